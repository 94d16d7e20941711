"""What a request brings: ids, bodies, queries, keys, cursors.  Each is checked whole before anything is done."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import orjson
from aiohttp import hdrs, web
from pydantic import BaseModel, TypeAdapter, ValidationError

from orderstream.errors import InvalidRecord
from orderstream.http.problems import Problem
from orderstream.streams.orders import (
    Key,
    Limits,
    Order,
    OrderRecord,
    check,
    describe,
    merge_lines,
    new_order_id,
    order_id_for_key,
    refuse_repeated_names,
)

BODY_S = 10.0
"""Longest wait for a request's body."""

PRODUCT_BYTES_MAX = 4 * 1024
"""Largest body of a request about a product: far more than a name and a reason need."""

FAULTS_MAX = 100
"""Faults of one body that are listed; a body can hold thousands."""

WHOLE_DIGITS_MAX = 19
"""Of a whole number that is written with a fraction; greater ones are out of every range."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

END = (datetime(9999, 1, 1, tzinfo=UTC), str(uuid.UUID(int=2**128 - 1)))
"""The place behind all others: pages that run backwards begin here."""

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_JSON = re.compile(r"application/([a-z0-9!#$&^_.-]+\+)?json", re.IGNORECASE)
_KEY: TypeAdapter[str] = TypeAdapter(Key)

T = TypeVar("T", bound=BaseModel)


def path_id(request: web.Request) -> str:
    """Return the order id in the path of a request, in lower case.

    Raises:
        Problem: ``invalid-order-id``.
    """
    order_id = request.match_info["id"]
    if not _ID.fullmatch(order_id):
        raise Problem("invalid-order-id", "An order id is a UUID like 0f8fad5b-d9cb-469f-a165-70867728950e.")
    return order_id.lower()


def refuse_no_utf8(raw: str, what: str) -> None:
    """Refuse a part of a URL that stands for other bytes than UTF-8: who decodes it leniently makes another text of it.

    Raises:
        Problem: ``invalid-request``.
    """
    try:
        unquote_to_bytes(raw).decode()
    except UnicodeError:
        raise Problem("invalid-request", f"{what}: the percent-encoded bytes are no UTF-8") from None


# Bodies


async def read_body(request: web.Request, bytes_max: int | None = None) -> bytes:
    """Return the body of a request; of so many bytes at most, by default those of any body.

    Raises:
        Problem: its headers say that it is no JSON, or encoded; it is too large or too slow, or does not come whole.
    """
    coding = ", ".join(request.headers.getall(hdrs.CONTENT_ENCODING, ["identity"]))
    if coding.lower() != "identity":
        detail = f"The Content-Encoding is {coding[:100]}; send the body as it is."
        raise Problem("unsupported-media-type", detail, headers={hdrs.ACCEPT_ENCODING: "identity"})
    charset = (request.charset or "utf-8").lower()
    if not _JSON.fullmatch(request.content_type) or charset not in {"utf-8", "utf8", "us-ascii"}:
        given = request.headers.get("Content-Type", "none")
        raise Problem(
            "unsupported-media-type",
            f"The Content-Type is {given}; send application/json in UTF-8.",
            headers={"Accept": "application/json"},
        )
    most, told = bytes_max or request.client_max_size, request.content_length or 0
    if told > most:  # before any of it has come
        raise Problem("too-large", f"The body has {told} bytes, at most {most}.")
    try:
        async with asyncio.timeout(BODY_S):
            body = await request.read()
    except TimeoutError:
        raise Problem("request-timeout", f"The body did not come within {BODY_S:g} s.") from None
    except (ConnectionError, web.RequestPayloadError) as error:  # whoever hung up does not read the answer
        raise Problem("incomplete-body", "The body ends early, or breaks the rules of its transfer coding.") from error
    if len(body) > most:
        raise Problem("too-large", f"The body has {len(body)} bytes, at most {most}.")
    return body


def parse_order(request: web.Request, body: bytes, limits: Limits) -> tuple[Order, bool, bool]:
    """Return the order that a request brings, under the same rules as a record on ``orders``.

    Returns:
        The order; whether its client chose its id, by an ``order_id`` or a key, so that it may be a repeat; and whether by
        the header ``Idempotency-Key``.

    Raises:
        Problem: ``not-json`` or ``invalid-order``, with every fault.
    """
    record = _validated(OrderRecord, body, "invalid-order")
    keyed = False
    try:
        refuse_repeated_names(body, len(record.model_fields_set) + 2 * len(record.items))
        if record.idempotency_key is None and (key := header_key(request)) is not None:
            if record.order_id is not None and str(record.order_id) != order_id_for_key(str(record.user_id), key):
                detail = (
                    f"order_id: {record.order_id} is not the id of the order with this key; leave one of the two out"
                )
                raise Problem("idempotency-key-reused", detail, order_id=str(record.order_id))
            record = record.model_copy(update={"idempotency_key": key})
            keyed = True
        if max(item.quantity for item in record.items) <= limits.quantity:  # 422: no schema says what lines add up to
            lines = merge_lines((str(item.product_id), item.quantity) for item in record.items)
            if any(quantity > limits.quantity for _, quantity in lines):
                detail = f"items: the lines of a product add up to more than {limits.quantity} units"
                raise Problem("too-many-units", detail)
        order = check(record, limits, fallback_id=new_order_id)
    except ValueError as error:
        raise Problem("invalid-order", str(error)) from None
    except InvalidRecord as error:
        raise Problem("invalid-order", error.detail) from None
    return order, record.idempotency_key is not None or record.order_id is not None, keyed


async def body_of(request: web.Request, model: type[T]) -> T:
    """Return the body of a request about a product.

    Raises:
        Problem: ``not-json``, ``invalid-request``, and those of :func:`read_body`.
    """
    body = await read_body(request, PRODUCT_BYTES_MAX)
    found = _validated(model, body, "invalid-request")
    try:
        refuse_repeated_names(body, len(found.model_fields_set))
    except ValueError as error:
        raise Problem("invalid-request", str(error)) from None
    return found


def _validated(model: type[T], body: bytes, kind: str) -> T:
    """Return what a model makes of a body.

    2.0 is a whole number in JSON Schema, and so it is here; records on the topics have to write 2.

    Raises:
        Problem: ``not-json``, or of this kind, with every fault.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error
    try:
        whole = json.loads(body.decode(), parse_float=_number, parse_constant=_no_number)
        return model.model_validate_json(orjson.dumps(whole))
    except (ValueError, TypeError, RecursionError):  # TypeError: orjson's; pydantic's is a ValueError
        raise _refused(kind, first) from None


def _number(text: str) -> int | float:
    """Return a number; one that is written with a fraction and has none as a whole one."""
    exact = Decimal(text)
    return int(exact) if exact.adjusted() < WHOLE_DIGITS_MAX and exact == exact.to_integral_value() else float(text)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def query_of(request: web.Request, model: type[T]) -> T:
    """Return the query of a request.

    Raises:
        Problem: ``invalid-request``.
    """
    refuse_no_utf8(request.rel_url.raw_query_string, "query")
    query: dict[str, Any] = {}
    for name, value in request.query.items():
        if name in query:
            raise Problem("invalid-request", f"{name}: given more than once")
        query[name] = value
    try:
        return model.model_validate_strings(query)
    except ValidationError as error:
        raise _refused("invalid-request", error) from None


def _refused(kind: str, error: ValidationError) -> Problem:
    """Make the problem of what a model refuses: ``not-json`` instead of ``kind`` where it can't be parsed."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    if found[0]["type"] == "json_invalid":
        kind = "not-json"
    faults = [
        {"field": ".".join(map(str, fault["loc"])), "message": fault["msg"].removeprefix("Value error, ")}
        for fault in found[:FAULTS_MAX]
    ]
    return Problem(kind, describe(error), faults=faults)


# Headers


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


def header_key(request: web.Request) -> str | None:
    """Return the key of the header ``Idempotency-Key``, or None; the quotes that RFC 8941 puts around it are no part of it.

    Raises:
        ValueError: it is no key.
    """
    keys = request.headers.getall("Idempotency-Key", [])
    if not keys:
        return None
    if len(keys) > 1:
        raise ValueError("header Idempotency-Key: given more than once")
    quoted = re.fullmatch(r'"([^"\\]*)"', keys[0])
    try:
        return _KEY.validate_python(quoted[1] if quoted else keys[0])
    except ValidationError as error:
        raise ValueError(f"header Idempotency-Key: {describe(error).removeprefix('record: ')}") from None


def prefers_async(request: web.Request) -> bool:
    """Return whether the client does not want to wait (``Prefer: respond-async``, RFC 7240)."""
    preferences = ",".join(request.headers.getall("Prefer", [])).split(",")
    return any(preference.partition(";")[0].strip().lower() == "respond-async" for preference in preferences)


# Cursors


def moment_cursor(at: datetime, name: str) -> str:
    """Return the cursor of an entry of a list that is sorted by time, then id: microseconds since the epoch, and the id."""
    return f"{(at - EPOCH) // timedelta(microseconds=1)}_{name}"


def moment_place(cursor: str | None) -> tuple[datetime, str]:
    """Return the place of such a cursor, of the shape :data:`~orderstream.http.models.MOMENT`; :data:`END` without one."""
    if cursor is None:
        return END
    microseconds, _, name = cursor.partition("_")
    return EPOCH + timedelta(microseconds=int(microseconds)), name
