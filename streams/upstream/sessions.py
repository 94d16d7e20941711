"""Fetches that name only what has changed: fetch sessions (KIP-227), which aiokafka does not use.

Without them each fetch names every partition and is answered about every partition, whether or not anything came: with forty
of them, a hundred times a second, that is more work than the records are, on both sides.  In a session the broker remembers
the partitions and where each is read, and answers about those that have records or another end.  No upstream issue found.
"""

from __future__ import annotations

import copy
from typing import Any

from aiokafka import TopicPartition
from aiokafka.protocol.fetch import FetchRequest

SINCE_VERSION = 7
"""Of the request: the first one that has sessions."""

EPOCH_MAX = 2**31 - 1


class Session:
    """What a broker remembers of a consumer's fetches.

    Attributes:
        assignment: of the consumer when it began.
        number: by which the broker knows it; 0: it is to be made by the next fetch, which names every partition.
        epoch: how many fetches it has had.
        asked: partition, offset and largest answer in bytes of what is read, by topic, as the broker was told.
    """

    def __init__(self, assignment: Any) -> None:
        self.assignment = assignment
        self.number = self.epoch = 0
        self.asked: dict[str, list[tuple[int, int, int]]] = {}
        self._has_ends = False

    def serves(self, assignment: Any, topics: list[Any]) -> bool:
        """Tell whether a fetch of this assignment can go on in it: a partition's end that got lost is not told again."""
        if self.assignment is not assignment:
            return False
        self._has_ends = self._has_ends or all(
            assignment.state_value(TopicPartition(topic, number)).highwater is not None
            for topic, parts in topics
            for number, _, _ in parts
        )
        return self._has_ends

    def told(self, topics: list[Any]) -> tuple[list[Any], list[Any]]:
        """Note where everything is read now; return what the broker does not know yet, and what it is to forget."""
        before, self.asked = self.asked, dict(topics)
        changed, forgotten = [], []
        for topic in {**before, **self.asked}:
            known, parts = before.get(topic, []), self.asked.get(topic, [])
            if known == parts:
                continue
            places = {*known}
            if fresh := [place for place in parts if place not in places]:
                changed.append((topic, fresh))
            if gone := {number for number, _, _ in known}.difference([number for number, _, _ in parts]):
                forgotten.append((topic, sorted(gone)))
        return changed, forgotten

    def goes_on(self, response: Any) -> bool:
        """Note the answer; tell whether the broker has this session."""
        if response.API_VERSION < SINCE_VERSION or response.error_code or not response.session_id:
            return False
        self.number = response.session_id
        self.epoch = self.epoch + 1 if self.epoch < EPOCH_MAX else 1
        return True


class _Fetch(FetchRequest):
    """A fetch in a session; the plain one where the broker knows no sessions."""

    def __init__(self, plain: FetchRequest, session: Session) -> None:
        self._plain, self._session = plain, session

    def build(self, request_struct_class: Any) -> Any:
        if request_struct_class.API_VERSION < SINCE_VERSION:
            return self._plain.build(request_struct_class)
        fetch = copy.copy(self._plain)
        fetch._topics, forgotten = self._session.told(self._plain.topics)
        built: Any = fetch.build(request_struct_class)
        built.session_id, built.session_epoch = self._session.number, self._session.epoch
        built.forgotten_topics_data = forgotten
        return built


def _narrow(request: FetchRequest, response: Any) -> None:
    """Leave in a request what was answered: the fetcher looks up nothing else, and makes a table of all that is there."""
    answered = {(topic, part[0]) for topic, parts in response.topics for part in parts}  # a topic may be there twice
    topics = {topic for topic, _ in response.topics}
    request._topics = [
        (topic, [place for place in parts if (topic, place[0]) in answered])
        for topic, parts in request.topics
        if topic in topics
    ]


def fetch_in_sessions(consumer: Any) -> None:
    """Make a consumer fetch in sessions, one with each broker.

    A fetch that fails, or that a rebalance cuts off, may have been counted by the broker or not: its session is given up.

    Args:
        consumer: ``aiokafka.AIOKafkaConsumer``, not started yet.
    """
    client = consumer._client
    send = client.send
    sessions: dict[int, Session] = {}

    async def sent(node_id: int, request: Any, **options: Any) -> Any:
        if not isinstance(request, FetchRequest):
            return await send(node_id, request, **options)
        subscription = consumer._subscription.subscription
        assignment = subscription and subscription.assignment
        session = sessions.pop(node_id, None)
        if session is None or not session.serves(assignment, request.topics):
            session = Session(assignment)
        response = await send(node_id, _Fetch(request, session), **options)
        if session.goes_on(response):
            sessions[node_id] = session
            _narrow(request, response)
        return response

    client.send = sent
