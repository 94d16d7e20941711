"""What a worker remembers of its last minutes, for its pages: rates by the second, and how long orders took to their end.

Costs the stages nothing that grows with the orders.  Rates are differences of counters that they keep by the batch.  The
time to the end is measured on a sample: some orders of each batch are noted, and once a second Postgres is asked which of
them have ended.  So it holds for orders of several products and several workers too, from the making of their record on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INTERVAL_S = 1.0
ROWS_MAX = 300
"""Five minutes of one row a second: a page that is opened shows a chart at once."""

RECENT_S, WINDOW_S = 10.0, 60.0
"""The percentiles of a row are those of the orders that ended in the last 10 s; those of the summary, in the last 60 s."""


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
    """Return a function that answers what ``scan`` did a moment ago, and scans again only so often.

    Args:
        scan: takes time of the event loop that the stages share.
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
