"""Commands about stock: get, list, receive, adjust and limit."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orderstream.console import say, warn
from orderstream.errors import NotFound, OrderstreamError
from orderstream.jobs.cli.base import HELD_BACK_S, Json, run, settings, uuid_of, with_producer, with_store
from orderstream.jobs.cli.shown import show_products

if TYPE_CHECKING:
    from orderstream.sql.store import Store

app = typer.Typer(no_args_is_help=True, help="Show stock; receive, adjust and limit it.")


async def _products(store: Store, ids: list[str] | None) -> list[dict[str, Any]]:
    rows = await store.products(ids)
    missing = sorted(set(ids or ()) - {row["product_id"] for row in rows})
    if missing:
        raise NotFound(f"no product {', '.join(missing)}: `orderstream stock list` shows all")
    return rows


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        say(json.dumps(rows, indent=2))
    else:
        show_products(rows)


@app.command("get")
def stock_get(
    product_ids: Annotated[list[str], typer.Argument(help="Products.", metavar="PRODUCT…")], as_json: Json = False
) -> None:
    """Show the counts of products."""
    _show(run(with_store(lambda store: _products(store, product_ids))), as_json)


@app.command("list")
def stock_list(as_json: Json = False) -> None:
    """Show the counts of all products."""
    _show(run(with_store(lambda store: _products(store, None))), as_json)


def _command_stock(body: dict[str, Any]) -> None:
    from pydantic import ValidationError

    from orderstream.streams.commands import StockCommand
    from orderstream.streams.orders import describe
    from orderstream.streams.producer import Outbox

    try:
        command = StockCommand.model_validate(body)
    except ValidationError as error:
        raise OrderstreamError(describe(error)) from None
    ours, product_id, command_id = settings(), str(command.product_id), str(command.command_id)

    async def work(store: Store) -> list[dict[str, Any]] | None:
        await _products(store, [product_id])
        outbox = Outbox(ours)
        outbox.stock_command(product_id, command.model_dump_json().encode())
        await with_producer(lambda producer: producer.send(outbox.handovers()))
        deadline = time.monotonic() + HELD_BACK_S
        while not await store.stock_command_seen(command_id):
            if time.monotonic() > deadline:
                return None
            await asyncio.sleep(0.05)
        return await _products(store, [product_id])

    rows = run(with_store(work))
    if rows is None:
        warn(
            f"command {command_id} was sent and not carried out within {HELD_BACK_S:.0f} s: is a worker running, are "
            f"there as many units available?  A refused one is among the dead letters."
        )
        raise typer.Exit(1)
    show_products(rows)


CommandId = Annotated[str | None, typer.Option("--command-id", help="A UUID: a repeated command changes nothing.")]


@app.command("receive")
def stock_receive(
    product_id: Annotated[str, typer.Argument(help="Product.")],
    quantity: Annotated[int, typer.Argument(min=1, help="Units that came in.")],
    command_id: CommandId = None,
) -> None:
    """Add units that came in.

    orderstream stock receive 1 50
    """
    known = uuid_of(command_id, "command id") if command_id else str(uuid.uuid4())
    _command_stock({"command": "receive", "command_id": known, "product_id": product_id, "quantity": quantity})


@app.command("adjust", context_settings={"ignore_unknown_options": True})
def stock_adjust(
    product_id: Annotated[str, typer.Argument(help="Product.")],
    quantity: Annotated[int, typer.Argument(help="Units to add, or with a minus to remove.")],
    reason: Annotated[str, typer.Option(help="Why: kept in the ledger.")],
    command_id: CommandId = None,
) -> None:
    """Correct the count, and say why. Units that are held or sold can't be removed.

    orderstream stock adjust 1 -3 --reason "broken in the warehouse"
    """
    known = uuid_of(command_id, "command id") if command_id else str(uuid.uuid4())
    body = {"command": "adjust", "command_id": known, "product_id": product_id, "quantity": quantity, "reason": reason}
    _command_stock(body)


@app.command("limit")
def stock_limit(
    product_id: Annotated[str, typer.Argument(help="Product.")],
    units: Annotated[
        int | None, typer.Argument(min=1, max=2_147_483_647, help="Units that one user may have, over all orders.")
    ] = None,
    none: Annotated[bool, typer.Option("--none", help="No limit any more.")] = False,
) -> None:
    """Limit how many units of a product one user may have, over all of their orders; without units: show the limit.

    Held and sold units count; what is released or returned does not. A user who has more already keeps it, and gets no more.

    orderstream stock limit 1 2
    """
    if none and units is not None:
        raise typer.BadParameter("give units, or --none")

    from orderstream.sql.limit import set_limit

    async def work(store: Store) -> list[dict[str, Any]]:
        if none or units is not None:
            await _products(store, [product_id])
            ours = settings()
            await with_producer(lambda producer: set_limit(ours, store, producer, product_id, units))
        return await _products(store, [product_id])

    (row,) = run(with_store(work))
    limit = row["limit_per_user"]
    say(f"{product_id}  " + (f"at most {limit} units a user" if limit is not None else "no limit"))
