"""Orders that ended long ago are removed: which go, which stay, and that no count, check or replay sees a difference."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from orderstream.jobs.reconcile.checkpoint import default_file
from orderstream.jobs.reconcile.reconcile import Reconcile, Report
from orderstream.jobs.reconcile.repair import repair_all
from orderstream.sql.store import query
from orderstream.streams.orders import order_id_for_key
from orderstream.streams.partitions import product_partition
from orderstream.streams.producer import Outbox
from orderstream.streams.topics import DEAD_LETTERS, ORDERS, TOPICS
from tests.chaos.progress import drained, forget, set_back
from tests.harness import Pipeline, ingress

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]
PRODUCTS = [f"p{n}" for n in range(8)]
TIMES = {
    "orders": (
        "created_at",
        "reserved_at",
        "paid_at",
        "confirmed_at",
        "cancelled_at",
        "refunded_at",
        "met_again_at",
    ),
    "holds": ("held_at", "ended_at", "returned_at"),
}


async def told(shop: Pipeline, *arguments: str) -> str:
    answer = await shop.orderstream("prune", "--keep-days", "1", *arguments)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


async def prune(shop: Pipeline, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await told(shop, "--json", *arguments))
    return found


async def older(shop: Pipeline, days: float, where: str = "true") -> None:
    """Make orders so much older, and all that happened to them."""
    pool = (await shop.store()).pool
    ids = [row["order_id"] for row in await pool.fetch(f"SELECT order_id FROM orders WHERE {where}")]
    for name, columns in TIMES.items():
        moved = ", ".join(f"{column} = {column} - make_interval(days => $1)" for column in columns)
        await pool.execute(f"UPDATE {name} SET {moved} WHERE order_id = ANY ($2)", days, ids)
    await pool.execute("UPDATE ledger SET at = at - make_interval(days => $1) WHERE order_ids && $2", days, ids)


async def reconcile(shop: Pipeline, *, yes: bool = False, **how: Any) -> Report:
    async with Reconcile(shop.settings, file=default_file(shop.settings), grace_s=5.0, **how) as job:
        report = await job.run()
        if yes:
            report.repairs = await repair_all(job, report.differences)
        return report


async def agrees(shop: Pipeline, **how: Any) -> None:
    report = await reconcile(shop, **how)
    assert report.differences == []


async def counts(shop: Pipeline) -> list[Mapping[str, Any]]:
    rows = await (await shop.store()).pool.fetch(
        "SELECT product_id, on_hand, reserved, initial, received, adjusted, sold, version FROM stock ORDER BY product_id"
    )
    return [dict(row) for row in rows]


async def left(shop: Pipeline) -> dict[str, int]:
    pool = (await shop.store()).pool
    tables = ("orders", "holds")
    return {name: await pool.fetchval(f"SELECT count(*) FROM {name}") for name in tables}


async def cancel(shop: Pipeline, ids: list[str]) -> None:
    outbox = Outbox(shop.settings)
    for order_id in ids:
        outbox.order_command(order_id, orjson.dumps({"command": "cancel", "order_id": order_id}))
    await (await shop.producer()).send(outbox.handovers())


async def leave(shop: Pipeline) -> None:
    """Have the last worker leave, once all is done and committed."""
    await drained(shop)
    assert await asyncio.to_thread(shop.workers[-1].stop) == 0


async def a_month(shop: Pipeline) -> list[str]:
    """Sell, decline, refuse; cancel before and after the payment, orders of one product and of several."""
    orders = [shop.order((PRODUCTS[n % 8], 1 + n % 3), user_id=f"u{n % 9}") for n in range(200)]
    orders += [shop.order((PRODUCTS[n % 8], 1), (PRODUCTS[(n + 3) % 8], 2), user_id=f"u{n % 9}") for n in range(100)]
    ids = await shop.produce(orders)
    revoked = {*ids[:10], *ids[200:210]}
    await cancel(shop, sorted(revoked))
    await shop.finished(ids)
    sold = [order_id for order_id, how in (await shop.ended(ids)).items() if how == "CONFIRMED"]
    revoked |= {*sold[:12], *sold[-12:]}
    await cancel(shop, sorted(revoked))
    cancelled = "SELECT count(*) FROM orders WHERE order_id = ANY ($1) AND status = 'CANCELLED'"
    await shop.eventually(cancelled, len(revoked), revoked)
    await shop.eventually("SELECT count(*) FROM orders WHERE payment IN ('VOID_DUE', 'REFUND_DUE')", 0)
    await shop.eventually("SELECT count(*) FROM orders WHERE states && '{a,h,g,l,b}'::\"char\"[]", 0)
    await shop.eventually("SELECT count(*) FROM waiting", 0)
    await shop.published(ids)
    return ids


async def test_what_has_ended_is_removed_once_kafka_has_removed_it_and_no_client_sees_a_difference(
    pipeline: Make,
) -> None:
    shop = pipeline(payment_success_rate=0.8, payment_latency_max_s=0.2, partitions=4, retention_hours=24)
    await shop.start(dict.fromkeys(PRODUCTS, 60))
    ids = await a_month(shop)
    assert len(await shop.outcomes(ids)) == 4, "sold, declined, refused, cancelled"
    await leave(shop)
    shop.add_worker(payment_latency_min_s=3_000.0, payment_latency_max_s=3_000.0)
    await shop.settled(1)
    store = await shop.store()
    await store.load_catalogue([("rest", "rest", 100, 50)], shop.settings.partitions)
    waiting = await shop.produce([shop.order(("rest", 1)) for _ in range(5)])
    await shop.eventually("SELECT count(*) FROM orders WHERE status = 'RESERVED'", 5)
    await leave(shop)
    await agrees(shop)

    assert (await prune(shop))["looked_at"] == 0, "too young"
    await older(shop, 30)
    held = await prune(shop, "--yes")
    assert (held["removed"], held["kept"]) == (0, {"kafka": 300, "open": 5})
    assert held["kafka"]["in"].split("/")[0] in {shop.settings.topic(spec.name) for spec in TOPICS}
    text = await told(shop)
    assert "300  stay: they are on Kafka's topics still" in text
    assert f"in {held['kafka']['in']}" in text

    await forget(shop)
    pool = store.pool
    due = await pool.fetchval(
        "UPDATE orders SET payment = 'REFUND_DUE', refunded_at = NULL WHERE order_id ="
        " (SELECT order_id FROM orders WHERE payment = 'REFUNDED' LIMIT 1) RETURNING order_id"
    )
    await pool.execute("INSERT INTO waiting SELECT home, order_id, created_at FROM orders WHERE order_id = $1", due)
    odd = await pool.fetchval(
        "UPDATE orders SET total_cents = total_cents + 1 WHERE order_id ="
        " (SELECT order_id FROM orders WHERE payment = 'SUCCESS' LIMIT 1) RETURNING order_id"
    )
    await pool.execute("INSERT INTO kept_commands VALUES (0, gen_random_uuid(), 1, now() - interval '9 days')")
    await pool.execute("INSERT INTO letter_actions VALUES (0, -1, now() - interval '9 days', 'drop', 'no', NULL,"
                       " now() - interval '8 days', now() - interval '8 days')")  # fmt: skip
    before, sold = await counts(shop), sum(row["sold"] for row in await counts(shop))
    would = await prune(shop)
    assert would["would_remove"] == 298
    assert would["kept"] == {"open": 5, "refund": 1, "unsound": 1}
    assert (would["kafka"], would["letters"], would["cancels"]) == (None, 1, 1)
    there = await left(shop)
    assert there["orders"] == 305, "only counted"
    assert there["holds"] > 0

    went = await prune(shop, "--yes")
    assert (went["removed"], went["letters"], went["cancels"]) == (298, 1, 1)
    again = await prune(shop, "--yes")
    assert (again["removed"], again["letters"], again["cancels"]) == (0, 0, 0)
    rows = await pool.fetch("SELECT order_id::text FROM orders")
    assert {row["order_id"] for row in rows} == {*waiting, str(due), str(odd)}
    assert await counts(shop) == before
    named = "SELECT unnest(order_ids)::text AS id FROM ledger UNION SELECT order_id::text FROM holds"
    assert {row["id"] for row in await pool.fetch(named)} <= {*waiting, str(due), str(odd)}
    await pool.execute("UPDATE orders SET total_cents = total_cents - 1 WHERE order_id = $1", odd)
    await older(shop, -30, "status = 'RESERVED'")
    assert await shop.violations() == []
    await agrees(shop)  # continues from the checkpoint made before the removal
    await agrees(shop, from_beginning=True)

    # These would not hold, were it not carried forward, or were it wrong by one.
    await pool.execute("UPDATE ledger SET quantity = quantity + 1 WHERE movement = 'carried' AND product_id = 'p1'")
    assert len(await shop.violations()) == 2
    report = await reconcile(shop, from_beginning=True)
    assert {d.subject for d in report.differences} == {"p1"}
    await pool.execute("UPDATE ledger SET quantity = quantity - 1 WHERE movement = 'carried' AND product_id = 'p1'")
    await pool.execute("UPDATE stock SET on_hand = on_hand + 5, adjusted = adjusted + 5 WHERE product_id = 'p2'")
    repaired = await reconcile(shop, from_beginning=True, yes=True)
    assert {(str(r.kind), r.subject, r.outcome) for r in repaired.repairs} == {("stock.counts", "p2", "done")}

    shop.add_worker()
    await shop.settled(1)
    more = await shop.produce([shop.order((p, 1)) for p in [*PRODUCTS, "rest"] for _ in range(3)])
    ended = await shop.finished([*more, *waiting])
    assert ended["CONFIRMED"] > 0
    await shop.eventually("SELECT status::text FROM payments WHERE order_id = $1", "REFUNDED", due)
    await shop.published(more)
    await drained(shop)
    assert sum(row["sold"] for row in await counts(shop)) >= sold
    assert await shop.violations() == []
    await agrees(shop)
    await agrees(shop, from_beginning=True)


async def test_an_order_that_was_sent_again_stays_while_kafka_has_the_second_record(pipeline: Make) -> None:
    shop = pipeline(partitions=2, retention_hours=24, session_timeout_s=3.0)
    await shop.start({"p1": 10, "p2": 10})
    once, again, other = (shop.order(("p1", 1)), shop.order(("p1", 1)), shop.order(("p2", 1)))
    ids = await shop.produce([once, again, other])
    await shop.finished(ids)
    await drained(shop)
    await forget(shop)

    # Twenty days ago, by its producer's clock, and it is as if it were now thirty days after the order ended.
    admin = AIOKafkaAdminClient(bootstrap_servers=shop.settings.kafka)
    await admin.start()
    theirs = {"message.timestamp.type": "CreateTime", "retention.ms": "-1"}
    await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, shop.settings.topic(ORDERS.name), theirs)])
    await admin.close()
    producer = AIOKafkaProducer(bootstrap_servers=shop.settings.kafka)
    await producer.start()
    for record in (again, {**other, "user_id": "another order under the same id"}):
        product_id = record["items"][0]["product_id"]
        await producer.send_and_wait(
            shop.settings.topic(ORDERS.name),
            orjson.dumps(record),
            key=product_id.encode(),
            partition=product_partition(product_id, shop.settings.partitions),
            timestamp_ms=int((time.time() - 20 * 86_400) * 1000),
        )
    await producer.stop()
    await shop.eventually("SELECT count(*) FROM orders WHERE met_again_at IS NOT NULL", 2)
    await leave(shop)
    await (await shop.store()).pool.execute("UPDATE orders SET met_again_at = met_again_at + interval '10 days'")
    await older(shop, 30)
    before = await counts(shop)

    found = await prune(shop, "--yes")
    assert (found["removed"], found["kept"]) == (1, {"kafka": 2})
    assert found["kafka"]["in"].startswith(shop.settings.topic(ORDERS.name))
    await set_back(shop)
    shop.add_worker()
    await shop.settled(1)
    await drained(shop)
    assert await counts(shop) == before, "neither was sold again"
    assert await shop.ended(ids) == {order["order_id"]: "CONFIRMED" for order in (again, other)}
    assert await shop.violations() == []

    await leave(shop)
    await forget(shop)
    await older(shop, 30)
    assert (await prune(shop, "--yes"))["removed"] == 2
    assert await counts(shop) == before
    assert await shop.violations() == []
    await agrees(shop, from_beginning=True)


async def test_a_removal_that_is_killed_and_two_at_once(pipeline: Make) -> None:
    shop = pipeline(partitions=2, retention_hours=24)
    await shop.start({"p1": 5_000, "p2": 5_000})
    ids = await shop.produce([shop.order(("p1", 1)) for _ in range(1_500)])
    await shop.finished(ids)
    ids += (more := await shop.produce([shop.order(("p2", 1)) for _ in range(2_500)]))
    await shop.finished(more)
    await leave(shop)
    await agrees(shop)
    await forget(shop)
    await older(shop, 30)
    before, pool = await counts(shop), (await shop.store()).pool

    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT FROM stock WHERE product_id = 'p2' FOR UPDATE")
        killed = shop.begin("prune", "--keep-days", "1", "--yes")
        await shop.eventually("SELECT count(*) FROM orders", 3_000)
        waits = (
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%remove_orders%'"
        )
        await shop.eventually(waits, True)
        killed.kill()
        killed.wait()
        assert await shop.violations() == []
    assert await shop.violations() == []
    await shop.eventually("SELECT count(*) FROM pg_locks WHERE relation = 'orders'::regclass", 0)
    remaining = (await left(shop))["orders"]
    assert remaining in (2_000, 3_000), "the batch that was waiting is removed whole, or not at all"

    both = await asyncio.gather(*(prune(shop, "--yes") for _ in range(2)))
    assert sum(found["removed"] for found in both) == remaining
    assert await left(shop) == {"orders": 0, "holds": 0}
    assert await counts(shop) == before
    carried = await pool.fetch("SELECT product_id, quantity FROM ledger WHERE movement = 'carried' ORDER BY 1")
    assert [tuple(row) for row in carried] == [("p1", 1_500), ("p2", 2_500)]
    assert await shop.violations() == []
    await agrees(shop)
    await agrees(shop, from_beginning=True)


async def test_two_at_once_while_orders_flow(pipeline: Make) -> None:
    shop = pipeline(partitions=2, retention_hours=24)
    await shop.start(dict.fromkeys(PRODUCTS, 100_000))
    ids = await shop.produce([shop.order((PRODUCTS[n % 8], 1)) for n in range(6_000)])
    await shop.finished(ids)
    await drained(shop)
    await forget(shop)
    await older(shop, 30)
    removals = [asyncio.create_task(prune(shop, "--yes")) for _ in range(2)]
    new: list[str] = []
    while not all(removal.done() for removal in removals):
        new += await shop.produce([shop.order((p, 1), (PRODUCTS[0], 1)) for p in PRODUCTS[1:]])
        await asyncio.sleep(0.05)
    both = [await removal for removal in removals]
    assert sum(found["removed"] for found in both) == 6_000
    assert all({*found["kept"]} <= {"in use"} for found in both), both
    assert (await shop.finished(new)) == {"CONFIRMED": len(new)}
    assert await shop.violations() == []
    await shop.published(new)
    await agrees(shop, from_beginning=True)


async def test_a_worker_removes_them_by_itself_while_it_sells(pipeline: Make) -> None:
    shop = pipeline(partitions=4, retention_hours=24, payment_success_rate=0.8, payment_latency_max_s=0.2)
    await shop.start(dict.fromkeys(PRODUCTS, 100))
    await a_month(shop)
    # A cancel that is sent once more by the next worker has its order told again, which stays then.
    await shop.eventually("SELECT count(*) FROM kept_commands", 0)
    await leave(shop)
    await forget(shop)
    await older(shop, 30)
    sold = sum(row["sold"] for row in await counts(shop))
    two = [shop.add_worker(keep_orders_days=1.0) for _ in range(2)]
    await shop.settled(2)
    ids = await shop.produce([shop.order((PRODUCTS[n % 8], 1)) for n in range(100)])
    ended = await shop.finished(ids)
    await shop.eventually("SELECT count(*) FROM orders", 100, timeout_s=30)
    removed = [await asyncio.to_thread(worker.metric, "orders_removed_total") for worker in two]
    assert sorted(removed) == [0, 300], "one does it"
    await drained(shop)
    assert sum(row["sold"] for row in await counts(shop)) == sold + ended["CONFIRMED"]
    assert await shop.violations() == []
    await shop.published(ids)
    await agrees(shop, from_beginning=True)
    for worker in two:
        began = time.monotonic()
        assert await asyncio.to_thread(worker.stop) == 0
        assert time.monotonic() - began < 10


async def test_what_has_a_limit_or_a_void_due_stays_and_a_removed_order_is_unknown(pipeline: Make) -> None:
    shop = pipeline(partitions=2, retention_hours=24, verdict_timeout_s=15.0, hold_ttl_s=2.0)
    await shop.start({"1": 10, "2": 10, "3": 10}, workers=0)
    store = await shop.store()
    shop.add_worker()
    await shop.settled(1)
    await shop.limit("2", 3)
    body = {"user_id": "u1", "items": [{"product_id": "1", "quantity": 1}], "payment_method": "card"}
    async with ingress(shop) as (client, _):
        keyed = await client.post("/api/v1/orders", json=body, headers={"Idempotency-Key": "k-1"})
        order_id = (await keyed.json())["order_id"]
        limited = await shop.produce([shop.order(("2", 2)), shop.order(("2", 1), user_id="removed")])
        await shop.finished([order_id, *limited])
        await drained(shop)
        await cancel(shop, limited[1:])
        await shop.eventually("SELECT count(*) FROM order_lines WHERE state = 'returned'", 1)
        await shop.eventually("SELECT count(*) FROM payments WHERE status = 'REFUNDED'", 1)
        await leave(shop)
        shop.add_worker(payment_latency_min_s=3_000.0, payment_latency_max_s=3_000.0)
        await shop.settled(1)
        asked = await shop.produce([shop.order(("3", 1))])
        assert (await shop.finished(asked)) == {"CANCELLED expired": 1}
        await shop.eventually("SELECT count(*) FROM order_lines WHERE state = 'held'", 0)
        await leave(shop)
        await forget(shop)
        await older(shop, 30)

        found = await prune(shop, "--yes")
        assert (found["removed"], found["kept"], found["users"]) == (2, {"limit": 1, "refund": 1}, 1)
        assert await shop.violations() == []
        rows = await store.pool.fetch(query("user_units"), ["2"])
        assert [(row["user_id"], row["units"]) for row in rows] == [("user-1", 2)]

        assert (await client.get(f"/api/v1/orders/{order_id}")).status == 404
        listed = await (await client.get("/api/v1/orders", params={"user_id": "u1"})).json()
        assert listed["orders"] == []
        # The charge may have been made; there is an order yet to which it belongs, and it is void in the end.
        shop.add_worker(hold_ttl_s=600.0)
        await shop.settled(1)
        await shop.eventually("SELECT status::text FROM payments WHERE order_id = $1::uuid", "VOIDED", asked[0])
        again = await client.post("/api/v1/orders", json=body, headers={"Idempotency-Key": "k-1"})
        assert (again.status, (await again.json())["type"]) == (410, "urn:orderstream:problem:order-removed")
        cancelled = await client.post(f"/api/v1/orders/{order_id}/cancel")
        assert (cancelled.status, "was removed" in (await cancelled.json())["detail"]) == (404, True)
        more = await shop.produce([shop.order(("2", 2)), shop.order(("2", 3), user_id="removed")])
        assert (await shop.finished(more)) == {"CANCELLED user_limit": 1, "CONFIRMED": 1}
    assert await shop.violations() == []
    await shop.limit("2", None)
    await leave(shop)
    await shop.published(more)
    await forget(shop)
    await older(shop, 30)
    assert (await prune(shop, "--yes"))["removed"] == 4
    assert await shop.violations() == []


async def test_a_record_under_the_id_of_a_removed_order_is_a_dead_letter_and_is_never_sold(pipeline: Make) -> None:
    shop = pipeline(partitions=2, retention_hours=24, session_timeout_s=3.0)
    await shop.start({"p1": 10, "p2": 10})
    key = {"user_id": "u1", "idempotency_key": "k-1"}
    by_key = order_id_for_key(*key.values())
    orders = [shop.order(("p1", 1), **key, order_id=by_key), shop.order(("p1", 1)), shop.order(("p1", 1), ("p2", 1))]
    ids = await shop.produce(orders)
    assert await shop.finished(ids) == {"CONFIRMED": 3}
    await leave(shop)
    await forget(shop)
    await older(shop, 30)
    assert (await prune(shop, "--yes"))["removed"] == 3
    before, pool = await counts(shop), (await shop.store()).pool

    shop.add_worker()
    await shop.settled(1)
    keyed = {**orders[0], "items": [{"product_id": "p2", "quantity": 2}]}
    del keyed["order_id"]
    await shop.produce([keyed, *orders[1:]])
    new = await shop.produce([shop.order(("p1", 1)), shop.order(("p2", 1))])
    assert await shop.finished(new) == {"CONFIRMED": 2}
    await shop.eventually("SELECT count(*) FROM rejections WHERE reason = 'order_removed'", 3)
    await drained(shop)
    letters = await shop.dead_letters()
    assert sorted(letter["detail"] for letter in letters) == sorted(
        f"{order_id} is the id of an order that was removed" for order_id in ids
    )
    assert {letter["reason"] for letter in letters} == {"order_removed"}
    told = await shop.events()
    assert {order_id: told[order_id] for order_id in ids} == {order_id: ["REJECTED"] for order_id in ids}
    assert {row["order_id"] for row in await pool.fetch("SELECT order_id::text FROM orders")} == {*new}
    assert [row["sold"] for row in await counts(shop)] == [row["sold"] + 1 for row in before]
    assert await shop.violations() == []
    await agrees(shop, from_beginning=True)

    again = await shop.orderstream("dead-letters", "retry", "--all", "--yes")
    assert again.returncode == 1
    assert "order_removed" in again.stdout + again.stderr
    placed = await shop.orderstream("order", "place", "--item", "p1=1", "--user", "u1", "--key", "k-1")
    assert (placed.returncode, "order_removed: k-1" in placed.stderr) == (1, True)
    cancelled = await shop.orderstream("order", "cancel", ids[1])
    assert (cancelled.returncode, "it ended long ago and was removed" in cancelled.stderr) == (1, True)
    async with ingress(shop) as (client, _):
        assert (await client.get(f"/api/v1/orders/{ids[1]}")).status == 404
        assert (await client.post(f"/api/v1/orders/{ids[1]}/cancel")).status == 404
    assert await pool.fetchval("SELECT count(*) FROM kept_commands") == 0

    # Read again they are dead letters again, whatever was acknowledged; and no second letter is needed to agree.
    await leave(shop)
    await set_back(shop)
    shop.add_worker()
    await shop.settled(1)
    await drained(shop)
    assert [letter["reason"] for letter in await shop.dead_letters()] == ["order_removed"] * 6
    await forget(shop, DEAD_LETTERS.name)
    await agrees(shop, from_beginning=True)
    assert {row["order_id"] for row in await pool.fetch("SELECT order_id::text FROM orders")} == {*new}


async def test_it_says_how_long_orders_are_kept_or_asks(pipeline: Make) -> None:
    shop = pipeline(retention_hours=48)
    short = await shop.orderstream("prune", "--keep-days", "1")
    assert (short.returncode, "keep_orders_days is 1" in short.stderr) == (2, True)
    never = await shop.orderstream("prune", "--keep-days", "0")
    assert never.returncode == 2
    assert "--keep-days" in re.sub(r"\x1b\[[0-9;]*m", "", never.stderr)
