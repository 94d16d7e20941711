"""The topic ``dead-letters`` as people read it: each letter with its story, those of one record once."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from orderstream import access, connecting
from orderstream.errors import EngineUnavailable, NotFound
from orderstream.settings import Settings
from orderstream.streams.dead_letters import Headers
from orderstream.streams.places import Place
from orderstream.streams.topics import DEAD_LETTERS
from orderstream.streams.upstream import lenient
from orderstream.streams.upstream.clients import READ_COMMITTED, REQUEST_TIMEOUT_MS

PAGE_LETTERS_MAX = 200
"""Letters read, looked up and sent again in one go."""

SILENCE_MAX_S = 30.0
"""How long the broker may keep records back that it has, in seconds."""

STORY = frozenset(
    {"reason", "detail", "source-topic", "source-partition", "source-offset", "source-timestamp", "cut-from"}
)
"""Headers that say why a record is a dead letter; the others are the record's own."""

RETRY_OF = "retry-of"
"""Header of a record that was sent again: the letter that it came from."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS_MAX = 253_402_300_799_999  # the end of the year 9999: a broken clock may have written a later time


class LetterId(NamedTuple):
    """Partition and offset of a letter on the topic ``dead-letters``; written ``PARTITION/OFFSET``."""

    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.partition}/{self.offset}"


class Letter(NamedTuple):
    """A dead letter.

    Attributes:
        id: its place.
        at: when it was written, to the millisecond.
        reason: from :data:`orderstream.streams.dead_letters.REASONS`.
        detail: for people.
        source: the place of its record; None when the letter does not name it, or not its time.
        timestamp: of its record, in milliseconds since the epoch; 0 without ``source``.
        key: of the record.
        value: of the record.
        headers: the record's own.
        size: of key, value and own headers, in bytes.
        retry_of: the letter that this record had been sent again from, by its header.
        cut_from: the size of the whole record, in bytes, when the letter holds a part of it.
    """

    id: LetterId
    at: datetime
    reason: str
    detail: str
    source: Place | None
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    size: int
    retry_of: str | None
    cut_from: int | None


def parse_id(text: str) -> LetterId:
    """Read a letter's id.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d{1,9})/(\d{1,18})", text, re.ASCII)
    if found is None:
        raise ValueError(f"{text!r} is no dead letter's id: expected PARTITION/OFFSET, like 3/17")
    return LetterId(int(found[1]), int(found[2]))


def read(record: Any) -> Letter:
    """Read a record of the topic, whoever wrote it."""
    story: dict[str, str] = {}
    for name, data in record.headers:
        story.setdefault(name, (data or b"").decode(errors="replace"))
    own = tuple((name, data) for name, data in record.headers if name not in STORY)
    where = story.get("source-partition", ""), story.get("source-offset", ""), story.get("source-timestamp", "")
    source = None
    if story.get("source-topic") and all(re.fullmatch(r"\d{1,18}", part, re.ASCII) for part in where):
        source = Place(story["source-topic"], int(where[0]), int(where[1]))
    cut_from = story.get("cut-from", "")
    return Letter(
        id=LetterId(record.partition, record.offset),
        at=_EPOCH + timedelta(milliseconds=min(max(record.timestamp, 0), _MS_MAX)),
        reason=story.get("reason", ""),
        detail=story.get("detail", ""),
        source=source,
        timestamp=int(where[2]) if source is not None else 0,
        key=record.key,
        value=record.value,
        headers=own,
        size=len(record.key or b"") + len(record.value or b"") + sum(len(n.encode()) + len(d or b"") for n, d in own),
        retry_of=story.get(RETRY_OF),
        cut_from=int(cut_from) if re.fullmatch(r"\d{1,18}", cut_from, re.ASCII) else None,
    )


def without_copies(letters: Iterable[Letter], seen: set[bytes]) -> list[Letter]:
    """Return the letters that are the first of their record.

    Copies of a letter are in one partition, in the order in which they were written.  The bytes are compared too: in a
    topic that was created again another record may have the same place.

    Args:
        letters: in their order.
        seen: digests of the records of earlier letters; those of these are added.
    """
    fresh = []
    for letter in letters:
        if letter.source is not None:
            parts = (str(letter.source).encode(), letter.key or b"", letter.value or b"")
            record = hashlib.blake2b(b"".join(b"%d:%b" % (len(part), part) for part in parts), digest_size=16).digest()
            if record in seen:
                continue
            seen.add(record)
        fresh.append(letter)
    return fresh


class Reader:
    """The topic, from its beginnings to the ends that it had when the reader was opened."""

    def __init__(self, consumer: Any, settings: Settings, begins: dict[Any, int], ends: dict[Any, int]) -> None:
        self._consumer, self._settings = consumer, settings
        self._begins, self._ends = begins, ends

    @property
    def total(self) -> int:
        """How many letters there are."""
        return sum(self._ends[tp] - self._begins[tp] for tp in self._ends)

    async def one(self, letter_id: LetterId) -> Letter:
        """Read one letter.

        Raises:
            NotFound: it never existed, or was removed by retention.
            EngineUnavailable: the broker does not answer.
        """
        tp = TopicPartition(self._settings.topic(DEAD_LETTERS.name), letter_id.partition)
        if letter_id.offset >= self._ends.get(tp, 0):
            raise NotFound(
                f"no dead letter {letter_id}: there never was one; `orderstream dead-letters list` has the ids"
            )
        if letter_id.offset >= self._begins[tp]:
            self._consumer.assign([tp])
            self._consumer.seek(tp, letter_id.offset)
            async for page in self._pages([tp], 1):
                if page[0].id == letter_id:
                    return page[0]
                break
        hours = self._settings.retention_hours
        raise NotFound(
            f"no dead letter {letter_id}: it was removed after its time, {hours} hours; ORDERSTREAM_RETENTION_HOURS keeps"
            " later ones longer"
        )

    async def pages(self) -> AsyncIterator[list[Letter]]:
        """Yield all letters, at most :data:`PAGE_LETTERS_MAX` at once, those of a partition in their order.

        A letter of the same record as an earlier one is left out.

        Raises:
            EngineUnavailable: the broker does not answer.
        """
        async for page in self._from(self._begins):
            yield page

    async def newest(self, number: int) -> list[Letter]:
        """Return the newest letters of each partition, ``number`` at most, those of one record once; newest first.

        Raises:
            EngineUnavailable: the broker does not answer.
        """
        since = {tp: max(begin, self._ends[tp] - number) for tp, begin in self._begins.items()}
        found = [letter async for page in self._from(since) for letter in page]
        return sorted(found, key=lambda letter: (letter.at, letter.id), reverse=True)

    async def _from(self, places: Mapping[Any, int]) -> AsyncIterator[list[Letter]]:
        seen: set[bytes] = set()
        tps = [tp for tp, end in self._ends.items() if end > places[tp]]
        if tps:
            self._consumer.assign(tps)
            for tp in tps:
                self._consumer.seek(tp, places[tp])
            async for page in self._pages(tps, PAGE_LETTERS_MAX):
                fresh = without_copies(page, seen)
                if fresh:
                    yield fresh

    async def _pages(self, tps: Sequence[Any], letters_max: int) -> AsyncIterator[list[Letter]]:
        left = list(tps)
        while left:
            try:
                async with asyncio.timeout(SILENCE_MAX_S):
                    fetched: dict[Any, list[Any]] = {}
                    while left and not fetched:
                        fetched = await self._consumer.getmany(*left, timeout_ms=500, max_records=letters_max)
                        # A position passes what a partition holds besides letters, too.
                        left = [tp for tp in left if await self._consumer.position(tp) < self._ends[tp]]
            except TimeoutError:
                raise EngineUnavailable(
                    "Kafka", self._settings.kafka, f"no letter within {SILENCE_MAX_S:.0f} s, there are more"
                ) from None
            page = [read(r) for tp, records in fetched.items() for r in records if r.offset < self._ends[tp]]
            if page:
                yield page


@asynccontextmanager
async def reading(settings: Settings) -> AsyncIterator[Reader]:
    """Open the topic, for one use.

    Raises:
        EngineUnavailable: Kafka does not answer, or the topic was never created.
    """
    lenient.install()
    name = settings.topic(DEAD_LETTERS.name)
    consumer = AIOKafkaConsumer(
        **access.kafka(settings),
        client_id="orderstream-letters",
        group_id=None,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
        isolation_level=READ_COMMITTED,
    )
    try:
        with connecting.kafka(settings, faults=(KafkaError,)):
            await access.start_kafka(consumer, settings)
            if name not in await consumer.topics():
                raise EngineUnavailable("Kafka", settings.kafka, f"it has no topic {name} yet", connecting.INIT)
            tps = [TopicPartition(name, partition) for partition in range(settings.partitions)]
            consumer.assign(tps)
            begins, ends = await consumer.beginning_offsets(tps), await consumer.end_offsets(tps)
            yield Reader(consumer, settings, begins, ends)
    finally:
        await consumer.stop()
