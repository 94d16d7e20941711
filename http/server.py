"""The composition root of an ingress: settings in, an aiohttp application out.

Nothing connects on import, nor when the application is made: its engines are connected when it starts.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

import orjson
import structlog
from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_LATEST
from yarl import URL

from orderstream import collector, connecting, descriptors, logs
from orderstream import metrics as counted
from orderstream.errors import OrderstreamError
from orderstream.http import cancel, events, openapi
from orderstream.http.answers import PATH
from orderstream.http.cancel import Cancel
from orderstream.http.events import Events
from orderstream.http.exporter import begin, note_unavailable
from orderstream.http.health import Engine, Presence, health, ready
from orderstream.http.listing import Listing
from orderstream.http.orders import Ingress
from orderstream.http.postgres import Postgres
from orderstream.http.problems import Handler, Problem, problems
from orderstream.http.producer import OrderProducer
from orderstream.http.products import PATH as PRODUCTS
from orderstream.http.products import Products
from orderstream.http.protocol import Runner, bounds
from orderstream.http.rate import ALLOWANCE, Allowance, limited
from orderstream.http.replies import Lookup, Replies
from orderstream.http.security import Access, guard, share
from orderstream.http.watch import Watch
from orderstream.settings import PREFIX, Settings, public
from orderstream.sql import prepare
from orderstream.sql.store import Store
from orderstream.streams import tracing

log = structlog.get_logger("ingress")

CONNECT_S = 10.0
"""Longest wait for Postgres when the ingress starts."""

FINISH_S = 4.0
"""When the ingress leaves: how long its requests still wait for their verdicts."""

LEAVE_S = 8.0
"""How long requests in hand may take in all before they are cut off; disconnecting then takes two seconds at most."""

CLOSE_S = 1.0
"""Longest wait for Postgres connections to end by themselves."""

BACKLOG = 2_048
"""Connections that the system keeps until this process accepts them; those of a larger burst are reset."""

YOUNG_OBJECTS = 20_000
"""The collector's first threshold: the objects of some hundred requests in hand."""

ID = r"/{id:[^/]+}"
"""aiohttp's own pattern leaves out braces, which an id may have."""

_METHODS = frozenset(hdrs.METH_ALL)
_INGRESS = web.AppKey("ingress", Ingress)
_LISTING = web.AppKey("listing", Listing)
_PRODUCTS = web.AppKey("products", Products)
_CANCEL = web.AppKey("cancel", Cancel)
_EVENTS = web.AppKey("events", Events)
_WATCHES = web.AppKey("watches", tuple[Watch, Watch])
_ENGINES = web.AppKey("engines", tuple[Engine, ...])
_PRESENCES = web.AppKey("presences", tuple[Presence, ...])
_TRACING = web.AppKey("tracing", tracing.Tracing)
_LEAVING = web.AppKey("leaving", asyncio.Event)


@web.middleware
async def measured(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count and time every request, by the template of its path: ids and typos make no new series.

    While this process leaves, each answer ends its connection: the next one goes to another process.
    """
    start = time.perf_counter()
    response = await handler(request)
    if request.app[_LEAVING].is_set() and not response.prepared:
        response.force_close()
    resource = request.match_info.route.resource
    labels = (
        request.method if request.method in _METHODS else "other",
        resource.canonical if resource is not None else "unknown",
        str(response.status),
    )
    counted.HTTP_REQUESTS.labels(*labels).inc()
    counted.HTTP_LATENCY.labels(*labels).observe(time.perf_counter() - start)
    return response


@web.middleware
async def traced(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Trace every request for an order, and no probe of a supervisor.

    OpenTelemetry's own middleware for aiohttp would trace every path, export queries with the ids of customers, and install
    itself by replacing ``aiohttp.web.Application`` for the whole process.
    """
    tracer, resource = request.app[_TRACING], request.match_info.route.resource
    path = resource.canonical if resource is not None else "unknown"
    if not path.startswith(PATH):
        return await handler(request)
    with tracer.serving(request.method, path, request.headers.get(tracing.TRACEPARENT)) as span:
        response = await handler(request)
        span.set_attribute("http.response.status_code", response.status)
        return response


_QUERIED = frozenset(
    (operation.method, operation.path) for operation in openapi.OPERATIONS if operation.query is not None
)


@web.middleware
async def strict(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse parameters that a request does not know: what they ask for would not be done."""
    resource = request.match_info.route.resource
    path = resource.canonical if resource is not None else ""
    method = "get" if request.method == hdrs.METH_HEAD else request.method.lower()
    if request.query_string and path.startswith("/api/") and method != "options" and (method, path) not in _QUERIED:
        raise Problem("invalid-request", f"This request takes no parameters: {request.query_string[:200]}")
    return await handler(request)


def create_app(settings: Settings) -> web.Application:
    """Make the ingress.

    It raises :class:`~orderstream.errors.SettingsError` where a file of tokens or keys can't be used.
    Its start raises :class:`~orderstream.errors.EngineUnavailable` when Kafka or Postgres does not answer or was not
    prepared by ``orderstream init``, :class:`~orderstream.errors.SettingsError` when the orders topic has another
    number of partitions, and :class:`~orderstream.errors.OrderstreamError` when the database, or the keys in Redis, are
    another pipeline's.  Without Redis it works: verdicts are then read from Postgres.
    """
    traces, access = tracing.wanted(), Access(settings)

    async def engines(app: web.Application) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            store = await connect_store(settings)
            stack.push_async_callback(close_store, store)
            producer = OrderProducer(settings)
            if traces:
                producer.tracing = app[_TRACING] = tracing.Tracing("ingress")
                stack.push_async_callback(app[_TRACING].close)
                logs.name_traces(app[_TRACING].name_in_log)
            stack.push_async_callback(producer.stop)
            await producer.start()
            presence = Presence("Postgres", public(settings.database_url))
            postgres = Postgres(store, presence, settings.postgres_pool_max)
            lookup = Lookup(postgres)
            stack.push_async_callback(lookup.close)
            replies = Replies(settings, lookup, await store.pool.fetchval("SELECT id::text FROM pipeline"))
            stack.push_async_callback(replies.close)
            await replies.start()
            app[_INGRESS] = Ingress(settings, postgres, producer, replies, access)
            app[_LISTING] = Listing(postgres, access)
            app[_PRODUCTS] = Products(settings, postgres, producer, access)
            if settings.rate_limit_per_s:
                app[ALLOWANCE] = Allowance(settings, replies.client)
            hasty = Watch(settings, postgres, cancel.TICK_S, "what became of cancellations is not known")
            streamed = Watch(settings, postgres, events.TICK_S, "streams of events wait for it")
            for watch in (hasty, streamed):
                stack.push_async_callback(watch.close)
                watch.start()
            app[_CANCEL] = Cancel(settings, producer, hasty, access)
            app[_EVENTS] = Events(settings, streamed, access)
            app[_WATCHES] = (hasty, streamed)
            app[_ENGINES] = (
                Engine("kafka", settings.kafka, producer.check),
                Engine("redis", public(settings.redis_url), replies.client.ping, is_needed=False),
                Engine("postgres", presence.address, postgres.check),
            )
            counted.HTTP_WAITING.set_function(replies.awaited)
            begin("ingress")
            app[_PRESENCES] = (producer.presence, replies.presence, presence)
            yield

    async def create(request: web.Request) -> web.Response:
        return await request.app[_INGRESS].create(request)

    async def read(request: web.Request) -> web.Response:
        return await request.app[_INGRESS].read(request)

    async def list_orders(request: web.Request) -> web.Response:
        return await request.app[_LISTING].list(request)

    async def list_products(request: web.Request) -> web.Response:
        return await request.app[_PRODUCTS].list(request)

    async def read_product(request: web.Request) -> web.Response:
        return await request.app[_PRODUCTS].read(request)

    async def put_product(request: web.Request) -> web.Response:
        return await request.app[_PRODUCTS].put(request)

    async def move_stock(request: web.Request) -> web.Response:
        return await request.app[_PRODUCTS].move(request)

    async def read_ledger(request: web.Request) -> web.Response:
        return await request.app[_PRODUCTS].ledger(request)

    api = openapi.describe(settings)
    text, shown = orjson.dumps(api), openapi.render(api)

    async def document(_request: web.Request) -> web.Response:
        return web.Response(body=text, content_type="application/json")

    async def docs(_request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": openapi.PAGE_POLICY}
        return web.Response(text=shown, content_type="text/html", headers=headers)

    async def cancel_order(request: web.Request) -> web.Response:
        return await request.app[_CANCEL].cancel(request)

    async def follow(request: web.Request) -> web.StreamResponse:
        return await request.app[_EVENTS].events(request)

    async def check(request: web.Request) -> web.Response:
        leaves = "This ingress leaves: send requests to another one." if request.app[_LEAVING].is_set() else None
        engines = request.app[_ENGINES]
        return await ready(engines, leaves)

    async def scrape(request: web.Request) -> web.Response:
        note_unavailable({presence.engine.lower() for presence in request.app[_PRESENCES] if presence.unavailable})
        return web.Response(body=counted.exported("ingress"), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def hurry(app: web.Application) -> None:
        app[_INGRESS].hurry(FINISH_S)
        cancelling, following = app[_WATCHES]
        following.leave()
        asyncio.get_running_loop().call_later(FINISH_S, cancelling.leave)

    app = web.Application(
        middlewares=[*([traced] if traces else []), measured, problems, limited, strict],
        client_max_size=settings.order_bytes_max,
    )
    app[_LEAVING] = asyncio.Event()
    app.router.add_post(PATH, create)
    app.router.add_get(PATH, list_orders)
    app.router.add_get(PATH + ID, read)
    app.router.add_get(PRODUCTS, list_products)
    app.router.add_get(PRODUCTS + ID, read_product)
    app.router.add_put(PRODUCTS + ID, put_product)
    app.router.add_post(PRODUCTS + ID + "/stock", move_stock)
    app.router.add_get(PRODUCTS + ID + "/ledger", read_ledger)
    app.router.add_get("/openapi.json", document)
    app.router.add_get("/docs", docs)
    app.router.add_post(PATH + ID + "/cancel", cancel_order)
    app.router.add_get(PATH + ID + "/events", follow)
    app.router.add_get("/health", health)
    app.router.add_get("/ready", check)
    app.router.add_get("/metrics", scrape)
    app.on_response_prepare.append(guard)
    if settings.cors_origins:
        share(app, settings.cors_origins.split(","))
    app.cleanup_ctx.append(engines)
    app.on_shutdown.append(hurry)
    return app


async def connect_store(settings: Settings) -> Store:
    """Connect Postgres.

    Raises:
        EngineUnavailable: it does not answer, or has no tables yet.
        OrderstreamError: it is another pipeline's.
    """
    with connecting.postgres(settings):
        async with asyncio.timeout(CONNECT_S):
            store = await Store.connect(
                settings.database_url,
                connections_max=settings.postgres_pool_max,
                timeout_s=settings.postgres_timeout_s,
            )
            try:
                await prepare.check(store.pool, settings)
            except BaseException:
                store.pool.terminate()
                raise
    return store


async def close_store(store: Store) -> None:
    """Disconnect Postgres; connections that hang are cut."""
    with suppress(TimeoutError):  # terminate() does it then
        async with asyncio.timeout(CLOSE_S):
            await store.close()
    store.pool.terminate()


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then finish the requests in hand, within 10 seconds.

    After SIGTERM it first says in ``/ready`` that it leaves, and takes connections for ``drain_s`` more seconds, at most
    until the next signal.

    Raises:
        EngineUnavailable: Kafka or Postgres does not answer.
        OrderstreamError: the address can't be listened on.
    """
    app, stopping = create_app(settings), asyncio.Event()
    loop = asyncio.get_running_loop()

    def leave(drain_s: float) -> None:
        if app[_LEAVING].is_set() or not drain_s:
            stopping.set()
        else:
            log.info("ingress drains", for_s=drain_s)
            loop.call_later(drain_s, stopping.set)
        app[_LEAVING].set()

    loop.add_signal_handler(signal.SIGTERM, leave, settings.drain_s)
    loop.add_signal_handler(signal.SIGINT, leave, 0.0)
    descriptors.raise_limit(settings.connections_max)
    runner = Runner(app, bounds(settings), access_log=None, shutdown_timeout=LEAVE_S)
    try:
        await runner.setup()
        site = web.TCPSite(runner, settings.http_host, settings.http_port, backlog=BACKLOG)
        try:
            await site.start()
        except OSError as error:
            raise OrderstreamError(
                f"the ingress can't listen at {settings.http_host}:{settings.http_port}: {error.strerror}\n"
                f"set {PREFIX}HTTP_HOST to an address of this machine, {PREFIX}HTTP_PORT to a free port (0 finds one)"
            ) from error
        collector.settle(YOUNG_OBJECTS)
        host, port = runner.addresses[0][:2]
        log.info("ingress listens", url=str(URL.build(scheme="http", host=host, port=port)))
        await stopping.wait()
        log.info("ingress leaves")
    finally:
        await runner.cleanup()


def run(settings: Settings) -> None:
    """Run an ingress until SIGTERM or SIGINT.

    Raises:
        EngineUnavailable: Kafka or Postgres does not answer.
        OrderstreamError: the address can't be listened on, or settings and topics don't fit.
    """
    logs.configure(settings)
    loop_factory = None
    with suppress(ImportError):  # not made for every platform
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(serve(settings))
