"""Orders from their record to their end: a home, an owner of foreign lines, Postgres, Kafka, a provider, and their faults.

What an order does at each event is not modelled but run: :mod:`orderstream.agents.lifecycle` and ``holding`` decide.
Modelled is what is around them: who writes, publishes, asks, sends and acknowledges when, and what a crash leaves of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import NamedTuple, TypeVar

from docs.model.checker import FORMER, PROGRESS, WHIM
from orderstream.agents import holding, lifecycle
from orderstream.agents.lifecycle import Cancel, Charged, Declined, Event, Expire, GivenBack
from orderstream.streams.orders import Status

HISTORY = "CRPFX"
"""The letters of the statuses, in the order in which an order can have them."""

LETTERS = dict(zip(Status, HISTORY, strict=True))
STATUSES = {letter: status.value for status, letter in LETTERS.items()}
AT = datetime(2026, 1, 1, tzinfo=UTC)
ANSWERS: dict[str, Event] = {"A": Charged("charge"), "D": Declined(), "V": GivenBack()}
HAS_UNITS, DUE = "hc", ("VOID_DUE", "REFUND_DUE")


@dataclass(frozen=True)
class Constants:
    """What there is, what can fail how often, and which rules are kept; see ``docs/model/README.md``.

    Attributes:
        foreign: orders with a second line, of a product of another partition.
        rival: an order of that partition that wants the same product.
        cancels: orders that their customer may cancel, also before they are there.
        expires: orders whose time may be over.
        formers: workers that freeze, lose their partition, and go on later.
        former_steps: that such a home still does at most; 0: as many as it can.
        lost, late: answers of the provider that are lost; second copies of charges that arrive late.
        restores: 1: Postgres is copied at some moment, and set back to the copy at another.
    """

    orders: int = 1
    foreign: list[int] = field(default_factory=list)
    rival: bool = False
    stock: int = 1
    foreign_stock: int = 1
    cancels: list[int] = field(default_factory=list)
    expires: list[int] = field(default_factory=list)
    declines: bool = True
    crashes: int = 0
    formers: int = 0
    former_steps: int = 0
    owner_crashes: int = 0
    owner_formers: int = 0
    lost: int = 0
    late: int = 0
    restores: int = 0
    acknowledge_apart: bool = False  # publishing and acknowledging are two steps, not one

    fence: bool = True  # R1: a transaction needs the claim that its lane has
    marks_grow: bool = True  # R1: marks never go back
    marks_last: bool = True  # R1: a mark is written no sooner than what it stands for
    marks_always: bool = True  # R3: what needs no other transaction is marked too before it is acknowledged
    in_hand: bool = True  # R4: from its hold on an order is in hand: what comes about it is decided after its hand-over
    whole_story: bool = True  # R4: who publishes of an order publishes all that is not published yet
    retells: bool = True  # R4: a record that comes again publishes again
    resends: bool = True  # R4, R6: and sends again
    claimed_events: bool = True  # R4: readers drop events of an older claim after one of a newer
    claim_event: bool = True  # R7: who folds publishes its claim on order-events before it reads the topics
    claims_silent: bool = True  # R7: also at homes that have no event yet
    due_with_end: bool = True  # R5: what is due is written in the statement that ends the order
    waits_until_told: bool = True  # R5: an order leaves `waiting` after its last event, not with its end
    tells_what_waits: bool = True  # R5: who takes an order up from `waiting` publishes its whole story
    voids: bool = True  # R8: an order that ends unpaid is voided
    catches_up: bool = False  # instead of that: nothing expires before all records are read
    voids_unknown: bool = True  # R8: so is one that ends before RESERVED, if it was read before a set-back
    void_after_told: bool = True  # R8: a void is asked when CANCELLED is published
    tombstones: bool = True  # R10: a release before its hold is remembered
    keeps_in_postgres: bool = True  # R12: a cancel before its order is kept in Postgres, not in memory
    notices: str = "always"  # R7: a set-back: at an `assignment`; by `transactions` too; `always`
    recognises: str = "identity"  # R7: by `offsets`; by `events` that Postgres does not know too; by its `identity`
    reads_from: str = (
        "mark"  # R7: where orders and commands begin after a fold: at their `mark`, or the group's `offset`
    )
    folds_cancels: bool = True  # R7, R12: the cancels from there on are carried out in the fold
    folds_lines: bool = True  # R7, R10: order-events bring lines of other owners forward too
    voids_again: bool = True  # R7: what was told CANCELLED, and is not in the row, is void or refund due
    settles_pending: bool = (
        True  # R7, R10: so are lines that home wants back already, and whose owner has units of them
    )
    gives_way: str = "reserved"  # R7: where units are missing: `nobody`; orders `untold`; then those told RESERVED too
    skips_inner: bool = True  # R7, R10: what stands on order-lines and reservations at a set-back is not read


class Row(NamedTuple):
    """An order in Postgres, or in memory.  `states`: of its line at home, then of its foreign line, if it has one."""

    status: str
    states: str
    payment: str
    story: str


class Entry(NamedTuple):
    """An order in hand, as in ``desk.Entry``.

    Attributes:
        published: how much of its story this worker has published.
        slip: its record is to be acknowledged when it is over, or waits.
        step: what follows from the last transaction: tell, send, retell (told after sent), acknowledge, over, note.
        acks: what is acknowledged then: c a command, a an answer of a line's owner, r its record; n: it was all known.
        till: p to be asked, c a charge is asked, v a void.
        answer: of the provider: A accepted, D declined, V void.
    """

    row: Row
    published: int = 0
    waiting: bool = False
    slip: bool = False
    step: str = ""
    acks: str = ""
    till: str = ""
    answer: str = ""


class Home(NamedTuple):
    """A worker that holds the home: all of it is memory.

    Attributes:
        taken: an order that a hold has written and not handed over; without a row: known before.
        kept: cancels that it knows to be kept; of those in Postgres, that it has sent on.
        busy: a cancel is kept, and to be acknowledged.
        done: records that are acknowledged as such, as bits.
    """

    claim: int
    position: int
    taken: tuple[int, Row | None] | None
    entries: tuple[Entry | None, ...]
    kept: str
    busy: bool = False
    done: int = 0


class Owner(NamedTuple):
    """A worker that holds the foreign product: `answer` is written, and not sent."""

    claim: int
    answer: tuple[int, str] | None = None


class Postgres(NamedTuple):
    """What is durable; a transaction is one step.

    Attributes:
        waiting: of each order: - no row, u a row that says untold, t one that says told.
        lines: foreign lines as their owner has them (``holds``); - is none.
        floor: records before this one were read before a set-back.
    """

    rows: tuple[Row | None, ...]
    waiting: str
    kept: str
    lines: str
    rival: str = "-"
    mark: int = 0
    command_mark: int = 0
    claim: int = 0
    owner_claim: int = 0
    floor: int = 0


class Faults(NamedTuple):
    """What may still happen.  `phase` of a set-back: 0 none, 1 copied, 2 set back, 3 folded; `stale`: claims before."""

    crashes: int
    formers: int
    owner_crashes: int
    owner_formers: int
    lost: int
    late: int
    phase: int = 0
    claims: int = 0
    stale: int = 0
    former_steps: int = 0


class World(NamedTuple):
    """All there is.

    Attributes:
        net: requests to the provider on their way: kind, order, claim of who waits for the answer (0: nobody).
        provider: of each order: - asked nothing yet, A accepted, D declined, V void.
        newest: the greatest claim that readers of order-events have seen.
        read: acknowledged commands, as long as a set-back may bring them again.
    """

    produced: int
    acked: int
    commands: tuple[int, ...]
    commands_acked: int
    asked: str
    events: tuple[str, ...]
    newest: int
    postgres: Postgres
    provider: str
    net: tuple[tuple[str, int, int], ...]
    home: Home | None
    former: Home | None
    to_lines: tuple[tuple[int, str], ...]
    answers: tuple[tuple[int, str], ...]
    owner: Owner | None
    former_owner: Owner | None
    rival_told: str
    copy: Postgres | None
    faults: Faults
    read: tuple[int, ...] = ()


Steps = list[tuple[str, str, World]]
T = TypeVar("T")


class At(NamedTuple):
    """A worker whose next steps are looked for: it holds its home (`mine`), or has lost it."""

    world: World
    home: Home
    mine: bool
    out: Steps

    def add(self, name: str, after: World) -> None:
        """Note a step."""
        who = "h" if self.mine else "former h"
        self.out.append((PROGRESS if self.mine else FORMER, f"{who}{self.home.claim} {name}", after))

    def dropped(self) -> World:
        """Return the world after this worker has forgotten everything."""
        return forget(self.world, self.home, self.mine)


def forget(s: World, w: Home, mine: bool) -> World:
    """Let a worker forget everything; what it has asked is still on its way, and its answer is heard by nobody."""
    net = tuple(sorted({(kind, o, 0 if claim == w.claim else claim) for kind, o, claim in s.net}))
    return s._replace(home=None, net=net) if mine else s._replace(former=None, net=net)


def change(text: str, n: int, letter: str) -> str:
    """Return a text with another letter at one place."""
    return text[:n] + letter + text[n + 1 :]


def replace(things: tuple[T, ...], n: int, thing: T) -> tuple[T, ...]:
    """Return a tuple with another thing at one place."""
    return (*things[:n], thing, *things[n + 1 :])


@cache
def order_of(row: Row) -> lifecycle.Order:
    """Return the order of a row; not to be changed."""
    has = row.story.__contains__
    foreign = len(row.states) > 1
    return lifecycle.Order(
        order_id="o",
        home=0,
        user_id="u",
        payment_method="card",
        lines=(("a", 1), ("b", 1))[: len(row.states)],
        status=Status(row.status),
        states=row.states,
        created_at=AT,
        total_cents=2 if has("R") else None,
        reason="expired" if has("X") else None,
        payment=lifecycle.Payment(row.payment) if row.payment else None,
        charge_id="charge" if has("P") else None,
        prices=[1, 1 if row.states[1] in "hgc" else None] if foreign else [],
        owners=(0, 1) if foreign else (),
        reserved_at=AT if has("R") else None,
        paid_at=AT if has("P") else None,
        confirmed_at=AT if has("F") else None,
        cancelled_at=AT if has("X") else None,
    )


@lru_cache(maxsize=None, typed=True)  # events without members are equal, whatever their type
def moved(row: Row, event: Event) -> Row:
    """Return what the life of an order makes of it at an event."""
    order: lifecycle.Order = order_of.__wrapped__(row)
    if not lifecycle.decide(order, event):
        return row
    lifecycle.stamp(order, AT)
    story = "".join(LETTERS[status] for status in Status if getattr(order, f"{status.lower()}_at") is not None)
    return Row(order.status.value, order.states, (order.payment or ""), story)


@cache
def asks(row: Row) -> str:
    """Return what the provider is to be asked: c a charge, v a void or a refund."""
    return {"charge": "c", "void": "v", "refund": "v", None: ""}[lifecycle.asks(order_of(row))]


@cache
def wants(row: Row) -> str:
    """Return what the owner of the foreign line is to do."""
    return next((action for _, action in lifecycle.sends(order_of(row))), "")


@cache
def is_over(row: Row) -> bool:
    """Tell whether nothing is left to do about an order."""
    return lifecycle.is_over(order_of(row))


def story_of(told: str, row: Row | None) -> str:
    """Return what an order went through, by what was published and by its row."""
    return "".join(letter for letter in HISTORY if letter in told or (row is not None and letter in row.story))


class Orders:
    """The model."""

    def __init__(self, constants: Constants) -> None:
        self.c = constants
        self.numbers = range(constants.orders)

    def initial(self) -> World:
        """See :class:`checker.Model`."""
        c, none = self.c, "-" * self.c.orders
        postgres = Postgres((None,) * c.orders, none, none, none)
        faults = Faults(c.crashes, c.formers, c.owner_crashes, c.owner_formers, c.lost, c.late)
        world = World(
            0, 0, (), 0, none, ("",) * c.orders, 0, postgres, none, (), None, None, (), (), None, None, "", None, faults
        )
        return self._claim(world)[1]

    # What must hold

    def broken(self, s: World) -> str | None:
        """See :class:`checker.Model`."""
        pg = s.postgres
        if self._free(pg) < 0 or self._free_foreign(pg) < 0:
            return "oversold"
        if (s.acked > pg.mark or s.commands_acked > pg.command_mark) and s.faults.phase < 2:
            return "a mark is behind what is acknowledged, and nobody set Postgres back"
        for o, told in enumerate(s.events):
            if "X" in told[:-1]:
                return f"o{o + 1}: published after CANCELLED: {told}"
            if told != story_of(told, None) or ("P" in told and "R" not in told) or ("F" in told and "P" not in told):
                return f"o{o + 1}: published is no history: {told}"
            if "P" in told and "X" in told and s.asked[o] == "-":
                return f"o{o + 1}: PAID and then CANCELLED, and nobody asked for it"
        for o, row in enumerate(pg.rows):
            if row is not None and row.status == "CONFIRMED" and len(row.states) > 1 and pg.lines[o] != "c":
                return f"o{o + 1}: CONFIRMED, and a line is not sold"
        return None

    def broken_at_rest(self, s: World) -> str | None:
        """See :class:`checker.Model`."""
        pg = s.postgres
        if s.acked < s.produced or s.commands or s.to_lines or s.answers:
            return "a record is never acknowledged"
        for o, row in enumerate(pg.rows):
            name = f"o{o + 1}"
            if row is None or row.status not in ("CONFIRMED", "CANCELLED"):
                return f"{name} has not ended"
            confirmed, charged = row.status == "CONFIRMED", s.provider[o] == "A"
            if charged and not confirmed:
                return f"{name}: a charge stands, and it is not CONFIRMED"
            if confirmed and not charged:
                return f"{name}: CONFIRMED, and no charge stands"
            if confirmed and s.asked[o] != "-":
                return f"{name}: its cancel is forgotten"
            if not confirmed and (row.states[0] in HAS_UNITS or pg.lines[o] in HAS_UNITS):
                return f"{name}: CANCELLED, and has units"
            told = s.events[o]
            if told[-1:] != row.story[-1] or (told != row.story and s.faults.phase < 2):
                return f"{name}: its end is not published ({row.story}, published {told})"
            if not is_over(row) or pg.waiting[o] != "-" or pg.kept[o] != "-":
                return f"{name}: something is due for ever"
        return None

    # What can happen

    def steps(self, s: World) -> Steps:
        """See :class:`checker.Model`."""
        out: Steps = []
        self._outside(s, out)
        self._at_provider(s, out)
        if s.home is None:
            out.append((PROGRESS, *self._claim(s)))
        else:
            self._home(At(s, s.home, True, out))
        if s.former is not None:
            steps: Steps = []
            self._home(At(s, s.former, False, steps))
            out += [(kind, name, self._tired(after)) for kind, name, after in steps]
        if self.c.foreign:
            self._owners(s, out)
        self._faults(s, out)
        return [(kind, name, self._without_noise(after)) for kind, name, after in out]

    def _tired(self, s: World) -> World:
        """Count a step of a former home; after its last one it is gone."""
        if not self.c.former_steps or s.former is None:
            return s
        left = s.faults.former_steps - 1
        s = s._replace(faults=s.faults._replace(former_steps=left))
        return forget(s, s.former, False) if s.former is not None and not left else s

    def _without_noise(self, s: World) -> World:
        """Leave out what can change nothing any more: the same behaviour, fewer states."""
        if s.former is not None and self._is_harmless(s, s.former):
            s = forget(s, s.former, False)
        if not s.net:
            return s
        net = tuple(
            m for m in s.net if m[2] or not (s.provider[m[1]] in "VD" or (m[0] == "c" and s.provider[m[1]] == "A"))
        )
        return s if len(net) == len(s.net) else s._replace(net=net)

    def _is_harmless(self, s: World, w: Home) -> bool:
        """Tell whether a former home can't publish, send or ask any more: all else is a transaction, and refused."""
        fenced = w.claim <= s.faults.stale or (self.c.fence and w.claim < s.postgres.claim and s.faults.phase != 1)
        if not fenced or w.taken is not None or self.c.foreign:
            return False
        quiet = ("", "acknowledge", "over", "note")
        return all(entry is None or (entry.step in quiet and entry.till != "p") for entry in w.entries)

    def _outside(self, s: World, out: Steps) -> None:
        if s.produced < self.c.orders:
            out.append((PROGRESS, f"o{s.produced + 1} is produced", s._replace(produced=s.produced + 1)))
        for o in self.c.cancels:
            if s.asked[o] == "-":
                after = s._replace(asked=change(s.asked, o, "c"), commands=(*s.commands, o))
                out.append((WHIM, f"the customer cancels o{o + 1}", after))

    def _at_provider(self, s: World, out: Steps) -> None:
        for n, (kind, o, claim) in enumerate(s.net):
            if n and s.net[n - 1] == s.net[n]:
                continue
            rest, known = s.net[:n] + s.net[n + 1 :], s.provider[o]
            if kind == "v":
                results = ["D" if known == "D" else "V"]
            elif known == "-":
                results = ["A", "D"] if self.c.declines else ["A"]
            else:
                results = [known]
            for result in results:
                heard = "V" if kind == "v" else "A" if result == "A" else "D"
                home = self._hear(s.home, kind, o, claim, heard)
                former = self._hear(s.former, kind, o, claim, heard)
                what = "a void" if kind == "v" else "a charge"
                name = f"{what} of o{o + 1} arrives{'' if claim else ' late'}: {heard}"
                after = s._replace(provider=change(s.provider, o, result), net=rest, home=home, former=former)
                out.append((PROGRESS, name, after))
                if s.faults.lost and (home is not s.home or former is not s.former):
                    faults = s.faults._replace(lost=s.faults.lost - 1)
                    out.append(
                        (
                            WHIM,
                            f"{name}, its answer is lost",
                            after._replace(home=s.home, former=s.former, faults=faults),
                        )
                    )
                if s.faults.late and claim and kind == "c":
                    faults = s.faults._replace(late=s.faults.late - 1)
                    copies = tuple(sorted({*rest, ("c", o, 0)}))
                    out.append((WHIM, f"{name}, a copy comes later", after._replace(net=copies, faults=faults)))

    @staticmethod
    def _hear(w: Home | None, kind: str, o: int, claim: int, heard: str) -> Home | None:
        if w is None or w.claim != claim:
            return w
        entry = w.entries[o]
        if entry is None or entry.till != kind:
            return w
        return w._replace(entries=replace(w.entries, o, entry._replace(answer=heard)))

    def _faults(self, s: World, out: Steps) -> None:
        faults, home = s.faults, s.home
        if home is not None and faults.crashes:
            after = forget(s, home, True)._replace(faults=faults._replace(crashes=faults.crashes - 1))
            out.append((WHIM, f"h{home.claim} dies", after))
        if home is not None and faults.formers and s.former is None:
            after = s._replace(home=None, former=home)._replace(
                faults=faults._replace(formers=faults.formers - 1, former_steps=self.c.former_steps)
            )
            out.append((WHIM, f"h{home.claim} freezes, and loses its partition", after))
        if home is not None and home.claim <= faults.stale and self.c.notices == "always":
            out.append((PROGRESS, f"h{home.claim} notices that Postgres is another one", forget(s, home, True)))
        if s.owner is not None and faults.owner_crashes:
            fewer = faults._replace(owner_crashes=faults.owner_crashes - 1)
            out.append((WHIM, "the owner dies", s._replace(owner=None, faults=fewer)))
        if s.owner is not None and s.owner.answer and faults.owner_formers and s.former_owner is None:
            fewer = faults._replace(owner_formers=faults.owner_formers - 1)
            after = s._replace(owner=None, former_owner=s.owner, faults=fewer)
            out.append((WHIM, "the owner freezes, and loses its partition", after))
        if self.c.restores and faults.phase == 0:
            out.append((WHIM, "Postgres is copied", s._replace(copy=s.postgres, faults=faults._replace(phase=1))))
        if s.copy is not None and s.copy != s.postgres:
            stale = 0 if self.c.notices == "assignment" else faults.claims
            after = s._replace(postgres=s.copy, copy=None, faults=faults._replace(phase=2, stale=stale))
            out.append((WHIM, "POSTGRES IS SET BACK to the copy", after))

    # A home

    def _claim(self, s: World) -> tuple[str, World]:
        """Take the home over: claim its lanes, fold the topics in after a set-back, take up what waits."""
        claim = s.faults.claims + 1
        faults, note = s.faults._replace(claims=claim), ""
        if s.faults.phase == 2 and self._recognises(s):
            s, note = self._folded(s), ", folds the topics into Postgres"
            faults = faults._replace(phase=3)
            claims = self.c.claim_event and (self.c.claims_silent or any(s.events))
            s = s._replace(newest=claim if claims else s.newest)
        pg = s.postgres._replace(claim=claim)
        entries = tuple(
            None if pg.waiting[o] == "-" or row is None else self._taken_up(row, pg.waiting[o])
            for o, row in enumerate(pg.rows)
        )
        home = Home(claim, s.acked, None, entries, "-" * self.c.orders)
        return f"h{claim} claims the home{note}", s._replace(postgres=pg, home=home, faults=faults)

    def _taken_up(self, row: Row, said: str) -> Entry:
        published = 0 if said == "u" or self.c.tells_what_waits else len(row.story)
        return Entry(row, published, waiting=True, step="tell", acks="" if self.c.resends else "n")

    def _recognises(self, s: World) -> bool:
        if self.c.recognises == "identity":
            return True
        if s.postgres.mark < s.acked or s.postgres.command_mark < s.commands_acked:
            return True
        rows = zip(s.events, s.postgres.rows, strict=True)
        return self.c.recognises == "events" and any(
            story_of(told, row) != (row.story if row else "") for told, row in rows
        )

    def _folded(self, s: World) -> World:
        """Fold the topics into a Postgres that was set back, as ``fold.sql`` does: one transaction over all lanes."""
        pg, c = s.postgres, self.c
        pg = pg._replace(floor=s.produced, rival=s.rival_told or pg.rival, owner_claim=pg.owner_claim + 1)
        commands = (*s.read[pg.command_mark :], *s.commands)
        cancelled = {o for o in commands if s.events[o] or pg.rows[o] is not None} if c.folds_cancels else set()
        for o in self.numbers:
            pg = self._forward(pg, o, story_of(s.events[o] + "X" * (o in cancelled), None))
            row = pg.rows[o]
            if c.settles_pending and row is not None and row.states[1:] in ("l", "b") and pg.lines[o] in HAS_UNITS:
                pg = pg._replace(lines=change(pg.lines, o, self._line(pg.lines[o], row.states[1])))
        for o in reversed(self.numbers):  # the youngest of those that nobody was told of
            if c.gives_way != "nobody" and not set(s.events[o]) - {"C"}:
                pg = self._give_way(pg, o)
        for o in self.numbers:
            if c.gives_way == "reserved":
                pg = self._give_way(pg, o)
        rows = zip(pg.rows, pg.waiting, strict=True)
        waiting = "".join(said if row is None or is_over(row) else "u" for row, said in rows)
        s = s._replace(postgres=pg._replace(waiting=waiting), owner=None)
        if c.reads_from == "mark":
            s = s._replace(
                acked=min(s.acked, pg.mark), commands=commands, commands_acked=min(s.commands_acked, pg.command_mark)
            )
        s = s._replace(read=())
        return s._replace(to_lines=(), answers=()) if c.skips_inner else s

    def _forward(self, pg: Postgres, o: int, told: str) -> Postgres:
        """Bring an order and its lines forward to what was published of it, never back: ``plan_fold``."""
        row, c = pg.rows[o], self.c
        if not set(told) - {"C"} or (row is not None and HISTORY.index(told[-1]) <= HISTORY.index(row.story[-1])):
            return pg  # of one told CREATED alone the record comes again
        story = story_of(told, row)
        foreign = o in c.foreign and (row is None or len(row.states) > 1)
        before = row.states if row is not None else "--"
        gone = "nb" if "P" in story else "rl"
        states = {"R": "hh", "P": "cg", "F": "cc", "X": gone}[story[-1]]
        states = "".join(
            was if was in "xrn" or (was, now) == ("c", "g") else now for was, now in zip(before, states, strict=False)
        )[: 1 + foreign]
        if story[-1] == "P" and set(states) == {"c"}:  # with its last line, which nobody was told of
            story, pg = f"{story}F", pg._replace(waiting=change(pg.waiting, o, "u"))
        due = "" if not c.voids_again else "REFUND_DUE" if "P" in story else "VOID_DUE"
        payment = (
            due if story[-1] == "X" else "SUCCESS" if story[-1] in "PF" else row.payment if row is not None else ""
        )
        pg = pg._replace(rows=replace(pg.rows, o, Row(STATUSES[story[-1]], states, payment, story)))
        return pg._replace(lines=change(pg.lines, o, self._line(pg.lines[o], states[1]))) if foreign else pg

    def _line(self, has: str, home: str) -> str:
        """Return what the owner has of a foreign line after the fold, of what it has and what home has now."""
        wanted = {"c": "c", "h": "h", "g": "h", "l": "r", "b": "n"}.get(home, has)
        if not self.c.folds_lines:
            return has
        return has if (wanted, has) == ("h", "c") or (wanted == "r" and has in "xn") else wanted

    def _give_way(self, pg: Postgres, o: int) -> Postgres:
        """End an order that is not paid, and has units that are missing."""
        row = pg.rows[o]
        short = (self._free(pg) < 0, self._free_foreign(pg) < 0)
        if row is None or row.status not in ("CREATED", "RESERVED"):
            return pg
        if not (short[0] and row.states[0] == "h") and not (short[1] and pg.lines[o] == "h"):
            return pg
        ended = Row("CANCELLED", "rl"[: len(row.states)], "VOID_DUE", row.story + "X")
        pg = pg._replace(rows=replace(pg.rows, o, ended))
        return pg._replace(lines=change(pg.lines, o, self._line(pg.lines[o], "l"))) if len(row.states) > 1 else pg

    def _home(self, at: At) -> None:
        s, w = at.world, at.home
        self._take_in(at)
        self._hand_over(at)
        for o, entry in enumerate(w.entries):
            if entry is not None:
                self._entry(at, o, entry)
                continue
            row = s.postgres.rows[o]
            if at.mine and row is not None and s.postgres.waiting[o] != "-" and (w.taken is None or w.taken[0] != o):
                taken = self._taken_up(row, s.postgres.waiting[o])
                after = s._replace(home=w._replace(entries=replace(w.entries, o, taken)))
                at.add(f"takes up o{o + 1} from `waiting`", after)
        self._commands(at)
        self._answers(at)

    def _take_in(self, at: At) -> None:
        """Reserve: hold the next order."""
        s, w = at.world, at.home
        o, pg, c = w.position, s.postgres, self.c
        if o >= s.produced or w.taken is not None:
            return
        row, known = pg.rows[o], pg.rows[o]
        if row is None:
            if self._free(pg) <= 0:
                row = self._floor(pg, o, Row("CANCELLED", "x", "", "CX"))
            elif o in c.foreign:
                row = Row("CREATED", "ha", "", "C")
            else:
                row = Row("RESERVED", "h", "", "CR")
        mark = max(pg.mark, o + 1) if c.marks_grow else o + 1
        waiting = change(pg.waiting, o, "u") if known is None and row.payment in DUE else pg.waiting
        pg = pg._replace(rows=replace(pg.rows, o, row), mark=mark, waiting=waiting)
        taken = (o, None if known is not None else row)
        name = f"hold: o{o + 1} is {'known: ' if known else ''}{row.status}"
        self._write(at, name, pg, w._replace(position=o + 1, taken=taken))

    def _hand_over(self, at: At) -> None:
        """Reserve: hand an order over in memory, where another stage may have read its row meanwhile."""
        s, w = at.world, at.home
        if w.taken is None:
            return
        o, row = w.taken
        entry, w = w.entries[o], w._replace(taken=None)
        if entry is not None and entry.step:
            return
        if row is None and s.postgres.rows[o] is None:  # Postgres was set back since the hold
            at.add(f"misses o{o + 1}, drops everything", at.dropped())
            return
        if row is None:
            self._turn(at._replace(home=w), o, None, f"o{o + 1} came again")
            return
        if row.status == "RESERVED":
            entry = Entry(row, slip=True, till="p")
        else:
            entry = Entry(row, slip=True, step="tell", waiting=row.payment in DUE)
        self._do(at, s, f"hands over o{o + 1}", w._replace(entries=replace(w.entries, o, entry)))

    def _entry(self, at: At, o: int, entry: Entry) -> None:
        """Go on about an order in hand."""
        s, w = at.world, at.home
        row, c, pg = entry.row, self.c, s.postgres
        asked = asks(row)
        if entry.till == "p" and asked and (asked == "c" or not entry.step or not c.void_after_told):
            self._ask(at, o, entry, asked)
        elif entry.till in ("c", "v") and not entry.answer and (entry.till, o, w.claim) not in s.net:
            self._ask(at, o, entry, entry.till)
        if entry.step:
            self._follow(at, o, entry)
            return
        if entry.answer:
            event = ANSWERS[entry.answer]
            self._turn(at, o, event, f"settle: o{o + 1} {type(event).__name__}")
        if not entry.waiting and not is_over(row) and not (w.taken and w.taken[0] == o):
            said = "t" if entry.published else "u"
            waits = pg._replace(waiting=change(pg.waiting, o, said))
            home = w._replace(entries=replace(w.entries, o, entry._replace(waiting=True, step="tell")))
            self._write(at, f"o{o + 1} waits in Postgres", waits, home, guard=None)
        is_open = row.status in ("CREATED", "RESERVED") and pg.waiting[o] != "-"
        if (
            o in c.expires
            and is_open
            and not self._is_held_back(w, o)
            and (not c.catches_up or w.position == s.produced)
        ):
            self._turn(at, o, Expire(AT), f"o{o + 1} expires")

    def _ask(self, at: At, o: int, entry: Entry, kind: str) -> None:
        s, w = at.world, at.home
        home = w._replace(entries=replace(w.entries, o, entry._replace(till=kind)))
        net = tuple(sorted((*s.net, (kind, o, w.claim))))
        name = f"asks the provider to {'void' if kind == 'v' else 'charge'} o{o + 1}"
        self._do(at, s._replace(net=net), name, home)

    def _decided(self, pg: Postgres, o: int, row: Row, event: Event) -> Row:
        return self._floor(pg, o, moved(row, event))

    def _floor(self, pg: Postgres, o: int, row: Row) -> Row:
        """Void what ends, of orders that may have been charged before Postgres was set back."""
        unknown = row.status == "CANCELLED" and not row.payment and o < pg.floor
        return row._replace(payment="VOID_DUE") if unknown and self.c.voids_unknown else row

    def _turn(self, at: At, o: int, event: Event | None, name: str, acks: str = "") -> None:
        """Commit: decide about an order and write it; what follows is the entry's next step."""
        s, w = at.world, at.home
        c, pg, entry = self.c, s.postgres, w.entries[o]
        if entry is None:
            row = pg.rows[o]
            assert row is not None
            entry = Entry(row, 0 if c.retells else len(row.story))
        if entry.step:
            return
        was, row = entry.row, entry.row
        if event is not None:
            row = self._decided(pg, o, row, event)
            if not c.voids and row.payment == "VOID_DUE" and was.payment == "" and entry.till not in ("c", "v"):
                row = row._replace(payment="")
        due = row.payment in DUE
        written = row if c.due_with_end or not due or was.payment in DUE else row._replace(payment="")
        waiting, said = entry.waiting, pg.waiting[o]
        if waiting and is_over(row) and not c.waits_until_told:
            waiting, said = False, "-"
        elif not waiting and due and written is row:
            waiting, said = True, "t" if entry.published else "u"
        if event is None:
            if not entry.slip and not entry.waiting:
                entry = entry._replace(slip=True)
            else:
                acks += "r"
        if row == was and not c.resends:
            acks += "n"
        if entry.answer and isinstance(event, Charged | Declined | GivenBack):
            entry = entry._replace(till="", answer="")
        early = "p" if not c.void_after_told and asks(row) == "v" and not entry.till else entry.till
        entry = entry._replace(row=row, waiting=waiting, step="tell", acks=acks, till=early)
        home = w._replace(entries=replace(w.entries, o, entry))
        after = pg._replace(waiting=change(pg.waiting, o, said))
        if "c" in acks and (c.marks_always or row != was):
            after = after._replace(command_mark=max(pg.command_mark, s.commands_acked + 1))
        if row == was and after == pg and "c" not in acks:
            self._do(at, s, f"{name}: is {row.status}", home)
            return
        if row != was:
            after = after._replace(rows=replace(pg.rows, o, written))
        name = f"{name}: {row.status}{' ' + row.payment if row.payment else ''}"
        self._write(at, name, after, home, guard=(o, was.status) if row != was else None)

    def _follow(self, at: At, o: int, entry: Entry) -> None:
        """Commit: publish and send what follows from a transaction, then acknowledge, then let go."""
        s, w = at.world, at.home
        c, row, step = self.c, entry.row, entry.step
        send = wants(row) if "n" not in entry.acks else ""
        if step in ("tell", "retell"):
            told, news = s.events[o], row.story[entry.published :] if c.whole_story else row.story[-1]
            newest = s.newest
            if not c.claimed_events or w.claim >= newest:
                told += "".join(letter for letter in news if letter not in told)
                newest = w.claim if c.claimed_events and c.restores and c.formers else newest
            published = entry._replace(published=len(row.story))
            after = s._replace(events=replace(s.events, o, told), newest=newest)
            name = f"publishes o{o + 1} {news or '(nothing new)'}"
            if send and step == "tell":
                self._do(at, after, name, self._with(w, o, published._replace(step="send")))
                home = self._with(w, o, entry._replace(step="retell"))
                self._do(at, self._sent(s, o, send), f"sends '{send}' of o{o + 1} first", home)
            else:
                self._finish(at, after, o, published, name)
        elif step == "send":
            self._finish(at, self._sent(s, o, send), o, entry, f"sends '{send}' of o{o + 1}")
        elif step == "acknowledge":
            self._let_go(at, s, o, entry, f"acknowledges what was about o{o + 1}")
        elif step == "over":
            pg = s.postgres._replace(waiting=change(s.postgres.waiting, o, "-"))
            self._write(at, f"o{o + 1} is over", pg, self._with(w, o, None))
        elif step == "note":
            rows = replace(s.postgres.rows, o, row)
            pg = s.postgres._replace(rows=rows, waiting=change(s.postgres.waiting, o, "u"))
            noted = entry._replace(step="", waiting=True)
            self._write(at, f"notes what is due of o{o + 1}", pg, self._with(w, o, noted))

    def _finish(self, at: At, s: World, o: int, entry: Entry, name: str) -> None:
        if self.c.acknowledge_apart:
            self._do(at, s, name, self._with(at.home, o, entry._replace(step="acknowledge")))
        else:
            self._let_go(at, s, o, entry, name)

    def _let_go(self, at: At, s: World, o: int, entry: Entry, name: str) -> None:
        """Acknowledge, then ask what is to be asked, and forget what is over."""
        w = at.home
        row = entry.row
        over, done = is_over(row), w.done
        slip = entry.slip and not (over or entry.waiting)
        if (entry.slip and not slip) or "r" in entry.acks:
            done |= 1 << o
        if at.mine:
            acked = s.acked
            while done >> acked & 1:
                acked += 1
            s = s._replace(acked=acked)
            if "c" in entry.acks:
                s = self._command_done(s)
            if "a" in entry.acks:
                s = s._replace(answers=s.answers[1:])
        till = "p" if asks(row) and not entry.till else entry.till
        step = "over" if over and entry.waiting else "note" if not entry.waiting and row.payment in DUE else ""
        left = None if over and not step else entry._replace(slip=slip, step=step, acks="", till=till)
        self._do(at, s, name, self._with(w, o, left)._replace(done=done))

    @staticmethod
    def _with(w: Home, o: int, entry: Entry | None) -> Home:
        return w._replace(entries=replace(w.entries, o, entry))

    @staticmethod
    def _sent(s: World, o: int, action: str) -> World:
        """Send what is wanted of a line; right behind the same record it would change nothing."""
        return s if s.to_lines[-1:] == ((o, action),) else s._replace(to_lines=(*s.to_lines, (o, action)))

    def _commands(self, at: At) -> None:
        """Take the next command; a cancel before its order is kept."""
        s, w = at.world, at.home
        c, pg = self.c, s.postgres
        if w.busy:
            after = s
            if at.mine:
                after = self._command_done(s)
            self._do(at, after, "acknowledges the cancel that is kept", w._replace(busy=False))
        elif s.commands and not any(entry and "c" in entry.acks for entry in w.entries):
            o = s.commands[0]
            if not c.marks_last and pg.command_mark <= s.commands_acked:
                self._write(at, "marks the cancel as read", pg._replace(command_mark=s.commands_acked + 1), w)
            if self._is_held_back(w, o):
                return
            if w.entries[o] is not None or pg.rows[o] is not None:
                self._turn(at, o, Cancel(), f"cancel o{o + 1}", "c")
            else:
                mark = max(pg.command_mark, s.commands_acked + 1)
                if c.keeps_in_postgres:
                    marked, home = pg._replace(command_mark=mark, kept=change(pg.kept, o, "k")), w
                else:
                    marked, home = pg._replace(command_mark=mark), w._replace(kept=change(w.kept, o, "k"))
                self._write(at, f"keeps the cancel of o{o + 1}", marked, home._replace(busy=True))
        for o in self.numbers:
            kept = w.kept[o] == "k" if not c.keeps_in_postgres else pg.kept[o] == "k" and w.kept[o] == "-"
            if kept and pg.rows[o] is not None and o not in s.commands:
                home = w._replace(kept=change(w.kept, o, "s" if c.keeps_in_postgres else "-"))
                after = s._replace(commands=(*s.commands, o))
                self._do(at, after, f"sends the kept cancel of o{o + 1}", home)
            if w.kept[o] == "s":
                removed = pg._replace(kept=change(pg.kept, o, "-"))
                home = w._replace(kept=change(w.kept, o, "-"))
                self._write(at, f"removes the kept cancel of o{o + 1}", removed, home)

    def _command_done(self, s: World) -> World:
        read = (*s.read, s.commands[0]) if self.c.restores and s.faults.phase < 3 else ()
        return s._replace(commands=s.commands[1:], commands_acked=s.commands_acked + 1, read=read)

    def _is_held_back(self, w: Home, o: int) -> bool:
        return self.c.in_hand and w.taken is not None and w.taken[0] == o

    def _answers(self, at: At) -> None:
        """Take the next answer of a line's owner; a line that is held for no order is released."""
        s, w = at.world, at.home
        if not s.answers or any(entry and "a" in entry.acks for entry in w.entries):
            return
        o, state = s.answers[0]
        if self._is_held_back(w, o):
            return
        if w.entries[o] is not None or s.postgres.rows[o] is not None:
            event = holding.answer("b", holding.Held(state, 1, None))
            self._turn(at, o, event, f"'{state}' of o{o + 1}", "a")
        elif at.mine:
            after = self._sent(s, o, "release") if state == "h" else s
            self._do(at, after._replace(answers=s.answers[1:]), f"'{state}' of o{o + 1}: unknown", w)

    # The owner of foreign lines

    def _owners(self, s: World, out: Steps) -> None:
        pg = s.postgres
        if s.owner is None:
            if s.faults.phase != 2:
                claim = pg.owner_claim + 1
                after = s._replace(owner=Owner(claim), postgres=pg._replace(owner_claim=claim))
                out.append((PROGRESS, "an owner claims its partition", after))
        else:
            self._owner(s, s.owner, True, out)
        if s.former_owner is not None:
            self._owner(s, s.former_owner, False, out)
        if self.c.rival and s.owner is not None and pg.rival == "-" and s.faults.phase != 2:
            fate = "F" if self._free_foreign(pg) > 0 else "X"
            after = s._replace(postgres=pg._replace(rival=fate), rival_told=fate)
            out.append((PROGRESS, f"the rival of the foreign product is {STATUSES[fate]}", after))

    def _owner(self, s: World, owner: Owner, mine: bool, out: Steps) -> None:
        kind = PROGRESS if mine else FORMER
        if owner.answer is not None:
            answers = s.answers if s.answers[-1:] == (owner.answer,) else (*s.answers, owner.answer)
            after = s._replace(answers=answers)
            if mine:
                after = after._replace(to_lines=s.to_lines[1:], owner=owner._replace(answer=None))
            else:
                after = after._replace(former_owner=None)  # it is fenced at its next transaction
            who = "the owner" if mine else "a former owner"
            out.append((kind, f"{who} answers '{owner.answer[1]}' of o{owner.answer[0] + 1}", after))
        elif mine and s.to_lines:
            (o, action), pg = s.to_lines[0], s.postgres
            if s.faults.phase == 2 or pg.owner_claim != owner.claim:
                out.append((kind, "the owner is refused by Postgres, and drops everything", s._replace(owner=None)))
                return
            state = pg.lines[o]
            if state != "-":
                state = holding.settle(holding.Held(state, 1, None), action).state or state
            elif action == "hold":
                state = "h" if self._free_foreign(pg) > 0 else "x"
            elif self.c.tombstones:
                state = "r"
            answer = (o, "r" if state == "-" else state)
            after = s._replace(
                postgres=pg._replace(lines=change(pg.lines, o, state)), owner=owner._replace(answer=answer)
            )
            out.append((kind, f"the owner reads '{action}' of o{o + 1}: '{state}'", after))

    # How it is done

    def _free(self, pg: Postgres) -> int:
        return self.c.stock - sum(row is not None and row.states[0] in HAS_UNITS for row in pg.rows)

    def _free_foreign(self, pg: Postgres) -> int:
        return self.c.foreign_stock - sum(state in HAS_UNITS for state in pg.lines) - (pg.rival == "F")

    @staticmethod
    def _do(at: At, s: World, name: str, home: Home) -> None:
        at.add(name, s._replace(home=home) if at.mine else s._replace(former=home))

    def _write(self, at: At, name: str, pg: Postgres, home: Home, guard: tuple[int, str] | None = None) -> None:
        """Commit a transaction, or drop everything: the fence refuses it, or an order is not in the status known."""
        s, w = at.world, at.home
        refused = w.claim <= s.faults.stale or (self.c.fence and s.postgres.claim != w.claim)
        if guard is not None:
            row = s.postgres.rows[guard[0]]
            refused = refused or row is None or row.status != guard[1]
        if refused:
            at.add(f"{name}: refused by Postgres, drops everything", at.dropped())
        else:
            self._do(at, s._replace(postgres=pg), name, home)
