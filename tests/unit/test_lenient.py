"""Batches with header names that are no UTF-8."""

from __future__ import annotations

from typing import Any

import pytest
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from orderstream.streams.upstream.lenient import Records, install

GZIP = 1


def batch(first: int, *headers: list[tuple[str, bytes | None]], codec: int = 0) -> bytes:
    """Return a batch of one record for each list of headers."""
    builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, 1 << 20)
    for n, named in enumerate(headers):
        assert builder.append(n, timestamp=1_000 + n, key=b"k%d" % n, value=b"v%d" % n, headers=named) is not None
    built = bytearray(builder.build())
    built[:8] = first.to_bytes(8, "big")
    return bytes(built)


def spoilt(text: bytes) -> bytes:
    """Put bytes that are no UTF-8 into the header names of a batch; lengths stay."""
    assert b"name" in text
    return text.replace(b"name", b"n\xff\xfee")


def read(raw: bytes) -> list[Any]:
    """Return the records as the fetcher gets them: those that it has had already, it passes over."""
    records, found, behind = Records(raw), [], -1
    while records.has_next():
        one = records.next_batch()
        assert one.base_offset > behind
        for record in one:
            if record.offset > behind:
                behind = record.offset
                found.append(record)
    return found


def test_a_header_name_that_is_no_utf8_is_escaped_and_its_neighbours_are_read() -> None:
    raw = batch(0, [("a", b"1")], [("name", b"2"), ("b", None)], [("c", b"3")])
    with pytest.raises(UnicodeDecodeError):
        list(MemoryRecords(spoilt(raw)).next_batch() or ())
    found = read(spoilt(raw))
    assert [(r.offset, r.timestamp, bytes(r.key), bytes(r.value)) for r in found] == [
        (n, 1_000 + n, b"k%d" % n, b"v%d" % n) for n in range(3)
    ]
    assert [[(name, value and bytes(value)) for name, value in r.headers] for r in found] == [
        [("a", b"1")],
        [("n\\xff\\xfee", b"2"), ("b", None)],
        [("c", b"3")],
    ]


def test_only_the_spoilt_batch_is_read_again() -> None:
    raw = batch(0, [("name", b"")], []) + spoilt(batch(2, [], [("name", b"")])) + batch(4, [("name", b"")])
    found = read(raw)
    assert [r.offset for r in found] == [0, 1, 2, 3, 4]
    assert [name for r in found for name, _ in r.headers] == ["name", "n\\xff\\xfee", "name"]


def test_a_sound_batch_is_read_by_the_fast_parser() -> None:
    raw = batch(0, [("a", b"1")], []) + batch(2, [], codec=GZIP)
    fast = [record for one in (MemoryRecords(raw),) for record in _all(one)]
    assert [(r.offset, r.key, r.headers) for r in read(raw)] == [(r.offset, r.key, r.headers) for r in fast]
    assert {type(r) for r in read(raw)} == {type(r) for r in fast}


def _all(records: Any) -> list[Any]:
    found = []
    while records.has_next():
        found += list(records.next_batch())
    return found


def test_consumers_read_so_once_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "MemoryRecords", MemoryRecords)
    install()
    assert fetcher.MemoryRecords is Records
