"""What a worker notes in Postgres of what it has read, on real engines."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import ConsumerRecord
from faust.types import TP

from orderstream.agents import commit, pay, stock
from orderstream.agents.batches import Batch
from orderstream.agents.desk import Desk, LineAsked, marks_of
from orderstream.agents.reserve import reserve
from orderstream.agents.stage import Stage
from orderstream.jobs.init import init
from orderstream.lua.gate import GateVerdict
from orderstream.sql.store import Store, gate_of
from orderstream.streams.codec import decode_rows, encode_rows
from orderstream.streams.lines import LineStands, LineWanted
from orderstream.streams.partitions import product_partition
from orderstream.streams.producer import Producer
from orderstream.streams.topics import DEAD_LETTERS, ORDER_COMMANDS, ORDERS, RESERVATIONS, STOCK_COMMANDS, TopicSpec
from orderstream.streams.upstream.app import App
from orderstream.streams.upstream.consumer import Chunk
from orderstream.tables.views import Views
from tests.conftest import MakeSettings
from tests.integration.assigned import assigned, to_its_end

pytestmark = pytest.mark.engines


PARTITIONS = 3
PRODUCT, ANOTHER = (
    next(p for p in map(str, range(1, 10)) if product_partition(p, PARTITIONS) == owner) for owner in (0, 1)
)


@pytest.fixture
async def desk(make_settings: MakeSettings) -> AsyncIterator[Desk]:
    """Give the desk of a worker that has claimed the first partition."""
    settings = make_settings(partitions=PARTITIONS)
    await init(settings)
    store = await Store.connect(settings.database_url)
    gate, producer = gate_of(settings, store), Producer(settings)
    app = assigned({TP(settings.topic(ORDERS.name), 0)})
    views = Views(App(settings.app_id, store="memory://", autodiscover=False), PARTITIONS)
    desk = Desk(Stage(settings, app, store, gate, producer), views)
    await desk.take_over(Batch(app, []))
    yield desk
    await producer.stop()
    await gate.close()
    await store.close()


def batch_of(desk: Desk, spec: TopicSpec, value: bytes, partition: int = 0) -> Batch:
    """Return a batch of one record, the first of its topic."""
    topic = desk.stage.settings.topic(spec.name)
    record = ConsumerRecord(topic, partition, 0, 1_700_000_000_000, 0, None, value, None, 0, len(value), ())
    return Batch(desk.stage.app, [Chunk(TP(topic, partition), [record])])


async def first(desk: Desk, places: list[TopicPartition]) -> Any:
    """Return the first record of these partitions."""
    async with AIOKafkaConsumer(bootstrap_servers=desk.stage.settings.kafka, auto_offset_reset="earliest") as consumer:
        consumer.assign(places)
        return await asyncio.wait_for(consumer.getone(), 10)


async def settled(desk: Desk) -> None:
    """Decide all that has come in, and what follows from it."""
    while desk.inbox:
        await to_its_end(commit.settle(desk, Batch(desk.stage.app, [])))


async def noted(desk: Desk) -> tuple[set[str], int]:
    """Return the topics of which Postgres has that they were read, and how many cancels are kept."""
    pool, prefix = desk.stage.store.pool, desk.stage.settings.topic_prefix
    rows = await pool.fetch("SELECT topic FROM marks WHERE next_offset = 1")
    return {row["topic"].removeprefix(prefix) for row in rows}, await pool.fetchval(
        "SELECT count(*) FROM kept_commands"
    )


async def test_a_command_counts_as_read_no_sooner_than_what_it_led_to_is_written(desk: Desk) -> None:
    """Else a Postgres that is set back to the moment in between never sees it again, and nobody was told of it."""
    cancel = orjson.dumps({"command": "cancel", "order_id": str(uuid.uuid4())})
    await pay.hand_on(desk, batch_of(desk, ORDER_COMMANDS, cancel))
    other = {"command": "receive", "command_id": str(uuid.uuid4()), "product_id": PRODUCT, "quantity": 1}
    batch = batch_of(desk, STOCK_COMMANDS, orjson.dumps(other))
    desk.note_marks(marks_of(batch))
    await stock.apply(desk, batch, desk.stage.outbox("commit", batch))
    assert await noted(desk) == ({"stock-commands"}, 0)
    await to_its_end(commit.settle(desk, batch))
    assert await noted(desk) == ({"stock-commands", "order-commands"}, 1)


async def test_a_line_that_was_let_go_of_by_who_knows_no_such_order_is_answered_to_the_home_that_asks_for_it(
    desk: Desk,
) -> None:
    """So it is after a set-back: an old answer comes first, then the order's record again."""
    order_id, answers = str(uuid.uuid4()), desk.stage.settings.topic(RESERVATIONS.name)
    (stands,) = encode_rows([LineStands(order_id, PRODUCT, "h", 100, None)], 10)
    await pay.hand_on(desk, batch_of(desk, RESERVATIONS, stands))
    await settled(desk)
    desk.put(LineAsked(LineWanted("hold", order_id, PRODUCT, 2, 1, "u")))
    await settled(desk)
    record = await first(desk, [TopicPartition(answers, 1)])
    assert decode_rows(record.value, LineStands) == [LineStands(order_id, PRODUCT, "r", 0, None)]


async def test_an_order_that_comes_again_with_its_lines_in_another_order_is_sent_on_to_its_home(desk: Desk) -> None:
    """Where it came, its first product is at home: sent there it would come again for ever."""
    topic = desk.stage.settings.topic(ORDERS.name)
    items = [{"product_id": product_id, "quantity": 1} for product_id in (PRODUCT, ANOTHER)]
    order = {"order_id": str(uuid.uuid4()), "user_id": "u", "payment_method": "card"}
    desk.stage.app.consumer.assignment = lambda: {TP(topic, n) for n in range(PARTITIONS)}
    desk.forget()
    await desk.take_over(Batch(desk.stage.app, []))
    for partition, lines in enumerate((items, items[::-1])):
        await to_its_end(reserve(desk, batch_of(desk, ORDERS, orjson.dumps({**order, "items": lines}), partition)))
    record = await first(desk, [TopicPartition(topic, n) for n in range(PARTITIONS)])
    assert (record.partition, orjson.loads(record.value)["items"]) == (0, items)


async def test_an_order_whose_row_is_another_orders_is_not_sent_on_to_where_it_is(desk: Desk) -> None:
    """Somebody has written the lines of one order into the row of another one under its id."""
    topics = [desk.stage.settings.topic(spec.name) for spec in (ORDERS, DEAD_LETTERS)]
    order = {"order_id": str(uuid.uuid4()), "user_id": "u", "payment_method": "card"}
    desk.stage.app.consumer.assignment = lambda: {TP(topics[0], n) for n in range(PARTITIONS)}
    desk.forget()
    await desk.take_over(Batch(desk.stage.app, []))
    for partition, product_id in enumerate((PRODUCT, ANOTHER)):
        value = orjson.dumps({**order, "items": [{"product_id": product_id, "quantity": 1}]})
        await to_its_end(reserve(desk, batch_of(desk, ORDERS, value, partition)))
        await desk.stage.store.pool.execute("UPDATE orders SET product_ids = $1", [ANOTHER])
    record = await first(desk, [TopicPartition(topic, n) for topic in topics for n in range(PARTITIONS)])
    assert (record.topic, dict(record.headers)["reason"]) == (topics[1], b"order_id_reused")


async def test_a_user_has_what_a_former_owner_held_for_them_and_did_not_tell_redis(desk: Desk) -> None:
    stage = desk.stage
    await stage.store.pool.execute("SELECT set_limit($1, 2)", PRODUCT)

    async def take(units: int) -> list[GateVerdict]:
        asked = [(PRODUCT, str(uuid.uuid4()), units)]
        return (await stage.gate.take(asked, lambda n: "u", desk.claims_of(desk.intake)))[0]

    assert await take(3) == [GateVerdict.LIMITED], "it is loaded"
    items = [{"product_id": PRODUCT, "quantity": 2}]
    order = {"order_id": str(uuid.uuid4()), "user_id": "u", "payment_method": "card", "items": items}
    handing_over = await (await reserve(desk, batch_of(desk, ORDERS, orjson.dumps(order))))
    (await handing_over).close()  # it dies here
    desk.forget()
    await desk.take_over(Batch(stage.app, []))
    assert await take(1) == [GateVerdict.LIMITED]
