"""Commands over orders and over stock: imperative, keyed by what they are about, written by people and by timers."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from orderstream.errors import InvalidRecord
from orderstream.streams.orders import Id, describe, refuse_repeated_names
from orderstream.streams.partitions import product_partition

T = TypeVar("T", bound=BaseModel)

QUANTITY_MAX = 1_000_000_000
REASON_CHARS_MAX = 200
COMMAND_BYTES_MAX = 16 * 1024
"""Far more than a command needs; one that has to be sent on must not outgrow the broker's limit by its new key."""


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must not hold control characters")
    return value


class OrderCommand(BaseModel):
    """A record on ``order-commands``, keyed by order id.

    ``cancel``: the customer does not want the order any more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: Literal["cancel"]
    order_id: uuid.UUID


_ABSENT: Any = object()


def _given(value: object, info: ValidationInfo) -> object:
    if value is not _ABSENT:
        return value
    if info.data.get("command") == "recount":
        return 0
    raise PydanticCustomError("missing", "Field required")


class StockCommand(BaseModel):
    """A record on ``stock-commands``, keyed by product id.

    ``receive`` adds units that came in; ``adjust`` adds or, with a negative quantity, removes units, and says why.  A
    repeated ``command_id`` changes nothing.  ``recount`` moves nothing: the product's owner gives Redis and its table the
    counts of Postgres.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: Literal["receive", "adjust", "recount"]
    command_id: uuid.UUID
    product_id: Id
    quantity: Annotated[
        StrictInt, Field(ge=-QUANTITY_MAX, le=QUANTITY_MAX, validate_default=True), BeforeValidator(_given)
    ] = _ABSENT
    reason: Annotated[StrictStr, Field(max_length=REASON_CHARS_MAX), AfterValidator(_printable)] = ""

    @model_validator(mode="after")
    def _sound(self) -> StockCommand:
        if self.command == "receive" and self.quantity < 1:
            raise ValueError("receive needs a quantity of at least 1")
        if self.command == "adjust" and (self.quantity == 0 or not self.reason.strip()):
            raise ValueError("adjust needs a quantity other than 0 and a reason")
        if self.command == "recount" and self.quantity != 0:
            raise ValueError("recount moves nothing: leave the quantity out")
        return self


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


def stock_move(value: bytes | None, partition: int, partitions: int) -> StockCommand | None:
    """Return the command of a record on ``stock-commands`` that moves stock where it stands.

    Returns:
        None for what is no command, for a recount, and for one that is sent on to another partition and counts there.
    """
    try:
        command = decode_stock_command(value)
    except InvalidRecord:
        return None
    moves = command.command != "recount" and product_partition(str(command.product_id), partitions) == partition
    return command if moves else None


def decode_stock_command(value: bytes | None) -> StockCommand:
    """Decode a record on ``stock-commands``.

    Raises:
        InvalidRecord: ``empty``, ``too_large``, ``not_json`` or ``invalid_command``.
    """
    return _decode(StockCommand, value)
