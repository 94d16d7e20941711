"""How many units of a product one user may have, over all orders: under concurrency, without Redis, given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from orderstream.lua.gate import Keys
from orderstream.sql.differences import Kind
from orderstream.streams.producer import Outbox
from tests.e2e.test_reconcile import found, reconcile
from tests.harness import Pipeline

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]


async def cancel(shop: Pipeline, *ids: str) -> None:
    outbox = Outbox(shop.settings)
    for order_id in ids:
        outbox.order_command(order_id, orjson.dumps({"command": "cancel", "order_id": order_id}))
    await (await shop.producer()).send(outbox.handovers())


async def units(shop: Pipeline, user: str, product_id: str = "hot") -> int | None:
    found: int | None = await (await shop.store()).pool.fetchval(
        "SELECT units FROM user_units WHERE product_id = $1 AND user_id = $2", product_id, user
    )
    return found


async def test_a_hundred_orders_at_once_get_a_user_no_more_than_the_limit_and_a_return_gives_it_back(
    pipeline: Make,
) -> None:
    shop = pipeline()
    await shop.start({"hot": 1_000, "free": 1_000})
    before = await shop.finished(await shop.produce(shop.order(("hot", 1), user_id="early") for _ in range(5)))
    assert before == {"CONFIRMED": 5}
    await shop.limit("hot", 3)

    one = [shop.order(("hot", 1), user_id="one") for _ in range(100)]
    two = [shop.order(("free", 1), ("hot", 2), user_id="two") for _ in range(20)]  # of several owners, too
    three = [shop.order(("hot", 4), user_id="three"), shop.order(("hot", 3), user_id="three")]
    early = [shop.order(("hot", 1), user_id="early"), shop.order(("free", 50), user_id="early")]
    ids = await shop.produce([*one, *two, *three, *early])
    assert await shop.finished(ids[:100]) == {"CONFIRMED": 3, "CANCELLED user_limit": 97}
    assert await shop.finished(ids[100:120]) == {"CONFIRMED": 1, "CANCELLED user_limit": 19}
    ended = await shop.ended_all(ids[120:])
    assert [ended[i] for i in ids[120:]] == ["CANCELLED user_limit", "CONFIRMED", "CANCELLED user_limit", "CONFIRMED"]
    assert [await units(shop, user) for user in ("one", "two", "three", "early")] == [3, 2, 3, 5]
    assert await shop.has_counts("hot", 1_000 - 5 - 8, 0, 13)
    assert await shop.has_counts("free", 1_000 - 51, 0, 51)

    sold = [order_id for order_id, end in (await shop.ended(ids[:100])).items() if end == "CONFIRMED"]
    await cancel(shop, *sold[:2])
    await shop.eventually("SELECT units FROM user_units WHERE user_id = 'one'", 1)
    assert await shop.has_counts("hot", 1_000 - 5 - 6, 0, 11)
    again = await shop.produce(shop.order(("hot", 1), user_id="one") for _ in range(10))
    assert await shop.finished(again) == {"CONFIRMED": 2, "CANCELLED user_limit": 8}

    assert await shop.violations(grace_s=0.0) == []  # Redis hears of it a moment after Postgres
    redis: Any = Redis.from_url(shop.settings.redis_url)
    limits = await redis.hgetall(Keys(shop.settings.redis_prefix).users("hot"))
    assert {user: value.split(b":")[0] for user, value in limits.items()} == {
        b"one": b"3",
        b"two": b"2",
        b"three": b"3",
        b"early": b"5",
    }
    assert await redis.hgetall(Keys(shop.settings.redis_prefix).claims("hot")) == {}
    await redis.flushall()  # what Redis knew is counted again from Postgres
    await redis.aclose()
    lost = await shop.produce([shop.order(("hot", 1), user_id=user) for user in ("one", "two", "two")])
    ended = await shop.ended_all(lost)
    assert [ended[i] for i in lost] == ["CANCELLED user_limit", "CONFIRMED", "CANCELLED user_limit"]

    await shop.limit("hot", None)
    ends: list[str] = []
    for _ in range(50):  # until Redis has heard of it
        ends += await shop.finished(await shop.produce([shop.order(("hot", 9), user_id="one")]))
        if ends[-1] == "CONFIRMED":
            break
    assert ends[-1] == "CONFIRMED", ends
    assert await units(shop, "one") is None
    assert await shop.violations(grace_s=0.0) == []
    assert found(await reconcile(shop)) == set()


async def test_postgres_enforces_a_limit_alone_and_reconcile_repairs_its_counts(
    pipeline: Make, redis_unavailable: str
) -> None:
    shop = pipeline(payment_success_rate=0.5)
    await shop.start({"hot": 1_000}, workers=0)
    shop.add_worker(redis_url=redis_unavailable)
    await shop.settled(1)
    limited = await shop.orderstream("stock", "limit", "hot", "2")
    assert limited.returncode == 0, limited.stderr
    assert "at most 2 units a user" in limited.stdout
    ids = await shop.produce(shop.order(("hot", 1), user_id=f"u{n % 20}") for n in range(200))
    outcome = await shop.finished(ids)
    assert outcome["CONFIRMED"] <= 40
    assert outcome["CANCELLED payment_declined"] > 0
    assert await shop.has_counts("hot", 1_000 - outcome["CONFIRMED"], 0, outcome["CONFIRMED"])
    assert await shop.violations(grace_s=0.0) == []
    pool = (await shop.store()).pool
    await shop.published(ids)
    await pool.execute("UPDATE user_units SET units = units + 1 WHERE user_id = 'u3'")
    report = await reconcile(shop, yes=True, from_beginning=True)
    assert found(report) == {(Kind.STOCK_USERS, "hot")}
    assert [repair.outcome for repair in report.repairs] == ["done"]
    assert await shop.violations(grace_s=0.0) == []
    assert found(await reconcile(shop, from_beginning=True)) == set()
