"""What counts as a violation, and what does not: every promise broken by hand, and that Redis has what Postgres has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from orderstream.jobs.init import Product, init
from orderstream.jobs.verify import REDIS_PROMISE, verify
from orderstream.lua.gate import Gate, GateVerdict
from orderstream.settings import Settings
from orderstream.sql.prepare import prepare
from orderstream.sql.store import Store, gate_of, statements
from tests.conftest import MakeSettings
from tests.integration.tables import Move, Tables, new, oid

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
    gate = gate_of(settings, store)
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


# Postgres

LIMITED = "few"


@pytest.fixture
async def sold(make_settings: MakeSettings) -> AsyncIterator[Tables]:
    """Orders in every state that there is at a healthy moment; of partition 1 is the product ``c``, the others of 0."""
    settings = make_settings()
    await prepare(settings)
    store = await Store.connect(settings.database_url, connections_max=2)
    tables = Tables(store.pool)
    for products in (["a", "b", LIMITED], ["c"]):
        many = len(products)
        owners = [int(products == ["c"])] * many
        await store.pool.execute(
            "SELECT load_catalogue($1, $2, $1, $3, $4)", products, owners, [100] * many, [20] * many
        )
    await store.pool.execute("SELECT set_limit($1, 3)", LIMITED)
    worker = await tables.worker().claim(0, 1)
    await worker.command((900, "a", "receive", 5), (901, "b", "adjust", -1))

    foreign = [("a", 1, "h", None, 0), ("c", 1, "a", None, 1)]
    await worker.hold(
        new(1, ("a", 2)),  # confirmed
        new(2, ("a", 1)),  # declined
        new(3, ("b", 1)),  # reserved
        new(4, ("b", 99, "x", "insufficient_stock"), ("a", 1, "r")),
        *(new(n, *foreign) for n in (5, 6, 7, 8, 11)),
        new(9, (LIMITED, 2)),
        new(10, ("a", 1)),  # expired, its void is due
    )
    now = await store.pool.fetchval("SELECT now()")
    held = [(1, n, "c", 0, "u", 1, "h", None) for n in (5, 6, 7, 8, 11)]
    await worker.settle(held=held, moved=[("hold", n, "c", 1) for n in (5, 6, 7, 8, 11)], partitions=[1])
    reserved: dict[str, Any] = {"states": "hh", "prices": "{100,100}", "total": 200}
    await worker.settle(
        *(Move(n, "CREATED", "RESERVED", **reserved) for n in (5, 6, 7, 11)),
        waiting=[(0, n, now, None) for n in (3, 8, 11)],
    )
    await worker.settle(
        *(Move(n, "RESERVED", "CONFIRMED", None, "SUCCESS", f"c{n}", states="c") for n in (1, 9)),
        *(Move(n, "RESERVED", "PAID", None, "SUCCESS", f"c{n}", 200, "cg") for n in (5, 7, 11)),
        Move(2, "RESERVED", "CANCELLED", "payment_declined", "FAILED", states="r"),
        Move(6, "RESERVED", "CANCELLED", "expired", "VOID_DUE", states="rl", total=200),
        Move(10, "RESERVED", "CANCELLED", "expired", "VOID_DUE", states="r"),
        moved=[
            ("commit", 1, "a", 2),
            ("commit", 9, LIMITED, 2),
            *(("commit", n, "a", 1) for n in (5, 7, 11)),
            *(("release", n, "a", 1) for n in (2, 6, 10)),
        ],
        waiting=[(0, n, now, None) for n in (6, 10)],
    )
    await worker.settle(
        ended=[(5, "c", "h", "c"), (6, "c", "h", "r"), (7, "c", "h", "c")],
        moved=[("commit", 5, "c", 1), ("release", 6, "c", 1), ("commit", 7, "c", 1)],
        partitions=[1],
    )
    await worker.settle(
        *(Move(n, "PAID", "CONFIRMED", None, "SUCCESS", f"c{n}", 200, "cc") for n in (5, 7)),
        Move(6, "CANCELLED", "CANCELLED", "expired", "VOIDED", None, 200, "rr"),
        over=[(0, 6)],
        kept=[(0, 99, 1)],
    )
    cancelled = Move(7, "CONFIRMED", "CANCELLED", "cancelled_by_user", "REFUND_DUE", "c7", 200, "nb")
    await worker.settle(cancelled, moved=[("return", 7, "a", 1)], waiting=[(0, 7, now, None)])
    await worker.settle(ended=[(7, "c", "c", "n")], moved=[("return", 7, "c", 1)], partitions=[1])
    await worker.settle(cancelled._replace(was="CANCELLED", payment="REFUNDED", states="nn"), over=[(0, 7)])
    yield tables
    await store.close()


async def broken(by: Any, grace_s: float = 600.0, ttl_s: float = 600.0) -> dict[str, list[str]]:
    """Return the promises that are broken, with whose rows break them."""
    found = {}
    for promise, statement in statements("invariants.sql").items():
        given = [value for name, value in (("$1", grace_s), ("$2", ttl_s)) if name in statement]
        if rows := await by.fetch(statement, *given):
            found[promise] = [row["subject"] for row in rows]
    return found


BROKEN = [
    ("stock adds up", "UPDATE stock SET sold = sold + 1 WHERE product_id = 'a'"),
    ("nothing is negative", "UPDATE stock SET reserved = on_hand + 1 WHERE product_id = 'c'"),
    ("the ledger explains the counts", "DELETE FROM ledger WHERE movement = 'hold' AND product_id = 'a'"),
    ("the ledger adds up", "UPDATE ledger SET quantity = quantity + 1 WHERE movement = 'commit' AND product_id = 'a'"),
    ("the ledger adds up", "UPDATE ledger SET quantities = quantities || 1 WHERE movement = 'commit'"),
    ("the ledger adds up", "UPDATE ledger SET quantities = '{3,-1}', order_ids = order_ids || order_ids"
                           " WHERE movement = 'hold' AND quantity = 2"),
    ("the ledger adds up", "UPDATE ledger SET partition = 1 WHERE product_id = 'a'"),
    ("the ledger adds up", "UPDATE ledger SET sequence = 1000 WHERE product_id = 'a'"),
    ("held lines explain the reservations", "UPDATE orders SET quantities = '{2}' WHERE status = 'RESERVED'"),
    ("held lines explain the reservations", "UPDATE holds SET quantity = 2 WHERE state = 'c'"),
    ("held lines explain the reservations", f"DELETE FROM orders WHERE order_id = '{oid(1)}'"),
    ("every line is moved once", "UPDATE ledger SET order_ids = order_ids || order_ids[1], quantities = quantities || 1"
                                 " WHERE movement = 'release'"),
    ("every line is moved once", f"UPDATE ledger SET order_ids = '{{{oid(2)}}}' WHERE movement = 'commit'"),
    ("every line is moved once", "INSERT INTO ledger SELECT * FROM ledger WHERE movement = 'return'"),
    ("every line is moved once", "UPDATE ledger SET at = at - interval '1 s' WHERE movement = 'commit'"),
    ("every line is moved once", f"DELETE FROM orders WHERE order_id = '{oid(10)}'"),
    ("every order has its lines", "UPDATE orders SET states = '{c}', quantities = '{1}' WHERE cardinality(states) = 2"),
    ("every order has its lines", f"UPDATE orders SET product_ids = '{{a,a}}' WHERE order_id = '{oid(5)}'"),
    ("every order has its lines", f"UPDATE orders SET prices = '{{NULL}}' WHERE order_id = '{oid(3)}'"),
    ("every order has its lines", f"UPDATE orders SET quantities = '{{0}}' WHERE order_id = '{oid(1)}'"),
    ("homes and owners agree on lines", "DELETE FROM holds WHERE state = 'r'"),
    ("homes and owners agree on lines", f"DELETE FROM orders WHERE order_id = '{oid(5)}'"),
    ("homes and owners agree on lines", f"UPDATE holds SET state = 'r' WHERE order_id = '{oid(5)}'"),
    ("homes and owners agree on lines", "UPDATE holds SET user_id = 'v' WHERE state = 'n'"),
    ("homes and owners agree on lines", "UPDATE holds SET price = 1 WHERE state = 'c'"),
    ("homes and owners agree on lines", "UPDATE holds SET state = 'h', held_at = now() - interval '21 minutes'"
                                        " WHERE state = 'r'"),
    ("an order is held whole or not at all", "UPDATE orders SET states = '{h}' WHERE status = 'CONFIRMED'"),
    ("an order is held whole or not at all", f"UPDATE orders SET states = '{{h,h}}' WHERE order_id = '{oid(8)}'"),
    ("an order is held whole or not at all", "UPDATE orders SET states = '{c}' WHERE payment = 'FAILED'"),
    ("an order is held whole or not at all", "UPDATE orders SET states = '{r,r}' WHERE payment = 'REFUNDED'"),
    ("the total is what the lines cost", "UPDATE orders SET total_cents = 1 WHERE status = 'CONFIRMED'"),
    ("charges minus refunds are the orders paid for", "UPDATE orders SET payment = NULL WHERE status = 'CONFIRMED'"),
    ("charges minus refunds are the orders paid for", "UPDATE orders SET payment = 'SUCCESS', charge_id = 'c'"
                                                      " WHERE status = 'RESERVED'"),
    ("charges minus refunds are the orders paid for", "UPDATE orders SET charge_id = NULL WHERE payment = 'SUCCESS'"),
    ("charges minus refunds are the orders paid for", "UPDATE orders SET payment = NULL WHERE payment = 'VOID_DUE'"),
    ("charges minus refunds are the orders paid for", "UPDATE orders SET payment = 'SUCCESS' WHERE payment = 'REFUNDED'"),
    ("charges minus refunds are the orders paid for", "UPDATE orders SET payment = 'FAILED' WHERE payment = 'VOIDED'"),
    ("charges minus refunds are the orders paid for", "UPDATE orders SET refunded_at = NULL WHERE payment = 'VOIDED'"),
    ("no hold outlives its time", "UPDATE orders SET created_at = now() - interval '21 minutes' WHERE status = 'RESERVED'"),
    ("no order is paid and forgotten", "UPDATE orders SET paid_at = now() - interval '11 minutes' WHERE status = 'PAID'"),
    ("cancelled orders hold nothing", "UPDATE orders SET states = '{h}' WHERE payment = 'FAILED'"),
    ("cancelled orders hold nothing", "UPDATE orders SET states = '{n,b}', cancelled_at = now() - interval '11 minutes'"
                                      " WHERE payment = 'REFUNDED'"),
    ("what is not over waits", f"DELETE FROM waiting WHERE order_id = '{oid(10)}'"),
    ("what is not over waits", "DELETE FROM waiting; UPDATE orders SET created_at = now() - interval '11 minutes'"
                               f" WHERE order_id = '{oid(11)}'"),
    ("what is not over waits", "DELETE FROM waiting; UPDATE orders SET states = '{r,l}', created_at = '2026-01-01',"
                               f" cancelled_at = now() - interval '11 minutes' WHERE order_id = '{oid(6)}'"),
    ("what is not over waits", f"INSERT INTO waiting VALUES (1, '{oid(3)}', now())"),
    ("no cancel is kept from its order", f"INSERT INTO kept_commands VALUES (1, '{oid(1)}', 1, now() - interval '1 h');"
                                         " UPDATE orders SET created_at = now() - interval '11 minutes'"),
    ("no user has more than a product's limit", f"UPDATE stock SET limit_per_user = 1 WHERE product_id = '{LIMITED}'"),
    ("the lines explain what users have", "UPDATE user_units SET units = units + 1"),
    ("the lines explain what users have", "DELETE FROM user_units"),
]  # fmt: skip


async def test_every_promise_notices_when_it_is_broken(sold: Tables) -> None:
    async with sold.pool.acquire() as one:
        assert await broken(one) == {}
        checks = await one.fetch(
            "SELECT conrelid::regclass::text AS t, conname FROM pg_constraint WHERE contype = 'c' AND conrelid <> 0"
        )
        for check in checks:
            await one.execute(f"ALTER TABLE {check['t']} DROP CONSTRAINT {check['conname']}")
        for promise, by_hand in BROKEN:
            undone = one.transaction()
            await undone.start()
            await one.execute(by_hand)
            assert promise in await broken(one), by_hand
            await undone.rollback()
        assert await broken(one) == {}
    assert {promise for promise, _ in BROKEN} == set(statements("invariants.sql"))


async def test_what_takes_its_time_is_no_violation_until_its_time_is_over(sold: Tables) -> None:
    late = {
        "no order is paid and forgotten": [oid(11)],
        "cancelled orders hold nothing": [oid(7)],
        "what is not over waits": [oid(7)],
    }
    await sold.pool.execute("UPDATE orders SET states = '{n,b}' WHERE order_id = $1", oid(7))
    assert await broken(sold.pool) == {}
    assert await broken(sold.pool, grace_s=0.0) == late
    held = {oid(n) for n in (3, 8)}
    outlived = await broken(sold.pool, grace_s=0.0, ttl_s=0.0)
    assert set(outlived.pop("no hold outlives its time")) == held
    assert outlived == late
