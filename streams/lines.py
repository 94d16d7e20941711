"""Lines of orders between their home and the owners of their products: what is wanted of a line, and where it stands."""

from __future__ import annotations

from typing import NamedTuple


class LineWanted(NamedTuple):
    """A row of a record on ``order-lines``, in the partition of the product.

    ``action`` is hold, then commit, release or return.
    """

    action: str
    order_id: str
    product_id: str
    quantity: int
    home: int
    user_id: str


class LineStands(NamedTuple):
    """A row of a record on ``reservations``, in the order's home: where its owner has the line now.

    ``state`` is h held (at ``price_cents``), x refused (for ``reason``), c committed, r released or n returned.
    """

    order_id: str
    product_id: str
    state: str
    price_cents: int
    reason: str | None
