"""Cancelling over HTTP at every state of an order, its history, and its events as they happen."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import orjson
import pytest

from orderstream.streams.topics import ORDER_COMMANDS, ORDERS
from tests.e2e.test_ingress import PATH, ingress, order, problem
from tests.harness import Pipeline

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]


async def cancelled(client: aiohttp.ClientSession, order_id: str, **how: Any) -> tuple[int, dict[str, Any]]:
    answer = await client.post(f"{PATH}/{order_id}/cancel", **how)
    return answer.status, await answer.json()


async def follow(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a stream: their fields, the data decoded."""
    event: dict[str, Any] = {}
    async for raw in answer.content:
        line = raw.decode().rstrip("\n")
        if line.startswith(":"):
            continue
        if not line and event:
            yield event
            event = {}
        elif line:
            name, _, text = line.partition(": ")
            event[name] = orjson.loads(text) if name == "data" else text


async def placed(client: aiohttp.ClientSession, *items: tuple[Any, Any]) -> str:
    answer = await client.post(PATH, json=order(*items))
    assert answer.status in (201, 202)
    return str((await answer.json())["order_id"])


async def test_a_part_of_an_order_is_not_cancelled_nor_all_of_it_instead(pipeline: Make) -> None:
    shop = pipeline(payment_latency_max_s=0.0)
    await shop.start({"1": 10})
    part = {"items": [{"product_id": "1", "quantity": 4}]}
    asked: list[dict[str, Any]] = [{"json": part}, {"params": {"quantity": "4"}}, {"data": b"4 of 6"}]
    async with ingress(shop.settings) as client:
        order_id = await placed(client, (1, 6))
        for one in asked:
            answer = await client.post(f"{PATH}/{order_id}/cancel", **one)
            assert answer.status in (400, 415), (one, await answer.text())
        await shop.finished([order_id])
        assert await shop.ended([order_id]) == {order_id: "CONFIRMED"}
        assert (await client.get(f"{PATH}/{order_id}?lines=1")).status == 400
        assert await cancelled(client, order_id, json={}) == (
            200,
            {"order_id": order_id, "status": "CANCELLED", "reason": "cancelled_by_user"},
        )


async def test_an_order_is_cancelled_at_each_state_and_its_status_answered(pipeline: Make) -> None:
    shop = pipeline(verdict_timeout_s=15.0, payment_latency_min_s=0.0, payment_latency_max_s=0.0)
    slow = shop.settings.model_copy(update={"verdict_timeout_s": 0.3})
    await shop.start({"1": 10, "2": 10}, workers=0)
    worker = shop.add_worker(payment_latency_min_s=3.0, payment_latency_max_s=3.0)
    await shop.settled(1)
    async with ingress(shop.settings) as client, ingress(slow) as impatient:
        held = await placed(client, (1, 1), (2, 1))
        done = {"order_id": held, "status": "CANCELLED", "reason": "cancelled_by_user"}
        assert await cancelled(client, held) == (200, done), "while its charge is under way"
        assert await cancelled(client, held.upper()) == (200, done), "twice: the same answer"
        await shop.eventually("SELECT status FROM payments WHERE order_id = $1::uuid", "VOIDED", held)
        worker.stop()
        early = (await (await impatient.post(PATH, json=order((1, 1)))).json())["order_id"]
        assert await cancelled(impatient, early) == (
            202,
            {"order_id": early, "status": "CREATED", "reason": None},
        ), "it is in Kafka, and no stage has taken it in"

        shop.add_worker()
        sold = await placed(client, (1, 2), (2, 3))
        few = await client.post(PATH, json=order((1, 11)))
        refused = (await problem(few))["order_id"]
        assert (await shop.ended_all([early, sold])) == {early: "CANCELLED cancelled_by_user", sold: "CONFIRMED"}
        assert await cancelled(client, refused) == (
            200,
            {"order_id": refused, "status": "CANCELLED", "reason": "insufficient_stock"},
        ), "one that ended otherwise stays as it is"
        answers = await asyncio.gather(*(cancelled(client, sold) for _ in range(5)))
        assert answers == [(200, {"order_id": sold, "status": "CANCELLED", "reason": "cancelled_by_user"})] * 5
        assert await shop.has_counts("1", 10, 0, 0)
        assert await shop.has_counts("2", 10, 0, 0)
        await shop.eventually("SELECT status FROM payments WHERE order_id = $1::uuid", "REFUNDED", sold)
        paid = (await (await client.get(f"{PATH}/{sold}")).json())["payment"]
        assert (paid["status"], paid["amount_cents"], paid["refunded_at"] > paid["created_at"]) == (
            "REFUNDED",
            500,
            True,
        )
        assert (await shop.published([sold]))[sold] == ["CREATED", "RESERVED", "PAID", "CONFIRMED", "CANCELLED"]

        unknown = [str(uuid.uuid4()) for _ in range(2)]
        for order_id in unknown:
            assert (await cancelled(client, order_id))[0] == 202, "it is kept, should the order come"
        await shop.eventually("SELECT count(*) FROM kept_commands", 2)
        orders = [
            shop.order(*lines, order_id=i) for i, lines in zip(unknown, ([("1", 1)], [("1", 1), ("2", 1)]), strict=True)
        ]
        assert await shop.finished(await shop.produce(orders)) == {"CANCELLED cancelled_by_user": 2}
        stories = await shop.published(unknown)
        for order_id in unknown:
            assert stories[order_id] == ["CREATED", "RESERVED", "CANCELLED"], "nobody was charged"
        await shop.eventually("SELECT count(*) FROM kept_commands", 0)
        assert (await client.post(f"{PATH}/no-id/cancel")).status == 400
        assert (await client.get(f"{PATH}/{sold}/cancel")).status == 405

        last = await placed(client, (2, 10))
        await shop.finished([last])
        shop.workers[-1].stop()
        late = await impatient.post(f"{PATH}/{last}/cancel")
        assert (late.status, late.headers["Location"]) == (202, f"{PATH}/{last}")
        assert (await late.json())["status"] == "CONFIRMED"
        eager = await client.post(f"{PATH}/{last}/cancel", headers={"Prefer": "respond-async"})
        assert (eager.status, eager.headers["Preference-Applied"]) == (202, "respond-async")
        shop.add_worker()
        assert await shop.has_counts("2", 10, 0, 0)
    assert await shop.violations(grace_s=0.0) == []


async def test_the_history_names_the_record_that_caused_each_status(pipeline: Make) -> None:
    shop = pipeline(verdict_timeout_s=15.0, payment_success_rate=1.0)
    await shop.start({"1": 10, "2": 10})

    async def history(order_id: str) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = (await (await client.get(f"{PATH}/{order_id}")).json())["history"]
        return steps

    async with ingress(shop.settings) as client:
        one, many = await placed(client, (1, 1)), await placed(client, (1, 1), (2, 2))
        refused = (await problem(await client.post(PATH, json=order((1, 1), (2, 99)))))["order_id"]
        await shop.finished([one, many, refused])
        await cancelled(client, many)
        topics = {spec.name: await shop.records(spec.name) for spec in (ORDERS, ORDER_COMMANDS)}
        must: dict[str, list[str | None]] = {
            one: ["orders", "orders", None, None],
            many: ["orders", "orders", None, None, "order-commands"],
            refused: ["orders", "orders"],
        }
        for order_id, names in must.items():
            steps = await history(order_id)
            assert [step["record"] and step["record"]["topic"] for step in steps] == [
                name and shop.settings.topic(name) for name in names
            ]
            for step, name in zip(steps, names, strict=True):
                if name is not None:
                    there = {(record.partition, record.offset): record for record in topics[name]}
                    record = there[step["record"]["partition"], step["record"]["offset"]]
                    assert order_id.encode() in record.value, (step, record.value)
        assert [step["status"] for step in await history(many)][-1] == "CANCELLED"
        assert (await history(refused))[-1]["reason"] == "insufficient_stock"


async def test_events_come_first_from_the_past_then_as_they_happen_and_continue_where_they_were(pipeline: Make) -> None:
    shop = pipeline(verdict_timeout_s=15.0)
    await shop.start({"1": 10, "2": 10}, workers=0)
    shop.add_worker(payment_latency_min_s=1.0, payment_latency_max_s=1.0)
    await shop.settled(1)
    async with ingress(shop.settings) as client:
        order_id = await placed(client, (1, 1), (2, 1))
        url = f"{PATH}/{order_id}/events"
        answers = [await client.get(url) for _ in range(20)]
        assert {(a.status, a.content_type, a.headers["Cache-Control"]) for a in answers} == {
            (200, "text/event-stream", "no-store")
        }
        streams = [[event async for event in follow(answer)] for answer in answers]
        assert all(stream == streams[0] for stream in streams)
        assert [event["id"] for event in streams[0]] == ["0", "1", "2", "3"]
        sent = [event["data"] for event in streams[0]]
        assert [one["status"] for one in sent] == ["CREATED", "RESERVED", "PAID", "CONFIRMED"]
        read = (await (await client.get(f"{PATH}/{order_id}")).json())["history"]
        assert sent == [{"order_id": order_id, **step} for step in read]
        assert streams[0][0]["retry"] == "2000"

        rest = await client.get(url, headers={"Last-Event-ID": "1"})
        assert [event["id"] async for event in follow(rest)] == ["2", "3"]
        over = await client.get(url, headers={"Last-Event-ID": "3"})
        assert (over.status, await over.read()) == (204, b""), "an EventSource does not come again"
        await cancelled(client, order_id)
        more = await client.get(url, headers={"Last-Event-ID": "3"})
        assert [(event["id"], event["data"]["reason"]) async for event in follow(more)] == [("4", "cancelled_by_user")]

        wrong = await client.get(url, headers={"Last-Event-ID": "x"})
        assert (wrong.status, (await problem(wrong))["type"]) == (400, "urn:orderstream:problem:invalid-event-id")
        assert (await client.get(f"{PATH}/no-id/events")).status == 400
        ahead = str(uuid.uuid4())
        waiting = asyncio.create_task(client.get(f"{PATH}/{ahead}/events"))
        await asyncio.sleep(0.3)
        await shop.produce([shop.order(("1", 1), order_id=ahead)])
        assert [e["data"]["status"] async for e in follow(await waiting)] == [
            "CREATED",
            "RESERVED",
            "PAID",
            "CONFIRMED",
        ]
    async with ingress(shop.settings.model_copy(update={"verdict_timeout_s": 0.2})) as client:
        assert (await client.get(f"{PATH}/{uuid.uuid4()}/events")).status == 404


async def test_streams_end_when_the_ingress_leaves(pipeline: Make) -> None:
    shop = pipeline(verdict_timeout_s=5.0)
    await shop.start({"1": 10}, workers=0)
    shop.add_worker(payment_latency_min_s=60.0, payment_latency_max_s=60.0)
    await shop.settled(1)
    async with asyncio.timeout(60), aiohttp.ClientSession() as patient:
        async with ingress(shop.settings) as client:
            where = (await client.get("/health")).url.origin()
            order_id = await placed(client, (1, 1))
            answer = await patient.get(f"{where}{PATH}/{order_id}/events")
            stream = follow(answer)
            assert [(await anext(stream))["data"]["status"] for _ in range(2)] == ["CREATED", "RESERVED"]
        assert [event async for event in stream] == []
