"""What the routes answer: JSON, and of an order its location, its verdict, its problems and all that is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web
from pydantic import BaseModel

from orderstream.errors import EngineUnavailable
from orderstream.http.history import history
from orderstream.http.problems import Problem, engine_unavailable, refused
from orderstream.http.replies import Verdict
from orderstream.settings import Settings
from orderstream.streams.events import REJECTED
from orderstream.streams.orders import Limits, Order, Status
from orderstream.streams.topics import ORDERS

PATH = "/api/v1/orders"


def json_answer(
    body: BaseModel | Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return an answer in JSON; times in UTC."""
    document = body.model_dump() if isinstance(body, BaseModel) else body
    return web.Response(
        status=status,
        body=orjson.dumps(document, option=orjson.OPT_UTC_Z),
        content_type="application/json",
        headers=headers,
    )


def location(order_id: str) -> str:
    """Return where an order can be read."""
    return f"{PATH}/{order_id}"


def verdict_answer(order_id: str, verdict: Verdict | None, *, applied: bool) -> web.Response:
    """Return the answer to a POST.

    Args:
        order_id: the order.
        verdict: None when it is not known yet.
        applied: the client preferred not to wait.

    Raises:
        Problem: 409, the order was refused.
    """
    if verdict is not None and verdict.reason is not None:
        raise refused(order_id, verdict.reason, location(order_id))
    headers = {"Location": location(order_id)}
    if verdict is None and applied:
        headers["Preference-Applied"] = "respond-async"
    status = Status.CREATED if verdict is None else Status.RESERVED
    return json_answer({"order_id": order_id, "status": status}, 202 if verdict is None else 201, headers)


def unknown(order_id: str, *, was_removed: bool = False) -> Problem:
    """Make the problem of an order that Postgres does not know, or of which it knows that it was removed."""
    detail = "No stage has taken in an order under this id. One that was accepted a moment ago may be on its way."
    if was_removed:
        detail = "The order ended long ago and was removed. Nothing can be done about it here any more."
    return Problem("order-not-found", detail, order_id=order_id)


def rejected(order_id: str, rejection: Mapping[str, Any], settings: Settings) -> Problem:
    """Make the problem of an order that no stage can read.

    Args:
        order_id: the order.
        rejection: a row of the query ``rejection``.
        settings: of the pipeline.
    """
    record = {"topic": settings.topic(ORDERS.name), "partition": rejection["partition"], "offset": rejection["offset"]}
    members = {"order_status": REJECTED, "reason": rejection["reason"], "at": rejection["rejected_at"]}
    return Problem("order-rejected", rejection["detail"], order_id=order_id, record=record, **members)


def reused(order: Order) -> Problem:
    """Make the problem of an id or a key that belongs to another order."""
    what = "this user's idempotency_key" if order.idempotency_key is not None else "this order_id"
    detail = f"Another order with other lines, user or payment method has {what}. Take a new one for a new order."
    return Problem("idempotency-key-reused", detail, order_id=order.order_id)


def removed(order: Order) -> Problem:
    """Make the problem of an id or a key of an order that was removed."""
    what = "this user's idempotency_key" if order.idempotency_key is not None else "this order_id"
    detail = f"An order that ended long ago had {what}, and was removed. Take a new one for a new order."
    return Problem("order-removed", detail, order_id=order.order_id)


def unproduced(order: Order, error: EngineUnavailable) -> Problem:
    """Make the problem of an order that Kafka did not confirm."""
    how = "the same idempotency_key" if order.idempotency_key is not None else "this order_id in the body"
    detail = f"Whether the order was taken in is not known. Send it again with {how}: it can't count twice."
    return engine_unavailable(error, detail, order_id=order.order_id)


def too_large(size: int, limits: Limits) -> Problem:
    """Make the problem of an order whose record would be too large."""
    return Problem("too-large", f"The order makes a record of {size} bytes, at most {limits.size_bytes}.")


def order_document(order: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return an order as clients read it.

    Args:
        order: a row of the query ``order``, with its ``lines``.
        settings: of the pipeline.

    Returns:
        ``order``, ``items``, ``payment`` (None while nothing is known of the money) and ``history`` (oldest first).
        Money in cents, times in UTC.
    """
    order_id = order["order_id"]
    steps = history(order, settings)
    payment = None
    if order["payment_status"] is not None:
        payment = {
            "status": order["payment_status"],
            "amount_cents": order["amount_cents"],
            "charge_id": order["charge_id"],
            "created_at": order["charged_at"],
            "refunded_at": order["refunded_at"],
            **{name: order[name] for name in ("refused_at", "retried_at", "closed_at", "closed_why")},
        }
    return {
        "order": {
            "id": order_id,
            "user_id": order["user_id"],
            "total_amount": order["total_cents"],
            "status": order["status"],
            "reason": order["reason"],
            "idempotency_key": order["idempotency_key"],
            "payment_method": order["payment_method"],
            "placed_at": order["placed_at"],
            "created_at": order["created_at"],
            "updated_at": steps[-1]["at"],
        },
        "items": [
            {
                "id": n,
                "order_id": order_id,
                "product_id": line["product_id"],
                "quantity": line["quantity"],
                "unit_price": line["unit_price_cents"],
                "state": line["state"],
                "reason": line["reason"],
            }
            for n, line in enumerate(order["lines"], 1)
        ],
        "payment": payment,
        "history": steps,
    }
