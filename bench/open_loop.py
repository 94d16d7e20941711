"""Latency under a load that does not wait: an open loop, without coordinated omission.

Each order has its time fixed in advance, evenly spaced; its latency counts from that time, whether or not the sender was
late, or the answer to an earlier order still to come.  So a pause of anybody counts for every order that fell into it.

The ends are read from ``order-events``, at the moment when this process, a consumer like any other, has the event.
Postgres' own timestamps would flatter: a transaction carries the time of its beginning, and is not seen before its end.
RESERVED is told sooner than its event: to who waits for the verdict.  On the topic that is this process, by the header that
an ingress sends; through the ingress it is the moment at which the answer to the POST was read.  An order whose verdict took
longer than the ingress waits (202) counts with its event instead.

Sender, client and consumer are one process on the same machine: what they cost is shown, and late sends count as latency.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import asyncpg
import orjson
import redis.asyncio
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from orderstream.bench.load import Drawn, Load, Produced, catalogue, draw
from orderstream.bench.measure import WARM_UP_ORDERS, Demand, Run, judged, together, warm_up, watched
from orderstream.bench.pipeline import Bench, Pipeline
from orderstream.console import Bar
from orderstream.http.answers import PATH
from orderstream.lua.gate import Keys
from orderstream.settings import Settings
from orderstream.streams.headers import REPLY_TO
from orderstream.streams.orders import Status
from orderstream.streams.partitions import product_partition
from orderstream.streams.topics import ORDER_EVENTS, ORDERS

RATES = (500, 1_000, 2_000)
"""Orders a second."""

WARM_UP_RATE = 1_000
"""Orders a second of the round before the first."""

SECONDS = 20
"""How long each rate is kept up, if there are orders enough."""

SETTLE_S = 2.0
"""The first orders of each rate are sent, and not counted: connections open, batches find their rhythm."""

STATUSES = (Status.RESERVED, Status.CONFIRMED)
PERCENTS = (50, 95, 99)
WAYS = {"kafka": "produce", "http": "POST"}
"""Ways in, and their names in sentences."""

END_S = 60.0
"""Longest wait for the last event."""

CONNECTIONS_MAX = 1_000
"""Of the HTTP client; a request that waits for one is late, and that counts."""

REPLIES = "bench"
"""The channel on which verdicts come."""

PRODUCTS = 100

Send = Callable[[int], Coroutine[Any, Any, None]]


def figure_name(way: str, rate: int, status: str, percent: int) -> str:
    """Return the name of one figure; milliseconds."""
    return f"{way}_{rate}_{status.lower()}_p{percent}_ms"


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of sorted values.

    Raises:
        ValueError: there is none.
    """
    if not ordered:
        raise ValueError("no order gave a latency")
    return ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1]


@dataclass
class Round:
    """The orders of one rate: what is sent when, and when each end was seen.  Seconds of ``time.perf_counter``."""

    rate: int
    orders: Sequence[Drawn]
    ids: Mapping[str, int]
    start: float = 0.0
    late_s: float = 0.0
    ends: dict[str, dict[int, float]] = field(default_factory=lambda: {status: {} for status in STATUSES})
    answers: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, rate: int, orders: Sequence[Drawn]) -> Round:
        """Prepare a round."""
        return cls(rate, orders, {orjson.loads(order.value)["order_id"]: n for n, order in enumerate(orders)})

    def scheduled(self, n: int) -> float:
        """Return the time of order ``n``."""
        return self.start + n / self.rate

    def saw(self, order_id: str, status: str, at: float) -> None:
        """Note an event; the first one counts."""
        n = self.ids.get(order_id)
        if n is not None and status in self.ends:
            self.ends[status].setdefault(n, at)

    @property
    def done(self) -> bool:
        """Whether every order that was taken in has ended."""
        return len(self.ends[Status.CONFIRMED]) >= len(self.orders) - self.refused

    @property
    def refused(self) -> int:
        """Requests that the ingress answered with neither a verdict nor a promise of one."""
        return sum(count for status, count in self.answers.items() if status not in (201, 202))

    def figures(self, way: str) -> dict[str, float]:
        """Return the percentiles in milliseconds, of the orders after the first :data:`SETTLE_S`."""
        first = int(min(SETTLE_S * self.rate, len(self.orders) / 10))
        found: dict[str, float] = {}
        for status, seen in self.ends.items():
            waits = sorted((at - self.scheduled(n)) * 1000 for n, at in seen.items() if n >= first)
            if waits:
                found |= {figure_name(way, self.rate, status, p): percentile(waits, p) for p in PERCENTS}
        return found


async def pace_out(loop: Round, send: Send) -> None:
    """Send each order at its time; never wait for what became of it."""
    loop.start = time.perf_counter() + 0.1
    tasks: set[asyncio.Task[None]] = set()
    for n in range(len(loop.orders)):
        wait = loop.scheduled(n) - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        elif not n % 100:
            await asyncio.sleep(0)  # late: others have to come to their turn as well
        loop.late_s = max(loop.late_s, time.perf_counter() - loop.scheduled(n))
        task = asyncio.create_task(send(n))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def listen(consumer: Any, loop: Round) -> None:
    """Note events as they come, until cancelled."""
    while True:
        fetched = await consumer.getmany(timeout_ms=100)
        at = time.perf_counter()
        for records in fetched.values():
            for record in records:
                loop.saw(record.key.decode(), orjson.loads(record.value)["status"], at)


async def listen_to_replies(subscription: Any, loop: Round) -> None:
    """Note verdicts as they come, until cancelled."""
    async for message in subscription.listen():
        at = time.perf_counter()
        if message["type"] == "message":
            for order_id, status, _ in orjson.loads(message["data"]):
                loop.saw(order_id, status, at)


async def one_rate(pipeline: Pipeline, way: str, loop: Round, seed: str) -> Run:
    """Measure one rate on a fresh pipeline."""
    settings, load = pipeline.settings, Load(catalogue(len({order.product_id for order in loop.orders})))
    count = len(loop.orders)
    connection = await asyncpg.connect(settings.database_url, timeout=30)
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.kafka, auto_offset_reset="latest", fetch_max_wait_ms=100)
    consumer.assign([TopicPartition(settings.topic(ORDER_EVENTS.name), n) for n in range(settings.partitions)])
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka, acks="all", linger_ms=0)
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX))
    verdicts = redis.asyncio.Redis.from_url(settings.redis_url)
    try:
        await warm_up(pipeline, connection, load, seed)
        await producer.start()
        await consumer.start()
        await consumer.seek_to_end()
        send = _produce(settings, producer, loop) if way == "kafka" else _post(pipeline, session, loop)
        subscription = verdicts.pubsub()
        await subscription.subscribe(Keys(settings.redis_prefix).replies(REPLIES))
        listeners = [
            asyncio.create_task(listen(consumer, loop)),
            asyncio.create_task(listen_to_replies(subscription, loop)),
        ]
        gc.collect()
        gc.freeze()
        gc.disable()  # a pause of this process would be counted as one of the pipeline
        async with watched(pipeline, connection) as seen:
            began = time.time()
            with Bar(f"confirmed at {loop.rate}/s", count) as bar:
                sending = asyncio.create_task(pace_out(loop, send))
                deadline = time.monotonic() + count / loop.rate + END_S
                while not (sending.done() and loop.done) and time.monotonic() < deadline:
                    pipeline.check_alive()
                    bar.update(len(loop.ends[Status.CONFIRMED]))
                    await asyncio.sleep(0.2)
                if sending.done():
                    sending.result()
        for listener in listeners:
            listener.cancel()
        await asyncio.wait(listeners)
        demand = Demand(load, count, {Status.CONFIRMED: count - loop.refused}, warm_up=load)
        produced = Produced(began, time.time())
        run = await judged(settings, connection, demand, produced, lines=count, seen=seen)
        return _told(run, way, loop)
    finally:
        gc.enable()
        gc.unfreeze()
        await session.close()
        await verdicts.aclose()
        await consumer.stop()
        await producer.stop()
        await connection.close()


def _produce(settings: Settings, producer: Any, loop: Round) -> Send:
    topic, partitions = settings.topic(ORDERS.name), settings.partitions

    async def send(n: int) -> None:
        order = loop.orders[n]
        partition = product_partition(order.product_id, partitions)
        await producer.send_and_wait(
            topic,
            order.value,
            key=order.product_id.encode(),
            partition=partition,
            headers=[(REPLY_TO, REPLIES.encode())],
        )

    return send


def _post(pipeline: Pipeline, session: Any, loop: Round) -> Send:
    assert pipeline.ingress is not None
    url, headers = pipeline.ingress.url + PATH, {"Content-Type": "application/json"}

    async def send(n: int) -> None:
        try:
            async with session.post(url, data=loop.orders[n].value, headers=headers) as answer:
                await answer.read()
                status = answer.status
        except (aiohttp.ClientError, TimeoutError):
            status = 0
        loop.answers[status] += 1
        if status == 201:
            loop.ends[Status.RESERVED][n] = time.perf_counter()

    return send


def _told(run: Run, way: str, loop: Round) -> Run:
    """Replace a run's rates by its latencies, and say what does not show in them."""
    notes, faults = [], list(run.faults)
    if late := loop.answers[202]:
        notes.append(f"{late} of {len(loop.orders)} POSTs were answered before their verdict")
    if loop.refused:
        notes.append(f"the ingress refused {loop.refused} of {len(loop.orders)} POSTs: this rate is too much for it")
    for status, seen in loop.ends.items():
        if missing := len(loop.orders) - loop.refused - len(seen):
            faults.append(f"{missing} orders without an event {status}")
    detail = {**run.detail, "late_send_ms_max": round(loop.late_s * 1000, 1), "answers": dict(loop.answers)}
    return Run({} if loop.refused else loop.figures(way), faults, run.usage, detail, notes=notes)


def paced(bench: Bench, way: str, rate: int, orders: int, seed: str, **overrides: Any) -> Run:
    """Measure one rate on a fresh pipeline: for :data:`SECONDS`, with ``orders`` orders at most.

    Args:
        bench: its engines.
        way: in; one of :data:`WAYS`.
        rate: orders a second.
        orders: at most.
        seed: of the draw.
        overrides: of settings.
    """
    products = catalogue(PRODUCTS)
    loop = Round.of(rate, list(draw(Load(products), min(orders, rate * SECONDS), seed)))
    stock = dict.fromkeys(products, len(loop.orders) + WARM_UP_ORDERS)
    with bench.pipeline(stock, ingress=way == "http", **overrides) as pipeline:
        return uvloop.run(one_rate(pipeline, way, loop, seed))


def warmed_up(bench: Bench, way: str, orders: int, seed: str) -> Run:
    """Make a round that does not count.

    A broker goes on compiling itself, on the same cores, until it has answered small requests for some ten seconds, and a
    burst of orders does not make it do so.
    """
    return replace(paced(bench, way, WARM_UP_RATE, orders, f"{seed}/warm_up"), figures={})


def latency(bench: Bench, orders: int, seed: str) -> Run:
    """Measure every way at every rate, each on a fresh pipeline, at most ``orders`` orders each."""
    parts = {"warm_up": warmed_up(bench, "http", orders, seed)}
    for way in WAYS:
        for rate in RATES:
            parts[f"{way}_{rate}"] = paced(bench, way, rate, orders, f"{seed}/{way}_{rate}")
    return together(parts, {name: value for part in parts.values() for name, value in part.figures.items()})
