"""What can be measured: each scenario with its name, what it does, and the sentences that tell its figures.

A new one is written as a function from :class:`~orderstream.bench.pipeline.Bench`, a number of orders and a seed to a
:class:`~orderstream.bench.measure.Run`, and listed in ``_LISTED``; tables, lines, charts and JSON follow from its
:class:`Figure` s.  A run that compares several things has one part for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from orderstream.bench.compare import ORDERS_MAX, ROW_LOCKS, WORKFLOWS, peer_run, workflows_installed
from orderstream.bench.floor import Floor
from orderstream.bench.load import Load, catalogue
from orderstream.bench.machine import machine
from orderstream.bench.measure import WARM_UP_ORDERS, Demand, Run, measure, together
from orderstream.bench.open_loop import PERCENTS, RATES, STATUSES, WAYS, figure_name, latency
from orderstream.bench.pipeline import Bench, unwatched
from orderstream.errors import OrderstreamError
from orderstream.streams.orders import Reason, Status

ALL = "all"
PRODUCTS = 100
LINES_MAX = 5
FLASH_UNITS = 1_000
WORKERS = (1, 2, 4)
SPREAD, HOT = Load(catalogue(PRODUCTS)), Load(catalogue(1))

Measure = Callable[[Bench, int, str], Run]


@dataclass(frozen=True)
class Figure:
    """One figure of a scenario, or several that are told together.

    Attributes:
        name: as runs have it.
        sentence: how it is told, ``{}`` for the number; one more for each of ``more``.
        digits: after the point.
        more: further figures in the same sentence.
        bare: told without the number of runs behind it.
    """

    name: str
    sentence: str
    digits: int = 0
    more: tuple[str, ...] = ()
    bare: bool = False

    def tell(self, values: Sequence[float], runs: int) -> str:
        """Return the line for people and for grep; ``values`` are those of ``name`` and ``more``."""
        told = self.sentence.format(*(f"{value:.{self.digits}f}" for value in values))
        return told if self.bare else f"{told} (median of {runs})"


@dataclass(frozen=True)
class Scenario:
    """Something to measure.

    Attributes:
        name: on the command line.
        about: what it does.
        measure: makes one run.
        figures: as they are told, the one that matters most last.
        bars: of its chart, each a label and a figure of the unit ``unit``.
        unit: of the chart.
        orders: of one run, unless told otherwise.
    """

    name: str
    about: str
    measure: Measure
    figures: tuple[Figure, ...]
    bars: tuple[tuple[str, str], ...] = ()
    unit: str = "orders/s"
    orders: int = 50_000


def _sold(load: Load) -> Measure:
    """Orders for which there is stock: each must end CONFIRMED."""

    def run(bench: Bench, orders: int, seed: str) -> Run:
        return pipeline_run(bench, load, orders, seed)

    return run


def pipeline_run(bench: Bench, load: Load, orders: int, seed: str, **pipeline: Any) -> Run:
    """Measure a fresh pipeline; there is stock for each order, so each must end CONFIRMED.

    Args:
        bench: its engines.
        load: what is ordered.
        orders: that are measured.
        seed: of the draw.
        pipeline: how it is made otherwise than usual; see :meth:`orderstream.bench.pipeline.Bench.pipeline`.
    """
    demand = Demand(load, orders, {Status.CONFIRMED: orders}, warm_up=load)
    with bench.pipeline(dict.fromkeys(load.products, orders + WARM_UP_ORDERS), **pipeline) as made:
        return asyncio.run(measure(made, demand, seed))


def _flash_sale(bench: Bench, orders: int, seed: str) -> Run:
    """Many orders for few units, all of one product: as many must end CONFIRMED as there are units."""
    flash, warm_up = Load(("flash",)), Load(("warm-up",))
    confirmed = min(orders, FLASH_UNITS)
    refused = {f"{Status.CANCELLED} {Reason.INSUFFICIENT_STOCK}": orders - confirmed} if orders > confirmed else {}
    demand = Demand(flash, orders, {Status.CONFIRMED: confirmed, **refused}, warm_up=warm_up)
    with bench.pipeline({"flash": FLASH_UNITS, "warm-up": WARM_UP_ORDERS}) as pipeline:
        return asyncio.run(measure(pipeline, demand, seed))


def _compared(parts: Mapping[str, Run], ratios: Mapping[str, tuple[str, str]], notes: Sequence[str] = ()) -> Run:
    """Make one run of several, with the rate of each and ratios ``name: (part, by part)`` between them."""
    rates = {name: part.figures["orders_per_s"] for name, part in parts.items() if "orders_per_s" in part.figures}
    figures = {f"{name}_orders_per_s": rate for name, rate in rates.items()}
    figures |= {name: rates[one] / rates[by] for name, (one, by) in ratios.items() if one in rates and by in rates}
    return together(parts, figures, notes)


def _in_turn(seed: str, measures: Mapping[str, Callable[[], Run]]) -> dict[str, Run]:
    """Measure one after the other, every other run backwards: who comes later finds the broker warmer.

    The seed ends with the number of the run.
    """
    backwards = not int(seed.rpartition("/")[2]) % 2
    found = {name: measures[name]() for name in (reversed([*measures]) if backwards else measures)}
    return {name: found[name] for name in measures}


def _floor(bench: Bench, orders: int, seed: str) -> Run:
    """The pipeline and its floor, the same orders."""
    quiet = replace(bench, profile=unwatched)
    parts = {
        "pipeline": lambda: pipeline_run(bench, SPREAD, orders, seed),
        "floor": lambda: pipeline_run(quiet, SPREAD, orders, seed, worker=Floor),
    }
    return _compared(_in_turn(seed, parts), {"of_the_floor": ("pipeline", "floor")})


def _scale(bench: Bench, orders: int, seed: str) -> Run:
    """The same orders with more and more workers, as far as there are cores."""
    cores = int(machine()["cores"])
    parts = {
        f"workers_{workers}": partial(pipeline_run, bench, SPREAD, orders, seed, workers=workers)
        for workers in WORKERS
        if workers <= cores
    }
    return _compared(_in_turn(seed, parts), {f"scale_{n}": (f"workers_{n}", "workers_1") for n in WORKERS[1:]})


def _peers(bench: Bench, orders: int, seed: str) -> Run:
    """The pipeline, row locks and durable workflows, the same orders."""
    quiet = replace(bench, profile=unwatched)
    parts = {
        "pipeline": lambda: pipeline_run(bench, SPREAD, orders, seed),
        "row_locks": lambda: peer_run(quiet, ROW_LOCKS, SPREAD, orders, seed),
        "pipeline_hot": lambda: pipeline_run(quiet, HOT, orders, seed),
        "row_locks_hot": lambda: peer_run(quiet, ROW_LOCKS, HOT, orders, seed),
    }
    notes = [f"{peer} sold {most:,} orders of them" for peer, most in ORDERS_MAX.items() if most < orders]
    if workflows_installed():
        parts["workflows"] = lambda: peer_run(quiet, WORKFLOWS, SPREAD, orders, seed)
    else:
        notes.append("DBOS is not installed, so there are no durable workflows: pip install -r requirements-bench.lock")
    ratios = {
        "vs_workflows": ("pipeline", "workflows"),
        "vs_row_locks_hot": ("pipeline_hot", "row_locks_hot"),
        "vs_row_locks": ("pipeline", "row_locks"),
    }
    return _compared(_in_turn(seed, parts), ratios, notes)


def _latency_figures() -> tuple[Figure, ...]:
    told = []
    for way in WAYS:
        for rate in RATES:
            for status in STATUSES:
                p50, *more = (figure_name(way, rate, status, percent) for percent in PERCENTS)
                sentence = f"latency at {rate} orders/s, {WAYS[way]} -> {status}: p50 {{}} ms, p95 {{}} ms, p99 {{}} ms"
                told.append(Figure(p50, sentence, 1, tuple(more)))
    return tuple(told)


_LISTED = (
    Scenario(
        "throughput",
        f"orders of one product, over {PRODUCTS} products",
        _sold(SPREAD),
        (
            Figure("steady_orders_per_s", f"steady rate over {PRODUCTS} products: {{}} orders/s"),
            Figure("orders_per_s", f"throughput over {PRODUCTS} products: {{}} orders/s"),
        ),
        (("first record to last verdict", "orders_per_s"), ("steady", "steady_orders_per_s")),
    ),
    Scenario(
        "hot",
        "orders of one product, all of the same",
        _sold(HOT),
        (
            Figure("steady_orders_per_s", "steady rate over 1 hot product: {} orders/s"),
            Figure("orders_per_s", "throughput over 1 hot product: {} orders/s"),
        ),
        (("first record to last verdict", "orders_per_s"), ("steady", "steady_orders_per_s")),
    ),
    Scenario(
        "lines",
        f"orders of 1 to {LINES_MAX} products, over {PRODUCTS} products",
        _sold(Load(catalogue(PRODUCTS), 1, LINES_MAX)),
        (
            Figure("orders_per_s", f"throughput of orders of 1 to {LINES_MAX} products: {{}} orders/s"),
            Figure("lines_per_s", f"throughput of orders of 1 to {LINES_MAX} products: {{}} lines/s"),
        ),
        (("orders", "orders_per_s"), ("lines", "lines_per_s")),
        "a second",
    ),
    Scenario(
        "flash-sale",
        f"orders for one product with {FLASH_UNITS} units",
        _flash_sale,
        (
            Figure("last_verdict_s", f"flash-sale of {FLASH_UNITS} units: last verdict after {{}} s", digits=2),
            Figure("orders_per_s", f"flash-sale of {FLASH_UNITS} units: {{}} decisions/s"),
        ),
        (("decisions", "orders_per_s"),),
        "decisions/s",
        100_000,
    ),
    Scenario(
        "latency",
        f"an open loop at {', '.join(map(str, RATES))} orders/s, to the topic and through the ingress",
        latency,
        _latency_figures(),
        tuple(
            (f"{rate}/s, {WAYS[way]} -> {status}, p{percent}", figure_name(way, rate, status, percent))
            for way in WAYS
            for status in STATUSES
            for rate in RATES
            for percent in (50, 99)
        ),
        "ms",
    ),
    Scenario(
        "scale",
        f"orders of one product over {PRODUCTS} products, with {', '.join(map(str, WORKERS))} workers where there are cores",
        _scale,
        (
            *(Figure(f"workers_{n}_orders_per_s", f"throughput, workers {n}: {{}} orders/s") for n in WORKERS),
            *(Figure(f"scale_{n}", f"throughput, workers {n} vs 1: {{}} x", 2) for n in WORKERS[1:]),
        ),
        tuple((f"workers: {n}", f"workers_{n}_orders_per_s") for n in WORKERS),
    ),
    Scenario(
        "floor",
        f"orders of one product over {PRODUCTS} products, and the same by plain loops without Faust",
        _floor,
        (
            Figure("pipeline_orders_per_s", f"pipeline over {PRODUCTS} products: {{}} orders/s"),
            Figure("floor_orders_per_s", f"floor over {PRODUCTS} products: {{}} orders/s"),
            Figure("of_the_floor", "throughput vs the floor: {} x", 2, bare=True),
        ),
        (("pipeline", "pipeline_orders_per_s"), ("floor: no Faust", "floor_orders_per_s")),
    ),
    Scenario(
        "peers",
        "the pipeline; asyncpg with row locks and DBOS workflows, both fed from memory, on the same tables",
        _peers,
        (
            Figure("pipeline_orders_per_s", f"pipeline over {PRODUCTS} products: {{}} orders/s"),
            Figure("row_locks_orders_per_s", f"row locks over {PRODUCTS} products: {{}} orders/s"),
            Figure("workflows_orders_per_s", f"durable workflows over {PRODUCTS} products: {{}} orders/s"),
            Figure("pipeline_hot_orders_per_s", "pipeline over 1 hot product: {} orders/s"),
            Figure("row_locks_hot_orders_per_s", "row locks over 1 hot product: {} orders/s"),
            Figure("vs_workflows", "throughput vs durable workflows: {} x", 1, bare=True),
            Figure("vs_row_locks_hot", "throughput of 1 hot product vs row locks: {} x", 1, bare=True),
            Figure("vs_row_locks", "throughput vs row locks: {} x", 1, bare=True),
        ),
        (
            (f"orderstream, {PRODUCTS} products", "pipeline_orders_per_s"),
            (f"row locks, {PRODUCTS} products", "row_locks_orders_per_s"),
            (f"durable workflows, {PRODUCTS} products", "workflows_orders_per_s"),
            ("orderstream, 1 hot product", "pipeline_hot_orders_per_s"),
            ("row locks, 1 hot product", "row_locks_hot_orders_per_s"),
        ),
    ),
)

SCENARIOS: Mapping[str, Scenario] = {scenario.name: scenario for scenario in _LISTED}


def chosen(name: str) -> list[Scenario]:
    """Return the scenario of this name, or all of them.

    Raises:
        OrderstreamError: there is none; names those that there are.
    """
    if name == ALL:
        return list(_LISTED)
    if name not in SCENARIOS:
        raise OrderstreamError(f"there is no scenario {name!r}: choose {', '.join(SCENARIOS)} or {ALL}")
    return [SCENARIOS[name]]
