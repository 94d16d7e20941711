"""A worker's figures about itself: sampled once a second in the background, for its pages.

Nothing here waits for an engine while a page is answered, and the stages ask nothing of it: a page that is slow or wrong
holds no order up.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from typing import Any

import structlog
from aiokafka.errors import KafkaError
from faust.exceptions import ConsumerNotStarted
from faust.types import TP
from prometheus_client import Counter, Histogram

from orderstream import __version__, metrics
from orderstream.http.exporter import open_orders
from orderstream.http.health import Engine, check
from orderstream.http.stats.shelf import NOTE_S, Shelf
from orderstream.http.stats.window import INTERVAL_S, RECENT_S, WINDOW_S, History, cached
from orderstream.sample import Sample
from orderstream.settings import public
from orderstream.streams.topics import ORDERS

log = structlog.get_logger("pages")

ENGINES_S = 5.0
"""How often the engines are asked whether they answer."""

STOCK_ROWS_MAX = 50
"""Products that the summary lists, those with the most movements first; any other has a page of its own."""

SCAN_S, SCAN_SHARE = 1.0, 0.01
"""The tables are scanned once a second at most, and for no more than a hundredth of the time."""

MEAN_ROWS = 5
"""The rates of the summary are means over so many rows of the history, one a second."""

STEPS = ("created", "reserved", "paid", "confirmed")
STAGES = ("reserve", "pay", "commit")


def total(counter: Counter) -> float:
    """Return the value of a counter, over all its labels."""
    return sum(by_label(counter).values())


def by_label(counter: Counter) -> dict[str, float]:
    """Return the value of a counter by its label, those that are 0 left out; by the empty text when it has none."""
    (family,) = counter.collect()
    return {
        next(iter(sample.labels.values()), ""): sample.value
        for sample in family.samples
        if sample.name.endswith("_total") and (sample.value or not sample.labels)
    }


def sums(histogram: Histogram) -> dict[str, tuple[float, float]]:
    """Return count and sum of a histogram by its label."""
    (family,) = histogram.collect()
    found: dict[str, tuple[float, float]] = {}
    for sample in family.samples:
        label = next((value for name, value in sample.labels.items() if name != "le"), "")
        count, amount = found.get(label, (0.0, 0.0))
        if sample.name.endswith("_count"):
            count = sample.value
        elif sample.name.endswith("_sum"):
            amount = sample.value
        found[label] = count, amount
    return found


class Figures:
    """The figures of one worker.

    Args:
        app: the worker's; its engines and tables are read.
        shelf: notes what products give, in the background.
    """

    def __init__(self, app: Any, shelf: Shelf) -> None:
        self._app, self._shelf = app, shelf
        self._stage = app.stage
        self._settings = app.stage.settings
        self.started_at = time.time()
        self.history = History(
            (*STEPS, "cancelled"), ("lag", "p50", "p95", "p99", *(f"busy_{stage}" for stage in STAGES))
        )
        self.sample: Sample = app.stage.sample
        stage, settings = self._stage, self._settings
        self.engines = (
            Engine("kafka", settings.kafka, stage.producer.check),
            Engine("redis", public(settings.redis_url), stage.gate.client.ping, is_needed=False),
            Engine("postgres", public(settings.database_url), lambda: stage.store.pool.fetchval("SELECT 1")),
        )
        self.health: dict[str, Any] = {}
        self._stages: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
        self._stock = cached(self._scan_stock, time.perf_counter, SCAN_S, SCAN_SHARE)
        self._open = cached(lambda: open_orders(app).status, time.perf_counter, SCAN_S, SCAN_SHARE)

    # In the background

    async def run(self) -> None:
        """Sample, for ever.  A fault here is logged; it never ends the worker."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._again(INTERVAL_S, self._tick))
            group.create_task(self._again(ENGINES_S, self._check_engines))
            group.create_task(self._again(NOTE_S, self._shelf.note))

    async def _again(self, interval_s: float, work: Any) -> None:
        due = time.monotonic()
        failed = False
        while True:
            try:
                await work()
                failed = False
            except Exception:  # whatever it is: the orders continue
                if not failed:
                    log.exception("a figure of the pages could not be taken", what=work.__name__)
                failed = True
            due = max(due + interval_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())

    async def _tick(self) -> None:
        now = time.time()
        self.sample.tick(now)
        counted = self._counted()
        recent = self.sample.time_to_end(now, RECENT_S)
        lag = sum(row["lag"] or 0 for row in self.own_partitions() or ())
        self._note_stages(now)
        busy = {f"busy_{stage}": self._stages[stage].get("busy") for stage in STAGES}
        self.history.add(
            now,
            {
                **{name: counted[name] for name in STEPS},
                "cancelled": sum(counted["cancelled"].values()) + counted["revoked"],
            },
            {"lag": lag, "p50": recent["p50"], "p95": recent["p95"], "p99": recent["p99"], **busy},
        )

    async def _check_engines(self) -> None:
        found = dict(await asyncio.gather(*(check(engine) for engine in self.engines)))
        self.health = {name: {**state, "at": round(time.time(), 3)} for name, state in found.items()}

    def _counted(self) -> dict[str, Any]:
        return {
            "created": total(metrics.ORDERS_CREATED),
            "reserved": total(metrics.ORDERS_RESERVED),
            "paid": total(metrics.ORDERS_PAID),
            "confirmed": total(metrics.ORDERS_CONFIRMED),
            "cancelled": by_label(metrics.ORDERS_CANCELLED),
            "revoked": total(metrics.ORDERS_REVOKED),
        }

    def _note_stages(self, now: float) -> None:
        sizes, times = sums(metrics.BATCH_SIZE), sums(metrics.BATCH_LATENCY)
        for stage in STAGES:
            batches, records = sizes.get(stage, (0.0, 0.0))
            seconds = times.get(stage, (0.0, 0.0))[1]
            before = self._stages[stage]
            elapsed = now - before.get("at", now)
            self._stages[stage] = {
                "at": now,
                "batches": batches,
                "records": records,
                "seconds": seconds,
                "records_per_s": round((records - before.get("records", 0)) / elapsed, 1) if elapsed > 0 else 0.0,
                "busy": round(min(1.0, (seconds - before.get("seconds", 0)) / elapsed), 3) if elapsed > 0 else 0.0,
            }

    # For the pages

    @property
    def state(self) -> str:
        """What the worker is doing: starting, leaving, rebalancing, recovering, waiting, running."""
        app = self._app
        if app.in_hand.leaving:
            return "leaving"
        own = self.own_partitions()
        if own is None:
            return "starting"
        if app.rebalancing:
            return "rebalancing"
        if app.tables.recovery.in_recovery:
            return "recovering"
        return "running" if own else "waiting"

    @property
    def unavailable(self) -> frozenset[str]:
        """Engines that a stage waits for or works without."""
        stage = self._stage
        return frozenset({*stage.unavailable, *(["redis"] if stage.gate.is_unavailable else [])})

    def own_partitions(self) -> list[dict[str, Any]] | None:
        """Return what this worker owns and how far it is, by partition; None while it has no consumer yet."""
        app = self._app
        consumer = app.made_consumer
        if consumer is None:
            return None
        try:
            assigned = sorted(consumer.assignment())
        except ConsumerNotStarted:
            return None
        rows, own = [], str(app.conf.canonical_url)
        for tp in assigned:
            if tp.topic in app.tables.changelog_topics:
                continue
            try:
                end = consumer.highwater(tp)
            except (KafkaError, AssertionError, KeyError):  # revoked a moment ago
                end = None
            committed = consumer.committed_offset(tp)
            rows.append(
                {
                    "topic": self.name(tp),
                    "partition": tp.partition,
                    "owner": own,
                    "end": end,
                    "done": consumer.done_offset(tp),
                    "committed": committed,
                    "lag": None if end is None else max(0, end - (committed or 0)),
                }
            )
        return rows

    def name(self, tp: TP) -> str:
        """Return a topic's name as in the docs."""
        return str(tp.topic.removeprefix(self._settings.topic_prefix))

    def owned(self) -> set[int]:
        """Return the partitions of this worker: of their orders and of their products it decides."""
        return {row["partition"] for row in self.own_partitions() or () if row["topic"] == ORDERS.name}

    def _scan_stock(self) -> dict[str, Any]:
        owned = self.owned()
        entries = [(key, row) for key, partition, row in self._app.views.stock.entries() if partition in owned]
        busiest = heapq.nlargest(STOCK_ROWS_MAX, entries, key=lambda entry: entry[1]["version"])
        return {
            "products": len(entries),
            "sold_out": sum(row["available"] == 0 for _, row in entries),
            **{name: sum(row[name] for _, row in entries) for name in ("available", "reserved", "sold")},
            "busiest": [{"product_id": key, **row} for key, row in busiest],
        }

    def summary(self, since: float | None = None) -> dict[str, Any] | None:
        """Return all of it; None while the worker starts.

        Args:
            since: with the rows of the history that are newer, in seconds since the epoch.
        """
        app = self._app
        partitions = self.own_partitions()
        if partitions is None:
            return None
        now = time.time()
        found = {
            "version": __version__,
            "worker": str(app.conf.canonical_url),
            "state": self.state,
            "now": round(now, 3),
            "started_at": round(self.started_at, 3),
            "owned": len(partitions),
            "lag": sum(row["lag"] or 0 for row in partitions),
            "orders": self._counted(),
            "rates": self.history.mean(MEAN_ROWS),
            "time_to_end": self.sample.time_to_end(now, WINDOW_S),
            "stages": {
                name: {figure: value for figure, value in row.items() if figure != "at"}
                for name, row in self._stages.items()
            },
            "open": self._open(),
            "charges_in_flight": len(app.till),
            "dead_letters": by_label(metrics.DEAD_LETTERS),
            "sent_on": total(metrics.SENT_ON),
            "engines": self.health,
            "unavailable": sorted(self.unavailable),
            "stock": self._stock(),
            "partitions": partitions,
        }
        if since is not None:
            found["history"] = {
                "interval_s": INTERVAL_S,
                "columns": self.history.columns,
                "rows": self.history.since(since),
            }
        return found
