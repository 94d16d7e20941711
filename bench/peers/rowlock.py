"""Row locks: an asyncpg service that sells each order in one transaction, as a good engineer writes it without a stream.

It locks the order's products in key order (``SELECT … FOR UPDATE``), reads what is left, charges (at once, as the
pipeline's provider does), writes stock, order and ledger in one statement, and commits: four round trips.
One statement for all of it would be one round trip, but then no charge could come between the read and the write.  With a
statement for each table instead of one for all it sold as many here: Postgres and its commits are what it waits for.

Tables, columns and durability are the pipeline's, so that the same promises can be checked: hence also its two movements of
a line in the ledger, ``hold`` and ``commit``: two rows a line here, since each order is a transaction.  Prepared statements,
20 connections.  What the pipeline gives besides is not here: events, a gate, cancelling, expiry, a second attempt under the
same id, charges that take their time (a charge that takes 100 ms would hold the lock for 100 ms).
"""

from __future__ import annotations

from typing import Any

from orderstream.bench.peers.service import LOCK, main, open_pool
from orderstream.settings import Settings
from orderstream.streams.orders import Order

_SELL = """
WITH lines AS (SELECT * FROM unnest($5::text[], $6::int[]) l (product_id, quantity)),
counted AS (
    UPDATE stock s SET on_hand = s.on_hand - l.quantity, sold = s.sold + l.quantity, version = s.version + 1
    FROM lines l WHERE s.product_id = l.product_id RETURNING s.product_id, s.partition, l.quantity
), ordered AS (
    INSERT INTO orders (order_id, home, source_offset, status, user_id, payment_method, product_ids, quantities, prices,
                        states, total_cents, payment, charge_id, created_at, reserved_at, paid_at, confirmed_at)
    SELECT $1::uuid, 0, 0, 'CONFIRMED', $2::text, $3::text, $5, $6, $7::bigint[],
           array_fill('c'::"char", ARRAY[cardinality($5)]), $4::bigint, 'SUCCESS', $8::text, now(), now(), now(), now()
)
INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, order_ids, quantities, at)
SELECT c.partition, 'settle', 0, c.product_id, m.movement, c.quantity, ARRAY[$1], ARRAY[c.quantity], now()
FROM counted c CROSS JOIN unnest('{hold,commit}'::movement[]) m (movement)
"""

_REFUSE = """
INSERT INTO orders (order_id, home, source_offset, status, reason, user_id, payment_method, product_ids, quantities, prices,
                    states, reasons, created_at, cancelled_at)
SELECT $1::uuid, 0, 0, 'CANCELLED', 'insufficient_stock', $2::text, $3::text, $4, $5::int[],
       array_fill(NULL::bigint, lines), array_fill('x'::"char", lines),
       array_fill('insufficient_stock'::cancel_reason, lines), now(), now()
FROM (SELECT ARRAY[cardinality($4::text[])] AS lines) n
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
