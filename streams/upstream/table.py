"""A Faust table whose content is set directly, beside Faust's own writes."""

from __future__ import annotations

from typing import Any

import faust


class Table(faust.Table):
    """A table in memory.

    Faust writes through ``table[key] = value``, which sends a changelog record to the partition of the event in hand, and
    refuses to be used elsewhere (faust-streaming/faust#497, for ``take()``).  The store notes the partition of each key for
    the end of a recovery, when it drops those of other workers (faust-streaming/faust#199): who sets the content has to note
    it as well.
    """

    def stored(self, key: str) -> Any:
        """Return the value of a key, or None."""
        return self.data.data.get(key)

    @property
    def content(self) -> dict[str, Any]:
        """Keys and values of the store, to be read and set."""
        content: dict[str, Any] = self.data.data
        return content

    @property
    def key_partitions(self) -> dict[str, int]:
        """The partition of each key of :attr:`content`."""
        partitions: dict[str, int] = self.data._key_partition
        return partitions
