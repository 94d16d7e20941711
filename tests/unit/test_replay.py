"""What orders and products must be, folded from the topics: repeats, reused ids, foreign partitions, dead letters."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orderstream.errors import InvalidRecord
from orderstream.jobs.reconcile.fold import CANCELLED, CONFIRMED, CREATED, PAID, RESERVED, UNSEEN, Fold, Move, Said
from orderstream.streams import events
from orderstream.streams.dead_letters import dead_letter
from orderstream.streams.orders import Limits, Order, decode, order_id_for_source
from orderstream.streams.partitions import product_partition

LIMITS = Limits(lines=3, quantity=100, size_bytes=4_096)
PARTITIONS = 4
AT = datetime(2026, 1, 1, tzinfo=UTC)
IDS = [str(uuid.UUID(int=n)) for n in range(1, 6)]


class Record(NamedTuple):
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Iterable[tuple[str, bytes]] = ()
    timestamp: int = 0


def fold() -> Fold:
    return Fold(LIMITS, PARTITIONS, lambda name: f"p.{name}")


def order(order_id: str | None = IDS[0], *items: tuple[Any, int], user: Any = "u", **more: Any) -> bytes:
    body = {
        "user_id": user,
        "items": [{"product_id": p, "quantity": q} for p, q in items or (("1", 2),)],
        "payment_method": "card",
        **({"order_id": order_id} if order_id else {}),
        **more,
    }
    return orjson.dumps(body)


HOME = product_partition("1", PARTITIONS)
ABROAD = (HOME + 1) % PARTITIONS


def orders(folded: Fold, *values: bytes | None, partition: int = HOME, start: int = 0) -> Fold:
    folded.take("p.orders", partition, [Record(start + n, b"k", value) for n, value in enumerate(values)])
    return folded


def publish(folded: Fold, *values: bytes) -> Fold:
    folded.take("p.order-events", 0, [Record(n, b"k", value) for n, value in enumerate(values)])
    return folded


def test_what_a_former_owner_tells_late_does_not_count() -> None:
    folded = fold()
    told = [
        (7, events.created(IDS[0], AT, "u", (("1", 2),))),
        (8, events.created(IDS[0], AT, "u", (("1", 2),))),
        (8, events.cancelled(IDS[0], AT, "expired")),
        (7, events.reserved(IDS[0], AT, 100)),
    ]
    for n, (claim, event) in enumerate(told):
        folded.take("p.order-events", 0, [Record(n, b"k", event, [("lane", b"%d:1" % claim)])])
    folded.take("p.order-events", 1, [Record(0, b"k", events.created(IDS[1], AT, "u", ()), [("lane", b"3:9")])])
    folded.take("p.order-events", 2, [Record(0, None, None, [("lane", b"9:1")])])  # a claim alone: nothing is told yet
    folded.take("p.order-events", 2, [Record(1, b"k", events.created(IDS[2], AT, "u", ()), [("lane", b"8:7")])])
    assert folded.orders[IDS[0]].published == CREATED | CANCELLED
    assert folded.orders[IDS[1]].published == CREATED, "of another home"
    assert IDS[2] not in folded.orders
    assert folded.claims == {0: 8, 1: 3, 2: 9}


def reject(folded: Fold, topic: str, partition: int, *offsets: int) -> Fold:
    fault = InvalidRecord("order_id_reused", "x")
    letters = [
        dead_letter(
            fault,
            topic=topic,
            partition=partition,
            offset=n,
            timestamp=0,
            key=b"k",
            value=b"v",
            headers=[("own", b"h")],
        )
        for n in offsets
    ]
    folded.take("p.dead-letters", 0, [Record(n, *letter) for n, letter in enumerate(letters)])
    folded.reject()
    return folded


# Orders


def test_an_order_is_what_its_first_record_says_and_a_repeat_changes_nothing() -> None:
    folded = orders(fold(), order(), order(), order())
    trace = folded.orders[IDS[0]]
    assert (trace.user_id, trace.method, trace.lines) == ("u", "card", (("1", 2),))
    assert (trace.partition, trace.offset, trace.rivals) == (HOME, 0, None)
    assert folded.records == 3


def test_ids_follow_the_rules_of_the_stages() -> None:
    folded = orders(fold(), order(IDS[1].upper()), order(None), order(None, user=7, idempotency_key="k"))
    assert IDS[1] in folded.orders
    assert order_id_for_source("p.orders", HOME, 1, 0) in folded.orders
    keyed = decode(
        order(None, user=7, idempotency_key="k"), LIMITS, topic="p.orders", partition=0, offset=9, timestamp=0
    )
    assert folded.orders[keyed.order_id].user_id == "7"


def test_another_order_under_a_known_id_counts_only_when_the_first_is_a_dead_letter() -> None:
    for dead, user in ((0, "v"), (1, "u")):
        folded = reject(orders(fold(), order(), order(user="v")), "p.orders", HOME, dead)
        assert folded.orders[IDS[0]].user_id == user


def test_a_dead_letter_is_no_order_whichever_topic_is_read_first() -> None:
    assert reject(orders(fold(), order()), "p.orders", HOME, 0).orders == {}
    late = orders(reject(fold(), "p.orders", HOME, 0), order())
    late.reject()
    assert late.orders == {}
    elsewhere = reject(orders(fold(), order()), "p.stock-commands", HOME, 0)
    assert [*elsewhere.orders] == IDS[:1]


def test_a_record_in_a_foreign_partition_counts_where_it_is_sent_on_to() -> None:
    folded = orders(fold(), order(), partition=ABROAD, start=5)
    assert folded.orders[IDS[0]].astray
    orders(folded, order())
    assert (folded.orders[IDS[0]].partition, folded.orders[IDS[0]].astray) == (HOME, False)
    orders(folded, order(), partition=ABROAD, start=6)
    assert folded.orders[IDS[0]].partition == HOME


def test_events_may_be_read_before_the_record_and_the_first_of_each_status_counts() -> None:
    folded = publish(
        fold(),
        events.created(IDS[0], AT, "u", [("1", 2)]),
        events.reserved(IDS[0], AT, 200),
        events.paid(IDS[0], AT, 200, "c-1"),
        events.paid(IDS[0], AT, 300, "c-2"),
        events.confirmed(IDS[0], AT),
        events.created(IDS[0], AT, "u", [("1", 2)]),
    )
    trace = folded.orders[IDS[0]]
    assert trace.partition == UNSEEN
    orders(folded, order())
    assert trace.partition == HOME
    assert trace.published == CREATED | RESERVED | PAID | CONFIRMED
    assert (trace.last, trace.total_cents, trace.charge_id) == ("CONFIRMED", 200, "c-1")


def test_an_order_of_several_lines_has_the_prices_that_were_told_first() -> None:
    folded = publish(
        fold(),
        events.reserved(IDS[0], AT, 250, [100, 50]),
        events.reserved(IDS[0], AT, 250, [99, 52]),
        events.reserved(IDS[1], AT, 200),
    )
    assert [folded.orders[order_id].prices for order_id in IDS[:2]] == [[100, 50], None]


def test_a_cancelled_order_has_its_reason() -> None:
    trace = publish(fold(), events.cancelled(IDS[0], AT, "expired"), events.cancelled(IDS[0], AT, "cancelled_by_user"))
    assert (trace.orders[IDS[0]].published, trace.orders[IDS[0]].reason) == (CANCELLED, "expired")


def test_what_is_no_order_is_counted_by_its_place() -> None:
    folded = orders(fold(), b"{", None, order(IDS[0], ("1", 101)), order(IDS[0], ("1", 0)), order(IDS[2]))
    assert [*folded.orders] == [IDS[2]]
    assert folded.invalid == {HOME: {0, 1, 2, 3}}


VALUES: st.SearchStrategy[Any] = st.sampled_from(
    ["1", "2", "x" * 64, "x" * 65, "", " 1", "a\x01", 1, 0, -1, 2**63, True, 1.0, None, [], "é"]
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "order_id": st.sampled_from([*IDS[:2], IDS[0].upper(), "no", 5, None, "{" + IDS[0] + "}"]),
        "user_id": VALUES,
        "payment_method": VALUES,
        "idempotency_key": VALUES,
        "placed_at": st.sampled_from(["2026-01-01T00:00:00Z", "soon", None]),
        "more": VALUES,
        "items": st.lists(
            st.fixed_dictionaries(
                {"product_id": VALUES, "quantity": st.sampled_from([1, 2, 100, 101, 0, True, 1.0, "1"])}
            )
            | VALUES,
            max_size=3,
        )
        | VALUES,
    },
)
SOUND = {"user_id": "u", "items": [{"product_id": "1", "quantity": 2}], "payment_method": "card"}


@given(st.lists(st.tuples(FIELDS, st.booleans()), max_size=8))
@settings(max_examples=300)
def test_what_the_stages_take_is_folded_as_they_take_it(bodies: list[tuple[dict[str, Any], bool]]) -> None:
    """A record that the stages refuse may pass here (its dead letter takes it out again); none may be read otherwise."""
    for n, (fields, sound) in enumerate(bodies):
        value = orjson.dumps({**SOUND, **fields} if sound else fields)
        folded = orders(fold(), value, start=n)
        try:
            taken = decode(value, LIMITS, topic="p.orders", partition=HOME, offset=n, timestamp=0)
        except InvalidRecord:
            assert len(folded.orders) <= 1
            continue
        ((order_id, trace),) = folded.orders.items()
        assert (order_id, trace.user_id, trace.method, trace.lines) == (
            taken.order_id,
            taken.user_id,
            taken.payment_method,
            taken.lines,
        )


STEPS = {
    "CREATED": lambda i: events.created(i, AT, "u", [("1", 2)]),
    "RESERVED": lambda i: events.reserved(i, AT, 200),
    "PAID": lambda i: events.paid(i, AT, 200, f"c-{i}"),
    "CONFIRMED": lambda i: events.confirmed(i, AT),
}


@given(st.lists(st.tuples(st.sampled_from(IDS), st.integers(0, 4), st.integers(1, 3)), max_size=12), st.integers())
def test_the_order_in_which_topics_are_read_and_repeats_change_nothing(
    lives: list[tuple[str, int, int]], seed: int
) -> None:
    rng = random.Random(seed)
    known = {order_id: steps for order_id, steps, _ in lives}
    pieces = []
    for order_id, _, repeats in lives:
        published = [STEPS[name](order_id) for name in list(STEPS)[: known[order_id]]]
        pieces += [("p.orders", order(order_id))] * repeats
        pieces += [("p.order-events", value) for value in published] * repeats
    rng.shuffle(pieces)
    folded = fold()
    for n, (topic, value) in enumerate(pieces):
        folded.take(topic, HOME, [Record(n, b"k", value)])
    folded.reject()
    assert {i: (t.published, t.last, t.lines) for i, t in folded.orders.items()} == {
        i: ((1 << steps) - 1, [None, *STEPS][steps], (("1", 2),)) for i, steps in known.items()
    }


# Commands


def stock(folded: Fold, *bodies: dict[str, Any], partition: int = HOME, start: int = 0) -> Fold:
    records = [
        Record(start + n, b"1", orjson.dumps({"product_id": "1", "command_id": IDS[0], **body}))
        for n, body in enumerate(bodies)
    ]
    folded.take("p.stock-commands", partition, records)
    return folded


RECEIVE = {"command": "receive", "quantity": 5}


def test_stock_commands_are_kept_by_id_with_each_of_their_records() -> None:
    folded = stock(fold(), RECEIVE, RECEIVE, {"command": "adjust", "quantity": -1, "reason": "x", "command_id": IDS[1]})
    assert folded.moves == {
        IDS[0]: [Move("1", "receive", 5, 5, "", None, HOME, 0), Move("1", "receive", 5, 5, "", None, HOME, 1)],
        IDS[1]: [Move("1", "adjust", -1, -1, "x", None, HOME, 2)],
    }
    reject(folded, "p.stock-commands", HOME, 1)
    assert [folded.is_dead(move) for move in folded.moves[IDS[0]]] == [False, True]


def test_of_a_set_two_records_say_what_was_wanted_and_what_came_of_it() -> None:
    wanted = {"command": "set", "quantity": 20, "reason": "counted"}
    folded = stock(fold(), wanted, wanted | {"change": -3})
    assert folded.moves == {
        IDS[0]: [
            Move("1", "set", None, 20, "counted", None, HOME, 0),
            Move("1", "set", -3, 20, "counted", None, HOME, 1),
        ]
    }


def test_a_stock_command_that_moves_nothing_here_is_left_out() -> None:
    folded = stock(
        fold(), {"command": "recount"}, {"command": "product", "name": "x"}, {"command": "receive", "quantity": 0}
    )
    stock(folded, RECEIVE, partition=ABROAD)
    assert folded.moves == {}
    assert folded.catalogue == {"1": [Said(IDS[0], HOME, 1, "name", "x")]}


def test_cancels_of_orders_are_remembered_with_their_place() -> None:
    folded = fold()
    values = [
        {"command": "cancel", "order_id": IDS[0].upper()},
        {"command": "no"},
        {"command": "expire", "order_id": IDS[1]},
    ]
    folded.take("p.order-commands", 2, [Record(n, b"k", orjson.dumps(value)) for n, value in enumerate(values)])
    assert folded.asked == {IDS[0]: (2, 0)}, "no timer of a home writes commands any more"


# Dead letters


@pytest.mark.parametrize("headers", [[], [("source-topic", b"p.orders")], [("source-topic", None), ("reason", b"x")]])
def test_a_dead_letter_without_a_place_names_no_record(headers: list[tuple[str, bytes]]) -> None:
    folded = fold()
    folded.take("p.dead-letters", 0, [Record(0, None, b"v", headers)])
    assert folded.dead == {}


def test_a_strangers_header_does_not_hide_the_place() -> None:
    folded = fold()
    story = [
        ("source-topic", b"p.orders"),
        ("source-partition", b"1"),
        ("source-offset", b"2"),
        ("source-offset", b"9"),
    ]
    folded.take("p.dead-letters", 0, [Record(0, None, b"v", story)])
    assert folded.dead == {("p.orders", 1): {2}}


def test_an_order_of_several_lines_is_the_same_in_any_order_of_them() -> None:
    folded = orders(fold(), order(IDS[0], ("1", 1), ("2", 2)))
    taken = Order(IDS[0], "u", (("2", 2), ("1", 1)), "card", None, None)
    assert folded.orders[IDS[0]].same(taken.user_id, taken.payment_method, taken.lines)
    assert not folded.orders[IDS[0]].same("u", "card", (("1", 1),))
