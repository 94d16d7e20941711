"""Reconcile on a pipeline that runs: what agrees, what is found, what is repaired, and what is left alone."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from redis.asyncio import Redis

from orderstream.engines.child import environment
from orderstream.jobs.reconcile.checkpoint import UnusableCheckpoint, default_file
from orderstream.jobs.reconcile.fold import TOPICS
from orderstream.jobs.reconcile.reconcile import Reconcile, Repair, Report
from orderstream.jobs.reconcile.repair import repair_all
from orderstream.lua.gate import GateVerdict, Keys
from orderstream.sql.differences import Kind
from orderstream.sql.store import Decision, LineToDecide
from orderstream.streams import events
from orderstream.streams.orders import Order
from orderstream.streams.partitions import order_partition, product_partition
from orderstream.streams.places import Place
from orderstream.streams.producer import Outbox
from orderstream.streams.topics import changelog_topic
from tests.harness import Pipeline

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]
PRODUCTS = [f"p{n}" for n in range(12)]


async def reconcile(shop: Pipeline, *, yes: bool = False, settle_s: float = 5.0, **how: Any) -> Report:
    file = default_file(shop.settings)
    async with Reconcile(shop.settings, file=file, settle_s=settle_s, **{"grace_s": 5.0, **how}) as job:
        report = await job.run()
        if yes:
            report.repairs = await repair_all(job, report.differences)
        return report


def found(report: Report) -> set[tuple[str, str]]:
    return {(str(d.kind), d.subject) for d in report.differences}


def some_orders(shop: Pipeline, number: int, seed: int = 1) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        shop.order(
            *((p, rng.randint(1, 3)) for p in rng.sample(PRODUCTS, 1 if rng.random() < 0.7 else rng.randint(2, 5)))
        )
        for _ in range(number)
    ]


async def stock_command(shop: Pipeline, product_id: str, **body: Any) -> None:
    outbox = Outbox(shop.settings)
    outbox.stock_command(product_id, orjson.dumps({"product_id": product_id, "command_id": str(uuid.uuid4()), **body}))
    await (await shop.producer()).send(outbox.handovers())


async def a_day(shop: Pipeline, orders: int = 300) -> list[str]:
    """Sell, refuse, decline; receive and adjust, refuse that too; send records twice, to foreign partitions, and rubbish."""
    some = some_orders(shop, orders)
    ids = await shop.produce(some)
    await shop.produce(some[:20])
    await shop.produce_raw(b"{", product_id="p1")
    reused = {**some[0], "user_id": "somebody else"}
    await shop.produce([reused])
    astray = {key: value for key, value in shop.order(("p2", 1)).items() if key != "order_id"}
    owner = product_partition("p2", shop.settings.partitions)
    await shop.produce_raw(orjson.dumps(astray), partition=(owner + 1) % shop.settings.partitions)
    await stock_command(shop, "p1", command="receive", quantity=50)
    await stock_command(shop, "p2", command="adjust", quantity=-1, reason="broken")
    await stock_command(shop, "p3", command="adjust", quantity=-100_000, reason="more than there is")
    await stock_command(shop, "none", command="receive", quantity=1)
    await shop.finished(ids)
    await shop.eventually("SELECT count(*) FROM orders WHERE status IN ('CONFIRMED', 'CANCELLED')", orders + 1)
    await shop.published(ids)
    await shop.eventually("SELECT sum(reserved)::int FROM stock", 0)  # released a moment after its event
    return ids


async def test_a_pipeline_that_did_all_it_can_agrees_and_the_next_run_reads_only_what_is_new(pipeline: Make) -> None:
    shop = pipeline(payment_success_rate=0.7)
    await shop.start({**dict.fromkeys(PRODUCTS, 40), "never": 5})
    ids = await a_day(shop)
    outcomes = await shop.outcomes(ids)
    assert len(outcomes) == 3, "sold, declined and refused"
    first = await reconcile(shop)
    assert found(first) == set()
    assert (first.open, first.orders, first.products, first.resumed) == (0, 301, 13, False)
    ends = {topic: sum(end for _, end in parts.values()) for topic, parts in first.covered.items()}
    assert ends[shop.settings.topic("orders")] == 300 + 20 + 1 + 1 + 2
    assert ends[shop.settings.topic("stock-commands")] == 4
    assert ends[shop.settings.topic("dead-letters")] >= 4, "a batch that comes again rejects again"
    assert first.records == sum(ends.values())

    nothing = await reconcile(shop)
    assert (found(nothing), nothing.records, nothing.orders, nothing.resumed) == (set(), 0, 0, True)
    more = await shop.produce(some_orders(shop, 50, seed=2))
    await shop.produce([shop.order(("p0", 1), order_id=ids[0])])  # of another order already: a dead letter
    await stock_command(shop, "p4", command="receive", quantity=7)
    await shop.finished(more)
    await shop.published(more)
    second = await reconcile(shop)
    assert found(second) == set()
    assert second.orders == 50
    assert 0 < second.records < 400
    assert found(await reconcile(shop, from_beginning=True)) == set()
    assert await shop.violations() == []


async def test_what_is_in_flight_is_no_drift_and_what_is_drift_is_repaired_while_orders_flow(pipeline: Make) -> None:
    shop = pipeline(payment_success_rate=0.7, payment_latency_max_s=0.2)
    await shop.start(dict.fromkeys(PRODUCTS, 2_000), workers=2)
    stop = asyncio.Event()
    ids: list[str] = []

    async def flow() -> None:
        while not stop.is_set():
            ids.extend(await shop.produce(some_orders(shop, 50, seed=len(ids))))
            await stock_command(shop, "p1", command="receive", quantity=1)
            await asyncio.sleep(0.02)

    flowing = asyncio.create_task(flow())
    try:
        await asyncio.sleep(1)
        for n in range(2):
            report = await reconcile(shop, settle_s=1.0)
            assert report.differences == [], n
            assert report.open > 0
        await (await shop.store()).pool.execute(
            "UPDATE stock SET on_hand = on_hand + 5, adjusted = adjusted + 5 WHERE product_id = 'p1'"
        )
        repaired = await reconcile(shop, settle_s=1.0, yes=True)
        assert (Kind.STOCK_COUNTS, "p1") in found(repaired)
        assert {d.subject for d in repaired.differences} == {"p1"}, "Redis may have learned of it too"
        assert {r.outcome for r in repaired.repairs} <= {"done", "agrees"}
    finally:
        stop.set()
        await flowing
    await shop.finished(ids)
    await shop.published(ids)
    assert found(await reconcile(shop)) == set()
    assert found(await reconcile(shop, from_beginning=True)) == set()
    assert await shop.violations() == []


async def drifted(shop: Pipeline, wanted: set[tuple[str, str]], **how: Any) -> list[Repair]:
    """Find exactly this drift, and once more: a dry run changes nothing.  Repair it, and find nothing then."""
    report = await reconcile(shop, settle_s=1.0, **how)
    assert found(report) == wanted, report.differences
    repaired = await reconcile(shop, settle_s=0.0, yes=True, **how)
    assert {(str(r.kind), r.subject) for r in repaired.repairs} == wanted
    assert not [r for r in repaired.repairs if r.outcome not in ("done", "agrees")]
    after = await reconcile(shop, **how)
    assert after.differences == [], repaired.repairs
    return repaired.repairs


async def test_counts_that_were_changed_by_hand_are_found_and_repaired(pipeline: Make) -> None:
    shop = pipeline(payment_success_rate=0.7)
    await shop.start(dict.fromkeys(PRODUCTS, 60))
    await a_day(shop, 150)
    await reconcile(shop)
    pool, redis = (await shop.store()).pool, Redis.from_url(shop.settings.redis_url)
    keys, stock = Keys(shop.settings.redis_prefix), changelog_topic(shop.settings.app_id, "stock")
    producer = await shop.producer()

    await redis.hset(keys.stock("p1"), "on_hand", "1")
    await redis.hincrby(keys.stock("p2"), "taken", 3)
    await drifted(shop, {(Kind.REDIS_COUNTS, "p1"), (Kind.REDIS_COUNTS, "p2")})
    await redis.aclose()

    # The row alone: Redis and the table have what must be.
    before = await pool.fetchrow("SELECT * FROM stock WHERE product_id = 'p3'")
    await pool.execute("UPDATE stock SET on_hand = on_hand + 5, adjusted = adjusted + 5 WHERE product_id = 'p3'")
    repaired = await drifted(shop, {(Kind.STOCK_COUNTS, "p3")})
    after = await pool.fetchrow("SELECT * FROM stock WHERE product_id = 'p3'")
    assert {n: after[n] for n in ("on_hand", "sold", "adjusted")} == {
        n: before[n] for n in ("on_hand", "sold", "adjusted")
    }
    entry = await pool.fetchrow(
        "SELECT * FROM stock_ledger WHERE product_id = 'p3' AND movement = 'adjust' ORDER BY at DESC LIMIT 1"
    )
    assert entry["quantity"] == 0
    assert entry["reason"] == f"reconcile: on_hand {before['on_hand'] + 5} -> {before['on_hand']}, adjusted 5 -> 0"
    assert entry["reason"].removeprefix("reconcile: ") in repaired[0].text

    # Entries were written into the ledger by hand, and the row with them; others were removed.
    await pool.execute("UPDATE stock SET on_hand = on_hand + 9, adjusted = adjusted + 9 WHERE product_id = 'p4'")
    await pool.execute(
        "INSERT INTO stock_ledger VALUES ('p4', gen_random_uuid(), 'adjust', 9, 'found in the attic', now())"
    )
    await pool.execute("DELETE FROM stock_ledger WHERE product_id = 'p5' AND movement = 'hold'")
    wanted: set[tuple[str, str]] = {(Kind.STOCK_LEDGER, "p4"), (Kind.STOCK_COUNTS, "p4"), (Kind.STOCK_LEDGER, "p5")}
    await drifted(shop, wanted)

    entries = {"p6": {"available": 1, "reserved": 0, "sold": 0, "version": 10_000}}
    await producer.send(
        {
            (stock, product_partition(key, shop.settings.partitions)): [(orjson.dumps(key), orjson.dumps(value), ())]
            for key, value in entries.items()
        }
    )
    await drifted(shop, {(Kind.TABLE_STOCK, "p6")})
    assert await shop.violations() == []


async def test_orders_that_were_changed_by_hand_are_found_and_repaired(pipeline: Make) -> None:
    shop = pipeline(payment_success_rate=0.7)
    await shop.start(dict.fromkeys(PRODUCTS, 60))
    ids = await a_day(shop, 100)
    outcomes = await shop.outcomes(ids)
    pool = (await shop.store()).pool
    rows = await pool.fetch("SELECT order_id::text, status::text, reason::text, line_count FROM orders")
    by: dict[tuple[str, str | None, bool], list[str]] = {}
    for row in rows:
        by.setdefault((row["status"], row["reason"], row["line_count"] > 1), []).append(row["order_id"])
    sold, sold_many = by["CONFIRMED", None, False], by["CONFIRMED", None, True]
    declined = by["CANCELLED", "payment_declined", False]
    counts = await pool.fetch("SELECT product_id, on_hand, reserved, sold FROM stock ORDER BY 1")

    status, payment, user, lines, removed, bare = sold[0], sold[1], sold[2], sold_many[0], sold_many[1], sold[3]
    await pool.execute(
        "UPDATE orders SET status = 'CANCELLED', reason = 'expired', confirmed_at = NULL, paid_at = NULL,"
        " cancelled_at = now(), lines_committed = 0 WHERE order_id = $1",
        status,
    )
    await pool.execute("UPDATE order_lines SET state = 'released' WHERE order_id = $1", status)
    await pool.execute("UPDATE payments SET charge_id = 'another' WHERE order_id = $1", payment)
    await pool.execute("UPDATE orders SET user_id = 'mallory' WHERE order_id = $1", user)
    await pool.execute("UPDATE order_lines SET quantity = quantity + 1 WHERE order_id = $1", lines)
    await pool.execute("UPDATE payments SET status = 'SUCCESS', charge_id = 'x' WHERE order_id = $1", declined[0])
    for table in ("orders", "order_lines", "payments"):
        await pool.execute(f"DELETE FROM {table} WHERE order_id = $1", removed)
    await pool.execute("DELETE FROM orders WHERE order_id = $1", bare)
    lost = declined[1]  # as a backup from before it does not have it: nothing of it is left
    for table in ("orders", "order_lines", "payments"):
        await pool.execute(f"DELETE FROM {table} WHERE order_id = $1", lost)
    await pool.execute("DELETE FROM stock_ledger WHERE source_id = $1", lost)
    wanted: set[tuple[str, str]] = {
        (Kind.ORDER_STATUS, status),
        (Kind.PAYMENT, payment),
        (Kind.ORDER_RECORD, user),
        (Kind.ORDER_LINES, lines),
        (Kind.PAYMENT, declined[0]),
        (Kind.ORDER_MISSING, removed),
        (Kind.ORDER_MISSING, bare),
        (Kind.ORDER_MISSING, lost),
    }
    await drifted(shop, wanted, from_beginning=True)
    assert await pool.fetch("SELECT product_id, on_hand, reserved, sold FROM stock ORDER BY 1") == counts
    assert await shop.outcomes(ids) == outcomes
    assert await shop.violations() == []


async def test_what_the_owners_left_undone_they_are_commanded_to_do(pipeline: Make) -> None:
    shop = pipeline(hold_ttl_s=600.0, payment_latency_min_s=600.0, payment_latency_max_s=600.0)
    await shop.start(dict.fromkeys(PRODUCTS, 60))
    producer, pool = await shop.producer(), (await shop.store()).pool
    order = shop.order(("p1", 2))
    ids = await shop.produce([order, shop.order(("p2", 1)), shop.order(("p3", 100))])
    await shop.eventually("SELECT count(*) FROM orders WHERE status = 'RESERVED'", 2)
    await reconcile(shop)

    # Its row is removed before anything came of it but its hold. That is in the ledger, so it can't be taken in again.
    await pool.execute("DELETE FROM orders WHERE order_id = $1", ids[0])
    await pool.execute("DELETE FROM order_lines WHERE order_id = $1", ids[0])
    # An entry that nothing waits for, and one of an order that never was.
    changelog, absent = changelog_topic(shop.settings.app_id, "open-orders"), str(uuid.uuid4())
    entry = {"status": "CANCELLED", "charge_asked": False, "refund": None, "unseen": [], "lines": {}, "line_count": 1}
    for order_id in (ids[2], absent):
        where = (changelog, order_partition(order_id, shop.settings.partitions))
        await producer.send({where: [(orjson.dumps(order_id), orjson.dumps(entry), ())]})
    wanted: set[tuple[str, str]] = {
        (Kind.ORDER_MISSING, ids[0]),
        (Kind.TABLE_OPEN_ORDERS, ids[2]),
        (Kind.TABLE_OPEN_ORDERS, absent),
    }
    repaired = await drifted(shop, wanted | {(Kind.TABLE_OPEN_ORDERS, ids[0])})
    assert {r.subject for r in repaired if r.outcome == "agrees"} == {ids[0]}, "it waits for its charge again"
    assert await shop.outcomes(ids) == {"RESERVED": 2, "CANCELLED insufficient_stock": 1}
    assert await shop.violations() == []


async def test_orders_that_are_stuck_are_ended_once_and_give_their_units_back(pipeline: Make) -> None:
    never = 600.0
    shop = pipeline(hold_ttl_s=1.0, expiry_interval_s=never, payment_latency_min_s=never, payment_latency_max_s=never)
    await shop.start(dict.fromkeys(PRODUCTS, 60), workers=0)
    lost, ended = shop.order(("p1", 2)), shop.order(("p2", 3))
    slow, removed, refused = shop.order(("p3", 4)), shop.order(("p4", 5)), shop.order(("p5", 61))
    orders = [lost, ended, slow, removed, refused]
    lost_id, ended_id, slow_id, removed_id, refused_id = ids = [order["order_id"] for order in orders]

    # The owner of two of them wrote and published them, and never handed them over: one waits for its charge, one holds
    # units.
    await shop.produce([lost, ended])
    store, now = await shop.store(), datetime.now(UTC)
    for order in (lost, ended):
        await taken_in(shop, order)
    outbox = Outbox(shop.settings)
    for order_id, product_id, quantity in ((lost_id, "p1", 2), (ended_id, "p2", 3)):
        outbox.event(order_id, events.created(order_id, now, "user-1", [(product_id, quantity)]))
    await store.decide([Decision(ended_id, "cancel", "cancelled_by_user")])
    outbox.event(ended_id, events.cancelled(ended_id, now, "cancelled_by_user"))
    await (await shop.producer()).send(outbox.publications())
    await acknowledge(shop)
    worker = shop.add_worker()
    await shop.settled(1)
    await shop.produce([slow, removed, refused])
    await shop.eventually("SELECT count(*) FROM orders WHERE status IN ('RESERVED', 'CANCELLED')", 5)
    await shop.has_counts("p3", 56, 4, 0)

    # One lost its row when its charge was under way; one was charged although it was refused.
    pool = store.pool
    for table in ("orders", "order_lines"):
        await pool.execute(f"DELETE FROM {table} WHERE order_id = $1", removed_id)
    await pool.execute(
        "INSERT INTO payments VALUES ($1, 'SUCCESS', 6100, 'x', now() - interval '1 minute', NULL)", refused_id
    )
    await shop.eventually("SELECT count(*) FROM orders WHERE created_at > now() - interval '2 seconds'", 0)
    wanted: set[tuple[str, str]] = {
        (Kind.ORDER_STUCK, lost_id),
        (Kind.ORDER_STUCK, slow_id),
        (Kind.ORDER_LINES, ended_id),
        (Kind.ORDER_MISSING, removed_id),
        (Kind.TABLE_OPEN_ORDERS, removed_id),
        (Kind.PAYMENT, refused_id),
    }
    before = await everything(shop)
    dry = await orderstream(shop, "reconcile", "--repair", "--grace", "0.5", "--settle", "3")
    assert (dry.returncode, dry.stdout.count("command its owner to expire")) == (1, 2), dry.stdout
    assert "nothing was changed" in dry.stdout
    assert await everything(shop) == before
    repaired = await drifted(shop, wanted, grace_s=0.5)
    assert {r.outcome for r in repaired if r.kind != Kind.TABLE_OPEN_ORDERS} == {"done"}
    (text,) = [r.text for r in repaired if r.kind == Kind.ORDER_MISSING]
    assert text == "its rows were put back; its owner was commanded to expire it, or to repeat what was decided"
    outcomes = {"CANCELLED expired": 3, "CANCELLED cancelled_by_user": 1, "CANCELLED insufficient_stock": 1}
    assert await shop.finished(ids) == outcomes
    for product_id in ("p1", "p2", "p3", "p4", "p5"):
        assert await shop.has_counts(product_id, 60, 0, 0)
    assert await pool.fetchval("SELECT count(*) FROM stock_ledger WHERE movement = 'release'") == 4
    assert await pool.fetchval("SELECT status::text FROM payments WHERE order_id = $1", refused_id) == "REFUND_DUE"
    assert await shop.violations() == []

    # The row of one is removed, its lines are there, and its record comes again: the worker says what repairs it.  It
    # can't pass the record; the events say that it must have been there, so it is not taken for one in flight.
    assert worker.stop() == 0
    await pool.execute("DELETE FROM orders WHERE order_id = $1", slow_id)
    await acknowledge(shop, at_the_ends=False)
    worker = shop.add_worker()
    assert await asyncio.to_thread(worker.process.wait, 60) == 70
    log = worker.log.read_text()
    assert f"of order {slow_id} there are lines or movements of stock in Postgres and no row" in log
    assert "orderstream reconcile --repair --yes" in log
    # The other two were ended too and wait for their charges: their entries have orders.
    missing: set[tuple[str, str]] = {(Kind.ORDER_MISSING, slow_id), (Kind.TABLE_OPEN_ORDERS, slow_id)}
    await drifted(shop, missing, from_beginning=True)
    shop.add_worker(expiry_interval_s=0.3)
    await shop.settled(1)
    await shop.eventually("SELECT status::text FROM payments WHERE order_id = $1", "REFUNDED", refused_id)
    assert await shop.outcomes(ids) == outcomes
    assert await shop.violations() == []


async def test_two_repairs_at_once_repair_each_ledger_once_and_what_can_t_be_repaired_is_reported(
    pipeline: Make,
) -> None:
    shop = pipeline(payment_success_rate=0.5)
    await shop.start(dict.fromkeys(PRODUCTS, 60))
    ids = await shop.produce([shop.order(("p4", 2)) for _ in range(20)])
    await shop.finished(ids)
    await shop.published(ids)
    commands = {"p3": str(uuid.uuid4()), "p7": str(uuid.uuid4())}
    await stock_command(shop, "p3", command="receive", quantity=50, command_id=commands["p3"])
    await stock_command(shop, "p7", command="adjust", quantity=-5, reason="broken", command_id=commands["p7"])
    pool = (await shop.store()).pool
    await shop.eventually(
        "SELECT count(*) FROM stock_ledger WHERE source_id = ANY ($1::uuid[])", 2, [*commands.values()]
    )
    assert found(await reconcile(shop)) == set()
    good = await pool.fetch("SELECT product_id, on_hand, reserved, received, adjusted, sold FROM stock ORDER BY 1")

    declined = await pool.fetchval("SELECT order_id FROM orders WHERE status = 'CANCELLED' LIMIT 1")
    surplus = "INSERT INTO stock_ledger VALUES ($1, $2, $3::movement, $4, NULL, now())"
    await pool.execute(surplus, "p1", uuid.uuid4(), "hold", 3)
    await pool.execute(surplus, "p2", uuid.uuid4(), "release", 2)
    await pool.execute("UPDATE stock SET reserved = reserved + 3 WHERE product_id = 'p1'")
    # Two commands that are nowhere but on their topic.
    await pool.execute("DELETE FROM stock_ledger WHERE source_id = ANY ($1::uuid[])", [*commands.values()])
    await pool.execute("UPDATE stock SET on_hand = 60, received = 0, adjusted = 0 WHERE product_id IN ('p3', 'p7')")
    # A sale of an order that never was confirmed, and a receipt without a command.
    await pool.execute(surplus, "p4", declined, "commit", 4)
    await pool.execute("UPDATE stock SET on_hand = on_hand - 4, sold = sold + 4 WHERE product_id = 'p4'")
    await pool.execute(surplus, "p5", uuid.uuid4(), "receive", 9)
    await pool.execute("UPDATE stock SET on_hand = on_hand + 9, received = received + 9 WHERE product_id = 'p5'")
    wanted = {(str(Kind.STOCK_LEDGER), f"p{n}") for n in (1, 2, 3, 4, 5, 7)}
    wanted |= {(str(Kind.STOCK_COUNTS), f"p{n}") for n in (1, 3, 4, 5, 7)}

    # Both have compared before either can repair.
    both = [asyncio.create_task(orderstream(shop, *REPAIR)) for _ in range(2)]
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT FROM stock ORDER BY product_id FOR UPDATE")
        await shop.eventually(waiting, 2)
    reports = [json.loads(one.stdout) for one in await asyncio.gather(*both)]
    assert [one.result().returncode for one in both] == [0, 0]
    assert [report["agrees"] for report in reports] == [True, True]
    assert sum("another repair" in note for one in reports for note in one["notes"]) == 1
    for one in reports:
        assert {(d["kind"], d["subject"]) for d in one["differences"]} == wanted
        assert {repair["outcome"] for repair in one["repairs"]} <= {"done", "agrees"}
    done = Counter(r["subject"] for one in reports for r in one["repairs"] if r["outcome"] == "done")
    assert done == {f"p{n}": 1 for n in (1, 2, 3, 4, 5, 7)}
    assert good == await pool.fetch(
        "SELECT product_id, on_hand, reserved, received, adjusted, sold FROM stock ORDER BY 1"
    )
    moved = await pool.fetch(
        "SELECT source_id::text FROM stock_ledger WHERE product_id IN ('p3', 'p7') AND quantity < 60"
    )
    assert {row["source_id"] for row in moved} >= {*commands.values()}, "under their own ids, although they were known"
    counters = await pool.fetch(
        "SELECT product_id, movement::text, quantity FROM stock_ledger WHERE reason LIKE 'reconcile: counters%'"
    )
    assert sorted(map(tuple, counters)) == [
        ("p1", "release", 3),
        ("p2", "hold", 2),
        ("p4", "commit", -4),
        ("p5", "receive", -9),
    ]
    for product_id, command_id in commands.items():  # as often as they come: once
        quantity = {"p3": 50, "p7": -5}[product_id]
        how = {"p3": {"command": "receive"}, "p7": {"command": "adjust", "reason": "broken"}}[product_id]
        await stock_command(shop, product_id, quantity=quantity, command_id=command_id, **how)
    await shop.finished(await shop.produce([shop.order(("p3", 110)), shop.order(("p7", 55))]))
    assert await shop.violations() == []

    # A receipt without a command, and its units are sold: there is nothing that could be taken out again.
    await pool.execute(surplus, "p6", uuid.uuid4(), "receive", 100)
    await pool.execute(
        "UPDATE stock SET on_hand = on_hand + 100, received = received + 100, version = version + 1,"
        " gate_generation = gate_generation + 1 WHERE product_id = 'p6'"
    )
    sold = 0
    while not sold:  # the worker learns of the new generation by what is refused
        outcome = await shop.finished(await shop.produce([shop.order(("p6", 150))]))
        sold = outcome["CONFIRMED"]
    left = await orderstream(shop, *REPAIR)
    summary = json.loads(left.stdout)
    assert (left.returncode, summary["agrees"]) == (1, False)
    outcomes = {repair["kind"]: repair["outcome"] for repair in summary["repairs"]}
    assert (outcomes[Kind.STOCK_LEDGER], outcomes[Kind.STOCK_COUNTS]) == ("left", "left")
    assert "adjust or receive first" in summary["repairs"][0]["text"]
    await stock_command(shop, "p6", command="receive", quantity=100)
    await shop.eventually("SELECT received FROM stock WHERE product_id = 'p6'", 200)
    repaired = await orderstream(shop, *REPAIR)
    assert repaired.returncode == 0, repaired.stdout
    assert await shop.has_counts("p6", 10, 0, 150)
    assert await shop.violations() == []


async def test_records_that_went_by_the_workers_are_sent_again(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start(dict.fromkeys(PRODUCTS, 60), workers=0)
    store = await shop.store()
    lost, refused, paid = orders = [shop.order(("p1", 2)), shop.order(("p2", 61)), shop.order(("p3", 3))]
    ids = await shop.produce(orders)
    waiting = await reconcile(shop)
    assert (found(waiting), waiting.in_flight) == (set(), {Kind.ORDER_MISSING: 3}), "no worker has had them yet"

    # A worker wrote two of them to Postgres and no event, another one acknowledged all three: so bad no worker is.
    for order in (refused, paid):
        await taken_in(shop, order)
    assert [s.status for s in await store.decide([Decision(paid["order_id"], "charged", None, 300, "c-1")])] == ["PAID"]
    await acknowledge(shop)
    shop.add_worker()
    await shop.settled(1)
    wanted: set[tuple[str, str]] = {
        (Kind.ORDER_MISSING, lost["order_id"]),
        (Kind.ORDER_EVENT_MISSING, refused["order_id"]),
        (Kind.ORDER_EVENT_MISSING, paid["order_id"]),
        (Kind.ORDER_STUCK, paid["order_id"]),
    }
    await drifted(shop, wanted, grace_s=0.5)
    assert await shop.finished(ids) == {"CONFIRMED": 2, "CANCELLED insufficient_stock": 1}
    assert (await shop.published(ids))[paid["order_id"]] == ["CREATED", "RESERVED", "PAID", "CONFIRMED"]
    assert await shop.violations() == []


async def test_records_that_retention_removed_are_named_and_nothing_is_made_up_about_them(pipeline: Make) -> None:
    shop = pipeline(payment_success_rate=0.7)
    await shop.start(dict.fromkeys(PRODUCTS, 40))
    await a_day(shop, 60)
    assert found(await reconcile(shop)) == set()
    await forget(shop)
    whole = await reconcile(shop, from_beginning=True)
    assert (found(whole), len(whole.notes)) == (set(), 1)
    assert whole.orders == 61
    ids = await shop.produce(some_orders(shop, 20, seed=3))
    await shop.finished(ids)
    await shop.published(ids)
    assert found(await reconcile(shop, from_beginning=True)) == set()
    more = await shop.produce(some_orders(shop, 20, seed=4))
    await shop.finished(more)
    await shop.published(more)
    await forget(shop)
    with pytest.raises(UnusableCheckpoint, match="were removed by retention"):
        await reconcile(shop)
    assert found(await reconcile(shop, from_beginning=True)) == set()


async def forget(shop: Pipeline) -> None:
    """Remove all records that the topics have now, as retention does."""
    tps = [
        TopicPartition(shop.settings.topic(spec.name), p) for spec in TOPICS for p in range(shop.settings.partitions)
    ]
    consumer = AIOKafkaConsumer(bootstrap_servers=shop.settings.kafka)
    admin = AIOKafkaAdminClient(bootstrap_servers=shop.settings.kafka)
    await consumer.start()
    await admin.start()
    try:
        ends = await consumer.end_offsets(tps)
        await admin.delete_records({tp: RecordsToDelete(before_offset=end) for tp, end in ends.items() if end})
    finally:
        await consumer.stop()
        await admin.close()


async def everything(shop: Pipeline) -> list[Any]:
    """Return all rows, and where the topics that a repair writes to end."""
    pool = (await shop.store()).pool
    tables = ("orders", "order_lines", "payments", "stock", "stock_ledger")
    rows = [sorted(map(str, await pool.fetch(f"SELECT * FROM {table}"))) for table in tables]
    topics = ("orders", "order-commands", "stock-commands")
    return [*rows, *[len(await shop.records(topic)) for topic in topics]]


async def taken_in(shop: Pipeline, order: dict[str, Any]) -> None:
    """Take an order of one line in as the stage does, up to Postgres and no further."""
    (item,) = order["items"]
    line = (item["product_id"], item["quantity"])
    record = Order(order["order_id"], order["user_id"], (line,), order["payment_method"], None, None)
    (place,) = [
        Place(r.topic, r.partition, r.offset)
        for r in await shop.records("orders")
        if orjson.loads(r.value)["order_id"] == order["order_id"]
    ]
    lines = [LineToDecide(1, record.order_id, *line, GateVerdict.UNDECIDED)]
    await (await shop.store()).reserve([(record, place)], lines, gate_unavailable=True)


async def acknowledge(shop: Pipeline, *, at_the_ends: bool = True) -> None:
    """Commit the consumer group's offsets at the ends of the topic `orders`, or at its beginnings."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=shop.settings.kafka, group_id=shop.settings.app_id, enable_auto_commit=False
    )
    await consumer.start()
    try:
        tps = [TopicPartition(shop.settings.topic("orders"), p) for p in range(shop.settings.partitions)]
        consumer.assign(tps)
        await consumer.commit(await consumer.end_offsets(tps) if at_the_ends else dict.fromkeys(tps, 0))
    finally:
        await consumer.stop()


# The command

REPAIR = ("reconcile", "--repair", "--yes", "--settle", "3", "--json")


async def orderstream(shop: Pipeline, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "orderstream", *arguments],
        env=environment(shop.settings) | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


async def test_the_command_tells_what_differs_where_it_read_and_what_it_would_do(
    pipeline: Make, redis_unavailable: str, tmp_path: Path
) -> None:
    shop = pipeline()
    await shop.start({"p1": 60, "p2": 60})
    ids = await shop.produce([shop.order(("p1", 1)) for _ in range(20)])
    await shop.finished(ids)
    await shop.published(ids)
    file = str(tmp_path / "here.json")
    good = await orderstream(shop, "reconcile", "--checkpoint", file, "--json")
    assert good.returncode == 0, good.stdout + good.stderr
    report = json.loads(good.stdout)
    orders = shop.settings.topic("orders")
    assert report["covered"][orders][str(product_partition("p1", shop.settings.partitions))] == {"from": 0, "to": 20}
    assert (report["agrees"], report["orders"], report["products"], report["checkpoint"]) == (True, 20, 2, file)
    assert report["records_per_second"] > 0

    pool = (await shop.store()).pool
    await pool.execute("UPDATE stock SET on_hand = on_hand + 5, adjusted = adjusted + 5 WHERE product_id = 'p2'")
    dry = await orderstream(shop, "reconcile", "--checkpoint", file, "--repair", "--settle", "0.5")
    assert dry.returncode == 1
    for words in (
        "stock.counts",
        "on_hand 60",
        "on_hand 65",
        "nothing was changed",
        "0 records read from the checkpoint",
    ):
        assert words in dry.stdout
    assert (await shop.counts("p2"))["available"] == 65
    wet = await orderstream(shop, "reconcile", "--checkpoint", file, "--repair", "--yes", "--settle", "0.5", "--json")
    (repair,) = json.loads(wet.stdout)["repairs"]
    assert (wet.returncode, repair["outcome"]) == (0, "done"), "compared again, nothing differs any more"
    report = json.loads(wet.stdout)
    assert (report["agrees"], len(report["differences"]), report["after_repairs"]["differences"]) == (True, 1, [])
    after = await orderstream(shop, "reconcile", "--checkpoint", file)
    assert (after.returncode, "everything agrees" in after.stdout) == (0, True), after.stdout + after.stderr

    foreign = await orderstream(shop, "reconcile", "--checkpoint", file, ORDERSTREAM_APP_ID="another")
    assert foreign.returncode == 2
    unavailable = {
        "Kafka": {"ORDERSTREAM_KAFKA": "127.0.0.1:9"},
        "Redis": {"ORDERSTREAM_REDIS_URL": redis_unavailable},
        "Postgres": {"ORDERSTREAM_DATABASE_URL": "postgresql://u:secret@127.0.0.1:9/x"},
    }
    for engine, env in unavailable.items():
        answer = await orderstream(shop, "reconcile", **env)
        assert answer.returncode == 2
        assert f"{engine} does not answer at" in answer.stderr
        assert "Traceback" not in answer.stderr
        assert "secret" not in answer.stderr
