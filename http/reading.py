"""What a request brings: bodies, queries, keys, cursors, each checked whole before anything is done."""

from __future__ import annotations

import base64
import binascii
import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ValidationError

from orderstream.http.orders import FAULTS_MAX, header_key, read_body
from orderstream.http.problems import Problem
from orderstream.streams.orders import describe, refuse_repeated_names

T = TypeVar("T", bound=BaseModel)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
END = (datetime(9999, 1, 1, tzinfo=UTC), str(uuid.UUID(int=2**128 - 1)))
"""The place behind all others: pages that run backwards begin here."""

PRODUCT_BYTES_MAX = 4 * 1024
"""Largest body of a request about a product: far more than a name and a reason need."""


def refuse(kind: str, error: ValidationError) -> Problem:
    """Make the problem of what a model refuses."""
    faults = [
        {"field": ".".join(map(str, fault["loc"])), "message": fault["msg"].removeprefix("Value error, ")}
        for fault in error.errors(include_url=False, include_context=False, include_input=False)[:FAULTS_MAX]
    ]
    return Problem(kind, describe(error), faults=faults)


async def body_of(request: web.Request, model: type[T]) -> T:
    """Return the body of a request.

    Raises:
        Problem: ``not-json``, ``invalid-request``, and those of :func:`~orderstream.http.orders.read_body`.
    """
    body = await read_body(request)
    if len(body) > PRODUCT_BYTES_MAX:
        raise Problem("too-large", f"The body has {len(body)} bytes, at most {PRODUCT_BYTES_MAX}.")
    try:
        found = model.model_validate_json(body)
        refuse_repeated_names(body, len(found.model_fields_set))
    except ValidationError as error:
        raise refuse("not-json" if error.errors()[0]["type"] == "json_invalid" else "invalid-request", error) from None
    except ValueError as error:
        raise Problem("invalid-request", str(error)) from None
    return found


def query_of(request: web.Request, model: type[T]) -> T:
    """Return the query of a request.

    Raises:
        Problem: ``invalid-request``.
    """
    query: dict[str, Any] = {}
    for name, value in request.query.items():
        if name in query:
            raise Problem("invalid-request", f"{name}: given more than once")
        query[name] = value
    try:
        return model.model_validate_strings(query)
    except ValidationError as error:
        raise refuse("invalid-request", error) from None


def required_key(request: web.Request) -> str:
    """Return the key of the header ``Idempotency-Key``.

    Raises:
        Problem: ``idempotency-key-missing``, ``invalid-request``.
    """
    try:
        key = header_key(request)
    except ValueError as error:
        raise Problem("invalid-request", str(error)) from None
    if key is None:
        detail = "Send an Idempotency-Key, a new one for each new change: repeated with it, the request counts once."
        raise Problem("idempotency-key-missing", detail)
    return key


def cursor(*place: str | int) -> str:
    """Return the cursor of a place: base64url of a JSON list; clients need not know."""
    return base64.urlsafe_b64encode(orjson.dumps(place)).decode().rstrip("=")


def place(text: str, *kinds: type) -> list[Any]:
    """Return the place that a cursor names.

    Raises:
        Problem: ``invalid-request``, it is none of ours.
    """
    try:
        found = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or [type(part) for part in found] != list(kinds):
        raise Problem("invalid-request", "cursor: not one that this API gave out; leave it out for the first page")
    return found


def moment_cursor(at: datetime, name: str) -> str:
    """Return the cursor of an entry of a list that is sorted by time, then id."""
    return cursor((at - EPOCH) // timedelta(microseconds=1), name)


def moment_place(text: str | None) -> tuple[datetime, str]:
    """Return the place of such a cursor; :data:`END` without one.

    Raises:
        Problem: ``invalid-request``.
    """
    if text is None:
        return END
    microseconds, name = place(text, int, str)
    try:
        return EPOCH + timedelta(microseconds=microseconds), str(uuid.UUID(name))
    except (OverflowError, ValueError):
        raise Problem(
            "invalid-request", "cursor: not one that this API gave out; leave it out for the first page"
        ) from None


def told(model: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Return an answer."""
    return web.Response(
        status=status,
        body=orjson.dumps(model.model_dump(), option=orjson.OPT_UTC_Z),
        content_type="application/json",
        headers=headers,
    )
