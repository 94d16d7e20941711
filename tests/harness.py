"""A pipeline under test: real engines, worker processes as a user runs them, outcomes read from Postgres and the topics."""

from __future__ import annotations

import asyncio
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import orjson
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from orderstream import access
from orderstream.engines.child import READY_S, Child, environment
from orderstream.engines.process import free_port
from orderstream.exits import EXIT_FAULT
from orderstream.jobs.init import init
from orderstream.jobs.verify import verify
from orderstream.settings import Settings
from orderstream.sql.store import Store
from orderstream.streams.partitions import product_partition
from orderstream.streams.producer import Outbox, Producer
from orderstream.streams.topics import DEAD_LETTERS, ORDER_EVENTS, ORDERS
from orderstream.streams.upstream import lenient
from tests.forked import Forked, orderstream


class ForkedChild(Child):
    """A worker or an ingress that has all modules when it starts."""

    def _start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        return Forked(arguments, environment(self.settings), self.log)


class Worker(ForkedChild):
    """A worker under test; one that does not leave when it is asked to fails the test."""

    def __init__(self, settings: Settings, log: Path, *, program: Sequence[str] = (), **overrides: Any) -> None:
        super().__init__("worker", settings.model_copy(update=overrides), log, program=program, say=pytest.fail)

    def metric(self, name: str, **labels: str) -> float:
        """Return a sample of its metrics; 0 for one that it does not have."""
        families = text_string_to_metric_families(self.page("/metrics"))
        samples = (sample for family in families for sample in family.samples)
        return sum(sample.value for sample in samples if (sample.name, sample.labels) == (name, labels))


class Keeper:
    """A supervisor, as a deployment has one: a worker that ended is started again.

    Attributes:
        ended: exit codes of those that it replaced.
    """

    def __init__(self, shop: Pipeline, workers: int, overrides: dict[str, Any]) -> None:
        self._shop, self._number, self._overrides = shop, workers, overrides
        self._task: asyncio.Task[None] | None = None
        self._seen: set[Worker] = set()
        self.ended: list[int] = []

    @property
    def alive(self) -> list[Worker]:
        """The workers that run."""
        return [worker for worker in self._shop.workers if worker.process.poll() is None]

    def _replace(self) -> None:
        for worker in self._shop.workers:
            if worker not in self._seen and (code := worker.process.poll()) is not None:
                self._seen.add(worker)
                self.ended.append(code)
        for _ in range(self._number - len(self.alive)):
            self._shop.add_worker(**self._overrides)

    async def __aenter__(self) -> Keeper:
        self._replace()
        self._task = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self._replace()


class Pipeline:
    """Engines with our topics and tables, and the workers that a test starts.

    Attributes:
        products: the units that each product began with.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.products: dict[str, int] = {}
        self.workers: list[Worker] = []
        self._store: Store | None = None
        self._producer: Producer | None = None

    async def start(self, products: dict[str, int], workers: int = 1, **overrides: Any) -> None:
        """Create topics and tables, load ``products`` (units by id, 100 cents each), start workers until they own all."""
        self.products = products
        await init(self.settings, ())
        store = await self.store()
        await store.load_catalogue(
            [(product_id, product_id, 100, units) for product_id, units in products.items()], self.settings.partitions
        )
        for _ in range(workers):
            self.add_worker(**overrides)
        if workers:
            await self.settled(workers)

    def add_worker(self, **overrides: Any) -> Worker:
        """Start one more worker."""
        worker = Worker(self.settings, self.folder / f"worker-{len(self.workers)}.log", **overrides)
        self.workers.append(worker)
        return worker

    def keep(self, workers: int, **overrides: Any) -> Keeper:
        """Have so many workers run from now on, whatever ends them; use it as an async context."""
        return Keeper(self, workers, overrides)

    async def settled(self, workers: int) -> None:
        """Wait until so many workers own all partitions, each some."""
        topics, deadline = 5, time.monotonic() + READY_S
        while True:
            alive = [worker for worker in self.workers if worker.process.poll() is None]
            answers = [await asyncio.to_thread(worker.summary) for worker in alive]
            owned = [summary["owned"] for summary in answers if summary]
            if len(owned) == workers and all(owned) and sum(owned) == topics * self.settings.partitions:
                return
            if len(alive) < workers or time.monotonic() > deadline:
                raise AssertionError(f"workers own {owned}\n" + "\n".join(w.tail() for w in self.workers))
            await asyncio.sleep(0.2)

    async def store(self) -> Store:
        """Return the statements on a pool of this test's."""
        if self._store is None:
            self._store = await Store.connect(self.settings.database_url, connections_max=4)
        return self._store

    async def producer(self) -> Producer:
        """Return a producer of this test's."""
        if self._producer is None:
            self._producer = Producer(self.settings, client_id="test")
            await self._producer.start()
        return self._producer

    async def reconnect(self) -> None:
        """Let go of the connections that an engine's end has cut."""
        if self._store is not None:
            self._store.pool.terminate()
            self._store = None

    async def close(self) -> None:
        """Stop what this pipeline started; a worker that does not leave is a failure."""
        try:
            await asyncio.gather(*(asyncio.to_thread(worker.stop) for worker in self.workers))
        finally:
            for worker in self.workers:
                if worker.process.poll() is None:
                    worker.kill()
                elif worker.process.returncode == EXIT_FAULT:
                    print(worker.tail())  # shown where the test fails
            if self._producer is not None:
                await self._producer.stop()
            if self._store is not None:
                await self._store.close()

    async def limit(self, product_id: str, units: int | None) -> None:
        """Limit what a user may have of a product, and wait until its owner has decided it."""
        command_id = str(uuid.uuid4())
        body = {"command": "limit", "command_id": command_id, "product_id": product_id, "limit_per_user": units}
        outbox = Outbox(self.settings)
        outbox.stock_command(product_id, orjson.dumps(body))
        await (await self.producer()).send(outbox.handovers())
        decided = "SELECT outcome FROM stock_commands WHERE command_id = $1::uuid"
        await self.eventually(decided, "applied", command_id)

    async def orderstream(self, *arguments: str, given: bytes = b"", **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command of ours with these settings to its end; return its exit code and all that it said."""
        return await asyncio.to_thread(orderstream, environment(self.settings) | env, *arguments, given=given)

    def begin(self, *arguments: str) -> Forked:
        """Start a command of ours with these settings."""
        return Forked(("-m", "orderstream", *arguments), environment(self.settings), self.folder / "command.log")

    # Orders

    @staticmethod
    def order(*items: tuple[str, int], **more: Any) -> dict[str, Any]:
        """Return an order record with an id."""
        return {
            "order_id": str(uuid.uuid4()),
            "user_id": "user-1",
            "items": [{"product_id": product_id, "quantity": quantity} for product_id, quantity in items],
            "payment_method": "card",
            **more,
        }

    async def produce(self, orders: Iterable[dict[str, Any]]) -> list[str]:
        """Produce orders, each to the partition of its first product; return the ids they bring."""
        outbox, ids = Outbox(self.settings), []
        for order in orders:
            ids.append(order.get("order_id", ""))
            outbox.order(str(order["items"][0]["product_id"]), orjson.dumps(order), ())
        await (await self.producer()).send(outbox.handovers())
        return ids

    async def produce_raw(
        self, value: bytes | None, *, product_id: str = "1", key: bytes | None = None, partition: int | None = None
    ) -> None:
        """Produce any bytes to ``orders``."""
        where = product_partition(product_id, self.settings.partitions) if partition is None else partition
        producer = await self.producer()
        await producer.send({(self.settings.topic(ORDERS.name), where): [(key or product_id.encode(), value, ())]})

    async def outcomes(self, ids: Sequence[str]) -> Counter[str]:
        """Count these orders by status, CANCELLED with its reason."""
        store = await self.store()
        rows = await store.pool.fetch(
            "SELECT status::text, reason::text, count(*) AS n FROM orders WHERE order_id = ANY ($1::uuid[]) GROUP BY 1, 2",
            list(ids),
        )
        return Counter({row["status"] + (f" {row['reason']}" if row["reason"] else ""): row["n"] for row in rows})

    async def ended(self, ids: Sequence[str]) -> dict[str, str]:
        """Return how these orders stand, by id: the status, of CANCELLED with its reason."""
        rows = await (await self.store()).pool.fetch(
            "SELECT order_id::text, status::text || coalesce(' ' || reason::text, '') AS ended FROM orders"
            " WHERE order_id = ANY ($1::uuid[])",
            list(ids),
        )
        return {row["order_id"]: row["ended"] for row in rows}

    async def ended_all(self, ids: Sequence[str]) -> dict[str, str]:
        """Wait until all of these orders have ended; return how, by id."""
        await self.finished(ids)
        return await self.ended(ids)

    async def finished(self, ids: Sequence[str], timeout_s: float = 120.0) -> Counter[str]:
        """Wait until all of these orders have ended; return how."""
        deadline = time.monotonic() + timeout_s
        while True:
            counted = await self.outcomes(ids)
            over = sum(n for status, n in counted.items() if status.startswith(("CONFIRMED", "CANCELLED")))
            if over == len(set(ids)):
                return counted
            if time.monotonic() > deadline:
                logs = "\n".join(worker.tail() for worker in self.workers)
                raise AssertionError(f"{over} of {len(set(ids))} orders have ended: {dict(counted)}\n{logs}")
            await asyncio.sleep(0.1)

    async def eventually(self, query: str, expected: Any, *arguments: Any, timeout_s: float = 60.0) -> None:
        """Wait until a statement's first value is as expected."""
        deadline = time.monotonic() + timeout_s
        while (found := await (await self.store()).pool.fetchval(query, *arguments)) != expected:
            if time.monotonic() > deadline:
                raise AssertionError(f"{query} {arguments}: {found!r}, not {expected!r}\n{self.workers[-1].tail()}")
            await asyncio.sleep(0.1)

    async def counts(self, product_id: str) -> dict[str, int]:
        """Return available, reserved and sold units of a product."""
        (row,) = await (await self.store()).products([product_id])
        return {name: row[name] for name in ("available", "reserved", "sold")}

    async def has_counts(self, product_id: str, available: int, reserved: int, sold: int) -> bool:
        """Wait for these counts: units of an order that has ended are settled a moment after."""
        expected = {"available": available, "reserved": reserved, "sold": sold}
        deadline = time.monotonic() + 15
        while (found := await self.counts(product_id)) != expected:
            if time.monotonic() > deadline:
                raise AssertionError(f"{product_id}: {found}, not {expected}")
            await asyncio.sleep(0.1)
        return True

    async def violations(self, **overrides: Any) -> list[str]:
        """Return every promise that is broken, with its offenders."""
        report = await verify(self.settings, **{"grace_s": 5.0, **overrides})
        return [f"{check.promise}: {check.offenders}" for check in report.checks if check.offenders]

    async def charges(self) -> tuple[int, int]:
        """Return how many charges stand, and how many orders are confirmed."""
        connection: asyncpg.Pool = (await self.store()).pool
        row = await connection.fetchrow(
            "SELECT (SELECT count(*) FROM payments WHERE status = 'SUCCESS') AS charges,"
            " (SELECT count(*) FROM orders WHERE status = 'CONFIRMED') AS confirmed"
        )
        return row["charges"], row["confirmed"]

    # Topics

    async def records(self, topic: str) -> list[Any]:
        """Return every record of one of our topics."""
        return await self.raw_records(self.settings.topic(topic))

    async def raw_records(self, name: str) -> list[Any]:
        """Return every record of a topic of the broker."""
        lenient.install()
        consumer = AIOKafkaConsumer(**access.kafka(self.settings), auto_offset_reset="earliest")
        await consumer.start()
        try:
            tps = [TopicPartition(name, partition) for partition in range(self.settings.partitions)]
            consumer.assign(tps)
            ends = await consumer.end_offsets(tps)
            found: list[Any] = []
            while any([await consumer.position(tp) < ends[tp] for tp in tps]):
                for batch in (await consumer.getmany(timeout_ms=500)).values():
                    found.extend(batch)
            return found
        finally:
            await consumer.stop()

    async def dead_letters(self, least: int = 0, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        """Return every dead letter, once there are so many: its headers, and its value as bytes."""
        async with asyncio.timeout(timeout_s if least else None):
            while len(records := await self.records(DEAD_LETTERS.name)) < least:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        return [
            {**{name: value.decode() for name, value in record.headers}, "value": record.value} for record in records
        ]

    async def events(self) -> dict[str, list[str]]:
        """Return the statuses of each order's events, repeats left out, in the order of the topic."""
        found: dict[str, list[str]] = {}
        for record in current_events(await self.records(ORDER_EVENTS.name)):
            event = orjson.loads(record.value)
            statuses = found.setdefault(event["order_id"], [])
            if event["status"] not in statuses:
                statuses.append(event["status"])
        return found

    async def published(self, ids: Sequence[str], timeout_s: float = 15.0) -> dict[str, list[str]]:
        """Return the events, once the last of each of these orders is there: it comes a moment after the order's row."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = await self.events()
            ended = await self.ended(ids)
            silent = [i for i in ids if ended.get(i, "CANCELLED").split()[0] not in found.get(i, ())]
            if not silent or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.2)


def current_events(records: Sequence[Any]) -> Iterator[Any]:
    """Yield the events that count, by the tests' own reading: of a home, none of an older claim behind one of a newer.

    A record without a value is a claim alone.
    """
    newest: dict[int, int] = {}
    for record in records:
        claim = int(dict(record.headers)["lane"].split(b":")[0])
        if claim >= newest.get(record.partition, 0):
            newest[record.partition] = claim
            if record.value is not None:
                yield record


@asynccontextmanager
async def ingress(shop: Pipeline) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    """Run an ingress process as a user does; give a client for it, and its address."""
    port = free_port()
    process = ForkedChild("ingress", shop.settings, shop.folder / f"ingress-{port}.log", port=port, say=pytest.fail)
    try:
        async with aiohttp.ClientSession(process.url) as client:
            deadline = time.monotonic() + READY_S
            while True:
                try:
                    async with client.get("/health") as answer:
                        assert answer.status == 200
                        break
                except aiohttp.ClientError:
                    process.check_alive()
                    assert time.monotonic() < deadline, process.tail()
                    await asyncio.sleep(0.1)
            yield client, process.url
    finally:
        code = process.stop()
    assert code == 0, process.tail()
