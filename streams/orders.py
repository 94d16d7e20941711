"""An order as strangers write it: decoding, checking, naming it.

The border of the pipeline.  What passes here is sound: every stage behind relies on it.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

import msgspec
import orjson
import uuid_utils
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
)

from orderstream.errors import InvalidRecord

ID_CHARS_MAX = 64
KEY_CHARS_MAX = 200
INTEGER_END = 2**63
"""No whole number gets this large: Python refuses to print one of 4,300 digits, so not even a refusal could name it."""
ORDER_NAMESPACE = uuid.UUID("6f1b2c1e-2f52-5d2b-9a55-5d0e5a0c9a11")
KEYED = "8"
"""The version (RFC 9562) of ids that follow from a key.  An order without one may not have it: nobody takes another's id."""
_VERSION_AT = 14
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_NAMESPACE = uuid_utils.UUID(int=ORDER_NAMESPACE.int)


class Status(StrEnum):
    """The life of an order, as records, rows, answers and pages name it."""

    CREATED = "CREATED"
    RESERVED = "RESERVED"
    PAID = "PAID"
    CONFIRMED = "CONFIRMED"
    CANCELLED = "CANCELLED"


TERMINAL = frozenset({Status.CONFIRMED, Status.CANCELLED})


class Reason(StrEnum):
    """Why an order was cancelled.  When several hold, the first of this list is reported."""

    UNKNOWN_PRODUCT = "unknown_product"
    INSUFFICIENT_STOCK = "insufficient_stock"
    USER_LIMIT = "user_limit"
    PAYMENT_DECLINED = "payment_declined"
    EXPIRED = "expired"
    CANCELLED_BY_USER = "cancelled_by_user"


def _text(value: str | int) -> str:
    text = str(value)
    if not text or text != text.strip():
        raise ValueError("must not be empty, nor begin or end with white space")
    if not text.isprintable():
        raise ValueError("must not hold control characters")
    return text


def _rfc3339(value: object) -> object:
    if not isinstance(value, str) or not re.match(r"\d{4}-\d\d-\d\d[Tt ]", value):
        raise ValueError("must be a time as RFC 3339 writes it, like 2025-01-31T12:00:00Z")
    return value


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie in the years 1 to 9999, in UTC") from None


TEXT = r"^[^\x00-\x20\x7f-\xa0\xad]([^\x00-\x1f\x7f-\xa0\xad]*[^\x00-\x20\x7f-\xa0\xad])?$"
"""What `_text` asks for, as a pattern for documents: exact for Latin-1."""

_TOLD: Any = {"minLength": 1, "pattern": TEXT}

Id = Annotated[
    Annotated[StrictStr, Field(max_length=ID_CHARS_MAX, json_schema_extra=_TOLD)]
    | Annotated[StrictInt, Field(ge=0, lt=INTEGER_END)],
    AfterValidator(_text),
]
"""An id: text of 1 to 64 printable characters, or a whole number, kept as text."""
Key = Annotated[
    StrictStr, Field(min_length=1, max_length=KEY_CHARS_MAX, json_schema_extra=_TOLD), AfterValidator(_text)
]
PaymentMethod = Annotated[
    StrictStr, Field(min_length=1, max_length=ID_CHARS_MAX, json_schema_extra=_TOLD), AfterValidator(_text)
]
Time = Annotated[AwareDatetime, BeforeValidator(_rfc3339), AfterValidator(_in_utc)]
"""A time with its offset from UTC, as RFC 3339 writes it; kept in UTC."""


_INTEGER_MAX = INTEGER_END - 1
_PlainId = (
    Annotated[str, msgspec.Meta(min_length=1, max_length=ID_CHARS_MAX)]
    | Annotated[int, msgspec.Meta(ge=0, le=_INTEGER_MAX)]
)
_PlainQuantity = Annotated[int, msgspec.Meta(ge=1, le=_INTEGER_MAX)]
_UNREMARKABLE = bytes(set(range(0x21, 0x7F)) - set(b"\\:"))
"""Printable ASCII that has no meaning beyond itself, wherever in an order it stands."""
_HEX = bytes(ord("0") if byte in b"0123456789abcdef" else byte for byte in range(256))
_UUID_SHAPE = b"00000000-0000-0000-0000-000000000000"
_DIGITS = bytes(ord("0") if byte in b"0123456789" else byte for byte in range(256))
_TIME_SHAPES = frozenset(
    b"0000-00-00T00:00:00" + fraction + offset
    for fraction in (b"", b".000", b".000000")
    for offset in (b"Z", b"+00:00", b"-00:00")
)
"""Times as JSON encoders write them, all digits made zeros."""


class OrderLine(BaseModel):
    """So many units of one product, as the customer asked for them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    product_id: Id
    quantity: Annotated[StrictInt, Field(ge=1, lt=INTEGER_END)]


class OrderRecord(BaseModel):
    """The JSON value of a record on ``orders``, and the body of a POST."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [{"user_id": 7, "items": [{"product_id": 1, "quantity": 2}], "payment_method": "card"}]
        },
    )

    order_id: uuid.UUID | None = None
    user_id: Id
    items: Annotated[list[OrderLine], Field(min_length=1)]
    payment_method: PaymentMethod
    idempotency_key: Key | None = None
    placed_at: Time | None = None


class Limits(NamedTuple):
    """The bounds of an order (settings ``order_lines_max``, ``line_quantity_max``, ``order_bytes_max``)."""

    lines: int
    quantity: int
    size_bytes: int


class Order(NamedTuple):
    """An order that passed the border.

    ``lines`` holds each product once, in the order in which the customer named them; its first product places the record.
    """

    order_id: str
    user_id: str
    lines: tuple[tuple[str, int], ...]
    payment_method: str
    idempotency_key: str | None
    placed_at: datetime | None


def new_order_id() -> str:
    """Return an id for an order that has neither id nor key: a UUIDv7 (RFC 9562), which begins with its time.

    Orders of one moment are side by side in every index of Postgres that begins with the order's id, so a batch touches
    few of its pages however many orders there are; random ids touch another page each.
    """
    return str(uuid_utils.uuid7())


def order_id_for_key(user_id: str, idempotency_key: str) -> str:
    """Return the id of the order that this user meant by this key; the same each time."""
    named = str(uuid_utils.uuid5(_NAMESPACE, f"key\0{user_id}\0{idempotency_key}"))
    return f"{named[:_VERSION_AT]}{KEYED}{named[_VERSION_AT + 1 :]}"


def order_id_for_source(topic: str, partition: int, offset: int, timestamp: int) -> str:
    """Return the id of an order that brought none: derived from place and time of its record, the same at each reading.

    A topic that was made anew has other records at the same places, and these have other times.

    Args:
        topic, partition, offset: its place.
        timestamp: its time, in milliseconds since the epoch.
    """
    return str(uuid_utils.uuid5(_NAMESPACE, f"source\0{topic}\0{partition}\0{offset}\0{timestamp}"))


def merge_lines(lines: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Add up the lines of the same product, keeping the place where each product was named first."""
    merged: dict[str, int] = {}
    for product_id, quantity in lines:
        merged[product_id] = merged.get(product_id, 0) + quantity
    return tuple(merged.items())


def describe(error: ValidationError) -> str:
    """Return every fault of a record in one line: where, what is wrong."""
    faults = []
    for fault in error.errors(include_url=False, include_context=False, include_input=False)[:10]:
        where = ".".join(str(part) for part in fault["loc"] if not str(part).startswith(("function-", "constrained-")))
        faults.append(f"{where or 'record'}: {fault['msg'].removeprefix('Value error, ')}")
    return "; ".join(faults)


def refuse_repeated_names(value: bytes, members: int) -> None:
    """Refuse JSON in which an object names a member twice: readers disagree about which of the two counts.

    Args:
        value: well-formed JSON.
        members: how many members the reader took from all its objects; when the text has no more colons than that, it
            hides none, which costs nothing to see.

    Raises:
        ValueError: with the name.
    """
    if value.count(b":") == members or len(re.findall(rb'"\s*:', value)) == members:
        return

    def once(pairs: list[tuple[str, object]]) -> None:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name}: named more than once in one object")

    json.loads(value, object_pairs_hook=once)


def check(record: OrderRecord, limits: Limits, *, fallback_id: Any = None) -> Order:
    """Turn a well-formed record into an order, or say what is wrong with it.

    Args:
        record: as decoded.
        limits: bounds of an order.
        fallback_id: called without arguments for the id of an order that has neither an id nor a key.

    Raises:
        InvalidRecord: ``invalid_order``.
    """
    items = record.items
    if len(items) == 1:
        lines: tuple[tuple[str, int], ...] = ((str(items[0].product_id), items[0].quantity),)
    else:
        lines = merge_lines((str(item.product_id), item.quantity) for item in items)
        if len(lines) > limits.lines:
            raise InvalidRecord("invalid_order", f"items: {len(lines)} products, at most {limits.lines} in one order")
    for product_id, quantity in lines:
        if quantity > limits.quantity:
            raise InvalidRecord(
                "invalid_order", f"items: {quantity} units of product {product_id!r}, at most {limits.quantity}"
            )
    user_id = str(record.user_id)
    order_id = str(record.order_id) if record.order_id is not None else None
    if record.idempotency_key is not None:
        derived = order_id_for_key(user_id, record.idempotency_key)
        if order_id is not None and order_id != derived:
            raise InvalidRecord(
                "invalid_order",
                f"order_id: {order_id} is not the id of this user's idempotency_key, {derived}; leave it out",
            )
        order_id = derived
    elif order_id is not None and order_id[_VERSION_AT] == KEYED:
        raise InvalidRecord(
            "invalid_order",
            f"order_id: {order_id} is of version {KEYED}, as ids that follow from an idempotency_key are: give the key too,"
            " or take an id of another version",
        )
    if order_id is None:
        order_id = fallback_id()
    return Order(order_id, user_id, lines, record.payment_method, record.idempotency_key, record.placed_at)


class _PlainLine(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    product_id: _PlainId
    quantity: _PlainQuantity


class _PlainRecord(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    user_id: _PlainId
    items: Annotated[list[_PlainLine], msgspec.Meta(min_length=1)]
    payment_method: Annotated[str, msgspec.Meta(min_length=1, max_length=ID_CHARS_MAX)]
    order_id: str | None = None
    idempotency_key: Annotated[str, msgspec.Meta(min_length=1, max_length=KEY_CHARS_MAX)] | None = None
    placed_at: str | None = None


_PLAIN = msgspec.json.Decoder(_PlainRecord)


def decode_plain(value: bytes, limits: Limits, *source: Any) -> Order | None:
    """Decode an order that is surely sound, in a fraction of the time that the models take.

    It takes what is written in printable ASCII without escapes, without nulls, its id and time in their usual forms.  What
    it takes is the order that :func:`decode_strictly` returns; a test holds them to that.

    Returns:
        The order, or None: then the models decide, and say what is wrong.
    """
    odd = value.translate(None, _UNREMARKABLE)
    if odd.strip(b": "):
        return None
    try:
        record = _PLAIN.decode(value)
    except msgspec.DecodeError:
        return None
    items, order_id, key, placed_at = record.items, record.order_id, record.idempotency_key, None
    members = 3 + 2 * len(items) + (order_id is not None) + (key is not None) + (record.placed_at is not None)
    if len(odd) != members and not _sound_texts(record, odd.count(b":") - members):
        return None
    if len(items) == 1:
        line = items[0]
        if line.quantity > limits.quantity:
            return None
        lines: tuple[tuple[str, int], ...] = ((str(line.product_id), line.quantity),)
    else:
        lines = merge_lines([(str(line.product_id), line.quantity) for line in items])
        if len(lines) > limits.lines or max(quantity for _, quantity in lines) > limits.quantity:
            return None
    if order_id is not None and order_id.encode().translate(_HEX) != _UUID_SHAPE:
        return None
    if record.placed_at is not None and (placed_at := _plain_time(record.placed_at)) is None:
        return None
    user_id = str(record.user_id)
    if key is not None:
        derived = order_id_for_key(user_id, key)
        if order_id is not None and order_id != derived:
            return None
        order_id = derived
    elif order_id is None:
        order_id = order_id_for_source(*source)
    elif order_id[_VERSION_AT] == KEYED:
        return None
    return Order(order_id, user_id, lines, record.payment_method, key, placed_at)


def _sound_texts(record: _PlainRecord, colons: int) -> bool:
    """Tell whether no text begins or ends with a space, and whether the texts account for so many colons.

    Colons in excess are those of members that are null, or that an object names a second time.
    """
    ids: list[str | int | None] = [record.user_id, record.payment_method, record.idempotency_key]
    ids += [line.product_id for line in record.items]
    texts = [text for text in ids if isinstance(text, str)]
    if any(text[0] == " " or text[-1] == " " for text in texts):
        return False
    texts += [text for text in (record.order_id, record.placed_at) if text is not None]
    return sum(text.count(":") for text in texts) == colons


def _plain_time(text: str) -> datetime | None:
    """Return the time, in UTC, or None when it is written in an unusual form, or is none."""
    # Python takes offsets of 99 minutes, and its next versions an hour 24.
    if text.encode().translate(_DIGITS) not in _TIME_SHAPES or text[11:13] == "24" or text[-3:] >= ":60":
        return None
    try:
        at = datetime.fromisoformat(text)
        return at if at.tzinfo is UTC else at.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def decode(value: bytes | None, limits: Limits, *, topic: str, partition: int, offset: int, timestamp: int) -> Order:
    """Decode the value of a record on ``orders``.

    Raises:
        InvalidRecord: ``too_large``, ``empty``, ``not_json`` or ``invalid_order``, with every fault.
    """
    if not value:
        raise InvalidRecord("empty", "the record has no value")
    if len(value) > limits.size_bytes:
        raise InvalidRecord("too_large", f"{len(value)} bytes, at most {limits.size_bytes}")
    source = (topic, partition, offset, timestamp)
    order = decode_plain(value, limits, *source)
    return order if order is not None else decode_strictly(value, limits, *source)


def decode_record(record: Any, limits: Limits) -> Order:
    """Decode a record on ``orders``; see :func:`decode`."""
    topic, partition, offset, timestamp = record.topic, record.partition, record.offset, record.timestamp
    return decode(record.value, limits, topic=topic, partition=partition, offset=offset, timestamp=timestamp)


def decode_strictly(value: bytes, limits: Limits, *source: Any) -> Order:
    """Decode by the models, which name every fault.

    Raises:
        InvalidRecord: ``not_json`` or ``invalid_order``.
    """
    try:
        record = OrderRecord.model_validate_json(value)
    except ValidationError as error:
        kind = "not_json" if error.errors()[0]["type"] == "json_invalid" else "invalid_order"
        raise InvalidRecord(kind, describe(error)) from None
    try:
        refuse_repeated_names(value, len(record.model_fields_set) + 2 * len(record.items))
    except ValueError as error:
        raise InvalidRecord("invalid_order", str(error)) from None
    return check(record, limits, fallback_id=lambda: order_id_for_source(*source))


def named(value: bytes | None) -> str | None:
    """Return the order id that a record on ``orders`` names, which is no order; None where it can't be read.

    An id of version 8 is left to the user whose key it follows from.
    """

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if [name for name, _ in pairs].count("order_id") > 1:
            raise ValueError("order_id: given more than once")
        return dict(pairs)

    try:
        body = json.loads((value or b"").decode(), object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None
    found = body.get("order_id") if isinstance(body, dict) else None
    if not isinstance(found, str) or not _UUID.fullmatch(found):
        return None
    order_id = found.lower()
    if order_id[_VERSION_AT] == KEYED:
        user_id, key = str(body.get("user_id")), body.get("idempotency_key")
        if not (isinstance(key, str) and user_id.isprintable() and key.isprintable()):
            return None
        return order_id if order_id == order_id_for_key(user_id, key) else None
    return order_id


def encode(order: Order) -> bytes:
    """Return the value of a record on ``orders`` that is this order, with its id."""
    body: dict[str, Any] = {
        "order_id": order.order_id,
        "user_id": order.user_id,
        "items": [{"product_id": product_id, "quantity": quantity} for product_id, quantity in order.lines],
        "payment_method": order.payment_method,
    }
    if order.idempotency_key is not None:
        body["idempotency_key"] = order.idempotency_key
    if order.placed_at is not None:
        body["placed_at"] = order.placed_at
    return orjson.dumps(body)


def same(one: Order, other: Order) -> bool:
    """Tell whether two records are the same order: who, what, how paid."""
    return (one.user_id, one.payment_method, sorted(one.lines)) == (
        other.user_id,
        other.payment_method,
        sorted(other.lines),
    )
