"""``open-orders``: orders that their owner still has to do with (owner: the order's partition).

An order is here while lines of it are undecided, while its charge is in progress, and, if it ended before the provider
answered, until the answer is known.  One that goes through all that within a batch never gets in here.
"""

from __future__ import annotations

from orderstream.streams.partitions import order_partition
from orderstream.streams.upstream.app import App
from orderstream.tables.batched import BatchedTable, batched_table

NAME = "open-orders"


def open_orders_table(app: App, partitions: int) -> BatchedTable:
    """Add the table to the app."""
    return batched_table(
        app, NAME, partitions, order_partition, "orders that are not decided yet: lines, status, total"
    )
