"""Ends a worker that looks healthy and gets nowhere; its supervisor starts it again and its partitions continue.

Two things are watched.  From the event loop: a partition whose records wait while nothing of it is done, or while what is
done is not committed; and what came in about orders in hand, while nothing is decided.  From a thread: the event loop
itself, when it does not come round.  A good reason does not count: an engine that is unavailable, topics that are
folded into a Postgres that was set back, a rebalance (unless that does not end either).  A payment provider that is silent
is none: the orders that wait for it do so in Postgres, and their records are acknowledged.  A partition ends where the
oldest open transaction begins: what stands behind it is no standstill, and is told by the age of the transaction.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import structlog
from aiokafka.errors import KafkaError
from faust.types import TP

from orderstream import metrics
from orderstream.agents.desk import Desk
from orderstream.exits import EXIT_FAULT, end_process

log = structlog.get_logger("watchdog")

CHECKS = 10
"""Checks within the time that a partition may stand still."""

CHECK_INTERVAL_MAX_S = 5.0
ENDS_TIMEOUT_S = 10.0
"""Longest wait for the broker's answer where its partitions end."""

OPEN_S = 10.0
"""A transaction that is open for so long is logged: producers end theirs within a second or so."""

BEAT_S = 0.5
"""How often the event loop shows that it comes round."""


DESK = TP("orders in hand", 0)
"""Takes the place of a partition: what came in about orders in hand, of which so much is decided."""


class Progress(NamedTuple):
    """How far one partition is: all before ``done`` is done, all before ``committed`` committed, ``end`` comes next."""

    done: int | None
    committed: int | None
    end: int

    @property
    def at_rest(self) -> bool:
        """Whether nothing waits and all is committed."""
        return self.done is None or (self.done >= self.end and (self.committed or 0) >= self.done)


class Standstill:
    """Since when each partition gets nowhere; no I/O."""

    def __init__(self) -> None:
        self._seen: dict[TP, tuple[tuple[int | None, int | None], float]] = {}

    def update(self, places: Mapping[TP, Progress], now_s: float) -> dict[TP, float]:
        """Return for how long each partition with work to do has made no progress, in seconds.

        Args:
            places: of every partition that is expected to make progress; others start from zero when they are here again.
            now_s: a monotonic clock.
        """
        before, self._seen = self._seen, {}
        for tp, place in places.items():
            if not place.at_rest:
                mark = (place.done, place.committed)
                then = before.get(tp)
                self._seen[tp] = then if then is not None and then[0] == mark else (mark, now_s)
        return {tp: now_s - since for tp, (_, since) in self._seen.items()}


class Open:
    """Since when transactions are open, as far as this worker has seen; no I/O."""

    def __init__(self) -> None:
        self._seen: dict[TP, tuple[int, float]] = {}
        self._told: dict[TP, float] = {}

    def update(self, begins: Mapping[TP, int], now_s: float) -> dict[TP, tuple[int, float]]:
        """Return of each partition with an open transaction where the oldest one begins, and for how long it is open.

        Args:
            begins: where it begins, of these partitions.
            now_s: a monotonic clock.
        """
        before, self._seen = self._seen, {}
        for tp, offset in begins.items():
            then = before.get(tp)
            self._seen[tp] = then if then is not None and then[0] == offset else (offset, now_s)
        self._told = {tp: told for tp, told in self._told.items() if self._seen.get(tp) == before.get(tp)}
        return {tp: (offset, now_s - since) for tp, (offset, since) in self._seen.items()}

    def is_due(self, tp: TP, open_s: float) -> bool:
        """Tell whether to log it: when it is that old, and again each time it is twice as old."""
        if open_s < 2 * self._told.get(tp, 0.0):
            return False
        self._told[tp] = open_s
        return True


class Watchdog:
    """The watchdog of one worker.

    Args:
        desk: of the worker; the app's consumer knows how far it has read.
        stall_timeout_s: how long may pass without progress, in seconds.
    """

    def __init__(self, desk: Desk, stall_timeout_s: float) -> None:
        self._desk, self._stage = desk, desk.stage
        self._timeout_s = stall_timeout_s
        self._standstill = Standstill()
        self._open = Open()
        self._rebalancing: tuple[Any, float] | None = None
        self._pulse = desk.stage.app.pulse
        self._over = threading.Event()

    async def run(self) -> None:
        """Watch, until the process ends or the task is cancelled."""
        thread = threading.Thread(target=self._watch_loop, name="watchdog", daemon=True)
        thread.start()
        beat = asyncio.create_task(self._show_life())
        try:
            while True:
                await asyncio.sleep(min(self._timeout_s / CHECKS, CHECK_INTERVAL_MAX_S))
                self._judge(await self._places(), time.monotonic())
                self._tell_open()
        finally:
            beat.cancel()
            self._over.set()

    # Partitions

    async def _places(self) -> dict[TP, Progress]:
        """Return how far each partition is that is expected to make progress."""
        app = self._stage.app
        if self._stage.unavailable or self._stage.is_folding or self._is_rebalancing():
            return {}
        consumer = app.consumer
        tps = [tp for tp in consumer.assignment() if tp.topic not in app.tables.changelog_topics]
        if not tps:
            return {}
        try:
            async with asyncio.timeout(ENDS_TIMEOUT_S):
                ends = await consumer.highwaters(*tps)
        except (KafkaError, TimeoutError):
            return {}  # Kafka is unavailable, or a rebalance has begun
        decided = self._desk.decided
        return {
            DESK: Progress(decided, decided, decided + len(self._desk.inbox)),
            **{tp: Progress(consumer.done_offset(tp), consumer.committed_offset(tp), ends.get(tp) or 0) for tp in tps},
        }

    def _is_rebalancing(self) -> bool:
        """Whether there is a rebalance, or tables are being restored; that has to make progress as well."""
        app = self._stage.app
        recovery = app.tables.recovery
        if not (app.rebalancing or recovery.in_recovery):
            self._rebalancing = None
            return False
        mark = (
            app.rebalancing_count,
            app.consumer_generation_id,
            sum(offset or 0 for offset in recovery.active_offsets.values()),
        )
        now = time.monotonic()
        if self._rebalancing is None or self._rebalancing[0] != mark:
            self._rebalancing = (mark, now)
        elif now - self._rebalancing[1] > 2 * self._timeout_s:
            end_process(f"the group does not settle: nothing has moved for {now - self._rebalancing[1]:.0f} s")
        return True

    def _judge(self, places: Mapping[TP, Progress], now_s: float) -> None:
        for tp, still_s in self._standstill.update(places, now_s).items():
            done, committed, end = places[tp]
            where = f"its end is at {end}, done is all before {done}, committed all before {committed}"
            if still_s > self._timeout_s:
                if tp != DESK:
                    where += f", fetched all before {self._stage.app.consumer.read_offset(tp)}"
                end_process(f"no progress for {still_s:.0f} s on {tp.topic}/{tp.partition}: {where}")

    def _tell_open(self) -> None:
        """Tell of transactions that are open: until they end, what stands behind them is nobody's to read."""
        app, settings = self._stage.app, self._stage.settings
        metrics.OPEN_TRANSACTION.clear()
        for tp, (offset, open_s) in self._open.update(app.consumer.held_back(), time.monotonic()).items():
            topic = tp.topic.removeprefix(settings.topic_prefix)
            metrics.OPEN_TRANSACTION.labels(topic, tp.partition).set(open_s)
            if open_s >= OPEN_S and self._open.is_due(tp, open_s):
                log.warning("a producer's transaction is open: what stands behind its beginning waits for its end",
                            topic=tp.topic, partition=tp.partition, begins=offset, open_s=round(open_s))  # fmt: skip

    # The event loop

    async def _show_life(self) -> None:
        while True:
            self._pulse.beat(self._stage.settings.session_timeout_s)
            await asyncio.sleep(BEAT_S)

    def _watch_loop(self) -> None:
        now = since = time.monotonic()
        while not self._over.wait(1.0):
            before, now = now, time.monotonic()
            if now - before > 2.0:
                since = now  # the whole process was stopped, not its loop alone
            still_s = now - max(self._pulse.last, since)
            if still_s > self._timeout_s:
                _end_blocked(still_s)


def _end_blocked(still_s: float) -> None:
    """End the process from beside the event loop; what it hangs in is written to stderr."""
    log.critical(f"the event loop has not come round for {still_s:.0f} s")
    faulthandler.dump_traceback(all_threads=True)
    sys.stderr.flush()
    os._exit(EXIT_FAULT)
