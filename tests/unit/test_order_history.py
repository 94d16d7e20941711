"""The history of an order: what its row says about each status and the record that caused it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from orderstream.http.history import history
from orderstream.settings import Settings
from orderstream.streams.orders import Reason, Status
from orderstream.streams.partitions import order_partition

SETTINGS = Settings(_env_file=None, topic_prefix="t.")
ID = "5e6e7e1c-2f52-4d2b-9a55-5d0e5a0c9a11"
MINE = order_partition(ID, SETTINGS.partitions)
BEGAN = datetime(2025, 1, 31, 12, tzinfo=UTC)


def records(lines: int, *statuses: Status, reason: Reason | None = None, **more: Any) -> list[Any]:
    order: dict[str, Any] = {f"{status.lower()}_at": None for status in Status}
    order |= {f"{status.lower()}_at": BEGAN + timedelta(seconds=n) for n, status in enumerate(statuses)}
    places = {"reservation_offset": 20, "settlement_partition": 3, "settlement_offset": 30, "command_offset": 40}
    order |= {"order_id": ID, "line_count": lines, "reason": reason, "source_partition": 1, "source_offset": 10}
    found = history(order | places | more, SETTINGS)
    assert [step["status"] for step in found] == [*statuses]
    assert [step["at"] for step in found] == [BEGAN + timedelta(seconds=n) for n in range(len(found))]
    assert [step.get("reason") for step in found] == [
        reason if step["status"] == "CANCELLED" else None for step in found
    ]
    return [step["record"] and tuple(step["record"].values()) for step in found]


ORDER, VERDICT, SETTLED, COMMAND = (
    ("t.orders", 1, 10),
    ("t.reservations", MINE, 20),
    ("t.settlements", 3, 30),
    ("t.order-commands", MINE, 40),
)


@pytest.mark.parametrize(("lines", "reserved"), [(1, ORDER), (2, VERDICT)])
def test_a_sale_and_its_return(lines: int, reserved: Any) -> None:
    whole = [*Status]
    assert records(lines, *whole, reason=Reason.CANCELLED_BY_USER) == [ORDER, reserved, VERDICT, SETTLED, COMMAND]


@pytest.mark.parametrize(
    ("lines", "reason", "record"),
    [
        (1, Reason.INSUFFICIENT_STOCK, ORDER),
        (2, Reason.UNKNOWN_PRODUCT, VERDICT),
        (1, Reason.PAYMENT_DECLINED, VERDICT),
        (2, Reason.PAYMENT_DECLINED, VERDICT),
        (1, Reason.EXPIRED, COMMAND),
        (1, Reason.CANCELLED_BY_USER, COMMAND),
    ],
)
def test_an_end_without_a_sale(lines: int, reason: Reason, record: Any) -> None:
    assert records(lines, Status.CREATED, Status.CANCELLED, reason=reason) == [ORDER, record]


def test_a_record_that_is_not_known_is_none() -> None:
    nothing = {"reservation_offset": None, "command_offset": None, "settlement_offset": None}
    assert records(2, *Status, reason=Reason.EXPIRED, **nothing) == [ORDER, None, None, None, None]
