"""A payment provider over HTTP that is slow, loses answers and fails: no order is charged twice, nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.chaos.bank import Bank
from tests.harness import Pipeline

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]


async def test_lost_answers_and_a_killed_worker_charge_no_order_twice(pipeline: Make) -> None:
    async with Bank(failing=0.3) as bank:
        shop = pipeline(payment_provider="http", payment_url=bank.url, payment_in_flight_max=300)
        await shop.start({"one": 10_000, "two": 10_000})
        ids = await shop.produce(shop.order(("one", 1), *([("two", 1)] if n % 3 else [])) for n in range(1_500))
        await shop.eventually("SELECT count(*) > 300 FROM payments", True)
        shop.workers[0].kill()
        shop.add_worker()
        outcome = await shop.finished(ids)
        assert outcome == {"CONFIRMED": bank.taken, "CANCELLED payment_declined": 1_500 - bank.taken}
        assert set(bank.charges) == set(ids)
        assert max(bank.asked.values()) > 1, "no answer was lost: the test shows nothing"
        assert 100 < bank.in_flight_most <= 300
        assert {charge["amount_cents"] for charge in bank.charges.values()} == {100, 200}
        assert await shop.charges() == (outcome["CONFIRMED"], outcome["CONFIRMED"])
        # What the killed worker had declined has ended already, while its lines elsewhere may still be held.
        await shop.eventually("SELECT count(*) FROM waiting", 0)
        assert await shop.violations() == []


async def test_a_success_that_comes_after_the_expiry_is_given_back_once(pipeline: Make) -> None:
    async with Bank(failing=0.2, latency_s=4.0) as bank:
        shop = pipeline(payment_provider="http", payment_url=bank.url, payment_in_flight_max=300, hold_ttl_s=2.0)
        await shop.start({"one": 1_000})
        ids = await shop.produce(shop.order(("one", 1)) for _ in range(200))
        outcome = await shop.finished(ids)
        assert outcome["CANCELLED expired"] > 0
        assert outcome["CONFIRMED"] > 0
        # Asked again and again until its outcome is known; a success is then given back.
        await shop.eventually("SELECT count(*) FROM waiting", 0)
        assert len(bank.standing) == outcome["CONFIRMED"]
        assert len(bank.voided) == outcome["CANCELLED expired"]
        assert bank.voided & bank.charges.keys(), "no charge came too late: the test shows nothing"
        await shop.eventually("SELECT count(*) FROM payments WHERE status = 'VOIDED'", outcome["CANCELLED expired"])
        assert await shop.outcomes(ids) == outcome
        assert await shop.violations() == []
