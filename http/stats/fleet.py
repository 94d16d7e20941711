"""The whole pipeline: the figures of every worker, asked for once a second at most, whoever looks, and added up.

Counts and rates are sums.  Where a sum says nothing (times, shares of the time) the worst worker's stands for all.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
from aiohttp import ClientError
from yarl import URL

from orderstream.http.stats.figures import STAGES, Figures
from orderstream.http.stats.fresh import Fresh
from orderstream.http.stats.owners import OwnerRouter
from orderstream.http.stats.window import ROWS_MAX
from orderstream.streams.topics import ORDER_COMMANDS, ORDER_LINES, ORDERS, RESERVATIONS, STOCK_COMMANDS

ASK_EVERY_S = 1.0

BEHIND_S = 2
"""A row of the pipeline's history is shown when every worker has had the time to tell of its second."""

STAGE_TOPICS = (ORDERS, ORDER_LINES, RESERVATIONS, ORDER_COMMANDS, STOCK_COMMANDS)

WORST = frozenset({"p50", "p95", "p99", *(f"busy_{stage}" for stage in STAGES)})
"""Columns of the history of which the largest stands for all; the others are sums."""


class Fleet:
    """The workers of a pipeline, as one of them sees them.

    Args:
        app: the worker's.
        figures: its own.
        router: knows who has which partition.
    """

    def __init__(self, app: Any, figures: Figures, router: OwnerRouter) -> None:
        self._app, self._figures, self._router = app, figures, router
        self._read = Fresh(self._ask_all, ASK_EVERY_S)
        self._rows: dict[str, deque[Sequence[float | None]]] = {}

    async def pipeline(self) -> dict[str, Any] | None:
        """Return the figures of all workers added up; None while this one starts."""
        return await self._read.get()

    def history(self, since: float) -> list[list[float | None]]:
        """Return the pipeline's rows newer than ``since``, one a second, oldest first; as of the last asking."""
        upto = int(time.time()) - BEHIND_S
        return merged(self._figures.history.columns, self._rows.values(), int(since), upto)

    async def _ask_all(self) -> dict[str, Any] | None:
        here = str(self._app.conf.canonical_url)
        own = self._figures.summary(self._newest(here))
        if own is None:
            return None
        owners = {
            (self._figures.name(tp), tp.partition): url for tp, url in self._router.owners().items()
        }  # of the last assignment: a worker that died since is in it
        others = sorted({url for url in owners.values() if not self._router.is_self(URL(url))})
        answers = {here: own, **dict(zip(others, await asyncio.gather(*map(self._ask, others)), strict=True))}
        for url in [url for url in self._rows if url not in answers]:
            del self._rows[url]
        for url, summary in answers.items():
            if summary is not None:
                self._keep(url, summary)
        return added_up(here, own, answers, owners, self._app.stage.settings.partitions)

    def _newest(self, url: str) -> float:
        rows = self._rows.get(url)
        return float(rows[-1][0] or 0) if rows else 0.0

    def _keep(self, url: str, summary: Mapping[str, Any]) -> None:
        rows = self._rows.setdefault(url, deque(maxlen=ROWS_MAX))
        if rows and summary["started_at"] > (rows[-1][0] or 0):
            rows.clear()  # another process answers there now
        rows.extend(row for row in summary["history"]["rows"] if not rows or row[0] > (rows[-1][0] or 0))

    async def _ask(self, url: str) -> dict[str, Any] | None:
        try:
            status, _, body = await self._router.ask(URL(url), URL(f"/stats/summary?since={self._newest(url)}"))
            found: dict[str, Any] | None = orjson.loads(body) if status == 200 else None
        except (ClientError, TimeoutError, OSError, ValueError):
            return None  # it is listed as a worker that does not answer
        return found


def merged(
    columns: Sequence[str], workers: Iterable[Iterable[Sequence[float | None]]], since: int, upto: int
) -> list[list[float | None]]:
    """Return the rows of several workers as one a second, of the seconds after ``since`` up to ``upto``, oldest first.

    Args:
        columns: of the rows: first ``at``, then figures.
        workers: rows of each.
        since: seconds since the epoch.
        upto: the same.
    """
    found: dict[int, list[float | None]] = {}
    for rows in workers:
        for row in rows:
            second = int(row[0] or 0)
            if not since < second <= upto:
                continue
            sums = found.setdefault(second, [float(second), *(None for _ in columns[1:])])
            for n, (name, value) in enumerate(zip(columns[1:], row[1:], strict=True), 1):
                before = sums[n]
                if value is not None:
                    sums[n] = value if before is None else max(before, value) if name in WORST else before + value
    return [found[second] for second in sorted(found)]


def added_up(
    here: str,
    own: Mapping[str, Any],
    answers: Mapping[str, Mapping[str, Any] | None],
    owners: Mapping[tuple[str, int], str],
    partitions: int,
) -> dict[str, Any]:
    """Return the figures of a pipeline.

    Args:
        here: this worker's URL.
        own: its figures.
        answers: those of each worker by its URL; None where it does not answer.
        owners: the URL of the owner of each topic's partition.
        partitions: of each topic.
    """
    there = [one for one in answers.values() if one is not None]
    steps = ("created", "reserved", "paid", "confirmed", "revoked")
    rows = {(row["topic"], row["partition"]): row for one in there for row in one["partitions"]}
    nothing = dict.fromkeys(("end", "done", "committed", "lag"))
    every = [(spec.name, n) for spec in STAGE_TOPICS for n in range(partitions)]
    listed = [
        rows.get(key) or {"topic": key[0], "partition": key[1], "owner": owners.get(key), **nothing} for key in every
    ]
    times = [one["time_to_end"] for one in there]
    return {
        "version": own["version"],
        "worker": here,
        "state": own["state"],
        "now": own["now"],
        "orders": {
            **{step: sum(one["orders"][step] for one in there) for step in steps},
            "cancelled": _sums(one["orders"]["cancelled"] for one in there),
        },
        "rates": _sums(one["rates"] for one in there),
        "time_to_end": {
            "window_s": own["time_to_end"]["window_s"],
            "sampled": sum(one["sampled"] for one in times),
            **{p: max((one[p] for one in times if one[p] is not None), default=None) for p in ("p50", "p95", "p99")},
        },
        "stages": {stage: _stage([one["stages"][stage] for one in there]) for stage in STAGES},
        "open": _sums(one["open"] for one in there),
        "charges_in_flight": sum(one["charges_in_flight"] for one in there),
        "dead_letters": _sums(one["dead_letters"] for one in there),
        "sent_on": sum(one["sent_on"] for one in there),
        "lag": sum(row["lag"] or 0 for row in listed),
        "engines": own["engines"],
        "unavailable": sorted({engine for one in there for engine in one["unavailable"]}),
        "workers": [
            {
                "url": url,
                "self": url == here,
                "answers": one is not None,
                "partitions": sum(row["owner"] == url for row in listed),
                **({} if one is None else _worker(one)),
            }
            for url, one in answers.items()
        ],
        "partitions": listed,
    }


def _sums(counted: Iterable[Mapping[str, float]]) -> dict[str, float]:
    found: Counter[str] = Counter()
    for one in counted:
        found.update(one)
    return dict(found)


def _stage(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    found = _sums({name: row.get(name, 0) for name in ("records", "batches", "records_per_s")} for row in rows)
    return {**found, "busy": max((row.get("busy", 0.0) for row in rows), default=0.0)}


def _worker(one: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "state": one["state"],
        "version": one["version"],
        "started_at": one["started_at"],
        "taken_in_per_s": one["rates"]["created"],
        "p95": one["time_to_end"]["p95"],
        "lag": one["lag"],
        "open": sum(one["open"].values()),
        "busy": {stage: row.get("busy", 0.0) for stage, row in one["stages"].items()},
        "dead_letters": sum(one["dead_letters"].values()),
        "unavailable": one["unavailable"],
    }
