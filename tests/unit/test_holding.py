"""What the owner of products makes of lines: of its own homes' orders, of other homes' orders, in the order of arrival."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orderstream.agents.holding import NOTHING, Held, Settling, answer, settle
from orderstream.agents.intake import Arrival
from orderstream.agents.lifecycle import PRECEDENCE, LineHeld, LineRefused, LineSettled
from orderstream.agents.reserve import Fate, fate_of, once, under_locks
from orderstream.lua.gate import Counts, GateVerdict
from orderstream.streams.orders import Order, Reason, Status

OURS, FOREIGN = GateVerdict.TAKEN, GateVerdict.NOT_OURS

# Lines of other homes' orders

STEPS = """
held | hold | commit    | release   | return
h    | =    | c commit  | r release | n release
x    | =    | =         | =         | =
c    | =    | =         | =         | n return
r    | =    | =         | =         | =
n    | =    | =         | =         | =
"""


def steps() -> list[tuple[str, str, Settling]]:
    head, *rows = ([cell.strip() for cell in line.split("|")] for line in STEPS.strip().splitlines())
    return [
        (state, action, NOTHING if cell == "=" else Settling(*cell.split()))
        for state, *after in rows
        for action, cell in zip(head[1:], after, strict=True)
    ]


@pytest.mark.parametrize(("state", "action", "becomes"), steps())
def test_what_a_wish_makes_of_a_line(state: str, action: str, becomes: Settling) -> None:
    assert settle(Held(state, 5, None), action) == becomes


@given(st.lists(st.sampled_from(["hold", "commit", "release", "return"]), max_size=6), st.integers(0, 9))
@settings(derandomize=True, deadline=None)
def test_a_wish_that_comes_twice_counts_once(actions: list[str], twice: int) -> None:
    def end(actions: list[str]) -> tuple[str, list[str]]:
        held, moved = Held("h", 5, None), []
        for action in actions:
            becomes = settle(held, action)
            held = held._replace(state=becomes.state or held.state)
            moved += [becomes.movement] if becomes.movement else []
        assert moved in ([], ["commit"], ["release"], ["commit", "return"])
        return held.state, moved

    n = twice % (len(actions) + 1)
    assert end(actions) == end([*actions[:n], *actions[max(n - 1, 0) : n], *actions[n:]])


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (Held("h", 5, None), LineHeld("p", 5)),
        (Held("h", 0, None), LineHeld("p", 0)),
        (Held("x", None, Reason.USER_LIMIT), LineRefused("p", Reason.USER_LIMIT)),
        (Held("c", 5, None), LineSettled("p", "c")),
        (Held("r", 5, None), LineSettled("p", "r")),
        (Held("r", None, None), LineSettled("p", "r")),
        (Held("n", 5, None), LineSettled("p", "n")),
    ],
)
def test_a_home_hears_where_its_line_stands(held: Held, said: LineHeld | LineRefused | LineSettled) -> None:
    assert answer("p", held) == said


# Orders, by the verdicts on their lines


@pytest.mark.parametrize(
    ("verdicts", "fate"),
    [
        ([OURS], Fate(Status.RESERVED, None, "h", ())),
        ([OURS, OURS], Fate(Status.RESERVED, None, "hh", ())),
        ([OURS, FOREIGN], Fate(Status.CREATED, None, "ha", ())),
        (
            [GateVerdict.REFUSED],
            Fate(Status.CANCELLED, Reason.INSUFFICIENT_STOCK, "x", [Reason.INSUFFICIENT_STOCK]),
        ),
        ([GateVerdict.LIMITED], Fate(Status.CANCELLED, Reason.USER_LIMIT, "x", [Reason.USER_LIMIT])),
        (
            [OURS, FOREIGN, GateVerdict.LIMITED, Reason.UNKNOWN_PRODUCT],
            Fate(
                Status.CANCELLED,
                Reason.UNKNOWN_PRODUCT,
                "rrxx",
                [None, None, Reason.USER_LIMIT, Reason.UNKNOWN_PRODUCT],
            ),
        ),
    ],
)
def test_an_order_is_held_whole_waits_for_other_owners_or_is_refused(
    verdicts: list[GateVerdict | Reason], fate: Fate
) -> None:
    assert fate_of(verdicts) == fate


VERDICTS = st.lists(
    st.sampled_from([OURS, FOREIGN, GateVerdict.REFUSED, GateVerdict.LIMITED, *Reason]), min_size=1, max_size=6
)


@given(VERDICTS)
@settings(derandomize=True, deadline=None)
def test_the_reason_of_an_order_is_the_first_of_the_list(verdicts: list[GateVerdict | Reason]) -> None:
    fate = fate_of(verdicts)
    refused = {reason for reason in fate.reasons if reason is not None}
    assert fate.reason == (min(refused, key=PRECEDENCE.index) if refused else None)
    assert (fate.status is Status.CANCELLED) == bool(refused)
    assert len(fate.states) == len(verdicts)
    assert set(fate.states) <= ({"r", "x"} if refused else {"h", "a"})
    assert [reason is not None for reason in fate.reasons or [None] * len(verdicts)] == [c == "x" for c in fate.states]


# Orders, by what Postgres has

FOREIGN_PRODUCT, UNKNOWN_PRODUCT = "foreign", "unknown"
PRODUCTS = ["1", "2", "3"]
USERS = ["ann", "bob"]


class World(NamedTuple):
    """A batch of orders, and what Postgres has."""

    arrivals: list[Arrival]
    counts: dict[str, Counts]
    limits: dict[str, int]
    units: dict[tuple[str, str], int]


def world_of(size: int, seed: int) -> World:
    """Return a world in which some orders are held, and others find too few units, or a limit."""
    pick = Random(seed)
    arrivals = []
    for n in range(size):
        products = pick.sample([*PRODUCTS, *PRODUCTS, FOREIGN_PRODUCT, UNKNOWN_PRODUCT], pick.choice([1, 1, 2, 3]))
        lines = tuple((product_id, pick.choice([1, 1, 2, 3])) for product_id in dict.fromkeys(products))
        order = Order(f"o{n}", pick.choice(USERS), lines, "card", None, None)
        arrivals.append(Arrival(order, SimpleNamespace(), None))
    counts = {}
    for product_id in PRODUCTS:
        on_hand = pick.randint(0, 8)
        counts[product_id] = Counts(on_hand, pick.randint(0, on_hand // 2), version=1, generation=1)
    limits = {product_id: pick.randint(1, 4) for product_id in PRODUCTS if pick.random() < 0.5}
    units = {(product_id, user): pick.randint(0, most) for product_id, most in limits.items() for user in USERS[:1]}
    return World(arrivals, counts, limits, units)


WORLDS = st.builds(world_of, size=st.sampled_from([*range(9)]), seed=st.integers(0, 10_000))
every_world = settings(max_examples=200, derandomize=True, deadline=None)


def decided(world: World, redis: GateVerdict = GateVerdict.UNDECIDED) -> list[Fate]:
    """Return what becomes of these orders, whatever Redis said about lines at home."""
    said = [
        [FOREIGN if product_id == FOREIGN_PRODUCT else redis for product_id, _ in arrival.order.lines]
        for arrival in world.arrivals
    ]
    return under_locks(world.arrivals, said, world.counts, world.limits, world.units)


def held_of(arrivals: list[Arrival], fates: list[Fate]) -> list[tuple[str, str, int]]:
    """Return user, product and units of each line that is held."""
    return [
        (arrival.order.user_id, product_id, units)
        for arrival, fate in zip(arrivals, fates, strict=True)
        for (product_id, units), state in zip(arrival.order.lines, fate.states, strict=True)
        if state == "h"
    ]


@given(WORLDS)
@every_world
def test_no_more_is_held_than_there_is_or_than_a_user_may_have(world: World) -> None:
    held = held_of(world.arrivals, decided(world))
    for product_id, now in world.counts.items():
        assert sum(n for _, product, n in held if product == product_id) <= now.on_hand - now.reserved
    for product_id, most in world.limits.items():
        for user in {user for user, product, _ in held if product == product_id}:
            taken = sum(n for who, product, n in held if (who, product) == (user, product_id))
            assert world.units.get((product_id, user), 0) + taken <= most


@given(WORLDS)
@every_world
def test_an_order_is_held_whole_or_not_at_all(world: World) -> None:
    for arrival, fate in zip(world.arrivals, decided(world), strict=True):
        where = [product_id == FOREIGN_PRODUCT for product_id, _ in arrival.order.lines]
        match fate.status:
            case Status.CANCELLED:
                assert "h" not in fate.states
                assert "a" not in fate.states
            case Status.RESERVED:
                assert fate.states == "h" * len(where)
                assert not any(where)
            case _:
                assert fate.status is Status.CREATED
                assert [state == "a" for state in fate.states] == where
                assert any(where)


@given(WORLDS)
@every_world
def test_who_comes_later_changes_nothing_for_who_came_first(world: World) -> None:
    fates = decided(world)
    for n in range(len(world.arrivals)):
        assert decided(world._replace(arrivals=world.arrivals[:n])) == fates[:n]


@given(WORLDS, st.sampled_from([verdict for verdict in GateVerdict if verdict is not FOREIGN]))
@every_world
def test_postgres_decides_whatever_redis_said_and_what_it_has_stays_as_given(world: World, redis: GateVerdict) -> None:
    given_units = dict(world.units)
    assert decided(world, redis) == decided(world)
    assert world.units == given_units


def one_by_one(world: World) -> list[Reason | None]:
    """Return why each order is refused, if it is: what a shop would do with one customer after the other at its counter."""
    refusals: list[Reason | None] = []
    orders_held: list[Order] = []
    for arrival in world.arrivals:
        order, reasons = arrival.order, set()
        for product_id, wanted in order.lines:
            if product_id == FOREIGN_PRODUCT:
                continue
            if product_id not in world.counts:
                reasons.add(Reason.UNKNOWN_PRODUCT)
                continue
            before = [dict(o.lines).get(product_id, 0) for o in orders_held]
            mine = [dict(o.lines).get(product_id, 0) for o in orders_held if o.user_id == order.user_id]
            if world.counts[product_id].on_hand - world.counts[product_id].reserved - sum(before) < wanted:
                reasons.add(Reason.INSUFFICIENT_STOCK)
            elif (
                product_id in world.limits
                and world.units.get((product_id, order.user_id), 0) + sum(mine) + wanted > world.limits[product_id]
            ):
                reasons.add(Reason.USER_LIMIT)
        refusals.append(next((reason for reason in Reason if reason in reasons), None))
        if not reasons:
            orders_held.append(order)
    return refusals


@given(WORLDS)
@every_world
def test_a_batch_is_decided_as_one_order_after_the_other(world: World) -> None:
    fates = decided(world)
    assert [fate.reason for fate in fates] == one_by_one(world)


# Several arrivals of one id


def test_of_one_id_only_a_repeat_in_the_same_partition_is_dropped() -> None:
    def arrival(order_id: str, partition: int, product_id: str) -> Arrival:
        order = Order(order_id, "u", ((product_id, 1),), "card", None, None)
        return Arrival(order, SimpleNamespace(partition=partition), None)

    first, repeat, other, elsewhere = (
        arrival("o", 0, "a"),
        arrival("o", 0, "a"),
        arrival("o", 0, "b"),
        arrival("o", 1, "a"),
    )
    alone = arrival("p", 1, "a")
    assert once([first, repeat, other, alone, elsewhere]) == ({"o": first, "p": alone}, [other, elsewhere])
