"""What differs between what the topics say and what Postgres and Redis have.  Pure: no engine is asked here.

A difference is drift only when it can't be the pipeline at work.  A :class:`Finding` says which of the two it may be:
``in_flight`` names what is still under way.  What depends on nothing else still has to be there in a second round.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from orderstream.agents.lifecycle import DUE, Payment
from orderstream.jobs.reconcile.fold import BITS, CANCELLED, CONFIRMED, CREATED, ENDS, PAID, RESERVED, UNSEEN, Trace
from orderstream.lua.gate import GateState
from orderstream.settings import Settings
from orderstream.sql.differences import Kind
from orderstream.streams.orders import TERMINAL, Reason, Status
from orderstream.streams.partitions import product_partition
from orderstream.streams.topics import ORDER_COMMANDS, ORDER_LINES, ORDERS, RESERVATIONS, STOCK_COMMANDS


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
        about_product = self.kind.startswith("stock.") or self.kind is Kind.REDIS_COUNTS
        return self.kind, self.subject, "" if about_product else str(self.must)


class Finding(NamedTuple):
    """A difference, and what may explain it: ``in_flight`` is None when nothing does."""

    difference: Difference
    in_flight: str | None = None


WAITS = "its home has it in hand"


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

    def _ahead(self, partition: int, *topics: str) -> str | None:
        """Return the first of these topics of which the group is not done with all that the round before saw."""
        for topic in topics:
            where = (self.settings.topic(topic), partition)
            if self.bar is None or self.committed.get(where, 0) < self.bar.get(where, 0):
                return f"{topic}/{partition}"
        return None

    def product_busy(self, product_id: str) -> str | None:
        """Return what is under way for a product, or None."""
        topics = (ORDERS, ORDER_LINES, RESERVATIONS, ORDER_COMMANDS, STOCK_COMMANDS)
        partition = product_partition(product_id, self.settings.partitions)
        return self._ahead(partition, *(topic.name for topic in topics))

    def order_busy(self, trace: Trace, home: int, owners: Collection[int]) -> str | None:
        """Return what is under way for an order of this home, whose lines have these owners; or None."""
        if trace.partition != UNSEEN and not self.passed(ORDERS.name, trace.partition, trace.offset):
            return f"{ORDERS.name}/{trace.partition}"
        ahead = self._ahead(home, ORDERS.name, RESERVATIONS.name, ORDER_COMMANDS.name)
        others = (self._ahead(owner, ORDER_LINES.name) for owner in sorted({*owners} - {home}))
        return ahead or next((busy for busy in others if busy is not None), None)


# Orders

_FITTING: Mapping[str, frozenset[str]] = {
    Status.CREATED: frozenset("ahx"),
    Status.RESERVED: frozenset("h"),
    Status.PAID: frozenset("cg"),
    Status.CONFIRMED: frozenset("c"),
    Status.CANCELLED: frozenset("rxl"),
}
"""The states that lines of an order may have; see :mod:`orderstream.agents.lifecycle`."""

_REVOKED_FITTING = frozenset("nb")
"""The same of an order that was cancelled after it was paid."""

ASKED = frozenset("aglb")
"""States of a line whose owner is still to do something; none of a line at home."""

_HOLDS: Mapping[str, tuple[str | None, ...]] = {
    "a": (None, "h", "x"),
    "h": ("h",),
    "x": ("x",),
    "g": ("c", "h"),
    "c": ("c",),
    "l": ("r", None, "h", "x"),
    "r": ("r", "x"),
    "b": ("n", "h", "c"),
    "n": ("n",),
}
"""How the owner of a line may have it (None: not at all), by how its home has it; the first is put where it differs."""

AGAIN, CANCEL, ROWS, HOLDS, COMMAND, REVOKE, NOTHING = (
    "send the order again: its home does what is left to do, and publishes its story",
    "send its customer's command to its home again",
    "put its row back to what its record and its events say",
    "put its owners' rows to what its home has",
    "command its owner to set what the topic says",
    "--resolve cancels its youngest orders, with refunds; or receive units, or count (set)",
    "none: it is for people to decide",
)

Holds = Mapping[str, tuple[str, int]]
"""Of an order: state and units of the lines that other owners have, by product."""


def holds_of(row: Mapping[str, Any]) -> Holds:
    """Return the lines that other owners have of an order, from its row."""
    if not row["held_ids"]:
        return {}
    return dict(zip(row["held_ids"], zip(row["held_states"], row["held_quantities"], strict=True), strict=True))


def judge_order(
    order_id: str,
    trace: Trace,
    row: Mapping[str, Any] | None,
    progress: Progress,
    *,
    asked: bool,
    cut: bool,
) -> list[Finding]:
    """Compare what the topics say of an order with Postgres.

    Args:
        order_id: the order.
        trace: what the topics say.
        row: as ``reconcile.sql`` reads it; None when Postgres does not know the order.
        progress: how far the workers are.
        asked: whether its customer cancelled it, by a record that the group is done with.
        cut: whether the topic has lost its first events to retention: those of this order may be among them.
    """
    if row is None:
        return [_missing(order_id, trace, progress)]
    found: list[Finding] = []

    def differs(kind: Kind, must: Any, is_now: Any, repair: str, in_flight: str | None = None) -> None:
        found.append(Finding(Difference(kind, order_id, must, is_now, repair), in_flight))

    status, story = row["status"], row["story"]
    if trace.published & ENDS == ENDS and trace.reason != Reason.CANCELLED_BY_USER:
        differs(Kind.ORDER_STATUS, "one end", f"events of two ends; Postgres says {status}", NOTHING)
    elif not stands(trace, row):
        differs(Kind.ORDER_STATUS, _status(trace.last, trace.reason), _status(status, row["reason"]), ROWS)
    if trace.partition != UNSEEN:
        # Of two orders under one id Postgres may have the other one, and this one's dead letter is still to come.
        busy = progress.order_busy(trace, row["home"], row["owners"] or ())
        then = (ROWS, None) if is_of(trace, row) else (NOTHING, busy)
        if (trace.user_id, trace.method) != (row["user_id"], row["payment_method"]):
            must = {"user_id": trace.user_id, "payment_method": trace.method}
            differs(Kind.ORDER_RECORD, must, {name: row[name] for name in must}, *then)
        if not _same_lines(trace, row):
            lines = dict(zip(row["product_ids"], row["quantities"], strict=True))
            differs(Kind.ORDER_LINES, dict(trace.lines), lines, *then)
    if trace.total_cents is not None and trace.total_cents != row["total_cents"]:
        differs(Kind.ORDER_RECORD, {"total_cents": trace.total_cents}, {"total_cents": row["total_cents"]}, ROWS)
    must_pay = payment_must_be(trace, row)
    if must_pay is not None:
        differs(Kind.PAYMENT, must_pay, _payment(row["payment"], row["charge_id"]), ROWS)
    if any(finding.difference.kind != Kind.ORDER_RECORD for finding in found):
        return found
    if trace.total_cents in (None, row["total_cents"]) and story & RESERVED and row["costs"] != row["total_cents"]:
        differs(Kind.ORDER_RECORD, {"lines_cost": row["total_cents"]}, {"lines_cost": row["costs"]}, ROWS)
    if not _states_fit(row):
        differs(Kind.ORDER_LINES, f"{status}: {' '.join(sorted(_fitting(row)))}", row["states"], ROWS)
        return found
    silent = [name for name, bit in BITS.items() if story & bit and not trace.published & bit]
    unlike = [] if row["owners"] is None else [*unlike_holds(row)]
    costs_total = row["costs"] == row["total_cents"]  # else its own prices are put right first
    dear = [*unlike_prices(row)] if row["owners"] is not None and costs_total else []
    late = _stuck(row, progress, asked)
    if not (silent or unlike or dear or late):
        return found
    busy = progress.order_busy(trace, row["home"], row["owners"] or ())
    if unlike or dear:
        must = {p: f"at {price}" for p, price, _ in dear} | {p: _HELD[state] for p, state, _ in unlike}
        there = {p: f"at {price}" for p, _, price in dear} | {p: _HELD[state] for p, _, state in unlike}
        differs(Kind.ORDER_HOLDS, must, there, HOLDS, busy)
    if silent and trace.partition != UNSEEN and not (cut and Status.CREATED in silent):
        waits = WAITS if row["waits"] and row["moved_s"] <= progress.settings.hold_ttl_s + progress.grace_s else None
        differs(Kind.ORDER_EVENT_MISSING, f"events {', '.join(silent)}", f"{status} without", AGAIN, waits or busy)
    if late:
        differs(Kind.ORDER_STUCK, f"past {status}", *late, busy)
    return found


_HELD = {None: "none", "h": "held", "x": "refused", "c": "committed", "r": "released", "n": "returned"}


def stands(trace: Trace, row: Mapping[str, Any]) -> bool:
    """Return whether an order may have the status that Postgres has, as far as its events say.

    Postgres is written before an event, so it has all that was published.
    """
    if is_revoked(row) and row["reason"] != Reason.CANCELLED_BY_USER:
        return False
    return not trace.published & ~row["story"] and trace.reason in (None, row["reason"])


def is_of(trace: Trace, row: Mapping[str, Any]) -> bool:
    """Return whether Postgres has taken in the very record that the topics are judged by."""
    return (trace.partition, trace.offset) == (row["home"], row["source_offset"])


def _same_lines(trace: Trace, row: Mapping[str, Any]) -> bool:
    return dict(trace.lines) == dict(zip(row["product_ids"], row["quantities"], strict=True))


def _fitting(row: Mapping[str, Any]) -> frozenset[str]:
    return _REVOKED_FITTING if is_revoked(row) else _FITTING[row["status"]]


def _states_fit(row: Mapping[str, Any]) -> bool:
    states = row["states"]
    of = row["owners"] or [row["home"]] * len(states)
    return _fitting(row).issuperset(states) and not any(
        state in ASKED and owner == row["home"] for state, owner in zip(states, of, strict=True)
    )


def unlike_holds(row: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield product, the state in which its owner must have it, and the one in which it has it, where these differ."""
    holds = holds_of(row)
    for product_id, quantity, state, owner in zip(
        row["product_ids"], row["quantities"], row["states"], row["owners"], strict=True
    ):
        held, units_held = holds.get(product_id, (None, quantity))
        must = _HOLDS[state]
        if owner != row["home"] and (held not in must or (held in ("h", "c") and units_held != quantity)):
            yield product_id, must[0], held


def unlike_prices(row: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Yield product, the price of a line at home, and the one that its owner has, where these differ."""
    held = dict(zip(row["held_ids"] or (), row["held_prices"] or (), strict=True))
    for product_id, price in zip(row["product_ids"], row["prices"], strict=True):
        there = held.get(product_id)
        if price is not None and there is not None and there != price:
            yield product_id, price, there


def _missing(order_id: str, trace: Trace, progress: Progress) -> Finding:
    must = _status(trace.last or Status.CREATED, trace.reason)
    if trace.partition == UNSEEN:
        difference = Difference(
            Kind.ORDER_MISSING, order_id, must, "not in Postgres", "none: its record no longer exists"
        )
        return Finding(difference, None if progress.bar is not None else "its record")
    repair = ROWS if trace.published & ~CREATED else AGAIN
    # Postgres is written before the events, so an order with events had its row.
    busy = None if trace.published else progress.order_busy(trace, trace.partition, ())
    return Finding(Difference(Kind.ORDER_MISSING, order_id, must, "not in Postgres", repair), busy)


def _stuck(row: Mapping[str, Any], progress: Progress, asked: bool) -> tuple[str, str] | None:
    """Return why an order is stuck, and what helps; None when it is not."""
    status, moved_s, time_s = row["status"], row["moved_s"], progress.settings.hold_ttl_s + progress.grace_s
    if asked and status != Status.CANCELLED and not row["kept"]:
        return f"{status}, though its customer cancelled it", CANCEL
    if is_over(row):
        return None
    if status in (Status.CREATED, Status.RESERVED) and row["age_s"] > time_s:
        return f"{status} for {row['age_s']:.0f} s, past the time of its hold", AGAIN
    if not row["waits"] and moved_s > progress.grace_s:
        return f"{status} for {moved_s:.0f} s, and nobody has it in hand", AGAIN
    if moved_s > time_s and (status not in TERMINAL or not ASKED.isdisjoint(row["states"])):
        return f"{status} for {moved_s:.0f} s, its lines {row['states']}", AGAIN
    return None


def _status(status: str | None, reason: str | None) -> str:
    return f"{status} {reason}" if reason and status == Status.CANCELLED else str(status)


def _payment(payment: str | None, charge_id: str | None) -> str:
    return " ".join(part for part in (payment or "none", charge_id) if part)


def is_revoked(row: Mapping[str, Any]) -> bool:
    """Return whether Postgres has an order as one that was cancelled after it was paid."""
    return bool(row["status"] == Status.CANCELLED and row["story"] & PAID)


def is_over(row: Mapping[str, Any]) -> bool:
    """Return whether nothing is left to do about an order: it has ended, its lines are settled, no money is due."""
    return row["status"] in TERMINAL and row["payment"] not in DUE and ASKED.isdisjoint(row["states"])


def payment_must_be(trace: Trace, row: Mapping[str, Any]) -> str | None:
    """Return what an order's payment must be, in words; None when nothing speaks against the one that is there."""
    payment, status = row["payment"], row["status"]
    charge_id = trace.charge_id if trace.published & PAID else row["charge_id"]
    good: set[str | None]
    if trace.published & PAID or row["story"] & PAID:
        if is_revoked(row) or trace.published & CANCELLED:
            good = {Payment.REFUNDED, Payment.REFUND_DUE, Payment.REFUSED}
        else:
            good = {Payment.SUCCESS}
        best: str | None = Payment.SUCCESS if Payment.SUCCESS in good else Payment.REFUNDED
        return None if payment in good and row["charge_id"] == charge_id else _payment(best, charge_id)
    if status != Status.CANCELLED:
        return None if payment is None else "none"
    good = {Payment.VOIDED, Payment.VOID_DUE, Payment.REFUSED}
    if row["reason"] == Reason.PAYMENT_DECLINED:
        best = Payment.FAILED
    else:
        best = Payment.VOIDED if row["story"] & RESERVED and row["total_cents"] else None
    return None if payment in {*good, best} else _payment(best, None)


def line_states(
    status: str, foreign: Sequence[bool], held: Sequence[str | None], *, revoked: bool, refused: bool
) -> str:
    """Return the states of the lines of an order that is put back.

    Args:
        status: of the order.
        foreign: of each line, whether its product has another owner than the order.
        held: how these have it, None for not at all.
        revoked: where it is cancelled, it was paid before.
        refused: where it is cancelled, it was since a line of it could not be held.
    """
    at_home = {Status.CREATED: "h", Status.RESERVED: "h", Status.PAID: "c", Status.CONFIRMED: "c"}
    home = at_home.get(Status(status), "n" if revoked else "x" if refused else "r")

    def abroad(has: str | None) -> str:
        if status == Status.CANCELLED:
            return ("n" if has == "n" else "b") if revoked else "r" if has in ("r", "x") else "l"
        if status == Status.CREATED:
            return has if has in ("h", "x") else "a"
        return "g" if status == Status.PAID and has != "c" else home

    return "".join(abroad(has) if is_foreign else home for is_foreign, has in zip(foreign, held, strict=True))


def units(trace: Trace, row: Mapping[str, Any] | None, holds: Holds, partitions: int) -> Iterator[tuple[str, int, int]]:
    """Yield product id, units sold and units held of an order: by its events, else by the snapshot.

    Lines of other owners count as these have them, until one is put right.

    Args:
        trace: what the topics say.
        row: None when Postgres does not know the order.
        holds: the lines that other owners have of it.
        partitions: of the topics.
    """
    told, seen = trace.published, trace.partition != UNSEEN
    if seen and told & CONFIRMED and not told & CANCELLED and (row is None or not is_revoked(row)):
        for product_id, quantity in trace.lines:
            yield product_id, quantity, 0
        return
    stood = row is not None and stands(trace, row)
    if row is None and not (told and seen):
        return
    fits = row is not None and stood and (not seen or _same_lines(trace, row)) and _states_fit(row)
    if row is not None and (fits or not seen):
        lines: Sequence[tuple[str, int]] = [*zip(row["product_ids"], row["quantities"], strict=True)]
    else:
        lines = trace.lines
    home = trace.partition if row is None else row["home"]
    owners = row["owners"] if row is not None and fits else None
    if owners is None:
        owners = [product_partition(product_id, partitions) if holds else home for product_id, _ in lines]
    foreign = [owner != home for owner in owners]
    held = [holds[product_id][0] if product_id in holds else None for product_id, _ in lines]
    if row is not None and fits:
        states = row["states"]
    else:
        status, story = (row["status"], row["story"]) if row is not None and stood else (str(trace.last), told)
        states = line_states(status, foreign, held, revoked=bool(story & PAID), refused=False)
    for (product_id, quantity), state, is_foreign, has in zip(lines, states, foreign, held, strict=True):
        now = has if is_foreign else state
        if now in ("h", "c"):
            yield product_id, quantity if now == "c" else 0, quantity if now == "h" else 0


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
        before: version in Postgres and state in Redis in the round before; what moves is at work.
    """

    row: Mapping[str, Any]
    sums: Sums
    in_redis: GateState | None = None
    before: tuple[Any, ...] | None = None
    must: dict[str, int] = field(default_factory=dict)

    @property
    def now(self) -> tuple[Any, ...]:
        """What ``before`` is in the next round."""
        return (self.row["version"], self.in_redis)


def judge_product(view: ProductView, progress: Progress) -> list[Finding]:
    """Compare what the topics account for with a product's counts, ledger and gate."""
    row, product_id = view.row, view.row["product_id"]
    found: list[Finding] = []

    def differs(kind: Kind, must: Any, is_now: Any, repair: str, in_flight: str | None = None) -> None:
        found.append(Finding(Difference(kind, product_id, must, is_now, repair), in_flight))

    initial = row["g_initial"] if row["g_initials"] else row["initial"]
    owed = row["owed"] or 0
    must = {"initial": initial or 0, "received": view.sums.received, "adjusted": view.sums.adjusted + owed}
    must |= {"sold": view.sums.sold, "reserved": view.sums.reserved}
    view.must = must
    in_ledger = {name: row[f"g_{name}"] for name in COUNTS}
    if in_ledger != must:
        differs(Kind.STOCK_LEDGER, *_unlike(must, in_ledger), "write the entries that are missing, or counter entries")
    on_hand = must["initial"] + must["received"] + must["adjusted"] - must["sold"]
    if row["version"] is None:
        differs(Kind.STOCK_COUNTS, {**must, "on_hand": on_hand}, "no row", NOTHING)
        return found
    if owed:
        differs(Kind.STOCK_OWED, "no unit sold that is not there", f"{owed} units", REVOKE)
    counts = {"on_hand": row["on_hand"], **{name: row[name] for name in COUNTS}}
    if counts != {"on_hand": on_hand, **must}:
        repair = "set the row to what must be, with an entry in the ledger"
        differs(Kind.STOCK_COUNTS, *_unlike({"on_hand": on_hand, **must}, counts), repair)
    there = view.in_redis
    counts = {"on_hand": on_hand, "reserved": must["reserved"], "taken": 0}
    if there is None or (counts == {name: getattr(there, name) for name in counts} and there.takes == 0):
        return found
    is_now = {name: getattr(there, name) for name in (*counts, "version")}
    in_flight = "its counts are changing" if view.before != view.now else progress.product_busy(product_id)
    if there.taken != there.takes:
        is_now["takes"] = there.takes
        in_flight = None  # no script leaves them so
    elif there.version == row["version"] and (there.on_hand, there.reserved) != (on_hand, must["reserved"]):
        in_flight = None  # the same version of the counts has one value only
    counts["version"] = row["version"]
    differs(
        Kind.REDIS_COUNTS, counts, is_now, "invalidate what Redis knows, and load the product from Postgres", in_flight
    )
    return found


def judge_catalogue(row: Mapping[str, Any], must: Mapping[str, Any]) -> list[Finding]:
    """Compare name, price and limit of a product with what the commands over them say; only what they say is compared."""
    found = {member: row[member] for member in must}
    if found == must:
        return []
    unlike = {member for member in must if must[member] != found[member]}
    said, is_now = ({member: of[member] for member in must if member in unlike} for of in (must, found))
    return [Finding(Difference(Kind.STOCK_CATALOGUE, row["product_id"], said, is_now, COMMAND))]


def _unlike(must: Mapping[str, int], found: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    names = [name for name in must if must[name] != found[name]]
    return {name: must[name] for name in names}, {name: found[name] for name in names}
