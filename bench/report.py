"""The results: tables for people, lines for grep, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orderstream.bench.measure import Run, Summary, summarize
from orderstream.bench.scenarios import Scenario
from orderstream.bench.stages import STAGES

COSTS = ("worker", "kafka", "postgres", "redis", "bench")
"""Processes whose CPU seconds the table shows."""

Results = Mapping[str, Sequence[Run]]


def summaries(scenario: Scenario, runs: Sequence[Run]) -> dict[str, Summary]:
    """Return each figure of a scenario over its good runs; without one, nothing."""
    names = dict.fromkeys(name for run in runs for name in run.figures)
    values = {name: [run.figures[name] for run in runs if not run.faults and name in run.figures] for name in names}
    return {name: summarize(found) for name, found in values.items() if found}


def lines(scenario: Scenario, runs: Sequence[Run]) -> list[str]:
    """Return the sentences of a scenario, one a figure; the figure that the project is judged by comes last."""
    found = summaries(scenario, runs)
    told = [
        figure.tell(found[figure.name].median, found[figure.name].runs)
        for figure in scenario.figures
        if figure.name in found
    ]
    failed = sum(bool(run.faults) for run in runs)
    return [*told, *([f"{scenario.name}: {failed} of {len(runs)} runs gave NO RESULT"] if failed else [])]


def run_line(scenario: Scenario, number: int, run: Run) -> str:
    """Return one line about one run."""
    shown = ", ".join(
        f"{figure.name} {run.figures[figure.name]:,.{figure.digits}f}"
        for figure in reversed(scenario.figures)
        if figure.name in run.figures
    )
    neighbours = f", other processes used {run.usage.others_s:.1f} CPU s of {run.usage.seconds:.1f} s"
    told = f"{scenario.name}, run {number}: {shown}{neighbours}"
    return "\n".join([told, *(f"  NO RESULT: {fault}" for fault in run.faults)])


def tables(console: Console, scenarios: Sequence[Scenario], results: Results) -> None:
    """Print what was measured, and what it cost."""
    figures = Table("scenario", "figure", title="figures", title_justify="left")
    costs = Table("scenario", title="CPU seconds per 10,000 orders, worker memory (medians)", title_justify="left")
    for head in ("min", "median", "max", "runs"):
        figures.add_column(head, justify="right")
    for head in (COSTS[0], "its main thread", *COSTS[1:], "others", "RSS MiB", "peak MiB"):
        costs.add_column(head, justify="right")
    for scenario in scenarios:
        good = [run for run in results.get(scenario.name, ()) if not run.faults]
        for name, summary in summaries(scenario, good).items():
            digits = 2 if name.endswith("_s") and "_per_" not in name else 0
            numbers = (f"{value:,.{digits}f}" for value in summary[:3])
            figures.add_row(scenario.name, name, *numbers, str(summary.runs))
        if good:
            costs.add_row(scenario.name, *(f"{value:.2f}" for value in _costs(good)), *_memory(good))
    if figures.row_count:
        console.print(figures, costs, _stages(scenarios, results))


def _stages(scenarios: Sequence[Scenario], results: Results) -> Table:
    table = Table("scenario", "stage", title="stages of the worker (medians)", title_justify="left")
    for head in ("batches", "records a batch", "ms a batch", "busy"):
        table.add_column(head, justify="right")
    for scenario in scenarios:
        good = [run.detail.get("stages", {}) for run in results.get(scenario.name, ()) if not run.faults]
        for stage in STAGES:
            told = [stages[stage] for stages in good if stage in stages]
            if told:
                names = ("batches", "records_per_batch", "seconds_per_batch", "busy_share")
                batches, records, seconds, busy = (summarize([one[name] for one in told]).median for name in names)
                row = (f"{batches:.0f}", f"{records:.0f}", f"{seconds * 1000:.1f}", f"{busy:.0%}")
                table.add_row(scenario.name, stage, *row)
    return table


def _costs(runs: Sequence[Run]) -> list[float]:
    def median(values: list[float]) -> float:
        return summarize(values).median

    per = [10_000 / run.detail["orders"] for run in runs]
    spent = [
        median([run.usage.cpu_s.get(name, 0.0) * scale for run, scale in zip(runs, per, strict=True)]) for name in COSTS
    ]
    main_thread = median([run.detail["worker_main_thread_s"] * scale for run, scale in zip(runs, per, strict=True)])
    return [
        spent[0],
        main_thread,
        *spent[1:],
        median([run.usage.others_s * scale for run, scale in zip(runs, per, strict=True)]),
    ]


def _memory(runs: Sequence[Run]) -> list[str]:
    names = ("worker_rss_bytes", "worker_rss_max_bytes")
    return [f"{summarize([run.detail[name] for run in runs]).median / 2**20:.0f}" for name in names]


def write_json(file: Path, about: Mapping[str, Any], scenarios: Sequence[Scenario], results: Results) -> None:
    """Write everything that was measured."""
    told = {
        scenario.name: {
            "about": scenario.about,
            "figures": {
                name: summary._asdict() for name, summary in summaries(scenario, results[scenario.name]).items()
            },
            "runs": [asdict(run) for run in results[scenario.name]],
        }
        for scenario in scenarios
        if scenario.name in results
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**about, "scenarios": told}, indent=2) + "\n")
