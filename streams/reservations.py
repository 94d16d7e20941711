"""What travels between reserve and pay: lines for their owner, and verdicts on lines.

Inner topics carry lists: one record holds many lines for one partition.  A record is JSON, ``{"v": 1, "rows": [[…], …]}``,
each row the fields of the tuple below, in order.
"""

from __future__ import annotations

from typing import NamedTuple


class LineToReserve(NamedTuple):
    """A line of an order of several products, sent to the owner of its product (topic ``order-lines``)."""

    order_id: str
    product_id: str
    quantity: int
    line_count: int
    user_id: str
    payment_method: str
    reply_to: str | None


class LineReserved(NamedTuple):
    """The verdict on a line, for the owner of its order (topic ``reservations``).

    ``reason`` is None for a line that is held, at ``unit_price_cents``; else the line was refused for that reason.
    ``reply_to`` is the channel on which a client waits for the order's verdict.  ``again`` is set when the verdict is that
    of an earlier record: anything may have become of the order since.
    """

    order_id: str
    product_id: str
    quantity: int
    unit_price_cents: int
    reason: str | None
    line_count: int
    user_id: str
    payment_method: str
    reply_to: str | None
    again: bool
