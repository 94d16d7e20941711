"""The duty of removing orders that ended long ago, on the worker that has the first partition; off unless orders are kept
for a limited time (``keep_orders_days``).

It checks the orders oldest first, a small batch at a time, and pauses four times as long as each took.  Orders that stay are
skipped by the next rounds; once a day all orders are checked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import datetime, timedelta

import asyncpg
import structlog
from aiokafka.errors import KafkaError

from orderstream import metrics
from orderstream.agents.stage import Stage
from orderstream.errors import OwnershipLost
from orderstream.sql.removal import BEGINNING, Pruned, Topics, read_topics, remove, tidy
from orderstream.sql.store import TRANSIENT, query
from orderstream.streams.topics import ORDERS

log = structlog.get_logger("prune")

CHECK_INTERVAL_S = 5.0
"""How often a worker checks whether a round is due, and whether it is this worker's."""

ROUND_S = 300.0
WHOLE_ROUND_S = 86_400.0
BATCH = 200
PAUSE_PART = 4.0
"""Pause after a batch, as a multiple of the time that it took."""

_FAULTS: tuple[type[BaseException], ...] = (*TRANSIENT, KafkaError, asyncpg.PostgresError)


class Prune:
    """The duty of one worker."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._since = BEGINNING
        self._due = self._whole_due = 0.0
        self._failing = False

    def ours(self) -> bool:
        """Return whether the duty is this worker's: it has the first partition of ``orders``."""
        topic = self._stage.settings.topic(ORDERS.name)
        return any(tp.topic == topic and tp.partition == 0 for tp in self._stage.app.consumer.assignment())

    async def run(self) -> None:
        """Remove and wait, for ever; what fails is tried again at the next round."""
        if not self._stage.settings.keep_orders_days:
            return
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            if time.monotonic() < self._due or not self.ours():
                continue
            self._due = time.monotonic() + ROUND_S
            try:
                with contextlib.suppress(OwnershipLost):
                    await self.round()
            except _FAULTS as error:
                if not self._failing:
                    log.warning("old orders can't be removed, tried again later", error=repr(error))
                self._failing = True
            else:
                if self._failing:
                    log.warning("old orders are removed again")
                self._failing = False

    async def round(self) -> None:
        """Remove what can be removed now.

        Raises:
            OwnershipLost: the duty is another worker's by now.
            KafkaError, OSError, asyncpg.PostgresError, TimeoutError: an engine does not answer.
        """
        stage = self._stage
        whole = time.monotonic() >= self._whole_due
        topics = await read_topics(stage.settings)
        until = await stage.store.pool.fetchval(query("now")) - timedelta(days=stage.settings.keep_orders_days)
        await self._remove(stage.store.pool, topics, until, whole=whole)

    async def _remove(self, postgres: asyncpg.Pool, topics: Topics, until: datetime, *, whole: bool) -> None:
        before = until if topics.bound is None else min(until, topics.bound)
        began, counted = time.monotonic(), 0

        async def pause() -> None:
            nonlocal began
            await asyncio.sleep(PAUSE_PART * (time.monotonic() - began))
            if not self.ours():
                raise OwnershipLost
            began = time.monotonic()

        def count(so_far: Pruned) -> None:
            nonlocal counted
            metrics.ORDERS_REMOVED.inc(so_far.removed - counted)
            counted = so_far.removed

        found = await remove(
            postgres,
            topics,
            until,
            really=True,
            batch=BATCH,
            since=BEGINNING if whole else self._since,
            before=before,
            pause=pause,
            progress=count,
        )
        self._since = max(self._since, before)
        if whole:
            await tidy(postgres, found, really=True)
            self._whole_due = time.monotonic() + WHOLE_ROUND_S
        if found.removed or found.letters or found.users or found.cancels or found.lines:
            log.info("old orders removed", orders=found.removed, until=until.isoformat(), kept=dict(found.kept))
