"""The results: tables for people, lines for grep, charts for the docs, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orderstream.bench.chart import Bar, svg
from orderstream.bench.measure import Run, Summary, summarize
from orderstream.bench.scenarios import Scenario
from orderstream.bench.stages import STAGES

COSTS = ("worker", "ingress", "kafka", "postgres", "redis", "bench")
"""Processes whose CPU seconds the table shows; a peer's stand under ``worker``."""

OTHERS_SHARE_MAX = 0.1
"""What processes that have nothing to do with a run may take of the cores before the reader is warned."""

Results = Mapping[str, Sequence[Run]]


def summaries(scenario: Scenario, runs: Sequence[Run]) -> dict[str, Summary]:
    """Return each figure of a scenario over its good runs; without one, nothing."""
    names = dict.fromkeys(name for run in runs for name in run.figures)
    values = {name: [run.figures[name] for run in runs if not run.faults and name in run.figures] for name in names}
    return {name: summarize(found) for name, found in values.items() if found}


def lines(scenario: Scenario, runs: Sequence[Run]) -> list[str]:
    """Return the sentences of a scenario, one a figure; the figure that the project is judged by comes last."""
    found = summaries(scenario, runs)
    sentences = []
    for figure in scenario.figures:
        names = (figure.name, *figure.more)
        if all(name in found for name in names):
            sentences.append(figure.filled([found[name].median for name in names], found[figure.name].runs))
    failed = sum(bool(run.faults) for run in runs)
    return [*sentences, *([f"{scenario.name}: {failed} of {len(runs)} runs gave NO RESULT"] if failed else [])]


def run_line(scenario: Scenario, number: int, run: Run) -> str:
    """Return one line about one run."""
    shown = ", ".join(
        f"{figure.name} {run.figures[figure.name]:,.{figure.digits}f}"
        for figure in reversed(scenario.figures)
        if figure.name in run.figures
    )
    notes = [f"  {note}" for note in run.notes]
    neighbours = f", other processes used {run.usage.others_s:.1f} CPU s of {run.usage.seconds:.1f} s"
    first = f"{scenario.name}, run {number}: {shown}{neighbours}"
    return "\n".join([first, *notes, *(f"  NO RESULT: {fault}" for fault in run.faults)])


def disturbed(runs: Sequence[Run], cores: int) -> str | None:
    """Say how much others took of the cores, where that makes figures doubtful."""
    shares = [max(_others_share(part, cores) for part in (run.parts or {"": run}).values()) for run in runs]
    loud = [share for share in shares if share > OTHERS_SHARE_MAX]
    if not loud:
        return None
    return (
        f"disturbed: in {len(loud)} of {len(runs)} runs other processes took up to {max(loud):.0%} of the cores; "
        "these figures say as much about them"
    )


def _others_share(run: Run, cores: int) -> float:
    return (run.usage.others_s + run.usage.stolen_s) / (run.usage.seconds * cores) if run.usage.seconds else 0.0


def tables(console: Console, scenarios: Sequence[Scenario], results: Results) -> None:
    """Print what was measured, and what it cost."""
    figures = Table("scenario", "figure", title="figures", title_justify="left")
    costs = Table("scenario", title="CPU seconds per 10,000 orders, worker memory (medians)", title_justify="left")
    for head in ("min", "median", "max", "runs"):
        figures.add_column(head, justify="right")
    for head in (COSTS[0], "its main thread", *COSTS[1:], "others", "RSS MiB", "peak MiB"):
        costs.add_column(head, justify="right")
    for scenario in scenarios:
        digits_of = {name: figure.digits for figure in scenario.figures for name in (figure.name, *figure.more)}
        for name, summary in summaries(scenario, results.get(scenario.name, ())).items():
            digits = digits_of.get(name, 2 if name.endswith("_s") and "_per_" not in name else 0)
            numbers = (f"{value:,.{digits}f}" for value in summary[:3])
            figures.add_row(scenario.name, name, *numbers, str(summary.runs))
    measured = list(_measured(scenarios, results))
    for name, runs in measured:
        costs.add_row(name, *(f"{value:.2f}" for value in _costs(runs)), *_memory(runs))
    if figures.row_count:
        console.print(figures, costs)
        stages = _stages(measured)
        if stages.row_count:
            console.print(stages)


def _measured(scenarios: Sequence[Scenario], results: Results) -> Iterator[tuple[str, list[Run]]]:
    """Yield what ran with its good runs: a scenario, or each of the parts that it consists of."""
    for scenario in scenarios:
        good = [run for run in results.get(scenario.name, ()) if not run.faults]
        parts = dict.fromkeys(name for run in good for name in run.parts)
        for name in parts:
            yield f"{scenario.name}: {name}", [run.parts[name] for run in good if name in run.parts]
        if good and not parts:
            yield scenario.name, good


def _stages(measured: Sequence[tuple[str, Sequence[Run]]]) -> Table:
    table = Table("scenario", "stage", title="stages of the worker (medians)", title_justify="left")
    for head in ("batches", "records a batch", "ms a batch", "busy"):
        table.add_column(head, justify="right")
    table.add_column("of these ms")
    for what, runs in measured:
        good = [run.detail.get("stages", {}) for run in runs]
        for stage in STAGES:
            found = [stages[stage] for stages in good if stage in stages]
            if found:
                names = ("batches", "records_per_batch", "seconds_per_batch", "busy_share")
                batches, records, seconds, busy = (summarize([one[name] for one in found]).median for name in names)
                steps = {k: summarize([one["steps"].get(k, 0.0) for one in found]).median for k in found[0]["steps"]}
                of_these = ", ".join(f"{step} {spent * 1000:.1f}" for step, spent in steps.items())
                row = (f"{batches:.0f}", f"{records:.0f}", f"{seconds * 1000:.1f}", f"{busy:.0%}", of_these)
                table.add_row(what, stage, *row)
    return table


def _costs(runs: Sequence[Run]) -> list[float]:
    def median(values: list[float]) -> float:
        return summarize(values).median

    per = [10_000 / run.detail["orders"] for run in runs]
    spent = [median([_spent(run, name) * scale for run, scale in zip(runs, per, strict=True)]) for name in COSTS]
    main_thread = median([run.detail["worker_main_thread_s"] * scale for run, scale in zip(runs, per, strict=True)])
    return [
        spent[0],
        main_thread,
        *spent[1:],
        median([run.usage.others_s * scale for run, scale in zip(runs, per, strict=True)]),
    ]


def _spent(run: Run, process: str) -> float:
    """Return CPU seconds; those of ``worker`` are of all workers, or of what stood in their place."""
    return sum(spent for name, spent in run.usage.cpu_s.items() if name.partition("-")[0] == process)


def _memory(runs: Sequence[Run]) -> list[str]:
    names = ("worker_rss_bytes", "worker_rss_max_bytes")
    return [f"{summarize([run.detail[name] for run in runs]).median / 2**20:.0f}" for name in names]


def write_json(file: Path, about: Mapping[str, Any], scenarios: Sequence[Scenario], results: Results) -> None:
    """Write everything that was measured."""
    measured = {
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
    file.write_text(json.dumps({**about, "scenarios": measured}, indent=2) + "\n")


def write_chart(folder: Path, about: Mapping[str, Any], scenario: Scenario, runs: Sequence[Run]) -> Path | None:
    """Draw a scenario's figures; return the file, or None when there is nothing to draw."""
    found = summaries(scenario, runs)
    bars = [Bar(label, found[name]) for label, name in scenario.bars if name in found]
    if not bars:
        return None
    machine = about.get("machine", {})
    captions = [
        scenario.about,
        f"runs: {bars[0].summary.runs}; {machine.get('cpu', '')}, cores: {machine.get('cores', '?')}; "
        f"{about.get('at', '')}; {about.get('commit', '')}",
    ]
    if (warning := disturbed(runs, int(machine.get("cores", 1)))) is not None:
        captions.append(warning)
    file = folder / f"{scenario.name}.svg"
    file.write_text(svg(scenario.name, scenario.unit, bars, captions))
    return file
