"""What the pipeline is compared with: the other way to do the same work, in a process of its own, in the same run."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import asyncpg
import orjson

from orderstream.bench.load import Load, Produced, draw
from orderstream.bench.measure import Demand, Run, judged, watched
from orderstream.bench.peers.service import Job
from orderstream.bench.pipeline import Bench, Pipeline
from orderstream.console import Bar
from orderstream.engines.child import ChildFailed, environment
from orderstream.engines.process import tail
from orderstream.streams.orders import Status

ROW_LOCKS, WORKFLOWS = "rowlock", "dbos"
"""The peers: modules of :mod:`orderstream.bench.peers`."""

ORDERS_MAX: Mapping[str, int] = {ROW_LOCKS: 10_000, WORKFLOWS: 2_000}
"""Orders that a peer sells in one run at most: with more of them its rate does not grow, but the tables do."""

SPARE_UNITS = 10_000
"""Units of each product beyond those that are sold while the clock runs: more than any warm-up takes."""

POLL_S = 2.0
"""Pause between two readings of how far a peer is."""

_TAKEN_IN = "SELECT count(*) FROM orders WHERE created_at >= to_timestamp($1)"

ANSWER_S = 900.0
STOP_S = 30.0


def workflows_installed() -> bool:
    """Say whether the durable workflow library is there; it comes with the extra ``bench``."""
    return find_spec("dbos") is not None


@asynccontextmanager
async def peer_process(pipeline: Pipeline, peer: str) -> AsyncIterator[Any]:
    """Start a peer; end it, whatever happened."""
    with pipeline.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"orderstream.bench.peers.{peer}"),
            env=environment(pipeline.settings),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
        process.stdin.close()  # type: ignore[union-attr]
        await asyncio.wait_for(process.wait(), STOP_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def sell(pipeline: Pipeline, peer: str, demand: Demand, seed: str) -> Run:
    """Have a peer warm up and sell; check every promise.

    Returns:
        The figures of :func:`orderstream.bench.measure.rates`; in ``detail`` how many orders it had in its hands at once,
        and what else it tried.

    Raises:
        ChildFailed: the peer ended before its work.
    """

    async def answer(process: Any) -> Any:
        line = await asyncio.wait_for(process.stdout.readline(), ANSWER_S)
        if not line:
            raise ChildFailed(f"the peer {peer} ended\n{tail(pipeline.log)}")
        return orjson.loads(line)

    connection = await asyncpg.connect(pipeline.settings.database_url, timeout=30)
    try:
        async with peer_process(pipeline, peer) as process:
            process.stdin.write(Job(demand.load, demand.orders, seed).encode())
            found = await answer(process)
            pipeline = replace(pipeline, pids={**pipeline.pids, "worker": process.pid})
            async with watched(pipeline, connection) as seen:
                process.stdin.write(b"\n")
                times = await _shown(asyncio.create_task(answer(process)), connection, demand.orders)
        lines = sum(order.lines for order in draw(demand.load, demand.orders, seed))
        seen.detail.update(found)
        produced = Produced(times["start"], times["end"])
        return await judged(pipeline.settings, connection, demand, produced, lines=lines, seen=seen)
    finally:
        await connection.close()


async def _shown(work: asyncio.Task[Any], connection: Any, orders: int) -> Any:
    """Await the work; show meanwhile how far it is."""
    began = time.time()
    with Bar("orders taken in", orders) as bar:
        while not (await asyncio.wait([work], timeout=POLL_S))[0]:
            bar.update(await connection.fetchval(_TAKEN_IN, began))
    return work.result()


def peer_run(bench: Bench, peer: str, load: Load, orders: int, seed: str) -> Run:
    """Measure a peer on a fresh database; each of its orders must end CONFIRMED."""
    orders = min(orders, ORDERS_MAX[peer])
    demand = Demand(load, orders, {Status.CONFIRMED: orders}, warm_up=load)
    with bench.pipeline(dict.fromkeys(load.products, orders + SPARE_UNITS), workers=0) as pipeline:
        return asyncio.run(sell(pipeline, peer, demand, seed))
