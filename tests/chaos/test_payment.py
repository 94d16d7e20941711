"""A payment provider that is slow, fails, is silent, comes late and answers twice: no customer pays twice or for nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.chaos.bank import Bank
from tests.chaos.scenario import Scenario
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]


async def test_a_provider_that_fails_half_of_the_time_and_answers_twice(pipeline: Make, bank: Bank) -> None:
    bank.failing, bank.doubled = 0.5, 0.3
    shop = pipeline(payment_in_flight_max=200, partitions=4, retry_wait_max_s=0.5)
    scenario = Scenario(5_000)
    await shop.start(scenario.products, workers=2)
    await scenario.flow(shop, over_s=8)
    outcome = await scenario.check(shop)
    assert min(bank.faults["failed"], bank.faults["doubled"]) > 1_000, bank.faults
    assert max(bank.asked.values()) > 1, "no answer was lost after its request took effect: the test shows nothing"
    assert not bank.refunds
    assert not bank.voided
    declined = {key for key, charge in bank.charges.items() if charge["status"] == "declined"}
    assert len(declined) == outcome["CANCELLED payment_declined"]


async def test_a_provider_that_is_slow_and_silent_until_holds_have_expired(pipeline: Make, bank: Bank) -> None:
    bank.silent, bank.latency_s = 0.2, 2.0
    shop = pipeline(
        payment_timeout_s=2.5,
        payment_in_flight_max=4_000,
        retry_wait_max_s=1.0,
        hold_ttl_s=1.5,
        expiry_interval_s=0.2,
        partitions=4,
    )
    scenario = Scenario(5_000, may_end=frozenset({"CANCELLED expired"}))
    await shop.start(scenario.products, workers=2)
    await scenario.flow(shop, over_s=8)
    outcome = await scenario.check(shop)
    assert min(outcome["CANCELLED expired"], outcome["CONFIRMED"]) > 300, outcome
    assert bank.faults["silent"] > 300, bank.faults
    assert len(bank.voided & set(bank.charges)) > 300, "hardly a charge came too late: the test shows nothing"
