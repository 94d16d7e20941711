"""What the stages count of what they have written: each order once, however often its record comes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

import structlog

from orderstream import metrics
from orderstream.agents.lifecycle import Order, Payment
from orderstream.sample import Sample
from orderstream.streams.orders import Reason, Status

CHARGED = frozenset({Status.PAID, Status.CONFIRMED})

NAMED_MAX = 10
"""Orders named in one line of the log."""

log = structlog.get_logger("pay")

Moved = tuple[Order, Status | None, Payment | None]
"""An order that a transaction has moved, its status and its payment before; status None: it was taken in."""


def count_orders(orders: Sequence[Moved], sample: Sample) -> None:
    """Count orders that a transaction has moved."""
    for _, alike in groupby(orders, _step):
        _count(list(alike))
    at = time.time()
    for order, was, _ in orders:
        if order.order_id in sample and order.status is not was:
            sample.passed(order.order_id, order.status, at)


def _step(moved: Moved) -> tuple[Status | str | None, ...]:
    order, was, paid = moved
    return was, order.status, order.reason, paid, order.payment


def _count(alike: Sequence[Moved]) -> None:
    (order, was, paid), number = alike[0], len(alike)
    now = order.status
    if was is None:
        metrics.ORDERS_CREATED.inc(number)
    if was is not now:
        if now is Status.RESERVED:
            metrics.ORDERS_RESERVED.inc(number)
        if now in CHARGED and was not in CHARGED:
            metrics.ORDERS_PAID.inc(number)
            metrics.PAYMENT_SUCCESS.inc(number)
        if now is Status.CONFIRMED:
            metrics.ORDERS_CONFIRMED.inc(number)
        if now is Status.CANCELLED and was is Status.CONFIRMED:
            metrics.ORDERS_REVOKED.inc(number)
        elif now is Status.CANCELLED:
            metrics.ORDERS_CANCELLED.labels(order.reason).inc(number)
    if order.payment is not paid and order.payment in _PAYMENTS:
        _PAYMENTS[order.payment].inc(number)
        why = _why_unwanted(order, was, paid) if order.payment is Payment.VOID_DUE else None
        if why is not None:
            metrics.PAYMENT_UNWANTED.labels(why).inc(number)
        if why is not None or order.payment is Payment.REFUSED:
            ids = [one.order_id for one, _, _ in alike[:NAMED_MAX]]
            log.warning(_MONEY[why], orders=number, order_ids=ids)


def _why_unwanted(order: Order, was: Status | None, paid: Payment | None) -> str | None:
    """Return why a void has become due, other than that the order has ended before its charge was known."""
    if was is Status.CANCELLED:
        return None if paid is Payment.REFUSED else "late"
    return "unclear" if order.reason == Reason.PAYMENT_DECLINED else None


_MONEY = {
    "late": "charged after the order had ended: it is given back",
    "unclear": "no charge that is this order's: it ends, and whatever stands under its key is given back",
    None: "the provider does not give this money back: people have to (orderstream payments list)",
}

_PAYMENTS = {
    Payment.VOID_DUE: metrics.PAYMENT_VOIDS_DUE,
    Payment.FAILED: metrics.PAYMENT_FAILED,
    Payment.VOIDED: metrics.PAYMENT_VOIDS,
    Payment.REFUNDED: metrics.PAYMENT_REFUNDS,
    Payment.REFUSED: metrics.PAYMENT_REFUSED,
}


def count_lines(held: int, refused: Iterable[str | None]) -> None:
    """Count lines for which units are held, and the reasons of those that are refused; None is of another line."""
    metrics.LINES_HELD.inc(held)
    for reason, number in Counter(refused).items():
        if reason is not None:
            metrics.LINES_REFUSED.labels(reason).inc(number)
