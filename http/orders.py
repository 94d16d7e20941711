"""Orders over HTTP: a POST becomes a record on ``orders`` and waits for its verdict; a GET reads Postgres.

Nothing is decided here.  What this process says about an order it heard from the stage that decided, or read in Postgres.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from typing import Any

import orjson
import structlog
from aiohttp import web
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, KafkaTimeoutError
from pydantic import TypeAdapter, ValidationError

from orderstream import metrics
from orderstream.agents.reserve import same
from orderstream.errors import EngineAway, InvalidRecord, SettingsError
from orderstream.history import history
from orderstream.http.health import Presence
from orderstream.http.problems import Problem, engine_away, refused
from orderstream.http.replies import Known, Lookup, OrderIdReused, Overloaded, Replies, Verdict
from orderstream.settings import PREFIX, Settings
from orderstream.sql.store import TRANSIENT, Store
from orderstream.streams.dead_letters import Headers
from orderstream.streams.orders import (
    Key,
    Limits,
    Order,
    OrderRecord,
    Status,
    check,
    describe,
    encode,
    new_order_id,
    refuse_repeated_names,
)
from orderstream.streams.pacing import pace
from orderstream.streams.partitions import order_partition, product_partition
from orderstream.streams.topics import ORDER_COMMANDS, ORDERS, STOCK_COMMANDS
from orderstream.streams.tracing import Tracing

log = structlog.get_logger("ingress")

PATH = "/api/v1/orders"

LINGER_S = 0.005
"""How long a record waits for others of its partition: one request to Kafka then carries a burst of orders."""

PRODUCE_S = 5.0
"""Longest wait for Kafka to take an order.  One that waited longer is dropped, so that an outage leaves no flood behind."""

STOP_S = 1.0
"""Longest wait for a producer to disconnect."""

BATCH_BYTES_MAX = 512 * 1024
REQUEST_BYTES_MAX = 2 * 1024 * 1024
"""As the stages' producer has them: half of the broker's limit for a record batch, and room for several of them."""

BODY_S = 10.0
"""Longest wait for a request's body."""

READ_S = 5.0
"""Longest wait for Postgres when an order is read."""

FAULTS_MAX = 100
"""Faults of one body that are listed; a body can hold thousands."""

RECENT_MAX = 10_000
"""Orders with a key that this process remembers; they tell apart two orders under one key before Postgres knows either."""

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_KEY: TypeAdapter[str] = TypeAdapter(Key)


class Intake:
    """Produces orders.  One for the process: concurrent requests share its batches.

    It is no idempotent producer: aiokafka keeps the records of one for ever, and those of an outage would be produced long
    after their clients were told that they were not.  A record that is sent twice is one order, since it carries its id.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topic = settings.topic(ORDERS.name)
        self._producer: Any = None
        self._connecting = asyncio.Lock()
        self._stopping: set[asyncio.Task[None]] = set()
        self.presence = Presence("Kafka", settings.kafka)
        self.tracing: Tracing | None = None

    async def start(self) -> None:
        """Connect, and look whether the topic is as this process believes.

        Raises:
            EngineAway: Kafka does not answer, or has no topic yet.
            SettingsError: the topic has another number of partitions.
        """
        address, wanted = self._settings.kafka, self._settings.partitions
        try:
            async with asyncio.timeout(2 * PRODUCE_S):
                producer = await self._connected()
                found = (await producer.client.fetch_all_metadata()).partitions_for_topic(self._topic)
                if not found:
                    advice = "run `orderstream init` first"
                    raise EngineAway("Kafka", address, f"it has no topic {self._topic} yet", advice)
                if len(found) != wanted:
                    fault = f"{PREFIX}PARTITIONS: {wanted}, but topic {self._topic} has {len(found)} partitions"
                    raise SettingsError([fault])
                await producer.partitions_for(self._topic)
        except (KafkaError, TimeoutError) as error:
            raise EngineAway("Kafka", address, repr(error)) from error

    async def stop(self) -> None:
        """Disconnect."""
        if self._producer is not None:
            self._drop(self._producer)
        await asyncio.gather(*self._stopping)

    async def check(self) -> None:
        """Ask Kafka for its metadata.

        Raises:
            KafkaError: it does not answer.
        """
        if not await (await self._connected()).client.force_metadata_update():
            raise KafkaTimeoutError("no broker tells its metadata")

    async def put(self, order: Order, value: bytes, headers: Headers) -> None:
        """Produce an order; return when all replicas have it.

        With tracing on, its record carries the trace along.

        Args:
            order: for its place: the partition of its first product.
            value: the record.
            headers: of the record.

        Raises:
            EngineAway: Kafka did not say that it has it.
        """
        if self.tracing is None:
            await self._put(order, value, headers)
        else:
            with self.tracing.producing(order.order_id, self._topic) as trace:
                await self._put(order, value, (*headers, *trace))

    async def _put(self, order: Order, value: bytes, headers: Headers) -> None:
        product_id = order.lines[0][0]
        partition = product_partition(product_id, self._settings.partitions)
        await self._produce(self._topic, partition, product_id.encode(), value, headers)

    async def stock_command(self, product_id: str, value: bytes) -> None:
        """Produce a command over a product's stock; return when all replicas have it.

        Raises:
            EngineAway: Kafka did not say that it has it.
        """
        topic = self._settings.topic(STOCK_COMMANDS.name)
        partition = product_partition(product_id, self._settings.partitions)
        await self._produce(topic, partition, product_id.encode(), value, ())

    async def order_command(self, order_id: str, value: bytes) -> None:
        """Produce a command over an order; return when all replicas have it.

        Raises:
            EngineAway: Kafka did not say that it has it.
        """
        topic = self._settings.topic(ORDER_COMMANDS.name)
        await self._produce(topic, order_partition(order_id, self._settings.partitions), order_id.encode(), value, ())

    async def _produce(self, topic: str, partition: int, key: bytes, value: bytes, headers: Headers) -> None:
        producer = None
        try:
            async with asyncio.timeout(PRODUCE_S):
                start = time.perf_counter()
                producer = await self._connected()
                await producer.send_and_wait(topic, value, key=key, partition=partition, headers=list(headers))
                metrics.PRODUCE_LATENCY.observe(time.perf_counter() - start)
        except (KafkaError, TimeoutError) as error:
            if producer is not None and not getattr(error, "retriable", True):
                self._drop(producer)  # it may be broken for good; the next order makes a new one
            raise self.presence.gone(error, "orders are answered 503") from error
        self.presence.back()

    async def _connected(self) -> Any:
        async with self._connecting:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    bootstrap_servers=self._settings.kafka,
                    client_id=f"{self._settings.app_id}-ingress",
                    acks="all",
                    linger_ms=LINGER_S * 1000,
                    max_batch_size=BATCH_BYTES_MAX,
                    max_request_size=REQUEST_BYTES_MAX,
                    request_timeout_ms=int(PRODUCE_S * 1000),
                )
                pace(producer.client)
                try:
                    await producer.start()
                except BaseException:
                    await producer.stop()
                    raise
                self._producer = producer
            return self._producer

    def _drop(self, producer: Any) -> None:
        if self._producer is not producer:
            return
        self._producer = None
        task = asyncio.create_task(_stop(producer))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)


async def _stop(producer: Any) -> None:
    try:
        async with asyncio.timeout(STOP_S):
            await producer.stop()
    except (KafkaError, TimeoutError) as error:
        log.warning("a producer did not disconnect", error=repr(error))


class Ingress:
    """The handlers of ``/api/v1/orders`` and what they share."""

    def __init__(self, settings: Settings, store: Store, intake: Intake, replies: Replies, lookup: Lookup) -> None:
        self._settings = settings
        self._store = store
        self._intake = intake
        self._replies = replies
        self._lookup = lookup
        self._limits = Limits(settings.order_lines_max, settings.line_quantity_max, settings.order_bytes_max)
        self._recent: dict[str, Order] = {}
        self._under_way: dict[str, Order] = {}

    def hurry(self, wait_s: float) -> None:
        """End every wait for a verdict in ``wait_s`` seconds."""
        self._replies.hurry(wait_s)

    # POST

    async def create(self, request: web.Request) -> web.Response:
        """Take an order in and tell its verdict: 201 reserved, 409 refused, 202 not known yet."""
        order, named, keyed = parse(request, await read_body(request), self._limits)
        value = encode(order)
        if len(value) > self._limits.size_bytes:
            raise too_large(len(value), self._limits)
        if not keyed:
            return await self._create(request, order, value, named=named)
        self._refuse_concurrent(order)
        self._under_way[order.order_id] = order
        try:
            return await self._create(request, order, value, named=named)
        finally:
            del self._under_way[order.order_id]

    def _refuse_concurrent(self, order: Order) -> None:
        """Refuse a request whose ``Idempotency-Key`` is that of one not answered yet, as the header's draft asks for."""
        before = self._under_way.get(order.order_id, order)
        if not same(before, order):
            raise reused(order)
        if before is not order:
            detail = "Another request with this Idempotency-Key is not answered yet. Come again when it is."
            raise Problem("request-in-progress", detail, order_id=order.order_id, headers={"Retry-After": "1"})

    async def _create(self, request: web.Request, order: Order, value: bytes, *, named: bool) -> web.Response:
        respond_async = prefers_async(request)
        verdict = None
        try:
            known = await self._known(order) if named else None
            if known is None and named:
                self._claim(order)
            if known is not None and known.verdict is not None:
                verdict = known.verdict
            elif respond_async:
                if known is None:
                    await self._intake.put(order, value, ())
            else:
                with self._replies.waiting(order) as waiter:
                    if known is None:
                        await self._intake.put(order, value, self._replies.headers(waiter))
                    else:
                        waiter.deaf = True  # its record, and the channel in it, is another request's
                    verdict = await self._replies.verdict(waiter, self._settings.verdict_timeout_s)
        except OrderIdReused:
            raise reused(order) from None
        except Overloaded as error:
            raise Problem("overloaded", f"{error}; the order was not taken in. Come again.") from None
        except EngineAway as error:
            self._recent.pop(order.order_id, None)
            raise unproduced(order, error) from error
        return answer(order.order_id, verdict, applied=respond_async)

    async def _known(self, order: Order) -> Known | None:
        """Return what Postgres has under the id of an order that may have come before; None when it can't say."""
        try:
            known = await self._lookup.order(order.order_id)
        except EngineAway:
            return None  # the lookup has told the log; the stage that takes the record in sees a repeat as well
        if known is not None and not same(known.order, order):
            raise OrderIdReused
        return known

    def _claim(self, order: Order) -> None:
        """Remember which order a key stands for while Postgres does not know it yet."""
        before = self._recent.pop(order.order_id, order)
        self._recent[order.order_id] = before
        if not same(before, order):
            raise OrderIdReused
        if len(self._recent) > RECENT_MAX:
            del self._recent[next(iter(self._recent))]

    # GET

    async def read(self, request: web.Request) -> web.Response:
        """Tell an order with its lines, its payment and its history."""
        order_id = path_id(request)
        try:
            async with asyncio.timeout(READ_S):
                order = await self._store.order(order_id)
        except TRANSIENT as error:
            raise engine_away(self._lookup.presence.gone(error, "orders can't be read"), "Come again.") from error
        self._lookup.presence.back()
        if order is None:
            raise unknown(order_id)
        return web.Response(
            body=orjson.dumps(shown(order, self._settings), option=orjson.OPT_UTC_Z),
            content_type="application/json",
            headers={"Cache-Control": "no-store"},
        )


# What came in


def path_id(request: web.Request) -> str:
    """Return the order id in the path of a request, in lower case.

    Raises:
        Problem: it is none.
    """
    order_id = request.match_info["id"]
    if not _ID.fullmatch(order_id):
        raise Problem("invalid-order-id", "An order id is a UUID like 0f8fad5b-d9cb-469f-a165-70867728950e.")
    return order_id.lower()


async def read_body(request: web.Request) -> bytes:
    """Return the body of a request.

    Raises:
        Problem: it is not JSON by its own account, too large, or too slow.
    """
    charset = (request.charset or "utf-8").lower()
    if request.content_type != "application/json" or charset not in {"utf-8", "us-ascii"}:
        given = request.headers.get("Content-Type", "none")
        raise Problem(
            "unsupported-media-type",
            f"The Content-Type is {given}; send application/json in UTF-8.",
            headers={"Accept": "application/json"},
        )
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise Problem("request-timeout", f"The body did not come within {BODY_S:g} s.") from None


def parse(request: web.Request, body: bytes, limits: Limits) -> tuple[Order, bool, bool]:
    """Return the order that a request brings, under the same rules as a record on ``orders``.

    Returns:
        The order; whether its client chose its id, by an ``order_id`` or a key, so that it may be a repeat; and whether by
        the header ``Idempotency-Key``.

    Raises:
        Problem: ``not-json`` or ``invalid-order``, with every fault told.
    """
    try:
        record = OrderRecord.model_validate_json(body)
    except ValidationError as error:
        kind = "not-json" if error.errors()[0]["type"] == "json_invalid" else "invalid-order"
        faults = [
            {
                "field": ".".join(str(part) for part in fault["loc"]),
                "message": fault["msg"].removeprefix("Value error, "),
            }
            for fault in error.errors(include_url=False, include_context=False, include_input=False)[:FAULTS_MAX]
        ]
        raise Problem(kind, describe(error), faults=faults) from None
    keyed = False
    try:
        refuse_repeated_names(body, len(record.model_fields_set) + 2 * len(record.items))
        if record.idempotency_key is None and (key := header_key(request)) is not None:
            record = record.model_copy(update={"idempotency_key": key})
            keyed = True
        order = check(record, limits, fallback_id=new_order_id)
    except ValueError as error:
        raise Problem("invalid-order", str(error)) from None
    except InvalidRecord as error:
        raise Problem("invalid-order", error.detail) from None
    return order, record.idempotency_key is not None or record.order_id is not None, keyed


def header_key(request: web.Request) -> str | None:
    """Return the key of the header ``Idempotency-Key``, or None; the quotes that RFC 8941 puts around it are no part of it.

    Raises:
        ValueError: it is no key.
    """
    keys = request.headers.getall("Idempotency-Key", [])
    if not keys:
        return None
    if len(keys) > 1:
        raise ValueError("header Idempotency-Key: given more than once")
    quoted = re.fullmatch(r'"([^"\\]*)"', keys[0])
    try:
        return _KEY.validate_python(quoted[1] if quoted else keys[0])
    except ValidationError as error:
        raise ValueError(f"header Idempotency-Key: {describe(error).removeprefix('record: ')}") from None


def prefers_async(request: web.Request) -> bool:
    """Tell whether the client does not want to wait (``Prefer: respond-async``, RFC 7240)."""
    preferences = ",".join(request.headers.getall("Prefer", [])).split(",")
    return any(preference.partition(";")[0].strip().lower() == "respond-async" for preference in preferences)


# What goes out


def location(order_id: str) -> str:
    """Return where an order can be read."""
    return f"{PATH}/{order_id}"


def answer(order_id: str, verdict: Verdict | None, *, applied: bool) -> web.Response:
    """Return the answer to a POST.

    Args:
        order_id: the order.
        verdict: None when it is not known yet.
        applied: the client preferred not to wait.

    Raises:
        Problem: 409, the order was refused.
    """
    if verdict is not None and verdict.reason is not None:
        raise refused(order_id, verdict.reason, location(order_id))
    headers = {"Location": location(order_id)}
    if verdict is None and applied:
        headers["Preference-Applied"] = "respond-async"
    status = Status.CREATED if verdict is None else Status.RESERVED
    body = orjson.dumps({"order_id": order_id, "status": status})
    return web.Response(
        status=202 if verdict is None else 201, body=body, content_type="application/json", headers=headers
    )


def unknown(order_id: str) -> Problem:
    """Make the problem of an order that Postgres does not know."""
    detail = "No stage has taken in an order under this id; one that was accepted a moment ago may be on its way."
    return Problem("order-not-found", detail, order_id=order_id)


def reused(order: Order) -> Problem:
    """Make the problem of an id or a key that stands for another order."""
    what = "this user's idempotency_key" if order.idempotency_key is not None else "this order_id"
    detail = f"Another order with other lines, user or payment method has {what}. Take a new one for a new order."
    return Problem("idempotency-key-reused", detail, order_id=order.order_id)


def unproduced(order: Order, error: EngineAway) -> Problem:
    """Make the problem of an order that Kafka did not say it has."""
    how = "the same idempotency_key" if order.idempotency_key is not None else "this order_id in the body"
    detail = f"Whether the order was taken in is not known. Send it again with {how}: it can't count twice."
    return engine_away(error, detail, order_id=order.order_id)


def too_large(size: int, limits: Limits) -> Problem:
    """Make the problem of an order that fits into no record."""
    return Problem("too-large", f"The order makes a record of {size} bytes, at most {limits.size_bytes}.")


def shown(order: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return an order as clients read it.

    Args:
        order: a row of the query ``order``, with its ``lines``.
        settings: of the pipeline.

    Returns:
        ``order``, ``items``, ``payment`` (None when nobody was charged) and ``history`` (oldest first).  Money in cents,
        times in UTC.
    """
    order_id = order["order_id"]
    told = history(order, settings)
    payment = None
    if order["payment_status"] is not None:
        payment = {
            "status": order["payment_status"],
            "amount_cents": order["amount_cents"],
            "charge_id": order["charge_id"],
            "created_at": order["charged_at"],
            "refunded_at": order["refunded_at"],
        }
    return {
        "order": {
            "id": order_id,
            "user_id": order["user_id"],
            "total_amount": order["total_cents"],
            "status": order["status"],
            "reason": order["reason"],
            "idempotency_key": order["idempotency_key"],
            "payment_method": order["payment_method"],
            "placed_at": order["placed_at"],
            "created_at": order["created_at"],
            "updated_at": told[-1]["at"],
        },
        "items": [
            {
                "id": n,
                "order_id": order_id,
                "product_id": line["product_id"],
                "quantity": line["quantity"],
                "unit_price": line["unit_price_cents"],
                "state": line["state"],
                "reason": line["reason"],
            }
            for n, line in enumerate(order["lines"], 1)
        ],
        "payment": payment,
        "history": told,
    }
