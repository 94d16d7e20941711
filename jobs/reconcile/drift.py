"""What differs between what the topics say and what Postgres, Redis and the tables have.  Pure: no engine is asked here.

A difference is drift only when it can't be the pipeline at work.  A :class:`Finding` says which of the two it may be:
``in_flight`` names what is still under way.  What depends on nothing else still has to be there in a second round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from orderstream.jobs.reconcile.fold import CANCELLED, CREATED, ENDS, PAID, RESERVED, UNSEEN, Trace
from orderstream.lua.gate import GateState
from orderstream.settings import Settings
from orderstream.sql.differences import Kind
from orderstream.streams.orders import Reason, Status
from orderstream.streams.partitions import order_partition, product_partition
from orderstream.streams.topics import ORDER_COMMANDS, ORDER_LINES, ORDERS, RESERVATIONS, SETTLEMENTS, STOCK_COMMANDS


class Difference(NamedTuple):
    """One difference.

    Attributes:
        kind: what it is about.
        subject: the order's or the product's id.
        must: what must be.
        found: what is.
        repair: what ``--repair`` does about it.
    """

    kind: Kind
    subject: str
    must: Any
    found: Any
    repair: str

    @property
    def key(self) -> tuple[Kind, str, str]:
        """What names it in the next round.  An order that continued differs in another way; counts of a product may move."""
        about_product = self.kind.startswith("stock.") or self.kind in (Kind.REDIS_COUNTS, Kind.TABLE_STOCK)
        return self.kind, self.subject, "" if about_product else str(self.must)


HELD, JUST_ENDED, CHARGING = "units are held", "it has just ended", "its charge is under way"
LASTING = frozenset({HELD, JUST_ENDED, CHARGING})
"""What may be under way for long: another round some seconds later shows nothing new."""


class Finding(NamedTuple):
    """A difference, and what may explain it: ``in_flight`` is None when nothing does."""

    difference: Difference
    in_flight: str | None = None


@dataclass(slots=True)
class Progress:
    """How far the workers are.

    Attributes:
        settings: of the pipeline.
        committed: offsets that the group has committed, before this round began to read.
        bar: ends of the topics after the snapshot of the round before; a group that has passed them is done with all that
            the round before may have seen half done.  None in the first round.
        grace_s: what depends on age may be so late, in seconds.
    """

    settings: Settings
    committed: Mapping[tuple[str, int], int]
    bar: Mapping[tuple[str, int], int] | None
    grace_s: float

    def passed(self, topic: str, partition: int, offset: int) -> bool:
        """Return whether the group is done with a record."""
        return self.committed.get((self.settings.topic(topic), partition), 0) > offset

    def past(self, topic: str, partition: int) -> bool:
        """Return whether the group is done with all that a partition held in the round before."""
        where = (self.settings.topic(topic), partition)
        return self.bar is not None and self.committed.get(where, 0) >= self.bar.get(where, 0)

    def product_busy(self, product_id: str, topics: Sequence[str]) -> str | None:
        """Return what is under way for a product, or None."""
        partition = product_partition(product_id, self.settings.partitions)
        return next((f"{topic}/{partition}" for topic in topics if not self.past(topic, partition)), None)

    def order_busy(self, order_id: str, trace: Trace, products: Sequence[str]) -> str | None:
        """Return what is under way for an order, or None."""
        if trace.partition != UNSEEN and not self.passed(ORDERS.name, trace.partition, trace.offset):
            return f"{ORDERS.name}/{trace.partition}"
        partition = order_partition(order_id, self.settings.partitions)
        for topic in (RESERVATIONS.name, ORDER_COMMANDS.name):
            if not self.past(topic, partition):
                return f"{topic}/{partition}"
        lines = (self.product_busy(p, (ORDERS.name, ORDER_LINES.name, SETTLEMENTS.name)) for p in products)
        return next((busy for busy in lines if busy is not None), None)


# Orders

_REACHED: Mapping[str | None, frozenset[str]] = {
    None: frozenset(Status),
    Status.CREATED: frozenset(Status),
    Status.RESERVED: frozenset(Status) - {Status.CREATED},
    Status.PAID: frozenset({Status.PAID, Status.CONFIRMED}),
    Status.CONFIRMED: frozenset({Status.CONFIRMED}),
    Status.CANCELLED: frozenset({Status.CANCELLED}),
}
"""The statuses that Postgres may have once an event has published one: it is written before the event.

From PAID and CONFIRMED an order may still be revoked: :func:`is_revoked`.
"""

_FITTING: Mapping[str, frozenset[str]] = {
    Status.CREATED: frozenset({"pending", "held", "refused"}),
    Status.RESERVED: frozenset({"held"}),
    Status.PAID: frozenset({"held", "committed"}),
    Status.CONFIRMED: frozenset({"committed"}),
    Status.CANCELLED: frozenset({"pending", "held", "refused", "released"}),
}
"""The states that lines of an order may have; of a cancelled one the first two only until it is settled."""

_REVOKED_FITTING = frozenset({"held", "committed", "released", "returned"})
"""The same of an order that was cancelled after it was paid."""

_EVENTS: Mapping[str, Sequence[Status]] = {
    Status.CREATED: (Status.CREATED,),
    Status.RESERVED: (Status.CREATED,),
    Status.PAID: (Status.CREATED,),
    Status.CONFIRMED: (Status.CREATED, Status.RESERVED, Status.PAID, Status.CONFIRMED),
    Status.CANCELLED: (Status.CREATED, Status.CANCELLED),
}
"""The events that an order in this status must have, once nothing of it is under way.

One that is not over may be between two effects of its owner; a cancelled one may never have published RESERVED.
"""

AGAIN, OWNER, EXPIRE, ROWS, NOTHING = (
    "send the order again",
    "have its owner repeat what was decided",
    "command its owner to expire it",
    "put its rows back to what the events say",
    "none: it is for people to decide",
)


def judge_order(
    order_id: str,
    trace: Trace,
    row: Mapping[str, Any] | None,
    progress: Progress,
    *,
    asked: bool,
    charging: bool,
    cut: bool,
) -> list[Finding]:
    """Compare what the topics say of an order with Postgres.

    Args:
        order_id: the order.
        trace: what the topics say.
        row: as ``reconcile.sql`` reads it; None when Postgres does not know the order.
        progress: how far the workers are.
        asked: whether it was commanded to end, by a record that the group is done with.
        charging: whether the table of open orders has a charge of it under way.
        cut: whether the topic has lost its first events to retention: those of this order may be among them.
    """
    if row is None:
        return [_missing(order_id, trace, progress)]
    found: list[Finding] = []
    must: Any
    status, last = row["status"], trace.last
    lines = dict(zip(row["product_ids"] or (), row["quantities"] or (), strict=True))
    states = sorted(set(row["states"] or ()))
    busy = progress.order_busy(order_id, trace, [*lines])

    def differs(kind: Kind, must: Any, is_now: Any, repair: str, in_flight: str | None = None) -> None:
        found.append(Finding(Difference(kind, order_id, must, is_now, repair), in_flight))

    revoked = is_revoked(row)
    if trace.published & ENDS == ENDS and trace.reason != Reason.CANCELLED_BY_USER:
        differs(Kind.ORDER_STATUS, "one end", f"events of two ends; Postgres says {status}", NOTHING)
    elif not (status in _REACHED[last] or revoked) or (trace.reason is not None and trace.reason != row["reason"]):
        differs(Kind.ORDER_STATUS, _status(last, trace.reason), _status(status, row["reason"]), ROWS)
    if trace.partition != UNSEEN:
        if (trace.user_id, trace.method) != (row["user_id"], row["payment_method"]):
            must = {"user_id": trace.user_id, "payment_method": trace.method}
            differs(Kind.ORDER_RECORD, must, {name: row[name] for name in must}, ROWS)
        if dict(trace.lines) != lines:
            differs(Kind.ORDER_LINES, dict(trace.lines), lines, ROWS)
    if trace.total_cents is not None and trace.total_cents != row["total_cents"]:
        must = {"total_cents": trace.total_cents}
        differs(Kind.ORDER_RECORD, must, {"total_cents": row["total_cents"]}, ROWS)
    must_pay, pays = payment_must_be(trace, row), payment_of(row)
    if must_pay is not None and must_pay != pays:
        differs(Kind.PAYMENT, must_pay, pays, ROWS)
    if any(finding.difference.kind != Kind.ORDER_RECORD for finding in found):
        return found
    fitting = _REVOKED_FITTING if revoked else _FITTING[status]
    unfit = [state for state in states if state not in fitting]
    if unfit:
        differs(Kind.ORDER_LINES, f"{status}: {', '.join(sorted(fitting))}", ", ".join(unfit), ROWS)
    elif status == Status.CANCELLED and {"held", "pending", "committed"} & set(states):
        late = None if row["moved_s"] > progress.grace_s else JUST_ENDED
        repair = AGAIN if "pending" in states else OWNER
        must = "returned or released" if revoked else "released or refused"
        differs(Kind.ORDER_LINES, must, ", ".join(states), repair, late or busy)
    if trace.partition != UNSEEN:
        silent = [name for name in _EVENTS[status] if not trace.published & _BIT[name]]
        if silent and not (cut and Status.CREATED in silent):
            repair = AGAIN if Status.CREATED in silent else OWNER
            in_flight = CHARGING if charging else busy
            differs(Kind.ORDER_EVENT_MISSING, f"events {', '.join(silent)}", f"{status} without", repair, in_flight)
    stuck = _stuck(row, progress, asked)
    if stuck is not None:
        repair = {Status.CREATED: AGAIN, Status.RESERVED: EXPIRE}.get(status, OWNER)
        differs(Kind.ORDER_STUCK, f"past {status}", stuck, repair, busy)
    return found


def _missing(order_id: str, trace: Trace, progress: Progress) -> Finding:
    must = _status(trace.last or Status.CREATED, trace.reason)
    if trace.partition == UNSEEN:
        difference = Difference(
            Kind.ORDER_MISSING, order_id, must, "not in Postgres", "none: its record no longer exists"
        )
        return Finding(difference, None if progress.bar is not None else "its record")
    repair = ROWS if trace.published & ~CREATED else AGAIN
    # Postgres is written before the events, so an order with events had its row.
    busy = None if trace.published else progress.order_busy(order_id, trace, [trace.lines[0][0]])
    return Finding(Difference(Kind.ORDER_MISSING, order_id, must, "not in Postgres", repair), busy)


def _stuck(row: Mapping[str, Any], progress: Progress, asked: bool) -> str | None:
    status, grace_s = row["status"], progress.grace_s
    if status in (Status.CREATED, Status.RESERVED):
        if row["age_s"] > progress.settings.hold_ttl_s + grace_s:
            return f"{status} for {row['age_s']:.0f} s, past the time of its hold"
        if status == Status.CREATED and row["age_s"] > grace_s:
            return f"CREATED for {row['age_s']:.0f} s, and no record of it is under way"
        if asked and row["age_s"] > grace_s:
            return f"{status} for {row['age_s']:.0f} s, though it was commanded to end"
    if status == Status.PAID and row["moved_s"] > grace_s:
        return f"PAID for {row['moved_s']:.0f} s"
    return None


_BIT = {
    Status.CREATED: CREATED,
    Status.RESERVED: RESERVED,
    Status.PAID: PAID,
    Status.CONFIRMED: 8,
    Status.CANCELLED: 16,
}


def _status(status: str | None, reason: str | None) -> str:
    return f"{status} {reason}" if reason and status == Status.CANCELLED else str(status)


def payment_of(row: Mapping[str, Any]) -> str:
    """Return an order's payment as Postgres has it, in words."""
    if row["payment"] is None:
        return "none"
    return " ".join(str(row[name]) for name in ("payment", "amount_cents", "charge_id") if row[name] is not None)


def is_revoked(row: Mapping[str, Any]) -> bool:
    """Return whether Postgres has an order as one that its customer cancelled after it was paid."""
    return bool(row["status"] == Status.CANCELLED and row["paid"] and row["reason"] == Reason.CANCELLED_BY_USER)


def payment_must_be(trace: Trace, row: Mapping[str, Any]) -> str | None:
    """Return what an order's payment must be, in words; None when nothing speaks against the one that is there."""
    status = row["status"]
    if is_revoked(row) or (trace.published & PAID and trace.published & CANCELLED):
        cents, charge_id = (
            (trace.total_cents, trace.charge_id) if trace.published & PAID else (row["total_cents"], None)
        )
        back = row["payment"] in ("REFUND_DUE", "REFUNDED") and row["amount_cents"] == cents
        return (
            None if back and charge_id in (None, row["charge_id"]) else f"REFUNDED {cents} {charge_id or ''}".rstrip()
        )
    if trace.published & PAID:
        return f"SUCCESS {trace.total_cents} {trace.charge_id}"
    if status in (Status.PAID, Status.CONFIRMED):
        good = row["payment"] == "SUCCESS" and row["amount_cents"] == row["total_cents"]
        return None if good else f"SUCCESS {row['total_cents']}"
    if status == Status.CANCELLED and row["reason"] == "payment_declined":
        return None if row["payment"] == "FAILED" else f"FAILED {row['total_cents']}"
    if status == Status.CANCELLED:
        return None if row["payment"] in (None, "REFUND_DUE", "REFUNDED") else "none, or one that is refunded"
    return None if row["payment"] is None else "none"


def is_settled(trace: Trace, row: Mapping[str, Any]) -> bool:
    """Return whether an order on which nothing was found has ended for good: all of its units are sold or released."""
    states = set(row["states"] or ())
    if row["status"] == Status.CONFIRMED:
        return states == {"committed"}
    return row["status"] == Status.CANCELLED and states <= {"refused", "released", "returned"}


def units(trace: Trace, row: Mapping[str, Any] | None) -> Iterator[tuple[str, int, int]]:
    """Yield product id, units sold and units held of an order: by its events, else by the snapshot."""
    back = trace.published & CANCELLED or (row is not None and is_revoked(row))
    if trace.published & _BIT[Status.CONFIRMED] and trace.partition != UNSEEN and not back:
        for product_id, quantity in trace.lines:
            yield product_id, quantity, 0
    elif row is None:
        if trace.published & (RESERVED | PAID) and not trace.published & ENDS:
            for product_id, quantity in trace.lines:
                yield product_id, 0, quantity
    else:
        for product_id, quantity, state in zip(
            row["product_ids"] or (), row["quantities"] or (), row["states"] or (), strict=True
        ):
            if state == "held":
                yield product_id, 0, quantity
            elif state == "committed" and not trace.published & _BIT[Status.CANCELLED]:
                yield product_id, quantity, 0


# Products


@dataclass(slots=True)
class Sums:
    """Units of one product that the topics account for."""

    received: int = 0
    adjusted: int = 0
    sold: int = 0
    reserved: int = 0


COUNTS = ("initial", "received", "adjusted", "sold", "reserved")


@dataclass(slots=True)
class ProductView:
    """One product in one round.

    Attributes:
        row: as ``reconcile.sql`` reads it.
        sums: what the topics account for.
        in_redis: None when Redis does not hold it, or holds it under an older generation or process.
        in_table: the last value in the changelog of the table ``stock``; None without one.
        before: versions in Postgres and Redis, and the takes, in the round before; what moves is at work.
    """

    row: Mapping[str, Any]
    sums: Sums
    in_redis: GateState | None = None
    in_table: Mapping[str, Any] | None = None
    before: tuple[Any, ...] | None = None
    must: dict[str, int] = field(default_factory=dict)

    @property
    def now(self) -> tuple[Any, ...]:
        """What ``before`` is in the next round."""
        return (self.row["version"], self.in_redis)


def judge_product(view: ProductView, progress: Progress) -> list[Finding]:
    """Compare what the topics account for with a product's counts, ledger, gate and table."""
    row, product_id = view.row, view.row["product_id"]
    found: list[Finding] = []

    def differs(kind: Kind, must: Any, is_now: Any, repair: str, in_flight: str | None = None) -> None:
        found.append(Finding(Difference(kind, product_id, must, is_now, repair), in_flight))

    initial = row["g_initial"] if row["g_initials"] else row["initial"]
    must = {"initial": initial or 0, "received": view.sums.received, "adjusted": view.sums.adjusted}
    must |= {"sold": view.sums.sold, "reserved": view.sums.reserved}
    view.must = must
    in_ledger = {name: row[f"g_{name}"] for name in COUNTS}
    if in_ledger != must:
        differs(Kind.STOCK_LEDGER, *_unlike(must, in_ledger), "write the entries that are missing, or counter entries")
    on_hand = must["initial"] + must["received"] + must["adjusted"] - must["sold"]
    if row["version"] is None:
        differs(Kind.STOCK_COUNTS, {**must, "on_hand": on_hand}, "no row", NOTHING)
        return found
    counts = {"on_hand": row["on_hand"], **{name: row[name] for name in COUNTS}}
    if counts != {"on_hand": on_hand, **must}:
        repair = "set the row to what must be, with an entry in the ledger"
        differs(Kind.STOCK_COUNTS, *_unlike({"on_hand": on_hand, **must}, counts), repair)
    moving = None if view.before == view.now else "its counts are changing"
    busy = progress.product_busy(product_id, (ORDERS.name, ORDER_LINES.name, SETTLEMENTS.name, STOCK_COMMANDS.name))
    if view.in_redis is not None:
        _judge_redis(view, on_hand, moving or busy, differs)
    _judge_table(view, on_hand, moving or busy, differs)
    return found


def _judge_redis(view: ProductView, on_hand: int, in_flight: str | None, differs: Any) -> None:
    there = view.in_redis
    assert there is not None
    must = {"on_hand": on_hand, "reserved": view.must["reserved"], "taken": 0}
    counts = {"on_hand": there.on_hand, "reserved": there.reserved, "taken": there.taken}
    if counts == must and there.takes == 0:
        return
    sides = [{**one, "version": version} for one, version in ((must, view.row["version"]), (counts, there.version))]
    if there.taken != there.takes:
        sides[1]["takes"] = there.takes
        in_flight = None  # no script leaves them so
    elif there.version == view.row["version"] and (there.on_hand, there.reserved) != (on_hand, must["reserved"]):
        in_flight = None  # the same version of the counts has one value only
    repair = "invalidate what Redis knows, and load the product from Postgres"
    differs(Kind.REDIS_COUNTS, *sides, repair, in_flight)


def _judge_table(view: ProductView, on_hand: int, in_flight: str | None, differs: Any) -> None:
    there, row = view.in_table, view.row
    if there is None and row["version"] == 1:
        return
    must = {"available": on_hand - view.must["reserved"], "reserved": view.must["reserved"], "sold": view.must["sold"]}
    counts = None if there is None else {name: there.get(name) for name in must}
    if counts == must:
        return
    if there is not None and there.get("version", 0) >= row["version"]:
        in_flight = None
    elif view.must["reserved"]:  # the table learns of a hold when it is settled
        in_flight = HELD
    differs(Kind.TABLE_STOCK, must, counts or "no entry", "have the product's owner recount it", in_flight)


def _unlike(must: Mapping[str, int], found: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    names = [name for name in must if must[name] != found[name]]
    return {name: must[name] for name in names}, {name: found[name] for name in names}


# Open orders


def judge_entry(
    order_id: str, value: Mapping[str, Any], row: Mapping[str, Any] | None, progress: Progress
) -> Finding | None:
    """Compare an entry of the table ``open-orders`` with Postgres."""
    repair = "remove the entry from the changelog"
    partition = order_partition(order_id, progress.settings.partitions)
    topics = (RESERVATIONS.name, ORDER_COMMANDS.name)
    busy = next((f"{topic}/{partition}" for topic in topics if not progress.past(topic, partition)), None)
    if row is None:
        difference = Difference(Kind.TABLE_OPEN_ORDERS, order_id, "no entry", "an entry; Postgres has no order", repair)
        return Finding(difference, busy)
    waits = value.get("charge_asked") or value.get("refund") is not None or value.get("unseen")
    over = row["status"] in (Status.PAID, Status.CONFIRMED, Status.CANCELLED) and "pending" not in (row["states"] or ())
    if waits or not over:
        return None
    found = f"{value.get('status')}; {row['status']} in Postgres"
    return Finding(Difference(Kind.TABLE_OPEN_ORDERS, order_id, "no entry", found, repair), busy)
