"""Commands about stock: get, list, receive, adjust, set, product and limit."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
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

app = typer.Typer(no_args_is_help=True, help="Show stock; receive, adjust and set it; name, price and limit products.")


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


def _command_stock(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Send a stock command and return its product once it is carried out."""
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
        if command.command != "product":
            await _products(store, [product_id])
        outbox = Outbox(ours)
        outbox.stock_command(product_id, command.encode())
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
            f"there as many units available?  A refused one is among the dead letters.  The same again, with --command-id "
            f"{command_id}, counts once."
        )
        raise typer.Exit(1)
    return rows


CommandId = Annotated[str | None, typer.Option("--command-id", help="A UUID: a repeated command changes nothing.")]


def _body(command: str, command_id: str | None, product_id: str, **more: Any) -> dict[str, Any]:
    known = uuid_of(command_id, "command id") if command_id else str(uuid.uuid4())
    with contextlib.suppress(OSError, KeyError):  # this account has no name
        more["actor"] = getpass.getuser()
    return {"command": command, "command_id": known, "product_id": product_id, **more}


@app.command("receive")
def stock_receive(
    product_id: Annotated[str, typer.Argument(help="Product.")],
    quantity: Annotated[int, typer.Argument(min=1, help="Units that came in.")],
    command_id: CommandId = None,
) -> None:
    """Add units that came in.

    orderstream stock receive 1 50
    """
    show_products(_command_stock(_body("receive", command_id, product_id, quantity=quantity)))


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
    show_products(_command_stock(_body("adjust", command_id, product_id, quantity=quantity, reason=reason)))


@app.command("product")
def stock_product(
    product_id: Annotated[str, typer.Argument(help="Product.")],
    name: Annotated[str | None, typer.Option(help="Its name.")] = None,
    price_cents: Annotated[int | None, typer.Option(min=0, help="Its price; orders held before keep theirs.")] = None,
    command_id: CommandId = None,
) -> None:
    """Change a product's name or price; with both, make one that is not there, without units.

    orderstream stock product cup --name "Tea cup" --price-cents 300
    """
    given = {"name": name, "price_cents": price_cents}
    given = {member: value for member, value in given.items() if value is not None}
    show_products(_command_stock(_body("product", command_id, product_id, **given)))


@app.command("set")
def stock_set(
    product_id: Annotated[str, typer.Argument(help="Product.")],
    quantity: Annotated[int, typer.Argument(min=0, help="Units in the house, held ones included.")],
    reason: Annotated[str, typer.Option(help="Why: kept in the ledger.")],
    command_id: CommandId = None,
) -> None:
    """Set the count to what is in the house, and say why. Units that are held can't be set aside.

    orderstream stock set 1 40 --reason "stocktaking"
    """
    show_products(_command_stock(_body("set", command_id, product_id, quantity=quantity, reason=reason)))


@app.command("limit")
def stock_limit(
    product_id: Annotated[str, typer.Argument(help="Product.")],
    units: Annotated[
        int | None, typer.Argument(min=1, max=2_147_483_647, help="Units that one user may have, over all orders.")
    ] = None,
    none: Annotated[bool, typer.Option("--none", help="No limit any more.")] = False,
    command_id: CommandId = None,
) -> None:
    """Limit how many units of a product one user may have, over all of their orders; without units: show the limit.

    Held and sold units count; what is released or returned does not. A user who has more already keeps it, and gets no more.

    orderstream stock limit 1 2
    """
    if none and units is not None:
        raise typer.BadParameter("give units, or --none")

    if none or units is not None:
        (row,) = _command_stock(_body("limit", command_id, product_id, limit_per_user=units))
    else:
        (row,) = run(with_store(lambda store: _products(store, [product_id])))
    limit = row["limit_per_user"]
    say(f"{product_id}  " + (f"at most {limit} units a user" if limit is not None else "no limit"))
