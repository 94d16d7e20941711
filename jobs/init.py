"""Setting up: topics, tables, the first products.  Safe to repeat."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Collection, Sequence
from typing import NamedTuple

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import for_code

from orderstream import access, connecting
from orderstream.errors import OrderstreamError
from orderstream.settings import Settings
from orderstream.sql.prepare import check_keys, prepare
from orderstream.sql.store import Store, query
from orderstream.streams.commands import NO_PATH, PRICE_CENTS_MAX, QUANTITY_MAX, StockCommand
from orderstream.streams.orders import ORDER_NAMESPACE
from orderstream.streams.producer import REQUEST_BYTES_MAX, Outbox, Producer
from orderstream.streams.topics import DEAD_LETTERS, TABLES, TOPICS, TopicSpec, changelog_topic

HOUR_MS = 3_600_000
TOPIC_ALREADY_EXISTS = 36
TIME, ON_APPEND = "message.timestamp.type", "LogAppendTime"
SET_ON_TOPIC = 1
"""Where a topic's setting comes from: its own, not the broker's default."""

APPEAR_S = 20.0

LOAD_S = 30.0
"""Longest wait for workers to load products."""


class Product(NamedTuple):
    """A product of a catalogue, with the units that are there when it is loaded."""

    product_id: str
    name: str
    price_cents: int
    units: int


SEED = (
    Product("1", "Laptop", 129_900, 100),
    Product("2", "Wireless mouse", 2_990, 100),
    Product("3", "Mechanical keyboard", 8_990, 100),
    Product("4", "Monitor", 32_900, 100),
    Product("5", "Headphones", 19_900, 100),
)
"""What ``orderstream init`` loads by default."""

CHANGELOG_CONFIG = {
    "cleanup.policy": "compact",
    "segment.bytes": str(32 * 1024 * 1024),
    "segment.ms": str(HOUR_MS // 6),
    "min.cleanable.dirty.ratio": "0.2",
    "delete.retention.ms": str(HOUR_MS),
}
"""Of a table's changelog.  A worker that takes over has to read what was written in the last minutes, not since the
beginning: the broker compacts only segments that are closed, by default after a gigabyte or a week."""


class Initialised(NamedTuple):
    """What there was to do."""

    topics_created: list[str]
    topics_there: list[str]
    topics_altered: list[str]
    database_made: bool
    products_new: int
    products_there: int


def topic_config(spec: TopicSpec, settings: Settings) -> dict[str, str]:
    """Return the broker's settings of one of our topics."""
    hours = settings.retention_inner_hours if spec.inner else settings.retention_hours
    config = {"cleanup.policy": "delete", "retention.ms": str(hours * HOUR_MS)}
    if {"outside", "ingress", "cli"} & set(spec.writers):
        # Their clocks may say anything, and retention goes by it: a record of 1970 would be deleted before it is read.
        config[TIME] = ON_APPEND
        # The broker unpacks what other producers compressed: their codec may be one that we can't read (lz4, zstd and snappy
        # need libraries of their own), and a megabyte of gzip may hold a gigabyte, which its dead letter could not carry.
        config["compression.type"] = "uncompressed"
    if spec is DEAD_LETTERS:
        config["max.message.bytes"] = str(REQUEST_BYTES_MAX)
    return config


def topics(settings: Settings) -> dict[str, dict[str, str]]:
    """Return every topic's name on the broker with its settings: ours, and the changelogs of the tables."""
    ours = {settings.topic(spec.name): topic_config(spec, settings) for spec in TOPICS}
    return ours | {changelog_topic(settings.app_id, table): CHANGELOG_CONFIG for table in TABLES}


async def _partitions(admin: AIOKafkaAdminClient, names: Collection[str]) -> dict[str, int]:
    """Return the partitions of topics, once the broker knows of all of them: those of a new topic appear a moment later."""
    deadline = time.monotonic() + APPEAR_S
    while names:
        found = {t["topic"]: len(t["partitions"]) for t in await admin.describe_topics(list(names))}
        if all(found.get(name) for name in names):
            return found
        if time.monotonic() > deadline:
            absent = sorted(name for name in names if not found.get(name))
            raise OrderstreamError(
                f"topics did not appear within {APPEAR_S:.0f} s: {', '.join(absent)}\nrun `orderstream init` again"
            )
        await asyncio.sleep(0.1)
    return {}


async def _time_on_append(admin: AIOKafkaAdminClient, names: Collection[str]) -> list[str]:
    """Have the broker's clock count in these topics, not their writers'; return those in which it did not.

    Raises:
        OrderstreamError: the broker refuses it.
    """
    if not names:
        return []
    altered = {}
    for answer in await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in names]):
        for *_, name, entries in answer.resources:
            found = {key: (value, source) for key, value, _, source, *_ in entries}
            if found[TIME][0] != ON_APPEND:
                # The request replaces all that is set on the topic.
                ours = {key: value for key, (value, source) in found.items() if source == SET_ON_TOPIC}
                altered[name] = ConfigResource(ConfigResourceType.TOPIC, name, ours | {TIME: ON_APPEND})
    if altered:
        for answer in await admin.alter_configs([*altered.values()]):
            for code, why, _, name in answer.resources:
                if code:
                    raise OrderstreamError(
                        f"{TIME}={ON_APPEND} can't be set on topic {name}: {for_code(code).__name__} {why or ''}\n"
                        "set it yourself (kafka-configs.sh --alter), then run `orderstream init` again: of a producer whose "
                        "clock is wrong, records would be deleted unread"
                    )
    return sorted(altered)


async def create_topics(settings: Settings) -> tuple[list[str], list[str], list[str]]:
    """Create the topics that are missing; return those created, those that were there, and of these those altered.

    Raises:
        EngineUnavailable: Kafka does not answer.
        OrderstreamError: a topic is there with another number of partitions, or can't be made as it has to be.
    """
    wanted = topics(settings)
    admin = AIOKafkaAdminClient(**access.kafka(settings), client_id="orderstream-init")
    try:
        with connecting.kafka(settings):
            await access.start_kafka(admin, settings)
        there = set(await admin.list_topics()) & set(wanted)
        for name, partitions in (await _partitions(admin, there)).items():
            if partitions != settings.partitions:
                raise OrderstreamError(
                    f"topic {name} has {partitions} partitions, the setting is {settings.partitions}: the number "
                    f"is fixed once orders flowed\nset ORDERSTREAM_PARTITIONS={partitions}, or begin again with another "
                    "ORDERSTREAM_TOPIC_PREFIX and ORDERSTREAM_APP_ID"
                )
        missing = [name for name in wanted if name not in there]
        if missing:
            answer = await admin.create_topics(
                [
                    NewTopic(name, settings.partitions, settings.replication_factor, topic_configs=wanted[name])
                    for name in missing
                ]
            )
            for name, code, *why in answer.topic_errors:
                if code not in (0, TOPIC_ALREADY_EXISTS):
                    raise OrderstreamError(
                        f"topic {name} can't be created: {for_code(code).__name__} {why[:1]}\n"
                        "correct what the broker refuses, then run `orderstream init` again"
                    )
            await _partitions(admin, missing)
        return missing, sorted(there), await _time_on_append(admin, [name for name in there if TIME in wanted[name]])
    finally:
        await admin.close()


async def load(settings: Settings, store: Store, catalogue: Sequence[Product]) -> int:
    """Load the products that are not there; return how many.

    Before any worker has claimed a lane they are written as rows; then they are commands, which the workers decide.

    Raises:
        EngineUnavailable: Kafka does not answer.
        OrderstreamError: no worker has loaded them within :data:`LOAD_S`.
    """
    if not await store.pool.fetchval(query("lanes_claimed")):
        return await store.load_catalogue(list(catalogue), settings.partitions)
    ids = [product.product_id for product in catalogue]
    there = {row["product_id"] for row in await store.products(ids)}
    outbox, last = Outbox(settings), []
    for product_id, name, price_cents, units in catalogue:
        if product_id in there:
            continue
        given: list[dict[str, object]] = [{"command": "product", "name": name, "price_cents": price_cents}]
        if units:
            given.append({"command": "receive", "quantity": units, "reason": "catalogue"})
        for one in given:  # the same ids whenever it is loaded: it is received once
            command_id = uuid.uuid5(ORDER_NAMESPACE, f"catalogue\0{one['command']}\0{product_id}")
            command = StockCommand.model_validate({**one, "command_id": command_id, "product_id": product_id})
            outbox.stock_command(product_id, command.encode())
        last.append(str(command_id))
    if last:
        producer = Producer(settings, client_id="orderstream-init")
        with connecting.kafka(settings):
            await producer.start()
            try:
                await producer.send(outbox.handovers())
            finally:
                await producer.stop()
    deadline = time.monotonic() + LOAD_S
    while undecided := await store.pool.fetchval(query("commands_undecided"), last):
        if time.monotonic() > deadline:
            raise OrderstreamError(
                f"{undecided} products were sent to the workers, and none has loaded them within {LOAD_S:.0f} s\n"
                "start a worker: it loads them; to run `orderstream init` again is safe"
            )
        await asyncio.sleep(0.05)
    return len(last)


async def init(settings: Settings, catalogue: Sequence[Product] = SEED) -> Initialised:
    """Create topics, make the database ready, load products.

    Raises:
        EngineUnavailable: Kafka or Postgres does not answer.
        OrderstreamError: what is there does not fit, or no worker loads the products; see :func:`load`.
    """
    for product in catalogue:
        if product.product_id in NO_PATH:
            raise OrderstreamError(f"{product.product_id} is no product's id: no path can name it")
        if not (0 <= product.price_cents <= PRICE_CENTS_MAX and 0 <= product.units <= QUANTITY_MAX):
            raise OrderstreamError(
                f"product {product.product_id}: {product.units} units at {product.price_cents} cents: there may be"
                f" 0 to {QUANTITY_MAX}, at 0 to {PRICE_CENTS_MAX}"
            )
    created, there, altered = await create_topics(settings)
    with connecting.postgres(settings):
        made = await prepare(settings)
        store = await Store.connect(settings.database_url, connections_max=1)
    try:
        await check_keys(store, settings)
        new = await load(settings, store, catalogue)
    finally:
        await store.close()
    return Initialised(
        topics_created=created,
        topics_there=there,
        topics_altered=altered,
        database_made=made,
        products_new=new,
        products_there=len(catalogue) - new,
    )
