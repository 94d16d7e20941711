"""Order files: what is read, what is skipped and counted, and where a fault is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orderstream.errors import OrderstreamError
from orderstream.jobs.invoices import COLUMNS, read_catalogue, read_orders
from orderstream.settings import project_dir
from orderstream.streams.orders import Limits, order_id_for_key

LIMITS = Limits(100, 10_000, 65_536)
SAMPLE = project_dir() / "data" / "online-retail-sample.csv"
HEAD = ",".join(COLUMNS) + "\n"


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_the_sample_is_read_whole() -> None:
    reading, orders = read_orders(SAMPLE, LIMITS)
    found = list(orders)
    assert len(found) == reading.orders == 61
    assert reading.faults == []
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


def test_the_catalogue_has_a_share_of_each_products_demand(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "o.csv",
        HEAD
        + "1,A,Thing,10,12/1/10 8:26,2.55,7,UK\n1,X9,Other,1,12/1/10 8:26,0.29,7,UK\n"
        + "2,A,Thing,5,12/1/10 8:26,2.95,7,UK\nC3,A,Thing,-2,12/1/10 8:26,2.55,7,UK\n",
    )
    assert [tuple(p) for p in read_catalogue(file, 0.66)] == [("A", "Thing", 295, 9), ("X9", "Other", 29, 1)]


def test_faults_name_line_and_column_and_reading_goes_on(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "o.csv",
        HEAD
        + "1,A,Thing,ten,12/1/10 8:26,2.55,7,UK\n"
        + "1,A,Thing\n"
        + "2,A,Thing,1,yesterday,2.55,7,UK\n"
        + "3,A,Thing,0,12/1/10 8:26,2.55,7,UK\n"
        + "4,A,Thing,1,12/1/10 8:26,2.55,7,UK\n",
    )
    reading, orders = read_orders(file, LIMITS)
    assert [order.idempotency_key for order in orders] == ["4"]
    assert [(fault.line, fault.column) for fault in reading.faults] == [
        (2, "Quantity"),
        (3, "-"),
        (4, "InvoiceDate"),
        (5, "items"),
    ]


def test_json_lines_are_read_line_by_line(tmp_path: Path) -> None:
    good = {"user_id": "u", "items": [{"product_id": 1, "quantity": 2}], "payment_method": "card"}
    lines = [json.dumps(good), "", "{", json.dumps({**good, "x": 1}), "y" * 70_000, json.dumps({**good, "user_id": 8})]
    file = written(tmp_path, "o.jsonl", "\n".join(lines))
    reading, orders = read_orders(file, LIMITS)
    assert [order.user_id for order in orders] == ["u", "8"]
    assert [fault.line for fault in reading.faults] == [3, 4, 5]


def test_a_file_of_no_known_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OrderstreamError, match="expected the columns"):
        list(read_orders(written(tmp_path, "o.csv", "a,b\n1,2\n"), LIMITS)[1])
    with pytest.raises(OrderstreamError, match="no such file"):
        read_orders(tmp_path / "none.csv", LIMITS)
