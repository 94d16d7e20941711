"""What happened to an order, status by status: when, why, and by which record.  Pure: of the order's row alone.

The row keeps when each status came, where the order's record stands, and where the command that ended it.  What follows from
the provider's answer, or from that of another home, has no record of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orderstream.settings import Settings
from orderstream.streams.orders import Reason, Status
from orderstream.streams.topics import ORDER_COMMANDS, ORDERS

_COMMANDED = frozenset({Reason.EXPIRED, Reason.CANCELLED_BY_USER})
"""Reasons that come by a command; an expiry mostly comes by the clock, and has no record."""


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
    if status == Status.CANCELLED and order["reason"] in _COMMANDED:
        spec, partition, offset = ORDER_COMMANDS, order["command_partition"], order["command_offset"]
    elif status == Status.CREATED or order[f"{status.lower()}_at"] == order["created_at"]:
        spec, partition, offset = ORDERS, order["home"], order["source_offset"]
    else:
        return None
    return None if offset is None else {"topic": settings.topic(spec.name), "partition": partition, "offset": offset}
