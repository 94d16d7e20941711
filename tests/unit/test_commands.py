"""Commands over orders and stock, as people and timers write them: what is taken, what is refused, and why."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderstream.errors import InvalidRecord
from orderstream.streams.commands import (
    CHANGE_MAX,
    COMMAND_BYTES_MAX,
    NAME_CHARS_MAX,
    PRICE_CENTS_MAX,
    QUANTITY_MAX,
    REASON_CHARS_MAX,
    decode_order_command,
    decode_stock_command,
    stock_command,
)
from orderstream.streams.partitions import product_partition

ID = "5e6e7e1c-2f52-4d2b-9a55-5d0e5a0c9a11"
CANCEL = {"command": "cancel", "order_id": ID}
RECEIVE = {"command": "receive", "command_id": ID, "product_id": "1", "quantity": 5}
RECOUNT = {"command": "recount", "command_id": ID, "product_id": "1"}
ADJUST = {"command": "adjust", "command_id": ID, "product_id": "1", "quantity": -5, "reason": "broken"}
PRODUCT = {"command": "product", "command_id": ID, "product_id": "1", "name": "Cup", "price_cents": 300}
LIMIT = {"command": "limit", "command_id": ID, "product_id": "1", "limit_per_user": 3}
SET = {"command": "set", "command_id": ID, "product_id": "1", "quantity": 5, "reason": "counted"}


COMMANDS = ("receive", "adjust", "set", "recount", "product", "limit", "cancel", "expire")


def raw(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def without(command: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in command.items() if key != name}


# Orders


def test_an_order_is_cancelled_by_its_id() -> None:
    decoded = decode_order_command(raw({"command": "cancel", "order_id": ID.upper()}))
    assert (decoded.command, str(decoded.order_id)) == ("cancel", ID)


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        (b"", "empty", "the record has no value"),
        (b"cancel", "not_json", "record: "),
        (b"[" * 10_000, "not_json", "record: "),
        (b"[]", "invalid_command", "record: "),
        (b"null", "invalid_command", "record: "),
        ({**CANCEL, "command": "Cancel"}, "invalid_command", "command: "),
        ({**CANCEL, "command": "receive"}, "invalid_command", "command: "),
        ({**CANCEL, "command": "expire"}, "invalid_command", "command: "),
        ({**CANCEL, "command": None}, "invalid_command", "command: "),
        ({**CANCEL, "order_id": "17"}, "invalid_command", "order_id: "),
        ({**CANCEL, "order_id": 17}, "invalid_command", "order_id: "),
        (without(CANCEL, "order_id"), "invalid_command", "order_id: "),
        (without(CANCEL, "command"), "invalid_command", "command: "),
        ({**CANCEL, "why": "x"}, "invalid_command", "why: "),
        (raw(CANCEL).replace(b"{", b'{"command": "expire", '), "invalid_command", "command: named more than once"),
    ],
)
def test_a_faulty_order_command_is_refused_and_the_field_is_named(value: Any, reason: str, detail: str) -> None:
    with pytest.raises(InvalidRecord) as caught:
        decode_order_command(raw(value))
    assert (caught.value.reason, caught.value.detail[: len(detail)]) == (reason, detail)


def test_a_command_that_is_padded_beyond_its_bound_is_refused() -> None:
    for decode, command in ((decode_order_command, CANCEL), (decode_stock_command, RECEIVE)):
        padded = raw(command).ljust(COMMAND_BYTES_MAX)
        decode(padded)
        with pytest.raises(InvalidRecord, match="too_large: 16385 bytes, at most 16384"):
            decode(padded + b" ")


# Stock


def test_stock_is_received_and_a_reason_may_be_given() -> None:
    decoded = decode_stock_command(raw(RECEIVE))
    assert (decoded.command, decoded.product_id, decoded.quantity, decoded.reason) == ("receive", "1", 5, "")
    assert str(decoded.command_id) == ID
    assert decode_stock_command(raw({**RECEIVE, "product_id": 7, "reason": "delivery 12"})).product_id == "7"


def test_stock_is_adjusted_both_ways_with_a_reason() -> None:
    assert decode_stock_command(raw(ADJUST)).quantity == -5
    assert decode_stock_command(raw({**ADJUST, "quantity": 5})).quantity == 5


def test_stock_is_set_with_a_reason_and_what_that_moved_is_another_record() -> None:
    decoded = decode_stock_command(raw(SET))
    assert (decoded.command, decoded.quantity, decoded.is_open) == ("set", 5, True)
    assert decode_stock_command(raw({**SET, "quantity": 0})).quantity == 0
    told = decode_stock_command(decoded.model_copy(update={"change": -CHANGE_MAX}).encode())
    assert (told.command, told.quantity, told.is_open, told.moved) == ("set", 5, False, -CHANGE_MAX)
    assert decode_stock_command(raw({**SET, "change": None})) == decoded == decode_stock_command(decoded.encode())


def test_a_recount_names_a_product_and_moves_nothing() -> None:
    assert decode_stock_command(raw(RECOUNT)).quantity == 0
    decoded = decode_stock_command(raw({**RECOUNT, "quantity": 0, "reason": "after a repair"}))
    assert (decoded.command, decoded.product_id, decoded.quantity) == ("recount", "1", 0)


def test_a_product_gets_a_name_or_a_price_or_both_and_is_limited_or_not() -> None:
    found = [
        decode_stock_command(raw(command)).content
        for command in (
            PRODUCT,
            without(PRODUCT, "name"),
            {**PRODUCT, "price_cents": None},
            LIMIT,
            {**LIMIT, "limit_per_user": None},
            {**PRODUCT, "was": None, "limit_per_user": None, "actor": "ann"},
            {**without(without(PRODUCT, "name"), "price_cents"), "retired": True},
        )
    ]
    assert found == [
        ("1", "product", 0, "Cup", 300, "", None),
        ("1", "product", 0, None, 300, "", None),
        ("1", "product", 0, "Cup", None, "", None),
        ("1", "limit", 3, None, None, "", None),
        ("1", "limit", 0, None, None, "", None),
        ("1", "product", 0, "Cup", 300, "", '{"limit_per_user":null,"was":null}'),
        ("1", "product", 0, None, None, "", '{"retired":true}'),
    ]


@pytest.mark.parametrize("command", [RECEIVE, ADJUST, PRODUCT, LIMIT, {**LIMIT, "limit_per_user": None}, RECOUNT])
def test_what_is_encoded_is_decoded(command: dict[str, Any]) -> None:
    decoded = decode_stock_command(raw(command))
    assert decode_stock_command(decoded.encode()) == decoded
    here = product_partition("1", 8)
    counts = decoded if command is not RECOUNT else None
    assert stock_command(raw(command), here, 8) == counts
    assert stock_command(raw(command), here + 1, 8) is None


def test_the_bounds_themselves_are_within() -> None:
    assert decode_stock_command(raw({**PRODUCT, "price_cents": PRICE_CENTS_MAX})).price_cents == PRICE_CENTS_MAX
    assert decode_stock_command(raw({**PRODUCT, "name": "x" * NAME_CHARS_MAX})).name == "x" * NAME_CHARS_MAX
    assert decode_stock_command(raw({**LIMIT, "limit_per_user": 2**31 - 1})).limit_per_user == 2**31 - 1
    assert decode_stock_command(raw({**RECEIVE, "quantity": QUANTITY_MAX})).quantity == QUANTITY_MAX
    assert decode_stock_command(raw({**ADJUST, "quantity": -QUANTITY_MAX})).quantity == -QUANTITY_MAX
    assert len(decode_stock_command(raw({**ADJUST, "reason": "x" * REASON_CHARS_MAX})).reason) == REASON_CHARS_MAX


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        ({**RECEIVE, "quantity": 0}, "record: receive needs"),
        ({**RECEIVE, "quantity": -5}, "record: receive needs"),
        ({**ADJUST, "quantity": 0}, "record: adjust needs a quantity other than 0"),
        (without(ADJUST, "reason"), "record: adjust needs a reason"),
        ({**ADJUST, "reason": ""}, "record: adjust needs a reason"),
        ({**ADJUST, "reason": "   "}, "record: adjust needs a reason"),
        ({**ADJUST, "reason": "a\nb"}, "reason: "),
        ({**ADJUST, "reason": "a\0b"}, "reason: "),
        ({**ADJUST, "reason": "x" * (REASON_CHARS_MAX + 1)}, "reason: "),
        ({**ADJUST, "reason": 5}, "reason: "),
        *(
            ({**RECEIVE, "quantity": quantity}, "quantity: ")
            for quantity in (1.5, "5", True, None, QUANTITY_MAX + 1, 10**4_000)
        ),
        ({**ADJUST, "quantity": -QUANTITY_MAX - 1}, "quantity: "),
        *(
            ({**RECEIVE, "product_id": product_id}, "product_id: ")
            for product_id in ("", " 1", "a\0b", -1, None, "x" * 65, ".", "..")
        ),
        ({**SET, "quantity": -1}, "record: set needs a quantity of at least 0, not -1"),
        (without(SET, "reason"), "record: set needs a reason"),
        ({**SET, "reason": " "}, "record: set needs a reason"),
        (without(SET, "quantity"), "quantity: Field required"),
        *(({**SET, "change": change}, "change: ") for change in ("1", 1.5, True, CHANGE_MAX + 1, -CHANGE_MAX - 1)),
        *(({**one, "change": 1}, f"record: {one['command']} has no change") for one in (RECEIVE, ADJUST, RECOUNT)),
        ({**RECOUNT, "quantity": 1}, "record: recount moves nothing"),
        ({**RECOUNT, "quantity": -1}, "record: recount moves nothing"),
        ({**RECOUNT, "quantity": None}, "quantity: "),
        *((without(RECOUNT, name), f"{name}: ") for name in RECOUNT),
        (raw(RECOUNT).replace(b"{", b'{"product_id": "1", '), "product_id: named more than once"),
        (without(ADJUST, "quantity"), "quantity: Field required"),
        *(({**RECEIVE, "command_id": command_id}, "command_id: ") for command_id in ("", "17", 17, None)),
        *((without(RECEIVE, name), f"{name}: ") for name in RECEIVE),
        *(({**PRODUCT, "price_cents": price}, "price_cents: ") for price in (-1, 1.5, "3", PRICE_CENTS_MAX + 1)),
        *(({**PRODUCT, "name": name}, "name: ") for name in ("", " x", "a\nb", 5, "x" * (NAME_CHARS_MAX + 1))),
        ({**PRODUCT, "quantity": 1}, "record: product moves nothing"),
        ({**PRODUCT, "limit_per_user": 0}, "limit_per_user: "),
        (without(without(PRODUCT, "name"), "price_cents"), "record: product needs a name, a price_cents or retired"),
        ({**PRODUCT, "name": None, "price_cents": None}, "record: product needs a name, a price_cents or retired"),
        *(({**LIMIT, "limit_per_user": limit}, "limit_per_user: ") for limit in (0, -1, 1.5, "3", 2**31)),
        ({**LIMIT, "quantity": 3}, "record: limit moves nothing"),
        (without(LIMIT, "limit_per_user"), "record: limit needs a limit_per_user"),
        ({**RECEIVE, "name": "x"}, "record: receive has no name"),
        ({**LIMIT, "retired": True}, "record: limit has no retired"),
        ({**PRODUCT, "retired": "yes"}, "retired: "),
        ({**PRODUCT, "was": {"name": "x"}}, "was."),
        *(({**RECEIVE, "actor": actor}, "actor: ") for actor in ("", " ann", "a\nb", "x" * 65, 7)),
        ({**RECEIVE, "command": "cancel"}, "command: "),
        ({**RECEIVE, "price": 5}, "price: "),
        (raw(RECEIVE).replace(b"{", b'{"quantity": 50, '), "quantity: named more than once"),
    ],
)
def test_a_faulty_stock_command_is_refused_and_the_field_is_named(value: Any, detail: str) -> None:
    with pytest.raises(InvalidRecord) as caught:
        decode_stock_command(raw(value))
    assert (caught.value.reason, caught.value.detail[: len(detail)]) == ("invalid_command", detail)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
)
UUIDS = st.uuids().map(str) | JSON


@given(
    st.binary(max_size=100)
    | JSON.map(raw)
    | st.fixed_dictionaries(
        {"command": st.sampled_from(COMMANDS) | JSON},
        optional={
            "order_id": UUIDS,
            "command_id": UUIDS,
            "product_id": JSON | st.integers(0, 9),
            "quantity": JSON,
            "reason": JSON,
            "name": JSON,
            "price_cents": JSON,
            "limit_per_user": JSON,
            "change": JSON,
        },
    ).map(raw)
)
def test_any_bytes_are_a_command_or_a_refusal(value: bytes) -> None:
    taken = []
    for decode in (decode_order_command, decode_stock_command):
        try:
            taken.append(decode(value))
        except InvalidRecord:
            continue
    assert len(taken) < 2, "no record is a command over both"
    for command in taken:
        identity = getattr(command, "order_id", None) or getattr(command, "command_id", None)
        assert isinstance(identity, uuid.UUID)
