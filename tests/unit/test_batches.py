"""The batch helper: nothing is acknowledged before its batch is done, nothing is lost, nothing grows without bound."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest
from faust.types import TP

from orderstream.agents.batches import BATCH_BYTES_MAX, EVENTS_BUFFERED_MAX, Batch, batches
from orderstream.errors import OwnershipLost
from orderstream.streams.upstream.app import InHand, Pulse
from orderstream.streams.upstream.consumer import Chunk

LONG_S = 30.0  # far beyond what any of this takes; a test that gets here hangs


def chunk(*offsets: int, topic: str = "t", partition: int = 0) -> Chunk:
    return Chunk(TP(topic, partition), [SimpleNamespace(offset=offset) for offset in offsets])


class Stream:
    """In place of an agent's stream: events as they are put in, and no acknowledging of its own."""

    def __init__(self, *chunks: Chunk) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.read = 0
        self.put(*chunks)

    def put(self, *chunks: Chunk, generation: int = 1) -> None:
        for one in chunks:
            self.queue.put_nowait(SimpleNamespace(value=[one], message=SimpleNamespace(generation_id=generation)))

    def fail(self, error: Exception) -> None:
        self.queue.put_nowait(error)

    def end(self) -> None:
        self.queue.put_nowait(None)

    def noack(self) -> Any:
        async def events() -> AsyncIterator[Any]:
            while (event := await self.queue.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                self.read += 1
                yield event

        return SimpleNamespace(events=events)


class App:
    """In place of the Faust app: which generation it is in, and what was acknowledged."""

    def __init__(self) -> None:
        self.consumer_generation_id = 1
        self.in_hand = InHand()
        self.pulse = Pulse()
        self.conf = SimpleNamespace(broker_session_timeout=LONG_S)
        self.read_again = 0
        self.acknowledged: list[Chunk] = []
        self.consumer = SimpleNamespace(
            ack_chunk=self.acknowledged.append, read_again=self.note_read_again, is_current=lambda _: True
        )

    def note_read_again(self) -> None:
        self.read_again += 1

    def batches(self, stream: Stream, **options: Any) -> AsyncGenerator[Batch, None]:
        app: Any = self
        made: Any = batches(app, stream, **{"records_max": 100, "interval_s": 0.0, **options})
        return cast("AsyncGenerator[Batch, None]", made)


async def settle() -> None:
    """Let the reader come as far as it gets."""
    for _ in range(10 * EVENTS_BUFFERED_MAX):
        await asyncio.sleep(0)


async def following(source: AsyncGenerator[Batch, None]) -> Batch:
    return await asyncio.wait_for(anext(source), LONG_S)


async def waits(source: AsyncGenerator[Batch, None]) -> asyncio.Task[Batch]:
    """Ask for the next batch and see that it does not come; return the question, still open."""
    asked = asyncio.create_task(anext(source))
    await settle()
    assert not asked.done()
    return asked


def offsets(batch: Batch, topic: str = "t") -> list[int]:
    return [record.offset for record in batch.records(topic)]


# Acknowledging


async def test_a_batch_is_acknowledged_when_its_body_has_ended_and_not_before() -> None:
    app, one = App(), chunk(0, 1)
    stream = Stream(one)
    source = app.batches(stream)
    batch = await following(source)
    assert offsets(batch) == [0, 1]
    await settle()
    assert app.acknowledged == []
    await waits(source)
    assert app.acknowledged == [one]


async def test_a_body_that_raises_in_the_middle_acknowledges_nothing_of_its_batch() -> None:
    app, done, failing = App(), chunk(0), [chunk(1), chunk(2)]
    stream = Stream(done)

    async def body() -> None:
        async for batch in app.batches(stream):
            if batch.chunks == failing:
                raise RuntimeError("in the middle")
            stream.put(*failing)
            await settle()

    with pytest.raises(RuntimeError, match="in the middle"):
        await body()
    await settle()
    assert app.acknowledged == [done]


async def test_leaving_the_loop_acknowledges_nothing_of_the_batch_in_hand() -> None:
    app = App()
    source = app.batches(Stream(chunk(0), chunk(1)))
    async for batch in source:
        assert batch.chunks
        break
    await source.aclose()
    assert app.acknowledged == []


async def test_an_agent_that_is_cancelled_acknowledges_nothing_and_stops_reading() -> None:
    app, stream = App(), Stream(chunk(0))

    async def body() -> None:
        async for _ in app.batches(stream):
            await asyncio.sleep(LONG_S)

    agent = asyncio.create_task(body())
    await settle()
    agent.cancel()
    with pytest.raises(asyncio.CancelledError):
        await agent
    await settle()
    stream.put(chunk(1))
    await settle()
    assert (app.acknowledged, stream.read) == ([], 1)


async def test_a_batch_whose_chunks_the_body_let_go_is_not_acknowledged() -> None:
    app = App()
    source = app.batches(Stream(chunk(0)))
    (await following(source)).chunks.clear()
    await waits(source)
    assert app.acknowledged == []


# What is in a batch


async def test_every_record_comes_once_in_order_and_topics_are_told_apart() -> None:
    app = App()
    stream = Stream(chunk(0, 1), chunk(7, topic="u"), chunk(2), chunk(8, topic="u"), *(chunk(n) for n in range(3, 100)))
    seen: dict[str, list[int]] = {"t": [], "u": []}
    async for batch in app.batches(stream, records_max=5):
        for topic in seen:
            seen[topic] += offsets(batch, topic)
        if len(seen["t"]) == 100:
            stream.end()
    assert seen == {"t": list(range(100)), "u": [7, 8]}


async def test_a_batch_takes_the_chunk_that_crosses_its_bound_and_none_after() -> None:
    app = App()
    stream = Stream(chunk(0, 1, 2), chunk(3, 4, 5), chunk(6))
    source = app.batches(stream, records_max=4, interval_s=0.01)
    first = await following(source)
    assert (offsets(first), len(first)) == ([0, 1, 2, 3, 4, 5], 6)
    assert offsets(await following(source)) == [6]


async def test_what_comes_after_a_while_is_taken_at_once_and_what_comes_soon_after_waits_for_more() -> None:
    app, stream = App(), Stream(chunk(0))
    source = app.batches(stream, interval_s=0.5)
    began = time.monotonic()
    assert offsets(await following(source)) == [0]
    assert time.monotonic() - began < 0.25
    stream.put(chunk(1))
    asked = asyncio.create_task(following(source))
    await settle()
    assert not asked.done()
    stream.put(chunk(2))
    assert offsets(await asked) == [1, 2]
    assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize(("records", "beside", "intervals"), [(2, 0, 3), (8, 0, 1), (0, 8, 1)])
async def test_few_records_wait_longer(records: int, beside: int, intervals: int) -> None:
    app, stream, wake = App(), Stream(chunk(0)), asyncio.Event()
    source = app.batches(stream, interval_s=1.0, wake=wake, beside=lambda: beside)
    began = time.monotonic()
    await following(source)
    for n in range(records):
        stream.put(chunk(n + 1))
    wake.set()
    await following(source)
    assert intervals <= time.monotonic() - began < intervals + 1


async def test_a_whole_batch_does_not_wait() -> None:
    app, stream = App(), Stream(chunk(0))
    source = app.batches(stream, interval_s=60.0, records_max=3)
    await following(source)
    stream.put(chunk(1, 2))
    asked = asyncio.create_task(following(source))
    await settle()
    stream.put(chunk(3))
    assert offsets(await asyncio.wait_for(asked, 5)) == [1, 2, 3]


async def test_many_small_chunks_are_one_batch() -> None:
    app, stream = App(), Stream(chunk(0))
    source = app.batches(stream, records_max=100)
    await following(source)
    for n in range(1, 60):
        stream.put(chunk(n))
    await settle()
    assert offsets(await following(source)) == list(range(1, 60))


async def test_a_stream_that_ends_ends_the_loop() -> None:
    app, stream = App(), Stream(chunk(0))
    source = app.batches(stream)
    await following(source)
    stream.end()
    with pytest.raises(StopAsyncIteration):
        await following(source)
    assert len(app.acknowledged) == 1


async def test_a_reader_that_raises_is_not_swallowed() -> None:
    app, stream = App(), Stream(chunk(0))
    source = app.batches(stream)
    await following(source)
    stream.put(chunk(1))
    stream.fail(ValueError("the stream broke"))
    await settle()
    with pytest.raises(ValueError, match="the stream broke"):
        await following(source)
    assert [one.next_offset for one in app.acknowledged] == [1], "what was read and not processed is not acknowledged"


# Rebalances


async def test_chunks_of_an_older_generation_are_dropped() -> None:
    app = App()
    stream = Stream(chunk(0))
    source = app.batches(stream)
    await following(source)
    stream.put(chunk(1), chunk(2))
    await settle()
    app.consumer_generation_id = 2
    stream.put(chunk(1), generation=2)
    await settle()
    batch = await following(source)
    assert (offsets(batch), batch.generation) == ([1], 2)
    await waits(source)
    assert [one.next_offset for one in app.acknowledged] == [1, 2]


async def test_a_batch_learns_that_its_partitions_were_dealt_anew() -> None:
    app = App()
    batch = await following(app.batches(Stream(chunk(0))))
    batch.check_owned()
    app.consumer_generation_id = 2
    with pytest.raises(OwnershipLost):
        batch.check_owned()


# Waking


async def test_a_wake_brings_a_batch_without_records() -> None:
    app, wake = App(), asyncio.Event()
    source = app.batches(Stream(), wake=wake)
    asked = await waits(source)
    wake.set()
    batch = await asyncio.wait_for(asked, LONG_S)
    assert len(batch) == 0
    assert list(batch.records("t")) == []


async def test_a_wake_while_a_batch_is_worked_on_is_not_lost() -> None:
    app, wake = App(), asyncio.Event()
    source = app.batches(Stream(chunk(0)), wake=wake)
    await following(source)
    wake.set()
    assert len(await following(source)) == 0
    await waits(source)


async def test_reading_ahead_goes_on_when_there_is_room_again() -> None:
    app = App()
    stream = Stream(*(chunk(n) for n in range(4 * EVENTS_BUFFERED_MAX)))
    source: Any = app.batches(stream, records_max=1)
    seen: list[int] = []
    while len(seen) < 4 * EVENTS_BUFFERED_MAX:
        seen += offsets(await following(source))
        assert stream.read - len(seen) <= EVENTS_BUFFERED_MAX
    assert seen == list(range(4 * EVENTS_BUFFERED_MAX))


async def test_a_worker_that_leaves_lets_the_batch_in_hand_end_and_begins_no_other() -> None:
    app, stream = App(), Stream(chunk(1, 2))
    source = app.batches(stream)
    await following(source)
    stream.put(chunk(3))
    leaving = asyncio.create_task(app.in_hand.finish())
    await settle()
    assert not leaving.done()

    asked = await waits(source)
    await asyncio.wait_for(leaving, LONG_S)
    assert [one.records[-1].offset for one in app.acknowledged] == [2]
    assert not asked.done()
    asked.cancel()


async def test_a_batch_that_is_dropped_is_read_again() -> None:
    app, stream = App(), Stream(chunk(1, 2))
    source = app.batches(stream)
    (await following(source)).drop()
    asked = await waits(source)
    assert (app.acknowledged, app.read_again) == ([], 1)
    asked.cancel()


def test_a_batch_may_be_anothers_after_the_process_stood_still_for_longer_than_its_session() -> None:
    now = [100.0]
    app = App()
    app.pulse = Pulse(lambda: now[0])
    app.conf.broker_session_timeout = 6.0
    any_app: Any = app
    batch = Batch(any_app, [])
    batch._taken = 100.0
    now[0] = 106.0
    batch.check_owned()
    now[0] = 106.1
    with pytest.raises(OwnershipLost):  # before the pulse beats again
        batch.check_owned()
    app.pulse.beat(6.0)
    with pytest.raises(OwnershipLost):  # and after
        batch.check_owned()
    later = Batch(any_app, [])
    later._taken = 106.2
    now[0] = 107.0
    later.check_owned()


# What is finished beside the next batch


class Rest:
    """The rest of a batch, which ends when the test says so."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()
        self.fault = fault

    async def run(self) -> None:
        self.begun.set()
        await self.may_end.wait()
        if self.fault is not None:
            raise self.fault


async def left(source: AsyncGenerator[Batch, None], rest: Rest) -> Batch:
    batch = await following(source)
    batch.finish_with(rest.run())
    return batch


async def test_the_next_batch_comes_while_the_rest_of_one_runs_and_each_is_acknowledged_when_its_rest_ended() -> None:
    app, one, two = App(), chunk(0), chunk(1)
    stream = Stream(one)
    source = app.batches(stream)
    rests = [Rest(), Rest()]
    await left(source, rests[0])
    stream.put(two)
    assert (await left(source, rests[1])).chunks == [two]
    assert rests[0].begun.is_set()
    asked = await waits(source)  # a third one, only once the first rest has ended
    assert (app.acknowledged, rests[1].begun.is_set()) == ([], False)
    rests[0].may_end.set()
    await settle()
    assert (app.acknowledged, rests[1].begun.is_set()) == ([one], True)
    rests[1].may_end.set()
    await settle()
    assert app.acknowledged == [one, two]
    assert not asked.done(), "a rest that ends is no batch"
    asked.cancel()


async def test_each_step_is_done_for_one_batch_after_the_other_while_the_next_ones_are_at_the_steps_before() -> None:
    app, ones = App(), [chunk(n) for n in range(4)]
    stream = Stream()
    source = app.batches(stream)
    firsts, seconds = [Rest() for _ in ones], [Rest() for _ in ones]

    async def rest(n: int) -> Coroutine[Any, Any, None]:
        await firsts[n].run()
        return seconds[n].run()

    for n, one in enumerate(ones[:3]):
        stream.put(one)
        (await following(source)).finish_with(rest(n), steps=2)
    asked = await waits(source)  # the third one has to wait: two are at their steps
    assert [one.begun.is_set() for one in (*firsts, *seconds)] == [True] + [False] * 7
    firsts[0].may_end.set()
    await settle()
    assert [one.begun.is_set() for one in (*firsts, *seconds)] == [True, True, False, False, True] + [False] * 3
    firsts[1].may_end.set()
    await settle()
    assert not seconds[1].begun.is_set(), "the first batch is at it"
    assert (app.acknowledged, asked.done()) == ([], False)
    seconds[0].may_end.set()
    await settle()
    assert (app.acknowledged, seconds[1].begun.is_set(), firsts[2].begun.is_set()) == ([ones[0]], True, True)
    asked.cancel()


async def test_a_rest_that_ends_wakes_nobody() -> None:
    """Else an agent that is woken once would go on for ever: each batch without records has a rest."""
    app, wake, rest = App(), asyncio.Event(), Rest()
    source = app.batches(Stream(), wake=wake)
    wake.set()
    await left(source, rest)
    rest.may_end.set()
    asked = await waits(source)
    wake.set()
    assert len(await asyncio.wait_for(asked, LONG_S)) == 0


async def test_a_batch_that_is_dropped_while_its_rest_runs_is_not_acknowledged() -> None:
    app, stream, rest = App(), Stream(chunk(0)), Rest()
    source = app.batches(stream)
    (await left(source, rest)).drop()
    rest.may_end.set()
    asked = await waits(source)
    assert (app.acknowledged, app.read_again) == ([], 1)
    asked.cancel()


async def test_a_rest_that_fails_surfaces_though_nothing_else_comes() -> None:
    app, rest = App(), Rest(RuntimeError("the rest failed"))
    source = app.batches(Stream(chunk(0)))
    await left(source, rest)
    asked = await waits(source)
    rest.may_end.set()
    with pytest.raises(RuntimeError, match="the rest failed"):
        await asyncio.wait_for(asked, LONG_S)
    assert app.acknowledged == []


async def test_a_worker_that_leaves_lets_the_rest_end() -> None:
    app, one, rest = App(), chunk(0), Rest()
    source = app.batches(Stream(one))
    await left(source, rest)
    asked = await waits(source)
    leaving = asyncio.create_task(app.in_hand.finish())
    await settle()
    assert not leaving.done()
    rest.may_end.set()
    await asyncio.wait_for(leaving, LONG_S)
    assert app.acknowledged == [one]
    asked.cancel()


async def test_a_stream_that_ends_waits_for_the_rest() -> None:
    app, one, rest = App(), chunk(0), Rest()
    stream = Stream(one)
    source = app.batches(stream)
    await left(source, rest)
    stream.end()
    asked = await waits(source)
    rest.may_end.set()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(asked, LONG_S)
    assert app.acknowledged == [one]


async def test_a_batch_takes_no_further_chunk_beyond_its_size_in_bytes() -> None:
    app = App()
    chunks = [chunk(n) for n in range(4)]
    for one in chunks:
        one.size_bytes = BATCH_BYTES_MAX // 2
    stream = Stream(*chunks)
    source = app.batches(stream)
    await settle()
    first = await following(source)
    await settle()
    second = await following(source)
    assert [len(first.chunks), len(second.chunks)] == [2, 2]
