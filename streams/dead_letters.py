"""Records that no stage can process (topic ``dead-letters``): key and value as they came, the story in the headers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from orderstream.errors import InvalidRecord

REASONS = (
    "empty",
    "too_large",
    "not_json",
    "invalid_order",
    "invalid_command",
    "invalid_rows",
    "order_id_reused",
    "order_removed",
    "unknown_product",
    "insufficient_stock",
    "product_changed",
)
"""Why a record can't be processed.

``invalid_rows``: a record on an inner topic that no stage wrote.  ``order_id_reused``: the id, or the user's key, belongs to
another order or stock command already.  ``order_removed``: it belongs to an order that was removed.  ``unknown_product``: a
stock command for a product that is not in the catalogue; ``insufficient_stock``: one that removes more than there is;
``product_changed``: the product is not as it says that it was.
The others say what is wrong with the bytes.
"""

DETAIL_BYTES_MAX = 2_000
CARRIED_BYTES_MAX = 1_536 * 1024
"""Of a record's own bytes.  More than the broker takes uncompressed; what a stranger's compression hid is cut to it."""

_KEY_BYTES_MAX = 1_000

Headers = Sequence[tuple[str, bytes]]


class DeadLetter(NamedTuple):
    """One dead letter, ready to be produced."""

    key: bytes | None
    value: bytes | None
    headers: Headers


def dead_letter(
    fault: InvalidRecord,
    *,
    topic: str,
    partition: int,
    offset: int,
    timestamp: int,
    key: bytes | None,
    value: bytes | None,
    headers: Headers = (),
) -> DeadLetter:
    """Make the dead letter for the record at ``topic/partition/offset``; its own headers stay behind ours.

    A record beyond :data:`CARRIED_BYTES_MAX` is cut, without its own headers, and ``cut-from`` holds its size in bytes.
    """
    detail = fault.detail.encode()[:DETAIL_BYTES_MAX].decode(errors="ignore").encode()  # no character cut in two
    story = [
        ("reason", fault.reason.encode()),
        ("detail", detail),
        ("source-topic", topic.encode()),
        ("source-partition", str(partition).encode()),
        ("source-offset", str(offset).encode()),
        ("source-timestamp", str(timestamp).encode()),
    ]
    size = len(key or b"") + len(value or b"") + sum(len(name.encode()) + len(data or b"") for name, data in headers)
    if size > CARRIED_BYTES_MAX:
        story.append(("cut-from", str(size).encode()))
        key, value, headers = key and key[:_KEY_BYTES_MAX], value and value[: CARRIED_BYTES_MAX - _KEY_BYTES_MAX], ()
    ours = {"cut-from", *(name for name, _ in story)}
    if key is None and value is None:
        value = b""  # Kafka takes no record without both
    return DeadLetter(key, value, [*story, *((name, data) for name, data in headers if name not in ours)])
