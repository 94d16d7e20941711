"""What an order costs, and how long it takes, at few orders a second and at many, on one partition and on many.

At a low rate a batch is an order or two, and each round trip, each look at a topic and each wake-up is paid by these.  So is
what the pipeline does when nothing comes: it is in the figures.  An order costs CPU time of the worker and of the engines;
what the bench takes, who sends the orders and reads their events, is left out, but not what it makes the engines do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from orderstream.bench.measure import Run, together
from orderstream.bench.open_loop import PERCENTS, STATUSES, figure_name, paced, warmed_up
from orderstream.bench.pipeline import Bench

RATES = (10, 100, 500, 1_000)
"""Orders a second."""

PARTITIONS = (1, 8, 48)

CELLS = {f"{rate}x{partitions}": (rate, partitions) for rate, partitions in product(RATES, PARTITIONS)}
"""What is measured: rate and partitions by name."""

PROCESSES = ("worker", "kafka", "postgres", "redis")
"""Of which CPU time is told; ``all`` of them together besides."""

WARM_UP_ORDERS_MAX = 10_000


def cost_name(cell: str, process: str) -> str:
    """Return the name of a figure: microseconds of CPU time an order."""
    return f"{cell}_{process}_us"


def latency_name(cell: str, status: str, percent: int) -> str:
    """Return the name of a figure: milliseconds."""
    return f"{cell}_{status.lower()}_p{percent}_ms"


def figures(cell: str, run: Run) -> dict[str, float]:
    """Return the figures of a cell; none where its run gave none."""
    if not run.figures:
        return {}
    rate, _ = CELLS[cell]
    spent = {name: run.usage.cpu_s.get(name, 0.0) * 1e6 / run.detail["orders"] for name in PROCESSES}
    found = {cost_name(cell, name): us for name, us in {**spent, "all": sum(spent.values())}.items()}
    for status, percent in product(STATUSES, PERCENTS):
        found[latency_name(cell, status, percent)] = run.figures[figure_name("kafka", rate, status, percent)]
    return found


def rates(bench: Bench, orders: int, seed: str, cells: Sequence[str] = tuple(CELLS)) -> Run:
    """Measure cells, each on a fresh pipeline, at most ``orders`` orders each."""
    parts = {"warm_up": warmed_up(bench, "kafka", min(orders, WARM_UP_ORDERS_MAX), seed)}
    for cell in cells:
        rate, partitions = CELLS[cell]
        parts[cell] = paced(bench, "kafka", rate, orders, f"{seed}/{cell}", partitions=partitions)
    found = {name: value for cell in cells for name, value in figures(cell, parts[cell]).items()}
    return together(parts, found)
