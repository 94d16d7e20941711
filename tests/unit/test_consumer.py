"""Offsets by chunk: never past a record that is not done, and never on the word of a batch from before a rebalance."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import CommitFailedError, IllegalStateError
from aiokafka.structs import OffsetAndMetadata
from faust.types import TP
from hypothesis import given, settings
from hypothesis import strategies as st

from orderstream.streams.upstream.app import App
from orderstream.streams.upstream.consumer import (
    BEHIND_POLL_S,
    CHUNK_BYTES_MAX,
    CHUNK_RECORDS_MAX,
    QUEUE_EVENTS_BEHIND,
    QUEUE_EVENTS_MAX,
    Chunk,
    Consumer,
)

ONE, TWO = TP("orders", 0), TP("order-lines", 1)


def fetched(offsets: Iterable[int]) -> list[Any]:
    return [
        SimpleNamespace(offset=offset, timestamp=1_700_000_000_000, timestamp_type=0, value=b"") for offset in offsets
    ]


class Disconnected:
    """A real consumer of a real app that never meets a broker; what a broker would know is here."""

    def __init__(self) -> None:
        self.app = App("disconnected", broker="kafka://127.0.0.1:1", store="memory://", web_enabled=False)
        self.consumer: Consumer = self.app.consumer
        self.committed: dict[TP, int | None] = {ONE: 0, TWO: None}
        self.beginnings: dict[TP, int | None] = {ONE: 0, TWO: 0}
        self.sought: list[dict[TP, int]] = []
        broker: Any = self.consumer
        broker.assignment = lambda: set(self.committed)
        broker.seek_to_committed = self.seek_to_committed
        broker.earliest_offsets = self.earliest_offsets
        broker.seek_wait = self.seek_wait
        broker.highwater = lambda tp: 0
        self.positions: dict[TP, int | None] = {}
        broker._thread.position_of = self.positions.get
        self.app.consumer_generation_id = 1
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        for tp in self.committed:
            self.app.topics._tp_index[tp] = [SimpleNamespace(queue=self.queue)]

    async def seek_to_committed(self) -> dict[TP, int | None]:
        return dict(self.committed)

    async def earliest_offsets(self, *tps: TP) -> dict[TP, int | None]:
        return {tp: self.beginnings[tp] for tp in tps}

    async def seek_wait(self, offsets: dict[TP, int]) -> None:
        self.sought.append(dict(offsets))

    def take_in(self, tp: TP, *sizes: int, start: int = 0) -> list[Chunk]:
        """Have chunks of these sizes waiting, as the drain loop leaves them."""
        chunks = []
        for size in sizes:
            chunks.append(Chunk(tp, fetched(range(start, start + size))))
            start += size
        self.consumer._chunks.setdefault(tp, deque()).extend(chunks)
        return chunks

    def commit(self) -> dict[TP, int]:
        """Return what the commit timer would commit now, and note it as the broker does."""
        tps = list(self.consumer._filter_tps_with_pending_acks())
        offsets: dict[TP, int] = self.consumer._filter_committable_offsets(tps)
        self.consumer._committed_offset.update(offsets)
        self.committed.update(offsets)
        return offsets

    def delivered(self) -> list[Any]:
        return [self.queue.get_nowait() for _ in range(self.queue.qsize())]


@pytest.fixture
async def disconnected() -> Disconnected:
    return Disconnected()


# Acknowledging and committing


def test_a_chunk_is_committed_behind_its_last_record() -> None:
    chunk = Chunk(ONE, fetched([3, 4, 9]))  # offsets may have gaps: a compacted topic, a transaction's mark
    assert (chunk.next_offset, chunk.done) == (10, False)
    assert repr(chunk) == "<Chunk orders/0 3…9>"


async def test_offsets_are_committed_up_to_the_first_chunk_that_is_not_done(disconnected: Disconnected) -> None:
    consumer = disconnected.consumer
    first, second, third = disconnected.take_in(ONE, 10, 5, 1)
    assert disconnected.commit() == {}
    assert consumer.ack_chunk(second)
    assert consumer.ack_chunk(third)
    assert disconnected.commit() == {}
    assert consumer.ack_chunk(first)
    assert disconnected.commit() == {ONE: 16}
    assert disconnected.commit() == {}


async def test_partitions_do_not_wait_for_each_other(disconnected: Disconnected) -> None:
    (slow,) = disconnected.take_in(ONE, 10)
    (quick,) = disconnected.take_in(TWO, 4, start=100)
    disconnected.consumer.ack_chunk(quick)
    assert disconnected.commit() == {TWO: 104}
    disconnected.consumer.ack_chunk(slow)
    assert disconnected.commit() == {ONE: 10}


@settings(max_examples=60)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.randoms(use_true_random=False), st.data())
def test_whatever_the_order_of_work_nothing_undone_is_committed(
    sizes: list[int], order: Any, data: st.DataObject
) -> None:
    async def run() -> None:
        disconnected = Disconnected()
        chunks = disconnected.take_in(ONE, *sizes)
        todo = list(chunks)
        order.shuffle(todo)
        while todo:
            for chunk in [todo.pop() for _ in range(data.draw(st.integers(1, len(todo))))]:
                assert disconnected.consumer.ack_chunk(chunk)
            disconnected.commit()
            undone = [chunk.records[0].offset for chunk in chunks if not chunk.done]
            assert disconnected.committed[ONE] == min(undone, default=sum(sizes))

    asyncio.run(run())


async def test_partitions_with_chunks_are_found_by_topic_or_by_themselves(disconnected: Disconnected) -> None:
    disconnected.take_in(ONE, 1)
    disconnected.take_in(TWO, 1)
    pending = disconnected.consumer._filter_tps_with_pending_acks
    assert set(pending()) == {ONE, TWO}
    assert set(pending({"orders"})) == {ONE}
    assert set(pending({TWO})) == {TWO}
    assert set(pending({"elsewhere"})) == set()


# Invalid acknowledgements


@pytest.mark.parametrize("committed", [0, 40], ids=["fresh partitions", "committed ones"])
async def test_an_acknowledgement_after_a_seek_is_invalid(disconnected: Disconnected, committed: int) -> None:
    disconnected.committed = {ONE: committed, TWO: committed}
    (old,) = disconnected.take_in(ONE, 10, start=committed)
    await disconnected.consumer.perform_seek()
    assert not disconnected.consumer.ack_chunk(old)
    assert disconnected.commit() == {}
    (again,) = disconnected.take_in(ONE, 10, start=committed)
    assert not disconnected.consumer.ack_chunk(old), "the same records, read again, are not done by what was before"
    assert disconnected.commit() == {}
    assert disconnected.consumer.ack_chunk(again)
    assert disconnected.commit() == {ONE: committed + 10}


async def test_a_chunk_that_was_done_and_not_committed_is_read_again_after_a_seek(disconnected: Disconnected) -> None:
    (done,) = disconnected.take_in(ONE, 10)
    disconnected.consumer.ack_chunk(done)
    await disconnected.consumer.perform_seek()
    assert disconnected.commit() == {}
    assert disconnected.consumer._read_offset[ONE] == 0


async def test_an_acknowledgement_after_the_partition_was_revoked_is_invalid(disconnected: Disconnected) -> None:
    (taken,) = disconnected.take_in(ONE, 10)
    (kept,) = disconnected.take_in(TWO, 10)
    await disconnected.consumer.on_partitions_revoked({ONE})
    assert not disconnected.consumer.ack_chunk(taken)
    assert disconnected.consumer.ack_chunk(kept)
    assert disconnected.commit() == {TWO: 10}


async def test_a_chunk_that_never_was_taken_in_is_not_acknowledged(disconnected: Disconnected) -> None:
    disconnected.take_in(ONE, 10)
    assert not disconnected.consumer.ack_chunk(Chunk(ONE, fetched(range(10))))
    assert disconnected.commit() == {}


# Where reading continues after a rebalance


async def test_a_seek_believes_a_broker_that_lost_what_was_committed(disconnected: Disconnected) -> None:
    disconnected.consumer._committed_offset[ONE] = 40
    disconnected.committed = {ONE: None, TWO: None}
    await disconnected.consumer.perform_seek()
    assert disconnected.sought == [{ONE: 0, TWO: 0}]
    disconnected.take_in(ONE, 10)
    for chunk in disconnected.consumer._chunks[ONE]:
        disconnected.consumer.ack_chunk(chunk)
    assert disconnected.commit() == {ONE: 10}


async def test_a_seek_goes_back_to_what_is_committed_and_else_to_the_beginning(disconnected: Disconnected) -> None:
    disconnected.committed = {ONE: 40, TWO: None}
    disconnected.beginnings[TWO] = 7  # what was before has outlived its retention
    await disconnected.consumer.perform_seek()
    assert (disconnected.consumer._read_offset[ONE], disconnected.consumer._read_offset[TWO]) == (40, 7)
    assert disconnected.sought == [{TWO: 7}]


# Delivering


async def deliver(disconnected: Disconnected, offsets: Iterable[int], generation: int = 1) -> list[Chunk]:
    consumer = disconnected.consumer
    await consumer._deliver_chunks({ONE: fetched(offsets)}, generation, consumer._seeks)
    return [chunk for event in disconnected.delivered() for chunk in event.value]


async def test_fetched_records_travel_as_bounded_chunks_in_order(disconnected: Disconnected) -> None:
    chunks = await deliver(disconnected, range(2 * CHUNK_RECORDS_MAX + 1))
    assert [len(chunk.records) for chunk in chunks] == [CHUNK_RECORDS_MAX, CHUNK_RECORDS_MAX, 1]
    assert [r.offset for chunk in chunks for r in chunk.records] == list(range(2 * CHUNK_RECORDS_MAX + 1))
    assert list(disconnected.consumer._chunks[ONE]) == chunks


async def test_what_was_fetched_of_the_partitions_of_a_topic_is_one_event(disconnected: Disconnected) -> None:
    consumer, index, three = disconnected.consumer, disconnected.app.topics._tp_index, TP(ONE.topic, 1)
    index[three] = index[ONE]
    consumer._read_offset[three] = 0
    await consumer._deliver_chunks({ONE: fetched(range(3)), three: fetched(range(5))}, 1, 0)
    (event,) = disconnected.delivered()
    assert [(chunk.tp, chunk.next_offset) for chunk in event.value] == [(ONE, 3), (three, 5)]
    assert [consumer._read_offset[tp] for tp in (ONE, three)] == [3, 5]
    for chunk in event.value:
        consumer.ack_chunk(chunk)
    assert disconnected.commit() == {ONE: 3, three: 5}
    await consumer._deliver_chunks({ONE: fetched(range(3, 5)), three: fetched(range(5, 5 + CHUNK_RECORDS_MAX))}, 1, 0)
    assert [[chunk.tp for chunk in event.value] for event in disconnected.delivered()] == [[ONE], [three]]


async def test_an_event_carries_the_generation_in_which_it_was_fetched(disconnected: Disconnected) -> None:
    await disconnected.consumer._deliver_chunks({ONE: fetched([1, 2])}, 1, 0)
    (event,) = disconnected.delivered()
    assert (event.message.generation_id, event.message.tp, event.message.offset) == (1, ONE, 2)


async def test_records_below_the_read_offset_are_passed_over(disconnected: Disconnected) -> None:
    disconnected.consumer._read_offset[ONE] = 5
    (chunk,) = await deliver(disconnected, range(3, 8))
    assert [record.offset for record in chunk.records] == [5, 6, 7]
    assert disconnected.consumer._read_offset[ONE] == 8
    assert await deliver(disconnected, range(3, 8)) == []
    assert not disconnected.consumer._dropped


@pytest.mark.parametrize("cause", ["flow", "generation", "no agent"])
async def test_what_is_not_delivered_is_not_forgotten(disconnected: Disconnected, cause: str) -> None:
    if cause == "flow":
        disconnected.consumer.stop_flow()
    elif cause == "generation":
        disconnected.app.consumer_generation_id = 2
    else:
        disconnected.app.topics._tp_index.clear()
    assert await deliver(disconnected, range(3)) == []
    assert disconnected.consumer._dropped
    await disconnected.consumer.perform_seek()
    assert not disconnected.consumer._dropped


async def test_an_agent_that_is_behind_is_waited_for(disconnected: Disconnected) -> None:
    records = fetched(range((QUEUE_EVENTS_MAX + 5) * CHUNK_RECORDS_MAX))
    delivering = asyncio.create_task(disconnected.consumer._deliver_chunks({ONE: records}, 1, 0))
    await asyncio.sleep(0.05)
    assert disconnected.queue.qsize() == QUEUE_EVENTS_MAX
    got: list[Any] = []
    async with asyncio.timeout(30):
        while len(got) < QUEUE_EVENTS_MAX + 5:
            got.append(await disconnected.queue.get())
        await delivering
    assert [chunk.records[0].offset for event in got for chunk in event.value] == [
        n * CHUNK_RECORDS_MAX for n in range(QUEUE_EVENTS_MAX + 5)
    ]


async def test_partitions_of_an_agent_that_is_behind_are_left_out_and_those_of_the_others_are_asked_for(
    disconnected: Disconnected,
) -> None:
    asked: list[tuple[set[TP], float]] = []

    async def getmany(active: set[TP], timeout: float) -> dict[TP, list[Any]]:
        asked.append((active, timeout))
        return {}

    disconnected.consumer._thread.getmany = getmany
    other: asyncio.Queue[Any] = asyncio.Queue()
    disconnected.app.topics._tp_index[TWO] = [SimpleNamespace(queue=other)]
    await disconnected.consumer._getmany({ONE, TWO}, 1.0)
    for _ in range(QUEUE_EVENTS_BEHIND):
        disconnected.queue.put_nowait(None)
    await disconnected.consumer._getmany({ONE, TWO}, 1.0)
    assert asked == [({ONE, TWO}, 1.0), ({TWO}, BEHIND_POLL_S)]
    for _ in range(QUEUE_EVENTS_BEHIND):
        other.put_nowait(None)
    assert await disconnected.consumer._getmany({ONE, TWO}, 1.0) == {}
    assert len(asked) == 2
    disconnected.queue.get_nowait()
    await disconnected.consumer._getmany({ONE, TWO}, 1.0)
    assert asked[2] == ({ONE}, BEHIND_POLL_S)


async def test_waiting_for_an_agent_ends_with_a_rebalance(disconnected: Disconnected) -> None:
    records = fetched(range((QUEUE_EVENTS_MAX + 5) * CHUNK_RECORDS_MAX))
    delivering = asyncio.create_task(disconnected.consumer._deliver_chunks({ONE: records}, 1, 0))
    await asyncio.sleep(0.01)
    disconnected.app.consumer_generation_id = 2
    await asyncio.wait_for(delivering, 30)
    assert disconnected.queue.qsize() == QUEUE_EVENTS_MAX
    assert disconnected.consumer._dropped


# The loop


class Fetcher:
    """Takes the place of Faust's fetcher: hands out what a test has fetched, then stops the loop."""

    def __init__(self, disconnected: Disconnected, *polls: Any) -> None:
        self._stopped = asyncio.Event()
        self.polls = list(polls)
        self.disconnected = disconnected
        broker: Any = disconnected.consumer
        broker._wait_next_records = self.wait_next_records

    async def wait_next_records(self, timeout: float) -> tuple[Any, Any]:
        if not self.polls:
            self._stopped.set()
            return {}, set()
        poll = self.polls.pop(0)
        records, active = await poll() if callable(poll) else poll
        return records, active

    async def run(self) -> list[int]:
        """Run the loop until nothing is left to fetch; return the offsets that were delivered."""
        await asyncio.wait_for(self.disconnected.consumer._drain_messages(self), 30)
        return [
            record.offset
            for event in self.disconnected.delivered()
            for chunk in event.value
            for record in chunk.records
        ]


async def test_what_is_fetched_is_delivered(disconnected: Disconnected) -> None:
    active = {ONE, TWO}
    polls = [({ONE: fetched([0, 1]), TWO: fetched([5])}, active), (None, active), ({ONE: fetched([2])}, active)]
    assert await Fetcher(disconnected, *polls).run() == [0, 1, 5, 2]
    assert disconnected.sought == []


# What transactions leave behind


async def test_a_chunk_ends_behind_the_mark_of_its_transaction(disconnected: Disconnected) -> None:
    disconnected.positions[ONE] = 2 * CHUNK_RECORDS_MAX + 1
    first, second = await deliver(disconnected, range(2 * CHUNK_RECORDS_MAX))
    assert (first.next_offset, second.next_offset) == (CHUNK_RECORDS_MAX, 2 * CHUNK_RECORDS_MAX + 1)
    disconnected.consumer.ack_chunk(first)
    disconnected.consumer.ack_chunk(second)
    assert disconnected.commit() == {ONE: 2 * CHUNK_RECORDS_MAX + 1}
    assert disconnected.consumer.done_offset(ONE) == 2 * CHUNK_RECORDS_MAX + 1


async def pass_over(disconnected: Disconnected, read: int | None, position: int | None, seeks: int = 0) -> list[Chunk]:
    disconnected.consumer._read_offset[ONE] = read
    disconnected.positions[ONE] = position
    await disconnected.consumer._deliver_passed_over({ONE, TWO}, 1, seeks)
    return [chunk for event in disconnected.delivered() for chunk in event.value]


async def test_what_was_passed_over_is_done_like_a_chunk(disconnected: Disconnected) -> None:
    (first,) = disconnected.take_in(ONE, 5)
    (chunk,) = await pass_over(disconnected, read=5, position=9)
    assert (chunk.records, chunk.offset, chunk.next_offset) == ([], 5, 9)
    assert repr(chunk) == "<Chunk orders/0 5…8>"
    assert disconnected.consumer.ack_chunk(chunk)
    assert disconnected.commit() == {}, "what stands before it is not done"
    assert disconnected.consumer.done_offset(ONE) == 0
    disconnected.consumer.ack_chunk(first)
    assert disconnected.commit() == {ONE: 9}
    assert await pass_over(disconnected, read=9, position=9) == []


@pytest.mark.parametrize(("read", "position"), [(None, 9), (5, None), (9, 5)])
async def test_nothing_is_passed_over_while_it_is_not_known_what_was_read(
    disconnected: Disconnected, read: int | None, position: int | None
) -> None:
    assert await pass_over(disconnected, read, position) == []
    assert disconnected.commit() == {}


@pytest.mark.parametrize("cause", ["dropped", "sought", "generation"])
async def test_records_that_were_not_delivered_are_not_passed_over(disconnected: Disconnected, cause: str) -> None:
    if cause == "dropped":
        disconnected.consumer._dropped = True
    elif cause == "generation":
        disconnected.app.consumer_generation_id = 2
    assert await pass_over(disconnected, read=5, position=9, seeks=int(cause == "sought")) == []
    assert disconnected.consumer._dropped


# A rebalance in the middle


@pytest.mark.parametrize("error", [IllegalStateError("gone"), AssertionError("No partitions are currently assigned")])
async def test_a_seek_that_a_rebalance_cuts_off_is_done_again(disconnected: Disconnected, error: Exception) -> None:
    answer, broker = disconnected.seek_to_committed, disconnected.consumer
    tries = 0

    async def unassigned() -> dict[TP, int | None]:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise error
        return await answer()

    patched: Any = broker
    patched.seek_to_committed = unassigned
    with pytest.raises(IllegalStateError):
        await broker.perform_seek()
    tries = 0
    polls = [({ONE: fetched([0])}, {ONE}), ({ONE: fetched([0])}, {ONE}), ({ONE: fetched([0, 1])}, {ONE})]
    assert await Fetcher(disconnected, *polls).run() == [0, 1]
    assert tries == 2


async def test_a_commit_that_a_rebalance_overtakes_ends_nothing(disconnected: Disconnected) -> None:
    thread: Any = disconnected.consumer._thread
    thread._consumer = consumer = thread._create_consumer(asyncio.get_running_loop())
    consumer.subscribe([ONE.topic])  # and nothing is assigned yet
    with pytest.raises(CommitFailedError, match="already rebalanced"):
        await consumer.commit({ONE: OffsetAndMetadata(1, "")})
    assert await thread._commit({ONE: 1}) is False
    assert not thread.crashed
    await consumer.stop()


async def test_a_seek_that_the_broker_does_not_answer_is_done_again_by_the_loop(disconnected: Disconnected) -> None:
    answer = disconnected.earliest_offsets
    patched: Any = disconnected.consumer
    patched.earliest_offsets = lambda *tps: asyncio.wait_for(asyncio.Event().wait(), 0.01)
    await disconnected.consumer.perform_seek()  # of Faust's recovery, which would end with the error
    patched.earliest_offsets = answer
    polls = [({ONE: fetched([0])}, {ONE}), ({ONE: fetched([0])}, {ONE})]
    assert await Fetcher(disconnected, *polls).run() == [0]


async def test_what_is_fetched_through_a_rebalance_belongs_to_the_new_generation(disconnected: Disconnected) -> None:
    async def rebalanced() -> Any:
        disconnected.app.consumer_generation_id = 2
        return {ONE: fetched([0])}, {ONE}

    await asyncio.wait_for(disconnected.consumer._drain_messages(Fetcher(disconnected, rebalanced)), 30)
    (event,) = disconnected.delivered()
    assert (event.message.generation_id, event.value[0].next_offset) == (2, 1)


async def test_what_was_fetched_and_can_not_be_delivered_is_read_again(disconnected: Disconnected) -> None:
    disconnected.committed[ONE] = 10
    disconnected.consumer._committed_offset[ONE] = 10
    sought = 0

    async def count() -> dict[TP, int | None]:
        nonlocal sought
        sought += 1
        return dict(disconnected.committed)

    broker: Any = disconnected.consumer
    broker.seek_to_committed = count
    # The partition is paused while a table recovers: what was fetched of it before is not to be delivered now.
    polls = [({ONE: fetched([10, 11])}, {TWO}), ({ONE: fetched([10, 11])}, {ONE})]
    assert await Fetcher(disconnected, *polls).run() == [10, 11]
    assert sought == 1


async def test_what_is_fetched_while_positions_are_being_set_is_read_again(disconnected: Disconnected) -> None:
    """Faust seeks while the loop is at work.  What the loop delivered meanwhile could not be acknowledged any more."""
    consumer, broker = disconnected.consumer, disconnected
    broker.committed = {ONE: 10, TWO: None}
    arrived, go_on = asyncio.Event(), asyncio.Event()
    answer = broker.seek_to_committed

    async def slow() -> dict[TP, int | None]:
        arrived.set()
        await go_on.wait()
        return await answer()

    patched: Any = consumer
    patched.seek_to_committed = slow
    recovery = asyncio.create_task(consumer.perform_seek())
    await arrived.wait()

    async def meanwhile() -> Any:
        go_on.set()
        return {ONE: fetched([10, 11])}, {ONE, TWO}

    async def begun_before() -> Any:
        await consumer.perform_seek()
        return {ONE: fetched([10, 11])}, {ONE, TWO}

    for poll in (meanwhile, begun_before):
        assert await Fetcher(broker, poll).run() == []
        assert not consumer._dropped, "the loop has gone back by itself"
    await recovery
    polls = [({ONE: fetched([10, 11])}, {ONE, TWO})]
    await asyncio.wait_for(consumer._drain_messages(Fetcher(broker, *polls)), 30)
    (event,) = broker.delivered()
    assert consumer.ack_chunk(*event.value)
    assert broker.commit() == {ONE: 12}


async def test_a_seek_ends_the_wait_for_an_agent(disconnected: Disconnected) -> None:
    records = fetched(range((QUEUE_EVENTS_MAX + 5) * CHUNK_RECORDS_MAX))
    delivering = asyncio.create_task(disconnected.consumer._deliver_chunks({ONE: records}, 1, 0))
    await asyncio.sleep(0.01)
    await disconnected.consumer.perform_seek()
    await asyncio.wait_for(delivering, 30)
    assert disconnected.queue.qsize() == QUEUE_EVENTS_MAX
    assert disconnected.consumer._dropped


async def test_during_a_rebalance_the_loop_leaves_the_offsets_to_the_recovery(disconnected: Disconnected) -> None:
    async def unexpected() -> dict[TP, int | None]:
        raise AssertionError("a seek in the middle of a rebalance")

    broker: Any = disconnected.consumer
    broker.seek_to_committed = unexpected
    disconnected.consumer.stop_flow()
    assert await Fetcher(disconnected, ({ONE: fetched([0])}, {ONE})).run() == []
    assert disconnected.consumer._dropped


async def test_a_fault_of_the_loop_surfaces(disconnected: Disconnected) -> None:
    async def broken() -> Any:
        raise RuntimeError("the broker said something new")

    with pytest.raises(RuntimeError, match="something new"):
        await Fetcher(disconnected, broken).run()


async def test_large_records_make_smaller_chunks(disconnected: Disconnected) -> None:
    records = fetched(range(10))
    for record in records:
        record.value = b"x" * (CHUNK_BYTES_MAX // 2)
    await disconnected.consumer._deliver_chunks({ONE: records}, 1, 0)
    chunks = [chunk for event in disconnected.delivered() for chunk in event.value]
    assert [len(chunk.records) for chunk in chunks] == [2] * 5
    assert {chunk.size_bytes for chunk in chunks} == {CHUNK_BYTES_MAX}
    assert [r.offset for chunk in chunks for r in chunk.records] == list(range(10))
