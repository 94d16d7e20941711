"""The composition root of a worker: settings in, a Faust app with its stages, tables and pages out.

Nothing connects on import.  The engines are connected when the app starts, before its consumer joins the group.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Coroutine, Mapping
from typing import Any, NoReturn

import structlog
from aiokafka.errors import KafkaError
from faust.sensors.prometheus import FaustMetrics, PrometheusMonitor
from prometheus_client import REGISTRY
from yarl import URL

from orderstream import collector, connecting, descriptors, failpoints, logs, metrics
from orderstream.agents import commit, pay, prune, reserve, stock, views, watchdog
from orderstream.agents.batches import Batch, batches
from orderstream.agents.desk import Desk, Slip, marks_of
from orderstream.agents.provider import Provider, make_provider
from orderstream.agents.setback import Setback
from orderstream.agents.stage import Stage, agent_body
from orderstream.agents.till import Till
from orderstream.agents.timers import Timers
from orderstream.agents.tracing import Traces
from orderstream.errors import EngineUnavailable, OrderstreamError, OwnershipLost, TopicsMisfit
from orderstream.exits import end_process, end_process_on_failure
from orderstream.http.stats import pages
from orderstream.http.stats.figures import Figures
from orderstream.http.stats.owners import OwnerRouter, advertised_url
from orderstream.settings import Settings, public, writable
from orderstream.sql.prepare import check, check_keys
from orderstream.sql.stages import Fenced, OrderMoved
from orderstream.sql.store import Store, gate_of
from orderstream.streams import counts, tracing
from orderstream.streams.producer import Producer
from orderstream.streams.topics import (
    ORDER_COMMANDS,
    ORDER_LINES,
    ORDERS,
    RESERVATIONS,
    STOCK_COMMANDS,
    TABLES,
    TOPICS,
    changelog_topic,
)
from orderstream.streams.upstream.app import App, credentials
from orderstream.streams.upstream.worker import QuietWorker
from orderstream.tables.views import Views

log = structlog.get_logger("worker")

EXIT_UNAVAILABLE = 2
"""Exit code of a worker without Kafka or Postgres, or whose topics do not fit; as of every command."""

YOUNG_OBJECTS = 200_000
"""Of the collector: more than all batches in hand are made of at full load, so that these do not set it off.  With 50,000 it
came by for every ten thousand orders, looked at what was in hand for some 50 ms, and found nothing."""

FINISH_S = 6.0
"""How long a worker that leaves works on the batches in hand; what is not done by then, its successor does."""

LEAVE_S = 9.0
"""How long a worker takes to leave at most, in seconds; then it ends as it is, which loses nothing."""

FAUST_WAIT_S = 3_600.0
"""How long Faust waits for Kafka within a rebalance; a worker whose wait is over never reads again."""

FETCH_RECORDS_MAX = 5_000
"""Records handed over by one poll of the consumer, over all partitions."""


class WorkerApp(App):
    """The worker's Faust app: it connects the engines before it reads, and closes them after."""

    stage: Stage
    provider: Provider
    desk: Desk
    setback: Setback
    till: Till
    timers: Timers
    figures: Figures
    views: Views
    refusal: TopicsMisfit | None = None
    _aside: tuple[asyncio.Task[None], ...] = ()

    def kafka_unavailable(self, error: KafkaError) -> NoReturn:
        """End the process: Kafka answered a moment ago and does not now.  What was read and not committed is read again."""
        self.engine_unavailable(connecting.fault("Kafka", self.stage.settings.kafka, error))

    def out_of_range(self, offsets: Mapping[Any, int]) -> None:
        """Let go of everything: at the next take-over, what was read is compared with the log."""
        if self.desk.generation is not None:
            log.error("these positions are in no log", places={f"{t}/{p}": at for (t, p), at in offsets.items()})
            self.desk.forget()

    def engine_unavailable(self, error: EngineUnavailable) -> NoReturn:
        """End the process, with a line that names the engine."""
        print(f"orderstream: {error}", file=sys.stderr, flush=True)  # noqa: T201  (as the command line writes it)
        sys.stdout.flush()
        os._exit(EXIT_UNAVAILABLE)

    async def on_start(self) -> None:
        """Connect Postgres and Kafka; Redis may be unavailable."""
        settings = self.stage.settings
        log.info(
            "worker starts",
            kafka=settings.kafka,
            redis=public(settings.redis_url),
            postgres=public(settings.database_url),
            pages=f"http://{settings.web_host}:{settings.web_port}/stats/" if settings.web_enabled else None,
        )
        with connecting.postgres(settings):
            self.stage.store.pool = (
                await Store.connect(
                    settings.database_url,
                    connections_max=settings.postgres_pool_max,
                    timeout_s=settings.postgres_timeout_s,
                )
            ).pool
        with connecting.kafka(settings):
            await self.stage.producer.start()
        if tracing.wanted():
            self.stage.traces = Traces(tracing.Tracing("worker"))
            logs.name_traces(self.stage.traces.tracing.name_in_log)
        await super().on_start()
        guard = watchdog.Watchdog(self.desk, settings.stall_timeout_s)
        self._aside = (
            asyncio.create_task(self.timers.run(), name="the timers"),
            asyncio.create_task(self.setback.watch(), name="the comparison with Postgres"),
            asyncio.create_task(guard.run(), name="the watchdog"),
            asyncio.create_task(views.keep(self.desk), name="the flushing of the tables"),
            asyncio.create_task(prune.Prune(self.stage).run(), name="the removal of old orders"),
            asyncio.create_task(self.figures.run(), name="the sampler of the pages"),
            asyncio.create_task(self._watch_partitions(), name="the watch over the numbers of partitions"),
        )
        for task in self._aside:
            task.add_done_callback(end_process_on_failure)

    async def _watch_partitions(self) -> None:
        """Leave where a topic has got another number of partitions: what stands in the new ones has no home."""
        before = None
        while True:
            await asyncio.sleep(counts.LOOK_S)
            try:
                found = await self.stage.producer.misfit()
            except KafkaError:
                continue  # the stages tell of it
            if found is not None and found == before:  # not a topic that is being made
                self.refusal = TopicsMisfit(found)
                log.critical(
                    "a topic has another number of partitions than the pipeline: this worker leaves", why=found
                )
                os.kill(os.getpid(), signal.SIGTERM)  # what is in hand is finished, and its offsets are committed
                return
            before = found

    async def on_stop(self) -> None:
        """Finish the batches in hand and commit their offsets, then release everything; in bounded time."""
        log.info("worker leaves", in_hand=len(self.desk.entries))
        deadline = threading.Timer(LEAVE_S, _leave_at_once)
        deadline.daemon = True
        deadline.start()
        for task in self._aside:
            task.cancel()
        self.till.close()  # nobody would hear the answers: a successor asks under the same keys
        try:
            async with asyncio.timeout(FINISH_S):
                await self.in_hand.finish()
                if self.made_consumer is not None:
                    await self.made_consumer.commit()
        except TimeoutError:
            log.warning("a batch was not done in time, its successor does it again", waited_s=FINISH_S)
        await super().on_stop()

    async def on_shutdown(self) -> None:
        """Close the engines, last of all: agents in the middle of a batch have used them until now."""
        await super().on_shutdown()
        await self.stage.producer.stop()
        await self.provider.close()
        await self.stage.gate.close()
        with contextlib.suppress(TimeoutError):  # connections that hang are the server's to clean up
            await asyncio.wait_for(self.stage.store.close(), 2)
        if self.stage.traces is not None:
            await self.stage.traces.tracing.close()
        log.info("worker has left")


def _leave_at_once() -> None:
    end_process(f"this worker could not leave within {LEAVE_S:g} s: it ends as it is")


class _Unconnected:
    """Takes the place of the pool until the app has started."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError("Postgres is connected when the app starts")


def create_app(settings: Settings) -> WorkerApp:
    """Make the worker's app: three agents, two tables, their pages."""
    app = WorkerApp(
        settings.app_id,
        broker=[URL(f"kafka://{server}") for server in settings.kafka.split(",")],
        broker_credentials=credentials(settings),
        store="memory://",
        datadir=writable(settings.local_dir / "faust"),
        autodiscover=False,
        topic_partitions=settings.partitions,
        topic_replication_factor=settings.replication_factor,
        topic_disable_leader=True,
        table_standby_replicas=0,  # a copy of a foreign partition would lag behind and pass for one's own orders
        consumer_auto_offset_reset="none",
        broker_commit_interval=settings.commit_interval_s,
        broker_commit_livelock_soft_timeout=300.0,
        broker_request_timeout=FAUST_WAIT_S,
        broker_session_timeout=settings.session_timeout_s,
        broker_heartbeat_interval=settings.heartbeat_interval_s,
        broker_max_poll_records=FETCH_RECORDS_MAX,
        broker_max_poll_interval=600.0,
        producer_acks=-1,
        stream_wait_empty=False,
        stream_buffer_maxsize=4096,
        web_enabled=settings.web_enabled,
        web_bind=settings.web_host,
        web_host=settings.web_host,
        web_port=settings.web_port,
        canonical_url=advertised_url(settings),
        Router=OwnerRouter,
        worker_redirect_stdouts=False,
    )
    if settings.faust_metrics:
        app.monitor = PrometheusMonitor(FaustMetrics.create(REGISTRY, "faust"))
    store = Store(_Unconnected())
    gate = gate_of(settings, store)
    producer = Producer(settings, client_id=f"{settings.app_id}-{socket.gethostname()}-{os.getpid()}")
    app.stage = Stage(settings, app, store, gate, producer)
    app.provider = make_provider(settings)
    app.views = Views(app, settings.partitions)
    app.desk = Desk(app.stage, app.views)
    app.setback = Setback(app.desk)
    app.desk.make_good = app.setback.make_good
    app.desk.check = app.setback.check
    app.till = Till(
        app.provider,
        settings.payment_in_flight_max,
        settings.payment_rate_max,
        settings.retry_wait_max_s,
        app.desk.wake_pay,
    )
    app.desk.till = app.till
    app.timers = Timers(app.desk, app.till)

    async def take_over() -> None:
        app.desk.wake_commit.set()

    app.views.open_orders.on_recover(take_over)  # a rebalance is over: what waits here may have no record that comes
    add_agents(app)
    app.figures = pages.register(app)
    return app


def add_agents(app: WorkerApp) -> None:
    """Add the agents: reserve, pay and commit, chained in memory by the desk."""
    settings, desk, till = app.stage.settings, app.desk, app.till

    def topic(*specs: Any) -> Any:
        names = [settings.topic(spec.name) for spec in specs]
        return app.topic(*names, key_serializer="raw", value_serializer="raw", key_type=bytes, value_type=bytes)

    def stream_of(stream: Any, interval_s: float, **wake: Any) -> Any:
        return batches(app, stream, records_max=settings.batch_records_max, interval_s=interval_s, **wake)

    def let_go(batch: Batch, lost: Exception) -> None:
        if not isinstance(lost, OwnershipLost):
            metrics.FENCED.inc()
            log.warning("a batch is dropped, and its partitions are taken over again", why=str(lost))
        desk.forget()
        batch.drop()

    async def followed(batch: Batch, rest: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any] | None:
        try:
            following = await rest
        except (OwnershipLost, Fenced) as lost:
            let_go(batch, lost)
            return None
        return None if following is None else followed(batch, following)

    @agent_body
    async def reserve_agent(stream: Any) -> None:
        async for batch in stream_of(stream, settings.batch_interval_s):
            try:
                await desk.take_over(batch)
                if batch.chunks:
                    await desk.room(batch)
                    batch.finish_with(followed(batch, await reserve.reserve(desk, batch)), steps=3)
            except (OwnershipLost, Fenced) as lost:
                let_go(batch, lost)

    @agent_body
    async def pay_agent(stream: Any) -> None:
        async for batch in stream_of(stream, 0.0, wake=desk.wake_pay):
            began, size = time.perf_counter(), len(batch) + len(desk.to_pay) + len(till.answers)
            try:
                await desk.take_over(batch)
                if batch.chunks:
                    await pay.wait_for_room(desk, till, batch)
                    await pay.hand_on(desk, batch)
            except OwnershipLost as lost:
                let_go(batch, lost)
            steps = metrics.Steps("pay")
            pay.hear(desk, till)
            pay.ask(desk, till)
            steps.done("ask")
            if size:
                metrics.batch_done("pay", size, began)

    @agent_body
    async def commit_agent(stream: Any) -> None:
        async for batch in stream_of(
            stream, settings.batch_interval_s, wake=desk.wake_commit, beside=lambda: len(desk.inbox)
        ):
            try:
                await desk.take_over(batch)
                outbox = app.stage.outbox("commit", batch)
                slip = Slip(app.stage, batch)
                if batch.chunks:
                    batch.keep()
                    desk.note_marks(marks_of(batch))
                    commit.sort(desk, batch, slip, outbox)
                    outbox.steps.done("decode")
                    await stock.apply(desk, batch, outbox)
                    await app.stage.emit(outbox, "commit", batch)
                follow = await commit.settle(desk, batch)
                slip.done()
                batch.finish_with(followed(batch, follow))
            except (OwnershipLost, Fenced, OrderMoved) as lost:
                if isinstance(lost, OrderMoved):
                    desk.keep_apart()
                let_go(batch, lost)

    app.agent(topic(ORDERS), name="reserve", concurrency=1)(reserve_agent)
    app.agent(topic(ORDER_COMMANDS, RESERVATIONS), name="pay", concurrency=1)(pay_agent)
    app.agent(topic(ORDER_LINES, STOCK_COMMANDS), name="commit", concurrency=1)(commit_agent)


def take_web_port(settings: Settings) -> tuple[Settings, socket.socket]:
    """Take the port for the pages: the wished one, or a free one where it is taken or 0.

    The socket is kept and handed to the web server, so that no other process takes the port in between.

    Raises:
        OrderstreamError: ``web_host`` is no address of this machine.
    """
    for port in (settings.web_port, 0):
        taken = socket.socket(socket.AF_INET6 if ":" in settings.web_host else socket.AF_INET)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((settings.web_host, port))
            taken.listen(128)
        except OSError as error:
            taken.close()
            if error.errno != errno.EADDRINUSE:
                raise OrderstreamError(
                    f"the pages can't be served at {settings.web_host}:{port}: {error.strerror}\n"
                    "set ORDERSTREAM_WEB_HOST to an address of this machine"
                ) from error
            continue
        return settings.model_copy(update={"web_port": taken.getsockname()[1]}), taken
    raise AssertionError("no port is free")


def check_engines(settings: Settings) -> None:
    """Report at once, and plainly, which engine does not answer, or is not this pipeline's.

    Raises:
        EngineUnavailable: Kafka or Postgres; without Redis a worker works.
        OrderstreamError: the database or the keys in Redis are another pipeline's; topics have other partitions.
    """

    async def ask() -> None:
        with connecting.postgres(settings):
            store = await Store.connect(settings.database_url, connections_max=1, timeout_s=5)
            try:
                await check(store.pool, settings)
                await check_keys(store, settings)
            finally:
                await store.close()
        producer = Producer(settings)
        topics = [
            *(settings.topic(spec.name) for spec in TOPICS),
            *(changelog_topic(settings.app_id, t) for t in TABLES),
        ]
        try:
            with connecting.kafka(settings):
                await asyncio.wait_for(producer.check_partitions(topics), 10)
        finally:
            await producer.stop()

    asyncio.run(ask())


def run_worker(settings: Settings) -> NoReturn:
    """Run a worker until it is asked to stop; ends the process.

    Raises:
        EngineUnavailable: Kafka or Postgres does not answer.
        TopicsMisfit: a topic has another number of partitions, or has got one.
    """
    logs.configure(settings)
    failpoints.arm(settings.failpoint)
    descriptors.raise_limit(settings.idle_connections_max)
    check_engines(settings)
    web_socket = None
    if settings.web_enabled:
        settings, web_socket = take_web_port(settings)
    with contextlib.suppress(ImportError):  # not made for every platform
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    app = create_app(settings)
    app.web_socket = web_socket
    collector.settle(YOUNG_OBJECTS)
    try:
        QuietWorker(app).execute_from_commandline()
    except SystemExit:
        if app.refusal is not None:
            raise app.refusal from None
        raise
    raise SystemExit(0)
