"""The kinds of drift that ``orderstream reconcile`` finds, as the table ``reconcile_runs`` counts them for each run."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """What a difference is about; in the order in which differences are repaired."""

    ORDER_UNKNOWN = "order.unknown"
    ORDER_MISSING = "order.missing"
    ORDER_STATUS = "order.status"
    ORDER_RECORD = "order.record"
    ORDER_LINES = "order.lines"
    PAYMENT = "payment"
    ORDER_HOLDS = "order.holds"
    ORDER_EVENT_MISSING = "order.event_missing"
    ORDER_STUCK = "order.stuck"
    STOCK_LEDGER = "stock.ledger"
    STOCK_COUNTS = "stock.counts"
    STOCK_USERS = "stock.users"
    STOCK_CATALOGUE = "stock.catalogue"
    STOCK_OWED = "stock.owed"
    REDIS_COUNTS = "redis.counts"
