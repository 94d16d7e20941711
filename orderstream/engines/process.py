"""Processes and ports of this machine."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orderstream.errors import EngineMissing

Say = Callable[[str], None]

START_TIMEOUT_S = 120.0  # a broker that recovers its logs after a kill, on a busy machine

STOP_TIMEOUT_S = 30.0  # then SIGKILL

DEATH_TIMEOUT_S = 10.0  # after SIGKILL

POLL_S = 0.05

LOG_BYTES_MAX = 10_000_000  # a longer log is put aside at the next start; one old log is kept

TAIL_LINES = 15


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
        proc = Path("/proc", str(pid))
        if not sys.platform.startswith("linux"):
            shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
            return cls(pid, shown.stdout.strip()) if shown.stdout.strip() else None
        try:
            fields = (proc / "stat").read_text().rpartition(")")[2].split()
            threads = len(list((proc / "task").iterdir()))
        except (FileNotFoundError, ProcessLookupError):
            return None
        # Fields 3 (state) and 22 (start, in clock ticks after boot) of proc(5); the name before them may hold anything.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Where the first thread has ended and others haven't yet, the process still holds its files and ports.
        ended = fields[0] in "ZX" and threads <= 1
        return None if ended else cls(pid, f"{boot}/{fields[19]}")

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
                return  # it ended between the look and the signal: what the signal was for

    def children(self) -> list[Process]:
        """Return the direct children; empty where there is no /proc."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(entry.read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            child = Process.of(int(entry.parent.name)) if parent == self.pid else None
            found += [child] if child else []
        return found

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
    """Return a loopback port that nobody listens on.

    Raises:
        EngineMissing: no free port was found in :data:`PORTS`.
    """
    taken = set(taken)
    for port in random.sample(PORTS, k=200):
        if port not in taken and port_free(port):
            return port
    raise EngineMissing(f"no free loopback port between {PORTS.start} and {PORTS.stop - 1} for a local engine")


def tail(*logs: Path) -> str:
    """Return the last lines of the logs, for an error message."""
    parts = []
    for log in logs:
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        parts += [f"  last lines of {log}:", *(f"    {line}" for line in lines[-TAIL_LINES:])] if lines else []
    return "\n".join(parts) or f"  nothing was written to {', '.join(map(str, logs))}"


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file in one step: who reads it meanwhile sees the old or the new one."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(file)
