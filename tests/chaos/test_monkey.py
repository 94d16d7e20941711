"""The monkey: faults of every kind, drawn from a seed, for a given time (``make chaos MINUTES=10 SEED=7``)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import asyncpg
import orjson
import pytest
import redis.asyncio as redis
from aiokafka.errors import KafkaError
from confluent_kafka import KafkaException
from confluent_kafka import Producer as TransactionalProducer

from orderstream.engines.local import LocalEngines
from orderstream.engines.process import Process
from orderstream.sql.store import TRANSIENT
from orderstream.streams.topics import ORDER_COMMANDS, ORDERS, STOCK_COMMANDS
from tests.chaos.bank import Bank
from tests.chaos.scenario import Scenario
from tests.harness import Keeper, Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]
Name = Literal["kafka", "redis", "postgres"]

MINUTES = float(os.environ.get("CHAOS_MINUTES") or 0.4)
SEED = int(os.environ.get("CHAOS_SEED") or 1)
EXPECTED = (0, 2, -signal.SIGKILL)
"""Exit codes: asked to leave; an engine was unavailable when it started; killed.  Of others the end of the log is shown."""

FROZEN_MAX_S: dict[Name, float] = {"kafka": 20.0, "redis": 8.0, "postgres": 8.0}
"""The broker for longer than clients wait for an answer, so that they let go of its connections."""

LATENCY_S, PAYMENT_TIMEOUT_S = 0.3, 2.0
"""The bank's slowest answer at its best, and how long it is waited for."""

ORDERS_PER_S = 250
ORDERS_MIN = 5_000


class Monkey:
    """The faults that it can cause, each in some seconds; everything runs again after it.

    Attributes:
        counts: how often it caused each.
    """

    def __init__(
        self, shop: Pipeline, keeper: Keeper, engines: LocalEngines, scenario: Scenario, bank: Bank, seed: int
    ) -> None:
        self.shop, self.keeper, self.engines, self.scenario, self.bank = shop, keeper, engines, scenario, bank
        self.draw = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.began = time.monotonic()
        self.faults: list[tuple[str, int, Callable[[], Awaitable[None]]]] = [
            ("kills a worker", 4, self.kill_worker),
            ("asks a worker to leave", 2, self.stop_worker),
            ("freezes a worker until it has lost its partitions", 2, self.freeze_worker),
            *((f"kills {name}", 1, self.engine(self.kill, name)) for name in ("kafka", "redis", "postgres")),
            *((f"restarts {name}", 1, self.engine(self.restart, name)) for name in ("kafka", "redis", "postgres")),
            *((f"freezes {name}", 1, self.engine(self.freeze, name)) for name in ("kafka", "redis", "postgres")),
            ("flushes redis", 1, self.flush_redis),
            ("restores an old redis", 1, self.restore_redis),
            ("ends postgres connections", 2, self.end_connections),
            ("repeats orders", 2, self.repeat_orders),
            ("cancels orders", 4, self.cancel_orders),
            ("receives units", 2, self.receive_units),
            ("turns the bank", 4, self.turn_bank),
            ("ends a transaction", 3, self.end_transaction),
            ("produces poison", 1, self.produce_poison),
        ]

    async def run(self, seconds: float) -> None:
        """Cause one fault after the other for a time."""
        self.snapshot = self.shop.folder / "snapshot"
        names = [name for name, _, _ in self.faults]
        weights = [weight for _, weight, _ in self.faults]
        while (now := time.monotonic() - self.began) < seconds:
            await asyncio.sleep(self.draw.uniform(0.5, 3.0))
            (name,) = self.draw.choices(names, weights)
            print(f"{now:7.1f} s  {name}", flush=True)
            self.counts[name] += 1
            await next(fault for known, _, fault in self.faults if known == name)()
        self.bank.failing = self.bank.silent = self.bank.doubled = self.bank.refusing = 0.0
        self.bank.latency_s = LATENCY_S

    def worker(self) -> Any:
        alive = self.keeper.alive
        return self.draw.choice(alive) if alive else None

    async def kill_worker(self) -> None:
        if worker := self.worker():
            worker.kill()

    async def stop_worker(self) -> None:
        if worker := self.worker():
            await asyncio.to_thread(worker.stop, 15)

    async def freeze_worker(self) -> None:
        if worker := self.worker():
            worker.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(self.shop.settings.session_timeout_s + self.draw.uniform(1, 4))
            worker.process.send_signal(signal.SIGCONT)

    @staticmethod
    def engine(fault: Callable[[Name], Awaitable[None]], name: Any) -> Callable[[], Awaitable[None]]:
        return lambda: fault(name)

    async def kill(self, name: Name) -> None:
        await asyncio.to_thread(self.engines.kill, name)
        await asyncio.sleep(self.draw.choice((0, 0, 2, 8)))
        await asyncio.to_thread(self.engines.start, name)

    async def restart(self, name: Name) -> None:
        await asyncio.to_thread(self.engines.restart, name)

    async def freeze(self, name: Name) -> None:
        pid = self.engines.pid(name)
        process = Process.of(pid) if pid else None
        if process is None:
            return
        family = [process, *process.children()]
        for member in family:
            member.send(signal.SIGSTOP)
        await asyncio.sleep(self.draw.uniform(1, FROZEN_MAX_S[name]))
        for member in family:
            member.send(signal.SIGCONT)

    async def flush_redis(self) -> None:
        with contextlib.suppress(redis.RedisError):
            async with redis.Redis.from_url(self.shop.settings.redis_url) as client:
                await client.flushall()

    async def restore_redis(self) -> None:
        data = self.engines.local_dir / "redis" / "data"
        if not self.snapshot.exists():
            shutil.copytree(data, self.snapshot)
            return
        await asyncio.to_thread(self.engines.kill, "redis")
        shutil.rmtree(data)
        shutil.move(self.snapshot, data)
        await asyncio.to_thread(self.engines.start, "redis")

    async def end_connections(self) -> None:
        with contextlib.suppress(*TRANSIENT):
            connection = await asyncpg.connect(self.shop.settings.database_url, timeout=5)
            try:
                for _ in range(20):
                    await connection.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                        " AND pid <> pg_backend_pid() AND (state = 'active' OR random() < 0.1)"
                    )
                    await asyncio.sleep(0.05)
            finally:
                await connection.close()

    async def repeat_orders(self) -> None:
        with contextlib.suppress(KafkaError):
            await self.shop.produce(self.draw.sample(self.scenario.orders, 300))

    async def cancel_orders(self) -> None:
        with contextlib.suppress(KafkaError):
            await self.scenario.cancel(self.shop, self.draw.sample(self.scenario.ids(), 50))

    async def receive_units(self) -> None:
        """Receive units of products, some of them told twice, some in a partition where they do not belong."""
        topic, partitions = self.shop.settings.topic(STOCK_COMMANDS.name), self.shop.settings.partitions
        with contextlib.suppress(KafkaError):
            for product_id in self.draw.sample(sorted(self.scenario.products), 5):
                body = {"command": "receive", "command_id": self.new_id()}
                value = orjson.dumps({**body, "product_id": product_id, "quantity": self.draw.randint(1, 20)})
                for _ in range(self.draw.randint(1, 2)):
                    place = (topic, self.draw.randrange(partitions))
                    await (await self.shop.producer()).send({place: [(product_id.encode(), value, ())]})

    async def end_transaction(self) -> None:
        """Produce orders, cancels and a receipt in a transaction; commit it, abort it, or leave that to the broker."""
        end = self.draw.choice(("commit", "abort", "abort", "leave"))
        orders, cancelled = self.draw.sample(self.scenario.orders, 40), self.draw.sample(self.scenario.ids(), 20)
        if end == "commit":
            self.scenario.cancelled.update(cancelled)
        else:
            orders = [order | {"order_id": self.new_id()} for order in orders]
        records: list[tuple[str, str, dict[str, Any]]] = [
            *((ORDERS.name, order["items"][0]["product_id"], order) for order in orders),
            *((ORDER_COMMANDS.name, i, {"command": "cancel", "order_id": i}) for i in cancelled),
            (STOCK_COMMANDS.name, "p0", {"command": "receive", "command_id": self.new_id(), "product_id": "p0",
                                         "quantity": 1_000_000}),
        ]  # fmt: skip
        with contextlib.suppress(KafkaException):
            await asyncio.to_thread(self._produce_and_end, records, end)

    def _produce_and_end(self, records: list[tuple[str, str, dict[str, Any]]], end: str) -> None:
        settings = self.shop.settings
        producer = TransactionalProducer(
            {
                "bootstrap.servers": settings.kafka,
                "transactional.id": f"{settings.app_id}-{self.new_id()}",
                "transaction.timeout.ms": 5_000,
                "partitioner": "murmur2_random",
            }
        )
        producer.init_transactions(10)
        producer.begin_transaction()
        for topic, key, body in records:
            producer.produce(settings.topic(topic), orjson.dumps(body), key.encode())
        producer.flush(10)
        if end == "commit":
            producer.commit_transaction(10)
        elif end == "abort":
            producer.abort_transaction(10)

    def new_id(self) -> str:
        return str(uuid.UUID(int=self.draw.getrandbits(128), version=4))

    async def turn_bank(self) -> None:
        """Have the bank fail, be silent, answer twice, keep money or be slow from now on, or be at its best."""
        self.bank.failing = self.draw.choice((0.0, 0.0, 0.5))
        self.bank.silent = self.draw.choice((0.0, 0.0, 0.2))
        self.bank.doubled = self.draw.choice((0.0, 0.0, 0.5))
        self.bank.refusing = self.draw.choice((0.0, 0.0, 0.3))
        self.bank.latency_s = self.draw.choice((LATENCY_S, LATENCY_S, 2 * PAYMENT_TIMEOUT_S))

    async def produce_poison(self) -> None:
        with contextlib.suppress(KafkaError):
            for value in (None, b"{", b"{}", b"\xff", b"[" * 1000):
                await self.shop.produce_raw(value, partition=self.draw.randrange(self.shop.settings.partitions))


async def reconciled(shop: Pipeline) -> int:
    """Check that the topics agree with Postgres and Redis; return how many records were read."""
    answer = await shop.orderstream("reconcile", "--from-beginning", "--json")
    assert answer.returncode in (0, 1), answer.stderr[-3000:]
    report = orjson.loads(answer.stdout)
    assert (answer.returncode, report["differences"]) == (0, [])
    records: int = report["records"]
    return records


@pytest.mark.timeout(600 + MINUTES * 60)
async def test_the_monkey_breaks_no_promise(own_pipeline: Make, own_engines: LocalEngines, bank: Bank) -> None:
    seconds = MINUTES * 60
    print(f"\nCHAOS_SEED={SEED} CHAOS_MINUTES={MINUTES:g}", flush=True)
    bank.latency_s = LATENCY_S
    shop = own_pipeline(
        payment_timeout_s=PAYMENT_TIMEOUT_S,
        redis_timeout_s=1.0,
        postgres_timeout_s=10.0,
        stall_timeout_s=30.0,
    )
    number = max(ORDERS_MIN, int(ORDERS_PER_S * seconds))
    scenario = Scenario(number, seed=SEED)
    await shop.start(scenario.products, workers=0)
    async with shop.keep(2) as keeper:
        await shop.settled(2)
        monkey = Monkey(shop, keeper, own_engines, scenario, bank, SEED)
        flowing = asyncio.create_task(scenario.flow(shop, over_s=seconds))
        await monkey.run(seconds)
        await asyncio.to_thread(own_engines.up)
        await shop.reconnect()
        await flowing
        outcome = await scenario.check(shop)
        read = await reconciled(shop)
    faults = sum(monkey.counts.values())
    print(f"{faults} faults in {seconds:.0f} s, {number} orders, 0 violations: {dict(outcome)}")
    print(f"read again: {read:,} records, no drift")
    for worker in shop.workers:
        if (code := worker.process.returncode) not in (None, *EXPECTED):
            print(f"{worker.log.name} ended with {code}:\n{worker.tail(12)}")
    print(f"faults: {dict(monkey.counts)}; exit codes of workers that ended: {Counter(keeper.ended)}", flush=True)
