"""``POST /api/v1/orders`` and ``GET /api/v1/orders/{id}``."""

from __future__ import annotations

import asyncio
import uuid
from datetime import datetime
from typing import Any

import asyncpg
import orjson
from aiohttp import web
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from pydantic import ValidationError

from orderstream.agents.reserve import REPLY_TO
from orderstream.errors import InvalidRecord
from orderstream.http.problems import Problem
from orderstream.http.replies import Answer, Replies
from orderstream.produce import body_of
from orderstream.settings import Settings
from orderstream.sql.store import TRANSIENT, Store
from orderstream.streams.orders import KEY_CHARS_MAX, Limits, Order, OrderRecord, check, describe
from orderstream.streams.partitions import product_partition
from orderstream.streams.topics import ORDERS

RETRY_AFTER_S = 2
SEND_TIMEOUT_S = 5.0
"""Longest wait for Kafka's acknowledgement before a client is told to come again."""

IDEMPOTENCY_KEY = "Idempotency-Key"


class Orders:
    """The two handlers, and what they share."""

    def __init__(self, settings: Settings, producer: AIOKafkaProducer, replies: Replies, store: Store) -> None:
        self._settings = settings
        self._limits = Limits(settings.order_lines_max, settings.line_quantity_max, settings.order_bytes_max)
        self._producer = producer
        self._replies = replies
        self._store = store

    async def post(self, request: web.Request) -> web.Response:
        """Take an order in: 201 held, 409 refused, 202 not decided yet."""
        order = self._decode(request, await self._body(request))
        location = {"Location": f"/api/v1/orders/{order.order_id}"}
        if "respond-async" in request.headers.get("Prefer", "").lower().replace(" ", "").split(","):
            await self._send(order, None)
            return accepted(order, location | {"Preference-Applied": "respond-async"})
        with self._replies.expect(order.order_id) as verdict:
            await self._send(order, self._replies.name if self._replies.listening else None)
            try:
                answer: Answer | None = await asyncio.wait_for(verdict, self._settings.verdict_timeout_s)
            except TimeoutError:
                answer = await self._ask(order)
        if answer is None:
            return accepted(order, location)
        if answer.status == "CANCELLED":
            raise Problem(
                409,
                str(answer.reason).replace("_", "-"),
                f"the order was refused: {answer.reason}",
                order_id=order.order_id,
                order_status=answer.status,
                reason=answer.reason,
            )
        return json(201, {"order_id": order.order_id, "status": "RESERVED"}, location)

    async def get(self, request: web.Request) -> web.Response:
        """Tell where an order stands."""
        order_id = request.match_info["order_id"]
        try:
            known = str(uuid.UUID(order_id))
        except ValueError:
            raise Problem(400, "invalid-order-id", f"{order_id[:80]!r} is no order id: expected a UUID") from None
        try:
            row = await self._store.order(known)
        except TRANSIENT as error:
            raise away("Postgres") from error
        if row is None:
            raise Problem(
                404, "order-not-found", f"no order {known}; one that was accepted a moment ago may not be taken in yet"
            )
        return json(200, shape(row))

    async def _body(self, request: web.Request) -> bytes:
        if request.content_type not in ("application/json", "application/octet-stream"):
            raise Problem(415, "unsupported-media-type", f"{request.content_type}: expected application/json")
        limit = self._limits.size_bytes
        if (request.content_length or 0) > limit:
            raise Problem(413, "too-large", f"{request.content_length} bytes, at most {limit}")
        body = await request.content.read(limit + 1)
        while not request.content.at_eof() and len(body) <= limit:
            body += await request.content.read(limit + 1 - len(body))
        if len(body) > limit:
            raise Problem(413, "too-large", f"more than {limit} bytes")
        return body

    def _decode(self, request: web.Request, body: bytes) -> Order:
        try:
            record = OrderRecord.model_validate_json(body)
            key = request.headers.get(IDEMPOTENCY_KEY)
            if key is not None and record.idempotency_key is None:  # the body's wins
                key = key.strip().strip('"')
                if not 0 < len(key) <= KEY_CHARS_MAX or not key.isprintable():
                    raise Problem(400, "invalid-order", f"{IDEMPOTENCY_KEY}: expected 1 to {KEY_CHARS_MAX} characters")
                record = record.model_copy(update={"idempotency_key": key})
            return check(record, self._limits, fallback_id=lambda: str(uuid.uuid4()))
        except ValidationError as error:
            faults = [
                {"field": ".".join(str(part) for part in fault["loc"]), "message": fault["msg"]}
                for fault in error.errors(include_url=False, include_context=False, include_input=False)
            ]
            kind = "not-json" if error.errors()[0]["type"] == "json_invalid" else "invalid-order"
            raise Problem(400, kind, describe(error), faults=faults) from None
        except InvalidRecord as error:
            raise Problem(400, "invalid-order", error.detail) from None

    async def _send(self, order: Order, reply_to: str | None) -> None:
        product_id = order.lines[0][0]
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._producer.send_and_wait(
                    self._settings.topic(ORDERS.name),
                    body_of(order),
                    key=product_id.encode(),
                    partition=product_partition(product_id, self._settings.partitions),
                    headers=[(REPLY_TO, reply_to.encode())] if reply_to else [],
                )
        except (KafkaError, TimeoutError) as error:
            raise away("Kafka", order_id=order.order_id) from error

    async def _ask(self, order: Order) -> Answer | None:
        """Ask Postgres at the end of the wait: the verdict may be there, or the id may be another order's."""
        try:
            row = await self._store.order(order.order_id)
        except (*TRANSIENT, asyncpg.PostgresError):
            return None  # 202 says so: not known yet
        if row is None:
            return None
        lines = sorted((line["product_id"], line["quantity"]) for line in row["lines"])
        if (row["user_id"], row["payment_method"], lines) != (order.user_id, order.payment_method, sorted(order.lines)):
            raise Problem(
                422,
                "idempotency-key-reused",
                "this id, or this user's key, belongs to another order",
                order_id=order.order_id,
            )
        if row["status"] == "CREATED":
            return None
        if row["status"] == "CANCELLED" and row["reserved_at"] is None:
            return Answer("CANCELLED", row["reason"])
        return Answer("RESERVED", None)


def away(engine: str, **more: Any) -> Problem:
    """Return the problem of an engine that does not answer; the same order may be sent again under its key or id."""
    return Problem(
        503,
        "engine-away",
        f"{engine} does not answer; send the same order again, with its id or idempotency key",
        {"Retry-After": str(RETRY_AFTER_S)},
        engine=engine,
        **more,
    )


def json(status: int, body: Any, headers: dict[str, str] | None = None) -> web.Response:
    """Answer JSON."""
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json", headers=headers)


def accepted(order: Order, headers: dict[str, str]) -> web.Response:
    """Answer that an order is on the topic, and not decided."""
    return json(202, {"order_id": order.order_id, "status": "CREATED"}, headers)


def shape(row: dict[str, Any]) -> dict[str, Any]:
    """Return an order as clients read it: order, items, payment, history.  Amounts in cents, times in UTC."""
    moments: list[tuple[str, datetime | None]] = [
        ("CREATED", row["created_at"]),
        ("RESERVED", row["reserved_at"]),
        ("PAID", row["paid_at"]),
        ("CONFIRMED", row["confirmed_at"]),
        ("CANCELLED", row["cancelled_at"]),
    ]
    history: list[dict[str, Any]] = [{"status": status, "at": at} for status, at in moments if at is not None]
    if row["reason"] is not None:
        history[-1]["reason"] = row["reason"]
    payment = None
    if row["payment_status"] is not None:
        payment = {
            "status": row["payment_status"],
            "amount_cents": row["amount_cents"],
            "charge_id": row["charge_id"],
            "charged_at": row["charged_at"],
            "refunded_at": row["refunded_at"],
        }
    return {
        "order": {
            "id": row["order_id"],
            "user_id": row["user_id"],
            "status": row["status"],
            "reason": row["reason"],
            "total_amount": row["total_cents"],
            "payment_method": row["payment_method"],
            "idempotency_key": row["idempotency_key"],
            "placed_at": row["placed_at"],
            "created_at": row["created_at"],
            "updated_at": history[-1]["at"],
        },
        "items": [
            {
                "order_id": row["order_id"],
                "product_id": line["product_id"],
                "quantity": line["quantity"],
                "unit_price": line["unit_price_cents"],
                "state": line["state"],
                "reason": line["reason"],
            }
            for line in row["lines"]
        ],
        "payment": payment,
        "history": history,
    }
