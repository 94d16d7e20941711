"""Records that no stage can process, in the middle of those that it can: each is one dead letter, none holds the stream."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.producer import message_accumulator
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy

from orderstream.streams.partitions import order_partition, product_partition
from orderstream.streams.topics import ORDER_COMMANDS, ORDER_LINES, ORDERS, RESERVATIONS, STOCK_COMMANDS
from tests.chaos.progress import drained
from tests.chaos.scenario import Scenario
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]


def order(**changes: Any) -> bytes:
    """Return an order of one unit of p1, changed."""
    return orjson.dumps({**Pipeline.order(("p1", 1)), **changes})


def item(**changes: Any) -> list[dict[str, Any]]:
    return [{"product_id": "p1", "quantity": 1, **changes}]


ELSEWHERE = next(f"p{n}" for n in range(40) if product_partition(f"p{n}", 4) != product_partition("p1", 4))
"""A product of another partition than p1: of four."""

POISON: dict[str, list[tuple[bytes | None, str]]] = {
    ORDERS.name: [
        (None, "empty"),
        (b"", "empty"),
        (b"{", "not_json"),
        (b"\xff\xfe\x00", "not_json"),
        (b"[" * 5_000, "not_json"),
        (b"[]", "invalid_order"),
        (b"7", "invalid_order"),
        (b"{}", "invalid_order"),
        (order(user_id=None), "invalid_order"),
        (order(user_id=["u"]), "invalid_order"),
        (order(items="p1"), "invalid_order"),
        (order(items=[]), "invalid_order"),
        (order(items=item(quantity="1")), "invalid_order"),
        (order(items=item(quantity=1.5)), "invalid_order"),
        (order(items=item(quantity=0)), "invalid_order"),
        (order(items=item(quantity=-1)), "invalid_order"),
        (order(items=item(quantity=2**63)), "invalid_order"),
        (order(items=item(product_id="")), "invalid_order"),
        (order(items=item(colour="red")), "invalid_order"),
        (order(order_id="1"), "invalid_order"),
        (order(placed_at="yesterday"), "invalid_order"),
        (order(colour="red"), "invalid_order"),
        (order(v=2), "invalid_order"),  # a version that is still to come
        (order(note="x" * 100_000), "too_large"),
        (json.dumps({"user_id": float("nan")}).encode(), "invalid_order"),
    ],
    ORDER_COMMANDS.name: [
        (None, "empty"),
        (b"cancel", "not_json"),
        (orjson.dumps({"command": "explode", "order_id": str(uuid.uuid4())}), "invalid_command"),
        (orjson.dumps({"command": "cancel", "order_id": "1"}), "invalid_command"),
    ],
    STOCK_COMMANDS.name: [
        (b"", "empty"),
        (orjson.dumps({"command": "receive", "command_id": str(uuid.uuid4()), "product_id": "p1"}), "invalid_command"),
        (
            orjson.dumps({"command": "receive", "command_id": str(uuid.uuid4()), "product_id": "none", "quantity": 1}),
            "unknown_product",
        ),
        (
            orjson.dumps(
                {
                    "command": "adjust",
                    "command_id": str(uuid.uuid4()),
                    "product_id": "p1",
                    "quantity": -1_000_000_000,
                    "reason": "burnt",
                }
            ),
            "insufficient_stock",
        ),
    ],
    ORDER_LINES.name: [
        (None, "invalid_rows"),
        (b"{", "invalid_rows"),
        (b'{"v":2,"rows":[]}', "invalid_rows"),
        (b'{"v":1,"rows":[[1,2,3]]}', "invalid_rows"),
        (orjson.dumps({"v": 1, "rows": [["hold", str(uuid.uuid4()), ELSEWHERE, 1, 0, "u"]]}), "invalid_rows"),
        (orjson.dumps({"v": 1, "rows": [["hold", "1", "p1", 1, 99, "u"]]}), "invalid_rows"),
    ],
    RESERVATIONS.name: [
        (b"\x00", "invalid_rows"),
        (b'{"v":2,"rows":[]}', "invalid_rows"),
        (b'{"v":1,"rows":[["x"]]}', "invalid_rows"),
    ],
}


@asynccontextmanager
async def stranger(shop: Pipeline) -> AsyncIterator[Any]:
    """A producer outside this code base."""
    producer = AIOKafkaProducer(bootstrap_servers=shop.settings.kafka, max_request_size=2**20)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


class Spoilt(str):
    """A header name that is no UTF-8 on the wire."""

    __slots__ = ()

    def encode(self, *_: Any) -> bytes:
        return b"\xff\xfe"


async def produce_spoilt(producer: Any, topic: str, partition: int, value: bytes) -> Any:
    """Produce a record with such a header, past aiokafka's fast builder, which takes no such name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(message_accumulator, "DefaultRecordBatchBuilder", _DefaultRecordBatchBuilderPy)
        batch = producer.create_batch()
    batch.append(key=b"p1", value=value, timestamp=None, headers=[(Spoilt("x"), b"1")])
    batch.close()
    return await (await producer.send_batch(batch, topic, partition=partition))


async def test_poison_is_rejected_and_orders_behind_it_go_through(pipeline: Make) -> None:
    shop = pipeline(partitions=4)
    scenario = Scenario(5_000)
    await shop.start(scenario.products, workers=2)
    flowing = asyncio.create_task(scenario.flow(shop, over_s=8))
    expected: dict[tuple[str, str, str], str] = {}
    async with stranger(shop) as producer:
        for name, records in POISON.items():
            for value, reason in records:
                await asyncio.sleep(0.1)
                partition = product_partition("none" if reason == "unknown_product" else "p1", 4)
                topic = shop.settings.topic(name)
                sent = await producer.send_and_wait(topic, value, key=b"p1", partition=partition)
                expected[topic, str(sent.partition), str(sent.offset)] = reason
        topic, sound, broken = shop.settings.topic(ORDERS.name), Pipeline.order(("p1", 1)), b'{"order_id": 7}'
        await produce_spoilt(producer, topic, product_partition("p1", 4), orjson.dumps(sound))
        sent = await produce_spoilt(producer, topic, product_partition("p1", 4), broken)
        expected[topic, str(sent.partition), str(sent.offset)] = "invalid_order"
    await flowing
    assert await shop.finished([sound["order_id"]])
    await drained(shop)
    await scenario.check(shop)
    letters = await shop.dead_letters()
    found = {
        (letter["source-topic"], letter["source-partition"], letter["source-offset"]): letter["reason"]
        for letter in letters
    }
    assert found == expected
    assert len(letters) == len(expected), "a record is among the dead letters twice"
    assert [worker.process.poll() for worker in shop.workers] == [None, None]


async def test_records_in_a_foreign_partition_or_without_a_key_are_sent_to_their_owner_once(pipeline: Make) -> None:
    shop = pipeline(partitions=4)
    scenario = Scenario(5_000)
    await shop.start({**scenario.products, "mine": 1_000}, workers=2)
    owner = product_partition("mine", 4)
    flowing = asyncio.create_task(scenario.flow(shop, over_s=6))
    ids, places = [], []
    async with stranger(shop) as producer:
        topic = shop.settings.topic(ORDERS.name)
        for n in range(200):
            body = Pipeline.order(("mine", 1))
            if n % 2:
                del body["order_id"]  # its id follows from its first place
            partition, key = (owner + n % 4) % 4, (None, b"mine", b"another", b"")[n // 4 % 4]
            sent = await producer.send_and_wait(topic, orjson.dumps(body), key=key, partition=partition)
            places.append((partition, sent.offset))
            ids.append(body.get("order_id"))
            await asyncio.sleep(0.02)
        cancelled = Pipeline.order(("p1", 1))
        command = orjson.dumps({"command": "cancel", "order_id": cancelled["order_id"]})
        foreign = (order_partition(cancelled["order_id"], 4) + 1) % 4
        await producer.send_and_wait(shop.settings.topic(ORDER_COMMANDS.name), command, partition=foreign)
        received = {"command": "receive", "command_id": str(uuid.uuid4()), "product_id": "mine", "quantity": 500}
        await producer.send_and_wait(
            shop.settings.topic(STOCK_COMMANDS.name), orjson.dumps(received), partition=(owner + 1) % 4
        )
    await flowing
    await shop.produce([cancelled])
    assert await shop.finished([cancelled["order_id"]])
    await shop.eventually(
        "SELECT reason::text FROM orders WHERE order_id = $1::uuid", "cancelled_by_user", cancelled["order_id"]
    )
    ended = "SELECT count(*) FROM order_lines WHERE product_id = 'mine' AND state IN ('committed', 'released')"
    await shop.eventually(ended, 200)
    await drained(shop)
    assert await shop.dead_letters() == []
    sent_on = [
        dict(record.headers)["sent-on-from"]
        for record in await shop.records(ORDERS.name)
        if "sent-on-from" in dict(record.headers)
    ]
    must = {f"{topic}/{partition}/{offset}".encode() for partition, offset in places if partition != owner}
    assert sorted(sent_on) == sorted(must), "each is sent on once, and names its first place"
    await scenario.check(shop)
