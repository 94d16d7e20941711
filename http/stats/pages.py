"""A worker's pages: ``/stats/…`` for people, in HTML; the same for programs, in JSON; ``/metrics``; its health.

What people read is made here and works without a script; the script draws charts, asks for a live page again, and searches
while one types.  No page asks another host for anything.  Where a path answers both, people are who asks for ``text/html``.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import wraps
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import orjson
from aiohttp import web
from faust.exceptions import SameNode
from prometheus_client import CONTENT_TYPE_LATEST
from yarl import URL

from orderstream import metrics
from orderstream.errors import EngineUnavailable
from orderstream.http.exporter import Exporter, note_worker
from orderstream.http.health import health, ready
from orderstream.http.problems import KINDS, RETRY_AFTER_S, Problem, problems
from orderstream.http.protocol import Runner, bounds
from orderstream.http.security import SERVER
from orderstream.http.stats import catalogue, found, overview, troubles
from orderstream.http.stats.figures import Figures
from orderstream.http.stats.fleet import Fleet
from orderstream.http.stats.fresh import Fresh
from orderstream.http.stats.html import Html, link, tag
from orderstream.http.stats.owners import OwnerRouter, unowned
from orderstream.http.stats.shelf import Shelf, select, totals
from orderstream.http.stats.shell import Head, page
from orderstream.sql.letters import handlings
from orderstream.sql.store import REMOVED, TRANSIENT, query
from orderstream.streams.letters import reading
from orderstream.streams.orders import Reason
from orderstream.streams.partitions import product_partition

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
    "Server": SERVER,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Headers of every answer: nothing is fetched from another host, nothing is framed, nothing is guessed."""

PRODUCT_ID_CHARS_MAX = 64
LATELY_S, LETTERS_S, FOUND_S = 5.0, 5.0, 1.0
"""How old the last reconcile, the dead letters, and what was searched for may be, in seconds."""

MOVES_MAX, ASKED_LATELY_MAX, LEFT_ROWS_MAX = 20, 20, 20_000
"""Movements and orders that a product's page shows; rows of the ledger that are read to tell what was left."""

LOOKED_AT_MAX, ALIKE_MAX = 200, 8
"""Products whose last orders are remembered for a moment; products with a name alike that a search lists."""

FOR_PEOPLE = "text/html"

View = Callable[..., Awaitable[Any]]


def static(name: str) -> tuple[bytes, str]:
    """Return a file of the page and its entity tag."""
    body = (files("orderstream") / "http" / "static" / name).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:16]}"'


_FILES = {name: static(name) for name in STATIC}


def register(app: Any) -> Figures:
    """Add the pages to the app's web server; return the figures that they show, which the app keeps up to date."""
    store, router = app.stage.store, app.router
    shelf = Shelf(store, time.monotonic)
    figures = Figures(app, shelf)
    assert isinstance(router, OwnerRouter)
    fleet = Fleet(app, figures, router)
    app.web.web_app.middlewares.append(problems)
    app.web.web_app.on_response_prepare.append(_secure)
    app.web.serve_by(Runner(app.web.web_app, bounds(app.stage.settings), access_log=None))

    async def from_postgres(reading: Awaitable[Any]) -> Any:
        try:
            return await reading
        except TRANSIENT:
            raise Problem(
                "engine-unavailable", "Postgres does not answer. Ask again in a moment.", engine="Postgres"
            ) from None

    def joined() -> None:
        """Refuse while the engines are not connected."""
        if figures.own_partitions() is None:
            raise _starting()

    looking = asyncio.Lock()  # one search at a time

    @app.page("/", name="stats:root")
    async def root(web_: Any, request: Any) -> Any:
        raise web.HTTPFound("/stats/")

    @app.page("/stats", name="stats:bare")
    async def bare(web_: Any, request: Any) -> Any:
        raise web.HTTPFound("/stats/")

    @app.page("/stats/static/{name}", name="stats:static")
    async def part(web_: Any, request: Any, name: str) -> Any:
        if name not in STATIC:
            raise web.HTTPNotFound
        return _file(request, name, STATIC[name])

    # For people

    def head() -> Head:
        return Head(str(app.conf.canonical_url), figures.state, figures.started_at, figures.health, figures.unavailable)

    def answer(place: str, title: str, *inside: Any, status: int = 200, **more: Any) -> web.Response:
        headers = {"Cache-Control": "no-store", "Vary": "Accept"}
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers["Retry-After"] = str(RETRY_AFTER_S)
        text = page(head(), place, title, *inside, **more)
        return web.Response(status=status, text=text, content_type=FOR_PEOPLE, charset="utf-8", headers=headers)

    def for_people(place: str) -> Callable[[View], View]:
        """Answer a problem with a page that says it."""

        def made(view: View) -> View:
            @wraps(view)
            async def checked(web_: Any, request: Any, **named: str) -> Any:
                try:
                    return await view(web_, request, **named)
                except Problem as problem:
                    status, title = KINDS[problem.kind]
                    said = tag("div", tag("h1", title), tag("p", problem.detail), class_="title full")
                    again = status == HTTPStatus.SERVICE_UNAVAILABLE
                    return answer(place, title, said, status=status, live=again)

            return checked

        return made

    async def last_run() -> overview.Lately | None:
        last = await store.pool.fetchrow(query("last_reconcile"))
        if last is None:
            return None
        drift, unrepaired = (sum(orjson.loads(last[name]).values()) for name in ("drift", "unrepaired"))
        return overview.Lately(datetime.fromtimestamp(last["at"], UTC), drift, unrepaired)

    lately = Fresh(last_run, LATELY_S)

    @app.page("/stats/", name="stats:people")
    @for_people("pipeline")
    async def people(web_: Any, request: Any) -> Any:
        summed = await fleet.pipeline()
        if summed is None:
            raise _starting()
        try:
            products, last = await shelf.products(), await lately.get()
            sums = totals(products)
        except TRANSIENT:  # the rest of the page is not Postgres's
            products, sums, last = None, None, None
        notes = (
            "Rates are means of the last 5 s. Counts of orders are those of all workers since each started; products,"
            " revenue and reconcile are Postgres's. The time to the end is that of a sample. JSON: ",
            tag("a", "pipeline", href="/stats/pipeline"),
            ", ",
            tag("a", "this worker", href="/stats/summary"),
            "; ",
            tag("a", "metrics", href="/metrics"),
            ". Charts: ",
            tag("a", "uPlot", href="/stats/static/uplot.LICENSE.txt"),
            ".",
        )
        title = f"{summed['rates'].get('created', 0):,.0f}/s"
        return answer("pipeline", title, overview.overview(summed, products, sums, last), live=True, notes=notes)

    @app.page("/stats/products", name="stats:products")
    @for_people("products")
    async def list_products(web_: Any, request: Any) -> Any:
        joined()
        products = await from_postgres(shelf.products())
        wanted = catalogue.wanted_of(request.query)
        notes = (
            "Sold out: at the rate at which orders took units in the last five minutes. Revenue: each unit at the"
            " catalogue's price when it was sold."
        )
        return answer(
            "products", "Products", catalogue.catalogue(products, totals(products), wanted), live=True, notes=notes
        )

    async def names() -> dict[str, str]:
        return {one.product_id: one.name for one in await shelf.products()}

    async def asked_for(product_id: str, before: tuple[datetime, str], limit: int) -> list[Any]:
        async with looking:
            rows: list[Any] = await store.pool.fetch(
                query("orders_of_product"), product_id, *before, limit, found.LOOKED_MAX
            )
            return rows

    async def placed_by(user_id: str | None, before: tuple[datetime, str], limit: int) -> list[Any]:
        async with looking:
            rows = await store.orders_page(user_id, None, before, limit, limit)
            placed = [row for row in rows if not row["edge"]]
            there = await store.order_states([row["order_id"] for row in placed])
            asked = [(row, there.get(row["order_id"])) for row in placed]
            return [{**row, **now} for row, now in asked if now is not None and now["status"] != REMOVED]

    @for_people("products")
    async def product_for_people(web_: Any, request: Any, product_id: str) -> Any:
        joined()
        one = await from_postgres(shelf.product(product_id))
        if one is None:
            raise _no_product(product_id)
        moves, rows, named = await from_postgres(
            asyncio.gather(store.ledger_page(product_id, _now(), MOVES_MAX), lately_asked(product_id), names())
        )
        card = found.orders_card(
            "Orders that asked for it",
            rows[:ASKED_LATELY_MAX],
            named,
            name="asked",
            about=product_id,
            older=URL(found.PATH).with_query(q=product_id) if len(rows) > ASKED_LATELY_MAX else None,
        )
        return answer("products", one.name, catalogue.product_page(one, moves, card), live=True)

    recent: dict[str, Fresh[list[Any]]] = {}

    async def lately_asked(product_id: str) -> list[Any]:
        """Return the last orders of a product that is looked at, asked for once a while for all who look."""
        if product_id not in recent:
            while len(recent) >= LOOKED_AT_MAX:
                del recent[next(iter(recent))]
            recent[product_id] = Fresh(lambda: asked_for(product_id, _now(), ASKED_LATELY_MAX + 1), FOUND_S)
        return await recent[product_id].get()

    @app.page("/stats/orders", name="stats:orders")
    @for_people("orders")
    async def list_orders(web_: Any, request: Any) -> Any:
        joined()
        text, before = _searched(request.query.get("q", "")), found.place_of(request.query)
        return await from_postgres(find(text, before))

    newest = Fresh(lambda: placed_by(None, _now(), found.PAGE_ROWS + 1), FOUND_S)

    async def find(text: str, before: tuple[datetime, str] | None) -> Any:
        named, at, rows_max = await names(), before or _now(), found.PAGE_ROWS + 1
        if not text:
            rows = await newest.get() if before is None else await placed_by(None, at, rows_max)
            card = found.orders_card(
                "Orders",
                rows[: found.PAGE_ROWS],
                named,
                name="newest",
                older=found.older_than(rows),
                note="newest first",
            )
            return answer("orders", "Orders", tag("h1", "Orders", class_="hidden"), card, live=before is None)
        if (order_id := _uuid(text)) is not None and await store.order(order_id) is not None:
            raise web.HTTPFound(URL(found.PATH) / order_id)
        of_user = await placed_by(text, at, rows_max)
        of_product = await asked_for(text, at, rows_max) if text in named else []
        alike = select(await shelf.products(), text, "all", "sold", descending=True)[:ALIKE_MAX]
        cards = [tag("div", tag("h1", f"Orders: {text}"), _alike(alike), class_="title full")]
        for title, name, about, rows in (
            (f"Orders of the customer {text}", "customer", None, of_user),
            (f"Orders that asked for {named.get(text, text)}", "asked", text, of_product),
        ):
            if rows:
                older = found.older_than(rows, q=text)
                cards.append(
                    found.orders_card(title, rows[: found.PAGE_ROWS], named, name=name, about=about, older=older)
                )
        if len(cards) == 1:
            cards.append(
                tag("p", "No order has this id, no customer is called so, and no product has this id.", id="nothing")
            )
        return answer("orders", f"Orders: {text}", cards)

    @for_people("orders")
    @_by_order_id
    async def order_for_people(web_: Any, request: Any, order_id: str) -> Any:
        joined()
        return await from_postgres(show_order(order_id))

    async def show_order(order_id: str) -> Any:
        order = await store.order(order_id)
        if order is None:
            raise Problem("order-not-found", "No stage has taken in an order with this id.")
        refused = any(line["reason"] == Reason.INSUFFICIENT_STOCK for line in order["lines"])
        async with looking:
            rows = await store.pool.fetch(query("left_then"), order_id, LEFT_ROWS_MAX) if refused else []
        products = await shelf.products()
        sections = found.order_page(
            order,
            app.stage.settings,
            {one.product_id: one.name for one in products},
            {row["product_id"]: row["units"] for row in rows},
            {one.product_id: one.limit_per_user for one in products},
        )
        return answer("orders", f"Order {order_id[:8]}", sections, live=order["status"] not in found.ENDS)

    async def read_letters() -> Any:
        async with reading(app.stage.settings) as reader:
            letters = await reader.newest(-(-troubles.LETTERS_MAX // app.stage.settings.partitions))
            return letters, await handlings(store, letters), reader.total

    letters = Fresh(read_letters, LETTERS_S)

    @app.page("/stats/dead-letters", name="stats:letters")
    @for_people("letters")
    async def list_letters(web_: Any, request: Any) -> Any:
        joined()
        summed = await fleet.pipeline()
        try:
            newest_ones, handled, there = await from_postgres(letters.get())
        except EngineUnavailable as error:
            raise Problem("engine-unavailable", f"{error.engine} does not answer. Ask again in a moment.") from None
        counted = {} if summed is None else summed["dead_letters"]
        return answer("letters", "Dead letters", troubles.letters_page(newest_ones, handled, there, counted))

    @app.page("/stats/reconcile", name="stats:reconcile")
    @for_people("reconcile")
    async def list_runs(web_: Any, request: Any) -> Any:
        joined()
        runs = await from_postgres(store.pool.fetch(query("reconcile_runs"), troubles.RUNS_MAX))
        return answer("reconcile", "Reconcile", troubles.reconcile_page(runs))

    def for_both(people_view: View) -> Callable[[View], View]:
        """Answer people with their view, and programs with theirs."""

        def made(view: View) -> View:
            @wraps(view)
            async def chosen(view_: Any, request: Any, **named: str) -> Any:
                return await (people_view if _is_person(request) else view)(view_, request, **named)

            return chosen

        return made

    # For programs

    @app.page("/stats/summary", name="stats:summary")
    async def summary(web_: Any, request: Any) -> Any:
        found = figures.summary(_since(request))
        if found is None:
            raise _starting()
        return _json(found)

    @app.page("/stats/pipeline", name="stats:pipeline")
    async def pipeline(web_: Any, request: Any) -> Any:
        since = _since(request)
        summed = await fleet.pipeline()
        if summed is None:
            raise _starting()
        if since is None:
            return _json(summed)
        return _json({**summed, "history": {"columns": figures.history.columns, "rows": fleet.history(since)}})

    @app.page("/stats/products/{product_id}", name="stats:product")
    @for_both(product_for_people)
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
            raise _no_product(product_id)
        counts = {name: row[name] for name in ("available", "reserved", "sold", "version")}
        owner = str(app.conf.canonical_url)
        return _json({"product_id": product_id, **counts, "source": source, "partition": partition, "owner": owner})

    @app.page("/stats/orders/{order_id}", name="stats:order")
    @for_both(order_for_people)
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

    @app.page("/health", name="stats:health")
    async def alive(web_: Any, request: Any) -> Any:
        return await health(request)

    @app.page("/ready", name="stats:ready")
    async def able(web_: Any, request: Any) -> Any:
        if figures.own_partitions() is None:
            raise _starting()
        state = figures.state
        return await ready(figures.engines, None if state in ("running", "waiting") else f"This worker is {state}.")

    exporter = Exporter(app.stage.store)

    @app.page("/metrics", name="stats:metrics")
    async def prometheus(web_: Any, request: Any) -> Any:
        if figures.own_partitions() is None:  # nor is Postgres connected: only what was counted
            body = metrics.exported("worker")
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


def _is_person(request: Any) -> bool:
    return FOR_PEOPLE in request.headers.get("Accept", "")


def _now() -> tuple[datetime, str]:
    """Return the place behind the newest order."""
    return datetime.now(UTC) + timedelta(minutes=5), "ffffffff-ffff-ffff-ffff-ffffffffffff"


def _searched(text: str) -> str:
    """Return what is searched for, as Postgres can take it."""
    return text[:200].replace("\0", "").encode(errors="ignore").decode().strip()


def _uuid(text: str) -> str | None:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return None


def _alike(products: Any) -> Html | None:
    links = [tag("li", link(one.name, catalogue.PATH, one.product_id)) for one in products]
    return (
        tag("div", tag("p", "Products with this in their name:", class_="dim"), tag("ul", links, class_="tabs"))
        if links
        else None
    )


def _no_product(product_id: str) -> Problem:
    return Problem("product-not-found", f"There is no product {product_id[:PRODUCT_ID_CHARS_MAX]}.")


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
