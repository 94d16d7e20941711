"""A lock between processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from orderstream.engines.process import START_TIMEOUT_S, Say
from orderstream.engines.programs import INSTALL_TIMEOUT_S
from orderstream.errors import EngineUnavailable
from orderstream.settings import writable

LOCK_TIMEOUT_S = INSTALL_TIMEOUT_S + START_TIMEOUT_S


@contextmanager
def file_lock(file: Path, say: Say) -> Iterator[None]:
    """Hold a lock between processes; it ends with the process that holds it.

    Raises:
        EngineUnavailable: another one has held it for :data:`LOCK_TIMEOUT_S`.
        OrderstreamError: its folder can't be written to.
    """
    writable(file.parent)
    # Without flock no lock at all: one that its holder's end does not release would stop every later command.
    lock = FileLock(file, fallback_to_soft=False)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        say(f"waiting for another command that holds {file}")
        try:
            held = lock.acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout:
            raise EngineUnavailable("the lock", str(file), f"held for {LOCK_TIMEOUT_S:.0f} s") from None
    with held:
        yield
