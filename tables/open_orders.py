"""``open-orders``: the orders of the table ``waiting`` in Postgres, by their home.  For pages and metrics.

An order is here while it is not over some seconds after it was taken in, or while its money is to be given back.
"""

from __future__ import annotations

from datetime import datetime

from orderstream.streams.upstream.app import App
from orderstream.tables.batched import BatchedTable, batched_table

NAME = "open-orders"


def open_orders_table(app: App, partitions: int) -> BatchedTable:
    """Add the table to the app."""
    return batched_table(app, NAME, partitions, "orders that wait: status, payment, since when")


def note_waiting(
    table: BatchedTable, order_id: str, home: int, status: str, payment: str | None, since: datetime
) -> None:
    """Put how a waiting order stands into the table, unless it is there so."""
    value = {"status": status, "payment": payment, "since": since.timestamp()}
    if table.read(order_id) != value:
        table.put(order_id, value, home)
