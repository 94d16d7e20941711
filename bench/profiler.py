"""Where a worker spends its time: ``python -m orderstream.bench.profiler [SCENARIO] [--orders N]``.

Samples the worker from outside while a run is measured, with py-spy (a developer's tool, no dependency: ``pip install
py-spy``), and prints the functions of each thread by own time.  Only the thread that holds the interpreter's lock counts:
a thread that waits for it, or for the network, does not.  A C function, and the garbage collector, count for the Python
function that called it; with ``--native`` they count for themselves, at the price of a slower worker.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from orderstream.bench.run import main as measure
from orderstream.errors import OrderstreamError
from orderstream.settings import load

RATE_HZ = 250
STOP_S = 60.0


class Own(NamedTuple):
    """A function, how long it was on top of the stack (in seconds, as a share of its thread's), and how long on it."""

    function: str
    seconds: float
    share: float
    share_with_callees: float


def own_times(raw: str, rate_hz: int) -> dict[str, list[Own]]:
    """Add up py-spy's raw format (``thread;frame;…;frame count``): by thread, the functions by own time."""
    counted: dict[str, Counter[str]] = {}
    within: dict[str, Counter[str]] = {}
    for line in raw.splitlines():
        stack, _, samples = line.rpartition(" ")
        thread, *frames = stack.split(";")
        if frames:
            counted.setdefault(thread, Counter())[frames[-1]] += int(samples)
            within.setdefault(thread, Counter()).update(dict.fromkeys(set(frames), int(samples)))
    by_time = sorted(counted.items(), key=lambda item: -item[1].total())
    return {
        thread: [
            Own(name, n / rate_hz, n / functions.total(), within[thread][name] / functions.total())
            for name, n in functions.most_common()
        ]
        for thread, functions in by_time
    }


class Profiler:
    """Runs py-spy beside a worker."""

    def __init__(self, output: Path, *, rate_hz: int = RATE_HZ, native: bool = False) -> None:
        found = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
        if found is None:
            raise OrderstreamError("profiling needs py-spy: pip install py-spy")
        self.output = output
        self._command = [found, "record", "--format", "raw", "--threads", "--function", "--gil"]
        self._command += ["--native"] if native else []
        self._command += ["--rate", str(rate_hz), "--output", str(output)]

    @contextmanager
    def __call__(self, pid: int) -> Iterator[None]:
        """Sample the process of this pid.

        Raises:
            OrderstreamError: py-spy did not work; with what it said.
        """
        child = subprocess.Popen(
            [*self._command, "--pid", str(pid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield
        finally:
            child.send_signal(signal.SIGINT)  # it writes what it has, and leaves
            said, _ = child.communicate(timeout=STOP_S)
        if child.returncode or not self.output.is_file():
            raise OrderstreamError(f"py-spy ended with {child.returncode}: {said.strip()}")


def main() -> int:
    """Profile one run."""
    parser = argparse.ArgumentParser(prog="python -m orderstream.bench.profiler", description=__doc__)
    parser.add_argument("scenario", nargs="?", default="throughput", help="as of `orderstream bench`")
    parser.add_argument("--orders", type=int, default=20_000, help="measured orders (20000)")
    parser.add_argument("--top", type=int, default=25, help="functions of each thread (25)")
    parser.add_argument("--rate", type=int, default=RATE_HZ, help=f"samples a second ({RATE_HZ})")
    parser.add_argument("--native", action="store_true", help="tell C functions apart")
    parser.add_argument("--output", type=Path, help="py-spy's raw samples (.local/profile.raw)")
    given = parser.parse_args()
    output = given.output or load().local_dir / "profile.raw"
    output.parent.mkdir(parents=True, exist_ok=True)
    profiler = Profiler(output, rate_hz=given.rate, native=given.native)
    code = measure(given.scenario, given.orders, runs=1, profile=profiler)
    for thread, functions in own_times(output.read_text(), given.rate).items():
        print(f"\n{thread}: {sum(own.seconds for own in functions):.2f} s; own time, its share, share with callees")
        for own in functions[: given.top]:
            print(f"  {own.seconds:7.2f} s  {own.share:6.1%}  {own.share_with_callees:6.1%}  {own.function}")
    return code


if __name__ == "__main__":
    sys.exit(main())
