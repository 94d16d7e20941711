"""What the stages count of what they have written: each order once, however often its record comes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from orderstream import metrics
from orderstream.agents.lifecycle import Order, Payment
from orderstream.sample import Sample
from orderstream.streams.orders import Status

CHARGED = frozenset({Status.PAID, Status.CONFIRMED})


class Step(NamedTuple):
    """How far a transaction has moved an order: its status and its payment before and after it; status None: none yet."""

    was: Status | None
    now: Status
    reason: str | None
    paid: Payment | None = None
    pays: Payment | None = None


def count_orders(orders: Sequence[tuple[Order, Status | None, Payment | None]], sample: Sample) -> None:
    """Count orders that a transaction has moved, each with its status and its payment before."""
    at = time.time()
    for step, number in Counter(
        Step(was, order.status, order.reason, paid, order.payment) for order, was, paid in orders
    ).items():
        _count(step, number)
    for order, was, _ in orders:
        if order.status is not was:
            sample.passed(order.order_id, order.status, at)


def _count(step: Step, number: int) -> None:
    if step.was is None:
        metrics.ORDERS_CREATED.inc(number)
    if step.was is not step.now:
        if step.now is Status.RESERVED:
            metrics.ORDERS_RESERVED.inc(number)
        if step.now in CHARGED and step.was not in CHARGED:
            metrics.ORDERS_PAID.inc(number)
            metrics.PAYMENT_SUCCESS.inc(number)
        if step.now is Status.CONFIRMED:
            metrics.ORDERS_CONFIRMED.inc(number)
        if step.now is Status.CANCELLED:
            metrics.ORDERS_CANCELLED.labels(step.reason).inc(number)
            metrics.ORDERS_REVOKED.inc(number if step.was in CHARGED else 0)
    if step.pays is not step.paid and step.pays in _PAYMENTS:
        _PAYMENTS[step.pays].inc(number)


_PAYMENTS = {
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
