"""The answers to requests that fail: problem documents (RFC 9457), ``application/problem+json``.

Every error that leaves a handler becomes one, routes that don't exist and faults of our own included.  A problem's ``type``
is a stable name, ``urn:orderstream:problem:<name>``; :data:`KINDS` and ``docs/API.md`` list the names.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

import orjson
import structlog
from aiohttp import web

from orderstream import metrics
from orderstream.errors import EngineUnavailable
from orderstream.streams.orders import Reason

log = structlog.get_logger("ingress")

TYPE_PREFIX = "urn:orderstream:problem:"
CONTENT_TYPE = "application/problem+json"

RETRY_AFTER_S = 2
"""When to come again after a 503: engines restart within some seconds."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Kind(NamedTuple):
    """A kind of problem: its HTTP status and its title, the same for every occurrence."""

    status: int
    title: str


KINDS: Mapping[str, Kind] = {
    "not-json": Kind(400, "The body is not JSON"),
    "incomplete-body": Kind(400, "The body did not come whole"),
    "malformed-request": Kind(400, "This is no HTTP request"),
    "invalid-request": Kind(400, "The request is not valid"),
    "idempotency-key-missing": Kind(400, "The header Idempotency-Key is missing"),
    "invalid-order": Kind(400, "The order is not valid"),
    "invalid-order-id": Kind(400, "This is no order id"),
    "unauthorized": Kind(401, "Who asks is not known"),
    "forbidden": Kind(403, "This is another customer's"),
    "admin-off": Kind(403, "The admin routes are off"),
    "invalid-event-id": Kind(400, "This is no id of an event"),
    "not-found": Kind(404, "There is nothing at this path"),
    "order-not-found": Kind(404, "There is no such order"),
    "order-rejected": Kind(404, "What was sent as this order is none"),
    "product-not-found": Kind(404, "There is no such product"),
    "method-not-allowed": Kind(405, "This path does not know the method"),
    "request-timeout": Kind(408, "The body took too long"),
    "request-in-progress": Kind(409, "A request with this key is under way"),
    "stock-too-low": Kind(409, "There are fewer units than that"),
    "stock-too-high": Kind(409, "There would be too many units"),
    "unknown-product": Kind(409, "A product of the order does not exist"),
    "insufficient-stock": Kind(409, "There is not enough stock for the order"),
    "user-limit": Kind(409, "The user has had as many units as one may"),
    "payment-declined": Kind(409, "The payment was declined"),
    "expired": Kind(409, "The order was not paid in time"),
    "cancelled-by-user": Kind(409, "The order was cancelled"),
    "order-removed": Kind(410, "The order ended long ago and was removed"),
    "precondition-failed": Kind(412, "The product has changed"),
    "too-large": Kind(413, "The body is too large"),
    "uri-too-long": Kind(414, "The path is too long"),
    "unsupported-media-type": Kind(415, "The body must be JSON"),
    "expectation-failed": Kind(417, "The header Expect asks for what is not known"),
    "idempotency-key-reused": Kind(422, "The key or id belongs to another request"),
    "too-many-units": Kind(422, "The order has too many units of a product"),
    "rate-limited": Kind(429, "Too many requests"),
    "headers-too-large": Kind(431, "The headers are too large"),
    "internal": Kind(500, "The request failed"),
    "engine-unavailable": Kind(503, "An engine does not answer"),
    "overloaded": Kind(503, "Too much is under way"),
    "not-ready": Kind(503, "This process can't do its work now"),
    "starting": Kind(503, "The worker is starting"),
    "owner-unavailable": Kind(503, "The owner can't be asked now"),
}
"""Every kind of problem by the last part of its type.  Most 409s are the reasons of a cancelled order."""

_BY_STATUS = {404: "not-found", 405: "method-not-allowed", 413: "too-large", 415: "unsupported-media-type"}
"""The kinds of the errors that aiohttp raises by itself."""


class Problem(Exception):
    """Ends a request with a problem document.

    Args:
        kind: a name of :data:`KINDS`.
        detail: what happened this time and what the client can do; for people.
        instance: the URI of this occurrence or of what it is about.
        headers: further headers of the response.
        members: further members of the document.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        instance: str | None = None,
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        self.kind, self.detail, self.instance = kind, detail, instance
        self.headers, self.members = headers or {}, members
        super().__init__(f"{kind}: {detail}")

    def response(self) -> web.Response:
        """Return the response."""
        status, title = KINDS[self.kind]
        document: dict[str, Any] = {
            "type": TYPE_PREFIX + self.kind,
            "title": title,
            "status": status,
            "detail": self.detail,
            "error": title,  # clients of the published service read this one and the next
            "details": self.detail,
        }
        if self.instance is not None:
            document["instance"] = self.instance
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
        return _response(status, document | self.members, {**headers, **self.headers})


def refused(order_id: str, reason: Reason, instance: str) -> Problem:
    """Make the problem of an order that ended without a sale.

    Args:
        order_id: the order.
        reason: why.
        instance: where the order can be read.
    """
    details = {
        Reason.UNKNOWN_PRODUCT: "The catalogue does not have every product of the order, so it gets none.",
        Reason.INSUFFICIENT_STOCK: "Not all units of the order can be had, so it gets none.",
        Reason.USER_LIMIT: "With this order its user would have more units of a product than one user may; it gets none.",
        Reason.PAYMENT_DECLINED: "The provider declined the charge; what was held is given back.",
        Reason.EXPIRED: "The hold's time was over before the charge; what was held is given back.",
        Reason.CANCELLED_BY_USER: "The order was cancelled; what was held is given back.",
    }
    kind = reason.replace("_", "-")
    return Problem(kind, details[reason], instance=instance, order_id=order_id, order_status="CANCELLED", reason=reason)


def engine_unavailable(error: EngineUnavailable, detail: str, **members: Any) -> Problem:
    """Make the problem of an engine that does not answer; its address is for the log, not for clients."""
    return Problem("engine-unavailable", f"{error.engine} does not answer. {detail}", engine=error.engine, **members)


OVERLOADED = ("verdicts", "cancellations", "streams", "connections", "idle_connections", "postgres_pool")
"""What there may be too much of."""


def overloaded(what: str, detail: str) -> Problem:
    """Count that a bound is reached, and make the problem of a request that is refused therefore.

    Args:
        what: one of :data:`OVERLOADED`.
        detail: how many there are, and what the client can do.
    """
    metrics.HTTP_OVERLOADED.labels(what).inc()
    return Problem("overloaded", detail)


def _response(status: int, document: Mapping[str, Any], headers: Mapping[str, str]) -> web.Response:
    return web.Response(
        status=status, body=orjson.dumps(document, option=orjson.OPT_UTC_Z), content_type=CONTENT_TYPE, headers=headers
    )


def _of_http_error(error: web.HTTPException, request: web.Request) -> web.Response:
    """Return the response to an error that aiohttp raised by itself."""
    kept = {name: error.headers[name] for name in ("Allow",) if name in error.headers}
    kind = _BY_STATUS.get(error.status)
    if kind is None:  # the status says it all: RFC 9457, 4.2.1
        title = HTTPStatus(error.status).phrase
        document: dict[str, Any] = {"type": "about:blank", "title": title, "status": error.status}
        if error.text and not error.text.startswith(f"{error.status}: "):  # aiohttp's own, when nothing is said
            document["detail"] = error.text
        return _response(error.status, document, kept)
    details = {
        "not-found": f"There is nothing at {request.path}.",
        "method-not-allowed": f"{request.path} knows {kept.get('Allow')}, not {request.method}.",
        "too-large": f"A body may have {request.client_max_size} bytes.",
        "unsupported-media-type": "Send application/json.",
    }
    return Problem(kind, details[kind], headers=kept).response()


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into a problem document; an unforeseen one is logged under an id that the client gets too."""
    try:
        return await handler(request)
    except Problem as problem:
        return problem.response()
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _of_http_error(error, request)
    except Exception:  # whatever it is: logged whole, answered without its insides
        incident = str(uuid.uuid4())
        log.exception("a request failed", incident=incident, method=request.method, path=request.path)
        detail = (
            "This is a fault of ours. Whether the request had an effect is not known; the log has it by this incident."
        )
        return Problem("internal", detail, instance=f"urn:uuid:{incident}", incident=incident).response()
