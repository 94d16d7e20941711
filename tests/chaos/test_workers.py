"""Workers that join, leave and die while orders flow."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from orderstream.agents.lifecycle import OpenOrder
from orderstream.streams.partitions import order_partition
from orderstream.streams.reservations import LineReserved
from orderstream.streams.topics import ORDERS, changelog_topic
from tests.chaos.progress import Progress
from tests.chaos.scenario import SUCCESS_RATE, Scenario
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]

SESSION_S = 4.0
STANDSTILL_MAX_S = SESSION_S + 15.0
LEAVE_MAX_S = 10.0


async def test_workers_join_leave_die_and_freeze_while_orders_flow(pipeline: Make) -> None:
    shop = pipeline(
        payment_success_rate=SUCCESS_RATE, payment_latency_max_s=0.05, session_timeout_s=SESSION_S, partitions=4
    )
    scenario = Scenario(8_000)
    await shop.start(scenario.products)
    first = shop.workers[0]
    async with Progress(shop) as progress:
        flowing = asyncio.create_task(scenario.flow(shop, over_s=28))
        await asyncio.sleep(2)
        second = shop.add_worker()
        await asyncio.sleep(8)
        assert await asyncio.to_thread(first.stop, LEAVE_MAX_S) == 0
        third = shop.add_worker()
        await asyncio.sleep(8)
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


async def test_a_worker_that_leaves_finishes_its_batches_and_commits(pipeline: Make) -> None:
    shop = pipeline(payment_success_rate=SUCCESS_RATE, partitions=4)
    scenario = Scenario(15_000)
    await shop.start(scenario.products)
    await shop.produce(scenario.orders)
    await shop.eventually("SELECT count(*) > 1000 FROM orders", True)
    began = time.monotonic()
    assert await asyncio.to_thread(shop.workers[0].stop, LEAVE_MAX_S) == 0
    print(f"left after {time.monotonic() - began:.1f} s")

    rows = await (await shop.store()).pool.fetch(
        "SELECT source_partition AS partition, max(source_offset) + 1 AS done FROM orders GROUP BY 1"
    )
    done = {TopicPartition(shop.settings.topic(ORDERS.name), row["partition"]): row["done"] for row in rows}
    admin = AIOKafkaAdminClient(bootstrap_servers=shop.settings.kafka)
    await admin.start()
    try:
        committed = await admin.list_consumer_group_offsets(shop.settings.app_id)
    finally:
        await admin.close()
    assert sum(done.values()) < 15_000, "it left when all was done: the test shows nothing"
    assert {tp: committed[tp].offset for tp in done} == done
    shop.add_worker()
    await scenario.check(shop)


async def test_what_a_former_owner_left_in_the_table_is_not_adopted(pipeline: Make) -> None:
    """A frozen worker may write its last entry after its successor has decided the order and removed it."""
    shop = pipeline(partitions=4, session_timeout_s=SESSION_S)
    await shop.start({"one": 100, "two": 100})
    orders = [shop.order(("one", 1), ("two", 1)) for _ in range(20)]
    ids = await shop.produce(orders)
    assert await shop.finished(ids) == {"CONFIRMED": 20}
    assert shop.workers[0].stop() == 0
    topic = changelog_topic(shop.settings.app_id, "open-orders")
    entries: dict[tuple[str, int], list[Any]] = {}
    for order_id in ids:
        partition = order_partition(order_id, 4)
        line = LineReserved(order_id, "one", 1, 100, None, 2, "user-1", "card", None, False)
        entry = orjson.dumps(OpenOrder.from_verdict(line, partition).stored())
        entries.setdefault((topic, partition), []).append((orjson.dumps(order_id), entry, ()))
    await (await shop.producer()).send(entries)

    worker = shop.add_worker()
    await shop.settled(1)
    assert await shop.finished(await shop.produce([shop.order(("one", 1))])) == {"CONFIRMED": 1}
    deadline = time.monotonic() + 30
    while (summary := await asyncio.to_thread(worker.summary)) is None or summary["open"]:
        assert time.monotonic() < deadline, summary
        await asyncio.sleep(0.2)
    last = {record.key: record.value for record in await shop.raw_records(topic)}
    assert [last[orjson.dumps(order_id)] for order_id in ids] == [None] * 20
    assert await shop.has_counts("one", 79, 0, 21)
    assert await shop.violations() == []
