"""One run, from the first record to the last verdict, and what several runs say together.

The clock starts when the first measured record is handed to the producer, in this process, and stops at the last order's
``confirmed_at`` or ``cancelled_at`` in Postgres: clocks of one machine.  These times are those at which the worker's
transactions began, so the last commit (some 10 ms) is not in the figure.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import asyncpg

from orderstream.bench.load import Load, Produced, draw, produce, steps
from orderstream.bench.pipeline import Pipeline
from orderstream.bench.stages import between, counted_by
from orderstream.bench.usage import Snapshot, Usage, main_thread_s, memory_bytes
from orderstream.console import Bar
from orderstream.engines.process import tail
from orderstream.errors import OrderstreamError
from orderstream.jobs.verify import verify
from orderstream.settings import Settings

WARM_UP_ORDERS = 2_000
"""Orders before the clock starts: the worker has joined, plans are made, connections are open, the gate is loaded."""

STALL_S = 60.0
"""A run in which no order ended for so long is over: the rest is lost."""

POLL_MIN_S, POLL_MAX_S = 0.1, 2.0
"""Pauses between two readings of how many orders have ended; each reads all orders since a time, so they are few."""

STEADY_BATCHES_MIN = 10
"""Orders end a batch at a time: a rate over fewer batches than these is chance."""

OFFENDERS_SHOWN_MAX = 3

_ENDED = """
SELECT count(*) FROM orders WHERE created_at >= to_timestamp($1) AND status IN ('CONFIRMED', 'CANCELLED')
"""

_OUTCOMES = """
SELECT concat_ws(' ', status, reason) AS outcome, count(*) AS orders FROM orders
WHERE created_at >= to_timestamp($1) GROUP BY 1 ORDER BY 1
"""

_TIMES = """
WITH ended AS (
    SELECT extract(epoch FROM coalesce(confirmed_at, cancelled_at))::float8 AS at FROM orders
    WHERE created_at >= to_timestamp($1) AND status IN ('CONFIRMED', 'CANCELLED')
), marks AS (
    SELECT max(at) AS last, percentile_disc(0.1) WITHIN GROUP (ORDER BY at) AS p10,
           percentile_disc(0.9) WITHIN GROUP (ORDER BY at) AS p90 FROM ended
)
SELECT last, p10, p90, (SELECT count(*) FROM ended WHERE at > p10 AND at <= p90) AS between,
       (SELECT count(DISTINCT at) FROM ended WHERE at > p10 AND at <= p90) AS batches FROM marks
"""


class Summary(NamedTuple):
    """What several runs say together."""

    min: float
    median: float
    max: float
    runs: int


def summarize(values: Sequence[float]) -> Summary:
    """Return the least, the middle and the greatest value.

    Raises:
        ValueError: there is none.
    """
    if not values:
        raise ValueError("no run gave a result")
    return Summary(min(values), statistics.median(values), max(values), len(values))


@dataclass(frozen=True)
class Run:
    """What one run gave.

    Attributes:
        figures: by name, in the units of the scenario's sentences.
        faults: why it is no result; empty for a good one.
        usage: CPU seconds while the clock ran.
        detail: what else is worth keeping, for JSON.
        parts: what the run consists of, where it compares several things one after the other.
        notes: what a reader of its figures has to know.
    """

    figures: Mapping[str, float]
    faults: Sequence[str]
    usage: Usage
    detail: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Run] = field(default_factory=dict)
    notes: Sequence[str] = ()


def together(parts: Mapping[str, Run], figures: Mapping[str, float], notes: Sequence[str] = ()) -> Run:
    """Make one run of several; a fault of one is a fault of the whole."""
    faults = [f"{name}: {fault}" for name, part in parts.items() for fault in part.faults]
    named = [f"{name}: {note}" for name, part in parts.items() for note in part.notes]
    return Run(figures, faults, Usage.total([part.usage for part in parts.values()]), {}, parts, [*named, *notes])


@dataclass(frozen=True)
class Demand:
    """Orders to be measured, and how they must end (by status, CANCELLED with its reason)."""

    load: Load
    orders: int
    expected: Mapping[str, int]
    warm_up: Load


async def measure(pipeline: Pipeline, demand: Demand, seed: str) -> Run:
    """Warm up, produce, wait for the last verdict, check every promise.

    Returns:
        Figures ``orders_per_s`` and ``lines_per_s`` (whole run), ``steady_orders_per_s`` (between the first and the last
        tenth of the orders; missing when these ended in a few batches), ``last_verdict_s``.

    Raises:
        ChildFailed: a worker ended meanwhile.
        OrderstreamError: not even the warm-up came to its end.
    """
    settings = pipeline.settings
    connection = await asyncpg.connect(settings.database_url, timeout=30)
    try:
        await warm_up(pipeline, connection, demand.warm_up, seed)
        orders = list(draw(demand.load, demand.orders, seed))
        packed = steps(settings, orders)
        async with watched(pipeline, connection) as seen:
            produced = await produce(settings, packed)
            with Bar("orders ended", demand.orders) as bar:
                await until_ended(connection, demand.orders, pipeline, since=produced.start, bar=bar)
        lines = sum(order.lines for order in orders)
        return await judged(settings, connection, demand, produced, lines=lines, seen=seen)
    finally:
        await connection.close()


async def warm_up(pipeline: Pipeline, connection: Any, load: Load, seed: str) -> None:
    """Have :data:`WARM_UP_ORDERS` orders of this load go all the way.

    Raises:
        ChildFailed: a worker ended meanwhile.
        OrderstreamError: some did not.
    """
    settings = pipeline.settings
    produced = await produce(settings, steps(settings, draw(load, WARM_UP_ORDERS, f"{seed}/warm-up")))
    warm = await until_ended(connection, WARM_UP_ORDERS, pipeline, since=produced.start)
    if warm < WARM_UP_ORDERS:
        log = tail(pipeline.log)
        raise OrderstreamError(f"only {warm} of the {WARM_UP_ORDERS} orders of the warm-up have ended\n{log}")


@dataclass
class Seen:
    """What a run cost, filled in at its end."""

    usage: Usage = field(default_factory=Usage.nothing)
    detail: dict[str, Any] = field(default_factory=dict)
    stages: Callable[[float], dict[str, Any]] = lambda _: {}


@asynccontextmanager
async def watched(pipeline: Pipeline, connection: Any) -> AsyncIterator[Seen]:
    """Watch the processes of a pipeline while the body runs; its buffers are clean at the start."""
    await connection.execute("CHECKPOINT")
    seen, workers = Seen(), pipeline.workers
    pid = pipeline.pids["worker"] or 0
    counted = await asyncio.to_thread(counted_by, workers[0]) if workers else {}
    with pipeline.profile(pid):
        seen.detail["load_average_before"] = os.getloadavg()[0]
        before, main_thread = Snapshot.take(pipeline.pids), main_thread_s(pid)
        yield seen
        seen.usage = Usage.between(before, Snapshot.take(pipeline.pids))
        seen.detail["worker_main_thread_s"] = round(main_thread_s(pid) - main_thread, 2)
    seen.detail["worker_rss_bytes"], seen.detail["worker_rss_max_bytes"] = memory_bytes(pid)
    if workers:
        after = await asyncio.to_thread(counted_by, workers[0])
        seen.stages = lambda seconds: {name: asdict(stage) for name, stage in between(counted, after, seconds).items()}


async def judged(
    settings: Settings, connection: Any, demand: Demand, produced: Produced, *, lines: int, seen: Seen
) -> Run:
    """Make a run of what Postgres has: its figures, and the promises that it broke."""
    outcomes = {row["outcome"]: row["orders"] for row in await connection.fetch(_OUTCOMES, produced.start)}
    faults = missed(demand.expected, outcomes)
    report = await verify(settings, grace_s=0.0)
    faults += broken((check.promise, check.offenders) for check in report.checks)
    times = await times_since(connection, produced.start)
    figures = rates(times, produced, demand.orders, lines) if times["last"] else {}
    detail = {
        "orders": demand.orders,
        "outcomes": outcomes,
        "produce_s": round(produced.end - produced.start, 3),
        **seen.detail,
        "stages": seen.stages(figures.get("last_verdict_s", seen.usage.seconds)),
    }
    return Run(figures, faults, seen.usage, detail)


async def times_since(connection: Any, start: float) -> Any:
    """Return the row of :data:`_TIMES` for the orders that came since a time, in seconds since 1970; for :func:`rates`."""
    return await connection.fetchrow(_TIMES, start)


def rates(times: Mapping[str, Any], produced: Produced, orders: int, lines: int) -> dict[str, float]:
    """Return the figures of :func:`measure`; ``times`` is a row of :data:`_TIMES`."""
    seconds = times["last"] - produced.start
    figures = {"orders_per_s": orders / seconds, "lines_per_s": lines / seconds, "last_verdict_s": seconds}
    if times["batches"] >= STEADY_BATCHES_MIN:
        figures["steady_orders_per_s"] = times["between"] / (times["p90"] - times["p10"])
    return figures


def missed(expected: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """Compare how orders ended with how they must; return what differs."""
    return [
        f"{outcome}: {found.get(outcome, 0)} orders instead of {expected.get(outcome, 0)}"
        for outcome in sorted({*expected, *found})
        if found.get(outcome, 0) != expected.get(outcome, 0)
    ]


def broken(checks: Iterable[tuple[str, Sequence[object]]]) -> list[str]:
    """Return the promises that have offenders, with the first of these."""
    return [
        f"{promise}: {len(offenders)} offenders, {', '.join(map(str, islice(offenders, OFFENDERS_SHOWN_MAX)))}"
        for promise, offenders in checks
        if offenders
    ]


async def until_ended(connection: Any, orders: int, pipeline: Pipeline, *, since: float, bar: Bar | None = None) -> int:
    """Wait until so many orders that came since a time have ended; return how many have.

    These are fewer when none did for :data:`STALL_S`.
    """
    ended, changed_at = 0, time.monotonic()
    while True:
        pipeline.check_alive()
        now_ended, now = await connection.fetchval(_ENDED, since), time.monotonic()
        if bar is not None:
            bar.update(now_ended)
        if now_ended >= orders or (now_ended == ended and now - changed_at > STALL_S):
            return int(now_ended)
        pause = POLL_MIN_S
        if now_ended > ended:
            # Half of the time that the rest will take, so that the readings get closer towards the end.
            pause = (orders - now_ended) / (now_ended - ended) * (now - changed_at) / 2
            ended, changed_at = now_ended, now
        await asyncio.sleep(min(max(pause, POLL_MIN_S), POLL_MAX_S))
