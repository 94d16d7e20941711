"""Who charges: a small protocol, a simulated provider and one over HTTP.

A charge is made under the order's id as its idempotency key.  Whatever happened to an earlier attempt, asking again under
the same key gives the verdict of the first: so an unknown outcome is asked again, never guessed.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
import uuid
from collections.abc import Awaitable
from enum import StrEnum
from typing import Any, Protocol

import aiohttp
import msgspec
import orjson

from orderstream.settings import Settings

ANSWER_BYTES_MAX = 16 * 1024
"""Of what a provider may answer, as it comes over the wire: far more than a verdict needs."""

CHARGE_ID_CHARS_MAX = 255


class Charge(msgspec.Struct, frozen=True, gc=False):
    """What is asked of the provider; ``order_id`` is the idempotency key."""

    order_id: str
    user_id: str
    payment_method: str
    amount_cents: int


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """What the provider said: ``charge_id`` None means declined.  ``amount_cents`` is what it took, where it says so."""

    charge_id: str | None
    amount_cents: int | None = None


class Back(StrEnum):
    """What became of a refund or a void."""

    GIVEN = "given"
    """No charge stands under this key any more, or there was none."""
    REFUSED = "refused"
    """The provider keeps the money, for good."""
    NO_VOID = "no void"
    """The provider has no such request."""


class Cause(StrEnum):
    """Why an outcome is not known."""

    SILENT = "silent"
    """No answer in time."""
    UNAVAILABLE = "unavailable"
    """No connection, or an answer that says: later."""
    MISCONFIGURED = "misconfigured"
    """The token, the URL or the account is wrong: it is so for every order."""
    REJECTED = "rejected"
    """The provider does not take this request; whether an earlier one had an effect it does not say."""
    UNCLEAR = "unclear"
    """An answer that says nothing, or nothing that can be trusted."""


class OutcomeUnknown(Exception):
    """The provider gave no verdict; ask again under the same key.

    Attributes:
        stray: what it said of another order instead: the order's id, and a charge that it has made.
    """

    def __init__(self, text: str, cause: Cause = Cause.UNAVAILABLE, stray: tuple[str, Verdict] | None = None) -> None:
        super().__init__(text)
        self.cause, self.stray = cause, stray


class Provider(Protocol):
    """Charges and refunds.  All of it is idempotent by the order's id."""

    def charge(self, charge: Charge) -> Verdict | Awaitable[Verdict]:
        """Charge, or say why not.  A provider that knows its answer at once gives it at once.

        Raises:
            OutcomeUnknown: from the awaitable.
        """
        ...

    async def refund(self, order_id: str, charge_id: str, amount_cents: int) -> Back:
        """Give a charge back.

        Raises:
            OutcomeUnknown: ask again.
        """
        ...

    async def void(self, order_id: str) -> Back:
        """Give back whatever was charged under this key, and have every later charge under it declined.

        Raises:
            OutcomeUnknown: ask again.
        """
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


class SimulatedProvider:
    """Declines a fixed share of orders, and takes its time.  The verdict and the latency of an order never change."""

    def __init__(self, *, success_rate: float, latency_min_s: float, latency_max_s: float, seed: int) -> None:
        self._success_rate = success_rate
        self._latency_min_s, self._latency_span_s = latency_min_s, latency_max_s - latency_min_s
        self._salt = seed.to_bytes(16, "little", signed=True)
        self._is_sure = success_rate >= 1 and latency_max_s <= 0
        self._voided: set[str] = set()

    def _draw(self, order_id: str) -> tuple[float, float]:
        digest = hashlib.blake2b(order_id.encode(), digest_size=16, salt=self._salt).digest()
        verdict, latency = struct.unpack("<QQ", digest)
        return (verdict >> 11) / 2**53, (latency >> 11) / 2**53

    def charge(self, charge: Charge) -> Verdict | Awaitable[Verdict]:
        """See :class:`Provider`; at once when the latency is 0."""
        if self._is_sure and charge.order_id not in self._voided:
            return Verdict(f"sim-{charge.order_id}")
        verdict, latency = self._draw(charge.order_id)
        succeeds = verdict < self._success_rate and charge.order_id not in self._voided
        answer = Verdict(f"sim-{charge.order_id}" if succeeds else None)
        wait_s = self._latency_min_s + latency * self._latency_span_s
        if wait_s <= 0:
            return answer

        async def later() -> Verdict:
            await asyncio.sleep(wait_s)
            return answer

        return later()

    async def refund(self, order_id: str, charge_id: str, amount_cents: int) -> Back:
        """See :class:`Provider`."""
        return Back.GIVEN

    async def void(self, order_id: str) -> Back:
        """See :class:`Provider`; this process remembers it."""
        self._voided.add(order_id)
        return Back.GIVEN

    async def close(self) -> None:
        """See :class:`Provider`."""


_MISCONFIGURED = frozenset({401, 403, 404, 405})
_REJECTED = frozenset({400, 402, 409, 410, 422})
_NO_VOID = frozenset({404, 405, 501})


class HttpProvider:
    """A provider over HTTP: ``POST {url}/charges``, ``/refunds`` and ``/voids``, each with an ``Idempotency-Key``.

    The contract stands in ``docs/PROVIDER.md``.  A charge's verdict is a 2xx answer ``{"status": "succeeded",
    "charge_id": "…"}``, with ``amount_cents`` if the provider likes, or ``{"status": "declined"}``; or a 402, whatever it
    says.  A refund or a void is done with a 2xx answer, and refused for good with ``{"status": "refused"}``.  No answer is
    larger than :data:`ANSWER_BYTES_MAX`, or compressed.  Everything else is an unknown outcome.

    A connection is used again, for requests of its own kind, only after an answer that names the order that was asked about
    in ``order_id``: a copy of such an answer that comes late is known by it.  After any other answer it is closed.  There
    are as many connections of a kind as there were requests at once.
    """

    def __init__(self, url: str, *, token: str, timeout_s: float) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._idle: dict[str, list[aiohttp.ClientSession]] = {"/charges": [], "/voids": [], "/refunds": []}

    def _opened(self) -> aiohttp.ClientSession:
        """Return a session for one request at a time, with a connection of its own.

        One of several would lend its connection to the next request with the last byte of an answer, before it is read.
        """
        return aiohttp.ClientSession(
            headers=self._headers,
            timeout=self._timeout,
            connector=aiohttp.TCPConnector(limit=1),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a few bytes may become a gigabyte
        )

    async def _post(self, path: str, key: str, body: dict[str, object]) -> tuple[int, Any]:
        """Return status and answer, None where that is no JSON."""
        idle = self._idle[path]
        session, is_kept = idle.pop() if idle else self._opened(), False
        try:
            status, text = await self._asked(session, path, key, body)
            try:
                answered = orjson.loads(text)
            except orjson.JSONDecodeError:
                answered = None
            about = answered.get("order_id") if isinstance(answered, dict) else None
            # A provider that answers twice on one connection answers the next request with the answer of this one.
            is_kept = about == body["order_id"]
        finally:
            if is_kept:
                idle.append(session)
            else:
                await session.close()
        if isinstance(answered, dict) and "order_id" in answered and not is_kept:
            said = f"{path} answered about another order: {text[:200]!r}"
            raise OutcomeUnknown(said, Cause.UNCLEAR, _stray(answered) if 200 <= status < 300 else None)
        return status, answered

    async def _asked(
        self, session: aiohttp.ClientSession, path: str, key: str, body: dict[str, object]
    ) -> tuple[int, bytes]:
        headers = {"Idempotency-Key": key, "Content-Type": "application/json", "Accept-Encoding": "identity"}
        try:
            async with session.post(
                f"{self._url}{path}",
                data=orjson.dumps(body),
                headers=headers,
                allow_redirects=False,  # followed, it would become a GET, and its answer no answer to this question
            ) as answer:
                return answer.status, await _bounded(path, answer)
        except TimeoutError as error:
            raise OutcomeUnknown(f"{path}: no answer in time", Cause.SILENT) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: headers that are none
            raise OutcomeUnknown(f"{path}: {error!r:.200}") from error

    async def charge(self, charge: Charge) -> Verdict:
        """See :class:`Provider`."""
        status, body = await self._post("/charges", charge.order_id, msgspec.structs.asdict(charge))
        if status == 402:
            return Verdict(None)
        if not 200 <= status < 300:
            raise _failed("/charges", status, body)
        if isinstance(body, dict) and body.get("status") == "declined":
            return Verdict(None)
        verdict = _verdict(body)
        if verdict is None:
            raise OutcomeUnknown(f"/charges answered {status}, no verdict: {body!r:.200}", Cause.UNCLEAR)
        return verdict

    async def refund(self, order_id: str, charge_id: str, amount_cents: int) -> Back:
        """See :class:`Provider`."""
        body: dict[str, object] = {"order_id": order_id, "charge_id": charge_id, "amount_cents": amount_cents}
        return await self._give_back("/refunds", f"refund-{order_id}", body)

    async def void(self, order_id: str) -> Back:
        """See :class:`Provider`."""
        return await self._give_back("/voids", f"void-{order_id}", {"order_id": order_id})

    async def _give_back(self, path: str, key: str, body: dict[str, object]) -> Back:
        status, answered = await self._post(path, key, body)
        if path == "/voids" and status in _NO_VOID:
            return Back.NO_VOID
        is_done = 200 <= status < 300
        if (is_done or status in _REJECTED) and isinstance(answered, dict) and answered.get("status") == "refused":
            return Back.REFUSED
        if not is_done or status == 202:
            raise _failed(path, status, answered)
        return Back.GIVEN

    async def close(self) -> None:
        """See :class:`Provider`."""
        for idle in self._idle.values():
            while idle:
                await idle.pop().close()


async def _bounded(path: str, answer: aiohttp.ClientResponse) -> bytes:
    """Return what was answered.

    Raises:
        OutcomeUnknown: it is too large; the connection is closed then.
    """
    text = bytearray()
    while part := await answer.content.readany():
        text += part
        if len(text) > ANSWER_BYTES_MAX:
            answer.close()
            raise OutcomeUnknown(f"{path} answered more than {ANSWER_BYTES_MAX} bytes", Cause.UNCLEAR)
    return bytes(text)


def _failed(path: str, status: int, body: Any) -> OutcomeUnknown:
    if status in _MISCONFIGURED:
        cause = Cause.MISCONFIGURED
    elif status in _REJECTED:
        cause = Cause.REJECTED
    else:
        cause = Cause.UNCLEAR if 200 <= status < 300 else Cause.UNAVAILABLE
    return OutcomeUnknown(f"{path} answered {status}: {body!r:.200}", cause)


def _verdict(body: Any) -> Verdict | None:
    """Return the charge that an answer names; None: there is none that a row can hold."""
    if not isinstance(body, dict) or body.get("status") != "succeeded":
        return None
    charge_id, amount = body.get("charge_id"), body.get("amount_cents")
    if not isinstance(charge_id, str) or not charge_id.isprintable() or not 0 < len(charge_id) <= CHARGE_ID_CHARS_MAX:
        return None
    if amount is not None and type(amount) is not int:  # a bool is an int
        return None
    return Verdict(charge_id, amount)


def _stray(body: dict[str, Any]) -> tuple[str, Verdict] | None:
    """Return which order was charged, of an answer that is about another order than was asked about."""
    verdict, order_id = _verdict(body), body["order_id"]
    try:
        known = str(uuid.UUID(order_id)) == order_id
    except (TypeError, ValueError, AttributeError):
        return None
    return (order_id, verdict) if known and verdict is not None else None


def make_provider(settings: Settings) -> Provider:
    """Return the provider that the settings name."""
    if settings.payment_provider == "http":
        return HttpProvider(
            settings.payment_url,
            token=settings.payment_token,
            timeout_s=settings.payment_timeout_s,
        )
    return SimulatedProvider(
        success_rate=settings.payment_success_rate,
        latency_min_s=settings.payment_latency_min_s,
        latency_max_s=settings.payment_latency_max_s,
        seed=settings.payment_seed,
    )
