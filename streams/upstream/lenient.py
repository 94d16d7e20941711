"""Reads records whose header names are no UTF-8.

Any client may produce one, and the broker takes it; aiokafka's parser raises in the middle of the batch.  Nothing behind the
record could be read any more, by any worker that gets the partition.  Here such a batch is read again by aiokafka's slower
parser, with what is no UTF-8 in its header names written as ``\\xff``.  No
upstream issue found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy


class _Text(bytearray):
    """Bytes that decode, whatever they are."""

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return _Text(found) if isinstance(key, slice) else found

    def decode(self, *_: Any) -> str:
        return super().decode(errors="backslashreplace")


def _slow(raw: bytes, number: int) -> Iterator[Any]:
    """Yield the records of the batch with this number, in the order of ``raw``."""
    batches = _MemoryRecordsPy(raw)
    for _ in range(number):
        batches.next_batch()
    batch: Any = _DefaultRecordBatchPy(batches._next_slice)
    batch._maybe_uncompress()
    batch._buffer = _Text(batch._buffer)
    return iter(batch)


class _Batch:
    """A batch as the fast parser has it; its records from the slow one where the fast one fails."""

    def __init__(self, fast: Any, raw: bytes, number: int) -> None:
        self._fast, self._raw, self._number = fast, raw, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)

    def __next__(self) -> Any:
        return next(self._fast)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._fast
        except UnicodeDecodeError:
            yield from _slow(self._raw, self._number)  # the fetcher passes over those that it has had already


class Records:
    """Takes the place of ``aiokafka.record.MemoryRecords`` in the fetcher."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._fast = MemoryRecords(raw)
        self._number = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)

    def next_batch(self) -> Any:
        """Return the next batch, None when there is no more."""
        batch = self._fast.next_batch()
        self._number += 1
        return None if batch is None else _Batch(batch, self._raw, self._number)


def install() -> None:
    """Have every consumer of this process read so."""
    fetcher.MemoryRecords = Records
