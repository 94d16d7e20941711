"""Where a record is."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """Topic, as the broker names it, partition and offset of a record."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"
