"""Reads topics from offsets to their ends, as fast as they come: a plain consumer, in no group, that commits nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    NotCoordinatorForGroupError,
    UnknownTopicOrPartitionError,
)
from aiokafka.structs import OffsetAndMetadata

from orderstream import access
from orderstream.settings import Settings
from orderstream.streams.counts import say
from orderstream.streams.topics import TOPICS
from orderstream.streams.upstream.clients import READ_COMMITTED, REQUEST_TIMEOUT_MS
from orderstream.streams.upstream.pacing import pace_consumer

FETCH_BYTES_MAX = 1024 * 1024
"""Bytes of one partition in one answer of the broker."""

ANSWER_BYTES_MAX = 16 * 1024 * 1024
"""Bytes of one answer of the broker: as much waits here, and as much again is being sent."""

FETCH_WAIT_MS = 50
"""How long the broker may hold a fetch back while it has nothing, in milliseconds."""

BACKOFF_MS = 20
"""Pause between two tries to learn where a topic lives, in milliseconds: the client learns of each topic by its own."""

RECORDS_MAX = 10_000
"""Records handed out at once: as objects they are several times as large as on the wire."""

NAMES = [spec.name for spec in TOPICS]

COORDINATOR_S = 15.0
"""A broker that was never asked for a group's offsets first makes the topic that keeps them."""

POLL_MS = 50
"""How often is looked whether all that is left of a partition are the marks of transactions: they are no records."""

SILENCE_S = 30.0
"""A broker that has records and sends none for so long is unavailable."""

Offsets = dict[TopicPartition, int]


class Replay:
    """A consumer of whole partitions.

    Attributes:
        partitions: of the topics that are read, all that there are.
        read: the offset after the last record that was handed out, by topic and partition.
    """

    def __init__(self, settings: Settings, topics: Sequence[str]) -> None:
        self._settings, self._names = settings, topics
        self.partitions: list[TopicPartition] = []
        self.read: Offsets = {}
        self._consumer: Any = None
        self._admin: Any = None
        self._counts: dict[str, int] = {}

    async def __aenter__(self) -> Replay:
        """Connect.

        Raises:
            KafkaError: the broker does not answer.
        """
        self._consumer = AIOKafkaConsumer(
            **access.kafka(self._settings),
            client_id="orderstream-replay",
            enable_auto_commit=False,
            auto_offset_reset="none",
            max_partition_fetch_bytes=FETCH_BYTES_MAX,
            fetch_max_bytes=ANSWER_BYTES_MAX,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            retry_backoff_ms=BACKOFF_MS,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            isolation_level=READ_COMMITTED,
        )
        pace_consumer(self._consumer)
        self._admin = AIOKafkaAdminClient(
            **access.kafka(self._settings),
            client_id="orderstream-replay",
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        try:
            await access.start_kafka(self._consumer, self._settings)
            await self._admin.start()
            self._counts = {t["topic"]: len(t["partitions"]) for t in await self._admin.describe_topics()}
            self.partitions = [tp for name in self._names for tp in self.partitions_of(name)]
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.stop()
        await self._admin.close()

    def partitions_of(self, topic: str) -> list[TopicPartition]:
        """Return all partitions of a topic: those of the pipeline, and those that it has got besides."""
        return [TopicPartition(topic, p) for p in range(max(self._settings.partitions, self._counts.get(topic, 0)))]

    def misfits(self) -> dict[str, str]:
        """Return what is wrong with those of our topics that have another number of partitions than the pipeline."""
        wanted = self._settings.partitions
        found = {name: self._counts.get(name, wanted) for name in map(self._settings.topic, NAMES)}
        return {name: say(name, number, wanted) for name, number in found.items() if number != wanted}

    async def check(self, others: Sequence[str]) -> None:
        """Check that these topics and those that are read here exist; asking for one might make it.

        Raises:
            UnknownTopicOrPartitionError: some do not.
        """
        wanted = {tp.topic for tp in self.partitions} | set(others)
        missing = wanted - await self.topics()
        if missing:
            raise UnknownTopicOrPartitionError(f"no topics {', '.join(sorted(missing))}: run `orderstream init` first")

    async def topics(self) -> set[str]:
        """Return the names of the topics that exist."""
        return set(await self._admin.list_topics())

    async def beginnings(self) -> Offsets:
        """Return the offset of the first record that each partition still has."""
        found: Offsets = await self._consumer.beginning_offsets(self.partitions)
        return found

    async def oldest(self) -> dict[TopicPartition, int]:
        """Return when the first record of each partition was written, in ms since the epoch; empty ones are left out."""
        found = await self._consumer.offsets_for_times(dict.fromkeys(self.partitions, 0))
        return {tp: place.timestamp for tp, place in found.items() if place is not None}

    async def ends(self, partitions: Sequence[TopicPartition] | None = None) -> Offsets:
        """Return the offset after the last record of each partition; without an argument, of those that are read here.

        Before an open transaction, a partition ends: nobody knows yet whether there is what stands behind.
        """
        found: Offsets = await self._consumer.end_offsets(list(partitions or self.partitions))
        return found

    async def committed(self, group: str) -> dict[TopicPartition, OffsetAndMetadata]:
        """Return what a consumer group has committed; a partition that it never committed is left out."""
        deadline = time.monotonic() + COORDINATOR_S
        while True:
            try:
                found = await self._admin.list_consumer_group_offsets(group)
                break
            except (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError, GroupLoadInProgressError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)
        return {tp: row for tp, row in found.items() if row.offset >= 0}

    async def cluster_id(self) -> str:
        """Return the id of the Kafka cluster."""
        return str((await self._admin.describe_cluster())["cluster_id"])

    def begin(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Go to these offsets; every partition that is read here has one."""
        self._consumer.assign(self.partitions)
        for tp in self.partitions:
            self._consumer.seek(tp, offsets[tp])
            self.read[tp] = offsets[tp]

    async def until(self, ends: Mapping[TopicPartition, int]) -> AsyncIterator[tuple[TopicPartition, Sequence[Any]]]:
        """Yield lists of consecutive records of one partition until all of these offsets are reached.

        What a fetch brought beyond them is left for the next call.

        Raises:
            KafkaError: the broker became unavailable.
            TimeoutError: it sent nothing for :data:`SILENCE_S`.
        """
        waiting = {tp for tp, end in ends.items() if self.read[tp] < end}
        # A fetch that asks only for what is not there yet would hold up the next one.
        self._consumer.pause(*(tp for tp in self.partitions if tp not in waiting))
        self._consumer.resume(*waiting)
        heard = time.monotonic()
        while waiting:
            fetched = await self._consumer.getmany(*waiting, timeout_ms=POLL_MS, max_records=RECORDS_MAX)
            for tp, records in fetched.items():
                end = ends[tp]
                if records[-1].offset >= end:
                    beyond = next(n for n, record in enumerate(records) if record.offset >= end)
                    self._consumer.seek(tp, records[beyond].offset)
                    records = records[:beyond]  # noqa: PLW2901
                    self.read[tp] = end
                else:
                    self.read[tp] = await self._consumer.position(tp)
                if records:
                    yield tp, records
            if not fetched:
                # The last records may no longer exist (compaction, a transaction's mark): the position shows it.
                for tp in waiting:
                    self.read[tp] = await self._consumer.position(tp)
            reached = {tp for tp in waiting if self.read[tp] >= ends[tp]}
            if fetched or reached:
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENCE_S:
                raise TimeoutError(f"no records of {len(waiting)} partitions for {SILENCE_S:.0f} s")
            waiting -= reached
            self._consumer.pause(*reached)

    async def whole(self, topic: str, partitions: Sequence[int]) -> AsyncIterator[Sequence[Any]]:
        """Yield all the records of some partitions, from their beginnings to their present ends; then go back.

        Raises:
            KafkaError, TimeoutError: as :meth:`until` does.
        """
        tps = [TopicPartition(topic, partition) for partition in partitions]
        beginnings = await self._consumer.beginning_offsets(tps)
        async for _, records in self.between(beginnings, await self.ends(tps)):
            yield records

    async def these(self, topic: str, places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Any]:
        """Return the records at these places (partition, offset) that still exist.  Then go back.

        Reads all that stands between the first and the last of each partition.

        Raises:
            KafkaError, TimeoutError: as :meth:`until` does.
        """
        wanted = set(places)
        firsts: Offsets = {}
        ends: Offsets = {}
        for partition, offset in sorted(wanted):
            tp = TopicPartition(topic, partition)
            firsts.setdefault(tp, offset)
            ends[tp] = offset + 1
        beginnings = await self._consumer.beginning_offsets([*ends])
        starts = {tp: max(first, beginnings[tp]) for tp, first in firsts.items() if beginnings[tp] < ends[tp]}
        found = {}
        async for tp, records in self.between(starts, {tp: ends[tp] for tp in starts}):
            for record in records:
                if (place := (tp.partition, record.offset)) in wanted:
                    found[place] = record
        return found

    async def since(self, times: Mapping[TopicPartition, int]) -> Offsets:
        """Return the offset of the first record that is not older than this, in ms since the epoch; without one, the end."""
        found = await self._consumer.offsets_for_times(dict(times))
        ends = await self.ends([tp for tp in times if found.get(tp) is None])
        return {tp: ends[tp] if found.get(tp) is None else found[tp].offset for tp in times}

    async def between(
        self, starts: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int]
    ) -> AsyncIterator[tuple[TopicPartition, Sequence[Any]]]:
        """Yield lists of consecutive records of these partitions, from these offsets to those; then go back.

        Raises:
            KafkaError, TimeoutError: as :meth:`until` does.
        """
        before = {tp: self.read[tp] for tp in starts}
        try:
            for tp, offset in starts.items():
                self._consumer.seek(tp, offset)
                self.read[tp] = offset
            async for tp, records in self.until(ends):
                yield tp, records
        finally:
            for tp, offset in before.items():
                self._consumer.seek(tp, offset)
                self.read[tp] = offset


async def fold(
    replay: Replay,
    ends: Mapping[TopicPartition, int],
    take: Callable[[str, int, Sequence[Any]], None],
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Read to these offsets and hand every list of records to ``take``; return how many records there were."""
    done = 0
    async for tp, records in replay.until(ends):
        take(tp.topic, tp.partition, records)
        done += len(records)
        progress(done)
    return done
