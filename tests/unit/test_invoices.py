"""Order files: what is read, what is left out whole, what is skipped and counted, and where a fault is."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import threading
import uuid
import zipfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderstream.errors import OrderstreamError
from orderstream.jobs.forms import FIELDS, FORMS, read_map
from orderstream.jobs.invoices import Fault, Reading, read_catalogue, read_orders
from orderstream.jobs.sheets import BROKEN_MAX
from orderstream.settings import project_dir
from orderstream.streams.orders import Limits, new_order_id, order_id_for_key

LIMITS = Limits(100, 10_000, 65_536)
SAMPLE = project_dir() / "data" / "online-retail-sample.csv"
CASES = project_dir() / "tests" / "data" / "orders"
EXPORTED = project_dir() / "tests" / "data" / "exports"
HEAD = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"

Found = dict[str | None, dict[str, int]]


def written(folder: Path, name: str, text: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def read(file: Path, *columns: str, **more: Any) -> tuple[Reading, Found]:
    """Return the reading, and the units of each order by its key."""
    reading, orders = read_orders(file, LIMITS, given=read_map(columns), **more)
    return reading, {order.idempotency_key: dict(order.lines) for order in orders}


def places(reading: Reading) -> list[tuple[int, str]]:
    return [(fault.line, fault.column) for fault in reading.faults]


def test_the_sample_is_read_whole() -> None:
    reading, drawn = read_orders(SAMPLE, LIMITS)
    found = list(drawn)
    assert len(found) == reading.orders == 61
    assert (reading.faults, reading.notes, reading.left_out) == ([], [], [])
    assert reading.skipped == {
        "credit notes": 10,
        "rows that are no products": 2,
        "stock corrections (no description, no price)": 1,
    }
    first = found[0]
    assert first.order_id == order_id_for_key("17850", "536365")
    assert first.lines[0] == ("85123A", 6)
    assert first.placed_at is not None
    assert first.placed_at.isoformat() == "2010-12-01T08:26:00+00:00"
    rows = SAMPLE.read_text().splitlines()
    assert len(rows) - 1 - 13 >= reading.lines == sum(len(order.lines) for order in found)


# The public reports of people who run shops (tests/data/orders)


class Case(NamedTuple):
    """What a file of tests/data/orders holds: units by order, and the places of its faults."""

    orders: Mapping[str, Mapping[str, int]]
    faults: tuple[tuple[int, str], ...] = ()


READ = {
    "cat5.csv": Case({"1": {"Z1": 10}, "2": {"Z1": 1}}),
    "f01-year4.csv": Case({"700001": {"F100": 6, "F101": 6}, "700002": {"F102": 8}}),
    "f06-interleaved.csv": Case({"750001": {"F100": 6, "F101": 2, "F102": 1}, "750002": {"F100": 1, "F101": 3}}),
    "f07-badrow.csv": Case({"760002": {"F103": 2}}, ((3, "Quantity"),)),
    "f07-mended.csv": Case({"760001": {"F100": 6, "F101": 1200, "F102": 1}, "760002": {"F103": 2}}),
    "f08-scientific.csv": Case({}, ((2, "InvoiceNo"), (3, "InvoiceNo"), (4, "InvoiceNo"))),
    "f10-negative.csv": Case({"790001": {"F100": 3}, "790002": {"F102": 1}}),
    "f11-stray-quote.csv": Case({"800001": {"F100": 1}, "800003": {"F104": 1}}, ((4, "-"),)),
    "f16-superscript.csv": Case({"830001": {"F100": 1}, "830003": {"F102": 1}}, ((3, "Quantity"),)),
    "f20-u2028.csv": Case({"870001": {"F100": 1, "F101": 1}}),
    "f21-shortrow.csv": Case({}, ((3, "-"),)),
    "f22-day1.csv": Case({"890001": {"F100": 1}}),
    "f22-day2.csv": Case({"890001": {"F100": 1, "F101": 1}}),
    "f25-guests.csv": Case({f"90000{n}": {"F109": 1} for n in (1, 2, 3, 4)}),
    "f26-dayfirst.csv": Case({"910001": {"F100": 1}, "910002": {"F100": 1}}),
    "f27-key-twice.jsonl": Case({"web-1": {"F100": 1}}, ((2, "idempotency_key"),)),
}


def test_every_case_is_here() -> None:
    assert {file.name for file in CASES.iterdir()} == READ.keys()


@pytest.mark.parametrize("name", READ)
def test_the_files_of_shops_have_their_right_value(name: str) -> None:
    reading, orders = read(CASES / name)
    assert (orders, tuple(places(reading))) == (READ[name].orders, READ[name].faults)


def test_dates_with_the_day_first_are_read_so_and_told() -> None:
    reading, drawn = read_orders(CASES / "f26-dayfirst.csv", LIMITS)
    assert [order.placed_at and f"{order.placed_at:%Y-%m-%d}" for order in drawn] == ["2010-12-13", "2010-12-01"]
    assert reading.notes == ["the day comes first in its dates, as line 2 shows: 13-12-2010 08:26"]


def test_each_invoice_of_nobody_has_a_user_of_its_own() -> None:
    users = [order.user_id for order in read_orders(CASES / "f25-guests.csv", LIMITS)[1]]
    assert len(set(users)) == 4


def test_a_price_of_0_is_told_and_counts_for_nothing() -> None:
    told: list[Fault] = []
    assert [tuple(product) for product in read_catalogue(CASES / "cat5.csv", 1, told=told)] == [
        ("Z1", "RADIO", 9990, 11)
    ]
    assert [(fault.line, fault.column) for fault in told] == [(3, "UnitPrice")]


# An invoice goes whole or not at all: whatever spoils a row, wherever it stands

SPOILS: dict[str, Callable[[list[str]], list[str]]] = {
    "a cell too few": lambda cells: [cells[0] + cells[1], *cells[2:]],
    "a cell too many": lambda cells: [*cells, "1"],
    "a quote in a cell": lambda cells: [*cells[:2], '"7" HANGER"', *cells[3:]],
    "a quote that is never closed": lambda cells: [*cells[:2], '"HANGER', *cells[3:]],
    "a line broken in two": lambda cells: [*cells[:2], "BAG\nBLUE", *cells[3:]],
    "a quantity that is none": lambda cells: [*cells[:3], "ten", *cells[4:]],
    "a quantity of digits that are none": lambda cells: [*cells[:3], "2²", *cells[4:]],
    "a date that is none": lambda cells: [*cells[:4], "yesterday", *cells[5:]],
    "no product": lambda cells: [cells[0], "", *cells[2:]],
    "a shortened product": lambda cells: [cells[0], "8.5E+12", *cells[2:]],
    "another customer": lambda cells: [*cells[:6], "666", *cells[7:]],
    "no number": lambda cells: ["", *cells[1:]],
}


@given(
    invoices=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    places=st.randoms(use_true_random=False),
    spoil=st.sampled_from(sorted(SPOILS)),
    closing=st.booleans(),
)
def test_an_invoice_goes_whole_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, invoices: list[int], places: Any, spoil: str, closing: bool
) -> None:
    rows = [
        [str(600_000 + n), f"P{n}-{k}", "THING", "2", "12/1/10 8:26", "2.55", str(n + 1), "UK"]
        for n, size in enumerate(invoices)
        for k in range(size)
    ]
    is_mixed = places.random() < 0.5 and spoil in ("a quantity that is none", "another customer", "a date that is none")
    if is_mixed:  # where the row itself says whose it is
        places.shuffle(rows)
    at = places.randrange(len(rows))
    number, alone = rows[at][0], sum(row[0] == rows[at][0] for row in rows) == 1
    lines = [",".join(row) for row in rows]
    lines[at] = ",".join(SPOILS[spoil](rows[at]))
    if closing and at + 1 < len(rows):  # another quote, which would close the first one
        lines[-1] = lines[-1].replace("THING", '"THING"')
    file = written(tmp_path_factory.getbasetemp(), "spoilt.csv", HEAD + "\n".join(lines) + "\n")
    reading, orders = read(file)
    whole = {str(600_000 + n): {f"P{n}-{k}": 2 for k in range(size)} for n, size in enumerate(invoices)}
    if spoil == "another customer" and alone:
        assert orders == whole
        return
    assert all(orders[key] == whole[key or ""] for key in orders), "no invoice is sold in part"
    assert number not in orders
    assert reading.faults
    assert set(reading.left_out) >= whole.keys() - orders.keys() - ({number} if alone else set())
    if spoil in ("a quantity that is none", "a date that is none", "another customer"):
        assert orders.keys() == whole.keys() - {number}, "the others go on"


def test_a_quote_that_swallows_a_row_is_a_fault(tmp_path: Path) -> None:
    row = "{0},P{0},{1},1,12/1/10 8:26,2.55,7,UK\n"
    rows = row.format(1, '"7 CANDLE') + row.format(2, 'LANTERN"') + row.format(3, "MUG")
    reading, orders = read(written(tmp_path, "o.csv", HEAD + rows))
    assert orders == {"2": {"P2": 1}, "3": {"P3": 1}}
    assert ([fault.line for fault in reading.faults], reading.left_out) == ([2], ["1"])


@pytest.mark.parametrize(
    ("rows", "sold", "left_out"),
    [
        (["SK1,1", "SK2,2,1,bob"], ["SK2"], ["SK1"]),
        (["SM1,1", "SM2,1", "SM3,2,1,bob"], ["SM3"], ["SM1", "SM2"]),
        (["SK9,1", "SK10,2,1,bob", "SK11,2,1,bob"], ["SK10", "SK11"], ["SK9"]),
        (["SK1,2,1,bob", "SK2,1"], ["SK1"], ["SK2"]),
        (["SK1,2,1,bob", "SK2,1", "SK2,1,1,bob", "SK1,3,1,bob,x"], [], ["SK1", "SK2"]),
        (["SK1,1"], [], ["SK1"]),
        (["web,1", "2,2,1,bob"], [], ["2"]),  # of no kind that is known: its neighbour's, perhaps
        (["1,2,1,bob", "2,1,bob", "3,2,1,bob"], [], ["1", "3"]),  # a product: its own number is missing, perhaps
    ],
)
def test_a_row_that_cant_be_split_takes_its_own_order_with_it(
    rows: list[str], sold: list[str], left_out: list[str], tmp_path: Path
) -> None:
    file = written(tmp_path, "o.csv", "\n".join(["order,product,quantity,customer", *rows]))
    reading, orders = read(file)
    assert (list(orders), sorted(reading.left_out)) == (sold, left_out)


def test_a_description_of_two_lines_is_one(tmp_path: Path) -> None:
    rows = '1,A,"CANDLE,\nBLUE",1,12/1/10 8:26,2.55,7,UK\n\n,,,,,,,\n1,X,MUG,1,12/1/10 8:26,2.55,7,UK\n'
    reading, orders = read(written(tmp_path, "o.csv", HEAD + rows))
    assert (orders, reading.faults) == ({"1": {"A": 1, "X": 1}}, [])


@pytest.mark.parametrize("sign", "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029", ids=ascii)
def test_a_sign_that_ends_no_line_of_a_file_ends_no_row(sign: str, tmp_path: Path) -> None:
    rows = f"1,A,CANDLE{sign}WIDE,1,12/1/10 8:26,2.55,7,UK\n1,X,MUG,1,12/1/10 8:26,2.55,7,UK\r\n"
    file = written(tmp_path, "o.csv", HEAD + rows)
    reading, orders = read(file)
    assert (orders, reading.faults) == ({"1": {"A": 1, "X": 1}}, [])
    assert [product.name for product in read_catalogue(file, 1)] == ["CANDLE WIDE", "MUG"]


def test_a_file_that_is_no_table_behind_its_head_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(OrderstreamError, match=f"more than {BROKEN_MAX:,} rows"):
        read(written(tmp_path, "o.csv", HEAD + "1,2\n" * (BROKEN_MAX + 1)))


def test_units_beyond_a_bound_are_told_the_bound(tmp_path: Path) -> None:
    rows = "A,1,1000000000000000\nB,1,99999999999999999999\n"
    reading, orders = read(written(tmp_path, "o.csv", "order,product,quantity\n" + rows))
    assert (orders, reading.left_out) == ({}, ["A", "B"])
    assert reading.faults[0].why == "items: 1000000000000000 units of product '1', at most 10000"
    assert "less than 9223372036854775808" in reading.faults[1].why


def test_what_is_taken_back_counts_against_what_is_sold(tmp_path: Path) -> None:
    row = "{},{},Thing,{},12/1/10 8:26,2.55,7,UK\n"
    rows = [
        ("1", "A", 5),
        ("1", "A", -5),
        ("1", "X", 1),
        ("2", "A", 1),
        ("2", "X", -1),
        ("3", "A", -4),
        ("C4", "A", -2),
    ]
    reading, orders = read(written(tmp_path, "o.csv", HEAD + "".join(row.format(*one) for one in rows)))
    assert orders == {"1": {"X": 1}}
    assert (places(reading), reading.left_out) == ([(5, "Quantity")], ["2"])
    assert reading.skipped == {"credit notes": 2}


# The usual forms of Online Retail

ROWS = [
    ["700001", "F100", "CANDLE £", "6", "13/12/2010 08:26", "2.55", "17850", "United Kingdom"],
    ["700001", "F101", "LANTERN", "6", "13/12/2010 08:26", "3.39", "17850", "United Kingdom"],
    ["700002", "F102", "HANGER", "8", "1/12/2010 08:28", "2.75", "", "France"],
]
WHOLE = {"700001": {"F100": 6, "F101": 6}, "700002": {"F102": 8}}


def table(rows: list[list[str]], head: str = HEAD, delimiter: str = ",") -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([head.strip().split(","), *rows])
    return text.getvalue()


def zipped(name: str, data: bytes, *others: str) -> bytes:
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w") as archive:
        archive.writestr(name, data)
        for other in others:
            archive.writestr(other, b"")
    return box.getvalue()


SECOND = "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,Customer ID,Country"
COMMAS = [[*row[:5], row[5].replace(".", ","), *row[6:]] for row in ROWS]
FLOATS = [[*row[:3], f"{row[3]}.0", *row[4:6], row[6] and f"{row[6]}.0", row[7]] for row in ROWS]

FORMED: dict[str, tuple[str, bytes]] = {
    "as it is": ("o.csv", table(ROWS).encode()),
    "Online Retail II": ("o.csv", table(ROWS, SECOND).encode()),
    "floats of pandas": ("o.csv", table(FLOATS).encode()),
    "another order of columns, and more": (
        "o.csv",
        table([[*row[::-1], "x"] for row in ROWS], ",".join(HEAD.strip().split(",")[::-1]) + ",More").encode(),
    ),
    "semicolons": ("o.csv", table(COMMAS, delimiter=";").encode()),
    "sep=": ("o.csv", b"sep=;\n" + table(COMMAS, delimiter=";").encode()),
    "tabs": ("o.txt", table(ROWS, delimiter="\t").encode()),
    "a byte order mark": ("o.csv", table(ROWS).encode("utf-8-sig")),
    "Windows-1252": ("o.csv", table(ROWS).encode("cp1252")),
    "UTF-16": ("o.csv", table(COMMAS, delimiter=";").encode("utf-16")),
    "UTF-16 without a mark": ("o.csv", table(ROWS, delimiter="\t").encode("utf-16-le")),
    "gzip": ("o.csv.gz", gzip.compress(table(ROWS).encode())),
    "zip": ("o.zip", zipped("Online Retail.csv", table(ROWS).encode(), "__MACOSX/._Online Retail.csv")),
}


@pytest.mark.parametrize("form", FORMED)
def test_online_retail_is_read_in_its_usual_forms(form: str, tmp_path: Path) -> None:
    name, data = FORMED[form]
    file = written(tmp_path, name, data)
    reading, drawn = read_orders(file, LIMITS)
    found = list(drawn)
    assert ({order.idempotency_key: dict(order.lines) for order in found}, reading.faults) == (WHOLE, [])
    assert [order.user_id for order in found] == ["17850", "guest-700002"]
    assert [order.placed_at and order.placed_at.isoformat()[:16] for order in found] == [
        "2010-12-13T08:26",
        "2010-12-01T08:28",
    ]
    assert [product.price_cents for product in read_catalogue(file, 1)] == [255, 339, 275]


# The exports of shops


EXPORTS: dict[str, tuple[dict[str, dict[str, int]], str]] = {
    "shopify.csv": ({"#1001": {"FERN-1": 2, "TOTE-1": 1}, "#1003": {"M": 1}}, "ada@example.com"),
    "woocommerce.csv": ({"101": {"CUP": 3}, "103": {"CUP": 1}}, "ada@example.com"),
    "woocommerce-items.csv": ({"7": {"CUP": 2}}, "ada@example.com"),
    "amazon.txt": ({"111-1": {"TOAST": 1}}, "guest-111-1"),
    "amazon-new.txt": ({"123-4": {"S1": 2}}, "a@marketplace.example"),
    "olist.csv": ({"00143d0f": {"e95ee689": 2}, "00018f77": {"e5f2d52b": 1}}, "guest-00143d0f"),
}


@pytest.mark.parametrize("said", [True, False], ids=["said", "found"])
@pytest.mark.parametrize("export", EXPORTS)
def test_the_exports_of_shops_are_read(export: str, said: bool) -> None:
    form = re.split(r"\W", export)[0]
    reading, drawn = read_orders(EXPORTED / export, LIMITS, given=read_map([form] if said else []))
    found = list(drawn)
    expected, user = EXPORTS[export]
    assert ({order.idempotency_key: dict(order.lines) for order in found}, reading.faults) == (expected, [])
    assert found[0].user_id == user
    assert f"read as {form}" in reading.notes[0]


def test_an_export_of_shopify_keeps_time_and_payment() -> None:
    first, *_ = read_orders(EXPORTED / "shopify.csv", LIMITS)[1]
    assert first.payment_method == "Shopify Payments"
    assert first.placed_at is not None
    assert first.placed_at.isoformat() == "2026-09-04T02:14:00+00:00"


def test_rows_that_a_join_has_doubled_are_a_fault(tmp_path: Path) -> None:
    text = (EXPORTED / "olist.csv").read_text()
    reading, orders = read(written(tmp_path, "o.csv", text + text.splitlines()[-1] + "\n"))
    assert (list(orders), places(reading)) == (["00143d0f"], [(5, "order_item_id")])


# What is not sold


@pytest.mark.parametrize("text", ["", "no", "No", "n", "false", "FALSE", "f", "0", "0.0", "not cancelled", "NaN"])
def test_what_says_that_it_is_not_cancelled_is_sold(text: str, tmp_path: Path) -> None:
    reading, orders = read(written(tmp_path, "o.csv", f"order,product,quantity,cancelled\nQ,1,1,{text}\n"))
    assert (orders, reading.faults, dict(reading.skipped)) == ({"Q": {"1": 1}}, [], {})


@pytest.mark.parametrize(
    "text", ["yes", "Y", "true", "1", "1.0", "x", "Cancelled", "2026-09-04 09:00:00 -0400", "5/9/26"]
)
def test_what_says_that_it_is_cancelled_is_left_out(text: str, tmp_path: Path) -> None:
    reading, orders = read(written(tmp_path, "o.csv", f"order,product,quantity,cancelled\nQ,1,1,{text}\n"))
    assert (orders, reading.faults) == ({}, [])
    assert reading.skipped == {"rows of orders that are cancelled": 1}


@pytest.mark.parametrize(
    ("status", "is_sold"),
    [
        *(
            (text, True)
            for text in ("", "paid", "Partially Paid", "partially_refunded", "wc-on-hold", "Pending payment")
        ),
        *((text, True) for text in ("Shipped - Delivered to Buyer", "PartiallyShipped", "invoiced", "delivered")),
        *((text, False) for text in ("Declined", "returned", "voided", "EXPIRED", "wc-failed", "Charged back", "Void")),
        *((text, False) for text in ("Shipped - Returned to Seller", "Canceled", "refunded", "Checkout-Draft")),
    ],
)
def test_a_status_says_whether_an_order_is_sold(status: str, is_sold: bool, tmp_path: Path) -> None:
    reading, orders = read(written(tmp_path, "o.csv", f"order,product,quantity,status\nQ,1,1,{status}\n"))
    assert (list(orders), reading.faults) == (["Q"] if is_sold else [], [])


@pytest.mark.parametrize(
    ("column", "text"), [("status", "Storniert"), ("cancelled", "maybe"), ("cancelled", "13/13/26")]
)
def test_a_value_that_may_mean_either_is_a_fault_of_its_order(column: str, text: str, tmp_path: Path) -> None:
    rows = f"order,product,quantity,{column}\nQ,1,1,{text}\nQ,2,1,\nR,1,1,\n"
    reading, orders = read(written(tmp_path, "o.csv", rows))
    assert (orders, places(reading), reading.left_out) == ({"R": {"1": 1}}, [(2, column)], ["Q"])


def test_a_row_that_does_not_say_it_is_as_the_row_before_of_its_order(tmp_path: Path) -> None:
    rows = "order,product,quantity,status,cancelled\nQ,1,1,paid,2026-09-04\nQ,2,1,,\nR,1,1,paid,1\nR,2,1,,no\n"
    assert read(written(tmp_path, "o.csv", rows))[1] == {"R": {"2": 1}}


OWN = "Beleg;Artikel;Menge;Datum;Kunde;Zahlung\nB1;a;2;1.2.2026;k;Rechnung\nB1;b;1,0;1.2.2026;k;Rechnung\n"
MAPPED = ("Beleg=order", "artikel=product_id", "Menge=Quantity", "Datum=date", "Kunde=customer", "Zahlung=payment")


def test_columns_are_what_the_user_says(tmp_path: Path) -> None:
    file = written(tmp_path, "o.csv", OWN)
    (order,) = read_orders(file, LIMITS, given=read_map(MAPPED))[1]
    assert (order.idempotency_key, order.user_id, order.payment_method) == ("B1", "k", "Rechnung")
    assert (dict(order.lines), order.placed_at and f"{order.placed_at:%Y-%m-%d}") == ({"a": 2, "b": 1}, "2026-02-01")
    # a code that is no product in Online Retail is one here
    _, orders = read(written(tmp_path, "p.csv", OWN.replace(";a;", ";POST;")), *MAPPED)
    assert orders == {"B1": {"POST": 2, "b": 1}}
    _, orders = read(written(tmp_path, "q.csv", HEAD.replace("Quantity", "Qty") + ",".join(ROWS[0])), "Qty=quantity")
    assert orders == {"700001": {"F100": 6}}


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_is_a_name_of_its_own(field: str) -> None:
    assert read_map([f"x={field}"]).fields == {field: "x"}


@pytest.mark.parametrize("said", ["x=colour", "etsy", "=", "x="])
def test_a_map_that_says_nothing_is_refused(said: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        read_map([said])


# Dates


@pytest.mark.parametrize(
    ("text", "dates", "found"),
    [
        ("12/1/10 8:26", None, "2010-12-01T08:26:00"),
        ("12/1/2010 8:26", None, "2010-12-01T08:26:00"),
        ("12/1/2010 8:26:30 PM", None, "2010-12-01T20:26:30"),
        ("12/1/2010 12:05 AM", None, "2010-12-01T00:05:00"),
        ("2010-12-01 08:26:00", None, "2010-12-01T08:26:00"),
        ("2010-12-01T08:26:00.500Z", None, "2010-12-01T08:26:00"),
        ("2010-12-01 08:26:00 +0200", None, "2010-12-01T06:26:00"),
        ("2010-12-01", None, "2010-12-01T00:00:00"),
        ("01.12.2010 08:26", None, "2010-12-01T08:26:00"),
        ("5/5/2010", None, "2010-05-05T00:00:00"),
        ("01/12/2010 08:26", "day-first", "2010-12-01T08:26:00"),
        ("01-12-2010 08:26", "month-first", "2010-01-12T08:26:00"),
        ("1 Dec 2010", "%d %b %Y", "2010-12-01T00:00:00"),
        ("40513.35", None, None),
        ("1/1/201", None, None),
        ("29/2/2010", None, None),
        ("2010-13-01", None, None),
        ("13/1/2010", "month-first", None),
        ("12/1/10 25:00", None, None),
    ],
)
def test_dates_are_read_as_they_are_written(text: str, dates: str | None, found: str | None, tmp_path: Path) -> None:
    file = written(tmp_path, "o.csv", f"{HEAD}1,A,Thing,1,{text},2.55,7,UK\n")
    reading, drawn = read_orders(file, LIMITS, dates=dates)
    moments = [order.placed_at and order.placed_at.isoformat()[:19] for order in drawn]
    assert moments == ([found] if found else [])
    assert places(reading) == ([] if found else [(2, "InvoiceDate")])


@pytest.mark.parametrize(
    ("text", "dates", "why"),
    [
        ("12/13/68", None, "in the future: '12/13/68' is 2068-12-13"),
        ("12/13/69", None, "before 1970: '12/13/69' is 1969-12-13"),
        ("0010-12-01", None, "before 1970: '0010-12-01' is 0010-12-01"),
        ("1 Dec 0010", "%d %b %Y", "before 1970: '1 Dec 0010' is 0010-12-01"),
        ("9999-12-31 23:59 -0500", None, "in the future: '9999-12-31 23:59 -0500' is 9999-12-31"),
        ("0001-01-01 00:00 +0500", None, "before 1970: '0001-01-01 00:00 +0500' is 0001-01-01"),
        (f"{datetime.now(UTC) + timedelta(days=2):%Y-%m-%d %H:%M}", None, "in the future"),
    ],
)
def test_a_date_of_no_order_is_a_fault(text: str, dates: str | None, why: str, tmp_path: Path) -> None:
    file = written(tmp_path, "o.csv", f"{HEAD}1,A,Thing,1,{text},2.55,7,UK\n2,A,Thing,1,,2.55,7,UK\n")
    reading, orders = read(file, dates=dates)
    assert (list(orders), places(reading), reading.left_out) == (["2"], [(2, "InvoiceDate")], ["1"])
    assert why in reading.faults[0].why


@pytest.mark.parametrize("at", [datetime(1970, 1, 2), datetime.now(UTC) + timedelta(hours=20)])
def test_a_clock_may_be_ahead(at: datetime, tmp_path: Path) -> None:
    reading, orders = read(written(tmp_path, "o.csv", f"{HEAD}1,A,Thing,1,{at:%Y-%m-%d %H:%M},2.55,7,UK\n"))
    assert (list(orders), reading.faults) == (["1"], [])


@pytest.mark.parametrize("texts", [("13/1/10", "1/13/10"), ("01-02-2010",), ("01/12/10 08:26",)])
def test_dates_that_say_nothing_or_two_things_are_asked_for(texts: tuple[str, ...], tmp_path: Path) -> None:
    rows = "".join(f"{n},A,Thing,1,{text},2.55,7,UK\n" for n, text in enumerate(texts))
    with pytest.raises(OrderstreamError, match="--dates day-first"):
        read(written(tmp_path, "o.csv", HEAD + rows))


# Files that don't fit


@pytest.mark.parametrize(
    ("name", "data", "said", "told"),
    [
        ("o.csv", b"", [], "empty"),
        ("o.csv", b"a,b\n1,2\n", [], "UTF-8, delimited by commas: 2 columns: 'a', 'b'"),
        ("o.csv", "Auftrag;Stück\n1;2\n".encode("utf-16"), [], "UTF-16, delimited by semicolons: 2 columns"),
        ("o.csv", b"InvoiceNo,StockCode,Qty\n", [], "online-retail lacks quantity, in a column called Quantity"),
        ("o.csv", b"InvoiceNo StockCode Quantity\n", [], "none of the delimiters"),
        ("o.csv", b"a,b,c\n", ["a=order", "x=product", "c=quantity"], "--map names columns that it has not: x"),
        ("o.csv", HEAD.encode(), ["shopify"], "shopify lacks order, in a column called Name"),
        ("o.csv", b"InvoiceNo,StockCode,Quantity,Quantity\n", [], "two columns are called 'Quantity'"),
        ("o.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\2\3", [], "line 3: no text: it has a NUL"),
        *(
            ("o.csv", table(ROWS).encode()[:n] + b"\0\r\n" + b"x" * 5_000, [], f"line {line}: no text: it has a NUL")
            for n, line in ((90, 2), (91, 2), (200, 3), (201, 3))
        ),
        ("o.csv", b"order,product,quantity\r\n1,2,3\r\n" * 500 + b"\0", [], "line 1001: no text: it has a NUL"),
        ("o.csv", (HEAD + "a\0").encode("utf-16"), [], "line 2: no text: it has a NUL"),
        ("o.csv", b"\xd0\xcf\x11\xe0\xa1\xb1", [], "save its sheet as CSV"),
        ("o.csv", zipped("[Content_Types].xml", b""), [], "save its sheet as CSV"),
        ("o.zip", zipped("a.csv", b"", "b.csv"), [], "there are 2: a.csv, b.csv"),
        ("o.zip", zipped("a.csv", HEAD.encode())[:40], [], "damaged"),
        ("o.csv.gz", gzip.compress(HEAD.encode())[:-9], [], "damaged"),
        ("o.parquet", b"PAR1", [], "expected a table"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # zipped data has the time in it
)
def test_a_file_that_does_not_fit_is_told_why(
    name: str, data: bytes, said: list[str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(OrderstreamError) as error:
        read(written(tmp_path, name, data), *said)
    assert told in str(error.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(OrderstreamError, match="no such file"):
        read(tmp_path / "none.csv")


# Pipes


@pytest.mark.parametrize(
    ("way", "form", "packed"),
    [("-", "table", False), ("-", "records", True), ("/dev/stdin", "table", True), ("fifo", "records", False)],
)
def test_orders_are_read_from_a_pipe(way: str, form: str, packed: bool, tmp_path: Path) -> None:
    record = {"user_id": "u", "items": [{"product_id": 1, "quantity": 2}], "payment_method": "card"}
    data = table(ROWS).encode() if form == "table" else b"\n" + json.dumps(record).encode() + b"\n"
    program = (
        "import sys; from pathlib import Path; from orderstream.jobs.invoices import *\n"
        "reading, orders = read_orders(Path(sys.argv[1]), Limits(9, 9, 9_999))\n"
        "print(len([*orders]), reading.faults, reading.file)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "fifo" if way == "fifo" else way)]
    given = gzip.compress(data) if packed else data
    if way == "fifo":
        os.mkfifo(command[-1])
        threading.Thread(target=Path(command[-1]).write_bytes, args=(given,), daemon=True).start()
    answer = subprocess.run(command, input=given, capture_output=True, check=True)
    assert answer.stdout.decode().split() == [str(2 if form == "table" else 1), "[]", command[-1]]


def test_a_device_that_is_not_there_is_told() -> None:
    with pytest.raises(OrderstreamError, match="no such file"):
        read(Path("/dev/fd/99999"))


def test_each_export_needs_what_an_order_has() -> None:
    for form in FORMS.values():
        assert {"order", "product"} <= set(form.needs) <= form.columns.keys() <= FIELDS.keys()


# The catalogue of a file


def test_the_catalogue_has_a_share_of_each_products_demand(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "o.csv",
        HEAD
        + "1,A,Thing,10,12/1/10 8:26,2.55,7,UK\n1,X9,Other,1,12/1/10 8:26,£0.29,7,UK\n"
        + "2,A,Thing,5,12/1/10 8:26,2.95,7,UK\nC3,A,Thing,-2,12/1/10 8:26,2.55,7,UK\n"
        + "3,FREE,Gift,5,12/1/10 8:26,0.00,7,UK\n",
    )
    assert [tuple(p) for p in read_catalogue(file, 0.66)] == [("A", "Thing", 295, 9), ("X9", "Other", 29, 1)]


@pytest.mark.parametrize(
    ("cells", "place"),
    [
        *(("ten,d,2.55", "line 2, Quantity"), ("1,d,2.5.5", "line 2, UnitPrice"), ("1,d", "line 2, -")),
        ("1,d,2.555", "line 2, UnitPrice: not a whole number of cents: '2.555'"),
    ],
)
def test_a_catalogue_that_cant_be_read_is_no_catalogue(cells: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(OrderstreamError, match=place):
        read_catalogue(written(tmp_path, "o.csv", f"{HEAD}1,A,Thing,{cells},7,UK\n"), 1)


# JSON lines


def test_json_lines_are_read_line_by_line(tmp_path: Path) -> None:
    good = {"user_id": "u", "items": [{"product_id": 1, "quantity": 2}], "payment_method": "card"}
    lines = [json.dumps(good), "", "{", json.dumps({**good, "x": 1}), "y" * 70_000, json.dumps({**good, "user_id": 8})]
    for file in (
        written(tmp_path, "o.jsonl", "\ufeff" + "\n".join(lines)),
        written(tmp_path, "o.jsonl.gz", gzip.compress("\n".join(lines).encode())),
    ):
        reading, orders = read_orders(file, LIMITS)
        assert [order.user_id for order in orders] == ["u", "8"]
        assert [fault.line for fault in reading.faults] == [3, 4, 5]


def test_one_name_is_one_order_in_a_file(tmp_path: Path) -> None:
    body = {"user_id": "u", "items": [{"product_id": 1, "quantity": 2}], "payment_method": "card"}
    named = {**body, "order_id": str(uuid.UUID(int=7))}
    other = {"items": [{"product_id": 1, "quantity": 3}]}
    records = [
        named,
        {**named, **other},
        named,
        {**body, "idempotency_key": "k"},
        {**body, "idempotency_key": "k", **other},
    ]
    file = written(tmp_path, "o.jsonl", "\n".join(json.dumps(record) for record in records))
    reading, orders = read_orders(file, LIMITS)
    assert [dict(order.lines) for order in orders] == [{"1": 2}] * 3
    assert [(fault.line, fault.column, fault.why.partition(":")[0]) for fault in reading.faults] == [
        (2, "order_id", "order_id_reused"),
        (5, "idempotency_key", "order_id_reused"),
    ]
    assert (reading.orders, reading.lines, reading.unnamed) == (3, 3, 0)


def test_records_without_a_name_are_the_same_orders_in_a_run_of_the_same_id(tmp_path: Path) -> None:
    body = json.dumps({"user_id": "u", "items": [{"product_id": 1, "quantity": 2}], "payment_method": "card"})
    file = written(tmp_path, "o.jsonl", f"{body}\n{body}\n")
    run, ids = uuid.UUID(new_order_id()), []
    for one in (run, run, uuid.UUID(new_order_id()), None):
        reading, orders = read_orders(file, LIMITS, run=one)
        ids.append([order.order_id for order in orders])
        assert reading.unnamed == 2
    assert ids[0] == ids[1]
    assert len({order_id for some in ids for order_id in some}) == 6
    assert {uuid.UUID(order_id).version for some in ids for order_id in some} == {7}
