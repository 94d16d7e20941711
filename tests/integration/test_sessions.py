"""Fetch sessions, and a kept list of partitions, with a real broker.

Whatever is sought, paused or idle, every record comes, and each end is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.protocol.fetch import FetchRequest

from orderstream.jobs.init import create_topics
from orderstream.settings import Settings
from orderstream.streams.producer import Producer
from orderstream.streams.topics import ORDERS, STOCK_COMMANDS
from orderstream.streams.upstream.clients import READ_COMMITTED
from orderstream.streams.upstream.fetch_list import keep_fetch_list
from orderstream.streams.upstream.sessions import fetch_in_sessions
from tests.conftest import MakeSettings

pytestmark = pytest.mark.engines

PARTITIONS = 6


class Reader:
    """A consumer that fetches in sessions, a producer, and how many partitions each fetch was answered about."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.topics = [settings.topic(spec.name) for spec in (ORDERS, STOCK_COMMANDS)]
        self.places = [TopicPartition(topic, n) for topic in self.topics for n in range(PARTITIONS)]
        self.producer = Producer(settings)
        self.consumer: Any = AIOKafkaConsumer(
            bootstrap_servers=settings.kafka,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=50,
            isolation_level=READ_COMMITTED,
        )
        self.answered: list[int] = []
        client = self.consumer._client
        send = client.send

        async def seen(node_id: int, request: Any, **options: Any) -> Any:
            response = await send(node_id, request, **options)
            if isinstance(request, FetchRequest):
                self.answered.append(sum(len(parts) for _, parts in response.topics))
            return response

        client.send = seen
        fetch_in_sessions(self.consumer)

    async def put(self, place: TopicPartition, *values: bytes) -> None:
        await self.producer.send({(place.topic, place.partition): [(None, value, ()) for value in values]})

    async def read(self, count: int) -> list[tuple[TopicPartition, bytes]]:
        """Return the next records, so many."""
        found: list[tuple[TopicPartition, bytes]] = []
        async with asyncio.timeout(20):
            while len(found) < count:
                for place, records in (await self.consumer.getmany(timeout_ms=100)).items():
                    found += [(place, record.value) for record in records]
        return found


@pytest.fixture
async def reader(make_settings: MakeSettings) -> AsyncIterator[Reader]:
    settings = make_settings(partitions=PARTITIONS)
    await create_topics(settings)
    reader = Reader(settings)
    await reader.producer.start()
    reader.consumer.assign(reader.places)
    await reader.consumer.start()
    keep_fetch_list(reader.consumer)
    yield reader
    await reader.consumer.stop()
    await reader.producer.stop()


async def test_idle_partitions_are_not_answered_about_and_records_come_from_each(reader: Reader) -> None:
    first, second = reader.places[0], reader.places[-1]
    await reader.put(first, b"0")
    assert await reader.read(1) == [(first, b"0")]
    await asyncio.sleep(0.3)
    reader.answered.clear()
    for n in range(1, 6):
        for place in (first, second):
            await reader.put(place, b"%d" % n)
            assert await reader.read(1) == [(place, b"%d" % n)]
    assert max(reader.answered) <= 1
    assert {reader.consumer.highwater(place) for place in reader.places} == {0, 5, 6}


async def test_what_is_sought_comes_again_and_what_is_paused_later(reader: Reader) -> None:
    first, second = reader.places[:2]
    await reader.put(first, b"a", b"b")
    await reader.put(second, b"c")
    assert sorted(await reader.read(3)) == [(first, b"a"), (first, b"b"), (second, b"c")]
    reader.consumer.seek(first, 1)
    assert await reader.read(1) == [(first, b"b")]
    reader.consumer.pause(first)
    await reader.put(first, b"d")
    await reader.put(second, b"e")
    assert await reader.read(1) == [(second, b"e")]
    reader.consumer.resume(first)
    assert await reader.read(1) == [(first, b"d")]


async def test_another_assignment_reads_on(reader: Reader) -> None:
    first, second = reader.places[:2]
    await reader.put(first, b"a")
    assert await reader.read(1) == [(first, b"a")]
    reader.consumer.assign([first, second])
    await reader.put(second, b"b")
    assert sorted(await reader.read(2)) == [(first, b"a"), (second, b"b")]  # without a group it begins anew
    assert reader.consumer.highwater(first) == 1


async def test_in_a_session_a_transaction_comes_once_it_is_committed_and_its_end_is_known(reader: Reader) -> None:
    first, second = reader.places[:2]
    consumer = reader.consumer
    await reader.put(first, b"a")
    assert await reader.read(1) == [(first, b"a")]
    await asyncio.sleep(0.3)  # everything has been answered about: from now on in the session
    reader.answered.clear()
    writer = AIOKafkaProducer(bootstrap_servers=reader.settings.kafka, transactional_id=reader.settings.app_id)
    async with writer:
        for ends in (writer.abort_transaction, writer.commit_transaction):
            before = {place: consumer.highwater(place) or 0 for place in (first, second)}
            await writer.begin_transaction()
            for place in (first, second):
                await writer.send_and_wait(place.topic, b"b", partition=place.partition)
            await reader.put(first, b"c")  # behind the beginning of an open transaction
            assert await consumer.getmany(timeout_ms=500) == {}
            for place, written in ((first, 2), (second, 1)):
                assert consumer.highwater(place) == before[place] + written
                assert consumer.last_stable_offset(place) == before[place]
            await ends()
            committed = [(first, b"b"), (second, b"b")] if ends == writer.commit_transaction else []
            assert sorted(await reader.read(1 + len(committed))) == sorted([*committed, (first, b"c")])
            await consumer.getmany(timeout_ms=500)
            for place in (first, second):
                end = consumer.highwater(place)
                assert (consumer.last_stable_offset(place), await consumer.position(place)) == (end, end)
    assert max(reader.answered) <= 2
