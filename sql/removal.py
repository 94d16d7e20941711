"""Removes orders that ended long ago from Postgres, once Kafka has no record of them any more.

Asks Kafka what it still has, then removes in batches.  ``functions/removal.sql`` decides which orders go and
why others stay.  What was sold to them is carried forward in the ledger, so no count and no sum changes; their ids are
remembered, so that none comes again.  Used by ``orderstream prune`` and, on a worker, by :mod:`orderstream.agents.prune`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from orderstream.settings import Settings
from orderstream.sql.store import query
from orderstream.streams.replay import Replay
from orderstream.streams.topics import (
    DEAD_LETTERS,
    ORDER_COMMANDS,
    ORDER_EVENTS,
    ORDER_LINES,
    ORDERS,
    RESERVATIONS,
    TopicSpec,
)

NAMING: tuple[TopicSpec, ...] = (ORDERS, ORDER_COMMANDS, ORDER_EVENTS, RESERVATIONS, ORDER_LINES)
"""The topics whose records name an order: read again, they would make a removed one look new, or lost."""

MARGIN = timedelta(days=1)
"""How much younger a record may be than the change in it: clocks differ, and a batch is read again after an outage."""

BATCH = 1_000
"""Orders checked in one transaction."""

BEGINNING = datetime(2000, 1, 1, tzinfo=UTC)
NO_ID = "00000000-0000-0000-0000-000000000000"
_TRIES = 10
_LONG_S = 300.0

STAY_REASONS: Mapping[str, str] = {
    "open": "have not ended",
    "refund": "have money to give back",
    "unsettled": "have units to give back",
    "waiting": "wait for something still",
    "recent": "changed since",
    "kafka": "are on Kafka's topics still",
    "limit": "bought of a product with a limit per user",
    "unsound": "have rows that do not agree with each other: see `orderstream verify` and `reconcile`",
    "in use": "were being worked on",
}
"""Why orders that are old enough stay, in words."""


@dataclass(frozen=True, slots=True)
class Topics:
    """What Kafka still has.

    Attributes:
        log_starts: the first offset of each partition of ``orders``.
        letter_starts: the same of ``dead-letters``.
        oldest: when the oldest record that names an order was written; None when there is no record at all.
        held_by: the topic and partition where it is.
    """

    log_starts: list[int]
    letter_starts: list[int]
    oldest: datetime | None
    held_by: str | None

    @property
    def bound(self) -> datetime | None:
        """What no record names has not changed since this; None when there is no record at all."""
        return None if self.oldest is None else self.oldest - MARGIN


@dataclass(slots=True)
class Pruned:
    """What was removed, or would be.

    Attributes:
        until: orders whose last change is before this are old enough.
        topics: what Kafka still had.
        checked: orders taken in before ``until``.
        removed: how many of them were removed, or would be.
        kept: how many stay, by reason; see :data:`STAY_REASONS`.
        users: entries of users of limited products who have nothing any more.
        letters: notes about dead letters that their topic no longer has.
        cancels: cancels kept for orders that never came.
        lines: lines that owners had of orders that never came.
    """

    until: datetime
    topics: Topics
    checked: int = 0
    removed: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    users: int = 0
    letters: int = 0
    cancels: int = 0
    lines: int = 0


async def read_topics(settings: Settings) -> Topics:
    """Ask Kafka what it still has.

    Raises:
        KafkaError, TimeoutError: Kafka does not answer.
    """
    wanted = [settings.topic(spec.name) for spec in (*NAMING, DEAD_LETTERS)]
    async with Replay(settings, wanted) as replay:
        await replay.check(())
        beginnings = {(tp.topic, tp.partition): offset for tp, offset in (await replay.beginnings()).items()}
        written = await replay.oldest()
    naming = set(wanted[:-1])
    found = min(((at, tp.topic, tp.partition) for tp, at in written.items() if tp.topic in naming), default=None)
    latest = max(((at, tp.topic, tp.partition) for tp, at in written.items() if tp.topic in naming), default=None)
    if latest is not None and datetime.fromtimestamp(latest[0] / 1000, UTC) > datetime.now(UTC) + MARGIN:
        found = (0, *latest[1:])  # written by a clock that is wrong: how old it is can't be known
    starts = {
        spec.name: [beginnings[settings.topic(spec.name), p] for p in range(settings.partitions)]
        for spec in (ORDERS, DEAD_LETTERS)
    }
    return Topics(
        starts[ORDERS.name],
        starts[DEAD_LETTERS.name],
        None if found is None else datetime.fromtimestamp(found[0] / 1000, UTC),
        None if found is None else f"{found[1]}/{found[2]}",
    )


async def _no_pause() -> None:
    await asyncio.sleep(0)


async def remove(
    postgres: Any,
    topics: Topics,
    until: datetime,
    *,
    really: bool,
    batch: int = BATCH,
    since: datetime = BEGINNING,
    before: datetime | None = None,
    pause: Callable[[], Awaitable[None]] = _no_pause,
    progress: Callable[[Pruned], None] = lambda so_far: None,
) -> Pruned:
    """Check all orders taken in before ``until``, oldest first, and remove those that can be.

    Each batch is one transaction, so an interruption leaves no order half removed.  It may run several times at once.

    Args:
        postgres: a pool or a connection.
        topics: what Kafka still has.
        until: the last change of an order must be before this.
        really: False only counts.
        batch: orders checked in one transaction.
        since: begin with those taken in at this time.
        before: end with those taken in before this time.
        pause: awaited between two batches.
        progress: called after each batch.

    Raises:
        OSError, asyncpg.PostgresError, TimeoutError: Postgres does not answer.
    """
    found = Pruned(until, topics)
    place = (since, NO_ID)
    end = until if before is None else min(until, before)
    while True:
        row = await _batch(postgres, *place, batch, end, topics.bound, topics.log_starts, really)
        found.checked += row["looked"]
        found.removed += row["removed"]
        found.kept.update(dict(zip(row["whys"] or (), row["numbers"] or (), strict=True)))
        progress(found)
        if row["looked"] < batch:
            return found
        place = (row["last_at"], str(row["last_id"]))
        await pause()


async def _batch(postgres: Any, *arguments: Any) -> Any:
    """Do one batch; one that conflicts with another transaction is tried again."""
    for _ in range(_TRIES - 1):
        try:
            return await postgres.fetchrow(query("remove_orders"), *arguments)
        except (asyncpg.SerializationError, asyncpg.DeadlockDetectedError):
            await asyncio.sleep(0.05)
    return await postgres.fetchrow(query("remove_orders"), *arguments)


async def tidy(postgres: Any, found: Pruned, *, really: bool) -> None:
    """Delete users of limited products who have nothing, notes about letters that no longer exist, old cancels, and lines of
    orders that never came.

    Raises:
        OSError, asyncpg.PostgresError, TimeoutError: Postgres does not answer.
    """
    for row in await postgres.fetch(query("idle_users"), timeout=_LONG_S):
        found.users += await postgres.fetchval(query("forget_users"), row["product_id"]) if really else row["users"]
    statement = query("forget_letters" if really else "letters_to_forget")
    found.letters = await postgres.fetchval(statement, found.topics.letter_starts, found.until, timeout=_LONG_S)
    if really:
        await postgres.execute(query("forget_rejections"), found.until, found.topics.bound, timeout=_LONG_S)
    statement = query("forget_cancels" if really else "cancels_to_forget")
    found.cancels = await postgres.fetchval(statement, found.until, found.topics.bound, timeout=_LONG_S)
    size, bounds = BATCH if really else None, (found.until, found.topics.bound)
    while lines := await postgres.fetchval(query("remove_strays"), size, *bounds, really, timeout=_LONG_S):
        found.lines += lines
        if not really:
            break


async def prune(
    settings: Settings, postgres: Any, topics: Topics, *, really: bool, progress: Callable[[int, int], None]
) -> Pruned:
    """Do all of it, as ``orderstream prune`` does; ``progress`` is called with the orders checked, and with their number.

    Raises:
        OSError, asyncpg.PostgresError, TimeoutError: Postgres does not answer.
    """
    until = await postgres.fetchval(query("now")) - timedelta(days=settings.keep_orders_days)
    total = await postgres.fetchval(query("orders_before"), until, timeout=_LONG_S)
    found = await remove(
        postgres, topics, until, really=really, progress=lambda so_far: progress(so_far.checked, total)
    )
    await tidy(postgres, found, really=really)
    return found


def as_json(found: Pruned, keep_days: float, *, really: bool) -> dict[str, Any]:
    """Return what was found, for JSON."""
    oldest = found.topics.oldest
    return {
        "removed" if really else "would_remove": found.removed,
        "looked_at": found.checked,
        "kept": dict(found.kept),
        "keep_days": keep_days,
        "until": found.until.isoformat(),
        "kafka": None if oldest is None else {"oldest_record_at": oldest.isoformat(), "in": found.topics.held_by},
        "users": found.users,
        "letters": found.letters,
        "cancels": found.cancels,
        "lines": found.lines,
    }
