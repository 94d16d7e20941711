"""What processes use, read from ``/proc`` (Linux; elsewhere nothing is known and nothing is said)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orderstream.engines.process import Process

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_BUSY = (0, 1, 2, 5, 6)  # user, nice, system, irq, softirq of proc_stat(5); idle and iowait are not work
_STEAL = 7


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process, its living children and those that it has buried; 0 when it has ended."""
    process = Process.of(pid)
    if process is None or not _PROC.is_dir():
        return 0.0
    return _ticks(pid, 4) + sum(_ticks(child.pid, 2) for child in process.children())


def main_thread_s(pid: int) -> float:
    """Return the CPU seconds of a process's main thread; in a worker, the one that the stages run in."""
    return _ticks(f"{pid}/task/{pid}", 2)


def _ticks(process: int | str, fields: int) -> float:
    """Return seconds of user and system (fields 14, 15), with four fields also those of buried children (16, 17)."""
    try:
        stat = (_PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0  # it ended between two looks
    return sum(map(int, stat[11 : 11 + fields])) / _TICKS_PER_S


def memory_bytes(pid: int) -> tuple[int, int]:
    """Return the resident memory of a process, now and at most so far, in bytes; zeros when it has ended."""
    try:
        status = (_PROC / str(pid) / "status").read_text()
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
        """Look at these processes; this one is ``bench``."""
        seen = {name: cpu_s(pid) if pid else 0.0 for name, pid in pids.items()}
        seen["bench"] = _ticks(os.getpid(), 2)
        machine = [0] * 8
        if (_PROC / "stat").is_file():
            machine = [int(field) for field in (_PROC / "stat").read_text().splitlines()[0].split()[1:9]]
        return cls(time.time(), seen, sum(machine[n] for n in _BUSY) / _TICKS_PER_S, machine[_STEAL] / _TICKS_PER_S)


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
