"""What happens before there is a request: bounds of connections and heads, and a problem document for what is no HTTP.

aiohttp answers such bytes in plain text, from a method of its protocol class; this is that class with another answer.
``tests/unit/test_security.py`` holds the installed aiohttp to what is relied on here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from itertools import islice
from typing import Any, NamedTuple, cast

import structlog
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo
from aiohttp.web_request import BaseRequest

from orderstream import descriptors, metrics
from orderstream.http.problems import Problem, overloaded
from orderstream.http.rate import network_of
from orderstream.http.security import HEADERS
from orderstream.settings import Settings

log = structlog.get_logger("http")

LINE_BYTES_MAX = 8_192
"""The request line: a path, a query with a cursor."""

HEADER_BYTES_MAX = 16_384
"""A header.  Not the number of the line, since nothing else in aiohttp's error tells the two apart."""

HEADERS_MAX = 100

IDLE_S = 75.0
"""How long a connection may be without a whole head of a request, the first one and each after an answer.  Longer than
usual proxies keep theirs, so that none of them sends into a connection that is being closed."""

SETTLED_S = 1.0
"""A connection that has had no request in hand for so long counts as idle: one of a burst has sent its request by then."""

LINGER_S = 1.0
"""How long a refused connection stays open for its client to read why; closed with bytes unread, it would be reset."""

REFUSED_MAX = 100
"""Refused connections that are kept open so; further ones are reset.  They take descriptors too."""

TOLD_S = 10.0
"""Refused connections are logged so often at most."""


class Bounds(NamedTuple):
    """How many connections an ingress, or a worker's pages, take at once; and how many idle ones of one client."""

    connections: int
    idle: int


def bounds(settings: Settings) -> Bounds:
    """Return the bounds that the settings ask for, or that the descriptors of this process allow."""
    connections = min(settings.connections_max, descriptors.free())
    return Bounds(connections, min(settings.idle_connections_max, max(1, connections // 2)))


class Protocol(RequestHandler):
    """One connection."""

    __slots__ = ("_body", "_client", "_ended", "_server")

    def __init__(self, server: Server, **kwargs: Any) -> None:
        super().__init__(server, **kwargs)
        self._server, self._client = server, ""
        self._body: StreamReader = EMPTY_PAYLOAD
        """Of the request in hand, or of the last one: what is left of it is read behind its answer."""
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the client sends nothing more: it has left, or waits for its answer."""
        return self._ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a connection, or answer that there are too many."""
        address = transport.get_extra_info("peername")
        self._client = network_of(str(address[0])) if address else "unknown"
        refusal = self._server.refusal(self._client)
        if refusal is None:
            super().connection_made(transport)
            self._server.note_idle(self._client, self)
        else:
            self._refuse(cast(asyncio.Transport, transport), refusal)

    def _refuse(self, transport: asyncio.Transport, refusal: Problem) -> None:
        self._close = True  # what comes in is passed over
        if self._server.refused >= REFUSED_MAX:
            transport.abort()
            return
        self._server.refused += 1
        response = refusal.response()
        headers = {**response.headers, **HEADERS, "Content-Length": str(len(response.body)), "Connection": "close"}  # type: ignore[arg-type]
        head = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
        head += [f"{name}: {value}" for name, value in headers.items()]
        transport.write("\r\n".join([*head, "", ""]).encode() + cast(bytes, response.body))
        transport.write_eof()
        self._loop.call_later(LINGER_S, self._end_refused, transport)

    def _end_refused(self, transport: asyncio.Transport) -> None:
        self._server.refused -= 1
        transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the connection."""
        self._server.note_busy(self._client, self)
        super().connection_lost(exc)

    async def _handle_request(
        self,
        request: BaseRequest,
        start_time: float | None,
        request_handler: Callable[[BaseRequest], Awaitable[web.StreamResponse]],
    ) -> tuple[web.StreamResponse, bool]:
        self._server.note_busy(self._client, self)
        self._body = request.content
        if self._ended:
            self._end()

        async def handled(asked: BaseRequest) -> web.StreamResponse:
            try:
                return await request_handler(asked)
            except web.HTTPExpectationFailed:  # raised before any middleware
                return Problem(
                    "expectation-failed", "The header Expect may say 100-continue, and nothing else."
                ).response()

        try:
            return await super()._handle_request(request, start_time, handled)
        finally:
            if self.transport is not None:
                self._server.note_idle(self._client, self)

    def data_received(self, data: bytes) -> None:
        """Take bytes in; a body that can't be read on ends the request that waits for it at once."""
        super().data_received(data)
        current = self._current_request
        unread = self._messages and isinstance(self._messages[-1][0], _ErrInfo)
        if unread and current is not None and not current.content.is_eof():
            current.content.set_exception(web.RequestPayloadError("the body breaks the rules of its transfer coding"))

    def eof_received(self) -> bool:  # type: ignore[override]
        """Note that the client sends nothing more; return whether it still gets answers, after which the connection ends."""
        self._ended = True
        if not self._messages and (self._waiter is not None or not self._request_count):
            return False  # no whole request is here
        self._end()
        return True

    def _end(self) -> None:
        """Make the request in hand the last one, unless there are more behind it."""
        if self._messages:
            return
        self._close = True
        if not self._body.is_eof():
            self._body.set_exception(web.RequestPayloadError("the body ends early"))

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log a fault of ours; what is the client's (it hung up, or the rest of its body can't be read) is none."""
        if not isinstance(kw.get("exc_info"), (ConnectionError, web.RequestPayloadError)):
            super().log_exception(*args, **kw)

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer a request that can't be read, or a fault that no middleware saw, without the insides of either."""
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer is sent already")
        if exc is None or (status >= 500 and not isinstance(exc, ConnectionError)):
            log.error("a request failed outside of its handler", exc_info=exc)
            problem = Problem("internal", "This is a fault of ours. Whether the request had an effect is not known.")
        else:
            problem = unreadable(exc)
        response = problem.response()
        response.headers.update(HEADERS)
        response.force_close()
        return response


def unreadable(error: BaseException) -> Problem:
    """Make the problem of bytes that are no request, or one whose head is too large."""
    if isinstance(error, LineTooLong):
        if str(LINE_BYTES_MAX) in map(str, error.args[1:2]):
            return Problem("uri-too-long", f"The request line has more than {LINE_BYTES_MAX} bytes.")
        return Problem("headers-too-large", f"A header has more than {HEADER_BYTES_MAX} bytes.")
    if "Too many headers" in str(error):
        return Problem("headers-too-large", f"The request has more than {HEADERS_MAX} headers.")
    return Problem("malformed-request", "What came is no HTTP/1.1 request.")


class Server(web.Server):
    """Makes a :class:`Protocol` for each connection, and bounds them.

    Attributes:
        refused: connections that are open only for their client to read that they are too many.
    """

    def __init__(self, made: web.Server, limits: Bounds) -> None:
        super().__init__(made.request_handler, request_factory=made.request_factory, loop=made._loop, **made._kwargs)
        self._limits = limits
        self._idle: dict[str, dict[Protocol, float]] = {}
        """Connections without a request in hand, by client, each with since when; the longest idle first."""
        self.refused = 0
        self._swept_at = self._told_at = float("-inf")
        self._untold = 0
        metrics.HTTP_CONNECTIONS.set_function(lambda: len(self._connections))

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return Protocol(self, loop=self._loop, **self._kwargs)

    def note_idle(self, client: str, connection: Protocol) -> None:
        """Note that a connection has no request in hand any more, or none yet."""
        self._idle.setdefault(client, {})[connection] = time.monotonic()

    def note_busy(self, client: str, connection: Protocol) -> None:
        """Note that a connection has a request in hand, or is no more."""
        idle = self._idle.get(client, {})
        idle.pop(connection, None)
        if not idle:
            self._idle.pop(client, None)

    def refusal(self, client: str) -> Problem | None:
        """Return why one more connection of a client is not taken, or None."""
        now = time.monotonic()
        if now - self._swept_at >= SETTLED_S:
            self._swept_at = now
            self._sweep(now)
        if len(self._connections) >= self._limits.connections:
            return self._too_many(client, "connections", self._limits.connections)
        idle = self._idle.get(client, {})
        if len(idle) >= self._limits.idle and self._settled(idle, self._limits.idle - 1, now):
            return self._too_many(client, "idle_connections", self._limits.idle)
        return None

    @staticmethod
    def _settled(idle: dict[Protocol, float], number: int, now: float) -> bool:
        return now - next(islice(idle.values(), number, None)) >= SETTLED_S

    def _sweep(self, now: float) -> None:
        """Close what a burst of connections that never sent anything has left beyond the bound."""
        for client, idle in list(self._idle.items()):
            beyond = list(islice(idle, self._limits.idle, None))
            for connection in beyond:
                if connection.connected and now - idle[connection] >= SETTLED_S:
                    self._too_many(client, "idle_connections", self._limits.idle)
                    connection.force_close()

    def _too_many(self, client: str, what: str, bound: int) -> Problem:
        self._untold += 1
        if time.monotonic() - self._told_at >= TOLD_S:
            log.warning("connections are refused", why=what, at_most=bound, client=client, refused=self._untold)
            self._told_at, self._untold = time.monotonic(), 0
        kept = "without a request, of one client, " if what == "idle_connections" else ""
        return overloaded(what, f"{bound} connections {kept}are open. Come again, or use one of them.")


class Runner(web.AppRunner):
    """Serves an application by this protocol."""

    __slots__ = ("_limits",)

    def __init__(self, app: web.Application, limits: Bounds, **kwargs: Any) -> None:
        known = {
            "max_line_size": LINE_BYTES_MAX,
            "max_field_size": HEADER_BYTES_MAX,
            "max_headers": HEADERS_MAX,
            "keepalive_timeout": IDLE_S,
            "auto_decompress": False,  # bodies come as they are: the bound on them is one on what is read
        }
        super().__init__(app, **{**known, **kwargs})
        self._limits = limits

    async def _make_server(self) -> web.Server:
        return Server(await super()._make_server(), self._limits)
