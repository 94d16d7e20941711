"""How lists of rows become records of the inner topics, and back.

Bounds: at most ``handoff_outcomes_max`` rows and :data:`RECORD_BYTES_MAX` bytes in a record, so that a batch of batches
never outgrows the broker's limit of 1 MiB for a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

VERSION = 1
RECORD_BYTES_MAX = 256 * 1024
_NAMES_BYTES_MAX = 700  # a row is at most two ids, a user, a method, a channel and some numbers


def encode_rows(rows: Sequence[tuple[Any, ...]], rows_max: int) -> Iterator[bytes]:
    """Yield the records that carry ``rows``, each within the bounds."""
    step = min(rows_max, RECORD_BYTES_MAX // _NAMES_BYTES_MAX)
    for start in range(0, len(rows), step):
        yield orjson.dumps({"v": VERSION, "rows": [[*row] for row in rows[start : start + step]]})


def decode_rows(value: bytes) -> list[list[Any]]:
    """Return the rows of a record of an inner topic.

    Raises:
        ValueError: when the bytes are no such record.  Only stages write there, so this is a fault of ours.
    """
    body = orjson.loads(value)
    if not isinstance(body, dict) or body.get("v") != VERSION:
        raise ValueError(f"not a version {VERSION} record of an inner topic: {value[:100]!r}")
    rows: list[list[Any]] = body["rows"]
    return rows
