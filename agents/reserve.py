"""Reads ``orders`` and ``order-lines``.
Decides, for each line whose product it owns, in the order of arrival: held, or refused and why.
Writes Redis takes, then orders, lines, counts and ledger in Postgres, in one commit.
Emits ``order-events`` (CREATED; RESERVED or CANCELLED of one-product orders), ``reservations``, ``order-lines``, verdicts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson
import structlog

from orderstream import metrics
from orderstream.agents.batches import Batch, batches
from orderstream.agents.intake import Arrival, Intake, inner_rows, reject, send_on, take_in
from orderstream.agents.stage import Stage, StageOutbox, agent_body, reply_messages
from orderstream.errors import InvalidRecord, OwnershipLost
from orderstream.failpoints import failpoint
from orderstream.lua.gate import REFUSALS, GateVerdict
from orderstream.metrics import LINES_HELD, LINES_REFUSED, ORDERS_CANCELLED, ORDERS_CREATED, ORDERS_RESERVED
from orderstream.sql.store import LineToDecide, LineVerdict, Reserved
from orderstream.streams import events
from orderstream.streams.dead_letters import DeadLetter
from orderstream.streams.headers import reply_channel
from orderstream.streams.orders import Limits, Order, decode, same
from orderstream.streams.partitions import product_partition
from orderstream.streams.places import Place
from orderstream.streams.producer import Outbox
from orderstream.streams.reservations import LineReserved, LineToReserve
from orderstream.streams.topics import ORDER_LINES, ORDERS

log = structlog.get_logger("reserve")


def sort(batch: Batch, stage: Stage, outbox: Outbox) -> Intake:
    """Sort a batch: what can't be processed is a dead letter, what belongs to another owner is sent on to it.

    An order that is in the batch more than once is taken once, and a repeat that is another order is a dead letter.
    """
    settings = stage.settings
    limits = Limits(settings.order_lines_max, settings.line_quantity_max, settings.order_bytes_max)
    partitions = settings.partitions
    arrivals: dict[str, Arrival] = {}

    def arrive(record: Any) -> Arrival:
        order = decode(record.value, limits, topic=record.topic, partition=record.partition, offset=record.offset)
        return Arrival(order, record, reply_channel(record))

    for record, arrival in take_in(batch.records(settings.topic(ORDERS.name)), arrive, outbox):
        order = arrival.order
        if product_partition(order.lines[0][0], partitions) != record.partition:
            send_on(order, record, outbox)
            continue
        before = arrivals.setdefault(order.order_id, arrival)
        if before is not arrival and not same(before.order, order):
            reject(reused(order), record, outbox)
    lines: dict[tuple[str, str], LineToReserve] = {}
    records = batch.records(settings.topic(ORDER_LINES.name))
    for _, rows in take_in(records, lambda record: inner_rows(record, LineToReserve), outbox):
        for line in rows:
            lines.setdefault((line.order_id, line.product_id), line)
    return Intake(list(arrivals.values()), list(lines.values()))


def reused(order: Order) -> InvalidRecord:
    """Return the fault of a record that brings another order under a known id."""
    return InvalidRecord("order_id_reused", f"{order.order_id} is the id of another order already")


def to_decide(intake: Intake, partitions: int) -> list[LineToDecide]:
    """List the lines of a batch in the order of arrival: of its own orders, then those handed over to it.

    A line of another owner's product is only noted with its order, and handed over.
    """
    decide = []
    for n, (order, record, _) in enumerate(intake.arrivals, 1):
        for product_id, quantity in order.lines:
            ours = product_partition(product_id, partitions) == record.partition
            gate = GateVerdict.TAKEN if ours else GateVerdict.NOT_OURS
            decide.append(LineToDecide(n, order.order_id, product_id, quantity, gate))
    taken = GateVerdict.TAKEN
    decide.extend(LineToDecide(0, line.order_id, line.product_id, line.quantity, taken) for line in intake.lines)
    return decide


def reserved_line(
    line: LineToDecide | LineToReserve,
    verdict: LineVerdict,
    *,
    line_count: int,
    user_id: str,
    payment_method: str,
    reply_to: str | None,
    again: bool,
) -> LineReserved:
    """Return the row that takes a verdict to the owner of its order.

    Made by position, here alone: by keyword a tuple costs twice as much, and each line makes one.
    """
    return LineReserved(
        line.order_id,
        line.product_id,
        line.quantity,
        verdict.unit_price_cents or 0,
        verdict.reason,
        line_count,
        user_id,
        payment_method,
        reply_to,
        again,
    )


def line_to_reserve(order: Order, line: LineToDecide, reply_to: str | None) -> LineToReserve:
    """Return the row that hands a line over to the owner of its product; made by position as :func:`reserved_line` is."""
    return LineToReserve(
        order.order_id,
        line.product_id,
        line.quantity,
        len(order.lines),
        order.user_id,
        order.payment_method,
        reply_to,
    )


def announce(  # the order of a batch's answers is that of its questions
    intake: Intake, lines: Sequence[LineToDecide], reserved: Reserved, outbox: Outbox
) -> list[tuple[str, str, str | None]]:
    """Put into the outbox what follows from a batch's verdicts.

    Returns:
        ``(reply channel, order id, reason)`` of every one-product order that a client waits for.
    """
    replies = []
    at_line = 0
    for n, (order, record, reply_to) in enumerate(intake.arrivals):
        first, at_line = at_line, at_line + len(order.lines)
        if reserved.order_reused[n]:
            reject(reused(order), record, outbox)
            continue
        at, known = reserved.order_created_at[n], reserved.order_known[n]
        outbox.event(order.order_id, events.created(order.order_id, at, order.user_id, order.lines))
        alone = len(order.lines) == 1
        for k in range(first, at_line):
            line, verdict = lines[k], reserved.lines[k]
            if verdict.reason == "pending":
                outbox.order_line(line_to_reserve(order, line, reply_to), line.product_id)
                continue
            if alone and verdict.reason is None:
                total = line.quantity * (verdict.unit_price_cents or 0)
                outbox.event(order.order_id, events.reserved(order.order_id, at, total))
            elif alone:
                outbox.event(order.order_id, events.cancelled(order.order_id, at, str(verdict.reason)))
            if alone and reply_to is not None:
                replies.append((reply_to, order.order_id, verdict.reason))
            if not alone or verdict.reason is None:
                outbox.reservation(
                    reserved_line(
                        line,
                        verdict,
                        line_count=len(order.lines),
                        user_id=order.user_id,
                        payment_method=order.payment_method,
                        reply_to=None if alone else reply_to,
                        again=known,
                    ),
                    order.order_id,
                )
    for line_to, verdict in zip(intake.lines, reserved.lines[at_line:], strict=True):
        if verdict.reason == "pending":  # no order has this line: no stage can have written it
            log.error("a line without an order", order_id=line_to.order_id, product_id=line_to.product_id)
            metrics.DEAD_LETTERS.labels("invalid_rows").inc()
            story = [("reason", b"invalid_rows"), ("detail", b"no order has this line")]
            outbox.dead_letter(DeadLetter(None, orjson.dumps([*line_to]), story))
            continue
        outbox.reservation(
            reserved_line(
                line_to,
                verdict,
                line_count=line_to.line_count,
                user_id=line_to.user_id,
                payment_method=line_to.payment_method,
                reply_to=line_to.reply_to,
                again=verdict.known,
            ),
            line_to.order_id,
        )
    return replies


class Decided(NamedTuple):
    """A batch that Postgres has decided; what follows from it is still to be published."""

    began: float
    outbox: StageOutbox
    intake: Intake
    lines: Sequence[LineToDecide] = ()
    takes: Mapping[str, list[str]] = {}
    reserved: Reserved | None = None


async def reserve(stage: Stage, batch: Batch) -> Decided:
    """Decide one batch, from the records to the commit in Postgres."""
    began = time.perf_counter()
    outbox = stage.outbox("reserve", batch)
    intake = sort(batch, stage, outbox)
    outbox.steps.done("decode")
    if not (intake.arrivals or intake.lines):
        return Decided(began, outbox, intake)
    decide = to_decide(intake, stage.settings.partitions)
    ours = [n for n, line in enumerate(decide) if line.gate != GateVerdict.NOT_OURS]

    def user_of(n: int) -> str:
        order_n = decide[ours[n]].order_n
        if order_n:
            return intake.arrivals[order_n - 1].order.user_id
        return intake.lines[ours[n] - len(decide) + len(intake.lines)].user_id

    with metrics.RESERVE_LATENCY.time():
        failpoint("reserve.before_lua")
        asked = [(decide[n].product_id, decide[n].order_id, decide[n].quantity) for n in ours]
        # Products that Redis does not hold are loaded from Postgres on the way.
        verdicts, gate_unavailable = await stage.until_available(
            "postgres", lambda: stage.gate.take(asked, user_of), batch
        )
        failpoint("reserve.after_lua")
        outbox.steps.done("gate")
        takes: dict[str, list[str]] = {}
        for n, gate in zip(ours, verdicts, strict=True):
            line = decide[n]
            if gate != GateVerdict.TAKEN:
                decide[n] = line._replace(gate=gate)
            if gate not in REFUSALS:  # undecided: Redis may have taken it before its answer got lost
                takes.setdefault(line.product_id, []).append(line.order_id)
        orders = [(a.order, Place(a.record.topic, a.record.partition, a.record.offset)) for a in intake.arrivals]
        reserved = await stage.until_available(
            "postgres", lambda: stage.store.reserve(orders, decide, gate_unavailable=gate_unavailable), batch
        )
    failpoint("reserve.after_sql")
    outbox.steps.done("sql")
    return Decided(began, outbox, intake, decide, takes, reserved)


async def follow(stage: Stage, batch: Batch, decided: Decided) -> None:
    """Tell Redis, the outside and the next owners what follows from a batch's verdicts."""
    began, outbox, intake, lines, takes, reserved = decided
    if reserved is not None:
        if outbox.trace is not None:
            outbox.trace.reserved(intake, lines, reserved)
        waiting = announce(intake, lines, reserved, outbox)
        await stage.update_gate(reserved.counts, takes, reply_messages(stage, waiting), batch, reserved.users)
        failpoint("reserve.after_gate")
        outbox.steps.done("update_gate")
        count_reserved(intake.arrivals, lines, reserved)
        stage.sample.offer(intake.arrivals, reserved.order_known)
    await stage.emit(outbox, "reserve", batch)
    metrics.batch_done("reserve", len(batch), began)


def register(stage: Stage) -> Any:
    """Add the agent to the app."""
    settings, app = stage.settings, stage.app
    topic = app.topic(
        settings.topic(ORDERS.name),
        settings.topic(ORDER_LINES.name),
        key_serializer="raw",
        value_serializer="raw",
        key_type=bytes,
        value_type=bytes,
    )

    @agent_body
    async def reserve_agent(stream: Any) -> None:
        async for batch in batches(
            app, stream, "reserve", records_max=settings.batch_records_max, interval_s=settings.batch_interval_s
        ):
            try:
                decided = await reserve(stage, batch)
            except OwnershipLost:
                batch.drop()
            else:
                # Redis and Kafka hear of it while the next batch is being decided.
                batch.finish_with(follow(stage, batch, decided))

    return app.agent(topic, name="reserve", concurrency=1)(reserve_agent)


def count_reserved(arrivals: Sequence[Any], lines: Sequence[LineToDecide], reserved: Reserved) -> None:
    """Count what a reserve batch decided for the first time."""
    fresh = sum(1 for known in reserved.order_known if not known)
    ORDERS_CREATED.inc(fresh)
    held = lines_held = 0
    refused: dict[str, int] = {}
    cancelled: dict[str, int] = {}
    for line, verdict in zip(lines, reserved.lines, strict=True):
        if verdict.known or verdict.reason == "pending":
            continue
        alone = line.order_n > 0 and len(arrivals[line.order_n - 1].order.lines) == 1
        if verdict.reason is None:
            held += alone
            lines_held += 1
        else:
            refused[verdict.reason] = refused.get(verdict.reason, 0) + 1
            if alone:
                cancelled[verdict.reason] = cancelled.get(verdict.reason, 0) + 1
    ORDERS_RESERVED.inc(held)
    LINES_HELD.inc(lines_held)
    for reason, lines_n in refused.items():
        LINES_REFUSED.labels(reason).inc(lines_n)
    for reason, orders_n in cancelled.items():
        ORDERS_CANCELLED.labels(reason).inc(orders_n)
