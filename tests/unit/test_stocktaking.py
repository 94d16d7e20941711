"""Tables of stock: what is read, and where a row is at fault; nothing of money or units is changed on the way."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from orderstream.jobs.invoices import Reading
from orderstream.jobs.stocktaking import Row, read_stock


def read(folder: Path, text: str) -> tuple[Reading, list[Row]]:
    file = folder / "s.csv"
    file.write_text(text)
    return read_stock(file, {"reason": "counted"}, uuid.UUID(int=1))


@pytest.mark.parametrize(
    ("cells", "cents"),
    [("2.55,", 255), ("2.550,", 255), ("2.5,", 250), (",300", 300), ("2.55,255", 255), ("2.55,255.0", 255), ("0,0", 0)],
)
def test_a_price_is_read_to_the_cent(cells: str, cents: int, tmp_path: Path) -> None:
    reading, (row,) = read(tmp_path, f"product,quantity,price,price_cents\ncup,1,{cells}\n")
    assert (reading.faults, row.commands[0].price_cents) == ([], cents)


@pytest.mark.parametrize(
    ("cells", "column", "why"),
    [
        ("1,2.555,", "price", "not a whole number of cents: '2.555'"),
        ("1,2.5500000001,", "price", "not a whole number of cents"),
        ("1,2.55,300", "price", "2.55, but price_cents is 300"),
        ("1,,2.55", "price_cents", "not a whole number"),
        ("1,-2.55,", "price", "not an amount"),
        ("1,9999999999999999,", "-", "price_cents: Input should be less than or equal to 1000000000000"),
        ("1000000000000000,,", "-", "quantity: Input should be less than or equal to 1000000000"),
        ("-1,,", "-", "set needs a quantity of at least 0, not -1"),
    ],
)
def test_a_row_at_fault_is_told_what_is_wrong(cells: str, column: str, why: str, tmp_path: Path) -> None:
    reading, rows = read(tmp_path, f"product,quantity,price,price_cents\ncup,{cells}\n")
    ((line, of, told),) = [(fault.line, fault.column, fault.why) for fault in reading.faults]
    assert (line, of, rows) == (2, column, [])
    assert why in told
    assert "reason" not in told
