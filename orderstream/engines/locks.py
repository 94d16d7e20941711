"""A lock between processes of this machine."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orderstream.engines.process import POLL_S, START_TIMEOUT_S, Say
from orderstream.engines.programs import INSTALL_TIMEOUT_S
from orderstream.errors import EngineUnavailable

LOCK_TIMEOUT_S = INSTALL_TIMEOUT_S + START_TIMEOUT_S


@contextmanager
def file_lock(file: Path, say: Say) -> Iterator[None]:
    """Hold a lock between processes; it goes with the process that holds it.

    Raises:
        EngineUnavailable: another one has held it for :data:`LOCK_TIMEOUT_S`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    told = False
    with file.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise EngineUnavailable("the lock", str(file), f"held for {LOCK_TIMEOUT_S:.0f} s") from None
                if not told:
                    say(f"waiting for another command that holds {file}")
                    told = True
                time.sleep(POLL_S)
        yield
