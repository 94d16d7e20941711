"""What a process counts, for Prometheus.  Names that the published service had mean what they meant there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from orderstream.sql.store import LineToDecide, Reserved

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

ORDERS_CREATED = Counter("orders_created_total", "Orders taken in")
ORDERS_RESERVED = Counter("orders_reserved_total", "Orders whose every line is held")
ORDERS_PAID = Counter("orders_paid_total", "Orders charged")
ORDERS_CONFIRMED = Counter("orders_confirmed_total", "Orders sold")
ORDERS_CANCELLED = Counter("orders_cancelled_total", "Orders that ended without a sale", ["reason"])
LINES_REFUSED = Counter("inventory_reservations_failed_total", "Lines refused", ["reason"])
RESERVE_LATENCY = Histogram("inventory_reserve_latency_seconds", "A batch through Redis and Postgres", buckets=_LATENCY)
PAYMENT_ATTEMPTS = Counter("payment_attempts_total", "Charges asked for, repeats included")
PAYMENT_SUCCESS = Counter("payment_success_total", "Charges made")
PAYMENT_FAILED = Counter("payment_failed_total", "Charges declined")
PAYMENT_UNKNOWN = Counter("payment_unknown_total", "Charges without a verdict, asked again")
PAYMENT_REFUNDS = Counter("payment_refunds_total", "Charges given back")
PAYMENT_LATENCY = Histogram("payment_processing_latency_seconds", "From asking to the verdict", buckets=_LATENCY)
PAYMENT_IN_FLIGHT = Gauge("payment_in_flight", "Charges under way")
DEAD_LETTERS = Counter("dead_letters_total", "Records that no stage can process", ["reason"])
SENT_ON = Counter("records_sent_on_total", "Records that stood in another partition than their key's owner's")
BATCH_SIZE = Histogram("batch_records", "Records of a batch", ["stage"], buckets=(1, 5, 25, 100, 250, 500, 1000, 2000))
BATCH_LATENCY = Histogram(
    "batch_latency_seconds", "A batch from its records to the hand-over", ["stage"], buckets=_LATENCY
)
RETRIES = Counter("engine_retries_total", "Tries that an engine did not answer", ["engine"])
REDIS_REBUILD = Histogram(
    "redis_rebuild_seconds", "Products read from Postgres and loaded into Redis, in one go", buckets=_LATENCY
)
REDIS_LOADED = Counter("redis_products_loaded_total", "Products loaded into Redis")
REDIS_FALLBACKS = Counter("redis_fallbacks_total", "Batches that Postgres decided alone, Redis being away")
HTTP_LATENCY = Histogram(
    "http_request_duration_seconds", "Requests answered", ["method", "path", "status"], buckets=_LATENCY
)
HTTP_REQUESTS = Counter("http_requests_total", "Requests answered", ["method", "path", "status"])


@contextmanager
def batch(stage: str, records: int) -> Iterator[None]:
    """Time a batch of a stage."""
    start = time.perf_counter()
    yield
    BATCH_SIZE.labels(stage).observe(records)
    BATCH_LATENCY.labels(stage).observe(time.perf_counter() - start)


def count_reserved(arrivals: Sequence[Any], lines: Sequence[LineToDecide], reserved: Reserved) -> None:
    """Count what a reserve batch decided for the first time."""
    fresh = sum(1 for known in reserved.order_known if not known)
    ORDERS_CREATED.inc(fresh)
    held = 0
    refused: dict[str, int] = {}
    cancelled: dict[str, int] = {}
    for line, verdict in zip(lines, reserved.lines, strict=True):
        if verdict.known or verdict.reason == "pending":
            continue
        alone = line.order_n > 0 and len(arrivals[line.order_n - 1].order.lines) == 1
        if verdict.reason is None:
            held += alone
        else:
            refused[verdict.reason] = refused.get(verdict.reason, 0) + 1
            if alone:
                cancelled[verdict.reason] = cancelled.get(verdict.reason, 0) + 1
    ORDERS_RESERVED.inc(held)
    for reason, lines_n in refused.items():
        LINES_REFUSED.labels(reason).inc(lines_n)
    for reason, orders_n in cancelled.items():
        ORDERS_CANCELLED.labels(reason).inc(orders_n)
