"""Holds that expire while payments come in, and cancellations at every state of an order."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

import pytest

from tests.chaos.bank import Bank
from tests.chaos.scenario import Scenario
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]


async def test_holds_expire_while_payments_come_in(pipeline: Make, bank: Bank) -> None:
    bank.latency_s = 4.0
    shop = pipeline(payment_in_flight_max=5_000, hold_ttl_s=2.0, expiry_interval_s=0.2, partitions=4)
    scenario = Scenario(5_000, may_end=frozenset({"CANCELLED expired"}))
    await shop.start(scenario.products, workers=2)
    await scenario.flow(shop, over_s=8)
    outcome = await scenario.check(shop)
    assert outcome["CANCELLED expired"] > 500, outcome
    assert outcome["CONFIRMED"] > 500, outcome
    assert len(bank.voided & bank.charges.keys()) > 300, "hardly a charge came too late: the test shows nothing"


async def test_orders_are_cancelled_at_every_state(pipeline: Make, bank: Bank) -> None:
    bank.latency_s = 0.5
    shop = pipeline(partitions=4)
    scenario = Scenario(5_000)
    await shop.start(scenario.products, workers=2)
    draw = random.Random(1)
    at_state: Counter[str] = Counter()
    flowing = asyncio.create_task(scenario.flow(shop, over_s=8))
    pool = (await shop.store()).pool
    while not flowing.done():
        ids = draw.sample(scenario.ids(), 60)
        rows = await pool.fetch("SELECT status::text FROM orders WHERE order_id = ANY ($1::uuid[])", ids)
        at_state.update(row["status"] for row in rows)
        at_state["unknown"] += len(ids) - len(rows)
        fresh = await pool.fetch(
            "SELECT order_id::text, status::text FROM orders WHERE status IN ('CREATED', 'RESERVED', 'PAID') LIMIT 20"
        )
        at_state.update(row["status"] for row in fresh)
        await scenario.cancel(shop, [*ids, *(row["order_id"] for row in fresh)])
        await asyncio.sleep(0.1)
    await flowing
    outcome = await scenario.check(shop)
    assert {"unknown", "RESERVED", "CONFIRMED", "CANCELLED"} <= set(at_state), at_state
    assert outcome["CANCELLED cancelled_by_user"] > 300, outcome
    assert outcome["CONFIRMED"] > 300, outcome
    by_end = await pool.fetchrow(
        "SELECT count(*) FILTER (WHERE confirmed_at IS NOT NULL) AS confirmed,"
        " count(*) FILTER (WHERE paid_at IS NOT NULL AND confirmed_at IS NULL) AS paid,"
        " count(*) FILTER (WHERE paid_at IS NULL) AS unpaid FROM orders WHERE reason = 'cancelled_by_user'"
    )
    assert min(by_end["confirmed"], by_end["unpaid"]) > 100, dict(by_end)
    print(f"cancelled after they were {dict(by_end)}")
    print(f"cancelled at {dict(at_state)}")
