"""Repairs what ``reconcile`` found.  Each action checks again, in its transaction, whether its difference is still there,
and does nothing where it is not: a repair that is repeated, or that comes late, changes nothing.

What the homes can do is left to them: they get the order's record again, or the command.  Rows are only written here where
no record can restore them, behind the workers' backs: such a transaction takes the lanes over, so a worker that knows them
otherwise forgets it and reads them anew.  A correction of stock leaves an entry in the ledger.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg
import orjson

from orderstream.agents.lifecycle import Payment
from orderstream.errors import InvalidRecord, OrderstreamError
from orderstream.jobs.reconcile.drift import (
    AGAIN,
    ASKED,
    CANCEL,
    COUNTS,
    ROWS,
    Difference,
    Holds,
    is_of,
    is_over,
    judge_order,
    line_states,
    payment_must_be,
    stands,
    units,
    unlike_holds,
    unlike_prices,
)
from orderstream.jobs.reconcile.fold import BITS, CREATED, ENDS, PAID, RESERVED, UNSEEN, Fold, Move, Trace
from orderstream.jobs.reconcile.reconcile import Reconcile, Repair, is_refused, query
from orderstream.lua.gate import Counts
from orderstream.sql.differences import Kind
from orderstream.streams.headers import current
from orderstream.streams.orders import Limits, Order, Reason, Status, decode_record, encode
from orderstream.streams.partitions import product_partition
from orderstream.streams.producer import Outbox, Producer
from orderstream.streams.topics import DEAD_LETTERS, ORDER_EVENTS, ORDERS, STOCK_COMMANDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ORDERS_MAX = 2_000
"""Orders that are put back in one transaction."""

MOVED_S = 300.0
"""Of the question for which orders units were moved: it reads the ledger of their products."""

_ORDERS = frozenset(kind for kind in Kind if kind == Kind.PAYMENT or kind.startswith("order."))
_PUT_BACK = _ORDERS - {Kind.ORDER_UNKNOWN, Kind.ORDER_HOLDS}
_LOST = "its record is not on the topic any more: correct its row by hand, or remove it"
_NO_STOCK = "the product has no row of stock: load it first, with `orderstream init`"
_UNSOUND = "an order of it could not be repaired: repair that one first, its lines are not reliable"
_COUNTERS = "reconcile: counters a surplus entry"
_REFUSALS = frozenset({Reason.UNKNOWN_PRODUCT, Reason.INSUFFICIENT_STOCK, Reason.USER_LIMIT})


class Agrees(OrderstreamError):
    """A difference that is not there any more: nothing was changed."""


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
        async with turn(job):
            return await Repairer(job, producer).repair(differences)
    finally:
        await producer.stop()


@asynccontextmanager
async def turn(job: Reconcile) -> AsyncIterator[None]:
    """Take the turn to repair this pipeline, by a transaction that does nothing else: of two at once, one waits for the
    other."""
    app_id = job.settings.app_id
    with job.postgres():
        async with job.store.pool.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            if not await connection.fetchval(query("try_turn"), app_id):
                job.remark("another repair of this pipeline was under way: waited for its end")
                await connection.execute(query("take_turn"), app_id)
            yield


class Before(NamedTuple):
    """What stands in Postgres about an order that is to be put back.

    Attributes:
        row: its row; empty: there is none.
        held: state of its lines at other owners, by product.
        moved: products of which units were moved for it.
        prices: of products, now.
        now: the time of the transaction.
    """

    row: dict[str, Any]
    held: dict[str, str]
    moved: set[str]
    prices: Mapping[str, int]
    now: datetime


class Repairer:
    """The repairs of one run."""

    def __init__(self, job: Reconcile, producer: Producer) -> None:
        self._job, self._producer, self._settings = job, producer, job.settings
        ours = job.settings
        self._limits = Limits(ours.order_lines_max, ours.line_quantity_max, ours.order_bytes_max)
        self._events: dict[str, dict[str, datetime]] = {}
        self._commands: dict[str, Move] = {}
        self._said = {product_id: len(said) for product_id, said in job.fold.catalogue.items()}
        self._unsound: set[str] = set()
        self._sent: set[str] = set()
        self._records: Mapping[tuple[int, int], Any] = {}
        self._by_kind: Mapping[Kind, Callable[[Difference], Awaitable[str]]] = {
            Kind.ORDER_HOLDS: self._holds,
            Kind.STOCK_LEDGER: self._stock,
            Kind.STOCK_COUNTS: self._stock,
            Kind.STOCK_USERS: self._users,
            Kind.STOCK_CATALOGUE: self._catalogue,
            Kind.REDIS_COUNTS: self._redis,
        }

    async def repair(self, differences: Sequence[Difference]) -> list[Repair]:
        """See :func:`repair_all`."""
        rows = {d.subject for d in differences if d.kind in _ORDERS}
        if rows:
            self._events = await self._times(rows)
        held = {product_id for d in differences if d.kind is Kind.ORDER_HOLDS for product_id in d.must}
        products = {d.subject for d in differences if d.kind in (Kind.STOCK_LEDGER, Kind.STOCK_COUNTS)}
        if held | products:
            self._commands = await self._moves(held | products)
        followed = [Difference(Kind.STOCK_LEDGER, product_id, None, None, "") for product_id in sorted(held - products)]
        order = [*Kind]
        done: list[Repair] = []
        ordered = sorted([*differences, *followed], key=lambda d: (order.index(d.kind), self._place(d)))
        for kind, group in groupby(ordered, key=lambda d: d.kind):
            if kind in _PUT_BACK:
                for part in _parts([*group], ORDERS_MAX):
                    done += await self._orders(part)
                continue
            for difference in group:
                try:
                    if (action := self._by_kind.get(kind)) is None:
                        raise Left(difference.repair)
                    done.append(Repair(kind, difference.subject, "done", await action(difference)))
                except Agrees:
                    if difference not in followed:
                        done.append(Repair(kind, difference.subject, "agrees", "agrees by now"))
                except (Left, InvalidRecord, asyncpg.IntegrityConstraintViolationError) as error:
                    done.append(await self._left(difference, error))
        return done

    async def _left(self, difference: Difference, error: Exception) -> Repair:
        if difference.kind in _ORDERS:
            self._unsound |= await self._products(difference.subject)
        return Repair(difference.kind, difference.subject, "left", str(error))

    def _place(self, difference: Difference) -> tuple[int, int]:
        """Return where an order's record stands: repaired in this order, each stretch of the topic is read once."""
        trace = self._job.fold.orders.get(difference.subject) if difference.kind in _PUT_BACK else None
        return (trace.partition, trace.offset) if trace is not None else (0, 0)

    @asynccontextmanager
    async def _fenced(self, partitions: set[int]) -> AsyncIterator[Any]:
        """Give a connection in a transaction that takes these partitions over; an exception leaves them as they were."""
        wanted = sorted(partitions)
        with self._job.postgres():
            async with self._job.store.pool.acquire() as connection, connection.transaction():
                await connection.execute(query("take_lanes"), wanted)
                await connection.execute(query("step_lanes"), wanted)
                yield connection

    def _owner(self, product_id: str) -> int:
        return product_partition(product_id, self._settings.partitions)

    async def _times(self, order_ids: set[str]) -> dict[str, dict[str, datetime]]:
        """Return when each status of these orders was published first; all of the topic is read for it."""
        job, topic = self._job, self._settings.topic(ORDER_EVENTS.name)
        times: dict[str, dict[str, datetime]] = {}
        claims: dict[int, int] = {}
        with job.kafka():
            async for records in job.replay.whole(topic, range(self._settings.partitions)):
                for record in current(records, records[0].partition, claims):
                    event = orjson.loads(record.value)
                    if event["order_id"] in order_ids and event["at"]:
                        at = datetime.fromisoformat(event["at"])
                        times.setdefault(event["order_id"], {}).setdefault(event["status"], at)
        return times

    async def _moves(self, product_ids: set[str]) -> dict[str, Move]:
        """Return what the workers must have carried out of the stock commands of these products, by command id.

        All of their topics is read for it: a checkpoint has sums of the earlier ones, not their ids.
        """
        job, ours = self._job, self._settings
        fold = Fold(self._limits, ours.partitions, ours.topic)
        owners = sorted({self._owner(product_id) for product_id in product_ids})
        for spec, partitions in ((STOCK_COMMANDS, owners), (DEAD_LETTERS, range(ours.partitions))):
            topic = ours.topic(spec.name)
            with job.kafka():
                async for records in job.replay.whole(topic, partitions):
                    fold.take(topic, records[0].partition, records)
        passed = {
            command_id: known[0]
            for command_id, moves in fold.moves.items()
            if (known := [move for move in moves if move.change is not None])
            and known[0].product_id in product_ids
            and all(job.progress.passed(STOCK_COMMANDS.name, move.partition, move.offset) for move in moves)
        }
        with job.postgres():
            rows = {row["command_id"]: row for row in await job.store.pool.fetch(query("moves"), [*passed])}
        return {i: move for i, move in passed.items() if not is_refused(fold, fold.moves[i], rows.get(i))}

    # Orders

    async def _orders(self, differences: Sequence[Difference]) -> list[Repair]:
        """Repair orders, one difference of each: those to be put back in one transaction, then what goes to their homes."""
        try:
            return await self._try_orders(differences)
        except asyncpg.IntegrityConstraintViolationError as error:
            if len(differences) == 1:
                return [await self._left(differences[0], error)]
            return [repair for difference in differences for repair in await self._orders([difference])]

    async def _try_orders(self, differences: Sequence[Difference]) -> list[Repair]:
        job = self._job
        found: dict[str, str | Exception] = {}
        remains: dict[str, Difference] = {}
        with job.postgres():
            rows = await self._rows(job.store.pool, [d.subject for d in differences])
            moved = await self._moved(job.store.pool, [d.subject for d in differences if d.subject not in rows])
        for difference in differences:
            order_id = difference.subject
            try:
                now = self._remains(difference, rows.get(order_id))
                if now.repair not in (AGAIN, CANCEL, ROWS):
                    raise Left(now.repair)
                remains[order_id] = now
            except (Agrees, Left) as error:
                found[order_id] = error
        await self._fetch(order_id for order_id, now in remains.items() if now.repair != CANCEL)
        to_put = {i for i, now in remains.items() if now.repair == ROWS or (now.repair == AGAIN and moved.get(i))}
        rows |= await self._put_back([d for d in differences if d.subject in to_put], rows, found)
        outbox = Outbox(self._settings)
        for order_id, now in remains.items():
            done = found.get(order_id, "")
            if isinstance(done, Exception):
                continue
            try:
                if not done or not self._is_told(order_id, rows[order_id]):
                    send = self._cancel if now.repair == CANCEL else self._send_again
                    done = f"{done}; " * bool(done) + send(order_id, rows.get(order_id), outbox)
                found[order_id] = done
            except (Left, InvalidRecord) as error:
                found[order_id] = error
        await self._send(outbox)
        return [await self._repair(difference, found[difference.subject]) for difference in differences]

    def _is_told(self, order_id: str, row: Any) -> bool:
        return is_over(row) and not row["story"] & ~self._job.fold.orders[order_id].published

    async def _repair(self, difference: Difference, found: str | Exception) -> Repair:
        if isinstance(found, Agrees):
            return Repair(difference.kind, difference.subject, "agrees", "agrees by now")
        if isinstance(found, Exception):
            return await self._left(difference, found)
        return Repair(difference.kind, difference.subject, "done", found)

    async def _rows(self, connection: Any, order_ids: Sequence[str]) -> dict[str, Any]:
        return {row["order_id"]: row for row in await connection.fetch(query("orders"), order_ids, None)}

    async def _moved(self, connection: Any, order_ids: Sequence[str]) -> dict[str, set[str]]:
        """Return the products of which units were moved for these orders."""
        moved: dict[str, set[str]] = {}
        if order_ids:
            products = {p for order_id in order_ids for p, _ in self._job.fold.orders[order_id].lines}
            for row in await connection.fetch(query("moved_for"), order_ids, [*products], timeout=MOVED_S):
                moved.setdefault(row["order_id"], set()).add(row["product_id"])
        return moved

    async def _put_back(
        self, differences: Sequence[Difference], rows: Mapping[str, Any], found: dict[str, str | Exception]
    ) -> dict[str, Any]:
        """Write the rows of orders as their records and events say; return them, and note in ``found`` what was done."""
        orders, homes, whole = self._job.fold.orders, dict[str, int](), []
        for difference in differences:
            order_id = difference.subject
            try:
                self._record(order_id)
            except (Left, InvalidRecord) as error:
                found[order_id] = error
                continue
            homes[order_id] = rows[order_id]["home"] if order_id in rows else orders[order_id].partition
            whole.append(difference)
        if not whole:
            return {}
        ids = [*homes]
        partitions = {*homes.values()} | {self._owner(p) for order_id in ids for p, _ in orders[order_id].lines}
        async with self._fenced(partitions) as connection:
            locked = await connection.fetch(query("lock_orders"), ids)
            before = {row["order_id"]: orjson.loads(row["row"]) for row in locked}
            held: dict[str, dict[str, str]] = {}
            for row in await connection.fetch(query("lock_holds"), ids):
                held.setdefault(row["order_id"], {})[row["product_id"]] = row["state"]
            now_rows, moved = await self._rows(connection, ids), await self._moved(connection, ids)
            products = {p for order_id in ids for p, _ in orders[order_id].lines}
            prices = {r["product_id"]: r["price_cents"] for r in await connection.fetch(query("prices"), [*products])}
            now = await connection.fetchval("SELECT now()")
            written = {}
            for difference in whole:
                order_id = difference.subject
                row, held_now = now_rows.get(order_id), held.get(order_id, {})
                there = Before(before.get(order_id, {}), held_now, moved.get(order_id, set()), prices, now)
                try:
                    if row is not None and row["home"] != homes[order_id]:
                        raise Left("its home was another one a moment ago: run this again")
                    self._remains(difference, row)
                    written[order_id] = there.row | self._restored(order_id, row, there)
                    found[order_id] = "its row was put back"
                except (Agrees, Left, InvalidRecord) as error:
                    found[order_id] = error
            await connection.execute(query("drop_orders"), [*written])
            await connection.execute(query("put_orders"), orjson.dumps([*written.values()]).decode())
            await connection.execute(query("put_hold_prices"), [*written], [*partitions])
            return await self._rows(connection, [*written])

    def _remains(self, difference: Difference, row: Any) -> Difference:
        job, order_id = self._job, difference.subject
        trace, asked = job.fold.orders[order_id], order_id in job.fold.asked
        if row is not None:
            trace.choose(row["home"], row["source_offset"])
        for finding in judge_order(order_id, trace, row, job.progress, asked=asked, cut=False):
            if finding.difference.key == difference.key:
                return finding.difference
        raise Agrees

    async def _fetch(self, order_ids: Iterable[str]) -> None:
        """Read the records of these orders."""
        traces = self._job.fold.orders
        places = {(t.partition, t.offset) for i in order_ids if (t := traces[i]).partition != UNSEEN}
        with self._job.kafka():
            self._records = await self._job.replay.these(self._settings.topic(ORDERS.name), places)

    def _record(self, order_id: str) -> Order:
        trace = self._job.fold.orders[order_id]
        record = self._records.get((trace.partition, trace.offset))
        if record is None:
            raise Left(_LOST)
        return decode_record(record, self._limits)._replace(order_id=order_id)

    def _send_again(self, order_id: str, row: Any, outbox: Outbox) -> str:
        if order_id not in self._sent:
            order = self._record(order_id)
            self._sent.add(order_id)
            outbox.order(order.lines[0][0], encode(order), ())
        return "the order was sent again"

    def _cancel(self, order_id: str, row: Any, outbox: Outbox) -> str:
        outbox.order_command(order_id, orjson.dumps({"command": "cancel", "order_id": order_id}), row["home"])
        return "its home was commanded to cancel it"

    def _restored(self, order_id: str, row: Any, there: Before) -> dict[str, Any]:
        """Return an order's columns as its record and its events say, and, where these leave it open, as they were.

        Its products' counts are repaired after all orders: they follow from the lines of all of them.
        """
        order, trace = self._record(order_id), self._job.fold.orders[order_id]
        if trace.published & ENDS == ENDS and trace.reason != Reason.CANCELLED_BY_USER:
            raise Left("events of two ends: it is for people to decide")
        if row is not None and not is_of(trace, row):
            lines = tuple(zip(row["product_ids"], row["quantities"], strict=True))
            if not trace.same(row["user_id"], row["payment_method"], lines):
                raise Left("Postgres has another order under this id: it is for people to decide")
        home = trace.partition if row is None else row["home"]
        held, moved = there.held, there.moved
        owners = [self._owner(product_id) for product_id, _ in order.lines]
        foreign = [owner != home for owner in owners]
        if row is not None and stands(trace, row):
            status, story, reason = row["status"], row["story"], row["reason"]
            at = {name: there.row[f"{name.lower()}_at"] for name in BITS}
        else:
            # Without an event it was held whole, or its other owners were still to be asked.
            status = trace.last or (Status.CREATED if any(foreign) else Status.RESERVED)
            story, reason = (
                trace.published | CREATED | BITS[status],
                None if status != Status.CANCELLED else trace.reason,
            )
            if status in (Status.PAID, Status.CONFIRMED) or story & PAID:
                story |= RESERVED | PAID
            times = self._events.get(order_id, {})
            first = min(times.values(), default=there.now)
            at = {name: times.get(name, first) if story & bit else None for name, bit in BITS.items()}
        refused = status == Status.CANCELLED and not story & RESERVED and reason in _REFUSALS
        revoked = status == Status.CANCELLED and bool(story & PAID)
        if refused and not held:
            foreign = [False] * len(owners)  # it was refused before any of them was asked
        states = line_states(
            status, foreign, [held.get(product_id) for product_id, _ in order.lines], revoked=revoked, refused=refused
        )
        ids = [product_id for product_id, _ in order.lines]
        if refused:  # beside a line that was refused, others may have been held
            states = "".join(
                "r" if s == "x" and p in moved else s for (p, _), s in zip(order.lines, states, strict=True)
            )
        prices = _prices(order, trace, there)
        if not story & RESERVED:
            prices = [price if p in moved else None for (p, _), price in zip(order.lines, prices, strict=True)]
        total_cents = None
        if story & RESERVED:
            known = row["total_cents"] if row is not None else None
            total_cents = trace.total_cents if trace.total_cents is not None else known
            costs = sum(units * (price or 0) for (_, units), price in zip(order.lines, prices, strict=True))
            total_cents = costs if total_cents is None else total_cents
            if costs != total_cents:
                raise Left("its lines' prices are lost, those known don't add up to its total: correct its row by hand")
        payment, charge_id = self._payment(
            trace, row, status=status, story=story, reason=reason, total_cents=total_cents
        )
        return {
            "order_id": order_id,
            "home": home,
            "source_offset": trace.offset if row is None else row["source_offset"],
            "status": status,
            "reason": reason,
            "user_id": order.user_id,
            "payment_method": order.payment_method,
            "idempotency_key": order.idempotency_key,
            "placed_at": order.placed_at,
            "product_ids": ids,
            "quantities": [quantity for _, quantity in order.lines],
            "prices": prices,
            "states": [*states],
            "reasons": [reason if state == "x" else None for state in states] if "x" in states else None,
            "owners": owners if any(foreign) else None,
            "total_cents": total_cents,
            "payment": payment,
            "charge_id": charge_id,
            **{f"{name.lower()}_at": time for name, time in at.items()},
        }

    @staticmethod
    def _payment(
        trace: Trace, row: Any, *, status: str, story: int, reason: str | None, total_cents: int | None
    ) -> tuple[str | None, str | None]:
        """Return payment and charge of an order that is put back; what is due, its home has the provider do."""
        if row is not None and stands(trace, row) and payment_must_be(trace, row) is None:
            return row["payment"], row["charge_id"]
        charge_id = trace.charge_id or (row["charge_id"] if row is not None else None)
        if story & PAID:
            if charge_id is None:
                raise Left("a payment without an event: it is for people to decide")
            if status != Status.CANCELLED:
                return Payment.SUCCESS, charge_id
            return Payment.REFUND_DUE if total_cents else Payment.REFUNDED, charge_id
        if status != Status.CANCELLED:
            return None, None
        charged = row is not None and row["payment"] is not None
        if reason == Reason.PAYMENT_DECLINED and not charged:
            return Payment.FAILED, None
        return Payment.VOID_DUE if charged or (story & RESERVED and total_cents) else None, None

    async def _products(self, order_id: str) -> set[str]:
        trace = self._job.fold.orders.get(order_id)
        with self._job.postgres():
            row = await self._job.store.pool.fetchrow(query("orders"), [order_id], None)
        return {p for p, _ in (trace.lines if trace else ())} | {*((row["product_ids"] if row else None) or ())}

    # Lines of other owners

    async def _holds(self, difference: Difference) -> str:
        job, order_id, products = self._job, difference.subject, [*difference.must]
        trace = job.fold.orders.get(order_id)
        owners = {self._owner(product_id) for product_id in products}
        async with self._fenced(owners) as connection:
            locked = await connection.fetchrow(query("lock_orders"), [order_id])
            before = orjson.loads(locked["row"]) if locked is not None else {}
            held: Holds = {
                r["product_id"]: (r["state"], r["quantity"])
                for r in await connection.fetch(query("lock_holds"), [order_id])
            }
            row = await connection.fetchrow(query("orders"), [order_id], None)
            lines: dict[str, tuple[int, int | None]] = {}
            wanted: dict[str, str | None] = {}
            dear = False
            if row is not None and row["owners"] is not None:
                of = zip(row["quantities"], before["prices"], strict=True)
                lines = dict(zip(row["product_ids"], of, strict=True))
                wanted = {product_id: must for product_id, must, _ in unlike_holds(row)}
                dear = any(product_id in products for product_id, *_ in unlike_prices(row))
            wanted |= {p: "r" for p, (state, _) in held.items() if state == "h" and p not in lines}
            wanted = {product_id: wanted[product_id] for product_id in products if product_id in wanted}
            if not wanted and not dear:
                raise Agrees
            await connection.execute(query("put_hold_prices"), [order_id], [*owners])
            now = dict(held)
            for product_id, state in wanted.items():
                if state is None:
                    await connection.execute(query("drop_hold"), order_id, product_id)
                    del now[product_id]
                    continue
                quantity, price = lines[product_id] if product_id in lines else (held[product_id][1], None)
                whose = (0, "") if row is None else (row["home"], row["user_id"])
                hold = (self._owner(product_id), order_id, product_id, *whose, quantity, price, state)
                was_sold = product_id in held and held[product_id][0] == "c"
                await connection.execute(query("put_hold"), *hold, was_sold)
                now[product_id] = (state, quantity)
            if trace is not None and row is not None:
                for sign, holds in ((-1, held), (1, now)):
                    for product_id, sold, _ in units(trace, row, holds, self._settings.partitions):
                        if product_id in wanted and (view := job.views.get(product_id)) is not None:
                            view.must["sold"] += sign * sold
        done = "its owners' rows were put to what its home has"
        if trace is not None and row is not None and not ASKED.isdisjoint(row["states"]):
            outbox = Outbox(self._settings)
            await self._fetch([order_id])
            done += f"; {self._send_again(order_id, row, outbox)}"
            await self._send(outbox)
        return done

    # Stock

    async def _stock(self, difference: Difference) -> str:
        """Write what is missing in a product's ledger, counter what is too much, set the row to the ledger's sums."""
        job, product_id = self._job, difference.subject
        if product_id in self._unsound:
            raise Left(_UNSOUND)
        partition = self._owner(product_id)
        async with self._fenced({partition}) as connection:
            row = await connection.fetchrow(query("lock_product"), product_id)
            if row is None:
                raise Left(_NO_STOCK)
            changes: list[str] = []
            ours = {command_id: move for command_id, move in self._commands.items() if move.product_id == product_id}
            decided = await connection.fetch(query("moves"), [*ours, *job.refused])
            applied = {row["command_id"] for row in decided if row["applied"]}
            if any(row["command_id"] in ours and not row["applied"] for row in decided):
                raise Left("a command of it was refused meanwhile: run it again")
            # A refused one that a retry has had carried out meanwhile is nothing that is too much.
            known = job.at, [*ours], [*(job.flying | (job.refused & applied))]
            missing, countered = await self._entries(connection, partition, product_id)
            names = ("command", "quantity", "change", "reason", "actor")
            columns = [[getattr(move, name) for move in ours.values()] for name in names]
            missing += len(await connection.fetch(query("write_commands"), partition, product_id, [*ours], *columns))
            if missing:
                changes.append(f"{missing} entries written")
            sums = await connection.fetchrow(query("ledger_sums"), product_id, *known)
            view = job.views.get(product_id)
            for movement, name in (("receive", "received"), ("adjust", "adjusted")):
                surplus = 0 if view is None else sums[f"{name}_judged"] - view.must[name]
                if surplus:
                    entry = (partition, product_id, movement, None, None, -surplus, _COUNTERS, None)
                    await connection.execute(query("write_entry"), *entry)
                    countered.append(f"countered by {movement} {-surplus}")
            changes += countered
            if changes:
                sums = await connection.fetchrow(query("ledger_sums"), product_id, *known)
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
                entry = (partition, product_id, "adjust", None, None, 0, f"reconcile: {counts}", None)
                await connection.execute(query("write_entry"), *entry)
            if not changes:
                if view is not None and view.must["sold"] not in (sums["sold_judged"], view.row["g_sold"]):
                    raise Left(
                        "the lines and the ledger agree with each other: --from-beginning lists which orders differ"
                    )
                raise Agrees
            if row["limit_per_user"] is not None:
                await connection.execute("SELECT recount_users($1)", product_id)
            await self._reload(connection, row)
        return "; ".join(changes)

    async def _entries(self, connection: Any, partition: int, product_id: str) -> tuple[int, list[str]]:
        """Write the entries that a product's lines call for and that its ledger lacks, and counter those of too much.

        Lines and ledger of a product change in one commit and under its row lock, which is held here, so what they differ
        by is exact.  A sale is written or countered only where the topics say the same: else it may be the lines that are
        wrong.

        Returns:
            How many entries were missing, and what was countered, in words.
        """
        unlike = await connection.fetch(query("unlike_entries"), product_id)
        signs = {"commit": 1, "return": -1}
        sold = sum(signs.get(row["movement"], 0) * row["n"] * row["quantity"] for row in unlike)
        view = self._job.views.get(product_id)
        if sold and (view is None or sold != view.must["sold"] - view.row["g_sold"]):
            raise Left(
                f"the lines have {sold} units sold more than the ledger, and the topics agree with neither: "
                "--from-beginning lists which orders differ"
            )
        missing: dict[tuple[str, datetime], list[tuple[str, int]]] = {}
        countered = Counter[str]()
        for row in unlike:
            if row["n"] > 0:
                missing.setdefault((row["movement"], row["at"]), []).append((row["order_id"], row["quantity"]))
                continue
            quantity = row["n"] * row["quantity"]
            entry = (partition, product_id, row["movement"], [row["order_id"]], [quantity], quantity)
            await connection.execute(query("write_entry"), *entry, _COUNTERS, row["at"])
            countered[row["movement"]] += quantity
        for (movement, at), lines in missing.items():
            ids, quantities = map(list, zip(*lines, strict=True))
            entry = (partition, product_id, movement, ids, quantities, sum(quantities))
            await connection.execute(query("write_entry"), *entry, "reconcile: was missing", at)
        return sum(map(len, missing.values())), [f"countered by {name} {units}" for name, units in countered.items()]

    async def _users(self, difference: Difference) -> str:
        product_id = difference.subject
        if product_id in self._unsound:
            raise Left(_UNSOUND)
        async with self._fenced({self._owner(product_id)}) as connection:
            row = await connection.fetchrow(query("lock_product"), product_id)
            if row is None:
                raise Left(_NO_STOCK)
            if product_id not in {one["product_id"] for one in await connection.fetch(query("users"))}:
                raise Agrees
            await connection.execute("SELECT recount_users($1)", product_id)
            await self._reload(connection, row)
        return "the units of its users were counted again"

    async def _catalogue(self, difference: Difference) -> str:
        """Command what the topic says once more, under ids of its own: those that it has change nothing any more."""
        job, product_id = self._job, difference.subject
        with job.kafka():
            await job.read_on(self._settings.topic(STOCK_COMMANDS.name))
        if product_id in job.commanded or len(job.fold.catalogue[product_id]) > self._said[product_id]:
            raise Left("its name, price or limit is being changed by a command: run it again")
        outbox, must = Outbox(self._settings), dict(difference.must)
        commands = (
            [{"command": "limit", "limit_per_user": must.pop("limit_per_user")}] if "limit_per_user" in must else []
        )
        for body in commands + [{"command": "product", **must}] * bool(must):
            command = {**body, "command_id": str(uuid.uuid4()), "product_id": product_id}
            outbox.stock_command(product_id, orjson.dumps(command))
        await self._send(outbox)
        return "its owner was commanded to set it"

    # Redis

    async def _reload(self, connection: Any, row: Any) -> Any:
        """Load a product into Redis under a new generation; the caller holds its row lock. Returns its counts."""
        job, product_id = self._job, row["product_id"]
        now = await connection.fetchrow(query("bump_generation"), product_id)
        limits = await job.store.user_limits(connection, [row])
        with job.redis():
            counts = Counts(now["on_hand"], now["reserved"], now["version"], now["generation"], row["claim"])
            await job.gate.load({product_id: counts}, limits)
        return now

    async def _redis(self, difference: Difference) -> str:
        job, product_id = self._job, difference.subject
        with job.postgres():
            async with job.store.pool.acquire() as connection, connection.transaction():
                row = await connection.fetchrow(query("lock_product"), product_id)
                if row is None:
                    raise Left(_NO_STOCK)
                with job.redis():
                    there = (await job.gate.inspect([row])).get(product_id)
                must = (row["on_hand"], row["reserved"], 0, 0)
                if there is None or (there.on_hand, there.reserved, there.taken, there.takes) == must:
                    raise Agrees
                now = await self._reload(connection, row)
        return f"loaded again: on_hand {now['on_hand']}, reserved {now['reserved']}, generation {now['generation']}"

    async def _send(self, outbox: Outbox) -> None:
        with self._job.kafka():
            await self._producer.send(outbox.handovers())


def _parts(differences: Sequence[Difference], size: int) -> Iterator[Sequence[Difference]]:
    return (differences[start : start + size] for start in range(0, len(differences), size))


def _prices(order: Order, trace: Trace, there: Before) -> list[int | None]:
    """Return the price of each line: as its event says, else as its row had it, else as it is now."""
    told = trace.prices or ()
    if (
        len(told) == len(order.lines)
        and sum(units * price for (_, units), price in zip(order.lines, told, strict=True)) == trace.total_cents
    ):
        return [*told]
    prices: dict[str, int | None] = dict(there.prices)
    had = zip(there.row.get("product_ids", ()), there.row.get("prices", ()), strict=True)
    prices |= {product_id: price for product_id, price in had if price is not None}
    if trace.total_cents is not None and len(order.lines) == 1:
        ((product_id, quantity),) = order.lines
        prices[product_id] = trace.total_cents // quantity
    return [prices.get(product_id) for product_id, _ in order.lines]
