"""The promises, checked over Postgres and Redis.  Used by ``orderstream verify``, the tests and the benchmarks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import RedisError

from orderstream import connecting
from orderstream.lua.gate import Gate
from orderstream.settings import Settings
from orderstream.sql.store import Store, gate_of, query, statements
from orderstream.streams.replay import Replay
from orderstream.streams.topics import TOPICS

REDIS_PROMISE = "redis is postgres"
KAFKA_PROMISE = "every partition is read"
_READ_PRODUCTS_MAX = 5_000
_PAUSE_S = 0.2


@dataclass(slots=True)
class Check:
    """One promise and those who break it, each ``(which, what was found)``."""

    promise: str
    offenders: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""


@dataclass(slots=True)
class Verdicts:
    """What was checked."""

    checks: list[Check]
    orders: int
    products: int

    @property
    def holds(self) -> bool:
        """Whether every promise holds."""
        return not any(check.offenders for check in self.checks)


async def verify(settings: Settings, *, grace_s: float = 30.0, settle_s: float = 5.0) -> Verdicts:
    """Check every promise of ``invariants.sql``, on one snapshot, and that Redis has the counts that Postgres has.

    Kafka is only asked whether its topics have partitions that no worker reads.

    Args:
        settings: of the pipeline.
        grace_s: how long an order may be past its time, or wait for its commit, before that is a violation, in seconds.
        settle_s: while orders are in flight Redis and Postgres differ for moments: how long to compare again, in seconds.

    Raises:
        EngineUnavailable: Postgres, Redis or Kafka does not answer.
    """
    with connecting.postgres(settings):
        store = await Store.connect(settings.database_url, connections_max=2)
    gate = gate_of(settings, store)
    try:
        checks = []
        async with (
            store.pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            await connection.execute("SET LOCAL work_mem = '64MB'")  # each reads all orders: aggregated in memory
            for promise, statement in statements("invariants.sql").items():
                given = (("$1", grace_s), ("$2", settings.hold_ttl_s))
                arguments = [value for name, value in given if name in statement]
                rows = await connection.fetch(statement, *arguments, timeout=600)
                checks.append(Check(promise, [(row["subject"], row["found"]) for row in rows]))
            orders = await connection.fetchval("SELECT count(*) FROM orders")
        with connecting.redis(settings, faults=(RedisError,)):
            check, products = await _compare(store, gate, settle_s)
        with connecting.kafka(settings):
            unread = await _unread(settings)
        return Verdicts([*checks, check, unread], orders, products)
    finally:
        await gate.close()
        await store.close()


async def _unread(settings: Settings) -> Check:
    """Find the partitions that are no home's: what stands there, no worker reads."""
    async with Replay(settings, [settings.topic(spec.name) for spec in TOPICS]) as replay:
        misfits = replay.misfits()
        others = [tp for tp in replay.partitions if tp.topic in misfits and tp.partition >= settings.partitions]
        starts, ends = (await replay.beginnings(), await replay.ends()) if others else ({}, {})
    offenders = [
        (f"{tp.topic}/{tp.partition}", f"{ends[tp] - starts[tp]} records that no worker reads") for tp in others
    ]
    return Check(KAFKA_PROMISE, offenders or [*misfits.items()])


async def _compare(store: Store, gate: Gate, settle_s: float) -> tuple[Check, int]:
    deadline = time.monotonic() + settle_s
    wanted: list[str] | None = None
    total = 0
    while True:
        rows = await store.products(wanted)
        total = max(total, len(rows))
        offenders, loaded = [], 0
        for start in range(0, len(rows), _READ_PRODUCTS_MAX):
            part = rows[start : start + _READ_PRODUCTS_MAX]
            seen = await gate.inspect(part)
            loaded += len(seen)
            for row in part:
                there = seen.get(row["product_id"])  # not what is invalid: no stage decides by it
                must = (row["on_hand"], row["reserved"], 0, 0)
                if there is not None and (there.on_hand, there.reserved, there.taken, there.takes) != must:
                    offenders.append((row["product_id"], _difference(row, there)))
                elif there is not None and row["limit_per_user"] is not None:
                    offenders += await _compare_users(store, gate, row)
        if not offenders or time.monotonic() > deadline:
            note = f"{loaded} of {len(rows)} products loaded" if wanted is None else ""
            return Check(REDIS_PROMISE, offenders, note), total
        wanted = [product_id for product_id, _ in offenders]  # in flight, or drift?  compare these again
        await asyncio.sleep(_PAUSE_S)


async def _compare_users(store: Store, gate: Gate, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Compare what Redis and Postgres have of a limited product's users."""
    product_id = row["product_id"]
    users, claims = await gate.inspect_users(row)
    rows = await store.pool.fetch(query("user_units"), [product_id])
    must = {row["user_id"]: row["units"] for row in rows if row["units"]}
    there = {user: units for user, units in users.items() if units}
    unlike = sorted(user for user in {*must, *there} if must.get(user) != there.get(user))
    if not unlike and not claims:
        return []
    user = (unlike or sorted(claims))[0]
    in_redis = f"{there.get(user, 0)} units, {claims.get(user, 0)} claimed"
    return [(product_id, f"user {user}: Redis: {in_redis}; Postgres: {must.get(user, 0)} units")]


def _difference(row: dict[str, Any], there: Any) -> str:
    return (
        f"Redis: on hand {there.on_hand}, reserved {there.reserved}, taken {there.taken} at version {there.version}; "
        f"Postgres: on hand {row['on_hand']}, reserved {row['reserved']} at version {row['version']}"
    )
