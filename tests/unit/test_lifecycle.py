"""An order's life at its home: what each event makes of it, and whole lives with crashes, repeats and late answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import orjson
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from orderstream.agents import holding
from orderstream.agents.commit import events_of
from orderstream.agents.holding import Held
from orderstream.agents.intake import Arrival
from orderstream.agents.lifecycle import (
    AskAgain,
    Cancel,
    Charged,
    Declined,
    Event,
    Expire,
    GivenBack,
    LineHeld,
    LineRefused,
    LineSettled,
    Order,
    Payment,
    Refused,
    Rejected,
    asks,
    decide,
    is_over,
    moves,
    sends,
    stamp,
)
from orderstream.agents.pay import FREE
from orderstream.agents.reserve import under_locks
from orderstream.lua.gate import Counts, GateVerdict
from orderstream.streams import orders
from orderstream.streams.lines import LineWanted
from orderstream.streams.orders import Reason, Status

AT = datetime(2026, 1, 1, tzinfo=UTC)
HOME = 0


def story(order: Order, told: int = 0) -> list[tuple[Status, datetime]]:
    """Return status and time of the events that an order is told by, but for the first so many."""
    told_of = [orjson.loads(event) for event in events_of(order, told)]
    return [(Status(event["status"]), datetime.fromisoformat(event["at"])) for event in told_of]


# What each event makes of an order


def order_in(words: str, *, total_cents: int | None = 500) -> Order:
    """Return an order of ``status payment states``: its first line is at home, the others have other owners."""
    status, payment, states = words.split()
    ended_paid = payment in ("REFUND_DUE", "REFUNDED") or words.endswith("REFUSED nn")
    return Order(
        order_id="o",
        home=HOME,
        user_id="u",
        payment_method="card",
        lines=[(product_id, 2) for product_id in "abc"[: len(states)]],
        status=Status(status),
        states=states,
        created_at=AT,
        total_cents=None if status == "CREATED" else total_cents,
        reason=Reason.EXPIRED if status == "CANCELLED" else None,
        payment=None if payment == "-" else Payment(payment),
        charge_id="ch" if status in ("PAID", "CONFIRMED") or ended_paid else None,
        prices=[None if state in "ax" else 50 for state in states],
        reasons=[Reason.INSUFFICIENT_STOCK if state == "x" else None for state in states] if "x" in states else [],
        owners=[HOME, 1, 2][: len(states)],
        paid_at=AT if status in ("PAID", "CONFIRMED") or ended_paid else None,
    )


def words_of(order: Order) -> str:
    return f"{order.status} {order.payment or '-'} {order.states}"


def cells(table: str) -> list[tuple[str, str, str]]:
    """Return before, event and after of each cell; ``=``: nothing moves."""
    head, *rows = ([cell.strip() for cell in line.split("|")] for line in table.strip().splitlines())
    return [
        (before, event, before if after == "=" else after)
        for before, *afters in rows
        for event, after in zip(head[1:], afters, strict=True)
    ]


MONEY_AND_WISHES = """
status payment states   | Charged               | Declined            | Cancel                  | Expire
CREATED - ha            | =                     | =                   | CANCELLED - rl          | CANCELLED - rl
RESERVED - hh           | PAID SUCCESS cg       | CANCELLED FAILED rl | CANCELLED VOID_DUE rl   | CANCELLED VOID_DUE rl
PAID SUCCESS cg         | =                     | =                   | CANCELLED REFUND_DUE nb | =
PAID SUCCESS cc         | =                     | =                   | CANCELLED REFUND_DUE nb | =
CONFIRMED SUCCESS cc    | =                     | =                   | CANCELLED REFUND_DUE nb | =
CANCELLED - rr          | CANCELLED VOID_DUE rr | =                   | =                       | =
CANCELLED FAILED rr     | CANCELLED VOID_DUE rr | =                   | =                       | =
CANCELLED VOID_DUE rr   | =                     | =                   | =                       | =
CANCELLED VOIDED rr     | CANCELLED VOID_DUE rr | =                   | =                       | =
CANCELLED REFUND_DUE nn | =                     | =                   | =                       | =
CANCELLED REFUNDED nn   | =                     | =                   | =                       | =
CANCELLED REFUSED nn    | =                     | =                   | =                       | =
"""

MONEY_BACK = """
status payment states   | GivenBack             | Refused              | AskAgain
CREATED - ha            | =                     | =                    | =
RESERVED - hh           | =                     | =                    | =
PAID SUCCESS cg         | =                     | =                    | =
CONFIRMED SUCCESS cc    | =                     | =                    | =
CANCELLED - rr          | =                     | =                    | =
CANCELLED FAILED rr     | =                     | =                    | =
CANCELLED VOID_DUE rr   | CANCELLED VOIDED rr   | CANCELLED REFUSED rr | =
CANCELLED VOIDED rr     | =                     | =                    | =
CANCELLED REFUND_DUE nn | CANCELLED REFUNDED nn | CANCELLED REFUSED nn | =
CANCELLED REFUNDED nn   | =                     | =                    | =
CANCELLED REFUSED nn    | CANCELLED REFUNDED nn | =                    | CANCELLED REFUND_DUE nn
CANCELLED REFUSED rr    | CANCELLED VOIDED rr   | =                    | CANCELLED VOID_DUE rr
"""

NO_CHARGE_OF_ITS_OWN = """
status payment states   | Rejected              | another amount
CREATED - ha            | =                     | =
RESERVED - hh           | CANCELLED VOID_DUE rl | CANCELLED VOID_DUE rl
PAID SUCCESS cg         | =                     | =
CONFIRMED SUCCESS cc    | =                     | =
CANCELLED - rr          | =                     | CANCELLED VOID_DUE rr
CANCELLED FAILED rr     | =                     | CANCELLED VOID_DUE rr
CANCELLED VOIDED rr     | =                     | CANCELLED VOID_DUE rr
CANCELLED REFUNDED nn   | =                     | =
"""

FREE_ORDERS = """
status payment states | Charged              | Cancel                | Expire
RESERVED - hh         | PAID SUCCESS cg      | CANCELLED - rl        | CANCELLED - rl
PAID SUCCESS cg       | =                    | CANCELLED REFUNDED nb | =
CONFIRMED SUCCESS cc  | =                    | CANCELLED REFUNDED nb | =
CANCELLED - rr        | =                    | =                     | =
CANCELLED REFUNDED nn | =                    | =                     | =
"""

LINES_DECIDED = """
status payment states   | LineHeld        | LineRefused
CREATED - ha            | RESERVED - hh   | CANCELLED - rx
CREATED - haa           | CREATED - hha   | CREATED - hxa
CREATED - hah           | RESERVED - hhh  | CANCELLED - rxl
CREATED - hax           | CANCELLED - rlx | CANCELLED - rxx
RESERVED - hh           | =               | =
PAID SUCCESS cg         | =               | =
CONFIRMED SUCCESS cc    | =               | =
CANCELLED - rl          | =               | CANCELLED - rr
CANCELLED VOID_DUE rl   | =               | CANCELLED VOID_DUE rr
CANCELLED - rr          | =               | =
CANCELLED - rx          | =               | =
CANCELLED REFUND_DUE nb | =               | =
CANCELLED REFUNDED nn   | =               | =
"""

LINES_SETTLED = """
status payment states   | committed            | released              | returned
CREATED - ha            | =                    | CANCELLED - rr        | =
CREATED - haa           | =                    | CANCELLED - rrl       | =
RESERVED - hh           | =                    | =                     | =
PAID SUCCESS cg         | CONFIRMED SUCCESS cc | =                     | =
PAID SUCCESS cgg        | PAID SUCCESS ccg     | =                     | =
PAID SUCCESS cgc        | CONFIRMED SUCCESS ccc | =                    | =
CONFIRMED SUCCESS cc    | =                    | =                     | =
CANCELLED - rl          | =                    | CANCELLED - rr        | =
CANCELLED VOID_DUE rl   | =                    | CANCELLED VOID_DUE rr | =
CANCELLED - rr          | =                    | =                     | =
CANCELLED - rx          | =                    | =                     | =
CANCELLED REFUND_DUE nb | =                    | =                     | CANCELLED REFUND_DUE nn
CANCELLED REFUNDED nb   | =                    | =                     | CANCELLED REFUNDED nn
CANCELLED REFUNDED nn   | =                    | =                     | =
"""

EVENTS: dict[str, Event] = {
    "Charged": Charged("ch"),
    "Declined": Declined(),
    "Rejected": Rejected(),
    "another amount": Charged("ch", 499),
    "AskAgain": AskAgain(),
    "GivenBack": GivenBack(),
    "Refused": Refused(),
    "Cancel": Cancel(),
    "Expire": Expire(AT),
    "LineHeld": LineHeld("b", 50),
    "LineRefused": LineRefused("b", Reason.INSUFFICIENT_STOCK),
    "committed": LineSettled("b", "c"),
    "released": LineSettled("b", "r"),
    "returned": LineSettled("b", "n"),
}

REASONS = {
    "Declined": Reason.PAYMENT_DECLINED,
    "Rejected": Reason.PAYMENT_DECLINED,
    "another amount": Reason.PAYMENT_DECLINED,
    "Cancel": Reason.CANCELLED_BY_USER,
    "Expire": Reason.EXPIRED,
    "LineHeld": Reason.INSUFFICIENT_STOCK,  # of the line that was refused before
    "LineRefused": Reason.INSUFFICIENT_STOCK,
    "released": Reason.EXPIRED,  # its owner let go of it: it is held no more
}


def check_cell(order: Order, event: str, after: str) -> None:
    before, was = words_of(order), replace(order, prices=[*order.prices], reasons=[*order.reasons])
    moved = decide(order, EVENTS[event])
    assert words_of(order) == after
    assert moved or order == was, "what did not move is as it was"
    assert moved or before == after
    if order.status is Status.CANCELLED and was.status is not Status.CANCELLED:
        assert order.reason == REASONS[event]
    else:
        assert order.reason == was.reason, "the first reason stays"


MONEY = cells(MONEY_AND_WISHES) + cells(MONEY_BACK) + cells(NO_CHARGE_OF_ITS_OWN)


@pytest.mark.parametrize(("before", "event", "after"), MONEY)
def test_what_the_provider_and_the_customer_make_of_an_order(before: str, event: str, after: str) -> None:
    check_cell(order_in(before), event, after)


@pytest.mark.parametrize(("before", "event", "after"), cells(FREE_ORDERS))
def test_nobody_is_asked_about_the_money_of_a_free_order(before: str, event: str, after: str) -> None:
    order = order_in(before, total_cents=0)
    check_cell(order, event, after)
    assert asks(order) in (None, "charge")


@pytest.mark.parametrize(("before", "event", "after"), cells(LINES_DECIDED) + cells(LINES_SETTLED))
def test_what_the_answer_of_another_owner_makes_of_an_order(before: str, event: str, after: str) -> None:
    check_cell(order_in(before), event, after)


def test_the_tables_name_each_pair_of_status_and_event() -> None:
    pairs = {(before.split()[0], event) for before, event, _ in MONEY}
    pairs |= {(before.split()[0], event) for before, event, _ in cells(LINES_DECIDED) + cells(LINES_SETTLED)}
    assert pairs == {(status, event) for status in Status for event in EVENTS}
    payments = {before.split()[1] for before, _, _ in cells(MONEY_BACK)}
    assert payments == {"-", *Payment}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("words", ["CREATED - h", "RESERVED - h", "CONFIRMED SUCCESS c", "CANCELLED VOID_DUE r"])
def test_an_order_whose_lines_are_all_at_home_hears_no_other_owner(words: str, event: str) -> None:
    order = order_in(words)
    order.owners = ()
    if event in ("LineHeld", "LineRefused", "committed", "released", "returned"):
        assert not decide(order, EVENTS[event])
    else:
        decide(order, EVENTS[event])
    assert not set(order.states) & set("aglb")
    assert not [*sends(order)]


def test_the_answer_about_a_line_at_home_or_of_another_product_changes_nothing() -> None:
    for product_id in ("a", "z"):
        events: tuple[Event, ...] = (
            LineHeld(product_id, 1),
            LineRefused(product_id, "x"),
            LineSettled(product_id, "c"),
        )
        for event in events:
            order = order_in("CREATED - ha")
            assert not decide(order, event)
            assert words_of(order) == "CREATED - ha"


def test_an_order_at_home_is_confirmed_as_it_is_paid() -> None:
    order = order_in("RESERVED - h")
    order.owners = ()
    assert decide(order, Charged("ch"))
    assert (words_of(order), order.charge_id) == ("CONFIRMED SUCCESS c", "ch")


def test_the_total_is_the_price_of_all_lines() -> None:
    order = order_in("CREATED - ha")
    decide(order, LineHeld("b", 30))
    assert (order.prices, order.total_cents) == ([50, 30], 2 * 50 + 2 * 30)


@pytest.mark.parametrize("first", Reason)
@pytest.mark.parametrize("second", Reason)
def test_of_two_reasons_the_first_of_the_list_is_reported(first: Reason, second: Reason) -> None:
    order = order_in("CREATED - haa")
    decide(order, LineRefused("b", first))
    decide(order, LineRefused("c", second))
    assert order.reason == min(first, second, key=[*Reason].index)
    assert order.reasons == [None, first, second]


def test_an_order_does_not_expire_before_its_time() -> None:
    order = order_in("RESERVED - hh")
    assert not decide(order, Expire(AT - timedelta(seconds=1)))
    assert decide(order, Expire(AT))


@pytest.mark.parametrize("words", ["CANCELLED VOID_DUE rr", "CANCELLED VOIDED rr", "CANCELLED REFUSED rr"])
def test_a_charge_that_was_taken_after_all_is_named(words: str) -> None:
    order = order_in(words)
    assert decide(order, Charged("late"))
    assert order.charge_id == "late"


def test_a_charge_over_the_order_s_own_amount_is_its_own() -> None:
    order = order_in("RESERVED - hh")
    assert decide(order, Charged("ch", 500))
    assert words_of(order) == "PAID SUCCESS cg"


def test_a_charge_over_another_amount_is_named_since_it_has_to_go_back() -> None:
    order = order_in("RESERVED - hh")
    decide(order, Charged("other", 499))
    assert (order.charge_id, asks(order)) == ("other", "void")


# What follows


@pytest.mark.parametrize(
    ("words", "asked", "over", "sent"),
    [
        ("CREATED - ha", None, False, ["hold"]),
        ("RESERVED - hh", "charge", False, []),
        ("PAID SUCCESS cg", None, False, ["commit"]),
        ("CONFIRMED SUCCESS cc", None, True, []),
        ("CANCELLED - rl", None, False, ["release"]),
        ("CANCELLED - rr", None, True, []),
        ("CANCELLED - rx", None, True, []),
        ("CANCELLED FAILED rr", None, True, []),
        ("CANCELLED VOID_DUE rr", "void", False, []),
        ("CANCELLED VOID_DUE rl", "void", False, ["release"]),
        ("CANCELLED VOIDED rr", None, True, []),
        ("CANCELLED REFUND_DUE nb", "refund", False, ["return"]),
        ("CANCELLED REFUND_DUE nn", "refund", False, []),
        ("CANCELLED REFUNDED nb", None, False, ["return"]),
        ("CANCELLED REFUNDED nn", None, True, []),
        ("CANCELLED REFUSED nn", None, True, []),
    ],
)
def test_what_is_left_to_do_about_an_order(words: str, asked: str | None, over: bool, sent: list[str]) -> None:
    order = order_in(words)
    assert (asks(order), is_over(order), [*sends(order)]) == (asked, over, [(1, action) for action in sent])


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        ("hah", "hhh", []),
        ("hhh", "cgg", [(0, "commit")]),
        ("hhh", "rll", [(0, "release")]),
        ("cgc", "nbb", [(0, "return")]),
        ("cgg", "ccg", []),
        ("hhh", "ccg", [(0, "commit"), (1, "commit")]),
    ],
)
def test_lines_at_home_and_of_near_owners_move_units_here(
    before: str, after: str, moved: list[tuple[int, str]]
) -> None:
    order = order_in(f"PAID SUCCESS {after}")
    assert [*moves(before, order.states)] == moved


@pytest.mark.parametrize(
    ("before", "event", "after"),
    [
        ("RESERVED - hhh", Charged("ch"), "PAID SUCCESS ccg"),
        ("RESERVED - hh", Charged("ch"), "CONFIRMED SUCCESS cc"),
        ("RESERVED - hhh", Declined(), "CANCELLED FAILED rrl"),
        ("CREATED - hah", Cancel(), "CANCELLED - rll"),  # what an owner was asked for is its to answer
        ("PAID SUCCESS cgc", Cancel(), "CANCELLED REFUND_DUE nbb"),
        ("CONFIRMED SUCCESS ccc", Cancel(), "CANCELLED REFUND_DUE nnb"),
    ],
)
def test_lines_of_near_owners_are_settled_with_the_order(before: str, event: Event, after: str) -> None:
    order = order_in(before)
    assert decide(order, event, {1})
    assert words_of(order) == after


def test_a_story_has_each_status_once_in_the_order_in_which_they_come() -> None:
    order = order_in("CREATED - ha")
    events: tuple[Event, ...] = (LineHeld("b", 1), Charged("ch"), LineSettled("b", "c"), Cancel())
    for n, event in enumerate(events, 1):
        assert decide(order, event)
        stamp(order, AT + timedelta(seconds=n))
        stamp(order, AT + timedelta(hours=1))
    whole = [(status, AT + timedelta(seconds=n)) for n, status in enumerate(Status)]
    assert all(story(order, told) == whole[told:] for told in range(6))


def test_a_status_that_an_order_passed_on_the_way_is_told_too() -> None:
    order = order_in("CONFIRMED SUCCESS c")
    stamp(order, AT)
    assert [status for status, _ in story(order)] == [Status.CREATED, Status.PAID, Status.CONFIRMED]


# Whole lives

OWNERS = {"a": HOME, "b": HOME, "c": 1, "d": 1, "e": 2}
PRICES = {"a": 5, "b": 0, "c": 3, "d": 0, "e": 1}
IDS = ("o0", "o1", "o2")
PATHS = {
    "hold": ("available", "held"),
    "commit": ("held", "sold"),
    "release": ("held", "available"),
    "return": ("sold", "available"),
}


CRASHES = [None] * 6 + ["before commit", "after commit", "after events", "after sends"]
"""Where the home's worker dies in a transaction, or does not."""

CHOICES: dict[str, list[Any]] = {
    "n": [*range(8)],
    "crash": CRASHES,
    "again": [False, False, True],
    "lost": [False, False, True],
    "early_s": [0, 1],
    "outcome": ["answered"] * 4 + ["rolled back", "killed"],
    "near": [{1}, {1, 2}, set()],
}
"""What a rule is called with."""


CRASHES_MAX = 3
"""In one life, beside those within a transaction."""

TIMERS_MAX = 4
"""In one life: orders that expire, or are taken up again."""

HABIT = ["orders", "commands", "kept", "order_lines", "reservations", "answers", "requests"]
"""What may be under way."""


@dataclass
class Shelf:
    """A product as its owner counts it."""

    available: int
    held: int = 0
    sold: int = 0

    def move(self, movement: str, units: int) -> None:
        source, target = PATHS[movement]
        setattr(self, source, getattr(self, source) - units)
        setattr(self, target, getattr(self, target) + units)
        assert min(self.available, self.held, self.sold) >= 0


@dataclass
class Bank:
    """The provider's books: what it makes of a key is fixed, however often and however late it is asked."""

    accepts: dict[str, bool] = field(default_factory=dict)
    keeps: set[str] = field(default_factory=set)
    """Keys whose money it will not give back, for good: until people ask it to."""
    moods: dict[str, str] = field(default_factory=dict)
    """What it does with a charge of a key that is not ``good``: rejects it, before or after it was made; takes too much."""
    taken: dict[str, int] = field(default_factory=dict)
    standing: Counter[str] = field(default_factory=Counter)
    voided: set[str] = field(default_factory=set)

    def hear(self, request: Request) -> Event:
        key = request.order_id
        if request.what == "charge":
            return self._charge(key, request.amount_cents)
        if key in self.keeps and self.standing[key]:
            return Refused()
        if request.what == "void":
            self.voided.add(key)
        self.standing[key] = 0
        return GivenBack()

    def _charge(self, key: str, amount_cents: int) -> Event:
        mood = self.moods.get(key, "good")
        if mood == "rejects":
            return Rejected()
        if key in self.voided:
            return Declined()
        if key not in self.taken:
            if not self.accepts[key]:
                return Declined()
            self.taken[key] = amount_cents + (mood == "too much")
            self.standing[key] += 1
        return Rejected() if mood == "rejects after" else Charged(f"ch-{key}", self.taken[key])


class Request(NamedTuple):
    """What a worker asked the provider; ``worker`` is dead by the time it arrives, or gets the answer."""

    what: str
    order_id: str
    amount_cents: int
    worker: int


class Answered(NamedTuple):
    """A record on ``reservations``."""

    order_id: str
    event: Event


class Placed(NamedTuple):
    """An order as it is drawn; ``others`` are products beside the first, which places it."""

    first: str
    others: list[str]
    units: list[int]
    accepts: bool
    keeps: bool
    mood: str
    unwanted: Status | str | None
    """Its customer cancels it when it has come so far; empty: before it is read, perhaps."""


MOODS = ["good"] * 5 + ["rejects", "rejects after", "too much"]

PLACED = st.builds(
    Placed,
    first=st.sampled_from("ab"),
    others=st.lists(st.sampled_from("cdeab"), max_size=2, unique=True),
    units=st.lists(st.sampled_from([1, 1, 2]), min_size=3, max_size=3),
    accepts=st.sampled_from([True, True, True, False]),
    keeps=st.sampled_from([False, False, False, True]),
    mood=st.sampled_from(MOODS),
    unwanted=st.sampled_from([None, None, "", Status.CREATED, Status.RESERVED, Status.PAID, Status.CONFIRMED]),
)


def copy_of(order: Order) -> Order:
    return replace(order, prices=[*order.prices], reasons=[*order.reasons])


Step = Callable[..., None]
STEPS: list[tuple[Callable[[Any], object], Step, Sequence[str]]] = []
"""What may happen next: when, what, and the names of what it is called with."""


def step(ready: Callable[[Any], object], *names: str) -> Callable[[Step], Step]:
    """Make a rule that is called with the :data:`CHOICES` of these names."""
    choices: dict[str, Any] = {name: st.sampled_from(CHOICES[name]) for name in names}
    as_rule: Any = rule(**choices)

    def decorate(function: Step) -> Step:
        STEPS.append((ready, function, names))
        made: Step = precondition(lambda life: bool(ready(life)))(as_rule(function))
        return made

    return decorate


class Lives(RuleBasedStateMachine):
    """Up to three orders, their home, the owners of their products, the provider; Postgres and Kafka keep what they have.

    The home's worker dies at any moment.  A record that is not acknowledged stays where it is and may be read again.
    """

    def __init__(self) -> None:
        super().__init__()
        # Postgres
        self.rows: dict[str, Order] = {}
        self.holds: dict[tuple[str, str], Held] = {}
        self.kept: dict[str, None] = {}
        self.shelves: dict[str, Shelf] = {}
        self.stock: dict[str, int] = {}
        self.moved: dict[tuple[str, str], list[str]] = {}
        # Kafka; a dict is a topic whose records may be read in any order, each as often as it is there
        self.records: dict[str, orders.Order] = {}
        self.orders: dict[str, None] = {}
        self.commands: dict[str, None] = {}
        self.order_lines: dict[LineWanted, None] = {}
        self.reservations: dict[Answered, None] = {}
        self.published: dict[str, list[Status]] = {}
        # The provider
        self.bank = Bank()
        self.requests: list[Request] = []
        # The worker; all of it is lost in a crash
        self.worker = 0
        self.is_up = True
        self.near: set[int] = set()
        self.in_hand: dict[str, Order] = {}
        self.told: dict[str, int] = {}
        self.answers: list[tuple[str, Event]] = []
        self.asking: set[str] = set()
        # What the test knows
        self.clock = AT
        self.timers = TIMERS_MAX
        self.unwanted: dict[str, Status | str] = {}
        self.cancelled: set[str] = set()
        self.stories: dict[str, list[tuple[Status, datetime]]] = {}
        self.habit: tuple[str, ...] = ()

    # The world

    @initialize(
        stock=st.fixed_dictionaries({product_id: st.sampled_from([3, 2, 3, 1, 3, 0]) for product_id in OWNERS}),
        placed=st.lists(PLACED, min_size=1, max_size=len(IDS)),
        habit=st.permutations(HABIT),
        near=st.sampled_from(CHOICES["near"]),
    )
    def begin(self, stock: dict[str, int], placed: list[Placed], habit: list[str], near: set[int]) -> None:
        self.stock, self.habit, self.near = stock, tuple(habit), near
        self.shelves = {product_id: Shelf(units) for product_id, units in stock.items()}
        for order_id, order in zip(IDS, placed, strict=False):
            lines = tuple(zip(dict.fromkeys((order.first, *order.others)), order.units, strict=False))
            self.records[order_id] = orders.Order(order_id, "u", lines, "card", None, None)
            self.orders[order_id] = None
            self.bank.accepts[order_id] = order.accepts
            self.bank.moods[order_id] = order.mood
            if order.keeps:
                self.bank.keeps.add(order_id)
            if order.unwanted is not None:
                self.unwanted[order_id] = order.unwanted

    @step(lambda self: self._to_cancel(), "n")
    def cancel(self, n: int) -> None:
        ready = self._to_cancel()
        order_id = ready[n % len(ready)]
        del self.unwanted[order_id]
        self.commands[order_id] = None
        self.cancelled.add(order_id)

    def _to_cancel(self) -> list[str]:
        return [
            order_id
            for order_id, far in self.unwanted.items()
            if not far or far in [status for status, _ in self.stories.get(order_id, [])]
        ]

    @step(lambda self: self.orders and self.is_up, "n", "crash", "again")
    def read_order(self, n: int, crash: str | None, again: bool) -> None:
        self._read(self.orders, n, again, lambda order_id: self._take_in(order_id, crash))

    @step(lambda self: self.commands and self.is_up, "n", "crash", "again")
    def read_command(self, n: int, crash: str | None, again: bool) -> None:
        self._read(self.commands, n, again, lambda order_id: self._decide(order_id, Cancel(), crash))

    @step(lambda self: self.kept.keys() & self.rows and self.is_up, "crash")
    def find_kept(self, crash: str | None) -> None:
        """A cancel that was kept finds its order."""
        self._decide(next(order_id for order_id in self.kept if order_id in self.rows), Cancel(), crash)

    @step(lambda self: self.reservations and self.is_up, "n", "crash", "again")
    def read_reservation(self, n: int, crash: str | None, again: bool) -> None:
        self._read(self.reservations, n, again, lambda record: self._decide(record.order_id, record.event, crash))

    @step(lambda self: self.answers and self.is_up, "n", "crash", "again")
    def hear(self, n: int, crash: str | None, again: bool) -> None:
        """An answer of the provider comes in, perhaps not for the last time."""
        order_id, event = self.answers[n % len(self.answers)] if again else self.answers.pop(n % len(self.answers))
        self._decide(order_id, event, crash)

    @step(lambda self: self.rows and self.is_up and self.timers, "n", "crash", "early_s")
    def expire(self, n: int, crash: str | None, early_s: int) -> None:
        self.timers -= 1
        order_id = [*self.rows][n % len(self.rows)]
        before = self.rows[order_id]
        self._decide(order_id, Expire(before.created_at - timedelta(seconds=early_s)), crash)
        assert not early_s or self.rows[order_id] == before

    @step(lambda self: self.rows and self.is_up and self.timers, "n", "crash")
    def repeat(self, n: int, crash: str | None) -> None:
        """An order that waits is taken up again."""
        self.timers -= 1
        self._decide([*self.rows][n % len(self.rows)], None, crash)

    @step(lambda self: self._refused() and self.is_up, "n", "crash")
    def have_asked_again(self, n: int, crash: str | None) -> None:
        """People have settled with the provider that it gives money back after all."""
        ready = self._refused()
        order_id = ready[n % len(ready)]
        self.bank.keeps.discard(order_id)
        self._decide(order_id, AskAgain(), crash)

    def _refused(self) -> list[str]:
        return [order_id for order_id, order in self.rows.items() if order.payment is Payment.REFUSED]

    @step(lambda self: self.is_up and self.worker < CRASHES_MAX)
    def crash(self) -> None:
        self.is_up = False
        self.worker += 1
        self.in_hand, self.told, self.answers, self.asking = {}, {}, [], set()

    @step(lambda self: not self.is_up, "near")
    def recover(self, near: set[int]) -> None:
        """Another worker takes over, which has more or fewer partitions."""
        self.is_up, self.near = True, near
        for order_id in self.rows:
            self._decide(order_id, None, None)

    @step(lambda self: self.order_lines, "n", "again", "outcome")
    def read_line(self, n: int, again: bool, outcome: str) -> None:
        """The owner of a line's product decides about it: in one transaction, then it answers the line's home."""
        self._read(self.order_lines, n, again, lambda wanted: self._decide_line(wanted, outcome))

    @step(lambda self: self.requests, "n", "again", "lost")
    def reach_provider(self, n: int, again: bool, lost: bool) -> None:
        request = self.requests[n % len(self.requests)] if again else self.requests.pop(n % len(self.requests))
        event = self.bank.hear(request)
        if request.worker != self.worker:
            return
        if not lost:
            self.answers.append((request.order_id, event))
            self.asking.discard(request.order_id)
        elif request not in self.requests:
            self.requests.append(request)  # its outcome is unknown, so it is asked again

    @step(lambda self: not any(self._under_way().values()))
    def rest(self) -> None:
        self._come_to_rest()

    # The home

    def _read(self, topic: dict[Any, None], n: int, again: bool, process: Callable[[Any], bool]) -> None:
        record = [*topic][n % len(topic)]
        if process(record) and not again:
            topic.pop(record, None)

    def _take_in(self, order_id: str, crash: str | None) -> bool:
        if order_id in self.rows:
            return self._decide(order_id, None, crash)
        if crash == "before commit":
            self.crash()
            return False
        taken = self.records[order_id]
        counts = {
            product_id: Counts(shelf.available + shelf.held, shelf.held, 1, 1)
            for product_id, shelf in self.shelves.items()
            if OWNERS[product_id] == HOME or (OWNERS[product_id] in self.near and not self._has_holds(taken))
        }
        said = [GateVerdict.TAKEN if product_id in counts else GateVerdict.NOT_OURS for product_id, _ in taken.lines]
        (fate,) = under_locks([Arrival(taken, SimpleNamespace(), None)], [said], counts, {}, {})
        prices = [
            PRICES[product_id] if state == "h" else None
            for (product_id, _), state in zip(taken.lines, fate.states, strict=True)
        ]
        order = Order(
            order_id=order_id,
            home=HOME,
            user_id="u",
            payment_method="card",
            lines=taken.lines,
            status=fate.status,
            states=fate.states,
            created_at=self._now(),
            reason=fate.reason,
            prices=prices,
            reasons=[*fate.reasons],
        )
        if fate.status is not Status.CANCELLED and {OWNERS[product_id] for product_id, _ in taken.lines} != {HOME}:
            order.owners = [OWNERS[product_id] for product_id, _ in taken.lines]
        if fate.status is Status.RESERVED:
            order.total_cents = sum(PRICES[product_id] * units for product_id, units in taken.lines)
        stamp(order, order.created_at)
        for (product_id, units), state in zip(taken.lines, fate.states, strict=True):
            if state == "h":
                self._move(order_id, "hold", product_id, units)
                if OWNERS[product_id] != HOME:
                    self.holds[order_id, product_id] = Held("h", PRICES[product_id], None)
        self._write(order)
        return self._follow(order, crash)

    def _has_holds(self, taken: orders.Order) -> bool:
        return any((taken.order_id, product_id) in self.holds for product_id, _ in taken.lines)

    def _decide(self, order_id: str, event: Event | None, crash: str | None) -> bool:
        """Run one transaction about an order and what follows; tell whether what brought it is acknowledged."""
        if order_id not in self.in_hand and order_id in self.rows:
            self.in_hand[order_id] = copy_of(self.rows[order_id])
        order = self.in_hand.get(order_id)
        if order is None:
            assert isinstance(event, Cancel)
            if crash == "before commit":
                self.crash()
                return False
            self.kept[order_id] = None
            return True
        states = order.states
        if event is not None and decide(order, event, self.near):
            if crash == "before commit":
                self.crash()
                return False
            stamp(order, self._now())
            for n, movement in moves(states, order.states):
                product_id, units = order.lines[n]
                self._move(order_id, movement, product_id, units)
                if not order.is_home(n):
                    held = self.holds[order_id, product_id]
                    assert held.state == states[n], "its owner has it as home knows it"
                    self.holds[order_id, product_id] = held._replace(state=order.states[n])
            self._write(order)
        else:
            assert order == self.rows[order_id], "what did not move is as it was"
        if isinstance(event, Cancel):
            self.kept.pop(order_id, None)
        return self._follow(order, crash)

    def _write(self, order: Order) -> None:
        row = self.rows.get(order.order_id)
        assert row is None or row.reason in (None, order.reason), "the first reason stays"
        self.rows[order.order_id] = copy_of(order)
        self.in_hand[order.order_id] = order
        before, now = self.stories.get(order.order_id, []), story(order)
        assert now[: len(before)] == before, "a story goes on, and what it said stays"
        self.stories[order.order_id] = now

    def _follow(self, order: Order, crash: str | None) -> bool:
        if crash in ("before commit", "after commit"):
            self.crash()
            return False
        self._publish(order)
        if crash == "after events":
            self.crash()
            return False
        for n, action in sends(order):
            product_id, units = order.lines[n]
            self.order_lines[LineWanted(action, order.order_id, product_id, units, HOME, "u")] = None
        if crash == "after sends":
            self.crash()
            return False
        if (what := asks(order)) is not None:
            self._ask(order, what)
        if is_over(order):
            del self.in_hand[order.order_id]
        return True

    def _publish(self, order: Order) -> None:
        seen = self.published.setdefault(order.order_id, [])
        steps = [status for status, _ in story(order)]
        for n, status in enumerate(steps[self.told.get(order.order_id, 0) :], self.told.get(order.order_id, 0)):
            assert n <= len(seen), "no status is left out"
            if n == len(seen):
                assert Status.CANCELLED not in seen, "nothing comes after the end"
                seen.append(status)
            assert seen[n] is status, "what was told is not taken back"
        self.told[order.order_id] = len(steps)

    def _ask(self, order: Order, what: str) -> None:
        order_id = order.order_id
        assert order.total_cents is not None
        if what == "charge" and not order.total_cents:
            if (order_id, Charged(FREE)) not in self.answers:
                self.answers.append((order_id, Charged(FREE)))
            return
        assert order.total_cents, "the provider is not asked about nothing"
        if order_id not in self.asking:
            self.asking.add(order_id)
            self.requests.append(Request(what, order_id, order.total_cents, self.worker))

    # The owners of other products

    def _decide_line(self, wanted: LineWanted, outcome: str) -> bool:
        if outcome == "rolled back":
            return False
        key = (wanted.order_id, wanted.product_id)
        held = self.holds.get(key)
        if held is not None:
            new, movement = holding.settle(held, wanted.action)
            held = held._replace(state=new or held.state)
        elif wanted.action != "hold":
            assert wanted.action == "release", "only a release comes before its hold"
            held, movement = Held("r", None, None), None
        elif self.shelves[wanted.product_id].available >= wanted.quantity:
            held, movement = Held("h", PRICES[wanted.product_id], None), "hold"
        else:
            held, movement = Held("x", None, Reason.INSUFFICIENT_STOCK), None
        if movement is not None:
            self._move(wanted.order_id, movement, wanted.product_id, wanted.quantity)
        self.holds[key] = held
        if outcome == "killed":
            return False
        self.reservations[Answered(wanted.order_id, holding.answer(wanted.product_id, held))] = None
        return True

    def _move(self, order_id: str, movement: str, product_id: str, units: int) -> None:
        self.shelves[product_id].move(movement, units)
        path = self.moved.setdefault((order_id, product_id), [])
        path.append(movement)
        assert path in (["hold"], ["hold", "commit"], ["hold", "release"], ["hold", "commit", "return"])

    def _now(self) -> datetime:
        self.clock += timedelta(seconds=1)
        return self.clock

    # What holds at any moment

    @invariant()
    def check(self) -> None:
        self._units_are_where_the_rows_say()
        self._rows_are_sound()
        self._money_is_where_the_rows_say()
        self._what_is_confirmed_is_sold()
        self._what_a_home_has_noted_is_so()
        self._what_is_published_is_a_story()

    def _units_are_where_the_rows_say(self) -> None:
        counted = {product_id: Counter[str]() for product_id in self.shelves}
        for order in self.rows.values():
            for n, (product_id, units) in enumerate(order.lines):
                if order.is_home(n):
                    assert order.states[n] in "hxcrn"
                    counted[product_id][order.states[n]] += units
        for (order_id, product_id), held in self.holds.items():
            counted[product_id][held.state] += dict(self.rows[order_id].lines)[product_id]
        for product_id, shelf in self.shelves.items():
            assert (shelf.held, shelf.sold) == (counted[product_id]["h"], counted[product_id]["c"])
            assert shelf.available + shelf.held + shelf.sold == self.stock[product_id]

    def _rows_are_sound(self) -> None:
        """What the constraints of the table ask for."""
        for order in self.rows.values():
            last = order.status
            assert (order.cancelled_at is not None) == (last is Status.CANCELLED) == (order.reason is not None)
            total = sum(PRICES[product_id] * units for product_id, units in order.lines)
            assert order.total_cents == (total if order.reserved_at is not None else None)
            if last is not Status.CANCELLED:
                had = (order.reserved_at is not None, order.paid_at is not None, order.confirmed_at is not None)
                passed = [*Status].index(last)
                assert had == (passed > 0, passed > 1, passed > 2)
            if last in (Status.PAID, Status.CONFIRMED):
                assert order.payment is Payment.SUCCESS
            assert not is_over(order) or (asks(order), [*sends(order)]) == (None, [])

    def _money_is_where_the_rows_say(self) -> None:
        for order_id, order in self.rows.items():
            standing = self.bank.standing[order_id]
            assert standing <= 1
            if order.status in (Status.PAID, Status.CONFIRMED):
                assert standing or not order.total_cents
                assert not standing or self.bank.taken[order_id] == order.total_cents
            if order.status is Status.CREATED:
                assert not standing
            if order.status is Status.CANCELLED and is_over(order):
                assert not standing or order.payment is Payment.REFUSED

    def _what_is_confirmed_is_sold(self) -> None:
        for order_id, order in self.rows.items():
            if order.status is Status.CONFIRMED:
                assert set(order.states) == {"c"}
                assert all(
                    self.holds[order_id, product_id].state == "c"
                    for n, (product_id, _) in enumerate(order.lines)
                    if not order.is_home(n)
                )

    def _what_a_home_has_noted_is_so(self) -> None:
        """A home knows less than the owners of its lines, never more."""
        for order_id, order in self.rows.items():
            for n, (product_id, _) in enumerate(order.lines):
                if order.is_home(n) or order.states[n] not in "hxgcrbn":
                    continue
                there = self.holds[order_id, product_id].state
                assert (
                    there in {"h": "h", "x": "x", "g": "hc", "b": "hcn", "c": "c", "r": "rx", "n": "n"}[order.states[n]]
                )

    def _what_is_published_is_a_story(self) -> None:
        for order_id, seen in self.published.items():
            assert seen == [status for status, _ in self.stories[order_id]][: len(seen)]

    # The end

    def _under_way(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.habit} | {"kept": self.kept.keys() & self.rows}

    def _come_to_rest(self) -> None:
        steps: dict[str, Callable[[], object]] = {
            "orders": lambda: self.read_order(0, None, False),
            "commands": lambda: self.read_command(0, None, False),
            "kept": lambda: self.find_kept(None),
            "order_lines": lambda: self.read_line(0, False, "answered"),
            "reservations": lambda: self.read_reservation(0, None, False),
            "answers": lambda: self.hear(0, None, False),
            "requests": lambda: self.reach_provider(0, False, False),
        }
        if not self.is_up:
            self.recover(self.near)
        for _ in range(1_000):
            under_way = self._under_way()
            name = next((name for name in self.habit if under_way[name]), None)
            if name is None:
                break
            steps[name]()
        else:
            raise AssertionError(f"no rest: {under_way}")
        for order_id in self.records:
            self._check_end(self.rows[order_id])

    def _check_end(self, order: Order) -> None:
        order_id = order.order_id
        assert is_over(order)
        assert (asks(order), [*sends(order)]) == (None, [])
        assert order_id not in self.in_hand
        assert self.published[order_id] == [status for status, _ in self.stories[order_id]]
        if order_id in self.cancelled:
            assert order.status is Status.CANCELLED
        standing = self.bank.standing[order_id] > 0
        paths = [self.moved.get((order_id, product_id), []) for product_id, _ in order.lines]
        if order.status is Status.CONFIRMED:
            assert standing or not order.total_cents
            assert all(path == ["hold", "commit"] for path in paths)
        elif order.paid_at is not None:
            assert order.reason == Reason.CANCELLED_BY_USER, (
                "a paid order ends otherwise only if its customer wants it to"
            )
            assert order.payment in (Payment.REFUNDED, Payment.REFUSED)
            assert all(path == ["hold", "commit", "return"] or path == ["hold", "release"] for path in paths)
        else:
            assert order.payment in (None, Payment.FAILED, Payment.VOIDED, Payment.REFUSED)
            assert (order.payment is None) == (order.reserved_at is None or not order.total_cents)
            assert order.payment is not Payment.FAILED or order.reason == Reason.PAYMENT_DECLINED
            if order.reason == Reason.PAYMENT_DECLINED and order.payment is not Payment.FAILED:
                assert self.bank.moods[order_id] != "good"
            assert all(path in ([], ["hold", "release"]) for path in paths)
        if order.status is Status.CANCELLED:
            # Of one that people had asked about again, an answer from before may have been the last that was heard.
            asked_again = not standing and order_id not in self.bank.keeps
            assert asked_again or standing == (order.payment is Payment.REFUSED)

    def teardown(self) -> None:
        if self.habit:
            self._come_to_rest()
            while self._to_cancel():
                self.cancel(0)
                self._come_to_rest()


@pytest.mark.parametrize("first", range(0, 800, 100))
def test_any_life_comes_to_its_end_whatever_crashes(first: int) -> None:
    """Of these lives each rule has as often a part as any other; they take no time, and cannot be made shorter."""
    for seed in range(first, first + 100):
        pick, life = Random(seed), Lives()
        placed = [
            Placed(
                pick.choice("ab"),
                pick.sample("cdeab", pick.randint(0, 3)),
                [pick.choice([1, 1, 2]) for _ in range(4)],
                accepts=pick.random() < 0.8,
                keeps=pick.random() < 0.2,
                mood=pick.choice(MOODS),
                unwanted=pick.choice([None, None, "", *Status]),
            )
            for _ in IDS
        ]
        life.begin(
            {product_id: pick.randint(0, 4) for product_id in OWNERS},
            placed,
            pick.sample(HABIT, len(HABIT)),
            pick.choice(CHOICES["near"]),
        )
        for _ in range(pick.randint(10, 80)):
            _, happen, names = pick.choice([one for one in STEPS if one[0](life)])
            happen(life, **{name: pick.choice(CHOICES[name]) for name in names})
            life.check()
        life.teardown()


def test_the_shortest_life_that_does_not_is_found() -> None:
    run_state_machine_as_test(
        Lives,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
