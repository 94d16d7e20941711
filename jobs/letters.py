"""Dead letters for operators: which are open, what each holds; sent again once, or dropped.

A stage that ended between writing a letter and acknowledging its record writes the letter again: of letters of one record
the first counts.  The topic ``dead-letters`` stays as it is.  What was done about a letter is its row in
``letter_actions``; a letter without one is open.  A retry notes its claim in Postgres, produces, then notes that it is done.
What a crash leaves in between is a retry that can be run again: the record carries the id of its order or command, so a
second copy of it changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from orderstream import connecting
from orderstream.errors import EngineUnavailable, InvalidRecord, NotFound, OrderstreamError
from orderstream.settings import Settings
from orderstream.sql.store import TRANSIENT, Store, content_of, statements
from orderstream.streams.codec import decode_rows
from orderstream.streams.commands import ON_HAND_MAX, StockCommand, decode_order_command, decode_stock_command
from orderstream.streams.dead_letters import Headers
from orderstream.streams.headers import HEADERS_BYTES_MAX, REPLY_TO
from orderstream.streams.lines import LineStands, LineWanted
from orderstream.streams.orders import Limits, Order, decode, encode
from orderstream.streams.partitions import order_partition, product_partition
from orderstream.streams.places import Place
from orderstream.streams.producer import Producer, Record
from orderstream.streams.topics import (
    DEAD_LETTERS,
    ORDER_COMMANDS,
    ORDER_LINES,
    ORDERS,
    RESERVATIONS,
    STOCK_COMMANDS,
)
from orderstream.streams.upstream import lenient
from orderstream.streams.upstream.clients import READ_COMMITTED, REQUEST_TIMEOUT_MS

PAGE_LETTERS_MAX = 200
"""Letters read, looked up and sent again in one go."""

SILENCE_MAX_S = 30.0
"""How long the broker may keep records back that it has, in seconds."""

STORY = frozenset(
    {"reason", "detail", "source-topic", "source-partition", "source-offset", "source-timestamp", "cut-from"}
)
"""Headers that say why a record is a dead letter; the others are the record's own."""

RETRY_OF = "retry-of"
"""Header of a record that was sent again: the letter that it came from."""

SOURCES = (ORDERS, ORDER_COMMANDS, STOCK_COMMANDS, ORDER_LINES, RESERVATIONS)
"""Every topic whose records can become dead letters."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS_MAX = 253_402_300_799_999  # the end of the year 9999: a broken clock may have written a later time


class LetterId(NamedTuple):
    """Partition and offset of a letter on the topic ``dead-letters``; written ``PARTITION/OFFSET``."""

    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.partition}/{self.offset}"


class Letter(NamedTuple):
    """A dead letter.

    Attributes:
        id: its place.
        at: when it was written, to the millisecond.
        reason: from :data:`orderstream.streams.dead_letters.REASONS`.
        detail: for people.
        source: the place of its record; None when the letter does not name it, or not its time.
        timestamp: of its record, in milliseconds since the epoch; 0 without ``source``.
        key: of the record.
        value: of the record.
        headers: the record's own.
        size: of key, value and own headers, in bytes.
        retry_of: the letter that this record had been sent again from, by its header.
        cut_from: the size of the whole record, in bytes, when the letter holds a part of it.
    """

    id: LetterId
    at: datetime
    reason: str
    detail: str
    source: Place | None
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    size: int
    retry_of: str | None
    cut_from: int | None


class Handling(NamedTuple):
    """What was done about a letter; nothing, when ``action`` is None.

    ``why`` is the reason of a drop; ``value`` is what a retry sends instead of the letter's own bytes.
    """

    action: str | None = None
    why: str | None = None
    value: bytes | None = None
    begun_at: datetime | None = None
    done_at: datetime | None = None

    @property
    def state(self) -> str:
        """``open``, ``retrying`` (begun, not known to be sent), ``retried`` or ``dropped``."""
        if self.action is None:
            return "open"
        return "dropped" if self.action == "drop" else "retried" if self.done_at else "retrying"

    @property
    def closed(self) -> bool:
        """Whether there is nothing left to do."""
        return self.done_at is not None

    def __str__(self) -> str:
        at = self.done_at or self.begun_at
        text = self.state if at is None else f"{self.state} {at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        if self.value is not None:
            text += ", with another value"
        return text if self.why is None else f"{text}: {self.why}"


OPEN = Handling()


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


def parse_id(text: str) -> LetterId:
    """Read a letter's id.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d{1,9})/(\d{1,18})", text, re.ASCII)
    if found is None:
        raise ValueError(f"{text!r} is no dead letter's id: expected PARTITION/OFFSET, like 3/17")
    return LetterId(int(found[1]), int(found[2]))


def read(record: Any) -> Letter:
    """Read a record of the topic, whoever wrote it."""
    story: dict[str, str] = {}
    for name, data in record.headers:
        story.setdefault(name, (data or b"").decode(errors="replace"))
    own = tuple((name, data) for name, data in record.headers if name not in STORY)
    where = story.get("source-partition", ""), story.get("source-offset", ""), story.get("source-timestamp", "")
    source = None
    if story.get("source-topic") and all(re.fullmatch(r"\d{1,18}", part, re.ASCII) for part in where):
        source = Place(story["source-topic"], int(where[0]), int(where[1]))
    cut_from = story.get("cut-from", "")
    return Letter(
        id=LetterId(record.partition, record.offset),
        at=_EPOCH + timedelta(milliseconds=min(max(record.timestamp, 0), _MS_MAX)),
        reason=story.get("reason", ""),
        detail=story.get("detail", ""),
        source=source,
        timestamp=int(where[2]) if source is not None else 0,
        key=record.key,
        value=record.value,
        headers=own,
        size=len(record.key or b"") + len(record.value or b"") + sum(len(n.encode()) + len(d or b"") for n, d in own),
        retry_of=story.get(RETRY_OF),
        cut_from=int(cut_from) if re.fullmatch(r"\d{1,18}", cut_from, re.ASCII) else None,
    )


def without_copies(letters: Iterable[Letter], seen: set[bytes]) -> list[Letter]:
    """Return the letters that are the first of their record.

    Copies of a letter are in one partition, in the order in which they were written.  The bytes are compared too: in a
    topic that was created again another record may have the same place.

    Args:
        letters: in their order.
        seen: digests of the records of earlier letters; those of these are added.
    """
    fresh = []
    for letter in letters:
        if letter.source is not None:
            parts = (str(letter.source).encode(), letter.key or b"", letter.value or b"")
            record = hashlib.blake2b(b"".join(b"%d:%b" % (len(part), part) for part in parts), digest_size=16).digest()
            if record in seen:
                continue
            seen.add(record)
        fresh.append(letter)
    return fresh


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
    wanted = sorted({str(sending.command.product_id) for sending in sendings if sending.command})
    products = {row["product_id"]: row for row in await store.products(wanted)} if wanted else {}
    found = []
    for sending, order_id in zip(sendings, ids, strict=True):
        fault, row = None, orders.get(order_id) if order_id is not None else None
        if sending.order is not None and row is not None:
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
    if row["available"] + row["reserved"] + command.quantity > ON_HAND_MAX:
        return InvalidRecord("invalid_command", f"product {product_id} would have more than {ON_HAND_MAX} units")
    if row["available"] + command.quantity >= 0:
        return None
    return InvalidRecord("insufficient_stock", f"product {product_id} has fewer units available")


# The topic


class Reader:
    """The topic, from its beginnings to the ends that it had when the reader was opened."""

    def __init__(self, consumer: Any, settings: Settings, begins: dict[Any, int], ends: dict[Any, int]) -> None:
        self._consumer, self._settings = consumer, settings
        self._begins, self._ends = begins, ends

    @property
    def total(self) -> int:
        """How many letters there are."""
        return sum(self._ends[tp] - self._begins[tp] for tp in self._ends)

    async def one(self, letter_id: LetterId) -> Letter:
        """Read one letter.

        Raises:
            NotFound: it never existed, or was removed by retention.
            EngineUnavailable: the broker does not answer.
        """
        tp = TopicPartition(self._settings.topic(DEAD_LETTERS.name), letter_id.partition)
        if letter_id.offset >= self._ends.get(tp, 0):
            raise NotFound(
                f"no dead letter {letter_id}: there never was one; `orderstream dead-letters list` has the ids"
            )
        if letter_id.offset >= self._begins[tp]:
            self._consumer.assign([tp])
            self._consumer.seek(tp, letter_id.offset)
            async for page in self._pages([tp], 1):
                if page[0].id == letter_id:
                    return page[0]
                break
        hours = self._settings.retention_hours
        raise NotFound(
            f"no dead letter {letter_id}: it was removed after its time, {hours} hours; ORDERSTREAM_RETENTION_HOURS keeps"
            " later ones longer"
        )

    async def pages(self) -> AsyncIterator[list[Letter]]:
        """Yield all letters, at most :data:`PAGE_LETTERS_MAX` at once, those of a partition in their order.

        A letter of the same record as an earlier one is left out.

        Raises:
            EngineUnavailable: the broker does not answer.
        """
        seen: set[bytes] = set()
        tps = [tp for tp, end in self._ends.items() if end > self._begins[tp]]
        if tps:
            self._consumer.assign(tps)
            for tp in tps:
                self._consumer.seek(tp, self._begins[tp])
            async for page in self._pages(tps, PAGE_LETTERS_MAX):
                fresh = without_copies(page, seen)
                if fresh:
                    yield fresh

    async def _pages(self, tps: Sequence[Any], letters_max: int) -> AsyncIterator[list[Letter]]:
        left = list(tps)
        while left:
            try:
                async with asyncio.timeout(SILENCE_MAX_S):
                    fetched: dict[Any, list[Any]] = {}
                    while left and not fetched:
                        fetched = await self._consumer.getmany(*left, timeout_ms=500, max_records=letters_max)
                        # A position passes what a partition holds besides letters, too.
                        left = [tp for tp in left if await self._consumer.position(tp) < self._ends[tp]]
            except TimeoutError:
                raise EngineUnavailable(
                    "Kafka", self._settings.kafka, f"no letter within {SILENCE_MAX_S:.0f} s, there are more"
                ) from None
            page = [read(r) for tp, records in fetched.items() for r in records if r.offset < self._ends[tp]]
            if page:
                yield page


@asynccontextmanager
async def reading(settings: Settings) -> AsyncIterator[Reader]:
    """Open the topic, for one use.

    Raises:
        EngineUnavailable: Kafka or, during the use, Postgres does not answer, or the topic was never created.
    """
    lenient.install()
    name = settings.topic(DEAD_LETTERS.name)
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka,
        client_id="orderstream-cli",
        group_id=None,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
        isolation_level=READ_COMMITTED,
    )
    try:
        with connecting.postgres(settings, faults=TRANSIENT), connecting.kafka(settings, faults=(KafkaError,)):
            await consumer.start()
            if name not in await consumer.topics():
                raise EngineUnavailable("Kafka", settings.kafka, f"it has no topic {name} yet", connecting.INIT)
            tps = [TopicPartition(name, partition) for partition in range(settings.partitions)]
            consumer.assign(tps)
            begins, ends = await consumer.beginning_offsets(tps), await consumer.end_offsets(tps)
            yield Reader(consumer, settings, begins, ends)
    finally:
        await consumer.stop()


# What was done


def _keys(letters: Iterable[Letter]) -> tuple[list[int], list[int], list[datetime]]:
    ids = [(letter.id.partition, letter.id.offset, letter.at) for letter in letters]
    return [i[0] for i in ids], [i[1] for i in ids], [i[2] for i in ids]


def _handlings(letters: Iterable[Letter], rows: Iterable[Any]) -> dict[LetterId, Handling]:
    there = {
        LetterId(row["letter_partition"], row["letter_offset"]): Handling(
            row["action"], row["why"], row["value"], row["begun_at"], row["done_at"]
        )
        for row in rows
    }
    return {letter.id: there.get(letter.id, OPEN) for letter in letters}


async def handlings(store: Store, letters: Sequence[Letter]) -> dict[LetterId, Handling]:
    """Return what was done about each of these letters."""
    return _handlings(letters, await store.pool.fetch(statements("letters.sql")["handlings"], *_keys(letters)))


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
    sql, keys = statements("letters.sql"), _keys(one.letter for one in plans)
    async with store.pool.acquire() as connection:
        await connection.execute(sql["claim_again" if again else "claim"], *keys, [one.value for one in plans])
        async with connection.transaction():
            held = _handlings((one.letter for one in plans), await connection.fetch(sql["hold"], *keys))
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
            await connection.execute(sql["done"], *_keys(one.letter for one in ours))
    sent = [Outcome(one.letter, True, f"sent again to {one.sending.topic}/{one.sending.partition}") for one in ours]
    return [*sent, *outcomes]


async def drop(store: Store, letters: Sequence[Letter], why: str, *, again: bool = False) -> list[Outcome]:
    """Note that these letters are not wanted any more."""
    rows = await store.pool.fetch(statements("letters.sql")["drop_again" if again else "drop"], *_keys(letters), why)
    dropped = {LetterId(row["letter_partition"], row["letter_offset"]) for row in rows}
    there = await handlings(store, letters)
    return [
        Outcome(letter, True, "dropped")
        if letter.id in dropped
        else Outcome(letter, False, f"{there[letter.id]}; each once, unless --again")
        for letter in letters
    ]
