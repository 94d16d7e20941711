"""Workers that join, leave and die while orders flow."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from orderstream.streams.topics import ORDERS
from tests.chaos.bank import Bank
from tests.chaos.progress import Progress
from tests.chaos.scenario import Scenario
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]

SESSION_S = 4.0
STANDSTILL_MAX_S = SESSION_S + 15.0
LEAVE_MAX_S = 10.0


async def test_workers_join_leave_die_and_freeze_while_orders_flow(pipeline: Make) -> None:
    shop = pipeline(session_timeout_s=SESSION_S, partitions=4)
    scenario = Scenario(8_000)
    await shop.start(scenario.products)
    first = shop.workers[0]
    async with Progress(shop) as progress:
        flowing = asyncio.create_task(scenario.flow(shop, over_s=28))
        await asyncio.sleep(2)
        second = shop.add_worker()
        await shop.settled(2)
        await asyncio.sleep(4)
        assert await asyncio.to_thread(first.stop, LEAVE_MAX_S) == 0
        third = shop.add_worker()
        await shop.settled(2)
        await asyncio.sleep(4)
        second.kill()
        shop.add_worker()
        await asyncio.sleep(1)
        third.process.send_signal(signal.SIGSTOP)  # when it continues, it does not know that it has lost its partitions
        await asyncio.sleep(SESSION_S + 3)
        third.process.send_signal(signal.SIGCONT)
        await flowing
        await scenario.check(shop)
    print(f"longest standstill {progress.longest_s:.1f} s, on {progress.where}")
    assert progress.longest_s <= STANDSTILL_MAX_S, progress.where


async def test_a_worker_that_leaves_commits_what_is_over_and_nothing_else(pipeline: Make) -> None:
    shop = pipeline(partitions=4)
    scenario = Scenario(30_000)
    await shop.start(scenario.products)
    await shop.produce(scenario.orders)
    await shop.eventually("SELECT count(*) > 7000 FROM orders WHERE status IN ('CONFIRMED', 'CANCELLED')", True)
    began = time.monotonic()
    assert await asyncio.to_thread(shop.workers[0].stop, LEAVE_MAX_S) == 0
    print(f"left after {time.monotonic() - began:.1f} s")

    pool = (await shop.store()).pool
    taken: int = await pool.fetchval("SELECT count(*) FROM orders")
    assert taken < 30_000, "it left when all was done: the test shows nothing"
    admin = AIOKafkaAdminClient(bootstrap_servers=shop.settings.kafka)
    await admin.start()
    try:
        committed = await admin.list_consumer_group_offsets(shop.settings.app_id)
    finally:
        await admin.close()
    done = [committed.get(TopicPartition(shop.settings.topic(ORDERS.name), n)) for n in range(4)]
    offsets = [0 if place is None else place.offset for place in done]
    assert sum(offsets) > 0, "nothing of what was over is committed"
    left = await pool.fetchval(
        "SELECT count(*) FROM orders o JOIN unnest($1::int[]) WITH ORDINALITY t (done, n) ON o.home = t.n - 1"
        " WHERE o.source_offset < t.done AND o.status NOT IN ('CONFIRMED', 'CANCELLED')"
        " AND NOT EXISTS (SELECT FROM waiting w WHERE w.order_id = o.order_id)",
        offsets,
    )
    assert left == 0, "of a record that is committed, the order is neither over nor waits: nobody goes on with it"
    shop.add_worker()
    await scenario.check(shop)


async def test_workers_die_at_random_while_the_provider_does_its_worst(pipeline: Make, bank: Bank) -> None:
    bank.failing, bank.silent, bank.doubled, bank.latency_s = 0.2, 0.05, 0.1, 0.2
    shop = pipeline(payment_timeout_s=1.0, retry_wait_max_s=1.0, session_timeout_s=SESSION_S, partitions=4)
    scenario, draw = Scenario(1_600), random.Random(11)
    await shop.start(scenario.products, workers=0)
    async with shop.keep(2) as keeper:
        for n in range(8):
            orders = scenario.orders[n::8]
            await scenario.cancel(shop, scenario.ids(orders[:15]))  # they come before their orders
            await shop.produce(orders)
            await scenario.cancel(shop, scenario.ids(orders[15:40]))
            await asyncio.sleep(draw.uniform(0.5, 2.0))
            draw.choice(keeper.alive).kill()
        await scenario.check(shop)
    assert set(keeper.ended) == {-signal.SIGKILL}
