"""The ingress: wiring, start and end."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator

import asyncpg
import structlog
from aiohttp import web
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from orderstream import logs, metrics
from orderstream.errors import EngineAway, OrderstreamError
from orderstream.http import health
from orderstream.http.orders import Orders
from orderstream.http.problems import Handler, problems
from orderstream.http.replies import Replies
from orderstream.lua.gate import Keys
from orderstream.settings import Settings, public
from orderstream.sql.store import Store
from orderstream.streams.topics import ORDERS

log = structlog.get_logger("ingress")

LEAVE_S = 8.0
"""How long requests in hand may take once the process is told to leave, in seconds."""

LINGER_MS = 2
"""How long the producer waits for more orders to send along."""


@web.middleware
async def measured(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count and time requests by route."""
    start = time.perf_counter()
    response = await handler(request)
    resource = request.match_info.route.resource
    path = resource.canonical if resource is not None else "(no route)"
    labels = (request.method, path, str(response.status))
    metrics.HTTP_REQUESTS.labels(*labels).inc()
    metrics.HTTP_LATENCY.labels(*labels).observe(time.perf_counter() - start)
    return response


async def connect(settings: Settings) -> tuple[AIOKafkaProducer, Store]:
    """Connect Kafka and Postgres.

    Raises:
        EngineAway: one of them does not answer.
    """
    try:
        store = await Store.connect(settings.database_url, connections_max=settings.postgres_pool_max, timeout_s=10)
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        raise EngineAway("Postgres", public(settings.database_url), repr(error)) from error
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka,
        client_id="orderstream-ingress",
        acks="all",
        enable_idempotence=True,
        linger_ms=LINGER_MS,
        max_batch_size=256 * 1024,
        request_timeout_ms=10_000,
    )
    try:
        await producer.start()
    except KafkaError as error:
        await producer.stop()
        await store.close()
        raise EngineAway("Kafka", settings.kafka, repr(error)) from error
    return producer, store


def create_app(settings: Settings) -> web.Application:
    """Make the application; it connects when it starts, and closes when it ends."""
    app = web.Application(middlewares=[measured, problems], client_max_size=settings.order_bytes_max)
    handlers: dict[str, Handler] = {}

    async def engines(app: web.Application) -> AsyncIterator[None]:
        producer, store = await connect(settings)
        replies = Replies(settings.redis_url, Keys(settings.redis_prefix), timeout_s=settings.redis_timeout_s)
        await replies.start()
        orders = Orders(settings, producer, replies, store)
        handlers["post"], handlers["get"] = orders.post, orders.get
        handlers["ready"] = health.ready(
            {
                "kafka": (settings.kafka, producer.client.fetch_all_metadata),
                "redis": (public(settings.redis_url), replies.ping),
                "postgres": (public(settings.database_url), lambda: store.pool.fetchval("SELECT 1")),
            }
        )
        yield
        await replies.stop()
        await producer.stop()
        await store.close()

    def connected(name: str) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            return await handlers[name](request)

        return handle

    app.cleanup_ctx.append(engines)
    app.router.add_get("/health", health.health)
    app.router.add_get("/ready", connected("ready"))
    app.router.add_get("/metrics", health.metrics)
    app.router.add_post("/api/v1/orders", connected("post"))
    app.router.add_get("/api/v1/orders/{order_id}", connected("get"))
    return app


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then finish the requests in hand.

    Raises:
        EngineAway: Kafka or Postgres does not answer at the start.
        OrderstreamError: the address can't be had.
    """
    runner = web.AppRunner(create_app(settings), access_log=None, shutdown_timeout=LEAVE_S)
    await runner.setup()
    try:
        site = web.TCPSite(runner, settings.http_host, settings.http_port)
        try:
            await site.start()
        except OSError as error:
            raise OrderstreamError(
                f"the ingress can't listen at {settings.http_host}:{settings.http_port}: {error.strerror}\n"
                "choose another port with --port or ORDERSTREAM_HTTP_PORT; 0 takes a free one"
            ) from error
        for host, port, *_ in runner.addresses:
            log.info("ingress listens", url=f"http://{host}:{port}", topic=settings.topic(ORDERS.name))
        stop = asyncio.Event()
        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, stop.set)
        await stop.wait()
    finally:
        await runner.cleanup()


def run(settings: Settings) -> None:
    """Run the ingress until it is told to stop."""
    logs.configure(settings)
    asyncio.run(serve(settings))
