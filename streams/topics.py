"""Every topic: what it carries, how it is keyed, who may write to it, how long it keeps.

An order's *home* is the partition of ``orders`` in which its record stands: that of its first product.  All about the order
is decided by the worker that holds its home.  A product's stock is the business of the worker that holds the product's
partition.  All topics have the same number of partitions, so Faust's assignor gives partition *p* of each to one worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KeyedBy = Literal["product", "order", "home", "source"]
Writer = Literal["outside", "ingress", "cli", "reserve", "pay", "commit", "timers"]


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """One topic.

    Attributes:
        name: as in the docs; the broker's name carries ``topic_prefix`` in front.
        keyed_by: whose partitioner places a record: product id, order id, the order's home, or as it came.
        writers: who may produce to it; a test holds the stages to that.
        inner: records between stages, each a list of outcomes for one partition; kept for a shorter time.
        carries: for people.
    """

    name: str
    keyed_by: KeyedBy
    writers: tuple[Writer, ...]
    inner: bool
    carries: str


ORDERS = TopicSpec("orders", "product", ("outside", "ingress", "cli", "reserve"), False, "an order, one a record")
ORDER_LINES = TopicSpec(
    "order-lines",
    "product",
    ("commit",),
    True,
    "lines of other homes' orders: to hold, then to commit, release or return",
)
RESERVATIONS = TopicSpec("reservations", "home", ("commit",), True, "what became of such lines, for the orders' homes")
ORDER_COMMANDS = TopicSpec(
    "order-commands", "order", ("outside", "ingress", "cli", "commit", "timers"), False, "cancel an order"
)
STOCK_COMMANDS = TopicSpec(
    "stock-commands",
    "product",
    ("outside", "ingress", "cli", "commit"),
    False,
    "receive stock, adjust or set it with a reason, recount it; name, price and limit products",
)
ORDER_EVENTS = TopicSpec("order-events", "home", ("commit",), False, "what became of an order")
DEAD_LETTERS = TopicSpec(
    "dead-letters", "source", ("reserve", "pay", "commit"), False, "a record that no stage can process, and why"
)

TOPICS: tuple[TopicSpec, ...] = (
    ORDERS,
    ORDER_LINES,
    RESERVATIONS,
    ORDER_COMMANDS,
    STOCK_COMMANDS,
    ORDER_EVENTS,
    DEAD_LETTERS,
)

TABLES = ("open-orders", "stock")
"""Faust tables.  Each has a changelog topic, compacted, partitioned like the topics of its keys."""


def changelog_topic(app_id: str, table: str) -> str:
    """Return the name of a table's changelog topic, as Faust makes it."""
    return f"{app_id}-{table}-changelog"
