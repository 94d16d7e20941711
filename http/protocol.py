"""What happens before there is a request: bounds of its head, and a problem document for what is no HTTP.

aiohttp answers such bytes in plain text, from a method of its protocol class; this is that class with another answer.
``tests/unit/test_security.py`` holds the installed aiohttp to what is relied on here.
"""

from __future__ import annotations

from typing import Any

import structlog
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest

from orderstream.http.problems import Problem
from orderstream.http.security import HEADERS

log = structlog.get_logger("ingress")

LINE_BYTES_MAX = 8_192
"""The request line: a path, a query with a cursor."""

HEADER_BYTES_MAX = 16_384
"""A header.  Not the number of the line, since nothing else in aiohttp's error tells the two apart."""

HEADERS_MAX = 100

IDLE_S = 75.0
"""How long a connection may be without a whole head of a request, the first one and each after an answer.  Longer than
usual proxies keep theirs, so that none of them sends into a connection that is being closed."""


class Protocol(RequestHandler):
    """One connection."""

    __slots__ = ()

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer a request that can't be read, or a fault that no middleware saw, without the insides of either."""
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer is sent already")
        if status >= 500 or exc is None:
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
    """Makes a :class:`Protocol` for each connection."""

    def __init__(self, made: web.Server) -> None:
        super().__init__(made.request_handler, request_factory=made.request_factory, loop=made._loop, **made._kwargs)

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return Protocol(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Serves an application by this protocol."""

    __slots__ = ()

    def __init__(self, app: web.Application, **kwargs: Any) -> None:
        bounds = {
            "max_line_size": LINE_BYTES_MAX,
            "max_field_size": HEADER_BYTES_MAX,
            "max_headers": HEADERS_MAX,
            "keepalive_timeout": IDLE_S,
        }
        super().__init__(app, **{**bounds, **kwargs})

    async def _make_server(self) -> web.Server:
        return Server(await super()._make_server())
