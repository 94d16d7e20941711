"""How far the workers' group is, from outside: its committed offsets and the ends of its topics."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.structs import OffsetAndMetadata

from orderstream.streams.topics import ORDER_COMMANDS, ORDER_LINES, ORDERS, RESERVATIONS, STOCK_COMMANDS, TOPICS
from tests.harness import Pipeline

INPUTS = (ORDERS, ORDER_LINES, RESERVATIONS, ORDER_COMMANDS, STOCK_COMMANDS)
"""The topics that the stages read."""


def partitions(shop: Pipeline) -> list[TopicPartition]:
    """Return every partition that the stages read."""
    names = [shop.settings.topic(spec.name) for spec in INPUTS]
    return [TopicPartition(name, number) for name in names for number in range(shop.settings.partitions)]


class Progress:
    """Watches every partition of a pipeline while it is entered.

    Attributes:
        longest_s: the longest time that a partition had records waiting and made no progress, in seconds.
        where: that partition.
    """

    def __init__(self, shop: Pipeline) -> None:
        self._shop = shop
        self._task: asyncio.Task[None] | None = None
        self.longest_s = 0.0
        self.where: TopicPartition | None = None

    async def __aenter__(self) -> Progress:
        kafka = self._shop.settings.kafka
        self._admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
        self._consumer = AIOKafkaConsumer(bootstrap_servers=kafka, isolation_level="read_committed")
        await self._admin.start()
        await self._consumer.start()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._task is not None
        failed = self._task.done()
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._consumer.stop()
        await self._admin.close()
        if failed and kind is None:
            self._task.result()

    async def lags(self) -> dict[TopicPartition, tuple[int, int]]:
        """Return the committed offset of each partition with records waiting, and how many wait."""
        tps = partitions(self._shop)
        ends = await self._consumer.end_offsets(tps)
        offsets = await self._admin.list_consumer_group_offsets(self._shop.settings.app_id)
        committed = {tp: max(0, offsets[tp].offset) if tp in offsets else 0 for tp in tps}
        return {tp: (committed[tp], ends[tp] - committed[tp]) for tp in tps if ends[tp] > committed[tp]}

    async def _watch(self) -> None:
        since: dict[TopicPartition, tuple[int, float]] = {}
        while True:
            lags, now = await self.lags(), time.monotonic()
            since = {
                tp: since[tp] if tp in since and since[tp][0] == committed else (committed, now)
                for tp, (committed, _) in lags.items()
            }
            for tp, (_, then) in since.items():
                if now - then > self.longest_s:
                    self.longest_s, self.where = now - then, tp
            await asyncio.sleep(0.5)


async def drained(shop: Pipeline, timeout_s: float = 90.0) -> None:
    """Wait until the group has committed all that its topics hold."""
    deadline = time.monotonic() + timeout_s
    async with Progress(shop) as progress:
        while lags := await progress.lags():
            assert time.monotonic() < deadline, lags
            await asyncio.sleep(0.3)


async def set_back(shop: Pipeline) -> None:
    """Set the group's offsets back to the first records that the topics have; no worker may run."""
    consumer: Any = AIOKafkaConsumer(
        bootstrap_servers=shop.settings.kafka, group_id=shop.settings.app_id, enable_auto_commit=False
    )
    await consumer.start()
    try:
        tps = partitions(shop)
        consumer.assign(tps)
        first = await consumer.beginning_offsets(tps)
        await consumer.commit({tp: OffsetAndMetadata(first[tp], "") for tp in tps})
    finally:
        await consumer.stop()


async def forget(shop: Pipeline, *topics: str, but: int = 0) -> None:
    """Delete all records of the topics, or of some, but the last ones of each partition, as retention does in the end."""
    names = [shop.settings.topic(name) for name in topics or [spec.name for spec in TOPICS]]
    tps = [TopicPartition(name, p) for name in names for p in range(shop.settings.partitions)]
    consumer = AIOKafkaConsumer(bootstrap_servers=shop.settings.kafka)
    admin = AIOKafkaAdminClient(bootstrap_servers=shop.settings.kafka)
    await consumer.start()
    await admin.start()
    try:
        ends = await consumer.end_offsets(tps)
        await admin.delete_records(
            {tp: RecordsToDelete(before_offset=end - but) for tp, end in ends.items() if end > but}
        )
    finally:
        await consumer.stop()
        await admin.close()
