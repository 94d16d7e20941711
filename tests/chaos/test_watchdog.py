"""A worker that makes no progress ends itself, logs why, and another one continues."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from orderstream.exits import EXIT_FAULT
from tests.chaos.bank import Bank
from tests.chaos.scenario import audited
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]

STUCK = str(Path(__file__).with_name("stuck_worker.py"))


@pytest.mark.parametrize(
    ("fault", "says"), [("waits", "no progress for"), ("blocks", "the event loop has not come round for")]
)
async def test_a_worker_that_makes_no_progress_ends_itself_and_logs_why(
    pipeline: Make, bank: Bank, fault: str, says: str
) -> None:
    bank.lenient = True
    shop = pipeline(stall_timeout_s=4.0, session_timeout_s=3.0, partitions=4)
    await shop.start({"one": 1_000}, workers=0)
    stuck = shop.add_worker(program=(STUCK, fault))
    await shop.settled(1)
    ids = await shop.produce(shop.order(("one", 1)) for _ in range(500))
    assert await asyncio.to_thread(stuck.process.wait, 60) == EXIT_FAULT, stuck.tail()
    assert says in stuck.log.read_text()
    if fault == "waits":
        assert f"{shop.settings.topic('orders')}/" in stuck.log.read_text()
    shop.add_worker()
    assert await shop.finished(ids) == {"CONFIRMED": 500}
    await audited(shop)


async def test_a_worker_whose_provider_is_silent_is_left_alone(pipeline: Make, bank: Bank) -> None:
    """As many charges are in flight as may be, for longer than a worker may stand still: the orders wait in Postgres."""
    bank.lenient, bank.quickest_s, bank.latency_s = True, 6.0, 6.0
    shop = pipeline(stall_timeout_s=4.0, payment_in_flight_max=10, partitions=4)
    await shop.start({"one": 1_000})
    ids = await shop.produce(shop.order(("one", 1)) for _ in range(15))
    assert await shop.finished(ids) == {"CONFIRMED": 15}
    await audited(shop)
    assert shop.workers[0].process.poll() is None
