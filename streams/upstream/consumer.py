"""A drain loop that moves chunks, not records.

Faust's own loop makes and tears down two tasks for every record: 12,500 records/s for an agent that does nothing
(robinhood/faust#563, "Message consumption is slow").  Here what one fetch brought of a topic travels through Faust as one
event: one queue entry, one stream iteration.  It is a list of *chunks*, consecutive records of one partition each, each
acknowledged as one.  Changelog topics keep one record an event, since table recovery reads them so.

Offsets are committed from the chunks: up to the first one that is not acknowledged.  The upstream behaviour that this
relies on is pinned in ``tests/unit/test_upstream.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from aiokafka.errors import (
    CommitFailedError,
    ConsumerStoppedError,
    IllegalStateError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)
from aiokafka.structs import OffsetAndMetadata
from faust.events import Event
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from orderstream.streams.upstream import lenient
from orderstream.streams.upstream.clients import COMMITTED_BY, READ_COMMITTED, REQUEST_TIMEOUT_MS
from orderstream.streams.upstream.fetch_list import keep_fetch_list
from orderstream.streams.upstream.pacing import pace
from orderstream.streams.upstream.sessions import fetch_in_sessions

REBALANCED = (IllegalStateError, AssertionError)
"""By these aiokafka says that a partition is not assigned any more."""

CHUNK_RECORDS_MAX = 500
"""Records of one chunk at most: a part of a batch, so that a batch can be filled from several partitions."""

CHUNK_BYTES_MAX = 128 * 1024
"""Where records are large, as those of the inner topics with their hundreds of rows, a chunk ends with the one that reaches
this."""

FETCH_WAIT_MS = 100
"""How long the broker keeps a fetch that finds nothing.  Whatever else is asked on the connection, at a start and at each
rebalance, waits for it: with Faust's 1.5 s, which no setting changes, a worker took over that much later.  No upstream issue
found."""

QUEUE_EVENTS_MAX = 64
"""Events that wait in front of one agent at most."""

QUEUE_EVENTS_BEHIND = 16
"""An agent with so many events in front of it is behind: its partitions are not drained until it has caught up, those of the
others are.  A loop that waited for it would hold back all of them, and the stages would work one after the other."""

OUT_OF_RANGE_POLL_S = 0.1
"""How long is waited where a position is in no log, before the broker is asked again."""

BEHIND_POLL_S = 0.005
"""How long other partitions are waited for before an agent that is behind is checked again."""

PASSED_OVER_S = 0.1
"""How often is looked what the fetcher has passed over: records of aborted transactions, and the marks that end each one."""

SEEK_AGAIN_S = 0.2
"""How long is waited before positions are set again that could not be set."""


class Chunk:
    """Consecutive records of one partition, acknowledged as one.

    Attributes:
        tp: topic and partition.
        records: what the consumer fetched (``aiokafka.ConsumerRecord``), in offset order.  Empty: there is nothing for us
            between these offsets, only what transactions leave behind.
        offset: of the first of them.
        next_offset: the offset to commit once all of them are done.  It is behind what transactions leave, too.
        size_bytes: of their values.
        seeks: how often the consumer had sought when it was delivered; see :meth:`Consumer.is_current`.
    """

    __slots__ = ("done", "next_offset", "offset", "records", "seeks", "size_bytes", "tp")

    def __init__(
        self,
        tp: TP,
        records: list[Any],
        size_bytes: int = 0,
        seeks: int = 0,
        passed_over: tuple[int, int] = (0, 0),
    ) -> None:
        self.seeks = seeks
        self.tp = tp
        self.records = records
        self.size_bytes = size_bytes
        self.offset: int
        self.next_offset: int
        self.offset, self.next_offset = (records[0].offset, records[-1].offset + 1) if records else passed_over
        self.done = False

    def __repr__(self) -> str:
        return f"<Chunk {self.tp.topic}/{self.tp.partition} {self.offset}…{self.next_offset - 1}>"


def _parts(records: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """Yield the records of the chunks that a fetch is cut into, each with its size in bytes."""
    start = size = 0
    for end, record in enumerate(records, start=1):
        size += len(record.value or b"")
        if size >= CHUNK_BYTES_MAX or end - start == CHUNK_RECORDS_MAX or end == len(records):
            yield records[start:end], size
            start, size = end, 0


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """The thread of Faust's aiokafka consumer: it pauses while no broker answers, and reads whatever a broker took."""

    _current: Any = None
    _assignment: set[TP]

    async def on_start(self) -> None:
        """Connect.  A broker that became unavailable since the worker checked is reported here, where no traceback hides it.

        Faust itself gives an app no such call: robinhood/faust#711.
        """
        try:
            await super().on_start()
        except KafkaError as error:
            self.consumer.app.kafka_unavailable(error)
            raise
        keep_fetch_list(self._ensure_consumer())

    def _create_consumer(self, loop: asyncio.AbstractEventLoop) -> Any:
        lenient.install()
        consumer = super()._create_consumer(loop)
        consumer._fetch_max_wait_ms = FETCH_WAIT_MS
        consumer._isolation_level = READ_COMMITTED  # Faust reads so only where it writes in transactions itself
        # Of one request.  Faust's setting also bounds its recovery, which then ends for good.  No upstream issue found.
        consumer._client._request_timeout_ms = REQUEST_TIMEOUT_MS
        pace(consumer._client)
        fetch_in_sessions(consumer)
        commit = consumer.commit

        async def commit_assigned(offsets: Any) -> None:
            try:
                await commit({tp: OffsetAndMetadata(at.offset, COMMITTED_BY) for tp, at in offsets.items()})
            except IllegalStateError as error:  # Faust ends with it
                raise CommitFailedError("already rebalanced") from error

        consumer.commit = commit_assigned
        return consumer

    def assignment(self) -> set[TP]:
        """Return the current assignment, made anew only where it is another one.

        Faust asks for it once for each offset that it commits, and makes all of it each time: with 48 partitions that was a
        tenth of this thread's work.  No upstream issue found.
        """
        subscription = self._ensure_consumer()._subscription.subscription
        current = subscription and subscription.assignment
        if current is None or current is not self._current:
            self._current, self._assignment = current, super().assignment()
        return self._assignment

    async def seek_to_committed(self) -> Mapping[TP, int | None]:
        """Go to the committed offsets of what is assigned and return them, None where nothing is committed.

        aiokafka asks for one partition after the other.

        Raises:
            IllegalStateError, AssertionError: there was a rebalance meanwhile.
        """
        found: Mapping[TP, int | None] = await self.call_thread(self._seek_to_committed)
        return found

    async def _seek_to_committed(self) -> Mapping[TP, int | None]:
        consumer = self._ensure_consumer()
        partitions = consumer.assignment()
        there = await consumer._coordinator.fetch_committed_offsets(partitions)
        found = {tp: there[tp].offset if tp in there and there[tp].offset >= 0 else None for tp in partitions}
        for tp, offset in found.items():
            if offset:
                consumer.seek(tp, offset)
        return found

    def _state(self, tp: TP) -> Any | None:
        """Return what aiokafka knows of a partition; None: it is not assigned."""
        subscription = self._ensure_consumer()._subscription.subscription
        assignment = subscription and subscription.assignment
        return assignment and assignment.state_value(tp)

    def position_of(self, tp: TP) -> int | None:
        """Return the offset before which everything was handed out or passed over; None while that is not known."""
        state = self._state(tp)
        return state and state._position

    def highwater(self, tp: TP) -> int | None:
        """Return the end of a partition, its last stable offset; None while that is not known."""
        state = self._state(tp)
        return state and state.lso

    def written(self, tp: TP) -> int | None:
        """Return the offset before which everything is written, of open transactions too; None while that is not known."""
        state = self._state(tp)
        return state and state.highwater

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Leave it to our watchdog to see what stands still; Faust's check fails in the middle of a rebalance."""

    def _verify_aiokafka_event_path(self, now: float, tp: TP) -> bool:
        # Faust's takes a partition without an answer for a silent one.  In a session nothing is said about what is idle; a
        # broker that is silent about all is the watchdog's to see.
        return False


class Consumer(driver.Consumer):
    """Faust's aiokafka consumer with the lean drain loop and offsets by chunk."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._chunks: dict[TP, deque[Chunk]] = {}
        self._dropped = False  # fetched records were not delivered since the last seek
        self._unsought = False  # the last seek was cut off
        self._seeking = asyncio.Lock()
        self._seeks = 0
        self._look_at = 0.0
        super().__init__(*args, **kwargs)

    def _new_consumer_thread(self) -> ConsumerThread:
        """Make our thread: Faust has a setting for the transport, none for this.  No upstream issue found."""
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    def _behind(self, active: Iterable[TP]) -> set[TP]:
        """Return the partitions whose agents have enough to do for now.

        Faust's own answer to faust-streaming/faust#53 counts records, and dropped those of a partition that it had set aside
        (faust-streaming/faust#88); with chunks its counts say nothing.
        """
        index, changelogs = self.app.topics._tp_index, self.app.tables.changelog_topics
        behind: dict[str, bool] = {}
        for tp in active:
            if tp.topic not in behind:
                behind[tp.topic] = tp.topic not in changelogs and any(
                    channel.queue.qsize() >= QUEUE_EVENTS_BEHIND for channel in index.get(tp, ())
                )
        return {tp for tp in active if behind[tp.topic]} if any(behind.values()) else set()

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> Any:
        if active_partitions:
            behind = self._behind(active_partitions)
            if behind:
                active_partitions, timeout = active_partitions - behind, BEHIND_POLL_S
                if not active_partitions:
                    await asyncio.sleep(timeout)
                    return {}
        try:
            return await super()._getmany(active_partitions=active_partitions, timeout=timeout)
        except OffsetOutOfRangeError as error:
            self.app.out_of_range(error.args[0])
        except NoOffsetForPartitionError:
            pass  # nothing was committed yet: whoever asks seeks, at the end of a rebalance
        await asyncio.sleep(OUT_OF_RANGE_POLL_S)
        return {}

    async def _drain_messages(self, fetcher: Any) -> None:
        """Deliver what is fetched: Faust's loop of the same name, by chunk (robinhood/faust#563)."""
        app = self.app
        changelogs = app.tables.changelog_topics
        stopped, fetcher_stopped = self._stopped.is_set, fetcher._stopped.is_set
        try:
            while not (stopped() or fetcher_stopped()):
                seeks = self._seeks
                records, active = await self._wait_next_records(timeout=1.0)
                # Only now: the wait may have lasted through a rebalance.
                generation = app.consumer_generation_id
                await asyncio.sleep(0)  # an answer that was ready at once must not starve the other tasks
                if self.should_stop:
                    break
                fresh: dict[str, dict[TP, list[Any]]] = {}
                for tp, fetched in (records or {}).items():
                    if (
                        not self.flow_active
                        or app.consumer_generation_id != generation
                        or (active is not None and tp not in active)
                    ):
                        self._dropped = True
                    elif tp.topic in changelogs:
                        await self._deliver_changelog(tp, fetched)
                    else:
                        if (end := self.highwater(tp)) is not None:
                            app.monitor.track_tp_end_offset(tp, end)
                        fresh.setdefault(tp.topic, {})[tp] = fetched
                for parts in fresh.values():
                    await self._deliver_chunks(parts, generation, seeks)
                if active and (now := time.monotonic()) >= self._look_at:
                    self._look_at = now + PASSED_OVER_S
                    await self._deliver_passed_over(active, generation, seeks)
                if (self._dropped or self._unsought) and self.flow_active and not app.in_recovery:
                    # Records were fetched and not delivered; the fetch position is behind them.  Go back, or they are
                    # never seen again.  In the middle of a rebalance its end does that, and changelogs are left alone.
                    with contextlib.suppress(IllegalStateError):
                        await self.perform_seek()
                    if self._unsought:
                        await asyncio.sleep(SEEK_AGAIN_S)
        except ConsumerStoppedError:
            if not app.should_stop:
                raise
        except asyncio.CancelledError:
            if not app.should_stop:
                raise
        except Exception as error:
            self.log.exception("The drain loop failed: %r", error)
            raise

    async def _deliver_changelog(self, tp: TP, fetched: list[Any]) -> None:
        for number, record in enumerate(fetched):
            message = self._to_message(tp, record)
            await self.wait_first(self.callback(message), self.suspend_flow.wait())
            self._read_offset[tp] = record.offset
            if not number % 100:
                await asyncio.sleep(0)

    def _sought(self, seeks: int) -> bool:
        """Return whether positions may have moved since ``_seeks`` was ``seeks``.  What was fetched then is not delivered.

        Faust seeks at the end of a recovery while this loop is at work.  A chunk that it delivers meanwhile would lose its
        acknowledgement to the seek, and with nothing behind it in its partition, the partition would stall.  The same
        race cost offsets in faust-streaming/faust#216; its fix (#217) reordered one of the places that seek.
        """
        return self._unsought or self._seeking.locked() or self._seeks != seeks

    async def _deliver_chunks(self, fetched: Mapping[TP, list[Any]], generation: int, seeks: int) -> None:
        """Deliver what was fetched of partitions of one topic, in one event if it is no more than a chunk may be."""
        chunks: list[Chunk] = []
        count = size_bytes = 0
        for chunk in self._chunks_of(fetched, seeks):
            count, size_bytes = count + len(chunk.records), size_bytes + chunk.size_bytes
            if chunks and (count > CHUNK_RECORDS_MAX or size_bytes > CHUNK_BYTES_MAX):
                if not await self._deliver(chunks, generation):
                    return
                chunks, count, size_bytes = [], len(chunk.records), chunk.size_bytes
            chunks.append(chunk)
        if chunks:
            await self._deliver(chunks, generation)

    def _chunks_of(self, fetched: Mapping[TP, list[Any]], seeks: int) -> Iterator[Chunk]:
        for tp, all_of_it in fetched.items():
            if self._sought(seeks):
                self._dropped = True
                return
            read = self._read_offset[tp]
            is_read = read is not None and all_of_it[0].offset < read
            records = [record for record in all_of_it if record.offset >= read] if is_read else all_of_it
            if not self.app.topics._tp_index.get(tp) or not records:
                self._dropped |= bool(records)
                continue
            position = self._thread.position_of(tp)  # behind the mark that ended a transaction with these records
            for part, size_bytes in _parts(records):
                chunk = Chunk(tp, part, size_bytes, seeks)
                if part[-1] is records[-1] and position is not None:
                    chunk.next_offset = max(position, chunk.next_offset)
                yield chunk

    async def _deliver_passed_over(self, active: Iterable[TP], generation: int, seeks: int) -> None:
        """Deliver chunks without records where the fetcher has passed over what transactions leave in a log.

        They are done as all chunks are: what is committed stands in a mark.
        """
        changelogs, index = self.app.tables.changelog_topics, self.app.topics._tp_index
        for tp in active:
            read, position = self._read_offset.get(tp), self._thread.position_of(tp)
            if read is None or position is None or position <= read or tp.topic in changelogs or not index.get(tp):
                continue
            if self._dropped:
                return  # the position is behind records that were not delivered
            if not await self._deliver([Chunk(tp, [], 0, seeks, (read, position))], generation):
                return

    async def _deliver(self, chunks: list[Chunk], generation: int) -> bool:
        """Put chunks of one topic into the queues of its agents; return False where a rebalance or a seek came between."""
        first = chunks[0]
        tp, record = first.tp, first.records[0] if first.records else None
        if not self._is_wanted(first, generation):
            return False
        message = ConsumerMessage(
            tp.topic,
            tp.partition,
            first.next_offset - 1,
            record.timestamp / 1000.0 if record else 0.0,
            record.timestamp_type if record else 0,
            (),
            None,
            chunks,
            None,
            0,
            0,
            tp,
            generation_id=generation,
        )
        for chunk in chunks:
            self._chunks.setdefault(chunk.tp, deque()).append(chunk)
        for channel in self.app.topics._tp_index[tp]:
            message.incref()
            event = Event(self.app, None, chunks, {}, message)
            while channel.queue.qsize() >= QUEUE_EVENTS_MAX:
                # The agent is behind.  Wait for it, but never through a rebalance: its queue is cleared then.
                await asyncio.sleep(0.002)
                if not self._is_wanted(first, generation):
                    return False
            channel.queue.put_nowait(event)
        for chunk in chunks:
            self._read_offset[chunk.tp] = chunk.next_offset
        return True

    def _is_wanted(self, chunk: Chunk, generation: int) -> bool:
        """Return whether a chunk is still to be delivered; else what was fetched is to be read again."""
        if self.flow_active and self.app.consumer_generation_id == generation and not self._sought(chunk.seeks):
            return True
        self._dropped = True
        return False

    def ack_chunk(self, chunk: Chunk) -> bool:
        """Mark a chunk as done for good: its effects are durable and what follows from it is produced.

        Returns False for a chunk whose partition was revoked meanwhile; its new owner reads it again.
        """
        waiting = self._chunks.get(chunk.tp)
        if waiting is None or chunk not in waiting:
            return False
        chunk.done = True
        self._n_acked += len(chunk.records)
        return True

    def read_again(self) -> None:
        """Go back to what is committed: chunks were dropped whose partitions may be ours still."""
        self._dropped = True

    def is_current(self, chunk: Chunk) -> bool:
        """Tell whether positions have not moved since a chunk was delivered: else it is delivered again, or not wanted."""
        return chunk.seeks == self._seeks

    async def begin_at(self, offsets: Mapping[TP, int]) -> bool:
        """Commit these offsets, which may be before the committed ones, and read on from there.

        Returns False where there was a rebalance: then nothing has changed.
        """
        self._seeks += 1  # chunks from before are not to be acknowledged: that would commit their offsets
        self._chunks.clear()
        if not await self._commit({TP(*tp): offset for tp, offset in offsets.items()}):
            return False
        try:
            await self.perform_seek()
        except IllegalStateError:
            return False
        return True

    def done_offset(self, tp: TP) -> int | None:
        """Return the offset before which every record of a partition is done; None when none was taken in yet."""
        for chunk in self._chunks.get(tp, ()):
            if not chunk.done:
                return chunk.offset
        return self.read_offset(tp)

    def read_offset(self, tp: TP) -> int | None:
        """Return the offset before which every record of a partition was delivered; None when none was yet."""
        offset: int | None = self._read_offset.get(tp)
        return offset

    def committed_offset(self, tp: TP) -> int | None:
        """Return the offset before which every record of a partition is committed, as far as this consumer knows."""
        offset: int | None = self._committed_offset.get(tp)
        return offset

    def lag(self, tp: TP) -> int | None:
        """Return how many records of a partition are not committed; None while its end is not known.

        Those of open transactions do not count: nobody may read them yet.
        """
        end = self.highwater(tp)
        return None if end is None else max(0, end - (self.committed_offset(tp) or 0))

    def held_back(self) -> dict[TP, int]:
        """Return the partitions in which a transaction is open, each with the offset where it begins."""
        found = {}
        for tp in self.assignment():
            end, written = self._thread.highwater(tp), self._thread.written(tp)
            if end is not None and written is not None and 0 <= end < written:
                found[tp] = end
        return found

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        # Faust's searches acknowledged records; ours are in chunks.
        return (tp for tp in list(self._chunks) if topics is None or tp in topics or tp.topic in topics)

    def _new_offset(self, tp: TP) -> int | None:
        # Faust's searches consecutive offsets; gaps have misled it (robinhood/faust#379, faust-streaming/faust#312).
        waiting = self._chunks.get(tp)
        offset = None
        while waiting and waiting[0].done:
            offset = waiting.popleft().next_offset
        return offset

    async def perform_seek(self) -> None:
        """Go back to the committed offsets; chunks from before are read again, so their late acknowledgement is invalid.

        A partition that never was committed goes back to its beginning.  (Upstream leaves it where the fetcher happens to
        be: what was fetched during a rebalance, and not delivered, would be lost.  No upstream issue found for that case;
        faust-streaming/faust#216 is of committed ones.)

        Where the broker does not answer, the loop does it again: Faust would end.

        Raises:
            IllegalStateError: a rebalance came in between; its end does this again, or the loop.
        """
        async with self._seeking:
            self._seeks += 1
            self._chunks.clear()
            self._dropped, self._unsought = False, True
            try:
                await super().perform_seek()
                own = [tp for tp in self.assignment() if not self._is_changelog_tp(tp)]
                fresh = [
                    tp for tp in own if not self._read_offset.get(tp)
                ]  # by the broker, which may be set back itself
                if fresh:
                    for tp in fresh:
                        self._committed_offset.pop(tp, None)
                    beginnings = {tp: offset or 0 for tp, offset in (await self.earliest_offsets(*fresh)).items()}
                    await self.seek_wait(beginnings)
                    self._read_offset.update(beginnings)
                self._unsought = False
            except REBALANCED as error:
                raise IllegalStateError(str(error)) from error
            except (KafkaError, TimeoutError) as error:
                self.log.warning("positions could not be set, this is done again: %r", error)
            finally:
                self._seeks += 1  # what the loop asked for meanwhile is of the positions before

    async def on_partitions_revoked(self, revoked: Iterable[TP]) -> None:
        """Forget the chunks of partitions that were revoked (all of them: the protocol is the eager one)."""
        await super().on_partitions_revoked(revoked)
        for tp in revoked:
            self._chunks.pop(tp, None)


class Transport(driver.Transport):
    """Faust's aiokafka transport with our consumer."""

    Consumer = Consumer
