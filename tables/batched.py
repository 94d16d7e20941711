"""A Faust table written once per batch and key.

Faust's own table sends a changelog record at each write, through the current event's partition, at about 0.3 ms.  Here a
batch's writes wait in an overlay; :meth:`flush` produces one changelog record a key, to the key's own partition, and only
when the broker has acknowledged them do they become the table's content.  A key set and dropped within one batch costs
nothing.  Recovery, table routes and pages are Faust's own.

Values are absolute, never increments: a batch that comes again writes the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import orjson

from orderstream.streams.upstream.app import App
from orderstream.streams.upstream.table import Table

Changelog = dict[tuple[str, int], list[tuple[bytes | None, bytes | None, Any]]]


class BatchedTable(Table):
    """See the module.  Keys are text; values are what JSON can say.

    Attributes:
        place: gives the partition of a key's owner.
    """

    place: Callable[[str], int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._overlay: dict[str, tuple[int, Any]] = {}

    def read(self, key: str) -> Any:
        """Return the value of a key as this batch sees it, or None."""
        if key in self._overlay:
            return self._overlay[key][1]
        return self.stored(key)

    def put(self, key: str, value: Any, partition: int) -> None:
        """Set a key.  ``partition`` is that of the key's owner, so that the owner recovers it."""
        self._overlay[key] = (partition, value)

    def drop(self, key: str, partition: int) -> None:
        """Remove a key; one that was never flushed leaves no trace."""
        if key in self.content:
            self._overlay[key] = (partition, None)
        else:
            self._overlay.pop(key, None)

    def pending(self) -> Changelog:
        """Return the changelog records of this batch, by topic and partition."""
        records: Changelog = {}
        topic = self.changelog_topic_name
        for key, (partition, value) in self._overlay.items():
            encoded = None if value is None else orjson.dumps(value)
            records.setdefault((topic, partition), []).append((orjson.dumps(key), encoded, ()))
        return records

    def settle(self) -> None:
        """Make the batch's writes the table's content: the broker has them."""
        content, partitions = self.content, self.key_partitions
        for key, (partition, value) in self._overlay.items():
            if value is None:
                content.pop(key, None)
                partitions.pop(key, None)
            else:
                content[key] = value
                partitions[key] = partition
        self._overlay.clear()

    def forget(self) -> None:
        """Drop the batch's writes: its partitions were revoked."""
        self._overlay.clear()

    def entries(self) -> Iterator[tuple[str, int, Any]]:
        """Yield key, partition and value of everything that this worker owns and has flushed."""
        partitions = self.key_partitions
        for key, value in list(self.content.items()):
            yield key, partitions[key], value


def batched_table(
    app: App, name: str, partitions: int, partition_of: Callable[[str, int], int], help: str
) -> BatchedTable:
    """Add a table to the app; its changelog topic has as many partitions as the topics of its keys.

    Args:
        app: the worker's.
        name: of the table.
        partitions: of the topics.
        partition_of: where those topics place a key, of how many partitions.
        help: for people.
    """
    table = BatchedTable(app, name=name, partitions=partitions, help=help)
    table.place = lambda key: partition_of(key, partitions)
    app.tables.add(table)
    return table
