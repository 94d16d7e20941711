"""``orderstream bench``: measure scenarios, print what came out, say by the exit code whether every promise held."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from orderstream.bench import machine, report
from orderstream.bench.measure import Run
from orderstream.bench.pipeline import Profile, bench, unwatched
from orderstream.bench.scenarios import ALL, chosen
from orderstream.errors import OrderstreamError

ORDERS_MIN = 100
WIDTH = 120
WARM_UP, ENGINES_ORDERS = "throughput", 20_000
"""Scenario and orders of a first run, which is not counted: the engines are fresh, the broker's code not compiled yet."""


def main(
    scenario: str = ALL,
    orders: int = 50_000,
    runs: int = 5,
    json_file: Path | None = None,
    profile: Profile = unwatched,
) -> int:
    """Run a scenario, or all of them, ``runs`` times each, every run on a fresh pipeline.

    Args:
        scenario: a name of :data:`orderstream.bench.scenarios.SCENARIOS`, or ``all``.
        orders: measured orders of one run, those of the warm-up not counted.
        runs: of each scenario.
        json_file: where all results go, besides the tables.
        profile: watches the worker while a run is measured; see :mod:`orderstream.bench.profiler`.

    Returns:
        The exit code: 1 when a run lost an order or broke a promise, and so gave no result.

    Raises:
        OrderstreamError: there is no such scenario, an engine can't be started, a worker ended.
    """
    if orders < ORDERS_MIN or runs < 1:
        raise OrderstreamError(f"measure at least {ORDERS_MIN} orders in at least 1 run")
    scenarios = chosen(scenario)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH  # a log is no terminal: its lines may be long
    results: dict[str, list[Run]] = {}

    def say(line: str) -> None:
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    with bench(say, profile) as ours:
        about = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            "machine": machine.machine(),
            "versions": machine.versions(ours.engines),
            "settings": machine.settings_told(ours.settings),
            "durability": machine.durability(ours.settings),
            "orders": orders,
            "runs": runs,
        }
        for part, told in about.items():
            shown = ", ".join(f"{name} {value}" for name, value in told.items()) if isinstance(told, dict) else told
            console.print(f"{part}: {shown}", markup=False, highlight=False, soft_wrap=True)
        say(
            f"warming the engines up: a fresh broker is slow, and is to be nobody's first run ({ENGINES_ORDERS:,} orders)"
        )
        warm_up = chosen(WARM_UP)[0].measure(replace(ours, profile=unwatched), ENGINES_ORDERS, "engines")
        for fault in warm_up.faults:
            say(f"  the warm-up failed: {fault}")
        for each in scenarios:
            say(f"{each.name}: {each.about}, {orders:,} orders, {runs} runs")
            for number in range(1, runs + 1):
                start = time.monotonic()
                run = each.measure(ours, orders, f"{each.name}/{number}")
                results.setdefault(each.name, []).append(run)
                say(f"{report.run_line(each, number, run)} ({time.monotonic() - start:.0f} s in all)")
                if json_file is not None:
                    report.write_json(json_file, about, scenarios, results)
    if json_file is not None:
        say(f"all results are in {json_file}")
    report.tables(console, scenarios, results)
    for each in scenarios:
        for line in report.lines(each, results[each.name]):
            print(line)
    return int(bool(warm_up.faults) or any(run.faults for found in results.values() for run in found))
