"""Reconcile on a pipeline that runs: what agrees, what is found, what is repaired, and what is left alone."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from redis.asyncio import Redis

from orderstream.agents.intake import Arrival
from orderstream.agents.reserve import columns_of, fate_of
from orderstream.jobs.reconcile.checkpoint import UnusableCheckpoint, default_file
from orderstream.jobs.reconcile.reconcile import Reconcile, Repair, Report
from orderstream.jobs.reconcile.repair import repair_all
from orderstream.lua.gate import GateVerdict, Keys
from orderstream.sql.differences import Kind
from orderstream.sql.stages import Lane, claim, hold
from orderstream.streams import events
from orderstream.streams.orders import Limits, decode_record
from orderstream.streams.partitions import product_partition
from orderstream.streams.producer import Outbox
from orderstream.streams.topics import ORDER_EVENTS
from tests.chaos.progress import forget
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
    # What was sold before is taken back: it is in the sums of the checkpoint.
    pool = (await shop.store()).pool
    back = await pool.fetch(
        "SELECT order_id::text, home FROM orders WHERE status = 'CONFIRMED' ORDER BY created_at LIMIT 3"
    )
    for row in back:
        await cancel(shop, row["order_id"], row["home"])
    taken_back = "SELECT count(*) FROM orders WHERE payment = 'REFUNDED' AND states <@ '{n}'"
    await shop.eventually(taken_back, len(back))
    third = await reconcile(shop)
    assert (found(third), third.orders, third.open) == (set(), 3, 0)
    assert found(await reconcile(shop, from_beginning=True)) == set()
    assert await shop.violations() == []


async def test_a_command_whose_refusal_was_read_before_the_group_was_done_with_it_counts_for_nothing(
    pipeline: Make,
) -> None:
    shop = pipeline(commit_interval_s=5.0)
    await shop.start({"p1": 60})
    await stock_command(shop, "p1", command="adjust", quantity=-100, reason="more than there is")
    await asyncio.sleep(1.0)
    rounds = 0
    async with asyncio.timeout(60):
        while True:
            async with Reconcile(shop.settings, file=default_file(shop.settings), settle_s=0.0, grace_s=5.0) as job:
                assert (await job.run()).differences == []
                if not job.flying:
                    break
                rounds += 1
            await asyncio.sleep(1.0)
    assert rounds > 0, "of the first one the group was not done with it"


async def test_what_a_former_owner_tells_late_counts_for_no_reader(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"p0": 10})
    (sold,) = await shop.produce([shop.order(("p0", 1))])
    await shop.finished([sold])
    told = await shop.published([sold])
    (home,) = await (await shop.store()).pool.fetchrow("SELECT home FROM orders")
    place = (shop.settings.topic(ORDER_EVENTS.name), home)
    late = events.cancelled(sold, datetime.now(UTC), "expired")
    await (await shop.producer()).send({place: [(sold.encode(), late, [("lane", b"0:1")])]})
    assert await shop.published([sold]) == told
    for from_beginning in (False, False, True):
        assert found(await reconcile(shop, from_beginning=from_beginning)) == set()
    await (await shop.producer()).send({place: [(sold.encode(), late, [("lane", b"0:1")])]})
    assert found(await reconcile(shop)) == set(), "the checkpoint knows of the newer claim"


async def test_stock_that_was_set_is_what_was_told_of_it(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"p0": 10, "p1": 10})
    for product_id in ("p0", "p1"):
        await stock_command(shop, product_id, command="set", quantity=4, reason="counted")
        assert await shop.has_counts(product_id, 4, 0, 0)
    assert found(await reconcile(shop)) == set()
    await stock_command(shop, "p1", command="set", quantity=9, reason="counted")
    assert await shop.has_counts("p1", 9, 0, 0)
    assert found(await reconcile(shop)) == set()
    pool = (await shop.store()).pool
    lost = await pool.fetch("DELETE FROM ledger WHERE movement = 'adjust' RETURNING command_id")
    await pool.execute("DELETE FROM stock_commands WHERE command_id = ANY ($1)", [row["command_id"] for row in lost])
    await pool.execute("UPDATE stock SET on_hand = 10, adjusted = 0")
    report = await reconcile(shop, from_beginning=True, yes=True)
    assert {subject for _, subject in found(report)} == {"p0", "p1"}
    assert [repair.outcome for repair in report.repairs] == ["done", "done", "agrees", "agrees"], report.repairs
    assert [await shop.has_counts(p, n, 0, 0) for p, n in (("p0", 4), ("p1", 9))] == [True, True]
    rows = await pool.fetch("SELECT command, quantity, change FROM stock_commands ORDER BY change")
    assert [tuple(row) for row in rows] == [("set", 4, -6), ("set", 4, -6), ("set", 9, 5)]
    assert found(await reconcile(shop, from_beginning=True)) == set()

    for price_cents in (70, 250):
        await stock_command(shop, "p0", command="product", price_cents=price_cents)
    await stock_command(shop, "p1", command="limit", limit_per_user=3)
    as_told = "SELECT count(*) FROM stock WHERE price_cents = 250 OR limit_per_user = 3"
    await shop.eventually(as_told, 2)
    assert found(await reconcile(shop)) == set()
    await pool.execute("UPDATE stock SET price_cents = 70, limit_per_user = NULL, limited_since = NULL")
    report = await reconcile(shop, from_beginning=True, yes=True)
    assert found(report) == {(Kind.STOCK_CATALOGUE, "p0"), (Kind.STOCK_CATALOGUE, "p1")}
    assert report.differences[0].must == {"price_cents": 250}
    await shop.eventually(as_told, 2)
    assert found(await reconcile(shop, from_beginning=True)) == set()
    await pool.execute("UPDATE stock SET price_cents = 70")
    async with Reconcile(shop.settings, file=default_file(shop.settings), from_beginning=True, grace_s=5.0) as job:
        report = await job.run()
        assert found(report) == {(Kind.STOCK_CATALOGUE, "p0")}
        await stock_command(shop, "p0", command="product", price_cents=300)
        assert [repair.outcome for repair in await repair_all(job, report.differences)] == ["left"]
    await shop.eventually("SELECT price_cents FROM stock WHERE product_id = 'p0'", 300)
    assert found(await reconcile(shop, from_beginning=True)) == set()
    assert await shop.violations() == []


async def test_what_commands_say_of_a_product_is_compared_though_no_offset_is_committed(pipeline: Make) -> None:
    shop = pipeline(commit_interval_s=60)
    await shop.start({"p0": 10})
    await stock_command(shop, "p0", command="product", price_cents=250)
    await shop.eventually("SELECT price_cents FROM stock", 250)
    assert found(await reconcile(shop)) == set()
    shop.workers[0].kill()
    await stock_command(shop, "p0", command="product", price_cents=300)
    assert found(await reconcile(shop, from_beginning=True, settle_s=1.0)) == set(), "the other is under way"
    await (await shop.store()).pool.execute("UPDATE stock SET price_cents = 70")
    report = await reconcile(shop, from_beginning=True, settle_s=1.0, yes=True)
    assert [(d.subject, d.must) for d in report.differences] == [("p0", {"price_cents": 250})]
    assert [repair.outcome for repair in report.repairs] == ["left"], "a command of 250 would come behind that of 300"
    shop.add_worker()
    await shop.eventually("SELECT price_cents FROM stock", 300)
    assert found(await reconcile(shop, from_beginning=True)) == set()


async def test_what_is_in_flight_is_no_drift_and_what_is_drift_is_repaired_while_orders_flow(pipeline: Make) -> None:
    shop = pipeline(payment_success_rate=0.7, payment_latency_max_s=0.2)
    await shop.start(dict.fromkeys(PRODUCTS, 2_000), workers=2)
    stop = asyncio.Event()
    ids: list[str] = []

    async def flow() -> None:
        while not stop.is_set():
            ids.extend(await shop.produce(some_orders(shop, 50, seed=len(ids))))
            await stock_command(shop, "p1", command="receive", quantity=1)
            await cancel(shop, ids[len(ids) // 2])
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
    keys = Keys(shop.settings.redis_prefix)

    await redis.hset(keys.stock("p1"), "on_hand", "1")
    await redis.hincrby(keys.stock("p2"), "taken", 3)
    await drifted(shop, {(Kind.REDIS_COUNTS, "p1"), (Kind.REDIS_COUNTS, "p2")})
    await redis.aclose()

    # The row alone: Redis has what must be.
    before = await pool.fetchrow("SELECT * FROM stock WHERE product_id = 'p3'")
    await pool.execute("UPDATE stock SET on_hand = on_hand + 5, adjusted = adjusted + 5 WHERE product_id = 'p3'")
    repaired = await drifted(shop, {(Kind.STOCK_COUNTS, "p3")})
    after = await pool.fetchrow("SELECT * FROM stock WHERE product_id = 'p3'")
    assert {n: after[n] for n in ("on_hand", "sold", "adjusted")} == {
        n: before[n] for n in ("on_hand", "sold", "adjusted")
    }
    entry = await pool.fetchrow(
        "SELECT * FROM ledger WHERE product_id = 'p3' AND movement = 'adjust' ORDER BY at DESC LIMIT 1"
    )
    assert entry["quantity"] == 0
    assert entry["reason"] == f"reconcile: on_hand {before['on_hand'] + 5} -> {before['on_hand']}, adjusted 5 -> 0"
    assert entry["reason"].removeprefix("reconcile: ") in repaired[0].text

    # Entries were written into the ledger by hand, and the row with them; others were removed.
    await pool.execute("UPDATE stock SET on_hand = on_hand + 9, adjusted = adjusted + 9 WHERE product_id = 'p4'")
    await entry_by_hand(shop, "p4", "adjust", 9)
    await pool.execute("DELETE FROM ledger WHERE product_id = 'p5' AND movement = 'hold'")
    wanted: set[tuple[str, str]] = {(Kind.STOCK_LEDGER, "p4"), (Kind.STOCK_COUNTS, "p4"), (Kind.STOCK_LEDGER, "p5")}
    await drifted(shop, wanted)

    assert await shop.violations() == []


async def entry_by_hand(
    shop: Pipeline, product_id: str, movement: str, quantity: int, order_id: str | None = None
) -> None:
    """Write an entry into the ledger that no transaction of a worker wrote."""
    await (await shop.store()).pool.execute(
        "INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, order_ids, quantities, command_id,"
        " at)"
        " VALUES ($1, 'settle', 0, $2, $3::text::movement, $4, $5::uuid[], $6::int[], gen_random_uuid(), now())",
        *(product_partition(product_id, shop.settings.partitions), product_id, movement, quantity),
        *((None, None) if order_id is None else ([order_id], [quantity])),
    )


async def test_orders_that_were_changed_by_hand_are_found_and_repaired(pipeline: Make) -> None:
    shop = pipeline(payment_success_rate=0.7)
    await shop.start(dict.fromkeys(PRODUCTS, 60))
    ids = await a_day(shop, 100)
    refused = await shop.produce([shop.order(("p0", 1), ("p1", 200), ("p2", 1))])
    await shop.finished(refused)
    await shop.published(refused)
    ids += refused
    outcomes = await shop.outcomes(ids)
    pool = (await shop.store()).pool
    rows = await pool.fetch(
        "SELECT order_id::text, status::text, reason::text, cardinality(product_ids) > 1 AS many FROM orders"
    )
    by: dict[tuple[str, str | None, bool], list[str]] = {}
    for row in rows:
        by.setdefault((row["status"], row["reason"], row["many"]), []).append(row["order_id"])
    sold, sold_many = by["CONFIRMED", None, False], by["CONFIRMED", None, True]
    declined = by["CANCELLED", "payment_declined", False]
    counts = await pool.fetch("SELECT product_id, on_hand, reserved, sold FROM stock ORDER BY 1")
    cost = "SELECT order_id, prices FROM orders WHERE reserved_at IS NOT NULL ORDER BY 1"
    prices = await pool.fetch(cost)

    status, charge, user, total, bare, price = sold[:6]
    lines, states, removed, price_of_many = sold_many[:4]
    by_hand: dict[str, str] = {
        status: "UPDATE orders SET status = 'CANCELLED', reason = 'expired', confirmed_at = NULL, paid_at = NULL,"
        " cancelled_at = now(), states = '{r}' WHERE order_id = $1",
        charge: "UPDATE orders SET charge_id = 'another' WHERE order_id = $1",
        user: "UPDATE orders SET user_id = 'mallory' WHERE order_id = $1",
        total: "UPDATE orders SET total_cents = total_cents + 1 WHERE order_id = $1",
        price: "UPDATE orders SET prices[1] = prices[1] + 1 WHERE order_id = $1",
        price_of_many: "UPDATE orders SET prices[2] = prices[2] + 1 WHERE order_id = $1",
        lines: "UPDATE orders SET quantities[1] = quantities[1] + 1 WHERE order_id = $1",
        states: "UPDATE orders SET states[1] = 'h' WHERE order_id = $1",
        declined[0]: "UPDATE orders SET payment = 'SUCCESS', charge_id = 'x' WHERE order_id = $1",
    }
    by_hand |= dict.fromkeys((removed, bare, declined[1], refused[0]), "DELETE FROM orders WHERE order_id = $1")
    for order_id, statement in by_hand.items():
        await pool.execute(statement, order_id)
    wanted: set[tuple[str, str]] = {
        (Kind.ORDER_STATUS, status),
        (Kind.PAYMENT, charge),
        (Kind.ORDER_RECORD, user),
        (Kind.ORDER_RECORD, total),
        (Kind.ORDER_RECORD, price),
        (Kind.ORDER_RECORD, price_of_many),
        (Kind.ORDER_LINES, lines),
        (Kind.ORDER_LINES, states),
        (Kind.PAYMENT, declined[0]),
        *((Kind.ORDER_MISSING, order_id) for order_id in (removed, bare, declined[1], refused[0])),
    }
    await drifted(shop, wanted, from_beginning=True)
    assert await pool.fetch("SELECT product_id, on_hand, reserved, sold FROM stock ORDER BY 1") == counts
    assert await shop.outcomes(ids) == outcomes
    assert await pool.fetch(cost) == prices
    await shop.eventually("SELECT payment::text FROM orders WHERE order_id = $1", "VOIDED", declined[0])
    assert await shop.violations() == []


async def moved_by_hand(shop: Pipeline, order_id: str, product_id: str, state: str) -> None:
    """Have the owner of a line hold it, or have it returned, with all that belongs to it: as no worker would."""
    pool = (await shop.store()).pool
    units = await pool.fetchval(
        "UPDATE holds SET state = $3::text::\"char\", ended_at = CASE WHEN $3 <> 'h' THEN ended_at END"
        " WHERE order_id = $1 AND product_id = $2 RETURNING quantity",
        *(order_id, product_id, state),
    )
    movement, change = {
        "h": ("hold", "reserved = reserved + $2"),
        "n": ("return", "sold = sold - $2, on_hand = on_hand + $2"),
    }[state]
    released = await pool.execute(
        "DELETE FROM ledger WHERE product_id = $2 AND movement = 'release' AND order_ids = ARRAY[$1::uuid]",
        *(order_id, product_id),
    )
    if released == "DELETE 0":
        await entry_by_hand(shop, product_id, movement, units, order_id)
    await pool.execute(
        f"UPDATE stock SET {change}, version = version + 1, generation = generation + 1 WHERE product_id = $1",
        *(product_id, units),
    )


async def test_lines_that_other_owners_have_otherwise_than_their_homes_are_put_right(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start(dict.fromkeys(PRODUCTS, 60), workers=2)
    homes = {product_id: product_partition(product_id, shop.settings.partitions) for product_id in PRODUCTS}
    abroad = [product_id for product_id in PRODUCTS if homes[product_id] != homes["p0"]]
    bought = [shop.order(("p0", 1), (product_id, 2)) for product_id in abroad[:4]]
    refused = [shop.order(("p0", 1), (product_id, 3), (abroad[-1], 61)) for product_id in abroad[4:6]]
    ids = await shop.produce([*bought, *refused, shop.order(("p0", 1), (abroad[0], 2))])
    assert await shop.finished(ids) == {"CONFIRMED": 5, "CANCELLED insufficient_stock": 2}
    await shop.published(ids)
    pool = (await shop.store()).pool
    await shop.eventually("SELECT sum(reserved)::int FROM stock", 0)
    await shop.eventually("SELECT count(*) FROM waiting", 0)
    assert found(await reconcile(shop)) == set()
    counts = await pool.fetch("SELECT product_id, on_hand, reserved, sold FROM stock ORDER BY 1")

    committed, returned, gone, unsettled = ids[:4]
    late, stray = ids[4], str(uuid.uuid4())
    # One has it as held still, and has the units; one has it as held, although its home has the units back; one took them
    # back although they are sold; one does not know of it any more.
    await pool.execute("UPDATE holds SET state = 'h' WHERE order_id = $1", committed)
    await moved_by_hand(shop, late, abroad[4], "h")
    await moved_by_hand(shop, returned, abroad[1], "n")
    await pool.execute("DELETE FROM holds WHERE order_id = $1", gone)
    # One has it at another price.
    dear = ids[6]
    await pool.execute("UPDATE holds SET price = price + 1 WHERE order_id = $1", dear)
    # Units are held for an order that nobody knows.
    await pool.execute(
        "INSERT INTO holds (partition, order_id, product_id, home, user_id, quantity, price, state, held_at)"
        " VALUES ($1, $2, $3, 0, 'u', 5, 100, 'h', now() - interval '1 minute')",
        *(homes[abroad[5]], stray, abroad[5]),
    )
    await moved_by_hand(shop, stray, abroad[5], "h")
    # One is not over for its home, although it was published as CONFIRMED.
    await pool.execute(
        "UPDATE orders SET status = 'PAID', confirmed_at = NULL, states = '{c,g}' WHERE order_id = $1",
        unsettled,
    )
    wrong = {(str(Kind.ORDER_HOLDS), order_id) for order_id in (committed, late, returned, gone, stray, dear)}
    wrong |= {
        (str(Kind.STOCK_LEDGER), abroad[1]),
        (str(Kind.STOCK_COUNTS), abroad[1]),
        (str(Kind.ORDER_STATUS), unsettled),
    }
    report = await reconcile(shop, from_beginning=True)
    assert found(report) == wrong
    repaired = await reconcile(shop, from_beginning=True, yes=True)
    assert {(str(r.kind), r.subject) for r in repaired.repairs} == wrong | {
        (str(Kind.STOCK_LEDGER), product_id) for product_id in (abroad[2], abroad[4], abroad[5])
    }, "what follows from the lines follows at once"
    assert {r.outcome for r in repaired.repairs} <= {"done", "agrees"}, repaired.repairs
    assert (await reconcile(shop, from_beginning=True)).differences == []
    assert await pool.fetch("SELECT product_id, on_hand, reserved, sold FROM stock ORDER BY 1") == counts
    rows = await pool.fetch(
        "SELECT order_id::text, state::text FROM holds WHERE order_id = ANY ($1::uuid[])", [*ids[:4], stray]
    )
    assert {row["order_id"]: row["state"] for row in rows} == {**dict.fromkeys(ids[:4], "c"), stray: "r"}
    assert await shop.outcomes(ids) == {"CONFIRMED": 5, "CANCELLED insufficient_stock": 2}
    assert await shop.violations() == []


async def test_orders_that_nobody_has_in_hand_are_taken_up_again(pipeline: Make) -> None:
    never = 600.0
    shop = pipeline(hold_ttl_s=never, payment_latency_min_s=never, payment_latency_max_s=never)
    await shop.start(dict.fromkeys(PRODUCTS, 60))
    homes = {product_id: product_partition(product_id, shop.settings.partitions) for product_id in PRODUCTS}
    other = next(product_id for product_id in PRODUCTS if homes[product_id] != homes["p6"])
    forgotten, unheard = shop.order(("p1", 2)), shop.order(("p2", 3))
    removed, refused, ended = shop.order(("p4", 5)), shop.order(("p5", 61)), shop.order(("p6", 1), (other, 4))
    orders = [forgotten, unheard, removed, refused, ended]
    forgotten_id, unheard_id, removed_id, refused_id, ended_id = ids = await shop.produce(orders)
    await shop.eventually("SELECT count(*) FROM orders WHERE status IN ('RESERVED', 'CANCELLED')", 5)
    await shop.eventually("SELECT count(*) FROM waiting", 4)
    await cancel(shop, ended_id, homes["p6"])
    await shop.eventually("SELECT states::text FROM orders WHERE order_id = $1", "{r,r}", ended_id)
    await shop.published([refused_id, ended_id])
    assert found(await reconcile(shop)) == set()
    for worker in shop.workers:
        assert worker.stop() == 0

    # As if a worker had acknowledged what it had in its memory only: so bad no worker is.
    pool = (await shop.store()).pool
    await pool.execute("DELETE FROM waiting WHERE order_id = ANY ($1::uuid[])", [forgotten_id, unheard_id, ended_id])
    await cancel(shop, unheard_id, homes["p2"])
    await acknowledge(shop, "order-commands")
    # One lost its row while its charge was under way; one was charged although it was refused; of one a line is held still.
    await pool.execute("DELETE FROM orders WHERE order_id = $1", removed_id)
    await pool.execute("UPDATE orders SET payment = 'SUCCESS', charge_id = 'x' WHERE order_id = $1", refused_id)
    await moved_by_hand(shop, ended_id, other, "h")
    await pool.execute("UPDATE orders SET states = '{r,l}', payment = 'VOIDED' WHERE order_id = $1", ended_id)
    await shop.eventually("SELECT count(*) FROM orders WHERE created_at > now() - interval '2 seconds'", 0)
    wanted: set[tuple[str, str]] = {
        (Kind.ORDER_STUCK, forgotten_id),
        (Kind.ORDER_STUCK, unheard_id),
        (Kind.ORDER_STUCK, ended_id),
        (Kind.ORDER_MISSING, removed_id),
        (Kind.PAYMENT, refused_id),
    }
    before = await everything(shop)
    dry = await shop.orderstream("reconcile", "--from-beginning", "--repair", "--grace", "0.5", "--settle", "3")
    assert (dry.returncode, dry.stdout.count("send the order again")) == (1, 2), dry.stdout
    assert "nothing was changed" in dry.stdout
    assert await everything(shop) == before
    shop.add_worker()
    await shop.settled(1)
    repaired = await drifted(shop, wanted, grace_s=0.5, from_beginning=True)
    assert {r.outcome for r in repaired} == {"done"}
    (text,) = [r.text for r in repaired if r.kind == Kind.ORDER_MISSING]
    assert text == "its row was put back; the order was sent again"
    await shop.eventually("SELECT payment::text FROM orders WHERE order_id = $1", "VOIDED", refused_id)
    await shop.eventually("SELECT count(*) FROM orders WHERE status = 'CANCELLED'", 3)
    await shop.has_counts(other, 60, 0, 0)
    assert await shop.outcomes(ids) == {
        "RESERVED": 2,
        "CANCELLED cancelled_by_user": 2,
        "CANCELLED insufficient_stock": 1,
    }
    await shop.eventually("SELECT count(*) FROM waiting", 2)
    assert await shop.violations() == []


async def test_a_worker_that_knows_an_order_otherwise_than_a_repair_has_put_it_reads_it_anew(pipeline: Make) -> None:
    shop = pipeline(hold_ttl_s=600.0, payment_latency_min_s=600.0, payment_latency_max_s=600.0)
    await shop.start(dict.fromkeys(PRODUCTS, 60))
    (order_id,) = await shop.produce([shop.order(("p1", 2))])
    await shop.eventually("SELECT count(*) FROM waiting", 1)
    await shop.published([order_id])
    claims = "SELECT min(claim)::int FROM lanes WHERE partition = $1"
    home, pool = product_partition("p1", shop.settings.partitions), (await shop.store()).pool
    before = await pool.fetchval(claims, home)
    # Its row says that it was charged; its home knows better, and its events say nothing of it.
    await pool.execute("UPDATE orders SET payment = 'SUCCESS', charge_id = 'x' WHERE order_id = $1", order_id)
    await drifted(shop, {(Kind.PAYMENT, order_id)})
    await shop.eventually(
        f"SELECT ({claims}) > {before + 1}", True, home, timeout_s=30
    )  # the repair's, then the worker's
    await cancel(shop, order_id, home)
    assert await shop.finished([order_id]) == {"CANCELLED cancelled_by_user": 1}
    assert await pool.fetchval("SELECT payment::text FROM orders WHERE order_id = $1", order_id) == "VOID_DUE"
    assert await shop.violations() == []


async def test_another_order_under_an_id_is_not_put_into_the_row_of_the_one_that_is_there(pipeline: Make) -> None:
    """Its record is read by who repairs, and not yet by a worker, which makes it a dead letter."""
    shop = pipeline(partitions=4)
    names = {product_partition(name, 4): name for name in PRODUCTS}
    await shop.start(dict.fromkeys(names.values(), 100))
    ids = await shop.produce([shop.order((names[3], 1)), shop.order((names[2], 1))])
    await shop.finished(ids)
    shop.workers[0].stop()
    await shop.produce([shop.order((names[0], 2), order_id=order_id) for order_id in ids])
    assert (await reconcile(shop, yes=True)).differences == []
    shop.add_worker()
    await shop.dead_letters(2)
    assert await shop.finished(ids) == {"CONFIRMED": 2}
    assert (await reconcile(shop)).differences == []
    assert await shop.violations() == []


async def test_charges_that_are_declined_after_a_cancel_are_no_drift(pipeline: Make) -> None:
    shop = pipeline(payment_success_rate=0.0, payment_latency_min_s=2.0, payment_latency_max_s=2.0)
    await shop.start(dict.fromkeys(PRODUCTS, 40))
    ids = await shop.produce([shop.order(("p1", 1)), shop.order(*((p, 1) for p in PRODUCTS))])
    await shop.eventually("SELECT count(*) FROM orders WHERE status = 'RESERVED'", 2)
    for order_id in ids:
        await cancel(shop, order_id)
    assert await shop.finished(ids) == {"CANCELLED cancelled_by_user": 2}
    await shop.eventually("SELECT count(*) FROM payments WHERE status = 'VOIDED'", 2)
    assert shop.workers[0].metric("payment_processing_latency_seconds_count") == 2, "verdicts came after the cancels"
    report = await reconcile(shop)
    assert (found(report), report.orders, report.open) == (set(), 2, 0)
    assert await shop.violations() == []


async def cancel(shop: Pipeline, order_id: str, home: int | None = None) -> None:
    outbox = Outbox(shop.settings)
    outbox.order_command(order_id, orjson.dumps({"command": "cancel", "order_id": order_id}), home)
    await (await shop.producer()).send(outbox.handovers())


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
    await shop.eventually("SELECT count(*) FROM ledger WHERE command_id = ANY ($1::uuid[])", 2, [*commands.values()])
    assert found(await reconcile(shop)) == set()
    good = await pool.fetch("SELECT product_id, on_hand, reserved, received, adjusted, sold FROM stock ORDER BY 1")

    declined = await pool.fetchval("SELECT order_id::text FROM orders WHERE status = 'CANCELLED' LIMIT 1")
    await entry_by_hand(shop, "p1", "hold", 3, str(uuid.uuid4()))
    await entry_by_hand(shop, "p2", "release", 2, str(uuid.uuid4()))
    await pool.execute("UPDATE stock SET reserved = reserved + 3 WHERE product_id = 'p1'")
    # Two commands that are nowhere but on their topic.
    for table in ("ledger", "stock_commands"):
        await pool.execute(f"DELETE FROM {table} WHERE command_id = ANY ($1::uuid[])", [*commands.values()])
    await pool.execute("UPDATE stock SET on_hand = 60, received = 0, adjusted = 0 WHERE product_id IN ('p3', 'p7')")
    # A sale of an order that never was confirmed, and a receipt without a command.
    await entry_by_hand(shop, "p4", "commit", 4, declined)
    await pool.execute("UPDATE stock SET on_hand = on_hand - 4, sold = sold + 4 WHERE product_id = 'p4'")
    await entry_by_hand(shop, "p5", "receive", 9)
    await pool.execute("UPDATE stock SET on_hand = on_hand + 9, received = received + 9 WHERE product_id = 'p5'")
    wanted = {(str(Kind.STOCK_LEDGER), f"p{n}") for n in (1, 2, 3, 4, 5, 7)}
    wanted |= {(str(Kind.STOCK_COUNTS), f"p{n}") for n in (1, 3, 4, 5, 7)}

    # Both have compared before either can repair.
    both = [asyncio.create_task(shop.orderstream(*REPAIR)) for _ in range(2)]
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
    moved = await pool.fetch("SELECT command_id::text FROM ledger WHERE product_id IN ('p3', 'p7') AND quantity < 60")
    assert {row["command_id"] for row in moved} >= {*commands.values()}, "under their own ids, although they were known"
    counters = await pool.fetch(
        "SELECT product_id, movement::text, quantity FROM ledger WHERE reason LIKE 'reconcile: counters%'"
    )
    assert sorted(map(tuple, counters)) == [
        ("p1", "hold", -3),
        ("p2", "release", -2),
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
    await entry_by_hand(shop, "p6", "receive", 100)
    await pool.execute(
        "UPDATE stock SET on_hand = on_hand + 100, received = received + 100, version = version + 1,"
        " generation = generation + 1 WHERE product_id = 'p6'"
    )
    sold = 0
    while not sold:  # the worker learns of the new generation by what is refused
        outcome = await shop.finished(await shop.produce([shop.order(("p6", 150))]))
        sold = outcome["CONFIRMED"]
    left = await shop.orderstream(*REPAIR)
    summary = json.loads(left.stdout)
    assert (left.returncode, summary["agrees"]) == (1, False)
    outcomes = {repair["kind"]: repair["outcome"] for repair in summary["repairs"]}
    assert (outcomes[Kind.STOCK_LEDGER], outcomes[Kind.STOCK_COUNTS]) == ("left", "left")
    assert "adjust or receive first" in summary["repairs"][0]["text"]
    await stock_command(shop, "p6", command="receive", quantity=100)
    await shop.eventually("SELECT received FROM stock WHERE product_id = 'p6'", 200)
    repaired = await shop.orderstream(*REPAIR)
    assert repaired.returncode == 0, repaired.stdout
    assert await shop.has_counts("p6", 10, 0, 150)
    assert await shop.violations() == []


async def test_a_repair_that_is_killed_halfway_is_completed_by_the_next_one(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start(dict.fromkeys(PRODUCTS, 60))
    pool = (await shop.store()).pool
    for product_id in ("p1", "p2"):
        await entry_by_hand(shop, product_id, "adjust", 9)
    counters = "SELECT count(*) FROM ledger WHERE reason LIKE 'reconcile: counters%' AND product_id = $1"
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT FROM stock WHERE product_id = 'p2' FOR UPDATE")
        killed = shop.begin(*REPAIR)
        await shop.eventually(counters, 1, "p1")
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        await shop.eventually(waiting, 1)
        killed.kill()
        assert await asyncio.to_thread(killed.wait) == -9
    assert (await pool.fetchval(counters, "p1"), await pool.fetchval(counters, "p2")) == (1, 0)
    again = json.loads((await shop.orderstream(*REPAIR)).stdout)
    assert [(repair["subject"], repair["outcome"]) for repair in again["repairs"]] == [("p2", "done")]
    assert (await pool.fetchval(counters, "p1"), await pool.fetchval(counters, "p2")) == (1, 1)
    assert await shop.violations() == []
    assert await shop.finished(await shop.produce([shop.order(("p1", 60)), shop.order(("p2", 61))])) == {
        "CONFIRMED": 1,
        "CANCELLED insufficient_stock": 1,
    }


async def test_records_that_went_by_the_workers_are_sent_again(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start(dict.fromkeys(PRODUCTS, 60), workers=0)
    orders = [shop.order(("p1", 2)), shop.order(("p2", 61)), shop.order(("p3", 3))]
    ids = await shop.produce(orders)
    waiting = await reconcile(shop)
    assert (found(waiting), waiting.in_flight) == (set(), {Kind.ORDER_MISSING: 3}), "no worker has had them yet"

    # A worker wrote two of them to Postgres and no event, another one acknowledged all three: so bad no worker is.
    await taken_in(shop, orders[1:])
    await acknowledge(shop, "orders")
    shop.add_worker()
    await shop.settled(1)
    lost, refused, held = ids
    wanted: set[tuple[str, str]] = {
        (Kind.ORDER_MISSING, lost),
        (Kind.ORDER_EVENT_MISSING, refused),
        (Kind.ORDER_EVENT_MISSING, held),
        (Kind.ORDER_STUCK, held),
    }
    await drifted(shop, wanted, grace_s=0.5)
    assert await shop.finished(ids) == {"CONFIRMED": 2, "CANCELLED insufficient_stock": 1}
    assert (await shop.published(ids))[held] == ["CREATED", "RESERVED", "PAID", "CONFIRMED"]
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


async def test_what_was_refused_stays_refused_where_its_dead_letter_is_gone(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"p1": 20, "p2": 20})
    (sold,) = await shop.produce([shop.order(("p1", 1))])
    await shop.finished([sold])
    await shop.produce([shop.order(("p1", 5), order_id=sold)])  # another order under its id
    was = {"name": "p2", "price_cents": 1, "limit_per_user": None, "retired": False}
    again = str(uuid.uuid4())
    await stock_command(shop, "p1", command="adjust", quantity=-100, reason="more than there is")
    await stock_command(shop, "p2", command="product", price_cents=70, was=was)
    await stock_command(shop, "new", command="limit", limit_per_user=1, command_id=again)
    decided = "SELECT count(*) FROM stock_commands WHERE outcome = $1"
    for outcome in ("insufficient_stock", "product_changed", "unknown_product"):
        await shop.eventually(decided, 1, outcome)
    await stock_command(shop, "new", command="product", name="new", price_cents=5)
    await stock_command(shop, "new", command="limit", limit_per_user=2)
    await stock_command(shop, "new", command="limit", limit_per_user=1, command_id=again)  # as a retry does
    await shop.eventually("SELECT count(*) FROM stock WHERE limit_per_user = 1", 1)
    await stock_command(shop, "p1", command="receive", quantity=100)
    await shop.eventually("SELECT on_hand FROM stock WHERE product_id = 'p1'", 119)
    assert found(await reconcile(shop)) == set()
    await forget(shop, "dead-letters")
    await forget(shop, "orders", but=1)
    whole = await reconcile(shop, from_beginning=True, yes=True)
    assert (found(whole), whole.repairs) == (set(), [])
    # A repair of the same product, by a run that continues: it reads all commands again.
    await entry_by_hand(shop, "p1", "adjust", 9)
    repaired = await reconcile(shop, yes=True)
    assert found(repaired) == {(Kind.STOCK_LEDGER, "p1")}
    assert [repair.text for repair in repaired.repairs] == ["countered by adjust -9"]
    assert found(await reconcile(shop, from_beginning=True)) == set()
    assert await shop.has_counts("p1", 119, 0, 1)
    assert await shop.violations() == []


@pytest.mark.parametrize("moment", ["between its rounds", "before it repairs"])
async def test_commands_that_a_retry_has_carried_out_while_it_compares_are_not_countered(
    pipeline: Make, moment: str
) -> None:
    shop = pipeline()
    await shop.start({"p1": 20, "p2": 20})
    await stock_command(shop, "p1", command="adjust", quantity=-30, reason="more than there is")
    await stock_command(shop, "new", command="set", quantity=5, reason="counted")
    await shop.eventually("SELECT count(*) FROM stock_commands WHERE outcome <> 'applied'", 2)
    await stock_command(shop, "p1", command="receive", quantity=20)
    await stock_command(shop, "new", command="product", name="new", price_cents=5)
    await shop.eventually("SELECT count(*) FROM stock_commands WHERE outcome = 'applied'", 2)
    assert found(await reconcile(shop)) == set()
    for product_id in ("p1", "p2", "new"):  # so it goes on after its first round, and repairs
        await entry_by_hand(shop, product_id, "adjust", 9)

    async def retry() -> None:
        assert (await shop.orderstream("dead-letters", "retry", "--all", "--yes")).returncode == 0
        await shop.eventually("SELECT count(*) FROM stock_commands WHERE outcome = 'applied'", 4)

    async with Reconcile(shop.settings, file=default_file(shop.settings), from_beginning=True, grace_s=5.0) as job:
        compare, rounds = job._round, 0

        async def one_round() -> Any:
            nonlocal rounds
            seen, rounds = await compare(), rounds + 1
            if rounds == 1 and moment == "between its rounds":
                await retry()
            return seen

        job._round = one_round  # type: ignore[method-assign]
        report = await job.run()
        assert rounds > 2
        if moment == "before it repairs":
            await retry()
            # Clocks may be set back: its entries look as if they had been there.
            await (await shop.store()).pool.execute("UPDATE ledger SET at = $1 - interval '1 ms' WHERE at > $1", job.at)
        assert found(report) == {(Kind.STOCK_LEDGER, product_id) for product_id in ("p1", "p2", "new")}
        repairs = await repair_all(job, report.differences)
    assert [(repair.outcome, repair.text) for repair in repairs] == [("done", "countered by adjust -9")] * 3
    assert [await shop.has_counts(p, n, 0, 0) for p, n in (("p1", 10), ("new", 5))] == [True, True]
    for from_beginning in (False, True):
        assert found(await reconcile(shop, from_beginning=from_beginning)) == set()
    assert await shop.violations() == []


async def test_a_set_of_which_nothing_is_told_yet_is_not_countered(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"p1": 20}, workers=0)
    command_id = str(uuid.uuid4())
    await stock_command(shop, "p1", command="set", quantity=5, reason="counted", command_id=command_id)
    await entry_by_hand(shop, "p1", "adjust", -15)
    await entry_by_hand(shop, "p1", "adjust", 9)
    pool = (await shop.store()).pool
    await pool.execute("UPDATE ledger SET command_id = $1 WHERE quantity = -15", command_id)
    await pool.execute("UPDATE stock SET on_hand = 5, adjusted = -15")
    await pool.execute(
        "INSERT INTO stock_commands"
        " (command_id, partition, product_id, command, quantity, reason, outcome, change, decided_at)"
        " VALUES ($1, $2, 'p1', 'set', 5, 'counted', 'applied', -15, now())",
        *(command_id, product_partition("p1", shop.settings.partitions)),
    )
    report = await reconcile(shop, yes=True)
    assert [(repair.outcome, repair.text) for repair in report.repairs] == [("done", "countered by adjust -9")]
    assert await shop.has_counts("p1", 5, 0, 0)


async def everything(shop: Pipeline) -> list[Any]:
    """Return all rows, and where the topics that a repair writes to end."""
    pool = (await shop.store()).pool
    tables = ("orders", "holds", "waiting", "lanes", "stock", "ledger", "stock_commands")
    rows = [sorted(map(str, await pool.fetch(f"SELECT * FROM {table}"))) for table in tables]
    topics = ("orders", "order-commands", "stock-commands")
    return [*rows, *[len(await shop.records(topic)) for topic in topics]]


async def taken_in(shop: Pipeline, orders: list[dict[str, Any]]) -> None:
    """Take orders of one line in as the stage does, up to Postgres and no further; one of 61 units is refused."""
    ours, pool = shop.settings, (await shop.store()).pool
    limits = Limits(ours.order_lines_max, ours.line_quantity_max, ours.order_bytes_max)
    wanted = {order["order_id"] for order in orders}
    taken = []
    for r in await shop.records("orders"):
        order = decode_record(r, limits)
        if order.order_id in wanted:
            verdict = GateVerdict.REFUSED if order.lines[0][1] > 60 else GateVerdict.TAKEN
            taken.append((Arrival(order, r, None), fate_of([verdict])))
    taken.sort(key=lambda one: one[0].order.order_id)
    intake = Lane()
    await claim(pool, range(ours.partitions), intake, Lane())
    step = intake.step({arrival.record.partition for arrival, _ in taken})
    await hold(pool, intake, step | columns_of(taken), uuid.uuid4())


async def acknowledge(shop: Pipeline, topic: str) -> None:
    """Commit the consumer group's offsets at the ends of a topic, and note in Postgres that all of it was read."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=shop.settings.kafka, group_id=shop.settings.app_id, enable_auto_commit=False
    )
    await consumer.start()
    try:
        tps = [TopicPartition(shop.settings.topic(topic), p) for p in range(shop.settings.partitions)]
        consumer.assign(tps)
        ends = await consumer.end_offsets(tps)
        await consumer.commit(ends)
    finally:
        await consumer.stop()
    await (await shop.store()).pool.executemany(
        "INSERT INTO marks (partition, topic, next_offset, acknowledged, stamp, digest) VALUES ($1, $2, $3, $3, 0, -1)"
        " ON CONFLICT ON CONSTRAINT marks_once DO UPDATE SET next_offset = $3, acknowledged = $3, digest = -1",
        [(tp.partition, tp.topic, end) for tp, end in ends.items()],
    )


# The command

REPAIR = ("reconcile", "--repair", "--yes", "--settle", "3", "--json")


async def test_the_command_tells_what_differs_where_it_read_and_what_it_would_do(
    pipeline: Make, redis_unavailable: str, tmp_path: Path
) -> None:
    shop = pipeline()
    await shop.start({"p1": 60, "p2": 60})
    ids = await shop.produce([shop.order(("p1", 1)) for _ in range(20)])
    await shop.finished(ids)
    await shop.published(ids)
    file = str(tmp_path / "here.json")
    good = await shop.orderstream("reconcile", "--checkpoint", file, "--json")
    assert good.returncode == 0, good.stdout + good.stderr
    report = json.loads(good.stdout)
    orders = shop.settings.topic("orders")
    assert report["covered"][orders][str(product_partition("p1", shop.settings.partitions))] == {"from": 0, "to": 20}
    assert (report["agrees"], report["orders"], report["products"], report["checkpoint"]) == (True, 20, 2, file)
    assert report["records_per_second"] > 0

    pool = (await shop.store()).pool
    await pool.execute("UPDATE stock SET on_hand = on_hand + 5, adjusted = adjusted + 5 WHERE product_id = 'p2'")
    dry = await shop.orderstream("reconcile", "--checkpoint", file, "--repair", "--settle", "0.5")
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
    wet = await shop.orderstream("reconcile", "--checkpoint", file, "--repair", "--yes", "--settle", "0.5", "--json")
    (repair,) = json.loads(wet.stdout)["repairs"]
    assert (wet.returncode, repair["outcome"]) == (0, "done"), "compared again, nothing differs any more"
    report = json.loads(wet.stdout)
    assert (report["agrees"], len(report["differences"]), report["after_repairs"]["differences"]) == (True, 1, [])
    after = await shop.orderstream("reconcile", "--checkpoint", file)
    assert (after.returncode, "everything agrees" in after.stdout) == (0, True), after.stdout + after.stderr

    foreign = await shop.orderstream("reconcile", "--checkpoint", file, ORDERSTREAM_APP_ID="another")
    assert foreign.returncode == 2
    unavailable: dict[str, dict[str, Any]] = {
        "Kafka": {"ORDERSTREAM_KAFKA": "127.0.0.1:9"},
        "Redis": {"ORDERSTREAM_REDIS_URL": redis_unavailable},
        "Postgres": {"ORDERSTREAM_DATABASE_URL": "postgresql://u:secret@127.0.0.1:9/x"},
    }
    for engine, env in unavailable.items():
        answer = await shop.orderstream("reconcile", **env)
        assert answer.returncode == 2
        assert f"{engine} does not answer at" in answer.stderr
        assert "Traceback" not in answer.stderr
        assert "secret" not in answer.stderr
