"""Topics folded into tables that were set back: how far orders move, and who gives way where there are too few units."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import asyncpg
import pytest

from orderstream.engines.local import LocalEngines
from orderstream.sql.prepare import schema
from orderstream.sql.store import statements
from tests.integration.tables import Move, Tables, Worker, database, new, oid

pytestmark = pytest.mark.engines

AT = datetime.now(UTC) - timedelta(minutes=1)
INNER = ["order-lines", "reservations"]
STORY = ("CR", "CRP", "CRPF", "CRPF", "CRX")


@pytest.fixture(scope="module")
def folding(engines: LocalEngines) -> Iterator[str]:
    """A database with the tables of a pipeline of three partitions."""
    ours = "INSERT INTO pipeline (app_id, topic_prefix, partitions) VALUES ('a', '', 3);"
    yield from database(engines, schema() + ours)


@pytest.fixture
async def shop(folding: str) -> AsyncIterator[Tables]:
    """Two products of partition 0, one of 1, one with a limit; the ledger explains what a test leaves, line by line."""
    pool = await asyncpg.create_pool(folding, min_size=1, max_size=3, server_settings={"jit": "off"})
    tables = Tables(pool)
    await tables.empty()
    await pool.execute("UPDATE pipeline SET set_backs = 0, folded = 0")
    for product_id, partition, units, most in (
        ("a", 0, 10, None),
        ("b", 0, 1, None),
        ("c", 1, 1, None),
        ("few", 0, 9, 3),
    ):
        await tables.product(product_id, partition, units, 100, most)
    yield tables
    assert await tables.faults() == []
    assert await pool.fetch(statements("invariants.sql")["every line is moved once"]) == []
    await pool.close()


class Told(NamedTuple):
    """What was told of an order, and its record, where it stands behind the mark.

    Attributes:
        statuses: C created, R reserved, P paid, F confirmed, X cancelled.
        total: of RESERVED; by default what its lines cost.
        lines: product and units.
        owners: where one has another home.
    """

    n: int
    statuses: str
    lines: Sequence[tuple[str, int]] = ()
    owners: Sequence[int] | None = None
    reason: str = "expired"
    user: str = "u"
    total: int | None = None
    prices: Sequence[int] | None = None


async def fold(shop: Tables, *told: Told, cancels: Sequence[int] = ()) -> Any:
    """Note a set-back and fold these in, and cancels of these orders; return what the fold says."""
    statement = statements("stages.sql")["fold"]
    async with shop.pool.acquire() as connection, connection.transaction():
        assert await connection.fetchval("SELECT note_set_back(0)")
        await connection.execute("SELECT begin_fold()")
        rows = [
            (
                oid(t.n),
                0,
                *(AT if letter in t.statuses else None for letter in "CRPFX"),
                t.total or (100 * sum(units for _, units in t.lines) if t.lines and "R" in t.statuses else None),
                f"c-{t.n}" if "P" in t.statuses else None,
                t.reason if "X" in t.statuses else None,
                t.prices,
            )
            for t in told
        ]
        await connection.copy_records_to_table("fold_told", records=rows)
        came = [
            (
                oid(t.n),
                0,
                500 + t.n,
                t.user,
                "card",
                None,
                None,
                [p for p, _ in t.lines],
                [q for _, q in t.lines],
                t.owners,
            )
            for t in told
            if t.lines
        ]
        await connection.copy_records_to_table("fold_came", records=came)
        await connection.copy_records_to_table("fold_cancelled", records=[(oid(n),) for n in cancels])
        topics = ["orders", *INNER]
        return await connection.fetchrow(statement, [0, 0, 0], topics, [700, 80, 90], INNER, "1", "00000001")


async def stands(shop: Tables, n: int) -> tuple[str, str, str | None]:
    """Return status, lines and payment of an order."""
    order = await shop.order(n)
    return order["status"], order["states"], order["payment"]


async def held(shop: Tables, *orders: Any) -> Worker:
    """Take orders in, as they were when Postgres was copied."""
    worker = await shop.worker().claim(0, 1)
    await worker.hold(*orders)
    return worker


TOLD = [
    ("C", ("RESERVED", "h", None), (10, 2, 0)),
    ("CR", ("RESERVED", "h", None), (10, 2, 0)),
    ("CRP", ("CONFIRMED", "c", "SUCCESS"), (8, 0, 2)),
    ("CRPF", ("CONFIRMED", "c", "SUCCESS"), (8, 0, 2)),
    ("CRX", ("CANCELLED", "r", "VOID_DUE"), (10, 0, 0)),
    ("CRPFX", ("CANCELLED", "n", "REFUND_DUE"), (10, 0, 0)),
]


@pytest.mark.parametrize(
    ("statuses", "expected", "counts", "there"),
    # One told CREATED alone, whose row is lost, is taken in anew: nobody was told that it is held.
    [*((*told, True) for told in TOLD), *((*told, False) for told in TOLD[1:])],
)
async def test_an_order_moves_forward_to_what_was_told(
    shop: Tables, statuses: str, expected: tuple[str, str, str | None], counts: tuple[int, int, int], there: bool
) -> None:
    if there:
        await held(shop, new(1, ("a", 2)))
    done = await fold(shop, Told(1, statuses, [("a", 2)]))
    assert await stands(shop, 1) == expected
    assert await shop.counts("a") == counts
    assert done["moved"] == (statuses not in ("C", "CR") or not there)
    waits = await shop.pool.fetchval("SELECT count(*) FROM waiting")
    assert waits == (there or statuses != "CRPF")  # what is not over, or not told yet


async def test_an_order_that_was_removed_does_not_come_to_life_again(shop: Tables) -> None:
    await held(shop, new(2, ("a", 1)))
    await shop.pool.execute(statements("stages.sql")["note_removed"], [oid(1), oid(2)])
    assert await shop.pool.fetchval("SELECT array_agg(order_id::text) FROM removed_orders") == [oid(1)], "2 is there"
    done = await fold(shop, Told(1, "CRPF", [("a", 2)]), Told(3, "CRPF", [("a", 1)]))
    assert (done["moved"], done["gone"]) == (1, 0)
    assert await shop.pool.fetchval("SELECT array_agg(order_id::text ORDER BY 1) FROM orders") == [oid(2), oid(3)]
    assert await shop.counts("a") == (9, 1, 1)


async def test_an_order_never_moves_back_and_what_ended_before_is_not_due_again(shop: Tables) -> None:
    worker = await held(shop, new(1, ("a", 1)), new(2, ("a", 1)))
    await worker.settle(
        Move(1, "RESERVED", "CONFIRMED", payment="SUCCESS", charge_id="c", states="c"),
        Move(2, "RESERVED", "CANCELLED", reason="payment_declined", payment="FAILED", states="r"),
        moved=[("commit", 1, "a", 1), ("release", 2, "a", 1)],
    )
    await fold(shop, Told(1, "CR", [("a", 1)]), Told(2, "CRX", [("a", 1)]))
    assert await stands(shop, 1) == ("CONFIRMED", "c", "SUCCESS")
    assert await stands(shop, 2) == ("CANCELLED", "r", "FAILED")


async def test_orders_that_nobody_was_told_of_give_way_and_are_voided(shop: Tables) -> None:
    await held(shop, new(1, ("b", 1)))
    done = await fold(shop, Told(2, "CRPF", [("b", 1)]))
    assert (done["ended"], done["short_ids"]) == (1, None)
    assert await stands(shop, 1) == ("CANCELLED", "r", "VOID_DUE")
    assert await stands(shop, 2) == ("CONFIRMED", "c", "SUCCESS")
    assert await shop.counts("b") == (0, 0, 1)
    assert await shop.pool.fetchval("SELECT count(*) FROM waiting") == 1


async def test_orders_that_were_told_reserved_and_no_more_give_way_to_what_was_sold(shop: Tables) -> None:
    await held(shop, new(1, ("b", 1)))
    done = await fold(shop, Told(1, "CR", [("b", 1)]), Told(2, "CRPF", [("b", 1)]), Told(3, "CR", [("b", 1)]))
    assert (done["ended"], done["short_ids"]) == (2, None)
    assert await stands(shop, 1) == ("CANCELLED", "r", "VOID_DUE")
    assert await stands(shop, 2) == ("CONFIRMED", "c", "SUCCESS")
    assert await stands(shop, 3) == ("CANCELLED", "x", "VOID_DUE")
    assert await shop.counts("b") == (0, 0, 1)


async def test_a_line_that_home_wants_back_has_no_units_that_a_rival_was_told_to_have(shop: Tables) -> None:
    worker = await held(shop, new(1, ("a", 1, "h", None, 0), ("c", 1, "a", None, 1)))
    await worker.settle(held=[(1, 1, "c", 0, "u", 1, "h", None)], moved=[("hold", 1, "c", 1)], partitions=[1])
    await worker.settle(
        Move(1, "CREATED", "CANCELLED", reason="expired", states="rl"), moved=[("release", 1, "a", 1)], partitions=[0]
    )
    done = await fold(shop, Told(2, "CRPF", [("a", 1), ("c", 1)], [0, 1]))
    assert (done["ended"], done["short_ids"]) == (0, None)
    assert [(await shop.line(n, "c"))[0] for n in (1, 2)] == ["r", "c"]
    assert await shop.counts("c") == (0, 0, 1)


async def test_what_a_cancel_gives_back_that_is_still_to_be_read_is_not_missing(shop: Tables) -> None:
    worker = await held(shop, new(1, ("b", 1)), new(3, ("a", 1)))
    sold = Move(1, "RESERVED", "CONFIRMED", payment="SUCCESS", charge_id="c", states="c")
    await worker.settle(sold, moved=[("commit", 1, "b", 1)])
    done = await fold(shop, Told(2, "CRPF", [("b", 1)]), Told(3, "CRPF", [("a", 1)]), cancels=[1, 3, 4])
    assert (done["ended"], done["short_ids"]) == (0, None)
    assert await stands(shop, 1) == ("CANCELLED", "n", "REFUND_DUE")
    assert await stands(shop, 2) == ("CONFIRMED", "c", "SUCCESS")
    assert await stands(shop, 3) == ("CANCELLED", "n", "REFUND_DUE")
    assert await shop.counts("b") == (0, 0, 1)


async def test_what_comes_in_of_a_product_of_which_more_was_sold_than_there_is_goes_against_that(shop: Tables) -> None:
    done = await fold(shop, Told(1, "CRPF", [("b", 1)]), Told(2, "CRPF", [("b", 2)]), Told(3, "CRPF", [("b", 4)]))
    assert done["short_ids"] == ["b"]

    async def stock() -> tuple[Any, ...]:
        row = await shop.pool.fetchrow(
            "SELECT on_hand, sold, received, adjusted, owed FROM stock WHERE product_id = 'b'"
        )
        return tuple(row)

    assert await stock() == (0, 7, 0, 6, 6)
    worker = await shop.worker().claim(0, 1)
    written = await worker.command((1, "b", "receive", 1))
    assert (written.row["each_change"], written.counts["b"].on_hand) == ([1], 0)
    assert await stock() == (0, 7, 1, 5, 5)
    revoked = Move(2, "CONFIRMED", "CANCELLED", "cancelled_by_user", payment="REFUND_DUE", states="n")
    written = await worker.settle(revoked, moved=[("return", 2, "b", 2)])
    assert written.counts["b"].on_hand == 0, "Redis must not sell them either"
    assert await stock() == (0, 5, 1, 3, 3)
    written = await worker.command((2, "b", "set", 5))
    assert written.row["each_change"] == [8], "whoever counts says that there were more all along"
    assert await stock() == (5, 5, 1, 8, 0)
    assert (await worker.command((3, "b", "receive", 2))).counts["b"].on_hand == 7


async def test_lines_of_other_owners_are_brought_forward_with_their_order(shop: Tables) -> None:
    worker = await held(shop, new(1, ("a", 1, "h", None, 0), ("c", 1, "a", None, 1)))
    await worker.settle(held=[(1, 1, "c", 0, "u", 1, "h", None)], moved=[("hold", 1, "c", 1)], partitions=[1])
    both = [("a", 1), ("c", 1)]
    done = await fold(shop, Told(2, "CRP", both, [0, 1]), Told(3, "CRPX", [("a", 3), ("c", 1)], [0, 1]))
    assert done["ended"] == 1
    assert await stands(shop, 1) == ("CANCELLED", "rl", "VOID_DUE")
    assert await stands(shop, 2) == ("PAID", "cg", "SUCCESS")
    assert await stands(shop, 3) == ("CANCELLED", "nb", "REFUND_DUE")
    assert [(await shop.line(n, "c"))[0] for n in (1, 2, 3)] == ["r", "h", "n"]
    assert await shop.counts("c") == (1, 1, 0)
    assert await shop.counts("a") == (9, 0, 1)
    assert await shop.pool.fetchval("SELECT count(*) FROM waiting") == 3


BOTH = [("a", 2), ("c", 1)]


@pytest.mark.parametrize(
    ("lines", "total", "told", "prices"),
    [
        ([("a", 2)], 140, None, [70]),
        (BOTH, 390, [70, 250], [70, 250]),
        ([("a", 2), ("few", 3)], 155, [70, 5], [70, 5]),
        (BOTH, 390, None, [100, 100]),  # by an event of before
        (BOTH, 390, [70, 240], [100, 100]),
        (BOTH, 390, [70, 250, 9], [100, 100]),
        (BOTH, 140, [70], [100, 100]),
    ],
)
@pytest.mark.parametrize("statuses", ["CR", "CRPF", "CRX", "CRPX"])
async def test_lines_cost_what_was_told_when_they_were_held(
    shop: Tables, lines: list[tuple[str, int]], total: int, told: list[int] | None, prices: list[int], statuses: str
) -> None:
    owners = [0, 1] if lines is BOTH else None
    await fold(shop, Told(1, statuses, lines, owners, total=total, prices=told))
    order = await shop.order(1)
    assert (order["prices"], order["total_cents"]) == (prices, total)
    if owners is not None and statuses != "CRX":  # then nobody has ever held it for this order
        query = "SELECT price FROM holds WHERE order_id = $1"
        assert await shop.pool.fetchval(query, oid(1)) == prices[1]


async def test_lines_that_were_held_before_cost_what_they_did_when_the_event_does_not_say_it(shop: Tables) -> None:
    await held(shop, new(1, ("a", 2), ("few", 1)))
    await shop.pool.execute("UPDATE stock SET price_cents = 7")
    await fold(shop, Told(1, "CRPF", [("a", 2), ("few", 1)]))
    assert (await shop.order(1))["prices"] == [100, 100]


async def test_a_refused_order_is_voided_since_it_may_have_been_charged_before(shop: Tables) -> None:
    await fold(shop, Told(1, "CX", [("b", 5)], reason="insufficient_stock"))
    assert await stands(shop, 1) == ("CANCELLED", "x", "VOID_DUE")


async def test_users_have_the_units_that_were_told(shop: Tables) -> None:
    await held(shop, new(1, ("few", 1)))
    await fold(shop, Told(1, "CRX", [("few", 1)]), Told(2, "CRPF", [("few", 2)], user="v"))
    assert await shop.units() == {("few", "u"): 0, ("few", "v"): 2}


async def test_a_product_that_is_not_there_leaves_all_as_it_was(shop: Tables) -> None:
    await held(shop, new(1, ("a", 1)))
    before = await shop.order(1)
    done = await fold(shop, Told(1, "CRPF", [("a", 1)]), Told(2, "CRPF", [("z", 1)]))
    assert done["unknown_ids"] == ["z"]
    assert await shop.order(1) == before


async def test_all_lanes_are_claimed_beyond_what_was_lost_and_marks_are_kept(shop: Tables) -> None:
    worker = await held(shop, new(1, ("a", 1)))
    await worker.settle(partitions=[0, 1])
    generation = await shop.pool.fetchval("SELECT generation FROM stock WHERE product_id = 'a'")
    await fold(shop)
    now_ms = time.time() * 1000
    for row in await shop.pool.fetch("SELECT claim, sequence FROM lanes"):
        assert min(row["claim"], row["sequence"]) > now_ms - 60_000
    assert await shop.pool.fetchval("SELECT count(*) FROM lanes") == 6
    assert await shop.pool.fetchval("SELECT generation FROM stock WHERE product_id = 'a'") > max(
        generation, now_ms - 60_000
    )
    found = {row["topic"]: (row["next_offset"], row["floor"]) for row in await shop.pool.fetch("SELECT * FROM marks")}
    assert found == {"orders": (0, 700), "order-lines": (80, 80), "reservations": (90, 90)}
    assert not await shop.pool.fetchval("SELECT note_set_back(0)")


async def test_many_orders_are_folded_at_once(shop: Tables) -> None:
    for n in range(100):
        await shop.product(f"p{n}", 0, 1_000)
    told = [Told(n, STORY[n % len(STORY)], [(f"p{n % 100}", 1)]) for n in range(1, 20_001)]
    done = await fold(shop, *told)
    assert done["moved"] == 20_000
