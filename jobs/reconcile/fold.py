"""What every order and product must be, folded from the topics alone.  No I/O; the topics may be read in any order.

Of an order the first record counts, and the first event of each status; of a stock command the first record of its id.
What is a dead letter counts for nothing.  The records of a million orders are folded in seconds: each one
needs a check of its parts, and only a record that fails this check is decoded as the stages do it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from orderstream.errors import InvalidRecord
from orderstream.streams.commands import MOVING, decode_order_command, stock_command
from orderstream.streams.events import REJECTED
from orderstream.streams.headers import current
from orderstream.streams.orders import ID_CHARS_MAX, INTEGER_END, KEY_CHARS_MAX, Limits, Status, decode
from orderstream.streams.partitions import product_partition
from orderstream.streams.topics import DEAD_LETTERS, ORDER_COMMANDS, ORDER_EVENTS, ORDERS, STOCK_COMMANDS

TOPICS = (ORDERS, ORDER_EVENTS, ORDER_COMMANDS, STOCK_COMMANDS, DEAD_LETTERS)
"""What is folded."""

CREATED, RESERVED, PAID, CONFIRMED, CANCELLED = 1, 2, 4, 8, 16
ENDS = CONFIRMED | CANCELLED
BITS: dict[str, int] = {
    Status.CREATED: CREATED,
    Status.RESERVED: RESERVED,
    Status.PAID: PAID,
    Status.CONFIRMED: CONFIRMED,
    Status.CANCELLED: CANCELLED,
}
"""The statuses that events publish, as bits of one number."""

SAYS = ("name", "price_cents", "limit_per_user", "retired")
"""Members of stock commands over the catalogue."""

UNSEEN = -1
"""Partition and offset of an order of which no record was read: only its events were."""

_CANONICAL_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").fullmatch

Lines = tuple[tuple[str, int], ...]


class Trace:
    """What the topics say about one order.  Small: there may be a million of them.

    Attributes:
        user_id: who ordered; with ``method`` and ``lines`` as the order's record has them.
        partition: of the record that counts; :data:`UNSEEN` without one.
        published: the statuses that its events published, as bits.
        reason: of the CANCELLED event.
        total_cents: of the RESERVED or PAID event.
        prices: of the RESERVED event of an order of several lines: cents of each.
        charge_id: of the PAID event.
        astray: the record is in a partition that its product does not belong to, and is to be sent on: not its home.
        rivals: other records under the same id that are another order, or that may count where this one is a dead letter.
        settled: the status in which the order has ended and agreed with Postgres: it is in the sums of its products.
        round: the last round in which Postgres knew the order.
    """

    __slots__ = (
        "astray",
        "charge_id",
        "lines",
        "method",
        "offset",
        "partition",
        "prices",
        "published",
        "reason",
        "rivals",
        "round",
        "settled",
        "total_cents",
        "user_id",
    )

    def __init__(self, user_id: str, method: str, lines: Lines, partition: int, offset: int) -> None:
        self.user_id = user_id
        self.method = method
        self.lines = lines
        self.partition = partition
        self.offset = offset
        self.published = 0
        self.reason: str | None = None
        self.total_cents: int | None = None
        self.prices: list[int] | None = None
        self.charge_id: str | None = None
        self.astray = False
        self.rivals: list[Trace] | None = None
        self.settled: str | None = None
        self.round = 0

    @property
    def last(self) -> str | None:
        """The last status that an event published, None without events."""
        return next((status for status, bit in reversed(BITS.items()) if self.published & bit), None)

    def same(self, user_id: str, method: str, lines: Lines) -> bool:
        """Return whether this is that order: who, what, how paid."""
        return (
            self.user_id == user_id
            and self.method == method
            and (self.lines == lines or (len(lines) > 1 and sorted(self.lines) == sorted(lines)))
        )

    def adopt(self, other: Trace) -> None:
        """Take the record of another trace for the one that counts."""
        self.user_id, self.method, self.lines = other.user_id, other.method, other.lines
        self.partition, self.offset, self.astray = other.partition, other.offset, other.astray

    def choose(self, partition: int, offset: int) -> None:
        """Let that one of the records under this id count which Postgres has taken in; no change where none stands there."""
        for n, rival in enumerate(self.rivals or ()):
            if (rival.partition, rival.offset) == (partition, offset):
                other = Trace(self.user_id, self.method, self.lines, self.partition, self.offset)
                other.astray = self.astray
                self.adopt(rival)
                self.rivals = [*self.rivals[:n], other, *self.rivals[n + 1 :]]  # type: ignore[index]
                return


class Move(NamedTuple):
    """A stock command, from one record.

    Attributes:
        change: the units that it adds or removes; None: a ``set``, of which another record says what came of it.
        quantity: as the record has it.
    """

    product_id: str
    command: str
    change: int | None
    quantity: int
    reason: str
    actor: str | None
    partition: int
    offset: int


class Said(NamedTuple):
    """What a stock command says of a product's name, price or limit; ``value`` None of a limit: there is none."""

    command_id: str
    partition: int
    offset: int
    member: str
    value: Any


class Fold:
    """Everything that was read, and what follows from it.

    Attributes:
        orders: traces by order id.
        moves: stock commands by id, each with its records in its product's partition.
        catalogue: what stock commands say of names, prices and limits, by product, in the order of their topic.
        asked: orders that their customers cancelled, with partition and offset of the last command.
        dead: offsets of the records that are dead letters, by topic and partition.
        invalid: offsets of records on ``orders`` that are no orders.
        claims: the newest claim of each home that has told an event.
        records: how many records were folded.
    """

    def __init__(self, limits: Limits, partitions: int, topic: Any = str) -> None:
        self._limits = limits
        self._partitions = partitions
        self._take = {
            topic(ORDERS.name): self._take_orders,
            topic(ORDER_EVENTS.name): self._take_events,
            topic(ORDER_COMMANDS.name): self._take_order_commands,
            topic(STOCK_COMMANDS.name): self._take_stock_commands,
            topic(DEAD_LETTERS.name): self._take_dead_letters,
        }
        self._orders_topic, self._stock_topic = topic(ORDERS.name), topic(STOCK_COMMANDS.name)
        self._lines: dict[tuple[str, int], Lines] = {}
        self._texts: dict[str, str] = {}
        self.orders: dict[str, Trace] = {}
        self.moves: dict[str, list[Move]] = {}
        self.catalogue: dict[str, list[Said]] = {}
        self.asked: dict[str, tuple[int, int]] = {}
        self.dead: dict[tuple[str, int], set[int]] = {}
        self.invalid: dict[int, set[int]] = {}
        self.claims: dict[int, int] = {}
        self.records = 0

    def take(self, topic: str, partition: int, records: Sequence[Any]) -> None:
        """Fold consecutive records of one partition in: anything with ``offset``, ``key``, ``value`` and ``headers``."""
        self._take[topic](topic, partition, records)
        self.records += len(records)

    # Orders

    def _take_orders(self, topic: str, partition: int, records: Sequence[Any]) -> None:
        orders, quick, partitions = self.orders, self._quick, self._partitions
        for record in records:
            found = quick(record.value)
            if found is None:
                try:
                    place = {"topic": topic, "partition": partition, "offset": record.offset}
                    order = decode(record.value, self._limits, **place, timestamp=record.timestamp)
                except InvalidRecord:
                    self.invalid.setdefault(partition, set()).add(record.offset)
                    continue
                found = (order.order_id, order.user_id, order.payment_method, order.lines)
            order_id, user_id, method, lines = found
            known = orders.get(order_id)
            if known is None:
                known = orders[order_id] = Trace(user_id, method, lines, partition, record.offset)
                known.astray = product_partition(lines[0][0], partitions) != partition
            elif known.partition == UNSEEN or known.astray or not known.same(user_id, method, lines):
                self._compete(known, Trace(user_id, method, lines, partition, record.offset))

    def _compete(self, known: Trace, other: Trace) -> None:
        other.astray = product_partition(other.lines[0][0], self._partitions) != other.partition
        if known.partition == UNSEEN:
            known.adopt(other)
        elif known.same(other.user_id, other.method, other.lines):
            if known.astray and not other.astray:
                known.adopt(other)  # it was sent on
        elif not other.astray:
            known.rivals = [*(known.rivals or ()), other]

    def _quick(self, value: bytes | None) -> tuple[str, str, str, Lines] | None:
        """Return id, user, method and lines of a plain order; None for one that has to be decoded as the stages do it.

        What passes here and is refused by the stages all the same, for a rule that is not checked here, is a dead letter
        and counts for nothing.
        """
        if not value or len(value) > self._limits.size_bytes:
            return None
        try:
            body = orjson.loads(value)
            order_id, user_id, method, items = (
                body["order_id"],
                body["user_id"],
                body["payment_method"],
                body["items"],
            )
            plain = (
                len(items) == 1
                and len(body) == 4 + ("idempotency_key" in body)
                and value.count(b":") == len(body) + 2
                and _CANONICAL_ID(order_id)
                and self._is_id(user_id)
                and self._is_id(method)
            )
            if not plain or ("idempotency_key" in body and not _is_key(body["idempotency_key"])):
                return None
            (item,) = items
            product_id, quantity = item["product_id"], item["quantity"]
            lines = self._lines.get((product_id, quantity))
            if lines is None or type(quantity) is not int:  # True == 1, in a dict too
                if type(quantity) is not int or not 1 <= quantity <= self._limits.quantity or len(item) != 2:
                    return None
                if type(product_id) is int and 0 <= product_id < INTEGER_END:
                    lines = ((str(product_id), quantity),)
                elif self._is_id(product_id):
                    lines = ((product_id, quantity),)
                else:
                    return None
                self._lines[product_id, quantity] = lines
            return order_id, self._texts[user_id], self._texts[method], lines
        except (ValueError, TypeError, KeyError):
            return None

    def _is_id(self, text: Any) -> bool:
        """Return whether this is the text of an id; the texts that are one are kept once."""
        if text in self._texts:
            return type(text) is str
        if type(text) is str and 0 < len(text) <= ID_CHARS_MAX and text == text.strip() and text.isprintable():
            self._texts[text] = text
            return True
        return False

    def _take_events(self, topic: str, partition: int, records: Sequence[Any]) -> None:
        orders, bits, loads = self.orders, BITS, orjson.loads
        for record in current(records, partition, self.claims):
            event = loads(record.value)
            if event["status"] == REJECTED:
                continue
            order_id, bit = event["order_id"], bits[event["status"]]
            known = orders.get(order_id)
            if known is None:
                known = orders[order_id] = Trace("", "", (), UNSEEN, UNSEEN)
            elif known.published & bit:
                continue
            known.published |= bit
            if bit == PAID:
                known.charge_id, known.total_cents = event["charge_id"], event["total_cents"]
            elif bit == RESERVED:
                known.prices = event.get("prices_cents")
                if known.total_cents is None:
                    known.total_cents = event["total_cents"]
            elif bit == CANCELLED:
                known.reason = self._texts.setdefault(event["reason"], event["reason"])

    def _take_order_commands(self, topic: str, partition: int, records: Sequence[Any]) -> None:
        for record in records:
            try:
                command = decode_order_command(record.value)
            except InvalidRecord:
                continue
            if command.command == "cancel":
                self.asked[str(command.order_id)] = (partition, record.offset)

    # Stock

    def _take_stock_commands(self, topic: str, partition: int, records: Sequence[Any]) -> None:
        for record in records:
            command = stock_command(record.value, partition, self._partitions)
            if command is not None and command.command in MOVING:
                change = None if command.is_open else command.moved
                what = str(command.product_id), command.command, change, command.quantity, command.reason, command.actor
                self.moves.setdefault(str(command.command_id), []).append(Move(*what, partition, record.offset))
            elif command is not None:
                place = str(command.command_id), partition, record.offset
                self.catalogue.setdefault(str(command.product_id), []).extend(
                    Said(*place, member, getattr(command, member))
                    for member in SAYS
                    if member in command.model_fields_set
                    and (member != "retired" or command.retired is not None)  # null: as it is
                )

    # What counts for nothing

    def _take_dead_letters(self, topic: str, partition: int, records: Sequence[Any]) -> None:
        for record in records:
            story = dict(reversed(record.headers))
            try:
                where = (story["source-topic"].decode(), int(story["source-partition"]))
                self.dead.setdefault(where, set()).add(int(story["source-offset"]))
            except (KeyError, ValueError, AttributeError):
                continue  # of a line without an order: no record brought it

    def reject(self) -> None:
        """Leave out what the dead letters name; call it when all that was to be read is read."""
        for order_id in [order_id for order_id, trace in self.orders.items() if self._is_dead(trace)]:
            trace = self.orders[order_id]
            alive = [rival for rival in trace.rivals or () if not self._is_dead(rival)]
            if alive:
                trace.adopt(alive[0])
                trace.rivals = alive[1:] or None
            elif trace.published:
                trace.partition = trace.offset = UNSEEN
                trace.rivals = None
            else:
                del self.orders[order_id]

    def _is_dead(self, trace: Trace) -> bool:
        return trace.offset in self.dead.get((self._orders_topic, trace.partition), ())

    def is_dead(self, move: Move | Said) -> bool:
        """Return whether this record of a stock command is a dead letter."""
        return move.offset in self.dead.get((self._stock_topic, move.partition), ())


def _is_key(text: Any) -> bool:
    return type(text) is str and 0 < len(text) <= KEY_CHARS_MAX and text == text.strip() and text.isprintable()
