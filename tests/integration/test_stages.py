"""The two transactions of a home in Postgres: the fence, holds, settlements, stock commands, and whose rows are written."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from orderstream.engines.local import LocalEngines
from orderstream.lua.gate import Counts
from orderstream.sql import stages
from orderstream.sql.prepare import schema
from orderstream.sql.stages import Fenced, HoldThere, Mark, NotEnough, OrderMoved
from orderstream.sql.store import query, statements
from orderstream.streams.commands import ON_HAND_MAX, ProductState
from tests.integration.tables import (
    WATCH,
    WATCHED,
    Move,
    New,
    Tables,
    Worker,
    database,
    hold_columns,
    is_blocked,
    new,
    oid,
    outcome,
)

pytestmark = pytest.mark.engines

SINCE = datetime(2026, 1, 2, tzinfo=UTC)
ORDERS = "orders"
INTAKE, SETTLE = "intake", "settle"


@pytest.fixture(scope="module")
def plain(engines: LocalEngines) -> Iterator[str]:
    """A database that these tests share, one after the other."""
    yield from database(engines, schema())


@pytest.fixture(scope="module")
def watched(engines: LocalEngines) -> Iterator[str]:
    """The same, where a transaction that writes a row of a partition whose lane it has not stepped fails."""
    yield from database(engines, schema() + WATCH)


async def opened(url: str) -> AsyncIterator[Tables]:
    pool = await asyncpg.create_pool(url, min_size=1, max_size=8, server_settings={"jit": "off"})
    tables = Tables(pool)
    await tables.empty()
    for product_id, partition, units, price in (("a", 0, 10, 100), ("b", 0, 5, 30), ("c", 1, 3, 7), ("d", 2, 4, 11)):
        await tables.product(product_id, partition, units, price)
    await tables.product("few", 0, 100, 1, most=3)
    await tables.product("few1", 1, 100, 1, most=3)
    yield tables
    assert await tables.faults() == []
    await pool.close()


@pytest.fixture
async def db(plain: str) -> AsyncIterator[Tables]:
    async for tables in opened(plain):
        yield tables


@pytest.fixture
async def shop(watched: str) -> AsyncIterator[Tables]:
    async for tables in opened(watched):
        yield tables


def mark(next_offset: int, acknowledged: int = 0, topic: str = ORDERS, partition: int = 0) -> Mark:
    return Mark(partition, topic, next_offset, acknowledged, 1000 + next_offset, 9000 + next_offset)


async def marks(tables: Tables) -> dict[tuple[str, int], tuple[int, ...]]:
    rows = await tables.pool.fetch("SELECT * FROM marks")
    return {
        (row["topic"], row["partition"]): (row["next_offset"], row["acknowledged"], row["stamp"], row["digest"])
        for row in rows
    }


# The fence


async def test_a_claim_takes_both_lanes_over_and_makes_those_that_are_missing(db: Tables) -> None:
    first = await db.worker().claim(2, 0)
    second = await db.worker().claim(1, 0)
    assert (first.intake.claims, first.settling.claims) == ({0: 1, 2: 1}, {0: 1, 2: 1})
    assert (second.intake.claims, second.settling.claims) == ({0: 2, 1: 1}, {0: 2, 1: 1})
    assert await db.lanes() == {(n, lane): 0 for n in (0, 1, 2) for lane in (INTAKE, SETTLE)}


async def test_each_transaction_steps_the_lanes_of_its_kind_and_leaves_its_attempt(db: Tables) -> None:
    worker = await db.worker().claim(0, 1)
    await worker.hold(new(1, ("a", 1)))
    attempt = worker.attempt
    await worker.settle(partitions=[0, 1])
    await worker.settle(partitions=[1])
    assert await db.lanes() == {(0, INTAKE): 1, (1, INTAKE): 0, (0, SETTLE): 1, (1, SETTLE): 2}
    assert (worker.intake.sequences, worker.settling.sequences) == ({0: 1, 1: 0}, {0: 1, 1: 2})
    attempts = await db.attempts()
    assert attempts[0, INTAKE] == attempt
    assert attempts[1, SETTLE] == worker.attempt
    assert attempts[0, SETTLE] not in (attempt, worker.attempt)
    assert attempts[1, INTAKE] is None


@pytest.mark.parametrize("call", ["hold", "settle", "command"])
@pytest.mark.parametrize("stale", ["claim", "sequence", "later", "never claimed"])
async def test_a_stale_lane_among_several_is_fenced_and_nothing_is_written(db: Tables, call: str, stale: str) -> None:
    worker = await db.worker().claim(0, 1, 2)
    await worker.hold(new(1, ("a", 1)), marks=[mark(5)])
    for lane in (worker.intake, worker.settling):
        match stale:
            case "claim":
                lane.claims[1] -= 1
            case "sequence":
                lane.sequences[1] -= 1  # of a Postgres that was set back
            case "later":
                lane.sequences[1] += 1
            case _:
                lane.claims[7] = lane.claims[1]
                lane.sequences[7] = 0
    partitions = [0, 1, 2, 7] if stale == "never claimed" else [0, 1, 2]
    before = await db.everything()
    calls = {
        "hold": lambda: worker.hold(new(2, ("a", 1)), partitions=partitions, marks=[mark(9)]),
        "settle": lambda: worker.settle(
            Move(1, "RESERVED", "CANCELLED", "expired"), partitions=partitions, marks=[mark(9)]
        ),
        "command": lambda: worker.command((5, "a", "receive", 3), partitions=partitions),
    }
    with pytest.raises(Fenced):
        await calls[call]()
    assert await db.everything() == before
    assert worker.intake.sequences[0] == 1, "nothing was noted as stepped"


async def test_a_claim_fences_whoever_had_the_lanes_also_one_in_the_middle_of_a_transaction(db: Tables) -> None:
    zombie = await db.worker().claim(0)
    async with db.pool.acquire() as connection:
        begun = connection.transaction()
        await begun.start()
        await zombie.hold(new(1, ("a", 1)), by=connection)
        heir = db.worker()
        claim = asyncio.create_task(heir.claim(0))
        assert await is_blocked(db.pool, connection, claim), "what was begun is ended first"
        await begun.commit()
    await claim
    assert heir.intake.sequences == {0: 1}
    with pytest.raises(Fenced):
        await zombie.hold(new(2, ("a", 1)))
    with pytest.raises(Fenced):
        await zombie.settle()
    await heir.hold(new(3, ("a", 1)))
    assert await db.counts("a") == (10, 2, 0)


async def test_a_transaction_whose_answer_was_lost_is_recognised_by_its_attempt(db: Tables) -> None:
    worker = await db.worker().claim(0)
    lost = worker.copy()  # believes what it believed before
    await worker.hold(new(1, ("a", 1)))
    before = await db.everything()
    assert (await lost.hold(new(1, ("a", 1)))).row["known"] == [oid(1)], "the order is there"
    with pytest.raises(Fenced):
        await lost.hold(partitions=[0])
    assert (await db.attempts())[0, INTAKE] == worker.attempt
    assert (await db.lanes())[0, INTAKE] == lost.intake.sequences[0] + 1
    assert await db.everything() == before


async def test_of_two_that_believe_the_same_one_steps_and_the_other_is_fenced(db: Tables) -> None:
    worker = await db.worker().claim(0, 1, 2)
    twins = [worker.copy() for _ in range(6)]
    outcomes = await asyncio.gather(
        *(outcome(twin.hold(new(n, ("a", 1)), partitions=[0, 1, 2])) for n, twin in enumerate(twins, 1))
    )
    assert Counter(outcomes) == {None: 1, Fenced: 5}
    assert await db.counts("a") == (10, 1, 0)


async def test_workers_with_overlapping_partitions_in_any_order_never_deadlock(db: Tables) -> None:
    await db.worker().claim(*range(8))
    draw = random.Random(5)

    async def work(partitions: list[int], lane: str) -> None:
        for _ in range(40):
            draw.shuffle(partitions)
            rows = await db.pool.fetch("SELECT partition, claim, sequence FROM lanes WHERE lane = $1::text::lane", lane)
            now = {row["partition"]: (row["claim"], row["sequence"]) for row in rows}
            claims, sequences = zip(*(now[partition] for partition in partitions), strict=True)
            with contextlib.suppress(asyncpg.UnknownPostgresError):
                await db.pool.execute(
                    "SELECT begin_step($1::text::lane, $2, $3, $4, gen_random_uuid(), '{}', '{}', '{}', '{}', '{}', '{}',"
                    " '{}')",
                    lane,
                    partitions,
                    list(claims),
                    list(sequences),
                )

    async def take_over() -> None:
        for _ in range(15):
            await db.worker().claim(*draw.sample(range(8), 5))

    await asyncio.gather(
        work([0, 1, 2, 3, 4, 5], INTAKE),
        work([7, 6, 5, 4, 3, 2], INTAKE),
        work([3, 1, 6, 0], SETTLE),
        work([6, 3, 0, 1], SETTLE),
        take_over(),
    )


async def test_the_lanes_of_a_partition_do_not_wait_for_each_other(db: Tables) -> None:
    worker = await db.worker().claim(0)
    await worker.hold(new(1, ("b", 1)), new(2, ("a", 1)))
    async with db.pool.acquire() as connection, connection.transaction():
        await worker.hold(new(3, ("a", 1)), marks=[mark(1)], by=connection)
        cancel = Move(1, "RESERVED", "CANCELLED", "expired", states="r")
        task = asyncio.create_task(
            worker.settle(cancel, moved=[("release", 1, "b", 1)], marks=[mark(1, topic="order-commands")])
        )
        assert not await is_blocked(db.pool, connection, task)
        await task
    async with db.pool.acquire() as connection:
        begun = connection.transaction()
        await begun.start()
        await worker.hold(new(4, ("a", 1)), by=connection)
        cancel = Move(2, "RESERVED", "CANCELLED", "expired", states="r")
        task = asyncio.create_task(worker.settle(cancel, moved=[("release", 2, "a", 1)]))
        assert await is_blocked(db.pool, connection, task), "the same row of stock"
        await begun.commit()
        await task
    assert await db.counts("a") == (10, 2, 0)


async def test_a_step_is_for_rows_of_its_own_partitions_only(db: Tables) -> None:
    worker = await db.worker().claim(0, 1)
    await worker.hold(new(1, ("c", 1), home=1))
    before = await db.everything()
    for call in (
        worker.hold(new(2, ("a", 1), home=1), partitions=[0]),
        worker.settle(held=[(1, 9, "c", 0, "u", 1, "h", None)]),
        worker.settle(waiting=[(1, 1, SINCE, None)]),
        worker.settle(over=[(1, 1)]),
        worker.settle(kept=[(1, 1, 5)]),
        worker.settle(found=[(1, 1)]),
        worker.settle(marks=[mark(4, partition=1)]),
        worker.settle(waiting=[(1, 1, SINCE, None)], partitions=()),
    ):
        assert await outcome(call) is Fenced
    for call in (
        worker.hold(new(2, ("a", 1), ("c", 1))),
        worker.settle(moved=[("release", 1, "c", 1)]),
        worker.command((5, "c", "receive", 3)),
    ):
        with pytest.raises(asyncpg.PostgresError, match="another partition") as caught:
            await call
        assert caught.value.sqlstate == "OS005"
    assert await db.everything() == before


# Marks


async def test_marks_never_go_back_and_what_is_acknowledged_only_grows(db: Tables) -> None:
    worker = await db.worker().claim(0, 1)
    await worker.hold(partitions=[0, 1], marks=[mark(10, 4), mark(3, partition=1)])
    assert await marks(db) == {(ORDERS, 0): (10, 4, 1010, 9010), (ORDERS, 1): (3, 0, 1003, 9003)}
    await worker.hold(partitions=[0], marks=[mark(8, 2)])
    assert (await marks(db))[ORDERS, 0] == (10, 4, 1010, 9010)
    await worker.hold(partitions=[0], marks=[mark(8, 6)])
    assert (await marks(db))[ORDERS, 0] == (10, 6, 1010, 9010), "a later acknowledgement, of an older read"
    await worker.hold(partitions=[0], marks=[mark(10, 10)])
    assert (await marks(db))[ORDERS, 0] == (10, 10, 1010, 9010), "nothing new was read, all is acknowledged"
    await worker.hold(partitions=[0], marks=[mark(12, 0)])
    assert (await marks(db))[ORDERS, 0] == (12, 10, 1012, 9012)
    assert (await marks(db))[ORDERS, 1] == (3, 0, 1003, 9003)


async def test_a_mark_is_written_without_any_order_and_not_with_what_is_rolled_back(db: Tables) -> None:
    worker = await db.worker().claim(0)
    written = await worker.hold(partitions=[0], marks=[mark(1)])
    assert (written.row["known"], written.counts) == (None, {})
    await worker.settle(marks=[mark(2, topic="order-commands")])
    with pytest.raises(NotEnough):
        await worker.hold(new(1, ("a", 11)), marks=[mark(7)])
    assert (await worker.hold(marks=[mark(2)], partitions=[0])).row["known"] is None
    assert {topic: row[0] for (topic, _), row in (await marks(db)).items()} == {ORDERS: 2, "order-commands": 2}


# Holding


async def test_an_order_is_held_at_its_prices(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    written = await worker.hold(new(1, ("a", 4)), new(2, ("a", 1), user="v"), new(3, ("b", 5)), marks=[mark(3)])
    assert (written.row["known"], written.row["totals"], written.row["prices_of"]) == (None, [400, 100, 150], None)
    assert written.counts == {"a": Counts(10, 5, 2, 1), "b": Counts(5, 5, 2, 1)}
    order = await shop.order(1)
    at = written.row["at"]
    assert {name: value for name, value in order.items() if value is not None} == {
        "order_id": uuid.UUID(oid(1)),
        "home": 0,
        "source_offset": 1,
        "status": "RESERVED",
        "user_id": "u",
        "payment_method": "card",
        "product_ids": ["a"],
        "quantities": [4],
        "prices": [100],
        "states": "h",
        "states_text": "h",
        "total_cents": 400,
        "created_at": at,
        "reserved_at": at,
    }
    assert await shop.ledger("a") == [("hold", 5, [(1, 4), (2, 1)])]
    assert await shop.ledger("b") == [("hold", 5, [(3, 5)])]
    assert await shop.units() == {}


async def test_everything_that_an_order_says_of_itself_is_kept(db: Tables) -> None:
    worker = await db.worker().claim(0)
    given = hold_columns([new(1, ("a", 2), user='ünï "名" \\')])
    given |= {
        "payment_methods": ["c,d"],
        "idempotency_keys": ["k{}" * 60],
        "placed_ats": [SINCE],
        "source_offsets": [2**40],
    }
    await stages.hold(db.pool, worker.intake, worker.intake.step([0]) | given, uuid.uuid4())
    order = await db.order(1)
    assert (order["user_id"], order["payment_method"], order["idempotency_key"]) == ('ünï "名" \\', "c,d", "k{}" * 60)
    assert (order["placed_at"], order["source_offset"]) == (SINCE, 2**40)


FATES = [
    new(1, ("a", 2)),
    new(2, ("a", 3, "x", "insufficient_stock")),
    new(3, ("zz", 1, "x", "unknown_product")),
    new(4, ("few", 2), user="v"),
    new(5, ("few", 2, "x", "user_limit"), user="v"),
]


async def test_one_line_orders_get_the_same_rows_alone_and_among_others(shop: Tables) -> None:
    found = []
    for others in ([], [new(9, ("a", 1), ("b", 2))]):
        await shop.empty()
        await shop.product("a", 0, 10)
        await shop.product("b", 0, 10, 30)
        await shop.product("few", 0, 10, 1, most=3)
        worker = await shop.worker().claim(0)
        written = await worker.hold(*FATES, *others)
        assert written.row["totals"][:5] == [200, None, None, 2, None]
        rows = [dict(await shop.order(n)) for n in range(1, 6)]
        assert {row.pop("created_at") for row in rows} == {written.row["at"]}
        for row in rows:
            ended = {row.pop("reserved_at"), row.pop("cancelled_at")}
            assert ended == {None, written.row["at"]}
        found.append(rows)
    assert found[0] == found[1]
    assert [(row["status"], row["reason"], row["states"], row["prices"]) for row in found[0]] == [
        ("RESERVED", None, "h", [100]),
        ("CANCELLED", "insufficient_stock", "x", [None]),
        ("CANCELLED", "unknown_product", "x", [None]),
        ("RESERVED", None, "h", [1]),
        ("CANCELLED", "user_limit", "x", [None]),
    ]
    assert [row["reasons"] for row in found[0]] == [
        None,
        *([row["reason"]] for row in found[0][1:3]),
        None,
        ["user_limit"],
    ]


async def test_an_order_of_many_lines_keeps_their_order_and_is_held_whole_or_not_at_all(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    written = await worker.hold(
        new(1, ("b", 2), ("a", 3), ("few", 1)),
        new(2, ("a", 1, "r"), ("zz", 1, "x", "unknown_product"), ("b", 9, "x", "insufficient_stock")),
        new(3, ("a", 1)),
    )
    assert written.row["totals"] == [361, None, 100]
    held, refused = await shop.order(1), await shop.order(2)
    assert (held["product_ids"], held["quantities"]) == (["b", "a", "few"], [2, 3, 1])
    assert (held["prices"], held["states"], held["reasons"], held["owners"]) == ([30, 100, 1], "hhh", None, None)
    assert (refused["status"], refused["reason"]) == ("CANCELLED", "unknown_product")
    assert (refused["states"], refused["prices"]) == ("rxx", [None] * 3)
    assert refused["reasons"] == [None, "unknown_product", "insufficient_stock"]
    assert (refused["total_cents"], refused["reserved_at"], refused["cancelled_at"]) == (None, None, written.row["at"])
    assert await shop.ledger("a") == [("hold", 4, [(1, 3), (3, 1)])]
    assert written.counts["a"] == Counts(10, 4, 2, 1)
    assert (written.users, await shop.units()) == ({"few": [("u", 1)]}, {("few", "u"): 1})


async def test_lines_of_other_owners_are_asked_for_and_those_at_home_held_meanwhile(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    written = await worker.hold(new(1, ("c", 2, "a", None, 1), ("a", 3, "h", None, 0), ("zz", 1, "a", None, 5)))
    assert written.row["totals"] is None or written.row["totals"] == [None]
    order = await shop.order(1)
    assert (order["status"], order["states"], order["owners"]) == ("CREATED", "aha", [1, 0, 5])
    assert (order["prices"], order["total_cents"], order["reserved_at"]) == ([None, 100, None], None, None)
    assert [await shop.counts(product_id) for product_id in "ac"] == [(10, 3, 0), (3, 0, 0)]


NEAR = new(1, ("a", 3, "h", None, 0), ("c", 2, "h", None, 1), ("few1", 1, "h", None, 1), ("d", 1, "h", None, 2))


async def test_lines_of_near_owners_are_held_with_their_order_and_settled_with_it(shop: Tables) -> None:
    worker = await shop.worker().claim(0, 1, 2)
    written = await worker.hold(NEAR, new(2, ("a", 1)), new(3, ("c", 1), home=1), partitions=[0, 1, 2])
    order = await shop.order(1)
    assert (order["status"], order["states"], order["owners"]) == ("RESERVED", "hhhh", [0, 1, 1, 2])
    assert (order["prices"], written.row["totals"]) == ([100, 7, 1, 11], [326, 100, 7])
    assert written.row["prices_of"] == ["[100,7,1,11]", None, None], "of orders of several lines only"
    assert [await shop.line(1, p) for p in ("c", "few1", "d")] == [("h", p, None, False) for p in (7, 1, 11)]
    assert await shop.pool.fetchval("SELECT count(*) FROM holds") == 3, "lines at home have no holds"
    assert [await shop.counts(p) for p in ("a", "c", "d")] == [(10, 4, 0), (3, 3, 0), (4, 1, 0)]
    assert written.users == {"few1": [("u", 1)]}
    await worker.settle(
        Move(1, "RESERVED", "CONFIRMED", payment="SUCCESS", charge_id="ch", states="cccc"),
        partitions=[0, 1, 2],
        ended=[(1, p, "h", "c") for p in ("c", "few1", "d")],
        moved=[("commit", 1, p, units) for p, units in (("a", 3), ("c", 2), ("few1", 1), ("d", 1))],
    )
    assert [await shop.line(1, p) for p in ("c", "few1", "d")] == [("c", p, None, True) for p in (7, 1, 11)]
    assert [await shop.counts(p) for p in ("a", "c", "d")] == [(7, 1, 3), (1, 1, 2), (3, 0, 1)]


async def test_a_line_costs_its_near_owner_what_it_costs_its_order_whenever_the_price_changes(db: Tables) -> None:
    worker = await db.worker().claim(0, 1, 2)
    await worker.hold(new(2, ("a", 1)))
    copy = "SELECT r.* FROM orders o, jsonb_populate_record(o, jsonb_build_object('order_id', $1::text)) r"
    waits = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"
    async with db.pool.acquire() as other:
        elsewhere = other.transaction()
        await elsewhere.start()
        await other.execute(f"INSERT INTO orders {copy}", str(oid(1)))  # another home takes the id in, and gives it up
        holding = asyncio.create_task(worker.hold(NEAR, partitions=[0, 1, 2]))
        while not await db.pool.fetchval(waits):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await db.pool.execute("UPDATE stock SET price_cents = price_cents + 1")
        await elsewhere.rollback()
        await holding
    assert (await db.order(1))["prices"] == [100, 7, 1, 11]
    assert [(await db.line(1, p))[1] for p in ("c", "few1", "d")] == [7, 1, 11]


async def test_a_line_of_a_near_owner_needs_its_lane_and_that_nothing_is_known_of_it(shop: Tables) -> None:
    worker = await shop.worker().claim(0, 1, 2)
    await worker.settle(partitions=[1], held=[(1, 1, "c", 0, "u", 2, "r", None)])
    before = await shop.everything()
    with pytest.raises(HoldThere):  # a release came before it
        await worker.hold(NEAR, partitions=[0, 1, 2])
    with pytest.raises(asyncpg.PostgresError, match=r"another partition|foreign row"):
        await worker.hold(NEAR._replace(n=2), partitions=[0, 1])
    assert await shop.everything() == before
    await worker.hold(NEAR._replace(n=3), partitions=[0, 1, 2])
    with pytest.raises(OrderMoved):  # its owner has asked before what is known of it
        await worker.settle(partitions=[1], held=[(1, 3, "c", 0, "u", 2, "r", None)])


@pytest.mark.parametrize("lines", [[("zz", 1)], [("a", 1), ("zz", 1)], [("a", 1), ("a0", 1, "a", None, 3), ("zz", 1)]])
async def test_a_hold_of_what_is_not_in_the_catalogue_is_never_written(shop: Tables, lines: list[Any]) -> None:
    worker = await shop.worker().claim(0)
    before = await shop.everything()
    with pytest.raises(NotEnough):
        await worker.hold(new(1, *lines), new(2, ("a", 1)))
    assert await shop.everything() == before


async def test_where_an_order_is_known_nothing_is_written_and_no_lane_steps(shop: Tables) -> None:
    worker = await shop.worker().claim(0, 1)
    await worker.hold(new(1, ("a", 1)), new(2, ("a", 1)))
    before = await shop.everything()
    written = await worker.hold(
        new(2, ("b", 1)), new(1, ("a", 1)), new(3, ("c", 1), home=1), marks=[mark(9), mark(9, partition=1)]
    )
    assert sorted(written.row["known"]) == [oid(1), oid(2)]
    assert (written.counts, written.users, written.row["totals"]) == ({}, {}, None)
    assert await shop.everything() == before
    assert worker.intake.sequences == {0: 1, 1: 0}
    assert (await worker.hold(new(3, ("c", 1), home=1))).row["known"] is None


@pytest.mark.parametrize("ends", ["commit", "rollback"])
async def test_of_two_homes_that_take_the_same_id_in_one_waits_for_the_other(shop: Tables, ends: str) -> None:
    here, there = await shop.worker().claim(0), await shop.worker().claim(1)
    before = await shop.everything()
    async with shop.pool.acquire() as connection:
        begun = connection.transaction()
        await begun.start()
        await here.hold(new(1, ("a", 1)), by=connection)
        task = asyncio.create_task(outcome(there.hold(new(1, ("c", 1), home=1), new(2, ("c", 1), home=1))))
        assert await is_blocked(shop.pool, connection, task)
        await (begun.commit() if ends == "commit" else begun.rollback())
    if ends == "commit":
        assert await task is asyncpg.SerializationError, "tried again, and known then"
        assert await shop.counts("c") == (3, 0, 0)
        assert there.intake.sequences == {1: 0}
        assert (await there.hold(new(1, ("c", 1), home=1))).row["known"] == [oid(1)]
        assert (await shop.order(1))["home"] == 0
    else:
        assert await task is None
        assert (await shop.order(1))["home"] == 1
        assert before["stock"] != (await shop.everything())["stock"]


async def test_homes_that_take_the_same_ids_in_never_deadlock(shop: Tables) -> None:
    homes = [
        (0, "a", await shop.worker().claim(0)),
        (1, "c", await shop.worker().claim(1)),
        (2, "d", await shop.worker().claim(2)),
    ]
    await shop.worker().claim(3)  # of no product

    async def take_in(home: int, product_id: str, worker: Worker, ids: range) -> None:
        left = [new(n, (product_id, 1, "x", "insufficient_stock"), home=home) for n in ids]
        while left:
            try:
                written = await worker.hold(*left)
            except asyncpg.SerializationError:
                continue
            known = written.row["known"]
            left = [] if known is None else [order for order in left if order.order_id not in known]

    for k in range(10):
        await asyncio.gather(*(take_in(*home, range(10 * k, 10 * k + 10)) for home in homes))
    assert await shop.pool.fetchval("SELECT count(*) FROM orders") == 100


@pytest.mark.parametrize(
    "orders",
    [
        [new(1, ("a", 11))],
        [new(1, ("a", 6)), new(2, ("a", 5))],
        [new(1, ("b", 1), ("a", 6)), new(2, ("a", 5))],
        [new(1, ("b", 1)), new(2, ("b", 5), home=0), new(3, ("c", 1), home=1)],
    ],
)
async def test_more_than_there_is_is_refused_whole(shop: Tables, orders: list[New]) -> None:
    worker = await shop.worker().claim(0, 1)
    before = await shop.everything()
    with pytest.raises(NotEnough):
        await worker.hold(*orders, marks=[mark(4)])
    assert await shop.everything() == before
    assert worker.intake.sequences == {0: 0, 1: 0}
    await worker.hold(new(1, ("a", 10)))
    assert await shop.counts("a") == (10, 10, 0)


async def test_a_user_never_has_more_of_a_product_than_its_limit(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    written = await worker.hold(new(1, ("few", 2)), new(2, ("few", 3), user="v"), new(3, ("a", 9)))
    assert {name: sorted(users) for name, users in written.users.items()} == {"few": [("u", 2), ("v", 3)]}
    before = await shop.everything()
    for orders in (
        [new(4, ("few", 2))],
        [new(4, ("few", 1)), new(5, ("few", 1))],
        [new(4, ("few", 1), ("a", 1)), new(5, ("b", 1), ("few", 1))],
        [new(4, ("few", 4), user="w")],
        [new(4, ("a", 1), ("few", 1)), new(5, ("few", 1), user="v")],
    ):
        with pytest.raises(NotEnough):
            await worker.hold(*orders)
    assert await shop.everything() == before
    await worker.hold(new(6, ("few", 1)))
    assert await shop.units() == {("few", "u"): 3, ("few", "v"): 3}


async def test_the_ledger_has_one_row_a_product_and_movement_of_a_step(shop: Tables) -> None:
    worker = await shop.worker().claim(0, 1)
    await worker.hold(partitions=[0])
    await worker.hold(new(1, ("a", 1), ("b", 2)), new(2, ("b", 1)), new(3, ("c", 1), home=1), new(4, ("a", 2)))
    rows = await shop.pool.fetch(
        "SELECT product_id, partition, lane::text, sequence, command_id, reason, at = (SELECT max(created_at) FROM orders)"
        " AS then FROM ledger ORDER BY product_id"
    )
    assert [tuple(row) for row in rows] == [
        ("a", 0, INTAKE, 2, None, None, True),
        ("b", 0, INTAKE, 2, None, None, True),
        ("c", 1, INTAKE, 1, None, None, True),
    ]
    assert await shop.ledger("a") == [("hold", 3, [(1, 1), (4, 2)])]
    assert await shop.ledger("b") == [("hold", 3, [(1, 2), (2, 1)])]


# Settling: orders


async def times(shop: Tables, n: int) -> dict[str, datetime]:
    order = await shop.order(n)
    names = ("created_at", "reserved_at", "paid_at", "confirmed_at", "cancelled_at", "refunded_at")
    return {name: order[name] for name in names if order[name] is not None}


async def test_a_sale_at_home_is_paid_and_confirmed_at_once(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    held = (await worker.hold(new(1, ("a", 4)), new(2, ("a", 1), ("b", 2)))).row["at"]
    written = await worker.settle(
        Move(1, "RESERVED", "CONFIRMED", None, "SUCCESS", "ch-1", 400, "c"),
        Move(2, "RESERVED", "CONFIRMED", None, "SUCCESS", "ch-2", 160, "cc"),
        moved=[("commit", 1, "a", 4), ("commit", 2, "a", 1), ("commit", 2, "b", 2)],
    )
    at = written.row["at"]
    assert await times(shop, 1) == {"created_at": held, "reserved_at": held, "paid_at": at, "confirmed_at": at}
    order = await shop.order(2)
    assert (order["status"], order["payment"], order["charge_id"]) == ("CONFIRMED", "SUCCESS", "ch-2")
    assert (order["states"], order["prices"], order["total_cents"]) == ("cc", [100, 30], 160)
    assert written.counts == {"a": Counts(5, 0, 3, 1), "b": Counts(3, 0, 3, 1)}
    assert [await shop.counts(p) for p in "ab"] == [(5, 0, 5), (3, 0, 2)]
    assert (await shop.ledger("a"))[1] == ("commit", 5, [(1, 4), (2, 1)])
    rows = await shop.pool.fetch("SELECT lane::text, sequence FROM ledger WHERE movement = 'commit'")
    assert {tuple(row) for row in rows} == {(SETTLE, 1)}


async def test_each_transition_has_its_time_and_keeps_the_earlier_ones(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    ats = [(await worker.hold(new(1, ("a", 3, "h", None, 0), ("c", 1, "a", None, 1)))).row["at"]]

    async def move(*given: Any, **more: Any) -> None:
        ats.append((await worker.settle(Move(1, *given, **more))).row["at"])

    await move("CREATED", "CREATED", total=None, states="ha")
    await move("CREATED", "RESERVED", total=307, states="hh", prices="{100,7}")
    assert await times(shop, 1) == {"created_at": ats[0], "reserved_at": ats[2]}
    order = await shop.order(1)
    assert (order["total_cents"], order["prices"], order["states"], order["payment"]) == (307, [100, 7], "hh", None)
    await move("RESERVED", "PAID", None, "SUCCESS", "ch", 307, "cg")
    await move("PAID", "PAID", None, "SUCCESS", "ch", 307)
    assert (await shop.order(1))["states"] == "cg", "null leaves the lines as they are"
    await move("PAID", "CONFIRMED", None, "SUCCESS", "ch", 307, "cc")
    assert await times(shop, 1) == {
        "created_at": ats[0],
        "reserved_at": ats[2],
        "paid_at": ats[3],
        "confirmed_at": ats[5],
    }
    confirmed = await times(shop, 1)
    ats.append(
        (
            await worker.settle(
                Move(1, "CONFIRMED", "CANCELLED", "cancelled_by_user", "REFUND_DUE", "ch", 307, "nb", command=(3, 99))
            )
        ).row["at"]
    )
    assert await times(shop, 1) == confirmed | {"cancelled_at": ats[6]}
    await move("CANCELLED", "CANCELLED", "cancelled_by_user", "REFUNDED", "ch", 307)
    assert await times(shop, 1) == confirmed | {"cancelled_at": ats[6], "refunded_at": ats[7]}
    order = await shop.order(1)
    assert (order["command_partition"], order["command_offset"], order["states"]) == (3, 99, "nb")


@pytest.mark.parametrize("payment", [None, "VOID_DUE", "FAILED"])
async def test_an_end_before_the_payment(shop: Tables, payment: str | None) -> None:
    worker = await shop.worker().claim(0)
    held = (await worker.hold(new(1, ("a", 4)))).row["at"]
    reason = "payment_declined" if payment == "FAILED" else "expired"
    end = Move(1, "RESERVED", "CANCELLED", reason, payment, None, 400, "r")
    at = (await worker.settle(end, moved=[("release", 1, "a", 4)])).row["at"]
    assert await times(shop, 1) == {"created_at": held, "reserved_at": held, "cancelled_at": at}
    assert ((await shop.order(1))["reason"], (await shop.order(1))["payment"]) == (reason, payment)
    assert await shop.counts("a") == (10, 0, 0)
    assert (await shop.ledger("a"))[1] == ("release", 4, [(1, 4)])
    if payment == "VOID_DUE":
        repaid = Move(1, "CANCELLED", "CANCELLED", reason, "VOIDED", None, 400)
        given_back = (await worker.settle(repaid)).row["at"]
        assert (await times(shop, 1))["refunded_at"] == given_back
        late = Move(1, "CANCELLED", "CANCELLED", reason, "VOID_DUE", "ch", 400)
        await worker.settle(late)
        assert "refunded_at" not in await times(shop, 1), "there is money again that goes back"
        await worker.settle(Move(1, "CANCELLED", "CANCELLED", reason, "REFUSED", "ch", 400))
        assert "refunded_at" not in await times(shop, 1)


async def test_a_return_brings_sold_units_back(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    await worker.hold(new(1, ("a", 4)), new(2, ("a", 1)))
    await worker.settle(
        *(Move(n, "RESERVED", "CONFIRMED", None, "SUCCESS", "ch", 400, "c") for n in (1, 2)),
        moved=[("commit", 1, "a", 4), ("commit", 2, "a", 1)],
    )
    written = await worker.settle(
        Move(1, "CONFIRMED", "CANCELLED", "cancelled_by_user", "REFUND_DUE", "ch", 400, "n"),
        moved=[("return", 1, "a", 4)],
    )
    assert (written.counts["a"][:2], await shop.counts("a")) == ((9, 0), (9, 0, 1))


async def test_all_movements_of_a_product_in_one_step(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    await worker.hold(*(new(n, ("a", n)) for n in (1, 2, 3)))
    await worker.settle(
        Move(1, "RESERVED", "CONFIRMED", None, "SUCCESS", "ch", 100, "c"), moved=[("commit", 1, "a", 1)]
    )
    written = await worker.settle(
        Move(1, "CONFIRMED", "CANCELLED", "cancelled_by_user", "REFUND_DUE", "ch", 100, "n"),
        Move(2, "RESERVED", "CONFIRMED", None, "SUCCESS", "ch", 200, "c"),
        Move(3, "RESERVED", "CANCELLED", "expired", "VOID_DUE", None, 300, "r"),
        moved=[("return", 1, "a", 1), ("commit", 2, "a", 2), ("release", 3, "a", 3), ("hold", 8, "a", 4)],
        held=[(0, 8, "a", 2, "w", 4, "h", None)],
    )
    assert written.counts == {"a": Counts(8, 4, 4, 1)}
    assert await shop.counts("a") == (8, 4, 2)
    assert {(m, q) for m, q, _ in (await shop.ledger("a"))[2:]} == {
        ("return", 1),
        ("commit", 2),
        ("release", 3),
        ("hold", 4),
    }


@pytest.mark.parametrize("moved", [("release", 1, "a", 2), ("commit", 1, "a", 2), ("return", 1, "a", 1)])
async def test_units_that_were_never_held_or_sold_do_not_move(shop: Tables, moved: tuple[str, int, str, int]) -> None:
    worker = await shop.worker().claim(0)
    await worker.hold(new(1, ("a", 1)))
    before = await shop.everything()
    with pytest.raises(asyncpg.CheckViolationError):
        await worker.settle(moved=[moved])
    assert await shop.everything() == before


@pytest.mark.parametrize("wrong", ["status", "home", "unknown", "twice"])
async def test_an_order_that_is_not_where_its_home_knows_it_moves_nothing(shop: Tables, wrong: str) -> None:
    worker = await shop.worker().claim(0, 1)
    await worker.hold(new(1, ("a", 1)), new(2, ("a", 1)), new(3, ("c", 1), home=1))
    before = await shop.everything()
    n, was = {"status": (2, "CREATED"), "home": (3, "RESERVED"), "unknown": (4, "RESERVED"), "twice": (1, "RESERVED")}[
        wrong
    ]
    with pytest.raises(OrderMoved):
        await worker.settle(
            Move(1, "RESERVED", "CANCELLED", "expired", states="r"),
            Move(n, was, "CANCELLED", "expired", states="r"),
            moved=[("release", 1, "a", 1)],
            marks=[mark(5, topic="order-commands")],
        )
    assert await shop.everything() == before
    assert worker.settling.sequences == {0: 0, 1: 0}


async def test_lines_prices_and_reasons_are_written_as_wholes(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    await worker.hold(new(1, ("a", 1, "h", None, 0), ("c", 1, "a", None, 1), ("d", 1, "a", None, 2)))
    await worker.settle(
        Move(
            1,
            "CREATED",
            "CREATED",
            total=None,
            states="hxa",
            reasons="{NULL,user_limit,NULL}",
            prices="{100,NULL,NULL}",
        )
    )
    order = await shop.order(1)
    assert (order["states"], order["reasons"], order["prices"]) == (
        "hxa",
        [None, "user_limit", None],
        [100, None, None],
    )
    await worker.settle(
        Move(1, "CREATED", "CANCELLED", "user_limit", None, None, None, "rxl", prices="{100,NULL,11}"),
        moved=[("release", 1, "a", 1)],
    )
    order = await shop.order(1)
    assert (order["states"], order["reasons"], order["prices"]) == ("rxl", [None, "user_limit", None], [100, None, 11])
    with pytest.raises(asyncpg.CheckViolationError, match="orders_have_lines"):
        await worker.settle(Move(1, "CANCELLED", "CANCELLED", "user_limit", states="rx"))


@pytest.mark.parametrize(
    "move",
    [
        Move(1, "RESERVED", "CONFIRMED", None, None),
        Move(1, "RESERVED", "CANCELLED", None),
        Move(1, "RESERVED", "PAID", "expired", "SUCCESS"),
        Move(1, "RESERVED", "CREATED"),
    ],
)
async def test_a_status_that_contradicts_itself_is_a_fault_and_not_a_lack_of_units(shop: Tables, move: Move) -> None:
    worker = await shop.worker().claim(0)
    await worker.hold(new(1, ("a", 1)))
    before = await shop.everything()
    assert await outcome(worker.settle(move)) is asyncpg.CheckViolationError
    assert await shop.everything() == before


async def test_a_total_is_written_once(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    await worker.hold(new(1, ("a", 1)), new(2, ("a", 1, "h", None, 0), ("c", 2, "a", None, 1)))
    await worker.settle(
        Move(1, "RESERVED", "CANCELLED", "expired", total=999, states="r"),
        Move(2, "CREATED", "RESERVED", total=114, states="hh", prices="{100,7}"),
        moved=[("release", 1, "a", 1)],
    )
    await worker.settle(Move(2, "RESERVED", "PAID", None, "SUCCESS", "ch", 999, "cg"), moved=[("commit", 2, "a", 1)])
    assert [(await shop.order(n))["total_cents"] for n in (1, 2)] == [100, 114]


async def test_what_users_have_goes_down_with_releases_and_returns(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    await worker.hold(new(1, ("few", 2)), new(2, ("few", 1)), new(3, ("few", 3), user="v"), new(4, ("a", 1)))
    written = await worker.settle(
        Move(1, "RESERVED", "CANCELLED", "expired", states="r"),
        Move(3, "RESERVED", "CONFIRMED", None, "SUCCESS", "ch", states="c"),
        Move(4, "RESERVED", "CANCELLED", "expired", states="r"),
        moved=[("release", 1, "few", 2), ("commit", 3, "few", 3), ("release", 4, "a", 1)],
        users=[("few", "u", -2), ("a", "u", -1)],
    )
    assert written.users == {"few": [("u", 1)]}
    assert await shop.units() == {("few", "u"): 1, ("few", "v"): 3}
    written = await worker.settle(
        Move(3, "CONFIRMED", "CANCELLED", "cancelled_by_user", "REFUND_DUE", "ch", states="n"),
        moved=[("return", 3, "few", 3)],
        users=[("few", "v", -3)],
    )
    assert (written.users, await shop.units()) == ({"few": [("v", 0)]}, {("few", "u"): 1, ("few", "v"): 0})
    await worker.hold(new(5, ("few", 3), user="v"), new(6, ("few", 2)))


async def test_a_limit_that_came_after_a_hold_does_not_stop_its_release(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    await worker.hold(new(1, ("a", 5)), new(2, ("a", 2), user="v"))
    async with shop.pool.acquire() as connection, connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")
        await connection.execute("UPDATE stock SET limit_per_user = 2, limited_since = now() WHERE product_id = 'a'")
    await worker.settle(
        Move(1, "RESERVED", "CANCELLED", "expired", states="r"), moved=[("release", 1, "a", 5)], users=[("a", "u", -5)]
    )
    assert (await shop.counts("a"), await shop.units()) == ((10, 2, 0), {})
    with pytest.raises(NotEnough):
        await worker.hold(new(3, ("a", 3)))


# Settling: lines of other homes' orders


async def test_a_line_of_another_homes_order_is_held_at_its_price_or_refused(shop: Tables) -> None:
    worker = await shop.worker().claim(1)
    written = await worker.settle(
        partitions=[1],
        held=[
            (1, 1, "few1", 0, "u", 2, "h", None),
            (1, 2, "c", 0, "u", 1, "x", "insufficient_stock"),
            (1, 3, "c", 2, "v", 2, "h", None),
            (1, 4, "c", 2, "v", 1, "r", None),
            (1, 5, "zz", 2, "v", 1, "x", "unknown_product"),
        ],
        moved=[("hold", 1, "few1", 2), ("hold", 3, "c", 2)],
        users=[("few1", "u", 2), ("c", "v", 2)],
    )
    assert written.row["new_hold_prices"] == [1, None, 7, None, None]
    assert written.counts == {"few1": Counts(100, 2, 2, 1), "c": Counts(3, 2, 2, 1)}
    assert (written.users, await shop.units()) == ({"few1": [("u", 2)]}, {("few1", "u"): 2})
    assert await shop.line(1, "few1") == ("h", 1, None, False)
    assert await shop.line(2, "c") == ("x", None, "insufficient_stock", True)
    assert await shop.line(4, "c") == ("r", None, None, True)
    rows = await shop.pool.fetch(
        statements("stages.sql")["holds_of"], [oid(1), oid(2), oid(3), oid(3)], ["few1", "few1", "c", "few1"]
    )
    assert [tuple(row)[2:] for row in sorted(rows, key=lambda row: row["order_id"])] == [
        ("h", 1, None, 2, "u", 0, 1),
        ("h", 7, None, 2, "v", 2, 1),
    ]


async def test_held_lines_are_committed_released_or_returned(shop: Tables) -> None:
    worker = await shop.worker().claim(1)
    await worker.settle(
        partitions=[1],
        held=[(1, n, "few1", 0, "u", 1, "h", None) for n in (1, 2, 3)],
        moved=[("hold", n, "few1", 1) for n in (1, 2, 3)],
        users=[("few1", "u", 1)] * 3,
    )
    written = await worker.settle(
        partitions=[1],
        ended=[(1, "few1", "h", "c"), (2, "few1", "h", "r"), (3, "few1", "h", "n")],
        moved=[("commit", 1, "few1", 1), ("release", 2, "few1", 1), ("release", 3, "few1", 1)],
        users=[("few1", "u", -1)] * 2,
    )
    assert written.counts["few1"][:2] == (99, 0)
    assert [await shop.line(n, "few1") for n in (1, 2, 3)] == [(state, 1, None, True) for state in "crn"]
    assert written.users == {"few1": [("u", 1)]}
    await worker.settle(
        partitions=[1],
        ended=[(1, "few1", "c", "n")],
        moved=[("return", 1, "few1", 1)],
        users=[("few1", "u", -1)],
    )
    assert (await shop.counts("few1"), await shop.units()) == ((100, 0, 0), {("few1", "u"): 0})


@pytest.mark.parametrize("wrong", [(1, "c", "c", "n"), (1, "few1", "h", "c"), (2, "c", "h", "c"), (3, "d", "h", "c")])
async def test_a_hold_that_is_not_where_its_owner_knows_it_moves_nothing(shop: Tables, wrong: Any) -> None:
    worker = await shop.worker().claim(1, 2)
    await worker.settle(
        partitions=[1, 2],
        held=[(1, 1, "c", 0, "u", 1, "h", None), (2, 3, "d", 0, "u", 1, "h", None)],
        moved=[("hold", 1, "c", 1), ("hold", 3, "d", 1)],
    )
    before = await shop.everything()
    with pytest.raises(OrderMoved):  # the last one has another owner
        await worker.settle(partitions=[1], ended=[wrong], moved=[("commit", 1, "c", 1)])
    assert await shop.everything() == before


@pytest.mark.parametrize(
    ("held", "moved", "users"),
    [
        ([(1, 1, "c", 0, "u", 4, "h", None)], [("hold", 1, "c", 4)], []),
        ([(1, 1, "zz", 0, "u", 1, "h", None)], [("hold", 1, "zz", 1)], []),
        (
            [(1, n, "few1", 0, "u", 2, "h", None) for n in (1, 2)],
            [("hold", n, "few1", 2) for n in (1, 2)],
            [("few1", "u", 2)] * 2,
        ),
    ],
    ids=["units", "product", "limit"],
)
async def test_a_line_that_can_not_be_held_is_written_by_nobody(
    shop: Tables, held: Any, moved: Any, users: Any
) -> None:
    worker = await shop.worker().claim(1)
    before = await shop.everything()
    with pytest.raises(NotEnough):
        await worker.settle(partitions=[1], held=held, moved=moved, users=users)
    assert await shop.everything() == before


# Settling: what waits, and what is kept


async def test_orders_wait_until_they_are_over(shop: Tables) -> None:
    worker = await shop.worker().claim(0, 1)
    await worker.hold(*(new(n, ("a", 1)) for n in (1, 2)))
    later = datetime(2026, 1, 3, tzinfo=UTC)
    await worker.settle(
        partitions=[0, 1],
        waiting=[(0, 2, later, "reply"), (0, 1, SINCE, None), (1, 3, SINCE, None)],
    )

    async def waits(home: int, most: int = 9, since: datetime = SINCE) -> list[tuple[Any, ...]]:
        rows = await shop.pool.fetch(statements("stages.sql")["waiting_orders"], [home], since, most)
        return [(uuid.UUID(row["order_id"]).int, row["reply_to"]) for row in rows]

    assert await waits(0) == [(1, None), (2, "reply")], "the oldest first"
    assert await waits(0, 1) == [(1, None)]
    assert await waits(0, since=later) == [(2, "reply")]
    await worker.settle(waiting=[(0, 2, SINCE, None)], over=[(0, 3)])
    assert await waits(0) == [(1, None), (2, None)]
    assert await waits(1) == [(3, None)], "over in another home is not over"
    assert await shop.pool.fetchval("SELECT since FROM waiting WHERE order_id = $1", oid(2)) == later
    await worker.settle(over=[(0, 1), (0, 2), (0, 77)])
    assert await waits(0) == []


async def test_cancels_before_their_order_are_kept_until_it_is_found(shop: Tables) -> None:
    worker = await shop.worker().claim(0, 1, 2)
    await worker.settle(kept=[(0, 1, 5), (0, 2, 6)])
    await worker.settle(partitions=[0, 1], kept=[(0, 1, 9), (1, 1, 3)])

    async def kept() -> list[tuple[int, int, int]]:
        rows = await shop.pool.fetch("SELECT * FROM kept_commands")
        return sorted((row["partition"], row["order_id"].int, row["offset"]) for row in rows)

    assert await kept() == [(0, 1, 5), (0, 2, 6), (1, 1, 3)]
    assert await shop.pool.fetch(statements("stages.sql")["kept_found"], [0, 1], 9) == []
    outlived = statements("stages.sql")["kept_outlived"]
    assert await shop.pool.fetch(outlived, [0, 1], timedelta(hours=1), 9) == []
    rows = await shop.pool.fetch(outlived, [0], timedelta(0), 9)
    assert sorted((row["partition"], uuid.UUID(row["order_id"]).int) for row in rows) == [(0, 1), (0, 2)]
    row = (await worker.hold(new(1, ("d", 1), home=2))).row
    found = zip(row["kept_ids"], row["kept_partitions"], row["kept_offsets"], strict=True)
    assert sorted(found) == [(str(oid(1)), 0, 5), (str(oid(1)), 1, 3)]
    rows = await shop.pool.fetch(outlived, [0, 1], timedelta(0), 9)
    assert [uuid.UUID(row["order_id"]).int for row in rows] == [2], "the other one's order has come"
    rows = await shop.pool.fetch(statements("stages.sql")["kept_found"], [0, 1], 9)
    assert sorted((row["partition"], row["home"]) for row in rows) == [(0, 2), (1, 2)]
    await worker.settle(found=[(0, 1)])
    assert await kept() == [(0, 2, 6), (1, 1, 3)]
    await worker.settle(kept=[(0, 2, 7)], found=[(0, 2)])
    assert await kept() == [(0, 2, 7), (1, 1, 3)], "another cancel, read while the first one was forgotten"


async def test_what_is_no_order_is_told_where_there_is_no_order_under_its_id(shop: Tables) -> None:
    worker = await shop.worker().claim(0, 2)
    await worker.hold(new(1, ("d", 1), home=2))
    written = await worker.settle(rejected=[(0, 1, 5), (0, 2, 6), (0, 3, 7)])
    assert sorted(written.row["told_rejects"]) == [2, 3]
    await worker.hold(new(2, ("a", 1)))
    written = await worker.settle(rejected=[(0, 2, 6), (0, 3, 7)])  # read again: an order has come since
    assert written.row["told_rejects"] == [2]
    rows = await shop.pool.fetch('SELECT order_id, partition, "offset", reason, detail FROM rejections ORDER BY 1')
    assert [(row["order_id"].int, *row[1:]) for row in rows] == [
        (n, 0, offset, "invalid_order", 'items: "\\"') for n, offset in ((2, 6), (3, 7))
    ]


async def test_a_step_without_anything_moves_nothing_but_its_lane(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    before = await shop.everything()
    written = await worker.settle()
    assert (written.counts, written.users, written.row["new_hold_prices"]) == ({}, {}, None)
    assert {table for table, rows in (await shop.everything()).items() if rows != before[table]} == {"lanes"}


# Stock commands


async def commands(
    worker: Worker, *given: tuple[Any, ...], partitions: Any = (0,), offset: int | None = None
) -> list[str]:
    written = await worker.command(*given, partitions=partitions, offset=offset)
    return list(written.row["each_outcome"])


async def test_units_are_received_adjusted_and_set(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    await worker.hold(new(1, ("a", 4)))
    written = await worker.command(
        (1, "a", "receive", 5), (2, "a", "adjust", -3), (3, "a", "set", 20), (4, "b", "set", 5), (5, "a", "adjust", 1)
    )
    assert written.row["each_outcome"] == ["applied"] * 5
    assert written.counts == {"a": Counts(21, 4, 6, 1), "b": Counts(5, 0, 2, 1)}
    row = await shop.pool.fetchrow("SELECT received, adjusted FROM stock WHERE product_id = 'a'")
    assert tuple(row) == (5, 6)
    rows = await shop.pool.fetch(
        "SELECT command_id, movement, quantity, reason FROM ledger WHERE command_id IS NOT NULL"
    )
    assert sorted((r["command_id"].int, r["movement"], r["quantity"], r["reason"]) for r in rows) == [
        (1, "receive", 5, "why"),
        (2, "adjust", -3, "why"),
        (3, "adjust", 8, "why"),
        (5, "adjust", 1, "why"),
    ]
    changes = await shop.pool.fetch("SELECT outcome, change, partition FROM stock_commands ORDER BY command_id")
    assert [tuple(row) for row in changes] == [("applied", change, 0) for change in (5, -3, 8, 0, 1)]
    await worker.command((6, "a", "set", 4))
    assert await shop.counts("a") == (4, 4, 0)


async def test_a_command_that_comes_again_changes_nothing(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    given = [(1, "a", "receive", 5), (2, "a", "set", 3), (3, "a", "receive", 1)]
    assert await commands(worker, *given, given[0]) == ["applied"] * 3 + ["known"]
    before = await shop.everything()
    assert await commands(worker, *given) == ["known"] * 3
    after = await shop.everything()
    assert {table for table in after if after[table] != before[table]} == {"lanes"}
    assert await shop.counts("a") == (4, 0, 0)


async def test_a_set_moves_what_it_moved_when_it_was_decided(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    written = await worker.command((1, "a", "set", 4), (2, "a", "receive", 6), (1, "a", "set", 4))
    assert written.row["each_change"] == [-6, 6, -6]
    assert written.row["each_outcome"] == ["applied", "applied", "known"]
    written = await worker.command((3, "a", "set", 4, 7), (1, "a", "set", 4, -6), (1, "a", "set", 4, 0))
    assert written.row["each_outcome"] == ["applied", "known", "known"]
    assert written.row["each_change"] == [7, -6, -6]
    assert await shop.counts("a") == (17, 0, 0)
    await worker.hold(new(1, ("a", 9)))
    written = await worker.command((4, "a", "set", 20, -9), (5, "a", "set", 8))
    assert written.row["each_outcome"] == ["insufficient_stock"] * 2
    assert await shop.counts("a") == (17, 9, 0)


async def test_another_command_under_the_same_id_is_noticed(shop: Tables) -> None:
    worker = await shop.worker().claim(0, 1)
    assert await commands(worker, (1, "a", "receive", 5), (1, "a", "receive", 6)) == ["applied", "reused"]
    others = [(1, "b", "receive", 5), (1, "a", "adjust", 5), (1, "a", "receive", 4), (1, "zz", "receive", 5)]
    assert await commands(worker, *others) == ["reused"] * 4
    assert await commands(worker, (1, "c", "receive", 5), partitions=[1]) == ["reused"]
    assert await commands(worker, (2, "a", "adjust", -99), (2, "a", "adjust", 1)) == ["insufficient_stock", "reused"]
    assert await shop.counts("a") == (15, 0, 0)
    assert await shop.counts("c") == (3, 0, 0)


async def test_a_refused_command_that_comes_again_is_decided_again(shop: Tables) -> None:
    worker = await shop.worker().claim(0, 1)
    await worker.hold(new(1, ("a", 8)))
    refused = [(1, "a", "adjust", -3), (2, "a", "set", 7), (3, "zz", "receive", 1), (4, "a", "adjust", -11)]
    why = ["insufficient_stock", "insufficient_stock", "unknown_product", "insufficient_stock"]
    assert await commands(worker, *refused, partitions=[0, 1]) == why
    assert await shop.counts("a") == (10, 8, 0)
    assert await commands(worker, *refused) == why
    await worker.settle(Move(1, "RESERVED", "CANCELLED", "expired", states="r"), moved=[("release", 1, "a", 8)])
    await shop.product("zz", 0, 0)
    assert await commands(worker, *refused) == ["applied"] * 3 + ["insufficient_stock"]
    assert await shop.counts("a") == (7, 0, 0)
    assert await shop.counts("zz") == (1, 0, 0)
    rows = await shop.pool.fetch(
        "SELECT command_id, outcome, change, partition FROM stock_commands ORDER BY command_id"
    )
    assert [(row["command_id"].int, *tuple(row)[1:]) for row in rows] == [
        (1, "applied", -3, 0),
        (2, "applied", 0, 0),
        (3, "applied", 1, 0),
        (4, "insufficient_stock", 0, 0),
    ]


async def test_a_refused_command_whose_own_record_is_read_again_stays_refused_as_its_dead_letter_says(
    shop: Tables,
) -> None:
    worker = await shop.worker().claim(0)
    refused = (1, "a", "adjust", -11)
    assert await commands(worker, refused, offset=5) == ["insufficient_stock"]
    assert await commands(worker, (2, "a", "receive", 5), offset=6) == ["applied"]
    assert await commands(worker, refused, offset=5) == ["insufficient_stock"]
    assert await shop.counts("a") == (15, 0, 0)
    assert await commands(worker, refused, offset=7) == ["applied"], "somebody sent it again"
    assert await commands(worker, refused, offset=5) == ["known"]
    assert await shop.counts("a") == (4, 0, 0)


async def test_there_are_never_more_units_than_can_be_counted(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    await shop.product("full", 0, ON_HAND_MAX)
    await worker.hold(new(1, ("full", 2)))
    sold = Move(1, "RESERVED", "CONFIRMED", payment="SUCCESS", states="c")
    await worker.settle(sold, moved=[("commit", 1, "full", 2)])
    many, beyond = "too_many_units", ON_HAND_MAX + 1
    given = [(1, "full", "receive", 3), (2, "full", "receive", 2), (3, "full", "adjust", 1), (4, "full", "set", beyond)]
    assert await commands(worker, *given) == [many, "applied", many, many]
    revoked = Move(1, "CONFIRMED", "CANCELLED", "cancelled_by_user", payment="REFUND_DUE", states="n")
    await worker.settle(revoked, moved=[("return", 1, "full", 2)])
    assert await shop.counts("full") == (ON_HAND_MAX + 2, 0, 0)
    assert await commands(worker, (5, "full", "adjust", -1), (6, "full", "receive", 1)) == ["applied", many]


async def test_a_refusal_belongs_to_the_partition_of_its_product(shop: Tables) -> None:
    worker = await shop.worker().claim(0, 1)
    assert await commands(worker, (1, "c", "adjust", -9), partitions=[0, 1]) == ["insufficient_stock"]
    assert await shop.pool.fetchval("SELECT partition FROM stock_commands") == 1


async def test_of_two_owners_that_get_the_same_command_id_one_applies_it(shop: Tables) -> None:
    here, there = await shop.worker().claim(0), await shop.worker().claim(1)
    async with shop.pool.acquire() as connection:
        begun = connection.transaction()
        await begun.start()
        await here.command((1, "a", "receive", 5), by=connection)
        task = asyncio.create_task(commands(there, (1, "c", "receive", 5), partitions=[1]))
        assert await is_blocked(shop.pool, connection, task)
        await begun.commit()
    assert await task == ["reused"]
    assert (await shop.counts("a"), await shop.counts("c")) == ((15, 0, 0), (3, 0, 0))


async def test_commands_and_holds_at_the_same_time_count_both(shop: Tables) -> None:
    worker = await shop.worker().claim(0)

    async def take_in() -> int:
        taken = 0
        for n in range(30):
            try:
                await worker.hold(new(n, ("a", 1), ("b", 1)))
                taken += 1
            except NotEnough:
                pass
        return taken

    async def deliver() -> None:
        for n in range(30):
            given = [(2 * n, "b", "receive", 1), (2 * n + 1, "a", "adjust", 1 if n % 2 else -1)]
            await worker.command(*given)

    taken, _ = await asyncio.gather(take_in(), deliver())
    assert (await shop.counts("b"))[:2] == (35, taken)
    assert (await shop.counts("a"))[1] == taken
    assert taken >= 5


# Names, prices and limits

CUP = {"name": "Cup", "price_cents": 300}


async def test_a_product_is_made_and_changed_and_orders_held_before_keep_their_price(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    assert await commands(worker, (1, "cup", "product", CUP), (2, "cup", "receive", 9)) == ["applied"] * 2
    await worker.hold(new(1, ("cup", 1)))
    assert (
        await commands(worker, (3, "cup", "product", {"price_cents": 250}), (4, "a", "product", {"name": "A"}))
        == ["applied"] * 2
    )
    await worker.hold(new(2, ("cup", 1)))
    assert [(await shop.order(n))["total_cents"] for n in (1, 2)] == [300, 250]
    rows = await shop.pool.fetch(
        "SELECT name, price_cents, partition FROM stock WHERE product_id IN ('a', 'cup') ORDER BY 1"
    )
    assert [tuple(row) for row in rows] == [("A", 100, 0), ("Cup", 250, 0)]
    assert await shop.ledger("cup") == [
        ("initial", 0, []), ("receive", 9, []), ("hold", 1, [(1, 1)]), ("hold", 1, [(2, 1)])]  # fmt: skip
    rows = await shop.pool.fetch("SELECT change, name, price_cents FROM stock_commands ORDER BY command_id")
    assert [tuple(row) for row in rows] == [(1, "Cup", 300), (9, None, None), (0, None, 250), (0, "A", None)]


async def test_an_older_price_that_comes_again_does_not_come_back(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    given = [(1, "a", "product", {"price_cents": 70}), (2, "a", "product", {"price_cents": 80}),
             (3, "a", "limit", {"limit_per_user": 3}), (4, "a", "limit", {"limit_per_user": None})]  # fmt: skip
    assert await commands(worker, *given) == ["applied"] * 4
    before = await shop.everything()
    assert await commands(worker, *given) == ["known"] * 4
    after = await shop.everything()
    assert {table for table in after if after[table] != before[table]} == {"lanes"}
    others = [(1, "a", "product", {"price_cents": 71}), (1, "a", "product", {"price_cents": 70, "name": "A"}),
              (3, "a", "limit", {"limit_per_user": 4})]  # fmt: skip
    assert await commands(worker, *others) == ["reused"] * 3
    row = await shop.pool.fetchrow("SELECT price_cents, limit_per_user FROM stock WHERE product_id = 'a'")
    assert tuple(row) == (80, None)


async def test_a_product_without_a_name_or_a_price_is_not_made_nor_is_an_unknown_one_limited(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    given = [(1, "cup", "product", {"name": "Cup"}), (2, "cup", "product", {"price_cents": 1}),
             (3, "cup", "limit", {"limit_per_user": 1})]  # fmt: skip
    assert await commands(worker, *given) == ["unknown_product"] * 3
    assert await commands(worker, (4, "cup", "product", CUP), *given) == ["applied"] * 4
    row = await shop.pool.fetchrow("SELECT name, price_cents, limit_per_user FROM stock WHERE product_id = 'cup'")
    assert tuple(row) == ("Cup", 1, 1)


async def test_a_limit_holds_from_its_command_on_and_redis_learns_of_it_by_a_new_generation(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    await worker.hold(new(1, ("a", 2)))
    written = await worker.command((1, "a", "limit", {"limit_per_user": 3}))
    assert written.counts == {"a": Counts(10, 2, 2, 2)}
    assert await shop.units() == {("a", "u"): 2}
    with pytest.raises(NotEnough):
        await worker.hold(new(2, ("a", 2)))
    await worker.hold(new(3, ("a", 1)))
    written = await worker.command((2, "a", "limit", {"limit_per_user": None}))
    assert written.counts["a"].generation == 3
    assert await shop.units() == {}
    await worker.hold(new(4, ("a", 5)))


async def test_a_retired_product_is_held_for_no_order_until_that_is_taken_back(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    await worker.hold(new(1, ("a", 2)))
    written = await worker.command((1, "a", "product", {"retired": True}))
    assert written.counts == {"a": Counts(10, 2, 2, 2)}
    for lines in ([("a", 1)], [("a", 1), ("b", 1)]):
        with pytest.raises(NotEnough):
            await worker.hold(new(2, *lines))
    moved = Move(1, "RESERVED", "CONFIRMED", None, "SUCCESS", "c1", states="c")
    await worker.settle(moved, moved=[("commit", 1, "a", 2)])  # what is held is sold
    written = await worker.command((2, "a", "product", {"retired": False}), (3, "a", "product", {"retired": False}))
    assert written.counts["a"].generation == 3
    await worker.hold(new(2, ("a", 1)))


async def test_a_command_that_says_what_the_product_was_counts_only_there(shop: Tables) -> None:
    worker = await shop.worker().claim(0)
    was = ProductState(name="Cup", price_cents=300, limit_per_user=None, retired=False)
    given = [(1, "cup", "product", {**CUP, "was": was}), (2, "cup", "product", {**CUP, "was": None}),
             (3, "cup", "product", {**CUP, "was": None}),
             (4, "cup", "product", {"price_cents": 1, "limit_per_user": 2, "was": was}),
             (5, "cup", "product", {"price_cents": 2, "was": was})]  # fmt: skip
    outcomes = ["product_changed", "applied", "product_changed", "applied", "product_changed"]
    assert await commands(worker, *given) == outcomes
    assert await commands(worker, given[3], (4, "cup", "product", {"price_cents": 1, "was": was})) == [
        "known",
        "reused",
    ]
    row = await shop.pool.fetchrow("SELECT name, price_cents, limit_per_user FROM stock WHERE product_id = 'cup'")
    assert tuple(row) == ("Cup", 1, 2)


# Whose rows are written


async def test_the_watch_bites(watched: str) -> None:
    async for tables in opened(watched):
        worker = await tables.worker().claim(0, 1)
        await worker.hold(new(1, ("few", 1)), marks=[mark(1)])
        await worker.settle(
            held=[(0, 5, "a", 1, "u", 1, "h", None)],
            moved=[("hold", 5, "a", 1)],
            waiting=[(0, 1, SINCE, None)],
            kept=[(0, 8, 1)],
            rejected=[(0, 9, 1)],
        )
        await worker.command((1, "a", "receive", 1), (2, "cup", "product", CUP))
        columns = {"orders": "home", "waiting": "home", "user_units": "units", "stock": "version"}
        writes = [f"UPDATE {table} SET {column} = {column} + 1" for table, column in columns.items()]
        writes += [f"UPDATE {table} SET partition = partition" for table in WATCHED if table not in columns]
        writes += [f"DELETE FROM {table}" for table in WATCHED]
        for write in writes:
            assert await outcome(tables.pool.execute(write)) is asyncpg.UnknownPostgresError, write
            async with tables.pool.acquire() as connection:
                begun = connection.transaction()
                await begun.start()
                await worker.copy().settle(partitions=[1], by=connection)
                assert await outcome(connection.execute(write)) is asyncpg.UnknownPostgresError, write
                await begun.rollback()
        await tables.pool.fetch(query("invalidate_gate"), ["a", "c"])


# In place


async def test_orders_and_stock_are_updated_in_place(engines: LocalEngines, database_url: str) -> None:
    pool = await asyncpg.create_pool(database_url, min_size=1, max_size=1)
    await pool.execute(schema())
    tables = Tables(pool)
    products = [f"p{n}" for n in range(50)]
    for product_id in products:
        await tables.product(product_id, 0, 1000)
    worker = await tables.worker().claim(0)
    for first in range(0, 4000, 200):
        ids = range(first, first + 200)
        of = {n: products[n * 7 % 50] for n in ids}
        await worker.hold(*(new(n, (of[n], 1), user=f"user-{n % 40}") for n in ids), marks=[mark(first)])
        await worker.settle(
            *(Move(n, "RESERVED", "CONFIRMED", None, "SUCCESS", f"charge-of-{oid(n)}", 100, "c") for n in ids),
            moved=[("commit", n, of[n], 1) for n in ids],
        )
    await pool.close()  # with the session its statistics are there
    connection = await asyncpg.connect(database_url)
    for _ in range(200):
        rows = await connection.fetch("SELECT relname, n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables")
        share = {row["relname"]: row["n_tup_hot_upd"] / row["n_tup_upd"] for row in rows if row["n_tup_upd"]}
        if {"orders", "stock", "lanes", "marks"} <= share.keys():
            break
        await asyncio.sleep(0.05)
    await connection.close()
    assert all(part >= 0.9 for part in share.values()), share


# At random, against a reference


@dataclass
class Reference:
    """What the tables should have, kept in plain Python."""

    counts: dict[str, list[int]]  # on hand, reserved, sold
    orders: dict[int, tuple[str, str]] = field(default_factory=dict)  # status, states
    given: dict[int, New] = field(default_factory=dict)
    holds: dict[tuple[int, str], tuple[str, int, str]] = field(default_factory=dict)  # state, units, user
    users: Counter[tuple[str, str]] = field(default_factory=Counter)
    limits: dict[str, int] = field(default_factory=dict)

    def move(self, movement: str, product_id: str, units: int, user: str) -> None:
        on_hand, reserved, sold = {
            "hold": (0, 1, 0),
            "commit": (-1, -1, 1),
            "release": (0, -1, 0),
            "return": (1, 0, -1),
        }[movement]
        for k, step in enumerate((on_hand, reserved, sold)):
            self.counts[product_id][k] += step * units
        if product_id in self.limits and movement != "commit":
            self.users[product_id, user] += units if movement == "hold" else -units

    def fits(self, wanted: list[tuple[str, int, str]]) -> bool:
        """Tell whether these lines can be held: product, units, user."""
        units: Counter[str] = Counter()
        theirs: Counter[tuple[str, str]] = Counter()
        for product_id, quantity, user in wanted:
            units[product_id] += quantity
            theirs[product_id, user] += quantity
        enough = all(self.counts[p][0] - self.counts[p][1] >= n for p, n in units.items())
        return enough and all(
            self.users[key] + n <= self.limits[key[0]] for key, n in theirs.items() if key[0] in self.limits
        )


OWNER = {"a": 0, "b": 0, "few": 0, "c": 1, "few1": 1, "d": 2}


@pytest.mark.parametrize("seed", [1, 2])
async def test_hundreds_of_batches_at_random_leave_what_a_plain_reference_has(
    request: pytest.FixtureRequest, seed: int
) -> None:
    async for tables in opened(request.getfixturevalue(("plain", "watched")[seed - 1])):
        await run_at_random(tables, random.Random(seed))


async def run_at_random(tables: Tables, draw: random.Random) -> None:
    worker = await tables.worker().claim(0, 1, 2)
    rows = await tables.pool.fetch("SELECT product_id, on_hand, limit_per_user FROM stock")
    known = Reference({row["product_id"]: [row["on_hand"], 0, 0] for row in rows})
    known.limits = {row["product_id"]: row["limit_per_user"] for row in rows if row["limit_per_user"]}
    kinds: Counter[str] = Counter()
    numbers = iter(range(1, 100_000))

    def drawn(home: int) -> New:
        products = draw.sample(sorted(OWNER), draw.choice([1, 1, 2, 3]))
        at_home = [product_id for product_id in OWNER if OWNER[product_id] == home]
        products = list(dict.fromkeys([draw.choice(at_home), *products[1:]]))
        user, refused = f"u{draw.randrange(6)}", draw.random() < 0.15
        foreign = not refused and any(OWNER[product_id] != home for product_id in products)
        lines: list[tuple[Any, ...]] = []
        for k, product_id in enumerate(products):
            units, owner = draw.randint(1, 2), OWNER[product_id] if foreign else None
            if refused:
                lines.append((product_id, units, "r") if k else (product_id, units, "x", "insufficient_stock"))
            else:
                lines.append((product_id, units, "h" if OWNER[product_id] == home else "a", None, owner))
        return new(next(numbers), *lines, home=home, user=user)

    async def hold() -> str:
        orders = [drawn(draw.randrange(3)) for _ in range(draw.randint(1, 6))]
        wanted = [(i.product_id, i.quantity, o.user) for o in orders for i in o.lines if i.state == "h"]
        if known.orders and draw.random() < 0.1:
            again = known.given[draw.choice(list(known.given))]
            assert (await worker.hold(*orders, again)).row["known"] == [again.order_id]
            return "known"
        if not known.fits(wanted):
            with pytest.raises(NotEnough):
                await worker.hold(*orders)
            return "not enough"
        written = await worker.hold(*orders)
        for order in orders:
            known.orders[order.n] = order.status, "".join(line.state for line in order.lines)
            known.given[order.n] = order
        for product_id, quantity, user in wanted:
            known.move("hold", product_id, quantity, user)
        check(written, {product_id for product_id, _, _ in wanted})
        return "held"

    def check(written: stages.Written, touched: set[str]) -> None:
        assert written.counts.keys() == touched
        for product_id, counts in written.counts.items():
            assert counts[:2] == tuple(known.counts[product_id][:2])
        for product_id, users in written.users.items():
            assert dict(users) == {user: known.users[product_id, user] for user, _ in users}

    async def settle() -> str:
        chosen = draw.sample(sorted(known.orders), min(len(known.orders), draw.randint(1, 6)))
        moves, moved, users = [], [], []
        for n in chosen:
            status, states = known.orders[n]
            order = known.given[n]
            become = {"CREATED": ["CANCELLED"], "RESERVED": ["CONFIRMED", "CANCELLED"], "CONFIRMED": ["CANCELLED"]}
            if status not in become:
                continue
            after = draw.choice(become[status])
            step = {"CONFIRMED": ("h", "c", "commit")}.get(after) or (
                ("c", "n", "return") if status == "CONFIRMED" else ("h", "r", "release")
            )
            now = states.replace(*step[:2])
            due = {"CREATED": None, "RESERVED": "VOID_DUE", "CONFIRMED": "REFUND_DUE"}[status]
            payment = "SUCCESS" if after == "CONFIRMED" else due
            reason = None if after == "CONFIRMED" else "cancelled_by_user"
            moves.append(Move(n, status, after, reason, payment, None, 1 if status != "CREATED" else None, now))
            for line, was in zip(order.lines, states, strict=True):
                if was == step[0]:
                    moved.append((step[2], n, line.product_id, line.quantity))
                    if step[2] != "commit":
                        users.append((line.product_id, order.user, -line.quantity))
        held: list[Any] = []
        ended: list[Any] = []
        for _ in range(draw.randint(0, 3)):
            n, product_id = 500_000 + draw.randrange(60), draw.choice(sorted(OWNER))
            if any((n, product_id) == (row[1], row[2]) for row in held) or any(
                (n, product_id) == row[:2] for row in ended
            ):
                continue
            there = known.holds.get((n, product_id))
            if there is None:
                user, units = f"u{draw.randrange(6)}", draw.randint(1, 2)
                held.append((OWNER[product_id], n, product_id, 1, user, units, "h", None))
                moved.append(("hold", n, product_id, units))
                users.append((product_id, user, units))
            elif (there[0]) in "hc":
                after, movement = (
                    draw.choice([("c", "commit"), ("r", "release")]) if there[0] == "h" else ("n", "return")
                )
                ended.append((n, product_id, there[0], after))
                moved.append((movement, n, product_id, there[1]))
                if movement != "commit":
                    users.append((product_id, there[2], -there[1]))
        if moves and draw.random() < 0.1:
            wrong = moves[0]._replace(was="PAID")
            with pytest.raises(OrderMoved):
                await worker.settle(*moves[1:], wrong, partitions=[0, 1, 2], moved=moved, users=users)
            return "moved"
        before = {product_id: list(counts) for product_id, counts in known.counts.items()}, Counter(known.users)
        who = {row[1]: row[4] for row in held} | {n: known.holds[n, p][2] for n, p, _, _ in ended}
        for movement, n, product_id, units in moved:
            user = (
                known.given[n].user
                if n in known.given
                else next((row[4] for row in held if row[1:3] == (n, product_id)), None)
                or known.holds[n, product_id][2]
            )
            known.move(movement, product_id, units, user)
        del who
        grown = {(p, u) for (p, u), n in known.users.items() if n > before[1][p, u]}
        if any(c[1] > c[0] for c in known.counts.values()) or any(
            known.users[key] > known.limits[key[0]] for key in grown
        ):
            known.counts, known.users = before
            with pytest.raises(NotEnough):
                await worker.settle(*moves, partitions=[0, 1, 2], moved=moved, users=users, held=held, ended=ended)
            return "not enough to settle"
        written = await worker.settle(*moves, partitions=[0, 1, 2], moved=moved, users=users, held=held, ended=ended)
        for move in moves:
            known.orders[move.n] = move.status, move.states or ""
        for _, n, product_id, _, user, units, state, _ in held:
            known.holds[n, product_id] = state, units, user
        for n, product_id, _, state in ended:
            known.holds[n, product_id] = state, *known.holds[n, product_id][1:]
        check(written, {product_id for _, _, product_id, _ in moved})
        return "settled"

    async def command() -> str:
        product_id = draw.choice(sorted(OWNER))
        kind, units = draw.choice(
            [("receive", draw.randint(1, 6)), ("adjust", draw.randint(-4, 4)), ("set", draw.randint(0, 30))]
        )
        on_hand, reserved, _ = known.counts[product_id]
        after = units if kind == "set" else on_hand + units
        written = await worker.command((next(numbers), product_id, kind, units), partitions=[OWNER[product_id]])
        assert written.row["each_outcome"] == ["applied" if after >= reserved else "insufficient_stock"]
        if after >= reserved:
            known.counts[product_id][0] = after
        check(written, {product_id})
        return str(written.row["each_outcome"][0])

    for n in range(300):
        kinds[await draw.choice([hold, hold, settle, settle, settle, command])()] += 1
        if n % 50 == 49:
            rows = await tables.pool.fetch("SELECT product_id, on_hand, reserved, sold FROM stock")
            assert {row["product_id"]: list(row)[1:] for row in rows} == known.counts
            rows = await tables.pool.fetch("SELECT order_id, status, array_to_string(states, '') AS states FROM orders")
            assert {row["order_id"].int: (row["status"], row["states"]) for row in rows} == known.orders
            rows = await tables.pool.fetch("SELECT order_id, product_id, state::text, quantity, user_id FROM holds")
            assert {(row["order_id"].int, row["product_id"]): tuple(row)[2:] for row in rows} == known.holds
            assert Counter(await tables.units()) == known.users
            assert await tables.faults() == []
    expected = {
        "known",
        "not enough",
        "held",
        "moved",
        "not enough to settle",
        "settled",
        "applied",
        "insufficient_stock",
    }
    assert kinds.keys() == expected, kinds
