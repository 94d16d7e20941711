"""Producing, to a real Kafka: all of a step is there when it is done, in order, in the partition of its key."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from orderstream.engines.local import LocalEngines
from orderstream.engines.process import free_port
from orderstream.errors import InvalidRecord, RecordTooLarge
from orderstream.jobs.init import create_topics
from orderstream.settings import Settings
from orderstream.streams.dead_letters import DeadLetter, dead_letter
from orderstream.streams.partitions import order_partition, product_partition
from orderstream.streams.producer import BATCH_BYTES_MAX, Outbox, Producer, Record
from orderstream.streams.topics import (
    DEAD_LETTERS,
    ORDER_COMMANDS,
    ORDER_EVENTS,
    ORDERS,
    STOCK_COMMANDS,
    TOPICS,
    TopicSpec,
)
from tests.conftest import ROOT, MakeSettings

pytestmark = pytest.mark.engines

MIB = 1024 * 1024


def oid(n: int) -> str:
    return str(uuid.UUID(int=n))


class Wire:
    """A producer under test, and what a reader finds on the topics."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.producer = Producer(settings)

    def outbox(self) -> Outbox:
        return Outbox(self.settings)

    async def records(self, spec: TopicSpec) -> dict[int, list[Any]]:
        """Return every record of a topic by partition, in the order of their offsets."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self.settings.kafka, auto_offset_reset="earliest")
        await consumer.start()
        try:
            tps = [TopicPartition(self.settings.topic(spec.name), n) for n in range(self.settings.partitions)]
            consumer.assign(tps)
            ends = await consumer.end_offsets(tps)
            found: dict[int, list[Any]] = {tp.partition: [] for tp in tps}
            while any([await consumer.position(tp) < ends[tp] for tp in tps]):
                for tp, batch in (await consumer.getmany(timeout_ms=500)).items():
                    found[tp.partition].extend(batch)
            return found
        finally:
            await consumer.stop()


@pytest.fixture
async def wire(make_settings: MakeSettings) -> AsyncIterator[Wire]:
    settings = make_settings(partitions=4)
    await create_topics(settings)
    wire = Wire(settings)
    yield wire
    await wire.producer.stop()


async def test_records_land_in_the_partition_of_their_key_or_at_their_orders_home(wire: Wire) -> None:
    outbox = wire.outbox()
    products = [f"p{n}" for n in range(40)]
    for n, product_id in enumerate(products):
        outbox.order(product_id, b"o", ())
        outbox.stock_command(product_id, b"s")
        outbox.event(oid(n), n % 4, b"e")
        outbox.order_command(oid(n), b"c")
        outbox.order_command(oid(n), b"at home", home=n % 4)
    await wire.producer.send(outbox.publications())
    await wire.producer.send(outbox.handovers())

    # Another client, which leaves the choice to its own default partitioner, puts the same keys in the same places.
    other = AIOKafkaProducer(bootstrap_servers=wire.settings.kafka)
    await other.start()
    for product_id in products:
        await other.send(wire.settings.topic(ORDERS.name), b"theirs", key=product_id.encode())
    await other.stop()

    def home_of(order_id: str, _partitions: int) -> int:
        return uuid.UUID(order_id).int % 4

    for spec, number, owner in (
        (ORDERS, 80, product_partition),
        (STOCK_COMMANDS, 40, product_partition),
        (ORDER_EVENTS, 40, home_of),
        (ORDER_COMMANDS, 80, order_partition),
    ):
        found = await wire.records(spec)
        assert sum(map(len, found.values())) == number
        assert len([p for p, records in found.items() if records]) > 1
        for partition, records in found.items():
            for record in records:
                own = home_of if record.value == b"at home" else owner
                assert own(record.key.decode(), 4) == partition


async def test_keys_values_headers_and_order_arrive_as_sent(wire: Wire) -> None:
    topic = wire.settings.topic(DEAD_LETTERS.name)
    sent: list[Record] = [
        (b"k", b"v", [("a", b"1"), ("a", b"2"), ("empty", b"")]),
        (None, b"v", ()),
        (b"k", None, ()),
        (b"", b"", [("null", None)]),  # type: ignore[list-item]  # as a stranger's record may have it
        *((b"k", b"%d" % n, ()) for n in range(500)),
    ]
    await wire.producer.send({(topic, 2): sent})
    found = (await wire.records(DEAD_LETTERS))[2]
    assert [(record.key, record.value) for record in found] == [(key, value) for key, value, _ in sent]
    assert [list(record.headers) for record in found[:4]] == [list(story) for _, _, story in sent[:4]]


async def test_a_step_is_acknowledged_whole_before_the_next_one_is_produced(wire: Wire) -> None:
    outbox = wire.outbox()
    for n in range(300):
        outbox.event(oid(n), 0, b"e")
        outbox.order_command(oid(n), b"c")
    await wire.producer.send(outbox.publications())
    assert sum(map(len, (await wire.records(ORDER_EVENTS)).values())) == 300
    assert sum(map(len, (await wire.records(ORDER_COMMANDS)).values())) == 0
    await wire.producer.send(outbox.handovers())
    assert sum(map(len, (await wire.records(ORDER_COMMANDS)).values())) == 300


async def test_more_than_one_request_holds_is_sent_in_several(wire: Wire) -> None:
    topic = wire.settings.topic(ORDERS.name)
    sent: list[Record] = [(b"%d" % n, bytes([65 + n % 26]) * 100_000, ()) for n in range(40)]  # 4 MB for one partition
    await wire.producer.send({(topic, 1): sent})
    found = (await wire.records(ORDERS))[1]
    assert [record.key for record in found] == [key for key, _, _ in sent]
    assert all(len(record.value) == 100_000 for record in found)


@pytest.mark.parametrize("size", [BATCH_BYTES_MAX - 100, BATCH_BYTES_MAX + 1, MIB - 2_000, MIB])
async def test_a_dead_letter_may_be_as_large_as_the_largest_record_that_strangers_can_send(
    wire: Wire, size: int
) -> None:
    value = bytes(range(256)) * (size // 256)
    fault = InvalidRecord("too_large", "x" * 5_000)
    story: dict[str, Any] = {"topic": "orders", "partition": 0, "offset": 1, "timestamp": 1, "key": b"k"}
    small = DeadLetter(b"k", b"small", ())
    outbox = wire.outbox()
    for letter in (small, dead_letter(fault, value=value, headers=[("trace", b"t" * 10_000)], **story), small):
        outbox.dead_letter(letter)
    await asyncio.wait_for(wire.producer.send(outbox.publications()), 60)
    first, large, last = [record for records in (await wire.records(DEAD_LETTERS)).values() for record in records]
    assert (first.value, large.value == value, last.value) == (b"small", True, b"small")
    assert dict(large.headers)["reason"] == b"too_large"


async def test_a_step_of_nothing_is_done_at_once(wire: Wire) -> None:
    await wire.producer.send({})
    await wire.producer.send(wire.outbox().handovers())
    await wire.producer.send({(wire.settings.topic(ORDERS.name), 0): []})
    assert sum(map(len, (await wire.records(ORDERS)).values())) == 0


async def test_many_stages_share_a_producer(wire: Wire) -> None:
    async def stage(n: int) -> None:
        outbox = wire.outbox()
        for k in range(50):
            outbox.event(oid(n), n % 4, orjson.dumps([n, k]))
        await wire.producer.send(outbox.publications())

    await asyncio.gather(*(stage(n) for n in range(20)))
    read: dict[int, list[int]] = {}
    for records in (await wire.records(ORDER_EVENTS)).values():
        for record in records:
            n, k = orjson.loads(record.value)
            read.setdefault(n, []).append(k)
    assert read == {n: list(range(50)) for n in range(20)}


async def test_a_broker_that_is_away_is_told_and_the_next_try_is_a_fresh_one(
    wire: Wire, engines: LocalEngines, make_settings: MakeSettings
) -> None:
    unavailable = Producer(make_settings(kafka=f"127.0.0.1:{free_port()}"))
    for _ in range(2):
        with pytest.raises(KafkaError):
            await unavailable.send({("orders", 0): [(b"k", b"v", ())]})
    await unavailable.stop()


async def test_after_a_fault_the_same_producer_sends_again(wire: Wire) -> None:
    orders = wire.settings.topic(ORDERS.name)
    await wire.producer.send({(orders, 0): [(b"k", b"1", ())]})
    with pytest.raises(RecordTooLarge, match=rf"topic {orders} takes no record of \d+ bytes(.|\n)*max.message.bytes"):
        await asyncio.wait_for(wire.producer.send({(orders, 0): [(b"k", b"x" * (2 * MIB - 1_000), ())]}), 60)
    await wire.producer.send({(orders, 0): [(b"k", b"2", ())]})
    assert [record.value for record in (await wire.records(ORDERS))[0]] == [b"1", b"2"]


async def test_batches_that_a_topic_does_not_take_are_split_and_smaller_from_then_on(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = wire.settings.topic(ORDER_EVENTS.name)
    admin = AIOKafkaAdminClient(bootstrap_servers=wire.settings.kafka)
    await admin.start()
    await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": "60000"})])
    await admin.close()
    sent = 0
    async with asyncio.timeout(60):  # the broker takes a moment to go by it
        while wire.producer._batch_bytes > 60_000:
            records = [(b"k", b"%d " % (sent + n) + b"x" * 500, ()) for n in range(300)]  # 150 kB
            sent += len(records)
            await wire.producer.send({(topic, 0): records})
            await asyncio.sleep(0.1)
    await wire.producer.send({(topic, 0): [(b"k", b"%d" % (sent - 1), ())]})
    alone: list[bool] = []
    send = wire.producer._send

    async def seen(step: Any, **how: bool) -> None:
        alone.append(how.get("alone", False))
        await send(step, **how)

    monkeypatch.setattr(wire.producer, "_send", seen)
    await wire.producer.send({(topic, 0): [(b"k", b"%d x" % (sent + n), ()) for n in range(300)]})
    assert alone == [False]
    order = [int(record.value.split()[0]) for record in (await wire.records(ORDER_EVENTS))[0]]
    assert list(dict.fromkeys(order)) == list(range(sent + 300))


async def test_a_stopped_producer_has_sent_what_it_took(wire: Wire) -> None:
    topic = wire.settings.topic(ORDERS.name)
    sending = asyncio.create_task(wire.producer.send({(topic, 0): [(b"k", b"%d" % n, ()) for n in range(2_000)]}))
    await sending
    await wire.producer.stop()
    await wire.producer.stop()
    assert len((await wire.records(ORDERS))[0]) == 2_000


# What other clients send

SEND = """
import java.util.Properties;
import org.apache.kafka.clients.producer.*;

class Send {
    public static void main(String[] a) throws Exception {
        for (String codec : new String[] {"none", "gzip", "lz4", "snappy", "zstd"}) {
            Properties p = new Properties();
            p.put("bootstrap.servers", a[0]);
            p.put("compression.type", codec);
            p.put("key.serializer", "org.apache.kafka.common.serialization.StringSerializer");
            p.put("value.serializer", "org.apache.kafka.common.serialization.StringSerializer");
            try (KafkaProducer<String, String> producer = new KafkaProducer<>(p)) {
                for (int n = 0; n < 50; n++)
                    producer.send(new ProducerRecord<>(a[1], "p" + n, codec + " " + n));
            }
        }
    }
}
"""


def compiler() -> str | None:
    """Return a Java that runs a source file, or None."""
    java = shutil.which("java")
    if java is None:
        return None
    modules = subprocess.run([java, "--list-modules"], capture_output=True, text=True, check=False).stdout
    return java if "jdk.compiler" in modules else None


async def test_orders_of_a_java_client_are_read_whatever_it_compresses_them_with(wire: Wire, tmp_path: Path) -> None:
    java = compiler()
    if java is None:
        pytest.skip("this Java runs Kafka but compiles nothing")
    (tmp_path / "Send.java").write_text(SEND)
    libs = f"{ROOT / '.local' / 'kafka' / 'libs'}/*"
    command = [
        str(java),
        "-cp",
        libs,
        str(tmp_path / "Send.java"),
        wire.settings.kafka,
        wire.settings.topic(ORDERS.name),
    ]
    sent = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False, timeout=120)
    assert sent.returncode == 0, sent.stderr
    found = await wire.records(ORDERS)
    values = sorted(record.value.decode() for records in found.values() for record in records)
    assert values == sorted(f"{codec} {n}" for codec in ("none", "gzip", "lz4", "snappy", "zstd") for n in range(50))
    assert all(product_partition(r.key.decode(), 4) == p for p, records in found.items() for r in records)


@pytest.mark.parametrize("spec", [spec for spec in TOPICS if "outside" in spec.writers], ids=lambda spec: spec.name)
async def test_no_compressed_record_holds_more_than_its_dead_letter_can_carry(wire: Wire, spec: TopicSpec) -> None:
    limit = 50 * MIB
    bomb = AIOKafkaProducer(
        bootstrap_servers=wire.settings.kafka, compression_type="gzip", max_request_size=limit, max_batch_size=limit
    )
    await bomb.start()
    try:
        await bomb.send_and_wait(wire.settings.topic(spec.name), bytes(MIB - 10_000), key=b"k")
        with pytest.raises(MessageSizeTooLargeError):
            await bomb.send_and_wait(wire.settings.topic(spec.name), bytes(10 * MIB), key=b"k")
    finally:
        await bomb.stop()
