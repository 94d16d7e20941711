"""The two transactions of a worker: ``hold`` takes orders in, ``settle`` moves them along; see ``functions/``."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import asyncpg

from orderstream.errors import OrderstreamError
from orderstream.lua.gate import Counts, UserUnits
from orderstream.sql.store import array
from orderstream.streams.commands import StockCommand

FENCED, OVER_LIMIT, MOVED, NO_PRODUCT = "OS001", "OS002", "OS003", "OS004"
"""SQLSTATEs that the stage functions raise; see there."""

_STEP = {
    "partitions": "int",
    "claims": "bigint",
    "sequences": "bigint",
    "mark_partitions": "int",
    "mark_topics": "text",
    "mark_nexts": "bigint",
    "mark_acknowledged": "bigint",
    "mark_stamps": "bigint",
    "mark_digests": "bigint",
}

_HOLD = _STEP | {
    "order_ids": "uuid",
    "homes": "int",
    "source_offsets": "bigint",
    "user_ids": "text",
    "payment_methods": "text",
    "idempotency_keys": "text",
    "placed_ats": "timestamptz",
    "statuses": "order_status",
    "cancel_reasons": "cancel_reason",
    "payments": "payment",
    "line_ns": "int",
    "line_product_ids": "text",
    "line_quantities": "int",
    "line_states": '"char"',
    "line_reasons": "cancel_reason",
    "line_owners": "int",
    "held_order_ids": "uuid",
    "held_product_ids": "text",
    "held_user_ids": "text",
    "held_quantities": "int",
}

_SETTLE = _STEP | {
    "order_ids": "uuid",
    "was": "order_status",
    "statuses": "order_status",
    "cancel_reasons": "cancel_reason",
    "payments": "payment",
    "charge_ids": "text",
    "totals": "bigint",
    "line_states": "text",
    "line_prices": "text",
    "line_reasons": "text",
    "command_partitions": "int",
    "command_offsets": "bigint",
    "movements": "movement",
    "move_order_ids": "uuid",
    "move_product_ids": "text",
    "move_quantities": "int",
    "user_product_ids": "text",
    "user_ids": "text",
    "user_changes": "int",
    "new_hold_partitions": "int",
    "new_hold_order_ids": "uuid",
    "new_hold_product_ids": "text",
    "new_hold_homes": "int",
    "new_hold_user_ids": "text",
    "new_hold_quantities": "int",
    "new_hold_states": '"char"',
    "new_hold_reasons": "cancel_reason",
    "end_hold_order_ids": "uuid",
    "end_hold_product_ids": "text",
    "end_hold_was": '"char"',
    "end_hold_states": '"char"',
    "wait_homes": "int",
    "wait_order_ids": "uuid",
    "wait_sinces": "timestamptz",
    "wait_reply_tos": "text",
    "over_homes": "int",
    "over_order_ids": "uuid",
    "keep_partitions": "int",
    "keep_order_ids": "uuid",
    "keep_offsets": "bigint",
    "found_partitions": "int",
    "found_order_ids": "uuid",
    "reject_partitions": "int",
    "reject_order_ids": "uuid",
    "reject_offsets": "bigint",
    "reject_reasons": "text",
    "reject_details": "text",
}


_COMMANDS = _STEP | {
    "command_ids": "uuid",
    "owners": "int",
    "command_product_ids": "text",
    "commands": "text",
    "quantities": "bigint",
    "names": "text",
    "prices": "bigint",
    "reasons": "text",
    "mores": "text",
    "changes": "bigint",
    "offsets": "bigint",
    "told": "text",
    "actors": "text",
}


def _statement(function: str, columns: Mapping[str, str]) -> str:
    named = [f"{name} => ${n}::text::{kind}[]" for n, (name, kind) in enumerate(columns.items(), 2)]
    return f"SELECT * FROM {function}(attempt => $1::uuid, {', '.join(named)})"


_HOLD_SQL = _statement("hold", _HOLD)
_SETTLE_SQL = _statement("settle", _SETTLE)
_COMMANDS_SQL = _statement("apply_stock_commands", _COMMANDS)


_SHORT = {"homes", "payment_methods", "statuses", "was", "payments", "line_states", "movements"}
"""Columns of which one element stands for all."""


class Fenced(OrderstreamError):
    """Another worker has claimed a lane of this transaction, or Postgres was set back; nothing was written.

    So it is too where the transaction has rows of a partition whose lane it does not step.
    """


class OrderMoved(OrderstreamError):
    """An order or a hold is not in the status that its home or owner knows; nothing was written."""


class NotEnough(OrderstreamError):
    """Fewer units than the lines hold, no such product, or more than a user may have; nothing was written."""


class HoldThere(OrderstreamError):
    """An owner has a row of a line already, whose order is new; nothing was written."""


_TOO_FEW = {"stock_not_oversold", "orders_reserved_total"}
"""CHECKs that lines violate for which there are too few units, or no price: no product."""

_ERRORS: Mapping[str | None, type[OrderstreamError]] = {
    FENCED: Fenced,
    OVER_LIMIT: NotEnough,
    MOVED: OrderMoved,
    NO_PRODUCT: NotEnough,
}


class Mark(NamedTuple):
    """How far a topic's partition has been read: all before ``next_offset``.

    Attributes:
        acknowledged: all before it is acknowledged.
        stamp: time of the last record, in milliseconds since the epoch.
        digest: a 63-bit hash of the last record.
    """

    partition: int
    topic: str
    next_offset: int
    acknowledged: int
    stamp: int
    digest: int


class Lane:
    """One kind of lane over the partitions of a worker: what it believes of their claims and sequences."""

    def __init__(self) -> None:
        self.claims: dict[int, int] = {}
        self.sequences: dict[int, int] = {}

    def step(self, partitions: Iterable[int], marks: Sequence[Mark] = ()) -> dict[str, Sequence[Any]]:
        """Return the columns with which a transaction for these partitions begins.

        Raises:
            Fenced: this worker has not claimed one of them.
        """
        wanted = sorted(partitions)
        if not self.claims.keys() >= set(wanted):
            raise Fenced(f"of partitions {wanted}, this worker has claimed {sorted(self.claims)}")
        columns = zip(*marks, strict=True) if marks else ((),) * 6
        names = ("mark_partitions", "mark_topics", "mark_nexts", "mark_acknowledged", "mark_stamps", "mark_digests")
        return {
            "partitions": wanted,
            "claims": [self.claims[partition] for partition in wanted],
            "sequences": [self.sequences[partition] for partition in wanted],
            **dict(zip(names, columns, strict=True)),
        }

    def place(self, partition: int) -> bytes:
        """Return claim and sequence of a partition's lane, for a header."""
        return b"%d:%d" % (self.claims.get(partition, 0), self.sequences.get(partition, 0))

    def stepped(self, partitions: Iterable[int]) -> None:
        """Note that such a transaction has committed."""
        for partition in partitions:
            self.sequences[partition] += 1


class Step(NamedTuple):
    """What a transaction begins with: its lane, the partitions that it writes for, what has been read of them."""

    lane: Lane
    partitions: frozenset[int]
    marks: Sequence[Mark]

    def columns(self) -> dict[str, Sequence[Any]]:
        """See :meth:`Lane.step`."""
        return self.lane.step(self.partitions, self.marks)


class Written(NamedTuple):
    """What a transaction answered: its columns by name, what Redis has to know, and how many units of products are sold."""

    row: Mapping[str, Any]
    counts: Mapping[str, Counts]
    sold: Mapping[str, int]
    users: UserUnits


def columns(*tables: tuple[str, Sequence[Sequence[Any]]]) -> dict[str, list[Any]]:
    """Return rows as the columns of a stage function, each table under their names; one without rows has none."""
    found: dict[str, list[Any]] = {}
    for names, rows in tables:
        if rows:
            found.update(zip(names.split(), map(list, zip(*rows, strict=True)), strict=True))
    return found


async def claim(connection: Any, partitions: Iterable[int], intake: Lane, settle: Lane) -> None:
    """Take over the lanes of these partitions."""
    for row in await connection.fetch("SELECT * FROM claim_lanes($1)", sorted(partitions)):
        lane = intake if row["lane"] == "intake" else settle
        lane.claims[row["partition"]], lane.sequences[row["partition"]] = row["claim"], row["sequence"]


async def hold(
    connection: Any, lane: Lane, columns: Mapping[str, Sequence[Any]], attempt: uuid.UUID, *, commits: bool = True
) -> Written:
    """Take orders in; see ``functions/hold.sql`` for the columns.  Where ``row["known"]`` has ids, nothing was written.

    With ``commits`` False the caller's transaction is still open: the lane is stepped by who commits it.

    Raises:
        Fenced, NotEnough, HoldThere: nothing was written.
        asyncpg.SerializationError: another home took in one of these ids at the same moment; nothing was written.
    """
    ids = columns.get("order_ids", ())
    short: dict[str, Sequence[Any] | None] = dict(columns)
    if len(columns.get("line_product_ids", ())) == len(ids):
        short["line_ns"] = ()
        if columns.get("held_order_ids") == ids:
            short |= dict.fromkeys(("held_order_ids", "held_product_ids", "held_user_ids", "held_quantities"))
    try:
        written = await _run(connection, _HOLD_SQL, _HOLD, short, attempt)
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name == "holds_once":
            raise HoldThere(str(error)) from error
        raise asyncpg.SerializationError(str(error)) from error  # passes: when it is tried again, the id is known
    if commits and written.row["known"] is None:
        lane.stepped(columns["partitions"])
    return written


async def settle(connection: Any, lane: Lane, columns: Mapping[str, Sequence[Any]], attempt: uuid.UUID) -> Written:
    """Move orders along; see ``functions/settle.sql`` for the columns.

    Raises:
        Fenced, OrderMoved, NotEnough: nothing was written.
    """
    short: dict[str, Sequence[Any] | None] = dict(columns)
    if columns.get("move_order_ids") == columns.get("order_ids"):
        short["move_order_ids"] = None
    if "CREATED" not in columns.get("was", ()):
        short["totals"] = ()  # the rows have them
    try:
        written = await _run(connection, _SETTLE_SQL, _SETTLE, short, attempt)
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name == "holds_once":
            raise OrderMoved(str(error)) from error  # the intake lane has held this line with its order meanwhile
        raise
    lane.stepped(columns["partitions"])
    return written


class Commanded(NamedTuple):
    """A stock command with the partition of its product.

    Attributes:
        offset: of its record; None: it is not decided for good.
        told: why it was refused, as a dead letter tells since before Postgres was set back.
    """

    command: StockCommand
    partition: int
    offset: int | None = None
    told: str | None = None


async def apply_commands(
    connection: Any,
    lane: Lane,
    step: Mapping[str, Sequence[Any]],
    commands: Iterable[Commanded],
    attempt: uuid.UUID,
) -> Written:
    """Apply stock commands; see ``functions/commands.sql``.

    Raises:
        Fenced: nothing was written.
    """
    names = " ".join(name for name in _COMMANDS if name not in _STEP)
    rows = [(str(c.command_id), owner, *c.content, c.change, *more, c.actor) for c, owner, *more in commands]
    written = await _run(connection, _COMMANDS_SQL, _COMMANDS, {**step, **columns((names, rows))}, attempt)
    lane.stepped(step["partitions"])
    return written


async def _run(
    connection: Any,
    statement: str,
    kinds: Mapping[str, str],
    columns: Mapping[str, Sequence[Any] | None],
    attempt: uuid.UUID,
) -> Written:
    parameters = [_parameter(name, columns.get(name, ())) for name in kinds]
    try:
        row = await connection.fetchrow(statement, attempt, *parameters)
    except asyncpg.CheckViolationError as error:
        if error.constraint_name not in _TOO_FEW:
            raise  # a fault of this program
        raise NotEnough(str(error)) from error
    except asyncpg.PostgresError as error:
        if (known := _ERRORS.get(error.sqlstate)) is not None:
            raise known(str(error)) from error
        raise
    ids = row["product_ids"] or ()
    return Written(row, _counts(row), dict(zip(ids, row["solds"] or (), strict=True)), _users(row))


def _parameter(name: str, values: Sequence[Any] | None) -> str | None:
    """Return a column as the functions read it: a column of nulls is empty, one of equal values has one element."""
    if values and (name in _SHORT or values[0] is None) and values.count(values[0]) == len(values):
        values = values[:1] if values[0] is not None else ()
    return array(values) if values is not None else None


def _counts(row: Any) -> dict[str, Counts]:
    if row["product_ids"] is None:
        return {}
    columns = (row[name] for name in ("on_hands", "reserveds", "versions", "generations"))
    return dict(zip(row["product_ids"], map(Counts, *columns), strict=True))


def _users(row: Any) -> UserUnits:
    users: dict[str, list[tuple[str, int]]] = {}
    names = ("limited_ids", "limited_users", "limited_units")
    for product_id, user_id, units in zip(*(row[name] or () for name in names), strict=True):
        users.setdefault(product_id, []).append((user_id, units))
    return users
