"""What every stage does with the records of a batch before it decides: decode them, send them on, or reject them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec
import structlog

from orderstream import metrics
from orderstream.errors import InvalidRecord
from orderstream.streams import codec, tracing
from orderstream.streams.dead_letters import dead_letter
from orderstream.streams.headers import SENT_ON
from orderstream.streams.orders import Order, encode
from orderstream.streams.producer import Outbox

log = structlog.get_logger("intake")

T = TypeVar("T")


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """An order of this batch and the record that brought it.

    Attributes:
        owners: partition of each line's product; empty where home has all.
    """

    order: Order
    record: Any
    reply_to: str | None
    owners: Sequence[int] = ()


def take_in(records: Iterable[Any], decode: Callable[[Any], T], outbox: Outbox) -> Iterator[tuple[Any, T]]:
    """Yield each record with what ``decode(record)`` makes of it; one for which it raises InvalidRecord is rejected."""
    for record in records:
        try:
            decoded = decode(record)
        except InvalidRecord as fault:
            reject(fault, record, outbox)
            continue
        yield record, decoded


def send_on(order: Order, record: Any, outbox: Outbox) -> None:
    """Send an order to the partition of its first product, under the id that it has here."""
    where = f"{record.topic}/{record.partition}/{record.offset}".encode()
    headers = [*((name, value) for name, value in record.headers if name != SENT_ON), (SENT_ON, where)]
    outbox.order(order.lines[0][0], encode(order), headers, record)
    metrics.SENT_ON.inc()


def inner_rows(record: Any, kind: type[codec.Row]) -> list[codec.Row]:
    """Return the rows of a record of an inner topic.

    Raises:
        InvalidRecord: no stage wrote this.
    """
    try:
        return codec.decode_rows(record.value or b"", kind)
    except ValueError as error:
        raise InvalidRecord("invalid_rows", str(error)[:500]) from None


def reject(fault: InvalidRecord, record: Any, outbox: Outbox) -> None:
    """Make a record a dead letter; log and count it."""
    where = {"topic": record.topic, "partition": record.partition, "offset": record.offset}
    traced = tracing.of_headers(record.headers)
    trace = {} if traced is None else {"trace_id": f"{traced.trace_id:032x}"}
    log.warning("dead letter", reason=fault.reason, detail=fault.detail, **where, **trace)
    metrics.DEAD_LETTERS.labels(fault.reason).inc()
    letter = dead_letter(
        fault, key=record.key, value=record.value, headers=record.headers, timestamp=record.timestamp, **where
    )
    outbox.dead_letter(letter)
