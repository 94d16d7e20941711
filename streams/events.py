"""What became of an order, in the past tense (topic ``order-events``, keyed by order id, one event a record).

An order has each status at most once, so ``(order_id, status)`` names an event: a reader drops a repeated one by it.
Events of one order are in causal order, since each stage publishes its events before it hands the order over.

REJECTED is about a record on ``orders`` that names an order id, and that no stage can read, or whose order was removed.  It
says nothing of an order: one that was, or is, or comes under this id has events of its own, and only where there are none
REJECTED counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache

import orjson

from orderstream.streams.orders import Status

VERSION = 1
REJECTED = "REJECTED"
"""No status of an order."""


_json: Callable[[object], bytes] = orjson.dumps
"""Writes a value: alone, it is what it is as a member."""
_time = lru_cache(maxsize=256)(orjson.dumps)
"""Writes a time: all orders of a transaction have the same."""


def _template(status: str, *more: str) -> bytes:
    """Return the event with a place for the order's id, for the time, and for each member more."""
    members = "".join(f',"{name}":%b' for name in more)
    return f'{{"v":{VERSION},"order_id":%b,"status":"{status}","at":%b{members}}}'.encode()


_CREATED = _template(Status.CREATED, "user_id", "items")
_CREATED_ONE_LINE = _CREATED.removesuffix(b"%b}") + b'[{"product_id":%b,"quantity":%b}]}'
_RESERVED = _template(Status.RESERVED, "total_cents")
_RESERVED_LINES = _template(Status.RESERVED, "total_cents", "prices_cents")
_PAID = _template(Status.PAID, "total_cents", "charge_id")
_CONFIRMED = _template(Status.CONFIRMED)
_CANCELLED = _template(Status.CANCELLED, "reason")
_REJECTED = _template(REJECTED, "reason", "detail", "record")


def created(order_id: str, at: datetime, user_id: str, lines: Sequence[tuple[str, int]]) -> bytes:
    """Encode CREATED: the order was taken in; nothing is held yet."""
    if len(lines) == 1:
        product_id, quantity = lines[0]
        return _CREATED_ONE_LINE % (_json(order_id), _time(at), _json(user_id), _json(product_id), _json(quantity))
    items = [{"product_id": product_id, "quantity": quantity} for product_id, quantity in lines]
    return _CREATED % (_json(order_id), _time(at), _json(user_id), _json(items))


def reserved(order_id: str, at: datetime, total_cents: int, prices: Sequence[int | None] = ()) -> bytes:
    """Encode RESERVED: every line is held, at these prices; of one line the total says it, and they are not told."""
    if len(prices) > 1 and None not in prices:
        return _RESERVED_LINES % (_json(order_id), _time(at), _json(total_cents), _json(prices))
    return _RESERVED % (_json(order_id), _time(at), _json(total_cents))


def paid(order_id: str, at: datetime | None, total_cents: int, charge_id: str) -> bytes:
    """Encode PAID: the provider took the total."""
    return _PAID % (_json(order_id), _time(at), _json(total_cents), _json(charge_id))


def confirmed(order_id: str, at: datetime) -> bytes:
    """Encode CONFIRMED: every line is sold."""
    return _CONFIRMED % (_json(order_id), _time(at))


def cancelled(order_id: str, at: datetime | None, reason: str) -> bytes:
    """Encode CANCELLED, with the machine-readable reason."""
    return _CANCELLED % (_json(order_id), _time(at), _json(reason))


def rejected(order_id: str, at: datetime, reason: str, detail: str, record: Mapping[str, object]) -> bytes:
    """Encode REJECTED: the record on ``orders`` that names this id is a dead letter, for this reason."""
    return _REJECTED % (_json(order_id), _time(at), _json(reason), _json(detail), _json(record))
