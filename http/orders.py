"""Orders over HTTP: a POST becomes a record on ``orders`` and waits for its verdict; a GET reads Postgres.

Nothing is decided here: a verdict comes from the stage that decided, or from Postgres.
"""

from __future__ import annotations

from aiohttp import web

from orderstream.errors import EngineUnavailable, RecordTooLarge
from orderstream.http.answers import (
    json_answer,
    order_document,
    rejected,
    removed,
    reused,
    too_large,
    unknown,
    unproduced,
    verdict_answer,
)
from orderstream.http.postgres import Postgres
from orderstream.http.problems import Problem, engine_unavailable, overloaded
from orderstream.http.producer import OrderProducer
from orderstream.http.reading import parse_order, path_id, prefers_async, read_body
from orderstream.http.replies import Known, OrderIdReused, OrderRemoved, Overloaded, Replies
from orderstream.http.security import Access, not_yours
from orderstream.settings import Settings
from orderstream.streams.orders import Limits, Order, encode, same

READ_S = 5.0
"""Longest wait for Postgres when an order is read."""

RECENT_MAX = 10_000
"""Orders with a key that this process remembers: it refuses another order under the key before Postgres knows either."""


class Ingress:
    """The handlers of ``/api/v1/orders`` and what they share."""

    def __init__(
        self,
        settings: Settings,
        postgres: Postgres,
        producer: OrderProducer,
        replies: Replies,
        access: Access,
    ) -> None:
        self._settings = settings
        self._access = access
        self._postgres = postgres
        self._producer = producer
        self._replies = replies
        self._lookup = replies.lookup
        self._limits = Limits(settings.order_lines_max, settings.line_quantity_max, settings.order_bytes_max)
        self._recent: dict[str, Order] = {}
        self._under_way: dict[str, Order] = {}

    def hurry(self, wait_s: float) -> None:
        """End every wait for a verdict in ``wait_s`` seconds."""
        self._replies.hurry(wait_s)

    # POST

    async def create(self, request: web.Request) -> web.Response:
        """Take an order in and answer with its verdict: 201 reserved, 409 refused, 202 not known yet."""
        customer = self._access.customer(request)
        order, named, keyed = parse_order(request, await read_body(request), self._limits)
        if customer not in (None, order.user_id):
            raise not_yours()
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
                    await self._producer.put(order, value, ())
            else:
                with self._replies.waiting(order) as waiter:
                    if known is None:
                        await self._producer.put(order, value, self._replies.headers(waiter))
                    else:
                        waiter.polling = True  # its record, and the channel in it, is another request's
                    verdict = await self._replies.verdict(waiter, self._settings.verdict_timeout_s)
        except OrderIdReused:
            raise reused(order) from None
        except OrderRemoved:
            raise removed(order) from None
        except Overloaded as error:
            raise overloaded("verdicts", f"{error}; the order was not taken in. Come again.") from None
        except RecordTooLarge as error:
            self._recent.pop(order.order_id, None)
            raise Problem("too-large", str(error).partition("\n")[0], order_id=order.order_id) from error
        except EngineUnavailable as error:
            self._recent.pop(order.order_id, None)
            raise unproduced(order, error) from error
        return verdict_answer(order.order_id, verdict, applied=respond_async)

    async def _known(self, order: Order) -> Known | None:
        """Return what Postgres has under the id of an order that may have come before; None when it can't say."""
        try:
            known = await self._lookup.order(order.order_id)
        except (EngineUnavailable, Problem):
            return None  # it is logged, or counted; the stage that takes the record in sees a repeat as well
        if known is not None and not same(known.order, order):
            raise OrderIdReused
        return known

    def _claim(self, order: Order) -> None:
        """Remember which order a key belongs to while Postgres does not know it yet."""
        before = self._recent.pop(order.order_id, order)
        self._recent[order.order_id] = before
        if not same(before, order):
            raise OrderIdReused
        if len(self._recent) > RECENT_MAX:
            del self._recent[next(iter(self._recent))]

    # GET

    async def read(self, request: web.Request) -> web.Response:
        """Return an order with its lines, its payment and its history."""
        customer, order_id = self._access.customer(request), path_id(request)
        try:
            order = await self._postgres.ask(lambda store: store.order(order_id), READ_S, "orders can't be read")
            rejection = None
            if order is None:
                rejection = await self._postgres.ask(
                    lambda store: store.rejection(order_id), READ_S, "orders can't be read"
                )
        except EngineUnavailable as error:
            raise engine_unavailable(error, "Come again.") from error
        if rejection is not None:
            raise rejected(order_id, rejection, self._settings)
        if order is None or customer not in (None, order["user_id"]):
            raise unknown(order_id)
        return json_answer(order_document(order, self._settings), headers={"Cache-Control": "no-store"})
