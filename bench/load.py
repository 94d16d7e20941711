"""What the benchmarks order: seeded orders, and putting them on the topic ``orders``.

The same load, count, seed and time are the same records, byte by byte.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import orjson
from uuid_utils import UUID

from orderstream.settings import Settings
from orderstream.streams.producer import Outbox, Producer, Step

STEP_ORDERS_MAX = 5_000
"""Orders that are produced in one go, over all partitions: about 1 MB."""

ORDERS_PER_MS = 10
"""Orders whose ids have the same time: about as many as a worker sells."""

USERS = 100_000
"""Customers that order."""


@dataclass(frozen=True)
class Load:
    """What customers order: ``lines_min`` to ``lines_max`` different products of these, one unit of each."""

    products: tuple[str, ...]
    lines_min: int = 1
    lines_max: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.lines_min <= self.lines_max <= len(self.products):
            raise ValueError(f"{self.lines_min} to {self.lines_max} lines of {len(self.products)} products")


class Drawn(NamedTuple):
    """One order: the product that places it, its lines and the record's value."""

    product_id: str
    lines: int
    value: bytes


class Produced(NamedTuple):
    """When the first record was handed to the producer and the last one acknowledged, in seconds since 1970."""

    start: float
    end: float


def catalogue(products: int) -> tuple[str, ...]:
    """Return the ids of so many products."""
    return tuple(f"p{n:05}" for n in range(products))


def draw(load: Load, count: int, seed: str, *, at: float | None = None) -> Iterator[Drawn]:
    """Yield ``count`` orders, each with an id of its own: a UUIDv7, as an ingress gives it.

    Args:
        at: the time in the first order's id, in seconds since 1970; now by default.  The ids continue from there by
            :data:`ORDERS_PER_MS`.
    """
    dice = random.Random(seed)
    first = int((time.time() if at is None else at) * 1_000)
    for n in range(count):
        lines = dice.randint(load.lines_min, load.lines_max)
        chosen = [dice.choice(load.products)] if lines == 1 else dice.sample(load.products, lines)
        body = {
            "order_id": str(UUID(int=first + n // ORDERS_PER_MS << 80 | dice.getrandbits(80), version=7)),
            "user_id": f"user-{dice.randrange(USERS)}",
            "items": [{"product_id": product_id, "quantity": 1} for product_id in chosen],
            "payment_method": "card",
        }
        yield Drawn(chosen[0], lines, orjson.dumps(body))


def steps(settings: Settings, orders: Iterable[Drawn]) -> list[Step]:
    """Pack orders for the producer, at most :data:`STEP_ORDERS_MAX` in a step."""
    packed: list[Step] = []
    outbox, size = Outbox(settings), 0
    for order in orders:
        outbox.order(order.product_id, order.value, ())
        size += 1
        if size == STEP_ORDERS_MAX:
            packed.append(outbox.handovers())
            outbox, size = Outbox(settings), 0
    if size:
        packed.append(outbox.handovers())
    return packed


async def produce(settings: Settings, packed: Sequence[Step]) -> Produced:
    """Produce as fast as the broker takes it; every record is acknowledged by all replicas.

    The connection is made, and the topic's partitions are known, before the clock starts.

    Raises:
        KafkaError: some records were not acknowledged.
    """
    producer = Producer(settings, client_id="orderstream-bench")
    await producer.start()
    try:
        start = time.time()
        for step in packed:
            await producer.send(step)
        return Produced(start, time.time())
    finally:
        await producer.stop()
