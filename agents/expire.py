"""The expiry timer: commands the owner to end orders whose hold has outlived its time.

Postgres knows which: an order is written there with its hold.  Every worker queries for orders of its own partitions, oldest
first, from a low-water mark below which all orders have ended; the order's owner decides, so no expiry races a payment.
Refunds that a lost worker left due are started here too.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from orderstream.agents.pay import Pay
from orderstream.agents.stage import Stage
from orderstream.sql.store import query
from orderstream.streams.partitions import order_partition
from orderstream.streams.topics import ORDER_COMMANDS

COMMANDS_MAX = 5_000
"""Orders commanded to expire in one round; the next round takes the next ones."""

REPEAT_S = 10.0
"""An order that was commanded to expire and has not ended after this is commanded again."""

REFUNDS_INTERVAL_S = 15.0
_BEGINNING = datetime(2000, 1, 1, tzinfo=UTC)
_OVERLAP = timedelta(seconds=60)  # statements that took in orders and are not committed yet carry earlier times


class Expiry:
    """The timer of one worker."""

    def __init__(self, stage: Stage, pay: Pay) -> None:
        self._stage = stage
        self._pay = pay
        self._since = _BEGINNING
        self._commanded_at: dict[str, float] = {}
        self._refunds_at = 0.0

    def owned(self) -> set[int]:
        """Return the order partitions that this worker owns."""
        settings = self._stage.settings
        topic = settings.topic(ORDER_COMMANDS.name)
        return {tp.partition for tp in self._stage.app.consumer.assignment() if tp.topic == topic}

    async def run(self) -> None:
        """Command and wait, for ever."""
        while True:
            await asyncio.sleep(self._stage.settings.expiry_interval_s)
            await self.once()

    async def once(self) -> None:
        """Command the orders that are overdue now to expire."""
        stage, owned = self._stage, self.owned()
        if not owned:
            self._since = _BEGINNING
            return
        pool, partitions = stage.store.pool, stage.settings.partitions
        now = await stage.until_available("postgres", lambda: pool.fetchval(query("now")))
        rows: list[Any] = await stage.until_available(
            "postgres", lambda: pool.fetch(query("overdue"), self._since, stage.settings.hold_ttl_s, COMMANDS_MAX)
        )
        ours = [row for row in rows if order_partition(row["order_id"], partitions) in owned]
        clock = time.monotonic()
        self._commanded_at = {order_id: at for order_id, at in self._commanded_at.items() if clock - at < REPEAT_S}
        outbox = stage.outbox("expire")
        for row in ours:
            if row["order_id"] not in self._commanded_at:
                self._commanded_at[row["order_id"]] = clock
                body = orjson.dumps({"command": "expire", "order_id": row["order_id"]})
                outbox.order_command(row["order_id"], body)
        await stage.emit(outbox, "expire")
        if len(rows) < COMMANDS_MAX:
            horizon = now - timedelta(seconds=stage.settings.hold_ttl_s) - _OVERLAP
            self._since = max(self._since, min([row["created_at"] for row in rows], default=horizon))
        if clock - self._refunds_at > REFUNDS_INTERVAL_S:
            self._refunds_at = clock
            due = await stage.until_available("postgres", lambda: pool.fetch(query("refunds_due")))
            for row in due:
                if order_partition(row["order_id"], partitions) in owned:
                    self._pay.till.refund(row["order_id"], row["charge_id"], row["amount_cents"])
