"""The judge of the chaos tests, which can't agree with the product by mistake: it shares no code with it.

It reads the topics with another client (librdkafka, read committed), Postgres by statements of its own, Redis by hand, and
the ledger of the bank over HTTP.  What must be it works out from the topics that strangers write and from the bank; what the
product has in tables, events and Redis is held to that.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import aiohttp
import asyncpg
import redis.asyncio as redis
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

INPUTS = ("orders", "order-commands", "stock-commands", "order-lines", "reservations")
TOPICS = (*INPUTS, "order-events", "dead-letters")
READ_S = 60.0
"""How long all topics may take to be read."""

LEADERLESS = (
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError._TRANSPORT,
    KafkaError._TIMED_OUT,
)
"""What a client hears of partitions whose broker has just started."""

STORIES = {
    ("CREATED", "RESERVED", "PAID", "CONFIRMED"),
    ("CREATED", "CANCELLED"),
    ("CREATED", "RESERVED", "CANCELLED"),
    ("CREATED", "RESERVED", "PAID", "CANCELLED"),
    ("CREATED", "RESERVED", "PAID", "CONFIRMED", "CANCELLED"),
}
"""The statuses that an order may have had, as its events tell them."""

MOVED = {
    "c": ({"hold": 1, "commit": 1},),
    "r": ({"hold": 1, "release": 1}, {}),
    "n": ({"hold": 1, "commit": 1, "return": 1}, {"hold": 1, "release": 1}),
    "x": ({},),
}
"""What the ledger may have of a line that came to rest: how often its units were moved, and how.  A release may come before
its hold, and a return before its commit."""

HELD_AS = {"c": "c", "r": "rx", "n": "n", "x": "x"}
"""How the owner of a line may have it that came to rest at its home."""

COMMAND_BYTES_MAX = 16 * 1024
UNITS_MOVED_MAX = 1_000_000_000
PRICE_MAX = 10**12
COMMANDS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "receive": (1, UNITS_MOVED_MAX, ()),
    "adjust": (-UNITS_MOVED_MAX, UNITS_MOVED_MAX, ()),
    "set": (0, UNITS_MOVED_MAX, ("change",)),
    "recount": (0, 0, ()),
    "product": (0, 0, ("name", "price_cents", "limit_per_user", "retired", "was")),
    "limit": (0, 0, ("limit_per_user",)),
}
"""Stock commands: the least and most units of each, and members that not every one has."""

INTEGER_END = 2**63
T = TypeVar("T")


class Record(NamedTuple):
    """A committed record; its topic without the prefix."""

    topic: str
    partition: int
    offset: int
    value: bytes | None
    headers: Mapping[str, bytes]

    @property
    def place(self) -> tuple[str, int, int]:
        """Where it stands."""
        return self.topic, self.partition, self.offset


class Order(NamedTuple):
    """A well-formed order; ``order_id`` and ``key`` None where it names none."""

    order_id: str | None
    key: str | None
    user_id: str
    payment_method: str
    lines: dict[str, int]

    @property
    def content(self) -> tuple[Any, ...]:
        """What makes it the same order as another record."""
        return self.user_id, self.payment_method, tuple(sorted(self.lines.items()))


class StockCommand(NamedTuple):
    """A well-formed stock command."""

    command_id: str
    product_id: str
    command: str
    quantity: int
    reason: str
    name: str | None
    price_cents: int | None
    limit_per_user: int | None
    retired: bool | None
    was: str | None
    """How the product has to be, where the command says so."""
    change: int | None
    """What a ``set`` added or removed, as its owner wrote once it was decided."""


@lru_cache(maxsize=100_000)
def partition_of(product_id: str, partitions: int) -> int:
    """Return where Kafka's default partitioner (murmur2) places a key."""
    data, m, mask = product_id.encode(), 0x5BD1E995, 0xFFFFFFFF
    whole = len(data) & ~3
    h = 0x9747B28C ^ len(data)
    for n in range(0, whole, 4):
        k = int.from_bytes(data[n : n + 4], "little") * m & mask
        h = h * m & mask ^ (k ^ k >> 24) * m & mask
    if rest := data[whole:]:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return ((h ^ h >> 15) & 0x7FFFFFFF) % partitions


# What strangers write


def parsed(value: bytes | None, bytes_max: int) -> Any:
    """Return what a value is as JSON; None for what is none, is too large, or names a member twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    def never(_: str) -> None:
        raise ValueError

    if not value or len(value) > bytes_max:
        return None
    try:
        return json.loads(value.decode(), object_pairs_hook=once, parse_constant=never)
    except (ValueError, RecursionError):
        return None


def has(body: Any, needed: set[str], more: Iterable[str] = ()) -> bool:
    """Tell whether this is an object with these members, and others only of ``more``."""
    return isinstance(body, dict) and needed <= body.keys() <= needed.union(more)


def is_text(value: Any, most: int = 64) -> bool:
    """Tell whether this is text that prints, of 1 to so many characters, without white space around it."""
    return isinstance(value, str) and 0 < len(value) <= most and value == value.strip() and value.isprintable()


def is_whole(value: Any, least: int, end: int = INTEGER_END) -> bool:
    """Tell whether this is a whole number from ``least`` to before ``end``."""
    return type(value) is int and least <= value < end


def is_id(value: Any) -> bool:
    """Tell whether this is an id as strangers write it."""
    return is_text(value) or is_whole(value, 0)


def uuid_of(value: Any) -> str | None:
    """Return a UUID as it is usually written, or None."""
    try:
        return str(uuid.UUID(value)) if isinstance(value, str) else None
    except ValueError:
        return None


def is_time(value: Any) -> bool:
    """Tell whether this is a time with its offset from UTC."""
    try:
        return bool(re.match(r"\d{4}-\d\d-\d\d[Tt ]", value)) and datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def order_of(value: bytes | None, settings: Any) -> Order | None:
    """Return the order of a record on ``orders``; None where it is none."""
    body = parsed(value, settings.order_bytes_max)
    if not has(body, {"user_id", "items", "payment_method"}, ("order_id", "idempotency_key", "placed_at")):
        return None
    items, key, order_id = body["items"], body.get("idempotency_key"), body.get("order_id")
    if not (
        is_id(body["user_id"])
        and is_text(body["payment_method"])
        and isinstance(items, list)
        and all(has(item, {"product_id", "quantity"}) for item in items)
        and all(is_id(item["product_id"]) and is_whole(item["quantity"], 1) for item in items)
        and (key is None or is_text(key, 200))
        and (order_id is None or uuid_of(order_id))
        and (body.get("placed_at") is None or is_time(body["placed_at"]))
    ):
        return None
    lines: Counter[str] = Counter()
    for item in items:
        lines[str(item["product_id"])] += item["quantity"]
    if not 0 < len(lines) <= settings.order_lines_max or max(lines.values()) > settings.line_quantity_max:
        return None
    named = uuid_of(order_id)
    if named is not None and key is None and named[14] == "8":  # such ids follow from keys
        return None
    return Order(named, key, str(body["user_id"]), body["payment_method"], dict(lines))


def order_command_of(value: bytes | None) -> tuple[str, str] | None:
    """Return the command of a record on ``order-commands``, and its order; None where it is none."""
    body = parsed(value, COMMAND_BYTES_MAX)
    if not has(body, {"command", "order_id"}) or body["command"] not in ("cancel", "retry_payment"):
        return None
    order_id = uuid_of(body["order_id"])
    return (body["command"], order_id) if order_id else None


def stock_command_of(value: bytes | None) -> StockCommand | None:
    """Return the command of a record on ``stock-commands``; None where it is none."""
    body = parsed(value, COMMAND_BYTES_MAX)
    command = body.get("command") if isinstance(body, dict) else None
    if not isinstance(command, str) or command not in COMMANDS:
        return None
    least, most, own = COMMANDS[command]
    if not has(body, {"command", "command_id", "product_id"}, ("quantity", "reason", "actor", *own)):
        return None
    quantity, reason, command_id = body.get("quantity", 0), body.get("reason", ""), uuid_of(body["command_id"])
    name, price, limit, change = (body.get(own) for own in ("name", "price_cents", "limit_per_user", "change"))
    retired, was = body.get("retired"), body.get("was")
    if not (
        command_id
        and is_id(body["product_id"])
        and is_whole(quantity, least, most + 1)
        and isinstance(reason, str)
        and len(reason) <= 200
        and reason.isprintable()
        and (body.get("actor") is None or is_text(body["actor"], 64))
        and (name is None or is_text(name, 200))
        and (price is None or is_whole(price, 0, PRICE_MAX + 1))
        and (limit is None or is_whole(limit, 1, 2**31))
        and (change is None or type(change) is int)
        and (command != "adjust" or quantity)
        and (command not in ("adjust", "set") or reason.strip())
        and (command != "set" or "quantity" in body)
        and (retired is None or isinstance(retired, bool))
        and (was is None or isinstance(was, dict))
        and (command != "product" or (name, price, retired) != (None, None, None))
        and (command != "limit" or "limit_per_user" in body)
    ):
        return None
    said = (limit, retired, repr(was) if "was" in body else None)
    return StockCommand(command_id, str(body["product_id"]), command, quantity, reason, name, price, *said, change)


def rows_of(record: Record, partitions: int) -> list[Any] | None:
    """Return the rows of a record of an inner topic; None where no stage can have written it, or not to this partition."""
    body = parsed(record.value, 2**30)
    if not isinstance(body, dict) or type(body.get("v")) is not int or body["v"] != 1:
        return None
    rows = body.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return None
    shapes = ([str, str, str, int, int, str],) if record.topic == "order-lines" else (
        [str, str, str, int, str], [str, str, str, int, type(None)]
    )  # fmt: skip
    for row in rows:
        if [type(value) for value in row] not in shapes:
            return None
        if record.topic == "order-lines":
            action, order_id, product_id, quantity, home, _ = row
            sound = action in ("hold", "commit", "release", "return") and 0 <= home < partitions
            sound = sound and quantity >= 0 and partition_of(product_id, partitions) == record.partition
        else:
            order_id, _, state, price, _ = row
            sound = state in tuple("hxcrn") and price >= 0
        if not sound or uuid_of(order_id) != order_id:
            return None
    return rows


# What is read


class Log:
    """All committed records of the topics; read on with each call of :meth:`read`.

    Attributes:
        records: by topic, of each partition in their order.
        begins: by topic and partition, the first offset that there is.
    """

    def __init__(self, settings: Any) -> None:
        self._settings = settings
        self._next: dict[tuple[str, int], int] = {}
        self.records: dict[str, list[Record]] = {topic: [] for topic in TOPICS}
        self.begins: dict[tuple[str, int], int] = {}

    def read(self) -> None:
        """Read all that is committed by now.

        Raises:
            TimeoutError: with the partitions whose end was not reached.
        """
        prefix = self._settings.topic_prefix
        consumer = Consumer(
            {
                "bootstrap.servers": self._settings.kafka,
                "group.id": "auditor",
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "enable.partition.eof": True,
                "allow.auto.create.topics": False,
            }
        )
        try:
            places = [(topic, partition) for topic in TOPICS for partition in range(self._settings.partitions)]
            tps = [TopicPartition(prefix + t, p, self._next.get((t, p), OFFSET_BEGINNING)) for t, p in places]
            for place, tp in zip(places, tps, strict=True):
                self.begins[place] = _beginning(consumer, tp)
            consumer.assign(tps)
            left, deadline, said = set(places), time.monotonic() + READ_S, None
            while left:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the ends of {sorted(left)} were not reached: {said}")
                for message in consumer.consume(5_000, timeout=0.1):
                    place = ((message.topic() or "").removeprefix(prefix), message.partition() or 0)
                    if (error := message.error()) is None:
                        self._note(place, message)
                    elif error.code() == KafkaError._PARTITION_EOF:
                        left.discard(place)
                    else:
                        said = error
        finally:
            consumer.close()

    def _note(self, place: tuple[str, int], message: Any) -> None:
        topic, partition = place
        of_ours = topic in ("order-events", "dead-letters")  # only the product's own headers are looked at
        headers = {name: value or b"" for name, value in reversed(message.headers() or ())} if of_ours else {}
        self.records[topic].append(Record(topic, partition, message.offset(), message.value(), headers))
        self._next[place] = message.offset() + 1


def _beginning(consumer: Consumer, tp: TopicPartition) -> int:
    """Return the first offset of a partition; one whose broker has just started may be without a leader for a moment."""
    deadline = time.monotonic() + READ_S
    while True:
        try:
            return int(consumer.get_watermark_offsets(tp, timeout=10)[0])
        except KafkaException as error:
            if time.monotonic() > deadline or error.args[0].code() not in LEADERLESS:
                raise
        time.sleep(0.1)


TABLES = {
    "orders": "SELECT *, order_id::text AS id, status::text AS now, reason::text AS why, payment::text AS money,"
    " array_to_string(states, '') AS lines FROM orders",
    "holds": "SELECT *, order_id::text AS id, state::text AS now FROM holds",
    "ledger": "SELECT t.order_id::text AS id, l.product_id, l.movement::text AS movement, sum(t.quantity)::bigint AS units"
    " FROM ledger l CROSS JOIN LATERAL unnest(l.order_ids, l.quantities) t (order_id, quantity) GROUP BY 1, 2, 3",
    "stock": "SELECT s.*, coalesce(max(l.claim), 0) AS claim FROM stock s LEFT JOIN lanes l USING (partition)"
    " GROUP BY s.product_id",
    "kept": "SELECT order_id::text AS id FROM kept_commands",
    "rejected": "SELECT order_id::text AS id FROM rejections",
    "removed": "SELECT order_id::text AS id FROM removed_orders",
}

GROUND = """
SELECT id, gates, (SELECT system_identifier FROM pg_control_system()),
       (SELECT oid FROM pg_database WHERE datname = current_database()), left(pg_walfile_name(pg_current_wal_lsn()), 8)
FROM pipeline
"""
"""What, beside the Redis that is there, the counts in it are of."""

UNSETTLED = {
    "orders have not ended": "SELECT order_id::text FROM orders WHERE status NOT IN ('CONFIRMED', 'CANCELLED')",
    "orders wait": "SELECT order_id::text FROM waiting",
    "cancels are kept of orders that are there": "SELECT order_id::text FROM kept_commands JOIN orders USING (order_id)",
    "lines are held": "SELECT order_id::text || ' ' || product_id FROM holds WHERE state = 'h'",
    "orders are owed money": "SELECT order_id::text FROM orders WHERE payment IN ('VOID_DUE', 'REFUND_DUE')",
}


class InRedis(NamedTuple):
    """What Redis has of a product, where it is valid."""

    counts: dict[str, int]
    takes: dict[str, str]
    claims: dict[str, str]


class Auditor:
    """Judges a pipeline that has come to rest.

    Attributes:
        seen: how many orders, events, cancels, stock commands, charges and dead letters there were to judge, and products of
            which Redis had something valid.
    """

    def __init__(self, settings: Any, initial: Mapping[str, int]) -> None:
        """Take where everything is from the settings' names (docs/SETTINGS.md), and the units that products began with."""
        self._settings, self._initial = settings, initial
        self._log = Log(settings)
        self.seen: Counter[str] = Counter()

    async def differences(self) -> list[str]:
        """Return all that is not as it must be, each with its ids; while something has not come to rest, only that."""
        if unsettled := await self.unsettled():
            return unsettled
        await asyncio.to_thread(self._log.read)
        tables = await self._fetch(TABLES)
        async with aiohttp.ClientSession() as client, client.get(f"{self._settings.payment_url}/ledger") as answer:
            charges = await answer.json()
        in_redis = await self._read_redis(tables["stock"])
        audit = Audit(self._settings, self._initial, self._log, tables, charges, in_redis)
        found = await asyncio.to_thread(audit.judge)
        self.seen = audit.seen
        return found

    async def unsettled(self) -> list[str]:
        """Return what Postgres says has not come to rest."""
        found = {what: [row[0] for row in rows] for what, rows in (await self._fetch(UNSETTLED)).items()}
        return [f"{len(ids)} {what}: {ids[:5]}" for what, ids in found.items() if ids]

    async def _fetch(self, queries: Mapping[str, str]) -> dict[str, list[Any]]:
        """Return the rows of each query, all of one moment."""
        connection = await asyncpg.connect(self._settings.database_url)
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                return {name: await connection.fetch(query) for name, query in queries.items()}
        finally:
            await connection.close()

    async def _read_redis(self, products: Iterable[Mapping[str, Any]]) -> dict[str, InRedis]:
        """Return what Redis has of each product; what is of another epoch or generation, or taken before, is not."""
        found = {}
        async with redis.Redis.from_url(self._settings.redis_url, decode_responses=True) as client:
            (ground,) = (await self._fetch({"pipeline": GROUND}))["pipeline"]
            history = (await client.info("server"))["run_id"], (await client.info("replication"))["master_replid"]
            now = hashlib.sha1(":".join(map(str, (*history, *ground))).encode()).hexdigest()[:16]
            for product in products:
                product_id = product["product_id"]
                key = f"{self._settings.redis_prefix}:{{{product_id}}}"
                pipe = client.pipeline(transaction=True)
                for part in ("stock", "takes", "claims"):
                    pipe.hgetall(f"{key}:{part}")
                stock, takes, claims = await pipe.execute()
                epoch = stock.get("epoch", "").split(":")
                if epoch == [now, str(product["generation"])]:
                    counts = {name: int(stock[name]) for name in ("version", "on_hand", "reserved", "taken")}
                    if int(stock["claim"]) < product["claim"]:
                        counts["taken"], takes, claims = 0, {}, {}
                    found[product_id] = InRedis(counts, takes, claims)
        return found


class Audit:
    """One judgement, over what was read."""

    def __init__(
        self,
        settings: Any,
        initial: Mapping[str, int],
        log: Log,
        tables: Mapping[str, list[Any]],
        charges: list[dict[str, Any]],
        in_redis: Mapping[str, InRedis],
    ) -> None:
        self._settings, self._initial, self._log = settings, initial, log
        self._tables, self._charges, self._redis = tables, charges, in_redis
        self._rows = {row["id"]: row for row in tables["orders"]}
        self._removed = {row["id"] for row in tables["removed"]}
        self._stock = {row["product_id"]: row for row in tables["stock"]}
        self._prices = {row["product_id"]: row["price_cents"] for row in tables["stock"]}
        self._letters = {
            (
                letter.headers["source-topic"].decode().removeprefix(settings.topic_prefix),
                int(letter.headers["source-partition"]),
                int(letter.headers["source-offset"]),
            ): letter.headers["reason"].decode()
            for letter in log.records["dead-letters"]
        }
        self._malformed: set[tuple[str, int, int]] = set()
        self._units: dict[str, dict[str, int]] = {}
        self._received: Counter[str] = Counter()
        self._adjusted: Counter[str] = Counter()
        self._repriced: set[str] = set()
        self._retired: set[str] = set()
        self._cancels: set[str] = set()
        self._found: list[str] = []
        self.seen: Counter[str] = Counter()

    def judge(self) -> list[str]:
        """Return all that is wrong."""
        self._judge_orders()
        self._judge_cancels()
        self._judge_stock_commands()
        self._judge_letters()
        self._judge_events()
        self._judge_reasons()
        self._judge_money()
        self._judge_lines()
        self._judge_stock()
        self._judge_redis()
        self.seen.update(orders=len(self._units), letters=len(self._letters), redis=len(self._redis))
        return self._found

    def _say(self, what: str) -> None:
        self._found.append(what)

    def _home(self, product_id: str) -> int:
        return partition_of(product_id, self._settings.partitions)

    def _decoded(self, topic: str, decode: Callable[[Record], T | None]) -> list[tuple[Record, T]]:
        """Return the well-formed records of a topic; the others must be dead letters."""
        found = []
        for record in self._log.records[topic]:
            if (decoded := decode(record)) is None:
                self._malformed.add(record.place)
            else:
                found.append((record, decoded))
        return found

    # Orders

    def _judge_orders(self) -> None:
        """Check that each order has one row, as its record has it, at the home of its first product."""
        by_key = {(row["user_id"], row["idempotency_key"]): order_id for order_id, row in self._rows.items()}
        by_place = {(row["home"], row["source_offset"]): order_id for order_id, row in self._rows.items()}
        sent: dict[str, list[tuple[Record, Order]]] = defaultdict(list)
        nameless = []
        for record, order in self._decoded("orders", lambda r: order_of(r.value, self._settings)):
            at_home = self._home(next(iter(order.lines))) == record.partition
            order_id = order.order_id
            if order_id is None and order.key is not None:
                order_id = by_key.get((order.user_id, order.key))
            if order_id is None and at_home:
                order_id = by_place.get((record.partition, record.offset))
            if order_id is not None:
                sent[order_id].append((record, order))
            elif at_home and order.key and self._removed and self._letters.get(record.place) == "order_removed":
                self._malformed.add(record.place)
            elif at_home:
                self._say(f"an order is lost: {record.place}, {order}")
            else:
                nameless.append((record, order))
        at_homes = {
            (order.content, record.partition)
            for records in sent.values()
            for record, order in records
            if self._home(next(iter(order.lines))) == record.partition
        }
        for record, order in nameless:
            if (order.content, self._home(next(iter(order.lines)))) not in at_homes:
                self._say(f"an order was not sent on to its home: {record.place}, {order}")
        for order_id, records in sent.items():
            self._judge_order(order_id, records)
        for order_id, row in self._rows.items():
            if order_id not in self._units:
                if row["source_offset"] >= self._log.begins["orders", row["home"]]:
                    self._say(f"{order_id} is {row['now']} and was never sent")
                self._units[order_id] = dict(zip(row["product_ids"], row["quantities"], strict=True))

    def _judge_order(self, order_id: str, records: list[tuple[Record, Order]]) -> None:
        row = self._rows.get(order_id)
        if row is None and order_id in self._removed:
            letters = {record.place for record, _ in records if self._letters.get(record.place) == "order_removed"}
            self._malformed |= letters  # of the same order twice in one batch the first
            if not letters:
                self._say(f"{order_id} was removed, came again, {records[0][0].place}, and is no dead letter")
            return
        if row is None:
            self._say(f"{order_id} is lost: it was sent, {records[0][0].place}, and has no row")
            return
        content = (
            row["user_id"],
            row["payment_method"],
            tuple(sorted(zip(row["product_ids"], row["quantities"], strict=True))),
        )
        places = set()
        for record, order in records:
            at_home = self._home(next(iter(order.lines))) == record.partition
            if order.content == content:
                self._units[order_id] = order.lines
                places |= {(record.partition, record.offset)} if at_home else set()
            elif at_home:
                self._malformed.add(record.place)  # its id is another order's
            elif not any(
                other.content == order.content and self._home(next(iter(other.lines))) == there.partition
                for there, other in records
            ):
                self._say(f"{order_id} was not sent on to its home: {record.place}, {order}")
        if order_id not in self._units:
            self._say(f"{order_id} has a row of which no record is: {content}, sent was {[o for _, o in records]}")
        elif (row["home"], row["source_offset"]) not in places:
            self._say(
                f"{order_id} has the record {row['home']}/{row['source_offset']}, it was sent at {sorted(places)}"
            )

    # Commands

    def _judge_cancels(self) -> None:
        """Check that each cancel was obeyed, or is kept for an order that is still to come; only CANCELLED is final."""
        kept = {row["id"] for row in self._tables["kept"]}
        commands = self._decoded("order-commands", lambda r: order_command_of(r.value))
        self._cancels = {order_id for _, (command, order_id) in commands if command == "cancel"}
        self.seen["cancels"] = len(self._cancels)
        for order_id in self._cancels:
            row = self._rows.get(order_id)
            if row is None and order_id not in kept:
                self._say(f"a cancel is lost: of {order_id}, which has not come")
            elif row is not None and row["now"] != "CANCELLED":
                self._say(f"{order_id} was cancelled and is {row['now']}")

    def _judge_stock_commands(self) -> None:
        """Count the units that commands moved, each once; those that could not be applied must be dead letters."""
        by_id: dict[str, list[tuple[Record, StockCommand]]] = defaultdict(list)
        changes: dict[str, int | None] = {}
        for record, command in self._decoded("stock-commands", lambda r: stock_command_of(r.value)):
            by_id[command.command_id].append((record, command._replace(change=None)))
            if command.change is not None:
                changes[command.command_id] = command.change
        self.seen["stock commands"] = len(by_id)
        for command_id, records in by_id.items():
            at_home = [(r, c) for r, c in records if self._home(c.product_id) == r.partition]
            for record, command in records:
                if all(c != command for _, c in at_home):
                    self._say(f"stock command {command_id} was not sent on: {record.place}, {command}")
            applied = {command for record, command in at_home if record.place not in self._letters}
            if len(applied) > 1:
                self._say(f"stock command {command_id} was taken for more than one: {applied}")
            for record, command in at_home:
                unknown = command.product_id not in self._stock
                reused = any(other != command for other in applied)
                if unknown or reused:
                    self._malformed.add(record.place)
                elif (command.quantity < 0 or command.command == "set") and (
                    self._letters.get(record.place) == "insufficient_stock"
                ):
                    self._malformed.add(record.place)  # nobody but the product knows what there was at that moment
                elif command.was is not None and self._letters.get(record.place) == "product_changed":
                    self._malformed.add(record.place)  # nor how it was
            for command in applied:
                if command.command == "receive":
                    self._received[command.product_id] += command.quantity
                elif command.command == "adjust":
                    self._adjusted[command.product_id] += command.quantity
                elif command.command == "set":
                    if (change := changes.get(command_id)) is None:
                        self._say(f"stock command {command_id} was not decided: {command}")
                    self._adjusted[command.product_id] += change or 0
                if command.price_cents is not None:
                    self._repriced.add(command.product_id)
                if command.retired:
                    self._retired.add(command.product_id)

    def _judge_letters(self) -> None:
        """Check that the dead letters are those records that can't be processed, and no others."""
        for topic in ("order-lines", "reservations"):
            self._decoded(topic, lambda r: rows_of(r, self._settings.partitions))
        for place in sorted(self._malformed - self._letters.keys()):
            self._say(f"{place} can't be processed, and is no dead letter")
        for place in sorted(self._letters.keys() - self._malformed):
            if place[2] >= self._log.begins[place[0], place[1]]:
                self._say(f"{place} is a dead letter, {self._letters[place]}, and sound")

    # Events

    def _judge_events(self) -> None:
        """Check that each order was told: all of its life, in order, at its home, as it was."""
        claims: dict[int, int] = defaultdict(int)
        told: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        homes: dict[str, set[int]] = defaultdict(set)
        rejected: set[str] = set()
        for record in self._log.records["order-events"]:
            claim = int(record.headers["lane"].split(b":")[0])
            event = None if record.value is None else json.loads(record.value)
            if event is not None and event["status"] == "REJECTED":
                rejected.add(event["order_id"])
                if claim >= claims[record.partition] and record.partition in homes[event["order_id"]]:
                    self._say(f"{event['order_id']} is told to be REJECTED behind its own events")
                self._judge_rejection(record, event)
                continue
            is_void = claim < claims[record.partition]  # a former owner tells late
            claims[record.partition] = max(claim, claims[record.partition])
            if event is None:
                continue  # a claim alone
            homes[event["order_id"]].add(record.partition)
            if not is_void:
                told[event["order_id"]].setdefault(event["status"], event)
        self.seen["events"] = sum(map(len, told.values()))
        self._judge_silence(rejected, told.keys() | self._rows.keys())
        for order_id in told.keys() - self._rows.keys():
            self._say(f"{order_id} is told to be {[*told[order_id]]}, and is not there")
        for order_id, row in self._rows.items():
            story = told.get(order_id, {})
            if tuple(story) not in STORIES or [*story][-1] != row["now"]:
                self._say(f"{order_id} is {row['now']}, told was {[*story]}")
                continue
            if homes[order_id] != {row["home"]}:
                self._say(f"{order_id} has its home in {row['home']}, its events are in {sorted(homes[order_id])}")
            items = {item["product_id"]: item["quantity"] for item in story["CREATED"]["items"]}
            if items != self._units[order_id]:
                self._say(f"{order_id} was sent with {self._units[order_id]}, told was {items}")
            for status in ("RESERVED", "PAID"):
                if status in story and story[status]["total_cents"] != self._cost(order_id):
                    self._say(f"{order_id} costs {self._cost(order_id)}, told was {story[status]}")
            prices = [self._prices_of(order_id)[product_id] for product_id in items]
            if "RESERVED" in story and story["RESERVED"].get("prices_cents", prices[:1]) != prices:
                self._say(f"the lines of {order_id} cost {prices}, told was {story['RESERVED']}")
            if row["now"] == "CANCELLED" and story["CANCELLED"]["reason"] != row["why"]:
                self._say(f"{order_id} was cancelled for {row['why']}, told was {story['CANCELLED']}")

    def _judge_rejection(self, record: Record, event: dict[str, Any]) -> None:
        """Check that what is told to be no order is a dead letter, at its home, for this reason."""
        place = ("orders", event["record"]["partition"], event["record"]["offset"])
        there = place[2] < self._log.begins[place[0], place[1]] or self._letters.get(place) == event["reason"]
        if place[1] != record.partition or not there:
            self._say(f"{record.place} tells of {place}, which is no such dead letter: {event}")

    def _judge_silence(self, rejected: set[str], orders: set[str]) -> None:
        """Check that records which are no orders and name one that is not there were told, and can be read."""
        known = {row["id"] for row in self._tables["rejected"]}
        for record in self._log.records["orders"]:
            body = parsed(record.value, 2**30) if record.place in self._letters else None
            order_id = str(body.get("order_id")).lower() if isinstance(body, dict) else ""
            if uuid_of(order_id) != order_id or order_id[14] == "8":  # 8: it follows from a key
                continue
            if order_id not in orders and not {order_id} <= rejected & known:
                self._say(f"{record.place} is no order and names {order_id}, which nobody was told")

    def _cost(self, order_id: str) -> int:
        """Return what an order costs."""
        units, prices = self._units[order_id], self._prices_of(order_id)
        return sum(units[product_id] * (price or 0) for product_id, price in prices.items())

    def _prices_of(self, order_id: str) -> dict[str, int | None]:
        """Return what a unit of each line of an order costs; where prices have changed, by its row."""
        row = self._rows[order_id]
        held = dict(zip(row["product_ids"], row["prices"], strict=True))
        return {p: held.get(p) if p in self._repriced else self._prices.get(p) for p in self._units[order_id]}

    def _judge_reasons(self) -> None:
        """Check that what ended an order was there."""
        declined = {
            charge["order_id"] for charge in self._charges if charge["status"] == "declined" or charge["voided"]
        }
        for order_id, row in self._rows.items():
            excused = {
                "cancelled_by_user": order_id in self._cancels,
                "payment_declined": order_id in declined,
                "unknown_product": not self._units[order_id].keys() <= self._stock.keys() - self._retired,
            }
            if not excused.get(row["why"], True):
                self._say(f"{order_id} was cancelled for {row['why']}, of which nobody knows")

    # Money

    def _judge_money(self) -> None:
        """Check that the charges that stand at the bank are the confirmed orders, by key and amount."""
        standing: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
        for charge in self._charges:
            if charge["stands"]:
                found = (charge["key"], charge["amount_cents"], charge["charge_id"])
                standing[charge["order_id"]].append(found)
        self.seen["charges"] = sum(map(len, standing.values()))
        refused = {charge["order_id"] for charge in self._charges if charge["refused"]}
        for order_id, row in self._rows.items():
            charges, due = standing.pop(order_id, []), []
            if row["now"] == "CONFIRMED" and (cost := self._cost(order_id)):
                due = [(order_id, cost, row["charge_id"])]
            elif row["money"] == "REFUSED" and order_id in refused:
                continue  # it stays until people have settled it with the bank
            if charges != due:
                self._say(f"{order_id} is {row['now']} ({row['why']}), due is {due}, at the bank stands {charges}")
        for order_id, charges in standing.items():
            self._say(f"{order_id} is not there, at the bank stands {charges}")

    # Stock

    def _judge_lines(self) -> None:
        """Check that each line came to rest, here and at its owner, and that its units were moved once each way."""
        moved: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
        for entry in self._tables["ledger"]:
            moved[entry["id"], entry["product_id"]][entry["movement"]] = entry["units"]
        holds = {(hold["id"], hold["product_id"]): hold for hold in self._tables["holds"]}
        for order_id, row in self._rows.items():
            ends = "c" if row["now"] == "CONFIRMED" else "n" if row["paid_at"] is not None else "rx"
            for product_id, quantity, state in zip(row["product_ids"], row["quantities"], row["lines"], strict=True):
                key = (order_id, product_id)
                what = f"{order_id} is {row['now']} ({row['why']}), its line of {product_id} is {state}"
                units = {movement: n / quantity for movement, n in moved.pop(key, {}).items() if n}
                if state not in ends:
                    self._say(what)
                elif units not in MOVED[state]:
                    self._say(f"{what}, the ledger moved it {units}")
                hold, owner = holds.pop(key, None), self._home(product_id)
                if owner == row["home"] or row["owners"] is None:
                    if hold is not None:
                        self._say(f"{what}, at home, and is held as another home's: {dict(hold)}")
                elif hold is None:
                    self._say(f"{what}, its owner {owner} does not know it")
                elif hold["now"] not in HELD_AS.get(state, "") or hold["partition"] != owner:
                    self._say(f"{what}, its owner {owner} has it as {dict(hold)}")
        for key, units in moved.items():
            self._say(f"the ledger moves {units} of no line: {key}")
        for key, hold in holds.items():
            if hold["now"] not in "rx":
                self._say(f"a line of no order is held: {key}, {dict(hold)}")

    def _judge_stock(self) -> None:
        """Check that of each product there is what came in, less what confirmed orders bought, and nothing is held."""
        sold: Counter[str] = Counter()
        for order_id, row in self._rows.items():
            if row["now"] == "CONFIRMED":
                sold.update(self._units[order_id])
        for product_id in self._initial.keys() - self._stock.keys():
            self._say(f"product {product_id} is lost")
        for product_id, row in self._stock.items():
            came = {
                "initial": self._initial.get(product_id, row["initial"]),
                "received": self._received[product_id],
                "adjusted": self._adjusted[product_id],
            }
            must = {**came, "on_hand": sum(came.values()) - sold[product_id], "reserved": 0, "sold": sold[product_id]}
            if wrong := {name: row[name] for name, units in must.items() if row[name] != units}:
                self._say(f"product {product_id} must have {must}, it has {wrong}")

    def _judge_redis(self) -> None:
        """Check that Redis holds no unit for anybody, and counts as Postgres does."""
        for product_id, found in self._redis.items():
            row = self._stock[product_id]
            must = {name: row[name] for name in ("version", "on_hand", "reserved")} | {"taken": 0}
            if (found.counts, found.takes, found.claims) != (must, {}, {}):
                self._say(f"product {product_id} in Redis must have {must}, it has {found}")
