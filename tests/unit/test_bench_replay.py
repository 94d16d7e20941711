"""When a replay is a result."""

from __future__ import annotations

from typing import Any

import pytest

from orderstream.bench.replay import drifted, sections

GOOD: dict[str, Any] = {"differences": [], "orders": 10, "open": 0}
DIFFERENCE = {"kind": "order", "subject": "o1", "must": "CONFIRMED", "found": "PAID", "repair": ""}


def test_sections_are_all_orders_and_none_is_too_large() -> None:
    assert sections(120, 50) == [50, 50, 20]
    assert sections(50, 50) == [50]
    assert sections(100_000, 50_000) == [50_000, 50_000]


def test_a_store_that_agrees_is_a_result() -> None:
    assert drifted(GOOD, 10) == []


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({"differences": [DIFFERENCE]}, "drift: 1 differences, order of o1"),
        ({"orders": 9}, "9 orders compared instead of 10"),
        ({"open": 1}, "1 orders are open"),
    ],
)
def test_drift_and_orders_that_were_not_compared_are_faults(found: dict[str, Any], fault: str) -> None:
    assert drifted({**GOOD, **found}, 10) == [fault]
