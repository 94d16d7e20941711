"""The batch helper: many chunks in, one decision, acknowledged only when all of it is done.

Faust's own ``take()`` acknowledges in a ``finally``: an exception that leaves the agent loses the batch.  Here nothing is
acknowledged unless the body came back for the next batch, everything that it produced included; or, where the body left the
rest of a batch to be finished beside the next one, unless that rest has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from orderstream.errors import OwnershipLost
from orderstream.streams.upstream.app import App
from orderstream.streams.upstream.consumer import CHUNK_BYTES_MAX, Chunk

BATCH_BYTES_MAX = 2 * CHUNK_BYTES_MAX
"""A batch takes no further event beyond this: some 2,000 rows of an inner topic.  One that takes all that has come makes the
stages behind it wait, then flood, one after the other."""

EVENTS_BUFFERED_MAX = 1_000
"""Events taken from the stream ahead of the batch in hand, however small: at a low rate one is a record or two, and a
batch that took no more than a few of them would be small while others wait."""


WORTH = (8, 12)
"""Records that are worth a batch's round trips after one interval, and after two: with fewer, one waits for another."""


STEPS_MAX = 3
"""Steps in which the rest of a batch is done."""


class Batch:
    """Chunks that are decided together."""

    __slots__ = ("_app", "_taken", "chunks", "generation", "kept", "rest", "steps")

    def __init__(self, app: App, chunks: list[Chunk]) -> None:
        self._app = app
        self._taken = time.monotonic()
        self.chunks = chunks
        self.generation = app.consumer_generation_id
        self.rest: Coroutine[Any, Any, Any] | None = None
        self.steps = 0
        self.kept = False

    def __len__(self) -> int:
        return _count(self.chunks)

    def records(self, topic: str) -> Iterator[Any]:
        """Yield the records of one topic: in offset order within a partition."""
        for chunk in self.chunks:
            if chunk.tp.topic == topic:
                yield from chunk.records

    def check_owned(self) -> None:
        """Raise when there was, or may have been, a rebalance since the batch was taken.

        A process that was frozen for longer than its session does not know yet that another one works on them.

        Raises:
            OwnershipLost: stop working on this batch, and :meth:`drop` it.
        """
        app = self._app
        if app.consumer_generation_id != self.generation or app.pulse.stood_still(
            self._taken, app.conf.broker_session_timeout
        ):
            raise OwnershipLost

    def acknowledged(self, tp: Any) -> int:
        """Return the offset before which all of a partition is acknowledged, as far as this worker has committed it."""
        return self._app.consumer.committed_offset(tp) or 0

    def finish_with(self, rest: Coroutine[Any, Any, Any], steps: int = 1) -> None:
        """Leave what is still to do to ``rest``, which returns the step after it, or None.

        A step runs after the same one of the batch before, while the next batches are at the steps before it.  The batch is
        acknowledged when the last one ends.

        Args:
            rest: the first step.
            steps: how many there are at most, so many batches are at them.
        """
        self.rest, self.steps = rest, steps

    def keep(self) -> None:
        """Leave the acknowledgement to who has taken the chunks over; see :meth:`~Consumer.ack_chunk`."""
        self.kept = True

    def leave_out_stale(self) -> None:
        """Leave out what was delivered before the consumer went elsewhere: it comes again, or is not to be read."""
        self.chunks = [chunk for chunk in self.chunks if self._app.consumer.is_current(chunk)]

    def drop(self) -> None:
        """Drop the batch: nothing of it is acknowledged, and the partitions' owner, perhaps this worker, reads it again."""
        self.chunks.clear()
        self._app.consumer.read_again()


def _count(chunks: list[Chunk]) -> int:
    return sum([len(chunk.records) for chunk in chunks])


async def batches(
    app: App,
    stream: Any,
    *,
    records_max: int,
    interval_s: float,
    wake: asyncio.Event | None = None,
    beside: Callable[[], int] = lambda: 0,
) -> AsyncIterator[Batch]:
    """Yield batches from an agent's stream and acknowledge each once the loop's body has ended without an exception.

    Args:
        app: the Faust app; its consumer keeps the chunks' acknowledgements.
        stream: as the agent got it.
        records_max: records of one batch; the event that crosses the bound is still taken.
        interval_s: seconds between the beginnings of two batches at least, unless there is enough for a whole one; up to
            three times as many while there are fewer records than :data:`WORTH`.  What comes after a quiet while is taken at
            once; under a steady load a batch costs its round trips less often.
        wake: set by the agent for a batch without records (something else is to be done).
        beside: what that is, counted like records.

    What is buffered of a partition that was revoked is dropped.  Once the worker leaves, no further batch comes.
    """
    arrived = wake or asyncio.Event()
    waiting: deque[Any] = deque()
    buffered = 0  # records of these
    plenty, room = asyncio.Event(), asyncio.Event()
    room.set()

    async def read() -> None:
        nonlocal buffered
        async for event in stream.noack().events():
            waiting.append(event)
            buffered += _count(event.value)
            arrived.set()
            if buffered >= records_max or len(waiting) >= EVENTS_BUFFERED_MAX:
                plenty.set()
                room.clear()
                await room.wait()

    def acknowledge(batch: Batch) -> None:
        if batch.kept:
            return
        for chunk in batch.chunks:
            app.consumer.ack_chunk(chunk)

    async def finish(batch: Batch, rest: Coroutine[Any, Any, Any]) -> None:
        following: Coroutine[Any, Any, Any] | None = rest
        with app.in_hand:
            for turn in turns:
                async with turn:  # who waits first has it first
                    following = await following if following is not None else None
                await asyncio.sleep(0)  # the next batch's step begins before this one's next
            acknowledge(batch)

    def surface(ended: asyncio.Task[None]) -> None:
        if not ended.cancelled() and ended.exception() is not None:
            arrived.set()

    began = float("-inf")
    finishing: deque[asyncio.Task[None]] = deque()
    turns = [asyncio.Lock() for _ in range(STEPS_MAX)]
    reader = asyncio.create_task(read(), name="batch reader")
    reader.add_done_callback(lambda _: arrived.set())
    reader.add_done_callback(lambda _: plenty.set())
    try:
        while True:
            if not waiting:
                await arrived.wait()
            arrived.clear()
            while finishing and finishing[0].done():
                finishing.popleft().result()
            if reader.done():
                reader.result()
                while finishing:
                    await finishing.popleft()
                return
            for intervals, worth in enumerate((*WORTH, 0), 1):
                early_s = began + intervals * interval_s - time.monotonic()
                if early_s > 0 and not (plenty.is_set() or reader.done()):
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(plenty.wait(), early_s)
                    if not reader.done():
                        arrived.clear()
                if buffered + beside() >= worth:
                    break
            began = time.monotonic()
            chunks: list[Chunk] = []
            size = size_bytes = 0
            while waiting and size < records_max and size_bytes < BATCH_BYTES_MAX:
                event = waiting.popleft()
                brought: list[Chunk] = event.value
                count = _count(brought)
                buffered -= count
                if event.message.generation_id == app.consumer_generation_id and app.consumer.is_current(brought[0]):
                    chunks += brought
                    size += count
                    size_bytes += sum([chunk.size_bytes for chunk in brought])
            if buffered < records_max:
                plenty.clear()
                room.set()
            if app.in_hand.leaving:
                await asyncio.Event().wait()  # until the agent is cancelled; another worker reads these again
            with app.in_hand:
                batch = Batch(app, chunks)
                yield batch
                while len(finishing) > max(0, batch.steps - 1):
                    await finishing.popleft()
                if batch.rest is None:
                    acknowledge(batch)
                else:
                    finishing.append(asyncio.create_task(finish(batch, batch.rest), name="batch finisher"))
                    finishing[-1].add_done_callback(surface)
                    await asyncio.sleep(0)  # it has begun, so it is in hand
    finally:
        reader.cancel()
        for task in finishing:
            task.cancel()
