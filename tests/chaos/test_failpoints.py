"""The kill-point matrix: the process ends, as by ``kill -9``, between any two effects of any stage."""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Callable
from random import Random
from typing import Any

import orjson
import pytest

from orderstream.failpoints import POINTS
from orderstream.streams.partitions import product_partition
from orderstream.streams.topics import STOCK_COMMANDS
from tests.chaos.bank import Bank
from tests.chaos.progress import INPUTS, drained
from tests.chaos.scenario import Scenario, audited
from tests.harness import Pipeline, Worker

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]

SESSION_S = 2.0
"""Short: each test waits for it once, while the killed worker still has its place in the group."""

ROUND = 300
"""Orders that are sent at once; more of them follow until the workers have been killed."""

RECEIVED = 7
"""Units that come in with each stock command."""

NTH = {
    "pay.before_charge": 100,
    **dict.fromkeys(("pay.before_refund", "pay.after_refund", "pay.before_void", "pay.after_void"), 3),
    **dict.fromkeys(("commit.before_settle", "commit.after_settle", "commit.after_update", "commit.after_events"), 10),
}
"""The passage at which a point kills, by default the second: later where each order passes it, or a worker at rest."""

REVOKING = ("pay.before_refund", "pay.after_refund", "commit.before_settle", "commit.after_settle", "commit.after_update",
            "commit.after_events", "desk.after_ack")  # fmt: skip
"""The failpoints that are passed when an order is cancelled that was sold."""


async def test_without_any_fault_orders_end_as_the_others_are_held_to(pipeline: Make) -> None:
    shop = pipeline(partitions=4)
    scenario = Scenario(5_000)
    await shop.start(scenario.products)
    await shop.produce(scenario.orders)
    outcome = await scenario.check(shop)
    assert len(outcome) == 3, outcome
    seen = await audited(shop)
    assert (seen["orders"], seen["charges"], seen["redis"]) == (5_000, outcome["CONFIRMED"], len(scenario.products))
    assert seen["events"] > 10_000


async def confirmed(shop: Pipeline) -> list[str]:
    """Return the orders that are confirmed."""
    rows = await (await shop.store()).pool.fetch("SELECT order_id::text FROM orders WHERE status = 'CONFIRMED'")
    return sorted(row["order_id"] for row in rows)


async def at_work(worker: Worker) -> None:
    """Wait until a worker has partitions, or has ended."""
    async with asyncio.timeout(60):
        while worker.process.poll() is None:
            summary = await asyncio.to_thread(worker.summary)
            if summary and summary["owned"]:
                return
            await asyncio.sleep(0.1)


async def all_that_comes(shop: Pipeline, scenario: Scenario, orders: list[dict[str, Any]]) -> None:
    """Send all that a pipeline can get: orders, what it refuses and sends on, and cancels at any time."""
    producer, draw, partitions = await shop.producer(), Random(scenario.seed), shop.settings.partitions
    astray = draw.sample(orders, len(orders) // 20)
    early, later = draw.sample(orders, len(orders) // 10), draw.sample(orders, len(orders) // 10)
    await scenario.cancel(shop, scenario.ids(early))
    await shop.produce(order for order in orders if order not in astray)
    await scenario.cancel(shop, scenario.ids(later))
    for order in astray:
        first = product_partition(order["items"][0]["product_id"], partitions)
        await shop.produce_raw(orjson.dumps(order), partition=(first + 1) % partitions)
    for partition in range(partitions):
        product_id = next(name for name in scenario.products if product_partition(name, partitions) != partition)
        command = {"command": "receive", "command_id": str(uuid.uuid4()), "product_id": product_id}
        body = orjson.dumps({**command, "quantity": RECEIVED})
        await producer.send({(shop.settings.topic(STOCK_COMMANDS.name), partition): [(None, body, ())]})
        for spec in INPUTS:
            await producer.send({(shop.settings.topic(spec.name), partition): [(None, b"{", ())]})
    await asyncio.sleep(1)
    sold = await confirmed(shop)
    await scenario.cancel(shop, draw.sample(sold, len(sold) // 10))


FOUR = [POINTS[n : n + 4] for n in range(0, len(POINTS), 4)]


@pytest.mark.parametrize("points", FOUR, ids=" ".join)
async def test_kills_between_two_effects_break_no_promise(pipeline: Make, bank: Bank, points: tuple[str, ...]) -> None:
    """Two workers at a time, each killed at a point of its own; whoever comes next finds what both left half done."""
    bank.latency_s = 0.3
    shop = pipeline(payment_in_flight_max=500, session_timeout_s=SESSION_S, partitions=4)
    scenario, sent = Scenario(10 * ROUND), 0
    await shop.start(scenario.products, workers=0)
    for pair in (points[:2], points[2:]):
        armed = [shop.add_worker(failpoint=f"{point}:kill:{NTH.get(point, 2)}") for point in pair]
        for worker in armed:
            await at_work(worker)
        while alive := [point for point, worker in zip(pair, armed, strict=True) if worker.process.poll() is None]:
            assert sent < len(scenario.orders), f"no worker comes past {alive}"
            await all_that_comes(shop, scenario, scenario.orders[sent : sent + ROUND])
            sent += ROUND
        for worker in armed:
            await killed(worker)
    del scenario.orders[sent:]
    shop.add_worker()
    await drained(shop)
    await scenario.check(shop)


async def killed(armed: Worker) -> None:
    """Wait until a failpoint has killed a worker."""
    await asyncio.to_thread(armed.process.wait, 60)
    assert armed.process.returncode == -signal.SIGKILL, armed.tail()


async def test_a_kill_while_sold_orders_are_cancelled_breaks_no_promise(pipeline: Make, bank: Bank) -> None:
    """One worker after the other is killed at the next failpoint; each also finishes what the one before left half done."""
    shop = pipeline(session_timeout_s=SESSION_S, partitions=4)
    scenario = Scenario(len(REVOKING) * 60)
    await shop.start(scenario.products)
    await shop.produce(scenario.orders)
    await scenario.check(shop)
    sold = await confirmed(shop)
    assert shop.workers[0].stop() == 0
    each = len(sold) // (len(REVOKING) + 1)
    for n, point in enumerate(REVOKING):
        armed = shop.add_worker(failpoint=f"{point}:kill:2")
        await at_work(armed)  # what came before would be one batch, which passes the point once
        for order_id in sold[n * each : (n + 1) * each]:
            await scenario.cancel(shop, [order_id])
            await asyncio.sleep(0.05)
        await killed(armed)
    shop.add_worker()
    outcome = await scenario.check(shop)
    assert outcome["CANCELLED cancelled_by_user"] == len(scenario.cancelled) > 100
    assert outcome["CONFIRMED"] == len(sold) - len(scenario.cancelled)
    assert len(bank.refunds) == len(scenario.cancelled)
