"""Redis loses what it knew, in every way in which it can, and becomes unavailable."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import redis.asyncio as redis

from orderstream.engines.local import LocalEngines
from tests.chaos.scenario import Scenario
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]


def append_only_file(engines: LocalEngines) -> Path:
    """Return the file to which Redis appends its writes."""
    (file,) = (engines.local_dir / "redis" / "data" / "appendonlydir").glob("*.incr.aof")
    return file


async def confirmed(shop: Pipeline) -> int:
    """Return how many orders are confirmed."""
    found: int = await (await shop.store()).pool.fetchval("SELECT count(*) FROM orders WHERE status = 'CONFIRMED'")
    return found


async def test_redis_restarts_loses_its_last_second_is_flushed_and_comes_up_with_old_data(
    own_pipeline: Make, own_engines: LocalEngines
) -> None:
    shop = own_pipeline()
    scenario = Scenario(8_000)
    await shop.start(scenario.products)
    data = own_engines.local_dir / "redis" / "data"
    flowing = asyncio.create_task(scenario.flow(shop, over_s=20))
    await asyncio.sleep(2)
    snapshot = shutil.copytree(data, shop.folder / "snapshot")

    await asyncio.sleep(2)
    await asyncio.to_thread(own_engines.restart, "redis")

    await asyncio.sleep(2)
    size = append_only_file(own_engines).stat().st_size
    await asyncio.sleep(1)
    await asyncio.to_thread(own_engines.kill, "redis")
    file = append_only_file(own_engines)
    assert file.stat().st_size > size, "nothing was written in the last second: the test shows nothing"
    with file.open("r+b") as opened:
        opened.truncate(size)
    await asyncio.to_thread(own_engines.start, "redis")

    await asyncio.sleep(2)
    async with redis.Redis.from_url(shop.settings.redis_url) as client:
        for _ in range(3):
            assert await client.dbsize() > 0
            await client.flushall()
            await asyncio.sleep(0.5)

    await asyncio.sleep(2)
    await asyncio.to_thread(own_engines.kill, "redis")
    shutil.rmtree(data)
    shutil.copytree(snapshot, data)
    await asyncio.to_thread(own_engines.start, "redis")

    await flowing
    await scenario.check(shop)
    (worker,) = shop.workers
    assert worker.process.poll() is None
    assert worker.metric("redis_rebuild_seconds_count") >= 5, "it was rebuilt less often than it was lost"
    took = worker.metric("redis_rebuild_seconds_sum") / worker.metric("redis_rebuild_seconds_count")
    print(f"{worker.metric('redis_products_loaded_total'):.0f} products loaded, {1000 * took:.1f} ms a time")


async def test_without_redis_the_owners_sell_on_from_postgres_and_go_back_to_it(
    own_pipeline: Make, own_engines: LocalEngines
) -> None:
    shop = own_pipeline()
    scenario = Scenario(6_000)
    await shop.start(scenario.products, workers=2)
    flowing = asyncio.create_task(scenario.flow(shop, over_s=15))
    await asyncio.sleep(2)
    await asyncio.to_thread(own_engines.kill, "redis")
    before = await confirmed(shop)
    await asyncio.sleep(10)
    assert await confirmed(shop) > before + 1_000, "the owners did not sell on"
    await asyncio.to_thread(own_engines.start, "redis")
    await flowing
    await scenario.check(shop)
    async with redis.Redis.from_url(shop.settings.redis_url) as client:
        assert await client.dbsize() > 0, "no owner went back to Redis"
    assert [worker.process.poll() for worker in shop.workers] == [None, None]
    assert all(worker.metric("redis_fallbacks_total") > 0 for worker in shop.workers)
