"""The tables ``stock`` and ``open-orders``: views of Postgres, for pages and metrics.  Nothing decides by them.

``stock`` has the last counts of each product that has moved, at its owner.  ``open-orders`` has the orders that wait in
Postgres, at their home: those that are not over some seconds after they were taken in, or whose money is to be given back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Container, Iterable, Mapping
from datetime import datetime

from orderstream.lua.gate import Counts
from orderstream.streams.partitions import product_partition
from orderstream.streams.producer import Step
from orderstream.streams.upstream.app import App
from orderstream.tables.batched import batched_table


class Views:
    """The tables of one worker.

    Args:
        app: they are added to it.
        partitions: of the topics, and hence of their changelogs.
    """

    def __init__(self, app: App, partitions: int) -> None:
        self._partitions = partitions
        self.stock = batched_table(app, "stock", partitions, "available, reserved and sold units of each product")
        self.open_orders = batched_table(
            app, "open-orders", partitions, "orders that wait: status, payment, since when"
        )

    def counted(self, counts: Mapping[str, Counts], sold: Mapping[str, int], *, recounted: Container[str] = ()) -> None:
        """Note the newest counts of products; older ones than are there are passed over, but for ``recounted`` ones."""
        for product_id, now in counts.items():
            before = self.stock.read(product_id)
            if before is None or before["version"] < now.version or product_id in recounted:
                self.stock.put(
                    product_id,
                    {
                        "available": now.on_hand - now.reserved,
                        "reserved": now.reserved,
                        "sold": sold[product_id],
                        "version": now.version,
                    },
                    product_partition(product_id, self._partitions),
                )

    def waits(self, order_id: str, home: int, status: str, payment: str | None, since: datetime) -> None:
        """Note how an order stands that waits since then."""
        value = {"status": status, "payment": payment, "since": since.timestamp()}
        if self.open_orders.read(order_id) != value:
            self.open_orders.put(order_id, value, home)

    def over(self, gone: Iterable[tuple[int, str]]) -> None:
        """Note homes and ids of orders that do not wait any more."""
        for home, order_id in gone:
            self.open_orders.drop(order_id, home)

    async def flush(self, owned: Collection[int], send: Callable[[Step], Awaitable[None]]) -> None:
        """Flush both tables; see :meth:`~orderstream.tables.batched.BatchedTable.flush`."""
        await self.stock.flush(owned, send)
        await self.open_orders.flush(owned, send)
