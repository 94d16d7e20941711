"""What happened to an order, status by status: when, why, and by which record.  Pure: of the order's row alone.

The row keeps when each status came, where the order's record stands, and where the cancel that ended it.  A status that came
by the provider's answer, by those of other homes or by the clock has no record of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orderstream.settings import Settings
from orderstream.streams.orders import Status
from orderstream.streams.topics import ORDER_COMMANDS, ORDERS


def history(order: Mapping[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """Return what happened to an order, oldest first.  It only grows: an entry keeps its index.

    Args:
        order: a row of the query ``order`` or ``order_histories``.
        settings: of the pipeline.

    Returns:
        ``status``, ``at``, ``reason`` (of CANCELLED only) and ``record``: ``topic``, ``partition`` and ``offset``
        of its cause, None where that was no single record.
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
    if status == Status.CANCELLED and order["command_offset"] is not None:
        spec, partition, offset = ORDER_COMMANDS, order["command_partition"], order["command_offset"]
    elif order[f"{status.lower()}_at"] == order["created_at"]:  # reached in the transaction that took the order in
        spec, partition, offset = ORDERS, order["home"], order["source_offset"]
    else:
        return None
    return {"topic": settings.topic(spec.name), "partition": partition, "offset": offset}
