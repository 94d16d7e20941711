"""Reconcile: reads the topics again, folds what every order and product must be, and compares with what is there.

One *round* reads on to the ends of the topics, then takes one snapshot of Postgres, then reads Redis.  Effects go Postgres,
events, other owners' lines.  So Postgres is never behind the events that were read before its snapshot, and what is behind
Postgres is in flight until the consumer group has passed all that there was at the snapshot, and while the order waits.
Rounds are repeated until everything agrees or the time is up; a difference that is still there, and that nothing under way
explains, is drift.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
from aiokafka import TopicPartition

from orderstream import connecting
from orderstream.jobs.reconcile.checkpoint import Checkpoint, Identity, UnusableCheckpoint, load, save
from orderstream.jobs.reconcile.drift import (
    HOLDS,
    NOTHING,
    Difference,
    Finding,
    Holds,
    ProductView,
    Progress,
    Sums,
    holds_of,
    is_over,
    judge_catalogue,
    judge_order,
    judge_product,
    units,
)
from orderstream.jobs.reconcile.fold import TOPICS, UNSEEN, Fold, Move, Trace
from orderstream.settings import Settings
from orderstream.sql.differences import Kind
from orderstream.sql.store import Store, gate_of, statements
from orderstream.streams.orders import Limits, Status
from orderstream.streams.partitions import product_partition
from orderstream.streams.replay import Offsets, Replay, fold
from orderstream.streams.topics import ORDER_COMMANDS, ORDER_EVENTS, ORDER_LINES, ORDERS, RESERVATIONS, STOCK_COMMANDS

ASK_ORDERS_MAX = 20_000
"""Orders asked about in one statement."""

ROWS_PREFETCHED = 5_000
"""Rows of a cursor on their way at once."""

SNAPSHOT_S = 600.0
"""Longest wait for one statement of a snapshot, in seconds."""

PAUSE_MIN_S, PAUSE_MAX_S = 0.3, 1.0
"""Pauses between two rounds, doubling in between: offsets are committed every half second."""

OVERLAP = timedelta(seconds=60)
"""Statements that took in orders and are not committed yet carry earlier times."""

RUNS_KEPT = 1_000
"""Runs of which Postgres keeps what they found."""

_STAGES = (ORDERS, ORDER_LINES, RESERVATIONS, ORDER_COMMANDS, STOCK_COMMANDS)
_COMMANDS = (ORDER_COMMANDS, STOCK_COMMANDS)


def query(name: str) -> str:
    """Return the statement of that name from ``reconcile.sql``."""
    return statements("reconcile.sql")[name]


@dataclass(frozen=True, slots=True)
class Repair:
    """What was done about one difference: ``outcome`` is ``done``, ``agrees`` (by now) or ``left``; ``text`` says what."""

    kind: Kind
    subject: str
    outcome: str
    text: str


@dataclass(slots=True)
class Report:
    """What a run found.

    Attributes:
        differences: the drift, in the order in which it is repaired.
        in_flight: how many differences of each kind are explained by what is under way.
        open: orders that have not ended.
        orders: those that were compared in this run.
        products: those that were compared.
        covered: first and next offset of each partition that was read, by topic.
        records: how many were read, in ``seconds``, the time of reading and folding.
        notes: what the reader has to know about the result.
        checkpoint: where the next run continues; None when that was not written.
        resumed: whether this run continued from a checkpoint.
        repairs: what was done about the differences.
        after: what a second run found, once they were repaired.
        youngest: orders over units that are owed, by product: those that ``--resolve`` cancels.
    """

    differences: list[Difference]
    in_flight: Counter[str]
    open: int
    orders: int
    products: int
    covered: dict[str, dict[int, tuple[int, int]]]
    records: int
    seconds: float
    notes: list[str]
    checkpoint: Path | None
    resumed: bool
    repairs: list[Repair] = field(default_factory=list)
    after: Report | None = None
    youngest: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether nothing differs, or nothing any more."""
        return not (self.after or self).differences

    @property
    def records_per_second(self) -> float:
        """How fast the topics were read and folded."""
        return self.records / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Round:
    """What one round saw."""

    progress: Progress
    findings: list[Finding] = field(default_factory=list)
    units: dict[str, Sums] = field(default_factory=dict)
    orders: int = 0

    def sums(self, product_id: str) -> Sums:
        """Return a product's sums of what is not settled."""
        return self.units.setdefault(product_id, Sums())


class Reconcile:
    """One run; use it as an async context.

    Attributes:
        fold: what was read.
        views: every product as the last round saw it.
        at: when the last snapshot was taken, by Postgres' clock.
        flying: stock commands that the group is not done with.
        refused: those that it had refused by the last round; a retry may have them carried out since.
        commanded: products over whose name, price or limit a command was under way in the last round.
        progress: how far the workers were in the last round.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        file: Path | None,
        from_beginning: bool = False,
        grace_s: float = 30.0,
        settle_s: float = 5.0,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.settings = settings
        self.fold = Fold(
            Limits(settings.order_lines_max, settings.line_quantity_max, settings.order_bytes_max),
            settings.partitions,
            settings.topic,
        )
        self.views: dict[str, ProductView] = {}
        self.at: datetime | None = None
        self.flying: set[str] = set()
        self.refused: set[str] = set()
        self.commanded: set[str] = set()
        self.progress = Progress(settings, {}, None, grace_s)
        self._file, self._from_beginning = file, from_beginning
        self._settle_s, self._on_progress = settle_s, on_progress
        self._stack = AsyncExitStack()
        self._settled: dict[str, Sums] = {}
        self._done_moves: set[str] = set()
        self._carried: set[str] = set()
        self._unknown: set[str] = set()
        self._asked: set[str] = set()
        self._reopened: set[str] = set()
        self._resumed_at: datetime | None = None
        self._start: Offsets = {}
        self._bar: dict[tuple[str, int], int] | None = None
        self._rounds = 0
        self._records, self._seconds = 0, 0.0
        self._notes: list[str] = []
        self._orders = 0
        self._cut: set[tuple[str, int]] = set()

    def remark(self, note: str) -> None:
        """Add a note to the report."""
        self._notes.append(note)

    # Engines

    def kafka(self) -> contextlib.AbstractContextManager[None]:
        """Raise Kafka's faults as EngineUnavailable."""
        return connecting.kafka(self.settings)

    def postgres(self) -> contextlib.AbstractContextManager[None]:
        """Raise Postgres' faults as EngineUnavailable."""
        return connecting.postgres(self.settings)

    def redis(self) -> contextlib.AbstractContextManager[None]:
        """Raise Redis' faults as EngineUnavailable."""
        return connecting.redis(self.settings)

    async def __aenter__(self) -> Reconcile:
        """Connect the engines and find where to begin.

        Raises:
            EngineUnavailable: one of them does not answer.
            UnusableCheckpoint: the run can't continue from it.
        """
        ours, stack = self.settings, self._stack
        try:
            with self.postgres():
                self.store = await Store.connect(ours.database_url, connections_max=2, timeout_s=SNAPSHOT_S)
            stack.push_async_callback(self.store.close)
            with self.postgres():
                await self.store.pool.execute(query("clock"))
            self.gate = gate_of(ours, self.store)
            stack.push_async_callback(self.gate.close)
            with self.redis():
                await self.gate.enter()
            topics = [ours.topic(spec.name) for spec in TOPICS]
            with self.kafka():
                self.replay = Replay(ours, topics)
                await stack.enter_async_context(self.replay)
                await self.replay.check([ours.topic(spec.name) for spec in _STAGES])
                await self._begin()
        except BaseException:
            await stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _begin(self) -> None:
        ours = self.settings
        self._pipeline = Identity.of(ours, await self.replay.cluster_id())
        beginnings, ends = await self.replay.beginnings(), await self.replay.ends()
        last = None if self._file is None or self._from_beginning else load(self._file, self._pipeline)
        if last is None:
            self._start = beginnings
            cut = {tp for tp, offset in beginnings.items() if offset}
            self._cut = {(tp.topic, tp.partition) for tp in cut}
            if cut:
                lost = sum(beginnings[tp] for tp in cut)
                self._notes.append(
                    f"{lost:,} records of {len(cut)} partitions were removed by retention: what only they said is taken as "
                    "Postgres has it"
                )
        else:
            self._resume(last, beginnings, ends)
        self.replay.begin(self._start)
        self._notes += (": ".join(why.splitlines()) for why in self.replay.misfits().values())

    def _resume(self, last: Checkpoint, beginnings: Offsets, ends: Offsets) -> None:
        assert self._file is not None
        for tp in self.replay.partitions:
            offset = last.offsets.get((tp.topic, tp.partition), 0)
            where = f"{tp.topic}/{tp.partition}"
            if offset > ends[tp]:
                raise UnusableCheckpoint(self._file, f"{where} ends at {ends[tp]}, before the offset to continue from")
            if offset < beginnings[tp]:
                lost = beginnings[tp] - offset
                raise UnusableCheckpoint(self._file, f"{lost} records after {where}/{offset} were removed by retention")
            self._start[tp] = offset
        self._resumed_at = last.at
        self._settled = {product_id: Sums(r, a, s) for product_id, (r, a, s) in last.sums.items()}
        self.fold.orders, self.fold.moves, self.fold.asked = last.orders, last.moves, last.asked
        self.fold.claims = last.claims
        for partition, offset in last.dead:
            self.fold.dead.setdefault((self.settings.topic(STOCK_COMMANDS.name), partition), set()).add(offset)
        self._carried = {*last.orders, *last.moves}
        self._asked = {*last.asked}

    # The run

    async def run(self) -> Report:
        """Repeat rounds until everything agrees or the time is up, and leave a checkpoint.

        Raises:
            EngineUnavailable: an engine does not answer.
            UnusableCheckpoint: it can't be written.
        """
        before: set[tuple[Kind, str, str]] = set()
        deadline, pause_s = 0.0, PAUSE_MIN_S
        while True:
            seen = await self._round()
            drift = [f.difference for f in seen.findings if f.in_flight is None and f.difference.key in before]
            if not seen.findings or (self._rounds > 1 and time.monotonic() > deadline):
                break
            if self._rounds == 1:
                deadline = time.monotonic() + self._settle_s
            before = {finding.difference.key for finding in seen.findings}
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)
        keys = {difference.key for difference in drift}
        explained = Counter(str(f.difference.kind) for f in seen.findings if f.difference.key not in keys)
        order = [*Kind]
        drift.sort(key=lambda difference: (order.index(difference.kind), difference.subject))
        covered: dict[str, dict[int, tuple[int, int]]] = {}
        for tp in self.replay.partitions:
            covered.setdefault(tp.topic, {})[tp.partition] = (self._start[tp], self.replay.read[tp])
        return Report(
            differences=drift,
            in_flight=explained,
            open=sum(not trace.settled for trace in self.fold.orders.values()),
            orders=self._orders,
            products=len(self.views),
            covered=covered,
            records=self._records,
            seconds=self._seconds,
            notes=self._notes,
            checkpoint=self._save(),
            resumed=self._resumed_at is not None,
        )

    async def note(self, report: Report) -> None:
        """Leave in Postgres what this run found, for Prometheus and for later.

        Raises:
            EngineUnavailable: Postgres does not answer.
        """
        found = Counter(str(difference.kind) for difference in report.differences)
        left = Counter(str(difference.kind) for difference in (report.after or report).differences)
        with self.postgres():
            await self.store.pool.execute(
                query("note_run"),
                report.resumed,
                report.records,
                report.seconds,
                report.orders,
                report.products,
                report.open,
                orjson.dumps(found).decode(),
                orjson.dumps(left).decode(),
            )
            await self.store.pool.execute(query("forget_runs"), RUNS_KEPT)

    async def _round(self) -> Round:
        self._rounds += 1
        with self.kafka():
            committed = {
                (tp.topic, tp.partition): there.offset
                for tp, there in (await self.replay.committed(self.settings.app_id)).items()
            }
            await self.read_on()
        self.fold.reject()
        self.progress = Progress(self.settings, committed, self._bar, self.progress.grace_s)
        seen = Round(self.progress)
        with self.postgres():
            async with (
                self.store.pool.acquire() as connection,
                connection.transaction(isolation="repeatable_read", readonly=True),
            ):
                since, self.at = self.at or self._resumed_at, await connection.fetchval(query("clock"))
                with self.kafka():
                    # Whatever the snapshot has of commands, their records are there by now.
                    await self.read_on(*(self.settings.topic(spec.name) for spec in _COMMANDS))
                    stages = [
                        tp for spec in _STAGES for tp in self.replay.partitions_of(self.settings.topic(spec.name))
                    ]
                    ends = await self.replay.ends(stages)
                    self._bar = {(tp.topic, tp.partition): end for tp, end in ends.items()}
                await self._compare_orders(connection, seen, since)
                products = await connection.fetch(query("products"), timeout=SNAPSHOT_S)
                for row in await connection.fetch(query("users"), timeout=SNAPSHOT_S):
                    seen.findings.append(_users_differ(row))
                await self._count_moves(connection, seen)
                must = await self._catalogue(connection)
        for row in products:
            if row["product_id"] in must and row["version"] is not None:
                seen.findings += judge_catalogue(row, must[row["product_id"]])
        await self._compare_products(seen, products)
        return seen

    async def read_on(self, *topics: str) -> None:
        """Read to the present ends of the topics, or of some of them.

        Raises:
            KafkaError, TimeoutError: Kafka does not answer.
        """
        wanted = [tp for tp in self.replay.partitions if not topics or tp.topic in topics]
        ends = await self.replay.ends(wanted)
        total = sum(ends[tp] - self.replay.read[tp] for tp in wanted)
        first = self._rounds == 1 and not topics
        collecting = gc.isenabled()
        gc.disable()  # a million small objects, and no cycles among them
        start = time.perf_counter()
        try:
            self._records += await fold(
                self.replay, ends, self.fold.take, lambda done: self._on_progress(done, total) if first else None
            )
        finally:
            if collecting:
                gc.enable()
        if total:
            self._seconds += time.perf_counter() - start

    # Orders

    async def _compare_orders(self, connection: Any, seen: Round, since: datetime | None) -> None:
        orders = self.fold.orders
        asked, self._asked = self.fold.asked.keys() - self._asked, {*self.fold.asked}
        for order_id in asked:
            trace = orders.get(order_id)
            if trace is not None and trace.settled == Status.CONFIRMED:
                trace.settled = None  # it was sold, and may be taken back now
                self._reopened.add(order_id)
        if since is None:
            asked = await connection.prepare(query("orders"))
            async for row in asked.cursor(None, None, prefetch=ROWS_PREFETCHED, timeout=SNAPSHOT_S):
                self._weigh(row, seen)
        else:
            ids = [order_id for order_id, trace in orders.items() if not trace.settled]
            ids += self._unknown | {order_id for order_id in asked if order_id not in orders}
            since -= OVERLAP
            for start in range(0, len(ids) or 1, ASK_ORDERS_MAX):
                part = ids[start : start + ASK_ORDERS_MAX]
                for row in await connection.fetch(query("orders"), part, None if start else since, timeout=SNAPSHOT_S):
                    self._weigh(row, seen)
        missing = [i for i, trace in orders.items() if not trace.settled and trace.round != self._rounds]
        gone = await connection.fetch(statements("queries.sql")["removed"], missing, timeout=SNAPSHOT_S)
        for row in gone:
            del orders[row["order_id"]]  # a record under a removed order's id is none, though its dead letter be gone
        missing = [i for i in missing if i in orders]
        strays: dict[str, dict[str, Any]] = {}
        for row in await connection.fetch(query("stray_holds"), missing, timeout=SNAPSHOT_S):
            strays.setdefault(row["order_id"], {})[row["product_id"]] = row
        for order_id in missing:
            held = strays.pop(order_id, {})
            self._judge(
                order_id, orders[order_id], None, {p: (r["state"], r["quantity"]) for p, r in held.items()}, seen
            )
        for order_id, held in strays.items():
            seen.findings.append(self._stray(order_id, held))
            for product_id, row in held.items():
                seen.sums(product_id).reserved += row["quantity"]
        self._orders = self._orders or seen.orders

    def _stray(self, order_id: str, held: Mapping[str, Any]) -> Finding:
        """Make the finding of lines that are held for an order that Postgres does not know with them."""
        late = all(row["held_s"] > self.progress.grace_s for row in held.values())
        busy = next(filter(None, map(self.progress.product_busy, held)), None if late else "they were held just now")
        must, found = dict.fromkeys(held, "none"), dict.fromkeys(held, "held")
        return Finding(Difference(Kind.ORDER_HOLDS, order_id, must, found, HOLDS), busy)

    def _weigh(self, row: Any, seen: Round) -> None:
        """Take in one order as the snapshot has it."""
        order_id, home = row["order_id"], row["home"]
        trace = self.fold.orders.get(order_id)
        tp = TopicPartition(self.settings.topic(ORDERS.name), home)
        earlier = row["source_offset"] < self._start.get(tp, 0)
        if earlier and self._resumed_at is not None and order_id not in self._carried:
            if not self._was_sold(row) or (row["cancelled_at"] is None and order_id not in self.fold.asked):
                self.fold.orders.pop(order_id, None)  # it is in the sums; a record of it was repeated
                return
            self._carried.add(order_id)
            self._reopened.add(order_id)
        if trace is None:
            if not earlier and row["source_offset"] not in self.fold.invalid.get(home, ()):
                self._not_read(row, tp, seen)
                return
            trace = self.fold.orders[order_id] = Trace("", "", (), UNSEEN, UNSEEN)
        if earlier and self._resumed_at is None and trace.partition != UNSEEN:
            lines = tuple(zip(row["product_ids"], row["quantities"], strict=True))
            if not trace.same(row["user_id"], row["payment_method"], lines):
                trace.partition = trace.offset = UNSEEN  # its own record was removed, this one is another order's
                trace.rivals = None
        if order_id in self._reopened:
            self._reopened.discard(order_id)
            for product_id, quantity in zip(row["product_ids"], row["quantities"], strict=True):
                self._settled[product_id].sold -= quantity
        if not trace.settled and trace.round != self._rounds:
            trace.choose(home, row["source_offset"])
            trace.round = self._rounds
            self._judge(order_id, trace, row, holds_of(row), seen)

    def _was_sold(self, row: Any) -> bool:
        """Return whether an order that is in the checkpoint's sums is there as sold."""
        confirmed_at, cancelled_at, at = row["confirmed_at"], row["cancelled_at"], self._resumed_at
        return confirmed_at is not None and confirmed_at < at and (cancelled_at is None or cancelled_at >= at)

    def _not_read(self, row: Any, tp: TopicPartition, seen: Round) -> None:
        if row["source_offset"] >= self.replay.read.get(tp, 0):
            unread = Trace("", "", (), UNSEEN, UNSEEN)
            for product_id, sold, reserved in units(unread, row, holds_of(row), self.settings.partitions):
                seen.sums(product_id).sold += sold
                seen.sums(product_id).reserved += reserved
            return
        self._unknown.add(row["order_id"])
        where = f"{row['status']}; {tp.topic}/{tp.partition}/{row['source_offset']} is another record"
        seen.findings.append(Finding(Difference(Kind.ORDER_UNKNOWN, row["order_id"], "no such order", where, NOTHING)))

    def _judge(self, order_id: str, trace: Trace, row: Any, holds: Holds, seen: Round) -> None:
        asked = self.fold.asked.get(order_id)
        found = judge_order(
            order_id,
            trace,
            row,
            self.progress,
            asked=asked is not None and self.progress.passed(ORDER_COMMANDS.name, *asked),
            cut=self._is_cut(ORDER_EVENTS.name, trace.partition if row is None else row["home"]),
        )
        seen.findings += found
        seen.orders += 1
        taken_back = asked is not None and row is not None and row["cancelled_at"] is None
        if row is not None and not found and is_over(row) and not taken_back:
            trace.settled = row["status"]
        for product_id, sold, reserved in units(trace, row, holds, self.settings.partitions):
            sums = self._settled.setdefault(product_id, Sums()) if trace.settled else seen.sums(product_id)
            sums.sold += sold
            sums.reserved += reserved

    def _is_cut(self, topic: str, partition: int) -> bool:
        return (self.settings.topic(topic), partition) in self._cut

    # Products

    async def _count_moves(self, connection: Any, seen: Round) -> None:
        moves = self.fold.moves
        ids = [command_id for command_id in moves if command_id not in self._done_moves]
        cut = any(topic == self.settings.topic(STOCK_COMMANDS.name) for topic, _ in self._cut)
        rows = await connection.fetch(query("moves"), None if cut else ids, timeout=SNAPSHOT_S)
        there = {row["command_id"]: row for row in rows}
        self.flying, self.refused = set(), set()
        for command_id in ids:
            row, records = there.get(command_id), moves[command_id]
            known = next((move for move in records if move.change is not None), None)
            if row is not None and row["applied"]:
                self._moved(command_id, row, seen)
            elif not all(self.progress.passed(STOCK_COMMANDS.name, move.partition, move.offset) for move in records):
                self.flying.add(command_id)
            elif is_refused(self.fold, records, row):
                self.refused.add(command_id)  # until it is sent again
            elif known is not None:
                _add(seen.sums(known.product_id), known.command, known.change or 0)
        if cut:
            for row in rows:
                partition = product_partition(row["product_id"], self.settings.partitions)
                is_ours = row["applied"] and row["command_id"] not in moves
                if is_ours and self._is_cut(STOCK_COMMANDS.name, partition):
                    _add(seen.sums(row["product_id"]), row["command"], row["change"])

    def _moved(self, command_id: str, row: Any, seen: Round) -> None:
        ours = (row["product_id"], row["command"], row["change"])
        known = [move for move in self.fold.moves[command_id] if move.change is not None]
        carried = command_id in self._carried
        if not carried and self._resumed_at is not None and row["decided_at"] < self._resumed_at:
            self._done_moves.add(command_id)  # it is in the sums; its record was repeated
        elif any(move[:3] == ours for move in known):
            self._done_moves.add(command_id)
            _add(self._settled.setdefault(row["product_id"], Sums()), row["command"], row["change"])
        elif not known:  # what came of it is not read yet: Postgres says so
            _add(seen.sums(row["product_id"]), row["command"], row["change"])
        else:
            _add(seen.sums(known[0].product_id), known[0].command, known[0].change or 0)

    async def _catalogue(self, connection: Any) -> dict[str, dict[str, Any]]:
        """Return what commands that are carried out, or must be, say of products' names, prices and limits.

        One that comes again changes nothing: that record counts by which Postgres carried it out, else its first one that
        is no dead letter, of this run.  What Postgres has refused counts for nothing, whatever became of its dead letter.
        """
        said = {
            product_id: [one for one in them if not self.fold.is_dead(one)]
            for product_id, them in self.fold.catalogue.items()
        }
        ids = sorted({one.command_id for them in said.values() for one in them})
        done = {row["command_id"]: row for row in await connection.fetch(query("catalogue"), ids)} if ids else {}
        must: dict[str, dict[str, Any]] = {}
        self.commanded = set()
        for product_id, them in said.items():
            counted: dict[str, int] = {}
            for one in them:
                row = done.get(one.command_id)
                if row is None and not self.progress.passed(STOCK_COMMANDS.name, one.partition, one.offset):
                    self.commanded.add(product_id)
                    continue
                if row is not None and not row["applied"]:
                    continue
                repeats = self._resumed_at is not None and row is not None and row["decided_at"] < self._resumed_at
                by = None if row is None else row["offset"]
                first = counted.setdefault(one.command_id, one.offset)
                if not repeats and one.offset == (first if by is None else by):
                    must.setdefault(product_id, {})[one.member] = one.value
        return must

    async def _compare_products(self, seen: Round, products: Sequence[Any]) -> None:
        with self.redis():
            in_redis = await self.gate.inspect(row for row in products if row["version"] is not None)
        before, self.views = self.views, {}
        for row in products:
            product_id = row["product_id"]
            if row["carried"] and self._resumed_at is None and self._rounds == 1:
                # Orders that were removed: from here on they are in the sums, as those are that end and agree.
                self._settled.setdefault(product_id, Sums()).sold += row["carried"]
            view = self.views[product_id] = ProductView(
                row,
                _both(self._settled.get(product_id), seen.units.get(product_id)),
                in_redis=in_redis.get(product_id),
                before=before[product_id].now if product_id in before else None,
            )
            seen.findings += judge_product(view, self.progress)

    # The checkpoint

    def _save(self) -> Path | None:
        if self._file is None or self.at is None:
            return None
        orders = {order_id: trace for order_id, trace in self.fold.orders.items() if not trace.settled}
        done = self._done_moves | self.refused
        moves = {i: moves for i, moves in self.fold.moves.items() if i not in done}
        checkpoint = Checkpoint(
            pipeline=self._pipeline,
            at=self.at,
            offsets={(tp.topic, tp.partition): offset for tp, offset in self.replay.read.items()},
            sums={product_id: (s.received, s.adjusted, s.sold) for product_id, s in self._settled.items()},
            orders=orders,
            moves=moves,
            dead=[(m.partition, m.offset) for records in moves.values() for m in records if self.fold.is_dead(m)],
            asked={order_id: place for order_id, place in self.fold.asked.items() if order_id in orders},
            claims=self.fold.claims,
        )
        try:
            save(self._file, checkpoint)
        except OSError as error:
            raise UnusableCheckpoint(self._file, f"can't be written: {error}") from error
        return self._file


def _users_differ(row: Any) -> Finding:
    """Make the finding of a limited product; its counts of users are written with its lines, so nothing is in flight."""
    user, more = {"user_id": row["user_id"]}, {"users": row["users"]} if row["users"] > 1 else {}
    must, counted = {**user, "units": row["must"]}, {**user, "units": row["counted"], **more}
    repair = "count the units of its users again, from their lines"
    return Finding(Difference(Kind.STOCK_USERS, row["product_id"], must, counted, repair))


def is_refused(fold: Fold, records: Sequence[Move], row: Any) -> bool:
    """Return whether a stock command that the group is done with counts for nothing, unless it is carried out later.

    A dead letter of it tells so, or Postgres where retention has removed that.  A repeat of it in the same batch is no dead
    letter of its own.

    Args:
        fold: which knows the dead letters.
        records: of the command.
        row: how Postgres has it; None: not at all.
    """
    return any(map(fold.is_dead, records)) if row is None else not row["applied"]


def _add(sums: Sums, command: str, change: int) -> None:
    if command == "receive":
        sums.received += change
    else:
        sums.adjusted += change


def _both(one: Sums | None, other: Sums | None) -> Sums:
    a, b = one or Sums(), other or Sums()
    return Sums(a.received + b.received, a.adjusted + b.adjusted, a.sold + b.sold, a.reserved + b.reserved)


def as_json(report: Report) -> dict[str, Any]:
    """Return a report as JSON."""
    told = ("in_flight", "open", "orders", "products", "records", "notes", "resumed")
    after = report.after
    return {
        "agrees": report.agrees,
        "differences": [difference._asdict() for difference in report.differences],
        **{name: getattr(report, name) for name in told},
        "covered": {
            topic: {str(partition): {"from": start, "to": end} for partition, (start, end) in parts.items()}
            for topic, parts in report.covered.items()
        },
        "seconds": round(report.seconds, 3),
        "records_per_second": round(report.records_per_second),
        "checkpoint": None if report.checkpoint is None else str(report.checkpoint),
        "repairs": [asdict(repair) for repair in report.repairs],
        "resolve": {
            product_id: [order._asdict() for order in orders] for product_id, orders in report.youngest.items()
        },
        "after_repairs": after
        and {"differences": [one._asdict() for one in after.differences], "in_flight": after.in_flight},
    }
