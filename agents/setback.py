"""Postgres knows what was read: at each take-over it is compared with the topics, before anything is read.

Postgres may have been restored, or a standby without the last moments promoted; a log may have been cut off, made anew, or
have lost records that nobody had read.  docs/ARCHITECTURE.md says how each is found and what is done then.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson
import structlog
from aiokafka import TopicPartition

from orderstream import metrics
from orderstream.agents.desk import UNKNOWN, Desk, digest_of
from orderstream.agents.stock import REASONS
from orderstream.errors import InvalidRecord, OwnershipLost
from orderstream.sql import stages
from orderstream.sql.stages import Lane
from orderstream.sql.store import statements
from orderstream.streams.commands import WHY, cancelled, stock_command
from orderstream.streams.events import REJECTED
from orderstream.streams.headers import LANE, current, lane_of
from orderstream.streams.orders import Limits, Status, decode_record
from orderstream.streams.partitions import product_partition
from orderstream.streams.replay import Offsets, Replay
from orderstream.streams.topics import (
    DEAD_LETTERS,
    ORDER_COMMANDS,
    ORDER_EVENTS,
    ORDER_LINES,
    ORDERS,
    RESERVATIONS,
    STOCK_COMMANDS,
    TopicSpec,
)
from orderstream.streams.upstream.clients import COMMITTED_BY

WATCH_S = 2.0
"""How often a worker looks whether Postgres is still the one that it knows."""

SLACK_S = 600.0
"""Events are folded from so many seconds before the last transaction that Postgres has: by how much clocks may differ."""

LAST_EVENTS = 20
"""Of a home, read at a take-over: the last of them may be a former worker's."""

LOOK_BACK = 1_000
"""Offsets before a mark among which the last record is looked for, where transactions have left their marks behind it."""

ENDS_TRIES = 3
"""How often the end of a log is asked for before it is believed to be before what was read."""

FOLD_TIMEOUT_S = 3_600.0
"""Of a statement of the fold."""

COMMANDS_MAX = 1_000
"""Stock commands of one statement."""

READ = (ORDERS, ORDER_LINES, RESERVATIONS, ORDER_COMMANDS, STOCK_COMMANDS)
SKIPPED = (ORDER_LINES, RESERVATIONS)
"""What stands there at a set-back is about holds that may be gone.  Homes ask again."""

OUTCOMES = {REASONS.get(outcome, outcome): outcome for outcome in WHY if outcome != "reused"}
"""What becomes of a stock command, by the reason of its dead letter."""

log = structlog.get_logger("setback")


@dataclass(slots=True)
class Findings:
    """What a comparison found.

    Attributes:
        set_back: why Postgres must have been set back; empty: it was not.
        begins: where to begin, of partitions that do not begin where the group was.
        anew: where marks begin anew: another log, or records that were removed unread.
        missed: first offset, and the one after the last, of records that nobody read.
        others: partitions in which another log stands than was read.
        cut: homes of orders whose records may be gone before they were acknowledged.
        group: the group's offsets, whoever has committed them.
        done: before which all is acknowledged: the group's offsets, where a worker has committed them, else Postgres's.
    """

    set_back: list[str] = field(default_factory=list)
    begins: Offsets = field(default_factory=dict)
    anew: Offsets = field(default_factory=dict)
    missed: dict[TopicPartition, tuple[int, int]] = field(default_factory=dict)
    others: list[TopicPartition] = field(default_factory=list)
    cut: set[int] = field(default_factory=set)
    group: Offsets = field(default_factory=dict)
    done: Offsets = field(default_factory=dict)


class Told:
    """What ``order-events`` says of the orders of one home; ``removed``: which had been removed."""

    def __init__(self, home: int) -> None:
        self._home, self._claims = home, dict[int, int]()
        self._orders: dict[str, list[Any]] = {}
        self.removed = set[str]()

    def __contains__(self, order_id: str) -> bool:
        return order_id in self._orders

    def add(self, records: Iterable[Any]) -> None:
        """Take the next events."""
        for record in current(records, self._home, self._claims):
            event = orjson.loads(record.value)
            if event["status"] == REJECTED:
                if event["reason"] == "order_removed":
                    self.removed.add(event["order_id"])
                continue
            status, order_id = Status(event["status"]), event["order_id"]
            told = self._orders.setdefault(order_id, [None] * 9)
            told[_PLACES[status]] = datetime.fromisoformat(event["at"])
            told[5] = event.get("total_cents", told[5])
            told[6] = event.get("charge_id", told[6])
            told[7] = event.get("reason", told[7])
            told[8] = event.get("prices_cents", told[8])

    def rows(self) -> list[tuple[Any, ...]]:
        """Return the rows of ``fold_told``."""
        return [(order_id, self._home, *told) for order_id, told in self._orders.items()]


_PLACES = {status: n for n, status in enumerate(Status)}


class Setback:
    """Compares Postgres with the topics for one worker, and makes good what it finds."""

    def __init__(self, desk: Desk) -> None:
        self._desk, self._stage = desk, desk.stage
        self._settings = desk.stage.settings
        self._folded = 0

    def _topic(self, spec: TopicSpec) -> str:
        return self._settings.topic(spec.name)

    async def _ask(self, name: str, *arguments: Any) -> list[Any]:
        pool = self._stage.store.pool
        rows: list[Any] = await self._stage.until_available(
            "postgres", lambda: pool.fetch(statements("stages.sql")[name], *arguments)
        )
        return rows

    async def watch(self) -> None:
        """Let go of everything, for ever and as soon as Postgres is another one: also where nothing has to be written."""
        desk = self._desk
        while True:
            await asyncio.sleep(WATCH_S)
            if desk.generation is None:
                continue
            intake, settle = desk.intake, desk.settle
            known = {"intake": dict(intake.sequences), "settle": dict(settle.sequences)}
            (state,) = await self._ask("pipeline_state")
            await self._stage.gate.look(state["gates"])
            rows = await self._ask("lanes_of", sorted(desk.partitions))
            behind = any(row["sequence"] < known[row["lane"]].get(row["partition"], 0) for row in rows)
            due = state["set_backs"] > state["folded"] or state["is_other"]
            if (behind or due or len(rows) < len(intake.claims) * 2) and desk.intake is intake:
                log.warning("Postgres is not the one that it was", behind=behind, another=state["is_other"])
                desk.forget()
                self._stage.app.consumer.read_again()

    async def make_good(self) -> None:
        """Where Postgres was set back, fold the topics in, or wait while another worker does."""
        (state,) = await self._ask("pipeline_state")
        if state["set_backs"] > state["folded"]:
            await self._make_good(state["set_backs"])

    async def check(self) -> None:
        """Compare Postgres with the topics, of the lanes that have just been claimed.

        Raises:
            OwnershipLost: something had to be made good; take over again.
        """
        desk, stage = self._desk, self._stage
        (state,) = await self._ask("pipeline_state")
        if state["set_backs"] > state["folded"]:
            raise OwnershipLost
        if self._folded != state["folded"]:
            stage.gate.forget()
            self._folded = state["folded"]
        await stage.gate.look(state["gates"])
        if state["system"] is None:
            await self._ask("note_system", state["system_now"], state["timeline_now"])
        marks = {
            TopicPartition(row["topic"], row["partition"]): row
            for row in await self._ask("marks_of", sorted(desk.partitions))
        }
        intake, settle = desk.intake, desk.settle
        behind = self._lanes_behind(intake, settle)
        found = await stage.until_available("kafka", lambda: self._compare(settle, marks, state["folded"]))
        if desk.intake is not intake:
            raise OwnershipLost  # another stage has let go of everything meanwhile
        if state["is_other"]:
            found.set_back.insert(0, "it is another server, or on another timeline")
        found.set_back += behind
        if found.set_back:
            if (await self._ask("note_set_back", state["set_backs"]))[0]["noted"]:
                metrics.SET_BACKS.inc()
                log.error(
                    "Postgres was set back: all stop, and the topics are folded in",
                    found=found.set_back[:10],
                )
            raise OwnershipLost
        await self._begin(found, marks, state["folded"])
        orders = {tp.partition: row for tp, row in marks.items() if tp.topic == self._topic(ORDERS)}
        desk.floors = {home: row["floor"] for home, row in orders.items() if row["floor"]}
        desk.read_before = {home: row["next_offset"] for home, row in orders.items()}

    def _lanes_behind(self, intake: Lane, settle: Lane) -> list[str]:
        """Compare the lanes as they were claimed with what this worker knew of them before."""
        found = []
        for kind, before, now in zip(("intake", "settle"), self._desk.former, (intake, settle), strict=True):
            for partition in before.claims.keys() & now.claims.keys():
                was, there = before.sequences[partition], now.sequences[partition]
                if there < was or now.claims[partition] <= before.claims[partition]:
                    found.append(f"lane {kind} of partition {partition} was at {was} and is at {there}")
        return found

    async def _compare(self, settle: Lane, marks: Mapping[TopicPartition, Any], folded: int) -> Findings:
        """Compare marks and lanes with the topics."""
        found, partitions = Findings(), sorted(settle.claims)
        async with Replay(self._settings, [self._topic(spec) for spec in (*READ, ORDER_EVENTS)]) as replay:
            starts, ends = await replay.beginnings(), await replay.ends()
            for _ in range(ENDS_TRIES):
                if all(row["next_offset"] <= ends[tp] for tp, row in marks.items()):
                    break
                await asyncio.sleep(1)  # a broker that has just become the leader may not know its end yet
                ends = await replay.ends()
            group = await replay.committed(self._settings.app_id)
            found.group = {tp: there.offset for tp, there in group.items()}
            found.done = {tp: row["acknowledged"] for tp, row in marks.items()} | {
                tp: there.offset for tp, there in group.items() if there.metadata == COMMITTED_BY
            }
            replay.begin(starts)
            events = [TopicPartition(self._topic(ORDER_EVENTS), partition) for partition in partitions]
            last = {tp: max(starts[tp], ends[tp] - LAST_EVENTS) for tp in events}
            async for tp, records in replay.between(last, {tp: ends[tp] for tp in events}):
                told, there = max(lane_of(record)[1] for record in records), settle.sequences[tp.partition]
                if told > there:
                    found.set_back.append(f"events of {tp.partition} are of transaction {told}, it has {there}")
            read = {
                tp: row["next_offset"] - 1
                for tp, row in marks.items()
                if row["digest"] != UNKNOWN and starts[tp] < row["next_offset"] <= ends[tp]
            }
            there_now = {}
            bounds = {tp: offset + 1 for tp, offset in read.items()}
            async for tp, records in replay.between(read, bounds):
                there_now[tp] = records[0]
            further = {tp: max(starts[tp], end - LOOK_BACK) for tp, end in bounds.items() if tp not in there_now}
            async for tp, records in replay.between(further, {tp: bounds[tp] for tp in further}):
                there_now[tp] = records[-1]
        for spec in READ:
            for partition in partitions:
                tp = TopicPartition(self._topic(spec), partition)
                row = marks.get(tp)
                is_other = row is not None and (
                    row["next_offset"] > ends[tp] or (tp in there_now and not _is_same(row, there_now[tp]))
                )
                log_has = {"start": starts[tp], "end": ends[tp]}
                self._place(found, spec, tp, mark=row, is_other=is_other, folded=folded, **log_has)
        return found

    def _place(
        self,
        found: Findings,
        spec: TopicSpec,
        tp: TopicPartition,
        *,
        mark: Any | None,
        start: int,
        end: int,
        is_other: bool,
        folded: int,
    ) -> None:
        """Choose where a partition begins."""
        group, done = found.group.get(tp), found.done.get(tp)
        following = mark["next_offset"] if mark is not None else 0
        if mark is not None and (is_other or start > following):
            begin = found.anew[tp] = start
            if is_other:
                found.others.append(tp)
            else:
                found.missed[tp] = (following, start)
        else:
            behind = done is not None and done > following
            if behind and (mark["set_back"] if mark is not None else 0) == folded:
                found.set_back.append(
                    f"{tp.topic}/{tp.partition} is read before {following}, acknowledged before {done}"
                )
            begin = start if done is None else min(done, following)
            if group is not None:
                begin = min(group, begin)
            if mark is not None and spec in SKIPPED:
                begin = max(begin, mark["floor"])
        if spec is ORDERS and mark is not None and (tp in found.anew or start > (done or 0)):
            found.cut.add(tp.partition)
        begin = min(max(begin, start), end)
        if begin != (start if group is None else group):
            found.begins[tp] = begin

    async def _begin(self, found: Findings, marks: Mapping[TopicPartition, Any], folded: int) -> None:
        """Go where reading begins, and note it.

        Raises:
            OwnershipLost: this is elsewhere than the group was, or marks begin anew, so what has been read is dropped.
        """
        consumer = self._stage.app.consumer
        if found.cut:  # before the group moves: whoever comes after a death would not see it any more
            cut = sorted(found.cut)
            await self._ask("have_wait", cut)
            orders = self._topic(ORDERS)
            await self._ask("have_told", cut, [found.done.get(TopicPartition(orders, home), 0) for home in cut])
        if found.begins and not await consumer.begin_at(found.begins):
            raise OwnershipLost
        for tp, (first, end) in found.missed.items():
            metrics.RECORDS_LOST.labels(tp.topic.removeprefix(self._settings.topic_prefix)).inc(end - first)
            log.error("records were removed before anybody read them", topic=tp.topic, partition=tp.partition,
                      first=first, last=end - 1)  # fmt: skip
        for tp, begin in found.begins.items():
            if tp not in found.anew and found.group.get(tp, 0) > max(begin, found.done.get(tp, 0)):
                log.warning("somebody has moved the group over records that are not acknowledged: they are read",
                            topic=tp.topic, partition=tp.partition, moved_to=found.group[tp], first=begin)  # fmt: skip
        for tp in found.others:
            log.error("another log stands where this one was read: it is read from its beginning", topic=tp.topic,
                      partition=tp.partition, read_before=marks[tp]["next_offset"])  # fmt: skip
        if found.anew:
            places = sorted(found.anew.items())
            columns = [tp.partition for tp, _ in places], [tp.topic for tp, _ in places], [at for _, at in places]
            await self._ask("begin_marks", *columns)
        known = [tp for tp in marks if tp not in found.anew]
        columns = [tp.partition for tp in known], [tp.topic for tp in known], [found.done.get(tp, 0) for tp in known]
        await self._ask("note_begun", *columns, folded)
        if found.begins or found.anew:
            begins = {f"{topic}/{partition}": at for (topic, partition), at in found.begins.items()}
            log.info("reading begins elsewhere than the group was", begins=begins)
            raise OwnershipLost

    # The fold

    async def _make_good(self, set_backs: int) -> None:
        """Fold the topics into Postgres, or wait while another worker does."""
        app = self._stage.app
        generation = app.consumer_generation_id
        self._stage.is_folding = True
        try:
            while generation == app.consumer_generation_id:
                if await self._stage.until_available("postgres", self._fold):
                    return
                await asyncio.sleep(0.2)
                (state,) = await self._ask("pipeline_state")
                if state["folded"] >= set_backs:
                    return
        finally:
            self._stage.is_folding = False

    async def _fold(self) -> bool:
        """Fold the topics into Postgres in one transaction; return whether it is done."""
        began = time.monotonic()
        async with self._stage.store.pool.acquire() as connection, connection.transaction():
            state = await connection.fetchrow(statements("stages.sql")["lock_pipeline"])
            if state is None:
                return False  # another worker is at it
            if state["set_backs"] == state["folded"]:
                return True
            lanes = {row["partition"]: row for row in await connection.fetch(statements("stages.sql")["settle_lanes"])}
            marks = await connection.fetch(statements("stages.sql")["marks_of"], sorted(lanes))
            read = {TopicPartition(row["topic"], row["partition"]): row["next_offset"] for row in marks}
            topics = [self._topic(spec) for spec in (*READ, ORDER_EVENTS, DEAD_LETTERS)]
            async with Replay(self._settings, topics) as replay:
                starts = await replay.beginnings()
                replay.begin(starts)
                await self._publish_claims(lanes)
                ends = await replay.ends()
                await connection.execute("SELECT begin_fold()")
                await self._read(connection, replay, starts=starts, ends=ends, lanes=lanes, read=read)
            read_ones = {self._topic(spec) for spec in READ}
            ours = [(tp, end) for tp, end in ends.items() if tp.topic in read_ones]
            done = await connection.fetchrow(
                statements("stages.sql")["fold"],
                [tp.partition for tp, _ in ours],
                [tp.topic for tp, _ in ours],
                [end for _, end in ours],
                [self._topic(spec) for spec in SKIPPED],
                state["system_now"],
                state["timeline_now"],
                timeout=FOLD_TIMEOUT_S,
            )
            if done["unknown_ids"] is not None:
                log.error("products are missing of which orders were told: load these again, and the fold goes on",
                          products=done["unknown_ids"][:20])  # fmt: skip
                raise TimeoutError("the fold waits for products")
        metrics.ORDERS_FOLDED.inc(done["moved"])
        log.warning("the topics are folded into Postgres", orders_moved=done["moved"], taken_up=done["waiting_now"],
                    ended_for_want_of_units=done["ended"], seconds=round(time.monotonic() - began, 2))  # fmt: skip
        if done["gone"]:
            log.error("orders were told of, and neither they nor their records are there any more", orders=done["gone"])
        if done["short_ids"]:
            log.error("more was sold of products than there is: nothing more is, until they are counted",
                      products=done["short_ids"][:20], number=len(done["short_ids"]))  # fmt: skip
        return True

    async def _publish_claims(self, lanes: Mapping[int, Any]) -> None:
        """Publish the present claim at each home, with or without events: later ones of former workers are void."""
        topic = self._topic(ORDER_EVENTS)
        lane_of_home = {home: (LANE, b"%d:%d" % (row["claim"], row["sequence"])) for home, row in lanes.items()}
        await self._stage.producer.send({(topic, home): [(None, None, (lane,))] for home, lane in lane_of_home.items()})

    async def _read(
        self,
        connection: Any,
        replay: Replay,
        *,
        starts: Offsets,
        ends: Offsets,
        lanes: Mapping[int, Any],
        read: Offsets,
    ) -> None:
        """Read what the fold needs into its tables, and apply the stock commands, a partition after the other."""
        told_on = {
            TopicPartition(self._topic(spec), partition): row["at"]
            for partition, row in lanes.items()
            for spec in (ORDER_EVENTS, DEAD_LETTERS)
        }
        first = await replay.since(
            {tp: int((at.timestamp() - SLACK_S) * 1000) for tp, at in told_on.items() if at is not None}
        )
        letters = [tp for tp in told_on if tp.topic == self._topic(DEAD_LETTERS)]
        refused: dict[tuple[int, int], str] = {}
        async for _, records in replay.between(
            {tp: first.get(tp, starts[tp]) for tp in letters}, {tp: ends[tp] for tp in letters}
        ):
            refused |= dict(one for record in records if (one := refusal_of(record, self._topic(STOCK_COMMANDS))))
        for tp in (tp for tp in told_on if tp.topic == self._topic(ORDER_EVENTS)):
            home, told = tp.partition, Told(tp.partition)
            async for _, records in replay.between({tp: first.get(tp, starts[tp])}, {tp: ends[tp]}):
                told.add(records)
            await connection.execute(statements("stages.sql")["note_removed"], sorted(told.removed))
            orders, commands = (TopicPartition(self._topic(spec), home) for spec in (ORDERS, STOCK_COMMANDS))
            came: dict[str, tuple[Any, ...]] = {}
            first_order = {orders: max(starts[orders], read.get(orders, 0))}
            async for _, records in replay.between(first_order, {orders: ends[orders]}):
                for row in self._came(records):
                    if row[0] in told:
                        came.setdefault(row[0], row)
            await connection.copy_records_to_table("fold_told", records=told.rows(), timeout=FOLD_TIMEOUT_S)
            await connection.copy_records_to_table("fold_came", records=came.values(), timeout=FOLD_TIMEOUT_S)
            cancels = TopicPartition(self._topic(ORDER_COMMANDS), home)
            async for _, records in replay.between(
                {cancels: max(starts[cancels], read.get(cancels, 0))}, {cancels: ends[cancels]}
            ):
                ids = [(order_id,) for record in records if (order_id := cancelled(record.value)) is not None]
                await connection.copy_records_to_table("fold_cancelled", records=ids, timeout=FOLD_TIMEOUT_S)
            first_command = {commands: max(starts[commands], read.get(commands, 0))}
            async for _, records in replay.between(first_command, {commands: ends[commands]}):
                for start in range(0, len(records), COMMANDS_MAX):
                    await self._apply(connection, records[start : start + COMMANDS_MAX], refused)

    def _came(self, records: Iterable[Any]) -> Iterable[tuple[Any, ...]]:
        """Yield the rows of ``fold_came``; what is no order, or not at home here, is left out as ``reserve`` does."""
        settings = self._settings
        limits = Limits(settings.order_lines_max, settings.line_quantity_max, settings.order_bytes_max)
        for r in records:
            try:
                order = decode_record(r, limits)
            except InvalidRecord:
                continue
            owners = [product_partition(product_id, settings.partitions) for product_id, _ in order.lines]
            if owners[0] == r.partition:
                yield (
                    order.order_id,
                    r.partition,
                    r.offset,
                    order.user_id,
                    order.payment_method,
                    order.idempotency_key,
                    order.placed_at,
                    [product_id for product_id, _ in order.lines],
                    [quantity for _, quantity in order.lines],
                    None if set(owners) == {r.partition} else owners,
                )

    async def _apply(self, connection: Any, records: Sequence[Any], refused: Mapping[tuple[int, int], str]) -> None:
        """Apply stock commands, which may be lost; they are read again, and what can't be applied is rejected then.

        A ``set`` moves what it moved when it was decided; one of which that was not told is decided when it is read again.
        What was told to be refused stays so: ``refused`` has why, by partition and offset.
        """
        commands = []
        for record in records:
            command = stock_command(record.value, record.partition, self._settings.partitions)
            told = refused.get((record.partition, record.offset))
            if command is not None and (told is not None or not command.is_open):
                offset = None if told is None else record.offset
                commands.append(stages.Commanded(command, record.partition, offset, told))
        if commands:
            lane = Lane()
            for row in await connection.fetch(statements("stages.sql")["settle_lanes"]):
                lane.claims[row["partition"]], lane.sequences[row["partition"]] = row["claim"], row["sequence"]
            step = lane.step([records[0].partition])
            await stages.apply_commands(connection, lane, step, commands, uuid.uuid4())


def refusal_of(letter: Any, topic: str) -> tuple[tuple[int, int], str] | None:
    """Return of a dead letter, where it is of a stock command on this topic, partition and offset, and the outcome."""
    story = dict(reversed(letter.headers))  # the first of each name is ours
    try:
        outcome = OUTCOMES.get(story["reason"].decode())
        if outcome is None or story["source-topic"] != topic.encode():
            return None
        return (int(story["source-partition"]), int(story["source-offset"])), outcome
    except (KeyError, ValueError, AttributeError):
        return None  # no stage wrote this


def _is_same(mark: Any, record: Any) -> bool:
    return bool(record.timestamp == mark["stamp"] and digest_of(record) == mark["digest"])
