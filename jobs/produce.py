"""Sending orders to the topic, and waiting for what becomes of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import NamedTuple

from orderstream.settings import Settings
from orderstream.sql.store import Store
from orderstream.streams.orders import Order, Reason, encode
from orderstream.streams.producer import Outbox, Producer

SEND_ORDERS_MAX = 2_000
"""Orders produced and acknowledged in one go."""

ASK_ORDERS_MAX = 20_000
"""Orders asked about in one statement."""

Progress = Callable[[int], None]


class Sent(NamedTuple):
    """An order that was sent: when, in seconds since the epoch; by which key, if by one; what it said, of this process."""

    at: float
    key: str | None
    content: int


def content_of(user_id: str, payment_method: str, lines: Iterable[tuple[str, int]]) -> int:
    """Return a number for what an order says, other than its id, in this process: another order has another one."""
    return hash((user_id, payment_method, tuple(sorted(lines))))


@dataclass(slots=True)
class Outcome:
    """What became of orders.

    Attributes:
        ended: number of orders by how they ended, ``CONFIRMED`` or ``CANCELLED reason``; ``REFUSED order_removed``: an order
            that was removed had the id.
        reused: ids of orders that were not taken in: another one stands under each.
        open: number of those that have not ended.
        latencies_s: from an order's send to its end, sorted, in seconds.
        elapsed_s: from the first send to the last end.
    """

    ended: Counter[str]
    open: int
    latencies_s: list[float]
    elapsed_s: float
    reused: list[str] = field(default_factory=list)

    @property
    def refused(self) -> int:
        """Orders that were refused: cancelled by the pipeline, or not taken in."""
        by_user = f"CANCELLED {Reason.CANCELLED_BY_USER}"
        return len(self.reused) + sum(n for how, n in self.ended.items() if how not in ("CONFIRMED", by_user))

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
) -> dict[str, Sent]:
    """Produce orders, in their order; return what was sent, by id.

    Args:
        settings: of the pipeline.
        producer: started.
        orders: drawn as they are sent.
        progress: called with the number sent so far.
        rate: orders a second at most; as fast as possible without.
    """
    sent: dict[str, Sent] = {}
    drawn, start = iter(orders), time.monotonic()
    size = SEND_ORDERS_MAX if rate is None else max(1, min(SEND_ORDERS_MAX, int(rate / 20)))
    while part := list(islice(drawn, size)):
        if rate is not None and (ahead := len(sent) / rate - (time.monotonic() - start)) > 0:
            await asyncio.sleep(ahead)
        outbox, now = Outbox(settings), time.time()
        for order in part:
            outbox.order(order.lines[0][0], encode(order), ())
            content = content_of(order.user_id, order.payment_method, order.lines)
            sent.setdefault(order.order_id, Sent(now, order.idempotency_key, content))
        await producer.send(outbox.handovers())
        progress(len(sent))
    return sent


async def wait(
    store: Store,
    sent: dict[str, Sent],
    *,
    timeout_s: float,
    progress: Progress = lambda _: None,
    alive: Callable[[], None] = lambda: None,
) -> Outcome:
    """Wait until every order has ended, or the time is up; what ended is compared with what was sent.

    Args:
        store: connected.
        sent: as :func:`send` answered.
        timeout_s: how long to wait, in seconds.
        progress: called with the number that have ended so far.
        alive: called now and then; raises when waiting has no point.
    """
    deadline = time.monotonic() + timeout_s
    gone = set[str]()
    for start in range(0, len(sent), ASK_ORDERS_MAX):
        gone |= await store.removed([*islice(sent, start, start + ASK_ORDERS_MAX)])
    waiting = [order_id for order_id in sent if order_id not in gone]
    ended: Counter[str] = Counter({"REFUSED order_removed": len(gone)} if gone else {})
    times: list[tuple[str, datetime]] = []
    reused: list[str] = []
    while waiting:
        still: list[str] = []
        for start in range(0, len(waiting), ASK_ORDERS_MAX):
            part = waiting[start : start + ASK_ORDERS_MAX]
            rows = await store.ended(part)
            for row in rows:
                lines = zip(row["product_ids"], row["quantities"], strict=True)
                if content_of(row["user_id"], row["payment_method"], lines) != sent[row["order_id"]].content:
                    reused.append(row["order_id"])
                    continue
                ended[row["status"] + (f" {row['reason']}" if row["reason"] else "")] += 1
                times.append((row["order_id"], row["ended_at"]))
            over = {row["order_id"] for row in rows}
            still += [order_id for order_id in part if order_id not in over] if over else part
        waiting = still
        progress(sum(ended.values()) + len(reused))
        if not waiting or time.monotonic() > deadline:
            break
        alive()
        await asyncio.sleep(0.1)
    return _outcome(ended, len(waiting), sent, times, reused)


def _outcome(
    ended: Counter[str],
    still_open: int,
    sent: dict[str, Sent],
    times: Sequence[tuple[str, datetime]],
    reused: list[str],
) -> Outcome:
    # An order that was there before (the file was sent before) ended before it was sent now.
    latencies = sorted(max(0.0, at.timestamp() - sent[order_id].at) for order_id, at in times)
    last = max((at.timestamp() for _, at in times), default=0.0)
    began = min((one.at for one in sent.values()), default=0.0)
    return Outcome(ended, still_open, latencies, max(0.0, last - began), reused)
