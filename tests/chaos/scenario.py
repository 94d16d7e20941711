"""What every chaos test runs, and what must hold after it: one list of orders, one judge."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiokafka.errors import KafkaError

from orderstream.jobs.verify import verify
from orderstream.settings import Settings
from orderstream.streams.producer import Outbox
from tests.chaos.auditor import Auditor
from tests.chaos.bank import Bank
from tests.harness import Pipeline

PLENTY, SCARCE = 40, 5
PLENTY_UNITS = 1_000_000
SCARCE_SHARE = 0.03
"""Units of each scarce product for each order: some of those who want one get none."""

SLICES_S = 0.1

Ends = frozenset[str]
"""The ways in which an order may end."""


@dataclass
class Scenario:
    """Seeded orders of one to four products, some of them scarce.

    The same seed gives the same orders with the same ids, so that two runs can be compared order by order.

    Attributes:
        number: of orders.
        seed: of the orders.
        may_end: other ways in which any of them may end, because the test lets them expire.
        cancelled: the orders that a customer may have cancelled.
    """

    number: int
    seed: int = 1
    may_end: Ends = frozenset()
    orders: list[dict[str, Any]] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)

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
        scarce = int(SCARCE_SHARE * self.number)
        return {f"p{n}": PLENTY_UNITS for n in range(PLENTY)} | {f"s{n}": scarce for n in range(SCARCE)}

    def ids(self, orders: Sequence[dict[str, Any]] | None = None) -> list[str]:
        """Return the ids of these orders, of all by default."""
        return [order["order_id"] for order in (self.orders if orders is None else orders)]

    def ends(self, order: dict[str, Any]) -> Ends:
        """Return how an order must end, whatever happens: one way, or more where that depends on who came first."""
        order_id = order["order_id"]
        ends = {"CANCELLED payment_declined" if Bank.declines(order_id) else "CONFIRMED"}
        if any(item["product_id"].startswith("s") for item in order["items"]):
            ends.add("CANCELLED insufficient_stock")
        if order_id in self.cancelled:
            ends.add("CANCELLED cancelled_by_user")  # it must, if the cancel is on the topic: the auditor knows
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

    async def cancel(self, shop: Pipeline, ids: Iterable[str]) -> None:
        """Cancel these orders, as a customer does who does not know their home."""
        outbox, ids = Outbox(shop.settings), list(ids)
        self.cancelled.update(ids)
        for order_id in ids:
            outbox.order_command(order_id, orjson.dumps({"command": "cancel", "order_id": order_id}))
        await (await shop.producer()).send(outbox.handovers())

    async def check(self, shop: Pipeline, *, timeout_s: float = 60.0) -> Counter[str]:
        """Wait until every order has ended and all has come to rest, then check every promise; return how they ended.

        Args:
            shop: the pipeline, with workers that run.
            timeout_s: until what follows the last end has come to rest: refunds, units given back, events, Redis.
        """
        await shop.finished(self.ids(), timeout_s=120.0)
        await audited(shop, timeout_s)
        ended = await shop.ended(self.ids())
        wrong = [
            f"{order['order_id']} is {how}, without the fault {' or '.join(sorted(must))}"
            for order in self.orders
            if (how := ended[order["order_id"]]) not in (must := self.ends(order))
        ]
        assert not wrong, f"{len(wrong)} orders:\n" + "\n".join(wrong[:20])
        return Counter(ended.values())


async def audited(shop: Pipeline, timeout_s: float = 60.0) -> Counter[str]:
    """Wait until the auditor finds nothing, and every promise of ``orderstream verify`` holds; return what it has seen.

    Args:
        shop: the pipeline, with workers that run.
        timeout_s: until all has come to rest.
    """
    auditor, deadline = Auditor(shop.settings, shop.products), time.monotonic() + timeout_s
    while faults := await auditor.differences() or await broken(shop.settings):
        assert time.monotonic() < deadline, f"{len(faults)} faults:\n" + "\n".join(faults[:20])
        await asyncio.sleep(0.5)
    return auditor.seen


async def broken(settings: Settings) -> list[str]:
    """Return the promises of ``orderstream verify`` that do not hold, without any grace."""
    report = await verify(settings, grace_s=0.0, settle_s=0.0)
    return [f"{check.promise}: {check.offenders[:5]}" for check in report.checks if check.offenders]
