"""A Faust table that is a view: written by the key, in no acknowledgement, and flushed about once a second.

Faust's own table sends a changelog record at each write, through the current event's partition, at about 0.3 ms.  Here
writes wait in an overlay; :meth:`BatchedTable.flush` produces one changelog record a key, to the key's own partition, and
when the broker has acknowledged them they become the table's content.  A key set and dropped between two flushes costs
nothing.  Recovery, table routes and pages are Faust's own.

Nothing decides by it: what a worker that was killed had not flushed is missing, until it is written again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from typing import Any

import orjson

from orderstream.streams.producer import Record, Step
from orderstream.streams.upstream.app import App
from orderstream.streams.upstream.table import Table


class BatchedTable(Table):
    """See the module.  Keys are text; values are what JSON can say, and absolute, never increments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._overlay: dict[str, tuple[int, Any]] = {}
        self._flushing: Mapping[str, tuple[int, Any]] = {}

    def read(self, key: str) -> Any:
        """Return the newest value of a key, flushed or not, or None."""
        for unflushed in (self._overlay, self._flushing):
            if key in unflushed:
                return unflushed[key][1]
        return self.stored(key)

    def put(self, key: str, value: Any, partition: int) -> None:
        """Set a key.  ``partition`` is that of the key's owner, so that the owner recovers it."""
        self._overlay[key] = (partition, value)

    def drop(self, key: str, partition: int) -> None:
        """Remove a key; one that was never flushed leaves no trace."""
        if key in self.content or key in self._flushing:
            self._overlay[key] = (partition, None)
        else:
            self._overlay.pop(key, None)

    async def flush(self, owned: Collection[int], send: Callable[[Step], Awaitable[None]]) -> None:
        """Produce what was written since the last flush; what was written of partitions not ``owned`` any more is dropped.

        Args:
            owned: partitions of this worker.
            send: produces a step, however often that has to be tried; what it raises drops what was to be flushed.
        """
        self._flushing = {key: put for key, put in self._overlay.items() if put[0] in owned}
        self._overlay = {}
        step: dict[tuple[str, int], list[Record]] = {}
        for key, (partition, value) in self._flushing.items():
            encoded = None if value is None else orjson.dumps(value)
            step.setdefault((self.changelog_topic_name, partition), []).append((orjson.dumps(key), encoded, ()))
        try:
            if step:
                await send(step)
            content, partitions = self.content, self.key_partitions
            for key, (partition, value) in self._flushing.items():
                if value is None:
                    content.pop(key, None)
                    partitions.pop(key, None)
                else:
                    content[key], partitions[key] = value, partition
        finally:
            self._flushing = {}

    def entries(self) -> Iterator[tuple[str, int, Any]]:
        """Yield key, partition and newest value of everything there is, flushed or not."""
        partitions = self.key_partitions
        stored = {key: (partitions[key], value) for key, value in self.content.items()}
        for key, (partition, value) in {**stored, **self._flushing, **self._overlay}.items():
            if value is not None:
                yield key, partition, value


def batched_table(app: App, name: str, partitions: int, help: str) -> BatchedTable:
    """Add a table to the app; its changelog topic has as many partitions as the topics of its keys.

    Args:
        app: the worker's.
        name: of the table.
        partitions: of the topics.
        help: for people.
    """
    table = BatchedTable(app, name=name, partitions=partitions, help=help)
    app.tables.add(table)
    return table
