"""The floor: the shape of a worker's chained pass and nothing else, as the limit to compare a worker with.

``python -m orderstream.bench.floor`` reads orders of one product, takes them in by ``hold``, sells them by ``settle`` and
sends the same four events an order to its home, batch by batch: the next one is taken in while the one before is sold.  It
uses the worker's decoder, SQL functions, events and producer.  It does without what a worker is made of: Faust with its
agents, acknowledgements and pages, Redis, a consumer group, offsets and marks, repeats, refusals, other partitions' lines,
declined and late charges, expiry, patience with engines.  It ends with the first fault.  So it can't be used; it shows how
far a worker is from what its stores and its language allow.
"""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from aiokafka import AIOKafkaConsumer, TopicPartition

from orderstream import collector
from orderstream.engines.child import PAGE_S, Child
from orderstream.settings import Settings, load
from orderstream.sql import stages
from orderstream.sql.stages import Lane
from orderstream.sql.store import Store
from orderstream.streams import events
from orderstream.streams.orders import Limits, Order, decode_record
from orderstream.streams.producer import Outbox, Producer
from orderstream.streams.topics import ORDERS

READY = "the floor reads"
POLL_MS = 100
YOUNG_OBJECTS = 100_000
PASSES_MAX = 2
"""Batches that are taken in and not sold yet, at most."""


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


class Held(NamedTuple):
    """A batch that is taken in: its orders sorted by id, each with its home, and what Postgres answered."""

    orders: Sequence[tuple[Order, int]]
    at: datetime
    totals: Sequence[int]


class Passes:
    """The two halves of a pass; happy path only."""

    def __init__(self, settings: Settings, store: Store, producer: Producer) -> None:
        self._settings, self._pool, self._producer = settings, store.pool, producer
        self._limits = Limits(settings.order_lines_max, settings.line_quantity_max, settings.order_bytes_max)
        self._intake, self._settle = Lane(), Lane()

    async def claim(self) -> None:
        """Take every partition's lanes."""
        await stages.claim(self._pool, range(self._settings.partitions), self._intake, self._settle)

    async def take_in(self, records: Sequence[Any]) -> Held:
        """Hold what orders of one product want."""
        decoded = sorted(
            (
                decode_record(r, self._limits),
                r.partition,
                r.offset,
            )
            for r in records
        )
        ids = [order.order_id for order, _, _ in decoded]
        homes = [home for _, home, _ in decoded]
        columns = {
            "order_ids": ids,
            "homes": homes,
            "source_offsets": [offset for _, _, offset in decoded],
            "user_ids": [order.user_id for order, _, _ in decoded],
            "payment_methods": [order.payment_method for order, _, _ in decoded],
            "statuses": ["RESERVED"],
            "line_ns": ids,
            "line_product_ids": [order.lines[0][0] for order, _, _ in decoded],
            "line_quantities": [order.lines[0][1] for order, _, _ in decoded],
            "line_states": ["h"],
            "held_order_ids": ids,
        }
        step = self._intake.step(set(homes))
        row = (await stages.hold(self._pool, self._intake, step | columns, uuid.uuid4())).row
        return Held([(order, home) for order, home, _ in decoded], row["at"], row["totals"])

    async def sell(self, held: Held) -> None:
        """Sell what is held, as if it were paid for, and tell all of it."""
        ids = [order.order_id for order, _ in held.orders]
        charges = [f"sim-{order_id}" for order_id in ids]
        columns: dict[str, Sequence[Any]] = {
            "order_ids": ids,
            "was": ["RESERVED"],
            "statuses": ["CONFIRMED"],
            "payments": ["SUCCESS"],
            "charge_ids": charges,
            "line_states": ["{c}"],
            "movements": ["commit"],
            "move_order_ids": ids,
            "move_product_ids": [order.lines[0][0] for order, _ in held.orders],
            "move_quantities": [order.lines[0][1] for order, _ in held.orders],
        }
        step = self._settle.step({home for _, home in held.orders})
        at = (await stages.settle(self._pool, self._settle, step | columns, uuid.uuid4())).row["at"]
        outbox = Outbox(self._settings)
        for (order, home), total, charge_id in zip(held.orders, held.totals, charges, strict=True):
            order_id = order.order_id
            outbox.event(order_id, home, events.created(order_id, held.at, order.user_id, order.lines))
            outbox.event(order_id, home, events.reserved(order_id, held.at, total))
            outbox.event(order_id, home, events.paid(order_id, at, total, charge_id))
            outbox.event(order_id, home, events.confirmed(order_id, at))
        await self._producer.send(outbox.publications())


async def take_in_all(settings: Settings, consumer: Any, passes: Passes, held: asyncio.Queue[Held]) -> None:
    """Take in batch after batch."""
    while True:
        fetched = await consumer.getmany(timeout_ms=POLL_MS, max_records=settings.batch_records_max)
        if records := [record for part in fetched.values() for record in part]:
            await held.put(await passes.take_in(records))


async def sell_all(passes: Passes, held: asyncio.Queue[Held]) -> None:
    """Sell batch after batch."""
    while True:
        await passes.sell(await held.get())


async def serve(settings: Settings) -> None:
    """Run both halves until the process has to stop, or one of them fails."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    async with AsyncExitStack() as stack:
        store = await Store.connect(settings.database_url, connections_max=2)
        stack.push_async_callback(store.close)
        producer = Producer(settings, client_id="orderstream-floor")
        await producer.start()
        stack.push_async_callback(producer.stop)
        passes = Passes(settings, store, producer)
        await passes.claim()
        consumer = AIOKafkaConsumer(
            bootstrap_servers=settings.kafka,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=POLL_MS,
        )
        consumer.assign([TopicPartition(settings.topic(ORDERS.name), n) for n in range(settings.partitions)])
        await consumer.start()
        stack.push_async_callback(consumer.stop)
        held: asyncio.Queue[Held] = asyncio.Queue(PASSES_MAX)
        halves = [
            asyncio.create_task(take_in_all(settings, consumer, passes, held)),
            asyncio.create_task(sell_all(passes, held)),
        ]
        print(READY, flush=True)
        stop = asyncio.create_task(stopping.wait())
        done, _ = await asyncio.wait([stop, *halves], return_when=asyncio.FIRST_COMPLETED)
        for half in halves:
            half.cancel()
        for task in done:
            task.result()


def main() -> None:
    """Run the floor, tuned as a worker is."""
    collector.settle(YOUNG_OBJECTS)
    uvloop.run(serve(load()))


if __name__ == "__main__":
    main()
