"""That Redis has what Postgres has: what counts as a violation, and what does not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from orderstream.jobs.init import Product, init
from orderstream.jobs.verify import REDIS_PROMISE, verify
from orderstream.lua.gate import Gate, GateVerdict
from orderstream.settings import Settings
from orderstream.sql.store import Store
from tests.conftest import MakeSettings

pytestmark = pytest.mark.engines


class Shop:
    """Two products of ten units, both loaded into Redis."""

    def __init__(self, settings: Settings, store: Store, gate: Gate) -> None:
        self.settings, self.store, self.gate = settings, store, gate

    async def violations(self) -> list[str]:
        report = await verify(self.settings, grace_s=0, settle_s=0)
        assert {check.promise for check in report.checks if check.offenders} <= {REDIS_PROMISE}
        return [product_id for check in report.checks for product_id, _ in check.offenders]

    async def change(self, product_id: str, **counts: int) -> None:
        fields: dict[Any, Any] = dict(counts)
        await self.gate.client.hset(self.gate.keys.stock(product_id), mapping=fields)


@pytest.fixture
async def shop(make_settings: MakeSettings) -> AsyncIterator[Shop]:
    settings = make_settings(partitions=1)
    await init(settings, [Product("1", "one", 100, 10), Product("2", "two", 100, 10)])
    store = await Store.connect(settings.database_url, connections_max=2)
    gate = Gate(settings.redis_url, settings.redis_prefix, store.load_gate)
    order = "0f8fad5b-d9cb-469f-a165-70867728950e"
    taken, unavailable = await gate.take([("1", order, 1), ("2", order, 1)])
    assert (taken, unavailable) == ([GateVerdict.TAKEN, GateVerdict.TAKEN], False)
    yield Shop(settings, store, gate)
    await gate.close()
    await store.close()


async def test_takes_without_a_decision_are_a_violation(shop: Shop) -> None:
    assert await shop.violations() == ["1", "2"]
    shop.gate.invalidated(await shop.store.invalidate_gate(["1"]))
    assert await shop.violations() == ["2"]  # no stage decides by what is invalid


@pytest.mark.parametrize("counts", [{"on_hand": 9}, {"on_hand": 11}, {"reserved": 1}, {"taken": 1}])
async def test_other_counts_than_those_of_postgres_are_a_violation(shop: Shop, counts: dict[str, int]) -> None:
    shop.gate.invalidated(await shop.store.invalidate_gate(["1", "2"]))
    await shop.gate.take([("1", "8a6e0804-2bd0-4672-b79d-d97027f9071a", 100)])  # loads it, takes nothing
    assert await shop.violations() == []
    await shop.change("1", **counts)
    assert await shop.violations() == ["1"]


async def test_a_product_that_redis_does_not_hold_is_none(shop: Shop) -> None:
    await shop.gate.client.flushall()
    assert await shop.violations() == []
