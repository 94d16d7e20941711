"""Reads the orders that ``reserve`` hands over, ``order-commands`` and ``reservations``.
Decides whom the provider is asked to charge, to void or to refund, and when.
Writes nothing.
Emits charges, voids and refunds; hands what came in about an order to ``commit``, in memory.
"""

from __future__ import annotations

from typing import Any

from orderstream import metrics
from orderstream.agents.batches import Batch
from orderstream.agents.desk import IN_HAND_MAX, About, Desk, Read, Slip, marks_of
from orderstream.agents.holding import Held, answer
from orderstream.agents.intake import inner_rows, take_in
from orderstream.agents.lifecycle import AskAgain, Cancel, Charged, Declined, Event, Order, asks
from orderstream.agents.provider import Charge
from orderstream.agents.till import Till
from orderstream.errors import InvalidRecord
from orderstream.failpoints import failpoint
from orderstream.streams.commands import decode_order_command
from orderstream.streams.lines import LineStands
from orderstream.streams.producer import Outbox
from orderstream.streams.topics import ORDER_COMMANDS, RESERVATIONS

FREE = "free"
"""Stands for the id of a charge of nothing: an order whose total is 0 is not charged."""


INBOX_MAX = 10_000
"""While more has come in that commit has not decided about, no more commands and answers are read: they stand in Kafka."""


COMMANDS: dict[str, Event] = {"cancel": Cancel(), "retry_payment": AskAgain()}
"""What the commands on ``order-commands`` bring about."""


def ask(desk: Desk, till: Till) -> None:
    """Ask the provider what is to be asked about the orders handed over; what it answers at once goes on at once."""
    charges = 0
    while desk.to_pay:
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
                verdict = till.charge(_charge(order), is_late=entry.is_waiting)
                if verdict is not None:
                    if desk.stage.traces is not None:
                        desk.stage.traces.answered(order.order_id, verdict.charge_id)
                    event = (
                        Declined() if verdict.charge_id is None else Charged(verdict.charge_id, verdict.amount_cents)
                    )
                    desk.put(About(order.order_id, event))
            case "refund":
                till.refund(_charge(order), order.charge_id or "")
            case "void":
                till.void(_charge(order))
            case None:
                pass
    if charges:
        metrics.PAYMENT_ATTEMPTS.inc(charges)


def _charge(order: Order) -> Charge:
    return Charge(order.order_id, order.user_id, order.payment_method, order.total_cents or 0)


def hear(desk: Desk, till: Till) -> None:
    """Hand on what the provider has answered; let go of orders that are asked about in vain where many are in hand."""
    if till.answers:
        failpoint("pay.after_charge")
    while till.answers:
        order_id, event = till.answers.popleft()
        if desk.stage.traces is not None and isinstance(event, Charged | Declined):
            desk.stage.traces.answered(order_id, event.charge_id if isinstance(event, Charged) else None)
        desk.put(About(order_id, event))
    for order_id in till.tired:
        if (entry := desk.entries.get(order_id)) is not None:
            desk.let_go(entry, IN_HAND_MAX // 2)
    till.tired.clear()


async def wait_for_room(desk: Desk, till: Till, batch: Batch) -> None:
    """Wait until commit has caught up; the provider goes on being asked.

    Raises:
        OwnershipLost: there was a rebalance meanwhile.
    """

    def go_on() -> None:
        hear(desk, till)
        ask(desk, till)

    await desk.room(batch, INBOX_MAX, go_on)


async def hand_on(desk: Desk, batch: Batch) -> None:
    """Hand on what came in with a batch, then how far it was read: a mark is written no sooner than what it stands for."""
    stage, slip = desk.stage, Slip(desk.stage, batch)
    outbox = stage.outbox("pay", batch)
    batch.keep()
    sort(desk, batch, slip, outbox)
    slip.left += 1
    desk.put(Read(marks_of(batch), slip))
    outbox.steps.done("decode")
    await stage.emit(outbox, "pay", batch)
    slip.done()


def sort(desk: Desk, batch: Batch, slip: Slip, outbox: Outbox) -> None:
    """Hand on the commands and the owners' answers of a batch; they are acknowledged with what becomes of them."""
    topic = desk.stage.settings.topic
    for record, command in take_in(
        batch.records(topic(ORDER_COMMANDS.name)), lambda r: decode_order_command(r.value), outbox
    ):
        slip.left += 1
        place = (record.partition, record.offset) if command.command == "cancel" else None
        desk.put(About(str(command.order_id), COMMANDS[command.command], slip, place))
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
