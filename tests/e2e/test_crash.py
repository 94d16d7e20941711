"""Workers that die, engines that become unavailable: every order ends in exactly one state, and the promises hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.harness import Pipeline

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]


async def test_charges_under_way_in_a_killed_worker_are_asked_again_by_the_next_owner(pipeline: Make) -> None:
    shop = pipeline(payment_latency_min_s=3.0, payment_latency_max_s=3.0)
    await shop.start({"one": 200})
    ids = await shop.produce(shop.order(("one", 1)) for _ in range(200))
    await shop.eventually("SELECT count(*) FROM orders WHERE status = 'RESERVED'", 200)
    await asyncio.sleep(1.5)  # its offsets are committed by now: only the table knows of the charges
    shop.workers[0].kill()
    shop.add_worker()
    assert await shop.finished(ids) == {"CONFIRMED": 200}
    assert await shop.charges() == (200, 200)
    assert await shop.violations() == []


async def test_without_redis_postgres_sells_on_and_never_twice(pipeline: Make, redis_unavailable: str) -> None:
    shop = pipeline(redis_url=redis_unavailable)
    await shop.start({"few": 300})
    ids = await shop.produce(shop.order(("few", 1)) for _ in range(1_000))
    assert await shop.finished(ids) == {"CONFIRMED": 300, "CANCELLED insufficient_stock": 700}
    assert await shop.has_counts("few", 0, 0, 300)


async def test_rebalances_one_after_the_other_end_no_worker(pipeline: Make) -> None:
    shop = pipeline(partitions=8, session_timeout_s=4.0, commit_interval_s=0.05)
    await shop.start({f"p{n}": 10_000 for n in range(16)})
    (lasting,) = shop.workers
    ids: list[str] = []

    async def flow() -> None:
        while True:
            ids.extend(await shop.produce(shop.order((f"p{n}", 1)) for n in range(16)))
            await asyncio.sleep(0.05)

    flowing = asyncio.create_task(flow())
    for n in range(6):  # they leave in the middle of the rebalance that their coming began, or just after it
        passing = shop.add_worker()
        async with asyncio.timeout(60):
            while "(Re-)joining group" not in passing.log.read_text() and not passing.summary():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await asyncio.sleep(n * 0.4)
        assert await asyncio.to_thread(passing.stop) == 0
    flowing.cancel()
    assert sum((await shop.finished(ids)).values()) == len(ids)
    assert lasting.process.poll() is None
    assert "crashed" not in lasting.log.read_text()
    assert await shop.violations() == []
