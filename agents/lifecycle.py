"""The life of an order as its home decides it.  Pure: events come in, the order moves; what follows is read off the order.

::

    CREATED ──all lines held──▶ RESERVED ──charged──▶ PAID ──all lines committed──▶ CONFIRMED
       │                           │                    │                              │
       └──a line refused, expired, └──declined, expired,└──cancelled──▶ CANCELLED,     └──cancelled──▶ CANCELLED,
          cancelled──▶ CANCELLED      cancelled──▶ CANCELLED  refund due                  refund due

``decide`` changes an order in place and says whether it did.  Nothing else is decided anywhere: ``moves``, ``sends``,
``asks`` and ``is_over`` are read off the order.  So a repeat after a crash does what was left to do, once.

A line is ``a`` asked of another owner, ``h`` held, ``x`` refused; ``g`` commit sent, ``c`` committed; ``l`` release sent,
``r`` released; ``b`` return sent, ``n`` returned.  Home settles its own lines at once: they never are a, g, l or b.  So it
does with lines of *near* owners: partitions of the same worker, for which one transaction can write what both would.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

import msgspec

from orderstream.streams.orders import Reason, Status

PRECEDENCE = tuple(Reason)
"""When lines are refused for different reasons, the first of these is the order's."""


class Payment(StrEnum):
    """What is known of an order's money, beside None: nobody was asked, or the answer is not known."""

    SUCCESS = "SUCCESS"
    FAILED = "FAILED"
    REFUND_DUE = "REFUND_DUE"
    REFUNDED = "REFUNDED"
    VOID_DUE = "VOID_DUE"
    VOIDED = "VOIDED"
    REFUSED = "REFUSED"


DUE = frozenset({Payment.VOID_DUE, Payment.REFUND_DUE})


class Order(msgspec.Struct, gc=False):
    """An order as its home knows it: what its row in Postgres has.

    Attributes:
        home: partition of its record.
        lines: product id and units of each line.
        states: a character a line; see the module.
        prices: cents of each line once it is held; may be empty where there is one line, or nothing is held.
        reasons: of each line that was refused; empty where none was.
        owners: partition of each line's product; empty where all are at home.
        may_be_charged: its record was there when Postgres was set back, so it may have been charged in what got lost.
        is_closed: its money was refused for good, and people have dealt with that.
    """

    order_id: str
    home: int
    user_id: str
    payment_method: str
    lines: Sequence[tuple[str, int]]
    status: Status
    states: str
    created_at: datetime
    total_cents: int | None = None
    reason: str | None = None
    payment: Payment | None = None
    charge_id: str | None = None
    prices: list[int | None] = []
    reasons: list[str | None] = []
    owners: Sequence[int] = ()
    may_be_charged: bool = False
    is_closed: bool = False
    reserved_at: datetime | None = None
    paid_at: datetime | None = None
    confirmed_at: datetime | None = None
    cancelled_at: datetime | None = None

    def is_home(self, line: int) -> bool:
        """Tell whether home owns the product of a line."""
        return not self.owners or self.owners[line] == self.home


# Events


class Charged(msgspec.Struct, frozen=True, gc=False):
    """The provider has taken the money; ``amount_cents``: so much, where it says so."""

    charge_id: str
    amount_cents: int | None = None


class Declined(NamedTuple):
    """The provider said no, for good."""


class Rejected(NamedTuple):
    """The provider takes no request to charge this order, and does not say that no earlier one has charged it."""


class GivenBack(NamedTuple):
    """The provider has given the money back, or says that there is none of this key and never will be."""


class Refused(NamedTuple):
    """The provider will not give the money back, for good."""


class AskAgain(NamedTuple):
    """People have the provider asked again to give back what it has refused to."""


class Cancel(NamedTuple):
    """The customer does not want the order any more."""


class Expire(NamedTuple):
    """The order's time is over: it was taken in before ``before``, or this changes nothing."""

    before: datetime


class LineHeld(NamedTuple):
    """The owner of a line's product holds it."""

    product_id: str
    price_cents: int


class LineRefused(NamedTuple):
    """The owner of a line's product does not hold it."""

    product_id: str
    reason: str


class LineSettled(NamedTuple):
    """The owner of a line's product has settled it: ``c`` committed, ``r`` released, ``n`` returned."""

    product_id: str
    state: str


Event = (
    Charged
    | Declined
    | Rejected
    | GivenBack
    | Refused
    | AskAgain
    | Cancel
    | Expire
    | LineHeld
    | LineRefused
    | LineSettled
)

NOBODY: Container[int] = ()

_AT_HOME = {"commit": str.maketrans("h", "c"), "release": str.maketrans("h", "r"), "return": str.maketrans("c", "n")}
_SENT = {
    "commit": str.maketrans("h", "g"),
    "release": str.maketrans("ha", "ll"),
    "return": str.maketrans("gc", "bb"),
}
_SETTLED = {("g", "c"), ("l", "r"), ("b", "n")}


def decide(order: Order, event: Event, near: Container[int] = NOBODY) -> bool:
    """Move an order by an event; tell whether it moved.

    Args:
        near: partitions whose lines the same transaction settles, where home knew before that they are held or committed.
    """
    match event:
        case Charged():
            return _charged(order, event, near)
        case Declined():
            if order.status is not Status.RESERVED:
                return False  # it ended otherwise, and its void gives back whatever may have been taken
            _cancel(order, Reason.PAYMENT_DECLINED, Payment.FAILED, near)
            return True
        case Rejected():
            if order.status is not Status.RESERVED:
                return False
            _cancel(order, Reason.PAYMENT_DECLINED, Payment.VOID_DUE, near)
            return True
        case Cancel():
            return _end(order, Reason.CANCELLED_BY_USER, near)
        case Expire():
            open_one = order.status is Status.CREATED or order.status is Status.RESERVED
            return open_one and order.created_at <= event.before and _end(order, Reason.EXPIRED, near)
        case GivenBack():
            back = Payment.VOIDED if order.paid_at is None else Payment.REFUNDED
            return _repaid(order, dict.fromkeys((*DUE, Payment.REFUSED), back))
        case Refused():
            return _repaid(order, dict.fromkeys(DUE, Payment.REFUSED))
        case AskAgain():
            due = Payment.VOID_DUE if order.paid_at is None else Payment.REFUND_DUE
            return not order.is_closed and _repaid(order, {Payment.REFUSED: due})
        case LineHeld():
            return _line_decided(order, event.product_id, event.price_cents, None)
        case LineRefused():
            return _line_decided(order, event.product_id, None, event.reason)
        case LineSettled():
            return _line_settled(order, event.product_id, event.state)


def _charged(order: Order, event: Charged, near: Container[int]) -> bool:
    charge_id = event.charge_id
    if order.status is Status.RESERVED:
        if event.amount_cents is not None and event.amount_cents != order.total_cents:
            _cancel(order, Reason.PAYMENT_DECLINED, Payment.VOID_DUE, near)  # under this key something else was charged
            order.charge_id = charge_id
            return True
        order.payment, order.charge_id = Payment.SUCCESS, charge_id
        _settle(order, "commit", near)
        order.status = Status.CONFIRMED if not order.owners or set(order.states) == {"c"} else Status.PAID
        return True
    if order.status is not Status.CANCELLED or order.total_cents == 0:
        return False  # known already; or free, and there is no money
    if order.payment in (None, Payment.FAILED, Payment.VOIDED):
        order.payment = Payment.VOID_DUE  # as far as was known there was none, and yet there is: it goes back
    elif order.charge_id is not None:
        return False
    order.charge_id = charge_id
    return True


def _end(order: Order, reason: Reason, near: Container[int]) -> bool:
    if order.status is Status.CANCELLED:
        return False
    paid = order.status is Status.PAID or order.status is Status.CONFIRMED
    payment = order.payment
    if paid:
        payment = Payment.REFUND_DUE if order.total_cents else Payment.REFUNDED
    elif order.total_cents is None:
        payment = Payment.VOID_DUE if order.may_be_charged else None
    elif order.status is Status.RESERVED:
        payment = Payment.VOID_DUE if order.total_cents else None  # nothing is charged for nothing
    _cancel(order, reason, payment, near)
    return True


def _cancel(order: Order, reason: str, payment: Payment | None, near: Container[int]) -> None:
    paid = order.status is Status.PAID or order.status is Status.CONFIRMED
    _settle(order, "return" if paid else "release", near)
    order.status, order.reason, order.payment = Status.CANCELLED, reason, payment


def _settle(order: Order, what: str, near: Container[int]) -> None:
    """Settle the lines at home and of near owners, and note that the others' owners are told to."""
    home, sent = _AT_HOME[what], _SENT[what]
    if not order.owners:
        order.states = order.states.translate(home)
        return
    order.states = "".join(
        state.translate(home if owner == order.home or (owner in near and state in "hc") else sent)
        for owner, state in zip(order.owners, order.states, strict=True)
    )


def _repaid(order: Order, become: dict[Payment, Payment]) -> bool:
    if order.payment not in become:
        return False
    order.payment = become[order.payment]
    return True


def _line_of(order: Order, product_id: str) -> int | None:
    return next((n for n, (name, _) in enumerate(order.lines) if name == product_id and not order.is_home(n)), None)


def _line_decided(order: Order, product_id: str, price_cents: int | None, reason: str | None) -> bool:
    n = _line_of(order, product_id)
    if n is None:
        return False
    if order.states[n] == "l" and reason is not None:
        _set(order, n, "r")  # there is nothing to release
        return True
    if order.states[n] != "a":
        return False
    _set(order, n, "h" if reason is None else "x")
    if reason is None:
        order.prices[n] = price_cents
    else:
        order.reasons = order.reasons or [None] * len(order.lines)
        order.reasons[n] = reason
    if order.status is Status.CREATED and "a" not in order.states:
        refused = {reason for reason in order.reasons if reason is not None}
        if refused:
            payment = Payment.VOID_DUE if order.may_be_charged else None
            _cancel(order, next(reason for reason in PRECEDENCE if reason in refused), payment, NOBODY)
        else:
            order.status = Status.RESERVED
            order.total_cents = sum(
                units * (price or 0) for (_, units), price in zip(order.lines, order.prices, strict=True)
            )
    return True


def _line_settled(order: Order, product_id: str, state: str) -> bool:
    n = _line_of(order, product_id)
    if n is None:
        return False
    if (order.states[n], state) == (
        "a",
        "r",
    ):  # let go of while its home did not know the order: it can't be held again
        _set(order, n, "r")
        return _end(order, Reason.EXPIRED, NOBODY)
    if (order.states[n], state) not in _SETTLED:
        return False
    _set(order, n, state)
    if order.status is Status.PAID and set(order.states) == {"c"}:
        order.status = Status.CONFIRMED
    return True


def _set(order: Order, n: int, state: str) -> None:
    order.states = f"{order.states[:n]}{state}{order.states[n + 1 :]}"


# What follows

STEPS = {"commit": ("h", "c"), "release": ("h", "r"), "return": ("c", "n")}
"""State of a line before a movement of its units, and after."""

_MOVEMENTS = {step: movement for movement, step in STEPS.items()}
_ACTIONS = {"a": "hold", "g": "commit", "l": "release", "b": "return"}


@lru_cache(maxsize=4_096)
def moves(before: str, after: str) -> tuple[tuple[int, str], ...]:
    """Return the lines whose units one event has moved between these states, and how: at home, and of near owners."""
    steps = enumerate(zip(before, after, strict=True))
    return tuple([(n, _MOVEMENTS[step]) for n, step in steps if step in _MOVEMENTS])


def sends(order: Order) -> Iterator[tuple[int, str]]:
    """Yield the lines that another owner has to act on, and how: hold, commit, release or return."""
    if order.owners:
        for n, state in enumerate(order.states):
            if state in _ACTIONS:
                yield n, _ACTIONS[state]


_SETTLE_AGAIN = {"c": "commit", "r": "release", "x": "release", "n": "return"}


def settled_already(order: Order, event: LineHeld) -> tuple[int, str] | None:
    """Return the line that its owner still holds, as it says, although here it is settled; and what is wanted of it."""
    n = _line_of(order, event.product_id)
    action = _SETTLE_AGAIN.get(order.states[n]) if n is not None else None
    return None if n is None or action is None else (n, action)


def asks(order: Order) -> str | None:
    """Return what the provider has to be asked now: ``charge``, ``void`` or ``refund``; None: nothing."""
    if order.payment is None:
        return "charge" if order.status is Status.RESERVED else None
    return {Payment.VOID_DUE: "void", Payment.REFUND_DUE: "refund"}.get(order.payment)


def is_over(order: Order) -> bool:
    """Tell whether nothing is left to do: the order has ended, its lines are settled, no money is due."""
    if order.status is not Status.CONFIRMED and order.status is not Status.CANCELLED:
        return False
    return order.payment not in DUE and not (order.owners and any(state in _ACTIONS for state in order.states))


def stamp(order: Order, at: datetime) -> None:
    """Note when the status of an order was written; a status that it passed on the way has the same time."""
    match order.status:
        case Status.RESERVED:
            order.reserved_at = order.reserved_at or at
        case Status.PAID:
            order.paid_at = order.paid_at or at
        case Status.CONFIRMED:
            order.paid_at, order.confirmed_at = order.paid_at or at, order.confirmed_at or at
        case Status.CANCELLED:
            order.cancelled_at = order.cancelled_at or at
        case Status.CREATED:
            pass
