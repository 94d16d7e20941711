"""The first page: the whole pipeline, live."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from yarl import URL

from orderstream.http.stats.catalogue import lasts
from orderstream.http.stats.html import (
    DASH,
    Html,
    age,
    card,
    column,
    count,
    link,
    money,
    number,
    rate,
    row,
    scroll,
    share,
    span,
    table,
    tag,
    tile,
    word,
)
from orderstream.http.stats.shelf import Product, Totals

NEXT_MAX = 8
"""Products that the page lists, of those that will be sold out next."""

BUSY = 0.9
"""A stage that is at work for a larger share of the time is the bottleneck, or waits for an engine."""


class Lately(NamedTuple):
    """What the last ``orderstream reconcile`` found.

    Attributes:
        at: when.
        drift: how many differences.
        unrepaired: how many of them stood after its repairs.
    """

    at: datetime
    drift: int
    unrepaired: int


def overview(
    found: Mapping[str, Any], products: Sequence[Product] | None, sums: Totals | None, lately: Lately | None
) -> list[Html]:
    """Return the sections of the page.

    Args:
        found: the pipeline's figures.
        products: all, None while Postgres does not answer.
        sums: of the products.
        lately: None without any run.
    """
    workers = found["workers"]
    several = len(workers) > 1
    worst = "slowest worker" if several else None
    return [
        tag("h1", "Pipeline", class_="hidden"),
        _steps(found, worst),
        _shop(found, sums, lately),
        _chart("rate", "Orders", "per second", wide=True),
        _chart("time", "Time to the end", "last 10 s" + (", slowest worker" if several else "")),
        _chart("lag", "Lag", "records"),
        _next(products),
        _verdicts(found),
        _stages(found, several),
        _workers(workers),
        _partitions(found),
    ]


def _steps(found: Mapping[str, Any], worst: str | None) -> Html:
    orders, rates, times = found["orders"], found["rates"], found["time_to_end"]
    cancelled, opened = sum(orders["cancelled"].values()) + orders["revoked"], sum(found["open"].values())

    def step(name: str, key: str, number: float, **more: Any) -> Html:
        return tile(name, f"{rate(rates.get(key, 0.0))} /s", f"{count(number)} in all", **more)

    below = f"p95 {span(times['p95'])} · p99 {span(times['p99'])}" if times["sampled"] else "none ended in 60 s"
    open_orders = tag("a", "Open orders", href="/stats/orders")
    return tag(
        "dl",
        step("Taken in", "created", orders["created"], class_="flow"),
        step("Reserved", "reserved", orders["reserved"], class_="flow"),
        step("Paid", "paid", orders["paid"], class_="flow"),
        step("Confirmed", "confirmed", orders["confirmed"]),
        step("Cancelled", "cancelled", cancelled),
        tile("To the end, p50", span(times["p50"]), below, title=worst),
        tile("Lag", f"{count(found['lag'])} records", f"{count(len(found['partitions']))} partitions"),
        tile(open_orders, count(opened), f"{count(found['charges_in_flight'])} charges under way"),
        id="steps",
        class_="tiles",
        aria_label="Orders by stage, of all workers",
    )


def _shop(found: Mapping[str, Any], sums: Totals | None, lately: Lately | None) -> Html:
    letters = sum(found["dead_letters"].values())
    if sums is None:
        names = ("Revenue", "Sell-through", "Sold out", "Running out")
        shop = [tile(name, DASH, "Postgres does not answer") for name in names]
    else:
        had = sums.available + sums.reserved + sums.sold
        revenue = tag("a", "Revenue", href="/stats/products?sort=revenue")
        sold = tag("a", "Sell-through", href="/stats/products?sort=through")
        out = tag("a", "Sold out", href="/stats/products?show=out")
        soon = tag("a", "Running out", href="/stats/products?show=soon")
        shop = [
            tile(revenue, money(sums.revenue_cents), f"{count(sums.sold)} units sold"),
            tile(sold, share(sums.sold, had), f"of {count(had)} units"),
            tile(
                out,
                count(sums.sold_out),
                f"of {count(sums.products)} products",
                class_="bad" if sums.sold_out else None,
            ),
            tile(soon, count(sums.running_out), "within the hour", class_="warn" if sums.running_out else None),
        ]
    dead = tag("a", "Dead letters", href="/stats/dead-letters")
    last = tag("a", "Last reconcile", href="/stats/reconcile")
    if lately is None:
        reconciled = tile(last, "never", tag("code", "orderstream reconcile"))
    else:
        said = "all agreed" if not lately.drift else f"{count(lately.drift)} differ"
        left = f", {count(lately.unrepaired)} not repaired" if lately.unrepaired else ""
        ago = f"{age(time.time() - lately.at.timestamp())} ago"
        reconciled = tile(last, ago, said + left, class_="bad" if lately.drift else None)
    return tag(
        "dl",
        shop,
        tile(dead, count(letters), "since the start", class_="bad" if letters else None),
        reconciled,
        id="shop",
        class_="tiles",
        aria_label="Products, and what needs people",
    )


def _chart(name: str, title: str, note: str, *, wide: bool = False) -> Html:
    legend = tag("ul", class_="legend", id=f"legend-{name}", data_keep=True)
    plot = tag(
        "div",
        tag("noscript", tag("p", "Charts need JavaScript.", class_="none")),
        class_="plot",
        id=f"plot-{name}",
        role="img",
        aria_labelledby=f"h-{name}",
        data_keep=True,
    )
    return card(title, plot, note=note, class_="chart wide" if wide else "chart", name=name, more=legend)


def _next(products: Sequence[Product] | None) -> Html:
    soonest = sorted(
        (one for one in products or () if not one.sold_out and one.lasts_s is not None),
        key=lambda one: one.lasts_s or 0,
    )[:NEXT_MAX]
    rows = [
        row(
            tag("th", link(one.name, "/stats/products", one.product_id), scope="row", class_="name"),
            number(one.available),
            tag("td", f"{60 * (one.rate or 0):,.1f}", class_="n"),
            tag("td", lasts(one), class_="n"),
        )
        for one in soonest
    ]
    return card(
        "Sold out next",
        table(
            "Products that will be sold out next at the rate of the last five minutes",
            (column("product"), column("left", "n"), column("per min", "n"), column("sold out in", "n")),
            rows,
            empty="Postgres does not answer."
            if products is None
            else "Nothing has been sold in the last five minutes.",
        ),
        note="at the rate of the last 5 min",
        class_="wide",
        name="next",
        more=tag("a", "All products", href="/stats/products", class_="more"),
    )


def _verdicts(found: Mapping[str, Any]) -> Html:
    orders = found["orders"]
    sold, revoked = orders["confirmed"] - orders["revoked"], orders["revoked"]  # each order once
    refused = {name: n for name, n in {"sold, then cancelled": revoked, **orders["cancelled"]}.items() if n}
    ended = [("confirmed", sold), *sorted(refused.items(), key=lambda one: -one[1])]
    whole = sum(n for _, n in ended)
    rows = (
        [row(word(name), number(n), tag("td", share(n, whole), class_="n dim")) for name, n in ended] if whole else []
    )
    still = [row(word(status).lower(), number(n)) for status, n in sorted(found["open"].items())]
    still.append(row("charges under way", number(found["charges_in_flight"])))
    if found["sent_on"]:
        still.append(row("records sent on to their owner", number(found["sent_on"])))
    return card(
        "Verdicts",
        table(
            "Orders by how they ended",
            (column("ended"), column("orders", "n"), column("share", "n")),
            rows,
            empty="No order has ended since the workers started.",
        ),
        tag("h3", "Not over yet"),
        table("Open orders, charges, records sent on", (), still, id="open"),
        note="since the workers started",
        name="verdicts",
    )


def _stages(found: Mapping[str, Any], several: bool) -> Html:
    def busy(value: float) -> Html:
        kind = "n warn" if value > BUSY else "n" if value else "n zero"
        return tag("td", f"{100 * value:.0f} %", class_=kind)

    rows = [
        row(
            stage,
            tag("td", rate(one["records_per_s"]), class_="n" if one["records_per_s"] else "n zero"),
            tag("td", rate(one["records"] / one["batches"]) if one["batches"] else DASH, class_="n"),
            busy(one["busy"]),
        )
        for stage, one in found["stages"].items()
    ]
    letters = [
        row(
            tag("th", tag("a", word(reason), href="/stats/dead-letters"), scope="row"),
            tag("td", count(n), class_="n bad"),
        )
        for reason, n in sorted(found["dead_letters"].items(), key=lambda one: -one[1])
        if n
    ]
    return card(
        "Stages",
        table(
            "Stages: records per second, size of a batch, share of the time at work",
            (column("stage"), column("records/s", "n"), column("batch", "n"), column("busy", "n")),
            rows,
        ),
        tag("h3", "Dead letters ", tag("small", "since the workers started")),
        table("Dead letters by reason", (), letters, id="letters"),
        note="busiest worker" if several else None,
        name="stages",
    )


def _place(url: str, here: str) -> str:
    at = URL(url)
    return f":{at.port}" if at.host == URL(here).host else at.authority


def _workers(workers: Sequence[Mapping[str, Any]]) -> Html:
    here = next(one["url"] for one in workers if one["self"])
    rows = []
    for one in sorted(workers, key=lambda one: (not one["self"], one["url"])):
        name = tag("a", _place(one["url"], here), href=URL(one["url"]) / "stats/")
        head = tag("th", name, tag("small", " this one") if one["self"] else None, scope="row", class_="mono")
        if not one["answers"]:
            rows.append(
                row(
                    head,
                    tag("td", "does not answer", class_="bad", colspan=3),
                    number(one["partitions"]),
                    tag("td", colspan=5),
                )
            )
            continue
        busiest, most = max(one["busy"].items(), key=lambda stage: stage[1])
        rows.append(
            row(
                head,
                tag("td", one["state"], class_=None if one["state"] == "running" else "warn"),
                tag("td", f"v{one['version']}", class_="dim"),
                tag("td", age(time.time() - one["started_at"]), class_="n"),
                number(one["partitions"]),
                tag("td", rate(one["taken_in_per_s"]), class_="n" if one["taken_in_per_s"] else "n zero"),
                tag("td", span(one["p95"]), class_="n"),
                number(one["lag"]),
                tag("td", f"{busiest} {100 * most:.0f} %", class_="n warn" if most > BUSY else "n"),
                tag("td", count(one["dead_letters"]), class_="n bad" if one["dead_letters"] else "n zero"),
            )
        )
    heads = (
        column("worker"),
        column("state"),
        column("version"),
        *(
            column(name, "n")
            for name in ("up", "partitions", "taken in/s", "p95", "lag", "busiest stage", "dead letters")
        ),
    )
    return card(
        "Workers",
        scroll("workers", table("Workers of the group", heads, rows)),
        note=f"{len(workers)}, together all that this page shows" if len(workers) > 1 else "one",
        class_="full",
        name="workers",
    )


def _partitions(found: Mapping[str, Any]) -> Html:
    here = found["worker"]
    topics = list(dict.fromkeys(one["topic"] for one in found["partitions"]))
    by_number: dict[int, dict[str, Mapping[str, Any]]] = {}
    for one in found["partitions"]:
        by_number.setdefault(one["partition"], {})[one["topic"]] = one
    rows = []
    for n, by_topic in sorted(by_number.items()):
        owners = {one["owner"] for one in by_topic.values()}
        named = ", ".join(
            sorted("no worker" if url is None else "this one" if url == here else _place(url, here) for url in owners)
        )
        rows.append(
            row(
                str(n),
                tag("td", named, class_="mono self" if owners == {here} else "mono"),
                *(number(by_topic[topic]["lag"]) if topic in by_topic else tag("td") for topic in topics),
            )
        )
    heads = (column("no."), column("owner"), *(column(topic, "n") for topic in topics))
    return card(
        "Partitions",
        scroll("partitions", table("Lag of each partition by topic, and the worker that owns it", heads, rows)),
        note="lag by topic, and the owner",
        class_="full",
        name="partitions",
    )
