"""The pages of products: all of them, searched and sorted; and one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from yarl import URL

from orderstream.http.stats.html import (
    DASH,
    Html,
    Inside,
    age,
    card,
    column,
    count,
    link,
    moment,
    money,
    row,
    share,
    table,
    tag,
    tile,
    word,
)
from orderstream.http.stats.shelf import ORDERS, SHOWN, Product, Totals, select

PAGE_ROWS = 50
PATH = "/stats/products"

LONG_S = 90 * 86_400.0
"""What lasts longer is not told to the day."""

HEADS: Mapping[str, tuple[str, str]] = {
    "name": ("product", ""),
    "price": ("price", "n"),
    "left": ("left", "n"),
    "held": ("held", "n"),
    "sold": ("sold", "n"),
    "through": ("sell-through", "meter"),
    "revenue": ("revenue", "n"),
    "rate": ("per min", "n"),
    "lasts": ("sold out in", "n"),
}


class Wanted(NamedTuple):
    """What a list of products is asked for; see :func:`orderstream.http.stats.shelf.select`."""

    text: str = ""
    show: str = "all"
    sort: str = "lasts"
    descending: bool = False
    page: int = 1

    def link(self, **changes: Any) -> URL:
        """Return where the list is with these changes; from its first page unless they say."""
        other = self._replace(**{"page": 1, **changes})
        asked = {"q": other.text, "show": other.show, "sort": other.sort, "page": str(other.page)}
        asked["dir"] = "desc" if other.descending else "asc"
        usual = {"q": "", "show": "all", "sort": "lasts", "page": "1", "dir": _usual(other.sort)}
        return URL(PATH).with_query({key: value for key, value in asked.items() if value != usual[key]})


def _usual(sort: str) -> str:
    return "desc" if ORDERS[sort][1] else "asc"


def wanted_of(asked: Mapping[str, str]) -> Wanted:
    """Read what is asked for; what is no such word is passed over."""
    sort = asked.get("sort", "")
    sort = sort if sort in ORDERS else "lasts"
    show, page, turn = asked.get("show", ""), asked.get("page", ""), asked.get("dir", "")
    return Wanted(
        asked.get("q", "")[:200].strip(),
        show if show in SHOWN else "all",
        sort,
        (turn if turn in ("asc", "desc") else _usual(sort)) == "desc",
        int(page) if page.isascii() and page.isdigit() and 0 < len(page) < 7 and int(page) else 1,
    )


def lasts(one: Product) -> Html:
    """Return when a product will be sold out, in words."""
    if one.sold_out:
        return tag("span", "sold out" if one.sold or one.reserved else "no stock", class_="badge out")
    if one.rate is None:
        return tag("span", "measuring", class_="dim", title="The rate is known after some seconds.")
    if one.lasts_s is None:
        return tag("span", "not selling", class_="dim", title="No unit was taken in the last five minutes.")
    if one.lasts_s > LONG_S:
        return tag("span", "> 90 days", class_="dim")
    at = datetime.now(UTC) + timedelta(seconds=one.lasts_s)
    return tag(
        "span",
        _left_for(one.lasts_s),
        class_="soon" if one.running_out else None,
        title=f"about {at:%Y-%m-%d %H:%M} UTC",
    )


def _left_for(seconds: float) -> str:
    if seconds < 60:
        return "< 1 min"
    return f"{round(seconds / 60)} min" if seconds < 5_400 else age(seconds)


def meter(one: Product) -> Html:
    """Return a bar of what is sold, held and left."""
    had = one.available + one.reserved + one.sold or 1
    sold, held = 100 * one.sold / had, 100 * one.reserved / had
    return tag(
        "svg",
        tag("rect", class_="all", width="100%", height=8, rx=2),
        tag("rect", class_="sold", width=f"{sold:.2f}%", height=8, rx=2) if sold else None,
        tag("rect", class_="held", x=f"{sold:.2f}%", width=f"{held:.2f}%", height=8) if held else None,
        class_="meter",
        aria_hidden="true",
    )


def catalogue(products: Sequence[Product], sums: Totals, wanted: Wanted) -> list[Html]:
    """Return the sections of the list.

    Args:
        products: all of them.
        sums: of them.
        wanted: which, and how.
    """
    found = select(products, wanted.text, wanted.show, wanted.sort, descending=wanted.descending)
    pages = max(1, -(-len(found) // PAGE_ROWS))
    at = min(wanted.page, pages)
    shown = found[(at - 1) * PAGE_ROWS : at * PAGE_ROWS]
    numbers = {"all": sums.products, "soon": sums.running_out, "out": sums.sold_out}
    narrow = tag(
        "ul",
        (
            tag(
                "li",
                tag(
                    "a",
                    name,
                    tag("b", count(numbers[key])) if key in numbers else None,
                    href=wanted.link(show=key),
                    aria_current="true" if key == wanted.show else None,
                ),
            )
            for key, (name, _) in SHOWN.items()
        ),
        class_="tabs",
    )
    first = (at - 1) * PAGE_ROWS
    said = f"{count(first + 1)} to {count(first + len(shown))} of {count(len(found))}" if found else "none"
    return [
        tag("h1", "Products"),
        tag(
            "div",
            tag(
                "form",
                tag("label", "Search by name or id", for_="search"),
                tag(
                    "input",
                    id="search",
                    name="q",
                    type="search",
                    value=wanted.text,
                    maxlength=200,
                    autocomplete="off",
                    spellcheck="false",
                ),
                (
                    tag("input", type="hidden", name=key, value=value)
                    for key, value in wanted.link().query.items()
                    if key != "q"
                ),
                id="narrow",
                role="search",
                action=PATH,
                data_live=True,
                data_keep=True,
                hidden=True,
            ),
            tag("nav", narrow, aria_label="Which products"),
            class_="tools full",
        ),
        tag(
            "section",
            table(
                "Products, with what is left, held and sold, and when they will be sold out",
                (_head(key, wanted) for key in HEADS),
                map(_row, shown),
                empty="No product is like that.",
                class_="products",
            ),
            class_="card full",
            aria_label="Products",
        ),
        tag(
            "nav",
            tag("span", said, role="status", id="said"),
            tag("span", _turn("Previous", wanted, at - 1, pages), " ", _turn("Next", wanted, at + 1, pages)),
            class_="pager full",
            aria_label="Pages of the list",
        ),
    ]


def _turn(text: str, wanted: Wanted, to: int, pages: int) -> Html:
    there = 1 <= to <= pages
    return tag("a", text, href=wanted.link(page=to)) if there else tag("span", text, class_="dim", aria_hidden="true")


def _head(key: str, wanted: Wanted) -> Html:
    text, kind = HEADS[key]
    here = key == wanted.sort
    descending = not wanted.descending if here else ORDERS[key][1]
    arrow = tag("span", " ↓" if wanted.descending else " ↑", aria_hidden="true") if here else None
    return column(
        tag("a", text, arrow, href=wanted.link(sort=key, descending=descending)),
        kind or None,
        aria_sort=("descending" if wanted.descending else "ascending") if here else None,
    )


def _row(one: Product) -> Html:
    def cell(label: str, *inside: Inside, class_: str = "n") -> Html:
        return tag("td", inside, class_=class_, data_label=label)

    name = link(one.name, PATH, one.product_id)
    had = one.available + one.reserved + one.sold
    per_min = DASH if one.rate is None else f"{60 * one.rate:,.1f}"
    return row(
        tag("th", name, tag("span", one.product_id, class_="id"), scope="row", class_="name"),
        cell("price", money(one.price_cents)),
        cell("left", count(one.available), class_="n zero" if one.sold_out else "n"),
        cell("held", count(one.reserved), class_="n" if one.reserved else "n zero"),
        cell("sold", count(one.sold), class_="n" if one.sold else "n zero"),
        cell("sell-through", meter(one), tag("span", share(one.sold, had)), class_="meter"),
        cell("revenue", money(one.revenue_cents), class_="n" if one.revenue_cents else "n zero"),
        cell("per min", per_min, class_="n" if one.rate else "n zero"),
        cell("sold out in", lasts(one)),
        class_="gone" if one.sold_out else None,
    )


def product_page(one: Product, moves: Sequence[Mapping[str, Any]], orders: Html) -> list[Html]:
    """Return the sections of one product's page.

    Args:
        one: the product.
        moves: what people and deliveries moved of it, newest first.
        orders: those that asked for it last.
    """
    had = one.available + one.reserved + one.sold
    limit = "any number a customer" if one.limit_per_user is None else f"{count(one.limit_per_user)} a customer at most"
    per_min = "not known yet" if one.rate is None else f"{60 * one.rate:,.1f} a minute go, in the last 5 min"
    rows = [
        row(
            tag("th", moment(move["at"]), scope="row"),
            tag("td", word(move["movement"])),
            tag("td", f"{move['quantity']:+,}", class_="n"),
            tag("td", move["reason"] or "", class_="text"),
        )
        for move in moves
    ]
    return [
        tag(
            "div",
            tag("h1", one.name, " ", lasts(one) if one.sold_out else None),
            tag("p", "Product ", tag("span", one.product_id, class_="mono"), f", {limit}", class_="dim"),
            class_="title full",
        ),
        tag(
            "dl",
            tile(
                "Left",
                count(one.available),
                f"{count(one.reserved)} held for orders",
                class_="bad" if one.sold_out else None,
            ),
            tile("Sold", count(one.sold), f"of {count(had)} units"),
            tile("Sell-through", share(one.sold, had), meter(one)),
            tile("Revenue", money(one.revenue_cents), f"price now {money(one.price_cents)}"),
            tile("Sold out in", _lasts(one), per_min, class_="warn" if one.running_out else None),
            class_="tiles",
            id="figures",
            aria_label="Figures of the product",
        ),
        orders,
        card(
            "Deliveries and corrections",
            table(
                "What people and deliveries moved",
                (column("at"), column("movement"), column("units", "n"), column("reason")),
                rows,
            ),
            name="moves",
            class_="full",
            note=f"the last {len(moves)}" if moves else None,
        ),
    ]


def _lasts(one: Product) -> str:
    if one.sold_out:
        return "now"
    return DASH if one.lasts_s is None else "> 90 days" if one.lasts_s > LONG_S else _left_for(one.lasts_s)
