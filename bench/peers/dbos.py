"""Durable workflows: each order a DBOS workflow of three steps (reserve, pay, commit) on the pipeline's tables.

Of the ways in which the library can be used, this is the one that was the fastest here: asynchronous workflows started
directly, under the order's id (a queue would write one row more an order, and poll), and steps that do their work in one
transaction over asyncpg.  The library's own transactions, which commit a step's checkpoint together with its work, made half
as many orders or fewer.  So a step may run again after a crash, and is written to change nothing then.  No tracing, no admin
server, pools as large as the work in hand.  The library's own tables stand in the same database.

Tables, columns and durability are the pipeline's, so that the same promises can be checked.  The library is no dependency
of orderstream; it comes with the extra ``bench``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from orderstream.bench.peers.service import LOCK, POOL_MAX, main, open_pool
from orderstream.settings import Settings
from orderstream.streams.orders import Order

_RESERVE = """
WITH ordered AS (
    INSERT INTO orders (order_id, status, line_count, total_cents, source_partition, source_offset, user_id, payment_method,
                        created_at, reserved_at)
    SELECT $1::uuid, 'RESERVED', cardinality($5::text[]), $4::bigint, 0, 0, $2::text, $3::text, now(), now()
    ON CONFLICT (order_id) DO NOTHING RETURNING order_id
), lines AS (
    SELECT * FROM ordered CROSS JOIN unnest($5, $6::int[], $7::bigint[]) l (product_id, quantity, price_cents)
), counted AS (
    UPDATE stock s SET reserved = s.reserved + l.quantity, version = s.version + 1
    FROM lines l WHERE s.product_id = l.product_id
), noted AS (
    INSERT INTO order_lines (order_id, product_id, quantity, unit_price_cents, state)
    SELECT l.order_id, l.product_id, l.quantity, l.price_cents, 'held' FROM lines l
)
INSERT INTO stock_ledger (product_id, source_id, movement, quantity)
SELECT l.product_id, l.order_id, 'hold', l.quantity FROM lines l
"""

_REFUSE = """
WITH ordered AS (
    INSERT INTO orders (order_id, status, reason, line_count, source_partition, source_offset, user_id, payment_method,
                        created_at, cancelled_at)
    SELECT $1::uuid, 'CANCELLED', 'insufficient_stock', cardinality($4::text[]), 0, 0, $2::text, $3::text, now(), now()
    ON CONFLICT (order_id) DO NOTHING RETURNING order_id
)
INSERT INTO order_lines (order_id, product_id, quantity, state, reason)
SELECT o.order_id, l.product_id, l.quantity, 'refused', 'insufficient_stock'
FROM ordered o CROSS JOIN unnest($4, $5::int[]) l (product_id, quantity)
"""

_DECIDED = "SELECT total_cents FROM orders WHERE order_id = $1::uuid"

_PAY = """
WITH paid AS (
    UPDATE orders SET status = 'PAID', paid_at = now() WHERE order_id = $1::uuid AND status = 'RESERVED' RETURNING order_id
)
INSERT INTO payments (order_id, status, amount_cents, charge_id) SELECT order_id, 'SUCCESS', $2::bigint, $3::text FROM paid
"""

_COMMIT = """
WITH lines AS (
    UPDATE order_lines SET state = 'committed' WHERE order_id = $1::uuid AND state = 'held'
    RETURNING order_id, product_id, quantity
), counted AS (
    UPDATE stock s
    SET on_hand = s.on_hand - l.quantity, reserved = s.reserved - l.quantity, sold = s.sold + l.quantity,
        version = s.version + 1
    FROM lines l WHERE s.product_id = l.product_id
), ordered AS (
    UPDATE orders SET status = 'CONFIRMED', confirmed_at = now(), lines_committed = line_count
    WHERE order_id = $1 AND status = 'PAID'
)
INSERT INTO stock_ledger (product_id, source_id, movement, quantity)
SELECT l.product_id, l.order_id, 'commit', l.quantity FROM lines l
"""

_LOCK_LINES = """
SELECT FROM stock s JOIN order_lines l ON l.product_id = s.product_id
WHERE l.order_id = $1::uuid ORDER BY s.product_id FOR UPDATE OF s
"""

_NOTHING_DONE = "INSERT 0 0"


class Workflows:
    """See :class:`~orderstream.bench.peers.service.Peer`."""

    tried = (4, 8, 16)
    probe_orders = 200

    async def start(self, settings: Settings) -> None:
        """Launch the library on the pipeline's database, and register the workflow."""
        self._dbos: Any = import_module("dbos")
        dbos = self._dbos.DBOS
        dbos(
            config={
                "name": "orderstream-bench",
                "system_database_url": settings.database_url,
                "sys_db_pool_size": POOL_MAX,
                "max_executor_threads": POOL_MAX,
                "log_level": "WARNING",
                "run_admin_server": False,
            }
        )
        self._pool: Any = await open_pool(settings)

        @dbos.step()  # the library marks what it decorates, and a method can't be marked
        async def reserve(order_id: str, user_id: str, method: str, lines: list[tuple[str, int]]) -> int | None:
            return await self._reserve(order_id, user_id, method, lines)

        @dbos.step()
        async def pay(order_id: str, total: int) -> None:
            await self._pool.execute(_PAY, order_id, total, f"sim-{order_id}")

        @dbos.step()
        async def commit(order_id: str, lines: int) -> None:
            await self._commit(order_id, lines)

        @dbos.workflow()
        async def sell(order_id: str, user_id: str, method: str, lines: list[tuple[str, int]]) -> None:
            total = await reserve(order_id, user_id, method, lines)
            if total is not None:
                await pay(order_id, total)
                await commit(order_id, len(lines))

        self._sell: Any = sell
        dbos.launch()

    async def _reserve(self, order_id: str, user_id: str, method: str, lines: list[tuple[str, int]]) -> int | None:
        """Hold every line; return the total in cents, or None when one can't be had."""
        ids, quantities = (list(part) for part in zip(*lines, strict=True))
        async with self._pool.acquire() as connection, connection.transaction():
            rows = {row["product_id"]: row for row in await connection.fetch(LOCK, ids)}
            total: int | None = None
            if any(p not in rows or rows[p]["available"] < n for p, n in lines):
                done = await connection.execute(_REFUSE, order_id, user_id, method, ids, quantities)
            else:
                prices = [rows[product_id]["price_cents"] for product_id in ids]
                total = sum(price * quantity for price, quantity in zip(prices, quantities, strict=True))
                done = await connection.execute(_RESERVE, order_id, user_id, method, total, ids, quantities, prices)
            if done == _NOTHING_DONE:
                total = await connection.fetchval(_DECIDED, order_id)
            return total

    async def _commit(self, order_id: str, lines: int) -> None:
        """Sell what is held."""
        if lines == 1:
            await self._pool.execute(_COMMIT, order_id)  # one row is locked in any order
            return
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(_LOCK_LINES, order_id)
            await connection.execute(_COMMIT, order_id)

    async def sell(self, order: Order) -> None:
        """Sell one order, or refuse it whole."""
        with self._dbos.SetWorkflowID(order.order_id):
            await self._sell(order.order_id, order.user_id, order.payment_method, list(order.lines))

    async def close(self) -> None:
        """End the library's threads, close every connection."""
        self._dbos.DBOS.destroy()
        await self._pool.close()


if __name__ == "__main__":
    main(Workflows())
