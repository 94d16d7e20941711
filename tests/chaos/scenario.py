"""What every chaos test runs and what must hold after it: one list of orders, one judge."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiokafka.errors import KafkaError

from orderstream.agents.provider import Charge, SimulatedProvider, Verdict
from orderstream.jobs.verify import verify
from orderstream.settings import Settings
from orderstream.streams.producer import Outbox
from orderstream.streams.topics import ORDER_EVENTS
from tests.chaos.bank import Bank
from tests.harness import Pipeline

PLENTY, SCARCE = 40, 5
PLENTY_UNITS = 1_000_000
SCARCE_SHARE = 0.03
"""Units of each scarce product for each order: some of those who want one get none."""

PRICE_CENTS = 100
SUCCESS_RATE = 0.8
SLICES_S = 0.1

Ends = frozenset[str]
"""The ways in which an order may end."""

STORIES = {
    ("CREATED", "RESERVED", "PAID", "CONFIRMED"),
    ("CREATED", "CANCELLED"),
    ("CREATED", "RESERVED", "CANCELLED"),
    ("CREATED", "RESERVED", "PAID", "CANCELLED"),
    ("CREATED", "RESERVED", "PAID", "CONFIRMED", "CANCELLED"),
}
"""The statuses that an order may have had, as its events tell them."""

PAID_BACK = {None, "FAILED", "VOIDED", "REFUNDED"}
"""What may be known of the money of a cancelled order, once nothing is due."""

MOVED = {
    "committed": ({"hold": 1, "commit": 1},),
    "released": ({"hold": 1, "release": 1}, {}),
    "returned": ({"hold": 1, "commit": 1, "return": 1}, {"hold": 1, "release": 1}),
    "refused": ({},),
}
"""What the ledger may have of a line that came to rest: how often its units were moved, and how.  A release may come before
its hold, and a return before its commit."""

HELD_AS = {"committed": "c", "released": "rx", "returned": "n", "refused": "x"}
"""How the owner of a line may have it that came to rest at its home."""

AT_REST = {
    "orders that wait": "SELECT order_id::text FROM waiting",
    "cancels that are kept": "SELECT order_id::text FROM kept_commands",
    "lines that are held": "SELECT order_id::text || ' ' || product_id FROM holds WHERE state = 'h'",
    "orders that were cancelled and are not": "SELECT order_id::text FROM orders"
    " WHERE order_id = ANY ($1::uuid[]) AND status <> 'CANCELLED'",
}
"""What there must be none of once everything has come to rest."""


@dataclass
class Scenario:
    """Seeded orders of one to four products, some of them scarce.

    The same seed gives the same orders with the same ids, so that two runs can be compared order by order.

    Attributes:
        number: of orders.
        seed: of the orders.
        may_end: other ways in which any of them may end, because the test lets them expire.
        bank: who charges; None: the simulated provider, which keeps no ledger of its own.
        cancelled: the orders that a customer has cancelled.
    """

    number: int
    seed: int = 1
    may_end: Ends = frozenset()
    bank: Bank | None = None
    orders: list[dict[str, Any]] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        for _ in range(self.number):
            pool = [f"p{n}" for n in range(PLENTY)]
            if draw.random() < 0.3:
                pool += [f"s{n}" for n in range(SCARCE)] * 4
            products = dict.fromkeys(draw.choices(pool, k=draw.choice((1, 1, 1, 2, 3, 4))))
            order = Pipeline.order(*((product_id, draw.randint(1, 3)) for product_id in products))
            order["order_id"] = str(uuid.UUID(int=draw.getrandbits(128), version=4))
            self.orders.append(order)

    @property
    def products(self) -> dict[str, int]:
        """Return the units of each product."""
        scarce = int(SCARCE_SHARE * self.number)
        return {f"p{n}": PLENTY_UNITS for n in range(PLENTY)} | {f"s{n}": scarce for n in range(SCARCE)}

    def ids(self, orders: Sequence[dict[str, Any]] | None = None) -> list[str]:
        """Return the ids of these orders, of all by default."""
        return [order["order_id"] for order in (self.orders if orders is None else orders)]

    def ends(self, settings: Settings, order: dict[str, Any]) -> Ends:
        """Return how an order must end, whatever happens: one way, or more where that depends on who came first."""
        order_id = order["order_id"]
        if self.bank is not None:
            charged = not self.bank.declines(order_id)
        else:
            provider = SimulatedProvider(
                success_rate=settings.payment_success_rate, latency_min_s=0, latency_max_s=0, seed=settings.payment_seed
            )
            answer = provider.charge(Charge(order_id, order["user_id"], order["payment_method"], 1))
            assert isinstance(answer, Verdict)
            charged = answer.charge_id is not None
        ends = {"CONFIRMED" if charged else "CANCELLED payment_declined"}
        if any(item["product_id"].startswith("s") for item in order["items"]):
            ends.add("CANCELLED insufficient_stock")
        if order_id in self.cancelled:
            ends = ends - {"CONFIRMED"} | {"CANCELLED cancelled_by_user"}
        return self.may_end | ends

    async def flow(self, shop: Pipeline, over_s: float, orders: Sequence[dict[str, Any]] | None = None) -> None:
        """Produce these orders, all by default, evenly over a time, in seconds; continue when Kafka is available again."""
        orders = self.orders if orders is None else orders
        began = time.monotonic()
        sent = 0
        while sent < len(orders):
            due = min(len(orders), int(len(orders) * (time.monotonic() - began + SLICES_S) / over_s) + 1)
            try:
                await shop.produce(orders[sent:due])
                sent = due
            except KafkaError:
                pass  # the slice is sent again, perhaps for the second time: the same orders
            await asyncio.sleep(SLICES_S)

    async def cancel(self, shop: Pipeline, ids: Iterable[str]) -> None:
        """Cancel these orders, as a customer does who does not know their home; they must end as CANCELLED then."""
        outbox, ids = Outbox(shop.settings), list(ids)
        for order_id in ids:
            outbox.order_command(order_id, orjson.dumps({"command": "cancel", "order_id": order_id}))
        await (await shop.producer()).send(outbox.handovers())
        self.cancelled.update(ids)

    async def check(self, shop: Pipeline, *, others: int = 0, timeout_s: float = 60.0) -> Counter[str]:
        """Wait until every order has ended and all has come to rest, then check every promise; return how they ended.

        Args:
            shop: the pipeline, with workers that run.
            others: orders that the test sent besides these; of them only what holds of all is checked.
            timeout_s: until what follows the last end has come to rest: refunds, units given back, events, Redis.
        """
        await shop.finished(self.ids(), timeout_s=120.0)
        deadline = time.monotonic() + timeout_s
        while faults := await self.faults(shop, others):
            assert time.monotonic() < deadline, f"{len(faults)} faults:\n" + "\n".join(faults[:20])
            await asyncio.sleep(0.5)
        return await shop.outcomes(self.ids())

    async def faults(self, shop: Pipeline, others: int = 0) -> list[str]:
        """Return all that is not as it must be once everything has come to rest."""
        pool = (await shop.store()).pool
        faults = []
        for what, query in AT_REST.items():
            if found := [row[0] for row in await pool.fetch(query, *([list(self.cancelled)] if "$1" in query else []))]:
                faults.append(f"{len(found)} {what}: {found[:5]}")
        return faults or await self.judge(shop, others) or await broken(shop.settings)

    async def judge(self, shop: Pipeline, others: int) -> list[str]:
        """Return what breaks a promise, by the judge's own reading of the tables, the events and the bank's ledger."""
        pool = (await shop.store()).pool
        rows = {row["order_id"]: row for row in await pool.fetch("SELECT *, order_id::text FROM orders")}
        lines = defaultdict(list)
        for line in await pool.fetch("SELECT *, order_id::text FROM order_lines"):
            lines[line["order_id"]].append(line)
        events, homes = await told(shop)
        faults = []
        for order in self.orders:
            faults += self._judge_sent(shop, order, rows.get(order["order_id"]))
        if (unknown := len(rows.keys() - set(self.ids()))) != others:
            faults.append(f"{unknown} orders that are none of these, not {others}")
        for order_id, row in rows.items():
            if (story := events.get(order_id, ())) not in STORIES or story[-1] != row["status"]:
                faults.append(f"{order_id} is {row['status']}, its events are {story}")
            if homes.get(order_id, set()) != {row["home"]}:
                faults.append(f"{order_id} has its home in {row['home']}, its events are in {homes.get(order_id)}")
            faults += _judge_money(order_id, row, lines[order_id])
        if self.bank is not None:
            paid = {order_id: row["total_cents"] for order_id, row in rows.items() if row["status"] == "CONFIRMED"}
            for order_id, cents in paid.items() ^ self.bank.standing.items():
                which = "orders" if paid.get(order_id) == cents else "bank"
                faults.append(f"{order_id}: only the {which} has a charge of {cents} that stands")
        faults += await _judge_lines(shop, rows, lines)
        faults += await self._judge_stock(shop, rows, lines)
        return faults

    def _judge_sent(self, shop: Pipeline, order: dict[str, Any], row: Any) -> list[str]:
        order_id = order["order_id"]
        if row is None:
            return [f"{order_id} was sent and is not there"]
        faults = []
        sent = {item["product_id"]: item["quantity"] for item in order["items"]}
        if dict(zip(row["product_ids"], row["quantities"], strict=True)) != sent:
            faults.append(f"{order_id} was sent with {sent}, its row has {row['product_ids']}, {row['quantities']}")
        ended = row["status"] + (f" {row['reason']}" if row["reason"] else "")
        if ended not in (must := self.ends(shop.settings, order)):
            faults.append(f"{order_id} is {ended}, without the fault {' or '.join(sorted(must))}")
        return faults

    async def _judge_stock(self, shop: Pipeline, rows: dict[str, Any], lines: dict[str, list[Any]]) -> list[str]:
        """Check that of each product as much is sold as confirmed orders bought, and nothing is reserved."""
        sold: Counter[str] = Counter()
        for order_id, row in rows.items():
            if row["status"] == "CONFIRMED":
                sold.update({line["product_id"]: line["quantity"] for line in lines[order_id]})
        faults = []
        for row in await (await shop.store()).pool.fetch("SELECT * FROM stock"):
            name = row["product_id"]
            there = row["initial"] + row["received"] + row["adjusted"]
            if (row["on_hand"], row["reserved"], row["sold"]) != (there - sold[name], 0, sold[name]):
                counts = {key: row[key] for key in ("on_hand", "reserved", "sold")}
                faults.append(f"{name}: {counts} of {there}, its orders {sold[name]}")
            if row["initial"] != self.products.get(name, row["initial"]):
                faults.append(f"{name} began with {row['initial']} units, not {self.products[name]}")
        return faults


def _judge_money(order_id: str, row: Any, lines: Sequence[Any]) -> list[str]:
    cost = PRICE_CENTS * sum(line["quantity"] for line in lines)
    if row["status"] == "CONFIRMED" and (row["payment"], row["total_cents"]) != ("SUCCESS", cost):
        return [f"{order_id} is CONFIRMED over {cost}, its payment {row['payment']} of {row['total_cents']}"]
    if row["status"] == "CANCELLED" and row["payment"] not in PAID_BACK:
        return [f"{order_id} is CANCELLED, its payment {row['payment']}"]
    return []


async def _judge_lines(shop: Pipeline, rows: dict[str, Any], lines: dict[str, list[Any]]) -> list[str]:
    """Check each line against its order, its owner and the ledger: its units were moved once each way."""
    pool = (await shop.store()).pool
    moved: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for entry in await pool.fetch(
        "SELECT l.product_id, l.movement::text, t.order_id::text, t.quantity, l.quantity AS total, l.quantities"
        " FROM ledger l CROSS JOIN LATERAL unnest(l.order_ids, l.quantities) t (order_id, quantity)"
    ):
        assert entry["total"] == sum(entry["quantities"]), dict(entry)
        moved[entry["order_id"], entry["product_id"]][entry["movement"]] += entry["quantity"]
    holds = {
        (hold["order_id"], hold["product_id"]): hold
        for hold in await pool.fetch("SELECT *, order_id::text, state::text FROM holds")
    }
    faults = []
    for order_id, row in rows.items():
        ends = {"committed"} if row["status"] == "CONFIRMED" else {"released", "refused"}
        ends = {"returned"} if row["status"] == "CANCELLED" and row["paid_at"] is not None else ends
        for line in lines[order_id]:
            key, state = (order_id, line["product_id"]), line["state"]
            what = f"{order_id} {row['status']} {row['reason']}: its line of {line['product_id']} is {state}"
            if state not in ends:
                faults.append(what)
                continue
            units = {movement: n // line["quantity"] for movement, n in moved.pop(key, Counter()).items()}
            if units not in MOVED[state]:
                faults.append(f"{what}, the ledger moved it {units}")
            hold = holds.pop(key, None)
            if line["owner"] == row["home"]:
                if hold is not None:
                    faults.append(f"{what}, at home, and held as another home's: {dict(hold)}")
            elif hold is None or hold["state"] not in HELD_AS[state] or hold["partition"] != line["owner"]:
                faults.append(f"{what}, its owner {line['owner']} has it as {hold and dict(hold)}")
    faults += [f"the ledger moves {dict(found)} of no line: {key}" for key, found in moved.items()]
    faults += [f"a line of no order is held: {dict(hold)}" for hold in holds.values()]
    return faults


async def told(shop: Pipeline) -> tuple[dict[str, tuple[str, ...]], dict[str, set[int]]]:
    """Return the statuses of each order's events in the order of the topic, repeats left out; and in which partitions."""
    stories: dict[str, dict[str, None]] = defaultdict(dict)
    homes: dict[str, set[int]] = defaultdict(set)
    for record in await shop.records(ORDER_EVENTS.name):
        event = orjson.loads(record.value)
        stories[event["order_id"]].setdefault(event["status"])
        homes[event["order_id"]].add(record.partition)
    return {order_id: tuple(story) for order_id, story in stories.items()}, homes


async def broken(settings: Settings) -> list[str]:
    """Return the promises of ``orderstream verify`` that do not hold, without any grace."""
    report = await verify(settings, grace_s=0.0, settle_s=0.0)
    return [f"{check.promise}: {check.offenders[:5]}" for check in report.checks if check.offenders]
