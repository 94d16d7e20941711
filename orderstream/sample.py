"""How long orders take from their record to their end, measured on a sample of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypedDict

from orderstream import metrics

SAMPLE_PER_S = 200
"""About so many of the orders of a second are followed to their end; below that, all of them."""

FOLLOWED_MAX = 2_000
"""Orders followed at once; while so many are open no further one is taken up."""

FOLLOWED_MAX_S = 3_600.0
"""An order that has not ended after this time is no longer followed."""

ENDED_MAX = 20_000

SHOWN = frozenset({"RESERVED", "CONFIRMED", "CANCELLED"})
ENDS = frozenset({"CONFIRMED", "CANCELLED"})

SHARES = (0.5, 0.95, 0.99)


class Ended(NamedTuple):
    """An order of the sample that has ended: when, and how long after its record was produced, in seconds."""

    at: float
    took_s: float


class TimeToEnd(TypedDict):
    """Percentiles in seconds over ``sampled`` orders that ended in the last ``window_s`` seconds; null without any."""

    window_s: float
    sampled: int
    p50: float | None
    p95: float | None
    p99: float | None


def percentiles(values: Iterable[float]) -> tuple[float | None, ...]:
    """Return p50, p95 and p99: of each, the smallest value that so large a share does not exceed; None without values."""
    found = sorted(values)
    if not found:
        return (None,) * len(SHARES)
    return tuple(found[max(0, math.ceil(share * len(found)) - 1)] for share in SHARES)


class Sample:
    """Orders that are followed from their record to their end."""

    def __init__(self) -> None:
        self._open: dict[str, float] = {}
        self._ended: deque[Ended] = deque(maxlen=ENDED_MAX)
        self._seen = 0
        self._seen_this_second = 0
        self._stride = 1

    def __contains__(self, order_id: str) -> bool:
        return order_id in self._open

    def offer(self, arrivals: Sequence[Any]) -> None:
        """Take some orders of a batch into the sample: every n-th one, n by how many there are a second.

        Args:
            arrivals: orders that were not taken in before, with ``order`` and ``record``.
        """
        size = len(arrivals)
        self._seen_this_second += size
        stride = max(self._stride, self._seen_this_second // SAMPLE_PER_S, 1)
        for n in range(-self._seen % stride, size, stride):
            if len(self._open) < FOLLOWED_MAX:
                arrival = arrivals[n]
                self._open.setdefault(arrival.order.order_id, arrival.record.timestamp / 1000)
        self._seen += size

    def tick(self, now: float) -> None:
        """Begin another second."""
        self._stride = max(1, self._seen_this_second // SAMPLE_PER_S)
        self._seen_this_second = 0
        for order_id in [order_id for order_id, at in self._open.items() if now - at > FOLLOWED_MAX_S]:
            del self._open[order_id]

    def forget(self) -> None:
        """Follow none of these orders any more: another worker may end them."""
        self._open.clear()

    def passed(self, order_id: str, status: str, at: float) -> None:
        """Note when an order, of the sample or not, came to a status, in seconds since the epoch.

        The clocks of who produced its record and of this machine may differ by a little.
        """
        began = self._open.get(order_id)
        if began is None or status not in SHOWN:
            return
        took_s = max(0.0, at - began)
        metrics.ORDER_LATENCY.labels(status).observe(took_s)
        if status in ENDS:
            del self._open[order_id]
            self._ended.append(Ended(at, took_s))

    def time_to_end(self, now: float, window_s: float) -> TimeToEnd:
        """Return the percentiles of what ended in the last ``window_s`` seconds."""
        took = [one.took_s for one in self._ended if one.at > now - window_s]
        p50, p95, p99 = percentiles(took)
        return TimeToEnd(window_s=window_s, sampled=len(took), p50=p50, p95=p95, p99=p99)
