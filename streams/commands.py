"""Commands over orders and over stock: imperative, keyed by what they are about, written by people and by timers."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from orderstream.errors import InvalidRecord
from orderstream.streams.lines import UNITS_MAX
from orderstream.streams.orders import TEXT, Id, describe, refuse_repeated_names
from orderstream.streams.partitions import product_partition

T = TypeVar("T", bound=BaseModel)

QUANTITY_MAX = 1_000_000_000
ON_HAND_MAX = 10**15
"""Units of a product in the house: counts stay exact in Redis, whose numbers have 53 bits, and no sum of them overflows."""
REASON_CHARS_MAX = 200
ACTOR_CHARS_MAX = 64
COMMAND_BYTES_MAX = 16 * 1024
"""Far more than a command needs; one that has to be sent on must not outgrow the broker's limit by its new key."""

PRICE_CENTS_MAX = 10**12
"""The greatest price of a unit, as the table of stock has it: times the units of one order it fits into a bigint."""

NAME_CHARS_MAX = 200

CHANGE_MAX = 10**15
"""More units than any product has."""

MOVING = ("receive", "adjust", "set")
"""Commands that move units, and name a quantity."""

WHY = {
    "unknown_product": "is not in the catalogue",
    "insufficient_stock": "has fewer units that nobody holds",
    "too_many_units": f"would have more than {ON_HAND_MAX} units",
    "product_changed": "is not as the command says that it was",
    "reused": "was meant by another command under this id",
}
"""Outcomes of stock commands that are refused, each with what is true of its product then."""

_MEMBERS = {
    "name": ("product",),
    "price_cents": ("product",),
    "limit_per_user": ("product", "limit"),
    "retired": ("product",),
    "was": ("product",),
    "change": ("set",),
}
"""Members that not every command has."""


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must not hold control characters")
    return value


def printable(value: str) -> str:
    """Check a text.

    Raises:
        ValueError: it is empty, or has control characters or white space at its ends.
    """
    if not value or value != value.strip():
        raise ValueError("must not be empty, nor begin or end with white space")
    return _printable(value)


SHAPE: Any = {"minLength": 1, "pattern": TEXT}
"""What :func:`printable` asks for, for documents."""

Name = Annotated[StrictStr, Field(max_length=NAME_CHARS_MAX, json_schema_extra=SHAPE), AfterValidator(printable)]
Actor = Annotated[StrictStr, Field(max_length=ACTOR_CHARS_MAX, json_schema_extra=SHAPE), AfterValidator(printable)]
NO_PATH = (".", "..")
"""What is no product's id: in a path it is the folder itself, or the one above, and clients cut it out."""


def _has_path(value: str) -> str:
    if value in NO_PATH:
        raise ValueError("must not be . or .., which no path can name")
    return value


ProductId = Annotated[Id, AfterValidator(_has_path), Field(json_schema_extra={"not": {"enum": [*NO_PATH]}})]
"""The id of a product that there may be; an order may name any, and finds no such product."""

PriceCents = Annotated[StrictInt, Field(ge=0, le=PRICE_CENTS_MAX)]
LimitPerUser = Annotated[StrictInt, Field(ge=1, le=UNITS_MAX)]


class OrderCommand(BaseModel):
    """A record on ``order-commands``, keyed by order id.

    ``cancel``: the customer does not want the order any more.  ``retry_payment``: the provider is to be asked again to give
    back what it has refused to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: Literal["cancel", "retry_payment"]
    order_id: uuid.UUID


_ABSENT: Any = object()


def _given(value: object, info: ValidationInfo) -> object:
    if value is not _ABSENT:
        return value
    if info.data.get("command") in MOVING:
        raise PydanticCustomError("missing", "Field required")
    return 0


class ProductState(BaseModel):
    """What a ``product`` command may change of a product."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: StrictStr
    price_cents: StrictInt
    limit_per_user: StrictInt | None
    retired: StrictBool

    @classmethod
    def of(cls, product: Mapping[str, Any]) -> ProductState:
        """Return that of a row of ``stock``."""
        return cls(**{name: product[name] for name in cls.model_fields})


class StockCommand(BaseModel):
    """A record on ``stock-commands``, keyed by product id.

    ``receive`` adds units that came in; ``adjust`` adds or, with a negative quantity, removes units, and says why; ``set``
    says how many units are in the house, held ones included, and why.
    ``product`` sets a product's name, its price, or both; with both it also makes one that is not there, without units.  It
    may set the limit too, and retire the product, or take that back: a retired one is held for no order any more.  With
    ``was`` it counts only where the product is as that says, null: is not there.
    ``limit`` sets how many units one user may have over all orders, null for any number.  A repeated ``command_id`` changes
    nothing.  ``recount`` moves nothing: the product's owner gives Redis and its table the counts of Postgres.

    Once a ``set`` is decided the product's owner writes it again, with ``change``: the units that it added or removed.  That
    stands, also after Postgres was set back.

    ``actor`` is who gave the command, as its producer says: the ingress names the admin.  The ledger keeps it.  Another
    actor makes no other command.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: Literal["receive", "adjust", "set", "recount", "product", "limit"]
    command_id: uuid.UUID
    product_id: ProductId
    quantity: Annotated[
        StrictInt, Field(ge=-QUANTITY_MAX, le=QUANTITY_MAX, validate_default=True), BeforeValidator(_given)
    ] = _ABSENT
    reason: Annotated[StrictStr, Field(max_length=REASON_CHARS_MAX), AfterValidator(_printable)] = ""
    name: Name | None = None
    price_cents: PriceCents | None = None
    limit_per_user: LimitPerUser | None = None
    retired: StrictBool | None = None
    was: ProductState | None = None
    change: Annotated[StrictInt, Field(ge=-CHANGE_MAX, le=CHANGE_MAX)] | None = None
    actor: Actor | None = None

    @model_validator(mode="after")
    def _sound(self) -> StockCommand:
        if self.command == "receive" and self.quantity < 1:
            raise ValueError("receive needs a quantity of at least 1")
        if self.command == "adjust" and self.quantity == 0:
            raise ValueError("adjust needs a quantity other than 0")
        if self.command == "set" and self.quantity < 0:
            raise ValueError(f"set needs a quantity of at least 0, not {self.quantity}")
        if self.command in ("adjust", "set") and not self.reason.strip():
            raise ValueError(f"{self.command} needs a reason")
        if self.command not in MOVING and self.quantity != 0:
            raise ValueError(f"{self.command} moves nothing: leave the quantity out")
        for member in self.model_fields_set & _MEMBERS.keys():
            if self.command not in _MEMBERS[member]:
                raise ValueError(f"{self.command} has no {member}")
        if self.command == "product" and self.name is None and self.price_cents is None and self.retired is None:
            raise ValueError("product needs a name, a price_cents or retired")
        if self.command == "limit" and "limit_per_user" not in self.model_fields_set:
            raise ValueError("limit needs a limit_per_user, null for any number")
        return self

    @property
    def is_open(self) -> bool:
        """Whether it is a ``set`` that its owner has to decide."""
        return self.command == "set" and self.change is None

    @property
    def moved(self) -> int:
        """The units that it adds or removes; of no use where it is open."""
        return self.quantity if self.change is None else self.change

    @property
    def content(self) -> tuple[str, str, int, str | None, int | None, str, str | None]:
        """Product, command, quantity (of ``limit`` the limit, 0: none), name, price, reason: another has another id.

        The last one is JSON: what else a ``product`` command says.
        """
        quantity = (self.limit_per_user or 0) if self.command == "limit" else self.quantity
        more = self.model_dump(include={"limit_per_user", "retired", "was"}, exclude_unset=True)
        said = orjson.dumps(more, option=orjson.OPT_SORT_KEYS).decode() if more and self.command == "product" else None
        return str(self.product_id), self.command, quantity, self.name, self.price_cents, self.reason, said

    def encode(self) -> bytes:
        """Return the record's value."""
        return self.model_dump_json(exclude_unset=True).encode()


def _decode(model: type[T], value: bytes | None) -> T:
    if not value:
        raise InvalidRecord("empty", "the record has no value")
    if len(value) > COMMAND_BYTES_MAX:
        raise InvalidRecord("too_large", f"{len(value)} bytes, at most {COMMAND_BYTES_MAX}")
    try:
        command = model.model_validate_json(value)
    except ValidationError as error:
        kind = "not_json" if error.errors()[0]["type"] == "json_invalid" else "invalid_command"
        raise InvalidRecord(kind, describe(error)) from None
    try:
        refuse_repeated_names(value, len(command.model_fields_set))
    except ValueError as error:
        raise InvalidRecord("invalid_command", str(error)) from None
    return command


def decode_order_command(value: bytes | None) -> OrderCommand:
    """Decode a record on ``order-commands``.

    Raises:
        InvalidRecord: ``empty``, ``too_large``, ``not_json`` or ``invalid_command``.
    """
    return _decode(OrderCommand, value)


def cancelled(value: bytes | None) -> str | None:
    """Return the order that a record on ``order-commands`` cancels; None: it cancels none."""
    try:
        command = decode_order_command(value)
    except InvalidRecord:
        return None
    return str(command.order_id) if command.command == "cancel" else None


def stock_command(value: bytes | None, partition: int, partitions: int) -> StockCommand | None:
    """Return the command of a record on ``stock-commands`` that counts where it stands.

    Returns:
        None for what is no command, for a recount, and for one that is sent on to another partition and counts there.
    """
    try:
        command = decode_stock_command(value)
    except InvalidRecord:
        return None
    counts = command.command != "recount" and product_partition(str(command.product_id), partitions) == partition
    return command if counts else None


def decode_stock_command(value: bytes | None) -> StockCommand:
    """Decode a record on ``stock-commands``.

    Raises:
        InvalidRecord: ``empty``, ``too_large``, ``not_json`` or ``invalid_command``.
    """
    return _decode(StockCommand, value)
