"""Row locks: an asyncpg service that sells each order in one transaction, as a good engineer writes it without a stream.

It locks the order's products in key order (``SELECT … FOR UPDATE``), reads what is left, charges (at once, as the
pipeline's provider does), writes stock, order, lines, payment and ledger in one statement, and commits: four round trips.
One statement for all of it would be one round trip, but then no charge could come between the read and the write.  With a
statement for each table instead of one for all it sold as many here: Postgres and its commits are what it waits for.

Tables, columns and durability are the pipeline's, so that the same promises can be checked: hence also its two entries a
line in the ledger, ``hold`` and ``commit``.  Prepared statements, 20 connections.  What the pipeline gives
besides is not here: events, a gate, cancelling, expiry, a second attempt under the same id, charges that take their time
(a charge that takes 100 ms would hold the lock for 100 ms).
"""

from __future__ import annotations

from typing import Any

from orderstream.bench.peers.service import LOCK, main, open_pool
from orderstream.settings import Settings
from orderstream.streams.orders import Order

_SELL = """
WITH lines AS (SELECT * FROM unnest($5::text[], $6::int[], $7::bigint[]) l (product_id, quantity, price_cents)),
counted AS (
    UPDATE stock s SET on_hand = s.on_hand - l.quantity, sold = s.sold + l.quantity, version = s.version + 1
    FROM lines l WHERE s.product_id = l.product_id
), ordered AS (
    INSERT INTO orders (order_id, status, line_count, lines_committed, total_cents, source_partition, source_offset, user_id,
                        payment_method, created_at, reserved_at, paid_at, confirmed_at)
    SELECT $1::uuid, 'CONFIRMED', cardinality($5), cardinality($5), $4::bigint, 0, 0, $2::text, $3::text,
           now(), now(), now(), now()
), noted AS (
    INSERT INTO order_lines (order_id, product_id, quantity, unit_price_cents, state)
    SELECT $1, l.product_id, l.quantity, l.price_cents, 'committed' FROM lines l
), paid AS (
    INSERT INTO payments (order_id, status, amount_cents, charge_id) SELECT $1, 'SUCCESS', $4, $8::text
)
INSERT INTO stock_ledger (product_id, source_id, movement, quantity)
SELECT l.product_id, $1, m.movement, l.quantity
FROM lines l CROSS JOIN unnest('{hold,commit}'::movement[]) m (movement)
"""

_REFUSE = """
WITH ordered AS (
    INSERT INTO orders (order_id, status, reason, line_count, source_partition, source_offset, user_id, payment_method,
                        created_at, cancelled_at)
    SELECT $1::uuid, 'CANCELLED', 'insufficient_stock', cardinality($4::text[]), 0, 0, $2::text, $3::text, now(), now()
)
INSERT INTO order_lines (order_id, product_id, quantity, state, reason)
SELECT $1, l.product_id, l.quantity, 'refused', 'insufficient_stock' FROM unnest($4, $5::int[]) l (product_id, quantity)
"""


class RowLock:
    """See :class:`~orderstream.bench.peers.service.Peer`."""

    tried = (4, 8, 12, 20)
    probe_orders = 500

    async def start(self, settings: Settings) -> None:
        """Open every connection."""
        self._pool: Any = await open_pool(settings)

    async def sell(self, order: Order) -> None:
        """Sell one order, or refuse it whole."""
        ids, quantities = (list(part) for part in zip(*order.lines, strict=True))
        async with self._pool.acquire() as connection, connection.transaction():
            rows = {row["product_id"]: row for row in await connection.fetch(LOCK, ids)}
            if any(p not in rows or rows[p]["available"] < n for p, n in order.lines):
                await connection.execute(_REFUSE, order.order_id, order.user_id, order.payment_method, ids, quantities)
                return
            prices = [rows[product_id]["price_cents"] for product_id in ids]
            total = sum(price * quantity for price, quantity in zip(prices, quantities, strict=True))
            charge_id = f"sim-{order.order_id}"
            await connection.execute(
                _SELL, order.order_id, order.user_id, order.payment_method, total, ids, quantities, prices, charge_id
            )

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.close()


if __name__ == "__main__":
    main(RowLock())
