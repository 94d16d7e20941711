"""Postgres as the stages, the ingress and the command line use it.  The SQL itself is in the files beside."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

import asyncpg
import orjson

from orderstream.lua.gate import Counts, Gate, Ground, Loaded, NotEntered, UserLimit
from orderstream.settings import Settings, hosts_of
from orderstream.streams.partitions import product_partition

REMOVED = "REMOVED"
"""What stands for the status of an order that was removed after its end."""

TRANSIENT: tuple[type[BaseException], ...] = (
    asyncpg.PostgresConnectionError,  # a session that idled too long, too
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # so asyncpg calls it when a connection ends in the middle of preparing a statement
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.QueryCanceledError,
    asyncpg.InsufficientResourcesError,  # memory, disk, connections
    asyncpg.TransactionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,  # a standby, or a primary that is about to become one
    asyncpg.InvalidCatalogNameError,  # the database is dropped, and a restored one about to be put in its place
    asyncpg.ObjectNotInPrerequisiteStateError,  # what only a primary can say, asked of a standby; lock_timeout
    OSError,
    TimeoutError,
)
"""Faults that pass: the statement is tried again.  Every statement here may be run again whatever became of it."""

DROP_S = 0.05
"""After so long a connection is dropped whose statement takes too long, or whose caller has gone."""

HOST_S = 5.0
"""Longest wait for one of several hosts: one that is silent must not keep us from the others."""

_DIRECT: Mapping[str, Any] = {
    "server_settings": {
        "application_name": "orderstream",
        "jit": "off",
        # Statements of connections that were dropped would wait for locks in a queue, each with a process.
        "client_connection_check_interval": "5s",
    }
}
"""Options of a connection to Postgres itself."""

_POOLED: Mapping[str, Any] = {"server_settings": {"application_name": "orderstream"}, "statement_cache_size": 0}
"""Options of one to a pooler, like PgBouncer: it takes no such parameters, and the next transaction may be another server
process's, which knows no statement that was prepared before."""

ENTER_S = 5.0
"""Longest wait for the answer of Postgres, and for a connection, while Redis is entered."""


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


def content_of(decided: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return :attr:`orderstream.streams.commands.StockCommand.content` of a row of ``stock_commands``."""
    return tuple(
        decided[name] for name in ("product_id", "command", "quantity", "name", "price_cents", "reason", "more")
    )


class NotReplicated(ConnectionError):
    """A statement committed without the synchronous standby that has to have it: the server gave up waiting for that."""


class _Connection(asyncpg.Connection):
    """A connection whose statements are never cancelled, and which goes back to its pool as it is.

    asyncpg has the server cancel a statement that takes too long, or whose caller has gone.  A commit that waits for a
    synchronous standby then is one all the same, on this server only: others see it and tell of it, and the standby knows
    nothing when it is promoted.  So the connection is dropped instead.  What its statement did is asked again.

    It has the server forget what a session may have set, too (locks, settings, listeners), in a round trip of its own after
    each statement.  Here no session sets anything of that kind; an open transaction is still rolled back.
    """

    _gave_up = _is_dropped = False

    def get_reset_query(self) -> str:
        """Return nothing to execute."""
        return ""

    def _cancel_current_command(self, *_: Any) -> None:
        self._is_dropped = True
        # Soon: asyncpg is in the middle of noting that it waits for the cancellation, and the caller, who is woken next,
        # leaves its transaction and gives the connection back: on a closed one both are faults of their own.
        self._loop.call_later(DROP_S, self.terminate)

    def _process_log_message(self, fields: Mapping[str, str], last_query: str) -> None:
        # By the server's routine: the message is translated, and has no code of its own.
        self._gave_up |= fields.get("R") == "SyncRepWaitForLSN"
        super()._process_log_message(fields, last_query)

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """See asyncpg.

        Raises:
            NotReplicated: it was carried out, on this server only.
        """
        if self._is_dropped and query.startswith("ROLLBACK"):
            return ""  # asyncpg leaves a transaction after its fault, which must stay the one that is raised
        return str(self._replicated(await super().execute(query, *args, timeout=timeout)))

    async def _execute(self, *args: Any, **named: Any) -> Any:
        try:
            return self._replicated(await super()._execute(*args, **named))
        except (asyncpg.ReadOnlySQLTransactionError, asyncpg.ObjectNotInPrerequisiteStateError):
            self._is_dropped = True
            self.terminate()  # the next one may lead to the server that has been promoted
            raise

    def _replicated(self, result: Any) -> Any:
        if self._gave_up:
            self._gave_up = False
            raise NotReplicated("the server gave up waiting for its synchronous standby")
        return result


async def connect(url: str, *, timeout: float, **options: Any) -> asyncpg.Connection:
    """Connect the first of the hosts of a URL that is as its ``target_session_attrs`` asks; ``options``: see asyncpg.

    asyncpg itself has one timeout for all of them, which a host that is silent uses up.

    Raises:
        OSError, asyncpg.PostgresError, asyncpg.InternalClientError: there is none; what the last of them did.
    """
    *others, last = hosts_of(url)
    for one in others:
        with contextlib.suppress(OSError, asyncpg.CannotConnectNowError, asyncpg.TargetServerAttributeNotMatched):
            return await asyncpg.connect(one, timeout=min(timeout, HOST_S), **options)
    return await asyncpg.connect(last, timeout=min(timeout, HOST_S) if others else timeout, **options)


class Store:
    """The statements, on a pool of connections."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.pool = pool

    @classmethod
    async def connect(cls, url: str, *, connections_max: int = 8, timeout_s: float = 30.0) -> Store:
        """Open a pool; its connections come as they are needed.

        Raises:
            OSError, asyncpg.PostgresError, asyncpg.InternalClientError: Postgres does not answer at ``url``.
        """

        async def pool_of(options: Mapping[str, Any]) -> asyncpg.Pool:
            return await asyncpg.create_pool(
                url,
                connect=connect,
                min_size=1,
                max_size=connections_max,
                command_timeout=timeout_s,
                timeout=timeout_s,
                connection_class=_Connection,
                **options,
            )

        with contextlib.suppress(asyncpg.ProtocolViolationError):  # PgBouncer refuses a parameter that it does not know
            pool = await pool_of(_DIRECT)
            async with pool.acquire() as connection:
                asked = await connection.prepare("SELECT pg_backend_pid()", name="")
                if await asked.fetchval() == connection.get_server_pid():  # a pooler tells a number of its own
                    return cls(pool)
            await pool.close()
        return cls(await pool_of(_POOLED))

    async def close(self) -> None:
        """Close the pool."""
        await self.pool.close()

    # The gate

    async def load_gate(self, product_ids: Sequence[str], loaded: Loaded) -> None:
        """Read products and call ``loaded`` while their rows are locked; see :meth:`orderstream.lua.gate.Gate.take`."""
        async with self.pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch("SELECT * FROM lock_stock($1)", list(product_ids))
            rows = [row for row in rows if not row["retired"]]  # of these Postgres says that they are unknown
            if rows:
                await loaded(self.counts_of(rows), await self.user_limits(connection, rows))

    async def enter_gate(self, redis_now: str, notes: bool) -> Ground:
        """Say what makes up an epoch of the gate; see :data:`orderstream.lua.gate.Enter`.

        Raises:
            NotEntered: Postgres did not answer.
        """
        try:
            async with self.pool.acquire(timeout=ENTER_S) as connection:
                row = await connection.fetchrow("SELECT * FROM enter_gate($1, $2)", redis_now, notes, timeout=ENTER_S)
        except TRANSIENT as error:
            raise NotEntered(f"Postgres does not say what Redis may know: {error!r}") from error
        return Ground(*row)

    @staticmethod
    def counts_of(rows: Sequence[Any]) -> dict[str, Counts]:
        """Return the counts of these rows of ``stock``, by product."""
        return {
            r["product_id"]: Counts(r["on_hand"], r["reserved"], r["version"], r["generation"], r.get("claim", 0))
            for r in rows
        }

    async def user_limits(self, connection: Any, rows: Sequence[Any]) -> dict[str, UserLimit]:
        """Return the limits of those of these rows of ``stock`` that have one, with who has how many units."""
        limits = {row["product_id"]: row["limit_per_user"] for row in rows if row["limit_per_user"] is not None}
        units: dict[str, dict[str, int]] = {product_id: {} for product_id in limits}
        if limits:
            for row in await connection.fetch(query("user_units"), list(limits)):
                units[row["product_id"]][row["user_id"]] = row["units"]
        return {product_id: UserLimit(limit, units[product_id]) for product_id, limit in limits.items()}

    async def invalidate_gate(self, product_ids: Sequence[str]) -> dict[str, int]:
        """Invalidate what Redis knows of these products; return their new generations."""
        rows = await self.pool.fetch(query("invalidate_gate"), list(product_ids))
        return {row["product_id"]: row["generation"] for row in rows}

    # Reading

    async def order_states(self, order_ids: Sequence[str]) -> dict[str, Any]:
        """Return where orders stand, with their lines, by id; unknown ones are left out, removed ones :data:`REMOVED`."""
        rows = await self.pool.fetch(query("order_states"), list(order_ids))
        return {row["order_id"]: row for row in rows}

    async def removed(self, order_ids: Sequence[str]) -> set[str]:
        """Return those of these orders that were removed."""
        if not order_ids:
            return set()
        return {row["order_id"] for row in await self.pool.fetch(query("removed"), list(order_ids))}

    async def order_histories(self, order_ids: Sequence[str]) -> dict[str, Any]:
        """Return the histories of orders, by id, for :mod:`orderstream.http.history`; unknown orders are left out."""
        rows = await self.pool.fetch(query("order_histories"), list(order_ids))
        return {row["order_id"]: row for row in rows}

    async def order(self, order_id: str) -> dict[str, Any] | None:
        """Return one order with ``lines``, or None.  ``order_id`` must be a UUID."""
        row = await self.pool.fetchrow(query("order"), str(uuid.UUID(order_id)))
        return None if row is None else {**row, "lines": orjson.loads(row["lines"])}

    async def rejection(self, order_id: str) -> dict[str, Any] | None:
        """Return the last record that names this order and is none, where no order is there; None: there is none."""
        row = await self.pool.fetchrow(query("rejection"), order_id)
        return None if row is None else dict(row)

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

    async def products_page(self, after: str, limit: int, *, retired: bool) -> list[dict[str, Any]]:
        """Return products behind an id, with their counts, by id."""
        return [dict(row) for row in await self.pool.fetch(query("products_page"), after, limit, retired)]

    async def stock_command(self, command_id: str) -> dict[str, Any] | None:
        """Return how a stock command was decided, or None."""
        row = await self.pool.fetchrow(query("stock_command"), command_id)
        return None if row is None else dict(row)

    async def ledger_page(self, product_id: str, before: tuple[datetime, str], limit: int) -> list[dict[str, Any]]:
        """Return what people and deliveries moved of a product before a place, newest first."""
        return [dict(row) for row in await self.pool.fetch(query("ledger_page"), product_id, *before, limit)]

    async def load_catalogue(self, products: Sequence[tuple[str, str, int, int]], partitions: int) -> int:
        """Load products, each ``(id, name, price in cents, units)``; return how many were new."""
        ids, names, prices, units = (list(part) for part in zip(*products, strict=True)) if products else ([],) * 4
        owners = [product_partition(product_id, partitions) for product_id in ids]
        return int(await self.pool.fetchval(query("load_catalogue"), ids, owners, names, prices, units))

    async def ended(self, order_ids: Sequence[str]) -> list[Any]:
        """Return those of these orders that have ended: order_id, status, reason, ended_at, and what they say."""
        rows: list[Any] = await self.pool.fetch(query("ended"), list(order_ids))
        return rows


def gate_of(settings: Settings, store: Store) -> Gate:
    """Make the gate in front of the stock of this store."""
    loads, enters = store.load_gate, store.enter_gate
    return Gate(settings.redis_url, settings.redis_prefix, loads, enters, timeout_s=settings.redis_timeout_s)
