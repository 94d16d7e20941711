"""``orderstream bench``: measure scenarios, print what came out, say by the exit code whether every promise held."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from orderstream.bench import machine, report
from orderstream.bench.measure import Run
from orderstream.bench.pipeline import Profile, bench, unwatched
from orderstream.bench.scenarios import ALL, chosen
from orderstream.errors import OrderstreamError

ORDERS_MIN = 100
WIDTH = 120
RESULTS = "results"
"""Folder under the bench's own, which git does not see, for results that are not to be kept."""

WARM_UP, ENGINES_ORDERS = "throughput", 20_000
"""Scenario and orders of a first run, which is not counted: the engines are fresh, the broker's code not compiled yet."""


def main(
    scenario: str = ALL,
    orders: int | None = None,
    runs: int = 5,
    out: Path | None = None,
    profile: Profile = unwatched,
) -> int:
    """Run a scenario, or all of them, ``runs`` times each, every run on a fresh pipeline.

    Args:
        scenario: a name of :data:`orderstream.bench.scenarios.SCENARIOS`, or ``all``.
        orders: measured orders of one run, those of the warm-up not counted; None: as many as the scenario says.
        runs: of each scenario.
        out: folder for ``results.json`` and a chart a scenario; None: a new one under :data:`RESULTS`.
        profile: watches the worker while a run is measured; see :mod:`orderstream.bench.profiler`.

    Returns:
        The exit code: 1 when a run lost an order or broke a promise, and so gave no result.

    Raises:
        OrderstreamError: there is no such scenario, an engine can't be started, a worker ended.
    """
    if (orders is not None and orders < ORDERS_MIN) or runs < 1:
        raise OrderstreamError(f"measure at least {ORDERS_MIN} orders in at least 1 run")
    scenarios = chosen(scenario)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH  # a log is no terminal: its lines may be long
    results: dict[str, list[Run]] = {}

    def say(line: str) -> None:
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    with bench(say, profile) as ours:
        about: dict[str, Any] = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            "machine": machine.machine(),
            "versions": machine.versions(ours.engines),
            "settings": machine.settings_shown(ours.settings),
            "durability": machine.durability(ours.settings),
            "orders": {each.name: orders or each.orders for each in scenarios},
            "runs": runs,
        }
        folder = out or ours.folder / RESULTS / datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        folder.mkdir(parents=True, exist_ok=True)
        for part, value in about.items():
            shown = ", ".join(f"{name} {one}" for name, one in value.items()) if isinstance(value, dict) else value
            console.print(f"{part}: {shown}", markup=False, highlight=False, soft_wrap=True)
        say(f"warming the engines up, for a fresh broker is slow ({ENGINES_ORDERS:,} orders)")
        warm_up = chosen(WARM_UP)[0].measure(replace(ours, profile=unwatched), ENGINES_ORDERS, "engines")
        for fault in warm_up.faults:
            say(f"  the warm-up failed: {fault}")
        for each in scenarios:
            count = orders or each.orders
            say(f"{each.name}: {each.about}, {count:,} orders, {runs} runs")
            with each.shared(ours, count) as given:
                for number in range(1, runs + 1):
                    start = time.monotonic()
                    run = each.measure(given, count, f"{each.name}/{number}")
                    results.setdefault(each.name, []).append(run)
                    say(f"{report.run_line(each, number, run)} ({time.monotonic() - start:.0f} s in all)")
                    report.write_json(folder / "results.json", about, scenarios, results)
            report.write_chart(folder, about, each, results[each.name])
    say(f"all results, and a chart a scenario, are in {folder}")
    report.tables(console, scenarios, results)
    for each in scenarios:
        if (warning := report.disturbed(results[each.name], int(about["machine"]["cores"]))) is not None:
            print(f"{each.name}: {warning}")
        for line in report.lines(each, results[each.name]):
            print(line)
    return int(bool(warm_up.faults) or any(run.faults for found in results.values() for run in found))
