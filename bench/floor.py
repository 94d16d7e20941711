"""The floor: the same stores and topics, driven by plain aiokafka loops, as the limit to compare a worker with.

``python -m orderstream.bench.floor`` reads orders of one product, decides them with the same Lua script, writes them with
the same SQL functions, sends the same records to the same topics and commits offsets, batch by batch, one loop a stage.
It does without what a worker is made of: Faust with its agents, streams and acknowledgements, tables and their changelogs,
a consumer group, repeats, foreign partitions, dead letters, refunds, expiry, patience with engines, pages.  It ends with
the first fault.  So it can't be used; it shows how far a worker is from what its stores and its language allow.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import uvloop
from aiokafka import AIOKafkaConsumer, TopicPartition

from orderstream.agents.provider import Charge, Verdict, make_provider
from orderstream.engines.child import PAGE_S, Child
from orderstream.lua.gate import Gate, GateVerdict
from orderstream.settings import Settings, load
from orderstream.sql.store import Decision, LineToDecide, Store
from orderstream.streams import codec, events
from orderstream.streams.orders import Limits, decode
from orderstream.streams.places import Place
from orderstream.streams.producer import Outbox, Producer
from orderstream.streams.reservations import LineReserved
from orderstream.streams.settlements import Action, Settlement
from orderstream.streams.topics import ORDERS, RESERVATIONS, SETTLEMENTS

READY = "the floor reads"
POLL_MS = 100

Decide = Callable[[list[Any], Outbox], Awaitable[None]]


class Floor(Child):
    """The floor's process; takes the place of a worker, and is ready when its log says so."""

    def __init__(self, settings: Settings, log: Path) -> None:
        super().__init__("floor", settings, log, program=("-m", "orderstream.bench.floor"))

    def is_ready(self) -> bool:
        """See :class:`~orderstream.engines.child.Child`."""
        return READY in self.log.read_text()

    def page(self, path: str, timeout_s: float = PAGE_S) -> str:
        """Return nothing: it has no pages."""
        return ""


class Stages:
    """The three stages, each for a list of records; happy path only."""

    def __init__(self, settings: Settings, store: Store, gate: Gate) -> None:
        self._settings, self._store, self._gate = settings, store, gate
        self._limits = Limits(settings.order_lines_max, settings.line_quantity_max, settings.order_bytes_max)
        self._provider = make_provider(settings)

    async def reserve(self, records: list[Any], outbox: Outbox) -> None:
        """Decide orders of one product."""
        orders = [
            (decode(r.value, self._limits, topic=r.topic, partition=r.partition, offset=r.offset), r) for r in records
        ]
        asked = [(order.lines[0][0], order.order_id, order.lines[0][1]) for order, _ in orders]
        verdicts, unavailable = await self._gate.take(asked)
        lines = [
            LineToDecide(n, order_id, product_id, quantity, verdict)
            for n, ((product_id, order_id, quantity), verdict) in enumerate(zip(asked, verdicts, strict=True), 1)
        ]
        takes: dict[str, list[str]] = {}
        for line in lines:
            if line.gate != GateVerdict.REFUSED:
                takes.setdefault(line.product_id, []).append(line.order_id)
        sources = [(order, Place(record.topic, record.partition, record.offset)) for order, record in orders]
        reserved = await self._store.reserve(sources, lines, gate_unavailable=unavailable)
        for (order, _), (_, _, product_id, quantity, _), verdict in zip(orders, lines, reserved.lines, strict=True):
            order_id, price = order.order_id, verdict.unit_price_cents or 0
            outbox.event(order_id, events.created(order_id, reserved.at, order.user_id, order.lines))
            if verdict.reason is not None:
                outbox.event(order_id, events.cancelled(order_id, reserved.at, verdict.reason))
                continue
            outbox.event(order_id, events.reserved(order_id, reserved.at, quantity * price))
            row = LineReserved(
                order_id=order_id,
                product_id=product_id,
                quantity=quantity,
                unit_price_cents=price,
                reason=None,
                line_count=1,
                user_id=order.user_id,
                payment_method=order.payment_method,
                reply_to=None,
                again=False,
            )
            outbox.reservation(row, order_id)
        await self._gate.decided(reserved.counts, takes)

    async def pay(self, records: list[Any], outbox: Outbox) -> None:
        """Charge what is held; the provider answers at once."""
        lines = [line for record in records for line in codec.decode_rows(record.value, LineReserved)]
        decisions = []
        for line in lines:
            total = line.quantity * line.unit_price_cents
            verdict = self._provider.charge(Charge(line.order_id, line.user_id, line.payment_method, total))
            assert isinstance(verdict, Verdict)
            decisions.append(Decision(line.order_id, "charged", None, total, verdict.charge_id))
        standings = await self._store.decide(decisions)
        for line, decision, standing in zip(lines, decisions, standings, strict=True):
            total, charge_id = decision.amount_cents or 0, str(decision.charge_id)
            outbox.event(line.order_id, events.paid(line.order_id, standing.moved_at, total, charge_id))
            outbox.settlement(Settlement(line.order_id, line.product_id, line.quantity, Action.COMMIT), line.product_id)

    async def commit(self, records: list[Any], outbox: Outbox) -> None:
        """Sell what was paid."""
        lines = [
            (line.order_id, line.product_id, line.action, record.partition, record.offset)
            for record in records
            for line in codec.decode_rows(record.value, Settlement)
        ]
        settled = await self._store.settle(lines, gate_unavailable=False)
        for order_id, at in settled.confirmed:
            outbox.event(order_id, events.confirmed(order_id, at))
        await self._gate.decided(settled.counts, {})


async def drive(settings: Settings, consumer: Any, producer: Producer, decide: Decide) -> None:
    """Read batches of a topic, decide each, send what follows, commit offsets now and then."""
    committed = time.monotonic()
    while True:
        fetched = await consumer.getmany(timeout_ms=POLL_MS, max_records=settings.batch_records_max)
        records = [record for part in fetched.values() for record in part]
        if records:
            outbox = Outbox(settings)
            await decide(records, outbox)
            await producer.send(outbox.publications())
            await producer.send(outbox.handovers())
        if time.monotonic() - committed > settings.commit_interval_s:
            await consumer.commit()
            committed = time.monotonic()


async def serve(settings: Settings) -> None:
    """Run the three loops until the process has to stop, or one of them fails."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    async with AsyncExitStack() as stack:
        store = await Store.connect(settings.database_url, connections_max=settings.postgres_pool_max)
        stack.push_async_callback(store.close)
        gate = Gate(settings.redis_url, settings.redis_prefix, store.load_gate, timeout_s=settings.redis_timeout_s)
        stack.push_async_callback(gate.close)
        producer = Producer(settings, client_id="orderstream-floor")
        await producer.start()
        stack.push_async_callback(producer.stop)
        stages = Stages(settings, store, gate)
        loops = []
        for spec, decide in ((ORDERS, stages.reserve), (RESERVATIONS, stages.pay), (SETTLEMENTS, stages.commit)):
            consumer = AIOKafkaConsumer(
                bootstrap_servers=settings.kafka,
                group_id=f"{settings.app_id}-floor-{spec.name}",
                enable_auto_commit=False,
                auto_offset_reset="earliest",
            )
            consumer.assign([TopicPartition(settings.topic(spec.name), n) for n in range(settings.partitions)])
            await consumer.start()
            stack.push_async_callback(consumer.stop)
            loops.append(asyncio.create_task(drive(settings, consumer, producer, decide)))
        print(READY, flush=True)
        stop = asyncio.create_task(stopping.wait())
        done, _ = await asyncio.wait([stop, *loops], return_when=asyncio.FIRST_COMPLETED)
        for loop in loops:
            loop.cancel()
        for task in done:
            task.result()


def main() -> None:
    """Run the floor, tuned as a worker is."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    uvloop.run(serve(load()))


if __name__ == "__main__":
    main()
