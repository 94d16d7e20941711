"""Reads ``reservations`` and ``order-commands``.
Decides, as the order's owner, one thing at a time: reserved, charged, declined, expired, cancelled (paid or not), refunded.
Writes the order's status and its payment in Postgres, and ``open-orders``, the table of what is not over yet.
Emits ``order-events`` (RESERVED of many-product orders, PAID, CANCELLED of what was not paid), ``settlements``, verdicts.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import structlog

from orderstream import metrics
from orderstream.agents.batches import Batch, batches
from orderstream.agents.intake import inner_rows, take_in
from orderstream.agents.lifecycle import OpenOrder
from orderstream.agents.provider import Charge, Provider, Verdict
from orderstream.agents.stage import Stage, agent_body, reply_messages
from orderstream.agents.till import Till
from orderstream.errors import OwnershipLost
from orderstream.failpoints import failpoint
from orderstream.sql.store import Decision, Standing
from orderstream.streams import events
from orderstream.streams.commands import OrderCommand, decode_order_command
from orderstream.streams.orders import Reason, Status
from orderstream.streams.partitions import order_partition
from orderstream.streams.reservations import LineReserved
from orderstream.streams.settlements import Action, Settlement
from orderstream.streams.topics import ORDER_COMMANDS, RESERVATIONS
from orderstream.tables.batched import BatchedTable

log = structlog.get_logger("pay")

INTERVAL_PART = 0.25
"""Of the setting ``batch_interval_s``: reserve sets the rhythm; its batch comes in a few parts, one soon after the other."""

OLD_RECORD_S = 5.0
"""A verdict that waited longer than this: its order may have gone another way, so Postgres is asked before the charge."""

UNSEEN_MAX_S = 3_600.0
"""How long a cancelled order waits for verdicts that Postgres told already, before it is forgotten."""

TIDY_INTERVAL_S = 60.0

LOOK_UP_MAX = 5_000
"""Orders asked about in one statement."""

_PAID_FOR = {Status.PAID, Status.CONFIRMED}
_DECIDED = {*_PAID_FOR, Status.CANCELLED}

Row = tuple[LineReserved, int, int, bool]
"""A line's verdict, partition and offset of its record, and whether the record is old."""


class Pay:
    """The stage of one worker: its open orders, its till."""

    def __init__(self, stage: Stage, table: BatchedTable, provider: Provider) -> None:
        self.stage = stage
        self.table = table
        self.wake = asyncio.Event()
        settings = stage.settings
        self.till = Till(provider, settings.payment_in_flight_max, settings.retry_wait_max_s, self.wake)
        self.turns = asyncio.Lock()
        self._recovered = False
        self._tidied = time.monotonic()

    def full(self) -> bool:
        """Whether as many charges are under way as may be; further reservations wait on their topic."""
        return len(self.till) >= self.stage.settings.payment_in_flight_max

    async def on_recovered(self) -> None:
        """Note that a rebalance is over and the table is restored; the next batch continues where others stopped."""
        self._recovered = True
        self.wake.set()

    async def decide(self, batch: Batch) -> None:
        """Decide one batch, from the records to the hand-over; the batches of both agents take turns."""
        async with self.turns:
            try:
                batch.check_owned()
                turn = Turn(self, batch)
                if self._recovered:
                    self._recovered = False
                    await turn.adopt_table()
                if time.monotonic() - self._tidied > TIDY_INTERVAL_S:
                    self._tidied = time.monotonic()
                    turn.tidy()
                rows, commands = turn.sort()
                turn.outbox.steps.done("decode")
                await turn.look_up(rows, commands)
                turn.outbox.steps.done("look_up")
                turn.note_rows(rows)
                turn.note_commands(commands)
                turn.note_answers()
                turn.outbox.steps.done("decide")
                await turn.settle()
            except OwnershipLost:
                self.table.forget()
                self._recovered = True  # what this turn had taken in from the provider is asked for again
                batch.drop()

    def describe(self) -> dict[str, int]:
        """Return how many orders are open, and in which status, for the pages."""
        open_orders: dict[str, int] = {}
        for _, _, value in self.table.entries():
            open_orders[value["status"]] = open_orders.get(value["status"], 0) + 1
        return open_orders


class Turn:
    """One batch of the stage: what it learns, what it decides, what follows."""

    def __init__(self, pay: Pay, batch: Batch) -> None:
        self.pay = pay
        self.batch = batch
        self.settings = pay.stage.settings
        self.outbox = pay.stage.outbox("pay", batch)
        self.orders: dict[str, OpenOrder] = {}
        self.rows_in_postgres: dict[str, Any] = {}
        self.decisions: list[tuple[Decision, OpenOrder]] = []
        self.refunded: list[str] = []
        self.resume: list[OpenOrder] = []
        self.repeated: set[str] = set()
        self.revoked: set[str] = set()
        self.revoking = False
        self.replies: list[tuple[str, str, str | None]] = []
        self.paid = 0
        self.old = time.time() - OLD_RECORD_S

    # What comes in

    async def adopt_table(self) -> None:
        """Go on with the orders of the table whose outcome is not known: their former owner may have asked for them.

        A former owner that was frozen may have left an entry behind, after the next one had decided the order and removed
        it: what Postgres knows to be over is not taken on.
        """
        entries = {order_id: OpenOrder.from_stored(order_id, value) for order_id, _, value in self.pay.table.entries()}
        self.pay.till.keep(entries)
        doubtful = []
        for order_id, order in entries.items():
            if order.charge_asked or order.refund is not None:
                if order_id not in self.pay.till:
                    self.orders[order_id] = order
                    self.resume.append(order)
            elif not order.unseen:
                doubtful.append(order_id)
        for start in range(0, len(doubtful), LOOK_UP_MAX):
            rows = await self._states(doubtful[start : start + LOOK_UP_MAX])
            for order_id, row in rows.items():
                if row["status"] in _DECIDED and "pending" not in row["states"]:
                    self.orders[order_id] = OpenOrder.from_row(row, entries[order_id].partition)
                    self.repeat(row)

    def tidy(self) -> None:
        """Forget orders that wait for verdicts that will not come: their records were read before the table got lost."""
        for order_id, _, value in self.pay.table.entries():
            if value["unseen"] and value["since"] < time.time() - UNSEEN_MAX_S:
                order = self.orders[order_id] = OpenOrder.from_stored(order_id, value)
                order.unseen.clear()

    def sort(self) -> tuple[list[Row], list[tuple[OrderCommand, int]]]:
        """Sort the records: verdicts with their partition, their offset and whether they are old; commands and offsets."""
        rows = []
        records = self.batch.records(self.settings.topic(RESERVATIONS.name))
        for record, lines in take_in(records, lambda record: inner_rows(record, LineReserved), self.outbox):
            old = record.timestamp / 1000 < self.old
            place = (record.partition, record.offset, old)
            rows += [(line, *place) for line in lines]
        commands = []
        records = self.batch.records(self.settings.topic(ORDER_COMMANDS.name))
        for record, command in take_in(records, lambda record: decode_order_command(record.value), self.outbox):
            if order_partition(str(command.order_id), self.settings.partitions) == record.partition:
                commands.append((command, record.offset))
            else:
                self.outbox.order_command(str(command.order_id), record.value)
                metrics.SENT_ON.inc()
        return rows, commands

    async def look_up(self, rows: list[Row], commands: list[tuple[OrderCommand, int]]) -> None:
        """Ask Postgres about orders that the table does not hold and that may have gone their way already."""
        wanted = {
            line.order_id
            for line, _, _, old in rows
            if (line.again or old or line.line_count > 1) and self.look(line.order_id) is None
        }
        wanted.update(str(c.order_id) for c, _ in commands if self.look(str(c.order_id)) is None)
        if wanted:
            self.rows_in_postgres = await self._states(sorted(wanted))

    async def _states(self, order_ids: list[str]) -> Any:
        """Return where orders stand in Postgres, by id; see the query ``order_states``."""
        stage = self.pay.stage
        return await stage.until_available("postgres", lambda: stage.store.order_states(order_ids), self.batch)

    def look(self, order_id: str) -> OpenOrder | None:
        """Return an order that is open, as this batch sees it."""
        order = self.orders.get(order_id)
        if order is None:
            value = self.pay.table.read(order_id)
            if value is not None:
                order = self.orders[order_id] = OpenOrder.from_stored(order_id, value)
        return order

    # What follows

    def note_rows(self, rows: list[Row]) -> None:
        """Take the lines' verdicts in."""
        for line, partition, offset, _ in rows:
            order = self.look(line.order_id)
            if order is None:
                row = self.rows_in_postgres.get(line.order_id)
                if row is not None and row["status"] in _DECIDED:
                    self.repeat(row)
                    continue
                # Not decided yet, whatever Postgres knows: each line's verdict comes here as a record.
                order = OpenOrder.from_verdict(line, partition)
                self.orders[line.order_id] = order
            elif order.status == Status.CREATED:
                order.note(line)
            elif order.status == Status.CANCELLED:
                order.note(line)
                if line.reason is None:
                    self.release_line(line.order_id, line.product_id, line.quantity)
                continue
            order.source = offset
            if order.status == Status.CREATED and order.decided:
                self.complete(order)

    def complete(self, order: OpenOrder) -> None:
        """Every line has its verdict: charge, or give back what is held."""
        refusal = order.refusal
        if refusal is not None:
            self.cancel(order, refusal, order.source)
            return
        order.status = Status.RESERVED
        if order.line_count > 1:
            step = Decision(order.order_id, "reserve", None, order.total_cents, None, order.source)
            self.decisions.append((step, order))
        self.ask(order)

    def ask(self, order: OpenOrder) -> None:
        """Ask for an order's charge."""
        order.charge_asked = True
        failpoint("pay.before_charge")
        charge = Charge(order.order_id, order.user_id, order.payment_method, order.total_cents)
        verdict = self.pay.till.charge(charge)
        if verdict is not None:
            self.charged(order, verdict)

    def charged(self, order: OpenOrder, verdict: Verdict) -> None:
        """Take the provider's verdict in."""
        failpoint("pay.after_charge")
        order.charge_asked = False
        step = "declined" if verdict.charge_id is None else "charged"
        if step == "declined" and order.status == Status.CANCELLED:
            return  # it ended without a charge: nothing to give back
        decision = Decision(order.order_id, step, None, order.total_cents, verdict.charge_id, order.source)
        self.decisions.append((decision, order))

    def cancel(self, order: OpenOrder, reason: str, source_offset: int | None) -> None:
        """End an order that is not paid; its customer's word ends it even if it gets paid at this very moment."""
        order.status = Status.CANCELLED
        step = "revoke" if reason == Reason.CANCELLED_BY_USER else "cancel"
        decision = Decision(order.order_id, step, reason, None, order.refund, source_offset)
        self.decisions.append((decision, order))

    def note_commands(self, commands: list[tuple[OrderCommand, int]]) -> None:
        """Cancel or expire orders, those that can be."""
        charged = (
            {decision.order_id for decision, _ in self.decisions if decision.step == "charged"} if commands else ()
        )
        for command, offset in commands:
            order_id = str(command.order_id)
            expires = command.command == "expire"
            reason = Reason.EXPIRED if expires else Reason.CANCELLED_BY_USER
            order = self.look(order_id)
            if order is None:
                row = self.rows_in_postgres.get(order_id)
                if row is None:
                    log.warning(
                        "a command for an order that does not exist", order_id=order_id, command=command.command
                    )
                    continue
                paid = row["status"] in _PAID_FOR
                if row["status"] == Status.CANCELLED or (paid and expires):
                    self.repeat(row)
                    continue
                order = OpenOrder.from_row(row, order_partition(order_id, self.settings.partitions))
                if paid:
                    order.refund = row["charge_id"]
                else:
                    # Its verdicts are still on their way to us: remember it until they are here, so that it is not charged.
                    order.unseen = list(order.lines)
                self.orders[order_id] = order
            elif order.status == Status.CANCELLED or (expires and order_id in charged):
                continue
            self.cancel(order, reason, offset)

    def note_answers(self) -> None:
        """Take in what the provider has answered since the last batch, and ask about adopted orders."""
        answers, self.pay.till.answers = self.pay.till.answers, deque()
        for order_id, verdict in answers:
            order = self.look(order_id)
            if verdict is None:
                self.refunded.append(order_id)
                if order is not None:
                    order.refund = None
            elif order is not None and order.charge_asked:
                self.charged(order, verdict)
        for order in self.resume:
            if order.refund is not None:
                self.pay.till.refund(order.order_id, order.refund, order.total_cents)
            elif order.charge_asked:
                self.ask(order)

    def repeat(self, row: Any) -> None:
        """Say and hand on once more what was decided: an owner may have ended between its commit and its records."""
        order_id = row["order_id"]
        order = OpenOrder.from_row(row, order_partition(order_id, self.settings.partitions))
        if order_id not in self.repeated:
            self.repeated.add(order_id)
            if row["reserved_at"] is not None:
                self.outbox.event(order_id, events.reserved(order_id, row["reserved_at"], row["total_cents"]))
            if row["paid_at"] is not None:
                self.outbox.event(
                    order_id, events.paid(order_id, row["paid_at"], row["amount_cents"], row["charge_id"])
                )
            if row["cancelled_at"] is not None and row["paid_at"] is not None:
                self.give_back(order)
                if row["payment"] == "REFUND_DUE":
                    order.refund = row["charge_id"]
                    self.orders[order_id] = order  # in the table until it is given back
                    self.pay.till.refund(order_id, row["charge_id"], row["amount_cents"])
                return
            if row["cancelled_at"] is not None:
                self.outbox.event(order_id, events.cancelled(order_id, row["cancelled_at"], row["reason"]))
            if order.status == Status.CANCELLED:
                self.release(order)
            else:
                self.commit(order)

    def release_line(self, order_id: str, product_id: str, quantity: int) -> None:
        """Have one line given back."""
        self.outbox.settlement(Settlement(order_id, product_id, quantity, Action.RELEASE), product_id)

    def release(self, order: OpenOrder) -> None:
        """Have every held line given back."""
        for product_id, quantity in order.held():
            self.release_line(order.order_id, product_id, quantity)

    def commit(self, order: OpenOrder) -> None:
        """Have every held line sold."""
        for product_id, quantity in order.held():
            self.outbox.settlement(Settlement(order.order_id, product_id, quantity, Action.COMMIT), product_id)

    def give_back(self, order: OpenOrder) -> None:
        """Have every line of a paid order taken back.

        The owner of the last one tells that it is cancelled: a commit of before, and that it was confirmed, may still be
        under way there.
        """
        for product_id, quantity in order.held():
            self.outbox.settlement(Settlement(order.order_id, product_id, quantity, Action.RETURN), product_id)

    async def settle(self) -> None:
        """Write what was decided, tell it, hand it on, keep in the table what is not over."""
        stage, table = self.pay.stage, self.pay.table
        self.revoking = any(decision.step == "revoke" for decision, _ in self.decisions)
        self.failpoint("pay.before_sql")
        if self.decisions:
            asked = [decision for decision, _ in self.decisions]
            standings = await stage.until_available("postgres", lambda: stage.store.decide(asked), self.batch)
            for (decision, order), standing in zip(self.decisions, standings, strict=True):
                self.follow(decision, order, standing)
            metrics.ORDERS_PAID.inc(self.paid)
            metrics.PAYMENT_SUCCESS.inc(self.paid)
        if self.refunded:
            refunded = self.refunded
            done = await stage.until_available("postgres", lambda: stage.store.refunded(refunded), self.batch)
            metrics.PAYMENT_REFUNDS.inc(len(done))
        self.failpoint("pay.after_sql")
        self.outbox.steps.done("sql")
        if self.outbox.trace is not None:
            self.outbox.trace.paid(self.orders, self.decisions)
        if self.replies:
            await stage.update_gate({}, replies=reply_messages(stage, self.replies))
            self.outbox.steps.done("update_gate")
        await stage.emit(self.outbox, "pay", self.batch)
        if self.revoking:
            failpoint("revoke.after_produce")
        for order in self.orders.values():
            if self.is_over(order):
                table.drop(order.order_id, order.partition)
            else:
                table.put(order.order_id, order.stored(), order.partition)
        changelog = table.pending()
        if changelog:
            self.batch.check_owned()
            await stage.until_available("kafka", lambda: stage.producer.send(changelog), self.batch)
            table.settle()
            self.failpoint("pay.after_table")
            self.outbox.steps.done("table")

    def failpoint(self, point: str) -> None:
        """Pass a failpoint of the stage, and the one of a batch that revokes orders."""
        if self.revoking:
            failpoint(point.replace("pay.", "revoke."))
        failpoint(point)

    def is_over(self, order: OpenOrder) -> bool:
        """Whether nothing about this order is still to come to its owner."""
        if order.charge_asked or order.refund is not None or order.unseen:
            return False
        return order.status in _PAID_FOR or (order.status == Status.CANCELLED and order.decided)

    def follow(self, decision: Decision, order: OpenOrder, standing: Standing) -> None:
        """Tell and hand on what follows from a decision, as Postgres took it.

        What was decided before, by this owner or by another one, follows once more: the first time may have got lost.
        """
        order_id = decision.order_id
        if standing.status is None:
            log.error("an order that is not in Postgres", order_id=order_id, step=decision.step)
            order.status, order.unseen, order.line_count = Status.CANCELLED, [], len(order.lines)
            return
        if decision.step == "reserve" and standing.reserved_at is not None:
            self.outbox.event(order_id, events.reserved(order_id, standing.reserved_at, order.total_cents))
            self.reply(order, None)
            metrics.ORDERS_RESERVED.inc(standing.changed)
            if standing.changed or standing.status != Status.CANCELLED:
                return
        if decision.charge_id is not None:
            order.refund = decision.charge_id if standing.payment == "REFUND_DUE" else None
            if order.refund is not None:
                self.pay.till.refund(order_id, order.refund, order.total_cents)
        if standing.revoked:
            self.follow_revoked(decision, order, standing)
            return
        if decision.step == "charged" and standing.payment == "REFUND_DUE" and order.status == Status.CANCELLED:
            return  # told when it was cancelled
        if standing.status in _PAID_FOR:
            order.status = standing.status
            if decision.step == "charged":
                charge_id = str(decision.charge_id)
                total = decision.amount_cents or 0
                self.outbox.event(order_id, events.paid(order_id, standing.moved_at, total, charge_id))
                self.paid += standing.changed
            self.commit(order)
        elif standing.status == Status.CANCELLED:
            order.status = Status.CANCELLED
            self.outbox.event(order_id, events.cancelled(order_id, standing.moved_at, str(standing.reason)))
            self.release(order)
            self.reply(order, standing.reason)
            if standing.changed:
                metrics.ORDERS_CANCELLED.labels(standing.reason).inc()
                metrics.PAYMENT_FAILED.inc(decision.step == "declined")

    def follow_revoked(self, decision: Decision, order: OpenOrder, standing: Standing) -> None:
        """Tell and hand on what follows where an order was cancelled after it was paid; once a batch for each."""
        order.status = Status.CANCELLED
        if decision.step == "charged":
            charge_id = str(decision.charge_id)
            self.outbox.event(
                order.order_id, events.paid(order.order_id, standing.moved_at, order.total_cents, charge_id)
            )
            self.paid += standing.changed
        elif standing.changed:
            metrics.ORDERS_CANCELLED.labels(standing.reason).inc()
            metrics.ORDERS_REVOKED.inc()
        if order.order_id not in self.revoked:
            self.revoked.add(order.order_id)
            self.give_back(order)
            self.reply(order, standing.reason)

    def reply(self, order: OpenOrder, reason: str | None) -> None:
        """Answer whoever waits for the order's verdict, once."""
        if order.reply_to is not None:
            self.replies.append((order.reply_to, order.order_id, reason))
            order.reply_to = None


def register(stage: Stage, table: BatchedTable, provider: Provider) -> Pay:
    """Add the two agents to the app: one for verdicts, one for commands, so that no wait for charges holds a command."""
    settings, app = stage.settings, stage.app
    pay = Pay(stage, table, provider)
    table.on_recover(pay.on_recovered)

    def topic(name: str) -> Any:
        return app.topic(
            settings.topic(name), key_serializer="raw", value_serializer="raw", key_type=bytes, value_type=bytes
        )

    @agent_body
    async def pay_agent(stream: Any) -> None:
        async for batch in batches(
            app,
            stream,
            "pay",
            records_max=settings.batch_records_max,
            interval_s=INTERVAL_PART * settings.batch_interval_s,
            wake=pay.wake,
            full=pay.full,
        ):
            with metrics.batch("pay", len(batch)):
                await pay.decide(batch)

    @agent_body
    async def order_commands_agent(stream: Any) -> None:
        async for batch in batches(
            app, stream, "order-commands", records_max=settings.batch_records_max, interval_s=settings.batch_interval_s
        ):
            with metrics.batch("order-commands", len(batch)):
                await pay.decide(batch)

    app.agent(topic(RESERVATIONS.name), name="pay", concurrency=1)(pay_agent)
    app.agent(topic(ORDER_COMMANDS.name), name="order-commands", concurrency=1)(order_commands_agent)
    return pay
