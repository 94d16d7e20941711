"""How the verdict of an order comes back to the ingress that asked for it.

Each ingress has a random channel name, which is in the header of every order record.  The stage that decides the order
publishes on that channel: ``[[order id, "RESERVED" or "CANCELLED", reason or null], …]``.  No ingress reads the verdicts of
another.  A publication that is lost costs a moment, since Postgres knows every verdict.  A request that waits asks it once a
second and at the end of its wait, and ten times a second while Redis is unavailable.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import orjson
import structlog
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from orderstream.access import redis_client
from orderstream.backoff import Backoff
from orderstream.errors import EngineRefused, EngineUnavailable, OrderstreamError
from orderstream.exits import end_process_on_failure
from orderstream.http.health import Presence
from orderstream.http.postgres import Postgres
from orderstream.http.problems import Problem
from orderstream.lua.gate import Keys, check_prefix
from orderstream.settings import Settings, public
from orderstream.sql.store import REMOVED
from orderstream.streams.dead_letters import Headers
from orderstream.streams.headers import REPLY_TO
from orderstream.streams.orders import Order, Reason, Status, same

log = structlog.get_logger("ingress")

WAITING_MAX = 10_000
"""Requests that wait for a verdict at once; each is an open connection.  Further ones get a 503."""

LOOKUP_ORDERS_MAX = 1_000
"""Orders of one question to Postgres."""

LOOKUP_S = 1.0
"""Longest wait for Postgres's answer; a request that waits for a verdict has waited long enough already."""

LOOKUP_INTERVAL_S = 0.005
"""Between the beginnings of two statements, in seconds: under load each then asks for more orders."""

LOOKUP_PAUSE_S = 0.5
"""How long a Postgres that did not answer is not asked, so that an outage costs each request no time-out."""

POLL_S = 0.1
"""How often Postgres is asked for verdicts that no reply can bring."""

SILENCE_S = 1.0
"""How long a reply is waited for before Postgres is asked: a stage that Redis does not answer publishes nothing, even if it
answers this process."""

QUIET_S = 2.0
"""A subscription that brings nothing for so long is sent a PING, and given up after as long again."""

RECONNECT_MIN_S = 0.1
"""First pause between two tries to reach Redis; doubles up to the setting ``retry_wait_max_s``."""


class Verdict(NamedTuple):
    """What became of an order; ``reason`` None when its stock was reserved."""

    reason: Reason | None


class Known(NamedTuple):
    """An order as Postgres has it; ``verdict`` None while it is not decided."""

    order: Order
    verdict: Verdict | None


class OrderIdReused(Exception):
    """The id belongs to another order already: other user, lines or payment method."""


class OrderRemoved(Exception):
    """The id is that of an order that was removed after its end."""


class Overloaded(OrderstreamError):
    """More requests wait for verdicts than this ingress takes in."""


class Lookup:
    """Reads orders in Postgres.  What is asked while a statement runs goes into the next one."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._asked: list[tuple[str, asyncio.Future[Known | None]]] = []
        self._running: asyncio.Task[None] | None = None
        self._began = self._unavailable_until = 0.0

    async def order(self, order_id: str) -> Known | None:
        """Return what Postgres knows of an order, or None.

        Raises:
            OrderRemoved: it was removed after its end.
            EngineUnavailable: Postgres does not answer.
            Problem: ``overloaded``, no connection to it became free.
        """
        if time.monotonic() < self._unavailable_until:
            raise EngineUnavailable("Postgres", self._postgres.presence.address, "it did not a moment ago")
        future: asyncio.Future[Known | None] = asyncio.get_running_loop().create_future()
        self._asked.append((order_id, future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await future

    async def close(self) -> None:
        """Let the statement under way end."""
        if self._running is not None:
            await self._running

    async def _run(self) -> None:
        try:
            while self._asked:
                early_s = self._began + LOOKUP_INTERVAL_S - time.monotonic()
                if early_s > 0:
                    await asyncio.sleep(early_s)
                self._began = time.monotonic()
                asked, self._asked = self._asked[:LOOKUP_ORDERS_MAX], self._asked[LOOKUP_ORDERS_MAX:]
                await self._ask(asked)
        finally:
            self._running = None

    async def _ask(self, asked: list[tuple[str, asyncio.Future[Known | None]]]) -> None:
        try:
            ids, meanwhile = sorted({order_id for order_id, _ in asked}), "orders are taken in without their verdicts"
            rows = await self._postgres.ask(lambda store: store.order_states(ids), LOOKUP_S, meanwhile)
        except Exception as error:  # noqa: BLE001  (whatever it is: each request that asked raises it)
            if isinstance(error, EngineUnavailable):
                self._unavailable_until = time.monotonic() + LOOKUP_PAUSE_S
            self._fail(asked, error)
            return
        for order_id, future in asked:
            row = rows.get(order_id)
            if future.done():
                continue
            if row is not None and row["status"] == REMOVED:
                future.set_exception(OrderRemoved())
            else:
                future.set_result(None if row is None else _known(row))

    @staticmethod
    def _fail(asked: list[tuple[str, asyncio.Future[Known | None]]], error: Exception) -> None:
        for _, future in asked:
            if not future.done():
                future.set_exception(error)


def _known(row: Mapping[str, Any]) -> Known:
    lines = tuple(zip(row["product_ids"], row["quantities"], strict=True))
    order = Order(row["order_id"], row["user_id"], lines, row["payment_method"], None, None)
    return Known(order, None if row["status"] == Status.CREATED else _verdict(row["status"], row["reason"]))


def _verdict(status: str, reason: str | None) -> Verdict:
    """Make a verdict of an order's status; that it was reserved stays true when it is paid and confirmed.

    Raises:
        ValueError: not a status, or not a reason, that a decided order has.
    """
    if Status(status) == Status.CREATED:
        raise ValueError("CREATED is no verdict")
    return Verdict(Reason(str(reason)) if status == Status.CANCELLED else None)


class Waiter:
    """A request that waits.  ``polling``: no reply can reach it, so it asks Postgres all the time."""

    __slots__ = ("changed", "order", "polling", "verdict")

    def __init__(self, order: Order, *, polling: bool) -> None:
        self.order = order
        self.polling = polling
        self.verdict: Verdict | None = None
        self.changed = asyncio.Event()


class Replies:
    """The subscription of one ingress, and the requests that wait for what it brings."""

    def __init__(self, settings: Settings, lookup: Lookup, pipeline: str) -> None:
        self.name = uuid.uuid4().hex
        self._pipeline = pipeline
        self.client = redis_client(settings.redis_url, timeout_s=settings.redis_timeout_s)
        self.lookup = lookup
        self._keys = Keys(settings.redis_prefix)
        self._channel = self._keys.replies(self.name)
        self._waiters: dict[str, list[Waiter]] = {}
        self._count = 0
        self._backoff = Backoff(RECONNECT_MIN_S, settings.retry_wait_max_s)
        self.presence = Presence("Redis", public(settings.redis_url))
        self._subscribed = False
        self._leaving = False
        self._tried = asyncio.Event()
        self._lost: EngineUnavailable | None = None
        self._task: asyncio.Task[None] | None = None

    # Life

    async def start(self) -> None:
        """Subscribe.  When Redis does not answer, log it and try again in the background; Postgres has the verdicts.

        Raises:
            PrefixTaken: its keys are another pipeline's.  Where that is found later, the process ends.
            EngineRefused: it answers, and does not let us in.
        """
        with contextlib.suppress(RedisError, OSError):
            await check_prefix(self.client, self._keys, self._pipeline)
        self._task = asyncio.create_task(self._listen(), name="the subscription to verdicts")
        self._task.add_done_callback(end_process_on_failure)
        await self._tried.wait()
        if isinstance(self._lost, EngineRefused):
            raise self._lost

    async def close(self) -> None:
        """Unsubscribe and disconnect."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self.client.aclose()

    def hurry(self, wait_s: float) -> None:
        """End every wait in ``wait_s`` seconds: this ingress leaves."""
        asyncio.get_running_loop().call_later(wait_s, self._leave)

    def _leave(self) -> None:
        self._leaving = True
        self._wake_all(polling=False)

    def _wake_all(self, *, polling: bool) -> None:
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.polling = waiter.polling or polling
                waiter.changed.set()

    # Waiting

    def awaited(self) -> int:
        """Return how many requests wait."""
        return self._count

    @contextlib.contextmanager
    def waiting(self, order: Order) -> Iterator[Waiter]:
        """Note, before an order is produced, that a request waits for its verdict.

        Raises:
            Overloaded: too many do.
        """
        if self._count >= WAITING_MAX:
            raise Overloaded(f"{self._count} requests wait for their verdict")
        waiter = Waiter(order, polling=not self._subscribed)
        waiters = self._waiters.setdefault(order.order_id, [])
        waiters.append(waiter)
        self._count += 1
        try:
            yield waiter
        finally:
            self._count -= 1
            waiters.remove(waiter)
            if not waiters:
                del self._waiters[order.order_id]

    def headers(self, waiter: Waiter) -> Headers:
        """Return the headers that bring the verdict here; none while there is no subscription."""
        return () if waiter.polling else ((REPLY_TO, self.name.encode()),)

    async def verdict(self, waiter: Waiter, timeout_s: float) -> Verdict | None:
        """Wait for a verdict; None when it is not known by then.

        Args:
            waiter: from :meth:`waiting`.
            timeout_s: the bound, in seconds; asking Postgres at its end may take :data:`LOOKUP_S` more, and the wait for a
                connection to it.

        Raises:
            OrderIdReused: Postgres has another order under this id, so this one is refused.
            OrderRemoved: it had one that was removed, so this one is refused.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while waiter.verdict is None:
            left_s = deadline - loop.time()
            if left_s > 0 and not self._leaving:
                waiter.changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left_s, POLL_S if waiter.polling else SILENCE_S)):
                        await waiter.changed.wait()
            over = loop.time() >= deadline or self._leaving
            if waiter.verdict is None:
                waiter.verdict = await self._ask(waiter.order)
            if over:
                break
        return waiter.verdict

    async def _ask(self, order: Order) -> Verdict | None:
        try:
            known = await self.lookup.order(order.order_id)
        except (EngineUnavailable, Problem):
            return None  # it is logged, or counted; the order is safe in Kafka
        if known is None:
            return None
        if not same(known.order, order):
            raise OrderIdReused
        return known.verdict

    # The subscription

    async def _listen(self) -> None:
        while True:
            try:
                await check_prefix(self.client, self._keys, self._pipeline)
                async with self.client.pubsub() as pubsub:
                    await pubsub.subscribe(self._channel)
                    await self._receive(pubsub)
            except (RedisError, OSError, TimeoutError) as error:
                self._note_lost(error)
            await self._backoff.pause()

    async def _receive(self, pubsub: PubSub) -> None:
        asked = False
        while True:
            message = await pubsub.get_message(timeout=QUIET_S)
            if message is None:
                if asked:
                    raise TimeoutError(f"no sign of life for {2 * QUIET_S:g} s")
                await pubsub.ping()
                asked = True
                continue
            asked = False
            if message["type"] == "subscribe":
                self._note_subscribed()
            elif message["type"] == "message":
                self._deliver(message["data"])

    def _deliver(self, data: bytes) -> None:
        try:
            verdicts = [(str(order_id), _verdict(status, reason)) for order_id, status, reason in orjson.loads(data)]
        except (ValueError, TypeError) as error:
            log.warning("a reply that no stage wrote", error=repr(error), data=repr(data[:200]))
            return
        for order_id, verdict in verdicts:
            for waiter in self._waiters.get(order_id, ()):
                waiter.verdict = verdict
                waiter.changed.set()

    def _note_subscribed(self) -> None:
        self.presence.answered()
        self._subscribed = True
        self._backoff.reset()
        self._tried.set()

    def _note_lost(self, error: BaseException) -> None:
        self._lost = self.presence.unanswered(error, "verdicts are read from Postgres")
        if self._subscribed:
            self._subscribed = False
            self._wake_all(polling=True)
        self._tried.set()
