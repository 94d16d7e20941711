"""Every topic: what it carries, how it is keyed, who may write to it, how long it keeps.

Two owners share all decisions and need no lock.  The worker that holds a *product's* partition decides over its stock;
the worker that holds an *order's* partition decides over its life.  All topics have the same number of partitions, so
Faust's assignor gives partition *p* of each of them to the same worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KeyedBy = Literal["product", "order", "source"]
Writer = Literal["outside", "ingress", "cli", "reserve", "pay", "commit", "expire"]


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """One topic.

    Attributes:
        name: as in the docs; the broker's name carries ``topic_prefix`` in front.
        keyed_by: whose partitioner places a record: product id, order id, or as it came.
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
    "order-lines", "product", ("reserve",), True, "lines of orders whose products belong to several owners"
)
RESERVATIONS = TopicSpec("reservations", "order", ("reserve",), True, "lines held, or refused with the reason")
ORDER_COMMANDS = TopicSpec(
    "order-commands", "order", ("outside", "ingress", "cli", "expire", "pay"), False, "cancel or expire an order"
)
SETTLEMENTS = TopicSpec("settlements", "product", ("pay",), True, "held lines to commit or to release")
STOCK_COMMANDS = TopicSpec(
    "stock-commands",
    "product",
    ("outside", "ingress", "cli", "commit"),
    False,
    "receive stock, adjust it with a reason, recount it",
)
ORDER_EVENTS = TopicSpec("order-events", "order", ("reserve", "pay", "commit"), False, "what became of an order")
DEAD_LETTERS = TopicSpec(
    "dead-letters", "source", ("reserve", "pay", "commit"), False, "a record that no stage can process, and why"
)

TOPICS: tuple[TopicSpec, ...] = (
    ORDERS,
    ORDER_LINES,
    RESERVATIONS,
    ORDER_COMMANDS,
    SETTLEMENTS,
    STOCK_COMMANDS,
    ORDER_EVENTS,
    DEAD_LETTERS,
)

TABLES = ("open-orders", "stock")
"""Faust tables.  Each has a changelog topic, compacted, partitioned like the topics of its keys."""


def changelog_topic(app_id: str, table: str) -> str:
    """Return the name of a table's changelog topic, as Faust makes it."""
    return f"{app_id}-{table}-changelog"
