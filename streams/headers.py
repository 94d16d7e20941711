"""Headers of an order record: who waits for its verdict, and where it was sent on from; of an event: who tells it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from orderstream.errors import InvalidRecord

REPLY_TO = "reply-to"
"""Header of an order record: the channel on which its producer waits for the verdict."""

REPLY_TO_CHARS_MAX = 200
"""The channel travels with every line of its order, in records that carry hundreds of them."""

HEADERS_BYTES_MAX = 16 * 1024
"""An order that has to be sent on takes its headers along, and must not outgrow the broker's limit by one more."""

LANE = "lane"
"""Header of an event: claim and sequence of the settle lane's transaction that it follows from, as ``claim:sequence``.  Of
the events of a home, those of an older claim behind a newer one do not count.  A record without a value is a claim."""

SENT_ON = "sent-on-from"
"""Header of an order record that was in a partition where its product does not belong: where it came from."""


def header(record: Any, name: str) -> str | None:
    """Return a header of a record as text, or None."""
    for key, value in record.headers:
        if key == name:
            return value.decode(errors="replace") if value is not None else None
    return None


def lane_of(event: Any) -> tuple[int, int]:
    """Return claim and sequence of the transaction that a record on ``order-events`` follows from; 0, 0: it does not say."""
    claim, _, sequence = (header(event, LANE) or "0:0").partition(":")
    return int(claim), int(sequence)


def current(events: Iterable[Any], home: int, claims: dict[int, int]) -> Iterator[Any]:
    """Yield those of the next events of a home that count: a former owner may still tell, late, what is no longer so.

    A record without a value is no event: it says whose turn it is from there on.

    Args:
        events: consecutive records of its partition of ``order-events``.
        home: the partition.
        claims: the newest claim that was met, by home; brought up to date.
    """
    newest = claims.get(home, 0)
    for event in events:
        claim = lane_of(event)[0]
        if claim >= newest:
            newest = claims[home] = claim
            if event.value is not None:
                yield event


def reply_channel(record: Any) -> str | None:
    """Return the channel on which the producer of an order waits, or None.

    Raises:
        InvalidRecord: ``too_large``, the headers are; ``invalid_order``, the channel's name is too long.
    """
    if not record.headers:
        return None
    size = sum(len(name.encode()) + len(value or b"") for name, value in record.headers)
    if size > HEADERS_BYTES_MAX:
        raise InvalidRecord("too_large", f"headers: {size} bytes, at most {HEADERS_BYTES_MAX}")
    reply_to = header(record, REPLY_TO)
    if reply_to is not None and len(reply_to) > REPLY_TO_CHARS_MAX:
        raise InvalidRecord(
            "invalid_order", f"header {REPLY_TO}: {len(reply_to)} characters, at most {REPLY_TO_CHARS_MAX}"
        )
    return reply_to
