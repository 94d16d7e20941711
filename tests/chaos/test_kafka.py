"""The broker becomes unavailable, cleanly and not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from orderstream.engines.local import LocalEngines
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
