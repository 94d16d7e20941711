"""``stock``: the last counts of each product (owner: the product's partition), as Postgres had them.  For pages."""

from __future__ import annotations

from collections.abc import Container, Mapping

from orderstream.lua.gate import Counts
from orderstream.streams.partitions import product_partition
from orderstream.streams.upstream.app import App
from orderstream.tables.batched import BatchedTable, batched_table

NAME = "stock"


def stock_table(app: App, partitions: int) -> BatchedTable:
    """Add the table to the app."""
    return batched_table(app, NAME, partitions, "available, reserved and sold units of each product")


def note_counts(
    table: BatchedTable,
    counts: Mapping[str, Counts],
    sold: Mapping[str, int],
    partitions: int,
    *,
    recounted: Container[str] = (),
) -> None:
    """Put the newest counts into the table; older ones than it has are passed over, but for the ``recounted`` products."""
    for product_id, now in counts.items():
        before = table.read(product_id)
        if before is None or before["version"] < now.version or product_id in recounted:
            table.put(
                product_id,
                {
                    "available": now.on_hand - now.reserved,
                    "reserved": now.reserved,
                    "sold": sold[product_id],
                    "version": now.version,
                },
                product_partition(product_id, partitions),
            )
