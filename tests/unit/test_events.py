"""What the outside reads on order-events: the promised fields, named as in the database, in UTC."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderstream.streams import events
from orderstream.streams.orders import Reason, Status

ID = "5e6e7e1c-2f52-4d2b-9a55-5d0e5a0c9a11"
AT = datetime(2025, 1, 31, 12, 0, 0, 250_000, tzinfo=UTC)
WHEN = "2025-01-31T12:00:00.250000+00:00"

EVENTS: dict[Status, tuple[bytes, dict[str, Any]]] = {
    Status.CREATED: (
        events.created(ID, AT, "u", (("b", 2), ("a", 1))),
        {"user_id": "u", "items": [{"product_id": "b", "quantity": 2}, {"product_id": "a", "quantity": 1}]},
    ),
    Status.RESERVED: (events.reserved(ID, AT, 300), {"total_cents": 300}),
    Status.PAID: (events.paid(ID, AT, 300, "ch-1"), {"total_cents": 300, "charge_id": "ch-1"}),
    Status.CONFIRMED: (events.confirmed(ID, AT), {}),
    Status.CANCELLED: (events.cancelled(ID, AT, Reason.EXPIRED), {"reason": "expired"}),
}


@pytest.mark.parametrize("status", EVENTS)
def test_an_event_holds_what_is_promised_and_no_more(status: Status) -> None:
    written, more = EVENTS[status]
    assert orjson.loads(written) == {"v": 1, "order_id": ID, "status": status.value, "at": WHEN, **more}


def test_prices_are_told_of_several_lines_of_which_all_are_known() -> None:
    assert orjson.loads(events.reserved(ID, AT, 300, [100, 50]))["prices_cents"] == [100, 50]
    for prices in ([], [300], [100, None]):
        assert events.reserved(ID, AT, 300, prices) == events.reserved(ID, AT, 300)


def test_a_rejection_names_its_record_and_reason() -> None:
    written = events.rejected(ID, AT, "invalid_order", 'items: "é" ', {"partition": 1, "offset": 2})
    more = {"reason": "invalid_order", "detail": 'items: "é" ', "record": {"partition": 1, "offset": 2}}
    assert orjson.loads(written) == {"v": 1, "order_id": ID, "status": "REJECTED", "at": WHEN, **more}


def test_there_is_an_event_for_every_status() -> None:
    assert set(EVENTS) == set(Status)


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_told_by_its_word(reason: Reason) -> None:
    assert orjson.loads(events.cancelled(ID, AT, reason))["reason"] == reason.value


def test_a_repeated_event_is_the_same_bytes() -> None:
    # A reader drops a repeated one; nothing in it may depend on when it was written.
    assert events.confirmed(ID, AT) == events.confirmed(ID, AT)
    assert events.created(ID, AT, "u", [("1", 1)]) == events.created(ID, AT, "u", (("1", 1),))


TEXT = st.text('"\\/\0\x1f\x7f\u2028é名😀%a') | st.text() | st.sampled_from([ID, "user-1", "%b", "%(a)d", "<&>"])
MOMENTS = st.datetimes(timezones=st.timezones() | st.just(UTC) | st.none())
LINES = st.lists(st.tuples(TEXT, st.integers(1, 2**63 - 1)), max_size=3)
CENTS = st.integers(-(2**63), 2**64 - 1)


@given(TEXT, MOMENTS, TEXT, LINES, CENTS, st.sampled_from(Reason) | TEXT)
def test_an_event_is_written_as_the_encoder_writes_it(
    order_id: str, at: datetime, name: str, lines: Sequence[tuple[str, int]], cents: int, reason: str
) -> None:
    def whole(status: Status, at: datetime | None, **more: Any) -> bytes:
        return orjson.dumps({"v": events.VERSION, "order_id": order_id, "status": status, "at": at, **more})

    items = [{"product_id": product_id, "quantity": quantity} for product_id, quantity in lines]
    assert events.created(order_id, at, name, lines) == whole(Status.CREATED, at, user_id=name, items=items)
    assert events.reserved(order_id, at, cents) == whole(Status.RESERVED, at, total_cents=cents)
    prices = [cents, 0]
    told = events.reserved(order_id, at, cents, prices)
    assert told == whole(Status.RESERVED, at, total_cents=cents, prices_cents=prices)
    assert events.confirmed(order_id, at) == whole(Status.CONFIRMED, at)
    for when in (at, None):
        paid = events.paid(order_id, when, cents, name)
        assert paid == whole(Status.PAID, when, total_cents=cents, charge_id=name)
        assert events.cancelled(order_id, when, reason) == whole(Status.CANCELLED, when, reason=reason)


@pytest.mark.parametrize("wrong", ["\ud800", 2**64, object()], ids=["lone surrogate", "65 bits", "object"])
def test_what_the_encoder_refuses_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError):
        events.created(ID, AT, "u", [(wrong, 1)])
    with pytest.raises(TypeError):
        events.paid(ID, AT, 300, wrong)
