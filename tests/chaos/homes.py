"""A pipeline with the stages of :mod:`orderstream.agents.home`, and a judge that asks topics, bank and tables by itself."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from orderstream.engines.child import Child
from orderstream.jobs.init import create_topics
from orderstream.settings import Settings
from orderstream.sql.prepare import prepare
from orderstream.streams.partitions import order_partition, product_partition
from tests.chaos.bank import Bank

ENDED = {"CONFIRMED", "CANCELLED"}


class Homes:
    """Engines with the tables of homes, the workers of a test, and what was sent."""

    def __init__(self, settings: Settings, folder: Path, bank: Bank) -> None:
        self.settings, self.folder, self.bank = settings, folder, bank
        self.workers: list[Child] = []
        self.sent: dict[str, dict[str, Any]] = {}
        self.cancelled: set[str] = set()
        self.initial: dict[str, int] = {}
        self._draw = random.Random(7)

    async def start(self, products: dict[str, int]) -> None:
        """Make topics and tables, and put these products there."""
        self.initial = products
        await create_topics(self.settings)
        await prepare(self.settings)
        self.pool = await asyncpg.create_pool(self.settings.database_url, min_size=1, max_size=2)
        await self.pool.executemany(
            "INSERT INTO stock (product_id, partition, name, price_cents, on_hand, initial)"
            " VALUES ($1, $2, $1, 100, $3, $3)",
            [(p, product_partition(p, self.settings.partitions), units) for p, units in products.items()],
        )
        self.producer = AIOKafkaProducer(bootstrap_servers=self.settings.kafka)
        await self.producer.start()

    def worker(self, **overrides: Any) -> Child:
        """Start one more worker."""
        settings = self.settings.model_copy(update=overrides)
        log = self.folder / f"worker-{len(self.workers)}.log"
        self.workers.append(Child("worker", settings, log))
        return self.workers[-1]

    async def keep(self, number: int, until: asyncio.Event) -> list[int]:
        """Have so many workers run until the event is set; return the exit codes of those that ended."""
        ended: list[int] = []
        seen: set[Child] = set()
        while not until.is_set():
            for worker in self.workers:
                if worker not in seen and (code := worker.process.poll()) is not None:
                    seen.add(worker)
                    ended.append(code)
            for _ in range(number - sum(w.process.poll() is None for w in self.workers)):
                self.worker()
            await asyncio.sleep(0.2)
        return ended

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
            row = await self.pool.fetchrow(
                "SELECT count(*) FILTER (WHERE status IN ('CONFIRMED', 'CANCELLED')) AS ended, count(*) AS taken,"
                " (SELECT count(*) FROM waiting) AS waiting, (SELECT count(*) FROM kept_commands) AS kept,"
                " (SELECT count(*) FROM holds WHERE state = 'h') AS held FROM orders"
            )
            cancelled = await self.pool.fetchval(
                "SELECT count(*) FROM orders WHERE order_id = ANY ($1) AND status <> 'CANCELLED'", list(self.cancelled)
            )
            if row["ended"] == len(self.sent) and not (row["waiting"] or row["kept"] or row["held"] or cancelled):
                return
            if time.monotonic() > deadline:
                held = await self.pool.fetch(
                    "SELECT h.order_id::text, h.product_id, h.held_at::text, o.created_at::text, o.cancelled_at::text,"
                    " o.status::text, o.reason::text, o.product_ids, array_to_string(o.states, '') AS states,"
                    " o.payment::text FROM holds h LEFT JOIN orders o ON o.order_id = h.order_id WHERE h.state = 'h' LIMIT 3"
                )
                logs = "\n".join(w.log.read_text(errors="replace")[-2000:] for w in self.workers[-2:])
                raise AssertionError(
                    f"not at rest: {dict(row)}, {cancelled} cancels open, {len(self.sent)} sent\n"
                    f"held: {[dict(line) for line in held]}\n{logs}"
                )
            await asyncio.sleep(0.2)

    async def events(self) -> dict[str, list[str]]:
        """Return the statuses of each order's events in the order of the topic, repeats left out."""
        found: dict[str, list[str]] = {}
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
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    for record in records:
                        event = orjson.loads(record.value)
                        statuses = found.setdefault(event["order_id"], [])
                        if event["status"] not in statuses:
                            statuses.append(event["status"])
        finally:
            await consumer.stop()
        return found

    async def judge(self) -> list[str]:
        """Return everything that breaks a promise; asks the tables by its own statements, the topic and the bank."""
        faults = []
        rows = {row["order_id"]: row for row in await self.pool.fetch("SELECT *, order_id::text FROM orders")}
        events, standing = await self.events(), self.bank.standing
        sold: Counter[str] = Counter()
        for order_id, order in self.sent.items():
            row = rows.get(order_id)
            if row is None or row["status"] not in ENDED:
                faults.append(f"{order_id} has not ended: {row and row['status']}")
                continue
            told = events.get(order_id, [])
            if told[-1:] != [row["status"]]:
                faults.append(f"{order_id} is {row['status']}, its events are {told}")
            legal = (["CREATED", "RESERVED", "PAID", "CONFIRMED"], ["CREATED", "RESERVED", "PAID", "CONFIRMED", "CANCELLED"],
                     ["CREATED", "CANCELLED"], ["CREATED", "RESERVED", "CANCELLED"],
                     ["CREATED", "RESERVED", "PAID", "CANCELLED"])  # fmt: skip
            if told not in legal:
                faults.append(f"{order_id}: events {told}")
            if order_id in self.cancelled and row["status"] != "CANCELLED":
                faults.append(f"{order_id} was cancelled and is {row['status']}")
            units = {item["product_id"]: item["quantity"] for item in order["items"]}
            if row["status"] == "CONFIRMED":
                sold.update(units)
                if standing.get(order_id) != 100 * sum(units.values()):
                    faults.append(f"{order_id} is CONFIRMED, its charge is {standing.get(order_id)}")
            elif order_id in standing:
                faults.append(
                    f"{order_id} is CANCELLED for {row['reason']}, payment {row['payment']}, and a charge stands"
                )
        for extra in rows.keys() - self.sent.keys():
            faults.append(f"{extra} was never sent")
        for row in await self.pool.fetch("SELECT * FROM stock"):
            name, initial = row["product_id"], self.initial[row["product_id"]]
            if (row["on_hand"], row["reserved"], row["sold"]) != (initial - sold[name], 0, sold[name]):
                counts = {key: row[key] for key in ("on_hand", "reserved", "sold")}
                faults.append(f"{name}: {counts} of {initial}, its orders {sold[name]}")
        for row in await self.pool.fetch(
            "SELECT product_id, coalesce(sum(quantity) FILTER (WHERE movement = 'hold'), 0) AS held,"
            " coalesce(sum(quantity) FILTER (WHERE movement = 'commit'), 0) AS committed,"
            " coalesce(sum(quantity) FILTER (WHERE movement = 'release'), 0) AS released,"
            " coalesce(sum(quantity) FILTER (WHERE movement = 'return'), 0) AS returned FROM ledger GROUP BY product_id"
        ):
            name, settled = row["product_id"], row["committed"] + row["released"]
            if row["held"] != settled or row["committed"] - row["returned"] != sold[name]:
                faults.append(f"{name}: the ledger has {dict(row)}, its orders {sold[name]}")
        return faults


MakeHomes = Callable[..., Homes]
