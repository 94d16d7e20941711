"""Flushes the tables of a worker, and drops from them what their former owner left behind."""

from __future__ import annotations

import asyncio

from orderstream.agents.desk import Desk
from orderstream.sql.store import statements
from orderstream.streams.producer import Step

FLUSH_S = 1.0
ROWS_MAX = 5_000
"""Of one question."""


async def keep(desk: Desk) -> None:
    """Flush and wait, for ever."""
    app, stage, tidied = desk.stage.app, desk.stage, None

    async def send(step: Step) -> None:
        await stage.until_available("kafka", lambda: stage.producer.send(step))

    while True:
        await asyncio.sleep(FLUSH_S)
        generation = desk.generation
        if generation is None or generation != app.consumer_generation_id or app.tables.recovery.in_recovery:
            continue
        if tidied != generation:
            await tidy(desk)
            tidied = generation
        await desk.views.flush(desk.partitions, send)


async def tidy(desk: Desk) -> None:
    """Drop orders that do not wait any more: a worker that was killed may not have flushed that they are over."""
    pool = desk.stage.store.pool
    ours = [
        (home, order_id)
        for order_id, home, _ in desk.views.open_orders.entries()
        if home in desk.partitions and order_id not in desk.entries
    ]
    for start in range(0, len(ours), ROWS_MAX):
        part = ours[start : start + ROWS_MAX]
        homes, ids = [home for home, _ in part], [order_id for _, order_id in part]
        rows = await desk.stage.until_available(
            "postgres",
            lambda homes=homes, ids=ids: pool.fetch(statements("stages.sql")["still_waiting"], homes, ids),  # type: ignore[misc]
        )
        waiting = {row["order_id"] for row in rows}
        desk.views.over((home, one) for home, one in part if one not in waiting and one not in desk.entries)
