"""The log of `orders` under its reader: records vanish from its beginning or its end, the log is made again, offsets move.

One partition, one worker at a time; an order is held when its record is read, and ends later.  All are orders without an id
of their own: theirs is made of topic, partition, offset and time of their record (R11).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from docs.model.checker import PROGRESS, WHIM


@dataclass(frozen=True)
class LogConstants:
    """What can happen how often, and which rules are kept; see ``docs/model/README.md``.

    Attributes:
        removals: records that retention removes from the beginning, read or not.
        cuts: records that vanish from the end (an unclean election of a leader).
        remakes: the topic is deleted and made again; the group's offset stays, or goes as well.
        resets: somebody sets the group's offset to 0, or removes it.
        prunes: orders that have ended are removed from Postgres.
    """

    orders: int = 4
    crashes: int = 0
    removals: int = 0
    cuts: int = 0
    remakes: int = 0
    resets: int = 0
    prunes: int = 0

    compares: bool = (
        True  # R11: the log is compared with the mark at an assignment; else it begins at the earliest record
    )
    restarts: bool = True  # R1: in another log the mark begins again
    remembers: bool = True  # R2: an unknown order that was read before was removed, and is not taken in
    dates: bool = True  # R11: the id is made of the record's time too
    takes_up: bool = True  # R2: orders that are held, and whose records are gone, are taken up from Postgres


class Mark(NamedTuple):
    """What Postgres knows of the log.

    Attributes:
        following: offset behind the last record read.
        digest: of this record; -1 in a log of which nothing was read.
        stamp: time of the youngest record that was read, of any log.
    """

    following: int
    digest: int
    stamp: int
    acknowledged: int


class Reader(NamedTuple):
    """A worker: what it reads next, and the orders in its hands."""

    position: int
    hand: tuple[int, ...]


class LogWorld(NamedTuple):
    """All there is.  Orders are numbered in the order of time: a record's number is its time and its digest.

    Attributes:
        log: the records from offset `start` on.
        states: of each order: - no row, h held, e ended, r removed, d rejected as another order's repeat.
        taken: how often each order was taken in.
        vanished: of each order: - it did not, or was read before; u unread; c unread, and nobody can know
            of it: cut off, or of a log of which nothing was read.
        ids: which order has which id.
        counted, reported: records said to be lost; another log was noticed, whose end nobody knows.
    """

    produced: int
    start: int
    log: tuple[int, ...]
    group: int | None
    mark: Mark | None
    states: str
    taken: tuple[int, ...]
    vanished: str
    ids: tuple[tuple[int, int], ...]
    counted: int
    reported: bool
    reader: Reader | None
    faults: tuple[int, ...]


CRASH, REMOVAL, CUT, REMAKE, RESET, PRUNE = range(6)
Steps = list[tuple[str, str, LogWorld]]


def _set(text: str, n: int, letter: str) -> str:
    return text[:n] + letter + text[n + 1 :]


class Log:
    """The model."""

    def __init__(self, constants: LogConstants) -> None:
        self.c = constants

    def initial(self) -> LogWorld:
        """See :class:`checker.Model`."""
        c, none = self.c, "-" * self.c.orders
        faults = (c.crashes, c.removals, c.cuts, c.remakes, c.resets, c.prunes)
        return LogWorld(0, 0, (), None, None, none, (0,) * c.orders, none, (), 0, False, None, faults)

    def broken(self, s: LogWorld) -> str | None:
        """See :class:`checker.Model`."""
        for n, times in enumerate(s.taken):
            if times > 1:
                return f"o{n + 1} is taken in twice"
            if s.states[n] == "d":
                return f"o{n + 1} is taken for another order"
        return None

    def broken_at_rest(self, s: LogWorld) -> str | None:
        """See :class:`checker.Model`."""
        for n in range(s.produced):
            if not s.taken[n] and s.vanished[n] == "-":
                return f"o{n + 1} is never read"
            if s.states[n] == "h":
                return f"o{n + 1} is held for ever"
        unread = s.vanished.count("u")
        if not s.reported and s.counted != unread:
            return f"{unread} orders vanished unread, and {s.counted} are reported"
        return None

    def steps(self, s: LogWorld) -> Steps:
        """See :class:`checker.Model`."""
        out: Steps = []
        if s.produced < self.c.orders:
            after = s._replace(produced=s.produced + 1, log=(*s.log, s.produced))
            out.append((PROGRESS, f"o{s.produced + 1} is produced, at {s.start + len(s.log)}", after))
        self._faults(s, out)
        if s.reader is None:
            out.append((PROGRESS, *self._assigned(s)))
        else:
            self._read(s, s.reader, out)
        return out

    def _faults(self, s: LogWorld, out: Steps) -> None:
        def fault(which: int, name: str, after: LogWorld) -> None:
            left = after.faults
            out.append((WHIM, name, after._replace(faults=(*left[:which], left[which] - 1, *left[which + 1 :]))))

        left, end = s.faults, s.start + len(s.log)
        if left[CRASH] and s.reader is not None:
            fault(CRASH, "the worker dies", s._replace(reader=None))
        if left[REMOVAL] and s.log:
            after = s._replace(start=s.start + 1, log=s.log[1:], vanished=self._gone(s, s.log[:1], "u"))
            if s.reader is not None and s.reader.position < after.start:
                after = after._replace(reader=None)  # out of range
            fault(REMOVAL, f"retention removes o{s.log[0] + 1}", after)
        if left[CUT] and s.log:
            after = s._replace(log=s.log[:-1], vanished=self._gone(s, s.log[-1:], "c"), reader=None)
            fault(CUT, f"the log loses o{s.log[-1] + 1}, its last record", after)
        if left[REMAKE]:
            unread = "c" if s.mark is None or s.mark.digest < 0 else "u"
            after = s._replace(start=0, log=(), vanished=self._gone(s, s.log, unread), reader=None)
            fault(REMAKE, "the topic is made again", after)
            fault(REMAKE, "the topic and the group are made again", after._replace(group=None))
        if left[RESET] and s.group is not None:
            fault(RESET, "the group's offset is set to 0", s._replace(group=0, reader=None))
            fault(RESET, f"the group's offset is set to the end, {end}", s._replace(group=end, reader=None))
            fault(RESET, "the group's offset is removed", s._replace(group=None, reader=None))
        if left[PRUNE]:
            for n, state in enumerate(s.states):
                if state == "e":
                    ids = tuple(one for one in s.ids if one[1] != n)
                    fault(
                        PRUNE, f"o{n + 1} is removed from Postgres", s._replace(states=_set(s.states, n, "r"), ids=ids)
                    )

    @staticmethod
    def _gone(s: LogWorld, records: tuple[int, ...], how: str) -> str:
        vanished = s.vanished
        for n in records:
            if not s.taken[n]:
                vanished = _set(vanished, n, how)
        return vanished

    def _assigned(self, s: LogWorld) -> tuple[str, LogWorld]:
        """Choose where to begin."""
        end, mark, name = s.start + len(s.log), s.mark, "an assignment"
        begin = (
            s.group if s.group is not None else mark.acknowledged if mark is not None and self.c.compares else s.start
        )
        if mark is not None and self.c.compares:
            last = mark.following - 1
            there = s.log[last - s.start] if s.start <= last < end else None
            if mark.following > end or (there is not None and mark.digest not in (-1, there)):
                name, begin = "an assignment finds another log", s.start
                if self.c.restarts:
                    mark = Mark(s.start, -1, mark.stamp, s.start)
                s = s._replace(reported=True, mark=mark)
            elif s.start > mark.following:
                name = f"an assignment misses {mark.following} to {s.start - 1}"
                mark = mark._replace(following=s.start, digest=-1, acknowledged=s.start)
                s = s._replace(counted=s.counted + s.start - s.mark.following if s.mark else 0, mark=mark)
            else:
                begin = min(begin, mark.following)  # what is not marked was not read, whatever the offset says
        elif mark is None and self.c.compares:
            name, begin = "the first assignment", s.start
            s = s._replace(counted=s.counted + s.start, mark=Mark(s.start, -1, -1, s.start))
        begin = begin if s.start <= begin <= end else s.start
        hand = tuple(n for n, state in enumerate(s.states) if state == "h") if self.c.takes_up else ()
        return f"{name}, begins at {begin}", s._replace(reader=Reader(begin, hand))

    def _read(self, s: LogWorld, reader: Reader, out: Steps) -> None:
        position, hand = reader
        if hand:
            states = _set(s.states, hand[0], "e") if s.states[hand[0]] == "h" else s.states
            after = s._replace(states=states, reader=Reader(position, hand[1:]))
            out.append((PROGRESS, f"o{hand[0] + 1} ends, and was told so", after))
        elif s.group != position:
            out.append((PROGRESS, f"acknowledges up to {position}", s._replace(group=position)))
        if not s.start <= position < s.start + len(s.log):
            return
        n = s.log[position - s.start]
        following, digest, stamp, _ = s.mark or Mark(0, -1, -1, 0)
        before = position < following or n <= stamp
        mark = Mark(
            max(following, position + 1), n if position + 1 > following else digest, max(stamp, n), s.group or 0
        )
        after = s._replace(mark=mark, reader=Reader(position + 1, hand))
        key = n if self.c.dates else position
        owner = next((order for known, order in s.ids if known == key), None)
        if owner is not None and owner != n:
            out.append(
                (
                    PROGRESS,
                    f"o{n + 1} has the id of o{owner + 1}: a dead letter",
                    after._replace(states=_set(s.states, n, "d")),
                )
            )
        elif owner is not None:
            repeat = after._replace(reader=Reader(position + 1, (*hand, n) if n not in hand else hand))
            out.append((PROGRESS, f"o{n + 1} comes again", repeat))
        elif before and self.c.remembers:
            out.append((PROGRESS, f"o{n + 1} was read before, and is unknown: it was removed", after))
        else:
            taken = (*s.taken[:n], s.taken[n] + 1, *s.taken[n + 1 :])
            new = after._replace(
                states=_set(s.states, n, "h"),
                taken=taken,
                ids=(*s.ids, (key, n)),
                reader=Reader(position + 1, (*hand, n)),
            )
            out.append((PROGRESS, f"o{n + 1} is taken in", new))
