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
       'user-' || n * 7919 % {users} AS user_id, (n % {partitions})::int AS partition,
       at,
       CASE (n + n / {products}) % 20 WHEN 0 THEN 'refused' WHEN 1 THEN 'declined' ELSE 'sold' END AS outcome
FROM generate_series({first}::bigint, {last}::bigint) n,
     LATERAL (SELECT md5('filled ' || n) AS hash,
                     now() - make_interval(hours => 1, secs => {seconds}::float8 * ({history} - n) / {history}) AS at) drawn
"""
"""A statement that makes a table takes no parameters; these are numbers."""

_FILL = (
    f"""
    INSERT INTO orders (order_id, status, reason, line_count, lines_committed, total_cents, source_partition, source_offset,
                        user_id, payment_method, created_at, reserved_at, paid_at, confirmed_at, cancelled_at)
    SELECT order_id, CASE outcome WHEN 'sold' THEN 'CONFIRMED' ELSE 'CANCELLED' END::order_status,
           CASE outcome WHEN 'refused' THEN 'insufficient_stock' WHEN 'declined' THEN 'payment_declined' END::cancel_reason,
           1, (outcome = 'sold')::int, CASE WHEN outcome <> 'refused' THEN {PRICE_CENTS} END, partition, n, user_id, 'card',
           at, CASE WHEN outcome <> 'refused' THEN at END,
           CASE WHEN outcome = 'sold' THEN at + interval '20 ms' END,
           CASE WHEN outcome = 'sold' THEN at + interval '40 ms' END,
           CASE WHEN outcome <> 'sold' THEN at + interval '20 ms' END
    FROM filled ORDER BY n
    """,
    f"""
    INSERT INTO order_lines (order_id, product_id, quantity, unit_price_cents, state, reason)
    SELECT order_id, product_id, 1, CASE WHEN outcome <> 'refused' THEN {PRICE_CENTS} END,
           CASE outcome WHEN 'sold' THEN 'committed' WHEN 'declined' THEN 'released' ELSE 'refused' END::line_state,
           CASE WHEN outcome = 'refused' THEN 'insufficient_stock'::cancel_reason END
    FROM filled ORDER BY n
    """,
    f"""
    INSERT INTO payments (order_id, status, amount_cents, charge_id, created_at)
    SELECT order_id, CASE outcome WHEN 'sold' THEN 'SUCCESS' ELSE 'FAILED' END::payment_status, {PRICE_CENTS},
           CASE WHEN outcome = 'sold' THEN 'filled-' || n END, at + interval '20 ms'
    FROM filled WHERE outcome <> 'refused' ORDER BY n
    """,
    """
    INSERT INTO stock_ledger (product_id, source_id, movement, quantity, at)
    SELECT product_id, order_id, m.movement::movement, 1, at + m.later
    FROM filled CROSS JOIN LATERAL (VALUES ('hold', interval '0'),
        (CASE outcome WHEN 'sold' THEN 'commit' ELSE 'release' END, interval '40 ms')) m (movement, later)
    WHERE outcome <> 'refused' ORDER BY n
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
                            partitions=settings.partitions,
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
