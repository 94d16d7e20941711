"""Repairs what ``reconcile`` found.  Each action checks again, under the row locks that the stages take, whether its
difference is still there, and does nothing where it is not: a repair that is repeated, or that comes late, changes nothing.

What the owners can do is left to them: they get a record (the order again, a command).  Rows are only written here where no
record can restore them, and a correction of stock leaves an entry in the ledger.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg
import orjson

from orderstream.errors import InvalidRecord, OrderstreamError
from orderstream.jobs.reconcile.drift import (
    AGAIN,
    COUNTS,
    EXPIRE,
    ROWS,
    Difference,
    judge_entry,
    judge_order,
    payment_must_be,
)
from orderstream.jobs.reconcile.fold import ENDS, PAID, RESERVED, UNSEEN, Fold, Move, Trace
from orderstream.jobs.reconcile.reconcile import Reconcile, Repair, query
from orderstream.lua.gate import Counts
from orderstream.sql.differences import Kind
from orderstream.streams.orders import Limits, Order, Reason, Status, decode, encode
from orderstream.streams.partitions import order_partition, product_partition
from orderstream.streams.producer import Outbox, Producer, Step
from orderstream.streams.topics import DEAD_LETTERS, ORDER_EVENTS, ORDERS, STOCK_COMMANDS, changelog_topic

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

AGREES = "agrees by now"
_ORDERS = frozenset(kind for kind in Kind if kind == Kind.PAYMENT or kind.startswith("order."))
_TIMES = ("CREATED", "RESERVED", "PAID", "CONFIRMED", "CANCELLED")


class OrderRow(NamedTuple):
    """An order's row, its columns in the order of the statement ``put_order``."""

    order_id: str
    status: str
    reason: str | None
    line_count: int
    lines_committed: int
    total_cents: int | None
    source_partition: int
    source_offset: int
    user_id: str
    payment_method: str
    idempotency_key: str | None
    placed_at: datetime | None
    created_at: datetime
    reserved_at: datetime | None
    paid_at: datetime | None
    confirmed_at: datetime | None
    cancelled_at: datetime | None


class Left(OrderstreamError):
    """A difference that can't be repaired here; says why."""


async def repair_all(job: Reconcile, differences: Sequence[Difference]) -> list[Repair]:
    """Repair what a run found; return what was done about each difference.

    Of two repairs of one pipeline at once, one waits until the other one has ended.

    Raises:
        EngineUnavailable: an engine does not answer; what was done until then remains, and a second run does the rest.
    """
    if not differences:
        return []
    with job.kafka():
        producer = Producer(job.settings, client_id="orderstream-reconcile")
        await producer.start()
    try:
        async with _turn(job):
            return await Repairer(job, producer).repair(differences)
    finally:
        await producer.stop()


@asynccontextmanager
async def _turn(job: Reconcile) -> AsyncIterator[None]:
    app_id = job.settings.app_id
    with job.postgres():
        connection = await job.store.pool.acquire()
    try:
        with job.postgres():
            if not await connection.fetchval(query("try_turn"), app_id):
                job.remark("another repair of this pipeline was under way: waited for its end")
                await connection.execute(query("take_turn"), app_id)
        yield
        with job.postgres():
            await connection.execute(query("end_turn"), app_id)
    finally:
        await job.store.pool.release(connection)  # which releases the turn, whatever happened


class Repairer:
    """The repairs of one run."""

    def __init__(self, job: Reconcile, producer: Producer) -> None:
        self._job, self._producer, self._settings = job, producer, job.settings
        self._events: dict[str, dict[str, datetime]] = {}
        self._commands: dict[str, Move] = {}
        self._corrected: set[str] = set()
        self._unsound: set[str] = set()
        self._sent: set[tuple[str, str]] = set()
        self._by_kind: Mapping[Kind, Callable[[Difference], Awaitable[str]]] = {
            Kind.ORDER_MISSING: self._order,
            Kind.ORDER_STATUS: self._order,
            Kind.ORDER_RECORD: self._order,
            Kind.ORDER_LINES: self._order,
            Kind.PAYMENT: self._order,
            Kind.ORDER_EVENT_MISSING: self._order,
            Kind.ORDER_STUCK: self._order,
            Kind.STOCK_LEDGER: self._stock,
            Kind.STOCK_COUNTS: self._stock,
            Kind.STOCK_USERS: self._users,
            Kind.REDIS_COUNTS: self._redis,
            Kind.TABLE_STOCK: self._recount,
            Kind.TABLE_OPEN_ORDERS: self._entry,
        }

    async def repair(self, differences: Sequence[Difference]) -> list[Repair]:
        """See :func:`repair_all`."""
        rows = {d.subject for d in differences if d.kind in _ORDERS}
        if rows:
            self._events = await self._times(rows)
        products = {d.subject for d in differences if d.kind in (Kind.STOCK_LEDGER, Kind.STOCK_COUNTS)}
        if products:
            self._commands = await self._moves(products)
        done: list[Repair] = []
        for difference in differences:
            action = self._by_kind.get(difference.kind)
            try:
                if action is None:
                    raise Left(difference.repair)
                text = await action(difference)
                done.append(Repair(difference.kind, difference.subject, "agrees" if text == AGREES else "done", text))
            except (Left, InvalidRecord, asyncpg.IntegrityConstraintViolationError) as error:
                done.append(Repair(difference.kind, difference.subject, "left", str(error)))
                if difference.kind in _ORDERS:
                    self._unsound |= await self._products(difference.subject)
        for product_id in sorted(self._corrected):  # their owners do not know what was set here
            await self._recount(Difference(Kind.TABLE_STOCK, product_id, None, None, ""))
        return done

    async def _times(self, order_ids: set[str]) -> dict[str, dict[str, datetime]]:
        """Return when each status of these orders was published first; all of the topic is read for it."""
        job, topic = self._job, self._settings.topic(ORDER_EVENTS.name)
        partitions = {order_partition(order_id, self._settings.partitions) for order_id in order_ids}
        times: dict[str, dict[str, datetime]] = {}
        with job.kafka():
            async for records in job.replay.whole(topic, sorted(partitions)):
                for record in records:
                    event = orjson.loads(record.value)
                    if event["order_id"] in order_ids:
                        at = event["at"] and datetime.fromisoformat(event["at"])
                        times.setdefault(event["order_id"], {}).setdefault(event["status"], at)
        return times

    async def _moves(self, product_ids: set[str]) -> dict[str, Move]:
        """Return what the workers must have carried out of the stock commands of these products, by command id.

        All of their topics is read for it: a checkpoint has sums of the earlier ones, not their ids.
        """
        job, ours = self._job, self._settings
        fold = Fold(
            Limits(ours.order_lines_max, ours.line_quantity_max, ours.order_bytes_max), ours.partitions, ours.topic
        )
        owners = sorted({product_partition(product_id, ours.partitions) for product_id in product_ids})
        for spec, partitions in ((STOCK_COMMANDS, owners), (DEAD_LETTERS, range(ours.partitions))):
            topic = ours.topic(spec.name)
            with job.kafka():
                async for records in job.replay.whole(topic, partitions):
                    fold.take(topic, records[0].partition, records)
        return {
            command_id: moves[0]
            for command_id, moves in fold.moves.items()
            if moves[0].product_id in product_ids
            and not any(fold.is_dead(move) for move in moves)
            and all(job.progress.passed(STOCK_COMMANDS.name, move.partition, move.offset) for move in moves)
        }

    # Orders

    async def _order(self, difference: Difference) -> str:
        job, order_id, restored = self._job, difference.subject, ""
        trace = job.fold.orders[order_id]
        with job.postgres():
            async with job.store.pool.acquire() as connection, connection.transaction():
                await connection.execute(query("lock_order"), order_id)
                lines = {row["product_id"]: row for row in await connection.fetch(query("lock_lines"), order_id)}
                row = await connection.fetchrow(query("some_orders"), [order_id], None)
                remains = self._remains(difference, trace, row)
                if remains is None:
                    return AGREES
                if (
                    remains.repair == AGAIN
                    and row is None
                    and await connection.fetchval(query("traces_left"), order_id)
                ):
                    remains = remains._replace(repair=ROWS)  # taken in again, it would meet what is left of it
                if remains.repair == ROWS:
                    restored = await self._restore(connection, order_id, trace, row, lines)
                    row = await connection.fetchrow(query("some_orders"), [order_id], None)
                    # The owners' timers have passed the time of an old order: they don't return to it.
                    late = Difference(Kind.ORDER_STUCK, order_id, f"past {row['status']}", None, "")
                    remains = self._remains(late, trace, row)
                    if remains is None:
                        return restored
        if remains.repair.startswith("none"):
            raise Left(remains.repair)
        if remains.repair == AGAIN:
            done = await self._send_again(order_id, trace)
        elif ("order", order_id) in self._sent and remains.repair != EXPIRE:
            done = "the order was sent again: its owner repeats what was decided"
        else:
            done = await self._command(order_id)
        return f"{restored}; {done}" if restored else done

    def _remains(self, difference: Difference, trace: Trace, row: Any) -> Difference | None:
        job, order_id = self._job, difference.subject
        found = judge_order(
            order_id, trace, row, job.progress, asked=order_id in job.fold.asked, charging=False, cut=False
        )
        same = (f.difference for f in found if f.difference.kind == difference.kind)
        return next((one for one in same if one.must == difference.must), None)

    async def _record(self, order_id: str, trace: Trace) -> Order:
        if trace.partition == UNSEEN:
            raise Left("its record is not on the topic any more: correct its rows by hand, or remove them")
        topic = self._settings.topic(ORDERS.name)
        with self._job.kafka():
            record = await self._job.replay.one(topic, trace.partition, trace.offset)
        if record is None:
            raise Left("its record is not on the topic any more: correct its rows by hand, or remove them")
        ours = self._settings
        limits = Limits(ours.order_lines_max, ours.line_quantity_max, ours.order_bytes_max)
        order = decode(record.value, limits, topic=topic, partition=trace.partition, offset=trace.offset)
        return order._replace(order_id=order_id)

    async def _send_again(self, order_id: str, trace: Trace) -> str:
        if ("order", order_id) not in self._sent:
            self._sent.add(("order", order_id))
            order = await self._record(order_id, trace)
            outbox = Outbox(self._settings)
            outbox.order(order.lines[0][0], encode(order), ())
            await self._send(outbox.handovers())
        return "the order was sent again"

    async def _command(self, order_id: str) -> str:
        if ("command", order_id) not in self._sent:
            self._sent.add(("command", order_id))
            outbox = Outbox(self._settings)
            outbox.order_command(order_id, orjson.dumps({"command": "expire", "order_id": order_id}))
            await self._send(outbox.handovers())
        return "its owner was commanded to expire it, or to repeat what was decided"

    async def _restore(self, connection: Any, order_id: str, trace: Trace, row: Any, there: Mapping[str, Any]) -> str:
        """Put an order's rows back to what its record and its events say.

        Its products' counts are repaired after all orders: they follow from the lines of all of them.
        """
        order = await self._record(order_id, trace)
        times = self._events.get(order_id, {})
        status = trace.last or Status.CREATED
        reason = trace.reason if status == Status.CANCELLED else None
        if trace.published & ENDS == ENDS and reason != Reason.CANCELLED_BY_USER:
            raise Left("events of two ends: it is for people to decide")
        revoked = reason == Reason.CANCELLED_BY_USER and bool(trace.published & PAID)
        moved = {
            r["product_id"]: set(r["movements"]) for r in await connection.fetch(query("order_movements"), order_id)
        }
        prices = await self._prices(connection, order, trace, there)
        held = bool(trace.published & RESERVED)
        states = {p: _state(status, moved.get(p, set()), revoked=revoked, was_held=held) for p, _ in order.lines}
        now = await connection.fetchval("SELECT now()")
        at = {name: times.get(name) or (now if name == status else None) for name in _TIMES}
        created_at = at["CREATED"] or min([time for time in at.values() if time is not None], default=now)
        committed = sum(state == "committed" for state in states.values())
        paid = revoked or status in (Status.PAID, Status.CONFIRMED)
        reserved = paid or status == Status.RESERVED or at["RESERVED"] is not None
        restored = OrderRow(
            order_id=order_id,
            status=str(status),
            reason=reason,
            line_count=len(order.lines),
            lines_committed=committed,
            total_cents=trace.total_cents,
            source_partition=trace.partition,
            source_offset=trace.offset,
            user_id=order.user_id,
            payment_method=order.payment_method,
            idempotency_key=order.idempotency_key,
            placed_at=order.placed_at,
            created_at=created_at,
            reserved_at=(at["RESERVED"] or created_at) if reserved else None,
            paid_at=(at["PAID"] or now) if paid else None,
            confirmed_at=at["CONFIRMED"] if status == Status.CONFIRMED or revoked else None,
            cancelled_at=at["CANCELLED"] if status == Status.CANCELLED else None,
        )
        await connection.execute(query("put_order"), *restored)
        await connection.execute(query("drop_other_lines"), order_id, [product_id for product_id, _ in order.lines])
        for product_id, quantity in sorted(order.lines):
            state = states[product_id]
            price = None if state in ("pending", "refused") else prices.get(product_id)
            refused = (reason if reason in ("unknown_product", "insufficient_stock") else None) or "insufficient_stock"
            why = refused if state == "refused" else None
            await connection.execute(query("put_line"), order_id, product_id, quantity, price, state, why)
        await self._pay(connection, order_id, trace, status, reason)
        return "its rows were put back"

    async def _prices(
        self, connection: Any, order: Order, trace: Trace, there: Mapping[str, Any]
    ) -> dict[str, int | None]:
        rows = await connection.fetch(query("prices"), [product_id for product_id, _ in order.lines])
        prices: dict[str, int | None] = {row["product_id"]: row["price_cents"] for row in rows}
        prices |= {p: line["unit_price_cents"] for p, line in there.items() if line["unit_price_cents"] is not None}
        if trace.total_cents is not None:
            if len(order.lines) == 1:
                ((product_id, quantity),) = order.lines
                prices[product_id] = trace.total_cents // quantity
            if (
                sum(quantity * (prices.get(product_id) or 0) for product_id, quantity in order.lines)
                != trace.total_cents
            ):
                raise Left(
                    "its lines' prices are lost, those known don't add up to its total: correct its rows by hand"
                )
        return prices

    async def _pay(self, connection: Any, order_id: str, trace: Trace, status: str, reason: str | None) -> None:
        row = await connection.fetchrow(query("some_orders"), [order_id], None)
        if payment_must_be(trace, row) is None:
            return
        if trace.published & PAID:
            payment = "REFUND_DUE" if status == Status.CANCELLED else "SUCCESS"  # the owner's timer refunds it
            await connection.execute(query("put_payment"), order_id, payment, trace.total_cents, trace.charge_id)
        elif reason == "payment_declined":
            await connection.execute(query("put_payment"), order_id, "FAILED", trace.total_cents or 0, None)
        elif status == Status.CANCELLED:
            await connection.execute(query("give_back"), order_id)
        else:
            raise Left("a payment without an event: it is for people to decide")

    async def _products(self, order_id: str) -> set[str]:
        trace = self._job.fold.orders.get(order_id)
        with self._job.postgres():
            row = await self._job.store.pool.fetchrow(query("some_orders"), [order_id], None)
        return {p for p, _ in (trace.lines if trace else ())} | {*((row["product_ids"] if row else None) or ())}

    # Stock

    async def _stock(self, difference: Difference) -> str:
        job = self._job
        if difference.subject in self._unsound:
            raise Left("an order of it could not be repaired: repair that one first, its lines are not reliable")
        with job.postgres():
            async with job.store.pool.acquire() as connection, connection.transaction():
                return await self._repair_product(connection, difference.subject) or AGREES

    async def _repair_product(self, connection: Any, product_id: str) -> str:
        """Write what is missing in a product's ledger, counter what is too much, set the row to the ledger's sums."""
        job = self._job
        row = await connection.fetchrow(query("lock_product"), product_id)
        if row is None:
            raise Left("the product has no row of stock: load it first, with `orderstream init`")
        changes: list[str] = []
        written = await connection.fetchrow(query("write_missing"), product_id)
        missing = written["entries"]
        ours = {command_id: move for command_id, move in self._commands.items() if move.product_id == product_id}
        for command_id, move in ours.items():
            entry = (product_id, command_id, move.command, move.quantity, move.reason or None)
            missing += await connection.fetchval(query("write_entry"), *entry) or 0
        if missing:
            changes.append(f"{missing} entries written")
        sums = await connection.fetchrow(query("ledger_sums"), product_id, job.at, [*ours], [*job.flying])
        lines = await connection.fetchrow(query("line_sums"), product_id)
        changes += await self._counter(connection, product_id, sums, lines, written["sold"])
        if changes:
            sums = await connection.fetchrow(query("ledger_sums"), product_id, job.at, [*ours], [*job.flying])
        must = {name: sums[name] for name in COUNTS}
        if not sums["initials"]:
            must["initial"] = row["initial"]
        must["on_hand"] = must["initial"] + must["received"] + must["adjusted"] - must["sold"]
        unlike = [name for name in ("on_hand", *COUNTS) if row[name] != must[name]]
        if must["on_hand"] < must["reserved"]:
            held, on_hand = must["reserved"], must["on_hand"]
            raise Left(f"{held} units are held and the ledger explains {on_hand} on hand: adjust or receive first")
        if unlike:
            counts = ", ".join(f"{name} {row[name]} -> {must[name]}" for name in unlike)
            changes.append(counts)
            await connection.execute(query("set_stock"), product_id, *(must[name] for name in (*COUNTS, "on_hand")))
            reason = f"reconcile: {counts}"
            await connection.execute(query("write_entry"), product_id, str(uuid.uuid4()), "adjust", 0, reason)
            self._corrected.add(product_id)
        if row["limit_per_user"] is not None and (changes or unlike):
            await connection.execute(query("count_users"), product_id)
        view = job.views.get(product_id)
        if not changes and view is not None and view.must["sold"] not in (sums["sold_judged"], view.row["g_sold"]):
            raise Left("the lines and the ledger agree with each other: --from-beginning lists which orders differ")
        return "; ".join(changes)

    async def _counter(self, connection: Any, product_id: str, sums: Any, lines: Any, written: int) -> list[str]:
        """Counter what the ledger has too much: it is append-only.

        Lines and ledger of a product change in one commit and under its row lock, which is held here, so what they differ
        by is exact.  A sale is countered only where the topics say the same: else it may be the lines that are wrong.

        Args:
            connection: in the transaction that holds the lock.
            product_id: the product.
            sums: of its ledger.
            lines: what its lines say.
            written: units sold that the ledger missed until now.
        """
        view = self._job.views.get(product_id)
        done, counters = [], []
        sold = sums["sold"] - lines["sold"]
        if sold:
            if view is None or sold != view.row["g_sold"] + written - view.must["sold"]:
                raise Left(
                    f"the ledger has {sums['sold']} units sold and the lines {lines['sold']}, and the topics agree with "
                    "neither: --from-beginning lists which orders differ"
                )
            counters.append(("commit", -sold))
        held = sums["reserved"] + sold - lines["reserved"]
        if held:
            counters.append(("release" if held > 0 else "hold", abs(held)))
        if view is not None:
            received = sums["received_judged"] - view.must["received"]
            adjusted = sums["adjusted_judged"] - view.must["adjusted"]
            if received:
                counters.append(("receive", -received))
            if adjusted:
                counters.append(("adjust", -adjusted))
        for movement, quantity in counters:
            entry = (product_id, str(uuid.uuid4()), movement, quantity, "reconcile: counters a surplus entry")
            await connection.execute(query("write_entry"), *entry)
            done.append(f"countered by {movement} {quantity}")
        return done

    async def _users(self, difference: Difference) -> str:
        job, product_id = self._job, difference.subject
        if product_id in self._unsound:
            raise Left("an order of it could not be repaired: repair that one first, its lines are not reliable")
        with job.postgres():
            async with job.store.pool.acquire() as connection, connection.transaction():
                row = await connection.fetchrow(query("lock_product"), product_id)
                if row is None:
                    raise Left("the product has no row of stock: load it first, with `orderstream init`")
                if product_id not in {one["product_id"] for one in await connection.fetch(query("users"))}:
                    return AGREES
                await connection.execute(query("count_users"), product_id)
                await self._reload(connection, row)
        return "the units of its users were counted again"

    # Redis and the tables

    async def _reload(self, connection: Any, row: Any) -> Any:
        """Load a product into Redis under a new generation; the caller holds its row lock. Returns its counts."""
        job, product_id = self._job, row["product_id"]
        now = await connection.fetchrow(query("bump_generation"), product_id)
        limits = await job.store.user_limits(connection, [row])
        with job.redis():
            counts = Counts(now["on_hand"], now["reserved"], now["version"], now["generation"])
            await job.gate.load({product_id: counts}, limits)
        return now

    async def _redis(self, difference: Difference) -> str:
        job, product_id = self._job, difference.subject
        with job.postgres():
            async with job.store.pool.acquire() as connection, connection.transaction():
                row = await connection.fetchrow(query("lock_product"), product_id)
                if row is None:
                    raise Left("the product has no row of stock: load it first, with `orderstream init`")
                with job.redis():
                    there = (await job.gate.inspect({product_id: row["generation"]})).get(product_id)
                if there is None or (there.on_hand, there.reserved, there.taken, there.takes) == (
                    row["on_hand"],
                    row["reserved"],
                    0,
                    0,
                ):
                    return AGREES
                now = await self._reload(connection, row)
        return f"loaded again: on_hand {now['on_hand']}, reserved {now['reserved']}, generation {now['generation']}"

    async def _recount(self, difference: Difference) -> str:
        product_id = difference.subject
        if ("recount", product_id) not in self._sent:
            self._sent.add(("recount", product_id))
            command = {"command": "recount", "command_id": str(uuid.uuid4()), "product_id": product_id}
            outbox = Outbox(self._settings)
            outbox.stock_command(product_id, orjson.dumps(command))
            await self._send(outbox.handovers())
        return "its owner was commanded to recount it"

    async def _entry(self, difference: Difference) -> str:
        job, order_id = self._job, difference.subject
        topic = changelog_topic(self._settings.app_id, "open-orders")
        before = job.fold.tables[topic].get(order_id)
        with job.kafka():
            await job.read_on(topic)
        now = job.fold.tables[topic].get(order_id)
        with job.postgres():
            row = await job.store.pool.fetchrow(query("some_orders"), [order_id], None)
        if now is None or now != before or judge_entry(order_id, now[1], row, job.progress) is None:
            return AGREES
        await self._send({(topic, now[0]): [(orjson.dumps(order_id), None, ())]})
        return "the entry was removed"

    async def _send(self, step: Step) -> None:
        with self._job.kafka():
            await self._producer.send(step)


def _state(status: str, movements: set[str], *, revoked: bool, was_held: bool) -> str:
    """Return the state of a line of an order in this status, of which the ledger has these movements.

    Args:
        status: of the order.
        movements: of the line, none where they were lost with it.
        revoked: it was cancelled after it was paid, and its events say so: every unit of it is returned.
        was_held: RESERVED was published, so each of its lines was held once.
    """
    if revoked:
        return "returned" if "commit" in movements or "release" not in movements else "released"
    if status == Status.CONFIRMED or (status == Status.PAID and "commit" in movements):
        return "committed"
    if status in (Status.PAID, Status.RESERVED):
        return "held"
    if status == Status.CREATED:
        return "held" if "hold" in movements else "pending"
    if "release" in movements:
        return "released"
    if "hold" in movements:
        return "held"
    return "released" if was_held else "refused"
