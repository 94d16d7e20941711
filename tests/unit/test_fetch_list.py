"""The kept list of a fetcher finds what aiokafka finds that goes over all partitions."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import Fetcher, FetchError
from aiokafka.consumer.subscription_state import SubscriptionState

from orderstream.streams.upstream.fetch_list import (
    FETCH_INTERVAL_MAX_S,
    FETCH_INTERVAL_MIN_S,
    FETCH_WORTH,
    FetchList,
)

PLACES = [TopicPartition(topic, n) for topic in ("orders", "lines") for n in range(4)]


class Reader:
    """aiokafka's own fetcher and what it knows; its connection is never used."""

    def __init__(self) -> None:
        leaders = {topic: {n: SimpleNamespace(leader=n % 2) for n in range(4)} for topic in ("orders", "lines")}
        self.cluster: Any = SimpleNamespace(_partitions=leaders, leader_for_partition=self._leader)
        client = SimpleNamespace(_loop=asyncio.get_running_loop(), _metadata_max_age_ms=300_000, cluster=self.cluster)
        self.subscriptions = SubscriptionState()
        self.fetcher: Any = Fetcher(client, self.subscriptions)
        self.fetcher._fetch_task.cancel()
        self.assign()
        self.list = FetchList(self.fetcher)
        self.whole = 0
        whole = self.list._whole

        def counted(assignment: Any) -> Any:
            self.whole += 1
            return whole(assignment)

        self.list._whole = counted

    def assign(self, places: list[TopicPartition] = PLACES) -> None:
        if self.subscriptions.subscription is not None:
            self.subscriptions.unsubscribe()
        self.subscriptions.assign_from_user(places)
        self.assignment: Any = self.subscriptions.subscription.assignment
        for n, place in enumerate(places):
            self.assignment.state_value(place).seek(n)

    def _leader(self, place: TopicPartition) -> int | None:
        at: int | None = self.cluster._partitions[place.topic][place.partition].leader
        return at

    def moved(self, leader: int | None, place: TopicPartition = PLACES[0]) -> None:
        """Let the metadata say that another broker leads a partition."""
        parts = {**self.cluster._partitions[place.topic], place.partition: SimpleNamespace(leader=leader)}
        self.cluster._partitions = {**self.cluster._partitions, place.topic: parts}

    def fetched(self, place: TopicPartition, backoff_s: float) -> None:
        self.fetcher._records[place] = FetchError(error=ValueError(), backoff=backoff_s)

    def check(self) -> None:
        """Compare the two, but for the order in which partitions are named, and for the time between two fetches."""
        for pace in self.list._paces.values():
            pace.interval_s = 0.0
        ours, theirs = self.list(self.assignment), self.fetcher._get_actions_per_node(self.assignment)
        assert _told(ours) == _told(theirs)
        assert ours[1:2] + ours[3:] == theirs[1:2] + theirs[3:]
        assert ours[2] == pytest.approx(theirs[2], abs=0.01)


def _told(actions: Any) -> dict[int, Any]:
    return {
        node: (
            {topic: sorted(parts) for topic, parts in request.topics},
            {name: value for name, value in vars(request).items() if name != "_topics"},
        )
        for node, request in actions[0]
    }


async def test_positions_fetches_under_way_and_records_that_wait() -> None:
    reader = Reader()
    rng = random.Random(1)
    for _ in range(300):
        reader.assignment.state_value(rng.choice(PLACES)).consumed_to(rng.randrange(1_000))
        reader.fetcher._in_flight = {node for node in (0, 1) if rng.random() < 0.4}
        reader.fetcher._records.clear()
        for place in rng.sample(PLACES, rng.choice((0, 0, 1, 3))):
            reader.fetched(place, rng.choice((0.0, rng.uniform(5, 10))))
        reader.check()
    assert reader.whole == 0


async def test_what_is_not_usual_is_left_to_the_fetcher() -> None:
    reader = Reader()
    first = reader.assignment.state_value(PLACES[0])
    for place in PLACES[::2]:
        reader.fetched(place, 0.0)  # all of a broker
    reader.check()
    reader.fetcher._records.clear()
    assert reader.whole == 0
    first.pause()
    reader.check()
    first.resume()
    first.await_reset(1)
    reader.check()
    first.reset_to(7)
    reader.moved(None)
    reader.check()
    reader.moved(-1)
    reader.check()
    assert reader.whole == 4
    reader.moved(1)
    reader.check()
    assert reader.whole == 4


async def test_another_leader_and_another_assignment_are_seen() -> None:
    reader = Reader()
    reader.check()
    for leader in (1, 2, 0):
        reader.moved(leader)
        reader.check()
    reader.assign(PLACES[:3])
    reader.check()
    reader.fetched(PLACES[5], 9.0)  # of the assignment before
    reader.list(reader.assignment)
    assert reader.whole == 1


async def test_a_fetch_waits_for_records_that_are_worth_it_at_the_rate_of_the_last_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = Reader()
    now = 1_000.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("orderstream.streams.upstream.fetch_list.time", clock)
    ends = [reader.assignment.state_value(place) for place in PLACES if reader._leader(place) == 0]

    def came(records: int, after_s: float) -> float:
        """Let so many records come of a broker, and fetch; return how long no other fetch from it begins."""
        nonlocal now
        now += after_s
        for n in range(records):
            ends[n % len(ends)].consumed_to(ends[n % len(ends)]._position + 1)
        assert {node for node, _ in reader.list(reader.assignment)[0]} == {0, 1}
        fetches, _, wait_s, *_ = reader.list(reader.assignment)
        intervals = {node: pace.interval_s for node, pace in reader.list._paces.items()}
        assert not fetches
        assert wait_s == pytest.approx(min(intervals.values()))
        return intervals[0]

    assert came(0, 0.0) == FETCH_INTERVAL_MAX_S
    assert came(1, 60.0) == FETCH_INTERVAL_MAX_S  # after a quiet while it is not held back, and the next one is
    assert came(FETCH_WORTH, 0.03 + FETCH_INTERVAL_MAX_S) == FETCH_INTERVAL_MAX_S
    assert came(2 * FETCH_WORTH, 0.05) == pytest.approx(0.025)
    assert came(100 * FETCH_WORTH, 0.05) == FETCH_INTERVAL_MIN_S
    now += FETCH_INTERVAL_MIN_S
    assert [node for node, _ in reader.list(reader.assignment)[0]] == [0]  # nothing came from the other one
    now += FETCH_INTERVAL_MAX_S
    assert {node for node, _ in reader.list(reader.assignment)[0]} == {0, 1}
    reader.moved(0)  # other metadata, the same leader
    ends[0].pause()
    for seen in (1, 2):
        fetches, _, wait_s, *_ = reader.list(reader.assignment)
        assert (fetches, reader.whole) == ([], seen)
        assert 0 < wait_s <= FETCH_INTERVAL_MAX_S
    now += FETCH_INTERVAL_MAX_S
    assert {node for node, _ in reader.list(reader.assignment)[0]} == {0, 1}
    assert reader.list(reader.assignment)[0] == []
    ends[0].resume()
    assert reader.list(reader.assignment)[0] == []
