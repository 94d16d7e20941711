"""The ingress on real engines: it answers what was decided, and claims nothing that is not known.

The tests act as the worker where they need its timing: the stages' own code, on a plain consumer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import orjson
import pytest
import redis.asyncio as redis
import structlog
from aiohttp import web
from aiokafka import AIOKafkaConsumer, TopicPartition
from faust.types import TP

from orderstream.agents.batches import Batch
from orderstream.agents.commit import settle
from orderstream.agents.desk import About, Desk
from orderstream.agents.lifecycle import Charged, Declined, Event, LineHeld
from orderstream.agents.reserve import reserve
from orderstream.agents.stage import Stage
from orderstream.engines.child import environment
from orderstream.engines.local import LocalEngines
from orderstream.engines.probes import create_database
from orderstream.engines.process import free_port
from orderstream.errors import EngineUnavailable, OrderstreamError, SettingsError
from orderstream.http import orders, postgres, producer, replies
from orderstream.http.server import create_app
from orderstream.jobs.init import Product, init
from orderstream.lua.gate import Gate, Keys
from orderstream.settings import Settings, load
from orderstream.sql.prepare import prepare
from orderstream.sql.store import Store, gate_of, query
from orderstream.streams.headers import REPLY_TO
from orderstream.streams.orders import order_id_for_key
from orderstream.streams.partitions import order_partition, product_partition
from orderstream.streams.producer import Producer
from orderstream.streams.topics import DEAD_LETTERS, ORDER_COMMANDS, ORDERS
from orderstream.streams.upstream.app import App
from orderstream.streams.upstream.consumer import Chunk
from orderstream.tables.views import Views
from tests.conftest import MakeSettings
from tests.integration.assigned import assigned, to_its_end

pytestmark = pytest.mark.engines

PATH = "/api/v1/orders"
PRODUCTS = [Product("1", "one", 100, 10), Product("2", "two", 250, 1_000)]
SLOW_S = 60.0
"""The ingress's bound: what a client gets within its own, which is shorter, was not answered by a time-out."""

PATIENCE = aiohttp.ClientTimeout(total=30.0)

T = TypeVar("T")
Client = aiohttp.ClientSession


# What acts beside the ingress


class Shop:
    """Topics and tables of one test, and what happened in them."""

    desk: Desk

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store

    async def happens(self, order_id: str, event: Event | None) -> None:
        """Let the commit stage decide about something that comes in, and all that follows from it; None: nothing does."""
        self.desk.put(About(order_id, event))
        while self.desk.inbox:
            await (await settle(self.desk, Batch(self.desk.stage.app, [])))

    async def units(self, product_id: str) -> tuple[int, int]:
        """Return available and reserved units."""
        (row,) = await self.store.products([product_id])
        return row["available"], row["reserved"]

    async def records(self, topic: str) -> list[Any]:
        """Return every record of a topic."""
        name, found = self.settings.topic(topic), []
        async with consumer(self.settings, topic) as reader:
            partitions = [TopicPartition(name, partition) for partition in range(self.settings.partitions)]
            ends = await reader.end_offsets(partitions)
            while any([await reader.position(tp) < ends[tp] for tp in partitions]):
                for batch in (await reader.getmany(timeout_ms=200)).values():
                    found += batch
        return found

    async def produced(self, n: int) -> list[Any]:
        """Wait until there are so many orders on the topic; return them."""

        async def enough() -> list[Any] | None:
            found = await self.records(ORDERS.name)
            return found if len(found) >= n else None

        found = await until(enough)
        assert len(found) == n
        return found


@asynccontextmanager
async def consumer(settings: Settings, topic: str) -> AsyncIterator[Any]:
    reader = AIOKafkaConsumer(bootstrap_servers=settings.kafka, auto_offset_reset="earliest")
    await reader.start()
    try:
        reader.assign([TopicPartition(settings.topic(topic), partition) for partition in range(settings.partitions)])
        yield reader
    finally:
        await reader.stop()


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Shop]:
    """Make the topics, the tables and two products of ten units."""
    await init(settings, PRODUCTS)
    store = await Store.connect(settings.database_url, connections_max=2)
    try:
        yield Shop(settings, store)
    finally:
        await store.close()


@asynccontextmanager
async def reserving(shop: Shop, far: str | None = None) -> AsyncIterator[None]:
    """Run the reserve stage from the beginning, over all partitions but that of the product ``far``."""
    settings = shop.settings
    owned = {n for n in range(settings.partitions) if far is None or n != product_partition(far, settings.partitions)}
    gate = gate_of(settings, shop.store)
    sender = Producer(settings, client_id="test")
    app = assigned({TP(settings.topic(ORDERS.name), n) for n in owned})
    views = Views(App(settings.app_id, store="memory://", autodiscover=False), settings.partitions)
    shop.desk = Desk(Stage(settings, app, shop.store, gate, sender), views)
    await shop.desk.take_over(Batch(app, []))

    async def run(reader: Any) -> None:
        while True:
            fetched = await reader.getmany(timeout_ms=100)
            if fetched:
                chunks = [Chunk(TP(tp.topic, tp.partition), records) for tp, records in fetched.items()]
                await to_its_end(reserve(shop.desk, Batch(app, chunks)))

    async with consumer(settings, ORDERS.name) as reader:
        task = asyncio.create_task(run(reader))
        try:
            yield
        finally:
            task.cancel()
            (ended,) = await asyncio.gather(task, return_exceptions=True)
            await sender.stop()
            await gate.close()
    assert isinstance(ended, asyncio.CancelledError), ended


@asynccontextmanager
async def ingress(settings: Settings) -> AsyncIterator[Client]:
    """Serve on a free port; give a client for it."""
    runner = web.AppRunner(create_app(settings), shutdown_timeout=1.0)
    try:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}", timeout=PATIENCE) as client:
            yield client
    finally:
        await runner.cleanup()


def order(*items: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    lines = [{"product_id": product_id, "quantity": quantity} for product_id, quantity in items or [("1", 2)]]
    return {"user_id": 7, "items": lines, "payment_method": "mock", **more}


async def json_of(answer: aiohttp.ClientResponse, status: int, kind: str | None = None) -> dict[str, Any]:
    """Return a body, once the status is as expected, and, with ``kind``, the problem is of this type."""
    body: dict[str, Any] = await answer.json(content_type=None)
    assert answer.status == status, body
    if kind is not None:
        assert answer.content_type == "application/problem+json"
        assert (body["type"], body["status"]) == (f"urn:orderstream:problem:{kind}", status), body
    else:
        assert answer.content_type == "application/json"
    return body


async def until(ask: Callable[[], Awaitable[T | None]], timeout_s: float = 60.0) -> T:
    """Ask until there is an answer; return it."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = await ask()
        if found is not None:
            return found
        assert time.monotonic() < deadline, "it did not come to it"
        await asyncio.sleep(0.05)


async def readable(client: Client, order_id: str) -> dict[str, Any]:
    """Wait until an order can be read; return it."""

    async def read() -> dict[str, Any] | None:
        answer = await client.get(f"{PATH}/{order_id}")
        return await json_of(answer, 200) if answer.status == 200 else None

    return await until(read)


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    return make_settings(partitions=4, verdict_timeout_s=SLOW_S)


def but(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update=changes)


# The verdict


async def test_an_order_that_is_held_is_a_201_and_can_be_read(settings: Settings) -> None:
    async with opened(settings) as shop, reserving(shop), ingress(settings) as client:
        answer = await client.post(PATH, json=order((1, 2)))
        body = await json_of(answer, 201)
        assert body == {"order_id": body["order_id"], "status": "RESERVED"}
        assert answer.headers["Location"] == f"{PATH}/{body['order_id']}"
        assert await shop.units("1") == (8, 2)

        read = await json_of(await client.get(answer.headers["Location"]), 200)
        at = read["order"]["created_at"]
        where = product_partition("1", settings.partitions)
        record = {"topic": settings.topic("orders"), "partition": where, "offset": 0}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", at)
        assert read == {
            "order": {
                "id": body["order_id"],
                "user_id": "7",
                "total_amount": 200,
                "status": "RESERVED",
                "reason": None,
                "idempotency_key": None,
                "payment_method": "mock",
                "placed_at": None,
                "created_at": at,
                "updated_at": at,
            },
            "items": [
                {
                    "id": 1,
                    "order_id": body["order_id"],
                    "product_id": "1",
                    "quantity": 2,
                    "unit_price": 100,
                    "state": "held",
                    "reason": None,
                }
            ],
            "payment": None,
            "history": [
                {"status": "CREATED", "at": at, "record": record},
                {"status": "RESERVED", "at": at, "record": record},
            ],
        }


async def test_the_record_is_the_one_that_any_producer_would_write(settings: Settings) -> None:
    async with opened(settings) as shop, ingress(but(settings, verdict_timeout_s=0)) as client:
        sent = order(("2", 1), ("1", 3), ("2", 1), placed_at="2025-01-31T12:00:00+01:00")
        late = await json_of(await client.post(PATH, json=sent, headers={"Idempotency-Key": "k"}), 202)
        (record,) = await shop.records(ORDERS.name)
        assert (record.key, record.partition) == (b"2", product_partition("2", settings.partitions))
        value = orjson.loads(record.value)
        assert value.pop("placed_at").startswith("2025-01-31T11:00:00")
        assert value == {
            "order_id": late["order_id"],
            "user_id": "7",
            "items": [{"product_id": "2", "quantity": 2}, {"product_id": "1", "quantity": 3}],
            "payment_method": "mock",
            "idempotency_key": "k",
        }
        assert late["order_id"] == order_id_for_key("7", "k")
        assert [name for name, _ in record.headers] == [REPLY_TO]


async def test_the_client_may_choose_the_id(settings: Settings) -> None:
    async with opened(settings) as shop, reserving(shop), ingress(settings) as client:
        mine = str(uuid.uuid4())
        assert (await json_of(await client.post(PATH, json=order(order_id=mine.upper())), 201))["order_id"] == mine
        assert (await json_of(await client.post(PATH, json=order(order_id=mine)), 201))["order_id"] == mine
        await json_of(await client.post(PATH, json=order(("1", 3), order_id=mine)), 422, "idempotency-key-reused")
        assert await shop.units("1") == (8, 2)


@pytest.mark.parametrize(
    ("product_id", "reason"), [("1", "insufficient_stock"), ("nothing", "unknown_product")], ids=["stock", "product"]
)
async def test_an_order_that_is_refused_is_a_409_with_the_reason(
    settings: Settings, product_id: str, reason: str
) -> None:
    async with opened(settings) as shop, reserving(shop), ingress(settings) as client:
        answer = await client.post(PATH, json=order((product_id, 11)))
        body = await json_of(answer, 409, reason.replace("_", "-"))
        assert (body["reason"], body["order_status"]) == (reason, "CANCELLED")
        read = await json_of(await client.get(body["instance"]), 200)
        assert read["order"]["id"] == body["order_id"]
        assert [(step["status"], step.get("reason")) for step in read["history"]] == [
            ("CREATED", None),
            ("CANCELLED", reason),
        ]
        assert await shop.units("1") == (10, 0)


async def test_a_verdict_that_is_late_is_a_202_and_the_order_goes_on(settings: Settings) -> None:
    async with opened(settings) as shop, ingress(but(settings, verdict_timeout_s=0.2)) as client:
        answer = await client.post(PATH, json=order())
        body = await json_of(answer, 202)
        assert body == {"order_id": body["order_id"], "status": "CREATED"}
        assert "Preference-Applied" not in answer.headers
        missing = await json_of(await client.get(answer.headers["Location"]), 404, "order-not-found")
        assert "a moment ago" in missing["detail"]
        async with reserving(shop):
            assert (await readable(client, body["order_id"]))["order"]["status"] == "RESERVED"


async def test_a_client_that_does_not_want_to_wait_does_not(settings: Settings) -> None:
    made = []
    async with opened(settings) as shop, ingress(settings) as client:
        for prefer in ("respond-async", "handling=lenient, Respond-Async;foo=1"):
            answer = await client.post(PATH, json=order(), headers={"Prefer": prefer})
            body = await json_of(answer, 202)
            assert body["status"] == "CREATED"
            assert answer.headers["Preference-Applied"] == "respond-async"
            made.append(body["order_id"])
        records = await shop.records(ORDERS.name)
        assert [record.headers for record in records] == [(), ()]
        assert [orjson.loads(record.value)["order_id"] for record in records] == made


async def test_a_lost_reply_costs_a_moment_and_not_the_whole_wait(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unpublished(self: Gate, *_: Any, **__: Any) -> bool:
        return True

    monkeypatch.setattr(Gate, "decided", unpublished)
    async with opened(settings) as shop, reserving(shop), ingress(settings) as client:
        assert (await json_of(await client.post(PATH, json=order()), 201))["status"] == "RESERVED"
        await json_of(await client.post(PATH, json=order(("1", 11))), 409, "insufficient-stock")


async def test_what_no_stage_wrote_on_the_channel_changes_nothing(settings: Settings) -> None:
    mine = str(uuid.uuid4())
    async with opened(settings) as shop, ingress(settings) as client:
        waiting = asyncio.create_task(client.post(PATH, json=order(order_id=mine)))
        (record,) = await shop.produced(1)
        channel = Keys(settings.redis_prefix).replies(dict(record.headers)[REPLY_TO].decode())
        gate = gate_of(settings, shop.store)
        for message in (
            b"{",
            b"7",
            b"[[1]]",
            b"[[%a,null,null]]",
            b'[["%s","CREATED",null]]',
            b'[["%s","CANCELLED","x"]]',
        ):
            await gate.client.publish(channel, message.replace(b"%s", mine.encode()))
        await gate.close()
        async with reserving(shop):
            await json_of(await waiting, 201)


# Repeats


async def test_a_repeated_key_gets_the_same_answer_and_is_one_order(settings: Settings) -> None:
    key = {"Idempotency-Key": "k-1"}
    async with opened(settings) as shop, reserving(shop), ingress(settings) as client:
        first = await json_of(await client.post(PATH, json=order(), headers=key), 201)
        again = [
            await client.post(PATH, json=order(), headers=key),
            await client.post(PATH, json=order(idempotency_key="k-1")),
            await client.post(PATH, json=order(idempotency_key="k-1"), headers={"Idempotency-Key": "the body wins"}),
            await client.post(PATH, json=order(), headers={"Idempotency-Key": '"k-1"'}),
            await client.post(PATH, json=order(), headers={**key, "Prefer": "respond-async"}),
        ]
        assert [await json_of(answer, 201) for answer in again] == [first] * len(again)
        assert len(await shop.records(ORDERS.name)) == 1  # Postgres knows the answer
        assert await shop.units("1") == (8, 2)
        other_user = await json_of(await client.post(PATH, json={**order(), "user_id": 8}, headers=key), 201)
        assert other_user["order_id"] != first["order_id"]


async def test_a_repeat_of_a_refused_order_is_refused_for_the_same_reason(settings: Settings) -> None:
    key = {"Idempotency-Key": "k-1"}
    async with opened(settings) as shop, reserving(shop), ingress(settings) as client:
        first = await json_of(await client.post(PATH, json=order(("1", 11)), headers=key), 409, "insufficient-stock")
        await shop.store.pool.execute("UPDATE stock SET on_hand = on_hand + 40, received = 40 WHERE product_id = '1'")
        again = await json_of(await client.post(PATH, json=order(("1", 11)), headers=key), 409, "insufficient-stock")
        assert again == first


async def test_a_repeat_of_an_order_that_ended_without_a_sale_is_not_answered_that_it_is_reserved(
    settings: Settings,
) -> None:
    key = {"Idempotency-Key": "k-1"}
    async with opened(settings) as shop, reserving(shop), ingress(settings) as client:
        first = await json_of(await client.post(PATH, json=order(), headers=key), 201)
        await shop.happens(first["order_id"], Declined())
        again = await json_of(await client.post(PATH, json=order(), headers=key), 409, "payment-declined")
        assert (again["order_id"], again["reason"]) == (first["order_id"], "payment_declined")
        read = await json_of(await client.get(f"{PATH}/{first['order_id']}"), 200)
        assert [step["status"] for step in read["history"]] == ["CREATED", "RESERVED", "CANCELLED"]
        assert (read["payment"]["status"], read["payment"]["amount_cents"]) == ("FAILED", 200)
        assert read["payment"]["charge_id"] is None
        assert read["payment"]["created_at"] == read["history"][-1]["at"]


async def test_a_repeat_of_an_order_that_is_sold_gets_the_answer_of_the_first_time(settings: Settings) -> None:
    key = {"Idempotency-Key": "k-1"}
    async with opened(settings) as shop, reserving(shop), ingress(settings) as client:
        first = await json_of(await client.post(PATH, json=order(), headers=key), 201)
        await shop.happens(first["order_id"], Charged("c-1"))
        assert await json_of(await client.post(PATH, json=order(), headers=key), 201) == first
        read = await json_of(await client.get(f"{PATH}/{first['order_id']}"), 200)
        assert [step["status"] for step in read["history"]] == ["CREATED", "RESERVED", "PAID", "CONFIRMED"]
        assert read["order"]["updated_at"] == read["history"][-1]["at"]
        assert (read["payment"]["status"], read["payment"]["charge_id"]) == ("SUCCESS", "c-1")


async def test_of_requests_at_once_with_one_key_in_the_header_one_is_served_and_the_others_are_asked_to_wait(
    settings: Settings,
) -> None:
    key = {"Idempotency-Key": "k-1"}
    async with opened(settings) as shop, ingress(settings) as client:
        first = asyncio.create_task(client.post(PATH, json=order(), headers=key))
        await shop.produced(1)
        for _ in range(4):
            again = await client.post(PATH, json=order(), headers=key)
            body = await json_of(again, 409, "request-in-progress")
            assert int(again.headers["Retry-After"]) > 0
        await json_of(await client.post(PATH, json=order(("1", 3)), headers=key), 422, "idempotency-key-reused")
        async with reserving(shop):
            made = await json_of(await first, 201)
            assert made["order_id"] == body["order_id"]
            assert await json_of(await client.post(PATH, json=order(), headers=key), 201) == made
        assert len(await shop.records(ORDERS.name)) == 1
        assert await shop.units("1") == (8, 2)


async def test_a_request_that_ended_badly_does_not_keep_its_key(settings: Settings) -> None:
    key = {"Idempotency-Key": "k-1"}
    async with opened(settings) as shop, reserving(shop), ingress(settings) as client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(replies, "WAITING_MAX", 0)
            await json_of(await client.post(PATH, json=order(), headers=key), 503, "overloaded")
        await json_of(await client.post(PATH, json=order(), headers=key), 201)


async def test_all_requests_at_once_for_the_same_order_get_its_verdict(settings: Settings) -> None:
    named = order(idempotency_key="k-1")
    async with opened(settings) as shop, ingress(settings) as client:
        asked = [asyncio.create_task(client.post(PATH, json=named)) for _ in range(5)]
        await shop.produced(5)
        async with reserving(shop):
            answers = [await json_of(answer, 201) for answer in await asyncio.gather(*asked)]
        assert len({answer["order_id"] for answer in answers}) == 1
        assert await shop.units("1") == (8, 2)


async def test_two_ingresses_that_are_asked_for_the_same_order_both_answer_its_verdict(settings: Settings) -> None:
    key = {"Idempotency-Key": "k-1"}
    hasty = but(settings, verdict_timeout_s=4.0)
    async with opened(settings) as shop, ingress(hasty) as one, ingress(hasty) as two:
        asked = [asyncio.create_task(client.post(PATH, json=order(), headers=key)) for client in (one, two)]
        await shop.produced(2)
        async with reserving(shop):
            answers = [await json_of(answer, 201) for answer in await asyncio.gather(*asked)]
        assert answers[0] == answers[1]
        assert await shop.units("1") == (8, 2)


async def test_a_repeat_of_an_order_that_is_not_decided_waits_for_it(settings: Settings) -> None:
    key = {"Idempotency-Key": "k-1"}
    many = order(("1", 1), ("2", 1))
    async with opened(settings) as shop, reserving(shop, far="2"), ingress(settings) as client:
        first = asyncio.create_task(client.post(PATH, json=many, headers={**key, "Prefer": "respond-async"}))
        order_id = (await json_of(await first, 202))["order_id"]
        await readable(client, order_id)
        again = asyncio.create_task(client.post(PATH, json=many, headers=key))
        done, _ = await asyncio.wait({again}, timeout=0.3)
        assert not done
        await shop.happens(order_id, LineHeld("2", 1))  # the other product's owner has been asked, and answers
        assert await json_of(await again, 201) == {"order_id": order_id, "status": "RESERVED"}
        assert len(await shop.records(ORDERS.name)) == 1


async def test_a_key_that_stands_for_another_order_is_a_422(settings: Settings) -> None:
    key = {"Idempotency-Key": "k-1"}
    others = [order(("1", 3)), order(("1", 2), ("2", 1)), order(("2", 2)), {**order(), "payment_method": "cash"}]
    async with opened(settings) as shop, reserving(shop), ingress(settings) as client:
        first = await json_of(await client.post(PATH, json=order(), headers=key), 201)
        for other in others:
            body = await json_of(await client.post(PATH, json=other, headers=key), 422, "idempotency-key-reused")
            assert body["order_id"] == first["order_id"], other
        assert len(await shop.records(ORDERS.name)) == 1
        assert await shop.units("1") == (8, 2)


async def test_a_key_that_stands_for_another_order_is_a_422_before_either_is_decided(settings: Settings) -> None:
    key = {"Idempotency-Key": "k-1"}
    async with opened(settings) as shop, ingress(settings) as client:
        await json_of(await client.post(PATH, json=order(), headers={**key, "Prefer": "respond-async"}), 202)
        await json_of(await client.post(PATH, json=order(("1", 3)), headers=key), 422, "idempotency-key-reused")
        assert len(await shop.records(ORDERS.name)) == 1


async def test_a_key_that_another_ingress_gave_to_another_order_meanwhile_is_a_422_and_no_verdict_of_that_one(
    settings: Settings,
) -> None:
    key = {"Idempotency-Key": "k-1"}
    async with opened(settings) as shop, ingress(settings) as one, ingress(but(settings, verdict_timeout_s=3.0)) as two:
        await json_of(await one.post(PATH, json=order(), headers={**key, "Prefer": "respond-async"}), 202)
        asked = asyncio.create_task(two.post(PATH, json=order(("1", 3)), headers=key))
        await shop.produced(2)
        async with reserving(shop):
            await json_of(await asked, 422, "idempotency-key-reused")
            (letter,) = await shop.records(DEAD_LETTERS.name)
            assert dict(letter.headers)["reason"] == b"order_id_reused"
        assert await shop.units("1") == (8, 2)


# Cancelling


async def test_a_cancel_goes_to_the_orders_home_and_before_that_is_known_to_whoever_has_its_id(
    settings: Settings,
) -> None:
    hasty = {"Prefer": "respond-async"}
    async with opened(settings) as shop, reserving(shop), ingress(settings) as client:
        home = product_partition("1", settings.partitions)
        ids = (str(uuid.uuid4()) for _ in iter(int, 1))
        known, unknown = (next(i for i in ids if order_partition(i, settings.partitions) != home) for _ in range(2))
        await json_of(await client.post(PATH, json=order(order_id=known)), 201)
        for order_id, status in ((known, "RESERVED"), (unknown, "CREATED")):
            answer = await client.post(f"{PATH}/{order_id}/cancel", headers=hasty)
            assert await json_of(answer, 202) == {"order_id": order_id, "status": status, "reason": None}
        assert (await client.post(f"{PATH}/{unknown}/cancel")).status == 202, "it is not waited for"
        commands = [(r.key.decode(), r.partition, r.value) for r in await shop.records(ORDER_COMMANDS.name)]
        elsewhere = order_partition(unknown, settings.partitions)
        assert sorted(commands) == sorted(
            (order_id, partition, orjson.dumps({"command": "cancel", "order_id": order_id}))
            for order_id, partition in ((known, home), (unknown, elsewhere), (unknown, elsewhere))
        )


# What can't be taken in


NO_ORDERS: list[tuple[str, bytes | dict[str, Any]]] = [
    ("not-json", b""),
    ("not-json", b"{"),
    ("not-json", b"\xff"),
    ("invalid-order", b"[]"),
    ("invalid-order", b"null"),
    ("invalid-order", b"{}"),
    ("invalid-order", {**order(), "colour": "red"}),
    ("invalid-order", {**order(), "items": []}),
    ("invalid-order", order(("1", 0))),
    ("invalid-order", order(("1", -5))),
    ("invalid-order", order(("1", "2"))),
    ("invalid-order", order(("1", 1.5))),
    ("invalid-order", order(("1", True))),
    ("invalid-order", order(("", 1))),
    ("invalid-order", order((-1, 1))),
    ("invalid-order", order(("1", 10_001))),
    ("too-many-units", order(("1", 6_000), (1, 5_000))),
    ("invalid-order", order(*((str(n), 1) for n in range(101)))),
    ("invalid-order", {**order(), "user_id": None}),
    ("invalid-order", {**order(), "user_id": " x"}),
    ("invalid-order", {**order(), "user_id": "a\nb"}),
    ("invalid-order", {**order(), "payment_method": ""}),
    ("invalid-order", {**order(), "idempotency_key": ""}),
    ("invalid-order", {**order(), "idempotency_key": "k" * 201}),
    ("invalid-order", {**order(), "order_id": "7"}),
    ("invalid-order", {**order(), "placed_at": "yesterday"}),
    ("invalid-order", {**order(), "order_id": str(uuid.uuid4()), "idempotency_key": "k"}),
    ("invalid-order", orjson.dumps(order())[:-1] + b',"user_id":8}'),
]


async def test_what_is_no_order_is_a_400_and_is_not_produced(idle: tuple[Shop, Client]) -> None:
    shop, client = idle
    for kind, body in NO_ORDERS:
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        answer = await client.post(PATH, data=data, headers={"Content-Type": "application/json"})
        status = 422 if kind == "too-many-units" else 400
        assert answer.status == status, data
        refused = await json_of(answer, status, kind)
        assert refused["error"] == refused["title"]
        assert refused["details"] == refused["detail"] != ""
    assert await shop.records(ORDERS.name) == []


@pytest.fixture
async def idle(settings: Settings) -> AsyncIterator[tuple[Shop, Client]]:
    """Return an ingress whose orders no worker decides."""
    async with opened(settings) as shop, ingress(but(settings, verdict_timeout_s=0)) as client:
        yield shop, client


async def test_every_fault_of_a_body_is_listed_at_once(idle: tuple[Shop, Client]) -> None:
    body = {**order(("1", 0), ("", 1)), "colour": "red"}
    refused = await json_of(await idle[1].post(PATH, json=body), 400, "invalid-order")
    assert {"items.0.quantity", "colour"} <= {fault["field"] for fault in refused["faults"]}


async def test_a_key_in_the_header_is_held_to_the_rules_of_one_in_the_body(idle: tuple[Shop, Client]) -> None:
    shop, client = idle
    for key in ("", '""', "k" * 201, "a\tb", "\x80"):
        answer = await client.post(PATH, json=order(), headers={"Idempotency-Key": key})
        assert "Idempotency-Key" in (await json_of(answer, 400, "invalid-order"))["detail"]
    twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    await json_of(await client.post(PATH, json=order(), headers=twice), 400, "invalid-order")
    assert await shop.records(ORDERS.name) == []
    await json_of(await client.post(PATH, json=order(idempotency_key="a"), headers=twice), 202)  # the body wins


async def test_a_body_may_be_as_large_as_a_record_and_no_larger(settings: Settings) -> None:
    small = but(settings, order_bytes_max=500, verdict_timeout_s=0)
    kind = {"Content-Type": "application/json"}
    async with opened(settings) as shop, ingress(small) as client:
        exact = orjson.dumps(order()).ljust(500)
        await json_of(await client.post(PATH, data=exact, headers=kind), 202)

        async def pieces() -> AsyncIterator[bytes]:
            yield exact
            yield b" "

        await json_of(await client.post(PATH, data=exact + b" ", headers=kind), 413, "too-large")
        await json_of(await client.post(PATH, data=pieces(), headers=kind), 413, "too-large")
        # The body fits; with the id and the key that the ingress adds, the record would not.
        filled = orjson.dumps(order(*((f"{n:040}", 1) for n in range(5))))
        assert len(filled) < 500
        key = {**kind, "Idempotency-Key": "k" * 100}
        await json_of(await client.post(PATH, data=filled, headers=key), 413, "too-large")
        assert len(await shop.records(ORDERS.name)) == 1


async def test_a_body_must_say_that_it_is_json(idle: tuple[Shop, Client]) -> None:
    shop, client = idle
    data = orjson.dumps(order())
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"):
        answer = await client.post(PATH, data=data, headers={"Content-Type": kind})
        await json_of(answer, 415, "unsupported-media-type")
        assert answer.headers["Accept"] == "application/json"
    assert await shop.records(ORDERS.name) == []
    await json_of(await client.post(PATH, data=data, headers={"Content-Type": "Application/JSON; charset=UTF-8"}), 202)


async def test_other_paths_methods_and_ids(idle: tuple[Shop, Client]) -> None:
    _, client = idle
    await json_of(await client.get("/nowhere"), 404, "not-found")
    wrong = await client.put(PATH)
    await json_of(wrong, 405, "method-not-allowed")
    assert wrong.headers["Allow"] == "GET,HEAD,POST"
    await json_of(await client.get(f"{PATH}/{uuid.uuid4()}"), 404, "order-not-found")
    for malformed in ("7", uuid.uuid4().hex, f"urn:uuid:{uuid.uuid4()}", f"{uuid.uuid4()}x"):
        await json_of(await client.get(f"{PATH}/{malformed}"), 400, "invalid-order-id")


async def test_more_requests_than_may_wait_are_asked_to_come_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(settings) as shop, ingress(settings) as client:
        monkeypatch.setattr(replies, "WAITING_MAX", 1)
        first = asyncio.create_task(client.post(PATH, json=order()))
        await shop.produced(1)
        second = await client.post(PATH, json=order())
        await json_of(second, 503, "overloaded")
        assert second.headers["Retry-After"]
        assert len(await shop.records(ORDERS.name)) == 1
        async with reserving(shop):
            await json_of(await first, 201)
            await json_of(await client.post(PATH, json=order()), 201)


# Health


async def test_health_readiness_and_metrics(settings: Settings) -> None:
    secret = settings.redis_url.replace("redis://", "redis://someone:secret@")
    assert "secret" in secret
    async with opened(settings) as shop, reserving(shop), ingress(settings) as client:
        assert await json_of(await client.get("/health"), 200) == {"status": "ok"}
        ready = await json_of(await client.get("/ready"), 200)
        assert ready["status"] == "ready"
        assert {name: engine["ready"] for name, engine in ready["engines"].items()} == {
            "kafka": True,
            "redis": True,
            "postgres": True,
        }
        assert all(engine["latency_ms"] >= 0 and engine["address"] for engine in ready["engines"].values())
        made = await json_of(await client.post(PATH, json=order()), 201)
        await client.get(f"{PATH}/{made['order_id']}")
        await client.get(f"/{uuid.uuid4()}")
        await client.request("PROPFIND", "/ready")
        counted = await (await client.get("/metrics")).text()
        for labels in (
            'method="POST",path="/api/v1/orders",status="201"',
            'method="GET",path="/api/v1/orders/{id}",status="200"',
            'method="GET",path="unknown",status="404"',
            'method="other",path="unknown",status="405"',
        ):
            assert f"http_requests_total{{{labels}}}" in counted
            assert f"http_request_duration_seconds_count{{{labels}}}" in counted
        assert made["order_id"] not in counted


async def test_without_redis_the_verdict_is_read_from_postgres_and_ready_says_what_is_unavailable(
    settings: Settings,
) -> None:
    lonely = but(settings, redis_url=f"redis://someone:secret@127.0.0.1:{free_port()}/0?password=secret")
    async with opened(settings) as shop, reserving(shop):
        with structlog.testing.capture_logs() as logged:
            async with ingress(lonely) as client:
                await json_of(await client.post(PATH, json=order()), 201)
                await json_of(await client.post(PATH, json=order(("1", 11))), 409, "insufficient-stock")
                assert [record.headers for record in await shop.records(ORDERS.name)] == [(), ()]
                body = await json_of(await client.get("/ready"), 200)
        assert (body["status"], body["degraded"]) == ("degraded", ["redis"])
        assert {name: engine["ready"] for name, engine in body["engines"].items()} == {
            "kafka": True,
            "redis": False,
            "postgres": True,
        }
        assert "secret" not in json.dumps(body)
        assert [line["engine"] for line in logged if line["event"] == "an engine does not answer"] == ["Redis"]
        assert "secret" not in str(logged)


async def test_a_request_too_many_for_the_pool_is_told_so_and_postgres_is_not_said_to_be_away(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "WAIT_S", 0.3)
    monkeypatch.setattr(orders, "READ_S", SLOW_S)
    async with opened(settings) as shop, ingress(but(settings, postgres_pool_max=1, verdict_timeout_s=0)) as client:
        path = f"{PATH}/{uuid.uuid4()}"
        with structlog.testing.capture_logs() as logged:
            async with shop.store.pool.acquire() as connection, connection.transaction():
                await connection.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
                first = asyncio.create_task(client.get(path))
                waiting = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND relation = 'orders'::regclass"

                async def waits() -> bool | None:
                    return await connection.fetchval(waiting) or None

                await until(waits)
                for other in (path, f"{PATH}?user_id=7", "/api/v1/products"):
                    answer = await client.get(other)
                    assert "at work" in (await json_of(answer, 503, "overloaded"))["detail"]
                    assert int(answer.headers["Retry-After"]) > 0
                await json_of(await client.post(PATH, json=order(idempotency_key="k")), 202)
                assert (await json_of(await client.get("/ready"), 200))["degraded"] == []
            await json_of(await first, 404, "order-not-found")
        assert [line for line in logged if line["event"] == "an engine does not answer"] == []
        counted = await (await client.get("/metrics")).text()
        assert "postgres_pool_wait_seconds_count" in counted
        assert re.search(r'http_overloaded_total\{what="postgres_pool"\} ([0-9.]+)', counted)[1] >= "4"  # type: ignore[index]


async def test_an_order_is_read_by_one_statement(settings: Settings) -> None:
    async with opened(settings) as shop, reserving(shop), ingress(settings) as client:
        made = await json_of(await client.post(PATH, json=order(("1", 1), ("2", 1))), 201)
        asked: list[str] = []
        async with shop.store.pool.acquire() as connection:
            connection.add_query_logger(lambda record: asked.append(record.query))
        assert (await shop.store.order(made["order_id"]) or {})["status"] == "RESERVED"
        assert asked == [query("order")]


# Engines that become unavailable while it serves


@pytest.fixture
def own(own_engines: LocalEngines, run_id: str, tmp_path: Path) -> Settings:
    own_engines.up()
    addresses = own_engines.addresses()
    return load(
        **addresses | {"database_url": create_database(addresses["database_url"], run_id)},
        topic_prefix=f"{run_id}.",
        redis_prefix=run_id,
        app_id=run_id,
        local_dir=tmp_path / "local",
        partitions=4,
        verdict_timeout_s=SLOW_S,
        retry_wait_max_s=0.5,
        drain_s=0.0,
        _env_file=None,
    )


async def kill(own_engines: LocalEngines, name: Any) -> None:
    await asyncio.to_thread(own_engines.kill, name)


async def start_again(own_engines: LocalEngines, name: Any) -> None:
    await asyncio.to_thread(own_engines.start, name)


async def answers(client: Client, kind: str | None) -> dict[str, Any]:
    """Ask /ready until every engine answers (None) or one does not."""

    async def ask() -> dict[str, Any] | None:
        answer = await client.get("/ready")
        return await json_of(answer, answer.status, kind) if answer.status == (200 if kind is None else 503) else None

    return await until(ask)


async def test_while_kafka_is_unavailable_no_order_is_claimed_and_a_repeat_afterwards_counts_once(
    own_engines: LocalEngines, own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"Idempotency-Key": "k-1"}
    monkeypatch.setattr(producer, "PRODUCE_S", 2.0)
    async with opened(own) as shop, ingress(own) as client:
        await answers(client, None)
        await kill(own_engines, "kafka")
        answer = await client.post(PATH, json=order(), headers=key)
        body = await json_of(answer, 503, "engine-unavailable")
        assert (body["engine"], body["order_id"]) == ("Kafka", order_id_for_key("7", "k-1"))
        assert int(answer.headers["Retry-After"]) > 0
        fresh = await json_of(await client.post(PATH, json=order()), 503, "engine-unavailable")
        engines = (await answers(client, "not-ready"))["engines"]
        assert (engines["kafka"]["ready"], engines["postgres"]["ready"]) == (False, True)

        await start_again(own_engines, "kafka")
        await answers(client, None)
        assert await shop.records(ORDERS.name) == []  # what was refused is not produced behind the client's back
        async with reserving(shop):
            again = await json_of(await client.post(PATH, json=order(), headers=key), 201)
            assert again["order_id"] == body["order_id"]
            same = await json_of(await client.post(PATH, json=order(order_id=fresh["order_id"])), 201)
            assert same["order_id"] == fresh["order_id"]
        assert await shop.units("1") == (6, 4)


async def test_a_request_that_waits_while_redis_becomes_unavailable_gets_its_verdict_and_so_do_later_ones(
    own_engines: LocalEngines, own: Settings
) -> None:
    async with opened(own) as shop, ingress(own) as client:
        waiting = asyncio.create_task(client.post(PATH, json=order()))
        (record,) = await shop.produced(1)
        assert [name for name, _ in record.headers] == [REPLY_TO]
        await kill(own_engines, "redis")
        async with reserving(shop):
            await json_of(await waiting, 201)
            await json_of(await client.post(PATH, json=order()), 201)
            assert (await shop.produced(2))[-1].headers == () or (await shop.produced(2))[0].headers == ()
            await start_again(own_engines, "redis")

            async def heard() -> bool | None:
                made = await json_of(await client.post(PATH, json=order(("2", 1), order_id=str(uuid.uuid4()))), 201)
                records = await shop.records(ORDERS.name)
                (mine,) = [r for r in records if orjson.loads(r.value)["order_id"] == made["order_id"]]
                return True if mine.headers else None

            assert await until(heard)  # it subscribes again: orders carry the header again


async def test_while_postgres_is_unavailable_orders_are_taken_in_and_reading_says_so(
    own_engines: LocalEngines, own: Settings
) -> None:
    async with opened(own) as shop, ingress(but(own, verdict_timeout_s=0.5)) as client:
        await kill(own_engines, "postgres")
        made = await json_of(await client.post(PATH, json=order(idempotency_key="k-1")), 202)
        await json_of(await client.post(PATH, json=order(), headers={"Prefer": "respond-async"}), 202)
        body = await json_of(await client.get(f"{PATH}/{made['order_id']}"), 503, "engine-unavailable")
        assert body["engine"] == "Postgres"
        engines = (await json_of(await client.get("/ready"), 503, "not-ready"))["engines"]
        assert (engines["postgres"]["ready"], engines["kafka"]["ready"]) == (False, True)
        assert len(await shop.records(ORDERS.name)) == 2
        await start_again(own_engines, "postgres")
        await answers(client, None)
        async with reserving(shop):
            assert (await readable(client, made["order_id"]))["order"]["status"] == "RESERVED"


# Start and end


async def test_it_says_at_the_start_what_does_not_answer_or_was_not_prepared(settings: Settings) -> None:
    async def start(changed: Settings) -> str:
        with pytest.raises(OrderstreamError) as raised:
            async with ingress(changed):
                pass
        return f"{type(raised.value).__name__} {raised.value}"

    unused = free_port()
    assert re.search(r"EngineUnavailable Postgres .*\n.*orderstream init", await start(settings))
    await prepare(settings)
    assert re.search(r"EngineUnavailable Kafka .*no topic.*\n.*orderstream init", await start(settings))
    async with opened(settings) as shop:
        kafka = await start(but(settings, kafka=f"127.0.0.1:{unused}"))
        assert re.search(rf"EngineUnavailable Kafka does not answer at 127.0.0.1:{unused}.*\n.*orderstream up", kafka)
        postgres = await start(but(settings, database_url=f"postgresql://someone:secret@127.0.0.1:{unused}/x"))
        assert re.search(
            rf"EngineUnavailable Postgres does not answer at .*127.0.0.1:{unused}.*\n.*orderstream up", postgres
        )
        assert "secret" not in postgres
        assert "the database of another pipeline" in await start(but(settings, partitions=3))
        await shop.store.pool.execute("UPDATE pipeline SET partitions = 3")
        assert re.search(
            "SettingsError.*ORDERSTREAM_PARTITIONS: 3", await start(but(settings, partitions=3)), re.DOTALL
        )
        await shop.store.pool.execute("UPDATE pipeline SET partitions = $1", settings.partitions)
        key = Keys(settings.redis_prefix).pipeline
        async with redis.Redis.from_url(settings.redis_url) as client:
            await client.set(key, "of-another-pipeline")
        assert re.search(
            rf"PrefixTaken the Redis prefix {settings.redis_prefix} is another pipeline's.*\n.*remove the key {key}",
            await start(settings),
        )
        async with ingress(but(settings, redis_url=f"redis://127.0.0.1:{unused}/0")):
            pass  # a Redis that is away is no fault
    assert issubclass(EngineUnavailable, OrderstreamError)
    assert issubclass(SettingsError, OrderstreamError)


class Served:
    """An ingress process, as a user runs it."""

    def __init__(self, settings: Settings, log: Path, port: int = 0) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orderstream", "ingress", "--port", str(port)],
            env=environment(settings),
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
        )

    async def url(self) -> str:
        """Return where it listens, as its log says."""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            await asyncio.sleep(0.05)
        return found[0]

    async def end(self) -> int:
        """Wait for its end; return its exit code."""
        return await asyncio.to_thread(self.process.wait, 30)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Return a function that runs an ingress; all of them are ended after the test."""
    made: list[Served] = []

    def start(settings: Settings, port: int = 0) -> Served:
        made.append(Served(settings, tmp_path / f"ingress-{len(made)}.log", port))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_on_a_signal_it_finishes_the_request_in_hand(
    settings: Settings, serve: Callable[..., Served], signum: signal.Signals
) -> None:
    async with opened(settings) as shop:
        served = serve(settings)
        async with aiohttp.ClientSession(await served.url(), timeout=PATIENCE) as client:
            decided = asyncio.create_task(client.post(PATH, json=order()))
            await shop.produced(1)
            served.process.send_signal(signum)
            async with reserving(shop):
                await json_of(await decided, 201)
        assert await served.end() == 0, served.log.read_text()


async def test_on_a_signal_it_does_not_wait_for_a_verdict_that_does_not_come(
    settings: Settings, serve: Callable[..., Served]
) -> None:
    async with opened(settings) as shop:
        served = serve(settings)
        async with aiohttp.ClientSession(await served.url(), timeout=PATIENCE) as client:
            waiting = asyncio.create_task(client.post(PATH, json=order()))
            await shop.produced(1)
            served.process.send_signal(signal.SIGTERM)
            await json_of(await waiting, 202)
        assert await served.end() == 0, served.log.read_text()


async def test_on_sigterm_it_is_unready_first_and_takes_no_connection_later(
    settings: Settings, serve: Callable[..., Served]
) -> None:
    async with opened(settings):
        served = serve(but(settings, drain_s=2.0))
        url = await served.url()
        async with aiohttp.ClientSession(url, timeout=PATIENCE) as client:
            assert (await client.get("/ready")).status == 200
            served.process.send_signal(signal.SIGTERM)

            async def unready() -> aiohttp.ClientResponse | None:
                answer = await client.get("/ready")
                return answer if answer.status == 503 else None

            answer = await until(unready, 1.5)
            assert "leaves" in (await json_of(answer, 503, "not-ready"))["detail"]
            assert answer.headers["Connection"] == "close"
            for path in ("/health", "/api/v1/products"):  # of new connections
                await json_of(await client.get(path), 200)

            async def refused() -> bool | None:
                with contextlib.suppress(aiohttp.ClientConnectorError):
                    await client.get("/health")
                    return None
                return True

            assert await until(refused, 20)
        assert await served.end() == 0, served.log.read_text()


async def test_idle_connections_do_not_silence_it(settings: Settings, serve: Callable[..., Served]) -> None:
    async with opened(settings):
        served = serve(settings)
        resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (512, 1_024))  # before it has read its limit
        port = int((await served.url()).rpartition(":")[2])
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(1_100)]
        await asyncio.sleep(1.5)

        async def health(source: str) -> tuple[int, dict[str, Any]]:
            connector = aiohttp.TCPConnector(local_addr=(source, 0))
            async with aiohttp.ClientSession(
                f"http://127.0.0.1:{port}", connector=connector, timeout=PATIENCE
            ) as client:
                answer = await client.get("/health")
                return answer.status, await answer.json(content_type=None)

        assert (await health("127.0.0.1"))[1].get("type") == "urn:orderstream:problem:overloaded"

        async def is_served() -> bool | None:  # once those that sent nothing are closed beyond a client's bound
            return True if await health("127.0.0.2") == (200, {"status": "ok"}) else None

        assert await until(is_served, 10)
        said = served.log.read_text()
        assert re.search(r'"limit": 1024, "connections": 768, .*few descriptors', said), said
        assert re.search(r'"client": "127.0.0.1".*connections are refused', said), said
        for _, writer in held:
            writer.transport.abort()


async def test_a_port_that_is_taken_and_an_engine_that_is_unavailable_are_reported_without_a_traceback(
    settings: Settings, serve: Callable[..., Served]
) -> None:
    served = serve(but(settings, database_url="postgresql://someone:secret@127.0.0.1:1/x"))
    assert await served.end() == 2
    said = served.log.read_text()
    assert "Postgres does not answer at" in said
    assert "Traceback" not in said
    assert "secret" not in said
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with opened(settings):
            served = serve(settings, port)
            assert await served.end() != 0
    said = served.log.read_text()
    assert f"can't listen at 127.0.0.1:{port}" in said
    assert "ORDERSTREAM_HTTP_PORT" in said
    assert "Traceback" not in said
