"""Reads the orders that ``reserve`` hands over, ``order-commands`` and ``reservations``.
Decides whom the provider is asked to charge, to void or to refund, and when.
Writes nothing.
Emits charges, voids and refunds; hands what came in about an order to ``commit``, in memory.
"""

from __future__ import annotations

from typing import Any

from orderstream import metrics
from orderstream.agents.batches import Batch
from orderstream.agents.desk import About, Desk, Slip
from orderstream.agents.holding import Held, answer
from orderstream.agents.intake import inner_rows, take_in
from orderstream.agents.lifecycle import (
    Cancel,
    Charged,
    Declined,
    Event,
    GivenBack,
    asks,
)
from orderstream.agents.provider import Charge, Verdict
from orderstream.agents.till import Till
from orderstream.errors import InvalidRecord
from orderstream.failpoints import failpoint
from orderstream.streams.commands import decode_order_command
from orderstream.streams.lines import LineStands
from orderstream.streams.producer import Outbox
from orderstream.streams.topics import ORDER_COMMANDS, RESERVATIONS

FREE = "free"
"""Stands for the id of a charge of nothing: an order whose total is 0 is not charged."""


def ask(desk: Desk, till: Till) -> None:
    """Ask the provider what is to be asked about the orders handed over; what it answers at once goes on at once."""
    charges = 0
    while desk.to_pay and not till.is_full:
        entry = desk.to_pay.popleft()
        entry.is_to_pay, order = False, entry.order
        if entry.later is not None or desk.entries.get(order.order_id) is not entry:
            continue  # a transaction about it is under way, and brings it back; or it was let go of, and is taken up again
        match asks(order):
            case "charge" if not order.total_cents:
                desk.put(About(order.order_id, Charged(FREE)))
            case "charge":
                failpoint("pay.before_charge")
                charges += order.order_id not in till
                if desk.stage.traces is not None:
                    desk.stage.traces.asked(order)
                verdict = till.charge(
                    Charge(order.order_id, order.user_id, order.payment_method, order.total_cents or 0)
                )
                if verdict is not None:
                    desk.put(About(order.order_id, _answer(desk, order.order_id, verdict)))
            case "refund":
                till.refund(order.order_id, order.charge_id or "", order.total_cents or 0)
            case "void":
                till.void(order.order_id)
            case None:
                pass
    if charges:
        metrics.PAYMENT_ATTEMPTS.inc(charges)


def hear(desk: Desk, till: Till) -> None:
    """Hand on what the provider has answered."""
    if till.answers:
        failpoint("pay.after_charge")
    while till.answers:
        answer = till.answers.popleft()
        event = GivenBack() if answer.verdict is None else _answer(desk, answer.order_id, answer.verdict)
        desk.put(About(answer.order_id, event))


def _answer(desk: Desk, order_id: str, verdict: Verdict) -> Event:
    if desk.stage.traces is not None:
        desk.stage.traces.answered(order_id, verdict.charge_id)
    return Declined() if verdict.charge_id is None else Charged(verdict.charge_id)


def sort(desk: Desk, batch: Batch, slip: Slip, outbox: Outbox) -> None:
    """Hand on the commands and the owners' answers of a batch; they are acknowledged with what becomes of them."""
    topic = desk.stage.settings.topic
    for record, command in take_in(
        batch.records(topic(ORDER_COMMANDS.name)), lambda r: decode_order_command(r.value), outbox
    ):
        slip.left += 1
        desk.put(About(str(command.order_id), Cancel(), slip, (record.partition, record.offset)))
    for _, rows in take_in(batch.records(topic(RESERVATIONS.name)), _stands_of, outbox):
        for row in rows:
            slip.left += 1
            held = Held(row.state, row.price_cents, row.reason)
            desk.put(About(row.order_id, answer(row.product_id, held), slip))


def _stands_of(record: Any) -> list[LineStands]:
    """Return the rows of a record on ``reservations``.

    Raises:
        InvalidRecord: no stage wrote this.
    """
    rows = inner_rows(record, LineStands)
    if (wrong := next((row for row in rows if not row.is_sound()), None)) is not None:
        raise InvalidRecord("invalid_rows", f"no stage wrote this: {wrong!r:.200}")
    return rows
