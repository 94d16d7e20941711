"""What happened to an order, status by status: when, why, and by which record.  Pure: of the order's row alone.

The row keeps the time of each status and the offsets of the records that caused them.  Topics and, but for settlements and
the order itself, partitions follow from the status and the order's id, so they are not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orderstream.settings import Settings
from orderstream.streams.orders import Reason, Status
from orderstream.streams.partitions import order_partition
from orderstream.streams.topics import ORDER_COMMANDS, ORDERS, RESERVATIONS, SETTLEMENTS, TopicSpec

_COMMANDED = frozenset({Reason.EXPIRED, Reason.CANCELLED_BY_USER})
"""Reasons that come by a command; the others follow from a verdict."""


def history(order: Mapping[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """Return what happened to an order, oldest first.  It only grows: an entry keeps its index.

    Args:
        order: a row of the query ``order`` or ``order_histories``.
        settings: of the pipeline.

    Returns:
        ``status``, ``at``, ``reason`` (of CANCELLED only) and ``record``: ``topic``, ``partition`` and ``offset``
        of its cause, None where that is not known.
    """
    steps = []
    for status in Status:  # in the order of an order's life: a cancelled order goes no further
        at = order[f"{status.lower()}_at"]
        if at is None:
            continue
        why = {"reason": order["reason"]} if status == Status.CANCELLED else {}
        steps.append({"status": status, "at": at, **why, "record": _record(status, order, settings)})
    return steps


def _record(status: Status, order: Mapping[str, Any], settings: Settings) -> dict[str, Any] | None:
    alone = order["line_count"] == 1
    refused = status == Status.CANCELLED and order["reason"] not in _COMMANDED
    declined = refused and order["reason"] == Reason.PAYMENT_DECLINED
    spec: TopicSpec
    if status == Status.CREATED or (alone and (status == Status.RESERVED or (refused and not declined))):
        spec, partition, offset = ORDERS, order["source_partition"], order["source_offset"]
    elif status == Status.CONFIRMED:
        spec, partition, offset = SETTLEMENTS, order["settlement_partition"], order["settlement_offset"]
    else:
        partition = order_partition(order["order_id"], settings.partitions)
        commanded = status == Status.CANCELLED and not refused
        spec, offset = (
            (ORDER_COMMANDS, order["command_offset"]) if commanded else (RESERVATIONS, order["reservation_offset"])
        )
    return None if offset is None else {"topic": settings.topic(spec.name), "partition": partition, "offset": offset}
