"""What all pages of a worker share: the head with its navigation, its engines and its state."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from yarl import URL

from orderstream import __version__
from orderstream.http.stats.html import Html, Inside, age, tag

HEARD_MS = 1_000
"""A live page is asked for again every second while its tab is seen."""

PLACES = {
    "pipeline": ("Pipeline", "/stats/"),
    "products": ("Products", "/stats/products"),
    "orders": ("Orders", "/stats/orders"),
    "letters": ("Dead letters", "/stats/dead-letters"),
    "reconcile": ("Reconcile", "/stats/reconcile"),
}

NAMES = {"kafka": "Kafka", "redis": "Redis", "postgres": "Postgres"}


class Head(NamedTuple):
    """What the head says of the worker that answers.

    Attributes:
        url: of the worker.
        state: of the worker.
        started_at: seconds since the epoch.
        engines: what was heard of each.
        unavailable: those that a stage waits for, or works without.
    """

    url: str
    state: str
    started_at: float
    engines: Mapping[str, Mapping[str, Any]]
    unavailable: frozenset[str]


def page(head: Head, place: str, title: str, *inside: Inside, live: bool = False, notes: Inside = None) -> Html:
    """Make a page.

    Args:
        head: of the worker.
        place: of :data:`PLACES`.
        title: of the tab, before the worker's name.
        inside: its sections.
        live: it is asked for again every second, without a script every five.
        notes: for its foot.
    """
    host = URL(head.url).authority
    links = (
        tag("li", tag("a", name, href=path, aria_current="page" if key == place else None))
        for key, (name, path) in PLACES.items()
    )
    static = "/stats/static/"
    document = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("noscript", tag("meta", http_equiv="refresh", content=5)) if live else None,
            tag("title", f"{title} · orderstream {host}"),
            tag("link", rel="icon", href=f"{static}icon.svg", type="image/svg+xml"),
            tag("link", rel="stylesheet", href=f"{static}uplot.min.css") if place == "pipeline" else None,
            tag("link", rel="stylesheet", href=f"{static}stats.css"),
            tag("script", src=f"{static}uplot.min.js", defer=True) if place == "pipeline" else None,
            tag("script", src=f"{static}stats.js", defer=True),
        ),
        tag(
            "body",
            tag("a", "Skip to the content", class_="skip", href="#main"),
            tag(
                "header",
                tag(
                    "a",
                    tag("img", src=f"{static}icon.svg", alt="", width=22, height=22),
                    tag("span", "orderstream"),
                    class_="brand",
                    href="/stats/",
                ),
                tag("nav", tag("ul", links), aria_label="Pages"),
                tag(
                    "form",
                    tag("label", "Find an order by its id, a customer or a product", for_="find-q", class_="hidden"),
                    tag(
                        "input",
                        id="find-q",
                        name="q",
                        type="search",
                        maxlength=200,
                        spellcheck="false",
                        autocomplete="off",
                        placeholder="Order id, customer, product",
                    ),
                    tag("button", "Find"),
                    id="find",
                    role="search",
                    action="/stats/orders",
                    data_keep=True,
                    hidden=True,
                ),
            ),
            tag(
                "div",
                tag(
                    "p",
                    tag("span", host, id="worker", class_="mono"),
                    f" v{__version__}, up {age(time.time() - head.started_at)}",
                ),
                tag("ul", _engines(head), id="engines", class_="engines", aria_label="Engines"),
                tag("p", head.state, class_="state", id="state", data_state=head.state, role="status"),
                class_="status",
            ),
            tag("p", class_="alarm", id="alarm", role="alert", hidden=True, data_keep=True),
            tag("main", inside, id="main", tabindex=-1),
            tag(
                "footer",
                tag("p", notes, " Times are in UTC.") if notes else tag("p", "Times are in UTC."),
            ),
            data_every=HEARD_MS if live else None,
        ),
        lang="en",
    )
    return Html(f"<!doctype html>\n{document}")


def _engines(head: Head) -> list[Html]:
    found = []
    for key, name in NAMES.items():
        heard = head.engines.get(key)
        bad = (heard is not None and not heard["ready"]) or key in head.unavailable
        said: Inside = "not asked yet" if heard is None else f"{heard['latency_ms']:.1f} ms"
        found.append(
            tag(
                "li",
                tag("span", class_=f"dot {'bad' if bad else 'ok' if heard else ''}".strip()),
                name,
                " ",
                tag("span", "unavailable", class_="bad-text") if bad else tag("span", said, class_="dim"),
                title=None if heard is None else heard["address"],
            )
        )
    return found
