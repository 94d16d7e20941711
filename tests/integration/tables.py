"""The tables of homes for tests: short ways to call the stage functions, and a watch over whose rows are written."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import asyncpg

from orderstream.engines.local import LocalEngines
from orderstream.engines.probes import create_database, drop_database, run_async
from orderstream.errors import OrderstreamError
from orderstream.sql import stages
from orderstream.sql.stages import Lane, Mark, Written
from orderstream.streams.commands import StockCommand

TABLES = (
    "lanes",
    "marks",
    "stock",
    "ledger",
    "user_units",
    "orders",
    "waiting",
    "kept_commands",
    "rejections",
    "removed_orders",
    "holds",
    "stock_commands",
    "refusals",
)

WATCHED = [table for table in TABLES if table not in ("lanes", "refusals", "removed_orders")]

WATCH = """
-- Refuses to write a row of a partition of which this transaction has stepped no lane.  Closed list of exceptions: a new
-- generation of stock (R7), which moves no unit; that a record met a known order again, which decides nothing; the removal
-- of orders that are over for long (remove_orders), of which no worker has anything left to do.
CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    written jsonb := CASE TG_OP WHEN 'DELETE' THEN to_jsonb(OLD) ELSE to_jsonb(NEW) END;
    owner   int;
BEGIN
    IF TG_OP = 'UPDATE' AND (CASE TG_TABLE_NAME
            WHEN 'stock' THEN to_jsonb(OLD) - 'generation' = to_jsonb(NEW) - 'generation'
            WHEN 'orders' THEN to_jsonb(OLD) - 'met_again_at' = to_jsonb(NEW) - 'met_again_at' END) THEN
        RETURN NULL;
    END IF;
    owner := CASE WHEN TG_TABLE_NAME IN ('orders', 'waiting') THEN written ->> 'home'
                  WHEN TG_TABLE_NAME = 'user_units' THEN
                       (SELECT s.partition::text FROM stock s WHERE s.product_id = written ->> 'product_id')
                  ELSE written ->> 'partition' END;
    IF NOT EXISTS (SELECT FROM lanes l WHERE l.partition = owner AND l.xmin = pg_current_xact_id()::xid) THEN
        RAISE EXCEPTION '% of a foreign row of %: %', TG_OP, TG_TABLE_NAME, written USING ERRCODE = 'WATCH';
    END IF;
    IF TG_OP = 'UPDATE' AND (to_jsonb(OLD) ->> 'partition', to_jsonb(OLD) ->> 'home') IS DISTINCT FROM
                            (written ->> 'partition', written ->> 'home') THEN
        RAISE EXCEPTION 'a row of % has moved to another partition: %', TG_TABLE_NAME, written USING ERRCODE = 'WATCH';
    END IF;
    RETURN NULL;
END $$;
""" + "\n".join(
    f"CREATE TRIGGER watch AFTER INSERT OR UPDATE OR DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION watch();"
    for table in WATCHED
)


def database(engines: LocalEngines, text: str) -> Iterator[str]:
    """Make a database of this text, give its address, and drop it."""
    url = create_database(engines.addresses()["database_url"], f"t{uuid.uuid4().hex[:10]}")

    async def fill() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(text)
        await connection.close()

    run_async(fill)
    yield url
    drop_database(url)


class Line(NamedTuple):
    """A line of an order as ``hold`` is given it."""

    product_id: str
    quantity: int
    state: str = "h"
    reason: str | None = None
    owner: int | None = None


class New(NamedTuple):
    """An order as ``hold`` is given it; its status follows from its lines."""

    n: int
    lines: Sequence[Line]
    home: int = 0
    user: str = "u"

    @property
    def order_id(self) -> str:
        return oid(self.n)

    @property
    def reason(self) -> str | None:
        return next((line.reason for line in self.lines if line.reason), None)

    @property
    def status(self) -> str:
        states = {line.state for line in self.lines}
        return "CANCELLED" if "x" in states else "CREATED" if "a" in states else "RESERVED"


class Move(NamedTuple):
    """An order as ``settle`` is given it: from which status, to which."""

    n: int
    was: str
    status: str
    reason: str | None = None
    payment: str | None = None
    charge_id: str | None = None
    total: int | None = 100
    states: str | None = None
    prices: str | None = None
    reasons: str | None = None
    command: tuple[int | None, int | None] = (None, None)


def oid(n: int) -> str:
    """Return the order id of a number."""
    return str(uuid.UUID(int=n))


def new(n: int, *lines: tuple[Any, ...], home: int = 0, user: str = "u") -> New:
    """Make an order; each line (product, units[, state[, reason[, owner]]])."""
    return New(n, [Line(*line) for line in lines], home, user)


def columns(titles: str, rows: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
    """Return rows as named columns; none where there are no rows."""
    parts = list(zip(*rows, strict=True))
    return {name: list(part) for name, part in zip(titles.split(), parts, strict=True)} if parts else {}


def hold_columns(orders: Sequence[New]) -> dict[str, list[Any]]:
    """Return the columns of ``hold`` for these orders."""
    ordered = sorted(orders, key=lambda order: order.order_id)
    return {
        **columns(
            "order_ids homes source_offsets user_ids payment_methods statuses cancel_reasons idempotency_keys placed_ats",
            [(o.order_id, o.home, o.n, o.user, "card", o.status, o.reason, None, None) for o in ordered],
        ),
        **columns(
            "line_ns line_product_ids line_quantities line_states line_reasons line_owners",
            [(n, *line) for n, order in enumerate(ordered, 1) for line in order.lines],
        ),
        **columns(
            "held_order_ids held_product_ids held_user_ids held_quantities",
            [(o.order_id, i.product_id, o.user, i.quantity) for o in ordered for i in o.lines if i.state == "h"],
        ),
    }


def settle_columns(
    *moves: Move,
    moved: Sequence[tuple[str, int, str, int]] = (),
    users: Sequence[tuple[str, str, int]] = (),
    held: Sequence[tuple[int, int, str, int, str, int, str, str | None]] = (),
    ended: Sequence[tuple[int, str, str, str]] = (),
    waiting: Sequence[tuple[int, int, Any, str | None]] = (),
    over: Sequence[tuple[int, int]] = (),
    kept: Sequence[tuple[int, int, int]] = (),
    found: Sequence[tuple[int, int]] = (),
    rejected: Sequence[tuple[int, int, int]] = (),
) -> dict[str, list[Any]]:
    """Return the columns of ``settle``; orders by their numbers.

    Args:
        moves: of orders.
        moved: movement, order, product, units.
        users: product, user, more or fewer units.
        held: new holds: partition, order, product, home, user, units, state, reason.
        ended: of holds: order, product, the state that it has, the one that it gets.
        waiting: home, order, since, reply channel.
        over: home, order.
        kept: partition, order, offset.
        found: partition, order.
        rejected: partition, order, offset.
    """
    return {
        **columns(
            "order_ids was statuses cancel_reasons payments charge_ids totals line_states line_prices line_reasons"
            " command_partitions command_offsets",
            [
                (
                    oid(m.n),
                    *m[1:7],
                    None if m.states is None else "{" + ",".join(m.states) + "}",
                    m.prices,
                    m.reasons,
                    *m.command,
                )
                for m in sorted(moves)
            ],
        ),
        **columns(
            "movements move_order_ids move_product_ids move_quantities", [(m, oid(n), p, q) for m, n, p, q in moved]
        ),
        **columns("user_product_ids user_ids user_changes", users),
        **columns(
            "new_hold_partitions new_hold_order_ids new_hold_product_ids new_hold_homes new_hold_user_ids"
            " new_hold_quantities new_hold_states new_hold_reasons",
            [(partition, oid(n), *rest) for partition, n, *rest in held],
        ),
        **columns(
            "end_hold_order_ids end_hold_product_ids end_hold_was end_hold_states",
            [(oid(n), *rest) for n, *rest in ended],
        ),
        **columns(
            "wait_homes wait_order_ids wait_sinces wait_reply_tos",
            [(home, oid(n), *rest) for home, n, *rest in waiting],
        ),
        **columns("over_homes over_order_ids", [(home, oid(n)) for home, n in over]),
        **columns("keep_partitions keep_order_ids keep_offsets", [(p, oid(n), offset) for p, n, offset in kept]),
        **columns("found_partitions found_order_ids", [(p, oid(n)) for p, n in found]),
        **columns(
            "reject_partitions reject_order_ids reject_offsets reject_reasons reject_details",
            [(p, oid(n), offset, "invalid_order", 'items: "\\"') for p, n, offset in rejected],
        ),
    }


class Worker:
    """What a worker believes of its lanes, and its calls of the stage functions."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.intake, self.settling = Lane(), Lane()
        self.attempt = uuid.uuid4()

    async def claim(self, *partitions: int) -> Worker:
        await stages.claim(self.pool, partitions, self.intake, self.settling)
        return self

    def copy(self) -> Worker:
        """Return another one that believes the same: what a zombie is, or a worker whose last answer was lost."""
        twin = Worker(self.pool)
        for mine, theirs in ((self.intake, twin.intake), (self.settling, twin.settling)):
            theirs.claims, theirs.sequences = dict(mine.claims), dict(mine.sequences)
        return twin

    async def hold(
        self, *orders: New, partitions: Iterable[int] = (), marks: Sequence[Mark] = (), by: Any = None
    ) -> Written:
        """Take orders in, by a connection or the pool, in a step of their homes or of these partitions."""
        self.attempt = uuid.uuid4()
        step = self.intake.step(set(partitions) or {order.home for order in orders}, marks)
        return await stages.hold(by or self.pool, self.intake, step | hold_columns(orders), self.attempt)

    async def settle(
        self, *moves: Move, partitions: Iterable[int] = (0,), marks: Sequence[Mark] = (), by: Any = None, **what: Any
    ) -> Written:
        """Move orders along; see :func:`settle_columns`."""
        self.attempt = uuid.uuid4()
        step = self.settling.step(partitions, marks)
        return await stages.settle(by or self.pool, self.settling, step | settle_columns(*moves, **what), self.attempt)

    async def command(
        self, *commands: tuple[Any, ...], partitions: Iterable[int] = (0,), by: Any = None, offset: int | None = None
    ) -> Written:
        """Apply stock commands, each (number, product, command, units[, change], or the members that it has instead)."""
        self.attempt = uuid.uuid4()
        rows = await self.pool.fetch("SELECT product_id, partition FROM stock")
        owners = {row["product_id"]: row["partition"] for row in rows}
        given = []
        for n, product_id, command, what, *change in commands:
            body: dict[str, Any] = what if isinstance(what, dict) else {"quantity": what}
            body = {"quantity": 0, "reason": "why", **body, "command": command, "product_id": product_id}
            body |= {"change": change[0]} if change else {}
            owner = owners.get(product_id, min(partitions))
            given.append(
                stages.Commanded(StockCommand.model_construct(command_id=uuid.UUID(oid(n)), **body), owner, offset)
            )
        step = self.settling.step(partitions)
        return await stages.apply_commands(by or self.pool, self.settling, step, given, self.attempt)


class Tables:
    """A database with the tables of homes."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool

    def worker(self) -> Worker:
        return Worker(self.pool)

    async def empty(self) -> None:
        await self.pool.execute(
            "SET session_replication_role = replica; "
            + "; ".join(f"DELETE FROM {table}" for table in TABLES)
            + "; RESET session_replication_role"
        )

    async def product(
        self, product_id: str, partition: int, units: int, price: int = 100, most: int | None = None
    ) -> None:
        """Put a product there."""
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")  # the catalogue is not watched
            await connection.execute(
                "INSERT INTO stock (product_id, partition, name, price_cents, on_hand, initial, limit_per_user,"
                " limited_since)"
                " VALUES ($1, $2, $1, $3, $4, $4, $5, CASE WHEN $5::bigint IS NOT NULL THEN now() END)",
                product_id,
                partition,
                price,
                units,
                most,
            )

    async def everything(self) -> dict[str, list[str]]:
        """Return the whole content."""
        return {
            table: sorted(str(dict(row)) for row in await self.pool.fetch(f"SELECT * FROM {table}")) for table in TABLES
        }

    async def counts(self, product_id: str) -> tuple[int, int, int]:
        """Return on hand, reserved, sold."""
        row = await self.pool.fetchrow("SELECT on_hand, reserved, sold FROM stock WHERE product_id = $1", product_id)
        return row["on_hand"], row["reserved"], row["sold"]

    async def order(self, n: int) -> Mapping[str, Any]:
        """Return an order's row, its states as one text."""
        row = await self.pool.fetchrow(
            "SELECT *, array_to_string(states, '') AS states_text FROM orders WHERE order_id = $1", oid(n)
        )
        assert row is not None
        return {**dict(row), "states": row["states_text"]}

    async def line(self, n: int, product_id: str) -> tuple[str, int | None, str | None, bool]:
        """Return the hold of a line of another home's order: state, price, reason, whether it has ended."""
        row = await self.pool.fetchrow(
            "SELECT state::text, price, reason, ended_at FROM holds WHERE order_id = $1 AND product_id = $2",
            oid(n),
            product_id,
        )
        return row["state"], row["price"], row["reason"], row["ended_at"] is not None

    async def units(self) -> dict[tuple[str, str], int]:
        """Return what users have, by product and user."""
        rows = await self.pool.fetch("SELECT product_id, user_id, units FROM user_units")
        return {(row["product_id"], row["user_id"]): row["units"] for row in rows}

    async def ledger(self, product_id: str) -> list[tuple[Any, ...]]:
        """Return a product's movements: movement, units, (order, units) pairs by order."""
        rows = await self.pool.fetch(
            "SELECT movement, quantity, order_ids, quantities FROM ledger WHERE product_id = $1 ORDER BY at, movement",
            product_id,
        )
        return [
            (
                row["movement"],
                row["quantity"],
                sorted((i.int, q) for i, q in zip(row["order_ids"] or (), row["quantities"] or (), strict=True)),
            )
            for row in rows
        ]

    async def lanes(self) -> dict[tuple[int, str], int]:
        """Return the sequences."""
        rows = await self.pool.fetch("SELECT partition, lane, sequence FROM lanes")
        return {(row["partition"], row["lane"]): row["sequence"] for row in rows}

    async def attempts(self) -> dict[tuple[int, str], uuid.UUID | None]:
        """Return the names of the last transactions."""
        rows = await self.pool.fetch("SELECT partition, lane, attempt FROM lanes")
        return {(row["partition"], row["lane"]): row["attempt"] for row in rows}

    async def faults(self) -> list[str]:
        """Return what the ledger does not explain."""
        rows = await self.pool.fetch(
            """
            SELECT format('%s: %s', product_id, to_jsonb(s)) AS fault FROM stock s LEFT JOIN (
                SELECT product_id,
                       sum(quantity) FILTER (WHERE movement = 'hold') AS held,
                       sum(quantity) FILTER (WHERE movement = 'commit') AS committed,
                       sum(quantity) FILTER (WHERE movement = 'release') AS released,
                       sum(quantity) FILTER (WHERE movement = 'return') AS returned,
                       sum(quantity) FILTER (WHERE movement = 'receive') AS received,
                       sum(quantity) FILTER (WHERE movement = 'adjust') AS adjusted
                FROM ledger GROUP BY product_id) l USING (product_id)
            WHERE (reserved, sold, s.received, s.adjusted) IS DISTINCT FROM
                  (coalesce(held, 0) - coalesce(committed, 0) - coalesce(released, 0),
                   coalesce(committed, 0) - coalesce(returned, 0), coalesce(l.received, 0), coalesce(l.adjusted, 0))
            UNION ALL
            SELECT format('ledger: %s', to_jsonb(l)) FROM ledger l
            WHERE order_ids IS NOT NULL
              AND (cardinality(order_ids) <> cardinality(quantities)
                   OR quantity <> (SELECT sum(q) FROM unnest(quantities) q))
            UNION ALL
            SELECT format('ledger: %s of no step', to_jsonb(l)) FROM ledger l JOIN lanes k USING (partition, lane)
            JOIN stock s USING (product_id) WHERE l.sequence > k.sequence OR l.partition <> s.partition
            """
        )
        return [row["fault"] for row in rows]


async def is_blocked(pool: Any, by: asyncpg.Connection, waiting: asyncio.Future[Any]) -> bool:
    """Wait until a statement is done, or waits for a lock of this connection's; tell whether it waits."""
    pid = by.get_server_pid()
    while not waiting.done():
        if await pool.fetchval("SELECT count(*) FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid))", pid):
            return True
        await asyncio.sleep(0.005)
    return False


async def outcome(call: Awaitable[Any]) -> type[BaseException] | None:
    """Return the kind of exception that a call raises; None: none."""
    try:
        await call
    except (OrderstreamError, asyncpg.PostgresError) as error:
        return type(error)
    return None
