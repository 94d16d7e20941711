"""One worker and one store for very many orders: does its memory grow, does its rate fall, what do the stores keep?

The orders come in fifths, each as fast as the broker takes it and the next one when the last verdict of the one before is
there; worker, topics and database stay the same.  Sizes are read in the quiet after a fifth: what is in flight is in none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import redis.asyncio

from orderstream.bench.load import Load, Produced, draw, produce, steps
from orderstream.bench.measure import (
    WARM_UP_ORDERS,
    Demand,
    Run,
    judged,
    rates,
    times_since,
    until_ended,
    warm_up,
    watched,
)
from orderstream.bench.pipeline import Bench, Pipeline
from orderstream.bench.usage import memory_bytes
from orderstream.console import Bar
from orderstream.streams.orders import Status

FIFTHS = (1, 2, 3, 4, 5)

QUIET_S = 2.0
"""Before a reading: offsets are committed, changelogs written, Postgres' statistics published."""

READINGS: Mapping[str, str] = {
    "rss_mib": "worker's memory, MiB",
    "postgres_mib": "Postgres' database, MiB",
    "dead_tuples": "dead rows in Postgres",
    "redis_mib": "Redis' memory, MiB",
    "kafka_mib": "Kafka's logs, MiB",
}
"""What is read, and its name in sentences."""

MIB = 2**20

_POSTGRES = """
SELECT pg_database_size(current_database()) AS bytes, (SELECT sum(n_dead_tup) FROM pg_stat_user_tables) AS dead_tuples
"""


def soak(load: Load, bench: Bench, orders: int, seed: str) -> Run:
    """Sell orders, all in one run; each must end CONFIRMED.

    Returns:
        Figures ``section_<n>_orders_per_s`` of each fifth, ``last_of_first`` (ratio of the last to the first of these), each
        name of :data:`READINGS` with ``_fifth`` and ``_whole``, ``rss_growth`` (ratio).
    """
    with bench.pipeline(dict.fromkeys(load.products, orders + WARM_UP_ORDERS)) as pipeline:
        logs = bench.engines.local_dir / "kafka" / "data"
        return asyncio.run(_soak(pipeline, Demand(load, orders, {Status.CONFIRMED: orders}, load), seed, logs))


def fifths(orders: int) -> list[int]:
    """Divide orders into five parts; the first ones have one more where it does not come out even."""
    return [orders // 5 + (n <= orders % 5) for n in FIFTHS]


async def _soak(pipeline: Pipeline, demand: Demand, seed: str, logs: Path) -> Run:
    settings = pipeline.settings
    speeds: list[float] = []
    readings: list[dict[str, float]] = []
    first: Produced | None = None
    sold = 0
    connection = await asyncpg.connect(settings.database_url, timeout=30, command_timeout=600)
    try:
        await warm_up(pipeline, connection, demand.warm_up, seed)
        async with watched(pipeline, connection) as seen:
            with Bar("orders ended", demand.orders) as bar:
                for number, count in zip(FIFTHS, fifths(demand.orders), strict=True):
                    packed = steps(settings, draw(demand.load, count, f"{seed}/{number}"))
                    produced = await produce(settings, packed)
                    first = first or produced
                    sold += count
                    if await until_ended(connection, sold, pipeline, since=first.start, bar=bar) < sold:
                        break  # some are lost: no figures, and the verdict says which
                    times = await times_since(connection, produced.start)
                    speeds.append(rates(times, produced, count, count)["orders_per_s"])
                    await asyncio.sleep(QUIET_S)
                    readings.append(await read(pipeline, connection, logs))
        assert first is not None
        run = await judged(settings, connection, demand, first, lines=demand.orders, seen=seen)
    finally:
        await connection.close()
    found = figures(speeds, readings) if len(readings) == len(FIFTHS) else {}
    return replace(run, figures=found, detail={**run.detail, "readings": readings})


def figures(speeds: Sequence[float], readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the figures of :func:`soak`, of the rates and the readings of all fifths."""
    found = {f"section_{n}_orders_per_s": speed for n, speed in zip(FIFTHS, speeds, strict=True)}
    found["last_of_first"] = speeds[-1] / speeds[0]
    for name in READINGS:
        found |= {f"{name}_fifth": readings[0][name], f"{name}_whole": readings[-1][name]}
    found["rss_growth"] = readings[-1]["rss_mib"] / readings[0]["rss_mib"]
    return found


async def read(pipeline: Pipeline, connection: Any, logs: Path) -> dict[str, float]:
    """Return what worker, stores and logs take now, by the names of :data:`READINGS`."""
    postgres = await connection.fetchrow(_POSTGRES)
    client = redis.asyncio.Redis.from_url(pipeline.settings.redis_url)
    try:
        memory = await client.info("memory")
    finally:
        await client.aclose()
    return {
        "rss_mib": memory_bytes(pipeline.workers[0].process.pid)[0] / MIB,
        "postgres_mib": postgres["bytes"] / MIB,
        "dead_tuples": float(postgres["dead_tuples"]),
        "redis_mib": memory["used_memory"] / MIB,
        "kafka_mib": await asyncio.to_thread(log_bytes, logs, pipeline.settings.app_id) / MIB,
    }


def log_bytes(logs: Path, prefix: str) -> int:
    """Return the size of the segments of the topics whose names begin so, in the folder of a broker's logs.

    Indexes are left out: a broker makes them at their full size and cuts them when it closes a segment.
    """
    total = 0
    for segment in logs.glob(f"{prefix}*/*.log"):
        with suppress(FileNotFoundError):  # compacted between two readings
            total += segment.stat().st_size
    return total
