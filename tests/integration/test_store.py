"""The truth: what the stage functions in Postgres decide, once each, whatever comes again, too late, or at the same time."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import asyncpg
import pytest

import orderstream.sql.migrate as migration
from orderstream.engines.local import LocalEngines
from orderstream.engines.probes import create_database, drop_database, run_async
from orderstream.errors import OrderstreamError
from orderstream.lua.gate import Counts, Gate, GateVerdict
from orderstream.sql.migrate import migrate
from orderstream.sql.removal import BEGINNING, NO_ID
from orderstream.sql.store import (
    TRANSIENT,
    Decision,
    LineToDecide,
    Reserved,
    Standing,
    Store,
    array,
    statements,
)
from orderstream.streams.orders import Order, Reason
from orderstream.streams.places import Place
from orderstream.streams.settlements import Action

pytestmark = pytest.mark.engines

T = TypeVar("T")
Lines = Sequence[tuple[str, int]]
TAKEN, REFUSED, LIMITED = GateVerdict.TAKEN, GateVerdict.REFUSED, GateVerdict.LIMITED
UNDECIDED, NOT_OURS = GateVerdict.UNDECIDED, GateVerdict.NOT_OURS
HELD, SOLD_OUT, UNKNOWN, LIMIT = None, "insufficient_stock", "unknown_product", "user_limit"
COMMIT, RELEASE, RETURN = Action.COMMIT, Action.RELEASE, Action.RETURN
TABLES = ("orders", "order_lines", "payments", "stock", "stock_ledger", "user_units", "products")


def oid(n: int) -> str:
    return str(uuid.UUID(int=n))


def make(n: int, *lines: tuple[str, int], **changed: Any) -> Order:
    return Order(oid(n), "u", lines, "card", None, None)._replace(**changed)


class Db:
    """A migrated database, and short ways to say what the stages ask of it."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def stock(self, **units: int) -> None:
        """Load products at 100 cents each."""
        await self.store.load_catalogue([(product_id, product_id, 100, n) for product_id, n in units.items()])

    async def reserve(
        self,
        *orders: Order,
        gates: dict[tuple[int, str], GateVerdict] | None = None,
        handed: Sequence[tuple[int, str, int]] = (),
        gate: GateVerdict = TAKEN,
        unavailable: bool = False,
    ) -> Reserved:
        """Take orders in.

        Args:
            orders: each by :func:`make`.
            gates: what Redis said about single lines, by order number and product.
            handed: lines of orders taken in elsewhere: order number, product, units.
            gate: what Redis said about all other lines.
            unavailable: Redis is unavailable.
        """
        said = {(oid(n), product_id): verdict for (n, product_id), verdict in (gates or {}).items()}
        lines = [
            LineToDecide(k, order.order_id, product_id, quantity, said.get((order.order_id, product_id), gate))
            for k, order in enumerate(orders, 1)
            for product_id, quantity in order.lines
        ]
        lines += [LineToDecide(0, oid(n), product_id, quantity, gate) for n, product_id, quantity in handed]
        return await self.store.reserve(
            [(order, Place("orders", 0, k)) for k, order in enumerate(orders)], lines, gate_unavailable=unavailable
        )

    async def reasons(self, *orders: Order, **options: Any) -> list[str | None]:
        return [line.reason for line in (await self.reserve(*orders, **options)).lines]

    async def decide(self, *steps: tuple[int, str] | tuple[int, str, Any]) -> list[Standing]:
        """Move orders along, each (order number, step[, reason, or total in cents])."""
        decisions = []
        for n, step, *more in steps:
            if step == "revoke":
                decisions.append(Decision(oid(n), step, Reason.CANCELLED_BY_USER, None, None, 70 + n))
            elif step == "cancel":
                decisions.append(Decision(oid(n), step, more[0] if more else Reason.EXPIRED))
            else:
                total = more[0] if more else 100
                decisions.append(Decision(oid(n), step, None, total, f"ch-{n}" if step == "charged" else None))
        return await self.store.decide(decisions)

    async def settle(self, *lines: tuple[int, str, str], unavailable: bool = False) -> Any:
        return await self.store.settle(
            [(oid(n), product_id, action, 3, k) for k, (n, product_id, action) in enumerate(lines)],
            gate_unavailable=unavailable,
        )

    async def counts(self, product_id: str) -> tuple[int, int, int]:
        """Return available, reserved, sold."""
        (row,) = await self.store.products([product_id])
        return row["available"], row["reserved"], row["sold"]

    async def order(self, n: int) -> tuple[str, str | None] | None:
        row = await self.store.order(oid(n))
        return None if row is None else (row["status"], row["reason"])

    async def lines(self, n: int) -> dict[str, str]:
        row = await self.store.order(oid(n))
        assert row is not None
        return {line["product_id"]: line["state"] for line in row["lines"]}

    async def everything(self) -> dict[str, list[Any]]:
        """Return the whole content: what a repeat may not change; that it was met it may note."""
        rows = "SELECT to_jsonb(t) - 'met_again_at' FROM {} t"
        return {table: sorted(repr(row) for row in await self.store.pool.fetch(rows.format(table))) for table in TABLES}

    async def violations(self, grace_s: float = 600.0, by: Any = None) -> list[str]:
        """Return every broken promise of invariants.sql, with its offenders, as one connection or any sees them."""
        found = []
        for promise, text in statements("invariants.sql").items():
            rows = await (by or self.store.pool).fetch(text, *([grace_s, 600.0] if "$1" in text else []))
            found += [f"{promise}: {row['subject']} {row['found']}" for row in rows]
        return found


@pytest.fixture(scope="module")
def migrated(engines: LocalEngines) -> Iterator[str]:
    """A database that these tests share, one after the other: a new one costs more than most of them."""
    url = create_database(engines.addresses()["database_url"], f"t{uuid.uuid4().hex[:10]}")
    run_async(lambda: migrate(url))
    yield url
    drop_database(url)


@pytest.fixture
async def db(migrated: str) -> AsyncIterator[Db]:
    store = await Store.connect(migrated)
    await store.pool.execute("; ".join(f"DELETE FROM {table}" for table in TABLES))
    db = Db(store)
    await db.stock(a=10, b=5, c=1)
    yield db
    await store.close()


# Migrations


async def test_migrations_are_applied_once_in_order(engines: LocalEngines, database_url: str) -> None:
    names = [name for name, _ in migration.migrations()]
    assert names == sorted(names)
    assert await migrate(database_url) == names
    assert await migrate(database_url) == []


async def test_migrations_of_two_that_start_at_once_are_applied_once(engines: LocalEngines, database_url: str) -> None:
    applied = await asyncio.gather(*(migrate(database_url) for _ in range(4)))
    assert sorted(map(len, applied)) == [0, 0, 0, len(migration.migrations())]


async def test_a_migration_that_was_changed_after_it_was_applied_is_refused(
    engines: LocalEngines, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate(database_url)
    (name, text), *rest = migration.migrations()
    monkeypatch.setattr(migration, "migrations", lambda: [(name, text + "-- one more word"), *rest])
    with pytest.raises(OrderstreamError, match=f"{name} was changed"):
        await migrate(database_url)


async def test_a_database_of_a_newer_version_is_refused(
    engines: LocalEngines, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate(database_url)
    *older, (newest, _) = migration.migrations()
    monkeypatch.setattr(migration, "migrations", lambda: older)
    with pytest.raises(OrderstreamError, match=f"{newest}, which this version does not know"):
        await migrate(database_url)


async def test_a_migration_that_fails_leaves_nothing_of_its_run_behind(
    engines: LocalEngines, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = migration.migrations()
    monkeypatch.setattr(
        migration, "migrations", lambda: [*sound, ("9999_broken.sql", "CREATE TABLE x (); SELECT 1/0;")]
    )
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(database_url)
    connection = await asyncpg.connect(database_url)
    assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
    await connection.close()
    monkeypatch.setattr(migration, "migrations", lambda: sound)
    assert await migrate(database_url) == [name for name, _ in sound]


# Reserving: one product


async def test_an_order_of_one_product_is_reserved_or_cancelled_at_once(db: Db) -> None:
    reserved = await db.reserve(make(1, ("a", 4)), make(2, ("a", 7)), make(3, ("zz", 1)))
    assert [(line.reason, line.unit_price_cents, line.known) for line in reserved.lines] == [
        (HELD, 100, False),
        (SOLD_OUT, None, False),
        (UNKNOWN, None, False),
    ]
    assert (reserved.order_known, reserved.order_reused) == ([False] * 3, [False] * 3)
    assert reserved.order_created_at == [reserved.at] * 3
    assert reserved.counts == {"a": Counts(10, 4, 2, 1)}
    assert [await db.order(n) for n in (1, 2, 3)] == [
        ("RESERVED", None),
        ("CANCELLED", SOLD_OUT),
        ("CANCELLED", UNKNOWN),
    ]
    assert [await db.lines(n) for n in (1, 2, 3)] == [{"a": "held"}, {"a": "refused"}, {"zz": "refused"}]
    row = await db.store.order(oid(1))
    assert row is not None
    assert (row["total_cents"], row["reserved_at"], row["created_at"]) == (400, reserved.at, reserved.at)
    assert await db.counts("a") == (6, 4, 0)
    assert await db.violations() == []


async def test_everything_about_an_order_is_kept(db: Db) -> None:
    placed_at = datetime(2, 1, 1, tzinfo=UTC)
    lines = (("a", 2),)
    order = make(1, *lines, user_id="ünï 名", payment_method="card", idempotency_key="k" * 200, placed_at=placed_at)
    await db.store.reserve(
        [(order, Place("orders", 7, 2**40))], [LineToDecide(1, oid(1), "a", 2, TAKEN)], gate_unavailable=False
    )
    row = await db.store.order(oid(1))
    assert row is not None
    assert (row["user_id"], row["payment_method"], row["idempotency_key"]) == ("ünï 名", "card", "k" * 200)
    assert (row["placed_at"], row["source_partition"], row["source_offset"]) == (placed_at, 7, 2**40)


async def test_nothing_to_reserve_is_nothing_done(db: Db) -> None:
    before = await db.everything()
    reserved = await db.reserve()
    assert (reserved.lines, reserved.order_known, reserved.counts) == ([], [], {})
    assert await db.everything() == before


async def test_a_line_is_held_at_the_price_of_that_time(db: Db) -> None:
    await db.reserve(make(1, ("a", 2)))
    await db.store.pool.execute("UPDATE products SET price_cents = 250 WHERE product_id = 'a'")
    (second,) = (await db.reserve(make(2, ("a", 2)))).lines
    (first,) = (await db.reserve(make(1, ("a", 2)))).lines
    assert (first.unit_price_cents, second.unit_price_cents) == (100, 250)
    assert await db.violations() == []


@pytest.mark.parametrize("gate", [TAKEN, REFUSED, UNDECIDED])
async def test_repeats_are_answered_what_was_decided_and_change_nothing(db: Db, gate: GateVerdict) -> None:
    orders = [make(1, ("a", 4)), make(2, ("a", 7)), make(3, ("zz", 1)), make(4, ("a", 1), ("b", 9))]
    first = await db.reserve(*orders)
    before = await db.everything()
    again = await db.reserve(*orders, gate=gate)
    assert again.order_known == [True] * 4
    assert again.order_reused == [False] * 4
    assert again.order_created_at == [first.at] * 4
    assert [line._replace(known=False) for line in again.lines] == first.lines
    assert all(line.known for line in again.lines)
    assert await db.everything() == before


async def test_a_repeat_is_told_its_hold_however_far_the_order_is(db: Db) -> None:
    await db.reserve(make(1, ("a", 4)), make(2, ("a", 4)))
    await db.decide((1, "charged", 400), (2, "declined"))
    await db.settle((1, "a", COMMIT), (2, "a", RELEASE))
    before = await db.everything()
    assert await db.reasons(make(1, ("a", 4)), make(2, ("a", 4))) == [HELD, HELD]
    assert await db.everything() == before


# Reserving: ids that belong to another order


@pytest.mark.parametrize(
    "other",
    [
        make(1, ("a", 4), ("b", 1), user_id="somebody else"),
        make(1, ("a", 4), ("b", 1), payment_method="cash"),
        make(1, ("a", 5), ("b", 1)),
        make(1, ("a", 4), ("b", 2)),
        make(1, ("a", 4), ("c", 1)),
        make(1, ("a", 4), ("zz", 1)),
        make(1, ("a", 4)),
        make(1, ("b", 1)),
        make(1, ("a", 4), ("b", 1), ("c", 1)),
        make(1, ("c", 1)),
    ],
    ids=["user", "method", "quantity", "other quantity", "product", "no product", "fewer", "fewer too", "more", "else"],
)
async def test_another_order_under_the_same_id_is_noticed_and_changes_nothing(db: Db, other: Order) -> None:
    await db.reserve(make(1, ("a", 4), ("b", 1)))
    before = await db.everything()
    reserved = await db.reserve(make(2, ("a", 1)), other)
    assert reserved.order_reused == [False, True]
    assert reserved.lines[0].reason is HELD
    await db.decide((2, "cancel"))
    await db.settle((2, "a", RELEASE))
    after = await db.everything()
    assert [row for row in after["orders"] if oid(1) in row] == [row for row in before["orders"] if oid(1) in row]
    assert [row for row in after["order_lines"] if oid(1) in row] == [r for r in before["order_lines"] if oid(1) in r]
    assert [row for row in after["stock_ledger"] if oid(1) in row] == [r for r in before["stock_ledger"] if oid(1) in r]
    assert [await db.counts(product_id) for product_id in "abc"] == [(6, 4, 0), (4, 1, 0), (1, 0, 0)]


async def test_the_same_lines_in_another_order_are_the_same_order(db: Db) -> None:
    await db.reserve(make(1, ("a", 4), ("b", 1)))
    before = await db.everything()
    assert (await db.reserve(make(1, ("b", 1), ("a", 4)))).order_reused == [False]
    assert await db.everything() == before


# Reserving: what the gate says


async def test_a_take_of_what_is_sold_out_is_refused(db: Db) -> None:
    assert await db.reasons(make(1, ("c", 1))) == [HELD]
    assert await db.reasons(make(2, ("c", 1)), gate=TAKEN) == [SOLD_OUT]
    assert await db.counts("c") == (0, 1, 0)


async def test_a_product_of_which_the_gate_refused_every_line_is_not_touched(db: Db) -> None:
    reserved = await db.reserve(make(1, ("a", 1)), make(2, ("a", 1)), gate=REFUSED)
    assert [line.reason for line in reserved.lines] == [SOLD_OUT, SOLD_OUT]
    assert reserved.counts == {}
    async with db.store.pool.acquire() as other, other.transaction():
        await other.execute("SELECT FROM stock WHERE product_id = 'a' FOR UPDATE")
        assert await asyncio.wait_for(db.reasons(make(3, ("a", 1)), gate=REFUSED), 30) == [SOLD_OUT], "no row lock"


async def test_a_refusal_beside_a_take_is_decided_by_the_counts(db: Db) -> None:
    gates = {(1, "a"): REFUSED, (2, "a"): TAKEN, (3, "a"): REFUSED}
    assert await db.reasons(make(1, ("a", 4)), make(2, ("a", 4)), make(3, ("a", 4)), gates=gates) == [
        HELD,
        HELD,
        SOLD_OUT,
    ]


async def test_takes_beyond_what_there_is_go_to_who_came_first(db: Db) -> None:
    orders = [make(n, ("a", 3)) for n in range(1, 6)]
    assert await db.reasons(*orders) == [HELD, HELD, HELD, SOLD_OUT, SOLD_OUT]


async def test_without_redis_lines_are_decided_greedily_in_the_order_of_arrival(db: Db) -> None:
    asked = [6, 5, 4, 1, 3]
    reserved = await db.reserve(
        *(make(n, ("a", units)) for n, units in enumerate(asked, 1)), gate=UNDECIDED, unavailable=True
    )
    assert [line.reason for line in reserved.lines] == [HELD, SOLD_OUT, HELD, SOLD_OUT, SOLD_OUT]
    assert reserved.counts == {"a": Counts(10, 10, 2, 2)}, "what Redis knew is invalid"


async def test_only_products_that_changed_without_redis_are_invalidated(db: Db) -> None:
    reserved = await db.reserve(make(1, ("a", 1)), make(2, ("b", 6)), gate=UNDECIDED, unavailable=True)
    assert {product_id: now.generation for product_id, now in reserved.counts.items()} == {"a": 2, "b": 1}


async def test_counts_are_returned_of_every_product_that_was_asked_for(db: Db) -> None:
    await db.reserve(make(1, ("a", 4)))
    reserved = await db.reserve(make(1, ("a", 4)), make(2, ("b", 6)), make(3, ("zz", 1)))
    assert reserved.counts == {"a": Counts(10, 4, 2, 1), "b": Counts(5, 0, 1, 1)}


# Reserving: several products


async def test_an_order_of_several_products_waits_for_its_owner(db: Db) -> None:
    assert await db.reasons(make(1, ("a", 4), ("b", 6))) == [HELD, SOLD_OUT]
    assert await db.order(1) == ("CREATED", None)
    assert await db.lines(1) == {"a": "held", "b": "refused"}
    row = await db.store.order(oid(1))
    assert row is not None
    assert (row["total_cents"], row["reserved_at"]) == (None, None)


async def test_lines_of_another_owner_stay_pending_and_are_decided_later_once(db: Db) -> None:
    order = make(1, ("a", 4), ("b", 2), ("c", 2))
    elsewhere = {(1, "b"): NOT_OURS, (1, "c"): NOT_OURS}
    assert await db.reasons(order, gates=elsewhere) == [HELD, "pending", "pending"]
    assert await db.lines(1) == {"a": "held", "b": "pending", "c": "pending"}
    assert await db.counts("b") == (5, 0, 0)
    reserved = await db.reserve(handed=[(1, "b", 2), (1, "c", 2)])
    assert [(line.reason, line.known) for line in reserved.lines] == [(HELD, False), (SOLD_OUT, False)]
    before = await db.everything()
    again = await db.reserve(handed=[(1, "b", 2), (1, "c", 2)])
    assert [(line.reason, line.known) for line in again.lines] == [(HELD, True), (SOLD_OUT, True)]
    assert await db.reasons(order, gates=elsewhere) == [HELD, HELD, SOLD_OUT]
    assert await db.everything() == before
    assert await db.lines(1) == {"a": "held", "b": "held", "c": "refused"}


async def test_a_repeated_order_leaves_its_pending_lines_to_their_owner(db: Db) -> None:
    order = make(1, ("a", 4), ("b", 2))
    for _ in range(2):
        assert await db.reasons(order, gates={(1, "b"): NOT_OURS}) == [HELD, "pending"]
    assert await db.counts("b") == (5, 0, 0)


async def test_a_line_of_no_order_is_not_invented(db: Db) -> None:
    before = await db.everything()
    assert await db.reasons(handed=[(1, "a", 1), (2, "zz", 1)]) == ["pending", "pending"]
    await db.reserve(make(3, ("a", 1), ("b", 1)), gates={(3, "b"): NOT_OURS})
    between = await db.everything()
    assert await db.reasons(handed=[(3, "c", 1)]) == ["pending"]
    assert await db.everything() == between
    assert between["payments"] == before["payments"]


async def test_a_line_that_comes_from_its_order_and_from_another_owner_at_once_is_held_once(db: Db) -> None:
    # The customer's client sent the order twice, the lines in another order: the second record is in the partition
    # of b, where the line of b arrives from the first one too.
    await db.reserve(make(1, ("a", 4), ("b", 3)), gates={(1, "b"): NOT_OURS})
    reserved = await db.reserve(make(1, ("b", 3), ("a", 4)), gates={(1, "a"): NOT_OURS}, handed=[(1, "b", 3)])
    assert [line.reason for line in reserved.lines] == [HELD, HELD, HELD]
    assert [line.unit_price_cents for line in reserved.lines] == [100, 100, 100]
    assert reserved.counts["b"] == Counts(5, 3, 2, 1)
    assert await db.lines(1) == {"a": "held", "b": "held"}
    assert await db.violations() == []


async def test_a_line_handed_over_is_decided_where_the_order_beside_it_turns_out_to_be_another(db: Db) -> None:
    await db.reserve(make(1, ("a", 4), ("b", 3)), gates={(1, "b"): NOT_OURS})
    reserved = await db.reserve(make(1, ("b", 3), user_id="somebody else"), handed=[(1, "b", 3)])
    assert reserved.order_reused == [True]
    assert reserved.lines[1].reason is HELD
    assert await db.lines(1) == {"a": "held", "b": "held"}
    assert await db.counts("b") == (2, 3, 0)


async def test_handed_lines_compete_with_orders_in_the_order_of_arrival(db: Db) -> None:
    await db.reserve(make(1, ("a", 1), ("b", 3)), gates={(1, "b"): NOT_OURS})
    reserved = await db.reserve(make(2, ("b", 3)), handed=[(1, "b", 3)])
    assert [line.reason for line in reserved.lines] == [HELD, SOLD_OUT]


# Deciding


async def reserved_order(db: Db, n: int = 1) -> None:
    await db.reserve(make(n, ("a", 1)))


async def test_the_straight_way_is_reserved_charged(db: Db) -> None:
    await db.reserve(make(1, ("a", 2), ("b", 1)))
    (reserved,) = await db.decide((1, "reserve", 300))
    assert (reserved.status, reserved.changed, reserved.payment) == ("RESERVED", True, None)
    assert reserved.reserved_at is not None
    (charged,) = await db.decide((1, "charged", 300))
    assert (charged.status, charged.changed, charged.payment) == ("PAID", True, "SUCCESS")
    row = await db.store.order(oid(1))
    assert row is not None
    assert (row["total_cents"], row["amount_cents"], row["charge_id"], row["paid_at"]) == (
        300,
        300,
        "ch-1",
        charged.moved_at,
    )


@pytest.mark.parametrize(
    ("step", "status", "reason", "payment"),
    [
        (("declined",), "CANCELLED", "payment_declined", "FAILED"),
        (("cancel", Reason.EXPIRED), "CANCELLED", "expired", None),
        (("cancel", Reason.CANCELLED_BY_USER), "CANCELLED", "cancelled_by_user", None),
        (("charged",), "PAID", None, "SUCCESS"),
    ],
)
async def test_a_reserved_order_is_ended_or_paid_once(
    db: Db, step: tuple[Any, ...], status: str, reason: str | None, payment: str | None
) -> None:
    await reserved_order(db)
    (first,) = await db.decide((1, *step))
    assert (first.status, first.reason, first.payment, first.changed) == (status, reason, payment, True)
    before = await db.everything()
    (again,) = await db.decide((1, *step))
    assert again == first._replace(changed=False, reserved_at=again.reserved_at)
    assert await db.everything() == before


async def test_a_created_order_is_cancelled(db: Db) -> None:
    await db.reserve(make(1, ("a", 1), ("b", 9)))
    (standing,) = await db.decide((1, "cancel", Reason.INSUFFICIENT_STOCK))
    assert (standing.status, standing.reason, standing.reserved_at) == ("CANCELLED", SOLD_OUT, None)


@pytest.mark.parametrize("step", ["reserve", "cancel", "declined"])
async def test_a_paid_order_stays_paid(db: Db, step: str) -> None:
    await reserved_order(db)
    await db.decide((1, "charged"))
    before = await db.everything()
    (standing,) = await db.decide((1, step))
    assert (standing.status, standing.changed) == ("PAID", False)
    assert await db.everything() == before


@pytest.mark.parametrize("step", ["reserve", "cancel"])
async def test_a_cancelled_order_stays_cancelled_for_its_first_reason(db: Db, step: str) -> None:
    await reserved_order(db)
    await db.decide((1, "cancel", Reason.CANCELLED_BY_USER))
    before = await db.everything()
    (standing,) = await db.decide((1, step))
    assert (standing.status, standing.reason, standing.changed) == ("CANCELLED", "cancelled_by_user", False)
    assert await db.everything() == before


async def test_a_charge_that_comes_after_the_end_is_to_be_given_back(db: Db) -> None:
    await reserved_order(db)
    await db.decide((1, "cancel"))
    (standing,) = await db.decide((1, "charged"))
    assert (standing.status, standing.payment, standing.changed) == ("CANCELLED", "REFUND_DUE", False)
    assert await db.violations() == []
    (again,) = await db.decide((1, "charged"))
    assert again == standing


async def test_of_a_charge_and_a_cancellation_at_once_the_charge_counts(db: Db) -> None:
    await reserved_order(db)
    cancelled, charged = await db.decide((1, "cancel"), (1, "charged"))
    assert (charged.status, charged.changed, cancelled.status, cancelled.changed) == ("PAID", True, "PAID", False)


async def test_an_order_may_take_several_steps_at_once(db: Db) -> None:
    await db.reserve(make(1, ("a", 1), ("b", 1)))
    charged, reserved = await db.decide((1, "charged", 200), (1, "reserve", 200))
    assert (charged.changed, reserved.changed, reserved.status) == (True, True, "PAID")
    assert await db.violations() == []


async def test_of_two_cancellations_at_once_the_first_tells_the_reason(db: Db) -> None:
    await reserved_order(db)
    first, second = await db.decide((1, "cancel", Reason.EXPIRED), (1, "cancel", Reason.CANCELLED_BY_USER))
    assert (first.reason, first.changed, second.reason, second.changed) == ("expired", True, "expired", False)


async def test_answers_come_in_the_order_of_the_questions(db: Db) -> None:
    for n in (1, 2, 3):
        await reserved_order(db, n)
    standings = await db.decide((3, "cancel"), (9, "charged"), (1, "charged"), (2, "declined"))
    assert [one.status for one in standings] == ["CANCELLED", None, "PAID", "CANCELLED"]
    assert [one.payment for one in standings] == [None, None, "SUCCESS", "FAILED"]


@pytest.mark.parametrize("step", ["reserve", "charged", "declined", "cancel"])
async def test_an_order_that_does_not_exist_is_reported_and_nothing_is_written(db: Db, step: str) -> None:
    before = await db.everything()
    (standing,) = await db.decide((9, step))
    assert (standing.status, standing.payment, standing.changed) == (None, None, False)
    assert await db.everything() == before


async def test_a_verdict_on_an_order_that_is_not_reserved_changes_nothing(db: Db) -> None:
    await db.reserve(make(1, ("a", 1), ("b", 1)))
    before = await db.everything()
    (standing,) = await db.decide((1, "declined"))
    assert (standing.status, standing.changed) == ("CREATED", False)
    assert await db.everything() == before


async def test_no_decisions_are_no_answers(db: Db) -> None:
    assert await db.decide() == []


# Refunds


async def test_a_refund_is_noted_once_and_only_where_one_is_due(db: Db) -> None:
    for n in (1, 2, 3):
        await reserved_order(db, n)
    await db.decide((1, "cancel"), (2, "declined"), (3, "charged"))
    await db.decide((1, "charged"))
    everyone = [oid(n) for n in (1, 2, 3, 9)]
    assert await db.store.refunded(everyone) == [oid(1)]
    before = await db.everything()
    assert await db.store.refunded(everyone) == []
    assert await db.store.refunded([]) == []
    assert await db.everything() == before
    row = await db.store.order(oid(1))
    assert row is not None
    assert (row["payment_status"], row["refunded_at"] is not None) == ("REFUNDED", True)
    assert await db.violations() == []


# Settling


async def paid(db: Db, n: int, *lines: tuple[str, int]) -> None:
    total = sum(100 * units for _, units in lines)
    await db.reserve(make(n, *lines))
    await db.decide((n, "reserve", total))
    await db.decide((n, "charged", total))


async def cancelled(db: Db, n: int, *lines: tuple[str, int]) -> None:
    await db.reserve(make(n, *lines))
    await db.decide((n, "cancel"))


async def test_a_committed_line_is_sold_and_a_released_one_is_free_again(db: Db) -> None:
    await paid(db, 1, ("a", 4))
    await cancelled(db, 2, ("a", 3))
    settled = await db.settle((1, "a", COMMIT), (2, "a", RELEASE))
    assert (settled.settled, settled.misfits) == (2, [])
    assert [order_id for order_id, _ in settled.confirmed] == [oid(1)]
    assert settled.counts == {"a": Counts(6, 0, 4, 1)}
    assert settled.sold == {"a": 4}
    assert await db.counts("a") == (6, 0, 4)
    assert (await db.order(1), await db.order(2)) == (("CONFIRMED", None), ("CANCELLED", "expired"))
    assert await db.violations() == []


async def test_settling_again_changes_nothing_and_tells_the_same_counts(db: Db) -> None:
    await paid(db, 1, ("a", 4))
    await cancelled(db, 2, ("a", 3))
    first = await db.settle((1, "a", COMMIT), (2, "a", RELEASE))
    before = await db.everything()
    again = await db.settle((1, "a", COMMIT), (2, "a", RELEASE))
    assert (again.settled, again.misfits, again.confirmed) == (0, [], first.confirmed)
    assert (again.counts, again.sold) == (first.counts, first.sold)
    assert await db.everything() == before


async def test_an_order_is_confirmed_with_its_last_line(db: Db) -> None:
    await paid(db, 1, ("a", 2), ("b", 1), ("c", 1))
    assert (await db.settle((1, "b", COMMIT))).confirmed == []
    assert await db.order(1) == ("PAID", None)
    assert (await db.settle((1, "b", COMMIT), (1, "a", COMMIT))).confirmed == []
    settled = await db.settle((1, "c", COMMIT))
    assert settled.confirmed == [(oid(1), settled.at)]
    assert await db.violations() == []


@pytest.mark.parametrize("unavailable", [True, False])
async def test_a_change_that_misses_redis_invalidates_what_it_knows(db: Db, unavailable: bool) -> None:
    await paid(db, 1, ("a", 4))
    await db.settle((1, "a", COMMIT))
    await paid(db, 2, ("b", 1))
    settled = await db.settle((1, "a", COMMIT), (2, "b", COMMIT), unavailable=unavailable)
    assert (settled.counts["a"].generation, settled.counts["b"].generation) == (1, 1 + unavailable)


async def test_settlements_that_the_order_does_not_agree_to_are_left_out_and_reported(db: Db) -> None:
    await paid(db, 1, ("a", 1))
    await cancelled(db, 2, ("a", 1))
    await reserved_order(db, 3)
    before = await db.everything()
    settled = await db.settle((1, "a", RELEASE), (2, "a", COMMIT), (3, "a", COMMIT))
    assert sorted(settled.misfits) == [oid(1), oid(2), oid(3)]
    assert (settled.settled, settled.confirmed) == (0, [])
    assert await db.everything() == before
    assert sorted((await db.settle((3, "a", RELEASE))).misfits) == [oid(3)]
    assert await db.everything() == before


async def test_a_misfit_does_not_hold_up_what_its_order_agrees_to(db: Db) -> None:
    await paid(db, 1, ("a", 2), ("b", 1))
    await cancelled(db, 2, ("a", 1))
    settled = await db.settle(
        (1, "a", COMMIT), (1, "b", RELEASE), (1, "b", COMMIT), (2, "a", COMMIT), (2, "a", RELEASE), (3, "c", COMMIT)
    )
    assert sorted(set(settled.misfits)) == [oid(1), oid(2)]
    assert settled.settled == 3
    assert [order_id for order_id, _ in settled.confirmed] == [oid(1)]
    assert (await db.lines(1), await db.lines(2)) == ({"a": "committed", "b": "committed"}, {"a": "released"})
    assert await db.violations() == []


@pytest.mark.parametrize("committed", [(), ("a",), ("a", "b")])
async def test_a_paid_order_that_is_revoked_returns_what_is_sold_and_frees_what_is_held(
    db: Db, committed: tuple[str, ...]
) -> None:
    await paid(db, 1, ("a", 4), ("b", 2))
    await db.settle(*((1, product_id, COMMIT) for product_id in committed))
    (standing,) = await db.decide((1, "revoke"))
    assert (standing.status, standing.reason, standing.payment) == ("CANCELLED", "cancelled_by_user", "REFUND_DUE")
    assert (standing.changed, standing.revoked) == (True, True)
    assert (await db.decide((1, "revoke"))) == [standing._replace(changed=False)]
    assert await db.violations() == []
    late = await db.settle((1, "a", COMMIT), (1, "b", COMMIT), (1, "a", RELEASE))
    assert (late.settled, late.misfits, late.confirmed, late.returned) == (0, [], [], []), "only a return counts now"
    first = await db.settle((1, "a", RETURN), (1, "a", COMMIT))
    assert (first.settled, first.returned) == (1, []), "b is still to return"
    last = await db.settle((1, "b", RETURN))
    assert [order_id for order_id, _ in last.returned] == [oid(1)]
    assert (await db.counts("a"), await db.counts("b")) == ((10, 0, 0), (5, 0, 0))
    assert await db.lines(1) == {p: "returned" if p in committed else "released" for p in ("a", "b")}
    assert await db.violations(grace_s=0.0) == []
    before = await db.everything()
    again = await db.settle((1, "a", RETURN), (1, "b", RETURN), (1, "a", COMMIT), (1, "b", RELEASE))
    assert (again.settled, again.returned, again.misfits) == (0, last.returned, [])
    assert await db.everything() == before
    assert await db.store.refunded([oid(1)]) == [oid(1)]
    assert await db.violations(grace_s=0.0) == []


async def test_an_order_is_revoked_at_any_state_but_its_end_and_a_charge_at_the_same_moment_goes_back(db: Db) -> None:
    for n in (1, 2, 3):
        await reserved_order(db, n)
    await db.decide((3, "declined"))
    standings = await db.decide((1, "revoke"), (2, "revoke"), (2, "charged"), (3, "revoke"), (9, "revoke"))
    assert [(one.status, one.reason, one.payment, one.revoked) for one in standings] == [
        ("CANCELLED", "cancelled_by_user", None, False),
        ("CANCELLED", "cancelled_by_user", "REFUND_DUE", True),
        ("CANCELLED", "cancelled_by_user", "REFUND_DUE", True),
        ("CANCELLED", "payment_declined", "FAILED", False),
        (None, None, None, False),
    ]
    assert await db.violations() == []
    await db.decide((1, "charged"))
    await db.settle((1, "a", RELEASE), (2, "a", RETURN), (3, "a", RELEASE))
    assert await db.counts("a") == (10, 0, 0)
    assert await db.violations(grace_s=0.0) == []


async def test_a_return_of_an_order_that_was_not_revoked_is_a_misfit(db: Db) -> None:
    await paid(db, 1, ("a", 1))
    await cancelled(db, 2, ("a", 1))
    before = await db.everything()
    settled = await db.settle((1, "a", RETURN), (2, "a", RETURN))
    assert (sorted(settled.misfits), settled.settled, settled.returned) == ([oid(1), oid(2)], 0, [])
    assert await db.everything() == before


async def test_an_action_that_is_none_settles_nothing(db: Db) -> None:
    await paid(db, 1, ("a", 1))
    await cancelled(db, 2, ("a", 1))
    before = await db.everything()
    assert (await db.settle((1, "a", "refund"), (2, "a", ""))).settled == 0
    assert await db.everything() == before


async def test_lines_that_are_not_held_are_passed_over(db: Db) -> None:
    await db.reserve(make(1, ("a", 1), ("b", 9), ("c", 1)), gates={(1, "c"): NOT_OURS})
    await db.decide((1, "cancel"))
    settled = await db.settle(
        (1, "a", RELEASE), (1, "b", RELEASE), (1, "c", RELEASE), (1, "zz", RELEASE), (9, "a", RELEASE)
    )
    assert (settled.settled, settled.misfits) == (1, [])
    assert await db.lines(1) == {"a": "released", "b": "refused", "c": "pending"}


async def test_nothing_to_settle_is_nothing_done(db: Db) -> None:
    settled = await db.settle()
    assert (settled.settled, settled.confirmed, settled.misfits, settled.counts, settled.sold) == (0, [], [], {}, {})
    assert await db.store.move_stock([], gate_unavailable=False) == ([], {}, {})


# Limits


async def of_users(db: Db) -> dict[str, int]:
    rows = await db.store.pool.fetch("SELECT user_id, units FROM user_units WHERE product_id = 'a'")
    return {row["user_id"]: row["units"] for row in rows}


async def test_a_limit_counts_a_users_units_over_all_orders_and_gives_them_back(db: Db) -> None:
    await db.reserve(make(1, ("a", 2)))
    assert await db.store.set_limit("a", 3)
    assert await of_users(db) == {"u": 2}
    reserved = await db.reserve(
        make(2, ("a", 2)), make(3, ("a", 1)), make(4, ("a", 1)), make(5, ("a", 4), user_id="v"), make(6, ("b", 5))
    )
    assert [line.reason for line in reserved.lines] == [LIMIT, HELD, LIMIT, LIMIT, HELD]
    assert reserved.users == {"a": [("u", 3)]}
    assert await db.counts("a") == (7, 3, 0)
    again = await db.reserve(make(3, ("a", 1)), make(4, ("a", 1)))
    assert ([line.reason for line in again.lines], again.users) == ([HELD, LIMIT], reserved.users)
    await db.decide((1, "cancel"), (3, "charged"))
    settled = await db.settle((1, "a", RELEASE), (3, "a", COMMIT))
    assert settled.users == {"a": [("u", 1)]}
    assert (await db.settle((1, "a", RELEASE), (3, "a", COMMIT))).users == settled.users, "Redis may not have heard"
    await db.decide((3, "revoke"))
    assert (await db.settle((3, "a", RETURN))).users == {"a": [("u", 0)]}
    assert (await db.reserve(make(7, ("a", 3)))).users == {"a": [("u", 3)]}
    assert await db.violations() == []
    assert await db.store.set_limit("a", None)
    assert await of_users(db) == {}
    assert await db.reasons(make(8, ("a", 7))) == [HELD]
    assert (await db.settle((8, "a", COMMIT))).users == {}
    assert await db.violations() == []


async def test_a_line_that_is_handed_over_counts_for_the_user_of_its_order(db: Db) -> None:
    await db.store.set_limit("a", 1)
    await db.reserve(
        make(1, ("b", 1), ("a", 1)), make(2, ("b", 1), ("a", 1)), gates={(n, "a"): NOT_OURS for n in (1, 2)}
    )
    reserved = await db.reserve(handed=[(1, "a", 1), (2, "a", 1), (9, "a", 1)])
    assert [line.reason for line in reserved.lines] == [HELD, LIMIT, "pending"]
    assert reserved.users == {"a": [("u", 1)]}


async def test_what_redis_refused_for_a_users_limit_is_refused_for_that_unless_postgres_knows_better(db: Db) -> None:
    await db.store.set_limit("a", 3)
    assert await db.reasons(make(1, ("a", 2)), gate=LIMITED) == [LIMIT]
    assert await db.reasons(make(2, ("a", 2)), make(3, ("a", 1)), gates={(2, "a"): LIMITED}) == [HELD, HELD]
    assert await db.violations() == []


async def test_a_change_of_a_limit_invalidates_what_redis_knows_and_no_change_does_not(db: Db) -> None:
    generations = []
    for limit in (None, 2, 2, 3, None):
        assert await db.store.set_limit("a", limit)
        generations.append(await db.store.pool.fetchval("SELECT gate_generation FROM stock WHERE product_id = 'a'"))
    assert generations == [1, 2, 2, 3, 4]
    assert not await db.store.set_limit("nothing", 1)


# Stock


async def move(db: Db, *moves: tuple[int, str, str, int], unavailable: bool = False) -> Any:
    """Command stock, each (command number, product, command, units)."""
    return await db.store.move_stock(
        [(oid(n), product_id, command, units, "because") for n, product_id, command, units in moves],
        gate_unavailable=unavailable,
    )


async def test_stock_is_received_and_adjusted(db: Db) -> None:
    outcomes, counts, sold = await move(db, (1, "a", "receive", 5), (2, "a", "adjust", -3), (3, "b", "adjust", 2))
    assert outcomes == ["applied"] * 3
    assert counts == {"a": Counts(12, 0, 3, 1), "b": Counts(7, 0, 2, 1)}
    assert sold == {"a": 0, "b": 0}
    (row,) = await db.store.products(["a"])
    assert (row["initial"], row["received"], row["adjusted"], row["on_hand"]) == (10, 5, -3, 12)
    assert await db.violations() == []


async def test_a_repeated_command_changes_nothing_even_for_another_product(db: Db) -> None:
    await move(db, (1, "a", "receive", 5))
    before = await db.everything()
    outcomes, counts, _ = await move(db, (1, "a", "receive", 5), (1, "b", "adjust", 9))
    assert outcomes == ["known", "known"]
    assert counts["a"] == Counts(15, 0, 2, 1)
    assert await db.everything() == before
    assert (await move(db, (2, "a", "receive", 1), (2, "a", "receive", 1)))[0] == ["applied", "known"]


async def test_units_that_are_held_or_not_there_can_not_be_taken_away(db: Db) -> None:
    await db.reserve(make(1, ("a", 4)))
    outcomes, counts, _ = await move(db, (1, "a", "adjust", -7), (2, "a", "adjust", -6), (3, "a", "adjust", -1))
    assert outcomes == ["insufficient_stock", "applied", "insufficient_stock"]
    assert counts["a"] == Counts(4, 4, 3, 1)
    assert await db.violations() == []


async def test_commands_apply_one_after_the_other(db: Db) -> None:
    outcomes, _, _ = await move(db, (1, "c", "adjust", -2), (2, "c", "receive", 1), (3, "c", "adjust", -2))
    assert outcomes == ["insufficient_stock", "applied", "applied"]
    assert await db.counts("c") == (0, 0, 0)


async def test_a_refused_command_may_be_given_again(db: Db) -> None:
    assert (await move(db, (1, "c", "adjust", -2)))[0] == ["insufficient_stock"]
    await move(db, (2, "c", "receive", 1))
    assert (await move(db, (1, "c", "adjust", -2)))[0] == ["applied"]


async def test_a_product_that_is_not_in_the_catalogue_has_no_stock(db: Db) -> None:
    before = await db.everything()
    outcomes, counts, sold = await move(db, (1, "zz", "receive", 5))
    assert (outcomes, counts, sold) == (["unknown_product"], {}, {})
    assert await db.everything() == before


async def test_stock_that_moves_without_redis_invalidates_what_it_knows(db: Db) -> None:
    _, counts, _ = await move(db, (1, "a", "receive", 5), (2, "b", "adjust", -9), unavailable=True)
    assert {product_id: now.generation for product_id, now in counts.items()} == {"a": 2, "b": 1}


async def test_products_that_are_there_already_stay_as_they_are(db: Db) -> None:
    await db.reserve(make(1, ("a", 4)))
    before = await db.everything()
    assert await db.store.load_catalogue([("a", "another name", 1, 99), ("b", "b", 1, 0)]) == 0
    assert await db.everything() == before
    assert await db.store.load_catalogue([("a", "a", 1, 99), ("new", "new", 5, 0)]) == 1
    assert await db.store.load_catalogue([]) == 0
    assert await db.counts("new") == (0, 0, 0)
    assert await db.violations() == []


# Guards

BROKEN = {
    "products_price_not_negative": "UPDATE products SET price_cents = -1",
    "stock_on_hand_not_negative": "UPDATE stock SET on_hand = -1, reserved = -1, initial = -1 WHERE product_id = 'c'",
    "stock_reserved_not_negative": "UPDATE stock SET reserved = -1 WHERE product_id = 'c'",
    "stock_not_oversold": "UPDATE stock SET reserved = 2 WHERE product_id = 'c'",
    "stock_sold_not_negative": "UPDATE stock SET sold = -1, on_hand = 2 WHERE product_id = 'c'",
    "stock_adds_up": "UPDATE stock SET on_hand = 5 WHERE product_id = 'c'",
    "stock_ledger_sign": "UPDATE stock_ledger SET quantity = 0 WHERE movement = 'hold'",
    "orders_have_lines": "UPDATE orders SET lines_committed = -1",
    "orders_reserved_total": "UPDATE orders SET total_cents = NULL",
    "orders_status_times": "UPDATE orders SET paid_at = now()",
    "orders_cancelled_reason": "UPDATE orders SET reason = 'expired'",
    "orders_confirmed_whole": "UPDATE orders SET lines_committed = 1",
    "stock_limit_positive": "UPDATE stock SET limit_per_user = 0, limited_since = now()",
    "stock_limited_since": "UPDATE stock SET limit_per_user = 1",
    "user_units_not_negative": "INSERT INTO user_units VALUES ('a', 'u', -1)",
    "orders_paid_cancelled": (
        "UPDATE orders SET status = 'CANCELLED', reason = 'expired', cancelled_at = now(), paid_at = now()"
    ),
    "order_lines_quantity_positive": "UPDATE order_lines SET quantity = 0",
    "order_lines_held_price": "UPDATE order_lines SET unit_price_cents = NULL",
    "order_lines_refused_reason": "UPDATE order_lines SET reason = 'expired'",
    "payments_charged_id": "UPDATE payments SET charge_id = NULL",
    "payments_refunded_at": "UPDATE payments SET refunded_at = now()",
    "letter_actions_drop_why": "INSERT INTO letter_actions VALUES (0, 0, now(), 'drop', NULL, NULL, now(), now())",
    "letter_actions_drop": "INSERT INTO letter_actions VALUES (0, 0, now(), 'drop', 'old', NULL, now(), NULL)",
    "stock_commands_move": f"INSERT INTO stock_commands VALUES ('{oid(9)}', 'a', 'hold', 1, '', 'applied', now())",
    "stock_commands_outcome": f"INSERT INTO stock_commands VALUES ('{oid(9)}', 'a', 'adjust', 1, '', 'known', now())",
}


async def test_every_constraint_bites(db: Db) -> None:
    await reserved_order(db)
    await paid(db, 2, ("a", 1))
    await db.store.pool.execute("DELETE FROM orders WHERE order_id = $1", oid(2))
    for name, broken in BROKEN.items():
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            await db.store.pool.execute(broken)
        assert caught.value.constraint_name == name, broken
    checks = await db.store.pool.fetch("SELECT conname FROM pg_constraint WHERE contype = 'c' AND conrelid <> 0")
    assert {row["conname"] for row in checks} == set(BROKEN)


TAMPERED = {
    "stock adds up": "UPDATE stock SET sold = sold + 1 WHERE product_id = 'a'",
    "nothing is negative": "UPDATE stock SET reserved = on_hand + 1 WHERE product_id = 'c'",
    "the ledger explains the counts": "DELETE FROM stock_ledger WHERE movement = 'hold' AND product_id = 'a'",
    "held lines explain the reservations": "UPDATE order_lines SET quantity = quantity + 1 WHERE state = 'held'",
    "every order has its lines": "DELETE FROM order_lines WHERE state = 'refused'",
    "an order is held whole or not at all": "UPDATE order_lines SET state = 'held' WHERE state = 'committed'",
    "the total is what the lines cost": "UPDATE orders SET total_cents = 1 WHERE status = 'CONFIRMED'",
    "charges minus refunds are the orders paid for": "DELETE FROM payments WHERE status = 'SUCCESS'",
    "no hold outlives its time": "UPDATE orders SET created_at = now() - interval '11 minutes' WHERE status = 'RESERVED'",
    "no order is paid and forgotten": "UPDATE order_lines SET quantity = quantity WHERE false",
    "no user has more than a product's limit": (
        "SELECT set_limit('a', 1); UPDATE stock SET limited_since = now() - interval '1 hour'"
        " WHERE limit_per_user IS NOT NULL"
    ),
    "the lines explain what users have": "SELECT set_limit('a', 9); UPDATE user_units SET units = units + 1",
    "cancelled orders hold nothing": "UPDATE order_lines SET state = 'held' WHERE state = 'released'",
}


@pytest.mark.parametrize("promise", TAMPERED)
async def test_every_promise_notices_when_it_is_broken(db: Db, promise: str) -> None:
    await paid(db, 1, ("a", 2))
    await db.settle((1, "a", COMMIT))
    await cancelled(db, 2, ("a", 1))
    await db.settle((2, "a", RELEASE))
    await db.reserve(make(3, ("b", 1)), make(4, ("b", 99)))
    assert await db.violations() == []
    if promise == "no order is paid and forgotten":
        await db.decide((3, "charged"))
    async with db.store.pool.acquire() as one:
        undone = one.transaction()
        await undone.start()
        checks = await one.fetch(
            "SELECT conrelid::regclass::text AS t, conname FROM pg_constraint WHERE contype = 'c' AND conrelid <> 0"
        )
        for check in checks:
            await one.execute(f"ALTER TABLE {check['t']} DROP CONSTRAINT {check['conname']}")
        await one.execute(TAMPERED[promise])
        assert promise in {row.split(":")[0] for row in await db.violations(grace_s=0.0, by=one)}
        await undone.rollback()
    assert set(TAMPERED) == set(statements("invariants.sql"))


# Any batches, against a model


class Model:
    """What the shop would do with a sheet of paper: first come, first served, each line once."""

    def __init__(self, **units: int) -> None:
        self.left = dict(units)
        self.sold = dict.fromkeys(units, 0)
        self.lines: dict[tuple[int, str], str | None] = {}

    def reserve(self, n: int, product_id: str, units: int) -> str | None:
        if (n, product_id) not in self.lines:
            if product_id not in self.left:
                reason: str | None = UNKNOWN
            elif units > self.left[product_id]:
                reason = SOLD_OUT
            else:
                reason = HELD
                self.left[product_id] -= units
            self.lines[n, product_id] = reason
        return self.lines[n, product_id]

    def settle(self, product_id: str, units: int, action: str) -> None:
        (self.sold if action == COMMIT else self.left)[product_id] += units


class Worker:
    """The stages' way with Redis and Postgres, record by record chosen at random, with crashes in between."""

    def __init__(self, db: Db, gate: Gate, model: Model, seed: int) -> None:
        self.db, self.gate, self.model, self.dice = db, gate, model, random.Random(seed)
        self.orders: dict[int, Order] = {}
        self.elsewhere: set[tuple[int, str]] = set()  # lines that another owner decides
        self.handed: list[tuple[int, str, int]] = []  # and that are on their way to it
        self.open: set[int] = set()
        self.due: list[tuple[int, str, str]] = []
        self.settled: list[tuple[int, str, str]] = []

    def odds(self, share: float) -> bool:
        return self.dice.random() < share

    async def round(self) -> None:
        """Live through one batch of each stage."""
        self.gate._unavailable_until = time.monotonic() + 3600 if self.odds(0.15) else 0.0
        if self.odds(0.1):
            await self.gate.client.flushall()
        if self.odds(0.1):
            await self.gate.client.script_flush()
        if self.odds(0.1):
            self.gate.invalidated(await self.db.store.invalidate_gate(self.dice.sample("abcd", 2)))
        batch = [self.new_order() for _ in range(self.dice.randrange(9))]
        batch += self.dice.sample(sorted(self.orders), min(len(self.orders), self.dice.randrange(4)))
        batch = list(dict.fromkeys(batch))
        self.dice.shuffle(batch)
        handed, self.handed = self.handed, []
        handed += self.dice.sample(sorted(self.again), min(len(self.again), 2))
        await self.reserve(batch, handed)
        await self.decide()
        await self.settle()
        if self.odds(0.3):
            await self.move()

    @property
    def again(self) -> set[tuple[int, str, int]]:
        """Lines that were handed over before, and may come again."""
        return {
            (n, product_id, units)
            for n, product_id in self.elsewhere
            for known, units in self.orders[n].lines
            if known == product_id and (n, product_id) in self.model.lines
        }

    def new_order(self) -> int:
        n = len(self.orders) + 1
        products = self.dice.sample(["a", "b", "c", "d", "zz"], self.dice.choice([1, 1, 2, 3]))
        self.orders[n] = make(n, *((product_id, self.dice.randrange(1, 6)) for product_id in products))
        for product_id in products[1:]:
            if self.odds(0.4):
                self.elsewhere.add((n, product_id))
        self.open.add(n)
        return n

    async def reserve(self, batch: list[int], handed: list[tuple[int, str, int]]) -> None:
        if self.odds(0.3):  # a crash after Lua; then the records come again, cut into other batches
            await self.gate.take([line[:3] for line in self.asked(batch, handed)])
            cut = self.dice.randrange(len(batch) + 1)
            await self.reserve_once(batch[:cut], [])
            batch = batch[cut:]
        if self.odds(0.2):  # a crash after the commit
            await self.reserve_once(batch, handed, update=False)
        await self.reserve_once(batch, handed)

    def asked(self, batch: list[int], handed: list[tuple[int, str, int]]) -> list[tuple[str, str, int]]:
        return [
            *(
                (product_id, oid(n), units)
                for n in batch
                for product_id, units in self.orders[n].lines
                if (n, product_id) not in self.elsewhere
            ),
            *((product_id, oid(n), units) for n, product_id, units in handed),
        ]

    async def reserve_once(self, batch: list[int], handed: list[tuple[int, str, int]], update: bool = True) -> None:
        asked = self.asked(batch, handed)
        verdicts, unavailable = await self.gate.take(asked)
        gates = {
            (order_id, product_id): verdict for (product_id, order_id, _), verdict in zip(asked, verdicts, strict=True)
        }
        lines = [
            LineToDecide(k, oid(n), product_id, units, gates.get((oid(n), product_id), NOT_OURS))
            if (n, product_id) not in self.elsewhere
            else LineToDecide(k, oid(n), product_id, units, NOT_OURS)
            for k, n in enumerate(batch, 1)
            for product_id, units in self.orders[n].lines
        ]
        lines += [
            LineToDecide(0, oid(n), product_id, units, gates[oid(n), product_id]) for n, product_id, units in handed
        ]
        reserved = await self.db.store.reserve(
            [(self.orders[n], Place("orders", 0, n)) for n in batch], lines, gate_unavailable=unavailable
        )
        expected: list[str | None] = []
        for n in batch:
            for product_id, units in self.orders[n].lines:
                if (n, product_id) not in self.elsewhere:
                    expected.append(self.model.reserve(n, product_id, units))
                else:
                    expected.append(self.model.lines.get((n, product_id), "pending"))
                    if not reserved.order_known[batch.index(n)]:
                        self.handed.append((n, product_id, units))
        expected += [self.model.reserve(*line) for line in handed]
        assert [line.reason for line in reserved.lines] == expected
        assert not any(reserved.order_reused)
        if update:
            takes: dict[str, list[str]] = {}
            for (product_id, order_id, _), verdict in zip(asked, verdicts, strict=True):
                if verdict != REFUSED:
                    takes.setdefault(product_id, []).append(order_id)
            await self.update_gate(reserved.counts, takes)

    async def update_gate(self, counts: dict[str, Counts], takes: dict[str, list[str]] | None = None) -> None:
        takes = takes or {}
        if not await self.gate.decided(counts, takes):
            self.gate.invalidated(await self.db.store.invalidate_gate(sorted({*counts, *takes})))

    async def decide(self) -> None:
        whole = [n for n in self.open if all((n, p) in self.model.lines for p, _ in self.orders[n].lines)]
        steps: list[tuple[int, str, Any]] = []
        for n in sorted(whole):
            self.open.remove(n)
            lines = self.orders[n].lines
            refused = [self.model.lines[n, product_id] for product_id, _ in lines if self.model.lines[n, product_id]]
            total = 100 * sum(units for _, units in lines)
            if refused:
                if len(lines) > 1:
                    steps.append((n, "cancel", min(refused, key=[*Reason].index)))
                action: str = RELEASE
            else:
                steps += [(n, "reserve", total)] if len(lines) > 1 else []
                step = self.dice.choice(["charged", "charged", "declined", "cancel"])
                steps.append((n, step, Reason.EXPIRED if step == "cancel" else total))
                action = COMMIT if step == "charged" else RELEASE
            self.due += [(n, product_id, action) for product_id, _ in lines if not self.model.lines[n, product_id]]
        for _ in range(1 + self.odds(0.3)):
            await self.db.decide(*steps)

    async def settle(self) -> None:
        self.dice.shuffle(self.due)
        cut = self.dice.randrange(len(self.due) + 1)
        now, self.due = self.due[:cut], self.due[cut:]
        for n, product_id, action in now:
            self.model.settle(product_id, dict(self.orders[n].lines)[product_id], action)
        self.settled += now
        again = self.dice.sample(self.settled, min(len(self.settled), self.dice.randrange(5)))
        lines = list(dict.fromkeys([*now, *again]))
        self.dice.shuffle(lines)
        for crash in (self.odds(0.3), False):
            settled = await self.db.settle(*lines, unavailable=self.gate.is_unavailable)
            assert settled.misfits == []
            if not crash:
                await self.update_gate(settled.counts)
                return

    async def move(self) -> None:
        product_id, units = self.dice.choice("abcd"), self.dice.choice([-4, -1, 1, 3, 8])
        fits = self.model.left[product_id] + units >= 0
        command = (self.dice.randrange(10**9), product_id, "adjust", units)
        for crash in (self.odds(0.3), False):
            (outcome,), counts, _ = await move(self.db, command, unavailable=self.gate.is_unavailable)
            assert outcome in (("applied", "known") if fits else ("insufficient_stock",))
            if not crash:
                await self.update_gate(counts)
                break
        if fits:
            self.model.left[product_id] += units


@pytest.mark.parametrize("seed", range(4))
async def test_any_batches_with_repeats_and_crashes_come_to_what_a_model_says(
    engines: LocalEngines, db: Db, redis_prefix: str, seed: int
) -> None:
    model = Model(a=60, b=35, c=3, d=0)
    await db.store.pool.execute("DELETE FROM stock; DELETE FROM stock_ledger; DELETE FROM products")
    await db.stock(**model.left)
    gate = Gate(engines.addresses()["redis_url"], redis_prefix, db.store.load_gate, timeout_s=10.0)
    worker = Worker(db, gate, model, seed)
    for _ in range(40):
        await worker.round()
    gate._unavailable_until = 0.0
    while worker.handed or worker.open or worker.due:
        handed, worker.handed = worker.handed, []
        await worker.reserve_once([], handed)
        await worker.decide()
        await worker.settle()

    assert {product_id: await db.counts(product_id) for product_id in model.left} == {
        product_id: (units, 0, model.sold[product_id]) for product_id, units in model.left.items()
    }
    assert sum(model.sold.values()) > 20, "something has to happen"
    assert await db.violations(grace_s=0.0) == []
    verdicts, unavailable = await gate.take(
        [(product_id, oid(10**9), 10**6) for product_id in model.left]
    )  # loads what is invalid
    assert (verdicts, unavailable) == ([REFUSED] * 4, False)
    rows = await db.store.products(list(model.left))
    redis = await gate.inspect({row["product_id"]: row["generation"] for row in rows})
    assert {p: (c.on_hand - c.reserved, c.taken) for p, c in redis.items()} == {
        p: (n, 0) for p, n in model.left.items()
    }
    await gate.close()


# Removal of orders that ended long ago


async def sold(db: Db, *numbers: int) -> None:
    """Sell one unit of product a to each of these orders."""
    await db.reserve(*(make(n, ("a", 1)) for n in numbers))
    await db.decide(*((n, "charged") for n in numbers))
    await db.settle(*((n, "a", COMMIT) for n in numbers))


async def removed(by: Any, *, really: bool = True) -> tuple[int, dict[str, int]]:
    """Remove what could be removed tomorrow, if Kafka had nothing; return how many orders, and how many stayed by reason."""
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    row = await by.fetchrow(
        statements("queries.sql")["remove_orders"], BEGINNING, NO_ID, 100, tomorrow, None, [1_000], [], really
    )
    return row["removed"], dict(zip(row["whys"] or (), row["numbers"] or (), strict=True))


async def test_what_was_sold_to_removed_orders_is_carried_forward_again_and_again(db: Db) -> None:
    for numbers in ((1, 2), (3,), (0,)):  # the last one's id is the nil UUID, which what is carried has for its source
        await sold(db, *numbers)
        assert await removed(db.store.pool, really=False) == (len(numbers), {})
        assert await removed(db.store.pool) == (len(numbers), {})
        assert await db.violations() == []
    assert await db.counts("a") == (6, 0, 4)
    rows = await db.store.pool.fetch("SELECT quantity FROM stock_ledger WHERE movement = 'carried'")
    assert [row["quantity"] for row in rows] == [4]
    assert await removed(db.store.pool) == (0, {})
    await sold(db, 1)
    assert await db.counts("a") == (5, 0, 5)
    assert await db.violations() == []


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ("UPDATE order_lines SET quantity = 2", "unsound"),
        ("UPDATE order_lines SET state = 'released'", "unsound"),
        ("UPDATE orders SET line_count = 2, lines_committed = 2", "unsound"),
        ("DELETE FROM order_lines", "unsound"),
        ("DELETE FROM payments", "unsound"),
        ("UPDATE payments SET amount_cents = 1", "unsound"),
        ("DELETE FROM stock_ledger WHERE movement = 'commit'", "unsound"),
        ("INSERT INTO stock_ledger SELECT product_id, source_id, 'release', quantity FROM stock_ledger"
         " WHERE movement = 'commit'", "unsound"),
        ("SELECT set_limit('a', 3)", "limit"),
        ("UPDATE orders SET source_offset = 1000", "kafka"),
        ("UPDATE orders SET source_partition = 1", "kafka"),
        ("UPDATE orders SET met_again_at = now() + interval '2 days'", "recent"),
        ("UPDATE stock_ledger SET at = now() + interval '2 days' WHERE movement = 'commit'", "recent"),
        ("UPDATE payments SET created_at = now() + interval '2 days'", "recent"),
    ],
)  # fmt: skip
async def test_an_order_stays_for_a_reason(db: Db, broken: str, why: str) -> None:
    await sold(db, 1)
    await db.store.pool.execute(broken)
    before = await db.everything()
    assert await removed(db.store.pool) == (0, {why: 1})
    assert await db.everything() == before


async def test_a_known_order_is_noted_when_another_record_brings_it_and_not_when_its_own_does(db: Db) -> None:
    note = "SELECT met_again_at FROM orders WHERE order_id = $1"
    await db.reserve(make(1, ("a", 1)), make(2, ("a", 1)))
    await db.reserve(make(1, ("a", 1)), make(2, ("a", 1)))
    assert await db.store.pool.fetchval("SELECT count(met_again_at) FROM orders") == 0
    await db.reserve(make(2, ("a", 1), user_id="somebody else"))  # at another offset; refused, and yet it must be known
    noted = await db.store.pool.fetchval(note, oid(2))
    assert noted is not None
    await db.reserve(make(2, ("a", 1)))
    assert await db.store.pool.fetchval(note, oid(2)) == noted, "within the half hour"
    assert await db.store.pool.fetchval(note, oid(1)) is None


async def test_an_order_that_is_met_again_while_it_is_removed_is_one_or_the_other(db: Db) -> None:
    await sold(db, 7, 8)
    again = make(8, ("a", 1))
    async with db.store.pool.acquire() as connection:
        async with connection.transaction():
            assert (await removed(connection))[0] == 2
            waits = asyncio.create_task(db.reserve(again))
            await asyncio.sleep(0.2)
            assert not waits.done()
        with pytest.raises(asyncpg.SerializationError):
            await waits
        assert (await db.reserve(again)).order_known == [False], "a new order by now"
        async with connection.transaction():
            await sold(db, 9)
            await connection.execute("SELECT FROM orders WHERE order_id = $1 FOR UPDATE", oid(9))
            assert await removed(db.store.pool) == (0, {"open": 1, "in use": 1})
    assert await db.violations() == []


async def test_a_limit_that_is_set_while_orders_are_removed_counts_them_or_not(db: Db) -> None:
    await sold(db, 1, 2)
    async with db.store.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT set_limit('a', 5)")
        waits = asyncio.create_task(removed(db.store.pool))
        await asyncio.sleep(0.2)
        assert not waits.done()
    with pytest.raises(asyncpg.SerializationError):
        await waits
    assert await removed(db.store.pool) == (0, {"limit": 2})
    assert await db.violations() == []


# At the same time

ROUNDS = 200
PRODUCTS = [f"p{n}" for n in range(8)]


async def until_available(call: Callable[[], Awaitable[T]], faults: list[BaseException]) -> T:
    """Try again as the stages do; whatever else is raised comes through."""
    while True:
        try:
            return await call()
        except TRANSIENT as error:
            faults.append(error)


async def test_reserving_and_settling_the_same_products_in_opposite_order_never_deadlocks(db: Db) -> None:
    await db.stock(**dict.fromkeys(PRODUCTS, 10**6))
    faults: list[BaseException] = []
    ready: asyncio.Queue[int] = asyncio.Queue()
    dice = random.Random(5)

    async def reserving() -> None:
        for n in range(ROUNDS):
            orders = [make(10 * n + k, *((p, 1) for p in dice.sample(PRODUCTS, 5))) for k in (3, 1, 2)]
            reserved = await until_available(partial(db.reserve, *orders), faults)
            assert [line.reason for line in reserved.lines] == [HELD] * 15
            steps = [(10 * n + k, step, 500) for k in (2, 3, 1) for step in ("reserve", "charged")]
            await until_available(partial(db.decide, *steps), faults)
            for k in (1, 2, 3):
                ready.put_nowait(10 * n + k)

    async def settling() -> None:
        for _ in range(ROUNDS):
            numbers = [await ready.get() for _ in range(3)]
            lines = [(n, p, COMMIT) for n in reversed(numbers) for p in sorted(await db.lines(n), reverse=True)]
            assert (await until_available(partial(db.settle, *lines), faults)).settled == 15

    async def moving() -> None:
        for n in range(ROUNDS):
            moves = [(10**6 + 100 * n + k, p, "receive", 1) for k, p in enumerate(dice.sample(PRODUCTS, 8))]
            await until_available(partial(move, db, *moves), faults)
            await until_available(partial(db.store.invalidate_gate, dice.sample(PRODUCTS, 8)), faults)

    await asyncio.gather(reserving(), settling(), moving())
    assert faults == []
    rows = await db.store.products(PRODUCTS)
    assert sum(row["sold"] for row in rows) == ROUNDS * 15
    assert all(row["received"] == ROUNDS and row["reserved"] == 0 for row in rows)
    assert await db.violations(grace_s=0.0) == []


async def test_two_workers_that_both_take_themselves_for_the_owner_hold_each_line_once(db: Db) -> None:
    await db.stock(**dict.fromkeys(PRODUCTS, 100))
    faults: list[BaseException] = []
    for n in range(40):
        orders = [make(10 * n + k, (PRODUCTS[k], 2), (PRODUCTS[(k + n) % 7 + 1], 1)) for k in range(0, 6, 2)]
        orders = [order for order in orders if len(dict(order.lines)) == 2]
        one, other = await asyncio.gather(
            until_available(partial(db.reserve, *orders), faults),
            until_available(partial(db.reserve, *orders[::-1]), faults),
        )
        assert sorted(one.order_known + other.order_known) == [False] * len(orders) + [True] * len(orders)
        assert [line.reason for line in one.lines] == [HELD] * 2 * len(orders)
        assert [line.reason for line in other.lines] == [HELD] * 2 * len(orders)
    assert {type(fault) for fault in faults} <= {asyncpg.SerializationError}
    assert await db.violations() == []


async def test_two_workers_that_both_settle_the_same_lines_at_once_settle_each_once(db: Db) -> None:
    await db.stock(x=10_000, y=10_000)
    faults: list[BaseException] = []
    for n in range(30):
        numbers = [100 * n + k for k in range(20)]
        for number in numbers:
            await paid(db, number, ("x", 1), ("y", 2))
        lines = [(number, product_id, COMMIT) for number in numbers for product_id in "xy"]
        one, other = await asyncio.gather(
            until_available(partial(db.settle, *lines), faults),
            until_available(partial(db.settle, *lines[::-1]), faults),
        )
        assert sorted((one.settled, other.settled)) == [0, len(lines)]
        confirmed = {order_id for order_id, _ in one.confirmed}
        assert confirmed == {order_id for order_id, _ in other.confirmed} == {oid(number) for number in numbers}
        assert one.misfits == other.misfits == []
    assert {type(fault) for fault in faults} <= {asyncpg.SerializationError}
    assert (await db.counts("x"))[1:] == (0, 600)
    assert (await db.counts("y"))[1:] == (0, 1_200)
    assert await db.violations() == []


async def test_an_array_comes_to_postgres_as_it_was(db: Db) -> None:
    texts = ["plain", "null", None, "", " ", "a,b", '"', "\\", '\\"', "{}", "é€🙂", "\n", "\x7f\u2028", "x" * 70_000]
    assert await db.store.pool.fetchval("SELECT $1::text::text[]", array(texts)) == texts
    numbers = [0, -1, None, 2**62]
    assert await db.store.pool.fetchval("SELECT $1::text::bigint[]", array(numbers)) == numbers
    times = [datetime(1, 1, 1, tzinfo=UTC), None, datetime(2026, 2, 28, 23, 59, 59, 999_999, tzinfo=UTC)]
    assert await db.store.pool.fetchval("SELECT $1::text::timestamptz[]", array(times)) == times
    assert await db.store.pool.fetchval("SELECT $1::text::uuid[]", array(())) == []


async def test_expiries_and_payments_of_the_same_orders_at_once_come_to_one_end_each(db: Db) -> None:
    faults: list[BaseException] = []
    await db.stock(many=10_000)
    for n in range(30):
        numbers = [1_000 * n + k for k in range(40)]
        await db.reserve(*(make(number, ("many", 1)) for number in numbers))
        expiring = [(number, "cancel") for number in numbers]
        paying = [(number, "charged") for number in reversed(numbers)]
        expired, charged = await asyncio.gather(
            until_available(partial(db.decide, *expiring), faults), until_available(partial(db.decide, *paying), faults)
        )
        for ended, bought in zip(expired, reversed(charged), strict=True):
            assert ended.changed + bought.changed == 1
            assert bought.payment == ("SUCCESS" if bought.changed else "REFUND_DUE")
    assert faults == []
    assert await db.violations() == []
