"""``POST /api/v1/orders/{id}/cancel``: commands the order's owner, and tells what became of it.

Nothing is decided here: a record goes to ``order-commands``, as anyone may send one, and Postgres says when it was done.
"""

from __future__ import annotations

import time

import orjson
from aiohttp import web

from orderstream.errors import EngineUnavailable
from orderstream.http.answers import location, unknown
from orderstream.http.health import Presence
from orderstream.http.intake import OrderProducer
from orderstream.http.problems import Problem, engine_unavailable
from orderstream.http.reading import path_id, prefers_async
from orderstream.http.watch import View, Watch
from orderstream.settings import Settings
from orderstream.streams.orders import Status

TICK_S = 0.05
"""How often Postgres is asked about the orders that are being cancelled, all of them in one statement."""

LOOK_S = 5.0
"""Longest wait for Postgres before anything is commanded."""

WAITING_MAX = 1_000
"""Requests that wait for a cancellation at once; further ones are told to come again."""


class Cancel:
    """The handler and what it shares."""

    def __init__(self, settings: Settings, intake: OrderProducer, watch: Watch, presence: Presence) -> None:
        self._settings, self._intake, self._watch, self._presence = settings, intake, watch, presence

    async def cancel(self, request: web.Request) -> web.Response:
        """Cancel an order: 200 it is cancelled (now, or it was), 202 not yet, 404 no such order."""
        order_id = path_id(request)
        if len(self._watch) >= WAITING_MAX:
            raise Problem("overloaded", f"{WAITING_MAX} requests wait for a cancellation. Come again.")
        with self._watch.looking(order_id) as view:
            await self._first_look(view)
            if view.row is None:
                raise unknown(order_id)
            if view.status == Status.CANCELLED:
                return _standing(view)
            command = orjson.dumps({"command": "cancel", "order_id": order_id})
            try:
                await self._intake.order_command(order_id, command)
            except EngineUnavailable as error:
                detail = "Whether the order will be cancelled is not known. Cancel it again: that can't count twice."
                raise engine_unavailable(error, detail, order_id=order_id) from error
            respond_async = prefers_async(request)
            deadline = time.monotonic() + (0 if respond_async else self._settings.verdict_timeout_s)
            while view.status != Status.CANCELLED and not view.leaving:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                await view.changed(left_s)
            return _standing(view, applied=respond_async)

    async def _first_look(self, view: View) -> None:
        deadline = time.monotonic() + LOOK_S
        while not view.looks:
            left_s = deadline - time.monotonic()
            if left_s > 0 and not view.unavailable and not view.leaving:
                await view.changed(left_s)
                continue
            away = EngineUnavailable("Postgres", self._presence.address, "it did not answer")
            raise engine_unavailable(away, "Nothing was done about the order. Come again.", order_id=view.order_id)


def _standing(view: View, *, applied: bool = False) -> web.Response:
    """Tell where an order stands: 200 when it is cancelled, 202 with its path when that is still to come."""
    done = view.status == Status.CANCELLED
    headers = {"Location": location(view.order_id), "Cache-Control": "no-store"}
    if not done and applied:
        headers["Preference-Applied"] = "respond-async"
    body = {"order_id": view.order_id, "status": view.status, "reason": view.row["reason"]}
    return web.Response(
        status=200 if done else 202, body=orjson.dumps(body), content_type="application/json", headers=headers
    )
