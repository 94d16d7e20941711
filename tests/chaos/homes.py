"""A pipeline whose topics, tables and workers a test handles itself."""

from __future__ import annotations

import asyncio
import random
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from orderstream.engines.child import environment
from orderstream.jobs.init import create_topics
from orderstream.settings import Settings
from orderstream.sql.prepare import prepare
from orderstream.streams.partitions import order_partition, product_partition
from tests.chaos.auditor import Auditor
from tests.chaos.bank import Bank
from tests.forked import orderstream
from tests.harness import Worker, current_events


class Homes:
    """Engines with the tables of homes, the workers of a test, and what was sent."""

    def __init__(self, settings: Settings, folder: Path, bank: Bank) -> None:
        self.settings, self.folder, self.bank = settings, folder, bank
        self.workers: list[Worker] = []
        self.sent: dict[str, dict[str, Any]] = {}
        self.cancelled: set[str] = set()
        self.initial: dict[str, int] = {}
        self._draw = random.Random(7)

    async def start(self, products: dict[str, int]) -> None:
        """Make topics and tables, and put these products there."""
        self.initial = products
        self.auditor = Auditor(self.settings, products)
        await create_topics(self.settings)
        await prepare(self.settings)
        self.pool = await asyncpg.create_pool(self.settings.database_url, min_size=1, max_size=2)
        ids, owners = [*products], [product_partition(product_id, self.settings.partitions) for product_id in products]
        prices, units = [100] * len(ids), [*products.values()]
        await self.pool.execute("SELECT load_catalogue($1, $2, $1, $3, $4)", ids, owners, prices, units)
        self.producer = AIOKafkaProducer(bootstrap_servers=self.settings.kafka)
        await self.producer.start()

    def worker(self, **overrides: Any) -> Worker:
        """Start one more worker."""
        self.workers.append(Worker(self.settings, self.folder / f"worker-{len(self.workers)}.log", **overrides))
        return self.workers[-1]

    async def orderstream(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of ours with these settings to its end."""
        return await asyncio.to_thread(orderstream, environment(self.settings), *arguments)

    async def close(self) -> None:
        """Stop all of it."""
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
        await self.producer.stop()
        await self.pool.close()

    def order(self, lines_max: int) -> dict[str, Any]:
        """Draw an order."""
        products = self._draw.sample(sorted(self.initial), self._draw.randint(1, lines_max))
        return {
            "order_id": str(uuid.UUID(int=self._draw.getrandbits(128), version=4)),
            "user_id": f"u{self._draw.randrange(50)}",
            "items": [{"product_id": p, "quantity": self._draw.randint(1, 2)} for p in products],
            "payment_method": "card",
        }

    async def send(self, number: int, *, lines_max: int = 3, cancel_share: float = 0.0) -> list[str]:
        """Send orders, each to the partition of its first product, and cancel some of them: at once, or a moment later."""
        ids, waits = [], []
        topic, commands = self.settings.topic("orders"), self.settings.topic("order-commands")
        for _ in range(number):
            order = self.order(lines_max)
            order_id, first = order["order_id"], order["items"][0]["product_id"]
            self.sent[order_id] = order
            ids.append(order_id)
            place = product_partition(first, self.settings.partitions)
            if self._draw.random() < cancel_share:
                self.cancelled.add(order_id)
                body = orjson.dumps({"command": "cancel", "order_id": order_id})
                key = order_id.encode()
                where = order_partition(order_id, self.settings.partitions)
                waits.append(await self.producer.send(commands, body, key=key, partition=where))
            waits.append(await self.producer.send(topic, orjson.dumps(order), key=first.encode(), partition=place))
        await asyncio.gather(*waits)
        return ids

    async def rest(self, timeout_s: float = 90.0) -> None:
        """Wait until every order sent has ended and nothing waits or is due."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = await self.auditor.unsettled()
            ended: int = await self.pool.fetchval("SELECT count(*) FROM orders WHERE status >= 'CONFIRMED'")
            if ended == len(self.sent) and not left:
                return
            if time.monotonic() > deadline:
                logs = "\n".join(w.log.read_text(errors="replace")[-2000:] for w in self.workers[-2:])
                raise AssertionError(f"{ended} of {len(self.sent)} have ended; {left}\n{logs}")
            await asyncio.sleep(0.2)

    async def events(self) -> dict[str, list[str]]:
        """Return the statuses of each order's events in the order of the topic, repeats left out."""
        found: dict[str, list[str]] = {}
        records: list[Any] = []
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.settings.kafka, auto_offset_reset="earliest", isolation_level="read_committed"
        )
        await consumer.start()
        try:
            name = self.settings.topic("order-events")
            tps = [TopicPartition(name, partition) for partition in range(self.settings.partitions)]
            consumer.assign(tps)
            ends = await consumer.end_offsets(tps)
            while any([await consumer.position(tp) < ends[tp] for tp in tps]):
                for batch in (await consumer.getmany(timeout_ms=500)).values():
                    records += batch
        finally:
            await consumer.stop()
        for record in current_events(records):
            event = orjson.loads(record.value)
            statuses = found.setdefault(event["order_id"], [])
            if event["status"] not in statuses:
                statuses.append(event["status"])
        return found

    async def judge(self, timeout_s: float = 15.0) -> list[str]:
        """Return what the auditor finds once what follows the last end has been told."""
        deadline = time.monotonic() + timeout_s
        while True:
            if not (found := await self.auditor.differences()) or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.5)
