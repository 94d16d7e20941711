"""Producing in batches, to explicit partitions, acknowledged by all replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, KafkaTimeoutError, UnknownTopicOrPartitionError

from orderstream import access
from orderstream.errors import RecordTooLarge, SettingsError
from orderstream.settings import PREFIX, Settings
from orderstream.streams import counts
from orderstream.streams.dead_letters import DeadLetter, Headers
from orderstream.streams.partitions import order_partition, partition_of, product_partition
from orderstream.streams.topics import (
    DEAD_LETTERS,
    ORDER_COMMANDS,
    ORDER_EVENTS,
    ORDERS,
    STOCK_COMMANDS,
    TopicSpec,
)
from orderstream.streams.upstream.clients import REQUEST_TIMEOUT_MS, TOO_LARGE
from orderstream.streams.upstream.filling import fill
from orderstream.streams.upstream.pacing import pace

BATCH_BYTES_MAX = 512 * 1024
"""One produce batch: half of the broker's limit of 1 MiB."""

BATCH_BYTES_MIN = 16 * 1024
"""Where a topic's limit is lower, batches become smaller, down to this; what is larger is sent alone."""

REQUEST_BYTES_MAX = 2 * 1024 * 1024
"""The largest request: a dead letter may carry a record of 1 MiB and its story."""

STOP_S = 10.0
"""Longest wait for a broken producer to stop; what it still holds is sent again by the next one."""

log = structlog.get_logger("producer")

Record = tuple[bytes | None, bytes | None, Headers]
Step = Mapping[tuple[str, int], Sequence[Record]]


class Outbox:
    """What a batch sends, by topic and partition, in two steps: first dead letters and events, then what others act on."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._partitions = settings.partitions
        self._publications: dict[tuple[str, int], list[Record]] = {}
        self._handovers: dict[tuple[str, int], list[Record]] = {}
        self._sources: list[tuple[Record, Any]] = []

    def _put(self, box: dict[tuple[str, int], list[Record]], spec: TopicSpec, partition: int, record: Record) -> None:
        box.setdefault((self._settings.topic(spec.name), partition), []).append(record)

    def event(self, order_id: str, home: int, value: bytes) -> None:
        """Publish what became of an order, in its home."""
        self._put(self._publications, ORDER_EVENTS, home, (order_id.encode(), value, ()))

    def dead_letter(self, letter: DeadLetter) -> None:
        """Reject a record that no stage can process."""
        partition = partition_of(letter.key or b"", self._partitions)
        self._put(self._publications, DEAD_LETTERS, partition, (letter.key, letter.value, letter.headers))

    def order(self, product_id: str, value: bytes, headers: Headers, source: Any = None) -> None:
        """Send an order on to the partition where it belongs; ``source`` is the record that brought it."""
        partition = product_partition(product_id, self._partitions)
        record = (product_id.encode(), value, headers)
        self._put(self._handovers, ORDERS, partition, record)
        if source is not None:
            self._sources.append((record, source))

    def withdraw(self, record: Record) -> Any:
        """Take out an order that was to be sent on; return the record that brought it, None for anything else."""
        for ours, source in self._sources:
            if ours is record:
                for records in self._handovers.values():
                    records[:] = [one for one in records if one is not record]
                return source
        return None

    def order_command(self, order_id: str, value: bytes, home: int | None = None) -> None:
        """Command something of an order's home; where that is not known, of whoever has the partition of its id."""
        partition = order_partition(order_id, self._partitions) if home is None else home
        self._put(self._handovers, ORDER_COMMANDS, partition, (order_id.encode(), value, ()))

    def stock_command(self, product_id: str, value: bytes) -> None:
        """Command something of a product's owner."""
        partition = product_partition(product_id, self._partitions)
        self._put(self._handovers, STOCK_COMMANDS, partition, (product_id.encode(), value, ()))

    def publications(self) -> Step:
        """Return what is published; it is to be acknowledged before the handovers are produced."""
        return self._publications

    def handovers(self) -> Step:
        """Return what others act on."""
        return self._handovers


class Producer:
    """An aiokafka producer that sends whole batches and gives up on none of them silently."""

    def __init__(self, settings: Settings, *, client_id: str = "orderstream") -> None:
        self._settings = settings
        self._client_id = client_id
        self._producer: Any = None
        self._starting = asyncio.Lock()
        self._batch_bytes = BATCH_BYTES_MAX

    async def start(self) -> None:
        """Connect.

        Raises:
            KafkaError: the broker does not answer.
        """
        await self._connected()

    async def stop(self) -> None:
        """Flush and disconnect."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.stop()

    async def _connected(self) -> Any:
        async with self._starting:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    **access.kafka(self._settings),
                    client_id=self._client_id,
                    acks="all",
                    enable_idempotence=True,
                    max_batch_size=self._batch_bytes,
                    max_request_size=REQUEST_BYTES_MAX,
                    request_timeout_ms=REQUEST_TIMEOUT_MS,
                    linger_ms=0,
                )
                pace(producer.client)
                try:
                    await access.start_kafka(producer, self._settings)
                except BaseException:
                    await producer.stop()
                    raise
                self._producer = producer
            return self._producer

    async def check_partitions(self, topics: Iterable[str]) -> None:
        """Check that these topics, by their names on the broker, have as many partitions as the settings say.

        Raises:
            KafkaError: the broker does not answer, or has no such topic.
            SettingsError: one has another number of partitions.
        """
        cluster = await (await self._connected()).client.fetch_all_metadata()
        found = {topic: len(cluster.partitions_for_topic(topic) or ()) for topic in topics}
        if missing := [topic for topic, number in found.items() if not number]:
            raise UnknownTopicOrPartitionError(f"no topics {', '.join(missing)}")
        wanted = self._settings.partitions
        other = [f"topic {topic} has {number} partitions" for topic, number in found.items() if number != wanted]
        if other:
            raise SettingsError([f"{PREFIX}PARTITIONS: {wanted}, but {one}" for one in other])

    async def check(self) -> None:
        """Ask Kafka for its metadata.

        Raises:
            KafkaError: it does not answer.
        """
        if not await (await self._connected()).client.force_metadata_update():
            raise KafkaTimeoutError("no broker answers with its metadata")

    async def misfit(self) -> str | None:
        """Return what is wrong with a topic that has another number of partitions; see :func:`counts.misfit`.

        Raises:
            KafkaError: the broker does not answer.
        """
        return await counts.misfit((await self._connected()).client, self._settings)

    async def send(self, step: Step) -> None:
        """Produce records, each list to one topic and partition, in order; return once all are acknowledged.

        Where not all of them were, all are safe to be sent again.

        Raises:
            RecordTooLarge: a topic takes no record as large as one of these.
            KafkaError: some were not acknowledged.
        """
        try:
            await self._send(step)
        except TOO_LARGE:
            await self._send(step, alone=True)
            self._batch_bytes = max(self._batch_bytes // 2, BATCH_BYTES_MIN)  # of the next producer
            names = sorted({topic for topic, _ in step})
            log.warning("a topic did not take such a batch, smaller ones follow", bytes=self._batch_bytes, topics=names)

    async def _send(self, step: Step, *, alone: bool = False) -> None:
        """Produce records in batches, or each alone, which shows the one that is too large."""
        producer = await self._connected()
        try:
            pending = []
            for (topic, partition), records in step.items():
                start = 0
                while start < len(records):
                    builder = producer.create_batch()
                    taken = 0 if alone else fill(builder, records[start:] if start else records)
                    if taken:
                        builder.close()
                        pending.append(await producer.send_batch(builder, topic, partition=partition))
                    else:  # or larger than a batch of ours: within the request's limit
                        key, value, headers = records[start]
                        record: Any = {"key": key, "partition": partition, "headers": list(headers)}
                        if alone:
                            await producer.send_and_wait(topic, value, **record)
                        else:
                            pending.append(await producer.send(topic, value, **record))
                    start += taken or 1
            if pending:
                await asyncio.gather(*pending)
        except KafkaError as error:
            # A producer whose sequence broke can't continue; the next attempt makes a new one.
            if self._producer is producer:
                self._producer = None
                await asyncio.wait_for(producer.stop(), STOP_S)
            if alone and isinstance(error, TOO_LARGE):
                raise RecordTooLarge(topic, records[start]) from error
            raise
