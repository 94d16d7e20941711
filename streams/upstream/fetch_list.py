"""A fetcher that keeps its list of partitions, leaders and topics, and begins its fetches when they are worth it.

aiokafka goes over every assigned partition whenever anything happens, asks who leads it, and writes the whole list anew:
when an answer comes, and again when its records were taken.  With 48 partitions of five topics that was a third of the
consumer's thread.  No upstream issue found.

It asks again as soon as its records are taken, and a broker answers as soon as it has one record: at a thousand records a
second that is a fetch for every few of them, and the broker looks at all partitions for each (aio-libs/aiokafka#1081 asks
about such a rate).  Here a fetch waits for as many records as are worth it, by how fast the last ones came.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from typing import Any

from aiokafka.protocol.fetch import FetchRequest

FETCH_WORTH = 20
"""Records that are worth a fetch."""

FETCH_INTERVAL_MIN_S, FETCH_INTERVAL_MAX_S = 0.015, 0.04
"""Between the beginnings of two fetches from a broker, in seconds.  One after a quiet while is not held back."""

Actions = tuple[list[tuple[int, Any]], dict[int, Any], float, bool, list[Any]]


class _Pace:
    """When a broker is asked.

    Attributes:
        begun: when the last fetch from it began.
        read: how many records of its partitions were read by then.
        interval_s: how long after that the next one begins.
    """

    def __init__(self) -> None:
        self.begun = float("-inf")
        self.read = 0
        self.interval_s = 0.0

    def early_s(self, now: float) -> float:
        """Return how long the next fetch has to wait; 0 or less: not at all."""
        return self.begun + self.interval_s - now

    def begin(self, now: float, read: int) -> None:
        """Note that a fetch begins, and how much was read by now."""
        worth_s = FETCH_WORTH * (now - self.begun) / max(read - self.read, 1)
        self.interval_s = min(max(worth_s, FETCH_INTERVAL_MIN_S), FETCH_INTERVAL_MAX_S)
        self.begun, self.read = now, read


class FetchList:
    """Takes the place of ``Fetcher._get_actions_per_node``, and asks it whenever something is not as usual.

    Usual is: every partition has a leader and a position, and none is paused.  The order in which partitions are named is
    not drawn anew each time: a broker that knows sessions keeps its own.

    Args:
        fetcher: ``aiokafka.consumer.fetcher.Fetcher``.
    """

    def __init__(self, fetcher: Any) -> None:
        self._fetcher = fetcher
        self._whole = fetcher._get_actions_per_node
        self._assignment: Any = None
        self._metadata: Any = None
        self._states: list[Any] = []
        self._leader_of: dict[Any, int] = {}
        self._parts: dict[int, dict[str, list[tuple[int, Any]]]] = {}
        self._paces: defaultdict[int, _Pace] = defaultdict(_Pace)

    def __call__(self, assignment: Any) -> Actions:
        """Return fetches with their brokers, positions to be set, how long to wait, and what is not known yet."""
        fetcher = self._fetcher
        if assignment is not self._assignment or fetcher._client.cluster._partitions is not self._metadata:
            self._look(assignment)
        if not self._states or fetcher._preferred_read_replica:
            return self._all(assignment)
        for state in self._states:
            if state._position is None or state._paused:
                return self._all(assignment)
        waits: dict[int, float] = {}
        left_out: dict[str, set[int]] = {}  # nobody has taken their records for long, as those of changelogs
        for tp, fetched in fetcher._records.items():
            if (node := self._leader_of.get(tp)) is None:
                return self._all(assignment)
            if wait_s := fetched.calculate_backoff():
                waits[node] = max(wait_s, waits.get(node, 0.0))
            left_out.setdefault(tp.topic, set()).add(tp.partition)
        now, fetches = time.monotonic(), []
        for node, topics in self._parts.items():
            if node in waits or node in fetcher._in_flight:
                continue
            pace = self._paces[node]
            if (early_s := pace.early_s(now)) > 0:
                waits[node] = early_s
            elif places := self._places(topics, left_out):
                pace.begin(now, sum([state._position for parts in topics.values() for _, state in parts]))
                fetches.append((node, self._fetch(places)))
        return fetches, {}, min(waits.values(), default=fetcher._fetcher_timeout), False, []

    def _all(self, assignment: Any) -> Actions:
        """Have the fetcher go over all partitions; its fetches are as far apart as others."""
        fetches, resets, wait_s, *rest = self._whole(assignment)
        now, due = time.monotonic(), []
        for node, fetch in fetches:
            pace = self._paces[node]
            if (early_s := pace.early_s(now)) > 0:
                wait_s = min(wait_s, early_s)
            else:
                pace.begin(now, pace.read)
                due.append((node, fetch))
        return due, resets, wait_s, *rest

    def _places(
        self, topics: Mapping[str, Sequence[tuple[int, Any]]], left_out: Mapping[str, Container[int]]
    ) -> list[tuple[str, list[tuple[int, int, int]]]]:
        """Return what to ask a broker: partition, offset and largest answer in bytes, by topic."""
        found, size = [], self._fetcher._max_partition_fetch_bytes
        for topic, parts in topics.items():
            without = left_out.get(topic, ())
            if places := [(number, state._position, size) for number, state in parts if number not in without]:
                found.append((topic, places))
        return found

    def _fetch(self, places: list[Any]) -> FetchRequest:
        ours = self._fetcher
        return FetchRequest(
            ours._fetch_max_wait_ms, ours._fetch_min_bytes, ours._fetch_max_bytes, ours._isolation_level, places
        )

    def _look(self, assignment: Any) -> None:
        """Find the leader of each partition; without one of them, the list is empty."""
        cluster = self._fetcher._client.cluster
        self._assignment, self._metadata = assignment, cluster._partitions
        self._states, self._leader_of, self._parts = [], {}, {}
        for tp in assignment.tps:
            node = cluster.leader_for_partition(tp)
            if node is None or node == -1:
                self._states = []
                return
            state = assignment.state_value(tp)
            self._states.append(state)
            self._leader_of[tp] = node
            self._parts.setdefault(node, {}).setdefault(tp.topic, []).append((tp.partition, state))


def keep_fetch_list(consumer: Any) -> None:
    """Make a consumer's fetcher keep its list.

    Args:
        consumer: ``aiokafka.AIOKafkaConsumer``, started.
    """
    consumer._fetcher._get_actions_per_node = FetchList(consumer._fetcher)
