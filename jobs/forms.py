"""Which export calls its columns what, as a table, and how the names in a file are put to its fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from orderstream.errors import OrderstreamError
from orderstream.jobs.sheets import DELIMITERS, Sheet

FIELDS = {
    "order": ("order", "order_id", "order_number", "invoice", "idempotency_key"),
    "product": ("product", "product_id", "sku"),
    "quantity": ("quantity", "units", "qty"),
    "customer": ("customer", "customer_id", "user", "user_id"),
    "date": ("date", "placed_at", "order_date"),
    "payment": ("payment", "payment_method"),
    "price": ("price", "unit_price"),
    "name": ("name", "product_name", "description"),
    "status": ("status", "order_status"),
    "cancelled": ("cancelled", "cancelled_at"),
    "line": ("line", "order_item_id"),
}
"""What a row of an order may tell, with the names that stand for it in a file of no known export, and behind ``--map …=``.

``status``: a row of a cancelled order is left out; ``cancelled``: so is one with a yes or a time here.  ``line``: what tells
the rows of an order apart; the same one twice is a fault.
"""


class Form(NamedTuple):
    """An export.

    Attributes:
        columns: the names of each field's column, the best first; case, spaces and signs between letters don't count.
        needs: fields without which it is not this export.
        no_products: codes of rows that are no products: postage, discounts, carriage, manual entries, samples, fees.
        credit: how the number of a credit note begins.
        corrections: rows without name and price correct the stock.
        month_first: where no day is above 12, the month comes first in dates that are written like 12/1/10.
    """

    columns: Mapping[str, tuple[str, ...]]
    needs: tuple[str, ...] = ("order", "product", "quantity")
    no_products: frozenset[str] = frozenset()
    credit: str = ""
    corrections: bool = False
    month_first: bool = False


FORMS = {
    "online-retail": Form(
        {
            "order": ("InvoiceNo", "Invoice"),
            "product": ("StockCode",),
            "name": ("Description",),
            "quantity": ("Quantity",),
            "date": ("InvoiceDate",),
            "price": ("UnitPrice", "Price"),
            "customer": ("CustomerID",),
        },
        no_products=frozenset(
            {"POST", "D", "DOT", "M", "C2", "C3", "S", "B", "PADS", "CRUK", "AMAZONFEE", "BANK CHARGES"}
            | {"ADJUST", "ADJUST2", "TEST001", "TEST002"}
        ),
        credit="C",
        corrections=True,
        month_first=True,
    ),
    "shopify": Form(
        {
            "order": ("Name",),
            "product": ("Lineitem sku",),
            "name": ("Lineitem name",),
            "quantity": ("Lineitem quantity",),
            "date": ("Created at",),
            "price": ("Lineitem price",),
            "customer": ("Email",),
            "payment": ("Payment Method",),
            "status": ("Financial Status",),
            "cancelled": ("Cancelled at",),
        },
    ),
    "woocommerce": Form(
        {
            "order": ("Order Number", "order_number", "order_id", "Order ID"),
            "product": ("SKU", "item_sku", "Product SKU"),
            "name": ("Item Name", "item_name", "Product Name", "Name"),
            "quantity": ("Quantity (- Refund)", "item_quantity", "Quantity", "Qty"),
            "date": ("Order Date", "date", "order_date"),
            "price": ("Item Cost", "item_price", "Product Price"),
            "customer": ("Email (Billing)", "billing_email", "customer_email", "Billing Email", "customer_id"),
            "payment": ("Payment Method Title", "payment_method_title", "payment_method"),
            "status": ("Order Status", "status", "order_status"),
            "line": ("item_id", "Item ID"),
        },
        needs=("order", "product", "quantity", "customer", "status"),
    ),
    "amazon": Form(
        {
            "order": ("amazon-order-id", "order-id"),
            "product": ("sku",),
            "name": ("product-name",),
            "quantity": ("quantity-purchased", "quantity-shipped", "quantity"),
            "date": ("purchase-date",),
            "customer": ("buyer-email",),
            "status": ("item-status", "order-status"),
            "line": ("order-item-id",),
        },
        needs=("order", "product", "quantity", "date"),
    ),
    "olist": Form(
        {
            "order": ("order_id",),
            "line": ("order_item_id",),
            "product": ("product_id",),
            "price": ("price",),
            "date": ("order_purchase_timestamp",),
            "customer": ("customer_unique_id", "customer_id"),
            "payment": ("payment_type",),
            "status": ("order_status",),
        },
        needs=("order", "line", "product"),  # a row a unit
    ),
}
"""The exports with a map of their own: the UCI data sets Online Retail and Online Retail II; orders of Shopify, and of
WooCommerce by Advanced Order Export or Customer/Order/Coupon Export, a row an item; reports of Amazon; order items of Olist.
"""

PLAIN = Form(FIELDS)
"""A file of no known export: names as in :data:`FIELDS`."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NOT_SOLD = _words(
    "cancelled canceled refunded voided void failed trash deleted unavailable expired declined denied rejected returned"
    " abandoned chargedback chargeback unfulfillable restocked draft autodraft checkoutdraft shippedreturnedtoseller"
    " shippedreturningtoseller shippedrejectedbybuyer"
)
"""Statuses of orders that are not to be sold, as :func:`plain` has them."""

SOLD = _words(
    "paid partiallypaid authorized pending pendingpayment unpaid partiallyrefunded fulfilled unfulfilled partial onhold"
    " processing inprogress completed complete open new placed created approved accepted confirmed invoiced ready"
    " unshipped partiallyshipped shipping shipped dispatched sent delivered done closed pendingavailability"
    " invoiceunconfirmed shippeddeliveredtobuyer shippedoutfordelivery shippedpickedup shippedlostintransit"
    " shippeddamaged pendingwaitingforpickup"
)
"""Statuses of orders that are sold."""

YES = _words("yes y true t 1 x cancelled canceled")
NO = _words("no n false f 0 notcancelled notcanceled 00000000 00000000000000")
"""What stands for cancelled, and for not; the last ones are the times that MySQL has for none."""

NOTHING = frozenset({"", "nan", "null", "none", "na", "#na"})
"""What stands for no value."""


class Map(NamedTuple):
    """What ``--map`` says: an export, if any, and columns by their fields."""

    form: str | None = None
    fields: Mapping[str, str] = {}


AS_IT_IS = Map()
"""Nothing said: the file's own names decide."""


class Columns(NamedTuple):
    """Which column holds which field.

    Attributes:
        form: of which export the file is.
        title: that export's name, or ``plain``.
        delimiter: between the columns.
        at: the place of each field that is there, from 0.
        names: the column's name in the file, by field.
    """

    form: Form
    title: str
    delimiter: str
    at: Mapping[str, int]
    names: Mapping[str, str]


def plain(name: str) -> str:
    """Return a name without what differs between writers of the same name."""
    return re.sub(r"[^\w#]|_", "", name.casefold())


_FIELD_OF = {
    plain(alias): field
    for columns in (FORMS["online-retail"].columns, FIELDS)
    for field, aliases in columns.items()
    for alias in aliases
}


def read_map(given: Iterable[str]) -> Map:
    """Read the values of ``--map``: the name of an export, or ``COLUMN=FIELD``.

    Raises:
        ValueError: one is neither.
    """
    form, fields = None, {}
    for text in given:
        column, equals, field = text.rpartition("=")
        if not equals:
            form = text.strip().lower()
            if form not in FORMS:
                raise ValueError(f"{text!r}: expected COLUMN=FIELD, or one of {', '.join(FORMS)}")
        elif (found := _FIELD_OF.get(plain(field))) is None:
            raise ValueError(f"{text!r}: no field {field!r}: expected one of {', '.join(FIELDS)}")
        else:
            fields[found] = column.strip()
    return Map(form, fields)


def columns_of(sheet: Sheet, given: Map, forms: Mapping[str, Form] = FORMS, other: Form = PLAIN) -> Columns:
    """Find out how a file is delimited and which column is which.

    Args:
        sheet: the file.
        given: what the user says of it.
        forms: exports that are tried, in this order.
        other: what is tried behind them.

    Raises:
        OrderstreamError: it fits nothing; with what it has, and what to do.
    """
    named = {title: form for title, form in forms.items() if given.form in (None, title)}
    tried = named if given.form else {**named, "plain": other}
    heads = {delimiter: sheet.head(delimiter) for delimiter in DELIMITERS}
    for title, form in tried.items():
        for delimiter, head in heads.items():
            at = _places(form, head, given.fields)
            own = [field for field in ("order", "product") if field in at and field not in given.fields]
            if all(field in at for field in form.needs) and (own or form is other or given.form):
                names = [head[place] for place in at.values()]
                if twice := sorted({name for name in names if [plain(n) for n in head].count(plain(name)) > 1}):
                    raise OrderstreamError(f"{sheet.file}: line {sheet.start + 1}: two columns are called {twice[0]!r}")
                return Columns(form, title, delimiter, at, {field: head[place] for field, place in at.items()})
    raise OrderstreamError(_misfit(sheet, heads, given, tried))


def _places(form: Form, head: Sequence[str], given: Mapping[str, str]) -> dict[str, int]:
    places = {plain(name): place for place, name in reversed([*enumerate(head)])}
    wanted = {field: names for field, names in form.columns.items() if field not in given}
    wanted |= {field: (name,) for field, name in given.items()}
    taken = {plain(name) for name in given.values()}
    found = {}
    for field, names in wanted.items():
        free = [plain(name) for name in names if field in given or plain(name) not in taken]
        if (place := next((places[name] for name in free if name in places), None)) is not None:
            found[field] = place
    return found


def _misfit(sheet: Sheet, heads: Mapping[str, list[str]], given: Map, tried: Mapping[str, Form]) -> str:
    delimiter, head = max(heads.items(), key=lambda item: len(item[1]))
    lines = [f"{sheet.file}: line {sheet.start + 1}: the names of its columns fit no known form"]
    shown = ", ".join(repr(name[:40]) for name in head[:40]) + (", …" if len(head) > 40 else "")
    if len(head) < 2:
        lines.append(f"read as {sheet.encoding}, with none of the delimiters {', '.join(DELIMITERS.values())}: {shown}")
    else:
        lines.append(f"read as {sheet.encoding}, delimited by {DELIMITERS[delimiter]}: {len(head)} columns: {shown}")
    absent = [name for name in given.fields.values() if plain(name) not in map(plain, head)]
    if absent:
        lines.append(f"--map names columns that it has not: {', '.join(absent)}")
    near = min(tried, key=lambda title: (_lacks(tried[title], head, given), title == "plain"))
    for field in _lacking(tried[near], head, given):
        lines.append(f"{near} lacks {field}, in a column called {' or '.join(tried[near].columns.get(field, ('?',)))}")
    lines.append(f"say which it is by --map COLUMN=FIELD, for each of the fields {', '.join(tried[near].needs)}")
    return "\n  ".join(lines)


def _lacking(form: Form, head: Sequence[str], given: Map) -> list[str]:
    return [field for field in form.needs if field not in _places(form, head, given.fields)]


def _lacks(form: Form, head: Sequence[str], given: Map) -> int:
    return len(_lacking(form, head, given))
