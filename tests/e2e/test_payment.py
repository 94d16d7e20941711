"""A payment provider over HTTP that is slow, loses answers and fails: no order is charged twice, nothing is guessed."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from tests.harness import Pipeline

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]


class Bank:
    """A provider as real ones are: idempotent by key, and not to be relied on."""

    def __init__(self) -> None:
        self.charges: dict[str, dict[str, Any]] = {}
        self.refunds: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.in_flight = self.in_flight_most = 0
        self.latency_s = 0.05
        self._draw = random.Random(1)

    async def charge(self, request: web.Request) -> web.Response:
        key = request.headers["Idempotency-Key"]
        body = await request.json()
        self.asked[key] += 1
        self.in_flight += 1
        self.in_flight_most = max(self.in_flight_most, self.in_flight)
        try:
            await asyncio.sleep(self._draw.uniform(0, self.latency_s))
            if self._draw.random() < 0.1:
                return web.Response(status=503)  # before anything happened
            known = self.charges.setdefault(
                key,
                {**body, "status": "declined" if self._draw.random() < 0.2 else "succeeded", "charge_id": f"c-{key}"},
            )
            if self._draw.random() < 0.2:
                return web.Response(status=500)  # it happened, and the answer is lost
            return web.json_response({"status": known["status"], "charge_id": known["charge_id"]})
        finally:
            self.in_flight -= 1

    async def refund(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.refunds[body["charge_id"]] = 1
        return web.json_response({"status": "succeeded"})

    @property
    def taken(self) -> int:
        return sum(charge["status"] == "succeeded" for charge in self.charges.values())


@pytest.fixture
async def bank() -> AsyncIterator[tuple[Bank, str]]:
    """Run a provider; give it and its URL."""
    ours = Bank()
    app = web.Application()
    app.router.add_post("/charges", ours.charge)
    app.router.add_post("/refunds", ours.refund)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield ours, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_lost_answers_and_a_killed_worker_charge_no_order_twice(pipeline: Make, bank: tuple[Bank, str]) -> None:
    provider, url = bank
    shop = pipeline(payment_provider="http", payment_url=url, payment_in_flight_max=300)
    await shop.start({"one": 10_000, "two": 10_000})
    ids = await shop.produce(shop.order(("one", 1), *([("two", 1)] if n % 3 else [])) for n in range(1_500))
    await shop.eventually("SELECT count(*) > 300 FROM payments", True)
    shop.workers[0].kill()
    shop.add_worker()
    outcome = await shop.finished(ids)
    assert set(outcome) == {"CONFIRMED", "CANCELLED payment_declined"}
    assert provider.taken == outcome["CONFIRMED"]
    assert set(provider.charges) == set(ids)
    assert max(provider.asked.values()) > 1, "no answer was lost: the test shows nothing"
    assert 100 < provider.in_flight_most <= 300
    assert {charge["amount_cents"] for charge in provider.charges.values()} == {100, 200}
    assert await shop.charges() == (outcome["CONFIRMED"], outcome["CONFIRMED"])
    # What the killed worker had declined has ended already, while its successor may still be asking for that answer again.
    held = "SELECT count(*) FROM orders JOIN order_lines USING (order_id) WHERE status = 'CANCELLED' AND state = 'held'"
    await shop.eventually(held, 0)
    assert await shop.violations() == []


async def test_a_success_that_comes_after_the_expiry_is_given_back_once(pipeline: Make, bank: tuple[Bank, str]) -> None:
    provider, url = bank
    provider.latency_s = 4.0
    shop = pipeline(payment_provider="http", payment_url=url, hold_ttl_s=2.0)
    await shop.start({"one": 1_000})
    ids = await shop.produce(shop.order(("one", 1)) for _ in range(200))
    outcome = await shop.finished(ids)
    assert outcome["CANCELLED expired"] > 0
    assert outcome["CONFIRMED"] > 0
    # Asked again and again until its outcome is known; a success is then given back.
    for _ in range(600):
        if provider.taken - len(provider.refunds) == outcome["CONFIRMED"]:
            break
        await asyncio.sleep(0.1)
    assert provider.taken - len(provider.refunds) == outcome["CONFIRMED"]
    assert provider.refunds
    await shop.eventually("SELECT count(*) FROM payments WHERE status = 'REFUNDED'", len(provider.refunds))
    await shop.eventually("SELECT count(*) FROM payments WHERE status = 'REFUND_DUE'", 0)
    assert await shop.outcomes(ids) == outcome
    assert await shop.violations() == []
