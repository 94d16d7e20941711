"""What every chaos test runs and what must hold after it: one list of orders, one list of invariants."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aiokafka.errors import KafkaError

from orderstream.agents.provider import Charge, SimulatedProvider, Verdict
from orderstream.jobs.verify import verify
from orderstream.settings import Settings
from tests.harness import Pipeline

PLENTY, SCARCE = 40, 5
PLENTY_UNITS, SCARCE_UNITS = 1_000_000, 150
SUCCESS_RATE = 0.8
SLICES_S = 0.1

Ends = frozenset[str]
"""The ways in which an order may end."""

UNTROUBLED = {"CONFIRMED", "CANCELLED payment_declined", "CANCELLED insufficient_stock"}


@dataclass
class Scenario:
    """Seeded orders of one to four products, some of them scarce.

    The same seed gives the same orders with the same ids, so that two runs can be compared order by order.

    Attributes:
        number: of orders.
        seed: of the orders.
        may_end: other ways in which any of them may end, because the test cancels orders or lets them expire.
    """

    number: int
    seed: int = 1
    may_end: Ends = frozenset()
    orders: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        for _ in range(self.number):
            pool = [f"p{n}" for n in range(PLENTY)]
            if draw.random() < 0.3:
                pool += [f"s{n}" for n in range(SCARCE)] * 4
            products = dict.fromkeys(draw.choices(pool, k=draw.choice((1, 1, 1, 2, 3, 4))))
            order = Pipeline.order(*((product_id, draw.randint(1, 3)) for product_id in products))
            order["order_id"] = str(uuid.UUID(int=draw.getrandbits(128), version=4))
            self.orders.append(order)

    @property
    def products(self) -> dict[str, int]:
        """Return the units of each product."""
        return {f"p{n}": PLENTY_UNITS for n in range(PLENTY)} | {f"s{n}": SCARCE_UNITS for n in range(SCARCE)}

    def ids(self, orders: Sequence[dict[str, Any]] | None = None) -> list[str]:
        """Return the ids of these orders, of all by default."""
        return [order["order_id"] for order in (self.orders if orders is None else orders)]

    def ends(self, settings: Settings, order: dict[str, Any]) -> Ends:
        """Return how an order must end, whatever happens: one way, or two where that depends on who came first."""
        provider = SimulatedProvider(
            success_rate=settings.payment_success_rate, latency_min_s=0, latency_max_s=0, seed=settings.payment_seed
        )
        answer = provider.charge(Charge(order["order_id"], order["user_id"], order["payment_method"], 1))
        assert isinstance(answer, Verdict)
        ends = {"CONFIRMED" if answer.charge_id else "CANCELLED payment_declined"}
        if any(item["product_id"].startswith("s") for item in order["items"]):
            ends.add("CANCELLED insufficient_stock")
        return self.may_end | ends

    async def flow(self, shop: Pipeline, over_s: float, orders: Sequence[dict[str, Any]] | None = None) -> None:
        """Produce these orders, all by default, evenly over a time, in seconds; continue when Kafka is available again."""
        orders = self.orders if orders is None else orders
        began = time.monotonic()
        sent = 0
        while sent < len(orders):
            due = min(len(orders), int(len(orders) * (time.monotonic() - began + SLICES_S) / over_s) + 1)
            try:
                await shop.produce(orders[sent:due])
                sent = due
            except KafkaError:
                pass  # the slice is sent again, perhaps for the second time: the same orders
            await asyncio.sleep(SLICES_S)

    async def check(self, shop: Pipeline, orders: Sequence[dict[str, Any]] | None = None) -> Counter[str]:
        """Wait until every order has ended, then check every promise; return how the orders ended."""
        orders = self.orders if orders is None else orders
        ids = self.ids(orders)
        outcome = await shop.finished(ids)
        await settle(shop)
        rows = await (await shop.store()).pool.fetch(
            "SELECT order_id::text, status::text || coalesce(' ' || reason::text, '') AS ended FROM orders"
        )
        ended = {row["order_id"]: row["ended"] for row in rows}
        if not self.may_end and set(ended) == set(ids):
            assert set(outcome) <= UNTROUBLED
        wrong = {
            order["order_id"]: (ended[order["order_id"]], must)
            for order in orders
            if ended[order["order_id"]] not in (must := self.ends(shop.settings, order))
        }
        assert wrong == {}, f"{len(wrong)} orders ended in another way than without the fault"
        await self._check_sold(shop, orders, ended)
        await _check_charges(shop, outcome, ids)
        await _check_events(shop, ids, ended)
        return outcome

    async def _check_sold(self, shop: Pipeline, orders: Sequence[dict[str, Any]], ended: dict[str, str]) -> None:
        """Check that of each product as much is sold as these orders bought, when there are no others."""
        if set(ended) != set(self.ids(orders)):
            return
        must = dict.fromkeys(self.products, 0)
        for order in orders:
            if ended[order["order_id"]] == "CONFIRMED":
                for item in order["items"]:
                    must[item["product_id"]] += item["quantity"]
        rows = await (await shop.store()).products(None)
        assert {row["product_id"]: row["sold"] for row in rows} == must
        assert {row["product_id"]: row["reserved"] for row in rows} == dict.fromkeys(must, 0)


async def settle(shop: Pipeline, timeout_s: float = 30.0) -> None:
    """Wait until nothing is in flight any more; assert that then every promise holds, without any grace.

    The last thing that happens to an order, its units given back and Redis updated, comes a moment after its end.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        report = await verify(shop.settings, grace_s=0.0, settle_s=0.0)
        broken = [f"{check.promise}: {check.offenders[:5]}" for check in report.checks if check.offenders]
        if not broken:
            return
        assert time.monotonic() < deadline, broken
        await asyncio.sleep(0.3)


async def _check_charges(shop: Pipeline, outcome: Counter[str], ids: Sequence[str]) -> None:
    """Check that there are as many charges as confirmed orders, once every refund due is made."""
    await shop.eventually("SELECT count(*) FROM payments WHERE status = 'REFUND_DUE'", 0)
    row = await (await shop.store()).pool.fetchrow(
        "SELECT count(*) FILTER (WHERE p.status = 'SUCCESS') AS charges FROM payments p WHERE p.order_id = ANY ($1::uuid[])",
        list(ids),
    )
    assert row["charges"] == outcome["CONFIRMED"]


async def _check_events(shop: Pipeline, ids: Sequence[str], ended: dict[str, str]) -> None:
    """Check that each order's lifecycle is on the topic, with one end, as Postgres has it."""
    published = await shop.published(ids)
    for order_id in ids:
        ends = [status for status in published[order_id] if status in ("CONFIRMED", "CANCELLED")]
        if ended[order_id] == "CANCELLED cancelled_by_user" and ends[0] == "CONFIRMED":
            ends.remove("CONFIRMED")  # cancelled after it was confirmed, and published in this order
        assert ends == [ended[order_id].split()[0]], f"{order_id} {ended[order_id]}: {published[order_id]}"
        if ends == ["CONFIRMED"]:
            assert sorted(published[order_id]) == ["CONFIRMED", "CREATED", "PAID", "RESERVED"], published[order_id]
