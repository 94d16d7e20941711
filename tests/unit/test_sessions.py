"""Fetch sessions: what a broker is told, and when a session is given up."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.protocol.fetch import FetchRequest, FetchRequest_v4, FetchRequest_v11, FetchResponse_v4, FetchResponse_v11

from orderstream.streams.upstream.sessions import fetch_in_sessions

SIZE = 1_000


def request_of(**offsets: int) -> FetchRequest:
    """Return a plain fetch of partition 0 of these topics."""
    return FetchRequest(100, 1, SIZE, 0, [(topic, [(0, offset, SIZE)]) for topic, offset in offsets.items()])


class Assignment:
    """Of a consumer: where each partition ends, as far as it knows."""

    def __init__(self) -> None:
        self.highwater: int | None = 0

    def state_value(self, _: Any) -> Any:
        return self


class Broker:
    """Takes the place of the client's connection: notes what it is asked, answers with a session."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.struct: Any = FetchRequest_v11
        self.error_code, self.session_id = 0, 7
        self.answers: list[Any] = []
        self.fault: BaseException | None = None
        self.subscription = SimpleNamespace(assignment=Assignment())
        self.consumer = SimpleNamespace(_client=self, _subscription=SimpleNamespace(subscription=self.subscription))
        self.send = self._send
        fetch_in_sessions(self.consumer)

    async def _send(self, node_id: int, request: Any) -> Any:
        self.asked.append(request.build(self.struct))
        if self.fault is not None:
            raise self.fault
        if self.struct is FetchRequest_v4:
            return FetchResponse_v4(0, [])
        return FetchResponse_v11(0, self.error_code, self.session_id, self.answers)

    async def fetch(self, **offsets: int) -> tuple[int, int, dict[str, int], list[str]]:
        """Fetch; return session, epoch, the topics that were named with their offsets, and those to forget."""
        await self.send(1, request_of(**offsets))
        asked = self.asked[-1]
        named = {topic: parts[0][2] for topic, parts in asked.topics}
        return asked.session_id, asked.session_epoch, named, [topic for topic, _ in asked.forgotten_topics_data]


async def test_a_fetch_names_what_has_changed_since_the_one_before() -> None:
    broker = Broker()
    assert await broker.fetch(a=0, b=5) == (0, 0, {"a": 0, "b": 5}, [])
    assert await broker.fetch(a=0, b=5) == (7, 1, {}, [])
    assert await broker.fetch(a=3, b=5) == (7, 2, {"a": 3}, [])
    assert await broker.fetch(a=3) == (7, 3, {}, ["b"])
    assert await broker.fetch(a=3, b=5) == (7, 4, {"b": 5}, [])


async def test_the_fetcher_looks_up_what_was_answered_only() -> None:
    broker = Broker()
    answer = [0, 9, 9, 0, [], -1, b""]
    broker.answers = [("b", [(1, *answer)]), ("c", [(0, *answer)]), ("b", [(2, *answer)])]  # as they came, not by topic
    topics = [("a", [(0, 3, SIZE)]), ("b", [(0, 4, SIZE), (1, 5, SIZE), (2, 6, SIZE)]), ("c", [(0, 7, SIZE)])]
    request = FetchRequest(100, 1, SIZE, 0, topics)
    await broker.send(1, request)
    assert request.topics == [("b", [(1, 5, SIZE), (2, 6, SIZE)]), ("c", [(0, 7, SIZE)])]
    assert [topic for topic, _ in broker.asked[-1].topics] == ["a", "b", "c"]


@pytest.mark.parametrize("error_code", [70, 71])
async def test_a_session_that_the_broker_does_not_know_is_made_again(error_code: int) -> None:
    broker = Broker()
    await broker.fetch(a=0)
    broker.error_code = error_code
    await broker.fetch(a=0)
    assert await broker.fetch(a=0) == (0, 0, {"a": 0}, [])


@pytest.mark.parametrize("fault", [ConnectionError(), asyncio.CancelledError()])
async def test_a_fetch_without_an_answer_ends_its_session(fault: BaseException) -> None:
    broker = Broker()
    await broker.fetch(a=0)
    broker.fault = fault
    with pytest.raises(type(fault)):
        await broker.fetch(a=0)
    broker.fault = None
    assert await broker.fetch(a=0) == (0, 0, {"a": 0}, [])


async def test_a_broker_without_room_for_a_session_is_told_everything_each_time() -> None:
    broker = Broker()
    broker.session_id = 0
    for _ in range(2):
        assert await broker.fetch(a=0) == (0, 0, {"a": 0}, [])


async def test_another_assignment_asks_about_everything_again() -> None:
    broker = Broker()
    await broker.fetch(a=0)
    broker.subscription.assignment = Assignment()
    assert await broker.fetch(a=0) == (0, 0, {"a": 0}, [])


async def test_everything_is_asked_about_until_each_end_is_known() -> None:
    broker = Broker()
    broker.subscription.assignment.highwater = None
    for _ in range(2):
        assert await broker.fetch(a=0) == (0, 0, {"a": 0}, [])
    broker.subscription.assignment.highwater = 9
    assert await broker.fetch(a=0) == (7, 1, {}, [])


async def test_an_old_broker_gets_plain_fetches() -> None:
    broker = Broker()
    broker.struct = FetchRequest_v4
    for _ in range(2):
        await broker.send(1, request_of(a=0, b=5))
        assert [topic for topic, _ in broker.asked[-1].topics] == ["a", "b"]


async def test_other_requests_pass_untouched() -> None:
    broker = Broker()
    other = SimpleNamespace(build=lambda _: "other")
    await broker.send(1, other)
    assert broker.asked == ["other"]
