"""The series of a process, and the metrics that are known only at the moment of a scrape.

A series with few labels is born at 0 when its process starts, so that its first step counts in a rate too.  A worker's lag
comes from what its consumer knows of its partitions anyway, its open orders and counts from its memory and its tables: no
question to Kafka or Redis.  What the last ``orderstream reconcile`` found, and whose money the provider does not give back,
stands in Postgres, which is asked at most once in :data:`RECONCILE_PAUSE_S`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import asyncpg
import orjson
from prometheus_client import Counter as Counted
from prometheus_client import Gauge

from orderstream import __version__, metrics
from orderstream.http.problems import OVERLOADED
from orderstream.settings import Settings
from orderstream.sql.differences import Kind
from orderstream.sql.store import TRANSIENT, Store, query
from orderstream.streams.dead_letters import REASONS
from orderstream.streams.orders import Reason, Status
from orderstream.streams.topics import ORDER_COMMANDS, ORDER_LINES, ORDERS, RESERVATIONS, STOCK_COMMANDS

RECONCILE_PAUSE_S = 10.0
"""How old the figures may be that Postgres is asked for."""

ASK_S = 1.0
"""Longest wait for Postgres at a scrape; after that the figures stay as they were."""

ENGINES = ("kafka", "postgres", "redis")


_BORN: Mapping[Counted | Gauge, Iterable[str]] = {
    metrics.DEAD_LETTERS: REASONS,
    metrics.HTTP_OVERLOADED: OVERLOADED,
    metrics.LINES_REFUSED: (Reason.UNKNOWN_PRODUCT, Reason.INSUFFICIENT_STOCK, Reason.USER_LIMIT),
    metrics.ORDERS_CANCELLED: Reason,
    metrics.PAYMENTS_HELD: ("misconfigured", "unavailable"),
    metrics.PAYMENT_UNWANTED: ("late", "unclear"),
    metrics.RECORDS_LOST: [spec.name for spec in (ORDERS, ORDER_LINES, RESERVATIONS, ORDER_COMMANDS, STOCK_COMMANDS)],
    metrics.RETRIES: ENGINES,
}
"""The labels of metrics that have few of them."""


def begin(role: metrics.Role) -> None:
    """Give this process its series."""
    metrics.BUILD.labels(__version__, role).set(1)
    for metric, labels in _BORN.items():
        for label in labels:
            metric.labels(label)


class Exporter:
    """Answers the scrapes of a worker.

    Args:
        store: asked for the last reconcile run, and refusals.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._asked_at = float("-inf")
        begin("worker")

    async def scrape(self) -> bytes:
        """Return all metrics of this process in Prometheus' text format."""
        await self._read_reconcile()
        return metrics.exported("worker")

    async def _read_reconcile(self) -> None:
        if time.monotonic() - self._asked_at < RECONCILE_PAUSE_S:
            return
        self._asked_at = time.monotonic()
        try:
            async with asyncio.timeout(ASK_S):
                last = await self._store.pool.fetchrow(query("last_reconcile"))
                metrics.PAYMENTS_REFUSED.set(await self._store.pool.fetchval(query("refusals_open")))
        except (*TRANSIENT, asyncpg.UndefinedTableError):
            return  # the stages, or the ingress, log that Postgres does not answer
        if last is not None:
            metrics.RECONCILE_AT.set(last["at"])
            metrics.RECONCILE_RECORDS.set(last["records"])
            metrics.RECONCILE_SECONDS.set(last["seconds"])
        for gauge, column in ((metrics.RECONCILE_DRIFT, "drift"), (metrics.RECONCILE_UNREPAIRED, "unrepaired")):
            found = orjson.loads(last[column]) if last is not None else {}
            for kind in Kind:
                gauge.labels(kind).set(found.get(kind, 0))


def note_unavailable(unavailable: set[str]) -> None:
    """Set which engines are unavailable."""
    for engine in ENGINES:
        metrics.ENGINE_UNAVAILABLE.labels(engine).set(engine in unavailable)


class Open(NamedTuple):
    """The orders of a worker that are not over: in hand, or waiting in Postgres.

    Attributes:
        status: how many by status.
        due: how many by what is due of their payment.
        waiting: how many of them wait in Postgres.
        oldest: when the oldest was taken in, in seconds since the epoch; None without any.
    """

    status: Mapping[str, int]
    due: Mapping[str, int]
    waiting: int
    oldest: float | None


def open_orders(app: Any) -> Open:
    """Count the orders of a worker that are not over."""
    in_hand = app.desk.entries
    found = [(one.order.status, one.order.payment, one.order.created_at.timestamp()) for one in in_hand.values()]
    waiting = 0
    for order_id, _, value in app.views.open_orders.entries():
        waiting += 1
        if order_id not in in_hand:
            found.append((value["status"], value["payment"], value["since"]))
    statuses = Counter(str(status) for status, _, _ in found)
    due = Counter(str(payment) for _, payment, _ in found)
    return Open(statuses, due, waiting, min((since for _, _, since in found), default=None))


def note_worker(app: Any, settings: Settings) -> None:
    """Set what a worker's app knows at this moment."""
    note_unavailable({*app.stage.unavailable, *(["redis"] if app.stage.gate.is_unavailable else [])})
    metrics.REBALANCES.set(app.rebalancing_count)
    consumer, owned = app.consumer, 0
    metrics.LAG.clear()
    for tp in consumer.assignment():
        if tp.topic in app.tables.changelog_topics:
            continue
        owned += 1
        lag = consumer.lag(tp)
        if lag is not None:
            metrics.LAG.labels(tp.topic.removeprefix(settings.topic_prefix), tp.partition).set(lag)
    metrics.OWNED.set(owned)
    found = open_orders(app)
    for status in (Status.CREATED, Status.RESERVED, Status.PAID, Status.CANCELLED):
        metrics.ORDERS_OPEN.labels(status).set(found.status.get(status, 0))
    for ask, payment in (("refund", "REFUND_DUE"), ("void", "VOID_DUE")):
        metrics.PAYMENTS_DUE.labels(ask).set(found.due.get(payment, 0))
    metrics.OLDEST_OPEN.set(0 if found.oldest is None else max(0.0, time.time() - found.oldest))
    metrics.ORDERS_IN_HAND.set(len(app.desk.entries))
    metrics.ORDERS_WAITING.set(found.waiting)
    units = Counter[str]()
    for _, _, value in app.views.stock.entries():
        for state in ("available", "reserved", "sold"):
            units[state] += value[state]
    for state in ("available", "reserved", "sold"):
        metrics.STOCK_UNITS.labels(state).set(units[state])
