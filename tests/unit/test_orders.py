"""The border: every form of an order that is taken, every one that is refused, and why."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orderstream.errors import InvalidRecord
from orderstream.streams.orders import (
    TERMINAL,
    Limits,
    Order,
    Reason,
    Status,
    decode,
    merge_lines,
    named,
    order_id_for_key,
    order_id_for_source,
)

LIMITS = Limits(lines=100, quantity=10_000, size_bytes=65_536)
ORDER_ID = "5e6e7e1c-2f52-4d2b-9a55-5d0e5a0c9a11"


def record(**fields: Any) -> dict[str, Any]:
    """Return a sound record, with some fields changed; None leaves one out."""
    sound = {"user_id": "u-1", "items": [item()], "payment_method": "card", **fields}
    return {name: value for name, value in sound.items() if value is not None}


def item(product_id: Any = "1", quantity: Any = 1, **more: Any) -> dict[str, Any]:
    return {"product_id": product_id, "quantity": quantity, **more}


def read(value: Any, limits: Limits = LIMITS) -> Order:
    raw = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
    return decode(raw, limits, topic="orders", partition=3, offset=17, timestamp=1)


def refusal(value: Any, limits: Limits = LIMITS) -> tuple[str, str]:
    with pytest.raises(InvalidRecord) as caught:
        read(value, limits)
    return caught.value.reason, caught.value.detail


# What is taken


def test_a_whole_record_is_taken_as_it_stands() -> None:
    order = read(
        record(
            order_id=ORDER_ID.upper(),
            items=[item("b", 2), item("a", 10_000)],
            placed_at="2025-01-31T12:00:00.5+02:00",
        )
    )
    placed_at = datetime(2025, 1, 31, 10, 0, 0, 500_000, tzinfo=UTC)
    assert order == Order(ORDER_ID, "u-1", (("b", 2), ("a", 10_000)), "card", None, placed_at)


def test_fields_that_may_be_left_out_may_be_null() -> None:
    nulls = {**record(), "order_id": None, "idempotency_key": None, "placed_at": None}
    assert read(nulls) == read(record())


@pytest.mark.parametrize(
    ("written", "kept"),
    [(7, "7"), ("7", "7"), (0, "0"), (2**63 - 1, "9223372036854775807"), ("007", "007"), ("名", "名")],
)
def test_ids_may_be_whole_numbers_or_text_and_are_kept_as_text(written: Any, kept: str) -> None:
    order = read(record(user_id=written, items=[item(written)]))
    assert (order.user_id, order.lines) == (kept, ((kept, 1),))


def test_an_id_written_as_number_and_as_text_is_the_same_product() -> None:
    assert read(record(items=[item(5, 1), item("5", 2)])).lines == (("5", 3),)


def test_lines_of_the_same_product_are_merged_where_it_was_named_first() -> None:
    order = read(record(items=[item("b", 1), item("a", 2), item("b", 4), item("c", 1), item("a", 1)]))
    assert order.lines == (("b", 5), ("a", 3), ("c", 1))


def test_the_bounds_themselves_are_within() -> None:
    lines = [item(str(n)) for n in range(100)]
    assert len(read(record(items=lines + lines)).lines) == 100
    assert read(record(items=[item(quantity=6_000), item(quantity=4_000)])).lines == (("1", 10_000),)
    text = json.dumps(record()).encode()
    assert read(text + b" " * (LIMITS.size_bytes - len(text))).user_id == "u-1"
    assert read(record(user_id="x" * 64, payment_method="x" * 64, idempotency_key="x" * 200)).user_id == "x" * 64


@pytest.mark.parametrize("colons", ["a:b", 'a":"b', "a\\:", "quantity"])
def test_names_and_colons_within_a_text_are_no_members(colons: str) -> None:
    order = read(record(user_id=colons, placed_at="2025-01-31T12:00:00Z"))
    assert order.user_id == colons


# Its id


def test_an_order_without_an_id_is_named_by_where_and_since_when_its_record_stands() -> None:
    assert read(record()).order_id == order_id_for_source("orders", 3, 17, 1)
    places = [("orders", 3, 18, 1), ("orders", 4, 17, 1), ("x.orders", 3, 17, 1), ("orders", 3, 17, 2)]
    assert len({read(record()).order_id, *(order_id_for_source(*place) for place in places)}) == 5


def test_an_order_with_a_key_is_named_by_user_and_key_wherever_it_stands() -> None:
    order = read(record(idempotency_key="k"))
    again = decode(
        orjson.dumps(record(idempotency_key="k")), LIMITS, topic="orders", partition=0, offset=99, timestamp=2
    )
    assert order.order_id == again.order_id == order_id_for_key("u-1", "k")
    assert order.idempotency_key == "k"
    assert read(record(user_id="u-2", idempotency_key="k")).order_id != order.order_id
    assert read(record(idempotency_key="l")).order_id != order.order_id


def test_user_and_key_can_not_be_shifted_into_each_other() -> None:
    assert order_id_for_key("ab", "c") != order_id_for_key("a", "bc")
    assert order_id_for_source("t1", 1, 1, 1) != order_id_for_source("t", 11, 1, 1)


def test_an_explicit_id_is_kept_and_may_repeat_the_keys() -> None:
    assert read(record(order_id=ORDER_ID)).order_id == ORDER_ID
    derived = order_id_for_key("u-1", "k")
    assert read(record(idempotency_key="k", order_id=derived)).order_id == derived


def test_an_explicit_id_that_contradicts_the_key_is_refused() -> None:
    reason, detail = refusal(record(idempotency_key="k", order_id=ORDER_ID))
    assert reason == "invalid_order"
    assert detail.startswith("order_id: ")
    assert ORDER_ID in detail
    assert order_id_for_key("u-1", "k") in detail


def test_the_id_of_a_key_is_taken_from_nobody_who_does_not_name_user_and_key() -> None:
    theirs = order_id_for_key("u-2", "k")
    for order in (record(order_id=theirs), record(order_id=theirs.upper()), record(order_id="{" + theirs + "}")):
        reason, detail = refusal(order)
        assert (reason, detail.startswith(f"order_id: {theirs} is of version 8")) == ("invalid_order", True)
    assert refusal(record(order_id=theirs, idempotency_key="k"))[0] == "invalid_order"
    assert read(record(user_id="u-2", order_id=theirs, idempotency_key="k")).order_id == theirs


def test_derived_ids_are_what_they_always_were() -> None:
    # A new version that derived other ids would take every record that is read again for a new order.
    assert order_id_for_key("u-1", "k") == "7437bd80-3d94-8767-af8d-2dc25e86e642"
    assert order_id_for_source("orders", 3, 17, 1) == "8f5a7e9e-53b4-5ff5-9812-885a2ae85bc4"


# What is refused, with the field at fault

NOT_JSON = {
    "cut off": b'{"user_id": "u',
    "text": b"order please",
    "more behind it": json.dumps(record()).encode() + b"}",
    "not UTF-8": b'{"user_id": "\xff"}',
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(record()).encode(),
    "lone surrogate": rb'{"user_id": "\ud800", "items": [], "payment_method": "card"}',
    "deeply nested array": b"[" * 60_000,
    "deeply nested object": b'{"items":' * 7_000,
    "a number of 5,000 digits": json.dumps(record()).encode().replace(b'"quantity": 1', b'"quantity": ' + b"9" * 5_000),
}


@pytest.mark.parametrize("value", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_json_is_refused(value: bytes) -> None:
    reason, detail = refusal(value)
    assert (reason, detail[:8]) == ("not_json", "record: ")


@pytest.mark.parametrize("value", [b"[]", b"[{}]", b"5", b"null", b'"order"', b"true"])
def test_json_that_is_no_object_is_refused(value: bytes) -> None:
    assert refusal(value) == ("invalid_order", "record: Input should be an object")


@pytest.mark.parametrize("value", [b"", None])
def test_a_record_without_a_value_is_refused(value: bytes | None) -> None:
    assert refusal(value) == ("empty", "the record has no value")


def test_a_record_over_64_kib_is_refused_unread() -> None:
    text = json.dumps(record()).encode()
    assert refusal(text + b" " * (65_537 - len(text))) == ("too_large", "65537 bytes, at most 65536")
    assert refusal(b"\xff" * 102_400) == ("too_large", "102400 bytes, at most 65536")


QUANTITIES: tuple[Any, ...] = (0, -5, 1.5, 1.0, "1", "", True, None, [1], {}, float("nan"), 10**30, 10**4_000)
TEXTS: tuple[Any, ...] = (
    "",
    " ",
    "\t",
    " a",
    "a ",
    "a\0b",
    "a\nb",
    "a\u200bb",
    "\x7f",
    1.5,
    True,
    [],
    {},
    float("nan"),
)
PRODUCT_IDS: tuple[Any, ...] = ("", " ", " a", "a\0b", "x" * 65, -1, 2**63, 1.5, True, None, [], 10**4_000)
TIMES: tuple[Any, ...] = (
    "2025-01-31T12:00:00",
    "2025-01-31",
    "2025-02-30T12:00:00Z",
    "2025-01-31T25:00:00Z",
    "yesterday",
    "1738324800",
    1738324800,
    1e300,
    True,
    "9999-12-31T23:59:59-01:00",
    "0001-01-01T00:00:00+01:00",
)
INVALID: dict[str, tuple[Any, str]] = {
    "an unknown field": (record(coupon="SALE"), "coupon: "),
    "an unknown field of a line": (record(items=[item(price=1)]), "items.0.price: "),
    "no user": (record(user_id=None), "user_id: "),
    "no items": (record(items=None), "items: "),
    "no payment method": (record(payment_method=None), "payment_method: "),
    "an empty list": (record(items=[]), "items: "),
    "a line alone": (record(items=item()), "items: "),
    "a list as line": (record(items=[["1", 1]]), "items.0: "),
    "a line without a product": (record(items=[{"quantity": 1}]), "items.0.product_id: "),
    "a line without a quantity": (record(items=[{"product_id": "1"}]), "items.0.quantity: "),
    "an order id that is no UUID": (record(order_id="order-1"), "order_id: "),
    "an order id that is a number": (record(order_id=5), "order_id: "),
    "a blank order id": (record(order_id=""), "order_id: "),
    **{
        f"quantity {quantity!r}"[:40]: (record(items=[item(), item("2", quantity)]), "items.1.quantity: ")
        for quantity in QUANTITIES
    },
    "10,001 units": (record(items=[item(quantity=10_001)]), "items: 10001 units of product '1', at most 10000"),
    "10,001 units after merging": (record(items=[item(quantity=5_001), item(quantity=5_000)]), "items: 10001 units"),
    "101 products": (record(items=[item(n) for n in range(101)]), "items: 101 products, at most 100"),
    **{
        f"{field} {text!r}": (record(**{field: text}), f"{field}: ")
        for field in ("user_id", "payment_method", "idempotency_key")
        for text in TEXTS
    },
    **{f"product id {text!r}": (record(items=[item(text)]), "items.0.product_id: ") for text in PRODUCT_IDS},
    "a user id of 65 characters": (record(user_id="x" * 65), "user_id: "),
    "a payment method of 65 characters": (record(payment_method="x" * 65), "payment_method: "),
    "a payment method that is a number": (record(payment_method=1), "payment_method: "),
    "a key of 201 characters": (record(idempotency_key="x" * 201), "idempotency_key: "),
    "a key that is a number": (record(idempotency_key=1), "idempotency_key: "),
    **{f"placed at {text!r}": (record(placed_at=text), "placed_at: ") for text in TIMES},
}


@pytest.mark.parametrize(("value", "detail"), INVALID.values(), ids=INVALID.keys())
def test_a_faulty_order_is_refused_and_the_field_is_named(value: Any, detail: str) -> None:
    # A field of a union reports a fault for each of its forms, so what is asked is where the first one is.
    reason, found = refusal(value)
    assert (reason, found[: len(detail)]) == ("invalid_order", detail)


def test_quantities_that_only_add_up_to_a_monstrous_number_are_refused() -> None:
    # Python refuses to print a number of more than 4,300 digits: the refusal itself must not fail over it.
    text = json.dumps(record(items=[item(), item()])).encode().replace(b'"quantity": 1', b'"quantity": ' + b"9" * 4_300)
    reason, detail = refusal(text)
    assert (reason, detail[:18]) == ("invalid_order", "items.0.quantity: ")


def test_every_fault_is_told_at_once() -> None:
    _, detail = refusal({"user_id": "", "items": [item(quantity=0)], "coupon": 1})
    assert all(name in detail for name in ("user_id: ", "items.0.quantity: ", "payment_method: ", "coupon: "))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (b'{"user_id":"u","user_id":"v","items":[{"product_id":"1","quantity":1}],"payment_method":"card"}', "user_id"),
        (b'{"user_id":"u","items":[{"product_id":"1","quantity":1,"quantity":9}],"payment_method":"a:b"}', "quantity"),
        (b'{"user_id":"u","items":[{"product_id":"1","quantity":1}],"items":[],"payment_method":"card"}', "items"),
        (
            rb'{"user_id":"u","items":[{"product_id":"1","quantity" :1,"qu\u0061ntity": 9}],"payment_method":"card"}',
            "quantity",
        ),
        (
            b'{"order_id":null,"order_id":null,"user_id":"u","items":[{"product_id":"1","quantity":1}],"payment_method":"c"}',
            "order_id",
        ),
    ],
)
def test_a_member_named_twice_is_refused(text: bytes, name: str) -> None:
    reason, detail = refusal(text)
    assert reason == "invalid_order"
    assert detail.startswith(f"{name}: ") or f"; {name}: " in detail


def test_the_bounds_are_the_settings() -> None:
    tight = Limits(lines=1, quantity=2, size_bytes=200)
    assert read(record(items=[item(quantity=2)]), tight).lines == (("1", 2),)
    assert refusal(record(items=[item(quantity=3)]), tight)[0] == "invalid_order"
    assert refusal(record(items=[item("1"), item("2")]), tight)[0] == "invalid_order"
    assert refusal(record(user_id="x" * 150), tight)[0] == "too_large"


# For any input

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ITEMS = st.lists(st.fixed_dictionaries({"product_id": JSON, "quantity": JSON}) | JSON, max_size=3)
ORDERLIKE = st.fixed_dictionaries(
    {"user_id": JSON, "items": ITEMS | JSON, "payment_method": JSON},
    optional={"order_id": JSON, "idempotency_key": JSON, "placed_at": JSON, "more": JSON},
)
SOUND = st.fixed_dictionaries(
    {
        "user_id": st.integers(0, 2**63 - 1) | st.text("ab:\" \\'é", max_size=66),
        "items": st.lists(
            st.fixed_dictionaries({"product_id": st.integers(0, 3), "quantity": st.integers(-1, 10_001)}), max_size=5
        ),
        "payment_method": st.sampled_from(["card", "cash on delivery", ""]),
    },
    optional={
        "order_id": st.uuids().map(str),
        "idempotency_key": st.text(max_size=4),
        "placed_at": st.datetimes(timezones=st.timezones() | st.just(UTC)).map(datetime.isoformat),
    },
)


def taken_or_refused(raw: bytes) -> Order | None:
    """Decode; whatever else than an order or a typed refusal comes out is the test's failure."""
    fault: InvalidRecord | None = None
    try:
        order = decode(raw, LIMITS, topic="orders", partition=0, offset=0, timestamp=0)
    except InvalidRecord as refused:
        fault = refused
    if fault is not None:
        assert fault.reason in {"empty", "too_large", "not_json", "invalid_order"}
        assert fault.detail
        return None
    assert 1 <= len(order.lines) <= LIMITS.lines
    assert all(1 <= quantity <= LIMITS.quantity for _, quantity in order.lines)
    assert len(dict(order.lines)) == len(order.lines)
    assert str(uuid.UUID(order.order_id)) == order.order_id
    texts = [order.user_id, order.payment_method, *dict(order.lines), order.idempotency_key or "-"]
    assert all(text and text.isprintable() and text == text.strip() for text in texts)
    if order.placed_at is not None:
        assert order.placed_at.utcoffset() == timedelta(0)
    return order


@given(st.binary(max_size=200))
@example(b"\xed\xa0\x80")
@example(b'"' * 65_537)
def test_any_bytes_are_an_order_or_a_refusal(raw: bytes) -> None:
    taken_or_refused(raw)


@given(JSON | ORDERLIKE)
def test_any_json_is_an_order_or_a_refusal(value: Any) -> None:
    taken_or_refused(json.dumps(value).encode())


@given(SOUND)
def test_an_order_that_is_nearly_sound_is_taken_whole_or_refused(value: dict[str, Any]) -> None:
    order = taken_or_refused(json.dumps(value).encode())
    sound = (
        value["items"]
        and all(line["quantity"] >= 1 for line in value["items"])
        and all(n <= LIMITS.quantity for n in totals(value["items"]).values())
    )
    if order is None:
        texts = [str(value["user_id"]), value["payment_method"], value.get("idempotency_key", "-")]
        plain = all(t and t == t.strip() and t.isprintable() and len(t) <= 64 for t in texts)
        both = "order_id" in value and "idempotency_key" in value
        of_a_key = str(value.get("order_id"))[14:15] == "8"
        assert not sound or not plain or both or of_a_key or "placed_at" in value
    else:
        assert sound
        assert dict(order.lines) == totals(value["items"])
        assert order.user_id == str(value["user_id"])


def totals(items: list[dict[str, Any]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for line in items:
        total[str(line["product_id"])] += line["quantity"]
    return dict(total)


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 1000))))
def test_merging_keeps_the_units_of_each_product_and_the_order_of_products(lines: list[tuple[str, int]]) -> None:
    merged = merge_lines(lines)
    assert [product_id for product_id, _ in merged] == list(dict.fromkeys(product_id for product_id, _ in lines))
    assert all(quantity == sum(q for p, q in lines if p == product_id) for product_id, quantity in merged)
    assert merge_lines(merged) == merged


# The words


def test_statuses_and_reasons_are_what_clients_and_the_database_know() -> None:
    assert [*Status] == ["CREATED", "RESERVED", "PAID", "CONFIRMED", "CANCELLED"]
    assert {*TERMINAL} == {"CONFIRMED", "CANCELLED"}
    assert {*Reason} == {
        "unknown_product",
        "insufficient_stock",
        "user_limit",
        "payment_declined",
        "expired",
        "cancelled_by_user",
    }


KEYED_ID = order_id_for_key("7", "k")


@pytest.mark.parametrize(
    ("value", "order_id"),
    [
        (b'{"order_id": "%b", "items": 7, "x": {"order_id": 1}}' % ORDER_ID.upper().encode(), ORDER_ID),
        (b'{"order_id": "%b", "order_id": "%b"}' % (ORDER_ID.encode(), ORDER_ID.encode()), None),
        (b'{"order_id": "%b"' % ORDER_ID.encode(), None),
        (b'["%b"]' % ORDER_ID.encode(), None),
        (b'{"order_id": "%b"}' % ORDER_ID.replace("-", "").encode(), None),
        (b'{"order_id": 7}', None),
        (b"[" * 100_000, None),
        (b"\xff", None),
        (None, None),
        (json.dumps({"order_id": KEYED_ID}).encode(), None),
        (json.dumps({"order_id": KEYED_ID, "user_id": 8, "idempotency_key": "k"}).encode(), None),
        (json.dumps({"order_id": KEYED_ID, "user_id": "\ud800", "idempotency_key": "k"}).encode(), None),
        (json.dumps({"order_id": KEYED_ID, "user_id": 7, "idempotency_key": "k"}).encode(), KEYED_ID),
    ],
    ids=range(13),
)
def test_what_is_no_order_may_still_name_one_that_is_its_senders(value: bytes | None, order_id: str | None) -> None:
    assert named(value) == order_id
