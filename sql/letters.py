"""What was done about dead letters, as Postgres has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from orderstream.sql.store import Store, statements
from orderstream.streams.letters import Letter, LetterId


class Handling(NamedTuple):
    """What was done about a letter; nothing, when ``action`` is None.

    ``why`` is the reason of a drop; ``value`` is what a retry sends instead of the letter's own bytes.
    """

    action: str | None = None
    why: str | None = None
    value: bytes | None = None
    begun_at: datetime | None = None
    done_at: datetime | None = None

    @property
    def state(self) -> str:
        """``open``, ``retrying`` (begun, not known to be sent), ``retried`` or ``dropped``."""
        if self.action is None:
            return "open"
        return "dropped" if self.action == "drop" else "retried" if self.done_at else "retrying"

    @property
    def closed(self) -> bool:
        """Whether there is nothing left to do."""
        return self.done_at is not None

    def __str__(self) -> str:
        at = self.done_at or self.begun_at
        text = self.state if at is None else f"{self.state} {at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        if self.value is not None:
            text += ", with another value"
        return text if self.why is None else f"{text}: {self.why}"


OPEN = Handling()


def keys_of(letters: Iterable[Letter]) -> tuple[list[int], list[int], list[datetime]]:
    """Return the letters' partitions, offsets and times, as the statements take them."""
    ids = [(letter.id.partition, letter.id.offset, letter.at) for letter in letters]
    return [i[0] for i in ids], [i[1] for i in ids], [i[2] for i in ids]


def handlings_in(letters: Iterable[Letter], rows: Iterable[Any]) -> dict[LetterId, Handling]:
    """Return what was done about each of these letters, by these rows."""
    there = {
        LetterId(row["letter_partition"], row["letter_offset"]): Handling(
            row["action"], row["why"], row["value"], row["begun_at"], row["done_at"]
        )
        for row in rows
    }
    return {letter.id: there.get(letter.id, OPEN) for letter in letters}


async def handlings(store: Store, letters: Sequence[Letter]) -> dict[LetterId, Handling]:
    """Return what was done about each of these letters."""
    return handlings_in(letters, await store.pool.fetch(statements("letters.sql")["handlings"], *keys_of(letters)))
