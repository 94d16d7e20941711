"""Postgres as the stages, the ingress and the command line use it.  The SQL itself is in the files beside."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from itertools import repeat
from typing import Any, NamedTuple

import asyncpg
import orjson

from orderstream.errors import OrderstreamError
from orderstream.lua.gate import Counts, GateVerdict, Loaded, UserLimit, UserUnits
from orderstream.streams.orders import Order
from orderstream.streams.places import Place

TRANSIENT: tuple[type[BaseException], ...] = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # so asyncpg calls it when a connection ends in the middle of preparing a statement
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.QueryCanceledError,
    asyncpg.DiskFullError,
    OSError,
    TimeoutError,
)
"""Faults that pass: the statement is tried again.  Every statement here may be run again whatever became of it."""


@cache
def statements(file: str) -> Mapping[str, str]:
    """Return the named statements of a file of this folder: ``-- name: x`` opens one."""
    text = (files("orderstream") / "sql" / file).read_text()
    parts = re.split(r"^-- name: (.+)$", text, flags=re.MULTILINE)[1:]
    return {name.strip(): body.strip().rstrip(";") for name, body in zip(parts[::2], parts[1::2], strict=True)}


def query(name: str) -> str:
    """Return the statement of that name from ``queries.sql``."""
    return statements("queries.sql")[name]


def array(values: Sequence[Any]) -> str:
    """Return values as Postgres writes an array, for a parameter ``$1::text::type[]``.

    Made by orjson: asyncpg's own encoding asks of each element whether it is an array, and costs seven times as much.

    Args:
        values: text, numbers, times or None, all of one kind.
    """
    written = orjson.dumps(values).decode()
    if "\\" in written:  # JSON escapes more than the two characters that Postgres does, and differently
        written = ",".join(
            "null" if v is None else '"' + str(v).replace("\\", "\\\\").replace('"', '\\"') + '"' for v in values
        )
        return f"{{{written}}}"
    return f"{{{written[1:-1]}}}"


def _call(function: str, answer: str = "*", **parameters: str) -> str:
    """Return the statement that calls a stage function by its parameters' names, ``$1`` the first of them.

    Args:
        function: its name.
        answer: what is selected from it.
        parameters: by name: the kind of an array's elements (the array made by :func:`array`), or ``bool`` for a flag.
    """
    given = (
        f"{name} => ${n}" if kind == "bool" else f"{name} => ${n}::text::{kind}[]"
        for n, (name, kind) in enumerate(parameters.items(), start=1)
    )
    return f"SELECT {answer} FROM {function}({', '.join(given)})"


_RESERVE = _call(
    "reserve_batch",
    order_ids="uuid",
    user_ids="text",
    payment_methods="text",
    idempotency_keys="text",
    placed_ats="timestamptz",
    line_counts="int",
    source_partitions="int",
    source_offsets="bigint",
    line_order_ns="int",
    line_order_ids="uuid",
    line_product_ids="text",
    line_quantities="int",
    line_gates="int",
    gate_away="bool",
)
_DECIDE = _call(
    "decide_batch",
    order_ids="uuid",
    steps="text",
    reasons="text",
    amounts="bigint",
    charge_ids="text",
    source_offsets="bigint",
)
_SETTLE = _call(
    "settle_batch",
    "*, confirmed_ids::text[] AS confirmed_texts, returned_ids::text[] AS returned_texts, misfits::text[] AS misfit_texts",
    order_ids="uuid",
    line_product_ids="text",
    actions="text",
    source_partitions="int",
    source_offsets="bigint",
    gate_away="bool",
)
_MOVE_STOCK = """SELECT * FROM stock_batch(command_ids => $1, command_product_ids => $2, commands => $3, quantities => $4,
                                           reasons => $5, gate_away => $6)"""
_LOAD_CATALOGUE = "SELECT load_catalogue(ids => $1, names => $2, prices => $3, quantities => $4)"


class LineVerdict(NamedTuple):
    """What became of a line: ``reason`` None for held, ``pending`` for another owner's to decide, else why refused."""

    reason: str | None
    unit_price_cents: int | None
    known: bool


class Reserved(NamedTuple):
    """The answer to a batch of orders and lines; element n answers element n of what was asked."""

    at: datetime
    order_known: list[bool]
    order_reused: list[bool]
    order_created_at: list[datetime]
    lines: list[LineVerdict]
    counts: dict[str, Counts]
    users: UserUnits


class Decision(NamedTuple):
    """One step of an order's life, as its owner wants it.  See ``decide_batch`` for the steps.

    ``source_offset`` is that of the record which it follows from, on ``reservations`` or ``order-commands``.
    """

    order_id: str
    step: str
    reason: str | None = None
    amount_cents: int | None = None
    charge_id: str | None = None
    source_offset: int | None = None


class Standing(NamedTuple):
    """Where an order stands after a decision.

    ``changed`` when this very decision moved it; ``moved_at`` is when it was paid or, if it never was, cancelled;
    ``revoked`` when it was cancelled after it was paid.  ``reserved_at`` is None where every order of the batch was
    charged and paid.
    """

    status: str | None
    reason: str | None
    payment: str | None
    changed: bool
    reserved_at: datetime | None
    moved_at: datetime | None
    revoked: bool


class Settled(NamedTuple):
    """The answer to a batch of settlements.

    ``confirmed``: each order and when it was confirmed.  ``returned``: each order whose last line has returned, and when it
    was cancelled.
    """

    at: datetime
    confirmed: list[tuple[str, datetime]]
    returned: list[tuple[str, datetime]]
    misfits: list[str]
    settled: int
    counts: dict[str, Counts]
    sold: dict[str, int]
    users: UserUnits


class LineToDecide(NamedTuple):
    """A line for ``reserve_batch``; ``order_n`` counts the orders of the batch from 1, 0 for an order taken in before."""

    order_n: int
    order_id: str
    product_id: str
    quantity: int
    gate: GateVerdict


def _counts(row: Any) -> dict[str, Counts]:
    ids = row["product_ids"]
    if not ids:
        return {}
    return {
        product_id: Counts(on_hand, reserved, version, generation)
        for product_id, on_hand, reserved, version, generation in zip(
            ids, row["on_hands"], row["reserveds"], row["versions"], row["generations"], strict=True
        )
    }


def _users(row: Any) -> UserUnits:
    if not row["limited_ids"]:
        return {}
    users: dict[str, list[tuple[str, int]]] = {}
    for product_id, user_id, units in zip(row["limited_ids"], row["limited_users"], row["limited_units"], strict=True):
        users.setdefault(product_id, []).append((user_id, units))
    return users


class _Connection(asyncpg.Connection):
    """A connection that goes back to its pool as it is.

    asyncpg has the server forget what a session may have set (locks, settings, listeners), in a round trip of its own after
    each statement.  Here no session sets anything of that kind; an open transaction is still rolled back.
    """

    def get_reset_query(self) -> str:
        """Return nothing to execute."""
        return ""


class Store:
    """The statements, on a pool of connections."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.pool = pool

    @classmethod
    async def connect(cls, url: str, *, connections_max: int = 8, timeout_s: float = 30.0) -> Store:
        """Open a pool; its connections come as they are needed.

        Raises:
            OSError, asyncpg.PostgresError: Postgres does not answer at ``url``.
        """
        pool = await asyncpg.create_pool(
            url,
            min_size=1,
            max_size=connections_max,
            command_timeout=timeout_s,
            timeout=timeout_s,
            connection_class=_Connection,
            server_settings={"application_name": "orderstream", "jit": "off"},
        )
        return cls(pool)

    async def close(self) -> None:
        """Close the pool."""
        await self.pool.close()

    # Stages

    async def reserve(
        self, orders: Sequence[tuple[Order, Place]], lines: Sequence[LineToDecide], *, gate_unavailable: bool
    ) -> Reserved:
        """Take in orders and decide lines; see ``reserve_batch``.

        Raises:
            OrderstreamError: Postgres has parts of an order whose row was removed by hand.
        """
        try:
            row = await self.pool.fetchrow(
                _RESERVE,
                array([order.order_id for order, _ in orders]),
                array([order.user_id for order, _ in orders]),
                array([order.payment_method for order, _ in orders]),
                array([order.idempotency_key for order, _ in orders]),
                array([order.placed_at for order, _ in orders]),
                array([len(order.lines) for order, _ in orders]),
                array([source.partition for _, source in orders]),
                array([source.offset for _, source in orders]),
                array([line.order_n for line in lines]),
                array([line.order_id for line in lines]),
                array([line.product_id for line in lines]),
                array([line.quantity for line in lines]),
                array([line.gate for line in lines]),
                gate_unavailable,
            )
        except asyncpg.UniqueViolationError as error:
            left = await self.pool.fetch(query("orphans"), [order.order_id for order, _ in orders])
            if not left:
                raise
            named = ", ".join(row["order_id"] for row in left)
            raise OrderstreamError(
                f"of order {named} there are lines or movements of stock in Postgres and no row: somebody removed it\n"
                "`orderstream reconcile --repair --yes` puts it back"
            ) from error
        at, prices = row["at"], row["each_line_price"] or ()
        return Reserved(
            at,
            row["each_order_known"] or [False] * len(orders),
            row["each_order_reused"] or [False] * len(orders),
            row["each_order_created_at"] or [at] * len(orders),
            list(map(LineVerdict, row["each_line_reason"] or (), prices, row["each_line_known"] or repeat(False))),
            _counts(row),
            _users(row),
        )

    async def decide(self, decisions: Sequence[Decision]) -> list[Standing]:
        """Move orders along; see ``decide_batch``."""
        if not decisions:
            return []
        row = await self.pool.fetchrow(
            _DECIDE,
            array([decision.order_id for decision in decisions]),
            array([decision.step for decision in decisions]),
            array([decision.reason for decision in decisions]),
            array([decision.amount_cents for decision in decisions]),
            array([decision.charge_id for decision in decisions]),
            array([decision.source_offset for decision in decisions]),
        )
        if (at := row["all_paid_at"]) is not None:
            return [
                Standing("PAID", None, "SUCCESS", changed=True, reserved_at=None, moved_at=at, revoked=False)
            ] * len(decisions)
        return list(
            map(
                Standing,
                row["each_status"],
                row["each_reason"],
                row["each_payment"],
                row["each_changed"],
                row["each_reserved_at"],
                row["each_moved_at"],
                row["each_revoked"],
            )
        )

    async def refunded(self, order_ids: Sequence[str]) -> list[str]:
        """Note that due refunds were made; return the orders for which one was due until now."""
        return [str(order_id) for order_id in await self.pool.fetchval("SELECT refunded_batch($1)", order_ids)]

    async def settle(self, lines: Sequence[tuple[str, str, str, int, int]], *, gate_unavailable: bool) -> Settled:
        """Commit, release or return lines; see ``settle_batch``.

        Args:
            lines: each ``(order id, product id, action, partition, offset)``, the last two of the settlement's record.
            gate_unavailable: Redis is unavailable, so what it knows about the products is invalidated.
        """
        row = await self.pool.fetchrow(
            _SETTLE,
            *(array(part) for part in (zip(*lines, strict=True) if lines else [()] * 5)),
            gate_unavailable,
        )
        return Settled(
            row["at"],
            list(zip(row["confirmed_texts"], row["confirmed_ats"] or repeat(row["at"]), strict=False)),
            list(zip(row["returned_texts"] or (), row["returned_ats"] or (), strict=True)),
            row["misfit_texts"] or [],
            row["settled"],
            _counts(row),
            dict(zip(row["product_ids"], row["solds"] or (), strict=True)),
            _users(row),
        )

    async def move_stock(
        self, commands: Sequence[tuple[str, str, str, int, str]], *, gate_unavailable: bool
    ) -> tuple[list[str], dict[str, Counts], dict[str, int]]:
        """Receive or adjust stock, each ``(command id, product id, command, quantity, reason)``; see ``stock_batch``."""
        if not commands:
            return [], {}, {}
        row = await self.pool.fetchrow(
            _MOVE_STOCK,
            *(list(part) for part in zip(*commands, strict=True)),
            gate_unavailable,
        )
        return row["each_outcome"], _counts(row), dict(zip(row["product_ids"], row["solds"] or (), strict=True))

    async def counts(self, product_ids: Sequence[str]) -> tuple[dict[str, Counts], dict[str, int]]:
        """Return the counts of these products as they are, and the units sold of each; unknown ones are left out."""
        rows = await self.pool.fetch(query("counts"), list(product_ids))
        counts = {
            row["product_id"]: Counts(row["on_hand"], row["reserved"], row["version"], row["generation"])
            for row in rows
        }
        return counts, {row["product_id"]: row["sold"] for row in rows}

    # The gate

    async def load_gate(self, product_ids: Sequence[str], loaded: Loaded) -> None:
        """Read products and call ``loaded`` while their rows are locked; see :meth:`orderstream.lua.gate.Gate.take`."""
        async with self.pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch(query("lock_stock"), list(product_ids))
            if rows:
                await loaded(self.counts_of(rows), await self.user_limits(connection, rows))

    @staticmethod
    def counts_of(rows: Sequence[Any]) -> dict[str, Counts]:
        """Return the counts of these rows of ``stock``, by product."""
        return {r["product_id"]: Counts(r["on_hand"], r["reserved"], r["version"], r["generation"]) for r in rows}

    async def user_limits(self, connection: Any, rows: Sequence[Any]) -> dict[str, UserLimit]:
        """Return the limits of those of these rows of ``stock`` that have one, with who has how many units."""
        limits = {row["product_id"]: row["limit_per_user"] for row in rows if row["limit_per_user"] is not None}
        units: dict[str, dict[str, int]] = {product_id: {} for product_id in limits}
        if limits:
            for row in await connection.fetch(query("user_units"), list(limits)):
                units[row["product_id"]][row["user_id"]] = row["units"]
        return {product_id: UserLimit(limit, units[product_id]) for product_id, limit in limits.items()}

    async def set_limit(self, product_id: str, limit: int | None) -> bool:
        """Set how many units of a product one user may have over all orders, None for any number.

        Redis does not learn of it: use :func:`orderstream.sql.limit.set_limit`, which publishes it too.

        Returns:
            Whether there is such a product.
        """
        return bool(await self.pool.fetchval("SELECT set_limit($1, $2)", product_id, limit))

    async def invalidate_gate(self, product_ids: Sequence[str]) -> dict[str, int]:
        """Invalidate what Redis knows of these products; return their new generations."""
        rows = await self.pool.fetch(query("invalidate_gate"), list(product_ids))
        return {row["product_id"]: row["generation"] for row in rows}

    # Reading

    async def order_states(self, order_ids: Sequence[str]) -> dict[str, Any]:
        """Return where orders stand, with their lines, by id; those that don't exist are left out."""
        rows = await self.pool.fetch(query("order_states"), list(order_ids))
        return {row["order_id"]: row for row in rows}

    async def order_histories(self, order_ids: Sequence[str]) -> dict[str, Any]:
        """Return the histories of orders, by id, for :mod:`orderstream.http.history`; unknown orders are left out."""
        rows = await self.pool.fetch(query("order_histories"), list(order_ids))
        return {row["order_id"]: row for row in rows}

    async def order(self, order_id: str) -> dict[str, Any] | None:
        """Return one order with ``lines``, or None.  ``order_id`` must be a UUID."""
        async with self.pool.acquire() as connection:
            row = await connection.fetchrow(query("order"), str(uuid.UUID(order_id)))
            if row is None:
                return None
            lines = await connection.fetch(query("order_lines"), str(uuid.UUID(order_id)))
        return {**dict(row), "lines": [dict(line) for line in lines]}

    async def products(self, product_ids: Sequence[str] | None = None, limit: int = 1_000_000) -> list[dict[str, Any]]:
        """Return products with their counts, ordered by id."""
        return [dict(row) for row in await self.pool.fetch(query("products"), product_ids, limit)]

    async def orders_page(
        self, user_id: str | None, status: str | None, before: tuple[datetime, str], limit: int, scan_max: int
    ) -> list[Any]:
        """Return orders before a place, newest first, of the next ``scan_max``; see ``orders_of_user``, ``all_orders``."""
        statement = query("all_orders" if user_id is None else "orders_of_user")
        rows: list[Any] = await self.pool.fetch(statement, user_id, *before, scan_max, status, limit)
        return rows

    async def products_page(self, after: str, limit: int) -> list[dict[str, Any]]:
        """Return products behind an id, with their counts, by id."""
        return [dict(row) for row in await self.pool.fetch(query("products_page"), after, limit)]

    async def put_product(self, product_id: str, name: str, price_cents: int) -> bool:
        """Create a product without units, or change one; return whether it is new."""
        return bool(await self.pool.fetchval(query("put_product"), product_id, name, price_cents))

    async def stock_command(self, command_id: str) -> dict[str, Any] | None:
        """Return how a stock command was decided, or None."""
        row = await self.pool.fetchrow(query("stock_command"), command_id)
        return None if row is None else dict(row)

    async def ledger_page(self, product_id: str, before: tuple[datetime, str], limit: int) -> list[dict[str, Any]]:
        """Return what people and deliveries moved of a product before a place, newest first."""
        return [dict(row) for row in await self.pool.fetch(query("ledger_page"), product_id, *before, limit)]

    async def load_catalogue(self, products: Sequence[tuple[str, str, int, int]]) -> int:
        """Load products, each ``(id, name, price in cents, units)``; return how many were new."""
        ids, names, prices, units = (list(part) for part in zip(*products, strict=True)) if products else ([],) * 4
        return int(await self.pool.fetchval(_LOAD_CATALOGUE, ids, names, prices, units))

    async def ended(self, order_ids: Sequence[str]) -> list[Any]:
        """Return those of these orders that have ended: order_id, status, reason, ended_at."""
        rows: list[Any] = await self.pool.fetch(query("ended"), list(order_ids))
        return rows

    async def stock_command_seen(self, command_id: str) -> bool:
        """Return whether a stock command was carried out."""
        return bool(await self.pool.fetchval(query("stock_command_seen"), command_id))
