"""HTML from Python, and how its pages show numbers, money and times.  Text is escaped; what :func:`tag` made is not."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from typing import Any
from urllib.parse import quote


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Inside = Html | str | int | float | None | Iterable[Any]

DASH = "\N{EN DASH}"
"""Stands where there is nothing to say."""

_VOID = frozenset({"input", "link", "meta", "img"})


def tag(name: str, /, *inside: Inside, **attributes: Any) -> Html:
    """Make an element.

    Args:
        name: of the element.
        inside: what it holds: markup, text, or iterables of these; None is nothing.
        attributes: ``class_`` is ``class``, ``aria_label`` is ``aria-label``; True has no value, None and False are none.
    """
    made = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{made}>" if name in _VOID else f"<{name}{made}>{markup(inside)}</{name}>")


def markup(inside: Inside) -> Html:
    """Return what is markup as it is, and text escaped."""
    if inside is None:
        return Html("")
    if isinstance(inside, Html):
        return inside
    if isinstance(inside, (str, int, float)):
        return Html(escape(str(inside)))
    return Html("".join(map(markup, inside)))


def table(
    caption: str, heads: Iterable[Inside], rows: Iterable[Inside], *, empty: str = "None.", **attributes: Any
) -> Html:
    """Make a table with a caption that only screen readers see.

    Args:
        caption: what it shows.
        heads: cells of its head (``th``); none for a table of names and values.
        rows: ``tr`` elements.
        empty: what it says without any.
        attributes: of the table.
    """
    cells, lines = list(heads), list(rows)
    return tag(
        "table",
        tag("caption", caption, class_="hidden"),
        tag("thead", tag("tr", cells)) if cells else None,
        tag("tbody", lines or tag("tr", tag("td", empty, class_="none", colspan=max(1, len(cells))))),
        **attributes,
    )


def row(name: Inside, *cells: Inside, **attributes: Any) -> Html:
    """Make a row: its head, and cells; one that is no ``td`` yet becomes one."""
    return tag(
        "tr",
        name if _is_cell(name) else tag("th", name, scope="row"),
        (cell if _is_cell(cell) else tag("td", cell) for cell in cells),
        **attributes,
    )


def _is_cell(cell: Inside) -> bool:
    return isinstance(cell, Html) and cell.startswith(("<td", "<th"))


def column(text: Inside, class_: str | None = None, **attributes: Any) -> Html:
    """Make the head of a column; ``n`` is the class of numbers."""
    return tag("th", text, scope="col", class_=class_, **attributes)


def number(value: float | None, *, quiet: bool = True, class_: str = "n") -> Html:
    """Make a cell with a whole number; a zero is ``quiet``."""
    return tag("td", count(value), class_=f"{class_} zero" if quiet and not value else class_)


def card(title: Inside, *inside: Inside, note: Inside = None, class_: str = "", name: str, more: Inside = None) -> Html:
    """Make a section with a heading; ``name`` is its id, ``note`` stands beside the heading, ``more`` at the right."""
    heading = tag("h2", title, " ", tag("small", note) if note else None, id=f"h-{name}")
    return tag(
        "section",
        tag("div", heading, more, class_="head"),
        inside,
        class_=f"card {class_}".strip(),
        id=name,
        aria_labelledby=f"h-{name}",
    )


def tile(name: Inside, figure: str, below: Inside, **attributes: Any) -> Html:
    """Make a tile: a name, a large figure with its unit behind the first blank, what stands below."""
    value, _, unit = figure.partition(" ")
    big = tag("dd", value, tag("i", unit) if unit else None, class_="v")
    return tag("div", tag("dt", name), big, tag("dd", below, class_="t"), **attributes)


def scroll(name: str, *inside: Inside, class_: str = "") -> Html:
    """Make a region that scrolls by itself, by keyboard too; ``name`` is the id of the card that it stands in."""
    return tag("div", inside, class_=f"scroll {class_}".strip(), tabindex=0, role="region", aria_labelledby=f"h-{name}")


def link(text: Inside, folder: str, name: str, **attributes: Any) -> Html:
    """Make a link to something in a folder by its name, whatever characters that has."""
    return tag("a", text, href=f"{folder}/{quote(name, safe='')}", **attributes)


# Numbers, money, times


def count(value: float | None) -> str:
    """Return a whole number with its thousands set apart."""
    return DASH if value is None else f"{value:,.0f}"


def rate(value: float | None) -> str:
    """Return a rate: with one decimal below 100."""
    return DASH if value is None else f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:,.1f}"


def share(part: float, whole: float) -> str:
    """Return a part of a whole in percent; a dash of nothing."""
    if not whole:
        return DASH
    percent = 100 * part / whole
    return "<0.1 %" if 0 < percent < 0.1 else "100 %" if percent == 100 else f"{min(percent, 99.9):.1f} %"


def money(cents: int | None) -> str:
    """Return an amount of cents in whole units of the currency."""
    return DASH if cents is None else f"{'-' if cents < 0 else ''}{abs(cents) // 100:,}.{abs(cents) % 100:02d}"


def span(seconds: float | None) -> str:
    """Return a measured time, to the millisecond below a second."""
    if seconds is None:
        return DASH
    return (
        f"{max(1, round(seconds * 1000))} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds < 100 else age(seconds)
    )


def age(seconds: float) -> str:
    """Return a long time in its largest fitting unit."""
    for size, unit, upto in ((1, "s", 90), (60, "min", 5_400), (3_600, "h", 172_800)):
        if seconds < upto:
            return f"{max(0, round(seconds / size))} {unit}"
    return f"{round(seconds / 86_400):,} days"


def word(name: str | None) -> str:
    """Return a name of a program as people write it."""
    return (name or "unknown").replace("_", " ").replace(".", " ")


def moment(at: datetime | None, *, day: bool = True, exact: bool = False) -> Html:
    """Return a time in UTC; ``day``: with its day, ``exact``: to the millisecond."""
    if at is None:
        return Html(DASH)
    utc = at.astimezone(UTC)
    text = f"{utc:%Y-%m-%d %H:%M:%S}" if day else f"{utc:%H:%M:%S}"
    if exact:
        text += f".{utc.microsecond // 1000:03d}"
    return tag("time", text, datetime=utc.isoformat(timespec="milliseconds"))
