"""What can be measured: each scenario with its name, what it does, and the sentences that tell its figures.

A new one is written as a function from :class:`~orderstream.bench.pipeline.Bench`, a number of orders and a seed to a
:class:`~orderstream.bench.measure.Run`, and listed in :data:`SCENARIOS`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orderstream.bench.load import Load, catalogue
from orderstream.bench.measure import WARM_UP_ORDERS, Demand, Run, measure
from orderstream.bench.pipeline import Bench
from orderstream.errors import OrderstreamError
from orderstream.streams.orders import Reason, Status

ALL = "all"
PRODUCTS = 100
LINES_MAX = 5
FLASH_UNITS = 1_000

Measure = Callable[[Bench, int, str], Run]


@dataclass(frozen=True)
class Figure:
    """One figure of a scenario: its name in a run, and how it is told, ``{}`` for the number."""

    name: str
    sentence: str
    digits: int = 0

    def tell(self, value: float, runs: int) -> str:
        """Return the line for people and for grep."""
        return f"{self.sentence.format(f'{value:.{self.digits}f}')} (median of {runs})"


@dataclass(frozen=True)
class Scenario:
    """Something to measure."""

    name: str
    about: str
    measure: Measure
    figures: tuple[Figure, ...]


def _sold(load: Load) -> Measure:
    """Orders for which there is stock: each must end CONFIRMED."""

    def run(bench: Bench, orders: int, seed: str) -> Run:
        demand = Demand(load, orders, {Status.CONFIRMED: orders}, warm_up=load)
        with bench.pipeline(dict.fromkeys(load.products, orders + WARM_UP_ORDERS)) as pipeline:
            return asyncio.run(measure(pipeline, demand, seed))

    return run


def _flash_sale(bench: Bench, orders: int, seed: str) -> Run:
    """Many orders for few units, all of one product: as many must end CONFIRMED as there are units."""
    flash, warm_up = Load(("flash",)), Load(("warm-up",))
    confirmed = min(orders, FLASH_UNITS)
    refused = {f"{Status.CANCELLED} {Reason.INSUFFICIENT_STOCK}": orders - confirmed} if orders > confirmed else {}
    demand = Demand(flash, orders, {Status.CONFIRMED: confirmed, **refused}, warm_up=warm_up)
    with bench.pipeline({"flash": FLASH_UNITS, "warm-up": WARM_UP_ORDERS}) as pipeline:
        return asyncio.run(measure(pipeline, demand, seed))


_LISTED = (
    Scenario(
        "throughput",
        f"orders of one product, over {PRODUCTS} products",
        _sold(Load(catalogue(PRODUCTS))),
        (
            Figure("steady_orders_per_s", f"steady rate over {PRODUCTS} products: {{}} orders/s"),
            Figure("orders_per_s", f"throughput over {PRODUCTS} products: {{}} orders/s"),
        ),
    ),
    Scenario(
        "hot",
        "orders of one product, all of the same",
        _sold(Load(catalogue(1))),
        (
            Figure("steady_orders_per_s", "steady rate over 1 hot product: {} orders/s"),
            Figure("orders_per_s", "throughput over 1 hot product: {} orders/s"),
        ),
    ),
    Scenario(
        "lines",
        f"orders of 1 to {LINES_MAX} products, over {PRODUCTS} products",
        _sold(Load(catalogue(PRODUCTS), 1, LINES_MAX)),
        (
            Figure("orders_per_s", f"throughput of orders of 1 to {LINES_MAX} products: {{}} orders/s"),
            Figure("lines_per_s", f"throughput of orders of 1 to {LINES_MAX} products: {{}} lines/s"),
        ),
    ),
    Scenario(
        "flash-sale",
        f"orders for one product with {FLASH_UNITS} units",
        _flash_sale,
        (
            Figure("last_verdict_s", f"flash-sale of {FLASH_UNITS} units: last verdict after {{}} s", digits=2),
            Figure("orders_per_s", f"flash-sale of {FLASH_UNITS} units: {{}} decisions/s"),
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
