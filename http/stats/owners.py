"""Which worker owns a key, and asking it: Faust's router with our tables' partitioning, and an end to forwarding.

Faust's own router hashes a key as the changelog writes it, in JSON with quotes; ours places a product as its topics do, and
is told an order's home.  And during a rebalance two workers may each take the other one for the owner, and would forward a
request for ever: here one that was forwarded is answered where it is.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import structlog
from aiohttp import ClientError, ClientTimeout
from aiohttp.web import Response
from faust.exceptions import SameNode
from yarl import URL

from orderstream.http.problems import Problem
from orderstream.settings import Settings
from orderstream.streams.partitions import product_partition
from orderstream.streams.upstream.web import Router

log = structlog.get_logger("pages")

FORWARDED = "Orderstream-Forwarded"
"""Header of a request that another worker has passed on."""

ASK_S = 3.0
"""Longest wait for another worker's answer."""

_ANY_ADDRESS = frozenset({"0.0.0.0", "::", ""})


def advertised_url(settings: Settings) -> URL:
    """Return the URL at which other workers reach this one's pages.

    It names the worker in the group, so no two may share it: one that listens at every address takes its machine's name.
    """
    if settings.web_url:
        return URL(settings.web_url)
    host = socket.gethostname() if settings.web_host in _ANY_ADDRESS else settings.web_host
    return URL.build(scheme="http", host=host, port=settings.web_port)


def unowned() -> Problem:
    """Make the problem of a key that no worker owns, or that each of two takes for the other one's."""
    return Problem(
        "owner-unavailable", "Partitions are being rebalanced, so no worker owns this now. Ask again in a moment."
    )


class OwnerRouter(Router):
    """Faust's ``app.router``: finds the worker whose table has a key, and asks it."""

    def key_store(self, table_name: str, key: str) -> URL:
        """Return the URL of the worker that has this product of a table.

        Raises:
            KeyError: no worker has it now.
        """
        return self.owner(table_name, product_partition(key, self.app.tables[table_name].partitions))

    async def route_req(self, table_name: str, key: str, web: Any, request: Any) -> Any:
        """Ask the owner of a product for the answer to a request; Faust's table routes call this.  Raises as :meth:`at`."""
        return await self.at(table_name, product_partition(key, self.app.tables[table_name].partitions), request)

    async def at(self, table_name: str, partition: int, request: Any) -> Any:
        """Ask the owner of a table's partition for the answer to a request.

        Raises:
            SameNode: this worker is the owner; it answers by itself.
            Problem: ``owner-unavailable``, no worker owns the key now, or its owner does not answer.
        """
        try:
            url = self.owner(table_name, partition)
        except KeyError:
            raise unowned() from None
        if self.is_self(url):
            raise SameNode
        if FORWARDED in request.headers:
            raise unowned()
        try:
            status, content_type, body = await self.ask(url, request.rel_url, request.method)
        except (ClientError, TimeoutError, OSError) as error:
            log.warning("another worker does not answer", owner=str(url), error=repr(error))
            raise Problem(
                "owner-unavailable", "The worker that owns this does not answer. Another one takes over within seconds."
            ) from None
        return Response(status=status, body=body, content_type=content_type)

    async def ask(self, worker: URL, path: URL, method: str = "GET") -> tuple[int, str, bytes]:
        """Ask another worker's pages; return status, content type and body.

        Raises:
            ClientError, TimeoutError, OSError: it does not answer.
        """
        url = worker.join(URL.build(path=path.raw_path, query_string=path.raw_query_string, encoded=True))
        async with (
            asyncio.timeout(ASK_S),
            self.app.http_client.request(
                method, url, headers={FORWARDED: "1"}, allow_redirects=False, timeout=ClientTimeout(total=ASK_S)
            ) as answer,
        ):
            return answer.status, answer.content_type, await answer.read()
