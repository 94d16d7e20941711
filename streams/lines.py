"""Lines of orders between their home and the owners of their products: what is wanted of a line, and where it stands."""

from __future__ import annotations

import re
from typing import NamedTuple

from orderstream.streams.orders import Reason

ACTIONS = frozenset({"hold", "commit", "release", "return"})
STATES = frozenset("hxcrn")
REASONS = frozenset({None, *map(str, Reason)})
UNITS_MAX = 2**31 - 1
CENTS_MAX = 2**63 - 1
_is_uuid = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").fullmatch


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

    def is_sound(self, partitions: int) -> bool:
        """Tell whether a stage may have written this; of so many partitions."""
        return (
            self.action in ACTIONS
            and _is_uuid(self.order_id) is not None
            and 0 <= self.quantity <= UNITS_MAX
            and 0 <= self.home < partitions
            and "\0" not in self.product_id
            and "\0" not in self.user_id
        )


class LineStands(NamedTuple):
    """A row of a record on ``reservations``, in the order's home: where its owner has the line now.

    ``state`` is h held (at ``price_cents``), x refused (for ``reason``), c committed, r released or n returned.
    """

    order_id: str
    product_id: str
    state: str
    price_cents: int
    reason: str | None

    def is_sound(self) -> bool:
        """Tell whether a stage may have written this."""
        return (
            self.state in STATES
            and self.reason in REASONS
            and _is_uuid(self.order_id) is not None
            and 0 <= self.price_cents <= CENTS_MAX
        )
