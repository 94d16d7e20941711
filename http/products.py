"""Products over HTTP: any client reads them; an admin changes them, moves their stock and reads what was moved.

A change is a record on ``stock-commands`` that the product's owner decides.  The request waits until Postgres has the
decision.  The id of a command that moves stock follows from the product and the ``Idempotency-Key``, so a repeat is the same
command: it gets the same answer, or is produced again while there is none.  What a product is to be is said again as it is.

An entity tag has two parts: of what people change (:class:`~orderstream.streams.commands.ProductState`), and of the counts.
``If-Match`` compares the first one only, since a sale in between takes nothing back from anybody.  What the product was the
owner compares again when it decides.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import orjson
from aiohttp import ETag, web
from pydantic import TypeAdapter, ValidationError

from orderstream.errors import EngineUnavailable
from orderstream.http.answers import json_answer
from orderstream.http.models import (
    LedgerEntry,
    LedgerPage,
    PageQuery,
    Product,
    ProductChange,
    ProductsPage,
    ProductsQuery,
    StockChange,
    StockChanged,
    StockPending,
)
from orderstream.http.orders import READ_S
from orderstream.http.postgres import Postgres
from orderstream.http.problems import Problem, engine_unavailable
from orderstream.http.producer import OrderProducer
from orderstream.http.reading import (
    body_of,
    moment_cursor,
    moment_place,
    query_of,
    refuse_no_utf8,
    required_key,
)
from orderstream.http.security import Access
from orderstream.settings import Settings
from orderstream.sql.store import Store, content_of
from orderstream.streams.commands import ON_HAND_MAX, ProductId, ProductState, StockCommand
from orderstream.streams.orders import ORDER_NAMESPACE, describe

T = TypeVar("T")

PATH = "/api/v1/products"
POLL_S = 0.05
"""How often Postgres is asked what became of a stock command."""

_ID: TypeAdapter[Any] = TypeAdapter(ProductId)


class Products:
    """The handlers of ``/api/v1/products`` and what they share."""

    def __init__(self, settings: Settings, postgres: Postgres, producer: OrderProducer, access: Access) -> None:
        self._settings, self._postgres, self._producer, self._access = settings, postgres, producer, access
        self._under_way: dict[str, StockCommand] = {}

    # For every client

    async def list(self, request: web.Request) -> web.Response:
        """Return a page of the catalogue."""
        asked = query_of(request, ProductsQuery)
        rows = await self._read(
            lambda store: store.products_page(asked.cursor or "", asked.limit + 1, retired=asked.retired)
        )
        more = rows[asked.limit - 1]["product_id"] if len(rows) > asked.limit else None
        return json_answer(ProductsPage(products=[Product(**row) for row in rows[: asked.limit]], next=more))

    async def read(self, request: web.Request) -> web.Response:
        """Return a product; 304: as the client has it."""
        product = await self._product(_product_id(request))
        tag = tag_of(product)
        headers = {"ETag": f'"{tag}"', "Cache-Control": "no-cache"}
        if any(known.value in ("*", tag) for known in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return json_answer(product, headers=headers)

    # For admins

    async def put(self, request: web.Request) -> web.Response:
        """Create a product without units (201), or change it (200); 202: not decided yet."""
        admin, product_id = self._access.admin(request), _product_id(request)
        asked = await body_of(request, ProductChange)
        members = asked.model_dump(exclude_unset=True)
        if members.get("retired", True) is None:
            del members["retired"]
        command = StockCommand(
            command="product",
            command_id=uuid.uuid4(),
            product_id=product_id,
            actor=admin,
            **members,
            **await self._condition(request, product_id),
        )
        await self._produce(command, "Send it again as it is.")
        decided = await self._decided(str(command.command_id))
        if decided is None:
            return _pending(command)
        if decided["outcome"] == "product_changed":
            raise _changed(product_id)
        product = await self._product(product_id)
        fresh = decided["change"] == 1
        headers = {"ETag": f'"{tag_of(product)}"'} | ({"Location": str(request.rel_url)} if fresh else {})
        return json_answer(product, 201 if fresh else 200, headers)

    async def _condition(self, request: web.Request, product_id: str) -> dict[str, Any]:
        """Return what the product has to be when a change is decided, if the request says so.

        Raises:
            Problem: ``precondition-failed``, it is not so now.
        """
        wanted, unwanted = request.if_match, request.if_none_match
        if wanted is None and unwanted is None:
            return {}
        rows = await self._read(lambda store: store.products([product_id]))
        there = [tag_of(_shown(row)).partition(".")[0] for row in rows]

        def named(tags: Sequence[ETag]) -> bool:
            return any(tag.value == "*" or (not tag.is_weak and tag.value.partition(".")[0] in there) for tag in tags)

        if (wanted is not None and not (rows and named(wanted))) or (unwanted is not None and rows and named(unwanted)):
            raise _changed(product_id)
        return {"was": ProductState.of(rows[0]) if rows else None}

    async def move(self, request: web.Request) -> web.Response:
        """Receive, adjust or set stock: 200 carried out, 409 refused, 202 not decided yet."""
        admin = self._access.admin(request)
        product_id = _product_id(request)
        key = required_key(request)
        asked = await body_of(request, StockChange)
        command = _command(product_id, key, asked, admin)
        command_id = str(command.command_id)
        under_way = self._under_way.get(command_id)
        if under_way is not None:
            if under_way.content != command.content:
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
        self._access.admin(request)
        product_id = _product_id(request)
        asked = query_of(request, PageQuery)
        before = moment_place(asked.cursor)
        await self._product(product_id)
        rows = await self._read(lambda store: store.ledger_page(product_id, before, asked.limit + 1))
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
        decided = await self._read(lambda store: store.stock_command(command_id))
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
                decided = await self._postgres.ask(
                    lambda store: store.stock_command(command_id), READ_S, "stock commands are answered 202"
                )
            except (EngineUnavailable, Problem):
                return None
            if decided is not None or loop.time() >= deadline:
                return decided
            await asyncio.sleep(POLL_S)

    async def _product(self, product_id: str) -> Product:
        rows = await self._read(lambda store: store.products([product_id]))
        if not rows:
            raise _unknown(product_id)
        return _shown(rows[0])

    async def _read(self, question: Callable[[Store], Awaitable[T]]) -> T:
        try:
            return await self._postgres.ask(question, READ_S, "products can't be read")
        except EngineUnavailable as error:
            raise engine_unavailable(error, "Come again.") from error


def _product_id(request: web.Request) -> str:
    refuse_no_utf8(request.rel_url.raw_path, "product id")
    try:
        return str(_ID.validate_python(request.match_info["id"]))
    except ValidationError as error:
        raise Problem("invalid-request", f"product id: {describe(error).removeprefix('record: ')}") from None


def tag_of(product: Product) -> str:
    """Return the entity tag of a product."""
    counts = ("available", "reserved", "sold")
    parts = (product.model_dump(exclude={*counts}), product.model_dump(include={*counts}))
    return ".".join(hashlib.blake2b(orjson.dumps(part), digest_size=8).hexdigest() for part in parts)


def _shown(row: Mapping[str, Any]) -> Product:
    return Product(**{name: row[name] for name in Product.model_fields})


def _command(product_id: str, key: str, asked: StockChange, admin: str) -> StockCommand:
    try:
        return StockCommand(
            command=asked.command,
            command_id=uuid.uuid5(ORDER_NAMESPACE, f"stock\0{product_id}\0{key}"),
            product_id=product_id,
            quantity=asked.quantity,
            reason=asked.reason or "",
            actor=admin,
        )
    except ValidationError as error:
        raise Problem("invalid-request", describe(error).removeprefix("record: ")) from None


def _pending(command: StockCommand) -> web.Response:
    pending = StockPending(command_id=command.command_id, product_id=str(command.product_id), outcome="pending")
    return json_answer(pending, 202)


def _unknown(product_id: str) -> Problem:
    return Problem("product-not-found", "The catalogue has no such product.", product_id=product_id)


def _changed(product_id: str) -> Problem:
    detail = "It is not, or no longer, as the request says. Read it again, and decide anew."
    return Problem("precondition-failed", detail, product_id=product_id)


def _reused() -> Problem:
    detail = "This key belongs to another change of this product's stock. Take a new one for a new change."
    return Problem("idempotency-key-reused", detail)
