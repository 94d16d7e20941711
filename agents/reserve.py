"""Reads ``orders``.
Decides, in the order of arrival, which are held whole, which are refused and why, which wait for other owners' lines.
Writes takes in Redis, then the order, its stock and the ledger in Postgres, in one transaction of the intake lane.
Emits verdicts to the ingresses that wait for them; hands orders to ``pay`` and ``commit``, in memory.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from itertools import compress, islice, repeat
from typing import Any, NamedTuple

import orjson
import structlog

from orderstream import metrics
from orderstream.agents.batches import Batch
from orderstream.agents.counting import count_lines, count_orders
from orderstream.agents.desk import About, Desk, Entry, Slip, Unread, counted, marks_of
from orderstream.agents.intake import Arrival, reject, send_on, take_in
from orderstream.agents.lifecycle import PRECEDENCE, Cancel, Order, Payment
from orderstream.agents.stage import Stage, reply_messages
from orderstream.agents.tracing import BatchTrace
from orderstream.errors import InvalidRecord, OwnershipLost
from orderstream.failpoints import failpoint
from orderstream.lua.gate import Counts, GateVerdict
from orderstream.sql import stages
from orderstream.sql.stages import HoldThere, NotEnough, Step, Written
from orderstream.sql.store import statements
from orderstream.streams.headers import reply_channel
from orderstream.streams.orders import Limits, Reason, Status, decode_record, named, same
from orderstream.streams.partitions import product_partition
from orderstream.streams.producer import Outbox
from orderstream.streams.topics import ORDERS
from orderstream.streams.tracing import of_headers

TRACED = {"h": "held", "a": "pending", "r": "not held"}
"""States of lines that are not refused, as a trace has them."""

DETAIL_CHARS_MAX = 1_000
"""Of what is wrong with a record; its dead letter has more."""

NO_FLOORS: Mapping[int, int] = {}
REFUSALS = {GateVerdict.REFUSED: Reason.INSUFFICIENT_STOCK, GateVerdict.LIMITED: Reason.USER_LIMIT}

log = structlog.get_logger("reserve")


class Fate(NamedTuple):
    """What becomes of an order as it is taken in.

    Attributes:
        states: a character a line; see :mod:`~orderstream.agents.lifecycle`.
        reasons: of each line that is refused, else None.
    """

    status: Status
    reason: str | None
    states: str
    reasons: Sequence[str | None]


_ALONE: Mapping[GateVerdict | Reason, Fate] = {
    GateVerdict.TAKEN: Fate(Status.RESERVED, None, "h", ()),
    GateVerdict.REFUSED: Fate(Status.CANCELLED, Reason.INSUFFICIENT_STOCK, "x", [Reason.INSUFFICIENT_STOCK]),
}
"""Of most orders of one line, by the verdict of Redis."""


def sort(batch: Batch, stage: Stage, outbox: Outbox, slip: Slip, unread: list[Unread]) -> list[Arrival]:
    """Decode a batch: what is no order is rejected, and listed where it names one, what has another home is sent on."""
    settings = stage.settings
    limits = Limits(settings.order_lines_max, settings.line_quantity_max, settings.order_bytes_max)

    def arrival_of(record: Any) -> Arrival:
        try:
            order = decode_record(record, limits)
            owners = owners_of(order.lines, record.partition, settings.partitions) if len(order.lines) > 1 else ()
            return Arrival(order, record, reply_channel(record), owners)
        except InvalidRecord as fault:
            if (order_id := named(record.value)) is not None:
                detail = fault.detail[:DETAIL_CHARS_MAX].replace("\0", "\ufffd")  # Postgres keeps none
                unread.append(Unread(order_id, (record.partition, record.offset), fault.reason, detail, slip))
            raise

    arrivals = []
    for record, arrival in take_in(batch.records(settings.topic(ORDERS.name)), arrival_of, outbox):
        if product_partition(arrival.order.lines[0][0], settings.partitions) != record.partition:
            send_on(arrival.order, record, outbox)
        else:
            arrivals.append(arrival)
    return arrivals


def owners_of(lines: Sequence[tuple[str, int]], home: int, partitions: int) -> tuple[int, ...]:
    """Return the partition of each line's product; empty where home has all."""
    owners = tuple([product_partition(product_id, partitions) for product_id, _ in lines])
    return owners if owners.count(home) < len(owners) else ()


def once(arrivals: Sequence[Arrival]) -> tuple[dict[str, Arrival], list[Arrival]]:
    """Return the first arrival of each order id, by it, and those for which it does not stand.

    A repeat behind it in its partition is dropped.  About the others Postgres says later whose the id is: after a crash the
    partitions of a batch come in another order.
    """
    first: dict[str, Arrival] = {}
    others = []
    for arrival in arrivals:
        before = first.setdefault(arrival.order.order_id, arrival)
        if before is not arrival and (
            before.record.partition != arrival.record.partition or not same(before.order, arrival.order)
        ):
            others.append(arrival)
    return first, others


def reused(order_id: str) -> InvalidRecord:
    """Make the fault of an order whose id is another order's."""
    return InvalidRecord("order_id_reused", f"{order_id} is the id of another order already")


def removed(order_id: str) -> InvalidRecord:
    """Make the fault of an order whose id is that of one that was removed: the provider knows it as the old one's key."""
    return InvalidRecord("order_removed", f"{order_id} is the id of an order that was removed")


def is_below(floors: Mapping[int, int], record: Any) -> bool:
    """Tell whether a record was there when Postgres was last set back: its order may have been charged in what got lost."""
    return bool(record.offset < floors.get(record.partition, 0))


def fate_of(verdicts: Sequence[GateVerdict | Reason]) -> Fate:
    """Decide about an order by the verdicts on its lines: of Redis or of its owner; ``NOT_OURS`` of other partitions' lines.

    It is held whole or not at all.  While other owners have to be asked, the lines of this worker are held for it.
    """
    if len(verdicts) == 1 and (fate := _ALONE.get(verdicts[0])) is not None:
        return fate
    if verdicts.count(GateVerdict.TAKEN) == len(verdicts):
        return Fate(Status.RESERVED, None, "h" * len(verdicts), ())
    reasons = [verdict if isinstance(verdict, Reason) else REFUSALS.get(verdict) for verdict in verdicts]
    refused = {reason for reason in reasons if reason is not None}
    if refused:
        reason = next(reason for reason in PRECEDENCE if reason in refused)
        return Fate(Status.CANCELLED, reason, "".join("r" if why is None else "x" for why in reasons), reasons)
    asked = any(verdict is GateVerdict.NOT_OURS for verdict in verdicts)
    states = "".join("a" if verdict is GateVerdict.NOT_OURS else "h" for verdict in verdicts)
    return Fate(Status.CREATED if asked else Status.RESERVED, None, states, ())


def under_locks(
    arrivals: Sequence[Arrival],
    verdicts: Sequence[Sequence[GateVerdict]],
    counts: Mapping[str, Counts],
    limits: Mapping[str, int],
    units: Mapping[tuple[str, str], int],
) -> list[Fate]:
    """Decide by what Postgres has, in the order of arrival, whatever Redis said about single lines.

    Args:
        arrivals: the orders.
        verdicts: of Redis, or ``NOT_OURS``, for each line of each order.
        counts: of each product there is.
        limits: units that one user may have, of products with a limit.
        units: what users have of these, by product and user.
    """
    available = {product_id: now.on_hand - now.reserved for product_id, now in counts.items()}
    had = dict(units)
    fates = []
    for arrival, said in zip(arrivals, verdicts, strict=True):
        user = arrival.order.user_id
        decided: list[GateVerdict | Reason] = []
        for (product_id, quantity), verdict in zip(arrival.order.lines, said, strict=True):
            if verdict is GateVerdict.NOT_OURS:
                decided.append(verdict)
            elif product_id not in available:
                decided.append(Reason.UNKNOWN_PRODUCT)
            elif quantity > available[product_id]:
                decided.append(Reason.INSUFFICIENT_STOCK)
            elif product_id in limits and had.get((product_id, user), 0) + quantity > limits[product_id]:
                decided.append(Reason.USER_LIMIT)
            else:
                decided.append(GateVerdict.TAKEN)
        fate = fate_of(decided)
        if fate.status is not Status.CANCELLED:
            for (product_id, quantity), state in zip(arrival.order.lines, fate.states, strict=True):
                if state == "h":
                    available[product_id] -= quantity
                    had[product_id, user] = had.get((product_id, user), 0) + quantity
        fates.append(fate)
    return fates


def columns_of(
    taken: Sequence[tuple[Arrival, Fate]], floors: Mapping[int, int] = NO_FLOORS
) -> dict[str, Sequence[Any]]:
    """Return the columns of ``hold`` for these orders, sorted by id; ``floors``: see :func:`is_below`."""
    orders, records = [arrival.order for arrival, _ in taken], [arrival.record for arrival, _ in taken]
    fates = [fate for _, fate in taken]
    ids, users = [order.order_id for order in orders], [order.user_id for order in orders]
    products = [product_id for order in orders for product_id, _ in order.lines]
    quantities = [quantity for order in orders for _, quantity in order.lines]
    states = "".join([fate.states for fate in fates])
    held: tuple[Sequence[Any], ...] = (ids, products, users, quantities)
    ns: Sequence[int] = ()
    owners: Sequence[int | None] = ()
    if len(products) > len(ids):
        ns = [n for n, order in enumerate(orders, 1) for _ in order.lines]
        held = [ids[n - 1] for n in ns], products, [users[n - 1] for n in ns], quantities
        nobody = [(None,) * len(order.lines) for order in orders]
        owners = [
            owner
            for (arrival, fate), none in zip(taken, nobody, strict=True)
            for owner in (arrival.owners if fate.status is not Status.CANCELLED else ()) or none
        ]
    if states.count("h") < len(states):
        held = tuple([*compress(column, [state == "h" for state in states])] for column in held)
    reasons: Sequence[str | None] = ()
    if "x" in states:
        reasons = [why for fate in fates for why in fate.reasons or (None,) * len(fate.states)]
    return {
        "order_ids": ids,
        "homes": [record.partition for record in records],
        "source_offsets": [record.offset for record in records],
        "user_ids": users,
        "payment_methods": [order.payment_method for order in orders],
        "idempotency_keys": [order.idempotency_key for order in orders],
        "placed_ats": [order.placed_at for order in orders],
        "statuses": [fate.status for fate in fates],
        "cancel_reasons": [fate.reason for fate in fates],
        "payments": [_due(fate, is_below(floors, record)) for fate, record in zip(fates, records, strict=True)]
        if floors
        else (),
        "line_ns": ns,
        "line_product_ids": products,
        "line_quantities": quantities,
        "line_states": [*states],
        "line_reasons": reasons,
        "line_owners": owners,
        **dict(zip(("held_order_ids", "held_product_ids", "held_user_ids", "held_quantities"), held, strict=True)),
    }


def _due(fate: Fate, below: bool) -> Payment | None:
    """Return what is due of an order that ends as it is taken in: a void, where it may have been charged before."""
    return Payment.VOID_DUE if below and fate.status is Status.CANCELLED else None


async def reserve(desk: Desk, batch: Batch) -> Coroutine[Any, Any, Any]:
    """Begin to take a batch in, with takes in Redis; return what goes on with it.

    That is a coroutine that writes the orders; it returns another one, which hands them over in memory, and that a third
    one, which tells Redis and others.  Each is for one batch after the other.  The first one has the transaction and little
    more: the next batch's begins at once behind it.
    """
    stage, lane, began = desk.stage, desk.intake, time.perf_counter()
    outbox = stage.outbox("reserve", batch)
    slip = Slip(stage, batch)
    unread: list[Unread] = []
    first, others = once(await _without_removed(desk, sort(batch, stage, outbox, slip, unread)))
    arrivals = list(first.values())
    outbox.steps.done("decode")
    is_ours = lane.claims.__contains__
    asked = [
        (product_id, arrival.order.order_id, quantity)
        for arrival in arrivals
        for product_id, quantity in (
            compress(arrival.order.lines, map(is_ours, arrival.owners)) if arrival.owners else arrival.order.lines
        )
    ]

    def user_of(k: int) -> str:
        return first[asked[k][1]].order.user_id

    failpoint("reserve.before_lua")
    asked_at, claim_of = time.perf_counter(), desk.claims_of(lane)
    said, _ = await stage.until_available("postgres", lambda: stage.gate.take(asked, user_of, claim_of), batch)
    failpoint("reserve.after_lua")
    outbox.steps.done("gate")
    takes: dict[str, list[str]] = {}
    for (product_id, order_id, _), verdict in zip(asked, said, strict=True):
        if verdict is not GateVerdict.REFUSED and verdict is not GateVerdict.LIMITED:
            takes.setdefault(product_id, []).append(order_id)
    of_near = iter(said)
    new = [
        (
            arrival,
            [next(of_near) if is_ours(owner) else GateVerdict.NOT_OURS for owner in arrival.owners]
            or [*islice(of_near, len(arrival.order.lines))],
        )
        for arrival in arrivals
    ]
    plan = plan_of(new, desk.floors)
    partitions = {chunk.tp.partition for chunk in batch.chunks}
    partitions.update(owner for arrival in arrivals for owner in arrival.owners if is_ours(owner))
    batch.keep()

    async def hold() -> Coroutine[Any, Any, Any]:
        if desk.intake is not lane:
            raise OwnershipLost  # the batch before was not written: this one must not be marked as read before it
        outbox.steps.done("turn")
        desk.begin_hold(first)
        step = Step(lane, frozenset(partitions), [*marks_of(batch).values()])
        taken, known, written = await stage.until_available("postgres", lambda: _write(desk, step, new, plan), batch)
        failpoint("reserve.after_hold")
        outbox.steps.done("sql")
        metrics.RESERVE_LATENCY.observe(time.perf_counter() - asked_at)
        return hand_over(taken, known, written)

    async def hand_over(
        taken: Sequence[tuple[Arrival, Fate]], known: Sequence[Arrival], written: Written
    ) -> Coroutine[Any, Any, None]:
        if desk.intake is not lane:
            raise OwnershipLost
        if outbox.trace is not None:
            _trace(outbox.trace, taken, known)
        waiting = _hand_over(desk, slip, taken, written)
        await _repeat(desk, slip, [*known, *others], outbox)
        desk.end_hold(first)
        for item in unread:  # behind the hold: an order of this batch that has the id is there
            slip.left += 1
            desk.put(item)
        outbox.steps.done("hand_over")
        return publish(written, waiting)

    async def publish(written: Written, waiting: list[tuple[str, str, str | None]]) -> None:
        messages, counts = reply_messages(stage, waiting), dict(written.counts)
        await stage.update_gate(counts, takes, messages, batch, users=written.users, claim_of=claim_of)
        failpoint("reserve.after_gate")
        outbox.steps.done("update_gate")
        await stage.emit(outbox, "reserve", batch)
        slip.done()
        metrics.batch_done("reserve", len(batch), began)

    return hold()


async def _without_removed(desk: Desk, arrivals: list[Arrival]) -> list[Arrival]:
    """Leave out orders that were read before and have no row any more: they are gone, and must not be sold again.

    A record under the id of an order that is remembered as removed stays: it is a dead letter, however often it is read.
    """
    before = [a.order.order_id for a in arrivals if a.record.offset < desk.read_before.get(a.record.partition, 0)]
    if not before:
        return arrivals
    there = await desk.stage.until_available("postgres", lambda: desk.stage.store.order_states(before))
    gone = {order_id for order_id in before if order_id not in there}
    if gone:
        metrics.ORDERS_GONE.inc(len(gone))
        log.warning("orders that were removed come again: they are passed over", number=len(gone), first=min(gone))
    return [arrival for arrival in arrivals if arrival.order.order_id not in gone]


Plan = tuple[list[tuple[Arrival, Fate]], dict[str, Sequence[Any]]]
"""Orders with their fates, sorted by id, and the columns of ``hold`` for them."""


def plan_of(new: Sequence[tuple[Arrival, Sequence[GateVerdict]]], floors: Mapping[int, int]) -> Plan | None:
    """Decide by the verdicts of Redis; None: Postgres has to, under its locks."""
    if any(GateVerdict.UNDECIDED in said for _, said in new):
        return None
    taken = _by_id([arrival for arrival, _ in new], [fate_of(said) for _, said in new])
    return taken, columns_of(taken, floors)


async def _write(
    desk: Desk, step: Step, new: Sequence[tuple[Arrival, Sequence[GateVerdict]]], plan: Plan | None
) -> tuple[list[tuple[Arrival, Fate]], list[Arrival], Written]:
    """Write a batch; return the new orders with their fates, sorted by id, the known ones, and what Postgres answered."""
    known: list[Arrival] = []
    locked = plan is None
    while True:
        attempt = uuid.uuid4()
        try:
            if plan is None or locked:
                taken, written = await _write_under_locks(desk, step, new, attempt)
            else:
                taken, columns = plan
                written = await stages.hold(desk.stage.store.pool, step.lane, step.columns() | columns, attempt)
        except NotEnough:
            if locked:
                raise
            locked = True  # Redis was wrong about something: Postgres decides
            continue
        except HoldThere:  # a release came before its line: each owner answers by what it has
            new = [(arrival, _at_home(said, arrival)) for arrival, said in new]
        else:
            if (ids := written.row["known"]) is None:
                return taken, known, written
            there = set(ids)
            known += [arrival for arrival, _ in new if arrival.order.order_id in there]
            new = [one for one in new if one[0].order.order_id not in there]
        plan = plan_of(new, desk.floors)


def _by_id(arrivals: Sequence[Arrival], fates: Sequence[Fate]) -> list[tuple[Arrival, Fate]]:
    return sorted(zip(arrivals, fates, strict=True), key=lambda taken: taken[0].order.order_id)


def _at_home(said: Sequence[GateVerdict], arrival: Arrival) -> list[GateVerdict]:
    """Leave the verdicts on lines at home only."""
    home = arrival.record.partition
    owned = zip(said, arrival.owners or (home,) * len(said), strict=True)
    return [verdict if owner == home else GateVerdict.NOT_OURS for verdict, owner in owned]


async def _write_under_locks(
    desk: Desk, step: Step, new: Sequence[tuple[Arrival, Sequence[GateVerdict]]], attempt: uuid.UUID
) -> tuple[list[tuple[Arrival, Fate]], Written]:
    """Decide under the locks of the stock, and write, in one transaction."""
    arrivals = [arrival for arrival, _ in new]
    ids = sorted(
        {
            product_id
            for arrival, said in new
            for (product_id, _), verdict in zip(arrival.order.lines, said, strict=True)
            if verdict is not GateVerdict.NOT_OURS
        }
    )
    async with desk.stage.store.pool.acquire() as connection, connection.transaction():
        # Lanes before stock, as in every transaction: a former owner must not wait for one with the other in its hands.
        await connection.execute(statements("stages.sql")["lock_lanes"], sorted(step.partitions))
        rows = await connection.fetch("SELECT * FROM lock_stock($1)", ids)
        counts, limits, units = await counted(connection, rows, (arrival.order.user_id for arrival in arrivals))
        taken = _by_id(arrivals, under_locks(arrivals, [said for _, said in new], counts, limits, units))
        columns = step.columns() | columns_of(taken, desk.floors)
        written = await stages.hold(connection, step.lane, columns, attempt, commits=False)
    if written.row["known"] is None:
        step.lane.stepped(step.partitions)
    return taken, written


def _trace(trace: BatchTrace, new: Sequence[tuple[Arrival, Fate]], known: Sequence[Arrival]) -> None:
    for arrival, fate in new:
        if (context := of_headers(arrival.record.headers)) is not None:
            reasons = fate.reasons or (None,) * len(fate.states)
            named = zip(arrival.order.lines, fate.states, reasons, strict=True)
            lines = [f"{product_id}: {reason or TRACED[state]}" for (product_id, _), state, reason in named]
            trace.taken_in(arrival.order.order_id, context, lines)
    for arrival in known:
        if (context := of_headers(arrival.record.headers)) is not None:
            trace.taken_in(
                arrival.order.order_id, context, [f"{product_id}: known" for product_id, _ in arrival.order.lines]
            )


def _hand_over(
    desk: Desk, slip: Slip, new: Sequence[tuple[Arrival, Fate]], written: Written
) -> list[tuple[str, str, str | None]]:
    """Put new orders into the hands of the next stages; return the verdicts that somebody waits for."""
    waiting: list[tuple[str, str, str | None]] = []
    at, now = written.row["at"], time.monotonic()
    totals, prices = written.row["totals"] or (), written.row["prices_of"] or repeat(None, len(new))
    places = zip(written.row["kept_partitions"] or (), written.row["kept_offsets"] or (), strict=True)
    cancels = dict(zip(written.row["kept_ids"] or (), places, strict=True))
    orders: list[Order] = []
    for (arrival, fate), total, costs in zip(new, totals, prices, strict=True):
        taken, record, reply_to = arrival.order, arrival.record, arrival.reply_to
        below = is_below(desk.floors, record)
        held, refused = fate.status is Status.RESERVED, fate.status is Status.CANCELLED
        order = Order(
            order_id=taken.order_id,
            home=record.partition,
            user_id=taken.user_id,
            payment_method=taken.payment_method,
            lines=taken.lines,
            status=fate.status,
            states=fate.states,
            created_at=at,
            total_cents=total,
            prices=[] if costs is None else orjson.loads(costs),
            reason=fate.reason,
            payment=_due(fate, below),
            owners=arrival.owners if held else (),
            may_be_charged=below,
            reserved_at=at if held else None,
            cancelled_at=at if refused else None,
        )
        cancelled = cancels.get(order.order_id) if cancels and not refused else None
        if reply_to is not None and (held or refused) and cancelled is None:
            waiting.append((reply_to, order.order_id, fate.reason))
            reply_to = None
        orders.append(order)
        entry = Entry(order, [slip], reply_to, now, now)
        desk.add(entry)
        if cancelled is not None:  # its keeper will say so too
            desk.put(About(order.order_id, Cancel(), place=cancelled))
        elif held:
            desk.pay(entry)
        else:  # over, or its lines have to be asked of their owners
            desk.put(About(order.order_id, None))
    slip.left += len(orders)
    desk.views.counted(written.counts, written.sold)
    desk.stage.sample.offer([arrival for arrival, _ in new])
    count_orders([(order, None, None) for order in orders], desk.stage.sample)
    held_lines = sum([fate.states.count("h") for _, fate in new])
    count_lines(held_lines, (reason for _, fate in new for reason in fate.reasons))
    return waiting


async def _repeat(desk: Desk, slip: Slip, known: Sequence[Arrival], outbox: Outbox) -> None:
    """Take up again orders whose record came again; another order under the same id, or a removed one's, is rejected."""
    if not known:
        return
    metrics.ORDERS_REPEATED.inc(len(known))
    stage, ids = desk.stage, [a.order.order_id for a in known]
    met = [a.record.partition for a in known], [a.record.offset for a in known]
    await stage.until_available(
        "postgres", lambda: stage.store.pool.execute(statements("stages.sql")["met_again"], ids, *met)
    )
    rows = await stage.until_available("postgres", lambda: desk.read(ids))
    missing = [order_id for order_id in ids if order_id not in rows]
    gone = await stage.until_available("postgres", lambda: stage.store.removed(missing))
    for arrival in known:
        order, record = rows.get(arrival.order.order_id), arrival.record
        if order is None:
            if arrival.order.order_id not in gone:
                raise OwnershipLost  # a moment ago it was there: Postgres is another one; all is read again
            fault = removed(arrival.order.order_id)
            reject(fault, record, outbox)
            slip.left += 1
            place = record.partition, record.offset
            desk.put(Unread(arrival.order.order_id, place, fault.reason, fault.detail, slip))
            continue
        theirs = (order.user_id, order.payment_method, sorted(order.lines))
        is_same = theirs == (arrival.order.user_id, arrival.order.payment_method, sorted(arrival.order.lines))
        if not is_same or product_partition(order.lines[0][0], stage.settings.partitions) != order.home:
            # The second is no order of ours, whoever wrote its row: sent on, it would come here again for ever.
            reject(reused(order.order_id), record, outbox)
        elif order.home != record.partition:
            # With its lines as they stand there: the first one says where it goes.
            send_on(arrival.order._replace(lines=tuple(order.lines)), record, outbox)
        else:
            slip.left += 1
            desk.put(About(order.order_id, None, slip))
