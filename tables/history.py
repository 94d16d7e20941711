"""What a worker remembers of its last minutes, for its pages: rates by the second, and how long orders took to their end.

Costs the stages nothing that grows with the orders.  Rates are differences of counters that they keep by the batch.  The
time to the end is measured on a sample: some orders of each batch are noted, and once a second Postgres is asked which of
them have ended.  So it holds for orders of several products and several workers too, from the making of their record on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

INTERVAL_S = 1.0
ROWS_MAX = 300
"""Five minutes of one row a second: a page that is opened shows a chart at once."""

SAMPLE_PER_S = 200
"""About so many of the orders of a second are followed to their end; below that, all of them."""

FOLLOWED_MAX = 2_000
"""Orders followed at once; while so many are open no further one is taken up."""

FOLLOWED_MAX_S = 3_600.0
"""An order that has not ended after this time is no longer followed."""

ENDED_MAX = 20_000
RECENT_S, WINDOW_S = 10.0, 60.0
"""The percentiles of a row are those of the orders that ended in the last 10 s; those of the summary, in the last 60 s."""

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

    def offer(self, arrivals: Sequence[Any], known: Sequence[bool]) -> None:
        """Take some orders of a batch into the sample: every n-th one, n by how many there are a second.

        Args:
            arrivals: the batch's orders, with ``order`` and ``record``.
            known: for each, whether it was taken in before; then its record says nothing about when it began.
        """
        size = len(arrivals)
        self._seen_this_second += size
        stride = max(self._stride, self._seen_this_second // SAMPLE_PER_S, 1)
        for n in range(-self._seen % stride, size, stride):
            if not known[n] and len(self._open) < FOLLOWED_MAX:
                arrival = arrivals[n]
                self._open.setdefault(arrival.order.order_id, arrival.record.timestamp / 1000)
        self._seen += size

    def tick(self, now: float) -> None:
        """Begin another second."""
        self._stride = max(1, self._seen_this_second // SAMPLE_PER_S)
        self._seen_this_second = 0
        for order_id in [order_id for order_id, at in self._open.items() if now - at > FOLLOWED_MAX_S]:
            del self._open[order_id]

    def open(self) -> list[str]:
        """Return the orders that have not ended, as far as is known."""
        return list(self._open)

    def ended(self, order_id: str, at: float) -> None:
        """Note when an order ended, in seconds since the epoch; the clocks may differ by a little."""
        began = self._open.pop(order_id, None)
        if began is not None:
            self._ended.append(Ended(at, max(0.0, at - began)))

    def time_to_end(self, now: float, window_s: float) -> TimeToEnd:
        """Return the percentiles of what ended in the last ``window_s`` seconds."""
        took = [one.took_s for one in self._ended if one.at > now - window_s]
        p50, p95, p99 = percentiles(took)
        return TimeToEnd(window_s=window_s, sampled=len(took), p50=p50, p95=p95, p99=p99)


class History:
    """A ring of rows, one a second: rates of counters, values of gauges.

    Args:
        rates: names of the counters that are shown by their rate.
        gauges: names of what is shown as it is.
    """

    def __init__(self, rates: Sequence[str], gauges: Sequence[str]) -> None:
        self.columns = ("at", *rates, *gauges)
        self._rates, self._gauges = tuple(rates), tuple(gauges)
        self._rows: deque[tuple[float | None, ...]] = deque(maxlen=ROWS_MAX)
        self._last: tuple[float, Mapping[str, float]] | None = None

    def add(self, now: float, counted: Mapping[str, float], gauges: Mapping[str, float | None]) -> None:
        """Add a row.

        Args:
            now: seconds since the epoch.
            counted: the counters' values; the first row has none to compare with, and is left out.
            gauges: values as they are; None where there is none.
        """
        last, self._last = self._last, (now, dict(counted))
        if last is None or now <= last[0]:
            return
        elapsed = now - last[0]
        rates = (round((counted[name] - last[1][name]) / elapsed, 2) for name in self._rates)
        self._rows.append((round(now, 3), *rates, *(gauges[name] for name in self._gauges)))

    def since(self, at: float) -> list[tuple[float | None, ...]]:
        """Return the rows newer than ``at``, oldest first."""
        return [row for row in self._rows if row[0] is not None and row[0] > at]

    def mean(self, rows: int) -> dict[str, float]:
        """Return the mean rate of each counter over the last rows; 0 without any."""
        last = list(self._rows)[-rows:]
        return {
            name: round(sum(row[n] or 0.0 for row in last) / len(last), 2) if last else 0.0
            for n, name in enumerate(self._rates, 1)
        }


def cached(scan: Callable[[], Any], clock: Callable[[], float], least_s: float, share: float) -> Callable[[], Any]:
    """Return a function that answers what ``scan`` did a moment ago, and scans anew only so often.

    Args:
        scan: costs time in the event loop that the stages share.
        clock: seconds, going forward only.
        least_s: how long an answer is good for, at least.
        share: of the time may go into scans: one that takes long is good for longer.
    """
    kept: list[Any] = []
    until = float("-inf")

    def answer() -> Any:
        nonlocal until
        start = clock()
        if start >= until:
            kept[:] = [scan()]
            end = clock()
            until = end + max(least_s, (end - start) / share)
        return kept[0]

    return answer
