"""Makes good what was sold beyond what there is: the youngest orders over it are cancelled, as their customers could.

After a set-back of Postgres more may have been told CONFIRMED than there are units.  Nobody but the shop can know whether it
gets more of them, so nothing of this is done by itself.  The commands are ordinary ones: homes refund, give back, and tell.
The units that come back go against what is owed in the very same transactions, so no other order gets them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import orjson

from orderstream.jobs.reconcile.drift import Difference
from orderstream.jobs.reconcile.reconcile import Reconcile, Repair, query
from orderstream.jobs.reconcile.repair import turn
from orderstream.sql.differences import Kind
from orderstream.streams.orders import Status
from orderstream.streams.producer import Outbox, Producer

WAIT_S = 60.0
"""How long it is waited until the orders are cancelled, and their money is given back."""

POLL_S = 0.2


class Revoked(NamedTuple):
    """An order that is to be cancelled; ``total_cents`` None: its lines are not all held yet."""

    order_id: str
    home: int
    status: str
    created_at: datetime
    total_cents: int | None
    units: Mapping[str, int]


async def plan(job: Reconcile, differences: Sequence[Difference]) -> dict[str, list[Revoked]]:
    """Return the orders to be cancelled for each product of which units are owed: the youngest, each order once.

    Raises:
        EngineUnavailable: Postgres does not answer.
    """
    chosen: dict[str, Revoked] = {}
    plans: dict[str, list[Revoked]] = {}
    for product_id in sorted(d.subject for d in differences if d.kind is Kind.STOCK_OWED):
        with job.postgres():
            rows = await job.store.pool.fetch(query("youngest"), product_id)
        left = (rows[0]["owed"] if rows else 0) - sum(order.units.get(product_id, 0) for order in chosen.values())
        plans[product_id] = []
        for row in rows:
            units = dict(zip(row["product_ids"], row["quantities"], strict=True))
            if left <= 0:
                break
            if row["status"] == Status.CANCELLED:
                left -= units[product_id]
            elif row["order_id"] not in chosen:
                what = {name: row[name] for name in ("order_id", "home", "status", "created_at", "total_cents")}
                order = chosen[row["order_id"]] = Revoked(**what, units=units)
                plans[product_id].append(order)
                left -= units[product_id]
    return plans


async def resolve(job: Reconcile, differences: Sequence[Difference]) -> list[Repair]:
    """Cancel these orders, wait until that is done, and return what was done about each product.

    Raises:
        EngineUnavailable: an engine does not answer; a second run does the rest.
    """
    outbox = Outbox(job.settings)
    async with turn(job):
        plans = await plan(job, differences)
        for order in (order for orders in plans.values() for order in orders):
            body = orjson.dumps({"command": "cancel", "order_id": order.order_id})
            outbox.order_command(order.order_id, body, order.home)
        producer = Producer(job.settings, client_id="orderstream-reconcile")
        with job.kafka():
            await producer.start()
            try:
                await producer.send(outbox.handovers())
            finally:
                await producer.stop()
        left = await _wait(job, {order.order_id for orders in plans.values() for order in orders})
    return [_done(product_id, orders, left) for product_id, orders in plans.items()]


async def _wait(job: Reconcile, order_ids: set[str]) -> set[str]:
    """Wait until nothing is left to do about these orders; return those of which there is."""
    deadline = time.monotonic() + WAIT_S
    while True:
        with job.postgres():
            rows = await job.store.pool.fetch(query("revoked"), sorted(order_ids))
        left = order_ids - {row["order_id"] for row in rows}
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(POLL_S)


def _done(product_id: str, orders: Sequence[Revoked], left: set[str]) -> Repair:
    waits = sum(order.order_id in left for order in orders)
    units = sum(order.units[product_id] for order in orders)
    text = f"{len(orders)} orders with {units} units of it were cancelled"
    return Repair(
        Kind.STOCK_OWED,
        product_id,
        "left" if waits else "done",
        text + f", {waits} of them are under way" * bool(waits),
    )
