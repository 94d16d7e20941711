"""Lists of rows as records of the inner topics: what goes in comes out, within the bounds, and nothing else passes."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderstream.streams.codec import RECORD_BYTES_MAX, decode_rows, encode_rows
from orderstream.streams.lines import LineStands, LineWanted
from orderstream.streams.orders import ID_CHARS_MAX

ORDER_ID = "5e6e7e1c-2f52-4d2b-9a55-5d0e5a0c9a11"
LINE = LineWanted("hold", ORDER_ID, "1", 2, 3, "u")
WIDEST_ID = "\U0001f600" * ID_CHARS_MAX  # four bytes a character
WIDEST = LineWanted("release", ORDER_ID, WIDEST_ID, 10_000, 1_023, WIDEST_ID)

TEXT = st.text(max_size=20)
NUMBER = st.integers(-(2**63), 2**63 - 1)
LINES_WANTED = st.builds(LineWanted, TEXT, TEXT, TEXT, NUMBER, NUMBER, TEXT)
LINES_STAND = st.builds(LineStands, TEXT, TEXT, TEXT, NUMBER, st.none() | TEXT)


@given(st.lists(LINES_WANTED, max_size=12) | st.lists(LINES_STAND, max_size=12), st.integers(1, 5))
def test_rows_come_out_as_they_went_in_whole_and_in_order(rows: list[Any], rows_max: int) -> None:
    records = list(encode_rows(rows, rows_max))
    kind = type(rows[0]) if rows else LineWanted
    assert [row for record in records for row in decode_rows(record, kind)] == rows
    assert len(records) == -(-len(rows) // rows_max)


def test_no_rows_make_no_record() -> None:
    assert list(encode_rows([], 200)) == []


@pytest.mark.parametrize("rows_max", [1, 200, 2_000])
def test_a_record_keeps_the_bound_in_rows(rows_max: int) -> None:
    records = list(encode_rows([LINE] * 4_100, rows_max))
    sizes = [len(decode_rows(record, LineWanted)) for record in records]
    assert sum(sizes) == 4_100
    assert max(sizes) <= rows_max


@pytest.mark.parametrize("rows_max", [200, 2_000])
def test_a_record_keeps_the_bound_in_bytes_with_the_widest_rows_that_pass_the_border(rows_max: int) -> None:
    rows = [WIDEST._replace(quantity=n) for n in range(2_000)]
    records = list(encode_rows(rows, rows_max))
    assert max(map(len, records)) <= RECORD_BYTES_MAX
    assert [row for record in records for row in decode_rows(record, LineWanted)] == rows


def test_a_row_that_is_larger_than_a_record_may_be_goes_alone() -> None:
    big = LINE._replace(user_id="x" * RECORD_BYTES_MAX)
    records = list(encode_rows([LINE, big, LINE], 200))
    assert [decode_rows(record, LineWanted) for record in records] == [[LINE], [big], [LINE]]


ROW: list[Any] = [*LINE]
NO_RECORDS: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"\xff\x00",
    "a list": b"[]",
    "no version": orjson.dumps({"rows": [ROW]}),
    "another version": orjson.dumps({"v": 2, "rows": [ROW]}),
    "no rows": orjson.dumps({"v": 1}),
    "rows that are no list": orjson.dumps({"v": 1, "rows": {"0": ROW}}),
    "a row that is no list": orjson.dumps({"v": 1, "rows": [dict(enumerate(ROW))]}, option=orjson.OPT_NON_STR_KEYS),
    "a row that is a text": orjson.dumps({"v": 1, "rows": ["0123456789"]}),
    "a row too short": orjson.dumps({"v": 1, "rows": [ROW, ROW[:-1]]}),
    "a row too long": orjson.dumps({"v": 1, "rows": [[*ROW, None]]}),
    "a number as id": orjson.dumps({"v": 1, "rows": [[1, *ROW[1:]]]}),
    "null as id": orjson.dumps({"v": 1, "rows": [[None, *ROW[1:]]]}),
    "a fraction as quantity": orjson.dumps({"v": 1, "rows": [[*ROW[:3], 1.5, *ROW[4:]]]}),
    "true as quantity": orjson.dumps({"v": 1, "rows": [[*ROW[:3], True, *ROW[4:]]]}),
    "null as user": orjson.dumps({"v": 1, "rows": [[*ROW[:-1], None]]}),
}


@pytest.mark.parametrize("value", NO_RECORDS.values(), ids=NO_RECORDS.keys())
def test_what_no_stage_wrote_is_told_and_nothing_of_it_is_taken(value: bytes) -> None:
    with pytest.raises(ValueError):
        decode_rows(value, LineWanted)


def test_a_row_of_another_topic_is_refused() -> None:
    (record,) = encode_rows([LineStands(ORDER_ID, "1", "c", 100, None)], 200)
    with pytest.raises(ValueError, match="not a row of LineWanted"):
        decode_rows(record, LineWanted)


@given(st.binary(max_size=100))
def test_any_bytes_are_rows_or_a_value_error(value: bytes) -> None:
    try:
        rows = decode_rows(value, LineWanted)
    except ValueError:
        return
    assert all(isinstance(row, LineWanted) for row in rows)
