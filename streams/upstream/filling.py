"""Fills a produce batch many records at a time: aiokafka's own method takes one, three times as slowly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from orderstream.streams.dead_letters import Headers


def fill(builder: Any, records: Sequence[tuple[bytes | None, bytes | None, Headers]]) -> int:
    """Append records, as far as there is room; return how many.

    What ``BatchBuilder.append`` does for each record, of a batch that is not closed and without serializers.

    Args:
        builder: ``aiokafka.producer.message_accumulator.BatchBuilder``.
        records: key, value and headers of each.
    """
    append, now_ms = builder._builder.append, int(time.time() * 1_000)
    number = builder._relative_offset
    for key, value, headers in records:
        if append(number, now_ms, key, value, headers if type(headers) is list else list(headers)) is None:
            break
        number += 1
    taken: int = number - builder._relative_offset
    builder._relative_offset = number
    return taken
