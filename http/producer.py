"""The producer of the ingress: of orders, and of commands over orders and stock."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, KafkaTimeoutError

from orderstream import access, connecting, metrics
from orderstream.errors import EngineUnavailable, RecordTooLarge, SettingsError
from orderstream.http.health import Presence
from orderstream.settings import PREFIX, Settings
from orderstream.streams import counts
from orderstream.streams.dead_letters import Headers
from orderstream.streams.orders import Order
from orderstream.streams.partitions import order_partition, product_partition
from orderstream.streams.topics import ORDER_COMMANDS, ORDERS, STOCK_COMMANDS
from orderstream.streams.tracing import Tracing
from orderstream.streams.upstream.clients import TOO_LARGE
from orderstream.streams.upstream.pacing import pace

LINGER_S = 0.005
"""How long a record waits for others of its partition: one request to Kafka then carries a burst of orders."""

PRODUCE_S = 5.0
"""Longest wait for Kafka to take an order.  One that waited longer is dropped, so that an outage leaves no flood behind."""

STOP_S = 1.0
"""Longest wait for a producer to disconnect."""

BATCH_BYTES_MAX, REQUEST_BYTES_MAX = 512 * 1024, 2 * 1024 * 1024
"""As for the stages' producer: half of the broker's limit for a record batch, and room for several of them."""

log = structlog.get_logger("ingress")


class OrderProducer:
    """Produces orders and commands.  One for the process: concurrent requests share its batches.

    It is no idempotent producer: aiokafka keeps the records of one for ever, so those of an outage would be produced long
    after their clients got a 503.  A record that is sent twice is one order, since it carries its id.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topic = settings.topic(ORDERS.name)
        self._producer: Any = None
        self._connecting = asyncio.Lock()
        self._stopping: set[asyncio.Task[None]] = set()
        self.presence = Presence("Kafka", settings.kafka)
        self._misfit: str | None = None
        self._watching: asyncio.Task[None] | None = None
        self.tracing: Tracing | None = None

    async def start(self) -> None:
        """Connect, and check that the topic has the number of partitions that the settings say.

        Raises:
            EngineUnavailable: Kafka does not answer, or has no topic yet.
            SettingsError: the topic has another number of partitions.
        """
        address, wanted = self._settings.kafka, self._settings.partitions
        with connecting.kafka(self._settings):
            async with asyncio.timeout(2 * PRODUCE_S):
                producer = await self._connected()
                found = (await producer.client.fetch_all_metadata()).partitions_for_topic(self._topic)
                if not found:
                    advice = "run `orderstream init` first"
                    raise EngineUnavailable("Kafka", address, f"it has no topic {self._topic} yet", advice)
                if len(found) != wanted:
                    fault = f"{PREFIX}PARTITIONS: {wanted}, but topic {self._topic} has {len(found)} partitions"
                    raise SettingsError([fault])
                await producer.partitions_for(self._topic)
        self._watching = asyncio.create_task(self._watch_partitions())

    async def _watch_partitions(self) -> None:
        """Look whether the topics still have the numbers of partitions that the settings say; else nothing is taken in."""
        before = None
        while True:
            await asyncio.sleep(counts.LOOK_S)
            try:
                found = await counts.misfit((await self._connected()).client, self._settings)
            except KafkaError:
                continue  # it is told where a record is not taken
            if found == before and found != self._misfit:
                self._misfit = found
                if found is None:
                    log.warning("the topics have their numbers of partitions again")
                else:
                    log.critical(
                        "a topic has another number of partitions than the pipeline: nothing is taken in", why=found
                    )
            before = found

    def _check_fit(self) -> None:
        if self._misfit is not None:
            why, _, advice = self._misfit.partition("\n")
            raise EngineUnavailable("Kafka", self._settings.kafka, why, advice)

    async def stop(self) -> None:
        """Disconnect."""
        if self._watching is not None:
            self._watching.cancel()
        if self._producer is not None:
            self._drop(self._producer)
        await asyncio.gather(*self._stopping)

    async def check(self) -> None:
        """Ask Kafka for its metadata.

        Raises:
            KafkaError: it does not answer.
            EngineUnavailable: a topic has another number of partitions.
        """
        self._check_fit()
        if not await (await self._connected()).client.force_metadata_update():
            raise KafkaTimeoutError("no broker sends its metadata")

    async def put(self, order: Order, value: bytes, headers: Headers) -> None:
        """Produce an order; return when all replicas have it.

        With tracing on, its record carries the trace.

        Args:
            order: its first product names the partition.
            value: the record.
            headers: of the record.

        Raises:
            EngineUnavailable: Kafka did not confirm it.
            RecordTooLarge: the topic takes none as large as this one.
        """
        if self.tracing is None:
            await self._put(order, value, headers)
        else:
            with self.tracing.producing(order.order_id, self._topic) as trace:
                await self._put(order, value, (*headers, *trace))

    async def stock_command(self, product_id: str, value: bytes) -> None:
        """Produce a command over a product's stock; return when all replicas have it.

        Raises:
            EngineUnavailable: Kafka did not confirm it.
        """
        topic = self._settings.topic(STOCK_COMMANDS.name)
        partition = product_partition(product_id, self._settings.partitions)
        await self._produce(topic, partition, product_id.encode(), value, ())

    async def order_command(self, order_id: str, value: bytes, home: int | None) -> None:
        """Produce a command over an order; return when all replicas have it.

        Args:
            order_id: the order.
            value: the record.
            home: the order's; None where it is not known: then whoever has the partition of its id keeps the command.

        Raises:
            EngineUnavailable: Kafka did not confirm it.
        """
        topic = self._settings.topic(ORDER_COMMANDS.name)
        partition = order_partition(order_id, self._settings.partitions) if home is None else home
        await self._produce(topic, partition, order_id.encode(), value, ())

    async def _put(self, order: Order, value: bytes, headers: Headers) -> None:
        product_id = order.lines[0][0]
        partition = product_partition(product_id, self._settings.partitions)
        await self._produce(self._topic, partition, product_id.encode(), value, headers)

    async def _produce(self, topic: str, partition: int, key: bytes, value: bytes, headers: Headers) -> None:
        self._check_fit()
        producer = None
        try:
            async with asyncio.timeout(PRODUCE_S):
                start = time.perf_counter()
                producer = await self._connected()
                try:
                    await producer.send_and_wait(topic, value, key=key, partition=partition, headers=list(headers))
                except TOO_LARGE:  # it, or the batch that it was in
                    batch = producer.create_batch()
                    batch.append(key=key, value=value, timestamp=None, headers=list(headers))
                    await (await producer.send_batch(batch, topic, partition=partition))
                metrics.PRODUCE_LATENCY.observe(time.perf_counter() - start)
        except TOO_LARGE as error:
            raise RecordTooLarge(topic, (key, value, headers)) from error
        except (KafkaError, TimeoutError) as error:
            if producer is not None and not getattr(error, "retriable", True):
                self._drop(producer)  # it may be broken for good; the next record makes a new one
            raise self.presence.unanswered(error, "orders are answered 503") from error
        self.presence.answered()

    async def _connected(self) -> Any:
        async with self._connecting:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    **access.kafka(self._settings),
                    client_id=f"{self._settings.app_id}-ingress",
                    acks="all",
                    linger_ms=LINGER_S * 1000,
                    max_batch_size=BATCH_BYTES_MAX,
                    max_request_size=REQUEST_BYTES_MAX,
                    request_timeout_ms=int(PRODUCE_S * 1000),
                )
                pace(producer.client)
                try:
                    await access.start_kafka(producer, self._settings)
                except BaseException:
                    await producer.stop()
                    raise
                self._producer = producer
            return self._producer

    def _drop(self, producer: Any) -> None:
        if self._producer is not producer:
            return
        self._producer = None
        task = asyncio.create_task(_stop(producer))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)


async def _stop(producer: Any) -> None:
    try:
        async with asyncio.timeout(STOP_S):
            await producer.stop()
    except (KafkaError, TimeoutError) as error:
        log.warning("a producer did not disconnect", error=repr(error))
