"""Reads what ``reserve`` and ``pay`` hand over, ``order-lines`` and ``stock-commands``.
Decides what becomes of orders in hand, and of lines of other homes' orders (:mod:`.lifecycle`, :mod:`.holding`).
Writes orders, holds, stock, the ledger and what waits, in one transaction of the settle lane.
Emits ``order-events`` in the order of these transactions; lines to their owners, answers to homes.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgspec

from orderstream import metrics
from orderstream.agents import holding
from orderstream.agents.batches import Batch
from orderstream.agents.counting import count_lines, count_orders
from orderstream.agents.desk import About, Desk, Entry, LineAsked, Read, Slip, Unread
from orderstream.agents.intake import inner_rows, take_in
from orderstream.agents.lifecycle import (
    DUE,
    STEPS,
    AskAgain,
    Cancel,
    LineHeld,
    Order,
    Payment,
    asks,
    decide,
    is_over,
    moves,
    sends,
    settled_already,
    stamp,
)
from orderstream.agents.reserve import REFUSALS
from orderstream.agents.stage import reply_messages
from orderstream.agents.tracing import BatchTrace
from orderstream.errors import InvalidRecord, OwnershipLost
from orderstream.failpoints import failpoint
from orderstream.lua.gate import GateVerdict
from orderstream.sql import stages
from orderstream.sql.stages import Lane, Mark, NotEnough, Written
from orderstream.sql.store import statements
from orderstream.streams import events
from orderstream.streams.headers import LANE
from orderstream.streams.lines import LineStands, LineWanted
from orderstream.streams.orders import Reason, Status
from orderstream.streams.producer import Outbox
from orderstream.streams.topics import ORDER_COMMANDS, ORDER_EVENTS, ORDER_LINES, RESERVATIONS

ITEMS_MAX = 2_000
"""Of one transaction."""

TRIES = 5
"""How often lines are decided by counts that the intake lane may change meanwhile, before they are refused."""


class Change(msgspec.Struct, gc=False):
    """An order that this transaction moves: where it stood before, and the lines whose units move."""

    entry: Entry
    status: Status
    states: str
    payment: Payment | None
    place: tuple[int, int] | None
    moves: list[tuple[int, str]]


@dataclass(slots=True)
class Line:
    """A line of another home's order, and what this transaction makes of it; ``held`` None: its owner does not know it."""

    partition: int
    asked: LineWanted
    held: holding.Held | None
    new: str | None = None
    movement: str | None = None


@dataclass(slots=True)
class Turn:
    """What one transaction is about, and what follows from it."""

    size: int
    claim_of: Callable[[str], int]
    near: Container[int]
    began: float = field(default_factory=time.perf_counter)
    steps: metrics.Steps = field(default_factory=lambda: metrics.Steps("commit"))
    trace: BatchTrace | None = None
    changes: dict[str, Change] = field(default_factory=dict)
    touched: dict[str, Entry] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    to_wait: list[Entry] = field(default_factory=list)
    over: list[tuple[int, str]] = field(default_factory=list)
    kept: list[tuple[int, str, int]] = field(default_factory=list)
    found: list[tuple[int, str]] = field(default_factory=list)
    slips: list[Slip] = field(default_factory=list)
    takes: dict[str, list[str]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    homes: dict[str, int] = field(default_factory=dict)
    sent_on: list[tuple[int, str, bytes]] = field(default_factory=list)
    orphans: list[tuple[str, str]] = field(default_factory=list)
    lanes: dict[int, list[tuple[str, bytes]]] = field(default_factory=dict)
    again: list[tuple[Order, int, str]] = field(default_factory=list)
    repeated: list[Order] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    gives_back: bool = False

    def may_go_on(self, order: Order) -> bool:
        """Tell whether more may be decided about an order: so far this transaction has moved lines of it at most."""
        change = self.changes.get(order.order_id)
        return order.order_id in self.touched and (
            change is None or (change.status, change.payment) == (order.status, order.payment)
        )


def sort(desk: Desk, batch: Batch, slip: Slip, outbox: Outbox) -> None:
    """Put what other homes want of lines on the desk; it is acknowledged with what becomes of it."""
    name = desk.stage.settings.topic(ORDER_LINES.name)
    for _, rows in take_in(batch.records(name), lambda r: _lines_of(desk, r), outbox):
        for row in rows:
            slip.left += 1
            desk.put(LineAsked(row, slip))


def _lines_of(desk: Desk, record: Any) -> list[LineWanted]:
    """Return the lines of a record on ``order-lines``.

    Raises:
        InvalidRecord: no stage wrote this, or not to this partition.
    """
    rows = inner_rows(record, LineWanted)
    partitions = desk.stage.settings.partitions
    for row in rows:
        if desk.owner_of(row.product_id) != record.partition:
            raise InvalidRecord("invalid_rows", f"a line of a product that belongs to another partition: {row!r:.200}")
        if not row.is_sound(partitions):
            raise InvalidRecord("invalid_rows", f"no stage wrote this: {row!r:.200}")
    return rows


async def settle(desk: Desk, batch: Batch) -> Any:
    """Decide and write one batch of what came in; return the coroutine that publishes what follows."""
    if desk.generation is None:
        raise OwnershipLost  # another stage has let go of everything: take over first
    lane = desk.settle  # another one after a rebalance: then what is decided here is not written
    taken = [desk.inbox.popleft() for _ in range(min(len(desk.inbox), ITEMS_MAX))]
    if desk.inbox:
        desk.wake_commit.set()  # the rest of it is the next transaction's
    items = [item for item in taken if not isinstance(item, Read)]
    turn = Turn(max(len(items), len(batch)), desk.claims_of(lane), desk.near(lane))
    turn.trace = desk.stage.trace(turn.steps)
    for read in taken:
        if isinstance(read, Read):
            desk.note_marks(read.marks)
            turn.slips.append(read.slip)
    marks = desk.take_marks()
    turn.unread = [item for item in items if isinstance(item, Unread)]
    turn.slips += [item.slip for item in turn.unread]
    await _read(desk, items, turn)
    _decide_orders(desk, [item for item in items if isinstance(item, About)], turn)
    await _decide_lines(desk, [item for item in items if isinstance(item, LineAsked)], turn, batch)
    turn.over = desk.take_finished()
    _note_waiting(desk, turn)
    turn.found, desk.found = desk.found, []
    turn.steps.done("decide")
    failpoint("commit.before_settle")
    written = await _write(desk, lane, turn, batch, marks)
    if written is not None:
        _stamp(turn, written)
        _count(desk, turn, written)
        if turn.trace is not None:
            _trace(turn.trace, turn)
    desk.decided += len(taken)
    failpoint("commit.after_settle")
    turn.steps.done("sql")
    homes = {entry.order.home for entry in (*turn.touched.values(), *turn.to_wait)}
    homes |= {item.place[0] for item in turn.unread}
    turn.lanes = {home: [(LANE, lane.place(home))] for home in homes}
    return _publish(desk, turn, written, batch)


async def _read(desk: Desk, items: Iterable[About | LineAsked | Unread], turn: Turn) -> None:
    """Take orders in hand that something came in about; the rows of those that are not in hand yet are read."""
    wanted = {
        item.order_id
        for item in items
        if isinstance(item, About)
        and not _is_whole(desk.entries.get(item.order_id))
        and item.order_id not in desk.being_held
    }
    turn.read = wanted
    if not wanted:
        return
    rows = await desk.stage.until_available("postgres", lambda: desk.read(wanted))
    if over := [order_id for order_id, order in rows.items() if is_over(order)]:  # they are told again
        place, met = [-1] * len(over), statements("stages.sql")["met_again"]
        await desk.stage.until_available("postgres", lambda: desk.stage.store.pool.execute(met, over, place, place))
        there = await desk.stage.until_available("postgres", lambda: desk.read(over))
        rows = {order_id: order for order_id, order in rows.items() if order_id in there or not is_over(order)}
    for order_id, order in rows.items():
        entry = desk.entries.get(order_id)
        if entry is not None:
            entry.order = order
        elif order.home in desk.settle.claims:
            desk.add(Entry(order))
        else:
            turn.homes[order_id] = order.home


def _is_whole(entry: Entry | None) -> bool:
    """Tell whether all of an order is in memory: of one whose lines are asked, owners and prices stand in its row only."""
    return entry is not None and (entry.order.status is not Status.CREATED or bool(entry.order.owners))


def _decide_orders(desk: Desk, items: Sequence[About], turn: Turn) -> None:
    """Decide about orders: of each one step in its life a transaction, and none while the last one is being published."""
    for item in items:
        entry = desk.entries.get(item.order_id)
        if item.order_id in desk.being_held:
            desk.held_back.append(item)
        elif not (_is_whole(entry) or (entry is None and item.order_id in turn.read)):
            # Taken in hand, or let go of, since the rows were read: the next transaction reads its row first.
            desk.put(item)
        elif entry is None:
            _not_here(desk, item, turn)
        elif entry.later is not None and not turn.may_go_on(entry.order):
            entry.later.append(item)
        else:
            if entry.later is None:
                entry.later = []
                turn.touched[item.order_id] = entry
            _decide_one(entry, item, turn)


def _decide_one(entry: Entry, item: About, turn: Turn) -> None:
    order = entry.order
    if item.slip is not None:
        if item.event is None and not entry.is_waiting:
            entry.slips.append(item.slip)  # its record came again: acknowledged when the order is over, or waits
        else:
            turn.slips.append(item.slip)
    if item.event is None:
        turn.repeated.append(order)
        return
    states = order.states
    status, payment = order.status, order.payment
    if decide(order, item.event, turn.near):
        change = turn.changes.get(item.order_id)
        if change is None:
            change = turn.changes[item.order_id] = Change(entry, status, states, payment, None, [])
        change.moves += moves(states, order.states)
        change.place = item.place or change.place
    elif isinstance(item.event, LineHeld) and (line := settled_already(order, item.event)) is not None:
        turn.again.append((order, *line))


def _not_here(desk: Desk, item: About, turn: Turn) -> None:
    """Decide about an order of another home, or one that Postgres does not know: a cancel is kept, a held line released."""
    home = turn.homes.get(item.order_id)
    match item.event:
        case Cancel() if home is not None:
            turn.sent_on.append((home, item.order_id, b"cancel"))
        case AskAgain() if home is not None:
            turn.sent_on.append((home, item.order_id, b"retry_payment"))
        case Cancel() if item.place is not None:
            turn.kept.append((item.place[0], item.order_id, item.place[1]))
        case LineHeld() if home is None:
            turn.orphans.append((item.order_id, item.event.product_id))
        case _:
            pass
    if item.slip is not None:
        turn.slips.append(item.slip)


async def _decide_lines(desk: Desk, items: Sequence[LineAsked], turn: Turn, batch: Batch) -> None:
    """Decide about lines of other homes' orders: first what is known of them, then, of new ones, whether they are held."""
    if not items:
        return
    stage = desk.stage
    keys = [(item.wanted.order_id, item.wanted.product_id) for item in items]
    rows = await stage.until_available(
        "postgres",
        lambda: stage.store.pool.fetch(
            statements("stages.sql")["holds_of"], [k[0] for k in keys], [k[1] for k in keys]
        ),
    )
    known = {(row["order_id"], row["product_id"]): row for row in rows}
    by_key: dict[tuple[str, str], Line] = {}
    fresh: list[Line] = []
    for item, key in zip(items, keys, strict=True):
        if key in by_key:
            desk.put(item)  # one step a line and transaction
            continue
        if item.slip is not None:
            turn.slips.append(item.slip)
        wanted, held = item.wanted, None
        if (row := known.get(key)) is not None:
            if row["user_id"]:  # none: let go of by a home that did not know the order
                # As it was held, whatever is asked now.
                wanted = wanted._replace(quantity=row["quantity"], user_id=row["user_id"], home=row["home"])
            held = holding.Held(row["state"], row["price"], row["reason"])
        line = by_key[key] = Line(desk.owner_of(wanted.product_id), wanted, held)
        turn.lines.append(line)
        if held is not None or wanted.action != "hold":
            # Whoever took units for it in Redis may have died before it said so.
            turn.takes.setdefault(wanted.product_id, []).append(wanted.order_id)
        if line.held is not None:
            line.new, line.movement = holding.settle(line.held, wanted.action)
        elif wanted.action == "hold":
            fresh.append(line)
        else:
            line.new = "r"  # its hold is still to come, and finds that it is released
    if fresh:
        asked = [(line.asked.product_id, line.asked.order_id, line.asked.quantity) for line in fresh]
        verdicts, _ = await stage.until_available(
            "postgres", lambda: stage.gate.take(asked, lambda n: fresh[n].asked.user_id, turn.claim_of), batch
        )
        for line, verdict in zip(fresh, verdicts, strict=True):
            if verdict in REFUSALS:
                _refuse(line, REFUSALS[verdict])
            else:
                line.new, line.movement = "h", "hold"
                turn.takes.setdefault(line.asked.product_id, []).append(line.asked.order_id)
        if GateVerdict.UNDECIDED in verdicts:
            await _decide_by_counts(desk, turn)


def _refuse(line: Line, reason: str) -> None:
    line.new, line.movement, line.held = "x", None, holding.Held("x", None, reason)


async def _decide_by_counts(desk: Desk, turn: Turn) -> None:
    """Refuse the lines to be held for which Postgres has no units, whatever Redis said, in the order of arrival."""
    lines = [line for line in turn.lines if line.movement == "hold"]
    ids, users = {line.asked.product_id for line in lines}, {line.asked.user_id for line in lines}
    counts, limits, units = await desk.stage.until_available("postgres", lambda: desk.stock(ids, users))
    left = {product_id: now.on_hand - now.reserved for product_id, now in counts.items()}
    for line in lines:
        product_id, user, quantity = line.asked.product_id, line.asked.user_id, line.asked.quantity
        had = units.get((product_id, user), 0)
        if product_id not in left:
            _refuse(line, Reason.UNKNOWN_PRODUCT)
        elif quantity > left[product_id]:
            _refuse(line, Reason.INSUFFICIENT_STOCK)
        elif product_id in limits and had + quantity > limits[product_id]:
            _refuse(line, Reason.USER_LIMIT)
        else:
            left[product_id] -= quantity
            units[product_id, user] = had + quantity


def _note_waiting(desk: Desk, turn: Turn) -> None:
    """Choose the orders that go into ``waiting``: with money due, or not over after a moment."""
    for entry in turn.touched.values():
        # What has become due is written even where a row is believed to be there: it may be about to go.
        if entry.order.payment in DUE and (not entry.is_waiting or entry.order.order_id in turn.changes):
            turn.to_wait.append(entry)
    for entry in desk.grown():
        if not entry.is_waiting and entry.order.payment not in DUE and not is_over(entry.order):
            turn.to_wait.append(entry)


async def _write(desk: Desk, lane: Lane, turn: Turn, batch: Batch, marks: Sequence[Mark]) -> Written | None:
    """Write what was decided; None where nothing was."""
    columns = _columns(turn)
    partitions = {change.entry.order.home for change in turn.changes.values()}
    for change in turn.changes.values():
        order = change.entry.order
        if order.owners:
            partitions.update(order.owners[n] for n, _ in change.moves)
    partitions |= {line.partition for line in turn.lines if line.new is not None}
    partitions |= {entry.order.home for entry in turn.to_wait} | {home for home, _ in turn.over}
    partitions |= {mark.partition for mark in marks} | {partition for partition, _, _ in turn.kept}
    partitions |= {partition for partition, _ in turn.found} | {item.place[0] for item in turn.unread}
    if not partitions:
        return None
    attempt = uuid.uuid4()

    async def write() -> Written:
        step = lane.step(partitions, marks)
        return await stages.settle(desk.stage.store.pool, lane, step | columns, attempt)

    for _ in range(TRIES):
        try:
            return await desk.stage.until_available("postgres", write, batch)
        except NotEnough:  # Redis was wrong about a line, or the intake lane was quicker: Postgres decides
            await _decide_by_counts(desk, turn)
            columns = _columns(turn)
    for line in turn.lines:
        if line.movement == "hold":
            _refuse(line, Reason.INSUFFICIENT_STOCK)
    columns = _columns(turn)
    return await desk.stage.until_available("postgres", write, batch)


def _columns(turn: Turn) -> dict[str, list[Any]]:
    """Return the columns of ``settle``."""
    ids = sorted(turn.changes)
    changes = [turn.changes[order_id] for order_id in ids]
    orders = [change.entry.order for change in changes]
    steps = [(change.entry.order, n, what) for change in changes for n, what in change.moves]
    moved = [(what, order.order_id, *order.lines[n]) for order, n, what in steps]
    users = [(order.lines[n][0], order.user_id, -order.lines[n][1]) for order, n, what in steps if what != "commit"]
    far = [(order, n, STEPS[what]) for order, n, what in steps if order.owners and not order.is_home(n)]
    ended = [(order.order_id, order.lines[n][0], *states) for order, n, states in far]
    fresh = []
    for line in turn.lines:
        if line.new is None:
            continue
        asked = line.asked
        if line.held is None or line.new == "x":
            reason = line.held.reason if line.held is not None else None
            row = (line.partition, asked.order_id, asked.product_id, asked.home, asked.user_id, asked.quantity)
            fresh.append((*row, line.new, reason))
        else:
            ended.append((asked.order_id, asked.product_id, line.held.state, line.new))
        if line.movement is not None:
            moved.append((line.movement, asked.order_id, asked.product_id, asked.quantity))
            if line.movement != "commit":
                change = asked.quantity if line.movement == "hold" else -asked.quantity
                users.append((asked.product_id, asked.user_id, change))
    turn.gives_back = any(change < 0 for _, _, change in users)
    waits = [(e.order.home, e.order.order_id, e.order.created_at, e.reply_to) for e in turn.to_wait]
    tables = (
        ("movements move_order_ids move_product_ids move_quantities", moved),
        ("user_product_ids user_ids user_changes", users),
        (
            "new_hold_partitions new_hold_order_ids new_hold_product_ids new_hold_homes new_hold_user_ids"
            " new_hold_quantities new_hold_states new_hold_reasons",
            fresh,
        ),
        ("end_hold_order_ids end_hold_product_ids end_hold_was end_hold_states", ended),
        ("wait_homes wait_order_ids wait_sinces wait_reply_tos", waits),
        ("over_homes over_order_ids", turn.over),
        ("keep_partitions keep_order_ids keep_offsets", turn.kept),
        ("found_partitions found_order_ids", turn.found),
        (
            "reject_order_ids reject_partitions reject_offsets reject_reasons reject_details",
            [(item.order_id, *item.place, item.reason, item.detail) for item in turn.unread],
        ),
    )
    return {
        "order_ids": ids,
        "was": [change.status for change in changes],
        "statuses": [order.status for order in orders],
        "cancel_reasons": [order.reason for order in orders],
        "payments": [order.payment for order in orders],
        "charge_ids": [order.charge_id for order in orders],
        "totals": [order.total_cents for order in orders],
        "line_states": [
            _states(order.states) if order.states != change.states else None
            for order, change in zip(orders, changes, strict=True)
        ],
        "line_prices": [
            _array(order.prices) if change.status is Status.CREATED and order.prices else None
            for order, change in zip(orders, changes, strict=True)
        ],
        "line_reasons": [_array(order.reasons) if order.owners and order.reasons else None for order in orders],
        "command_partitions": [change.place[0] if change.place else None for change in changes],
        "command_offsets": [change.place[1] if change.place else None for change in changes],
        **stages.columns(*tables),
    }


def _array(values: Sequence[Any]) -> str:
    return "{" + ",".join("NULL" if value is None else str(value) for value in values) + "}"


_states = lru_cache(maxsize=1_024)(_array)
"""Writes the states of an order's lines: there are few kinds."""


def _stamp(turn: Turn, written: Written) -> None:
    """Note in memory what Postgres has added: when statuses were written, and what new holds cost."""
    at = written.row["at"]
    for change in turn.changes.values():
        stamp(change.entry.order, at)
    prices = iter(written.row["new_hold_prices"] or ())
    for line in turn.lines:
        if line.held is None or line.new == "x":
            price = next(prices) if line.new is not None else None
            reason = line.held.reason if line.held is not None else None
            line.held = holding.Held(line.new or "r", price, reason)
        elif line.new is not None:
            line.held = line.held._replace(state=line.new)


def _count(desk: Desk, turn: Turn, written: Written) -> None:
    count_orders([(c.entry.order, c.status, c.payment) for c in turn.changes.values()], desk.stage.sample)
    held = sum(line.movement == "hold" for line in turn.lines)
    count_lines(held, (line.held.reason for line in turn.lines if line.new == "x" and line.held is not None))
    metrics.CANCELS_KEPT.inc(len(turn.kept))
    metrics.SENT_ON.inc(len(turn.sent_on))
    desk.views.counted(written.counts, written.sold)


def _trace(trace: BatchTrace, turn: Turn) -> None:
    for change in turn.changes.values():
        order = change.entry.order
        moved = [f"{order.lines[n][0]}: {movement}" for n, movement in change.moves]
        trace.moved(order, change.status, moved)
    lines: dict[tuple[str, str], list[str]] = {}
    for line in turn.lines:
        if line.new is not None and line.held is not None:
            holds = line.asked.action == "hold"
            outcome = line.held.reason or "held" if holds else line.asked.action
            name = "reserve" if holds else "commit"
            lines.setdefault((line.asked.order_id, name), []).append(f"{line.asked.product_id}: {outcome}")
    for (order_id, name), outcomes in lines.items():
        trace.lines(order_id, name, outcomes)


async def _publish(desk: Desk, turn: Turn, written: Written | None, batch: Batch) -> None:
    """Tell what follows: Redis, the events, the owners of lines, their homes, the provider; then let go of what is over."""
    stage = desk.stage
    for entry in turn.to_wait:
        entry.is_waiting = True
    replies = []
    rows: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
    step: dict[tuple[str, int], list[tuple[bytes | None, bytes | None, Any]]] = {}
    topic = stage.settings.topic(ORDER_EVENTS.name)
    if written is not None:
        for item in (turn.unread[n - 1] for n in written.row["told_rejects"] or ()):
            home, offset = item.place
            record = {"partition": home, "offset": offset}
            told = events.rejected(item.order_id, written.row["at"], item.reason, item.detail, record)
            step.setdefault((topic, home), []).append((item.order_id.encode(), told, turn.lanes[home]))
    for entry in {**turn.touched, **{e.order.order_id: e for e in turn.to_wait}}.values():
        order = entry.order
        if story := events_of(order, entry.published):
            key, lane = order.order_id.encode(), turn.lanes[order.home]
            step.setdefault((topic, order.home), []).extend([(key, event, lane) for event in story])
            entry.published += len(story)
        if entry.reply_to is not None and order.status is not Status.CREATED:
            replies.append((entry.reply_to, order.order_id, order.reason))
            entry.reply_to = None
    counts, users = (dict(written.counts), written.users) if written is not None else ({}, None)
    messages = reply_messages(stage, replies)

    async def update_gate() -> None:
        await stage.update_gate(counts, turn.takes, messages, batch, users=users, claim_of=turn.claim_of)
        failpoint("commit.after_update")

    async def tell() -> None:
        if step:
            batch.check_owned()
            await stage.until_available("kafka", lambda: stage.producer.send(step), batch)

    if turn.gives_back:  # whoever hears that units are free may ask for them at once
        await update_gate()
        turn.steps.done("update_gate")
    for change in turn.changes.values():
        if change.entry.order.owners:
            _send_lines(desk, change.entry.order, change.states, rows)
    for order in turn.repeated:
        _send_lines(desk, order, "", rows)
    for line in turn.lines:
        _answer(desk, line, rows)
    for order, n, action in turn.again:
        _send_line(desk, _wanted(order, n, action), order.owners[n], rows)
    for order_id, product_id in turn.orphans:  # no order has this line: its owner lets go of it
        wanted = LineWanted("release", order_id, product_id, 0, 0, "")
        _send_line(desk, wanted, desk.owner_of(product_id), rows)
    commands = stage.settings.topic(ORDER_COMMANDS.name)
    for home, order_id, command in turn.sent_on:
        body = b'{"command":"%b","order_id":"%b"}' % (command, order_id.encode())
        step.setdefault((commands, home), []).append((order_id.encode(), body, ()))
    for place, part in rows.items():
        step[place] = stage.packed(part)
    faults = await asyncio.gather(tell(), *([] if turn.gives_back else [update_gate()]), return_exceptions=True)
    for fault in faults:
        if fault is not None:
            raise fault
    failpoint("commit.after_events")
    turn.steps.done("events")
    desk.views.over(turn.over)
    now = time.monotonic()
    for entry in turn.touched.values():
        _go_on(desk, entry, now)
    for entry in turn.to_wait:
        _acknowledge(entry)
        desk.let_go(entry)
    for entry in (*turn.touched.values(), *turn.to_wait):
        order = entry.order
        if entry.is_waiting and desk.entries.get(order.order_id) is entry:
            desk.views.waits(order.order_id, order.home, order.status, order.payment, order.created_at)
    for slip in turn.slips:
        slip.done()
    if turn.trace is not None:
        turn.trace.finish()
    if turn.size:
        metrics.batch_done("commit", turn.size, turn.began)


def _go_on(desk: Desk, entry: Entry, now: float) -> None:
    """Do what is left to do about an order, or let go of it."""
    order = entry.order
    later, entry.later, entry.touched = entry.later or (), None, now
    if desk.entries.get(order.order_id) is not entry:
        return  # all was let go of meanwhile: what is left to do follows from its row, which is read again
    if is_over(order):
        _acknowledge(entry)
        if entry.is_waiting:  # its row goes only now, with the next transaction: its last event is acknowledged
            desk.over.append((order.home, order.order_id))
            desk.wake_commit.set()
        del desk.entries[order.order_id]
    else:
        if asks(order) is not None:
            desk.pay(entry)
        if not later:
            desk.let_go(entry)
    for item in later:
        desk.put(item)


def _send_lines(desk: Desk, order: Order, before: str, rows: dict[tuple[str, int], list[tuple[Any, ...]]]) -> None:
    """Tell the owners of lines what is wanted of them: of those that have moved from ``before``; without it, of all."""
    for n, action in sends(order):
        if before and before[n] == order.states[n]:
            continue
        _send_line(desk, _wanted(order, n, action), order.owners[n], rows)


def _wanted(order: Order, n: int, action: str) -> LineWanted:
    return LineWanted(action, order.order_id, *order.lines[n], order.home, order.user_id)


def _send_line(desk: Desk, wanted: LineWanted, owner: int, rows: dict[tuple[str, int], list[tuple[Any, ...]]]) -> None:
    if owner in desk.settle.claims:
        desk.put(LineAsked(wanted))
    else:
        rows.setdefault((desk.stage.settings.topic(ORDER_LINES.name), owner), []).append(wanted)


def _answer(desk: Desk, line: Line, rows: dict[tuple[str, int], list[tuple[Any, ...]]]) -> None:
    """Tell a line's home where the line stands."""
    wanted, held = line.asked, line.held or holding.Held("r", None, None)
    if wanted.home in desk.settle.claims:
        desk.put(About(wanted.order_id, holding.answer(wanted.product_id, held)))
    else:
        stands = LineStands(wanted.order_id, wanted.product_id, held.state, held.price_cents or 0, held.reason)
        rows.setdefault((desk.stage.settings.topic(RESERVATIONS.name), wanted.home), []).append(stands)


def _acknowledge(entry: Entry) -> None:
    slips, entry.slips = entry.slips, []
    for slip in slips:
        slip.done()


def events_of(order: Order, told: int) -> list[bytes]:
    """Return an order's events but for the first ``told``: one for each status that it has had, in their order."""
    order_id = order.order_id
    made = [] if told else [events.created(order_id, order.created_at, order.user_id, order.lines)]
    had = 1
    if order.reserved_at is not None:
        if told <= had:
            made.append(events.reserved(order_id, order.reserved_at, order.total_cents or 0, order.prices))
        had += 1
    if order.paid_at is not None:
        if told <= had:
            made.append(events.paid(order_id, order.paid_at, order.total_cents or 0, order.charge_id or ""))
        had += 1
    if order.confirmed_at is not None:
        if told <= had:
            made.append(events.confirmed(order_id, order.confirmed_at))
        had += 1
    if order.cancelled_at is not None and told <= had:
        made.append(events.cancelled(order_id, order.cancelled_at, order.reason or ""))
    return made
