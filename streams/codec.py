"""How lists of rows become records of the inner topics, and back.

Bounds: at most ``handoff_outcomes_max`` rows and :data:`RECORD_BYTES_MAX` bytes in a record, so that a batch of batches
never outgrows the broker's limit of 1 MiB for a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any, TypeVar, get_args, get_type_hints

import orjson

VERSION = 1
RECORD_BYTES_MAX = 256 * 1024

Row = TypeVar("Row", bound=tuple[Any, ...])


def encode_rows(rows: Sequence[tuple[Any, ...]], rows_max: int) -> Iterator[bytes]:
    """Yield the records that carry ``rows``, in order, each within the bounds.

    A row that is larger than a record may be goes alone: a row is two ids, a user and some numbers, all of them bounded at
    the border to some 600 bytes together.
    """
    for start in range(0, len(rows), rows_max):
        yield from _within(rows[start : start + rows_max])


def _within(rows: Sequence[tuple[Any, ...]]) -> Iterator[bytes]:
    value = orjson.dumps({"v": VERSION, "rows": [[*row] for row in rows]})
    if len(value) <= RECORD_BYTES_MAX or len(rows) == 1:
        yield value
    else:
        half = len(rows) // 2
        yield from _within(rows[:half])
        yield from _within(rows[half:])


def decode_rows(value: bytes, kind: type[Row]) -> list[Row]:
    """Return the rows of a record of an inner topic, each a named tuple of this kind.

    Raises:
        ValueError: when the bytes are no such record.  Only stages write there, so this is a fault of ours.
    """
    body = orjson.loads(value)
    if not isinstance(body, dict) or body.get("v") != VERSION or not isinstance(body.get("rows"), list):
        raise ValueError(f"not a version {VERSION} record of an inner topic: {value[:100]!r}")
    shapes = _shapes(kind)
    rows = []
    for row in body["rows"]:
        if type(row) is not list or (*map(type, row),) not in shapes:
            raise ValueError(f"not a row of {kind.__name__}: {row!r:.200}")
        rows.append(kind(*row))
    return rows


@cache
def _shapes(kind: type[Row]) -> frozenset[tuple[type, ...]]:
    """Return every list of types that the fields of a named tuple may have: a lookup in a set costs least per row."""
    return frozenset(product(*(get_args(hint) or (hint,) for hint in get_type_hints(kind).values())))
