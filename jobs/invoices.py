"""Order files: JSON lines, and tables as shops export them (:mod:`orderstream.jobs.forms`), one row an order line.

A table is read whole before its first order is drawn: an invoice is an order with all of its rows, wherever they stand, or
none.  Its number is the idempotency key, so a file sent twice is the same orders.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from pydantic import ValidationError

from orderstream.errors import InvalidRecord, OrderstreamError
from orderstream.jobs.forms import AS_IT_IS, NO, NOT_SOLD, NOTHING, SOLD, YES, Columns, Map, columns_of, plain
from orderstream.jobs.init import Product
from orderstream.jobs.produce import content_of
from orderstream.jobs.sheets import DELIMITERS, is_piped, opened, read_sheet
from orderstream.streams.orders import Limits, Order, OrderRecord, check, describe, new_order_id

LINE_BYTES_MAX = 1024 * 1024
TABLES, LINES = (".csv", ".tsv", ".txt"), (".jsonl", ".ndjson", ".json")

PAYMENT = "invoice"
"""How an order of a table is paid that does not say it."""

NOBODY = frozenset({"", "0", "nan", "null", "none", "n/a", "#n/a"})
"""What stands for no customer.  Each such invoice is a customer of its own: a limit a user is not theirs together."""

EARLIEST, AHEAD = datetime(1970, 1, 1, tzinfo=UTC), timedelta(days=1)
"""Of when an order of a table may be, and of how much later than now: its clock may be another one."""

DAY_FIRST, MONTH_FIRST = "day-first", "month-first"

# A number may have more digits than any bound has: the record that it goes into tells its bound.
_SHORTENED = re.compile(r"\d(?:[.,]\d+)?E\+\d+", re.IGNORECASE | re.ASCII)
_WHOLE = re.compile(r"([+-]?\d{1,1000})(?:[.,]0{1,2})?", re.ASCII)
_FLOAT = re.compile(r"(\d+)[.,]0", re.ASCII)
_MONEY = re.compile(r"[^\d\s.,+-]{0,3}\s*([+-]?\d{1,1000})(?:([.,])(\d+))?\s*[^\d\s.,+-]{0,3}", re.ASCII)
_DATE = re.compile(
    r"(\d{4}|\d{1,2})([-/.])(\d{1,2})\2(\d{4}|\d{1,2})"
    r"(?:[T ,]+(\d{1,2}):(\d\d)(?::(\d\d)(?:[.,]\d+)?)?\s*([AP]M)?)?\s*(Z|UTC|[+-]\d\d:?\d\d)?",
    re.IGNORECASE | re.ASCII,
)


@dataclass(slots=True)
class Fault:
    """A place in a file that can't be read."""

    line: int
    column: str
    why: str


@dataclass(slots=True)
class Reading:
    """What a file held besides its orders: filled while it is read.

    Attributes:
        faults: what can't be read.
        skipped: rows that are no order lines, by what they are.
        notes: how the file was read, where that is not as it looks.
        left_out: the numbers of the invoices that were left out, since a row of theirs is at fault.
        orders: drawn, with ``lines`` lines.
        unnamed: of these, orders that brought neither an id nor a key.
    """

    file: Path
    faults: list[Fault] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    orders: int = 0
    lines: int = 0
    unnamed: int = 0

    def fault(self, line: int, column: str, why: str) -> None:
        """Note a fault; reading continues."""
        self.faults.append(Fault(line, column, why))


@dataclass(slots=True)
class Invoice:
    """The rows of one number, put together: each text with the line where it stands first, units by product."""

    line: int
    rows: int = 0
    is_sound: bool = True
    is_sold: bool = False
    is_cancelled: bool = False
    customers: dict[str, int] = field(default_factory=dict)
    payments: dict[str, int] = field(default_factory=dict)
    dates: dict[str, int] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    units: dict[str, int] = field(default_factory=dict)


def run_id(run: UUID, line: int) -> str:
    """Return the id of the order in a line that brings none: the same whenever the file is sent under the id of this run.

    Like :func:`orderstream.streams.orders.new_order_id` it is a UUIDv7: of the run's time, in the order of the lines.
    """
    return str(UUID(int=run.int >> 62 << 62 | line << 30 | run.int & (1 << 30) - 1))


def day_or_pattern(dates: str) -> bool:
    """Tell whether this says how dates are written: which comes first, or a pattern of ``strptime``."""
    return dates in (DAY_FIRST, MONTH_FIRST) or "%" in dates


def read_orders(
    file: Path, limits: Limits, *, given: Map = AS_IT_IS, dates: str | None = None, run: UUID | None = None
) -> tuple[Reading, Iterator[Order]]:
    """Open a file of orders; its faults and what is skipped are in the reading once the orders are drawn.

    Args:
        file: a table, or an order record a line; packed or not; ``-`` is standard input.
        limits: bounds of an order.
        given: which columns of a table are which.
        dates: ``day-first``, ``month-first``, or how a date is written, for ``strptime``; without, as the file shows.
        run: a UUIDv7 that gives ids to records without id and key.

    Raises:
        OrderstreamError: it can't be opened, or is no form that is known.
    """
    reading, run = Reading(file), run or UUID(new_order_id())
    with opened(file) as (called, stream):
        name = called
        if is_piped(file) and not called.endswith(LINES + TABLES):
            name = (LINES if stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{" else TABLES)[0]
    if name.endswith(LINES):
        return reading, _json_orders(reading, limits, run)
    if name.endswith(TABLES):
        return reading, iter(_invoices(reading, limits, given, dates))
    raise OrderstreamError(
        f"{file}: expected a table ({', '.join(TABLES)}) or an order record a line ({', '.join(LINES)});"
        " packed by gzip or zip, or not"
    )


def _sound(reading: Reading, line: int, body: dict[str, Any] | bytes, limits: Limits, run: UUID) -> Order | None:
    try:
        record = OrderRecord.model_validate_json(body if isinstance(body, bytes) else json.dumps(body))
        order = check(record, limits, fallback_id=lambda: run_id(run, line))
    except ValidationError as error:
        reading.fault(
            line, ", ".join(sorted({str(f["loc"][0]) for f in error.errors() if f["loc"]})) or "-", describe(error)
        )
    except InvalidRecord as error:
        reading.fault(line, error.detail.partition(":")[0], error.detail)
    else:
        reading.orders += 1
        reading.lines += len(order.lines)
        reading.unnamed += record.order_id is None and record.idempotency_key is None
        return order
    return None


def _json_orders(reading: Reading, limits: Limits, run: UUID) -> Iterator[Order]:
    before: dict[str, tuple[int, int]] = {}
    with opened(reading.file) as (_, lines):
        number = 0
        while line := lines.readline(LINE_BYTES_MAX + 1):
            number += 1
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if len(line) > limits.size_bytes:
                reading.fault(number, "-", f"an order of more than {limits.size_bytes} bytes")
                while len(line) > LINE_BYTES_MAX and not line.endswith(b"\n"):
                    line = lines.readline(LINE_BYTES_MAX + 1)  # the rest of the same line
                continue
            if not line.strip() or (order := _sound(reading, number, line, limits, run)) is None:
                continue
            content = content_of(order.user_id, order.payment_method, order.lines)
            first, known = before.setdefault(order.order_id, (number, content))
            if known == content:
                yield order
                continue
            reading.orders -= 1
            reading.lines -= len(order.lines)
            column = "order_id" if order.idempotency_key is None else "idempotency_key"
            named = order.idempotency_key or order.order_id
            reading.fault(number, column, f"order_id_reused: {named} is the order of line {first}")


# Cells


def units_of(text: str) -> int:
    """Return a whole number; pandas may have written it as 6.0.

    Raises:
        ValueError: it is none.
    """
    if (found := _WHOLE.fullmatch(text)) is None:
        raise ValueError(f"not a whole number: {text!r}")
    return int(found[1])


def cents_of(text: str, mark: str) -> int:
    """Return an amount in cents; a sign of a currency may stand on either side.

    Args:
        text: the amount.
        mark: before its fraction, ``.`` or ``,``.

    Raises:
        ValueError: it is no amount of 0 or more, or no whole number of cents.
    """
    found = _MONEY.fullmatch(text)
    if found is None or found[2] not in (None, mark) or found[1].startswith("-"):
        raise ValueError(f"not an amount like 2{mark}55: {text!r}")
    fraction = (found[3] or "").rstrip("0")
    if len(fraction) > 2:
        raise ValueError(f"not a whole number of cents: {text!r}")
    return int(found[1] + fraction.ljust(2, "0"))


def mark_of(columns: Columns, amounts: Iterable[str]) -> str:
    """Return what stands before the fraction of these amounts: a comma where the columns leave it free and one has it."""
    return "," if columns.delimiter != "," and any(re.search(r"\d,\d+\D*$", text) for text in amounts) else "."


def _bare(text: str) -> str:
    """Return a number as it was before pandas made it a float: 17850.0 is 17850."""
    found = _FLOAT.fullmatch(text)
    return found[1] if found else text


def _parsed(text: str, day_first: bool) -> datetime:
    found = _DATE.fullmatch(text)
    if found is None:
        raise ValueError(text)
    one, _, two, three, hour, minute, second, half, zone = found.groups()
    if len(one) > 2:
        year, month, day = int(one), int(two), int(three)
    else:
        day, month = (int(one), int(two)) if day_first else (int(two), int(one))
        year = int(three) + {4: 0, 2: 2000 if int(three) < 69 else 1900}[len(three)]
    hours = int(hour or 0)
    if half:
        if not 1 <= hours <= 12:
            raise ValueError(text)
        hours = hours % 12 + (12 if half.upper() == "PM" else 0)
    at = f"{year:04}-{month:02}-{day:02}T{hours:02}:{minute or '00'}:{second or '00'}"
    return datetime.fromisoformat(at + (zone if zone and zone.upper() not in ("Z", "UTC") else "+00:00"))


def _days_first(texts: dict[str, int], columns: Columns, reading: Reading) -> bool:
    """Find out whether the day comes first in these dates, each with its line."""
    says: dict[bool, tuple[str, int]] = {}
    open_ones: list[tuple[str, int]] = []
    for text, line in texts.items():
        if (found := _DATE.fullmatch(text)) is None or len(found[1]) > 2:
            continue
        if int(found[1]) > 12 or found[2] == ".":
            says.setdefault(True, (text, line))
        elif int(found[3]) > 12:
            says.setdefault(False, (text, line))
        elif found[1] != found[3]:
            open_ones.append((text, line))
    if len(says) == 2:
        (day, at), (month, there) = says[True], says[False]
        raise OrderstreamError(
            f"{reading.file}: {columns.names['date']}: in line {at} the day comes first ({day}), in line {there} the month"
            f" ({month})\nsay which it is by --dates {DAY_FIRST} or --dates {MONTH_FIRST}: what does not fit is a fault then"
        )
    if True in says:
        day, at = says[True]
        reading.notes.append(f"the day comes first in its dates, as line {at} shows: {day}")
        return True
    usual = columns.form.month_first and all(re.match(r"[1-9]\d?/[1-9]", text) for text, _ in open_ones)
    if open_ones and False not in says and not usual:
        text, line = open_ones[0]
        raise OrderstreamError(
            f"{reading.file}: line {line}, {columns.names['date']}: {text}: is the day or the month first? No date of the"
            f" file shows it\nsay it by --dates {DAY_FIRST} or --dates {MONTH_FIRST}"
        )
    return False


def _moments(
    texts: dict[str, int], columns: Columns, dates: str | None, reading: Reading
) -> dict[str, datetime | None]:
    """Return these dates, in UTC where they name no zone; None for what is no date."""
    day_first = dates == DAY_FIRST if dates in (DAY_FIRST, MONTH_FIRST) else None
    if dates is None:
        day_first = _days_first(texts, columns, reading)
    found: dict[str, datetime | None] = {}
    for text in texts:
        try:
            at = datetime.strptime(text, dates or "") if day_first is None else _parsed(text, day_first)
            found[text] = at if at.tzinfo else at.replace(tzinfo=UTC)
        except (ValueError, KeyError):
            found[text] = None
    return found


def _is_moment(text: str, dates: str | None) -> bool:
    """Tell whether this is a date, whichever comes first in it."""
    for day_first in (True, False):
        with contextlib.suppress(ValueError, KeyError):
            _parsed(text, day_first)
            return True
    with contextlib.suppress(ValueError):
        return bool(datetime.strptime(text, dates or ""))
    return False


# Tables


def _rows(reading: Reading, given: Map) -> tuple[Columns, Callable[[], Iterator[tuple[int, dict[str, str], str]]]]:
    """Return the columns of a table, and what yields its rows: line, cells by field, fault."""
    sheet = read_sheet(reading.file)
    columns = columns_of(sheet, given)
    if sheet.encoding != "UTF-8" or columns.delimiter != "," or columns.title != "online-retail":
        reading.notes.append(f"read as {columns.title}, {sheet.encoding}, delimited by {DELIMITERS[columns.delimiter]}")

    def rows() -> Iterator[tuple[int, dict[str, str], str]]:
        for line, cells, fault in sheet.rows(columns.delimiter):
            yield line, {name: cells[at] if at < len(cells) else "" for name, at in columns.at.items()}, fault

    return columns, rows


def _kind(row: dict[str, str], columns: Columns) -> str | None:
    """Return why a row is no order line, or None."""
    form = columns.form
    if form.credit and row["order"].upper().startswith(form.credit):
        return "credit notes"
    if row["product"].upper() in form.no_products:
        return "rows that are no products"
    if form.corrections and not row.get("name", "-") and re.fullmatch(r"0+(?:[.,]0*)?", row.get("price", "-")):
        return "stock corrections (no description, no price)"
    if not row["product"] and not row.get("quantity"):
        return "rows without product and quantity"
    return None


def _shape(text: str) -> str:
    """Return what numbers of the same kind have in common: SK9 and SK10, but of digits alone as many."""
    return re.sub(r"[^\W\d_]", "a", re.sub(r"\d" if text.isdigit() else r"\d+", "0", text))


@dataclass(slots=True)
class Spoilt:
    """A row that can't be told to be one of an invoice: the number that it seems to have, and its neighbours'."""

    line: int
    number: str
    before: str
    behind: str = ""


class _Gathering:
    """Puts the rows of a table together to invoices."""

    def __init__(self, reading: Reading, columns: Columns, dates: str | None) -> None:
        self.reading, self.columns, self.dates = reading, columns, dates
        self.latest = datetime.now(UTC) + AHEAD
        self.invoices: dict[str, Invoice] = {}
        self.last = ""
        self.products: set[str] = set()
        self.shapes: set[str] = set()
        self.spoilt: list[Spoilt] = []
        self.at_the_end: list[Spoilt] = []
        self.suspects: set[str] = set()

    def fault(self, line: int, of: str, why: str) -> None:
        self.reading.fault(line, self.columns.names.get(of, "-"), why)

    def invoice(self, number: str, line: int) -> Invoice:
        if (found := self.invoices.get(number)) is None:
            found = self.invoices[number] = Invoice(line)
        return found

    def spoil(self) -> None:
        """Leave out the invoices of rows that can't be split: the one that a row names, else those of its neighbours."""
        for row in self.spoilt:
            is_named = row.number in self.invoices or _shape(row.number) in self.shapes or not self.shapes
            if row.number and is_named and (row.number == row.before or row.number not in self.products):
                self.invoice(row.number, row.line).is_sound = False
            else:  # it may lack the cell of its number
                self.suspects |= {row.number, row.before, row.behind}

    def add(self, line: int, row: dict[str, str], fault: str) -> None:
        """Take a row."""
        number = _bare(row["order"])
        kind = None if fault else _kind(row, self.columns)
        if fault or (kind is None and not number):
            self.fault(line, "-" if fault else "order", fault or "empty: whose row it is can't be told")
            self.at_the_end.append(Spoilt(line, number, self.last))
            self.spoilt.append(self.at_the_end[-1])
            return
        for spoilt in self.at_the_end if number else ():
            spoilt.behind = number
        if number:
            self.at_the_end.clear()
            self.shapes.add(_shape(number))
            self.products.add(row["product"])
            self.last = number
        if kind is not None:
            self.reading.skipped[kind] += 1
            return
        invoice = self.invoice(number, line)
        try:
            self._take(line, row, number, invoice)
        except InvalidRecord as error:
            self.fault(line, error.reason, error.detail)
            invoice.is_sound = False

    def _take(self, line: int, row: dict[str, str], number: str, invoice: Invoice) -> None:
        customer = _bare(row.get("customer", ""))
        for of, text in (("order", number), ("product", row["product"]), ("customer", customer)):
            if "+" in text and _SHORTENED.fullmatch(text):
                raise InvalidRecord(
                    of, f"{text}: a spreadsheet has shortened this number; export the file again, as text"
                )
        invoice.is_cancelled = self._is_cancelled(row, invoice.is_cancelled)
        if invoice.is_cancelled:
            self.reading.skipped["rows of orders that are cancelled"] += 1
            return
        if not row["product"]:
            raise InvalidRecord("product", "empty")
        try:
            units = units_of(row["quantity"]) if "quantity" in row else 1
        except ValueError as error:
            raise InvalidRecord("quantity", str(error)) from None
        if units == 0:
            self.reading.skipped["rows of 0 units"] += 1
            return
        if name := row.get("line"):
            if name in invoice.names:
                raise InvalidRecord("line", f"{name}: a line of {number} that is there already")
            invoice.names.add(name)
        if customer.casefold() not in NOBODY:
            invoice.customers.setdefault(customer, line)
        if payment := row.get("payment"):
            invoice.payments.setdefault(payment, line)
        if date := row.get("date"):
            invoice.dates.setdefault(date, line)
        invoice.rows += 1
        invoice.is_sold |= units > 0
        invoice.units[row["product"]] = invoice.units.get(row["product"], 0) + units

    def _is_cancelled(self, row: dict[str, str], before: bool) -> bool:
        """Tell whether a row is one of an order that is not to be sold; one that does not say it is as the row before."""
        said, status = (plain(_bare(row.get(of, "").casefold().removeprefix("wc-"))) for of in ("cancelled", "status"))
        if said not in YES | NO | NOTHING and not _is_moment(row["cancelled"], self.dates):
            raise InvalidRecord("cancelled", f"neither yes, no, nor a time: {row['cancelled']!r}")
        if said not in NO | NOTHING or status in NOT_SOLD:
            return True
        if status not in SOLD | NOTHING:
            raise InvalidRecord("status", f"is it sold? Not known: {row['status']!r}; say it as cancelled or paid")
        return before and status in NOTHING and said in NOTHING

    def is_whole(self, number: str, invoice: Invoice, moments: dict[str, datetime | None]) -> bool:
        """Tell whether all rows of an invoice agree; what they don't agree in is a fault."""
        before = len(self.reading.faults)
        for of, texts in (("customer", invoice.customers), ("payment", invoice.payments)):
            if len(texts) > 1:
                (first, at), (other, line) = [*texts.items()][:2]
                self.fault(line, of, f"{other}, but {first} in line {at}: {number} is an invoice of one")
        for text, line in invoice.dates.items():
            if (moment := moments[text]) is None:
                self.fault(line, "date", f"no date that can be read: {text!r}; --dates says how they are written")
            elif not EARLIEST <= moment <= self.latest:
                when = "before 1970" if moment < EARLIEST else "in the future"
                self.fault(line, "date", f"{when}: {text!r} is {moment.isoformat()[:10]}")
        for product_id, units in invoice.units.items():
            if units < 0:
                self.fault(invoice.line, "quantity", f"{number} takes back more of {product_id} than it sells: {units}")
        return invoice.is_sound and number not in self.suspects and len(self.reading.faults) == before


def _invoices(reading: Reading, limits: Limits, given: Map, dates: str | None) -> list[Order]:
    columns, rows = _rows(reading, given)
    gathering = _Gathering(reading, columns, dates)
    for line, row, fault in rows():
        gathering.add(line, row, fault)
    gathering.spoil()
    texts: dict[str, int] = {}
    for invoice in gathering.invoices.values():
        for text, line in invoice.dates.items():
            texts.setdefault(text, line)
    moments = _moments(texts, columns, dates, reading)
    orders = []
    for number, invoice in gathering.invoices.items():
        if not invoice.is_sold and invoice.is_sound:  # its rows were left out, or it only takes back
            if invoice.rows:
                reading.skipped["credit notes"] += invoice.rows
            continue
        if not gathering.is_whole(number, invoice, moments):
            reading.left_out.append(number)
            continue
        placed_at = min((at for text in invoice.dates if (at := moments[text])), default=None)
        body = {
            "user_id": next(iter(invoice.customers), f"guest-{number}"),
            "items": [{"product_id": name, "quantity": units} for name, units in invoice.units.items() if units],
            "payment_method": next(iter(invoice.payments), PAYMENT),
            "idempotency_key": number,
            "placed_at": placed_at and placed_at.isoformat(),
        }
        if (order := _sound(reading, invoice.line, body, limits, UUID(int=0))) is None:
            reading.left_out.append(number)
        else:
            orders.append(order)
    reading.faults.sort(key=lambda fault: fault.line)
    return orders


def read_catalogue(
    file: Path, stock_share: float, *, given: Map = AS_IT_IS, told: list[Fault] | None = None
) -> list[Product]:
    """Return the products of a table of orders, each with so large a share of its demand in stock, at least 1 unit.

    A product's price is the last one in the file that is not 0, in cents (pence).

    Args:
        file: the table.
        stock_share: units in stock, as a share of the units that were ordered.
        given: which columns are which.
        told: gets the rows whose price counts for nothing.

    Raises:
        OrderstreamError: the file can't be read, with the first faults.
    """
    reading = Reading(file)
    columns, rows = _rows(reading, given)
    if "price" not in columns.at:
        raise OrderstreamError(f"{file}: no column for the price\nsay which it is by --map COLUMN=price")
    names: dict[str, str] = {}
    prices: dict[str, int] = {}
    demand: Counter[str] = Counter()
    free: list[Fault] = []
    mark = mark_of(columns, (row["price"] for _, row, _ in rows()))
    for line, row, fault in rows():
        if fault:
            reading.fault(line, "-", fault)
            continue
        if _kind(row, columns) is not None:
            continue
        product_id, of = row["product"], "quantity"
        try:
            quantity = units_of(row["quantity"]) if "quantity" in row else 1
            of = "price"
            price = cents_of(row["price"], mark)
        except ValueError as error:
            reading.fault(line, columns.names[of], str(error))
            continue
        if quantity < 0:
            continue
        demand[product_id] += quantity
        if price == 0:
            free.append(Fault(line, columns.names["price"], f"{product_id} for 0: this price counts for nothing"))
            continue
        name = " ".join("".join(c if c.isprintable() else " " for c in row.get("name", "")).split())
        names[product_id] = name or names.get(product_id, product_id)
        prices[product_id] = price
    if reading.faults:
        faults = "\n".join(f"  line {f.line}, {f.column}: {f.why}" for f in reading.faults[:10])
        raise OrderstreamError(f"{file}: {len(reading.faults)} rows can't be read\n{faults}")
    if told is not None:
        told += free
    return [
        Product(product_id, names[product_id], prices[product_id], max(1, int(units * stock_share)))
        for product_id, units in demand.items()
        if product_id in prices
    ]
