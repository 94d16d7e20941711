"""Dead letters without engines: ids, what is sent again for each source topic, bytes that can't hurt a terminal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderstream.console import table
from orderstream.errors import InvalidRecord, OrderstreamError
from orderstream.jobs.cli.shown import (
    SHOWN_BYTES_MAX,
    SHOWN_CHARS_MAX,
    form_of,
    printable,
    show_letter,
    show_letters,
    show_products,
    shown,
)
from orderstream.jobs.letters import SOURCES, Listing, to_send
from orderstream.settings import Settings
from orderstream.sql.letters import Handling
from orderstream.streams.codec import encode_rows
from orderstream.streams.dead_letters import CARRIED_BYTES_MAX, dead_letter
from orderstream.streams.headers import HEADERS_BYTES_MAX
from orderstream.streams.letters import STORY, Letter, LetterId, parse_id, read, without_copies
from orderstream.streams.lines import LineStands, LineWanted
from orderstream.streams.orders import Limits, decode, order_id_for_key, order_id_for_source
from orderstream.streams.partitions import order_partition, product_partition
from orderstream.streams.places import Place

SETTINGS = Settings(_env_file=None, topic_prefix="p.")
N = SETTINGS.partitions
LIMITS = Limits(SETTINGS.order_lines_max, SETTINGS.line_quantity_max, SETTINGS.order_bytes_max)
ORDER_ID = "5e6e7e1c-2f52-4d2b-9a55-5d0e5a0c9a11"
ORDER = {"user_id": "u", "items": [{"product_id": "b", "quantity": 1}], "payment_method": "card"}
STOCK = {"command": "receive", "command_id": ORDER_ID, "product_id": 7, "quantity": 1}


def kafka_record(value: bytes | None, headers: Sequence[tuple[str, bytes | None]], key: bytes | None = b"k") -> Any:
    return SimpleNamespace(partition=2, offset=40, timestamp=1_700_000_000_123, key=key, value=value, headers=headers)


def letter(topic: str, value: bytes | None, headers: Any = (), partition: int = 3) -> Letter:
    fault = InvalidRecord("invalid_order", "a fault")
    where: dict[str, Any] = {"topic": f"p.{topic}", "partition": partition, "offset": 17, "timestamp": 5}
    made = dead_letter(fault, **where, key=b"k", value=value, headers=headers)
    return read(kafka_record(made.value, list(made.headers), made.key))


# Ids and reading


@given(st.integers(0, 10**9 - 1), st.integers(0, 10**18 - 1))
def test_an_id_is_read_as_it_is_written(partition: int, offset: int) -> None:
    assert parse_id(str(LetterId(partition, offset))) == (partition, offset)


@pytest.mark.parametrize(
    "text", ["", "3", "3/", "/17", "3:17", "-1/0", "3/1 ", "\uff13/1", "3/1/2", "1e3/1", "9" * 5_000 + "/1"]
)
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="PARTITION/OFFSET"):
        parse_id(text)


def test_a_letter_tells_its_story_and_keeps_the_records_own_headers_apart() -> None:
    found = letter("orders", b"v", [("trace", b"\xff"), ("retry-of", b"1/2"), ("reason", b"forged"), ("n", None)])
    assert found.id == (2, 40)
    assert found.at == datetime(2023, 11, 14, 22, 13, 20, 123_000, tzinfo=UTC)
    assert (found.reason, found.detail, found.source) == ("invalid_order", "a fault", Place("p.orders", 3, 17))
    assert found.headers == (("trace", b"\xff"), ("retry-of", b"1/2"), ("n", None))
    assert (found.retry_of, found.cut_from) == ("1/2", None)
    assert found.size == len(b"kv" + b"trace\xff" + b"retry-of1/2" + b"n")


def test_a_letter_has_as_many_bytes_in_the_list_as_alone(capsys: pytest.CaptureFixture[str]) -> None:
    one = letter("orders", b"v" * 1_200, [("trace", b"abc")])
    show_letters(Listing([(one, Handling())], Counter(["invalid_order"]), Counter(["open"])), "")
    listed = capsys.readouterr().out
    show_letter(one, Handling())
    alone = capsys.readouterr().out
    assert listed.splitlines()[1].split()[-1] == "1,209"
    assert "     bytes  1,209: value, key and headers" in alone
    assert "     value  1,200 bytes" in alone


def test_products_show_whether_they_are_retired(capsys: pytest.CaptureFixture[str]) -> None:
    counts = dict.fromkeys(("price_cents", "available", "reserved", "sold", "initial", "received", "adjusted"), 0)
    show_products([{"product_id": f"{there}", "name": "Cup", "retired": there, **counts} for there in (True, False)])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "retired"
    assert [(row.split()[0], row.split()[-1]) for row in rows] == [("True", "yes"), ("False", "no")]


def test_of_letters_of_one_record_the_first_counts() -> None:
    first, other = letter("orders", b"v"), letter("orders", b"v", partition=4)
    # A topic that was created again has other records in the same places; a letter that does not name its place is alone.
    recreated, placeless = letter("orders", b"w"), letter("orders", b"v")._replace(source=None)
    keyed = first._replace(key=b"kv", value=b"")
    seen: set[bytes] = set()
    all_of_them = [first, other, recreated, placeless, placeless, keyed]
    assert without_copies([first, *all_of_them, recreated], seen) == all_of_them
    assert without_copies([first, keyed, placeless], seen) == [placeless], "on the next page, too"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("source-topic", b"x")],
        [("source-topic", b"x"), ("source-partition", b"1"), ("source-offset", b"1")],
        [("source-topic", b"x"), ("source-partition", b"1"), ("source-offset", b"-1")],
        [("source-topic", b"x"), ("source-partition", b"\xff"), ("source-offset", b"9" * 5_000)],
        [("source-topic", None), ("source-partition", b"1"), ("source-offset", b"1"), ("cut-from", b"much")],
    ],
)
def test_a_letter_that_no_stage_wrote_is_read_all_the_same(headers: list[tuple[str, bytes | None]]) -> None:
    found = read(kafka_record(None, headers, None))
    assert (found.source, found.cut_from, found.key, found.value) == (None, None, None, None)
    with pytest.raises(OrderstreamError, match="does not say which record"):
        to_send(found, SETTINGS, b"{}")


def test_a_clock_out_of_range_is_no_fault() -> None:
    for timestamp, year in ((-1, 1970), (2**63 - 1, 9999)):
        record = kafka_record(b"v", ())
        record.timestamp = timestamp
        assert read(record).at.year == year


def test_the_story_is_what_a_stage_writes() -> None:
    fault, where = InvalidRecord("empty", ""), {"topic": "orders", "partition": 0, "offset": 0, "timestamp": 0}
    made = dead_letter(fault, key=None, value=b"v" * (CARRIED_BYTES_MAX + 1), **where)  # type: ignore[arg-type]
    assert {name for name, _ in made.headers} == STORY


def test_the_states_of_a_letter() -> None:
    at = datetime(2025, 1, 31, 12, tzinfo=UTC)
    handlings = [
        Handling(),
        Handling("retry", None, None, at, None),
        Handling("retry", None, b"{}", at, at),
        Handling("drop", "old", None, at, at),
    ]
    assert [(one.state, one.closed) for one in handlings] == [
        ("open", False),
        ("retrying", False),
        ("retried", True),
        ("dropped", True),
    ]
    assert [str(one) for one in handlings[2:]] == [
        "retried 2025-01-31 12:00:00 UTC, with another value",
        "dropped 2025-01-31 12:00:00 UTC: old",
    ]


# What is sent again


@pytest.mark.parametrize(
    ("more", "order_id"),
    [
        ({}, order_id_for_source("p.orders", 3, 17, 5)),
        ({"order_id": ORDER_ID}, ORDER_ID),
        ({"idempotency_key": "k"}, order_id_for_key("u", "k")),
    ],
)
def test_an_order_goes_to_its_first_product_under_the_id_that_it_would_have_had(
    more: dict[str, Any], order_id: str
) -> None:
    headers = [("trace", b"1"), ("reply-to", b"r"), ("sent-on-from", b"p.orders/0/1"), ("retry-of", b"0/9")]
    sent = to_send(letter("orders", orjson.dumps({**ORDER, **more}), headers), SETTINGS)
    key, value, kept = sent.record
    assert (sent.topic, sent.partition, key) == ("p.orders", product_partition("b", N), b"b")
    assert kept == [("trace", b"1"), ("sent-on-from", b"p.orders/0/1"), ("retry-of", b"2/40")]
    # Wherever it is now, it is that order.
    again = decode(value, LIMITS, topic="p.orders", partition=0, offset=99, timestamp=9)
    assert again == sent.order
    assert again.order_id == order_id


def test_a_corrected_value_is_the_same_order_wherever_it_was_wrong() -> None:
    wrong = letter("orders", b"{")
    with pytest.raises(InvalidRecord, match="not_json"):
        to_send(wrong, SETTINGS)
    sent = to_send(wrong, SETTINGS, orjson.dumps(ORDER))
    assert sent.order is not None
    assert sent.order.order_id == order_id_for_source("p.orders", 3, 17, 5)


def test_commands_are_sent_as_they_are_to_the_owner_of_what_they_are_about() -> None:
    cancel = orjson.dumps({"command": "cancel", "order_id": ORDER_ID.upper()}) + b" "
    sent = to_send(letter("order-commands", cancel), SETTINGS)
    assert (sent.topic, sent.partition) == ("p.order-commands", order_partition(ORDER_ID, N))
    assert sent.record == (ORDER_ID.encode(), cancel, [("retry-of", b"2/40")])
    assert sent.about == ORDER_ID
    receive = orjson.dumps(STOCK)
    sent = to_send(letter("stock-commands", receive), SETTINGS)
    assert (sent.topic, sent.partition) == ("p.stock-commands", product_partition("7", N))
    assert sent.record == (b"7", receive, [("retry-of", b"2/40")])
    assert sent.command is not None


@pytest.mark.parametrize("topic", ["orders", "order-commands", "stock-commands"])
@pytest.mark.parametrize("value", [None, b"", b"{", b"[]", b'{"x":1}', b"{}" * 500_000])
def test_what_would_be_refused_again_is_not_sent(topic: str, value: bytes | None) -> None:
    with pytest.raises(InvalidRecord):
        to_send(letter(topic, value), SETTINGS)
    with pytest.raises(InvalidRecord):
        to_send(letter(topic, b"?"), SETTINGS, value or b"")


def test_an_order_that_its_id_makes_too_large_is_not_sent() -> None:
    value = orjson.dumps(ORDER)
    small = SETTINGS.model_copy(update={"order_bytes_max": len(value) + 10})
    with pytest.raises(InvalidRecord, match="with its id"):
        to_send(letter("orders", value), small)


HOME = (product_partition("b", N) + 1) % N
ROWS: dict[str, tuple[tuple[Any, ...], int]] = {
    "order-lines": (LineWanted("hold", ORDER_ID, "b", 1, HOME, "u"), product_partition("b", N)),
    "reservations": (LineStands(ORDER_ID, "b", "h", 100, None), HOME),
}


@pytest.mark.parametrize("topic", ROWS)
def test_rows_between_stages_are_sent_where_they_were_and_only_what_a_stage_would_have_sent(topic: str) -> None:
    row, owner = ROWS[topic]
    (value,) = encode_rows([row], 10)
    sent = to_send(letter(topic, b"[]", partition=owner), SETTINGS, value)
    assert (sent.topic, sent.partition, sent.record[:2]) == (f"p.{topic}", owner, (None, value))
    for wrong in (None, b"", b"[]", b'{"v":1,"rows":[[]]}'):
        with pytest.raises(InvalidRecord, match="invalid_rows"):
            to_send(letter(topic, wrong, partition=owner), SETTINGS)


def test_a_line_that_is_wanted_of_another_partition_is_not_sent() -> None:
    row, owner = ROWS["order-lines"]
    (value,) = encode_rows([row], 10)
    with pytest.raises(InvalidRecord, match="another partition"):
        to_send(letter("order-lines", b"[]", partition=(owner + 1) % N), SETTINGS, value)


def test_every_topic_that_a_stage_reads_can_be_sent_to_again_and_no_other() -> None:
    values = {"orders": ORDER, "order-commands": {"command": "cancel", "order_id": ORDER_ID}, "stock-commands": STOCK}
    assert {spec.name for spec in SOURCES} == {*values, *ROWS}
    for topic in ("order-events", "dead-letters", "elsewhere"):
        with pytest.raises(OrderstreamError, match="no topic of this pipeline"):
            to_send(letter(topic, orjson.dumps(ORDER)), SETTINGS)
    with pytest.raises(OrderstreamError, match="no topic of this pipeline"):
        to_send(letter("orders", orjson.dumps(ORDER)), Settings(_env_file=None))  # another pipeline's


def test_a_letter_that_was_cut_is_sent_only_with_the_whole_value() -> None:
    cut = letter("orders", orjson.dumps(ORDER) + b" " * CARRIED_BYTES_MAX)
    assert cut.cut_from is not None
    with pytest.raises(OrderstreamError, match="only a part"):
        to_send(cut, SETTINGS)
    assert to_send(cut, SETTINGS, orjson.dumps(ORDER)).order is not None


def test_headers_that_the_stage_would_refuse_can_be_left_out() -> None:
    large = letter("orders", orjson.dumps(ORDER), [("trace", b"t" * HEADERS_BYTES_MAX)])
    with pytest.raises(InvalidRecord, match="--bare"):
        to_send(large, SETTINGS)
    assert to_send(large, SETTINGS, own_headers=False).record[2] == [("retry-of", b"2/40")]


# What a terminal is shown


@given(st.text(max_size=300))
def test_printable_text_stays_and_everything_else_is_escaped(text: str) -> None:
    safe = printable(text)
    assert safe.isprintable()
    assert safe == text or not text.isprintable()
    assert len(printable(text, 10)) <= 10 * len("\\U0010ffff") + 1


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b31m", "\\x9b31m"),
        ("a\r\nb\tc\x7f", "a\\r\\nb\\tc\\x7f"),
        ("\u202eevil", "\\u202eevil"),
        ("é 漢 [red]", "é 漢 [red]"),
    ],
)
def test_what_commands_a_terminal_is_escaped(text: str, escaped: str) -> None:
    assert printable(text) == escaped


@given(st.binary(max_size=3_000) | st.text(max_size=2_000).map(str.encode))
def test_bytes_of_any_kind_are_shown_within_bounds(data: bytes) -> None:
    lines = shown(data)
    assert all(line.isprintable() for line in lines)
    assert sum(map(len, lines)) < 10 * SHOWN_CHARS_MAX
    if form_of(data) == "no text":
        assert len(lines) <= SHOWN_BYTES_MAX // 16 + 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_json_is_indented_and_says_the_same(value: Any) -> None:
    assert orjson.loads("\n".join(shown(json.dumps(value).replace("\x7f", "\\u007f").encode()))) == value


def test_json_is_shown_with_all_that_it_says() -> None:
    assert shown(b'{"a":[1.50,{}],"a":"{\\"\\u001b"}') == [
        "{",
        '  "a": [',
        "    1.50,",
        "    {}",
        "  ],",
        '  "a": "{\\"\\u001b"',
        "}",
    ]


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 1_000 + b"]" * 1_000,
        b"[" + b"[],[]," * 200_000 + b"1]",
        b'"' + b"x" * 1_400_000 + b'"',
        b"\n" * 1_000_000,
    ],
    ids=["deep", "wide", "one string", "lines"],
)
def test_what_is_large_is_cut(data: bytes) -> None:
    assert sum(len(line) + 1 for line in shown(data)) < 2 * SHOWN_CHARS_MAX
    assert shown(data)[-1].endswith("bytes in all")


def test_bytes_that_are_no_text_are_dumped() -> None:
    assert shown(b"\xff\x00A\x1b") == ["00000000  ff 00 41 1b" + " " * 36 + "  ..A."]
    assert shown(b"\xff" * 600)[-1] == "… 88 bytes more"


def test_what_stands_in_a_table_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table("", ["key"], [["[/b]"], ["[red]x"], [":smile:"]])
    assert capsys.readouterr().out.split() == ["key", "[/b]", "[red]x", ":smile:"]
