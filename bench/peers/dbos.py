"""Durable workflows: each order a DBOS workflow of three transactions (reserve, pay, commit) on the pipeline's tables.

What is measured is the library as its manual has it used where speed counts: asynchronous workflows started directly, under
the order's id (a queue would write one row more an order, and poll); transactions of a datasource, which commit their
checkpoint together with their work; READ COMMITTED instead of its default SERIALIZABLE, since the rows are locked; pools as
large as the work in hand; no tracing, no admin server.  Its own tables stand in the same database.

Each transaction is one or two statements.  Tables, columns and durability are the pipeline's, so that the same promises can
be checked.  The library is no dependency of orderstream; it comes with the extra ``bench``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from orderstream.bench.peers.service import main
from orderstream.settings import Settings
from orderstream.streams.orders import Order

POOL_MAX = 40

_LOCK = """
SELECT s.product_id, s.on_hand - s.reserved AS available, p.price_cents
FROM stock s JOIN products p ON p.product_id = s.product_id
WHERE s.product_id = ANY (:ids) ORDER BY s.product_id FOR UPDATE OF s
"""

_RESERVE = """
WITH lines AS (SELECT * FROM unnest(CAST(:ids AS text[]), CAST(:quantities AS int[]), CAST(:prices AS bigint[]))
               l (product_id, quantity, price_cents)),
counted AS (
    UPDATE stock s SET reserved = s.reserved + l.quantity, version = s.version + 1
    FROM lines l WHERE s.product_id = l.product_id
), ordered AS (
    INSERT INTO orders (order_id, status, line_count, total_cents, source_partition, source_offset, user_id, payment_method,
                        created_at, reserved_at)
    SELECT CAST(:order_id AS uuid), 'RESERVED', (SELECT count(*) FROM lines), CAST(:total AS bigint), 0, 0,
           CAST(:user_id AS text), CAST(:method AS text), now(), now()
), noted AS (
    INSERT INTO order_lines (order_id, product_id, quantity, unit_price_cents, state)
    SELECT CAST(:order_id AS uuid), l.product_id, l.quantity, l.price_cents, 'held' FROM lines l
)
INSERT INTO stock_ledger (product_id, source_id, movement, quantity)
SELECT l.product_id, CAST(:order_id AS uuid), 'hold', l.quantity FROM lines l
"""

_REFUSE = """
WITH lines AS (SELECT * FROM unnest(CAST(:ids AS text[]), CAST(:quantities AS int[])) l (product_id, quantity)),
ordered AS (
    INSERT INTO orders (order_id, status, reason, line_count, source_partition, source_offset, user_id, payment_method,
                        created_at, cancelled_at)
    SELECT CAST(:order_id AS uuid), 'CANCELLED', 'insufficient_stock', (SELECT count(*) FROM lines), 0, 0,
           CAST(:user_id AS text), CAST(:method AS text), now(), now()
)
INSERT INTO order_lines (order_id, product_id, quantity, state, reason)
SELECT CAST(:order_id AS uuid), l.product_id, l.quantity, 'refused', 'insufficient_stock' FROM lines l
"""

_PAY = """
WITH paid AS (UPDATE orders SET status = 'PAID', paid_at = now() WHERE order_id = CAST(:order_id AS uuid))
INSERT INTO payments (order_id, status, amount_cents, charge_id)
VALUES (CAST(:order_id AS uuid), 'SUCCESS', :total, :charge_id)
"""

_COMMIT = """
WITH lines AS (
    UPDATE order_lines SET state = 'committed' WHERE order_id = CAST(:order_id AS uuid) RETURNING product_id, quantity
), counted AS (
    UPDATE stock s
    SET on_hand = s.on_hand - l.quantity, reserved = s.reserved - l.quantity, sold = s.sold + l.quantity,
        version = s.version + 1
    FROM lines l WHERE s.product_id = l.product_id
), ordered AS (
    UPDATE orders SET status = 'CONFIRMED', confirmed_at = now(), lines_committed = line_count
    WHERE order_id = CAST(:order_id AS uuid)
)
INSERT INTO stock_ledger (product_id, source_id, movement, quantity)
SELECT l.product_id, CAST(:order_id AS uuid), 'commit', l.quantity FROM lines l
"""


class Workflows:
    """See :class:`~orderstream.bench.peers.service.Peer`."""

    tried = (4, 8, 16, 32)
    probe_orders = 200

    async def start(self, settings: Settings) -> None:
        """Launch the library on the pipeline's database, and register the workflow."""
        dbos: Any = import_module("dbos")
        text: Any = import_module("sqlalchemy").text
        self._dbos = dbos
        dbos.DBOS(
            config={
                "name": "orderstream-bench",
                "system_database_url": settings.database_url,
                "sys_db_pool_size": POOL_MAX,
                "max_executor_threads": POOL_MAX,
                "log_level": "WARNING",
                "run_admin_server": False,
            }
        )
        pool = {"pool_size": POOL_MAX, "max_overflow": 0}
        source = await dbos.AsyncSQLAlchemyDatasource.create(settings.database_url, engine_kwargs=pool)
        self._source = source
        lock, reserve_lines, refuse = text(_LOCK), text(_RESERVE), text(_REFUSE)
        charge, sell_lines = text(_PAY), text(_COMMIT)

        @source.transaction(isolation_level="READ COMMITTED")
        async def reserve(order_id: str, user_id: str, method: str, lines: list[tuple[str, int]]) -> int | None:
            session = source.sql_session()
            ids, quantities = [line[0] for line in lines], [line[1] for line in lines]
            rows = {row.product_id: row for row in await session.execute(lock, {"ids": ids})}
            told = {"order_id": order_id, "user_id": user_id, "method": method, "ids": ids, "quantities": quantities}
            if any(p not in rows or rows[p].available < n for p, n in lines):
                await session.execute(refuse, told)
                return None
            prices = [rows[product_id].price_cents for product_id in ids]
            total: int = sum(price * quantity for price, quantity in zip(prices, quantities, strict=True))
            await session.execute(reserve_lines, {**told, "prices": prices, "total": total})
            return total

        @source.transaction(isolation_level="READ COMMITTED")
        async def pay(order_id: str, total: int) -> None:
            told = {"order_id": order_id, "total": total, "charge_id": f"sim-{order_id}"}
            await source.sql_session().execute(charge, told)

        @source.transaction(isolation_level="READ COMMITTED")
        async def commit(order_id: str) -> None:
            await source.sql_session().execute(sell_lines, {"order_id": order_id})

        @dbos.DBOS.workflow()
        async def sell(order_id: str, user_id: str, method: str, lines: list[tuple[str, int]]) -> None:
            total = await reserve(order_id, user_id, method, lines)
            if total is not None:
                await pay(order_id, total)
                await commit(order_id)

        self._sell = sell
        dbos.DBOS.launch()

    async def sell(self, order: Order) -> None:
        """Sell one order, or refuse it whole."""
        with self._dbos.SetWorkflowID(order.order_id):
            await self._sell(order.order_id, order.user_id, order.payment_method, list(order.lines))

    async def close(self) -> None:
        """End the library's threads, close every connection."""
        self._dbos.DBOS.destroy()
        await self._source.engine.dispose()


if __name__ == "__main__":
    main(Workflows())
