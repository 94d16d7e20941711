"""What is drift, what may be the pipeline at work: the pure comparison, case by case."""

from __future__ import annotations

import re
import uuid
from typing import Any

import pytest

from orderstream.jobs.reconcile.drift import (
    AGAIN,
    CHARGING,
    HELD,
    JUST_ENDED,
    OWNER,
    ROWS,
    Finding,
    ProductView,
    Progress,
    Sums,
    judge_entry,
    judge_order,
    judge_product,
    units,
)
from orderstream.jobs.reconcile.fold import CANCELLED, CONFIRMED, CREATED, PAID, RESERVED, UNSEEN, Trace
from orderstream.jobs.reconcile.reconcile import query
from orderstream.jobs.reconcile.repair import OrderRow
from orderstream.lua.gate import GateState
from orderstream.settings import Settings
from orderstream.sql.differences import Kind
from orderstream.streams.topics import ORDERS, RESERVATIONS, SETTLEMENTS, TOPICS

SETTINGS = Settings(_env_file=None, partitions=1, hold_ttl_s=600)
ID = str(uuid.UUID(int=1))
WHOLE = CREATED | RESERVED | PAID | CONFIRMED


def progress(bar: int | None = 10, **behind: int) -> Progress:
    """Return workers that have passed everything, but for the topics that are named with their offset."""
    committed = {(spec.name, 0): behind.get(spec.name.replace("-", "_"), 10) for spec in TOPICS}
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


def row(status: str = "CONFIRMED", state: str = "committed", **more: Any) -> dict[str, Any]:
    paid = status in ("PAID", "CONFIRMED")
    return {
        "status": status,
        "reason": "expired" if status == "CANCELLED" else None,
        "user_id": "u",
        "payment_method": "card",
        "total_cents": None if status == "CREATED" else 200,
        "paid": paid,
        "age_s": 1.0,
        "moved_s": 1.0,
        "payment": "SUCCESS" if paid else None,
        "charge_id": "c" if paid else None,
        "amount_cents": 200 if paid else None,
        "product_ids": ["1"],
        "quantities": [2],
        "states": [state],
        **more,
    }


def judge(
    traced: Trace, there: dict[str, Any] | None, far: Progress | None = None, *, asked: bool = False, **more: Any
) -> list[Finding]:
    options = {"charging": False, "cut": False, **more}
    return judge_order(ID, traced, there, far or progress(), asked=asked, **options)


def kinds(found: list[Finding]) -> list[str]:
    return [finding.difference.kind for finding in found]


def only(found: list[Finding]) -> Finding:
    (finding,) = found
    return finding


# Orders

CANCELLED_ROW = row("CANCELLED", "released")
REVOKED_ROW = row(
    "CANCELLED", "returned", reason="cancelled_by_user", paid=True, payment="REFUNDED", charge_id="c", amount_cents=200
)


@pytest.mark.parametrize(
    ("published", "there"),
    [
        (WHOLE, row()),
        (CREATED, row("CREATED", "pending")),
        (CREATED | RESERVED, row("RESERVED", "held")),
        (CREATED | RESERVED | PAID, row("PAID", "held")),
        (CREATED | RESERVED | CANCELLED, CANCELLED_ROW),
        (CREATED | CANCELLED, CANCELLED_ROW),  # cancelled before its owner published that it was held
        (CREATED | RESERVED | CANCELLED, {**CANCELLED_ROW, "payment": "REFUND_DUE", "charge_id": "c"}),
        (CREATED | RESERVED | CANCELLED, {**CANCELLED_ROW, "payment": "REFUNDED", "charge_id": "c"}),
        (CREATED, row("RESERVED", "held")),  # Postgres is written before the event
        (CREATED | RESERVED, row("PAID", "held")),
        (CREATED | RESERVED | PAID, row("PAID", "committed")),
    ],
)
def test_what_fits_is_not_found(published: int, there: dict[str, Any]) -> None:
    assert judge(trace(published), there) == []


@pytest.mark.parametrize(
    ("published", "there", "kind"),
    [
        (WHOLE, row("PAID", "held"), Kind.ORDER_STATUS),
        (CREATED | RESERVED, row("CREATED", "held", total_cents=200), Kind.ORDER_STATUS),
        (CREATED | RESERVED | PAID, row("CANCELLED", "released", payment="SUCCESS", amount_cents=200, charge_id="c"),
         Kind.ORDER_STATUS),
        (CREATED | RESERVED | CANCELLED, row(), Kind.ORDER_STATUS),
        (CREATED | RESERVED | CANCELLED, {**CANCELLED_ROW, "reason": "cancelled_by_user"}, Kind.ORDER_STATUS),
        (WHOLE, row(user_id="v"), Kind.ORDER_RECORD),
        (WHOLE, row(payment_method="cash"), Kind.ORDER_RECORD),
        (WHOLE, row(quantities=[3]), Kind.ORDER_LINES),
        (WHOLE, row(product_ids=["2"]), Kind.ORDER_LINES),
        (WHOLE, row(states=["held"]), Kind.ORDER_LINES),
        (CREATED | RESERVED | CANCELLED, row("CANCELLED", "committed"), Kind.ORDER_LINES),
        (WHOLE, row(charge_id="another"), Kind.PAYMENT),
        (WHOLE, row(payment=None), Kind.PAYMENT),
        (WHOLE, row(amount_cents=100), Kind.PAYMENT),
        (CREATED | RESERVED | CANCELLED, {**CANCELLED_ROW, "payment": "SUCCESS", "charge_id": "c"}, Kind.PAYMENT),
        (CREATED | RESERVED, row("RESERVED", "held", payment="SUCCESS", charge_id="c"), Kind.PAYMENT),
    ],
)  # fmt: skip
def test_what_the_pipeline_never_does_is_drift_at_once(published: int, there: dict[str, Any], kind: str) -> None:
    found = judge(trace(published), there, progress(bar=None))
    assert (kind, None) in [(f.difference.kind, f.in_flight) for f in found]
    assert all(f.difference.repair == ROWS for f in found if f.difference.kind == kind)


def test_a_paid_order_may_be_cancelled_by_its_customer_only() -> None:
    back = trace(WHOLE | CANCELLED, reason="cancelled_by_user")
    assert judge(back, REVOKED_ROW) == []
    assert judge(back, {**REVOKED_ROW, "states": ["released"], "payment": "REFUND_DUE"}) == []
    assert judge(trace(WHOLE & ~CONFIRMED | CANCELLED, reason="cancelled_by_user"), REVOKED_ROW) == []
    assert kinds(judge(trace(WHOLE | CANCELLED), REVOKED_ROW)) == [Kind.ORDER_STATUS], "of two ends"
    assert kinds(judge(trace(WHOLE), {**REVOKED_ROW, "reason": "expired"}))[0] == Kind.ORDER_STATUS
    assert kinds(judge(back, row()))[0] == Kind.ORDER_STATUS
    assert kinds(judge(back, {**REVOKED_ROW, "payment": "SUCCESS"})) == [Kind.PAYMENT]
    assert kinds(judge(back, {**REVOKED_ROW, "amount_cents": 100})) == [Kind.PAYMENT]
    assert kinds(judge(back, {**REVOKED_ROW, "states": ["refused"]})) == [Kind.ORDER_LINES]


@pytest.mark.parametrize("state", ["held", "committed"])
def test_a_revoked_order_is_in_flight_until_its_units_are_back_and_it_was_published(state: str) -> None:
    there = {**REVOKED_ROW, "states": [state]}
    assert [f.in_flight for f in judge(trace(WHOLE), there, progress(settlements=9))] == [JUST_ENDED, "settlements/0"]
    late = judge(trace(WHOLE), {**there, "moved_s": 31})
    assert [(f.difference.kind, f.in_flight, f.difference.repair) for f in late] == [
        (Kind.ORDER_LINES, None, OWNER),
        (Kind.ORDER_EVENT_MISSING, None, OWNER),
    ]
    sold, held = (2, 0) if state == "committed" else (0, 2)
    assert [*units(trace(WHOLE), there)] == [("1", sold, held)]
    assert [*units(trace(WHOLE | CANCELLED, reason="cancelled_by_user"), REVOKED_ROW)] == []
    assert [*units(trace(WHOLE), {**there, "reason": "expired"})] == [("1", 2, 0)], "as the events say"


def test_a_declined_order_has_a_failed_payment() -> None:
    traced = trace(CREATED | RESERVED | CANCELLED, reason="payment_declined")
    there = {**CANCELLED_ROW, "reason": "payment_declined"}
    assert kinds(judge(traced, there)) == [Kind.PAYMENT]
    assert judge(traced, {**there, "payment": "FAILED", "amount_cents": 200}) == []


def test_a_record_that_the_group_has_not_passed_is_in_flight_however_old() -> None:
    assert only(judge(trace(0), None, progress(orders=5))).in_flight == "orders/0"
    finding = only(judge(trace(0), None, progress(orders=6, bar=6)))
    assert (finding.difference.kind, finding.in_flight, finding.difference.repair) == (Kind.ORDER_MISSING, None, AGAIN)


def test_an_order_with_events_had_its_row_whatever_the_workers_have_still_to_read() -> None:
    finding = only(judge(trace(WHOLE), None, progress(bar=None, orders=5)))
    assert (finding.difference.kind, finding.in_flight, finding.difference.repair) == (Kind.ORDER_MISSING, None, ROWS)
    assert only(judge(trace(0), None, progress(orders=5))).in_flight == "orders/0"


def test_a_missing_order_with_more_events_gets_its_rows_back_instead_of_being_decided_again() -> None:
    assert only(judge(trace(WHOLE), None)).difference.repair == ROWS
    assert only(judge(trace(CREATED | CANCELLED), None)).difference.repair == ROWS
    unknown = only(judge(trace(WHOLE, partition=UNSEEN), None)).difference
    assert unknown.repair.startswith("none")


@pytest.mark.parametrize("published", [WHOLE & ~CREATED, WHOLE & ~RESERVED, WHOLE & ~PAID, WHOLE & ~CONFIRMED])
def test_an_event_is_missing_once_nothing_of_its_order_is_under_way(published: int) -> None:
    finding = only(judge(trace(published), row()))
    assert (finding.difference.kind, finding.in_flight) == (Kind.ORDER_EVENT_MISSING, None)
    assert finding.difference.repair == (OWNER if published & CREATED else AGAIN)
    for behind in ("reservations", "order_commands", "settlements", "order_lines"):
        assert only(judge(trace(published), row(), progress(**{behind: 9}))).in_flight is not None
    assert only(judge(trace(published), row(), progress(bar=None))).in_flight is not None
    assert only(judge(trace(published), row(), charging=True)).in_flight == CHARGING


def test_an_order_that_went_on_differs_in_another_way_and_a_product_in_the_same() -> None:
    before = only(judge(trace(0), row("PAID", "held"))).difference
    now = only(judge(trace(CREATED | RESERVED | PAID), row())).difference
    assert (before.kind, before.subject) == (now.kind, now.subject)
    assert before.key != now.key
    moved = [only(judge_product(view(product(on_hand=n)), progress())).difference.key for n in (60, 61)]
    assert moved[0] == moved[1]


def test_events_that_retention_may_have_taken_are_not_missed() -> None:
    assert judge(trace(PAID | CONFIRMED), row(), cut=True) == []
    assert kinds(judge(trace(CREATED), row(), cut=True)) == [Kind.ORDER_EVENT_MISSING]


@pytest.mark.parametrize(
    ("there", "asked", "stuck"),
    [
        (row("CREATED", "pending", age_s=29), False, False),
        (row("CREATED", "pending", age_s=31), False, True),
        (row("RESERVED", "held", age_s=31), False, False),
        (row("RESERVED", "held", age_s=31), True, True),
        (row("RESERVED", "held", age_s=629), False, False),
        (row("RESERVED", "held", age_s=631), False, True),
        (row("PAID", "held", age_s=900, moved_s=29), False, False),
        (row("PAID", "held", moved_s=31), False, True),
        (row(age_s=9_000, moved_s=9_000), False, False),
    ],
)
def test_an_order_is_stuck_when_it_is_late_and_nothing_of_it_is_under_way(
    there: dict[str, Any], asked: bool, stuck: bool
) -> None:
    published = WHOLE if there["status"] == "CONFIRMED" else CREATED
    found = judge(trace(published), there, asked=asked)
    assert kinds(found) == [Kind.ORDER_STUCK] * stuck
    for finding in found:
        assert finding.in_flight is None
        waiting = progress(reservations=9)
        assert only(judge(trace(published), there, waiting, asked=asked)).in_flight == f"{RESERVATIONS.name}/0"


def test_a_cancelled_order_may_hold_units_until_they_are_given_back() -> None:
    traced = trace(CREATED | RESERVED | CANCELLED)
    assert only(judge(traced, row("CANCELLED", "held"))).in_flight == JUST_ENDED
    late = row("CANCELLED", "held", moved_s=31)
    assert only(judge(traced, late, progress(settlements=9))).in_flight == f"{SETTLEMENTS.name}/0"
    finding = only(judge(traced, late))
    assert (finding.difference.kind, finding.in_flight) == (Kind.ORDER_LINES, None)


def test_units_are_those_that_the_events_say_then_those_of_the_snapshot() -> None:
    assert [*units(trace(WHOLE), row("PAID", "held"))] == [("1", 2, 0)]
    assert [*units(trace(WHOLE), None)] == [("1", 2, 0)]
    assert [*units(trace(CREATED | RESERVED), None)] == [("1", 0, 2)]
    assert [*units(trace(CREATED), None)] == []
    assert [*units(trace(CREATED), row("RESERVED", "held"))] == [("1", 0, 2)]
    assert [*units(trace(CREATED | PAID), row("CONFIRMED", "committed"))] == [("1", 2, 0)]
    assert [*units(trace(CREATED | CANCELLED), row("CONFIRMED", "committed"))] == []
    assert [*units(trace(CREATED | CANCELLED), row("CANCELLED", "held"))] == [("1", 0, 2)]


def test_a_restored_row_has_the_columns_of_its_statement_in_their_order() -> None:
    columns = re.search(r"INSERT INTO orders \(([^)]*)\)", query("put_order"))
    assert columns is not None
    assert tuple(re.split(r",\s*", columns[1])) == OrderRow._fields


# Products


def product(version: int = 7, **more: Any) -> dict[str, Any]:
    counts = {"initial": 100, "received": 5, "adjusted": -1, "sold": 40, "reserved": 3}
    ledger = {f"g_{name}": value for name, value in counts.items()}
    return {"product_id": "1", **counts, **ledger, "g_initials": 1, "on_hand": 64, "version": version, **more}


def view(there: dict[str, Any] | None = None, **more: Any) -> ProductView:
    sums = more.pop("sums", Sums(5, -1, 40, 3))
    table = more.pop("table", {"available": 61, "reserved": 3, "sold": 40, "version": 7})
    return ProductView(there or product(), sums, in_table=table, **more)


def still(one: ProductView) -> ProductView:
    """Return a view that is as it was in the round before."""
    one.before = one.now
    return one


def test_a_product_that_agrees_everywhere_is_not_found() -> None:
    assert judge_product(view(in_redis=GateState(7, 64, 3, 0, 0)), progress()) == []
    unmoved = product(1, sold=0, g_sold=0, on_hand=104)
    assert judge_product(view(unmoved, sums=Sums(5, -1, 0, 3), table=None), progress()) == []


def test_counts_and_ledger_are_each_compared_with_what_must_be() -> None:
    changed = judge_product(view(product(on_hand=69, adjusted=4)), progress(bar=None))
    finding = only([f for f in changed if f.difference.kind == Kind.STOCK_COUNTS])
    assert finding.difference.must == {"on_hand": 64, "adjusted": -1}
    assert finding.difference.found == {"on_hand": 69, "adjusted": 4}
    assert Kind.STOCK_LEDGER not in kinds(changed)
    assert Kind.STOCK_LEDGER in kinds(judge_product(view(product(g_sold=39)), progress()))


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
    assert (only(judge_product(unmoved_view, progress(settlements=9))).in_flight is None) == drift


def test_the_table_hears_of_a_hold_when_it_is_settled() -> None:
    older = {"available": 70, "reserved": 0, "sold": 34, "version": 5}
    assert only(judge_product(still(view(table=older)), progress())).in_flight == HELD
    free = product(reserved=0, g_reserved=0)
    at_rest = still(view(free, sums=Sums(5, -1, 40, 0), table=older))
    assert only(judge_product(at_rest, progress())).in_flight is None
    assert only(judge_product(at_rest, progress(settlements=9))).in_flight is not None
    moving = view(free, sums=Sums(5, -1, 40, 0), table=older, before=(6, None))
    assert only(judge_product(moving, progress())).in_flight is not None
    for version in (7, 8):
        wrong = {**older, "version": version}
        assert only(judge_product(view(table=wrong), progress(bar=None))).in_flight is None


# Open orders

ENTRY = {"status": "CANCELLED", "charge_asked": False, "refund": None, "unseen": []}


@pytest.mark.parametrize(
    ("entry", "there", "drift"),
    [
        (ENTRY, CANCELLED_ROW, True),
        (ENTRY, row(), True),
        (ENTRY, None, True),
        ({**ENTRY, "charge_asked": True}, CANCELLED_ROW, False),
        ({**ENTRY, "refund": "c"}, CANCELLED_ROW, False),
        ({**ENTRY, "unseen": ["1"]}, CANCELLED_ROW, False),
        (ENTRY, row("CANCELLED", "pending"), False),
        (ENTRY, row("RESERVED", "held"), False),
    ],
)
def test_an_entry_of_an_order_that_is_over_and_waits_for_nothing_is_drift(
    entry: dict[str, Any], there: dict[str, Any] | None, drift: bool
) -> None:
    finding = judge_entry(ID, entry, there, progress())
    assert (finding is not None) == drift
    if drift:
        moment = judge_entry(ID, entry, there, progress(reservations=9))
        assert moment is not None
        assert moment.in_flight is not None


def test_a_group_that_never_committed_a_topic_has_passed_it_only_when_it_is_empty() -> None:
    idle = Progress(SETTINGS, {}, {(ORDERS.name, 0): 0, (RESERVATIONS.name, 0): 1}, 30.0)
    assert idle.past(ORDERS.name, 0)
    assert not idle.past(RESERVATIONS.name, 0)
    assert not idle.passed(ORDERS.name, 0, 0)
