"""The pages behind two numbers: dead letters, and what the last runs of ``orderstream reconcile`` found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from orderstream.http.stats.html import DASH, Html, card, column, count, moment, number, row, span, table, tag, word
from orderstream.sql.letters import Handling
from orderstream.streams.letters import Letter, LetterId

LETTERS_MAX = 200
"""Letters that the page reads, the newest of all partitions."""

SHOWN_BYTES = 4_000
"""Of a letter's value."""

RUNS_MAX = 30


def letters_page(
    letters: Sequence[Letter], handled: Mapping[LetterId, Handling], there: int, counted: Mapping[str, float]
) -> list[Html]:
    """Return the sections of the page.

    Args:
        letters: the newest ones, newest first.
        handled: what was done about each.
        there: records on the topic.
        counted: by reason, by all workers since they started.
    """
    reasons = Counter(letter.reason for letter in letters)
    opened = sum(not handled[letter.id].closed for letter in letters)
    rows = [
        row(
            word(reason),
            number(reasons.get(reason, 0)),
            tag("td", count(counted.get(reason, 0)), class_="n" if counted.get(reason) else "n zero"),
        )
        for reason in sorted(
            {*reasons, *(name for name, n in counted.items() if n)}, key=lambda name: (-reasons.get(name, 0), name)
        )
    ]
    heads = (column("reason"), column("shown here", "n"), column("since the workers started", "n"))
    return [
        tag(
            "div",
            tag("h1", "Dead letters"),
            tag(
                "p",
                "Records that no stage could process, as they came. ",
                tag("span", tag("code", "orderstream dead-letters"), " sends one again, or drops it."),
                class_="dim",
            ),
            class_="title full",
        ),
        card(
            "By reason",
            table("Dead letters by reason", heads, rows, empty="There are none."),
            name="reasons",
            note=f"{count(there)} records on the topic",
            class_="half",
        ),
        card(
            "Letters",
            tag("ul", (_letter(letter, handled[letter.id]) for letter in letters), class_="letters", id="list")
            if letters
            else tag("p", "There are none.", class_="none"),
            name="letters",
            note=f"the newest {count(len(letters))}, {count(opened)} of them open" if letters else None,
            class_="full",
        ),
    ]


def _letter(letter: Letter, handling: Handling) -> Html:
    state = handling.state
    rows = [row("why", tag("td", letter.detail or DASH, class_="text"))]
    if letter.source is not None:
        rows.append(
            row(
                "its record",
                tag(
                    "td",
                    f"{letter.source.topic}, partition {letter.source.partition}, offset {letter.source.offset}",
                    class_="mono text",
                ),
            )
        )
    if letter.key is not None:
        rows.append(row("key", tag("td", shown(letter.key), class_="mono text")))
    for name, data in letter.headers:
        rows.append(row(tag("th", "header ", name, scope="row"), tag("td", shown(data or b""), class_="mono text")))
    if handling.action is not None:
        rows.append(row("done about it", tag("td", str(handling), class_="text")))
    whole = letter.cut_from or len(letter.value or b"")
    return tag(
        "li",
        tag(
            "details",
            tag(
                "summary",
                tag("span", str(letter.id), class_="mono"),
                " ",
                moment(letter.at),
                " ",
                tag("strong", word(letter.reason)),
                " ",
                tag("span", state, class_=f"badge {'open' if not handling.closed else 'done'}"),
                " ",
                tag("span", letter.detail, class_="dim"),
            ),
            table(f"Dead letter {letter.id}", (), rows),
            tag("h3", "Value ", tag("small", f"{count(whole)} bytes")),
            tag("pre", pretty(letter.value or b"") or "empty", tabindex=0),
        ),
    )


def pretty(value: bytes) -> str:
    """Return a value so that people can read it: JSON indented, what is no text escaped, cut where it is long."""
    cut = value[:SHOWN_BYTES]
    if len(value) <= SHOWN_BYTES:
        try:
            cut = orjson.dumps(orjson.loads(value), option=orjson.OPT_INDENT_2)
        except ValueError:
            cut = value
    return shown(cut) + (" …" if len(value) > SHOWN_BYTES else "")


def shown(data: bytes) -> str:
    """Return bytes as text; what can't be printed, or turns the text around, is escaped."""
    text = data[: 2 * SHOWN_BYTES].decode(errors="backslashreplace")
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def reconcile_page(runs: Sequence[Mapping[str, Any]]) -> list[Html]:
    """Return the sections of the page; ``runs`` are newest first."""
    rows = []
    for run in runs:
        drift, unrepaired = orjson.loads(run["drift"]), orjson.loads(run["unrepaired"])
        kinds = ", ".join(f"{count(n)} {kind}" for kind, n in drift.items())
        left = ", ".join(f"{count(n)} {kind}" for kind, n in unrepaired.items())
        rows.append(
            row(
                tag("th", moment(run["at"]), scope="row"),
                tag(
                    "td",
                    tag(
                        "span", "differs" if drift else "all agree", class_=f"badge {'open' if drift else 'confirmed'}"
                    ),
                ),
                tag("td", kinds or DASH, class_="text"),
                tag("td", left or DASH, class_="text bad-text" if left else "text"),
                number(run["orders"]),
                number(run["products"]),
                number(run["open_orders"]),
                number(run["records"]),
                tag("td", span(run["seconds"]), class_="n"),
                tag("td", "since the last run" if run["resumed"] else "from the beginning", class_="dim"),
            )
        )
    heads = (
        column("run"),
        column("found"),
        column("differences"),
        column("not repaired"),
        *(column(name, "n") for name in ("orders", "products", "open orders", "records", "took")),
        column("read"),
    )
    return [
        tag(
            "div",
            tag("h1", "Reconcile"),
            tag(
                "p",
                tag("code", "orderstream reconcile"),
                " reads the topics again, works out what every order and product must be, and compares that with Postgres"
                " and Redis. Whoever runs it is told which ones differ.",
                class_="dim",
            ),
            class_="title full",
        ),
        card(
            "Runs",
            tag(
                "div",
                table("Runs of reconcile, newest first", heads, rows, empty="It was never run here.", id="runs"),
                class_="scroll wide-table",
                tabindex=0,
                role="region",
                aria_labelledby="h-reconciled",
            ),
            name="reconciled",
            note=f"the last {len(runs)}" if runs else None,
            class_="full",
        ),
    ]
