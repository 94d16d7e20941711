"""Each order is counted once for each thing that became of it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from orderstream.agents.counting import count_lines, count_orders
from orderstream.agents.lifecycle import Order, Payment
from orderstream.sample import Sample
from orderstream.streams.orders import Reason, Status

COUNTERS = (
    "orders_created", "orders_reserved", "orders_paid", "orders_confirmed", "orders_cancelled", "orders_revoked",
    "payment_success", "payment_failed", "payment_refunds", "payment_voids", "payment_voids_due",
    "payment_unwanted", "payment_refused", "lines_held", "inventory_reservations_failed",
)  # fmt: skip


def counted() -> dict[str, float]:
    """Return the values of these counters, over all their labels."""
    found = dict.fromkeys(COUNTERS, 0.0)
    for family in REGISTRY.collect():
        if family.name in found:
            found[family.name] = sum(sample.value for sample in family.samples)
    return found


@pytest.mark.parametrize(
    ("was", "now", "paid", "pays", "expected"),
    [
        (None, Status.CREATED, None, None, {"orders_created"}),
        (None, Status.RESERVED, None, None, {"orders_created", "orders_reserved"}),
        (None, Status.CANCELLED, None, None, {"orders_created", "orders_cancelled"}),
        (Status.CREATED, Status.RESERVED, None, None, {"orders_reserved"}),
        (Status.CREATED, Status.CREATED, None, None, set()),
        (Status.RESERVED, Status.PAID, None, Payment.SUCCESS, {"orders_paid", "payment_success"}),
        (Status.PAID, Status.CONFIRMED, Payment.SUCCESS, Payment.SUCCESS, {"orders_confirmed"}),
        (Status.RESERVED, Status.CONFIRMED, None, Payment.SUCCESS, {"orders_paid", "payment_success", "orders_confirmed"}),
        (Status.RESERVED, Status.CANCELLED, None, Payment.FAILED, {"orders_cancelled", "payment_failed"}),
        (Status.RESERVED, Status.CANCELLED, None, Payment.VOID_DUE, {"orders_cancelled", "payment_voids_due"}),
        (Status.CANCELLED, Status.CANCELLED, Payment.FAILED, Payment.VOID_DUE, {"payment_voids_due", "payment_unwanted"}),
        (Status.CANCELLED, Status.CANCELLED, Payment.REFUSED, Payment.VOID_DUE, {"payment_voids_due"}),
        (Status.CANCELLED, Status.CANCELLED, Payment.VOID_DUE, Payment.VOIDED, {"payment_voids"}),
        (Status.CONFIRMED, Status.CANCELLED, Payment.SUCCESS, Payment.REFUND_DUE, {"orders_revoked"}),
        (Status.PAID, Status.CANCELLED, Payment.SUCCESS, Payment.REFUND_DUE, {"orders_cancelled"}),
        (Status.CANCELLED, Status.CANCELLED, Payment.REFUND_DUE, Payment.REFUNDED, {"payment_refunds"}),
        (Status.CANCELLED, Status.CANCELLED, Payment.REFUND_DUE, Payment.REFUSED, {"payment_refused"}),
    ],
)  # fmt: skip
def test_each_step_of_an_order_is_counted_as_what_it_is(
    was: Status | None, now: Status, paid: Payment | None, pays: Payment | None, expected: set[str]
) -> None:
    reason = "cancelled_by_user" if now is Status.CANCELLED else None
    one, two = (
        Order(name, 0, "u", "card", [("p", 1)], now, "h", datetime.now(UTC), reason=reason, payment=pays)
        for name in ("one", "two")
    )
    other = Order("three", 0, "u", "card", [("p", 1)], Status.CREATED, "a", datetime.now(UTC))
    before = counted()
    count_orders([(one, was, paid), (other, Status.CREATED, None), (two, was, paid)], Sample())
    grown = {name: value - before[name] for name, value in counted().items() if value != before[name]}
    assert grown == dict.fromkeys(expected, 2)


def test_an_order_without_a_charge_of_its_own_is_counted_and_named() -> None:
    order = Order("one", 0, "u", "card", [("p", 1)], Status.CANCELLED, "r", datetime.now(UTC))
    order.reason, order.payment = Reason.PAYMENT_DECLINED, Payment.VOID_DUE
    before = counted()
    with capture_logs() as lines:
        count_orders([(order, Status.RESERVED, None)], Sample())
    grown = {name: value - before[name] for name, value in counted().items() if value != before[name]}
    assert grown == {"orders_cancelled": 1, "payment_voids_due": 1, "payment_unwanted": 1}
    assert [line["order_ids"] for line in lines] == [["one"]]


def test_lines_are_counted_where_they_are_decided() -> None:
    before = counted()
    count_lines(3, [None, "insufficient_stock", "user_limit", None])
    grown = {name: value - before[name] for name, value in counted().items() if value != before[name]}
    assert grown == {"lines_held": 3, "inventory_reservations_failed": 2}
