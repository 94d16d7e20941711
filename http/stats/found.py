"""The pages of orders: those of a customer, or that asked for a product; and one, with its history and its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from yarl import URL

from orderstream.http.history import history
from orderstream.http.stats.html import (
    DASH,
    Html,
    Inside,
    card,
    column,
    count,
    link,
    moment,
    money,
    row,
    span,
    table,
    tag,
    word,
)
from orderstream.settings import Settings
from orderstream.streams.orders import Reason, Status

PAGE_ROWS = 50
LOOKED_MAX = 20_000
"""Refused orders of a product are looked for among so many, the last ones: no index has the products of an order."""

PATH = "/stats/orders"
ENDS = (Status.CONFIRMED, Status.CANCELLED)

Names = Mapping[str, str]
"""Names of products by id."""


def pill(status: str) -> Html:
    """Return a status so that it is seen."""
    return tag("span", status.lower(), class_=f"badge {status.lower()}")


def _linked(product_id: str, names: Names) -> Html:
    return link(names.get(product_id, product_id), "/stats/products", product_id)


def _items(row_: Mapping[str, Any], names: Names, about: str | None) -> list[Inside]:
    lines = sorted(zip(row_["product_ids"], row_["quantities"], strict=True), key=lambda line: line[0] != about)
    shown: list[Inside] = []
    for product_id, units in lines[:1]:
        shown += [f"{count(units)} \N{MULTIPLICATION SIGN} ", _linked(product_id, names)]
    if len(lines) > 1:
        shown.append(tag("span", f" and {len(lines) - 1} more", class_="dim"))
    return shown


def orders_card(
    title: Inside,
    rows: Sequence[Mapping[str, Any]],
    names: Names,
    *,
    name: str,
    about: str | None = None,
    older: URL | None = None,
    note: Inside = None,
    empty: str = "No orders.",
) -> Html:
    """Return a list of orders.

    Args:
        title: of the card.
        rows: order_id, status, reason, user_id, total_cents, created_at, product_ids, quantities; newest first.
        names: of products.
        name: the card's id.
        about: of this product the units stand first.
        older: where the list goes on; None at its end.
        note: beside the title.
        empty: what it says without any.
    """
    lines = [
        row(
            tag(
                "th",
                link(one["order_id"], PATH, one["order_id"], class_="mono"),
                scope="row",
                class_="id",
            ),
            tag("td", moment(one["created_at"]), class_="at"),
            tag(
                "td",
                pill(one["status"]),
                tag("span", " ", word(one["reason"]), class_="dim") if one["reason"] else None,
                class_="verdict",
            ),
            tag("td", tag("a", one["user_id"], href=URL(PATH).with_query(q=one["user_id"])), class_="text"),
            tag("td", _items(one, names, about), class_="text"),
            tag("td", money(one["total_cents"]), class_="n"),
        )
        for one in rows
    ]
    heads = (
        column("order"),
        column("taken in"),
        column("status"),
        column("customer"),
        column("units"),
        column("total", "n"),
    )
    return card(
        title,
        table("Orders, newest first", heads, lines, empty=empty, class_="orders"),
        tag("p", tag("a", "Older ones", href=older), class_="pager") if older is not None else None,
        name=name,
        class_="full",
        note=note,
    )


def place_of(asked: Mapping[str, str]) -> tuple[datetime, str] | None:
    """Read the place before which a list goes on, ``TIME,ORDER``; None where there is none."""
    at, _, order_id = asked.get("before", "").partition(",")
    try:
        place = datetime.fromisoformat(at), str(UUID(order_id))
    except ValueError:
        return None
    return place if place[0].tzinfo is not None else None


def older_than(rows: Sequence[Mapping[str, Any]], **asked: str) -> URL | None:
    """Return where a list goes on behind these rows; None where there are no more."""
    if len(rows) <= PAGE_ROWS:
        return None
    last = rows[PAGE_ROWS - 1]
    return URL(PATH).with_query(**asked, before=f"{last['created_at'].isoformat()},{last['order_id']}")


# One order


def why(
    order: Mapping[str, Any], names: Names, left: Mapping[str, int | None], limits: Mapping[str, int | None]
) -> list[Html]:
    """Return why an order ended without a sale, a sentence each.

    Args:
        order: a row of the query ``order``, with its ``lines``.
        names: of products.
        left: units of a product that were left when the order was refused; None where that is not known any more.
        limits: what a customer may have of a product now.
    """
    said: list[Html] = []
    for line in order["lines"]:
        product, units = _linked(line["product_id"], names), count(line["quantity"])
        match line["reason"]:
            case Reason.INSUFFICIENT_STOCK:
                said.append(
                    tag(
                        "li",
                        f"It wanted {units} of ",
                        product,
                        f"; {_left(line['quantity'], left.get(line['product_id']))}.",
                    )
                )
            case Reason.UNKNOWN_PRODUCT:
                said.append(
                    tag(
                        "li",
                        "There was no product ",
                        tag("span", line["product_id"], class_="mono"),
                        " in the catalogue.",
                    )
                )
            case Reason.USER_LIMIT:
                now = limits.get(line["product_id"])
                most = "" if now is None else f", {count(now)} today"
                said.append(
                    tag("li", f"With {units} of ", product, f" its customer would have had more than one may{most}.")
                )
    match order["reason"]:
        case Reason.PAYMENT_DECLINED:
            said.append(tag("li", f"The provider declined the charge of {money(order['total_cents'])}."))
        case Reason.EXPIRED:
            said.append(tag("li", "Its hold's time was over before it was charged."))
        case Reason.CANCELLED_BY_USER:
            paid = order["paid_at"] is not None
            said.append(
                tag(
                    "li",
                    "It was cancelled ",
                    "after it was paid: what was sold came back." if paid else "before it was paid.",
                )
            )
    return said


def _left(wanted: int, units: int | None) -> str:
    if units is None or units < 0:
        return "there were fewer"
    if units >= wanted:  # another transaction gave them back in the same moment
        return "there were fewer at that moment"
    return "none was left" if units == 0 else "1 was left" if units == 1 else f"{count(units)} were left"


def order_page(
    order: Mapping[str, Any],
    settings: Settings,
    names: Names,
    left: Mapping[str, int | None],
    limits: Mapping[str, int | None],
) -> list[Html]:
    """Return the sections of one order's page; see :func:`why`."""
    reasons = why(order, names, left, limits)
    return [
        tag(
            "div",
            tag("h1", "Order ", tag("span", order["order_id"], class_="mono")),
            tag(
                "p",
                pill(order["status"]),
                " ",
                (tag("strong", word(order["reason"])), ", ") if order["reason"] else None,
                "customer ",
                tag("a", order["user_id"], href=URL(PATH).with_query(q=order["user_id"])),
                f", {money(order['total_cents'])} by {order['payment_method']}"
                if order["total_cents"] is not None
                else None,
            ),
            tag("ul", reasons, class_="why", id="why") if reasons else None,
            class_="title full",
        ),
        card("History", _timeline(order, settings), name="history", class_="half"),
        card("Money", _payment(order), name="money", class_="half"),
        card("Lines", _lines(order, names), name="lines", class_="full"),
        card("Record", _records(order, settings), name="record", class_="full"),
    ]


def _timeline(order: Mapping[str, Any], settings: Settings) -> Html:
    steps: list[Html] = []
    before: datetime | None = None
    for step in history(order, settings):
        record = step["record"]
        after = None if before is None else f"+{span(max(0.0, (step['at'] - before).total_seconds()))}"
        if after is not None and step["at"] == before:
            after = "at once"
        by = (
            "by no record of its own"
            if record is None
            else f"{record['topic']}, partition {record['partition']}, offset {record['offset']}"
        )
        steps.append(
            tag(
                "li",
                pill(step["status"]),
                " ",
                moment(step["at"], exact=True),
                tag("span", " ", after, class_="dim") if after else None,
                tag("div", by, class_="dim mono"),
                class_=step["status"].lower(),
            )
        )
        before = step["at"]
    if order["status"] not in ENDS:
        steps.append(tag("li", tag("span", "not over yet", class_="dim"), class_="open"))
    return tag("ol", steps, class_="timeline")


_MONEY = {
    None: "Nobody was asked for money, or the answer is not known.",
    "SUCCESS": "Charged.",
    "FAILED": "Declined.",
    "VOID_DUE": "Whatever was charged is to be given back; the provider is asked.",
    "VOIDED": "Nothing was kept: the provider has voided the charge.",
    "REFUND_DUE": "To be refunded; the provider is asked.",
    "REFUNDED": "Refunded.",
    "REFUSED": "The provider refused to give it back: people have to.",
}


def _payment(order: Mapping[str, Any]) -> Html:
    rows = [row("amount", tag("td", money(order["total_cents"]), class_="n"))]
    for name, key in (("charge", "charge_id"), ("method", "payment_method"), ("closed because", "closed_why")):
        if order[key]:
            rows.append(row(name, tag("td", order[key], class_="n mono")))
    for name, key in (
        ("charged, or declined", "charged_at"),
        ("given back", "refunded_at"),
        ("refused to give it back", "refused_at"),
        ("asked again", "retried_at"),
        ("closed by people", "closed_at"),
    ):
        if order[key] is not None:
            rows.append(row(name, tag("td", moment(order[key], exact=True), class_="n")))
    status = order["payment_status"]
    unheld = status is None and order["reserved_at"] is None and order["status"] == Status.CANCELLED
    said = "Nobody was asked for money: it never held its units." if unheld else _MONEY[status]
    return tag(
        "div",
        tag("p", said, class_="bad-text" if status == "REFUSED" else None),
        table("Money of the order", (), rows),
    )


def _lines(order: Mapping[str, Any], names: Names) -> Html:
    rows = [
        row(
            tag(
                "th",
                _linked(line["product_id"], names),
                tag("span", line["product_id"], class_="id"),
                scope="row",
                class_="name",
            ),
            tag("td", count(line["quantity"]), class_="n"),
            tag("td", money(line["unit_price_cents"]), class_="n"),
            tag(
                "td",
                DASH if line["unit_price_cents"] is None else money(line["quantity"] * line["unit_price_cents"]),
                class_="n",
            ),
            tag(
                "td",
                line["state"],
                (", ", tag("span", word(line["reason"]), class_="bad-text")) if line["reason"] else None,
            ),
        )
        for line in order["lines"]
    ]
    heads = (column("product"), column("units", "n"), column("price", "n"), column("amount", "n"), column("state"))
    return table("Lines of the order", heads, rows)


def _records(order: Mapping[str, Any], settings: Settings) -> Html:
    def place(topic: str, partition: int, offset: int) -> Html:
        return tag("td", f"{settings.topic(topic)}, partition {partition}, offset {offset}", class_="mono text")

    rows = [row("its record", place("orders", order["home"], order["source_offset"]))]
    if order["command_offset"] is not None:
        rows.append(
            row(
                "the cancel that ended it", place("order-commands", order["command_partition"], order["command_offset"])
            )
        )
    rows.append(
        row("its events", tag("td", f"{settings.topic('order-events')}, partition {order['home']}", class_="mono text"))
    )
    if order["idempotency_key"]:
        rows.append(row("idempotency key", tag("td", order["idempotency_key"], class_="mono text")))
    if order["placed_at"] is not None:
        rows.append(row("placed by its client", tag("td", moment(order["placed_at"], exact=True))))
    return table("Where the order's records stand", (), rows)
