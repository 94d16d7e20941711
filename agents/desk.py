"""What the stages of a worker share in memory: the orders in hand, what came in about them, and what is acknowledged when.

All of it may be lost at any moment.  What is not acknowledged is read again, and what is not over stands in Postgres.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from orderstream.agents.batches import Batch
from orderstream.agents.lifecycle import Event, Order, Payment
from orderstream.agents.stage import Stage
from orderstream.agents.till import Till
from orderstream.errors import OwnershipLost
from orderstream.failpoints import failpoint
from orderstream.lua.gate import Counts
from orderstream.sql import stages
from orderstream.sql.stages import Lane, Mark
from orderstream.sql.store import Store, statements
from orderstream.streams.lines import LineWanted
from orderstream.streams.orders import Status
from orderstream.streams.partitions import product_partition
from orderstream.streams.topics import ORDERS
from orderstream.tables.views import Views

APART_S = 60.0
"""How long each owner settles its lines by itself, after a transaction for several of them did not find what it knew."""

AHEAD_MAX = 4_000
"""Things that commit has not decided about yet, two of its transactions: with more, reserve waits for it."""

ROOM_POLL_S = 0.005

WAITING_AFTER_S = 2.0
"""An order that is not over after this time waits in Postgres, and its record is acknowledged."""

TAKEN_UP_MAX = 10_000
"""Of the orders that wait, taken up at once after a rebalance; the others follow as these are over."""

UNKNOWN = -1
"""Stands for the digest of a record that is not known."""

Place = tuple[str, int]
"""Topic and partition."""

BEGINNING = datetime(2000, 1, 1, tzinfo=UTC)
"""Before every order."""

IN_HAND_MAX = 20_000
"""Beyond this, orders that wait in Postgres, and about which nobody is being asked, are let go of until there is room."""


class Slip:
    """The chunks of a batch, acknowledged once nothing of them is left to do.

    Attributes:
        left: what is still to do.  Begins at 1, for the stage that makes the slip.
    """

    __slots__ = ("_batch", "_stage", "left")

    def __init__(self, stage: Stage, batch: Batch) -> None:
        self._stage, self._batch = stage, batch
        self.left = 1

    def done(self, number: int = 1) -> None:
        """Note that so much is done."""
        self.left -= number
        if not self.left:
            for chunk in self._batch.chunks:
                self._stage.app.consumer.ack_chunk(chunk)
            if self._batch.chunks:
                failpoint("desk.after_ack")


class Entry(msgspec.Struct, gc=False, eq=False):
    """An order in hand: from its hold until it is over, or waits in Postgres and nothing is asked about it.

    Attributes:
        slips: of the records that brought it, as long as none of them may be acknowledged: until it is over, or waits.
        reply_to: the channel on which its producer waits for the verdict, until it is answered.
        since: when it came in, by ``time.monotonic``.
        touched: when something was last decided about it, by the same clock.
        published: how many statuses of its story are on ``order-events``, as far as this worker knows.
        is_waiting: it has a row in ``waiting``.
        is_to_pay: it is among those that the pay stage is to ask about.
        later: what came in while a transaction about it was being published: decided after that.  None: nothing is.
    """

    order: Order
    slips: list[Slip] = []
    reply_to: str | None = None
    since: float = msgspec.field(default_factory=time.monotonic)
    touched: float = msgspec.field(default_factory=time.monotonic)
    published: int = 0
    is_waiting: bool = False
    is_to_pay: bool = False
    later: list[About] | None = None


class About(msgspec.Struct, frozen=True, gc=False):
    """Something that came in about an order.

    Attributes:
        event: None: its record came again, so what is left to do about it is done again.
        slip: acknowledged with it.
        place: partition and offset of the cancel that it is.
    """

    order_id: str
    event: Event | None
    slip: Slip | None = None
    place: tuple[int, int] | None = None


class LineAsked(NamedTuple):
    """What a home wants of a line whose product this worker owns, and the slip of the record that says so."""

    wanted: LineWanted
    slip: Slip | None = None


class Unread(NamedTuple):
    """A record on ``orders`` that is no order and names an id, and its slip; ``place``: partition and offset."""

    order_id: str
    place: tuple[int, int]
    reason: str
    detail: str
    slip: Slip


class Read(NamedTuple):
    """How far topics were read: what came in with that stands before it in the inbox.

    Attributes:
        slip: acknowledged with the transaction that writes the marks.
    """

    marks: Mapping[Place, Mark]
    slip: Slip


class Desk:
    """The desk of one worker.

    Attributes:
        till: has the orders about which the provider is being asked.
    """

    def __init__(self, stage: Stage, views: Views) -> None:
        self.stage, self.views = stage, views
        self.intake, self.settle = Lane(), Lane()
        self.entries: dict[str, Entry] = {}
        self.till: Till | None = None
        self.inbox: deque[About | LineAsked | Unread | Read] = deque()
        self.to_pay: deque[Entry] = deque()
        self.young: deque[tuple[float, list[str]]] = deque()  # when orders came in, and which: those of a batch are one
        self.found: list[tuple[int, str]] = []
        self.over: list[tuple[int, str]] = []
        self.being_held: set[str] = set()
        self.held_back: list[About] = []
        self.wake_commit, self.wake_pay = asyncio.Event(), asyncio.Event()
        self.marks: dict[Place, Mark] = {}
        self.decided = 0  # of what was put into the inbox, for the watchdog
        self.generation: int | None = None
        self._apart_until = 0.0
        self.former = (self.intake, self.settle)
        self.floors: dict[int, int] = {}
        self.read_before: dict[int, int] = {}
        self.make_good: Callable[[], Awaitable[None]] | None = None
        self.check: Callable[[], Awaitable[None]] | None = None
        self._claiming = asyncio.Lock()

    @property
    def partitions(self) -> set[int]:
        """The partitions whose lanes this worker has claimed."""
        return set(self.intake.claims)

    async def take_over(self, batch: Batch) -> None:
        """Claim the lanes of this worker's partitions after a rebalance, and take up what waits there.

        Raises:
            OwnershipLost: they may be another worker's since the batch was taken; then they are not claimed back from it.
        """
        app, settings = self.stage.app, self.stage.settings
        batch.check_owned()
        async with self._claiming:
            if self.generation == app.consumer_generation_id:
                batch.leave_out_stale()
                return
            self.forget()
            if self.make_good is not None:
                await self.make_good()  # before lanes are claimed: who folds has locked them
                batch.check_owned()
            generation = app.consumer_generation_id
            topic = settings.topic(ORDERS.name)
            partitions = sorted(tp.partition for tp in app.consumer.assignment() if tp.topic == topic)
            pool, intake, settle = self.stage.store.pool, self.intake, self.settle
            await self.stage.until_available("postgres", lambda: stages.claim(pool, partitions, intake, settle))
            if self.check is not None:
                await self.check()
            rows = await self.stage.until_available(
                "postgres",
                lambda: pool.fetch(statements("stages.sql")["waiting_orders"], partitions, BEGINNING, TAKEN_UP_MAX),
            )
            await self.take_up(rows)
            await self._tell_gate(partitions)
            if self.intake is not intake:
                raise OwnershipLost  # another stage has let go of everything meanwhile
            batch.leave_out_stale()
            self.generation = generation
            if self.till is not None:
                self.till.keep(self.entries)

    async def take_up(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take the orders of these rows of ``waiting`` in hand that are not; what was published of them is not known."""
        replies = {row["order_id"]: row["reply_to"] for row in rows if row["order_id"] not in self.entries}
        orders = await self.stage.until_available("postgres", lambda: self.read(replies))
        for order_id, reply_to in replies.items():
            order = orders.get(order_id)
            if order is not None and order_id not in self.entries and order.home in self.settle.claims:
                self.add(Entry(order, reply_to=reply_to, is_waiting=True))
                self.put(About(order_id, None))

    async def _tell_gate(self, partitions: Sequence[int]) -> None:
        """Tell Redis the counts that a former owner has written, and may have died before it told them."""
        stage = self.stage
        rows = await stage.until_available(
            "postgres", lambda: stage.store.pool.fetch(statements("stages.sql")["moved_last"], partitions)
        )
        await stage.update_gate(stage.store.counts_of(rows))
        if limited := [row["product_id"] for row in rows if row["is_limited"]]:  # nor of what their users have
            await stage.invalidate_gate(limited)

    def forget(self) -> None:
        """Drop what is in memory; nothing of it is acknowledged.  The next stage that is woken takes over again."""
        self.wake_commit.set()
        self.wake_pay.set()
        self.generation = None
        if self.intake.claims:
            self.former = (self.intake, self.settle)
        self.intake, self.settle = Lane(), Lane()
        self.entries.clear()
        self.inbox.clear()
        self.to_pay.clear()
        self.young.clear()
        self.found.clear()
        self.over.clear()
        self.being_held.clear()
        self.held_back.clear()
        self.marks.clear()
        self.stage.sample.forget()
        if self.stage.traces is not None:
            self.stage.traces.forget()

    def note_marks(self, marks: Mapping[Place, Mark]) -> None:
        """Note how far topics of the settle lane have been read; its next transaction writes it."""
        for place, mark in marks.items():
            before = self.marks.get(place)
            if mark.digest == UNKNOWN and before is not None:
                mark = mark._replace(stamp=before.stamp, digest=before.digest)  # noqa: PLW2901
            self.marks[place] = mark

    def take_finished(self) -> list[tuple[int, str]]:
        """Return home and id of the orders whose rows of ``waiting`` go: of those that are not in hand again."""
        gone = []
        for home, order_id in self.over:
            if (entry := self.entries.get(order_id)) is None:
                gone.append((home, order_id))
            else:
                entry.is_waiting = True
        self.over.clear()
        return gone

    def take_marks(self) -> list[Mark]:
        """Return the marks that no transaction has written yet."""
        marks = list(self.marks.values())
        self.marks.clear()
        return marks

    def owner_of(self, product_id: str) -> int:
        """Return the partition of a product."""
        return product_partition(product_id, self.stage.settings.partitions)

    def claims_of(self, lane: Lane) -> Callable[[str], int]:
        """Return what gives this lane's claim of a product's partition; 0: it has none."""
        return lambda product_id: lane.claims.get(self.owner_of(product_id), 0)

    def near(self, lane: Lane) -> Container[int]:
        """Return the partitions whose lines a transaction of this lane settles together with the orders of other homes."""
        return lane.claims if time.monotonic() >= self._apart_until else ()

    def keep_apart(self) -> None:
        """Settle with each order only what is at home, for a while."""
        self._apart_until = time.monotonic() + APART_S

    def add(self, entry: Entry) -> None:
        """Take an order in hand."""
        order_id = entry.order.order_id
        self.entries[order_id] = entry
        if not entry.is_waiting:
            if self.young and self.young[-1][0] == entry.since:
                self.young[-1][1].append(order_id)
            else:
                self.young.append((entry.since, [order_id]))

    async def room(self, batch: Batch, most: int = AHEAD_MAX, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until commit has caught up but for so many things, before more are taken in.

        Reserve would run ahead by seconds where much stands in the topic: its orders would count as waiting, a row and two
        records each, and commit would fall behind for that.

        Args:
            batch: that waits.
            most: things in the inbox.
            meanwhile: called after each pause.

        Raises:
            OwnershipLost: there was a rebalance meanwhile.
        """
        while len(self.inbox) > most:
            await asyncio.sleep(ROOM_POLL_S)
            batch.check_owned()
            meanwhile()

    def has_grown(self) -> bool:
        """Tell whether :meth:`grown` has something to return."""
        return bool(self.young) and self.young[0][0] < time.monotonic() - WAITING_AFTER_S

    def grown(self) -> list[Entry]:
        """Return the orders that have been in hand for :data:`WAITING_AFTER_S`, each once."""
        before = time.monotonic() - WAITING_AFTER_S
        grown: dict[str, Entry] = {}
        while self.young and self.young[0][0] < before:
            for order_id in self.young.popleft()[1]:
                entry = self.entries.get(order_id)
                if entry is not None and entry.since < before:  # else it was taken in hand again since
                    grown[order_id] = entry
        return [*grown.values()]

    def resting(self, age_s: float) -> list[str]:
        """Return the orders that wait and about which nothing has come in for so long."""
        before = time.monotonic() - age_s
        return [
            order_id
            for order_id, entry in self.entries.items()
            if entry.is_waiting
            and entry.later is None
            and entry.touched < before
            and not entry.is_to_pay
            and not self._is_asked(order_id)
        ]

    def _is_asked(self, order_id: str) -> bool:
        return self.till is not None and order_id in self.till

    def let_go(self, entry: Entry, most: int = IN_HAND_MAX) -> None:
        """Let go of an order that waits in Postgres, where too many are in hand: it is taken up again when there is room."""
        order_id = entry.order.order_id
        if (
            len(self.entries) > most
            and self.entries.get(order_id) is entry
            and entry.is_waiting
            and entry.later is None
            and (self.till is None or self.till.drop(order_id))
        ):
            self.entries.pop(order_id, None)

    def begin_hold(self, order_ids: Iterable[str]) -> None:
        """Note that these orders are being held: what comes in about them waits until they are in hand."""
        self.being_held.update(order_ids)

    def end_hold(self, order_ids: Iterable[str]) -> None:
        """Note that they are in hand, and decide what has come in about them meanwhile."""
        self.being_held.difference_update(order_ids)
        back, self.held_back = self.held_back, []
        for item in back:
            (self.held_back.append if item.order_id in self.being_held else self.put)(item)

    def put(self, item: About | LineAsked | Unread | Read) -> None:
        """Have the commit stage decide about something."""
        self.inbox.append(item)
        self.wake_commit.set()

    def pay(self, entry: Entry) -> None:
        """Have the pay stage ask the provider about an order."""
        if not entry.is_to_pay:
            entry.is_to_pay = True
            self.to_pay.append(entry)
        self.wake_pay.set()

    async def stock(
        self, product_ids: Iterable[str], user_ids: Iterable[str]
    ) -> tuple[dict[str, Counts], dict[str, int], dict[tuple[str, str], int]]:
        """Return the counts of products, the limits of those that have one, and what these users have of these."""
        pool = self.stage.store.pool
        rows = await pool.fetch(statements("stages.sql")["stock_of"], sorted(set(product_ids)))
        return await counted(pool, rows, user_ids)

    async def read(self, order_ids: Iterable[str]) -> dict[str, Order]:
        """Return the orders of these ids that Postgres has, whatever their home."""
        wanted = sorted(set(order_ids))
        if not wanted:
            return {}
        rows = await self.stage.store.pool.fetch(statements("stages.sql")["home_orders"], wanted)
        return {row["order_id"]: order_of(row, self.floors.get(row["home"], 0)) for row in rows}


async def counted(
    connection: Any, rows: Sequence[Any], user_ids: Iterable[str]
) -> tuple[dict[str, Counts], dict[str, int], dict[tuple[str, str], int]]:
    """Return the counts of rows of ``stock``, the limits of those that have one, and what these users have of these.

    A retired product is left out, as if it were unknown.
    """
    rows = [row for row in rows if not row["retired"]]
    limits = {r["product_id"]: r["limit_per_user"] for r in rows if r["limit_per_user"] is not None}
    units = {}
    if limits:
        users = sorted(set(user_ids))
        for row in await connection.fetch(statements("stages.sql")["units_of"], sorted(limits), users):
            units[row["product_id"], row["user_id"]] = row["units"]
    return Store.counts_of(rows), limits, units


def order_of(row: Mapping[str, Any], floor: int = 0) -> Order:
    """Return the order of a row of the query ``home_orders``; ``floor``: where its home ended at the last set-back."""
    payment = row["payment"]
    return Order(
        order_id=row["order_id"],
        home=row["home"],
        user_id=row["user_id"],
        payment_method=row["payment_method"],
        lines=tuple(zip(row["product_ids"], row["quantities"], strict=True)),
        status=Status(row["status"]),
        states=row["states"],
        created_at=row["created_at"],
        total_cents=row["total_cents"],
        reason=row["reason"],
        payment=None if payment is None else Payment(payment),
        charge_id=row["charge_id"],
        prices=list(row["prices"]),
        reasons=list(row["reasons"] or ()),
        may_be_charged=row["source_offset"] < floor,
        owners=tuple(row["owners"] or ()),
        is_closed=row["is_closed"],
        reserved_at=row["reserved_at"],
        paid_at=row["paid_at"],
        confirmed_at=row["confirmed_at"],
        cancelled_at=row["cancelled_at"],
    )


def digest_of(record: Any) -> int:
    """Return a 63-bit hash of a record."""
    return int.from_bytes(blake2b(record.value or b"", digest_size=8).digest(), "big") >> 1


def marks_of(batch: Batch) -> dict[Place, Mark]:
    """Return how far each partition of a batch has been read."""
    marks: dict[Place, Mark] = {}
    for chunk in batch.chunks:
        place = topic, partition = chunk.tp.topic, chunk.tp.partition
        if chunk.records:
            record = chunk.records[-1]
            last = record.timestamp, digest_of(record)
        else:
            before = marks.get(place)
            last = (before.stamp, before.digest) if before is not None else (0, UNKNOWN)
        marks[place] = Mark(partition, topic, chunk.next_offset, batch.acknowledged(chunk.tp), *last)
    return marks
