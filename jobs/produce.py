"""Sending orders to the topic, and waiting for what becomes of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

from orderstream.settings import Settings
from orderstream.sql.store import Store
from orderstream.streams.orders import Order, encode
from orderstream.streams.producer import Outbox, Producer

SEND_ORDERS_MAX = 2_000
"""Orders produced and acknowledged in one go."""

ASK_ORDERS_MAX = 20_000
"""Orders asked about in one statement."""

Progress = Callable[[int], None]


@dataclass(slots=True)
class Outcome:
    """What became of orders.

    Attributes:
        ended: number of orders by how they ended, ``CONFIRMED`` or ``CANCELLED reason``.
        open: number of those that have not ended.
        latencies_s: from an order's send to its end, sorted, in seconds.
        elapsed_s: from the first send to the last end.
    """

    ended: Counter[str]
    open: int
    latencies_s: list[float]
    elapsed_s: float

    def percentile(self, share: float) -> float:
        """Return a percentile of the time to the end, in seconds; 0 without orders."""
        if not self.latencies_s:
            return 0.0
        return self.latencies_s[min(len(self.latencies_s) - 1, int(share * len(self.latencies_s)))]

    @property
    def rate(self) -> float:
        """Orders that ended per second."""
        return sum(self.ended.values()) / self.elapsed_s if self.elapsed_s > 0 else 0.0


async def send(
    settings: Settings,
    producer: Producer,
    orders: Iterable[Order],
    progress: Progress = lambda _: None,
    rate: float | None = None,
) -> dict[str, float]:
    """Produce orders, in their order; return when each was sent, by id, in seconds since the epoch.

    Args:
        settings: of the pipeline.
        producer: started.
        orders: drawn as they are sent.
        progress: called with the number sent so far.
        rate: orders a second at most; as fast as possible without.
    """
    sent: dict[str, float] = {}
    drawn, start = iter(orders), time.monotonic()
    size = SEND_ORDERS_MAX if rate is None else max(1, min(SEND_ORDERS_MAX, int(rate / 20)))
    while part := list(islice(drawn, size)):
        if rate is not None and (ahead := len(sent) / rate - (time.monotonic() - start)) > 0:
            await asyncio.sleep(ahead)
        outbox, now = Outbox(settings), time.time()
        for order in part:
            outbox.order(order.lines[0][0], encode(order), ())
            sent.setdefault(order.order_id, now)
        await producer.send(outbox.handovers())
        progress(len(sent))
    return sent


async def wait(
    store: Store,
    sent: dict[str, float],
    *,
    timeout_s: float,
    progress: Progress = lambda _: None,
    alive: Callable[[], None] = lambda: None,
) -> Outcome:
    """Wait until every order has ended, or the time is up.

    Args:
        store: connected.
        sent: as :func:`send` answered.
        timeout_s: how long to wait, in seconds.
        progress: called with the number that have ended so far.
        alive: called now and then; raises when waiting has no point.
    """
    deadline = time.monotonic() + timeout_s
    waiting: list[str] = list(sent)
    ended: Counter[str] = Counter()
    times: list[tuple[str, datetime]] = []
    while waiting:
        still: list[str] = []
        for start in range(0, len(waiting), ASK_ORDERS_MAX):
            part = waiting[start : start + ASK_ORDERS_MAX]
            rows = await store.ended(part)
            for row in rows:
                ended[row["status"] + (f" {row['reason']}" if row["reason"] else "")] += 1
                times.append((row["order_id"], row["ended_at"]))
            over = {row["order_id"] for row in rows}
            still += [order_id for order_id in part if order_id not in over] if over else part
        waiting = still
        progress(sum(ended.values()))
        if not waiting or time.monotonic() > deadline:
            break
        alive()
        await asyncio.sleep(0.1)
    return _outcome(ended, len(waiting), sent, times)


def _outcome(
    ended: Counter[str], still_open: int, sent: dict[str, float], times: Sequence[tuple[str, datetime]]
) -> Outcome:
    # An order that was there before (the file was sent before) ended before it was sent now.
    latencies = sorted(max(0.0, at.timestamp() - sent[order_id]) for order_id, at in times)
    last = max((at.timestamp() for _, at in times), default=0.0)
    return Outcome(ended, still_open, latencies, max(0.0, last - min(sent.values(), default=0.0)))
