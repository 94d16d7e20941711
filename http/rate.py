"""How many requests a second one client may send, counted in Redis over all ingresses by one script.

While Redis is unavailable every request passes.  The limit is against the haste of one client, so it would be worse to
refuse all of them for want of a counter.  What the pipeline can't take it refuses by itself (``overloaded``).
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from importlib.resources import files

import redis.asyncio as redis
import structlog
from aiohttp import hdrs, web
from redis.exceptions import RedisError

from orderstream.http.problems import Handler, Problem
from orderstream.settings import Settings

log = structlog.get_logger("ingress")

ASK_S = 0.25
"""Longest wait for Redis's answer; then the request passes."""

UNAVAILABLE_PAUSE_S = 1.0
"""How long a Redis that did not answer is not asked again, so that an outage costs each request no time-out."""

LIMITED = "/api/"
"""Where requests count; health, metrics and the documents don't."""

IPV6_PREFIX = 64
"""One client has such a network, hence all its addresses."""


class Allowance:
    """The limit of each client (settings ``rate_limit_per_s`` and ``rate_limit_burst``)."""

    def __init__(self, settings: Settings, client: redis.Redis) -> None:
        self._per_s, self._burst = settings.rate_limit_per_s, settings.rate_limit_burst
        self._hops = settings.forwarded_hops
        self._prefix = f"{settings.redis_prefix}:rate:"
        self._take = client.register_script((files("orderstream") / "lua" / "rate.lua").read_text())
        self._unavailable_until = 0.0
        self._unavailable = False
        self.policy = f'"client";q={self._burst};w={max(1, math.ceil(self._burst / self._per_s))}'

    async def take(self, request: web.Request) -> dict[str, str]:
        """Count a request; return the headers of its answer.

        Raises:
            Problem: ``rate-limited``.
        """
        if time.monotonic() < self._unavailable_until:
            return {}
        who = client_of(request, self._hops)
        try:
            async with asyncio.timeout(ASK_S):
                allowed, left, next_us, whole_us = await self._take(
                    keys=[self._prefix + who], args=[math.ceil(1e6 / self._per_s), self._burst]
                )
        except (RedisError, OSError, TimeoutError) as error:
            self._unavailable_until = time.monotonic() + UNAVAILABLE_PAUSE_S
            if not self._unavailable:
                self._unavailable = True
                log.warning("requests are not counted: redis does not answer", error=repr(error))
            return {}
        if self._unavailable:
            self._unavailable = False
            log.warning("requests are counted again")
        headers = {
            "RateLimit-Policy": self.policy,
            "RateLimit": f'"client";r={left};t={math.ceil((whole_us if allowed else next_us) / 1e6)}',
        }
        if not allowed:
            wait_s = max(1, math.ceil(next_us / 1e6))
            detail = f"More than {self._per_s:g} requests a second came from this client. Come again in {wait_s} s."
            raise Problem("rate-limited", detail, headers={**headers, "Retry-After": str(wait_s)})
        return headers


ALLOWANCE = web.AppKey("allowance", Allowance)


def client_of(request: web.Request, hops: int) -> str:
    """Return who asks: the address of the connection, or the one that the outermost proxy of ours saw.

    Args:
        request: the request.
        hops: how many proxies of ours append to ``X-Forwarded-For``; any client can write what comes before their entries.
    """
    address = request.remote or "unknown"
    if hops:
        header = ",".join(request.headers.getall("X-Forwarded-For", []))
        entries = [entry.strip() for entry in header.split(",") if entry.strip()]
        if entries:
            address = entries[-min(hops, len(entries))]
    return network_of(address)


def network_of(address: str) -> str:
    """Return whom an address counts for: itself, or the network of an IPv6 one; ``unknown`` for what is no address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"  # all of them share one allowance
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, IPV6_PREFIX), strict=False))
    return str(ip)


@web.middleware
async def limited(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count a request to the API, if there is a limit; the answer says how much of it is left.

    A browser asks for itself whether a page may ask (CORS): that counts for nobody, and no page could read a refusal of it.
    """
    allowance = request.app.get(ALLOWANCE)
    preflight = request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
    if allowance is None or preflight or not request.path.startswith(LIMITED):
        return await handler(request)
    headers = await allowance.take(request)
    try:
        response = await handler(request)
    except Problem as problem:
        problem.headers = {**headers, **problem.headers}
        raise
    if not response.prepared:
        response.headers.update(headers)
    return response
