"""Postgres as people and the gate use it: reading orders, the catalogue, limits, and what its constraints refuse."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from orderstream.engines.local import LocalEngines
from orderstream.lua.gate import Counts, UserLimit
from orderstream.sql.prepare import schema
from orderstream.sql.stages import NotEnough
from orderstream.sql.store import REMOVED, TRANSIENT, NotReplicated, Store, array, query
from orderstream.streams.partitions import product_partition
from tests.integration.tables import Move, Tables, database, is_blocked, new, oid, outcome

pytestmark = pytest.mark.engines

PARTITIONS = 2
OWNERS = {"a": 0, "b": 0, "c": 1}


class Db(Tables):
    """The tables, and the statements on them."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.pool)
        self.store = store

    async def user_units(self) -> dict[str, int]:
        """Return what users have of the product a."""
        return {user: units for (product_id, user), units in (await self.units()).items() if product_id == "a"}

    async def set_limit(self, product_id: str, limit: int | None) -> bool:
        """Set a limit, as the product's owner does."""
        return bool(await self.pool.fetchval("SELECT set_limit($1, $2)", product_id, limit))

    async def recounted(self, connection: Any) -> tuple[list[Any], list[Any]]:
        """Return who has what of the product a: as it was counted order by order, and as it is counted anew."""
        statement = "SELECT user_id, units FROM user_units WHERE product_id = 'a' AND units > 0 ORDER BY 1"
        before = await connection.fetch(statement)
        await connection.execute("SELECT recount_users('a')")
        return before, await connection.fetch(statement)


@pytest.fixture(scope="module")
def prepared(engines: LocalEngines) -> Iterator[str]:
    """A database that these tests share, one after the other: a new one costs more than most of them."""
    yield from database(engines, schema())


@pytest.fixture
async def db(prepared: str) -> AsyncIterator[Db]:
    store = await Store.connect(prepared)
    db = Db(store)
    await db.empty()
    for product_id, units in (("a", 10), ("b", 5), ("c", 1)):
        await db.product(product_id, OWNERS[product_id], units)
    yield db
    assert await db.faults() == []
    await store.close()


# Reading orders


async def read(db: Db, n: int) -> Mapping[str, Any]:
    order = await db.store.order(oid(n))
    assert order is not None
    return order


async def test_an_order_is_read_whole_with_its_lines_as_they_were_named(db: Db) -> None:
    worker = await db.worker().claim(0, 1)
    await worker.hold(new(1, ("c", 1, "a", None, 1), ("a", 2, "h", None, 0), user="v"))
    refused = new(2, ("b", 9, "x", "insufficient_stock"), ("a", 1, "r"))
    await worker.hold(refused)
    order = await read(db, 1)
    assert order["lines"] == [
        {"product_id": "c", "quantity": 1, "unit_price_cents": None, "state": "pending", "reason": None},
        {"product_id": "a", "quantity": 2, "unit_price_cents": 100, "state": "held", "reason": None},
    ]
    assert (order["order_id"], order["status"], order["user_id"], order["home"]) == (oid(1), "CREATED", "v", 0)
    assert (order["total_cents"], order["payment_status"], order["amount_cents"]) == (None, None, None)
    order = await read(db, 2)
    assert (order["status"], order["reason"]) == ("CANCELLED", "insufficient_stock")
    assert [(line["product_id"], line["state"], line["reason"]) for line in order["lines"]] == [
        ("b", "refused", "insufficient_stock"),
        ("a", "released", None),
    ]
    assert await db.store.order(oid(3)) is None

    states = await db.store.order_states([oid(n) for n in (1, 2, 3)])
    assert states.keys() == {oid(1), oid(2)}
    assert (states[oid(1)]["product_ids"], states[oid(1)]["quantities"]) == (["c", "a"], [1, 2])
    histories = await db.store.order_histories([oid(n) for n in (1, 2, 3)])
    assert {i: (row["status"], row["created_at"] == row["cancelled_at"]) for i, row in histories.items()} == {
        oid(1): ("CREATED", False),
        oid(2): ("CANCELLED", True),
    }
    ended = await db.store.ended([oid(n) for n in (1, 2, 3)])
    assert [(row["order_id"], row["reason"], row["ended_at"]) for row in ended] == [
        (oid(2), "insufficient_stock", order["cancelled_at"])
    ]


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        ([("CONFIRMED", None, "SUCCESS", "ch")], ("SUCCESS", 300, "ch", "paid_at", False)),
        (
            [("CONFIRMED", None, "SUCCESS", "ch"), ("CANCELLED", "cancelled_by_user", "REFUND_DUE", "ch")],
            ("REFUND_DUE", 300, "ch", "paid_at", False),
        ),
        ([("CANCELLED", "payment_declined", "FAILED", None)], ("FAILED", 300, None, "cancelled_at", False)),
        ([("CANCELLED", "expired", "VOID_DUE", None)], ("VOID_DUE", 300, None, None, False)),
        (
            [("CANCELLED", "expired", "VOID_DUE", None), ("CANCELLED", "expired", "VOIDED", None)],
            ("VOIDED", 300, None, None, True),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
async def test_what_is_known_of_the_money_of_an_order(db: Db, ends: Sequence[Any], shown: Any) -> None:
    worker = await db.worker().claim(0)
    await worker.hold(new(1, ("a", 3)))
    status = "RESERVED"
    for end, reason, payment, charge_id in ends:
        await worker.settle(Move(1, status, end, reason, payment, charge_id))
        status = end
    order = await read(db, 1)
    names = ("payment_status", "amount_cents", "charge_id")
    at = None if shown[3] is None else order[shown[3]]
    assert (*(order[name] for name in names), order["charged_at"]) == (*shown[:3], at)
    assert (order["refunded_at"] is not None) is shown[4]


# The catalogue


async def test_products_that_are_there_already_stay_as_they_are(db: Db) -> None:
    await (await db.worker().claim(0)).hold(new(1, ("a", 4)))
    before = await db.everything()
    assert await db.store.load_catalogue([("a", "another name", 1, 99), ("b", "b", 1, 0)], PARTITIONS) == 0
    assert await db.everything() == before
    assert await db.store.load_catalogue([("a", "a", 1, 99), ("new", "New", 5, 7)], PARTITIONS) == 1
    assert await db.store.load_catalogue([], PARTITIONS) == 0
    (row,) = await db.store.products(["new"])
    assert (row["name"], row["price_cents"], row["available"], row["initial"]) == ("New", 5, 7, 7)
    assert await db.ledger("new") == [("initial", 7, [])]


async def test_a_unit_counts_at_the_price_when_it_was_sold_and_takes_away_what_the_last_ones_brought(db: Db) -> None:
    await db.store.load_catalogue([("priced", "Priced", 100, 10)], PARTITIONS)
    brought = []
    for price, sold in ((100, 2), (250, 1), (250, -2), (10**12, 9), (0, -3), (0, -7)):
        await db.pool.fetchval("SELECT put_product('priced', 0, NULL, $1)", price)
        await db.pool.execute(
            "UPDATE stock SET on_hand = on_hand - $1, sold = sold + $1 WHERE product_id = 'priced'", sold
        )
        rows = await db.pool.fetch(query("product_sales"), 10)
        brought += [row["revenue_cents"] for row in rows if row["product_id"] == "priced"]
    assert brought == [200, 450, 100, 9 * 10**12 + 100, 7 * (9 * 10**12 + 100) // 10, 0]


async def test_two_that_load_the_same_products_in_any_order_load_each_once(db: Db) -> None:
    products = [(f"p{n:03}", "p", 100, n) for n in range(300)]
    loaded = await asyncio.gather(
        *(db.store.load_catalogue(part, PARTITIONS) for part in (products, products[::-1], products[100:]))
    )
    assert sum(loaded) == len(products)
    assert await db.store.pool.fetchval("SELECT count(*) FROM ledger WHERE movement = 'initial'") == len(products)


async def test_a_product_that_is_loaded_while_its_owner_makes_it_is_there_once(db: Db) -> None:
    worker = await db.worker().claim(0)
    cups = [cup for n in range(100) if product_partition(cup := f"cup-{n}", PARTITIONS) == 0]
    for n, cup in enumerate(cups[:20]):
        loaded, made = await asyncio.gather(
            db.store.load_catalogue([(cup, "loaded", 1, 0)], PARTITIONS),
            worker.command((n, cup, "product", {"name": "Cup", "price_cents": 2})),
        )
        assert made.row["each_outcome"] == ["applied"]
        decided = await db.store.stock_command(oid(n))
        assert decided is not None
        assert loaded + decided["change"] == 1
        (row,) = await db.store.products([cup])
        assert (row["name"], row["price_cents"]) == ("Cup", 2)


# Limits


async def test_a_new_limit_counts_what_users_have_of_orders_at_home_and_of_lines_of_other_homes(db: Db) -> None:
    worker = await db.worker().claim(0, 1)
    await worker.hold(*(new(n, ("a", 1), user=user) for n, user in ((1, "u"), (2, "u"), (3, "v"), (4, "w"))))
    sold = [Move(n, "RESERVED", "CONFIRMED", None, "SUCCESS", "ch", states="c") for n in (2, 4)]
    await worker.settle(*sold, moved=[("commit", 2, "a", 1), ("commit", 4, "a", 1)])
    await worker.settle(
        Move(3, "RESERVED", "CANCELLED", "expired", "VOID_DUE", states="r"),
        Move(4, "CONFIRMED", "CANCELLED", "cancelled_by_user", "REFUND_DUE", "ch", states="n"),
        moved=[("release", 3, "a", 1), ("return", 4, "a", 1)],
    )
    foreign = [new(n, ("c", 1, "a", None, 1), ("a", 1, "a", None, 0), home=1, user="w") for n in (5, 6, 7, 8)]
    await worker.hold(*foreign)
    await worker.settle(
        held=[(0, n, "a", 1, "w", units, state, reason) for n, units, state, reason in (
            (5, 2, "h", None), (6, 3, "h", None), (7, 1, "x", "user_limit"), (8, 1, "r", None))],
        moved=[("hold", 5, "a", 2), ("hold", 6, "a", 3)],
    )  # fmt: skip
    await worker.settle(ended=[(6, "a", "h", "c")], moved=[("commit", 6, "a", 3)])
    await worker.settle(  # its home has heard of one of them: that counts once all the same
        Move(5, "CREATED", "CREATED", total=None, states="ah", prices="{NULL,100}"), partitions=[1]
    )
    assert await db.user_units() == {}
    assert await db.set_limit("a", 2)
    assert await db.user_units() == {"u": 2, "w": 5}
    assert await db.set_limit("a", None)
    assert await db.user_units() == {}


async def test_a_user_who_has_more_than_a_new_limit_keeps_it_and_gets_no_more_until_it_is_given_back(db: Db) -> None:
    worker = await db.worker().claim(0)
    await worker.hold(new(1, ("a", 3)))
    assert await db.set_limit("a", 2)
    with pytest.raises(NotEnough):
        await worker.hold(new(2, ("a", 1)))
    release = Move(1, "RESERVED", "CANCELLED", "expired", "VOID_DUE", states="r")
    await worker.settle(release, moved=[("release", 1, "a", 3)], users=[("a", "u", -3)])
    assert (await worker.hold(new(2, ("a", 2)), new(3, ("a", 2), user="v"))).users == {"a": [("u", 2), ("v", 2)]}
    assert await db.set_limit("a", None)
    assert (await worker.hold(new(4, ("a", 4)))).users == {}


async def test_a_change_of_a_limit_invalidates_what_redis_knows_and_no_change_does_not(db: Db) -> None:
    found = []
    for limit in (None, 2, 2, 3, None):
        assert await db.set_limit("a", limit)
        (row,) = await db.store.pool.fetch(
            "SELECT generation, limit_per_user, limited_since FROM stock WHERE product_id = 'a'"
        )
        found.append((row["generation"], row["limit_per_user"], row["limited_since"] is not None))
    assert found == [(1, None, False), (2, 2, True), (2, 2, True), (3, 3, True), (4, None, False)]
    assert not await db.set_limit("nothing", 1)


@pytest.mark.parametrize(
    ("before", "after", "units"),
    [(None, 5, {"u": 2}), (None, 1, None), (5, None, {}), (5, 1, None), (1, 5, {"u": 2})],
)
async def test_an_order_that_waits_for_a_new_limit_is_decided_by_it(
    db: Db, before: int | None, after: int | None, units: dict[str, int] | None
) -> None:
    worker = await db.worker().claim(0)
    await db.set_limit("a", before)
    async with db.pool.acquire() as connection:
        begun = connection.transaction()
        await begun.start()
        await connection.execute("SELECT set_limit('a', $1)", after)
        holding = asyncio.ensure_future(outcome(worker.hold(new(1, ("a", 2)))))
        assert await is_blocked(db.pool, connection, holding)
        await begun.commit()
    assert await holding is (NotEnough if units is None else None)
    assert await db.user_units() == (units or {})


@pytest.mark.parametrize("what", ["hold", "release"])
async def test_a_new_limit_waits_for_what_is_being_counted_and_counts_it_once(db: Db, what: str) -> None:
    worker = await db.worker().claim(0)
    await worker.hold(new(1, ("a", 2)))
    async with db.pool.acquire() as connection:
        begun = connection.transaction()
        await begun.start()
        if what == "hold":
            await worker.hold(new(2, ("a", 1)), by=connection)
        else:
            release = Move(1, "RESERVED", "CANCELLED", "expired", "VOID_DUE", states="r")
            await worker.settle(release, moved=[("release", 1, "a", 2)], users=[("a", "u", -2)], by=connection)
        limiting = asyncio.ensure_future(db.set_limit("a", 9))
        assert await is_blocked(db.pool, connection, limiting)
        await begun.commit()
    assert await limiting
    assert await db.user_units() == ({"u": 3} if what == "hold" else {})


async def test_while_limits_come_and_go_every_unit_is_counted_once(db: Db) -> None:
    await db.product("many", 0, 100_000)
    await db.store.pool.execute("UPDATE stock SET on_hand = 100000, initial = 100000 WHERE product_id = 'a'")
    worker, seller = await db.worker().claim(0), db.worker()
    seller.settling = worker.settling
    held: asyncio.Queue[list[int]] = asyncio.Queue()
    numbers = iter(range(1, 1_000_000))

    async def hold() -> None:
        for _ in range(150):
            batch = [next(numbers) for _ in range(5)]
            orders = [new(n, ("a", 1 + n % 3), *([("many", 1)] if n % 2 else []), user=f"u{n % 4}") for n in batch]
            await worker.hold(*orders)
            held.put_nowait(batch)
        held.put_nowait([])

    async def settle() -> None:
        while batch := await held.get():
            await seller.settle(
                *(
                    Move(n, "RESERVED", "CANCELLED", "expired", "VOID_DUE", states="rr" if n % 2 else "r")
                    for n in batch[:3]
                ),
                moved=[("release", n, "a", 1 + n % 3) for n in batch[:3]]
                + [("release", n, "many", 1) for n in batch[:3] if n % 2],
                users=[("a", f"u{n % 4}", -(1 + n % 3)) for n in batch[:3]],
            )

    async def limit() -> None:
        for n in range(60):
            assert await db.set_limit("a", None if n % 3 == 2 else 10_000 + n)
            async with db.pool.acquire() as connection, connection.transaction():
                await connection.execute("SELECT FROM stock WHERE product_id = 'a' FOR UPDATE")
                counted, anew = await db.recounted(connection)
                assert counted == anew, n

    await asyncio.gather(hold(), settle(), limit())
    await db.set_limit("a", 20_000)
    assert sum((await db.user_units()).values()) == (await db.counts("a"))[1] > 0


async def test_users_who_have_nothing_are_forgotten(db: Db) -> None:
    await db.set_limit("a", 9)
    worker = await db.worker().claim(0)
    await worker.hold(new(1, ("a", 2)), new(2, ("a", 1), user="v"))
    release = Move(1, "RESERVED", "CANCELLED", "expired", "VOID_DUE", states="r")
    await worker.settle(release, moved=[("release", 1, "a", 2)], users=[("a", "u", -2)])
    assert await db.user_units() == {"u": 0, "v": 1}
    assert await db.pool.fetchval("SELECT forget_users('a')") == 1
    assert await db.user_units() == {"v": 1}


# Removal


async def test_ended_lines_of_orders_that_are_not_there_are_removed_once_no_record_names_them(db: Db) -> None:
    worker = await db.worker().claim(0, 1)
    lines = [(1, "h"), (2, "x"), (3, "r"), (4, "h"), (5, "r"), (6, "h")]
    reasons = {"x": "insufficient_stock"}
    await worker.settle(
        held=[(0, n, "a", 1, "w", 1, state, reasons.get(state)) for n, state in lines],
        moved=[("hold", n, "a", 1) for n, state in lines if state == "h"],
    )
    await worker.settle(
        ended=[(1, "a", "h", "r"), (6, "a", "h", "c")], moved=[("release", 1, "a", 1), ("commit", 6, "a", 1)]
    )
    await worker.hold(new(5, ("c", 1, "h", None, 1), ("a", 1, "r", None, 0), home=1))
    soon = datetime.now(UTC) + timedelta(minutes=1)

    async def remove(until: datetime, kafka_until: datetime | None, *, really: bool = True) -> tuple[int, list[int]]:
        number = await db.pool.fetchval(query("remove_strays"), 9, until, kafka_until, really)
        rows = await db.pool.fetch("SELECT order_id FROM holds ORDER BY order_id")
        return number, [row["order_id"].int for row in rows]

    everything = [1, 2, 3, 4, 5, 6]
    assert await remove(soon, soon, really=False) == (3, everything)
    assert await remove(soon - timedelta(hours=1), None) == (0, everything)
    assert await remove(soon, soon - timedelta(hours=1)) == (0, everything), "a record may name them"
    before = await db.counts("a")
    assert await remove(soon, None) == (3, [4, 5, 6])
    assert await db.ledger("a") == [("hold", 2, [(4, 1), (6, 1)]), ("commit", 1, [(6, 1)])]
    assert await db.counts("a") == before
    assert await remove(soon, None) == (0, [4, 5, 6])


async def test_the_id_of_an_order_that_was_removed_stays_known_and_is_written_with_the_removal(db: Db) -> None:
    worker = await db.worker().claim(0)
    await worker.hold(new(1, ("a", 99, "x", "insufficient_stock")), new(2, ("a", 1)))
    soon = datetime.now(UTC) + timedelta(minutes=1)
    everything = soon - timedelta(days=9), oid(0), 9, soon, None, [9] * PARTITIONS

    async def remove(by: Any, *, really: bool) -> int:
        return int((await by.fetchrow(query("remove_orders"), *everything, really))["removed"])

    assert await remove(db.pool, really=False) == 1
    async with db.pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        assert await remove(connection, really=True) == 1
        await transaction.rollback()
    assert await db.store.removed([oid(1), oid(2)]) == set()
    assert await remove(db.pool, really=True) == 1
    assert await db.store.removed([oid(1), oid(2), oid(3)]) == {oid(1)}
    states = await db.store.order_states([oid(1), oid(2), oid(3)])
    assert {order_id: row["status"] for order_id, row in states.items()} == {oid(1): REMOVED, oid(2): "RESERVED"}

    before = await db.counts("a")
    written = await worker.hold(new(1, ("a", 1)), new(2, ("a", 1)), new(3, ("a", 1)))
    assert sorted(written.row["known"]) == [oid(1), oid(2)]
    assert await db.counts("a") == before
    assert (await worker.hold(new(3, ("a", 1)))).row["known"] is None


# Stock commands, for people


async def test_a_command_is_kept_with_what_became_of_it(db: Db) -> None:
    worker = await db.worker().claim(0)
    outcomes = await worker.command((1, "a", "receive", 5), (2, "a", "adjust", -99))
    assert outcomes.row["each_outcome"] == ["applied", "insufficient_stock"]
    kept = await db.store.stock_command(oid(2))
    assert kept is not None
    assert (kept["command"], kept["quantity"], kept["outcome"]) == ("adjust", -99, "insufficient_stock")
    assert await db.store.stock_command(oid(3)) is None


# The gate


async def test_redis_is_loaded_while_the_rows_are_locked_with_limits_and_who_has_what(db: Db) -> None:
    await db.set_limit("a", 4)
    await db.set_limit("b", 2)
    await (await db.worker().claim(0)).hold(new(1, ("a", 3), ("c", 1, "a", None, 1)), new(2, ("a", 1), user="v"))
    seen: list[Any] = []

    async def loaded(counts: Mapping[str, Counts], limits: Mapping[str, UserLimit]) -> None:
        seen.append((counts, limits))
        locked = db.pool.fetch("SELECT FROM stock WHERE product_id = 'c' FOR UPDATE NOWAIT")
        assert await outcome(locked) is asyncpg.LockNotAvailableError

    await db.store.load_gate(["c", "a", "b", "nothing"], loaded)
    ((counts, limits),) = seen
    assert counts == {"a": Counts(10, 4, 2, 2, 1), "b": Counts(5, 0, 1, 2, 1), "c": Counts(1, 0, 1, 1)}
    assert limits == {"a": UserLimit(4, {"u": 3, "v": 1}), "b": UserLimit(2, {})}
    await db.store.load_gate(["nothing"], loaded)
    assert len(seen) == 1


async def test_what_redis_knows_is_invalidated_product_by_product(db: Db) -> None:
    assert await db.store.invalidate_gate(["c", "a", "nothing"]) == {"a": 2, "c": 2}
    assert await db.store.invalidate_gate(["a"]) == {"a": 3}
    assert await db.store.invalidate_gate([]) == {}


async def test_an_array_comes_to_postgres_as_it_was(db: Db) -> None:
    texts = ["plain", "null", None, "", " ", "a,b", '"', "\\", '\\"', "{}", "é€🙂", "\n", "\x7f\u2028", "x" * 70_000]
    assert await db.store.pool.fetchval("SELECT $1::text::text[]", array(texts)) == texts
    numbers = [0, -1, None, 2**62]
    assert await db.store.pool.fetchval("SELECT $1::text::bigint[]", array(numbers)) == numbers
    times = [datetime(1, 1, 1, tzinfo=UTC), None, datetime(2026, 2, 28, 23, 59, 59, 999_999, tzinfo=UTC)]
    assert await db.store.pool.fetchval("SELECT $1::text::timestamptz[]", array(times)) == times
    assert await db.store.pool.fetchval("SELECT $1::text::uuid[]", array(())) == []


# Statements that take too long, and faults that pass


@pytest.fixture
async def awaited(engines: LocalEngines, prepared: str) -> AsyncIterator[Callable[[str], Awaitable[int]]]:
    """Have each commit wait for a standby that is not there; return what counts the sessions that wait for something."""
    connection = await asyncpg.connect(prepared)
    await connection.execute("CREATE TABLE noted (n int)")
    await connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    await connection.execute("SELECT pg_reload_conf()")

    async def sessions(event: str) -> int:
        statement = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = $1"
        return int(await connection.fetchval(statement, event))

    yield sessions
    await connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
    await connection.execute("SELECT pg_reload_conf()")
    async with asyncio.timeout(30):
        while await sessions("SyncRep"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await connection.execute("DROP TABLE noted")
    await connection.close()


Sessions = Callable[[str], Awaitable[int]]
NOTED = "SELECT count(*) FROM noted"


@pytest.mark.parametrize("how", ["time is up", "cancelled"])
@pytest.mark.parametrize("in_transaction", [False, True], ids=["a statement", "a transaction"])
async def test_a_commit_that_waits_for_its_standby_is_not_cancelled(
    awaited: Sessions, prepared: str, how: str, in_transaction: bool
) -> None:
    store = await Store.connect(prepared, timeout_s=1.0)

    async def write() -> None:
        if in_transaction:
            async with store.pool.acquire() as connection, connection.transaction():
                await connection.execute("INSERT INTO noted VALUES (1)")
        else:
            await store.pool.execute("INSERT INTO noted VALUES ($1)", 1)

    if how == "cancelled":
        task = asyncio.create_task(write())
        async with asyncio.timeout(30):
            while not await awaited("SyncRep"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        with pytest.raises(TimeoutError):
            await write()
    await asyncio.sleep(0.5)
    assert (await awaited("SyncRep"), await store.pool.fetchval(NOTED)) == (1, 0), (
        "it is seen, and the standby has it not"
    )
    store.pool.terminate()


@pytest.mark.parametrize("how", ["time is up", "cancelled"])
async def test_a_transaction_whose_statement_is_dropped_fails_as_it_did(db: Db, prepared: str, how: str) -> None:
    store = await Store.connect(prepared, connections_max=1, timeout_s=0.5 if how == "time is up" else 30)

    async def sleep() -> None:
        async with store.pool.acquire() as connection, connection.transaction():
            await connection.execute("UPDATE stock SET name = 'lost'")
            await connection.fetchval("SELECT pg_sleep(60)")

    task = asyncio.create_task(sleep())
    if how == "cancelled":
        await asyncio.sleep(0.3)
        task.cancel()
    with pytest.raises(TimeoutError if how == "time is up" else asyncio.CancelledError):
        await task
    async with asyncio.timeout(30):
        await store.pool.execute("UPDATE stock SET name = 'found'", timeout=25)  # once the server has noticed
    await store.close()


async def test_a_commit_that_its_server_gave_up_is_none(awaited: Sessions, prepared: str) -> None:
    store = await Store.connect(prepared)
    cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    for in_transaction in (False, True):

        async def write(in_transaction: bool = in_transaction) -> None:
            if in_transaction:
                async with store.pool.acquire() as connection, connection.transaction():
                    await connection.execute("INSERT INTO noted VALUES (1)")
            else:
                await store.pool.fetchrow("INSERT INTO noted VALUES ($1) RETURNING n", 1)

        task = asyncio.create_task(write())
        async with asyncio.timeout(30):
            while not await store.pool.fetch(cancel):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            with pytest.raises(NotReplicated):
                await task
    assert await store.pool.fetchval(NOTED) == 2, "whoever writes next waits for the standby to have these too"
    assert issubclass(NotReplicated, TRANSIENT)
    await store.close()


async def test_sessions_of_dropped_connections_do_not_queue_for_a_lock(awaited: Sessions, prepared: str) -> None:
    store = await Store.connect(prepared, timeout_s=0.3)
    holder = await asyncpg.connect(prepared)
    await holder.execute("SELECT pg_advisory_lock(7)")
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await store.pool.execute("SELECT pg_advisory_lock(7)")
    assert await awaited("advisory") == 3
    async with asyncio.timeout(30):
        while await awaited("advisory"):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    await holder.close()
    await store.close()


@asynccontextmanager
async def with_setting(url: str, setting: str) -> AsyncIterator[asyncpg.Connection]:
    """Have the sessions that begin from now on a setting of the database; give a connection that began before."""
    connection, name = await asyncpg.connect(url), url.rpartition("/")[2]
    await connection.execute(f'ALTER DATABASE "{name}" SET {setting}')
    try:
        yield connection
    finally:
        await connection.execute(f'ALTER DATABASE "{name}" RESET {setting.split(maxsplit=1)[0]}')
        await connection.close()


@pytest.mark.parametrize("is_read", [True, False], ids=["its end was read", "its end is read as the answer"])
@pytest.mark.parametrize("setting", ["lock_timeout", "idle_session_timeout", "idle_in_transaction_session_timeout"])
async def test_what_a_timeout_of_the_server_ends_passes(db: Db, prepared: str, setting: str, is_read: bool) -> None:
    async def time_out(store: Store) -> None:
        async with store.pool.acquire() as connection:
            if setting != "idle_session_timeout":
                await connection.execute("BEGIN")
            idle_s = 0.02 if setting == "lock_timeout" else 0.5
            if is_read:
                await asyncio.sleep(idle_s)
            else:
                time.sleep(idle_s)  # noqa: ASYNC251
            await connection.fetch("SELECT * FROM lock_stock($1)", ["a"])

    async with with_setting(prepared, f"{setting} = '100ms'") as other:
        store = await Store.connect(prepared, connections_max=1)
        async with other.transaction():
            await other.execute("SELECT FROM stock WHERE product_id = 'a' FOR UPDATE")
            with pytest.raises(TRANSIENT):
                await time_out(store)
    assert await store.pool.fetchval("SELECT 1") == 1
    await store.close()


async def test_a_server_that_only_reads_is_left_and_waited_for(db: Db, prepared: str) -> None:
    async with with_setting(prepared, "default_transaction_read_only = on"):
        store = await Store.connect(prepared, connections_max=1)
        for _ in range(2):
            with pytest.raises(TRANSIENT):
                await store.pool.fetchval("SELECT set_limit('a', 3)")
    assert await store.pool.fetchval("SELECT set_limit('a', 3)"), "the session that only reads is still there"
    await store.close()


async def test_a_server_out_of_memory_passes(db: Db) -> None:
    with pytest.raises(TRANSIENT):
        await db.store.pool.execute("DO $$ BEGIN RAISE 'out of memory' USING ERRCODE = 'out_of_memory'; END $$")


# Guards

LEDGER = "INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, order_ids, at) VALUES"
COMMAND = f"INSERT INTO stock_commands VALUES ('{oid(9)}', 0, 'a'"

BROKEN = {
    "pipeline_partitions_positive": "INSERT INTO pipeline VALUES ('a', 'p', 0)",
    "pipeline_once": "INSERT INTO pipeline (app_id, topic_prefix, partitions, one) VALUES ('a', 'p', 1, false)",
    "stock_price_bounded": "UPDATE stock SET price_cents = 1000000000001",
    "stock_on_hand_not_negative": "UPDATE stock SET on_hand = -1, reserved = -1, initial = -1 WHERE product_id = 'c'",
    "stock_reserved_not_negative": "UPDATE stock SET reserved = -1 WHERE product_id = 'c'",
    "stock_not_oversold": "UPDATE stock SET reserved = 2 WHERE product_id = 'c'",
    "stock_sold_not_negative": "UPDATE stock SET sold = -1, on_hand = 2 WHERE product_id = 'c'",
    "stock_owed_not_negative": "UPDATE stock SET owed = -1",
    "stock_adds_up": "UPDATE stock SET on_hand = 5 WHERE product_id = 'c'",
    "stock_limit_positive": "UPDATE stock SET limit_per_user = 0, limited_since = now()",
    "stock_limited_since": "UPDATE stock SET limit_per_user = 1",
    "ledger_sign": f"{LEDGER} (0, 'settle', 1, 'a', 'receive', 0, NULL, now())",
    "ledger_orders": f"{LEDGER} (0, 'settle', 1, 'a', 'hold', 1, NULL, now())",
    "user_units_not_negative": "INSERT INTO user_units VALUES ('a', 'u', -1)",
    "orders_have_lines": "UPDATE orders SET prices = '{1,2}'",
    "orders_reserved_total": "UPDATE orders SET total_cents = NULL",
    "orders_status_times": "UPDATE orders SET paid_at = now()",
    "orders_cancelled_reason": "UPDATE orders SET reason = 'expired'",
    "orders_paid_for": "UPDATE orders SET status = 'PAID', paid_at = now()",
    "stock_commands_kind": f"{COMMAND}, 'hold', 1, '', NULL, 'applied', 1, now())",
    "stock_commands_outcome": f"{COMMAND}, 'adjust', 1, '', NULL, 'known', 1, now())",
    "refusals_closed_why": f"INSERT INTO refusals VALUES ('{oid(1)}', now(), NULL, now(), NULL)",
    "letter_actions_drop_why": "INSERT INTO letter_actions VALUES (0, 0, now(), 'drop', NULL, NULL, now(), now())",
    "letter_actions_drop": "INSERT INTO letter_actions VALUES (0, 0, now(), 'drop', 'old', NULL, now(), NULL)",
}


async def test_every_constraint_bites(db: Db) -> None:
    await (await db.worker().claim(0)).hold(new(1, ("a", 1)))
    for name, broken in BROKEN.items():
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            await db.store.pool.execute(broken)
        assert caught.value.constraint_name == name, broken
    checks = await db.store.pool.fetch("SELECT conname FROM pg_constraint WHERE contype = 'c' AND conrelid <> 0")
    assert {row["conname"] for row in checks} == set(BROKEN)
