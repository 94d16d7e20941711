"""Order files: JSON lines, and the CSV form of the Online Retail data set.

CSV: ``InvoiceNo, StockCode, Description, Quantity, InvoiceDate, UnitPrice, CustomerID, Country``, one row an order line, the
rows of an invoice one after the other.  The invoice number is the idempotency key, so a file sent twice is the same orders.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orderstream.errors import InvalidRecord, OrderstreamError
from orderstream.jobs.init import Product
from orderstream.streams.orders import Limits, Order, OrderRecord, check, describe, new_order_id

COLUMNS = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country")
NO_PRODUCTS = frozenset({"POST", "D", "DOT", "M", "C2", "S", "B", "PADS", "CRUK", "AMAZONFEE", "BANK CHARGES"})
"""Stock codes of the data set that are no products: postage, discounts, carriage, manual entries, samples, fees."""

GUEST = "guest"
"""The user of an invoice without a customer."""

LINE_BYTES_MAX = 1024 * 1024


@dataclass(slots=True)
class Fault:
    """A place in a file that can't be read."""

    line: int
    column: str
    why: str


@dataclass(slots=True)
class Reading:
    """What a file held besides its orders: filled while it is read."""

    file: Path
    faults: list[Fault] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    orders: int = 0
    lines: int = 0

    def fault(self, line: int, column: str, why: str) -> None:
        """Note a fault; reading continues."""
        self.faults.append(Fault(line, column, why))


def read_orders(file: Path, limits: Limits) -> tuple[Reading, Iterator[Order]]:
    """Open a file of orders; its faults and what is skipped are in the reading once the orders are drawn.

    Raises:
        OrderstreamError: it can't be opened, or is no form that is known.
    """
    reading = Reading(file)
    if not file.is_file():
        raise OrderstreamError(f"{file}: no such file")
    suffix = file.suffix.lower()
    if suffix == ".csv":
        return reading, _csv_orders(reading, limits)
    if suffix in (".jsonl", ".ndjson", ".json"):
        return reading, _json_orders(reading, limits)
    raise OrderstreamError(f"{file}: expected .csv (the Online Retail form) or .jsonl (an order record a line)")


def _sound(reading: Reading, line: int, body: dict[str, Any] | bytes, limits: Limits) -> Order | None:
    try:
        if isinstance(body, bytes):
            record = OrderRecord.model_validate_json(body)
        else:
            record = OrderRecord.model_validate_json(json.dumps(body))
        order = check(record, limits, fallback_id=new_order_id)
    except ValidationError as error:
        reading.fault(
            line, ", ".join(sorted({str(f["loc"][0]) for f in error.errors() if f["loc"]})) or "-", describe(error)
        )
    except InvalidRecord as error:
        reading.fault(line, error.detail.partition(":")[0], error.detail)
    else:
        reading.orders += 1
        reading.lines += len(order.lines)
        return order
    return None


def _json_orders(reading: Reading, limits: Limits) -> Iterator[Order]:
    with reading.file.open("rb") as lines:
        number = 0
        while line := lines.readline(LINE_BYTES_MAX + 1):
            number += 1
            if len(line) > limits.size_bytes:
                reading.fault(number, "-", f"an order of more than {limits.size_bytes} bytes")
                while len(line) > LINE_BYTES_MAX and not line.endswith(b"\n"):
                    line = lines.readline(LINE_BYTES_MAX + 1)  # the rest of the same line
                continue
            if line.strip() and (order := _sound(reading, number, line, limits)) is not None:
                yield order


def _rows(reading: Reading) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line number and fields of each well-formed row."""
    try:
        text = reading.file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = reading.file.read_text(encoding="cp1252", errors="replace")
        reading.skipped["(read as Windows-1252: the file is not UTF-8)"] += 1
    rows = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        head = next(rows, None)
        if head is None or tuple(name.strip() for name in head) != COLUMNS:
            raise OrderstreamError(f"{reading.file}: line 1: expected the columns {', '.join(COLUMNS)}")
        for row in rows:
            if len(row) != len(COLUMNS):
                reading.fault(rows.line_num, "-", f"{len(row)} columns, expected {len(COLUMNS)}")
            else:
                yield rows.line_num, dict(zip(COLUMNS, (cell.strip() for cell in row), strict=True))
    except csv.Error as error:
        reading.fault(rows.line_num, "-", f"no CSV from here on: {error}")


def _kind(row: dict[str, str]) -> str | None:
    """Return why a row is no order line, or None."""
    if row["InvoiceNo"].upper().startswith("C") or row["Quantity"].startswith("-"):
        return "credit notes"
    if row["StockCode"].upper() in NO_PRODUCTS:
        return "rows that are no products"
    if not row["Description"] and row["UnitPrice"] in ("0", "0.0", "0.00"):
        return "stock corrections (no description, no price)"
    return None


def _placed_at(text: str) -> str:
    return datetime.strptime(text, "%m/%d/%y %H:%M").replace(tzinfo=UTC).isoformat()


def _csv_orders(reading: Reading, limits: Limits) -> Iterator[Order]:
    body: dict[str, Any] | None = None
    first = 0
    for number, row in _rows(reading):
        if (kind := _kind(row)) is not None:
            reading.skipped[kind] += 1
            continue
        if not row["Quantity"].isdigit():
            reading.fault(number, "Quantity", f"not a whole number: {row['Quantity']!r}")
            continue
        try:
            placed_at = _placed_at(row["InvoiceDate"])
        except ValueError:
            reading.fault(number, "InvoiceDate", f"not a date like 12/1/10 8:26: {row['InvoiceDate']!r}")
            continue
        if not row["InvoiceNo"] or not row["StockCode"]:
            reading.fault(number, "InvoiceNo" if not row["InvoiceNo"] else "StockCode", "empty")
            continue
        if body is None or body["idempotency_key"] != row["InvoiceNo"]:
            if body is not None and (order := _sound(reading, first, body, limits)) is not None:
                yield order
            first = number
            body = {
                "user_id": row["CustomerID"] or GUEST,
                "items": [],
                "payment_method": "invoice",
                "idempotency_key": row["InvoiceNo"],
                "placed_at": placed_at,
            }
        body["items"].append({"product_id": row["StockCode"], "quantity": int(row["Quantity"])})
    if body is not None and (order := _sound(reading, first, body, limits)) is not None:
        yield order


def read_catalogue(file: Path, stock_share: float) -> list[Product]:
    """Return the products of an order CSV, each with so large a share of its demand in stock, at least 1 unit.

    A product's price is the last one in the file, in cents (pence) without fractions.

    Raises:
        OrderstreamError: the file can't be read, with the first faults.
    """
    if not file.is_file():
        raise OrderstreamError(f"{file}: no such file")
    reading = Reading(file)
    names: dict[str, str] = {}
    prices: dict[str, int] = {}
    demand: Counter[str] = Counter()
    for number, row in _rows(reading):
        if _kind(row) is not None:
            continue
        try:
            quantity, price = int(row["Quantity"]), Decimal(row["UnitPrice"])
            if quantity < 0 or not price.is_finite() or price < 0:
                raise ValueError(row["UnitPrice"])
        except (ValueError, InvalidOperation):
            reading.fault(number, "Quantity, UnitPrice", f"not numbers: {row['Quantity']!r}, {row['UnitPrice']!r}")
            continue
        product_id = row["StockCode"]
        names[product_id] = row["Description"] or names.get(product_id, product_id)
        prices[product_id] = int((price * 100).to_integral_value())
        demand[product_id] += quantity
    if reading.faults:
        faults = "\n".join(f"  line {f.line}, {f.column}: {f.why}" for f in reading.faults[:10])
        raise OrderstreamError(f"{file}: {len(reading.faults)} rows can't be read\n{faults}")
    return [
        Product(product_id, names[product_id], prices[product_id], max(1, int(units * stock_share)))
        for product_id, units in demand.items()
    ]
