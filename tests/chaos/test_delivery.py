"""Records that come twice, out of order, or all over again: nothing changes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from orderstream.streams.topics import ORDER_EVENTS, ORDERS
from tests.chaos.progress import drained, set_back
from tests.chaos.scenario import Scenario
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]

STATE = {
    "orders": "SELECT to_jsonb(o) - 'met_again_at' FROM orders o ORDER BY order_id",
    "holds": "SELECT * FROM holds ORDER BY order_id, product_id",
    "ledger": "SELECT * FROM ledger ORDER BY partition, lane, sequence, product_id, movement",
    "stock": "SELECT product_id, on_hand, reserved, initial, received, adjusted, sold FROM stock ORDER BY product_id",
}
"""All that Postgres knows, besides the versions of the counts, when orders were met again, and how far topics were read."""


async def state(shop: Pipeline) -> dict[str, Any]:
    """Return all that Postgres knows, and what was published about each order, repeats left out."""
    pool = (await shop.store()).pool
    found: dict[str, Any] = {name: [tuple(row) for row in await pool.fetch(query)] for name, query in STATE.items()}
    published = [orjson.loads(record.value) for record in await shop.records(ORDER_EVENTS.name)]
    found["events"] = {
        (event["order_id"], event["status"]): {
            name: sorted(value, key=str) if isinstance(value, list) else value for name, value in event.items()
        }
        for event in published
    }
    return found


async def unchanged(shop: Pipeline, scenario: Scenario, before: dict[str, Any]) -> None:
    """Wait until all is read; check that nothing has changed and that every promise holds."""
    await drained(shop)
    await scenario.check(shop)
    after = await state(shop)
    for name, found in before.items():
        assert after[name] == found, f"{name} has changed"


async def test_every_record_twice_and_out_of_order(pipeline: Make) -> None:
    shop = pipeline(partitions=4)
    scenario = Scenario(5_000)
    await shop.start(scenario.products, workers=2)
    doubled = scenario.orders * 2
    random.Random(1).shuffle(doubled)
    await scenario.flow(shop, over_s=6, orders=doubled)
    await scenario.check(shop)
    await drained(shop)
    assert len(await shop.records(ORDERS.name)) == 10_000


async def test_the_whole_topic_again_and_then_from_the_beginning(pipeline: Make) -> None:
    shop = pipeline(partitions=4, session_timeout_s=3.0)
    scenario = Scenario(5_000)
    await shop.start(scenario.products)
    await shop.produce(scenario.orders)
    await scenario.check(shop)
    await drained(shop)
    before = await state(shop)

    await shop.produce(scenario.orders)
    await unchanged(shop, scenario, before)

    assert await asyncio.to_thread(shop.workers[0].stop) == 0
    await set_back(shop)
    shop.add_worker()
    await unchanged(shop, scenario, before)
    assert len(await shop.records(ORDERS.name)) == 10_000
