"""The broker becomes unavailable, cleanly and not, or stands still and closes no connection."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import pytest

from orderstream.engines.local import LocalEngines
from orderstream.engines.process import Process
from tests.chaos.scenario import Scenario
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]


async def test_the_broker_is_unavailable_for_ten_seconds_and_is_killed(
    own_pipeline: Make, own_engines: LocalEngines
) -> None:
    shop = own_pipeline()
    scenario = Scenario(8_000)
    await shop.start(scenario.products, workers=0)
    async with shop.keep(2) as keeper:
        await shop.settled(2)
        flowing = asyncio.create_task(scenario.flow(shop, over_s=20))
        await asyncio.sleep(2)
        await asyncio.to_thread(own_engines.stop, "kafka")
        await asyncio.sleep(10)
        await asyncio.to_thread(own_engines.start, "kafka")
        await asyncio.sleep(6)
        await asyncio.to_thread(own_engines.kill, "kafka")
        await asyncio.to_thread(own_engines.start, "kafka")
        await flowing
        await scenario.check(shop)
    print(f"workers that ended: {keeper.ended}")


AFTER_S = 15.0
"""How long the pipeline may stand still after a frozen broker goes on."""


def stop(engines: LocalEngines, number: signal.Signals) -> None:
    process = Process.of(engines.pid("kafka") or 0)
    assert process is not None
    for member in (process, *process.children()):
        member.send(number)


@pytest.mark.parametrize("frozen_s", [3, 25], ids=["within the sessions", "beyond them"])
async def test_a_frozen_broker_holds_the_pipeline_up_for_no_longer_than_it_is_frozen(
    own_pipeline: Make, own_engines: LocalEngines, frozen_s: float
) -> None:
    shop = own_pipeline()
    scenario = Scenario(6_000)
    await shop.start(scenario.products, workers=2)
    flowing = asyncio.create_task(scenario.flow(shop, over_s=6, orders=scenario.orders[:3_000]))
    await asyncio.sleep(3)
    stop(own_engines, signal.SIGSTOP)
    try:
        await asyncio.sleep(frozen_s)
    finally:
        stop(own_engines, signal.SIGCONT)
    began = time.monotonic()
    later = asyncio.create_task(scenario.flow(shop, over_s=1, orders=scenario.orders[3_000:3_100]))
    await shop.finished(scenario.ids(scenario.orders[3_000:3_100]), timeout_s=AFTER_S)
    print(f"goes on {time.monotonic() - began:.1f} s after the broker")
    await asyncio.gather(flowing, later)
    await scenario.flow(shop, over_s=3, orders=scenario.orders[3_100:])
    await scenario.check(shop)
    assert [worker.process.poll() for worker in shop.workers] == [None, None]
