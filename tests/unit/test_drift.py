"""What is drift, what may be the pipeline at work: the pure comparison, case by case."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from itertools import product as combinations
from typing import Any

import pytest

from orderstream.agents.lifecycle import Order, Payment
from orderstream.agents.lifecycle import is_over as is_over_at_home
from orderstream.jobs.reconcile.drift import (
    AGAIN,
    CANCEL,
    HOLDS,
    NOTHING,
    ROWS,
    WAITS,
    Finding,
    ProductView,
    Progress,
    Sums,
    is_over,
    judge_order,
    judge_product,
    line_states,
    units,
)
from orderstream.jobs.reconcile.fold import BITS, CANCELLED, CONFIRMED, CREATED, PAID, RESERVED, UNSEEN, Trace
from orderstream.lua.gate import GateState
from orderstream.settings import Settings
from orderstream.sql.differences import Kind
from orderstream.streams.orders import Status
from orderstream.streams.partitions import product_partition
from orderstream.streams.topics import ORDERS, RESERVATIONS, TOPICS

SETTINGS = Settings(_env_file=None, partitions=2, hold_ttl_s=600)
OWNER = product_partition("1", 2)
ID = str(uuid.UUID(int=1))
WHOLE = CREATED | RESERVED | PAID | CONFIRMED


def progress(bar: int | None = 10, partition: int = 0, **behind: int) -> Progress:
    """Return workers that have passed everything, but for the topics of a partition that are named with their offset."""
    committed = {(spec.name, p): 10 for spec in TOPICS for p in range(2)}
    committed |= {(name.replace("_", "-"), partition): offset for name, offset in behind.items()}
    return Progress(SETTINGS, committed, None if bar is None else dict.fromkeys(committed, bar), 30.0)


def trace(published: int = WHOLE, **more: Any) -> Trace:
    one = Trace("u", "card", (("1", 2),), 0, 5)
    one.published = published
    if published & (RESERVED | PAID):
        one.total_cents = 200
    if published & PAID:
        one.charge_id = "c"
    if published & CANCELLED:
        one.reason = "expired"
    for name, value in more.items():
        setattr(one, name, value)
    return one


STORIES = {
    "CREATED": CREATED,
    "RESERVED": CREATED | RESERVED,
    "PAID": CREATED | RESERVED | PAID,
    "CONFIRMED": WHOLE,
    "CANCELLED": CREATED | RESERVED | CANCELLED,
}


def row(status: str = "CONFIRMED", states: str = "c", **more: Any) -> dict[str, Any]:
    paid = status in ("PAID", "CONFIRMED")
    return {
        "home": 0,
        "source_offset": 5,
        "status": status,
        "story": STORIES[status],
        "reason": "expired" if status == "CANCELLED" else None,
        "user_id": "u",
        "payment_method": "card",
        "total_cents": None if status == "CREATED" else 200,
        "costs": None if status == "CREATED" else more.get("total_cents", 200),
        "prices": [100],
        "age_s": 1.0,
        "moved_s": 1.0,
        "payment": "SUCCESS" if paid else "VOIDED" if status == "CANCELLED" else None,
        "charge_id": "c" if paid else None,
        "product_ids": ["1"],
        "quantities": [2],
        "states": states,
        "owners": None,
        "waits": status not in ("CONFIRMED", "CANCELLED"),
        "kept": False,
        "held_ids": None,
        "held_states": None,
        "held_quantities": None,
        "held_prices": None,
        **more,
    }


def abroad(status: str, state: str, held: str, **more: Any) -> dict[str, Any]:
    """Return the row of an order whose line is another partition's, which has it as ``held``; "" for not at all."""
    lines = {"held_ids": ["1"], "held_states": held, "held_quantities": [2], "held_prices": [100]} if held else {}
    return row(status, state, **{"owners": [1], "waits": True, **lines, **more})


def judge(
    traced: Trace,
    there: dict[str, Any] | None,
    far: Progress | None = None,
    *,
    asked: bool = False,
    cut: bool = False,
) -> list[Finding]:
    return judge_order(ID, traced, there, far or progress(), asked=asked, cut=cut)


def kinds(found: list[Finding]) -> list[str]:
    return [finding.difference.kind for finding in found]


def only(found: list[Finding]) -> Finding:
    (finding,) = found
    return finding


# Orders

CANCELLED_ROW = row("CANCELLED", "r")
REVOKED_ROW = row(
    "CANCELLED",
    "n",
    reason="cancelled_by_user",
    story=WHOLE | CANCELLED,
    payment="REFUNDED",
    charge_id="c",
)


@pytest.mark.parametrize(
    ("published", "there"),
    [
        (WHOLE, row()),
        (CREATED, abroad("CREATED", "a", "")),
        (CREATED, abroad("CREATED", "x", "x")),
        (CREATED | RESERVED, row("RESERVED", "h")),
        (CREATED | RESERVED | PAID, abroad("PAID", "g", "h")),
        (CREATED | RESERVED | PAID, abroad("PAID", "c", "c")),
        (CREATED | RESERVED | CANCELLED, CANCELLED_ROW),
        (CREATED | RESERVED | CANCELLED, {**CANCELLED_ROW, "payment": "VOID_DUE", "waits": True}),
        (CREATED | RESERVED | CANCELLED, {**CANCELLED_ROW, "payment": "REFUSED"}),
        (CREATED | CANCELLED, {**CANCELLED_ROW, "story": CREATED | CANCELLED, "payment": None, "total_cents": None}),
        (CREATED | RESERVED | CANCELLED, {**CANCELLED_ROW, "total_cents": 200, "states": "r", "payment": "VOIDED"}),
        (CREATED | CANCELLED, abroad("CANCELLED", "l", "", story=CREATED | CANCELLED, payment=None)),
    ],
)
def test_what_fits_is_not_found(published: int, there: dict[str, Any]) -> None:
    assert judge(trace(published), there) == []


@pytest.mark.parametrize(
    ("published", "there", "kind"),
    [
        (WHOLE, abroad("PAID", "g", "h"), Kind.ORDER_STATUS),
        (CREATED | RESERVED, row("CREATED", "h", total_cents=200), Kind.ORDER_STATUS),
        (CREATED | RESERVED | PAID, row("CANCELLED", "r", payment="SUCCESS", charge_id="c"), Kind.ORDER_STATUS),
        (CREATED | RESERVED | CANCELLED, row(), Kind.ORDER_STATUS),
        (CREATED | RESERVED | CANCELLED, {**CANCELLED_ROW, "reason": "cancelled_by_user"}, Kind.ORDER_STATUS),
        (WHOLE, row(user_id="v"), Kind.ORDER_RECORD),
        (WHOLE, row(payment_method="cash"), Kind.ORDER_RECORD),
        (WHOLE, row(total_cents=100), Kind.ORDER_RECORD),
        (WHOLE, row(quantities=[3]), Kind.ORDER_LINES),
        (WHOLE, row(product_ids=["2"]), Kind.ORDER_LINES),
        (WHOLE, row(states="h"), Kind.ORDER_LINES),
        (CREATED | RESERVED | PAID, row("PAID", "g"), Kind.ORDER_LINES),
        (CREATED | RESERVED | CANCELLED, row("CANCELLED", "c"), Kind.ORDER_LINES),
        (CREATED | RESERVED | CANCELLED, row("CANCELLED", "h"), Kind.ORDER_LINES),
        (WHOLE, row(charge_id="another"), Kind.PAYMENT),
        (WHOLE, row(payment=None), Kind.PAYMENT),
        (CREATED | RESERVED | CANCELLED, {**CANCELLED_ROW, "payment": "SUCCESS", "charge_id": "c"}, Kind.PAYMENT),
        (CREATED | RESERVED | CANCELLED, {**CANCELLED_ROW, "payment": None}, Kind.PAYMENT),
        (CREATED | RESERVED, row("RESERVED", "h", payment="SUCCESS", charge_id="c"), Kind.PAYMENT),
    ],
)  # fmt: skip
def test_what_the_pipeline_never_does_is_drift_at_once(published: int, there: dict[str, Any], kind: str) -> None:
    found = judge(trace(published), there, progress(bar=None))
    assert (kind, None) in [(f.difference.kind, f.in_flight) for f in found]
    assert all(f.difference.repair == ROWS for f in found if f.difference.kind == kind)


@pytest.mark.parametrize(("status", "state"), [("RESERVED", "h"), ("CONFIRMED", "c"), ("CANCELLED", "r")])
def test_lines_of_an_order_that_was_held_cost_its_total(status: str, state: str) -> None:
    for costs in (0, 100, None):
        there = row(status, state, costs=costs)
        finding = only(judge(trace(there["story"]), there, progress(bar=None)))
        assert finding.in_flight is None
        assert finding.difference[0] == Kind.ORDER_RECORD
        assert finding.difference[2:] == ({"lines_cost": 200}, {"lines_cost": costs}, ROWS)
        assert kinds(judge(trace(there["story"], total_cents=None), there)) == [Kind.ORDER_RECORD]
    refused = {**CANCELLED_ROW, "story": CREATED | CANCELLED, "payment": None, "total_cents": None, "costs": 100}
    assert judge(trace(CREATED | CANCELLED), refused) == []


def test_a_line_costs_at_its_owner_what_it_does_at_home() -> None:
    there = abroad("CONFIRMED", "c", "c", held_prices=[90])
    finding = only(judge(trace(WHOLE), there))
    assert finding.difference[0] == Kind.ORDER_HOLDS
    assert finding.difference[2:] == ({"1": "at 100"}, {"1": "at 90"}, HOLDS)
    for unknown in ({"held_prices": [None]}, {"prices": [None]}):
        assert judge(trace(WHOLE), abroad("CONFIRMED", "c", "c", **unknown)) == []
    both = only(judge(trace(WHOLE), abroad("CONFIRMED", "c", "h", held_prices=[90])))
    assert (both.difference.must, both.difference.found) == ({"1": "committed"}, {"1": "held"})


def test_a_paid_order_may_be_cancelled_by_its_customer_only() -> None:
    back = trace(WHOLE | CANCELLED, reason="cancelled_by_user")
    assert judge(back, REVOKED_ROW) == []
    assert judge(back, {**REVOKED_ROW, "payment": "REFUND_DUE", "waits": True}) == []
    paid = {**REVOKED_ROW, "story": WHOLE & ~CONFIRMED | CANCELLED}
    assert judge(trace(WHOLE & ~CONFIRMED | CANCELLED, reason="cancelled_by_user"), paid) == []
    assert kinds(judge(trace(WHOLE | CANCELLED), REVOKED_ROW)) == [Kind.ORDER_STATUS], "of two ends"
    assert kinds(judge(trace(WHOLE), {**REVOKED_ROW, "reason": "expired"}))[0] == Kind.ORDER_STATUS
    assert kinds(judge(back, row()))[0] == Kind.ORDER_STATUS
    assert kinds(judge(back, {**REVOKED_ROW, "payment": "SUCCESS"})) == [Kind.PAYMENT]
    assert kinds(judge(back, {**REVOKED_ROW, "charge_id": "another"})) == [Kind.PAYMENT]
    assert kinds(judge(back, {**REVOKED_ROW, "states": "x"})) == [Kind.ORDER_LINES]


def test_a_declined_order_has_a_failed_payment_or_one_that_goes_back() -> None:
    traced = trace(CREATED | RESERVED | CANCELLED, reason="payment_declined")
    there = {**CANCELLED_ROW, "reason": "payment_declined"}
    assert kinds(judge(traced, {**there, "payment": None})) == [Kind.PAYMENT]
    for payment in ("FAILED", "VOIDED"):
        assert judge(traced, {**there, "payment": payment}) == []


def test_a_free_order_has_no_charge_to_give_back() -> None:
    ended = trace(CREATED | RESERVED | CANCELLED, total_cents=0)
    assert judge(ended, {**CANCELLED_ROW, "total_cents": 0, "costs": 0, "payment": None}) == []
    back = trace(WHOLE | CANCELLED, reason="cancelled_by_user", total_cents=0)
    assert judge(back, {**REVOKED_ROW, "total_cents": 0, "costs": 0}) == []


def test_a_record_that_the_group_has_not_passed_is_in_flight_however_old() -> None:
    assert only(judge(trace(0), None, progress(orders=5))).in_flight == "orders/0"
    finding = only(judge(trace(0), None, progress(orders=6, bar=6)))
    assert (finding.difference.kind, finding.in_flight, finding.difference.repair) == (Kind.ORDER_MISSING, None, AGAIN)


def test_an_order_with_events_had_its_row_whatever_the_workers_have_still_to_read() -> None:
    finding = only(judge(trace(WHOLE), None, progress(bar=None, orders=5)))
    assert (finding.difference.kind, finding.in_flight, finding.difference.repair) == (Kind.ORDER_MISSING, None, ROWS)
    assert only(judge(trace(0), None, progress(orders=5))).in_flight == "orders/0"


def test_a_missing_order_with_more_events_gets_its_row_back_instead_of_being_decided_again() -> None:
    assert only(judge(trace(WHOLE), None)).difference.repair == ROWS
    assert only(judge(trace(CREATED | CANCELLED), None)).difference.repair == ROWS
    unknown = only(judge(trace(WHOLE, partition=UNSEEN), None)).difference
    assert unknown.repair.startswith("none")


@pytest.mark.parametrize("status", ["CREATED", "RESERVED", "PAID", "CONFIRMED"])
def test_an_event_is_missing_once_nothing_of_its_order_is_under_way(status: str) -> None:
    there = abroad("CONFIRMED", "c", "c", waits=False)
    published = WHOLE & ~BITS[status]
    finding = only(judge(trace(published), there))
    assert (finding.difference.kind, finding.in_flight, finding.difference.repair) == (
        Kind.ORDER_EVENT_MISSING,
        None,
        AGAIN,
    )
    for behind in ("orders", "reservations", "order_commands"):
        assert only(judge(trace(published), there, progress(**{behind: 9}))).in_flight is not None
        assert only(judge(trace(published), there, progress(partition=1, **{behind: 9}))).in_flight is None
    assert only(judge(trace(published), there, progress(partition=1, order_lines=9))).in_flight == "order-lines/1"
    assert only(judge(trace(published), there, progress(bar=None))).in_flight is not None
    assert only(judge(trace(published), {**there, "waits": True})).in_flight == WAITS
    assert only(judge(trace(published), {**there, "waits": True, "moved_s": 631})).in_flight is None


def test_an_order_that_went_on_differs_in_another_way_and_a_product_in_the_same() -> None:
    before = only(judge(trace(0), row("RESERVED", "h", waits=True))).difference
    now = only(judge(trace(CREATED | RESERVED), row())).difference
    assert (before.kind, before.subject) == (now.kind, now.subject)
    assert before.key != now.key
    moved = [only(judge_product(view(product(on_hand=n)), progress())).difference.key for n in (60, 61)]
    assert moved[0] == moved[1]


def test_events_that_retention_may_have_taken_are_not_missed() -> None:
    assert judge(trace(PAID | CONFIRMED), row(), cut=True) == []
    assert kinds(judge(trace(CREATED), row(), cut=True)) == [Kind.ORDER_EVENT_MISSING]


@pytest.mark.parametrize(
    ("there", "stuck"),
    [
        (abroad("CREATED", "a", "", age_s=629, moved_s=629), False),
        (abroad("CREATED", "a", "", age_s=631, moved_s=631), True),
        (abroad("CREATED", "a", "", waits=False, moved_s=29), False),
        (abroad("CREATED", "a", "", waits=False, moved_s=31), True),
        (row("RESERVED", "h", age_s=629), False),
        (row("RESERVED", "h", age_s=631), True),
        (row("RESERVED", "h", waits=False, moved_s=31), True),
        (abroad("PAID", "g", "h", age_s=900, moved_s=629), False),
        (abroad("PAID", "g", "h", age_s=900, moved_s=631), True),
        (abroad("CANCELLED", "l", "h", waits=False, moved_s=31), True),
        ({**CANCELLED_ROW, "payment": "VOID_DUE", "moved_s": 31}, True),
        ({**CANCELLED_ROW, "payment": "VOID_DUE", "moved_s": 9_000, "waits": True}, False),  # the provider is asked
        (row(age_s=9_000, moved_s=9_000), False),
    ],
)
def test_an_order_is_stuck_when_it_is_late_and_nothing_of_it_is_under_way(there: dict[str, Any], stuck: bool) -> None:
    found = judge(trace(there["story"]), there)
    assert kinds(found) == [Kind.ORDER_STUCK] * stuck
    for finding in found:
        assert (finding.in_flight, finding.difference.repair) == (None, AGAIN)
        assert only(judge(trace(there["story"]), there, progress(reservations=9))).in_flight == f"{RESERVATIONS.name}/0"


def test_a_cancel_that_the_group_is_done_with_has_ended_its_order_or_is_kept() -> None:
    for there in (row("RESERVED", "h"), row()):
        traced = trace(there["story"])
        assert judge(traced, there) == []
        finding = only(judge(traced, there, asked=True))
        assert (finding.difference.kind, finding.in_flight, finding.difference.repair) == (
            Kind.ORDER_STUCK,
            None,
            CANCEL,
        )
        assert only(judge(traced, there, progress(order_commands=9), asked=True)).in_flight == "order-commands/0"
        assert judge(traced, {**there, "kept": True}, asked=True) == []
    assert judge(trace(CREATED | RESERVED | CANCELLED), CANCELLED_ROW, asked=True) == []


@pytest.mark.parametrize(
    ("status", "state", "fitting"),
    [
        ("CREATED", "a", ["", "h", "x"]),
        ("CREATED", "x", ["x"]),
        ("RESERVED", "h", ["h"]),
        ("PAID", "g", ["h", "c"]),
        ("CONFIRMED", "c", ["c"]),
        ("CANCELLED", "l", ["", "h", "x", "r"]),
        ("CANCELLED", "r", ["x", "r"]),
        ("CANCELLED", "b", ["h", "c", "n"]),
        ("CANCELLED", "n", ["n"]),
    ],
)
def test_an_owner_has_a_line_as_its_home_can_have_asked_for_it(status: str, state: str, fitting: list[str]) -> None:
    for held in ("", "h", "x", "c", "r", "n"):
        revoked = (
            {name: REVOKED_ROW[name] for name in ("story", "reason", "payment", "charge_id")} if state in "bn" else {}
        )
        there = abroad(status, state, held, **revoked)
        traced = trace(there["story"], reason=there["reason"])
        found = judge(traced, there)
        assert kinds(found) == [Kind.ORDER_HOLDS] * (held not in fitting), held
        for finding in found:
            assert (finding.in_flight, finding.difference.repair) == (None, HOLDS)
            assert only(judge(traced, there, progress(partition=1, order_lines=9))).in_flight == "order-lines/1"


def test_an_owner_holds_as_many_units_as_its_home_has_asked_for() -> None:
    found = judge(trace(CREATED | RESERVED), abroad("RESERVED", "h", "h", held_quantities=[3]))
    assert kinds(found) == [Kind.ORDER_HOLDS]


def test_what_is_over_here_is_over_at_home() -> None:
    """The comparison reads rows, a home reads orders: both have to say the same."""
    now = datetime.now(UTC)
    for status, payment, states in combinations(
        Status, [None, *Payment], ("h", "a", "g", "c", "l", "r", "b", "n", "x")
    ):
        order = Order(ID, 0, "u", "card", (("1", 2),), status, states, now, payment=payment, owners=(1,))
        assert is_over({"status": status, "payment": payment, "states": states}) == is_over_at_home(order)


def test_units_are_those_that_the_events_say_then_those_of_the_snapshot() -> None:
    def of(traced: Trace, there: dict[str, Any] | None, held: str = "") -> list[tuple[str, int, int]]:
        return [*units(traced, there, {"1": (held, 2)} if held else {}, 2)]

    assert of(trace(WHOLE), row("PAID", "c")) == [("1", 2, 0)]
    assert of(trace(WHOLE), None) == [("1", 2, 0)]
    assert of(trace(CREATED | RESERVED), None) == [("1", 0, 2)]
    assert of(trace(0), None) == []
    assert of(trace(CREATED), row("RESERVED", "h")) == [("1", 0, 2)]
    assert of(trace(CREATED | PAID), row("CONFIRMED", "c")) == [("1", 2, 0)]
    assert of(trace(CREATED | CANCELLED), row("CONFIRMED", "c")) == []
    assert of(trace(WHOLE), REVOKED_ROW) == []
    assert of(trace(WHOLE), {**REVOKED_ROW, "reason": "expired"}) == [("1", 2, 0)], "as the events say"
    # Lines of other owners are counted as these have them, until one is put right.
    assert of(trace(CREATED | RESERVED | PAID), abroad("PAID", "g", "h"), "h") == [("1", 0, 2)]
    assert of(trace(CREATED | RESERVED | PAID), abroad("PAID", "g", "c"), "c") == [("1", 2, 0)]
    assert of(trace(CREATED | RESERVED | CANCELLED), abroad("CANCELLED", "r", "h"), "h") == [("1", 0, 2)]


@pytest.mark.parametrize(
    ("status", "revoked", "held", "states"),
    [
        ("CREATED", False, [None, "h", "x"], "hahx"),
        ("RESERVED", False, ["h", "h", "h"], "hhhh"),
        ("PAID", False, ["h", "c", None], "cgcg"),
        ("CONFIRMED", False, ["c", "c", "c"], "cccc"),
        ("CANCELLED", False, [None, "h", "r"], "rllr"),
        ("CANCELLED", True, ["h", "c", "n"], "nbbn"),
    ],
)
def test_an_order_that_is_put_back_asks_its_owners_for_what_they_have_not_done(
    status: str, revoked: bool, held: list[str | None], states: str
) -> None:
    foreign = [False, True, True, True]
    assert line_states(status, foreign, [None, *held], revoked=revoked, refused=False) == states


def test_of_two_orders_under_one_id_that_one_counts_which_postgres_has() -> None:
    """The record of the other one is read first, and its dead letter is still to come."""
    other = trace(CREATED | RESERVED, lines=(("9", 7),), partition=1, offset=3)
    other.rivals = [trace()]
    there = row("RESERVED", "h")
    found = only(judge(other, there, progress(orders=3, partition=1)))
    assert (found.difference.kind, found.in_flight) == ("order.lines", "orders/1")
    assert only(judge(other, there)).difference.repair == NOTHING, "what it says is not to be written into that row"
    other.choose(there["home"], there["source_offset"])
    assert judge(other, there) == []
    assert [(one.lines, one.partition, one.offset) for one in other.rivals or ()] == [((("9", 7),), 1, 3)]


# Products


def product(version: int = 7, **more: Any) -> dict[str, Any]:
    counts = {"initial": 100, "received": 5, "adjusted": -1, "sold": 40, "reserved": 3}
    ledger = {f"g_{name}": value for name, value in counts.items()}
    return {
        "product_id": "1",
        **counts,
        **ledger,
        "g_initials": 1,
        "on_hand": 64,
        "owed": 0,
        "version": version,
        **more,
    }


def view(there: dict[str, Any] | None = None, **more: Any) -> ProductView:
    sums = more.pop("sums", Sums(5, -1, 40, 3))
    return ProductView(there or product(), sums, **more)


def still(one: ProductView) -> ProductView:
    """Return a view that is as it was in the round before."""
    one.before = one.now
    return one


def test_a_product_that_agrees_everywhere_is_not_found() -> None:
    assert judge_product(view(in_redis=GateState(7, 64, 3, 0, 0)), progress()) == []
    unmoved = product(1, sold=0, g_sold=0, on_hand=104)
    assert judge_product(view(unmoved, sums=Sums(5, -1, 0, 3)), progress()) == []


def test_counts_and_ledger_are_each_compared_with_what_must_be() -> None:
    changed = judge_product(view(product(on_hand=69, adjusted=4)), progress(bar=None))
    finding = only([f for f in changed if f.difference.kind == Kind.STOCK_COUNTS])
    assert finding.difference.must == {"on_hand": 64, "adjusted": -1}
    assert finding.difference.found == {"on_hand": 69, "adjusted": 4}
    assert Kind.STOCK_LEDGER not in kinds(changed)
    assert Kind.STOCK_LEDGER in kinds(judge_product(view(product(g_sold=39)), progress()))


def test_units_that_are_owed_are_told_and_are_no_other_difference() -> None:
    changed = judge_product(view(product(owed=7, adjusted=6, g_adjusted=6, on_hand=71)), progress())
    finding = only(changed)
    assert (finding.difference.kind, finding.difference.found) == (Kind.STOCK_OWED, "7 units")


@pytest.mark.parametrize(
    ("there", "drift"),
    [
        (GateState(7, 63, 3, 0, 0), True),  # the same version of the counts, and other counts
        (GateState(7, 64, 3, 2, 1), True),  # no script leaves the sum of the takes so
        (GateState(7, 64, 3, 2, 2), False),  # orders on their way into Postgres
        (GateState(6, 65, 4, 0, 0), False),  # it is about to learn of the newest version
    ],
)
def test_redis_may_be_behind_but_not_wrong(there: GateState, drift: bool) -> None:
    finding = only(judge_product(view(in_redis=there), progress()))
    assert finding.difference.kind == Kind.REDIS_COUNTS
    assert (finding.in_flight is None) == drift
    unmoved_view = still(view(in_redis=there))
    assert only(judge_product(unmoved_view, progress())).in_flight is None, "nothing moves, nothing is under way"
    assert (only(judge_product(unmoved_view, progress(partition=OWNER, order_lines=9))).in_flight is None) == drift


def test_a_group_that_never_committed_a_topic_has_passed_it_only_when_it_is_empty() -> None:
    idle = Progress(SETTINGS, {}, {(spec.name, 0): 0 for spec in TOPICS}, 30.0)
    assert idle.order_busy(trace(partition=UNSEEN), 0, ()) is None
    assert idle.order_busy(trace(), 0, ()) == f"{ORDERS.name}/0"
    waiting = Progress(SETTINGS, {}, {(RESERVATIONS.name, 0): 1}, 30.0)
    assert waiting.order_busy(trace(partition=UNSEEN), 0, ()) == f"{RESERVATIONS.name}/0"
