"""Every record format as an AsyncAPI 3 document, made from the models and rows that the code itself reads and writes.

``docs/asyncapi.yaml`` is its text; a test keeps it current and holds it to :data:`~orderstream.streams.topics.TOPICS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from orderstream import __version__
from orderstream.settings import Settings
from orderstream.streams import codec
from orderstream.streams.commands import OrderCommand, StockCommand
from orderstream.streams.dead_letters import REASONS
from orderstream.streams.headers import HEADERS_BYTES_MAX, LANE
from orderstream.streams.lines import LineStands, LineWanted
from orderstream.streams.orders import OrderLine, OrderRecord, Reason, Status
from orderstream.streams.topics import (
    DEAD_LETTERS,
    ORDER_COMMANDS,
    ORDER_EVENTS,
    ORDER_LINES,
    ORDERS,
    RESERVATIONS,
    STOCK_COMMANDS,
    TOPICS,
    TopicSpec,
)

MADE_BY = "orderstream schema asyncapi"


class _Schema(GenerateJsonSchema):
    ignored_warning_kinds = {"non-serializable-default"}  # that of a member which only some commands may leave out


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid")

    v: Literal[1]
    order_id: str
    at: datetime


class OrderCreated(_Event):
    """The order was taken in; nothing is held yet."""

    status: Literal[Status.CREATED]
    user_id: str
    items: list[OrderLine]


class OrderReserved(_Event):
    """Every line is held. The price of each, in their order, is told where there are several: of one the total says it."""

    status: Literal[Status.RESERVED]
    total_cents: int
    prices_cents: list[int] = Field(default_factory=list, min_length=2)


class OrderPaid(_Event):
    """The provider took the total."""

    status: Literal[Status.PAID]
    total_cents: int
    charge_id: str


class OrderConfirmed(_Event):
    """Every line is sold."""

    status: Literal[Status.CONFIRMED]


class OrderCancelled(_Event):
    """The order ended without a sale, or its sale was taken back."""

    status: Literal[Status.CANCELLED]
    reason: Reason


class RejectedRecord(BaseModel):
    """Where a record on `orders` stands."""

    partition: int
    offset: int


class OrderRejected(_Event):
    """A dead letter with this id: no order, or of one that was removed. Of an order with events it says nothing."""

    status: Literal["REJECTED"]
    reason: Literal["too_large", "invalid_order", "order_removed"]
    detail: str
    record: RejectedRecord


_Events = OrderCreated | OrderReserved | OrderPaid | OrderConfirmed | OrderCancelled | OrderRejected

OrderEvent: TypeAdapter[_Events] = TypeAdapter(Annotated[_Events, Field(discriminator="status")])
"""A record on ``order-events``."""

_ROWS = {ORDER_LINES: LineWanted, RESERVATIONS: LineStands}
_KEYS = {
    "product": "the product's id; the partition is murmur2 of it, as Kafka's own producers place it",
    "order": "the order's id; the partition is the order's home, where that is known, else murmur2 of the id",
    "home": "the order's id; the partition is the order's home: that of its record on `orders`",
    "source": "as the record had it",
}
_TEXT = {"type": "string"}
_LETTER_HEADERS = {
    "reason": {"enum": list(REASONS)},
    "detail": _TEXT,
    "source-topic": _TEXT,
    "source-partition": _TEXT,
    "source-offset": _TEXT,
    "source-timestamp": {**_TEXT, "description": "of that record, in milliseconds since the epoch"},
    "cut-from": {**_TEXT, "description": "bytes that it had, when it was too large to be carried whole"},
}


def describe() -> dict[str, Any]:
    """Return the AsyncAPI 3 document of the topics under their default names."""
    schemas: dict[str, Any] = {}
    messages = {spec.name: _message(spec, schemas) for spec in TOPICS}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "orderstream",
            "version": __version__,
            "license": {"name": "MIT"},
            "description": (
                "The topics of the pipeline. Outsiders may write to those with an operation `send…`, and read all. All have "
                "the same number of partitions. ORDERSTREAM_TOPIC_PREFIX comes before each name."
            ),
        },
        "defaultContentType": "application/json",
        "channels": {spec.name: _channel(spec) for spec in TOPICS},
        "operations": dict(_operations()),
        "components": {"messages": messages, "schemas": dict(sorted(schemas.items()))},
    }


def _channel(spec: TopicSpec) -> dict[str, Any]:
    kept = Settings.model_fields["retention_inner_hours" if spec.inner else "retention_hours"]
    return {
        "address": spec.name,
        "description": (
            f"{spec.carries[0].upper()}{spec.carries[1:]}. Written by: {', '.join(spec.writers)}. "
            f"Kept for {kept.default} hours by default."
            + f" Its headers have at most {HEADERS_BYTES_MAX:,} bytes, names included."
            * (spec == ORDERS)
        ),
        "messages": {spec.name: {"$ref": f"#/components/messages/{spec.name}"}},
    }


def _operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for spec in TOPICS:
        name = "".join(part.capitalize() for part in spec.name.split("-"))
        channel = {"$ref": f"#/channels/{spec.name}"}
        if "outside" in spec.writers:
            yield f"send{name}", {"action": "send", "channel": channel, "summary": f"Write to `{spec.name}`."}
        elif not spec.inner:
            yield f"receive{name}", {"action": "receive", "channel": channel, "summary": f"Read `{spec.name}`."}


def _message(spec: TopicSpec, schemas: dict[str, Any]) -> dict[str, Any]:
    key = {"type": "string", "description": _KEYS[spec.keyed_by]}
    message: dict[str, Any] = {"name": spec.name, "bindings": {"kafka": {"key": key}}}
    if spec in _ROWS:
        return {**message, "summary": "A list for one partition; no key.", "payload": _rows(spec), "bindings": {}}
    if spec == DEAD_LETTERS:
        headers = {"type": "object", "properties": _LETTER_HEADERS, "required": [*_LETTER_HEADERS][:-1]}
        summary = "The record as it came, any bytes, and why no stage can process it."
        return {**message, "summary": summary, "contentType": "application/octet-stream", "headers": headers}
    if spec == ORDER_EVENTS:
        said = (
            "claim:sequence of what was written; an event of a smaller claim behind a greater one is void. "
            "A record without a value is no event, but a claim: it is there for this header"
        )
        message["headers"] = {"type": "object", "properties": {LANE: {**_TEXT, "description": said}}}
    payloads: dict[TopicSpec, Any] = {
        ORDERS: TypeAdapter(OrderRecord),
        ORDER_COMMANDS: TypeAdapter(OrderCommand),
        STOCK_COMMANDS: TypeAdapter(StockCommand),
        ORDER_EVENTS: OrderEvent,
    }
    mode: Literal["validation", "serialization"] = "serialization" if spec == ORDER_EVENTS else "validation"
    schema = payloads[spec].json_schema(
        schema_generator=_Schema, ref_template="#/components/schemas/{model}", mode=mode
    )
    schemas |= schema.pop("$defs", {})
    if "title" in schema:
        schemas[schema["title"]] = schema
        schema = {"$ref": f"#/components/schemas/{schema['title']}"}
    else:
        schema.pop("discriminator", None)  # AsyncAPI's names a member, OpenAPI's an object; oneOf says it all
    return {**message, "payload": schema}


def _rows(spec: TopicSpec) -> dict[str, Any]:
    kind: Any = _ROWS[spec]
    row = TypeAdapter(kind).json_schema()
    fields = [{**item, "title": name} for name, item in zip(kind._fields, row["prefixItems"], strict=True)]
    row = {
        "type": "array",
        "title": kind.__name__,
        "prefixItems": fields,
        "minItems": len(fields),
        "maxItems": len(fields),
    }
    return {
        "type": "object",
        "properties": {"v": {"const": codec.VERSION}, "rows": {"type": "array", "items": row}},
        "required": ["v", "rows"],
    }


# Text

LINE_CHARS = 120
"""Longer descriptions are folded."""


def text() -> str:
    """Return the document as YAML."""
    document = yaml.dump(describe(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=LINE_CHARS)
    return f"# Made by `{MADE_BY}`; a test keeps it current.\n{document}"


class _Dumper(yaml.SafeDumper):
    """Writes each value out where it is, and text of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)  # lists are indented under their names


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style="|" if "\n" in value else None)


_Dumper.add_multi_representer(str, _represent_text)
_Dumper.add_representer(str, _represent_text)
