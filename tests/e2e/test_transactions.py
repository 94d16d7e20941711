"""Producers with transactions: of aborted ones nothing is carried out, and the marks that each leaves are no records."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaProducer

from orderstream.streams.partitions import order_partition, product_partition
from orderstream.streams.topics import ORDER_COMMANDS, ORDERS, STOCK_COMMANDS
from tests.chaos.progress import Progress, drained
from tests.e2e.test_reconcile import found, reconcile
from tests.harness import Pipeline

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]
Record = tuple[str, int, Any]

STALL_S = 3.0
PRODUCTS = {f"p{n}": 1_000 for n in range(6)}


class Stranger:
    """A producer of somebody else, with transactions."""

    def __init__(self, shop: Pipeline, producer: Any) -> None:
        self._shop, self._settings, self._producer = shop, shop.settings, producer

    def orders(self, orders: Iterable[dict[str, Any]]) -> list[Record]:
        """Return the records of these orders."""
        return [(ORDERS.name, self.home(order["items"][0]["product_id"]), order) for order in orders]

    def receipt(self, product_id: str, units: int) -> Record:
        """Return the record of a receipt."""
        command = {"command": "receive", "command_id": str(uuid.uuid4()), "product_id": product_id, "quantity": units}
        return STOCK_COMMANDS.name, self.home(product_id), command

    def cancel(self, order_id: str) -> Record:
        """Return the record of a cancel."""
        where = order_partition(order_id, self._settings.partitions)
        return ORDER_COMMANDS.name, where, {"command": "cancel", "order_id": order_id}

    def home(self, product_id: str) -> int:
        """Return the partition of a product."""
        return product_partition(product_id, self._settings.partitions)

    async def send(self, records: Sequence[Record]) -> None:
        """Produce records, within the transaction that is open."""
        await asyncio.gather(
            *[
                await self._producer.send(self._settings.topic(topic), orjson.dumps(value), partition=partition)
                for topic, partition, value in records
            ]
        )

    async def commit(self, *records: Record) -> None:
        """Produce records in a transaction, and commit it."""
        await self._producer.begin_transaction()
        await self.send(records)
        await self._producer.commit_transaction()

    async def abort(self, *records: Record) -> None:
        """Produce records in a transaction, and abort it."""
        await self._producer.begin_transaction()
        await self.send(records)
        await self._producer.abort_transaction()

    async def begin(self, *records: Record) -> None:
        """Produce records in a transaction that stays open."""
        await self._producer.begin_transaction()
        await self.send(records)
        await self._producer.flush()

    async def end(self) -> None:
        """Commit the transaction that is open."""
        await self._producer.commit_transaction()


@asynccontextmanager
async def stranger(shop: Pipeline) -> AsyncIterator[Stranger]:
    producer = AIOKafkaProducer(
        bootstrap_servers=shop.settings.kafka, transactional_id=f"{shop.settings.app_id}-{uuid.uuid4()}", linger_ms=5
    )
    await producer.start()
    try:
        yield Stranger(shop, producer)
    finally:
        await producer.stop()


async def counted(shop: Pipeline, product_id: str) -> int:
    return sum((await shop.counts(product_id)).values())


def logged(shop: Pipeline, text: str) -> bool:
    return any(text in worker.log.read_text() for worker in shop.workers)


async def at_rest(shop: Pipeline) -> None:
    """Wait for longer than a worker may stand still: the group is at the ends of its topics, and nobody ended himself."""
    await drained(shop, timeout_s=20)
    await asyncio.sleep(2 * STALL_S)
    assert [worker.process.poll() for worker in shop.workers] == [None] * len(shop.workers), shop.workers[0].tail()
    lags = [
        worker.metric("consumer_lag_records", topic=spec.name, partition=str(partition))
        for worker in shop.workers
        for spec in (ORDERS, ORDER_COMMANDS, STOCK_COMMANDS)
        for partition in range(shop.settings.partitions)
    ]
    assert set(lags) == {0.0}


async def test_what_was_aborted_is_not_carried_out_and_what_was_committed_is(pipeline: Make) -> None:
    shop = pipeline(partitions=3, stall_timeout_s=STALL_S)
    await shop.start(PRODUCTS)
    bought = await shop.produce(shop.order((f"p{n}", 1)) for n in range(6))
    assert await shop.finished(bought) == {"CONFIRMED": 6}
    gone, there = ([shop.order((f"p{n % 6}", 2), (f"p{(n + 1) % 6}", 1)) for n in range(40)] for _ in range(2))
    async with stranger(shop) as one, stranger(shop) as other:
        for n in range(0, 40, 10):
            units = [one.receipt(f"p{k}", 1_000_000) for k in range(6)]
            await other.begin(*other.orders(there[n : n + 5]), other.receipt("p0", 7))
            await one.abort(*one.orders(gone[n : n + 10]), *units, *map(one.cancel, bought))
            await other.send(other.orders(there[n + 5 : n + 10]))
            await other.end()
        await other.commit(other.cancel(bought[0]))
        await one.abort(*one.orders(gone[:3]))  # the last that stands there
    ids = [order["order_id"] for order in there]
    assert await shop.finished(ids) == {"CONFIRMED": 40}
    await shop.eventually("SELECT status::text FROM orders WHERE order_id = $1", "CANCELLED", bought[0])
    await at_rest(shop)
    assert await shop.outcomes([order["order_id"] for order in gone]) == {}
    assert await shop.outcomes(bought[1:]) == {"CONFIRMED": 5}
    assert await counted(shop, "p0") == 1_000 + 4 * 7
    assert await counted(shop, "p1") == 1_000
    assert await shop.dead_letters() == []
    assert await shop.violations() == []
    report = await reconcile(shop)
    assert (found(report), report.open, report.orders) == (set(), 0, 46)
    assert not report.in_flight


async def test_a_worker_begins_again_where_transactions_have_left_their_marks(pipeline: Make) -> None:
    shop = pipeline(partitions=3, stall_timeout_s=STALL_S)
    await shop.start(PRODUCTS)
    async with stranger(shop) as one:
        orders = [shop.order((f"p{n}", 1)) for n in range(6)]
        await one.commit(*one.orders(orders))
        assert await shop.finished([order["order_id"] for order in orders]) == {"CONFIRMED": 6}
        for _ in range(3):
            await one.abort(*one.orders(shop.order((f"p{n}", 1)) for n in range(6)), one.receipt("p0", 5))
    await at_rest(shop)
    for _ in range(2):
        assert await asyncio.to_thread(shop.workers[-1].stop) == 0
        shop.workers.clear()
        shop.add_worker()
        await shop.settled(1)
        more = await shop.produce([shop.order(("p3", 1))])
        assert await shop.finished(more) == {"CONFIRMED": 1}
    for what in ("another log stands", "removed before anybody read", "set back", "elsewhere than the group"):
        assert not logged(shop, what)
    assert await shop.violations() == []


async def test_an_open_transaction_is_told_by_its_age_and_is_no_standstill(pipeline: Make) -> None:
    shop = pipeline(partitions=3, stall_timeout_s=STALL_S)
    await shop.start(PRODUCTS)
    (worker,) = shop.workers
    order = shop.order(("p0", 1))
    async with stranger(shop) as one:
        home = {"topic": ORDERS.name, "partition": str(one.home("p0"))}
        await one.begin(*one.orders([order]))
        behind = await shop.produce([shop.order(("p0", 1))])
        elsewhere = next(p for p in PRODUCTS if one.home(p) != one.home("p0"))
        assert await shop.finished(await shop.produce([shop.order((elsewhere, 1))])) == {"CONFIRMED": 1}
        deadline = time.monotonic() + 40
        while not logged(shop, "a producer's transaction is open"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
        assert worker.metric("open_transaction_seconds", **home) >= 10.0
        assert worker.metric("consumer_lag_records", **home) == 0.0
        assert await shop.outcomes([order["order_id"], *behind]) == {}
        report = await reconcile(shop)
        assert (found(report), report.orders) == (set(), 1)
        assert worker.process.poll() is None
        await one.end()
    assert await shop.finished([order["order_id"], *behind]) == {"CONFIRMED": 2}
    await at_rest(shop)
    assert worker.metric("open_transaction_seconds", **home) == 0.0


async def test_aborted_transactions_do_not_hide_what_comes_between_them(pipeline: Make) -> None:
    """Many small transactions of several producers, in every order, over two workers of which one dies."""
    shop = pipeline(partitions=3, session_timeout_s=4.0)
    await shop.start(PRODUCTS, workers=2)
    kept: list[str] = []

    async def flow(number: int) -> None:
        async with stranger(shop) as one:
            for n in range(40):
                orders = [shop.order((f"p{(n + k + number) % 6}", 1)) for k in range(3)]
                if (n + number) % 3:
                    await one.commit(*one.orders(orders))
                    kept.extend(order["order_id"] for order in orders)
                else:
                    await one.abort(*one.orders(orders))

    flows = asyncio.gather(*map(flow, range(4)))
    await shop.eventually("SELECT count(*) > 50 FROM orders", True)
    shop.workers[0].kill()
    await flows
    outcome = await shop.finished(kept)
    assert sum(outcome.values()) == len(kept)
    async with Progress(shop):
        await drained(shop)
    assert await (await shop.store()).pool.fetchval("SELECT count(*) FROM orders") == len(kept)
    assert await shop.violations() == []
    assert found(await reconcile(shop)) == set()
