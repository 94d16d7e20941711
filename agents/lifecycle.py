"""The life of an order, as pure decisions: what its owner makes of verdicts, commands, charges, and what Postgres answers.

::

    CREATED ──all lines held──▶ RESERVED ──charged──▶ PAID ──all lines committed──▶ CONFIRMED
       │                           │                    │                              │
       └──a line refused, expire,  └──declined, expire, └──cancel──▶ CANCELLED,        └──cancel──▶ CANCELLED,
          cancel──▶ CANCELLED         cancel──▶ CANCELLED   refunded, returned             refunded, returned

An owner decides one thing at a time.  A former owner that has not noticed the rebalance may decide too: the order's row in
Postgres takes the first decision, and the other owner learns it from the answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orderstream.streams.orders import Reason, Status
from orderstream.streams.reservations import LineReserved

PRECEDENCE = tuple(Reason)
"""When lines are refused for different reasons, the first of these is the order's."""


@dataclass(slots=True)
class OpenOrder:
    """An order that is not over for its owner.

    Attributes:
        partition: of the order's owner.
        lines: product id to ``(quantity, unit price in cents, reason)``, of the lines decided so far; reason None: held.
        status: CREATED while lines are undecided, RESERVED while the charge is under way, CANCELLED when the order has
            ended and a charge or verdicts are still to come.
        charge_asked: the provider was asked, or may have been; the outcome has to be learned before this can be forgotten.
        refund: the charge to give back, once the provider has answered.
        unseen: products whose verdicts were read from Postgres, and whose records are still to come.
        since: when the owner first heard of it, seconds since the epoch.
        source: offset on ``reservations`` of the last verdict taken in; None where it is not known any more.
    """

    order_id: str
    partition: int
    user_id: str
    payment_method: str
    line_count: int
    reply_to: str | None = None
    lines: dict[str, tuple[int, int, str | None]] = field(default_factory=dict)
    status: str = Status.CREATED
    charge_asked: bool = False
    refund: str | None = None
    unseen: list[str] = field(default_factory=list)
    since: float = field(default_factory=time.time)
    source: int | None = None

    @property
    def decided(self) -> bool:
        """Whether every line has its verdict."""
        return len(self.lines) == self.line_count

    @property
    def refusal(self) -> str | None:
        """Why the order can't be had, or None."""
        reasons = {reason for _, _, reason in self.lines.values() if reason is not None}
        return next((reason for reason in PRECEDENCE if reason in reasons), None) if reasons else None

    @property
    def total_cents(self) -> int:
        """What the held lines cost."""
        return sum(quantity * price for quantity, price, reason in self.lines.values() if reason is None)

    def held(self) -> Iterable[tuple[str, int]]:
        """Yield product id and quantity of the lines that are held."""
        return ((product_id, quantity) for product_id, (quantity, _, reason) in self.lines.items() if reason is None)

    def note(self, line: LineReserved) -> None:
        """Take a line's verdict in; a repeated one changes nothing."""
        if line.product_id in self.unseen:
            self.unseen.remove(line.product_id)
        self.lines[line.product_id] = (line.quantity, line.unit_price_cents, line.reason)

    def stored(self) -> dict[str, Any]:
        """Return what the table keeps."""
        return {
            "partition": self.partition,
            "user_id": self.user_id,
            "payment_method": self.payment_method,
            "line_count": self.line_count,
            "reply_to": self.reply_to,
            "lines": self.lines,
            "status": self.status,
            "charge_asked": self.charge_asked,
            "refund": self.refund,
            "unseen": self.unseen,
            "since": self.since,
            "source": self.source,
        }

    @classmethod
    def from_stored(cls, order_id: str, value: Mapping[str, Any]) -> OpenOrder:
        """Return the order that the table keeps under this id; it shares nothing with it that can change."""
        lines = {product_id: (line[0], line[1], line[2]) for product_id, line in value["lines"].items()}
        return cls(order_id=order_id, **{**value, "lines": lines, "unseen": [*value["unseen"]]})

    @classmethod
    def from_verdict(cls, line: LineReserved, partition: int) -> OpenOrder:
        """Return a new order, from the verdict on the first of its lines to come in."""
        order = cls(line.order_id, partition, line.user_id, line.payment_method, line.line_count, line.reply_to)
        order.note(line)
        return order

    @classmethod
    def from_row(cls, row: Mapping[str, Any], partition: int) -> OpenOrder:
        """Return the order as Postgres has it, lines still pending left out."""
        lines = {
            product_id: (quantity, price, reason)
            for product_id, quantity, state, reason, price in zip(
                row["product_ids"], row["quantities"], row["states"], row["reasons"], row["unit_prices"], strict=True
            )
            if state != "pending"
        }
        return cls(
            row["order_id"],
            partition,
            row["user_id"],
            row["payment_method"],
            row["line_count"],
            lines=lines,
            status=row["status"],
        )
