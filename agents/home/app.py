"""The composition root of a worker with the stages of :mod:`orderstream.agents.home`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Any, NoReturn

from yarl import URL

from orderstream import collector, connecting, failpoints, logs
from orderstream.agents.batches import Batch, batches
from orderstream.agents.home import commands, commit, pay, reserve
from orderstream.agents.home.desk import About, Desk, LineAsked, Slip
from orderstream.agents.home.holding import Held, answer
from orderstream.agents.home.timers import Timers
from orderstream.agents.intake import inner_rows, take_in
from orderstream.agents.provider import Provider, make_provider
from orderstream.agents.stage import Stage, agent_body
from orderstream.agents.till import Till
from orderstream.errors import InvalidRecord, OwnershipLost
from orderstream.exits import end_process_on_failure
from orderstream.lua.gate import Gate, Loaded
from orderstream.settings import Settings, load
from orderstream.sql.prepare import prepare
from orderstream.sql.stages import Fenced, OrderMoved
from orderstream.sql.store import Store, statements
from orderstream.streams.lines import LineStands, LineWanted
from orderstream.streams.producer import Producer
from orderstream.streams.topics import ORDER_COMMANDS, ORDER_LINES, ORDERS, RESERVATIONS, STOCK_COMMANDS
from orderstream.streams.upstream.app import App
from orderstream.streams.upstream.worker import QuietWorker

YOUNG_OBJECTS = 50_000
"""Of the collector: about what three batches in hand are made of."""


class HomeStore(Store):
    """The statements of the tables of a home."""

    async def load_gate(self, product_ids: Sequence[str], loaded: Loaded) -> None:
        """See :class:`Store`."""
        async with self.pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch("SELECT * FROM lock_stock($1)", list(product_ids))
            if rows:
                await loaded(self.counts_of(rows), await self.user_limits(connection, rows))

    async def invalidate_gate(self, product_ids: Sequence[str]) -> dict[str, int]:
        """See :class:`Store`."""
        rows = await self.pool.fetch(statements("home.sql")["invalidate_gate"], list(product_ids))
        return {row["product_id"]: row["generation"] for row in rows}


class HomeApp(App):
    """The worker's Faust app."""

    stage: Stage
    desk: Desk
    provider: Provider
    timers: Timers
    _aside: asyncio.Task[None] | None = None

    async def on_start(self) -> None:
        """Connect Postgres and Kafka."""
        settings = self.stage.settings
        self.stage.store.pool = (await HomeStore.connect(settings.database_url, connections_max=6)).pool
        await self.stage.producer.start()
        await super().on_start()
        self._aside = asyncio.create_task(self.timers.run(), name="the timers")
        self._aside.add_done_callback(end_process_on_failure)

    async def on_stop(self) -> None:
        """Finish the batches in hand, and commit their offsets."""
        if self._aside is not None:
            self._aside.cancel()
        async with asyncio.timeout(6):
            await self.in_hand.finish()
            if self.made_consumer is not None:
                await self.made_consumer.commit()
        await super().on_stop()

    async def on_shutdown(self) -> None:
        """Close the engines."""
        await super().on_shutdown()
        await self.stage.producer.stop()
        await self.provider.close()
        await self.stage.gate.close()
        await self.stage.store.close()


def create_app(settings: Settings) -> HomeApp:
    """Make the worker's app."""
    data = settings.local_dir / "faust"
    data.mkdir(parents=True, exist_ok=True)
    app = HomeApp(
        settings.app_id,
        broker=[URL(f"kafka://{server}") for server in settings.kafka.split(",")],
        store="memory://",
        datadir=data,
        autodiscover=False,
        topic_partitions=settings.partitions,
        topic_replication_factor=settings.replication_factor,
        topic_disable_leader=True,
        table_standby_replicas=0,
        consumer_auto_offset_reset="earliest",
        broker_commit_interval=settings.commit_interval_s,
        broker_commit_livelock_soft_timeout=300.0,
        broker_session_timeout=settings.session_timeout_s,
        broker_heartbeat_interval=settings.heartbeat_interval_s,
        broker_max_poll_records=5_000,
        broker_max_poll_interval=600.0,
        producer_acks=-1,
        stream_wait_empty=False,
        stream_buffer_maxsize=4096,
        web_enabled=False,
        worker_redirect_stdouts=False,
    )
    store = HomeStore(None)

    async def load(product_ids: Any, loaded: Loaded) -> None:
        await store.load_gate(product_ids, loaded)

    gate = Gate(settings.redis_url, settings.redis_prefix, load, timeout_s=settings.redis_timeout_s)
    producer = Producer(settings, client_id=f"{settings.app_id}-{socket.gethostname()}-{os.getpid()}")
    app.stage = Stage(settings, app, store, gate, producer)
    app.provider = make_provider(settings)
    app.desk = Desk(app.stage)
    register(app, app.desk, app.provider)
    return app


def register(app: HomeApp, desk: Desk, provider: Provider) -> None:
    """Add the agents, chained in memory."""
    settings = app.stage.settings
    till = Till(provider, settings.payment_in_flight_max, settings.retry_wait_max_s, desk.wake_pay)

    app.timers = Timers(desk, till)

    def topic(*specs: Any) -> Any:
        names = [settings.topic(spec.name) for spec in specs]
        return app.topic(*names, key_serializer="raw", value_serializer="raw", key_type=bytes, value_type=bytes)

    def stream_of(name: str, stream: Any, interval_s: float, wake: asyncio.Event | None = None) -> Any:
        return batches(app, stream, name, records_max=settings.batch_records_max, interval_s=interval_s, wake=wake)

    @agent_body
    async def reserve_agent(stream: Any) -> None:
        async for batch in stream_of("reserve", stream, settings.batch_interval_s / 2):
            try:
                await desk.take_over()
                await reserve.reserve(desk, batch)
            except (OwnershipLost, Fenced):
                desk.forget()
                batch.drop()

    @agent_body
    async def pay_agent(stream: Any) -> None:
        async for batch in stream_of("pay", stream, 0.0, desk.wake_pay):
            try:
                await desk.take_over()
                if batch.chunks:
                    await hand_on(batch)
            except OwnershipLost:
                desk.forget()
                batch.drop()
            pay.hear(desk, till)
            pay.ask(desk, till)

    async def hand_on(batch: Batch) -> None:
        outbox, slip = app.stage.outbox("pay", batch), Slip(app.stage, batch)
        batch.keep()
        desk.note_marks(batch)
        pay.sort(desk, batch, slip, outbox)
        name = settings.topic(RESERVATIONS.name)
        for _, rows in take_in(batch.records(name), lambda r: inner_rows(r, LineStands), outbox):
            for row in rows:
                slip.left += 1
                held = Held(row.state, row.price_cents, row.reason)
                desk.put(About(row.order_id, answer(row.product_id, held), slip))
        await app.stage.emit(outbox, "home", batch)
        desk.read_slips.append(slip)  # acknowledged with the transaction that writes how far this topic has been read
        desk.wake_commit.set()

    @agent_body
    async def commit_agent(stream: Any) -> None:
        async for batch in stream_of("commit", stream, settings.batch_interval_s / 2, desk.wake_commit):
            try:
                await desk.take_over()
                outbox = app.stage.outbox("commit", batch)
                slip = Slip(app.stage, batch)
                if batch.chunks:
                    batch.keep()
                    desk.note_marks(batch)
                    name = settings.topic(ORDER_LINES.name)
                    for _, rows in take_in(batch.records(name), lambda r: _lines_of(desk, r), outbox):
                        for row in rows:
                            slip.left += 1
                            desk.put(LineAsked(row, slip))
                    await commands.apply(desk, batch, outbox)
                    await app.stage.emit(outbox, "home", batch)
                follow = await commit.settle(desk, batch, desk.take_marks())
                slip.done()
                batch.finish_with(follow)
            except (OwnershipLost, Fenced, OrderMoved):
                desk.forget()
                batch.drop()

    app.agent(topic(ORDERS), name="reserve", concurrency=1)(reserve_agent)
    app.agent(topic(ORDER_COMMANDS, RESERVATIONS), name="pay", concurrency=1)(pay_agent)
    app.agent(topic(ORDER_LINES, STOCK_COMMANDS), name="commit", concurrency=1)(commit_agent)


def _lines_of(desk: Desk, record: Any) -> list[LineWanted]:
    """Return the lines of a record on ``order-lines``.

    Raises:
        InvalidRecord: no stage wrote this, or not to this partition.
    """
    rows = inner_rows(record, LineWanted)
    if any(desk.owner_of(row.product_id) != record.partition for row in rows):
        raise InvalidRecord("invalid_rows", f"a line of a product that does not belong to partition {record.partition}")
    return rows


def run_worker(settings: Settings) -> NoReturn:
    """Run a worker until it is asked to stop; ends the process."""
    logs.configure(settings)
    failpoints.arm(settings.failpoint)
    with connecting.postgres(settings):
        asyncio.run(prepare(settings))
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    app = create_app(settings)
    collector.settle(YOUNG_OBJECTS)
    QuietWorker(app).execute_from_commandline()
    raise SystemExit(0)


if __name__ == "__main__":
    run_worker(load())
