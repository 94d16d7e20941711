"""What time brings: orders that outlive their hold, cancels that came before their order, orders that wait in Postgres.

Reads only, and puts what it finds on the desk: the stages decide and write, as with everything that comes in.
"""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import structlog

from orderstream.agents.desk import BEGINNING, IN_HAND_MAX, About, Desk, LineAsked
from orderstream.agents.lifecycle import Expire
from orderstream.agents.till import Till
from orderstream.sql.store import statements
from orderstream.streams.lines import LineWanted
from orderstream.streams.topics import ORDER_COMMANDS

TICK_S = 0.25
KEPT_S = 1.0
"""How often it is asked whether the order of a kept cancel has come."""

FORGET_S = 60.0
"""How often kept cancels are forgotten whose order has not come while Kafka would have had it."""

TAKE_UP_S = 2.0
"""How often orders that wait in Postgres, and are not in hand, are taken up."""

RESTING_S = 5.0
"""After so long without a word about an order that waits, what is asked about it is asked again."""

HELD_S = 10.0
"""How often the homes of lines that are held for long are told so again."""

ROWS_MAX = 5_000
"""Of one question."""

log = structlog.get_logger("timers")


class Timers:
    """The timers of one worker."""

    def __init__(self, desk: Desk, till: Till) -> None:
        self._desk, self._till = desk, till
        self._due: dict[str, float] = {}
        self._taken_up = BEGINNING

    async def run(self) -> None:
        """Look, put on the desk, wait, for ever."""
        settings = self._desk.stage.settings
        while True:
            await asyncio.sleep(TICK_S)
            if self._desk.generation is None:
                continue
            if self._desk.has_grown():
                self._desk.wake_commit.set()
            if self._is_due("expiry", settings.expiry_interval_s):
                await self.expire()
            if self._is_due("kept", KEPT_S):
                await self.send_kept()
            if self._is_due("forget", FORGET_S):
                await self.forget_kept()
            if self._is_due("take up", TAKE_UP_S):
                self.ask_again()
                await self.take_up()
            if self._is_due("held", HELD_S):
                await self.repeat_held()

    def _is_due(self, what: str, interval_s: float) -> bool:
        now = time.monotonic()
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + interval_s
        return True

    async def _ask(self, name: str, *arguments: Any) -> list[Any]:
        stage = self._desk.stage
        rows: list[Any] = await stage.until_available(
            "postgres", lambda: stage.store.pool.fetch(statements("stages.sql")[name], *arguments)
        )
        return rows

    async def expire(self) -> None:
        """Expire the orders whose time is over; all that are open for longer than a moment wait in Postgres."""
        ttl = timedelta(seconds=self._desk.stage.settings.hold_ttl_s)
        for row in await self._ask("overdue_orders", sorted(self._desk.settle.claims), ttl, ROWS_MAX):
            self._desk.put(About(row["order_id"], Expire(row["before"])))

    async def send_kept(self) -> None:
        """Send cancels to the homes of orders that have come meanwhile."""
        desk, stage = self._desk, self._desk.stage
        rows = await self._ask("kept_found", sorted(desk.settle.claims), ROWS_MAX)
        topic = stage.settings.topic(ORDER_COMMANDS.name)
        step: dict[tuple[str, int], list[tuple[bytes, bytes, Any]]] = {}
        for row in rows:
            key = row["order_id"].encode()
            step.setdefault((topic, row["home"]), []).append((key, b'{"command":"cancel","order_id":"%b"}' % key, ()))
        if step:
            await stage.until_available("kafka", lambda: stage.producer.send(step))
            desk.found += [(row["partition"], row["order_id"]) for row in rows]
            desk.wake_commit.set()

    async def forget_kept(self) -> None:
        """Forget kept cancels that are older than what Kafka keeps: their order can't be on its way any more."""
        desk = self._desk
        age = timedelta(hours=desk.stage.settings.retention_hours)
        rows = await self._ask("kept_outlived", sorted(desk.settle.claims), age, ROWS_MAX)
        if rows:
            log.info("cancels forgotten whose orders never came", cancels=len(rows))
            desk.found += [(row["partition"], row["order_id"]) for row in rows]
            desk.wake_commit.set()

    def ask_again(self) -> None:
        """Send again what the orders in hand wait for: a message may have got lost with a worker."""
        for order_id in self._desk.resting(RESTING_S):
            self._desk.put(About(order_id, None))

    async def repeat_held(self) -> None:
        """Tell homes again of lines held for longer than a hold lasts: an order that has ended releases them."""
        desk = self._desk
        ttl = timedelta(seconds=desk.stage.settings.hold_ttl_s + RESTING_S)
        for row in await self._ask("long_held", sorted(desk.settle.claims), ttl, ROWS_MAX):
            wanted = LineWanted(
                "hold", row["order_id"], row["product_id"], row["quantity"], row["home"], row["user_id"]
            )
            desk.put(LineAsked(wanted))

    async def take_up(self) -> None:
        """Take up orders that wait in Postgres and are not in hand, oldest first, then from the oldest again."""
        desk = self._desk
        room = min(ROWS_MAX, IN_HAND_MAX - len(desk.entries))
        if room <= 0 or self._till.is_full:
            return
        rows = await self._ask("waiting_orders", sorted(desk.settle.claims), self._taken_up, room)
        self._taken_up = rows[-1]["since"] if len(rows) == room else BEGINNING
        await desk.take_up(rows)
