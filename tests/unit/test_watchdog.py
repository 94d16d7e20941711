"""What the watchdog takes for a standstill.  That it ends the process is tested on real engines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from orderstream.agents.watchdog import Open, Progress, Standstill, Watchdog

ONE, TWO = TP("orders", 0), TP("orders", 1)


@pytest.mark.parametrize(
    ("place", "at_rest"),
    [
        (Progress(done=10, committed=10, end=10), True),
        (Progress(done=None, committed=None, end=10), True),  # not taken in yet: its seek is to come
        (Progress(done=0, committed=None, end=0), True),
        (Progress(done=9, committed=9, end=10), False),
        (Progress(done=10, committed=9, end=10), False),
        (Progress(done=10, committed=None, end=10), False),
    ],
)
def test_a_partition_is_at_rest_when_nothing_waits_and_all_is_committed(place: Progress, at_rest: bool) -> None:
    assert place.at_rest is at_rest


def test_time_counts_while_nothing_is_done() -> None:
    still = Standstill()
    assert still.update({ONE: Progress(5, 5, 9)}, 100.0) == {ONE: 0.0}
    assert still.update({ONE: Progress(5, 5, 20)}, 130.0) == {ONE: 30.0}
    assert still.update({ONE: Progress(6, 5, 20)}, 140.0) == {ONE: 0.0}


def test_time_counts_while_nothing_is_committed_of_what_is_done() -> None:
    still = Standstill()
    still.update({ONE: Progress(9, 5, 9)}, 100.0)
    assert still.update({ONE: Progress(9, 5, 9)}, 110.0) == {ONE: 10.0}
    assert still.update({ONE: Progress(9, 9, 9)}, 120.0) == {}


def test_each_partition_has_its_own_time() -> None:
    still = Standstill()
    still.update({ONE: Progress(5, 5, 9), TWO: Progress(5, 5, 9)}, 100.0)
    assert still.update({ONE: Progress(5, 5, 9), TWO: Progress(7, 7, 9)}, 110.0) == {ONE: 10.0, TWO: 0.0}


def test_a_partition_that_had_a_reason_starts_from_zero() -> None:
    still = Standstill()
    still.update({ONE: Progress(5, 5, 9)}, 100.0)
    assert still.update({}, 150.0) == {}
    assert still.update({ONE: Progress(5, 5, 9)}, 200.0) == {ONE: 0.0}


def test_a_transaction_is_as_old_as_where_it_begins_stays_the_same() -> None:
    seen = Open()
    assert seen.update({ONE: 5, TWO: 7}, 100.0) == {ONE: (5, 0.0), TWO: (7, 0.0)}
    assert seen.update({ONE: 5, TWO: 9}, 130.0) == {ONE: (5, 30.0), TWO: (9, 0.0)}
    assert seen.update({}, 140.0) == {}
    assert seen.update({ONE: 5}, 150.0) == {ONE: (5, 0.0)}


def test_an_open_transaction_is_logged_each_time_it_is_twice_as_old() -> None:
    seen, told = Open(), []
    for now in range(100, 200, 10):
        ((_, open_s),) = seen.update({ONE: 5}, float(now)).values()
        if seen.is_due(ONE, open_s) and open_s:
            told.append(open_s)
    assert told == [10.0, 20.0, 40.0, 80.0]
    seen.update({ONE: 6}, 200.0)
    seen.update({ONE: 6}, 210.0)
    assert seen.is_due(ONE, 10.0), "another one is told by itself"


def test_tables_that_have_restored_nothing_yet_count_as_a_rebalance() -> None:
    """While the broker has not answered where a changelog is restored from, there is no offset."""
    recovery = SimpleNamespace(in_recovery=True, active_offsets={ONE: None, TWO: 7})
    app = SimpleNamespace(
        rebalancing=False,
        rebalancing_count=1,
        consumer_generation_id=1,
        pulse=None,
        tables=SimpleNamespace(recovery=recovery),
    )
    desk: Any = SimpleNamespace(stage=SimpleNamespace(app=app))
    watchdog = Watchdog(desk, stall_timeout_s=60.0)
    assert watchdog._is_rebalancing()
    recovery.in_recovery = False
    assert not watchdog._is_rebalancing()
