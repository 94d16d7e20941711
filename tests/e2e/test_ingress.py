"""The ingress: orders over HTTP, verdicts in the answer, errors as problem documents."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from orderstream.http.server import create_app
from orderstream.settings import Settings
from tests.harness import Pipeline

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]
PATH = "/api/v1/orders"


@asynccontextmanager
async def ingress(settings: Settings) -> AsyncIterator[aiohttp.ClientSession]:
    """Serve on a free port; give a client for it."""
    runner = web.AppRunner(create_app(settings))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        await runner.cleanup()


def order(*items: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    lines = [{"product_id": product_id, "quantity": quantity} for product_id, quantity in items]
    return {"user_id": 7, "items": lines, "payment_method": "mock", **more}


async def problem(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    assert answer.content_type == "application/problem+json"
    body: dict[str, Any] = await answer.json()
    assert body["status"] == answer.status
    assert body["type"].startswith("urn:orderstream:problem:")
    assert body["error"]
    assert body["details"] == body["detail"]
    return body


async def test_the_verdict_is_in_the_answer(pipeline: Make) -> None:
    shop = pipeline(verdict_timeout_s=20.0)
    await shop.start({"1": 10, "2": 10, "3": 1})
    async with ingress(shop.settings) as client:
        answer = await client.post(PATH, json=order((1, 2)))
        held = await answer.json()
        assert (answer.status, held["status"]) == (201, "RESERVED")
        assert answer.headers["Location"] == f"{PATH}/{held['order_id']}"
        many = await client.post(PATH, json=order((1, 1), ("2", 1), ("3", 1)))
        assert (many.status, (await many.json())["status"]) == (201, "RESERVED")

        few = await client.post(PATH, json=order((1, 11)))
        assert few.status == 409
        refused = await problem(few)
        assert (refused["reason"], refused["order_status"]) == ("insufficient_stock", "CANCELLED")
        none = await client.post(PATH, json=order((1, 1), ("3", 1)))
        assert ((await problem(none))["reason"], none.status) == ("insufficient_stock", 409)
        unknown = await client.post(PATH, json=order(("nothing", 1)))
        assert ((await problem(unknown))["reason"], unknown.status) == ("unknown_product", 409)

        await shop.finished([held["order_id"], (await many.json())["order_id"]])
        body = await (await client.get(answer.headers["Location"])).json()
        assert body["order"]["status"] == "CONFIRMED"
        assert (body["order"]["total_amount"], body["order"]["user_id"]) == (200, "7")
        assert [(item["product_id"], item["quantity"], item["unit_price"]) for item in body["items"]] == [("1", 2, 100)]
        assert (body["payment"]["status"], body["payment"]["amount_cents"]) == ("SUCCESS", 200)
        assert [moment["status"] for moment in body["history"]] == ["CREATED", "RESERVED", "PAID", "CONFIRMED"]
    assert await shop.violations() == []


async def test_a_repeated_key_is_the_same_order_and_another_one_under_it_is_refused(pipeline: Make) -> None:
    shop = pipeline(verdict_timeout_s=10.0)
    await shop.start({"1": 10})
    async with ingress(shop.settings) as client:
        key = {"Idempotency-Key": "k-1"}
        named = order((1, 2), idempotency_key="k-1")
        answers = await asyncio.gather(*(client.post(PATH, json=named) for _ in range(5)))
        held = await client.post(PATH, json=order((1, 2)), headers=key)
        assert await held.json() == await answers[0].json()
        assert [answer.status for answer in answers] == [201] * 5
        assert len({(await answer.json())["order_id"] for answer in answers}) == 1
        again = await client.post(PATH, json=order((1, 2), idempotency_key="k-1"), headers={"Idempotency-Key": "other"})
        assert (await again.json())["order_id"] == (await answers[0].json())["order_id"]
    other = shop.settings.model_copy(update={"verdict_timeout_s": 1.0})
    async with ingress(other) as client:
        reused = await client.post(PATH, json=order((1, 3)), headers=key)
        assert (reused.status, (await problem(reused))["type"]) == (
            422,
            "urn:orderstream:problem:idempotency-key-reused",
        )
    assert await shop.has_counts("1", 8, 0, 2)


async def test_a_late_verdict_is_202_and_so_is_an_order_that_does_not_wait(pipeline: Make) -> None:
    shop = pipeline(verdict_timeout_s=0.3)
    await shop.start({"1": 10}, workers=0)
    async with ingress(shop.settings) as client:
        late = await client.post(PATH, json=order((1, 1)))
        assert (late.status, (await late.json())["status"]) == (202, "CREATED")
        unknown = await client.get(late.headers["Location"])
        assert unknown.status == 404
        assert "moment ago" in (await problem(unknown))["detail"]
        eager = await client.post(PATH, json=order((1, 1)), headers={"Prefer": "respond-async"})
        assert (eager.status, eager.headers["Preference-Applied"]) == (202, "respond-async")
        shop.add_worker()
        await shop.finished([(await late.json())["order_id"], (await eager.json())["order_id"]])
        assert (await (await client.get(late.headers["Location"])).json())["order"]["status"] == "CONFIRMED"


async def test_without_redis_the_verdict_comes_from_postgres(pipeline: Make, redis_unavailable: str) -> None:
    shop = pipeline(redis_url=redis_unavailable, verdict_timeout_s=2.0)
    await shop.start({"1": 10})
    async with ingress(shop.settings) as client:
        held = await client.post(PATH, json=order((1, 2)))
        assert held.status == 201
        assert (await client.post(PATH, json=order((1, 20)))).status == 409
        ready = await client.get("/ready")
        body = await ready.json()
        assert (ready.status, body["status"], body["degraded"]) == (200, "degraded", ["redis"])
        assert {name: engine["ready"] for name, engine in body["engines"].items()} == {
            "kafka": True,
            "redis": False,
            "postgres": True,
        }


async def test_bad_requests_get_every_fault_and_nothing_is_produced(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"1": 10}, workers=0)
    async with ingress(shop.settings) as client:

        async def refused(status: int, kind: str, **request: Any) -> dict[str, Any]:
            answer = await client.post(PATH, **request)
            body = await problem(answer)
            assert (answer.status, body["type"]) == (status, f"urn:orderstream:problem:{kind}"), body
            return body

        faulty = await refused(400, "invalid-order", json=order((1, 0), ("", 1), colour="red"))
        assert {"items.0.quantity", "colour"} <= {fault["field"] for fault in faulty["faults"]}
        await refused(400, "not-json", data=b"{", headers={"Content-Type": "application/json"})
        await refused(400, "invalid-order", json=order())
        await refused(400, "invalid-order", json=order((1, -5)))
        await refused(422, "too-many-units", json=order((1, 6_000), (1, 5_000)))
        await refused(400, "invalid-order", json=order((1, 1), order_id=str(uuid.uuid4()), idempotency_key="k"))
        await refused(413, "too-large", json=order((1, 1), idempotency_key="k" * 70_000))
        await refused(415, "unsupported-media-type", data=b"a=b", headers={"Content-Type": "text/plain"})
        assert (await problem(await client.get(f"{PATH}/not-an-id")))["status"] == 400
        assert (await problem(await client.get(f"{PATH}/{uuid.uuid4()}")))["status"] == 404
        assert (await problem(await client.get("/nowhere")))["status"] == 404
        wrong = await client.delete(PATH)
        assert ((await problem(wrong))["status"], wrong.headers["Allow"]) == (405, "GET,HEAD,POST")
        assert await shop.records("orders") == []
        assert (await (await client.get("/health")).json()) == {"status": "ok"}
        assert (await client.get("/ready")).status == 200
        counted = await (await client.get("/metrics")).text()
        assert 'http_requests_total{method="POST",path="/api/v1/orders",status="400"}' in counted
