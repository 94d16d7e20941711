"""Postgres and Kafka become unavailable while clients watch an order and cancel it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp
import pytest

from orderstream.engines.local import LocalEngines
from tests.chaos.bank import Bank
from tests.chaos.scenario import audited
from tests.e2e.test_cancel import follow, placed
from tests.e2e.test_ingress import PATH, ingress, order, problem
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]


async def refused(answer: aiohttp.ClientResponse) -> None:
    """Hold an answer to what it must be while an engine is unavailable."""
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert (await problem(answer))["type"] == "urn:orderstream:problem:engine-unavailable"


async def cancelled(client: aiohttp.ClientSession, order_id: str) -> str:
    """Cancel an order as a client does that was asked to come again; return the reason that it ended for."""
    async with asyncio.timeout(60):
        while True:
            answer = await client.post(f"{PATH}/{order_id}/cancel")
            if answer.status == 200:
                return str((await answer.json())["reason"])
            assert answer.status in (202, 503)
            await asyncio.sleep(0.2)


async def test_clients_that_watch_and_cancel_learn_that_an_engine_is_unavailable(
    own_pipeline: Make, own_engines: LocalEngines, bank: Bank
) -> None:
    bank.lenient, bank.quickest_s, bank.latency_s = True, 3.0, 3.0
    shop = own_pipeline(verdict_timeout_s=5.0)
    await shop.start({"1": 10})
    async with asyncio.timeout(150), ingress(shop.settings) as client:
        watched = await placed(client, (1, 1))
        stream = follow(await client.get(f"{PATH}/{watched}/events"))
        assert [(await anext(stream))["data"]["status"] for _ in range(2)] == ["CREATED", "RESERVED"]

        await asyncio.to_thread(own_engines.stop, "postgres")
        assert (await anext(stream))["event"] == "engine-unavailable"
        await refused(await client.post(f"{PATH}/{watched}/cancel"))
        await asyncio.to_thread(own_engines.start, "postgres")
        assert (await anext(stream))["event"] == "engine-available"
        assert [event["data"]["status"] async for event in stream] == ["PAID", "CONFIRMED"]

        await asyncio.to_thread(own_engines.kill, "kafka")
        await refused(await client.post(f"{PATH}/{watched}/cancel"))
        await refused(await client.post(PATH, json=order((1, 1))))
        await asyncio.to_thread(own_engines.start, "kafka")
        assert await cancelled(client, watched) == "cancelled_by_user"
        store = await shop.store()
        await shop.eventually("SELECT status::text FROM payments", "REFUNDED", timeout_s=10)
        assert await store.pool.fetchval("SELECT count(*) FROM orders") == 1, "of a refused order nothing is left"
        assert (await (await client.get("/api/v1/products/1")).json())["available"] == 10
        await audited(shop)
