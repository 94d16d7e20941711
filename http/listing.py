"""Lists of orders, a page at a time, newest first.

A page is found by the place where the page before ended (a keyset), so the last page costs what the first one costs.  The
status of an order is in no index, since that would slow every change of an order.  So a page with a status reads at most
:data:`SCANNED_MAX` orders, and may come back short, or empty, with a ``next``.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from orderstream.errors import EngineUnavailable
from orderstream.http.answers import json_answer
from orderstream.http.models import OrderHead, OrdersPage, OrdersQuery
from orderstream.http.orders import READ_S
from orderstream.http.postgres import Postgres
from orderstream.http.problems import engine_unavailable
from orderstream.http.reading import moment_cursor, moment_place, query_of
from orderstream.http.security import Access, not_yours

SCANNED_MAX = 5_000
"""Orders that one page with a status reads: some milliseconds."""


class Listing:
    """The handler of ``GET /api/v1/orders``."""

    def __init__(self, postgres: Postgres, access: Access) -> None:
        self._postgres, self._access = postgres, access

    async def list(self, request: web.Request) -> web.Response:
        """Return a page of a customer's orders; an admin may see those of all."""
        customer = self._access.customer(request)
        asked = query_of(request, OrdersQuery)
        if customer is None and asked.user_id is None:
            self._access.admin(request)
        elif customer is not None and asked.user_id not in (None, customer):
            raise not_yours()
        user_id = customer or asked.user_id
        before = moment_place(asked.cursor)
        scanned = asked.limit + 1 if asked.status is None else SCANNED_MAX
        try:
            rows = await self._postgres.ask(
                lambda store: store.orders_page(user_id, asked.status, before, asked.limit + 1, scanned),
                READ_S,
                "orders can't be read",
            )
        except EngineUnavailable as error:
            raise engine_unavailable(error, "Come again.") from error
        found = [row for row in rows if not row["edge"]]
        last = found[asked.limit - 1] if len(found) > asked.limit else next((row for row in rows if row["edge"]), None)
        after = None if last is None else moment_cursor(last["created_at"], last["order_id"])
        return json_answer(OrdersPage(orders=[head(row) for row in found[: asked.limit]], next=after))


def head(row: Any) -> OrderHead:
    """Return an order without its lines, as clients read it."""
    return OrderHead(
        id=row["order_id"],
        user_id=row["user_id"],
        total_amount=row["total_cents"],
        status=row["status"],
        reason=row["reason"],
        idempotency_key=row["idempotency_key"],
        payment_method=row["payment_method"],
        placed_at=row["placed_at"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )
