"""The history of an order: what its row says about each status and the record that caused it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from orderstream.http.history import history
from orderstream.settings import Settings
from orderstream.streams.orders import Reason, Status

SETTINGS = Settings(_env_file=None, topic_prefix="t.")
BEGAN = datetime(2025, 1, 31, 12, tzinfo=UTC)
ORDER, CANCEL = ("t.orders", 1, 10), ("t.order-commands", 1, 40)
CREATED, RESERVED, PAID, CONFIRMED, CANCELLED = Status


def records(*steps: tuple[Status, int], reason: Reason | None = None, commanded: bool = False) -> list[Any]:
    """Return the records of an order's statuses, each given with the number of the transaction that brought it."""
    times = {status: BEGAN + timedelta(microseconds=n) for status, n in steps}
    order: dict[str, Any] = {f"{status.lower()}_at": times.get(status) for status in Status}
    order |= {"home": 1, "source_offset": 10, "reason": reason, "command_partition": None, "command_offset": None}
    if commanded:
        order |= {"command_partition": 1, "command_offset": 40}
    found = history(order, SETTINGS)
    assert [(step["status"], step["at"]) for step in found] == list(times.items())
    assert [step.get("reason") for step in found] == [reason if step["status"] == CANCELLED else None for step in found]
    return [step["record"] and tuple(step["record"].values()) for step in found]


@pytest.mark.parametrize(("reserved", "record"), [(0, ORDER), (1, None)], ids=["at home", "by other owners"])
def test_a_sale_and_its_return(reserved: int, record: Any) -> None:
    sale = [(CREATED, 0), (RESERVED, reserved), (PAID, 2), (CONFIRMED, 2)]
    assert records(*sale) == [ORDER, record, None, None]
    cancelled = records(*sale, (CANCELLED, 3), reason=Reason.CANCELLED_BY_USER, commanded=True)
    assert cancelled == [ORDER, record, None, None, CANCEL]


@pytest.mark.parametrize(
    ("steps", "reason", "record"),
    [
        ([(CREATED, 0), (CANCELLED, 0)], Reason.INSUFFICIENT_STOCK, ORDER),
        ([(CREATED, 0), (CANCELLED, 1)], Reason.UNKNOWN_PRODUCT, None),
        ([(CREATED, 0), (RESERVED, 0), (CANCELLED, 1)], Reason.PAYMENT_DECLINED, None),
        ([(CREATED, 0), (RESERVED, 0), (CANCELLED, 1)], Reason.EXPIRED, None),
        ([(CREATED, 0), (CANCELLED, 1)], Reason.CANCELLED_BY_USER, CANCEL),
    ],
)
def test_an_end_without_a_sale(steps: Sequence[tuple[Status, int]], reason: Reason, record: Any) -> None:
    assert records(*steps, reason=reason, commanded=record == CANCEL)[-1] == record
