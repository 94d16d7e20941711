"""What can be measured: each scenario with its name, what it does, and the sentences for its figures.

A new one is written as a function from :class:`~orderstream.bench.pipeline.Bench`, a number of orders and a seed to a
:class:`~orderstream.bench.measure.Run`, and listed in ``_LISTED``; tables, lines, charts and JSON follow from its
:class:`Figure` s.  A run that compares several things has one part for each.
"""

from __future__ import annotations

import asyncio
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from orderstream.bench import grown, soak
from orderstream.bench.compare import ORDERS_MAX, ROW_LOCKS, WORKFLOWS, peer_run, workflows_installed
from orderstream.bench.floor import Floor
from orderstream.bench.kafka_streams import AT_LEAST_ONCE, EXACTLY_ONCE, missing, streams_run
from orderstream.bench.load import Load, catalogue
from orderstream.bench.machine import machine
from orderstream.bench.measure import WARM_UP_ORDERS, Demand, Run, measure, together
from orderstream.bench.open_loop import PERCENTS, RATES, STATUSES, WAYS, figure_name, latency
from orderstream.bench.pipeline import Bench, unwatched
from orderstream.bench.rates import CELLS, PARTITIONS, PROCESSES, cost_name, latency_name, rates
from orderstream.bench.rates import RATES as RATES_OF_CELLS
from orderstream.bench.replay import replay, sold_before
from orderstream.engines.programs import Programs
from orderstream.errors import OrderstreamError
from orderstream.streams.orders import Reason, Status

ALL = "all"
PRODUCTS = 100
LINES_MAX = 5
FLASH_UNITS = 1_000
WORKERS = (1, 2, 4)
SPREAD, HOT = Load(catalogue(PRODUCTS)), Load(catalogue(1))

Measure = Callable[..., Run]
"""Called with the bench, orders and a seed."""
T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """One figure of a scenario, or several in one sentence.

    Attributes:
        name: as runs have it.
        sentence: for people and grep, ``{}`` for the number; one more for each of ``more``.
        digits: after the point.
        more: further figures in the same sentence.
        bare: shown without the number of runs behind it.
    """

    name: str
    sentence: str
    digits: int = 0
    more: tuple[str, ...] = ()
    bare: bool = False

    def filled(self, values: Sequence[float], runs: int) -> str:
        """Return the line for people and for grep; ``values`` are those of ``name`` and ``more``."""
        text = self.sentence.format(*(f"{value:.{self.digits}f}" for value in values))
        return text if self.bare else f"{text} (median of {runs})"


@dataclass(frozen=True)
class Scenario:
    """Something to measure.

    Attributes:
        name: on the command line.
        about: what it does.
        measure: makes one run.
        figures: as they are shown, the one that matters most last.
        bars: of its chart, each a label and a figure of the unit ``unit``.
        unit: of the chart.
        orders: of one run, by default.
        shared: makes what all runs share, and removes it after the last; called with the orders of one run.
        cells: names of its parts that can be measured alone: ``measure`` takes some of them as ``cells``.
    """

    name: str
    about: str
    measure: Measure
    figures: tuple[Figure, ...]
    bars: tuple[tuple[str, str], ...] = ()
    unit: str = "orders/s"
    orders: int = 50_000
    shared: Callable[[Bench, int], AbstractContextManager[Bench]] = lambda bench, _: nullcontext(bench)
    cells: Sequence[str] = ()


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


def _in_turn(seed: str, measures: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Measure one after the other, every other run backwards: a later one finds the broker warmer.

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
    """The pipeline, Kafka Streams, row locks and durable workflows, the same orders."""
    quiet = replace(bench, profile=unwatched)
    parts = {"pipeline": lambda: pipeline_run(bench, SPREAD, orders, seed)}
    absent = missing(Programs())
    if not absent:
        parts["kafka_streams"] = lambda: streams_run(quiet, AT_LEAST_ONCE, SPREAD, orders, seed)
        parts["kafka_streams_exactly_once"] = lambda: streams_run(quiet, EXACTLY_ONCE, SPREAD, orders, seed)
    parts |= {
        "row_locks": lambda: peer_run(quiet, ROW_LOCKS, SPREAD, orders, seed),
        "pipeline_hot": lambda: pipeline_run(quiet, HOT, orders, seed),
        "row_locks_hot": lambda: peer_run(quiet, ROW_LOCKS, HOT, orders, seed),
    }
    notes = (
        [f"no Java compiler or no Maven, so there is no Kafka Streams: apt-get install {' '.join(absent)}"]
        if absent
        else []
    )
    notes += [f"{peer} sold {most:,} orders of them" for peer, most in ORDERS_MAX.items() if most < orders]
    if workflows_installed():
        parts["workflows"] = lambda: peer_run(quiet, WORKFLOWS, SPREAD, orders, seed)
    else:
        notes.append("DBOS is not installed, so there are no durable workflows: pip install -r requirements-bench.lock")
    ratios = {
        "vs_workflows": ("pipeline", "workflows"),
        "vs_row_locks_hot": ("pipeline_hot", "row_locks_hot"),
        "vs_row_locks": ("pipeline", "row_locks"),
        "vs_kafka_streams_exactly_once": ("pipeline", "kafka_streams_exactly_once"),
        "vs_kafka_streams": ("pipeline", "kafka_streams"),
    }
    return _compared(_in_turn(seed, parts), ratios, notes)


def _grown(bench: Bench, orders: int, seed: str) -> Run:
    """The same orders for a store that is empty and for one that has grown, over few products and over all of them."""
    size = grown.Size.of(orders)
    whole = catalogue(size.products)
    few, every = Load(grown.few(whole, PRODUCTS, seed)), Load(whole)

    def sold(loads: Mapping[str, Load], products: Sequence[str], history: int) -> dict[str, Run]:
        units = grown.units(orders + WARM_UP_ORDERS, len(loads), history, len(products))
        fill = partial(grown.fill, history=history, products=len(products)) if history else None
        with bench.pipeline(dict.fromkeys(products, units), fill=fill) as made:
            return {
                name: asyncio.run(
                    measure(
                        made, Demand(load, orders, {Status.CONFIRMED: orders}, load), f"{seed}/{len(load.products)}"
                    )
                )
                for name, load in loads.items()
            }

    stores = {
        "empty": lambda: sold({"empty": few}, few.products, 0),
        "empty_all": lambda: sold({"empty_all": every}, whole, 0),
        "grown": lambda: sold({"grown": few, "grown_all": every}, whole, size.history),
    }
    found = {name: run for runs in _in_turn(seed, stores).values() for name, run in runs.items()}
    parts = {name: found[name] for name in ("empty", "grown", "empty_all", "grown_all")}
    ratios = {"all_of_empty": ("grown_all", "empty_all"), "of_empty": ("grown", "empty")}
    return _compared(parts, ratios, [f"grown: {size.history:,} ended orders and {size.products:,} products were there"])


def _latency_figures() -> tuple[Figure, ...]:
    found = []
    for way in WAYS:
        for rate in RATES:
            for status in STATUSES:
                p50, *more = (figure_name(way, rate, status, percent) for percent in PERCENTS)
                sentence = f"latency at {rate} orders/s, {WAYS[way]} -> {status}: p50 {{}} ms, p95 {{}} ms, p99 {{}} ms"
                found.append(Figure(p50, sentence, 1, tuple(more)))
    return tuple(found)


def _rates_figures() -> tuple[Figure, ...]:
    found = []
    for cell, (rate, partitions) in CELLS.items():
        where = f"at {rate} orders/s, {partitions} partitions"
        for status in STATUSES:
            p50, *more = (latency_name(cell, status, percent) for percent in PERCENTS)
            found.append(
                Figure(p50, f"latency {where} -> {status}: p50 {{}} ms, p95 {{}} ms, p99 {{}} ms", 1, tuple(more))
            )
        costs = tuple(cost_name(cell, name) for name in PROCESSES)
        each = ", ".join(f"{name} {{}}" for name in PROCESSES)
        found.append(Figure(cost_name(cell, "all"), f"CPU time an order {where}: {{}} µs, {each}", more=costs))
    return tuple(found)


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
        "rates",
        "an open loop at " + ", ".join(map(str, RATES_OF_CELLS)) + " orders/s, each on "
        f"{', '.join(map(str, PARTITIONS))} partitions: what an order costs, and how long it takes",
        rates,
        _rates_figures(),
        tuple(
            (f"{rate}/s, {partitions} partitions", cost_name(cell, "all")) for cell, (rate, partitions) in CELLS.items()
        ),
        "µs of CPU time an order",
        cells=tuple(CELLS),
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
        f"orders of one product over {PRODUCTS} products, and the same by its chained pass alone",
        _floor,
        (
            Figure("pipeline_orders_per_s", f"pipeline over {PRODUCTS} products: {{}} orders/s"),
            Figure("floor_orders_per_s", f"floor over {PRODUCTS} products: {{}} orders/s"),
            Figure("of_the_floor", "throughput vs the floor: {} x", 2, bare=True),
        ),
        (("pipeline", "pipeline_orders_per_s"), ("floor: the pass alone", "floor_orders_per_s")),
    ),
    Scenario(
        "replay",
        f"`orderstream reconcile --from-beginning` over the records of orders of one product, over {PRODUCTS} products",
        replay,
        (
            Figure("records", "replay: {} records"),
            Figure("seconds", "replay, the whole command: {} s", 1),
            Figure("whole_records_per_s", "replay, the whole command: {} records/s"),
            Figure("peak_mib", "replay, peak memory: {} MiB"),
            Figure("records_per_s", "replay, reading and folding: {} records/s"),
        ),
        (("reading and folding", "records_per_s"), ("the whole command", "whole_records_per_s")),
        "records/s",
        200_000,
        partial(sold_before, Load(catalogue(PRODUCTS))),
    ),
    Scenario(
        "grown",
        f"orders of one product for an empty store, and for one with {grown.HISTORY:,} ended orders and "
        f"{grown.PRODUCTS:,} products",
        _grown,
        (
            Figure("empty_orders_per_s", f"empty store, over {PRODUCTS} products: {{}} orders/s"),
            Figure("grown_orders_per_s", f"grown store, over {PRODUCTS} of its products: {{}} orders/s"),
            Figure("empty_all_orders_per_s", "no orders yet, over all products: {} orders/s"),
            Figure("grown_all_orders_per_s", "grown store, over all products: {} orders/s"),
            Figure("all_of_empty", "grown store vs no orders yet, over all products: {} x", 2, bare=True),
            Figure("of_empty", f"grown store vs empty store, over {PRODUCTS} products: {{}} x", 2, bare=True),
        ),
        (
            (f"empty, {PRODUCTS} products", "empty_orders_per_s"),
            (f"grown, {PRODUCTS} products", "grown_orders_per_s"),
            ("no orders yet, all products", "empty_all_orders_per_s"),
            ("grown, all products", "grown_all_orders_per_s"),
        ),
    ),
    Scenario(
        "soak",
        f"one continued run over {PRODUCTS} products; read after a fifth of its orders, and after the last",
        partial(soak.soak, SPREAD),
        (
            *(Figure(f"section_{n}_orders_per_s", f"soak, fifth {n}: {{}} orders/s") for n in soak.FIFTHS),
            Figure("last_of_first", "soak, rate of the last fifth vs the first: {} x", 2),
            *(
                Figure(
                    f"{name}_fifth",
                    f"soak, {what}: {{}} after a fifth, {{}} after all orders",
                    0 if name == "dead_tuples" else 1,
                    more=(f"{name}_whole",),
                )
                for name, what in soak.READINGS.items()
            ),
            Figure("rss_growth", "soak, worker's memory after all orders vs after a fifth: {} x", 2),
        ),
        tuple((f"fifth {n}", f"section_{n}_orders_per_s") for n in soak.FIFTHS),
        orders=1_000_000,
    ),
    Scenario(
        "peers",
        "the pipeline; Kafka Streams from the same topic; asyncpg with row locks and DBOS workflows, both fed from memory, "
        "on the same tables",
        _peers,
        (
            Figure("pipeline_orders_per_s", f"pipeline over {PRODUCTS} products: {{}} orders/s"),
            Figure(
                "kafka_streams_orders_per_s",
                f"kafka streams over {PRODUCTS} products, at_least_once, orders stored: {{}} orders/s",
            ),
            Figure(
                "kafka_streams_exactly_once_orders_per_s",
                f"kafka streams over {PRODUCTS} products, exactly_once_v2, orders stored: {{}} orders/s",
            ),
            Figure("row_locks_orders_per_s", f"row locks over {PRODUCTS} products: {{}} orders/s"),
            Figure("workflows_orders_per_s", f"durable workflows over {PRODUCTS} products: {{}} orders/s"),
            Figure("pipeline_hot_orders_per_s", "pipeline over 1 hot product: {} orders/s"),
            Figure("row_locks_hot_orders_per_s", "row locks over 1 hot product: {} orders/s"),
            Figure("vs_workflows", "throughput vs durable workflows: {} x", 1, bare=True),
            Figure("vs_row_locks_hot", "throughput of 1 hot product vs row locks: {} x", 1, bare=True),
            Figure("vs_row_locks", "throughput vs row locks: {} x", 1, bare=True),
            Figure("vs_kafka_streams_exactly_once", "throughput vs kafka streams, exactly_once_v2: {} x", 2, bare=True),
            Figure("vs_kafka_streams", "throughput vs kafka streams: {} x", 2, bare=True),
        ),
        (
            (f"orderstream, {PRODUCTS} products", "pipeline_orders_per_s"),
            ("Kafka Streams, at_least_once", "kafka_streams_orders_per_s"),
            ("Kafka Streams, exactly_once_v2", "kafka_streams_exactly_once_orders_per_s"),
            (f"row locks, {PRODUCTS} products", "row_locks_orders_per_s"),
            (f"durable workflows, {PRODUCTS} products", "workflows_orders_per_s"),
            ("orderstream, 1 hot product", "pipeline_hot_orders_per_s"),
            ("row locks, 1 hot product", "row_locks_hot_orders_per_s"),
        ),
    ),
)

SCENARIOS: Mapping[str, Scenario] = {scenario.name: scenario for scenario in _LISTED}


def chosen(name: str) -> list[Scenario]:
    """Return the scenario of this name, or all of them; after a colon, which of its cells alone (``rates:500x*``).

    Raises:
        OrderstreamError: there is none; names those that there are.
    """
    if name == ALL:
        return list(_LISTED)
    name, _, pattern = name.partition(":")
    if name not in SCENARIOS:
        raise OrderstreamError(f"there is no scenario {name!r}: choose {', '.join(SCENARIOS)} or {ALL}")
    scenario = SCENARIOS[name]
    if not pattern:
        return [scenario]
    cells = fnmatch.filter(scenario.cells, pattern)
    if not cells:
        raise OrderstreamError(f"{name} has no part {pattern!r}: choose {', '.join(scenario.cells) or 'all of it'}")
    return [replace(scenario, measure=partial(scenario.measure, cells=cells), cells=cells)]
