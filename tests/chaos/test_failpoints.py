"""The kill-point matrix: the process ends, as by ``kill -9``, between any two effects of any stage."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import orjson
import pytest

from orderstream.failpoints import POINTS
from orderstream.streams.topics import ORDER_EVENTS
from tests.chaos.scenario import SUCCESS_RATE, Scenario
from tests.chaos.test_expiry import cancel
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]
SESSION_S = 2.0
"""Short: each test waits for it once, while the killed worker still has its place in the group."""


async def test_without_any_fault_orders_end_as_the_others_are_held_to(pipeline: Make) -> None:
    shop = pipeline(payment_success_rate=SUCCESS_RATE, payment_latency_max_s=0.05, partitions=4)
    scenario = Scenario(5_000)
    await shop.start(scenario.products)
    await shop.produce(scenario.orders)
    outcome = await scenario.check(shop)
    assert len(outcome) == 3, outcome


REVOKING = ("pay.before_refund", "pay.after_refund", *(p for p in POINTS if p.startswith(("revoke.", "return."))))
"""The failpoints that are passed only when a paid order is cancelled."""


async def test_a_kill_while_paid_orders_are_revoked_breaks_no_promise(pipeline: Make) -> None:
    """One worker after the other is killed at the next failpoint; each also finishes what the one before left half done."""
    shop = pipeline(payment_success_rate=1.0, session_timeout_s=SESSION_S, expiry_interval_s=0.2, partitions=4)
    scenario = Scenario(len(REVOKING) * 30, may_end=frozenset({"CONFIRMED", "CANCELLED cancelled_by_user"}))
    await shop.start(scenario.products)
    await shop.produce(scenario.orders)
    sold = [i for i, end in (await shop.ended_all(scenario.ids())).items() if end == "CONFIRMED"]
    keep, sold = sold[:30], sold[30:]
    shop.workers[0].stop()
    each = len(sold) // len(REVOKING)
    for n, point in enumerate(REVOKING):
        armed = shop.add_worker(failpoint=f"{point}:kill")
        await cancel(shop, sold[n * each : (n + 1) * each])
        await asyncio.to_thread(armed.process.wait, 60)
        assert armed.process.returncode == -signal.SIGKILL, armed.tail()
    shop.add_worker()
    revoked = sold[: each * len(REVOKING)]
    await shop.eventually("SELECT count(*) FROM orders WHERE reason = 'cancelled_by_user'", len(revoked))
    await shop.eventually("SELECT count(*) FROM payments WHERE status = 'REFUNDED'", len(revoked))
    outcome = await scenario.check(shop)
    assert set((await shop.ended(keep)).values()) == {"CONFIRMED"}
    assert outcome["CANCELLED cancelled_by_user"] == len(revoked) > 100
    last: dict[str, str] = {}
    for record in await shop.records(ORDER_EVENTS.name):
        event = orjson.loads(record.value)
        assert (last.get(event["order_id"]), event["status"]) != ("CANCELLED", "CONFIRMED"), event
        last[event["order_id"]] = event["status"]


@pytest.mark.parametrize("point", [point for point in POINTS if not point.startswith(("revoke.", "return."))])
async def test_a_kill_between_two_effects_breaks_no_promise(pipeline: Make, point: str) -> None:
    refunds = "refund" in point
    shop = pipeline(
        payment_success_rate=1.0 if refunds else SUCCESS_RATE,
        payment_latency_min_s=0.0,
        payment_latency_max_s=0.05,
        session_timeout_s=SESSION_S,
        partitions=4,
    )
    scenario = Scenario(5_000)
    if refunds:
        await refund_killed(shop, point)
        return
    await shop.start(scenario.products, workers=0)
    armed = shop.add_worker(failpoint=f"{point}:kill:{3 if 'charge' not in point else 700}")
    await shop.settled(1)
    await shop.produce(scenario.orders)
    await asyncio.to_thread(armed.process.wait, 60)
    assert armed.process.returncode == -signal.SIGKILL, armed.tail()
    shop.add_worker()
    await scenario.check(shop)


async def refund_killed(shop: Pipeline, point: str) -> None:
    """Kill around the refund of an order that expired while it was charged."""
    slow = {"hold_ttl_s": 1.0, "payment_latency_min_s": 4.0, "payment_latency_max_s": 4.0}
    await shop.start({"one": 100}, workers=0)
    armed = shop.add_worker(failpoint=f"{point}:kill", **slow)
    await shop.settled(1)
    ids = await shop.produce(shop.order(("one", 1)) for _ in range(50))
    assert await shop.finished(ids) == {"CANCELLED expired": 50}
    await asyncio.to_thread(armed.process.wait, 60)
    assert armed.process.returncode == -signal.SIGKILL, armed.tail()
    shop.add_worker(**slow)
    await shop.eventually("SELECT count(*) FROM payments WHERE status = 'REFUNDED'", 50)
    assert await shop.has_counts("one", 100, 0, 0)
    assert await shop.violations() == []
