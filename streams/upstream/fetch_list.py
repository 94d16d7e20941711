"""A fetcher that keeps its list of partitions, leaders and topics, and looks only at what changes: positions.

aiokafka goes over every assigned partition whenever anything happens, asks who leads it, and writes the whole list anew:
when an answer comes, and again when its records were taken.  With 48 partitions of five topics that was a third of the
consumer's thread.  No upstream issue found.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from aiokafka.protocol.fetch import FetchRequest

Actions = tuple[list[tuple[int, Any]], dict[int, Any], float, bool, list[Any]]


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
        self._leaders: Any = None
        self._states: list[Any] = []
        self._node_of: dict[Any, int] = {}
        self._parts: dict[int, dict[str, list[tuple[int, Any]]]] = {}

    def __call__(self, assignment: Any) -> Actions:
        """Return fetches with their brokers, positions to be set, how long to wait, and what is not known yet."""
        fetcher = self._fetcher
        if assignment is not self._assignment or fetcher._client.cluster._partitions is not self._leaders:
            self._look(assignment)
        if not self._states or fetcher._preferred_read_replica:
            return self._all(assignment)
        for state in self._states:
            if state._position is None or state._paused:
                return self._all(assignment)
        waits: dict[int, float] = {}
        left_out: dict[str, set[int]] = {}  # nobody has taken their records for long, as those of changelogs
        for tp, fetched in fetcher._records.items():
            if (node := self._node_of.get(tp)) is None:
                return self._all(assignment)
            if wait_s := fetched.calculate_backoff():
                waits[node] = max(wait_s, waits.get(node, 0.0))
            left_out.setdefault(tp.topic, set()).add(tp.partition)
        fetches = [
            (node, self._fetch(topics, left_out))
            for node, topics in self._parts.items()
            if node not in waits and node not in fetcher._in_flight
        ]
        return (
            [(node, fetch) for node, fetch in fetches if fetch.topics],
            {},
            min(waits.values(), default=fetcher._fetcher_timeout),
            False,
            [],
        )

    def _all(self, assignment: Any) -> Actions:
        found: Actions = self._whole(assignment)
        return found

    def _fetch(
        self, topics: Mapping[str, Sequence[tuple[int, Any]]], left_out: Mapping[str, Container[int]]
    ) -> FetchRequest:
        ours, size = self._fetcher, self._fetcher._max_partition_fetch_bytes
        named = []
        for topic, parts in topics.items():
            without = left_out.get(topic, ())
            if places := [(number, state._position, size) for number, state in parts if number not in without]:
                named.append((topic, places))
        return FetchRequest(
            ours._fetch_max_wait_ms, ours._fetch_min_bytes, ours._fetch_max_bytes, ours._isolation_level, named
        )

    def _look(self, assignment: Any) -> None:
        """Find the leader of each partition; without one of them, the list is empty."""
        cluster = self._fetcher._client.cluster
        self._assignment, self._leaders = assignment, cluster._partitions
        self._states, self._node_of, self._parts = [], {}, {}
        for tp in assignment.tps:
            node = cluster.leader_for_partition(tp)
            if node is None or node == -1:
                self._states = []
                return
            state = assignment.state_value(tp)
            self._states.append(state)
            self._node_of[tp] = node
            self._parts.setdefault(node, {}).setdefault(tp.topic, []).append((tp.partition, state))


def keep_fetch_list(consumer: Any) -> None:
    """Make a consumer's fetcher keep its list.

    Args:
        consumer: ``aiokafka.AIOKafkaConsumer``, started.
    """
    consumer._fetcher._get_actions_per_node = FetchList(consumer._fetcher)
