"""What every chaos test runs and what must hold after it: one list of orders, one list of invariants."""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orderstream.agents.provider import Charge, SimulatedProvider, Verdict
from orderstream.settings import Settings
from tests.harness import Pipeline

PLENTY, SCARCE = 40, 5
SCARCE_UNITS = 150
SUCCESS_RATE = 0.8


@dataclass
class Scenario:
    """Seeded orders of one to four products, some of them scarce.

    The same seed gives the same orders with the same ids, so that two runs can be compared order by order.
    """

    number: int
    seed: int = 1
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
        return {f"p{n}": 1_000_000 for n in range(PLENTY)} | {f"s{n}": SCARCE_UNITS for n in range(SCARCE)}

    def ids(self, orders: Sequence[dict[str, Any]] | None = None) -> list[str]:
        """Return the ids of these orders, of all by default."""
        return [order["order_id"] for order in (self.orders if orders is None else orders)]

    def verdict(self, settings: Settings, order: dict[str, Any]) -> str | None:
        """Return how an order must end, whatever happens; None where that depends on who came first."""
        if any(item["product_id"].startswith("s") for item in order["items"]):
            return None
        provider = SimulatedProvider(
            success_rate=settings.payment_success_rate, latency_min_s=0, latency_max_s=0, seed=settings.payment_seed
        )
        answer = provider.charge(Charge(order["order_id"], order["user_id"], order["payment_method"], 1))
        assert isinstance(answer, Verdict)
        return "CONFIRMED" if answer.charge_id else "CANCELLED payment_declined"

    async def check(self, shop: Pipeline, orders: Sequence[dict[str, Any]] | None = None) -> Counter[str]:
        """Wait until every order has ended, then check every promise; return how the orders ended."""
        orders = self.orders if orders is None else orders
        ids = self.ids(orders)
        outcome = await shop.finished(ids)
        assert await shop.violations() == []
        rows = await (await shop.store()).pool.fetch(
            "SELECT order_id::text, status::text || coalesce(' ' || reason::text, '') AS ended FROM orders"
        )
        ended = {row["order_id"]: row["ended"] for row in rows}
        wrong = {
            order["order_id"]: (ended[order["order_id"]], must)
            for order in orders
            if (must := self.verdict(shop.settings, order)) is not None and ended[order["order_id"]] != must
        }
        assert wrong == {}, f"{len(wrong)} orders ended in another way than without the fault"
        assert await shop.violations() == []
        charges, confirmed = await shop.charges()
        assert charges == confirmed == outcome["CONFIRMED"]
        told = await shop.told(ids)
        for order_id in ids:
            ends = [status for status in told[order_id] if status in ("CONFIRMED", "CANCELLED")]
            assert ends == [ended[order_id].split()[0]], f"{order_id} {ended[order_id]}: {told[order_id]}"
            if ends == ["CONFIRMED"]:
                assert sorted(told[order_id]) == ["CONFIRMED", "CREATED", "PAID", "RESERVED"], told[order_id]
        return outcome
