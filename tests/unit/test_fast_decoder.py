"""Two decoders, one verdict: what the fast one takes is what the models make of it; they decide, and describe, the rest."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from itertools import combinations
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orderstream.bench.load import Load, catalogue, draw
from orderstream.errors import InvalidRecord
from orderstream.jobs.invoices import read_orders
from orderstream.streams import orders
from orderstream.streams.orders import (
    INTEGER_END,
    ORDER_NAMESPACE,
    Limits,
    Order,
    decode,
    decode_plain,
    decode_strictly,
    encode,
    new_order_id,
    order_id_for_key,
    order_id_for_source,
)
from tests.chaos.test_poison import POISON
from tests.unit.test_orders import INVALID, JSON, LIMITS, NOT_JSON, ORDERLIKE, SOUND, item, record

DATA = Path(__file__).resolve().parents[2] / "data"
PLACE = ("orders", 3, 17, 1_700_000_000_000)
SOURCE: Any = dict(zip(("topic", "partition", "offset", "timestamp"), PLACE, strict=True))
ID = "5e6e7e1c-2f52-4d2b-9a55-5d0e5a0c9a11"
KEYED = order_id_for_key("u-1", "k")
TIGHT = Limits(lines=2, quantity=3, size_bytes=400)


def outcome(decoder: Callable[[], Order]) -> Order | tuple[str, str]:
    """Return the order, or the reason and the detail of its refusal."""
    try:
        return decoder()
    except InvalidRecord as refused:
        return refused.reason, refused.detail


def taken(value: bytes, limits: Limits = LIMITS) -> bool:
    """Hold the decoders to the same verdict; tell whether the fast one took the order."""
    found = outcome(lambda: decode(value, limits, **SOURCE))
    if not value or len(value) > limits.size_bytes:
        assert not isinstance(found, Order)
        return False
    strict = outcome(lambda: decode_strictly(value, limits, *PLACE))
    assert found == strict
    assert repr(found) == repr(strict), "equal, of another type"
    plain = decode_plain(value, limits, *PLACE)
    assert plain is None or (plain, repr(plain)) == (strict, repr(strict))
    return plain is not None


def text(**members: str) -> bytes:
    """Return a sound record as it is written, some members exchanged for this text; "" leaves one out."""
    written = {
        "user_id": '"u-1"',
        "items": '[{"product_id":"1","quantity":1}]',
        "payment_method": '"card"',
        **members,
    }
    return ("{" + ",".join(f'"{name}":{value}' for name, value in written.items() if value) + "}").encode()


# Ordinary orders are taken by the fast one


@pytest.mark.parametrize("lines", [1, 3, 20])
def test_the_orders_of_the_benchmarks_are_taken(lines: int) -> None:
    load = Load(catalogue(100), lines_max=lines)
    values = [drawn.value for drawn in draw(load, 200, "seed")]
    assert all(taken(value) for value in values)
    assert all(taken(json.dumps(orjson.loads(value)).encode()) for value in values), "with a space behind each colon"


@pytest.mark.parametrize("file", sorted(DATA.glob("*.csv")), ids=lambda file: file.name)
def test_the_orders_of_the_data_set_are_taken(file: Path) -> None:
    found = [order for _, order in zip(range(500), read_orders(file, LIMITS)[1], strict=False)]
    assert found
    assert all(taken(encode(order)) for order in found)


@pytest.mark.parametrize("key", [None, "k", "a:b", "two words"])
@pytest.mark.parametrize("placed_at", [None, datetime.now(UTC), datetime(2025, 1, 31, 12, tzinfo=UTC)])
def test_the_orders_of_the_ingress_are_taken(key: str | None, placed_at: datetime | None) -> None:
    order_id = new_order_id() if key is None else order_id_for_key("user-1", key)
    order = Order(order_id, "user-1", (("p1", 1), ("p2", 10_000)), "cash on delivery", key, placed_at)
    assert taken(encode(order))
    assert decode_plain(encode(order), LIMITS, *PLACE) == order


def test_the_models_are_not_asked_about_an_ordinary_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(orders, "decode_strictly")
    assert decode(text(), LIMITS, **SOURCE).order_id == order_id_for_source(*PLACE)


PLAIN = {
    "numbers as ids": text(user_id="7", items='[{"product_id":9223372036854775807,"quantity":1}]'),
    "a product as number and as text": text(
        items='[{"product_id":5,"quantity":1},{"quantity":2,"product_id":"5"},{"product_id":"a","quantity":1}]'
    ),
    "all members": text(order_id=f'"{KEYED}"', idempotency_key='"k"', placed_at='"2025-01-31T12:00:00.250+05:30"'),
    "a bare time": text(placed_at='"2025-01-31T12:00:00Z"'),
    "colons in texts": text(user_id='"a:b:c"', placed_at='"0001-01-01T00:00:00-00:00"'),
    "spaces in texts": text(user_id='"a b"'),
    "the longest texts": text(
        user_id=f'"{"x" * 64}"', payment_method=f'"{"x" * 64}"', idempotency_key=f'"{"x" * 200}"'
    ),
    "spaces around all": text(items='[ { "quantity" : 1 , "product_id" : "1" } ]').replace(b",", b"  ,  ") + b"  ",
}


@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN.keys())
def test_plain_orders_are_taken_in_every_form(value: bytes) -> None:
    assert taken(value)


# What it is not sure of, it leaves to the models: sound or not

SURROUNDED = [b"\xef\xbb\xbf" + text(), text()[:-1], *(text() + byte for byte in (b"\0", b",", b"}", b"{}", b"\n\x1a"))]
DOUBLED = [
    text(user_id='"u","user_id":"v"'),
    text(user_id='"u","user_id":null'),
    text(user_id='"a:b","user_id":"c"'),
    text(user_id='"u","us\\u0065r_id":"v"'),
    text(items='[],"items":[{"product_id":"1","quantity":1}]'),
    text(items='[{"product_id":"1","quantity":1,"quantity":1}]'),
    text(items='[{"product_id":"1","quantity":1,"product_id":"a:b"}]'),
    text(idempotency_key='null,"idempotency_key":"k"'),
    text(order_id=f'null,"order_id":"{ID}"'),
    text(placed_at='"2025-01-31T12:00:00Z","placed_at":null'),
]
NAMES = [text(**{name: "1"}) for name in ("v", "User_id", "user_id ", "", "userId", "order")]
TEXTS = [
    *('""', '" "', '" a"', '"a "', '"a\tb"', '"a\\tb"', '"a\\u0000"', '"a\\nb"', '"\\u0061"', '"a\\/b"', '"\\ud800"'),
    *('"\\ud83d\\ude00"', '"名"', '"é"', '"a\x7f"', '"\xa0a"', '"a\u200b"', '"\u0661"', '"a\\"b"', '"a\\\\"', '"\x1f"'),
    *("null", "true", "[]", "{}", "'a'", "a", f'"{"x" * 65}"', f'"{"x" * 201}"', f'"{"é" * 64}"', '"a:b"', '"a": "b"'),
]
NUMBERS = [
    *("0", "-0", "1", "-1", "1.0", "1.5", "0.0", "1e0", "1E2", "1e400", "01", "+1", "1.", ".5", "0x1", "1_0", "--1"),
    *(str(n) for n in (2**31, 2**53 + 1, INTEGER_END - 1, INTEGER_END, 2**64, -INTEGER_END, 10**30)),
    *("9" * 400, "9" * 5_000, "1" + "0" * 400 + ".0", "\u0661", "NaN", "Infinity", "-Infinity", '"1"', '"NaN"'),
    *("true", "false", "null"),
]
IDS = [
    *(ID.upper(), ID.replace("-", ""), f"{{{ID}}}", f"urn:uuid:{ID}", f" {ID}", f"{ID} ", ID[:-1], ID + "0"),
    *(ID.replace("-", "_"), ID.replace("-2f52", "2f52-"), "0" * 36, "-" * 36, "", ID[:-1] + "\u0661", ID[:-2] + "0x"),
    *(ID[:-1] + "g", str(uuid.UUID(int=0)), str(uuid.UUID(int=2**128 - 1)), KEYED, KEYED.upper()),
]
TIMES = [
    *("2025-01-31t12:00:00z", "2025-01-31T12:00:00z", "2025-01-31 12:00:00Z", "2025-01-31T12:00:00", "yesterday"),
    *("2025-01-31T12:00:00.Z", "2025-01-31T12:00:00.5Z", "2025-01-31T12:00:00,500Z", "2025-01-31T12:00:00.1234567Z"),
    *("2025-01-31T12:00:00.123456789+00:00", "2025-01-31T12:00:00+0000", "2025-01-31T12:00:00+00", "2025-01-31T12Z"),
    *("2025-01-31T12:00:00+00:00:30", "2025-01-31T12:00:00 Z", "2025-01-31T12:00:00\u221200:00", "20250131T120000Z"),
    *("2025-W05-5T12:00:00Z", "2025-031T12:00:00Z", "0000-01-01T00:00:00Z", "0001-01-01T00:00:00+00:01"),
    *("9999-12-31T23:59:59-00:01", "9999-12-31T23:59:60Z", "2016-12-31T23:59:60Z", "2025-01-31T12:00:00Z "),
    *("2025-02-29T12:00:00Z", "2024-02-29T12:00:00Z", "1900-02-29T12:00:00Z", "2000-02-29T12:00:00.999999Z"),
    *("2025-01-31T24:00:00Z", "2025-01-31T23:60:00Z", "2025-00-31T12:00:00Z", "2025-01-00T12:00:00Z"),
    *("2025-01-31T12:00Z", "10000-01-01T00:00:00Z", "\u0662025-01-31T12:00:00Z"),
]
NASTY: list[bytes] = [
    *SURROUNDED,
    *DOUBLED,
    *NAMES,
    *(text(**{name: value}) for name in ("user_id", "payment_method", "idempotency_key") for value in TEXTS + NUMBERS),
    *(text(items=f'[{{"product_id":{value},"quantity":1}}]') for value in TEXTS + NUMBERS),
    *(text(items=f'[{{"product_id":"1","quantity":{value}}}]') for value in TEXTS + NUMBERS),
    *(text(items=value) for value in TEXTS + NUMBERS),
    *(text(items=f"[{value}]") for value in TEXTS + NUMBERS),
    *(text(items='[{"product_id":"1","quantity":1},]'), text(items='[{"product_id":"1","quantity":1,}]')),
    *(text(order_id=value) for value in TEXTS + NUMBERS),
    *(text(order_id=json.dumps(value, ensure_ascii=False)) for value in IDS),
    *(text(order_id=json.dumps(value), idempotency_key='"k"') for value in IDS),
    *(text(placed_at=value) for value in TEXTS + NUMBERS),
    *(text(placed_at=json.dumps(value, ensure_ascii=False)) for value in TIMES),
    *(text(user_id=value) for value in ("[" * 5_000, '{"a":' * 5_000, "[" * 300 + "]" * 300)),
    *(text().replace(b",", space + b"," + space) for space in (b"\t", b"\r\n", b"\x0b", b"\x0c", b"\0", b"\xc2\xa0")),
    *(text().replace(b"card", byte) for byte in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80")),
    *(text().replace(b'"', b"'"), text() + b"// sound", b"/**/" + text(), text().upper()),
]


@pytest.mark.parametrize("limits", [LIMITS, TIGHT, Limits(1, 2**70, 10**6)], ids=["usual", "tight", "wide"])
def test_nasty_records_have_one_verdict(limits: Limits) -> None:
    for value in NASTY:
        taken(value, limits)


def test_doubled_members_and_what_surrounds_an_order_are_not_taken() -> None:
    assert not any(taken(value) for value in SURROUNDED + DOUBLED + NAMES)


def test_every_kind_of_poison_and_of_fault_has_one_verdict() -> None:
    poison = [value for kinds in POISON.values() for value, _ in kinds if value is not None]
    faulty = [json.dumps(value).encode() for value, _ in INVALID.values()]
    assert not any(taken(value) for value in [*poison, *NOT_JSON.values(), *faulty])


def test_bounds_are_kept_to_the_unit() -> None:
    for count in (1, 2, 3):
        for quantity in (1, 2, 3, 4):
            for names in ("abc", "aaa", "aba"):
                lines = [item(name, quantity) for name in names[:count]]
                merged: dict[str, int] = {}
                for line in lines:
                    merged[line["product_id"]] = merged.get(line["product_id"], 0) + quantity
                within = len(merged) <= TIGHT.lines and max(merged.values()) <= TIGHT.quantity
                assert taken(json.dumps(record(items=lines)).encode(), TIGHT) is within


def test_every_offset_and_every_time_of_day_has_one_verdict() -> None:
    offsets = [f"{sign}{hour:02}:{minute:02}" for sign in "+-" for hour in (*range(26), 99) for minute in range(100)]
    clocks = [f"{h:02}:{m:02}:{s:02}" for h in range(26) for m in (0, 59, 60, 99) for s in (0, 59, 60, 61)]
    days = [f"{year:04}-{month:02}-{day:02}" for year in (1900, 2000, 2025) for month in range(14) for day in range(33)]
    times = [
        *(f"2025-01-31T12:00:00{offset}" for offset in offsets),
        *(f"2025-01-31T{clock}Z" for clock in clocks),
        *(f"{day}T12:00:00.250000+00:00" for day in days),
    ]
    sound = sum(taken(text(placed_at=f'"{at}"')) for at in times)
    assert sound == 2 * 24 * 60 + 24 * 2 * 2 + (365 + 366 + 365)


# For any input


def mostly(sound: st.SearchStrategy[str], odd: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Draw something sound nine times in ten, so that an order of several members is sound now and then."""
    return st.sampled_from([sound] * 9 + [odd]).flatmap(lambda chosen: chosen)


STRINGS = st.text(max_size=3).map(json.dumps) | st.sampled_from(TEXTS)
NAMED = mostly(
    st.sampled_from(['"a"', '"a b"', '"a:b"', '"p-1"', '"\\u00e9"', "7"]), STRINGS | st.sampled_from(NUMBERS)
)
QUANTITIES = mostly(
    st.integers(1, 5).map(str), st.integers().map(str) | st.floats().map(json.dumps) | st.sampled_from(NUMBERS)
)
SPACE = mostly(st.sampled_from(["", " "]), st.sampled_from(["  ", "\n", "\t", "\0"]))
ZONES = st.integers(-1_439, 1_439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
MOMENTS = st.datetimes(timezones=ZONES | st.just(UTC)).map(datetime.isoformat)


@st.composite
def objects(draw: st.DrawFn, members: dict[str, st.SearchStrategy[str]], required: int) -> str:
    """Write an object: its members in any order, some left out, some twice."""
    names = list(members)
    chosen = [
        *names[:required],
        *draw(st.sampled_from([(), *combinations(names[required:], 1), *combinations(names[required:], 2)])),
    ]
    if draw(st.sampled_from(range(20))) == 0:
        chosen.append(draw(st.sampled_from([*names, "more"])))
    if draw(st.sampled_from(range(20))) == 0:
        chosen.pop(draw(st.integers(0, len(chosen) - 1)))
    chosen = draw(st.permutations(chosen))
    s = [draw(SPACE) for _ in range(3)]
    body = f"{s[0]},{s[1]}".join(f'"{name}"{s[2]}:{draw(members.get(name, STRINGS))}' for name in chosen)
    return f"{{{s[1]}{body}{s[2]}}}"


LINES = st.lists(objects({"product_id": NAMED, "quantity": QUANTITIES}, 2), min_size=1, max_size=3).map(
    lambda lines: f"[{','.join(lines)}]"
)
WRITTEN = objects(
    {
        "user_id": NAMED,
        "items": mostly(LINES, STRINGS),
        "payment_method": mostly(st.sampled_from(['"card"', '"on delivery"']), STRINGS),
        "order_id": mostly(st.uuids().map(lambda found: f'"{found}"'), st.sampled_from(IDS).map(json.dumps) | STRINGS),
        "idempotency_key": mostly(st.sampled_from(['"k"', '"a:b"', "null"]), STRINGS),
        "placed_at": mostly(MOMENTS.map(json.dumps), st.sampled_from(TIMES).map(json.dumps) | STRINGS),
    },
    3,
).map(lambda written: written.encode("utf-8", "surrogatepass"))
SEEDS = st.sampled_from([*PLAIN.values(), *DOUBLED]) | SOUND.map(lambda value: json.dumps(value).encode())
BYTES = st.sampled_from([*b'{}[]":,\\ \n\t0123456789.eE+-nulatrsfZT\0\x7f\xff\xc3\xa9'])


@given(WRITTEN, st.sampled_from([LIMITS, TIGHT]))
@settings(max_examples=400)
def test_whatever_is_written_like_an_order_has_one_verdict(value: bytes, limits: Limits) -> None:
    taken(value, limits)


@given(SEEDS, st.lists(st.tuples(st.integers(0, 400), st.sampled_from("-+="), BYTES), max_size=2))
@settings(max_examples=400)
def test_an_order_that_was_damaged_has_one_verdict(value: bytes, damage: list[tuple[int, str, int]]) -> None:
    damaged = bytearray(value)
    for at, what, byte in damage:
        place = at % (len(damaged) or 1)
        damaged[place : place + (what != "+")] = b"" if what == "-" else bytes([byte])
    taken(bytes(damaged))


@given(SEEDS, SEEDS, st.integers(0, 200), st.integers(0, 200))
def test_two_orders_cut_and_joined_have_one_verdict(one: bytes, other: bytes, end: int, start: int) -> None:
    taken(one[:end] + other[start:])


@given(st.binary(max_size=200))
@example(b"\xed\xa0\x80")
@example(b'"' * 65_537)
def test_any_bytes_have_one_verdict(value: bytes) -> None:
    taken(value)


@given(JSON | ORDERLIKE | SOUND)
def test_any_json_has_one_verdict(value: Any) -> None:
    taken(json.dumps(value).encode())
    taken(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))


def test_single_bytes_changed_everywhere_have_one_verdict() -> None:
    value = PLAIN["all members"]
    dice = random.Random(1)
    for at in range(len(value)):
        for byte in (*b'":, \\019aZ}]', 0, 0x80, dice.randrange(256)):
            taken(value[:at] + bytes([byte]) + value[at + 1 :])
        taken(value[:at] + value[at + 1 :])
        taken(value[:at] + value[at : at + 1] + value[at:])


# Ids that are derived


@given(st.text(), st.text(), st.integers(0), st.integers(0), st.integers(-1))
def test_derived_ids_are_of_version_8_and_5(one: str, other: str, partition: int, offset: int, at: int) -> None:
    named = str(uuid.uuid5(ORDER_NAMESPACE, f"key\0{one}\0{other}"))
    assert order_id_for_key(one, other) == f"{named[:14]}8{named[15:]}"
    source = f"source\0{one}\0{partition}\0{offset}\0{at}"
    assert order_id_for_source(one, partition, offset, at) == str(uuid.uuid5(ORDER_NAMESPACE, source))
