"""Reconcile on a pipeline that runs: what agrees, what is found, what is mended, and what is left alone."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from orderstream.checkpoint import default_file
from orderstream.drift import Kind
from orderstream.lua.gate import Keys
from orderstream.reconcile import Reconcile, Repair, Report
from orderstream.repair import mend
from orderstream.streams.partitions import order_partition, product_partition
from orderstream.streams.producer import Outbox
from orderstream.streams.topics import changelog_topic
from tests.harness import Pipeline, environment

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]
PRODUCTS = [f"p{n}" for n in range(12)]


async def reconcile(shop: Pipeline, *, yes: bool = False, settle_s: float = 5.0, **how: Any) -> Report:
    file = default_file(shop.settings)
    async with Reconcile(shop.settings, file=file, settle_s=settle_s, **{"grace_s": 5.0, **how}) as job:
        report = await job.run()
        if yes:
            report.repairs = await mend(job, report.differences)
        return report


def found(report: Report) -> set[tuple[str, str]]:
    return {(str(d.kind), d.subject) for d in report.differences}


def some_orders(shop: Pipeline, number: int, seed: int = 1) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        shop.order(
            *((p, rng.randint(1, 3)) for p in rng.sample(PRODUCTS, 1 if rng.random() < 0.7 else rng.randint(2, 5)))
        )
        for _ in range(number)
    ]


async def stock_command(shop: Pipeline, product_id: str, **body: Any) -> None:
    outbox = Outbox(shop.settings)
    outbox.stock_command(product_id, orjson.dumps({"product_id": product_id, "command_id": str(uuid.uuid4()), **body}))
    await (await shop.producer()).send(outbox.handed())


async def a_day(shop: Pipeline, orders: int = 300) -> list[str]:
    """Sell, refuse, decline; receive and adjust, refuse that too; send records twice, to foreign partitions, and rubbish."""
    some = some_orders(shop, orders)
    ids = await shop.produce(some)
    await shop.produce(some[:20])
    await shop.produce_raw(b"{", product_id="p1")
    reused = {**some[0], "user_id": "somebody else"}
    await shop.produce([reused])
    astray = {key: value for key, value in shop.order(("p2", 1)).items() if key != "order_id"}
    owner = product_partition("p2", shop.settings.partitions)
    await shop.produce_raw(orjson.dumps(astray), partition=(owner + 1) % shop.settings.partitions)
    await stock_command(shop, "p1", command="receive", quantity=50)
    await stock_command(shop, "p2", command="adjust", quantity=-1, reason="broken")
    await stock_command(shop, "p3", command="adjust", quantity=-100_000, reason="more than there is")
    await stock_command(shop, "none", command="receive", quantity=1)
    await shop.finished(ids)
    await shop.told(ids)
    return ids


async def test_a_pipeline_that_did_all_it_can_agrees_and_the_next_run_reads_only_what_is_new(pipeline: Make) -> None:
    shop = pipeline(payment_success_rate=0.7)
    await shop.start({**dict.fromkeys(PRODUCTS, 40), "never": 5})
    ids = await a_day(shop)
    outcomes = await shop.outcomes(ids)
    assert len(outcomes) == 3, "sold, declined and refused"
    first = await reconcile(shop)
    assert found(first) == set()
    assert (first.open, first.orders, first.products, first.resumed) == (0, 301, 13, False)
    ends = {topic: sum(end for _, end in parts.values()) for topic, parts in first.covered.items()}
    assert ends[shop.settings.topic("orders")] == 300 + 20 + 1 + 1 + 2
    assert ends[shop.settings.topic("stock-commands")] == 4
    assert ends[shop.settings.topic("dead-letters")] == 4
    assert first.records == sum(ends.values())

    nothing = await reconcile(shop)
    assert (found(nothing), nothing.records, nothing.orders, nothing.resumed) == (set(), 0, 0, True)
    more = await shop.produce(some_orders(shop, 50, seed=2))
    await shop.produce([shop.order(("p0", 1), order_id=ids[0])])  # of another order already: a dead letter
    await stock_command(shop, "p4", command="receive", quantity=7)
    await shop.finished(more)
    await shop.told(more)
    second = await reconcile(shop)
    assert found(second) == set()
    assert second.orders == 50
    assert 0 < second.records < 400
    assert found(await reconcile(shop, from_beginning=True)) == set()
    assert await shop.violations() == []


async def test_what_is_in_flight_is_no_drift(pipeline: Make) -> None:
    shop = pipeline(payment_success_rate=0.7, payment_latency_max_s=0.2)
    await shop.start(dict.fromkeys(PRODUCTS, 2_000), workers=2)
    stop = asyncio.Event()
    ids: list[str] = []

    async def flow() -> None:
        while not stop.is_set():
            ids.extend(await shop.produce(some_orders(shop, 50, seed=len(ids))))
            await stock_command(shop, "p1", command="receive", quantity=1)
            await asyncio.sleep(0.02)

    flowing = asyncio.create_task(flow())
    try:
        await asyncio.sleep(1)
        for n in range(3):
            report = await reconcile(shop, settle_s=1.0)
            assert found(report) == set(), n
            assert report.open > 0
    finally:
        stop.set()
        await flowing
    await shop.finished(ids)
    await shop.told(ids)
    assert found(await reconcile(shop)) == set()
    assert found(await reconcile(shop, from_beginning=True)) == set()
