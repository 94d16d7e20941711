"""What the HTTP API takes and answers, as models: they check what comes in, and the OpenAPI document is made from them."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from orderstream.streams.commands import (
    QUANTITY_MAX,
    REASON_CHARS_MAX,
    SHAPE,
    LimitPerUser,
    Name,
    PriceCents,
    printable,
)
from orderstream.streams.orders import ID_CHARS_MAX, KEY_CHARS_MAX, Reason, Status

PAGE_DEFAULT, PAGE_MAX = 50, 500
MOMENT = r"^[0-9]{1,17}_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
"""The place of an entry in a list by time; any of this shape is one."""

Why = Annotated[StrictStr, Field(max_length=REASON_CHARS_MAX, json_schema_extra=SHAPE), AfterValidator(printable)]
UserId = Annotated[StrictStr, Field(max_length=ID_CHARS_MAX, json_schema_extra=SHAPE), AfterValidator(printable)]
Cursor = Annotated[str, Field(pattern=MOMENT)]
Limit = Annotated[int, Field(ge=1, le=PAGE_MAX)]


class Asked(BaseModel):
    """What a client sends; a member that is not listed is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Answered(BaseModel):
    """What a client is answered."""

    model_config = ConfigDict(frozen=True)


# Examples

ORDER, COMMAND = "e48c57ea-17bb-86f0-a715-391b2273cd47", "bb0adcd1-f6d7-5a14-b27e-e9fa786af028"
NOON = "2025-01-31T12:00:00.100000Z"
_RECORD = {"topic": "orders", "partition": 7, "offset": 1041}
_HEAD: dict[str, Any] = {
    **{"id": ORDER, "user_id": "7", "total_amount": 259_800, "status": "RESERVED", "reason": None},
    **{
        "idempotency_key": "cart-17",
        "payment_method": "card",
        "placed_at": None,
        "created_at": NOON,
        "updated_at": NOON,
    },
}
_ITEM: dict[str, Any] = {
    **{"id": 1, "order_id": ORDER, "product_id": "1", "quantity": 2, "unit_price": 129_900},
    **{"state": "held", "reason": None},
}
_HISTORY: Any = [
    {"status": status, "at": NOON, "reason": None, "record": _RECORD} for status in ("CREATED", "RESERVED")
]
_PRODUCT: dict[str, Any] = {
    **{"product_id": "cup", "name": "Tea cup", "price_cents": 300, "available": 30, "reserved": 0, "sold": 0},
    **{"limit_per_user": 4, "retired": False},
}
_ENTRY: dict[str, Any] = {
    **{"movement": "receive", "quantity": 30, "reason": None, "actor": "ann", "at": NOON, "source_id": COMMAND},
}


# Orders


class Nothing(Asked):
    """A body that asks for nothing."""


class OrdersQuery(Asked):
    """Which orders, and which page of them."""

    user_id: Annotated[UserId | None, Field(description="only orders of this customer")] = None
    status: Annotated[Status | None, Field(description="only orders in this status")] = None
    cursor: Annotated[Cursor | None, Field(description="`next` of the page before; without it, the first page")] = None
    limit: Annotated[Limit, Field(description="orders of a page at most")] = PAGE_DEFAULT


class Placed(Answered):
    """An order that was taken in; RESERVED: every unit is held for it, CREATED: its verdict is not known yet."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"order_id": ORDER, "status": "RESERVED"}]})

    order_id: uuid.UUID
    status: Literal[Status.RESERVED, Status.CREATED]


class OrderHead(Answered):
    """An order without its lines.  Money in cents, times in UTC."""

    id: uuid.UUID
    user_id: str
    total_amount: Annotated[
        int | None, Field(description="cents; null before its stock is held, and if it was refused")
    ]
    status: Status
    reason: Annotated[Reason | None, Field(description="why it was cancelled")]
    idempotency_key: Annotated[str | None, Field(max_length=KEY_CHARS_MAX)]
    payment_method: str
    placed_at: datetime | None
    created_at: datetime
    updated_at: Annotated[datetime, Field(description="when its status changed last")]


class Item(Answered):
    """A line of an order."""

    id: Annotated[int, Field(description="counts the lines of the order from 1")]
    order_id: uuid.UUID
    product_id: str
    quantity: int
    unit_price: Annotated[int | None, Field(description="cents, as in the catalogue when the line was held")]
    state: Literal["pending", "held", "refused", "committed", "released", "returned"]
    reason: Reason | None


class Payment(Answered):
    """What is known of an order's money.

    SUCCESS: it was taken.  FAILED: the provider declined.  REFUND_DUE, REFUNDED: it was taken, and goes, or went, back.
    VOID_DUE: the order ended before the provider's answer was known; the provider is asked to give back whatever it took.
    VOIDED: it has, or there was nothing.  REFUSED: it gives nothing back, for good; people have to.
    """

    status: Literal["SUCCESS", "FAILED", "REFUND_DUE", "REFUNDED", "VOID_DUE", "VOIDED", "REFUSED"]
    amount_cents: Annotated[int | None, Field(description="null: the order was never priced")]
    charge_id: str | None
    created_at: Annotated[datetime | None, Field(description="when the provider took the money or declined, if known")]
    refunded_at: Annotated[datetime | None, Field(description="when the provider had given back what it took")]
    refused_at: Annotated[datetime | None, Field(description="when it last refused to, for good")]
    retried_at: Annotated[datetime | None, Field(description="when people last had it asked again")]
    closed_at: Annotated[datetime | None, Field(description="when people closed it: the provider is not asked again")]
    closed_why: Annotated[str | None, Field(description="what they did instead")]


class Record(Answered):
    """Where a record is stored."""

    topic: str
    partition: int
    offset: int


class Step(Answered):
    """A status that an order had, since when, and by which record."""

    status: Status
    at: datetime
    reason: Reason | None = None
    record: Annotated[
        Record | None,
        Field(description="what caused it; null: the provider, other products' owners or the clock, no single record"),
    ]


class OrderDetail(Answered):
    """An order with its lines, its payment and its history, oldest first."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"order": _HEAD, "items": [_ITEM], "payment": None, "history": _HISTORY}]}
    )

    order: OrderHead
    items: list[Item]
    payment: Annotated[Payment | None, Field(description="null: nobody was asked for money yet, or has answered")]
    history: list[Step]


class Cancelled(Answered):
    """An order that is cancelled, and why: by its customer, or as it had ended before."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"order_id": ORDER, "status": "CANCELLED", "reason": "cancelled_by_user"}]}
    )

    order_id: uuid.UUID
    status: Literal[Status.CANCELLED]
    reason: Reason


class Cancelling(Answered):
    """An order that is commanded to be cancelled, and its status until then; CREATED also while nobody knows the order."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"order_id": ORDER, "status": "RESERVED", "reason": None}]}
    )

    order_id: uuid.UUID
    status: Literal[Status.CREATED, Status.RESERVED, Status.PAID, Status.CONFIRMED]
    reason: None


class OrdersPage(Answered):
    """A page of orders, newest first."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"orders": [_HEAD], "next": f"1738324800100000_{ORDER}"}]}
    )

    orders: list[OrderHead]
    next: Annotated[str | None, Field(description="the cursor of the next page; null: this was the last one")]


# Products


class PageQuery(Asked):
    """Which page."""

    cursor: Annotated[Cursor | None, Field(description="`next` of the page before; without it, the first page")] = None
    limit: Annotated[Limit, Field(description="entries of a page at most")] = PAGE_DEFAULT


class ProductsQuery(Asked):
    """Which products, and which page of them."""

    cursor: Annotated[UserId | None, Field(description="`next` of the page before; without it, the first page")] = None
    limit: Annotated[Limit, Field(description="products of a page at most")] = PAGE_DEFAULT
    retired: Annotated[bool, Field(description="those that are retired, instead of those that are not")] = False


class ProductChange(Asked):
    """What a product is to be."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "Tea cup", "price_cents": 300, "limit_per_user": 4}]}
    )

    name: Name
    price_cents: PriceCents
    limit_per_user: Annotated[
        LimitPerUser | None,
        Field(description="units that one customer may have over all orders; null: any number; left out: as it is"),
    ] = None
    retired: Annotated[
        StrictBool | None, Field(description="whether no order may have it any more; null or left out: as it is")
    ] = None


class Product(Answered):
    """A product and its units: `available` can be ordered, `reserved` are held for orders, `sold` have left the stock."""

    model_config = ConfigDict(json_schema_extra={"examples": [_PRODUCT]})

    product_id: str
    name: str
    price_cents: int
    available: int
    reserved: int
    sold: int
    limit_per_user: Annotated[int | None, Field(description="units that one customer may have; null: any number")]
    retired: Annotated[bool, Field(description="no order may have it any more")]


class ProductsPage(Answered):
    """A page of the catalogue, by product id."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"products": [_PRODUCT], "next": "cup"}]})

    products: list[Product]
    next: Annotated[str | None, Field(description="the cursor of the next page; null: this was the last one")]


class StockChange(Asked):
    """Units that came in (`receive`, 1 or more), or a correction with its reason: by so many (`adjust`, either sign, not 0),
    or to so many in the house (`set`, 0 or more)."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"command": "receive", "quantity": 30}]})

    command: Literal["receive", "adjust", "set"]
    quantity: Annotated[StrictInt, Field(ge=-QUANTITY_MAX, le=QUANTITY_MAX)]
    reason: Annotated[Why | None, Field(description="why; `adjust` and `set` need one")] = None


class StockChanged(Answered):
    """A stock command that was carried out."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "command_id": COMMAND,
                    "product_id": "cup",
                    "command": "receive",
                    "quantity": 30,
                    "change": 30,
                    "reason": None,
                    "outcome": "applied",
                    "decided_at": NOON,
                }
            ]
        }
    )

    command_id: uuid.UUID
    product_id: str
    command: Literal["receive", "adjust", "set"]
    quantity: int
    change: Annotated[int, Field(description="units that it added, or removed")]
    reason: str | None
    outcome: Literal["applied"]
    decided_at: datetime


class StockPending(Answered):
    """A command that is on its way.  The request again, with the same key where it has one, tells the outcome."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"command_id": COMMAND, "product_id": "cup", "outcome": "pending"}]}
    )

    command_id: uuid.UUID
    product_id: str
    outcome: Literal["pending"]


class LedgerEntry(Answered):
    """A movement of a product's units; `source_id` is the command that moved them."""

    movement: Literal["initial", "receive", "adjust"]
    quantity: int
    reason: str | None
    actor: Annotated[
        str | None, Field(description="who gave the command, as its record says: of this API, an admin's name")
    ]
    at: datetime
    source_id: uuid.UUID


class LedgerPage(Answered):
    """A page of what people and deliveries moved, newest first."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"entries": [_ENTRY], "next": None}]})

    entries: list[LedgerEntry]
    next: Annotated[str | None, Field(description="the cursor of the next page; null: this was the last one")]


# Everything else


class Health(Answered):
    """The process lives."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ok"}]})

    status: Literal["ok"]


class EngineState(Answered):
    """Whether an engine answers."""

    ready: bool
    address: str
    latency_ms: float
    error: str | None = None


class Ready(Answered):
    """The process can do its work."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "status": "ready",
                    "degraded": [],
                    "engines": {"kafka": {"ready": True, "address": "127.0.0.1:9092", "latency_ms": 1.2}},
                }
            ]
        }
    )

    status: Literal["ready", "degraded"]
    degraded: Annotated[list[str], Field(description="engines that do not answer, and without which it works")]
    engines: dict[str, EngineState]


class Fault(Answered):
    """What is wrong with one member."""

    field: str
    message: str


class ProblemDocument(BaseModel):
    """An error, as RFC 9457 has it.  `type` is a stable name; `error` and `details` repeat `title` and `detail`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    title: str
    status: int
    detail: str | None = None
    instance: str | None = None
    error: str | None = None
    details: str | None = None
    faults: list[Fault] | None = None
