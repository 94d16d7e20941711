"""Setting up: topics with their settings, safe to repeat, plain where it does not fit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from orderstream.engines.probes import create_database, database_of, drop_database
from orderstream.errors import EngineUnavailable, OrderstreamError
from orderstream.jobs.init import SEED, Product, init, topics
from orderstream.lua.gate import PrefixTaken
from orderstream.sql.store import Store
from orderstream.streams.commands import PRICE_CENTS_MAX, QUANTITY_MAX

pytestmark = pytest.mark.engines
MakeSettings = Callable[..., Any]


async def test_init_makes_everything_once(make_settings: MakeSettings) -> None:
    settings = make_settings(partitions=3)
    first = await init(settings)
    assert (len(first.topics_created), first.topics_there, first.database_made) == (9, [], True)
    assert (first.products_new, first.products_there) == (5, 0)
    again = await init(settings)
    assert (again.topics_created, len(again.topics_there), again.database_made) == ([], 9, False)
    assert (again.products_new, again.products_there) == (0, 5)
    store = await Store.connect(settings.database_url)
    rows = await store.products()
    await store.close()
    assert [(row["product_id"], row["available"], row["price_cents"]) for row in rows] == [
        (product.product_id, 100, product.price_cents) for product in SEED
    ]


async def test_topics_have_the_partitions_and_settings_that_are_asked_for(make_settings: MakeSettings) -> None:
    settings = make_settings(partitions=3, retention_hours=5, retention_inner_hours=2)
    await init(settings)
    wanted = topics(settings)
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka)
    await admin.start()
    try:
        for topic in await admin.describe_topics(list(wanted)):
            assert len(topic["partitions"]) == 3
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in wanted]
        for answer in await admin.describe_configs(resources):
            for *_, name, entries in answer.resources:
                found = {entry[0]: entry[1] for entry in entries}
                assert {key: found[key] for key in wanted[name]} == wanted[name]
    finally:
        await admin.close()
    hours = {wanted[settings.topic(name)]["retention.ms"] for name in ("orders", "order-events", "dead-letters")}
    assert hours == {str(5 * 3_600_000)}
    assert wanted[settings.topic("order-lines")]["retention.ms"] == str(2 * 3_600_000)


async def test_topics_that_were_there_get_the_brokers_time_and_keep_their_other_settings(
    make_settings: MakeSettings,
) -> None:
    settings = make_settings(partitions=2)
    orders, events = settings.topic("orders"), settings.topic("order-events")
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka)
    await admin.start()
    try:
        theirs = {"retention.ms": "12345678", "max.message.bytes": "700000"}
        await admin.create_topics([NewTopic(name, 2, 1, topic_configs=theirs) for name in (orders, events)])
        done = await init(settings)
        assert (done.topics_altered, len(done.topics_created)) == ([orders], 7)
        assert (await init(settings)).topics_altered == []
        (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, orders)])
        found = {entry[0]: entry[1] for entry in answer.resources[0][-1]}
        assert found["message.timestamp.type"] == "LogAppendTime"
        assert {name: found[name] for name in theirs} == theirs
    finally:
        await admin.close()


async def test_a_record_has_the_time_of_the_broker_whatever_its_producers_clock_says(
    make_settings: MakeSettings,
) -> None:
    settings = make_settings(partitions=1)
    await init(settings)
    began_ms = time.time() * 1000
    for name in ("orders", "order-commands", "stock-commands"):
        async with AIOKafkaProducer(bootstrap_servers=settings.kafka) as producer:
            sent = await producer.send_and_wait(settings.topic(name), b"x", timestamp_ms=1_000, partition=0)
        async with AIOKafkaConsumer(
            settings.topic(name), bootstrap_servers=settings.kafka, auto_offset_reset="earliest"
        ) as consumer:
            record = await asyncio.wait_for(consumer.getone(), 20)
        assert record.timestamp == sent.timestamp
        assert began_ms - 1_000 < record.timestamp < time.time() * 1000 + 1_000


async def test_another_number_of_partitions_is_refused(make_settings: MakeSettings) -> None:
    await init(make_settings(partitions=3))
    with pytest.raises(OrderstreamError, match="ORDERSTREAM_PARTITIONS=3"):
        await init(make_settings(partitions=4))


async def test_the_database_of_another_pipeline_is_refused_and_keeps_its_products(make_settings: MakeSettings) -> None:
    settings = make_settings(partitions=3)
    await init(settings)
    with pytest.raises(OrderstreamError, match="another pipeline"):
        await init(settings.model_copy(update={"app_id": f"{settings.app_id}-2"}), [Product("6", "Desk", 100, 1)])
    store = await Store.connect(settings.database_url)
    assert len(await store.products()) == len(SEED)
    await store.close()


@pytest.mark.parametrize(("price", "units"), [(PRICE_CENTS_MAX + 1, 1), (-1, 1), (1, QUANTITY_MAX + 1), (1, -1)])
async def test_a_product_that_could_not_be_counted_is_refused(
    make_settings: MakeSettings, price: int, units: int
) -> None:
    with pytest.raises(OrderstreamError, match="product 6: "):
        await init(make_settings(partitions=3), [Product("6", "Desk", price, units)])


async def test_a_product_that_no_path_could_name_is_refused(make_settings: MakeSettings) -> None:
    with pytest.raises(OrderstreamError, match=r"\.\. is no product's id"):
        await init(make_settings(partitions=3), [Product("..", "Desk", 100, 1)])


async def test_the_redis_keys_of_another_pipeline_are_refused(
    make_settings: MakeSettings, database_url: str, run_id: str
) -> None:
    settings = make_settings(partitions=3)
    await init(settings)
    await init(settings)
    url = create_database(database_url, f"{run_id}x")
    try:
        with pytest.raises(PrefixTaken, match=f"the Redis prefix {settings.redis_prefix} is another pipeline's"):
            await init(make_settings(partitions=3, database_url=url))
        await init(make_settings(partitions=3, database_url=url, redis_prefix=f"{run_id}x"))
    finally:
        drop_database(url)


async def test_a_database_that_cannot_hold_every_name_is_refused(
    make_settings: MakeSettings, database_url: str, run_id: str
) -> None:
    connection = await asyncpg.connect(database_url)
    how = "ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    await connection.execute(f"CREATE DATABASE {run_id}x {how}")
    await connection.close()
    url = database_of(database_url, f"{run_id}x")
    try:
        with pytest.raises(OrderstreamError, match="is a database in LATIN1"):
            await init(make_settings(partitions=3, database_url=url))
    finally:
        drop_database(url)


async def test_an_unavailable_engine_is_named(make_settings: MakeSettings) -> None:
    with pytest.raises(EngineUnavailable, match=r"Kafka does not answer at 127\.0\.0\.1:9"):
        await init(make_settings(kafka="127.0.0.1:9"))
    with pytest.raises(EngineUnavailable, match=r"Postgres does not answer at postgresql://127\.0\.0\.1:9/x"):
        await init(make_settings(database_url="postgresql://u:secret@127.0.0.1:9/x"))
