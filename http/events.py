"""``GET /api/v1/orders/{id}/events``: what happens to an order, as server-sent events.

First what happened, then what happens.  An event's id is its index in the order's history: a client that lost its connection
continues where it was.  Postgres is asked once for all clients, by :mod:`orderstream.http.watch`.
"""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import hdrs, web
from aiohttp_sse import EventSourceResponse

from orderstream import metrics
from orderstream.errors import EngineUnavailable
from orderstream.http.history import history
from orderstream.http.problems import Problem, engine_unavailable, overloaded
from orderstream.http.protocol import Protocol
from orderstream.http.reading import path_id
from orderstream.http.security import Access
from orderstream.http.watch import View, Watch
from orderstream.settings import Settings
from orderstream.streams.orders import TERMINAL

TICK_S = 0.25
"""How often Postgres is asked about the orders that are watched."""

STREAMS_MAX = 1_000
"""Streams of one ingress at once; each is an open connection.  Further ones get a 503."""

PING_S = 10.0
"""How often a comment is sent, so that proxies keep the connection and a client that has left is noticed."""

SEND_S = 20.0
"""A client that takes nothing for so long is cut off."""

CONNECTED_S = 1.0
"""How often a stream checks that its client is still connected; one that sends nothing more gets a comment each time."""

RETRY_MS = 2_000
"""The field ``retry``: how long a client waits before it connects again."""


class Events:
    """The handler and what it shares."""

    def __init__(self, settings: Settings, watch: Watch, access: Access) -> None:
        self._settings, self._watch, self._access = settings, watch, access

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Stream what happens to an order until it has ended."""
        customer = self._access.customer(request)
        order_id, seen = path_id(request), last_seen(request)
        if len(self._watch) >= STREAMS_MAX:
            raise overloaded("streams", f"{STREAMS_MAX} clients follow orders here already. Come again.")
        with self._watch.watching(order_id, customer) as view:
            try:
                await self._watch.until_there(view, self._settings.verdict_timeout_s)
            except EngineUnavailable as error:
                raise engine_unavailable(error, "The order can't be read. Come again.", order_id=order_id) from error
            steps = history(view.row, self._settings)
            if seen >= len(steps) - 1 and steps[-1]["status"] in TERMINAL:
                return web.Response(status=204)  # nothing follows: an EventSource does not connect again
            if request.method == hdrs.METH_HEAD:
                return web.Response(content_type="text/event-stream")
            metrics.EVENT_STREAMS.inc()
            try:
                return await self._stream(request, view, seen)
            finally:
                metrics.EVENT_STREAMS.dec()

    async def _stream(self, request: web.Request, view: View, seen: int) -> web.StreamResponse:
        stream = EventSourceResponse(sep="\n", ping_interval=PING_S, send_timeout=SEND_S)
        stream.headers["Cache-Control"] = "no-store"
        unavailable = False
        try:
            await stream.prepare(request)
            async with stream:
                retry: int | None = RETRY_MS
                while stream.is_connected() and not view.leaving:
                    if view.unavailable != unavailable:
                        unavailable = view.unavailable
                        what = "engine-unavailable" if unavailable else "engine-available"
                        await stream.send('{"engine":"Postgres"}', event=what)
                    steps = history(view.row, self._settings)
                    for n, step in enumerate(steps[seen + 1 :], seen + 1):
                        await stream.send(_data(view.order_id, step), id=str(n), retry=retry)
                        seen, retry = n, None
                    if steps[-1]["status"] in TERMINAL or request.transport is None or request.transport.is_closing():
                        break
                    if isinstance(request.protocol, Protocol) and request.protocol.ended:
                        # A client that has left resets the connection then.
                        await stream.write(b": ping\n\n")
                    await view.changed(CONNECTED_S)
        except (ConnectionResetError, TimeoutError):
            pass  # the client has left, or takes nothing
        return stream


def last_seen(request: web.Request) -> int:
    """Return the index of the last event that a client has, -1 for none.

    Raises:
        Problem: ``Last-Event-ID`` is no such index.
    """
    text = request.headers.get("Last-Event-ID", "")
    if not text:
        return -1
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise Problem("invalid-event-id", "Last-Event-ID is the id of an event of this stream: 0, 1, 2 and so on.")
    return int(text)


def _data(order_id: str, step: dict[str, Any]) -> str:
    return orjson.dumps({"order_id": order_id, **step}, option=orjson.OPT_UTC_Z).decode()
