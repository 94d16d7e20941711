"""Products over HTTP: any client reads them; an admin changes them, moves their stock and reads what was moved.

A change is a record on ``stock-commands`` that the product's owner decides.  The request waits until Postgres has the
decision.  The id of a command that moves stock follows from the product and the ``Idempotency-Key``, so a repeat is the same
command: it gets the same answer, or is produced again while there is none.  What a product is to be is said again as it is.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable
from typing import Any, TypeVar

from aiohttp import web
from pydantic import TypeAdapter, ValidationError

from orderstream.errors import EngineUnavailable
from orderstream.http.answers import json_answer
from orderstream.http.health import Presence
from orderstream.http.models import (
    LedgerEntry,
    LedgerPage,
    PageQuery,
    Product,
    ProductChange,
    ProductsPage,
    StockChange,
    StockChanged,
    StockPending,
)
from orderstream.http.orders import READ_S
from orderstream.http.problems import Problem, engine_unavailable
from orderstream.http.producer import OrderProducer
from orderstream.http.reading import (
    body_of,
    cursor,
    foreign_cursor,
    moment_cursor,
    moment_place,
    place,
    query_of,
    required_key,
)
from orderstream.http.security import Admins
from orderstream.settings import Settings
from orderstream.sql.store import TRANSIENT, Store, content_of
from orderstream.streams.commands import ON_HAND_MAX, StockCommand
from orderstream.streams.orders import ORDER_NAMESPACE, Id, describe

T = TypeVar("T")

PATH = "/api/v1/products"
POLL_S = 0.05
"""How often Postgres is asked what became of a stock command."""

_ID: TypeAdapter[Any] = TypeAdapter(Id)


class Products:
    """The handlers of ``/api/v1/products`` and what they share."""

    def __init__(self, settings: Settings, store: Store, producer: OrderProducer, presence: Presence) -> None:
        self._settings, self._store, self._producer, self._presence = settings, store, producer, presence
        self._admins = Admins(settings)
        self._under_way: dict[str, StockCommand] = {}

    # For every client

    async def list(self, request: web.Request) -> web.Response:
        """Return a page of the catalogue."""
        asked = query_of(request, PageQuery)
        after = "" if asked.cursor is None else place(asked.cursor, str)[0]
        if "\0" in after:
            raise foreign_cursor()
        rows = await self._read(self._store.products_page(after, asked.limit + 1))
        more = cursor(rows[asked.limit - 1]["product_id"]) if len(rows) > asked.limit else None
        return json_answer(ProductsPage(products=[Product(**row) for row in rows[: asked.limit]], next=more))

    async def read(self, request: web.Request) -> web.Response:
        """Return a product."""
        product_id = _product_id(request)
        return json_answer(await self._product(product_id))

    # For admins

    async def put(self, request: web.Request) -> web.Response:
        """Create a product without units (201), or change its name, price and limit (200); 202: not decided yet."""
        self._admins.check(request)
        product_id = _product_id(request)
        asked = await body_of(request, ProductChange)
        ids: dict[str, Any] = {"command_id": uuid.uuid4(), "product_id": product_id}
        commands = [StockCommand(command="product", **ids, name=asked.name, price_cents=asked.price_cents)]
        if "limit_per_user" in asked.model_fields_set:
            ids["command_id"] = uuid.uuid4()
            commands.append(StockCommand(command="limit", **ids, limit_per_user=asked.limit_per_user))
        for command in commands:
            await self._produce(command, "Send it again as it is.")
        last = commands[-1]
        if await self._decided(str(last.command_id)) is None:
            return _pending(last)
        made = await self._read(self._store.stock_command(str(commands[0].command_id)))
        fresh = made is not None and made["change"] == 1
        headers = {"Location": str(request.rel_url)} if fresh else None
        return json_answer(await self._product(product_id), 201 if fresh else 200, headers)

    async def move(self, request: web.Request) -> web.Response:
        """Receive, adjust or set stock: 200 carried out, 409 refused, 202 not decided yet."""
        self._admins.check(request)
        product_id = _product_id(request)
        key = required_key(request)
        asked = await body_of(request, StockChange)
        command = _command(product_id, key, asked)
        command_id = str(command.command_id)
        under_way = self._under_way.get(command_id)
        if under_way is not None:
            if under_way != command:
                raise _reused()
            detail = "Another request with this key is not answered yet. Come again when it is."
            raise Problem("request-in-progress", detail, headers={"Retry-After": "1"})
        self._under_way[command_id] = command
        try:
            return await self._move(command)
        finally:
            del self._under_way[command_id]

    async def ledger(self, request: web.Request) -> web.Response:
        """Return a page of what people and deliveries moved of a product."""
        self._admins.check(request)
        product_id = _product_id(request)
        asked = query_of(request, PageQuery)
        before = moment_place(asked.cursor)
        await self._product(product_id)
        rows = await self._read(self._store.ledger_page(product_id, before, asked.limit + 1))
        last = rows[asked.limit - 1] if len(rows) > asked.limit else None
        more = None if last is None else moment_cursor(last["at"], last["source_id"])
        return json_answer(LedgerPage(entries=[LedgerEntry(**row) for row in rows[: asked.limit]], next=more))

    # How it is done

    async def _produce(self, command: StockCommand, advice: str) -> None:
        try:
            await self._producer.stock_command(str(command.product_id), command.encode())
        except EngineUnavailable as error:
            detail = f"Whether the command was taken in is not known. {advice}"
            raise engine_unavailable(error, detail, command_id=str(command.command_id)) from error

    async def _move(self, command: StockCommand) -> web.Response:
        command_id, product_id = str(command.command_id), str(command.product_id)
        decided = await self._read(self._store.stock_command(command_id))
        if decided is None:
            await self._product(product_id)
            await self._produce(command, "Send it again with the same Idempotency-Key.")
            decided = await self._decided(command_id)
        if decided is None:
            return _pending(command)
        if command.content != content_of(decided):
            raise _reused()
        if decided["outcome"] == "unknown_product":
            raise _unknown(product_id)
        if decided["outcome"] == "insufficient_stock":
            detail = (
                f"More units of product {product_id} were held than {command.quantity}; nothing was changed."
                if command.command == "set"
                else f"Product {product_id} had fewer units available than {-command.quantity}; nothing was changed."
            )
            raise Problem("stock-too-low", detail, command_id=command_id)
        if decided["outcome"] == "too_many_units":
            raise Problem("stock-too-high", f"No product has more than {ON_HAND_MAX} units.", command_id=command_id)
        return json_answer(StockChanged(**{**decided, "reason": decided["reason"] or None}))

    async def _decided(self, command_id: str) -> dict[str, Any] | None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.verdict_timeout_s
        while True:
            try:
                async with asyncio.timeout(READ_S):
                    decided = await self._store.stock_command(command_id)
            except TRANSIENT as error:
                self._presence.unanswered(error, "stock commands are answered 202")
                return None
            if decided is not None or loop.time() >= deadline:
                return decided
            await asyncio.sleep(POLL_S)

    async def _product(self, product_id: str) -> Product:
        rows = await self._read(self._store.products([product_id]))
        if not rows:
            raise _unknown(product_id)
        return Product(**{name: rows[0][name] for name in Product.model_fields})

    async def _read(self, question: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(READ_S):
                answer = await question
        except TRANSIENT as error:
            raise engine_unavailable(
                self._presence.unanswered(error, "products can't be read"), "Come again."
            ) from error
        self._presence.answered()
        return answer


def _product_id(request: web.Request) -> str:
    try:
        return str(_ID.validate_python(request.match_info["id"]))
    except ValidationError as error:
        raise Problem("invalid-request", f"product id: {describe(error).removeprefix('record: ')}") from None


def _command(product_id: str, key: str, asked: StockChange) -> StockCommand:
    try:
        return StockCommand(
            command=asked.command,
            command_id=uuid.uuid5(ORDER_NAMESPACE, f"stock\0{product_id}\0{key}"),
            product_id=product_id,
            quantity=asked.quantity,
            reason=asked.reason or "",
        )
    except ValidationError as error:
        raise Problem("invalid-request", describe(error).removeprefix("record: ")) from None


def _pending(command: StockCommand) -> web.Response:
    pending = StockPending(command_id=command.command_id, product_id=str(command.product_id), outcome="pending")
    return json_answer(pending, 202)


def _unknown(product_id: str) -> Problem:
    return Problem("product-not-found", "The catalogue has no such product.", product_id=product_id)


def _reused() -> Problem:
    detail = "This key belongs to another change of this product's stock. Take a new one for a new change."
    return Problem("idempotency-key-reused", detail)
