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
    INSERT INTO orders (order_id, home, source_offset, status, user_id, payment_method, product_ids, quantities, prices,
                        states, total_cents, created_at, reserved_at)
    SELECT $1::uuid, 0, 0, 'RESERVED', $2::text, $3::text, $5::text[], $6::int[], $7::bigint[],
           array_fill('h'::"char", ARRAY[cardinality($5)]), $4::bigint, now(), now()
    ON CONFLICT (order_id) DO NOTHING RETURNING order_id
), lines AS (
    SELECT * FROM ordered CROSS JOIN unnest($5, $6) l (product_id, quantity)
), counted AS (
    UPDATE stock s SET reserved = s.reserved + l.quantity, version = s.version + 1
    FROM lines l WHERE s.product_id = l.product_id RETURNING s.product_id, s.partition, l.quantity
)
INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, order_ids, quantities, at)
SELECT partition, 'intake', 0, product_id, 'hold', quantity, ARRAY[$1], ARRAY[quantity], now() FROM counted
"""

_REFUSE = """
INSERT INTO orders (order_id, home, source_offset, status, reason, user_id, payment_method, product_ids, quantities, prices,
                    states, reasons, created_at, cancelled_at)
SELECT $1::uuid, 0, 0, 'CANCELLED', 'insufficient_stock', $2::text, $3::text, $4, $5::int[],
       array_fill(NULL::bigint, lines), array_fill('x'::"char", lines),
       array_fill('insufficient_stock'::cancel_reason, lines), now(), now()
FROM (SELECT ARRAY[cardinality($4::text[])] AS lines) n
ON CONFLICT (order_id) DO NOTHING
"""

_DECIDED = "SELECT total_cents FROM orders WHERE order_id = $1::uuid"

_PAY = """
UPDATE orders SET status = 'PAID', paid_at = now(), payment = 'SUCCESS', charge_id = $2
WHERE order_id = $1::uuid AND status = 'RESERVED'
"""

_COMMIT = """
WITH ordered AS (
    UPDATE orders
    SET status = 'CONFIRMED', confirmed_at = now(), states = array_fill('c'::"char", ARRAY[cardinality(states)])
    WHERE order_id = $1::uuid AND status = 'PAID' RETURNING order_id, paid_at, product_ids, quantities
), lines AS (
    SELECT o.paid_at, l.* FROM ordered o CROSS JOIN LATERAL unnest(o.product_ids, o.quantities) l (product_id, quantity)
), counted AS (
    UPDATE stock s
    SET on_hand = s.on_hand - l.quantity, reserved = s.reserved - l.quantity, sold = s.sold + l.quantity,
        version = s.version + 1
    FROM lines l WHERE s.product_id = l.product_id RETURNING s.product_id, s.partition, l.quantity, l.paid_at
)
INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, order_ids, quantities, at)
SELECT partition, 'settle', 0, product_id, 'commit', quantity, ARRAY[$1], ARRAY[quantity], paid_at FROM counted
"""

_LOCK_LINES = """
SELECT FROM stock s JOIN orders o ON s.product_id = ANY (o.product_ids)
WHERE o.order_id = $1::uuid ORDER BY s.product_id FOR UPDATE OF s
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
        async def pay(order_id: str) -> None:
            await self._pool.execute(_PAY, order_id, f"sim-{order_id}")

        @dbos.step()
        async def commit(order_id: str, lines: int) -> None:
            await self._commit(order_id, lines)

        @dbos.workflow()
        async def sell(order_id: str, user_id: str, method: str, lines: list[tuple[str, int]]) -> None:
            total = await reserve(order_id, user_id, method, lines)
            if total is not None:
                await pay(order_id)
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
