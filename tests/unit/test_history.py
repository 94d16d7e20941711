"""The ring of a worker's figures, and the sample of how long orders take."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderstream.http.stats.window import ROWS_MAX, History, cached
from orderstream.sample import FOLLOWED_MAX, FOLLOWED_MAX_S, SAMPLE_PER_S, Sample, percentiles


def arrivals(first: int, number: int, at_s: float = 1_000.0) -> list[Any]:
    return [
        SimpleNamespace(order=SimpleNamespace(order_id=f"o-{n}"), record=SimpleNamespace(timestamp=at_s * 1000))
        for n in range(first, first + number)
    ]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(values: list[float]) -> None:
    for share, found in zip((50, 95, 99), percentiles(values), strict=True):
        assert found in values
        assert 100 * sum(value <= found for value in values) >= share * len(values)
        assert 100 * sum(value < found for value in values) < share * len(values)


def test_no_value_has_no_percentile() -> None:
    assert percentiles([]) == (None, None, None)


def test_rates_are_differences_over_the_time_that_really_passed() -> None:
    history = History(("created",), ("lag",))
    history.add(10.0, {"created": 100}, {"lag": 1})
    history.add(12.0, {"created": 300}, {"lag": None})
    history.add(13.0, {"created": 300}, {"lag": 7})
    assert history.columns == ("at", "created", "lag")
    assert history.since(0) == [(12.0, 100.0, None), (13.0, 0.0, 7)]
    assert history.since(12.0) == [(13.0, 0.0, 7)]
    assert history.mean(5) == {"created": 50.0}


def test_a_clock_that_goes_back_makes_no_row() -> None:
    history = History(("created",), ())
    for at in (10.0, 9.0, 9.0, 10.0):
        history.add(at, {"created": 1}, {})
    assert history.since(0) == [(10.0, 0.0)]


def test_the_ring_is_bounded() -> None:
    history = History(("created",), ())
    for n in range(2 * ROWS_MAX):
        history.add(float(n), {"created": n}, {})
    assert len(history.since(0)) == ROWS_MAX


def ended(sample: Sample, order_ids: Iterable[str]) -> list[str]:
    """End orders; return those that were followed."""
    followed = []
    for order_id in order_ids:
        before = sample.time_to_end(0.0, math.inf)["sampled"]
        sample.passed(order_id, "CONFIRMED", 1_000.0)
        if sample.time_to_end(0.0, math.inf)["sampled"] > before:
            followed.append(order_id)
    return followed


def test_of_few_orders_all_are_followed_and_timed_from_their_record() -> None:
    sample = Sample()
    sample.offer(arrivals(0, 5))
    for n in range(5):
        sample.passed(f"o-{n}", "RESERVED", 1_000.5)
        sample.passed(f"o-{n}", "CONFIRMED", 1_001.0 + n)
    sample.passed("o-0", "CANCELLED", 1_050.0)  # after its end: counts once
    sample.passed("stranger", "CONFIRMED", 1_050.0)
    times = sample.time_to_end(1_006.0, 60.0)
    assert (times["sampled"], times["p50"], times["p99"]) == (5, 3.0, 5.0)
    assert sample.time_to_end(1_006.0, 2.0)["sampled"] == 1


def test_after_a_rebalance_no_order_of_before_is_followed() -> None:
    sample = Sample()
    sample.offer(arrivals(0, 3))
    sample.forget()
    sample.offer(arrivals(3, 1))
    assert ended(sample, [f"o-{n}" for n in range(4)]) == ["o-3"]


@pytest.mark.parametrize("batch", [1, 7, 1_000])
def test_of_many_orders_some_are_followed_spread_over_all_batches(batch: int) -> None:
    sample, sent = Sample(), 0
    for second in range(3):
        sample.tick(1_000.0 + second)
        first = sent
        for _ in range(10_000 // batch):
            sample.offer(arrivals(sent, batch))
            sent += batch
        followed = [int(order_id[2:]) for order_id in ended(sample, (f"o-{n}" for n in range(first, sent)))]
    assert SAMPLE_PER_S * 0.9 <= len(followed) <= SAMPLE_PER_S * 1.1
    gaps = [later - sooner for sooner, later in pairwise(followed)]
    assert max(gaps) <= 2 * 10_000 / SAMPLE_PER_S


def test_what_never_ends_is_bounded_and_given_up() -> None:
    ids = [f"o-{n}" for n in range(6_000)]

    def offered() -> Sample:
        sample = Sample()
        for n in range(30):
            sample.offer(arrivals(n * 200, 200))
            sample.tick(1_000.0)
        return sample

    assert len(ended(offered(), ids)) == FOLLOWED_MAX
    given_up = offered()
    given_up.tick(1_000.0 + FOLLOWED_MAX_S + 1)
    assert ended(given_up, ids) == []


def test_a_scan_that_takes_long_is_made_less_often() -> None:
    now, scans = 0.0, 0

    def scan() -> int:
        nonlocal now, scans
        now += 0.5
        scans += 1
        return scans

    answer = cached(scan, lambda: now, least_s=1.0, share=0.01)
    assert answer() == 1
    now += 49.0
    assert answer() == 1
    now += 1.0
    assert answer() == 2
