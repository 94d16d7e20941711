"""``POST /api/v1/orders/{id}/cancel``: commands the order's home, and answers with what became of the order.

Nothing is decided here: a record goes to ``order-commands``, as anyone may send one.  Postgres says where the order's home
is, and when the command was carried out.  Where it does not know the order, the command is kept until the order comes;
not where it knows that what came under the id is none, or that the order was removed.
"""

from __future__ import annotations

import time

import orjson
from aiohttp import web

from orderstream.errors import EngineUnavailable
from orderstream.http.answers import json_answer, location
from orderstream.http.models import Nothing
from orderstream.http.problems import engine_unavailable, overloaded
from orderstream.http.producer import OrderProducer
from orderstream.http.reading import body_of, path_id, prefers_async
from orderstream.http.security import Access
from orderstream.http.watch import View, Watch
from orderstream.settings import Settings
from orderstream.streams.orders import Status

TICK_S = 0.05
"""How often Postgres is asked about the orders that are being cancelled, all of them in one statement."""

WAITING_MAX = 1_000
"""Requests that wait for a cancellation at once; further ones get a 503."""


class Cancel:
    """The handler and what it shares."""

    def __init__(self, settings: Settings, producer: OrderProducer, watch: Watch, access: Access) -> None:
        self._settings, self._producer, self._watch, self._access = settings, producer, watch, access

    async def cancel(self, request: web.Request) -> web.Response:
        """Cancel an order whole: 200 it is cancelled (now, or it was), 202 not yet.  A body is empty, or ``{}``."""
        customer, order_id = self._access.customer(request), path_id(request)
        if request.can_read_body:
            await body_of(request, Nothing)
        if len(self._watch) >= WAITING_MAX:
            raise overloaded("cancellations", f"{WAITING_MAX} requests wait for a cancellation. Come again.")
        with self._watch.watching(order_id, customer) as view:
            try:
                await self._watch.until_read(view)
                if customer is not None:  # one that nobody knows may be another's, and is not cancelled in advance
                    await self._watch.until_there(view, self._settings.verdict_timeout_s)
                elif view.row is None and (rejection := await self._watch.rejection(view)) is not None:
                    raise rejection
            except EngineUnavailable as error:
                detail = "Nothing was done about the order. Come again."
                raise engine_unavailable(error, detail, order_id=order_id) from error
            if view.status == Status.CANCELLED:
                return _state(view)
            home = None if view.row is None else view.row["home"]
            command = orjson.dumps({"command": "cancel", "order_id": order_id})
            try:
                await self._producer.order_command(order_id, command, home)
            except EngineUnavailable as error:
                detail = "Whether the order will be cancelled is not known. Cancel it again: that can't count twice."
                raise engine_unavailable(error, detail, order_id=order_id) from error
            respond_async = prefers_async(request)
            patient = home is not None and not respond_async  # nobody knows when, or whether, an unknown order comes
            deadline = time.monotonic() + (self._settings.verdict_timeout_s if patient else 0)
            while view.status != Status.CANCELLED and not view.leaving:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                await view.changed(left_s)
            return _state(view, applied=respond_async)


def _state(view: View, *, applied: bool = False) -> web.Response:
    """Return the status of an order: 200 when it is cancelled, 202 when that is still to come."""
    done = view.status == Status.CANCELLED
    headers = {"Location": location(view.order_id), "Cache-Control": "no-store"}
    if not done and applied:
        headers["Preference-Applied"] = "respond-async"
    reason = view.row["reason"] if done else None
    body = {"order_id": view.order_id, "status": view.status or Status.CREATED, "reason": reason}
    return json_answer(body, 200 if done else 202, headers)
