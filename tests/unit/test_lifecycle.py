"""The life of an order as its owner keeps it: verdicts in any order, repeated, across a crash, come to the same."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderstream.agents.lifecycle import PRECEDENCE, OpenOrder
from orderstream.streams.orders import Reason, Status
from orderstream.streams.reservations import LineReserved

ORDER_ID = "5e6e7e1c-2f52-4d2b-9a55-5d0e5a0c9a11"
REFUSALS = [Reason.UNKNOWN_PRODUCT, Reason.INSUFFICIENT_STOCK]


def verdict(
    product_id: str, quantity: int = 1, price: int = 100, reason: str | None = None, lines: int = 2, again: bool = False
) -> LineReserved:
    return LineReserved(ORDER_ID, product_id, quantity, price, reason, lines, "u", "card", "reply", again)


def fold(lines: list[LineReserved]) -> OpenOrder:
    order = OpenOrder.from_verdict(lines[0], 3)
    for line in lines[1:]:
        order.note(line)
    return order


def state(order: OpenOrder) -> Any:
    """Return what is decided from; when it was first heard of differs from one owner to the next."""
    return {**order.stored(), "since": 0.0}


@st.composite
def orders(draw: st.DrawFn) -> list[LineReserved]:
    """Draw the verdicts on all lines of an order, each once."""
    count = draw(st.integers(1, 6))
    return [
        verdict(
            str(n),
            draw(st.integers(1, 10_000)),
            draw(st.integers(0, 10**6)),
            draw(st.none() | st.sampled_from(REFUSALS)),
            lines=count,
        )
        for n in range(count)
    ]


@given(st.data())
def test_verdicts_in_any_order_and_repeated_come_to_the_same_state(data: st.DataObject) -> None:
    lines = data.draw(orders())
    repeated = [line._replace(again=True) for line in data.draw(st.lists(st.sampled_from(lines), max_size=6))]
    shuffled = data.draw(st.permutations([*lines, *repeated]))
    assert state(fold(shuffled)) == state(fold(lines))
    assert (fold(shuffled).decided, fold(shuffled).refusal) == (True, fold(lines).refusal)


@given(orders(), st.integers(0, 6))
def test_an_order_is_decided_with_its_last_line_and_not_before(lines: list[LineReserved], seen: int) -> None:
    some = lines[: max(1, seen)]
    assert fold(some).decided == (len(some) == len(lines))


@given(orders())
def test_an_order_is_had_whole_or_refused(lines: list[LineReserved]) -> None:
    order = fold(lines)
    assert (order.refusal is None) == all(line.reason is None for line in lines)
    assert dict(order.held()) == {line.product_id: line.quantity for line in lines if line.reason is None}
    assert order.total_cents == sum(line.quantity * line.unit_price_cents for line in lines if line.reason is None)


@given(st.permutations([*Reason]), st.integers(1, 5))
def test_of_several_reasons_the_first_of_the_list_is_told(reasons: list[Reason], count: int) -> None:
    lines = [verdict(str(n), reason=reason, lines=count + 1) for n, reason in enumerate(reasons[:count])]
    order = fold([*lines, verdict("held", lines=count + 1)])
    assert order.refusal == min(reasons[:count], key=PRECEDENCE.index)


def test_the_precedence_is_the_documented_one() -> None:
    assert PRECEDENCE == (
        "unknown_product",
        "insufficient_stock",
        "user_limit",
        "payment_declined",
        "expired",
        "cancelled_by_user",
    )


def test_a_refused_line_costs_nothing_and_is_not_held() -> None:
    order = fold([verdict("1", 2, 150), verdict("2", 5, 0, Reason.INSUFFICIENT_STOCK)])
    assert order.total_cents == 300
    assert [*order.held()] == [("1", 2)]


def test_a_new_order_knows_what_its_first_verdict_tells() -> None:
    order = OpenOrder.from_verdict(verdict("1"), 3)
    assert (order.order_id, order.partition, order.user_id, order.payment_method) == (ORDER_ID, 3, "u", "card")
    assert (order.line_count, order.reply_to, order.status) == (2, "reply", Status.CREATED)
    assert (order.charge_asked, order.refund, order.unseen) == (False, None, [])


# Verdicts read from Postgres before their records came


def test_a_verdict_that_was_awaited_is_ticked_off_once() -> None:
    order = OpenOrder(ORDER_ID, 3, "u", "card", 3, unseen=["1", "2"])
    order.note(verdict("1"))
    order.note(verdict("1", again=True))
    order.note(verdict("3"))
    assert order.unseen == ["2"]
    order.note(verdict("2"))
    assert order.unseen == []


# The table


@given(
    orders(),
    st.sampled_from([*Status]),
    st.booleans(),
    st.none() | st.text(),
    st.lists(st.sampled_from(["1", "2", "é"]), unique=True),
    st.none() | st.text(),
)
def test_what_the_table_keeps_comes_back_the_same_through_its_changelog(
    lines: list[LineReserved],
    status: Status,
    charge_asked: bool,
    refund: str | None,
    unseen: list[str],
    reply_to: str | None,
) -> None:
    order = fold(lines)
    order.status, order.charge_asked, order.refund = status, charge_asked, refund
    order.unseen, order.reply_to = unseen, reply_to
    recovered = OpenOrder.from_stored(ORDER_ID, orjson.loads(orjson.dumps(order.stored())))
    assert recovered == order
    assert recovered.stored() == order.stored()
    assert (recovered.refusal, recovered.total_cents) == (order.refusal, order.total_cents)


def test_a_batch_that_is_dropped_leaves_what_the_table_keeps_as_it_was() -> None:
    order = OpenOrder(ORDER_ID, 3, "u", "card", 2, unseen=["1", "2"])
    kept = order.stored()
    before = orjson.dumps(kept)
    opened = OpenOrder.from_stored(ORDER_ID, kept)
    opened.note(verdict("1"))
    opened.unseen.clear()
    assert orjson.dumps(kept) == before


# Postgres


def test_an_order_read_from_postgres_holds_its_decided_lines() -> None:
    row = {
        "order_id": ORDER_ID,
        "user_id": "u",
        "payment_method": "card",
        "line_count": 4,
        "status": "CANCELLED",
        "product_ids": ["a", "b", "c", "d"],
        "quantities": [1, 2, 3, 4],
        "states": ["held", "refused", "pending", "released"],
        "reasons": [None, "insufficient_stock", None, None],
        "unit_prices": [10, 0, 0, 20],
    }
    order = OpenOrder.from_row(row, 5)
    assert order.lines == {"a": (1, 10, None), "b": (2, 0, "insufficient_stock"), "d": (4, 20, None)}
    assert (order.partition, order.status, order.decided) == (5, Status.CANCELLED, False)
    assert (order.reply_to, order.charge_asked, order.refund, order.unseen) == (None, False, None, [])


@pytest.mark.parametrize("reason", [None, *REFUSALS])
def test_a_verdict_and_postgres_tell_the_same_line(reason: Reason | None) -> None:
    row = {
        "order_id": ORDER_ID,
        "user_id": "u",
        "payment_method": "card",
        "line_count": 1,
        "status": "CREATED",
        "product_ids": ["1"],
        "quantities": [2],
        "states": ["held" if reason is None else "refused"],
        "reasons": [reason],
        "unit_prices": [100],
    }
    from_verdict = OpenOrder.from_verdict(verdict("1", 2, 100, reason, lines=1)._replace(reply_to=None), 3)
    assert state(OpenOrder.from_row(row, 3)) == state(from_verdict)
