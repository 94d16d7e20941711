"""Dead letters for operators: which are open, what each holds; sent again once, or dropped.

A stage that ended between writing a letter and acknowledging its record writes the letter again: of letters of one record
the first counts.  The topic ``dead-letters`` stays as it is.  What was done about a letter is its row in
``letter_actions``; a letter without one is open.  A retry notes its claim in Postgres, produces, then notes that it is done.
What a crash leaves in between is a retry that can be run again: the record carries the id of its order or command, so a
second copy of it changes nothing.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, NamedTuple

from orderstream import connecting
from orderstream.errors import InvalidRecord, OrderstreamError
from orderstream.settings import Settings
from orderstream.sql.letters import OPEN, Handling, handlings, handlings_in, keys_of
from orderstream.sql.store import REMOVED, TRANSIENT, Store, content_of, statements
from orderstream.streams import letters as topic
from orderstream.streams.codec import decode_rows
from orderstream.streams.commands import (
    ON_HAND_MAX,
    ProductState,
    StockCommand,
    decode_order_command,
    decode_stock_command,
)
from orderstream.streams.headers import HEADERS_BYTES_MAX, REPLY_TO
from orderstream.streams.letters import RETRY_OF, Letter, LetterId, Reader
from orderstream.streams.lines import LineStands, LineWanted
from orderstream.streams.orders import Limits, Order, decode, encode
from orderstream.streams.partitions import order_partition, product_partition
from orderstream.streams.places import Place
from orderstream.streams.producer import Producer, Record
from orderstream.streams.topics import ORDER_COMMANDS, ORDER_LINES, ORDERS, RESERVATIONS, STOCK_COMMANDS

SOURCES = (ORDERS, ORDER_COMMANDS, STOCK_COMMANDS, ORDER_LINES, RESERVATIONS)
"""Every topic whose records can become dead letters."""


@asynccontextmanager
async def reading(settings: Settings) -> AsyncIterator[Reader]:
    """Open the topic, for one use.

    Raises:
        EngineUnavailable: Kafka or, during the use, Postgres does not answer, or the topic was never created.
    """
    with connecting.postgres(settings, faults=TRANSIENT):
        async with topic.reading(settings) as reader:
            yield reader


class Sending(NamedTuple):
    """A letter's record, ready to be sent again.

    ``order`` or ``command`` is the decoded record, to ask Postgres whether it would be refused; ``about`` is the id of the
    order that a command is about, whose home Postgres may know.
    """

    topic: str
    partition: int
    record: Record
    order: Order | None = None
    command: StockCommand | None = None
    about: str | None = None


class Outcome(NamedTuple):
    """What became of one letter: done or not, and in words (``text``)."""

    letter: Letter
    done: bool
    text: str


# What is sent again


def to_send(letter: Letter, settings: Settings, value: bytes | None = None, *, own_headers: bool = True) -> Sending:
    """Make of a letter the record that is sent again to its source topic.

    It says which order or command it is, so that it counts once however often it is produced: an order that brought no id
    gets the one that its place gave it.

    Args:
        letter: read from the topic.
        settings: of the pipeline.
        value: corrected bytes, instead of the letter's own.
        own_headers: take the record's own headers along.

    Raises:
        OrderstreamError: the letter does not say enough about its record.
        InvalidRecord: it would be a dead letter again.
    """
    if letter.source is None:
        raise OrderstreamError("it does not say which record it was: produce the record yourself, and drop the letter")
    if letter.cut_from is not None and value is None:
        raise OrderstreamError(
            f"it holds only a part of its record of {letter.cut_from:,} bytes: give the whole one with --value"
        )
    body = letter.value if value is None else value
    topic, partitions = letter.source.topic, settings.partitions
    # A client that waited for a verdict has had its answer long ago.
    kept = [(n, d) for n, d in letter.headers if n not in (REPLY_TO, RETRY_OF)] if own_headers else []
    headers = [*kept, (RETRY_OF, str(letter.id).encode())]
    size = sum(len(name.encode()) + len(data or b"") for name, data in headers)
    if size > HEADERS_BYTES_MAX:
        raise InvalidRecord("too_large", f"headers: {size} bytes, at most {HEADERS_BYTES_MAX}; --bare leaves them out")
    if topic == settings.topic(ORDERS.name):
        limits = Limits(settings.order_lines_max, settings.line_quantity_max, settings.order_bytes_max)
        order = decode(body, limits, **letter.source._asdict(), timestamp=letter.timestamp)
        product_id, encoded = order.lines[0][0], encode(order)
        if len(encoded) > limits.size_bytes:
            raise InvalidRecord("too_large", f"{len(encoded)} bytes with its id, at most {limits.size_bytes}")
        record = (product_id.encode(), encoded, headers)
        return Sending(topic, product_partition(product_id, partitions), record, order=order)
    if topic == settings.topic(ORDER_COMMANDS.name):
        order_id = str(decode_order_command(body).order_id)
        return Sending(topic, order_partition(order_id, partitions), (order_id.encode(), body, headers), about=order_id)
    if topic == settings.topic(STOCK_COMMANDS.name):
        command = decode_stock_command(body)
        product_id = str(command.product_id)
        record = (product_id.encode(), body or b"", headers)
        return Sending(topic, product_partition(product_id, partitions), record, command=command)
    _check_rows(letter.source, body or b"", settings)
    return Sending(topic, letter.source.partition, (None, body, headers))


def _check_rows(source: Place, value: bytes, settings: Settings) -> None:
    """Hold a record of an inner topic to what a stage would have written: rows, lines wanted where their products are."""
    inner: dict[str, type[LineWanted | LineStands]] = {
        settings.topic(ORDER_LINES.name): LineWanted,
        settings.topic(RESERVATIONS.name): LineStands,
    }
    if source.topic not in inner:
        raise OrderstreamError(
            f"it came from {source.topic!r}, which is no topic of this pipeline: retry it with that pipeline's settings"
        )
    try:
        rows = decode_rows(value, inner[source.topic])
    except ValueError as error:
        raise InvalidRecord("invalid_rows", str(error)[:500]) from None
    for row in rows:
        owner = product_partition(row.product_id, settings.partitions)
        if isinstance(row, LineWanted) and owner != source.partition:
            raise InvalidRecord("invalid_rows", f"a row of another partition, {owner}: {row!r:.200}")


async def _as_it_stands(store: Store, sendings: Sequence[Sending]) -> list[tuple[Sending, InvalidRecord | None]]:
    """Return each record as it is to be sent now, a command to its order's home, and why Postgres would refuse it."""
    ids = [sending.order.order_id if sending.order else sending.about for sending in sendings]
    orders = await store.order_states([order_id for order_id in ids if order_id is not None])
    gone = {order_id for order_id in orders if orders[order_id]["status"] == REMOVED}
    wanted = sorted({str(sending.command.product_id) for sending in sendings if sending.command})
    products = {row["product_id"]: row for row in await store.products(wanted)} if wanted else {}
    found = []
    for sending, order_id in zip(sendings, ids, strict=True):
        fault, row = None, orders.get(order_id) if order_id is not None and order_id not in gone else None
        if sending.order is not None and order_id in gone:
            fault = InvalidRecord("order_removed", f"{order_id} is the id of an order that was removed")
        elif sending.order is not None and row is not None:
            fault = _order_reused(sending.order, row)
        elif sending.command is not None:
            fault = await _stock_refused(store, sending.command, products)
        placed = sending._replace(partition=row["home"]) if sending.about is not None and row is not None else sending
        found.append((placed, fault))
    return found


def _order_reused(order: Order, row: Any) -> InvalidRecord | None:
    lines = sorted(zip(row["product_ids"], row["quantities"], strict=True))
    if (row["user_id"], row["payment_method"], lines) == (order.user_id, order.payment_method, sorted(order.lines)):
        return None
    return InvalidRecord("order_id_reused", f"{order.order_id} is the id of another order already")


async def _stock_refused(store: Store, command: StockCommand, there: dict[str, Any]) -> InvalidRecord | None:
    product_id, before = str(command.product_id), await store.stock_command(str(command.command_id))
    if before is not None and content_of(before) != command.content:
        return InvalidRecord("order_id_reused", f"{command.command_id} is the id of another command already")
    if product_id not in there:
        if command.name is not None and command.price_cents is not None:
            return None
        return InvalidRecord("unknown_product", f"product {product_id} is not in the catalogue")
    row = there[product_id]
    if before is not None and before["outcome"] == "applied":
        return None
    if "was" in command.model_fields_set and (command.was is None or command.was != ProductState.of(row)):
        return InvalidRecord("product_changed", f"product {product_id} is not as the command says that it was")
    if row["available"] + row["reserved"] + command.quantity > ON_HAND_MAX:
        return InvalidRecord("invalid_command", f"product {product_id} would have more than {ON_HAND_MAX} units")
    if row["available"] + command.quantity >= 0:
        return None
    return InvalidRecord("insufficient_stock", f"product {product_id} has fewer units available")


# What was done


class Listing(NamedTuple):
    """The newest of the letters that were asked for, newest last, and how many there are by reason and by state."""

    letters: list[tuple[Letter, Handling]]
    reasons: Counter[str]
    states: Counter[str]


async def listing(
    store: Store,
    reader: Reader,
    wanted: Callable[[Letter], bool],
    *,
    closed: bool,
    limit: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Listing:
    """List letters, without their values.

    Args:
        store: connected.
        reader: of the topic.
        wanted: which letters.
        closed: list those that were retried or dropped as well.
        limit: at most so many of them; all are counted.
        progress: called with the number read so far.
    """
    newest: list[tuple[tuple[datetime, LetterId], Letter, Handling]] = []
    reasons: Counter[str] = Counter()
    states: Counter[str] = Counter()
    seen = 0
    async for page in reader.pages():
        seen += len(page)
        progress(seen)
        asked = [letter._replace(value=None, headers=()) for letter in page if wanted(letter)]
        there = await handlings(store, asked) if asked else {}
        for letter in asked:
            handling = there[letter.id]
            if closed or not handling.closed:
                reasons[letter.reason] += 1
                states[handling.state] += 1
                newest.append(((letter.at, letter.id), letter, handling))
        if len(newest) > limit:
            newest = heapq.nlargest(limit, newest, key=lambda one: one[0])
    newest.sort(key=lambda one: one[0])
    return Listing([(letter, handling) for _, letter, handling in newest], reasons, states)


class Plan(NamedTuple):
    """One letter of a retry: what it sends, with the value that replaces its own."""

    letter: Letter
    value: bytes | None
    sending: Sending


async def plan(
    store: Store,
    settings: Settings,
    letters: Sequence[Letter],
    *,
    value: bytes | None = None,
    again: bool = False,
    own_headers: bool = True,
) -> tuple[list[Plan], list[Outcome]]:
    """Return what a retry of these letters would send, and why the others can't be sent."""
    there = await handlings(store, letters)
    plans: list[Plan] = []
    refused: list[Outcome] = []
    for letter in letters:
        handling = there[letter.id]
        if handling.closed and not again:
            refused.append(Outcome(letter, False, f"{handling}; each once, unless --again"))
            continue
        if value is not None and handling.state == "retrying" and handling.value != value and not again:
            refused.append(
                Outcome(letter, False, f"{handling}; finish it without --value, or begin again with --again")
            )
            continue
        instead = handling.value if value is None else value
        try:
            plans.append(Plan(letter, instead, to_send(letter, settings, instead, own_headers=own_headers)))
        except InvalidRecord as fault:
            refused.append(Outcome(letter, False, f"would be a dead letter again: {fault}"))
        except OrderstreamError as error:
            refused.append(Outcome(letter, False, str(error)))
    now = await _as_it_stands(store, [one.sending for one in plans])
    refused += [
        Outcome(one.letter, False, f"would be a dead letter again: {fault}")
        for one, (_, fault) in zip(plans, now, strict=True)
        if fault is not None
    ]
    ready = [one._replace(sending=sending) for one, (sending, fault) in zip(plans, now, strict=True) if fault is None]
    return ready, refused


async def carry_out(store: Store, producer: Producer, plans: Sequence[Plan], *, again: bool = False) -> list[Outcome]:
    """Send records again: note it as begun, produce, note it as done.

    Of two retries at once, one sends: the claim's row is locked while its record is produced.

    Raises:
        KafkaError: some were not produced; their letters are ``retrying``, and retrying them again is safe.
    """
    if not plans:
        return []
    outcomes: list[Outcome] = []
    sql, keys = statements("letters.sql"), keys_of(one.letter for one in plans)
    async with store.pool.acquire() as connection:
        await connection.execute(sql["claim_again" if again else "claim"], *keys, [one.value for one in plans])
        async with connection.transaction():
            held = handlings_in((one.letter for one in plans), await connection.fetch(sql["hold"], *keys))
            ours: list[Plan] = []
            for one in plans:
                handling = held[one.letter.id]
                if handling is OPEN:
                    outcomes.append(Outcome(one.letter, False, "another retry is sending it at this moment"))
                elif handling.closed or handling.value != one.value:
                    outcomes.append(Outcome(one.letter, False, f"another retry or drop was faster: {handling}"))
                else:
                    ours.append(one)
            step: dict[tuple[str, int], list[Record]] = {}
            for one in ours:
                step.setdefault((one.sending.topic, one.sending.partition), []).append(one.sending.record)
            await producer.send(step)
            await connection.execute(sql["done"], *keys_of(one.letter for one in ours))
    sent = [Outcome(one.letter, True, f"sent again to {one.sending.topic}/{one.sending.partition}") for one in ours]
    return [*sent, *outcomes]


async def drop(store: Store, letters: Sequence[Letter], why: str, *, again: bool = False) -> list[Outcome]:
    """Note that these letters are not wanted any more."""
    rows = await store.pool.fetch(statements("letters.sql")["drop_again" if again else "drop"], *keys_of(letters), why)
    dropped = {LetterId(row["letter_partition"], row["letter_offset"]) for row in rows}
    there = await handlings(store, letters)
    return [
        Outcome(letter, True, "dropped")
        if letter.id in dropped
        else Outcome(letter, False, f"{there[letter.id]}; each once, unless --again")
        for letter in letters
    ]
