"""What a process counts, for Prometheus.  Names that the published service had mean the same here.

All of it is here, and nowhere else: ``docs/METRICS.md`` is made from this module (:func:`document`).  What is known only
on request (lag, open orders, counts) is set by :mod:`orderstream.http.exporter` at each scrape.  A process exports what it
counts (:func:`exported`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Metric, disable_created_metrics, generate_latest
from prometheus_client.registry import Collector

disable_created_metrics()  # type: ignore[no-untyped-call]  # no query asks when a series began, and they are as many again

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

ORDERS_CREATED = Counter("orders_created_total", "Orders taken in")
ORDERS_RESERVED = Counter("orders_reserved_total", "Orders whose every line is held")
ORDERS_PAID = Counter("orders_paid_total", "Orders charged")
ORDERS_CONFIRMED = Counter("orders_confirmed_total", "Orders sold")
ORDERS_CANCELLED = Counter("orders_cancelled_total", "Orders that ended without a sale", ["reason"])
ORDERS_REVOKED = Counter("orders_revoked_total", "Orders sold, and cancelled by their customer afterwards")
ORDERS_REPEATED = Counter("orders_repeated_total", "Records of orders that were taken in before")
ORDER_LATENCY = Histogram(
    "order_latency_seconds",
    "From an order's record to its status, of a sample: of all orders, or of some 200 a second",
    ["status"],
    buckets=_LATENCY,
)
ORDERS_REMOVED = Counter("orders_removed_total", "Orders that had ended long ago and were removed from Postgres")
LINES_REFUSED = Counter("inventory_reservations_failed_total", "Lines refused", ["reason"])
RESERVE_LATENCY = Histogram("inventory_reserve_latency_seconds", "A batch through Redis and Postgres", buckets=_LATENCY)
PAYMENT_ATTEMPTS = Counter("payment_attempts_total", "Charges asked for, repeats included")
PAYMENT_SUCCESS = Counter("payment_success_total", "Charges made")
PAYMENT_FAILED = Counter("payment_failed_total", "Charges declined")
PAYMENT_UNKNOWN = Counter("payment_unknown_total", "Charges, voids and refunds without an answer, asked again")
PAYMENT_REFUNDS = Counter("payment_refunds_total", "Charges refunded")
PAYMENT_VOIDS = Counter("payment_voids_total", "Unpaid orders of which the provider has said that no charge stands")
PAYMENT_VOIDS_DUE = Counter("payment_voids_due_total", "Orders that ended without it being known that no charge stands")
PAYMENT_UNWANTED = Counter(
    "payment_unwanted_total",
    "Of these, charged after they had ended (`late`), or with no charge that is theirs (`unclear`)",
    ["why"],
)
PAYMENT_REFUSED = Counter("payment_refused_total", "Refunds and voids that the provider refused for good")
PAYMENT_LATENCY = Histogram("payment_processing_latency_seconds", "From asking to the verdict", buckets=_LATENCY)
PAYMENT_IN_FLIGHT = Gauge("payment_in_flight", "Requests to the provider under way")
PAYMENTS_HELD = Gauge(
    "payments_held", "1 while the provider is left alone: it does not work, or refuses the token or the URL", ["why"]
)
DEAD_LETTERS = Counter("dead_letters_total", "Records that no stage can process", ["reason"])
SENT_ON = Counter("records_sent_on_total", "Records in another partition than their key's owner's")
CANCELS_KEPT = Counter("cancels_kept_total", "Cancels that came before their order")
FENCED = Counter("worker_fenced_total", "Transactions that wrote nothing, since another worker had claimed a partition")
BATCH_SIZE = Histogram(
    "batch_records",
    "Records of a batch, or what came in about orders in hand",
    ["stage"],
    buckets=(1, 5, 25, 100, 250, 500, 1000, 2000),
)
BATCH_LATENCY = Histogram(
    "batch_latency_seconds", "A batch from its records to the handover", ["stage"], buckets=_LATENCY
)
STEP_LATENCY = Histogram("stage_step_seconds", "A step of a batch", ["stage", "step"], buckets=_LATENCY)
LINES_HELD = Counter("lines_held_total", "Lines for which units are held")
RETRIES = Counter("engine_retries_total", "Calls that an engine did not answer", ["engine"])
ENGINE_UNAVAILABLE = Gauge(
    "engine_unavailable", "1 while this process waits for the engine or works without it, else 0", ["engine"]
)
REDIS_REBUILD = Histogram(
    "redis_rebuild_seconds", "Products read from Postgres and loaded into Redis, in one go", buckets=_LATENCY
)
REDIS_LOADED = Counter("redis_products_loaded_total", "Products loaded into Redis")
REDIS_FALLBACKS = Counter("redis_fallbacks_total", "Batches that Postgres decided alone, Redis being unavailable")
REDIS_EPOCHS = Counter(
    "redis_epochs_total", "Times that Redis was another one than before, the first included: what any knew is invalid"
)
REDIS_INVALID = Counter(
    "redis_invalid_total", "Answers of Redis that it knows nothing valid of a product, which is loaded then"
)
REDIS_GENERATIONS = Counter(
    "redis_generations_total", "Products given a new generation, because Redis missed a change of theirs"
)
SET_BACKS = Counter(
    "set_backs_total", "How often this worker found that Postgres was set back, or that offsets were moved"
)
ORDERS_FOLDED = Counter("orders_folded_total", "Orders brought forward from the topics after Postgres was set back")
RECORDS_LOST = Counter("records_lost_total", "Records that were removed from a topic before they were read", ["topic"])
ORDERS_GONE = Counter("orders_gone_total", "Records read again whose orders are gone: passed over")
EVENT_STREAMS = Gauge("http_event_streams", "Clients that follow an order")
HTTP_LATENCY = Histogram(
    "http_request_duration_seconds", "Requests answered", ["method", "path", "status"], buckets=_LATENCY
)
HTTP_REQUESTS = Counter("http_requests_total", "Requests answered", ["method", "path", "status"])
PRODUCE_LATENCY = Histogram("http_produce_seconds", "An order from the ingress into Kafka", buckets=_LATENCY)
HTTP_WAITING = Gauge("http_verdicts_awaited", "Requests that wait for the verdict on their order")
HTTP_CONNECTIONS = Gauge("http_connections", "Connections of clients")
HTTP_OVERLOADED = Counter(
    "http_overloaded_total",
    "Requests and connections refused, or closed, because there were too many already",
    ["what"],
)
POOL_WAIT = Histogram("postgres_pool_wait_seconds", "A request's wait for a connection to Postgres", buckets=_LATENCY)

LAG = Gauge("consumer_lag_records", "Records of a partition that are not committed", ["topic", "partition"])
OPEN_TRANSACTION = Gauge(
    "open_transaction_seconds",
    "For how long a foreign producer's open transaction has held back what stands behind it",
    ["topic", "partition"],
)
OWNED = Gauge("partitions_owned", "Partitions of the stages' topics that this worker has")
REBALANCES = Gauge("rebalances", "Rebalances since this worker started")
ORDERS_IN_HAND = Gauge("orders_in_hand", "Orders that this worker has in memory")
ORDERS_WAITING = Gauge("orders_waiting", "Orders of this worker that wait in Postgres")
PAYMENTS_REFUSED = Gauge(
    "payments_refused", "Orders whose money the provider does not give back, until people close them"
)
PAYMENTS_DUE = Gauge("payments_due", "Orders of this worker whose money is to be given back", ["ask"])
ORDERS_OPEN = Gauge("orders_open", "Orders of this worker that are not over", ["status"])
OLDEST_OPEN = Gauge("orders_open_oldest_seconds", "Age of the oldest open order of this worker; 0: none")
STOCK_UNITS = Gauge("stock_units", "Units of this worker's products, those with a change so far", ["state"])
RECONCILE_AT = Gauge("reconcile_last_run_timestamp_seconds", "When `orderstream reconcile` ran last; 0: never")
RECONCILE_RECORDS = Gauge("reconcile_records", "Records that the last run of reconcile read")
RECONCILE_SECONDS = Gauge("reconcile_seconds", "How long the last run of reconcile read and folded")
RECONCILE_DRIFT = Gauge("reconcile_drift", "Differences that the last run of reconcile found", ["kind"])
RECONCILE_UNREPAIRED = Gauge(
    "reconcile_drift_unrepaired",
    "Differences that the last run of reconcile left: `--repair --yes` did not repair them",
    ["kind"],
)
BUILD = Gauge("orderstream_build_info", "1, with the version and the role of the process", ["version", "role"])

_STEPS: dict[tuple[str, str], Histogram] = {}


class Steps:
    """Times the steps of one batch of a stage, one after the other, from its making on.

    Attributes:
        marks: ``(step, end in nanoseconds since the epoch)``; kept only where a trace made it a list.
    """

    __slots__ = ("_since", "marks", "stage")

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._since = time.perf_counter()
        self.marks: list[tuple[str, int]] | None = None

    def done(self, step: str) -> None:
        """Note that a step has ended; the next one begins."""
        now = time.perf_counter()
        histogram = _STEPS.get((self.stage, step))
        if histogram is None:
            histogram = _STEPS[self.stage, step] = STEP_LATENCY.labels(self.stage, step)
        histogram.observe(now - self._since)
        self._since = now
        if self.marks is not None:
            self.marks.append((step, time.time_ns()))


def batch_done(stage: str, records: int, began: float) -> None:
    """Note a batch of a stage that began at this time of ``time.perf_counter`` and is done."""
    BATCH_SIZE.labels(stage).observe(records)
    BATCH_LATENCY.labels(stage).observe(time.perf_counter() - began)


Role = Literal["worker", "ingress"]

_OF_BOTH = (ENGINE_UNAVAILABLE, HTTP_CONNECTIONS, HTTP_OVERLOADED, BUILD)
_OF_INGRESS = (EVENT_STREAMS, HTTP_LATENCY, HTTP_REQUESTS, PRODUCE_LATENCY, HTTP_WAITING, POOL_WAIT)

_Ours = Counter | Gauge | Histogram


def _counted_by(metric: _Ours) -> tuple[Role, ...]:
    if metric in _OF_BOTH:
        return ("worker", "ingress")
    return ("ingress",) if metric in _OF_INGRESS else ("worker",)


def _ours() -> dict[str, _Ours]:
    """Return every metric of this module, by the name of its family."""
    found = {id(value): value for value in globals().values() if isinstance(value, (Counter, Gauge, Histogram))}
    return {family.name: metric for metric in found.values() for family in metric.collect()}


class _Exported(Collector):
    """What a process of a role counts, and what its libraries do."""

    def __init__(self, role: Role) -> None:
        self._others = {name for name, metric in _ours().items() if role not in _counted_by(metric)}

    def collect(self) -> Iterator[Metric]:
        return (family for family in REGISTRY.collect() if family.name not in self._others)


_EXPORTED: dict[Role, _Exported] = {"worker": _Exported("worker"), "ingress": _Exported("ingress")}


def exported(role: Role) -> bytes:
    """Return what a process of a role has counted, in Prometheus' text format."""
    return generate_latest(_EXPORTED[role])


def document() -> str:
    """Return the table of ``docs/METRICS.md``: name, type, who counts it, labels, meaning, of every metric, by name."""
    kinds = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}
    rows = []
    for name, metric in _ours().items():
        full = f"{name}_total" if isinstance(metric, Counter) else name
        labels, (family,) = ", ".join(f"`{label}`" for label in metric._labelnames), metric.collect()
        who = " ".join(_counted_by(metric))
        rows.append(f"| `{full}` | {kinds[type(metric)]} | {who} | {labels} | {family.documentation} |")
    return "\n".join(["| name | type | of | labels | meaning |", "|---|---|---|---|---|", *sorted(rows)])
