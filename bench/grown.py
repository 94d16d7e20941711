"""A store that has been at work for long: ended orders with all that they leave behind, put into Postgres by SQL.

The rows are those that the stages would have written: most orders are CONFIRMED, some were declined by the provider, some
refused for want of stock, and every promise of ``orderstream verify`` holds for them.  Ids begin with the order's time, as
an ingress gives them (UUIDv7); the rest is a hash of its number.  After the rows the tables are vacuumed and analyzed, as
autovacuum would have done long ago; otherwise it would do so while the clock runs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import asyncpg

from orderstream.bench.load import USERS
from orderstream.bench.pipeline import PRICE_CENTS
from orderstream.console import Bar
from orderstream.settings import Settings

HISTORY, PRODUCTS = 1_000_000, 100_000
"""Orders and products of a grown store, at most."""

HISTORY_PER_ORDER, PRODUCTS_PER_ORDER = 20, 2
"""Fewer where few orders are measured: a first reading is not to wait for a million rows."""

DAYS = 30
"""Over so many days the orders are spread, the last one an hour ago."""

SECTION_ORDERS = 100_000
"""Orders filled in at a time."""

STATEMENT_S = 600.0

_ORDERS = """
CREATE TEMPORARY TABLE filled AS
SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || substr(hash, 1, 3) || 'a'
        || substr(hash, 4, 15))::uuid AS order_id, 'p' || lpad((n % {products})::text, 5, '0') AS product_id, n,
       'user-' || n * 7919 % {users} AS user_id, at, at + interval '20 ms' AS ended_at,
       CASE (n + n / {products}) % 20 WHEN 0 THEN 'refused' WHEN 1 THEN 'declined' ELSE 'sold' END AS outcome
FROM generate_series({first}::bigint, {last}::bigint) n,
     LATERAL (SELECT md5('filled ' || n) AS hash, now() - make_interval(
                  hours => 1, secs => {seconds}::float8 * ({history} - n / {batch} * {batch}) / {history}) AS at) drawn
"""
"""A statement that makes a table takes no parameters; these are numbers."""

_FILL = (
    f"""
    INSERT INTO orders (order_id, home, source_offset, status, reason, user_id, payment_method, product_ids, quantities,
                        prices, states, reasons, total_cents, payment, charge_id, created_at, reserved_at, paid_at,
                        confirmed_at, cancelled_at)
    SELECT f.order_id, s.partition, n, CASE outcome WHEN 'sold' THEN 'CONFIRMED' ELSE 'CANCELLED' END::order_status,
           r.reason, user_id, 'card', ARRAY[product_id], ARRAY[1],
           ARRAY[CASE WHEN outcome <> 'refused' THEN {PRICE_CENTS} END],
           ARRAY[CASE outcome WHEN 'sold' THEN 'c' WHEN 'declined' THEN 'r' ELSE 'x' END::"char"],
           CASE WHEN outcome = 'refused' THEN ARRAY[r.reason] END, CASE WHEN outcome <> 'refused' THEN {PRICE_CENTS} END,
           CASE outcome WHEN 'sold' THEN 'SUCCESS' WHEN 'declined' THEN 'FAILED' END::payment,
           CASE WHEN outcome = 'sold' THEN 'filled-' || n END, at, CASE WHEN outcome <> 'refused' THEN at END,
           CASE WHEN outcome = 'sold' THEN ended_at END, CASE WHEN outcome = 'sold' THEN ended_at END,
           CASE outcome WHEN 'declined' THEN ended_at WHEN 'refused' THEN at END
    FROM filled f JOIN stock s USING (product_id), LATERAL (SELECT
        CASE outcome WHEN 'refused' THEN 'insufficient_stock' WHEN 'declined' THEN 'payment_declined' END::cancel_reason
        AS reason) r
    ORDER BY n
    """,
    """
    INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, order_ids, quantities, at)
    SELECT s.partition, m.lane::lane, 0, product_id, m.movement::movement, count(*), array_agg(f.order_id),
           array_agg(1), m.at
    FROM filled f JOIN stock s USING (product_id), LATERAL (VALUES ('intake', 'hold', f.at),
        ('settle', CASE outcome WHEN 'sold' THEN 'commit' ELSE 'release' END, f.ended_at)) m (lane, movement, at)
    WHERE outcome <> 'refused' GROUP BY 1, 2, 4, 5, 9 ORDER BY m.at
    """,
    """
    UPDATE stock s SET on_hand = s.on_hand - f.sold, sold = s.sold + f.sold, version = s.version + f.changes
    FROM (SELECT product_id, count(*) FILTER (WHERE outcome = 'sold') AS sold, 2 * count(*) AS changes
          FROM filled WHERE outcome <> 'refused' GROUP BY product_id) f
    WHERE s.product_id = f.product_id
    """,
)


class Size(NamedTuple):
    """How much a grown store has: ended orders, and products."""

    history: int
    products: int

    @classmethod
    def of(cls, orders: int) -> Size:
        """Return the size for so many measured orders."""
        return cls(min(HISTORY, HISTORY_PER_ORDER * orders), min(PRODUCTS, PRODUCTS_PER_ORDER * orders))


def few(products: Sequence[str], count: int, seed: str) -> tuple[str, ...]:
    """Draw products out of all of them."""
    return tuple(sorted(random.Random(f"{seed}/few").sample(products, count)))


def units(orders: int, loads: int, history: int, products: int) -> int:
    """Return how many units each product needs, so that no order of any load, and none of the history, is refused."""
    return loads * orders + -(-history // products)


async def fill(settings: Settings, *, history: int, products: int) -> None:
    """Put ended orders into a database that has the products of :func:`orderstream.bench.load.catalogue` in stock.

    Raises:
        asyncpg.PostgresError: it breaks a rule of the schema; too few units, for instance.
    """
    connection = await asyncpg.connect(settings.database_url, timeout=30, command_timeout=STATEMENT_S)
    try:
        with Bar("orders filled in", history) as bar:
            for first in range(1, history + 1, SECTION_ORDERS):
                last = min(first + SECTION_ORDERS - 1, history)
                async with connection.transaction():
                    await connection.execute("DROP TABLE IF EXISTS pg_temp.filled")
                    await connection.execute(
                        _ORDERS.format(
                            first=first,
                            last=last,
                            history=history,
                            products=products,
                            batch=settings.batch_records_max,
                            users=USERS,
                            seconds=DAYS * 86_400,
                        )
                    )
                    for statement in _FILL:
                        await connection.execute(statement)
                bar.update(last)
        await connection.execute("DROP TABLE IF EXISTS pg_temp.filled")
        await connection.execute("VACUUM (ANALYZE)")
    finally:
        await connection.close()
