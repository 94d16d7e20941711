"""The log of `orders` under its reader: records vanish from its beginning or its end, the log is made again, offsets move.

One partition, one worker at a time; an order is held when its record is read, ends later, and is told so then.  All are
orders without an id of their own: theirs is made of topic, partition, offset and time of their record (R11).  An assignment
is what ``agents/setback.py`` does, effect by effect; the worker may die between any two.
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
    takes_up: bool = True  # R2: orders that are not over, and whose records are gone, are taken up from Postgres
    tells_ended: bool = True  # R2, R4: so are those that have ended, and may be untold
    waits_first: bool = True  # R2: that stands in Postgres before the group's offset moves
    says_first: bool = True  # R11: what is lost is said before the mark goes on
    stops: bool = True  # R11: a position outside of the log is an assignment; it never jumps by itself


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


class Effect(NamedTuple):
    """One of an assignment: ``wait`` from an offset, ``say`` how many are lost (-1: another log), ``begin``, ``mark``."""

    kind: str
    at: int


class LogWorld(NamedTuple):
    """All there is.  Orders are numbered in the order of time: a record's number is its time and its digest.

    Attributes:
        log: the records from offset `start` on.
        states: of each order: - no row, h held, n ended and not told, e ended, r removed, d another order's repeat.
        waiting: orders that have a row of `waiting`.
        places: of each order, the offset of its record.
        taken: how often each order was taken in.
        vanished: of each order: - it did not, or was read before; u unread; c unread, and nobody can know
            of it: cut off, or of a log of which nothing was read.
        ids: which order has which id.
        counted, reported: records said to be lost; another log was noticed, whose end nobody knows.
        plan: what is left to do of an assignment.
    """

    produced: int
    start: int
    log: tuple[int, ...]
    group: int | None
    mark: Mark | None
    states: str
    waiting: frozenset[int]
    places: tuple[int, ...]
    taken: tuple[int, ...]
    vanished: str
    ids: tuple[tuple[int, int], ...]
    counted: int
    reported: bool
    reader: Reader | None
    plan: tuple[Effect, ...]
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
        places = taken = (0,) * c.orders
        return LogWorld(0, 0, (), None, None, none, frozenset(), places, taken, none, (), 0, False, None, (), faults)

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
            if s.states[n] == "n":
                return f"o{n + 1} has ended, and is never told so"
        unread = s.vanished.count("u")
        if not s.reported and s.counted < unread:
            return f"{unread} orders vanished unread, and {s.counted} are reported"
        return None

    def steps(self, s: LogWorld) -> Steps:
        """See :class:`checker.Model`."""
        out: Steps = []
        if s.produced < self.c.orders:
            after = s._replace(produced=s.produced + 1, log=(*s.log, s.produced))
            out.append((PROGRESS, f"o{s.produced + 1} is produced, at {s.start + len(s.log)}", after))
        self._faults(s, out)
        if s.plan:
            out.append((PROGRESS, *self._take_effect(s)))
        elif s.reader is None:
            out.append((PROGRESS, *self._assigned(s)))
        else:
            self._read(s, s.reader, out)
        return out

    def _faults(self, s: LogWorld, out: Steps) -> None:
        def fault(which: int, name: str, after: LogWorld) -> None:
            left = after.faults
            out.append((WHIM, name, after._replace(faults=(*left[:which], left[which] - 1, *left[which + 1 :]))))

        left = s.faults
        if left[CRASH] and (s.reader is not None or s.plan):
            fault(CRASH, "the worker dies", s._replace(reader=None, plan=()))
        if s.plan:
            return  # the log was compared a moment ago
        if left[REMOVAL] and s.log:
            unread = "c" if s.mark is None else "u"
            after = s._replace(start=s.start + 1, log=s.log[1:], vanished=self._gone(s, s.log[:1], unread))
            if s.reader is not None and s.reader.position < after.start:
                jumped = s.reader._replace(position=after.start)
                after = after._replace(reader=None if self.c.stops else jumped)  # out of range
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
            fault(RESET, "the group's offset is removed", s._replace(group=None, reader=None))
        if left[PRUNE]:
            for n, state in enumerate(s.states):
                if state == "e" and n not in s.waiting:
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
        """Compare the log with the mark; what is to be done about it comes effect by effect, or reading begins."""
        c, end, mark, group = self.c, s.start + len(s.log), s.mark, s.group
        if not c.compares:
            return self._begun(s, group if group is not None and s.start <= group <= end else s.start)
        if mark is None:
            return self._begun(s, s.start)
        last = mark.following - 1
        there = s.log[last - s.start] if s.start <= last < end else None
        is_other = mark.following > end or (there is not None and mark.digest not in (-1, there))
        is_anew = is_other or s.start > mark.following
        begin = s.start if is_anew else min(mark.acknowledged if group is None else group, mark.following)
        begin = min(max(begin, s.start), end)
        waits = Effect("wait", group or 0) if is_anew or s.start > (group or 0) else None
        says = Effect("say", -1 if is_other else s.start - mark.following) if is_anew else None
        begins = Effect("begin", begin) if begin != group else None
        marks = Effect("mark", s.start) if is_anew and (c.restarts or not is_other) else None
        effects = [waits, begins] if c.waits_first else [begins, waits]
        effects += [says, marks] if c.says_first else [marks, says]
        plan = tuple(effect for effect in effects if effect is not None)
        if not plan or plan == (waits,):
            return self._begun(self._waits(s, waits.at) if waits else s, begin)
        if is_other and marks is None and begins is None:  # the mark stays, and its records count as read
            return self._begun(self._waits(s, group or 0)._replace(reported=True), begin)
        return f"an assignment finds {'another log' if is_other else f'that the log begins at {s.start}'}", s._replace(
            plan=plan
        )

    def _begun(self, s: LogWorld, begin: int) -> tuple[str, LogWorld]:
        return f"an assignment, begins at {begin}", s._replace(reader=Reader(begin, tuple(sorted(s.waiting))))

    def _waits(self, s: LogWorld, done: int) -> LogWorld:
        """Have orders wait that are not over, and those that may be untold: whose records stand behind an offset."""
        held = {n for n, state in enumerate(s.states) if state == "h" and self.c.takes_up}
        untold = {n for n, state in enumerate(s.states) if state in "ne" and s.places[n] >= done and self.c.tells_ended}
        return s._replace(waiting=s.waiting | held | untold)

    def _take_effect(self, s: LogWorld) -> tuple[str, LogWorld]:
        (kind, at), *rest = s.plan
        s = s._replace(plan=tuple(rest))
        if kind == "wait":
            return "what is not over waits, and what may be untold", self._waits(s, at)
        if kind == "say":
            return "says what is lost", s._replace(reported=True) if at < 0 else s._replace(counted=s.counted + at)
        if kind == "begin":
            return f"the group goes to {at}", s._replace(group=at)
        return f"the mark begins anew at {at}", s._replace(mark=Mark(at, -1, s.mark.stamp if s.mark else -1, at))

    def _read(self, s: LogWorld, reader: Reader, out: Steps) -> None:
        position, hand = reader
        if hand:
            o = hand[0]
            if s.states[o] == "h":
                out.append((PROGRESS, f"o{o + 1} ends", s._replace(states=_set(s.states, o, "n"))))
            else:
                told = s._replace(states=_set(s.states, o, "e")) if s.states[o] == "n" else s
                told = told._replace(waiting=s.waiting - {o}, reader=Reader(position, hand[1:]))
                out.append((PROGRESS, f"o{o + 1} is told so", told))
        elif s.group != position and s.mark is not None:
            out.append((PROGRESS, f"acknowledges up to {position}", s._replace(group=position)))
        if not s.start <= position < s.start + len(s.log):
            return
        n = s.log[position - s.start]
        following, digest, stamp, known = s.mark or Mark(0, -1, -1, 0)
        before = position < following or n <= stamp
        mark = Mark(
            max(following, position + 1),
            n if position + 1 > following else digest,
            max(stamp, n),
            max(known, s.group or 0),
        )
        after = s._replace(mark=mark, reader=Reader(position + 1, hand))
        key = n if self.c.dates else position
        owner = next((order for name, order in s.ids if name == key), None)
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
                places=(*s.places[:n], position, *s.places[n + 1 :]),
                ids=(*s.ids, (key, n)),
                reader=Reader(position + 1, (*hand, n)),
            )
            out.append((PROGRESS, f"o{n + 1} is taken in", new))
