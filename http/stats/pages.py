"""A worker's pages: ``/stats/`` for people, ``/stats/…`` as JSON for programs, ``/metrics`` for Prometheus.

The page is a file, like its script and its style: it reads ``/stats/summary`` once a second while its tab is seen, and
asks no other host for anything.  Products and orders are answered by the worker that owns them, whichever is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import uuid
from collections.abc import Awaitable, Callable
from functools import wraps
from importlib.resources import files
from typing import Any

import orjson
from aiohttp import ClientError, web
from faust.exceptions import SameNode
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from yarl import URL

from orderstream.http.exporter import Exporter, note_worker
from orderstream.http.problems import Problem, problems
from orderstream.http.stats.figures import Figures
from orderstream.http.stats.owners import FORWARDED, OwnerRouter, unowned
from orderstream.sql.store import TRANSIENT
from orderstream.streams.partitions import product_partition
from orderstream.streams.topics import ORDER_COMMANDS, ORDER_LINES, ORDERS, RESERVATIONS, STOCK_COMMANDS

PAGE = "stats.html"
STATIC = {
    "stats.css": "text/css",
    "stats.js": "text/javascript",
    "icon.svg": "image/svg+xml",
    "uplot.min.js": "text/javascript",
    "uplot.min.css": "text/css",
    "uplot.LICENSE.txt": "text/plain",
}
"""What the page is made of, in ``http/static/``.  uPlot 1.6.32 (MIT) draws the charts."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Headers of every answer: nothing is fetched from another host, nothing is framed, nothing is guessed."""

PRODUCT_ID_CHARS_MAX = 64
STAGE_TOPICS = (ORDERS, ORDER_LINES, RESERVATIONS, ORDER_COMMANDS, STOCK_COMMANDS)

View = Callable[..., Awaitable[Any]]


def static(name: str) -> tuple[bytes, str]:
    """Return a file of the page and its entity tag."""
    body = (files("orderstream") / "http" / "static" / name).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:16]}"'


_FILES = {name: static(name) for name in (PAGE, *STATIC)}


def register(app: Any) -> Figures:
    """Add the pages to the app's web server; return the figures that they show, which the app keeps up to date."""
    figures, store, router = Figures(app), app.stage.store, app.router
    assert isinstance(router, OwnerRouter)
    app.web.web_app.middlewares.append(problems)
    app.web.web_app.on_response_prepare.append(_secure)

    async def from_postgres(reading: Awaitable[Any]) -> Any:
        try:
            return await reading
        except TRANSIENT:
            raise Problem(
                "engine-unavailable", "Postgres does not answer. Ask again in a moment.", engine="Postgres"
            ) from None

    @app.page("/", name="stats:root")
    async def root(web_: Any, request: Any) -> Any:
        raise web.HTTPFound("/stats/")

    @app.page("/stats", name="stats:bare")
    async def bare(web_: Any, request: Any) -> Any:
        raise web.HTTPFound("/stats/")

    @app.page("/stats/", name="stats:people")
    async def people(web_: Any, request: Any) -> Any:
        return _file(request, PAGE, "text/html")

    @app.page("/stats/static/{name}", name="stats:static")
    async def part(web_: Any, request: Any, name: str) -> Any:
        if name not in STATIC:
            raise web.HTTPNotFound
        return _file(request, name, STATIC[name])

    @app.page("/stats/summary", name="stats:summary")
    async def summary(web_: Any, request: Any) -> Any:
        found = figures.summary(_since(request))
        if found is None:
            raise _starting()
        return _json(found)

    @app.page("/stats/partitions", name="stats:partitions")
    async def partitions(web_: Any, request: Any) -> Any:
        own = figures.own_partitions()
        if own is None:
            raise _starting()
        if FORWARDED in request.headers:
            return _json({"partitions": own})
        return _json(await whole_group(own))

    async def whole_group(own: list[dict[str, Any]]) -> dict[str, Any]:
        """Return every partition of every topic with its owner; the other workers are asked how far theirs are."""
        owners = {(figures.name(tp), tp.partition): url for tp, url in router.owners().items()}
        here = str(app.conf.canonical_url)
        others = sorted({url for url in owners.values() if not router.is_self(URL(url))})
        answers = dict(zip(others, await asyncio.gather(*map(ask, others)), strict=True))
        rows = {(row["topic"], row["partition"]): row for theirs in answers.values() for row in theirs or ()}
        rows |= {(row["topic"], row["partition"]): row for row in own}
        nothing = dict.fromkeys(("end", "done", "committed", "lag"))
        every = [(spec.name, n) for spec in STAGE_TOPICS for n in range(app.stage.settings.partitions)]
        listed = [
            rows.get((topic, n)) or {"topic": topic, "partition": n, "owner": owners.get((topic, n)), **nothing}
            for topic, n in every
        ]
        workers = [{"url": here, "self": True, "answers": True}]
        workers += [{"url": url, "self": False, "answers": answer is not None} for url, answer in answers.items()]
        for worker in workers:
            worker["partitions"] = sum(row["owner"] == worker["url"] for row in listed)
        return {"workers": workers, "partitions": listed}

    async def ask(url: str) -> list[dict[str, Any]] | None:
        try:
            status, _, body = await router.ask(URL(url), URL("/stats/partitions"))
            found: list[dict[str, Any]] | None = orjson.loads(body)["partitions"] if status == 200 else None
        except (ClientError, TimeoutError, OSError, ValueError, KeyError):
            return None  # it is listed as a worker that does not answer
        return found

    @app.page("/stats/products/{product_id}", name="stats:product")
    @app.table_route(table=app.views.stock, match_info="product_id")
    async def product(web_: Any, request: Any, product_id: str) -> Any:
        partition = product_partition(product_id, app.stage.settings.partitions)
        if partition not in figures.owned():
            raise unowned()
        row, source = app.views.stock.read(product_id), "table"
        if row is None and len(product_id) <= PRODUCT_ID_CHARS_MAX and "\0" not in product_id:
            # Nothing was settled of it since the table began: its counts are in Postgres alone.
            found = await from_postgres(store.products([product_id]))
            row, source = (found[0] if found else None), "postgres"
        if row is None:
            raise Problem("product-not-found", f"There is no product {product_id[:PRODUCT_ID_CHARS_MAX]}.")
        counts = {name: row[name] for name in ("available", "reserved", "sold", "version")}
        owner = str(app.conf.canonical_url)
        return _json({"product_id": product_id, **counts, "source": source, "partition": partition, "owner": owner})

    @app.page("/stats/orders/{order_id}", name="stats:order")
    @_by_order_id
    async def order(web_: Any, request: Any, order_id: str) -> Any:
        if not figures.owned():
            raise unowned()
        row = await from_postgres(store.order(order_id))
        if row is None:
            raise Problem("order-not-found", "No stage has taken in an order with this id.", order_id=order_id)
        try:
            return await router.at(app.views.open_orders.name, row["home"], request)
        except SameNode:
            return here(order_id, row)

    def here(order_id: str, row: dict[str, Any]) -> Any:
        """Return an order of this worker."""
        if row["home"] not in figures.owned():
            raise unowned()
        in_hand = order_id in app.desk.entries
        shown = (
            "status",
            "reason",
            "total_cents",
            "created_at",
            "reserved_at",
            "paid_at",
            "confirmed_at",
            "cancelled_at",
        )
        return _json(
            {
                "order_id": order_id,
                **{name: row[name] for name in shown},
                "payment_status": row["payment_status"],
                "lines": row["lines"],
                "open": in_hand or app.views.open_orders.read(order_id) is not None,
                "partition": row["home"],
                "owner": str(app.conf.canonical_url),
            }
        )

    exporter = Exporter("worker", app.stage.store)

    @app.page("/metrics", name="stats:metrics")
    async def prometheus(web_: Any, request: Any) -> Any:
        if figures.own_partitions() is None:  # nor is Postgres connected: only what was counted
            body = generate_latest()
        else:
            note_worker(app, app.stage.settings)
            body = await exporter.scrape()
        return web_.bytes(body, content_type=CONTENT_TYPE_LATEST.split(";")[0])

    return figures


def _json(document: Any) -> web.Response:
    headers = {"Cache-Control": "no-store"}
    return web.Response(body=orjson.dumps(document), content_type="application/json", headers=headers)


def _file(request: Any, name: str, content_type: str) -> web.Response:
    body, tag = _FILES[name]
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if request.headers.get("If-None-Match") == tag:
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)


async def _secure(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


def _starting() -> Problem:
    return Problem("starting", "This worker has not joined its group yet. Ask again in a moment.")


def _since(request: Any) -> float | None:
    given = request.query.get("since")
    if given is None:
        return None
    try:
        at = float(given)
    except ValueError:
        at = math.nan
    if not math.isfinite(at):
        raise Problem("invalid-request", "since: seconds since the epoch, of the newest row that you have; 0 for all.")
    return at


def _by_order_id(view: View) -> View:
    """Refuse what is no order id, and write one as the pipeline does, before its owner is looked up."""

    @wraps(view)
    async def checked(view_: Any, request: Any, **named: str) -> Any:
        try:
            order_id = str(uuid.UUID(named["order_id"]))
        except ValueError:
            raise Problem("invalid-order-id", "An order id is a UUID.") from None
        return await view(view_, request, order_id=order_id)

    return checked
