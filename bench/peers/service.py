"""The process that a peer runs in: given what to sell, it warms up, finds its best setting, waits, sells, reports when.

A peer reads no Kafka: its orders are drawn and decoded in its own memory before the clock starts.  That favours the peer;
a service would read them from a socket or a topic.  Like the worker that it is compared with, it is one Python process on
uvloop.

Standard input: a line with the job, then a line for the start, then its end.  Standard output: a line with what the peer
found out while warming up, then a line with the result.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import asyncpg
import orjson
import uvloop

from orderstream.bench.load import Load, draw
from orderstream.settings import Settings, load
from orderstream.streams.orders import Limits, Order, decode

POOL_MAX = 20
"""Postgres connections of a peer."""

LOCK = """
SELECT product_id, on_hand - reserved AS available, price_cents
FROM stock WHERE product_id = ANY ($1::text[]) ORDER BY product_id FOR UPDATE
"""
"""Locks the rows of products, in key order, and returns what is left of each and what it costs."""


async def open_pool(settings: Settings) -> Any:
    """Open every connection of a peer."""
    return await asyncpg.create_pool(
        settings.database_url, min_size=POOL_MAX, max_size=POOL_MAX, server_settings={"jit": "off"}
    )


class Peer(Protocol):
    """Something else that sells orders, one at a time."""

    @property
    def tried(self) -> Sequence[int]:
        """Orders in its hands at once: what is tried out, to take the best."""
        ...

    @property
    def probe_orders(self) -> int:
        """Orders of one such trial."""
        ...

    async def start(self, settings: Settings) -> None:
        """Connect, and make what it needs in the database."""
        ...

    async def sell(self, order: Order) -> None:
        """Bring one order to its end."""
        ...

    async def close(self) -> None:
        """Disconnect."""
        ...


@dataclass(frozen=True)
class Job:
    """What a peer is to sell."""

    load: Load
    orders: int
    seed: str

    def encode(self) -> bytes:
        """Return the line that describes it."""
        return orjson.dumps(asdict(self)) + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> Job:
        """Read the line."""
        body = orjson.loads(line)
        products, lines_min, lines_max = body["load"].values()
        return cls(Load(tuple(products), lines_min, lines_max), body["orders"], body["seed"])


def drawn(settings: Settings, load: Load, count: int, seed: str) -> list[Order]:
    """Return the orders that the pipeline finds on its topic, decoded."""
    limits = Limits(settings.order_lines_max, settings.line_quantity_max, settings.order_bytes_max)
    return [
        decode(one.value, limits, topic="orders", partition=0, offset=0, timestamp=0) for one in draw(load, count, seed)
    ]


async def sell(peer: Peer, orders: Sequence[Order], at_once: int) -> tuple[float, float]:
    """Sell orders, so many at once; return when the first began and the last ended, in seconds since 1970."""
    waiting = iter(orders)

    async def customer() -> None:
        for order in waiting:
            await peer.sell(order)

    start = time.time()
    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(customer())
    return start, time.time()


async def probe(peer: Peer, settings: Settings, job: Job) -> dict[int, float]:
    """Return orders/s by orders at once; the first trial is made twice, since nothing was warm."""
    rates = {}
    for n, at_once in enumerate([peer.tried[0], *peer.tried]):
        orders = drawn(settings, job.load, peer.probe_orders, f"{job.seed}/probe/{n}")
        start, end = await sell(peer, orders, at_once)
        rates[at_once] = round(len(orders) / (end - start), 1)
    return rates


async def serve(peer: Peer, report: Any) -> None:
    """Do one job."""
    settings = load()
    job = Job.decode(await asyncio.to_thread(sys.stdin.buffer.readline))
    await peer.start(settings)
    try:
        rates = await probe(peer, settings, job)
        best = max(rates, key=lambda at_once: rates[at_once])
        orders = drawn(settings, job.load, job.orders, job.seed)
        gc.collect()
        gc.freeze()
        report({"at_once": best, "probes": {str(at_once): rate for at_once, rate in rates.items()}})
        if not await asyncio.to_thread(sys.stdin.buffer.readline):
            return
        start, end = await sell(peer, orders, best)
        report({"start": start, "end": end})
        await asyncio.to_thread(sys.stdin.buffer.read)  # it is watched until its input ends
    finally:
        await peer.close()


def main(peer: Peer) -> None:
    """Run a peer; whatever its library prints goes to the log."""
    with os.fdopen(os.dup(1), "wb", buffering=0) as out:
        os.dup2(2, 1)
        uvloop.run(serve(peer, lambda found: out.write(orjson.dumps(found) + b"\n")))
