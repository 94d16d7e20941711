"""What processes use, as far as the system says it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from orderstream.engines.process import Process

_BUSY = ("user", "nice", "system", "irq", "softirq")  # of the machine's CPU times; idle and iowait are not work


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process, its living children and those that it has reaped; 0 when it has ended."""
    process = Process.of(pid)
    if process is None:
        return 0.0
    return _spent_s(pid, 4) + sum(_spent_s(child.pid) for child in process.children())


def _spent_s(pid: int, fields: int = 2) -> float:
    """Return the seconds of user and system, with four fields also those of reaped children."""
    try:
        return sum(psutil.Process(pid).cpu_times()[:fields])
    except psutil.NoSuchProcess:
        return 0.0  # it ended between two readings


def main_thread_s(pid: int) -> float:
    """Return the CPU seconds of a process's main thread; in a worker, the one that the stages run in."""
    try:
        threads = psutil.Process(pid).threads()
    except psutil.NoSuchProcess:
        return 0.0
    return sum(thread.user_time + thread.system_time for thread in threads if thread.id == pid)


def memory_bytes(pid: int) -> tuple[int, int]:
    """Return the resident memory of a process, now and at most so far, in bytes; zeros when it has ended, or not on Linux.

    Read here because psutil does not give the greatest (``VmHWM``).
    """
    try:
        status = Path("/proc", str(pid), "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    found = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    now, peak = (int(found[name].split()[0]) * 1024 if name in found else 0 for name in ("VmRSS", "VmHWM"))
    return now, peak


@dataclass(frozen=True)
class Snapshot:
    """CPU seconds so far: of each process by name, of the whole machine, and taken from it by its host."""

    at: float
    cpu_s: Mapping[str, float]
    machine_s: float
    stolen_s: float

    @classmethod
    def take(cls, pids: Mapping[str, int | None]) -> Snapshot:
        """Read those of these processes; this one is ``bench``."""
        seen = {name: cpu_s(pid) if pid else 0.0 for name, pid in pids.items()}
        seen["bench"] = _spent_s(os.getpid())
        machine = psutil.cpu_times()
        busy = sum(getattr(machine, name, 0.0) for name in _BUSY)
        return cls(time.time(), seen, machine_s=busy, stolen_s=getattr(machine, "steal", 0.0))


@dataclass(frozen=True)
class Usage:
    """What a run cost: CPU seconds by process, and what the rest of the machine did meanwhile.

    ``others_s`` is the work of processes that have nothing to do with the run: where it is more than a few per cent of
    ``seconds``, the run's figures say more about the neighbours than about the pipeline.
    """

    seconds: float
    cpu_s: Mapping[str, float]
    others_s: float
    stolen_s: float

    @classmethod
    def between(cls, before: Snapshot, after: Snapshot) -> Usage:
        """Subtract."""
        spent = {name: round(after.cpu_s[name] - before.cpu_s[name], 2) for name in after.cpu_s}
        others = after.machine_s - before.machine_s - sum(spent.values())
        return cls(
            round(after.at - before.at, 3),
            spent,
            round(max(0.0, others), 2),
            round(after.stolen_s - before.stolen_s, 2),
        )

    @classmethod
    def nothing(cls) -> Usage:
        """Return the usage of no time at all."""
        return cls(0.0, {}, 0.0, 0.0)

    @classmethod
    def total(cls, usages: Sequence[Usage]) -> Usage:
        """Add up."""
        names = dict.fromkeys(name for usage in usages for name in usage.cpu_s)
        return cls(
            round(sum(usage.seconds for usage in usages), 3),
            {name: round(sum(usage.cpu_s.get(name, 0.0) for usage in usages), 2) for name in names},
            round(sum(usage.others_s for usage in usages), 2),
            round(sum(usage.stolen_s for usage in usages), 2),
        )
