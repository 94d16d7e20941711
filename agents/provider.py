"""Who charges: a small protocol, a simulated provider and one over HTTP.

A charge is made under the order's id as its idempotency key.  Whatever happened to an earlier attempt, asking again under
the same key gives the verdict of the first: so an unknown outcome is asked again, never guessed.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Awaitable
from typing import Any, NamedTuple, Protocol

import aiohttp
import orjson

from orderstream.settings import Settings


class Charge(NamedTuple):
    """What is asked of the provider; ``order_id`` is the idempotency key."""

    order_id: str
    user_id: str
    payment_method: str
    amount_cents: int


class Verdict(NamedTuple):
    """What the provider said: ``charge_id`` None means declined."""

    charge_id: str | None


class OutcomeUnknown(Exception):
    """The provider gave no verdict; ask again under the same key."""


class Provider(Protocol):
    """Charges and refunds.  All of it is idempotent by the order's id."""

    def charge(self, charge: Charge) -> Verdict | Awaitable[Verdict]:
        """Charge, or say why not.  A provider that knows its answer at once gives it at once.

        Raises:
            OutcomeUnknown: also from the awaitable.
        """
        ...

    async def refund(self, order_id: str, charge_id: str, amount_cents: int) -> None:
        """Give a charge back.

        Raises:
            OutcomeUnknown: ask again.
        """
        ...

    async def void(self, order_id: str) -> None:
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

    async def refund(self, order_id: str, charge_id: str, amount_cents: int) -> None:
        """See :class:`Provider`."""

    async def void(self, order_id: str) -> None:
        """See :class:`Provider`; this process remembers it."""
        self._voided.add(order_id)

    async def close(self) -> None:
        """See :class:`Provider`."""


class HttpProvider:
    """A provider over HTTP.

    ``POST {url}/charges`` with ``{"order_id", "user_id", "payment_method", "amount_cents"}`` and ``POST {url}/refunds``
    with ``{"order_id", "charge_id", "amount_cents"}``, both with an ``Idempotency-Key`` header.

    A charge's verdict is a 2xx answer ``{"status": "succeeded", "charge_id": "…"}`` or ``{"status": "declined"}``, or a
    402, whatever it says; a refund or a void is done with a 2xx answer that names no other ``order_id``.  Anything else
    (a timeout, 5xx, 429, a redirect, a broken answer, one that names another ``order_id``, a refused token) is an unknown
    outcome.
    """

    def __init__(self, url: str, *, token: str, timeout_s: float, connections_max: int) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._connections_max = connections_max
        self._session: aiohttp.ClientSession | None = None

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                timeout=self._timeout,
                connector=aiohttp.TCPConnector(limit=self._connections_max),
            )
        return self._session

    async def _post(self, path: str, key: str, body: dict[str, object]) -> tuple[int, Any]:
        try:
            async with self._connected().post(
                f"{self._url}{path}",
                data=orjson.dumps(body),
                headers={"Idempotency-Key": key, "Content-Type": "application/json"},
                allow_redirects=False,  # followed, it would become a GET, and its answer no answer to this question
            ) as answer:
                status, text = answer.status, await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise OutcomeUnknown(f"{path}: {error!r}") from error
        if status != 402 and not 200 <= status < 300:
            raise OutcomeUnknown(f"{path} answered {status}: {text[:200]!r}")
        try:
            answered = orjson.loads(text)
        except orjson.JSONDecodeError:
            answered = None
        # A provider that answers twice on one connection answers the next request with the answer of this one.
        if isinstance(answered, dict) and answered.get("order_id", body["order_id"]) != body["order_id"]:
            raise OutcomeUnknown(f"{path} answered about another order: {text[:200]!r}")
        return status, answered

    async def charge(self, charge: Charge) -> Verdict:
        """See :class:`Provider`."""
        status, body = await self._post("/charges", charge.order_id, charge._asdict())
        if status == 402:
            return Verdict(None)
        if isinstance(body, dict) and body.get("status") == "declined":
            return Verdict(None)
        charge_id = body.get("charge_id") if isinstance(body, dict) and body.get("status") == "succeeded" else None
        if not isinstance(charge_id, str) or not charge_id or not charge_id.isprintable():
            raise OutcomeUnknown(f"/charges gave no verdict: {body!r:.200}")
        return Verdict(charge_id)

    async def refund(self, order_id: str, charge_id: str, amount_cents: int) -> None:
        """See :class:`Provider`."""
        body: dict[str, object] = {"order_id": order_id, "charge_id": charge_id, "amount_cents": amount_cents}
        status, _ = await self._post("/refunds", f"refund-{order_id}", body)
        if status == 402:
            raise OutcomeUnknown("/refunds answered 402")

    async def void(self, order_id: str) -> None:
        """See :class:`Provider`."""
        status, _ = await self._post("/voids", f"void-{order_id}", {"order_id": order_id})
        if status == 402:
            raise OutcomeUnknown("/voids answered 402")

    async def close(self) -> None:
        """See :class:`Provider`."""
        if self._session is not None:
            await self._session.close()


def make_provider(settings: Settings) -> Provider:
    """Return the provider that the settings name."""
    if settings.payment_provider == "http":
        return HttpProvider(
            settings.payment_url,
            token=settings.payment_token,
            timeout_s=settings.payment_timeout_s,
            connections_max=settings.payment_in_flight_max,
        )
    return SimulatedProvider(
        success_rate=settings.payment_success_rate,
        latency_min_s=settings.payment_latency_min_s,
        latency_max_s=settings.payment_latency_max_s,
        seed=settings.payment_seed,
    )
