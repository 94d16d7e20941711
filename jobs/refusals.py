"""Money that the provider does not give back, for operators: of which orders; asked again, or closed with a reason."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import orjson

from orderstream.settings import Settings
from orderstream.sql.store import Store, query
from orderstream.streams.producer import Outbox, Producer

POLL_S = 0.1

CLOSED = "closed"
"""How what is told of money begins that people have dealt with."""


async def listing(store: Store, *, closed: bool, limit: int) -> list[Any]:
    """Return the orders whose money was refused, the oldest first; with ``closed`` those too that are dealt with."""
    rows: list[Any] = await store.pool.fetch(query("refusals"), closed, None, limit)
    return rows


async def retry(
    settings: Settings, store: Store, producer: Producer, order_ids: Sequence[str], wait_s: float
) -> dict[str, str]:
    """Have the homes of these orders ask the provider again; return what became of each after so many seconds at most.

    Of those that are not open nothing is asked, and what they are is returned.  Repeated, it is the same question.
    """
    rows = await store.pool.fetch(query("refusals"), False, order_ids, len(order_ids))
    outbox, ids = Outbox(settings), [row["order_id"] for row in rows]
    for row in rows:
        body = orjson.dumps({"command": "retry_payment", "order_id": row["order_id"]})
        outbox.order_command(row["order_id"], body, row["home"])
    await store.pool.execute(query("note_retried"), ids)
    await producer.send(outbox.handovers())
    deadline, before = time.monotonic() + wait_s, {row["order_id"]: row["refused_at"] for row in rows}
    while True:
        rows = await store.pool.fetch(query("refusals"), True, order_ids, len(order_ids))
        stands = {row["order_id"]: row["payment"] for row in rows}
        is_known = [
            row["payment"] in ("REFUNDED", "VOIDED") or row["refused_at"] != before[row["order_id"]]
            for row in rows
            if row["order_id"] in before
        ]
        if all(is_known) or time.monotonic() > deadline:
            closed = {row["order_id"]: row["why"] for row in rows if row["closed_at"] is not None}
            stands |= {
                order_id: f"{CLOSED}: {why}" for order_id, why in closed.items() if stands[order_id] == "REFUSED"
            }
            return {order_id: stands.get(order_id, "not refused") for order_id in order_ids}
        await asyncio.sleep(POLL_S)


async def close(store: Store, order_ids: Sequence[str], why: str) -> list[str]:
    """Note that people have dealt with the money of these orders; return those that were open, and are closed now."""
    rows = await store.pool.fetch(query("close_refusals"), list(order_ids), why)
    return [row["order_id"] for row in rows]
