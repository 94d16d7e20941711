"""What became of an order, in the past tense (topic ``order-events``, keyed by order id, one event a record).

An order has each status at most once, so ``(order_id, status)`` names an event: a reader drops a repeated one by it.
Events of one order are in causal order, since each stage publishes its events before it hands the order over.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import orjson

from orderstream.streams.orders import Status

VERSION = 1


def _encode(body: dict[str, object]) -> bytes:
    return orjson.dumps(body)


def created(order_id: str, at: datetime, user_id: str, lines: Sequence[tuple[str, int]]) -> bytes:
    """Encode CREATED: the order was taken in; nothing is held yet."""
    return _encode(
        {
            "v": VERSION,
            "order_id": order_id,
            "status": Status.CREATED,
            "at": at,
            "user_id": user_id,
            "items": [{"product_id": product_id, "quantity": quantity} for product_id, quantity in lines],
        }
    )


def reserved(order_id: str, at: datetime, total_cents: int) -> bytes:
    """Encode RESERVED: every line is held, at these prices."""
    return _encode(
        {"v": VERSION, "order_id": order_id, "status": Status.RESERVED, "at": at, "total_cents": total_cents}
    )


def paid(order_id: str, at: datetime | None, total_cents: int, charge_id: str) -> bytes:
    """Encode PAID: the provider took the total."""
    return _encode(
        {
            "v": VERSION,
            "order_id": order_id,
            "status": Status.PAID,
            "at": at,
            "total_cents": total_cents,
            "charge_id": charge_id,
        }
    )


def confirmed(order_id: str, at: datetime) -> bytes:
    """Encode CONFIRMED: every line is sold."""
    return _encode({"v": VERSION, "order_id": order_id, "status": Status.CONFIRMED, "at": at})


def cancelled(order_id: str, at: datetime | None, reason: str) -> bytes:
    """Encode CANCELLED, with the machine-readable reason."""
    return _encode({"v": VERSION, "order_id": order_id, "status": Status.CANCELLED, "at": at, "reason": reason})
