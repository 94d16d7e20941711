"""How fast `orderstream reconcile --from-beginning` reads what orders have left in Kafka, and in how much memory.

The records are those of orders that were really sold: a worker sells them once, leaves, and every run reads the same store.
The command is a process of its own, as people start it; its peak is what the kernel saw of it at most.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import orjson

from orderstream.bench.load import Load, draw, produce, steps
from orderstream.bench.measure import OFFENDERS_SHOWN_MAX, Run, until_ended
from orderstream.bench.pipeline import Bench, Pipeline
from orderstream.bench.usage import Snapshot, Usage, cpu_s, main_thread_s, memory_bytes
from orderstream.console import Bar
from orderstream.engines.child import environment
from orderstream.engines.process import tail
from orderstream.errors import OrderstreamError

SECTION_ORDERS = 50_000
"""Orders drawn, and sold, at a time."""

POLL_S = 0.05
"""Between two readings of the command's memory and processor time: what it takes after the last one is not seen."""

COMMAND = ("orderstream", "reconcile", "--from-beginning", "--json")


def sections(orders: int, size: int) -> list[int]:
    """Deal orders out into sections of at most this size."""
    return [min(size, orders - start) for start in range(0, orders, size)]


@contextmanager
def sold_before(load: Load, bench: Bench, orders: int) -> Iterator[Bench]:
    """Sell these orders, then let the worker go; the bench that this yields has the store.

    Raises:
        OrderstreamError: some orders did not end.
    """
    bench.say(f"selling {orders:,} orders, whose records are then read; that is not measured")
    with bench.pipeline(dict.fromkeys(load.products, orders)) as pipeline:
        asyncio.run(_sell(pipeline, load, orders))
        for worker in pipeline.workers:
            worker.stop()
        yield replace(bench, store=pipeline)


async def _sell(pipeline: Pipeline, load: Load, orders: int) -> None:
    connection = await asyncpg.connect(pipeline.settings.database_url, timeout=30)
    try:
        since, sold = time.time(), 0
        with Bar("orders sold", orders) as bar:
            for number, count in enumerate(sections(orders, SECTION_ORDERS)):
                await produce(
                    pipeline.settings, steps(pipeline.settings, draw(load, count, f"{load.products[0]}/{number}"))
                )
                sold += count
                ended = await until_ended(connection, sold, pipeline, since=since, bar=bar)
                if ended < sold:
                    raise OrderstreamError(f"only {ended} of {sold} orders have ended\n{tail(pipeline.log)}")
    finally:
        await connection.close()


def replay(bench: Bench, orders: int, seed: str) -> Run:
    """Run the command over the bench's store.

    Returns:
        Figures ``records`` (read), ``records_per_s`` (reading and folding, as the command says it), ``seconds`` and
        ``whole_records_per_s`` (the process from its start to its end), ``peak_mib``.
    """
    assert bench.store is not None
    return asyncio.run(_reconciled(bench.store, orders))


async def _reconciled(store: Pipeline, orders: int) -> Run:
    pids = {name: pid for name, pid in store.pids.items() if not name.startswith("worker")}
    load_before, before = os.getloadavg()[0], Snapshot.take(pids)
    start = time.monotonic()
    with store.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *COMMAND),
            env=environment(store.settings),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    now = peak = 0
    spent = main_thread = 0.0
    ended = asyncio.create_task(process.communicate())
    while not (await asyncio.wait([ended], timeout=POLL_S))[0]:
        seen = memory_bytes(process.pid)
        if seen[1]:
            now, peak = seen
            spent, main_thread = cpu_s(process.pid), main_thread_s(process.pid)
    seconds = time.monotonic() - start
    after = Snapshot.take(pids)
    usage = Usage.between(
        replace(before, cpu_s={**before.cpu_s, "worker": 0.0}), replace(after, cpu_s={**after.cpu_s, "worker": spent})
    )
    detail = {
        "orders": orders,
        "load_average_before": load_before,
        "worker_main_thread_s": main_thread,
        "worker_rss_bytes": now,
        "worker_rss_max_bytes": peak,
    }
    out, status = ended.result()[0], process.returncode
    if status not in (0, 1):
        return Run({}, [f"the command ended with {status}\n{tail(store.log)}"], usage, detail)
    found = orjson.loads(out)
    figures = {
        "records": float(found["records"]),
        "seconds": seconds,
        "records_per_s": found["records"] / found["seconds"],
        "whole_records_per_s": found["records"] / seconds,
        "peak_mib": peak / 2**20,
    }
    read = {topic: sum(p["to"] - p["from"] for p in parts.values()) for topic, parts in found["covered"].items()}
    return Run(figures, drifted(found, orders), usage, {**detail, "read": read})


def drifted(found: Mapping[str, Any], orders: int) -> list[str]:
    """Return why a report, as JSON, is no result: it has differences, or not all orders were compared to their end."""
    differences: Sequence[Mapping[str, Any]] = found["differences"]
    faults = []
    if differences:
        first = ", ".join(f"{one['kind']} of {one['subject']}" for one in differences[:OFFENDERS_SHOWN_MAX])
        faults.append(f"drift: {len(differences)} differences, {first}")
    if found["orders"] != orders:
        faults.append(f"{found['orders']} orders compared instead of {orders}")
    if found["open"]:
        faults.append(f"{found['open']} orders are open")
    return faults
