"""Processes and ports of this machine."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orderstream.errors import EngineMissing

Say = Callable[[str], None]

START_TIMEOUT_S = 120.0  # a broker that recovers its logs after a kill, on a busy machine

STOP_TIMEOUT_S = 30.0  # then SIGKILL

DEATH_TIMEOUT_S = 10.0  # after SIGKILL

POLL_S = 0.05

LOG_BYTES_MAX = 10_000_000  # a longer log is put aside at the next start; one old log is kept

TAIL_LINES = 15

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux only

# Below the range that Linux (32768) and macOS (49152) hand out to clients: a client that keeps connecting to a stopped
# engine's port in that range can end up connected to itself, and then holds the port.
PORTS = range(20_000, 30_000)


@dataclass(frozen=True)
class Process:
    """A process that can't be confused with a later one of the same pid."""

    pid: int
    birth: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Return the process that has this pid now; None when none has, or when it only waits to be reaped."""
        try:
            process = psutil.Process(pid)
            # Where the first thread has ended and others haven't yet, the process still holds its files and ports.
            if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) and process.num_threads() <= 1:
                return None
            # Counted from the boot: the clock may be set while it runs.
            ticks = round((process.create_time() - psutil.boot_time()) * os.sysconf("SC_CLK_TCK"))
        except psutil.NoSuchProcess:
            return None
        return cls(pid, f"{BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ''}/{ticks}")

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return Process.of(self.pid) == self

    def send(self, signum: int) -> None:
        """Send a signal, unless the process has ended or its pid belongs to another one."""
        if self.alive:
            try:
                os.kill(self.pid, signum)
            except ProcessLookupError:
                return  # it ended between the check and the signal: what the signal was for

    def children(self) -> list[Process]:
        """Return the direct children; none when it has ended."""
        if not self.alive:
            return []
        try:
            found = [Process.of(child.pid) for child in psutil.Process(self.pid).children()]
        except psutil.NoSuchProcess:
            return []  # it ended in the meantime
        return [child for child in found if child]

    def wait(self, timeout_s: float) -> bool:
        """Wait until the process has ended; False when it still runs after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True


def port_free(port: int) -> bool:
    """Whether a server can listen on this loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port(taken: Iterable[int] = ()) -> int:
    """Return a loopback port that no process listens on.

    Raises:
        EngineMissing: no free port was found in :data:`PORTS`.
    """
    taken = set(taken)
    for port in random.sample(PORTS, k=200):
        if port not in taken and port_free(port):
            return port
    raise EngineMissing(f"no free loopback port between {PORTS.start} and {PORTS.stop - 1} for a local engine")


def mute(line: str) -> None:
    """Say nothing."""


def tail(*logs: Path, lines: int = TAIL_LINES) -> str:
    """Return the last lines of the logs, for an error message."""
    parts = []
    for log in logs:
        last = log.read_text(errors="replace").splitlines()[-lines:] if log.is_file() else []
        parts += [f"  last lines of {log}:", *(f"    {line}" for line in last)] if last else []
    return "\n".join(parts) or f"  nothing was written to {', '.join(map(str, logs))}"


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file in one step: a reader sees the old or the new one."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(file)
