"""A synchronous standby falls silent, the primary is lost, the standby is promoted: it has all that was told, and those who
know of both hosts go on with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncpg
import pytest

from orderstream.engines.local import LocalEngines
from orderstream.engines.probes import database_of
from orderstream.lua.gate import NotEntered
from orderstream.sql.store import TRANSIENT, Store, statements
from orderstream.streams.orders import Status
from tests.chaos.scenario import Scenario
from tests.chaos.standby import Standby, standby_of, synchronous
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]

FROZEN_S = 6.0
"""Several times the time that a statement may take."""


@pytest.fixture
async def standby(own_engines: LocalEngines, own_pipeline: Make, run_id: str) -> AsyncIterator[Standby]:
    """A standby of the engines' Postgres, which each commit waits for, until the database of the test is dropped."""
    url = own_engines.addresses()["database_url"]
    data = Path(f"/var/tmp/orderstream-standby-{run_id}")
    async with standby_of(url, data) as made, synchronous(own_engines, url):
        yield made
        made.thaw()


async def test_nothing_is_told_that_the_standby_does_not_have(
    standby: Standby, own_pipeline: Make, own_engines: LocalEngines, run_id: str
) -> None:
    url = database_of(own_engines.addresses()["database_url"], run_id)
    shop = own_pipeline(postgres_timeout_s=1.0, database_url=standby.beside(url))
    scenario = Scenario(6_000)
    await shop.start(scenario.products, workers=2)
    flowing = asyncio.create_task(scenario.flow(shop, over_s=10))
    await asyncio.sleep(3)
    standby.freeze()
    await asyncio.sleep(FROZEN_S)
    store = await shop.store()
    waiting = await store.pool.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
    assert waiting > 0, "no commit waits for the standby: the test shows nothing"
    for worker in shop.workers:
        assert worker.process.poll() is None
        worker.kill()
    await asyncio.to_thread(own_engines.kill, "postgres")
    standby.thaw()
    store = await Store.connect(standby.url(url))
    with pytest.raises(TRANSIENT):  # which all stages wait for
        await store.pool.fetch(statements("stages.sql")["pipeline_state"])
    with pytest.raises(NotEntered):
        await store.enter_gate("another Redis", notes=False)
    await store.close()
    await standby.promote(url)

    connection = await asyncpg.connect(standby.url(url))
    rows = await connection.fetch(
        "SELECT order_id::text, created_at, reserved_at, paid_at, confirmed_at, cancelled_at FROM orders"
    )
    await connection.close()
    there = {
        row["order_id"]: {Status(name[:-3].upper()) for name in row.keys() - {"order_id"} if row[name]}
        for row in map(dict, rows)
    }
    told = await shop.events()
    untrue = {order_id: story for order_id, story in told.items() if not there.get(order_id, set()).issuperset(story)}
    print(f"{len(told)} orders told of, {len(there)} on the standby")
    assert len(told) > 500
    assert untrue == {}
    await flowing

    # On the standby all goes on, by the same address.
    await shop.reconnect()
    shop.workers.clear()
    worker = shop.add_worker()
    await scenario.check(shop)
    assert await asyncio.to_thread(worker.stop) == 0
    await shop.close()
