"""Commands about stock: get, list, receive, adjust, set, import and limit."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orderstream.console import say, warn
from orderstream.errors import NotFound, OrderstreamError
from orderstream.jobs.cli.base import (
    HELD_BACK_S,
    Json,
    map_of,
    repeatable,
    run,
    say_again,
    settings,
    uuid_of,
    with_producer,
    with_store,
)
from orderstream.jobs.cli.shown import FAULTS_SHOWN_MAX, show_faults, show_products

if TYPE_CHECKING:
    from orderstream.sql.store import Store

app = typer.Typer(
    no_args_is_help=True, help="Show stock; receive, adjust and set it, of one product or a file; limit products."
)


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


def command_stock(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Send a stock command and return its product once it is carried out.

    Raises:
        OrderstreamError: it is none, is refused, or is about a product that is not there.
        Exit: it was not decided in time.
    """
    from pydantic import ValidationError

    from orderstream.sql.store import content_of, query
    from orderstream.streams.commands import WHY, StockCommand
    from orderstream.streams.orders import describe
    from orderstream.streams.producer import Outbox
    from orderstream.streams.topics import STOCK_COMMANDS

    try:
        command = StockCommand.model_validate(body)
    except ValidationError as error:
        raise OrderstreamError(describe(error)) from None
    ours, product_id, command_id = settings(), str(command.product_id), str(command.command_id)

    async def work(store: Store) -> list[dict[str, Any]] | None:
        if command.command != "product":
            await _products(store, [product_id])
        outbox, began = Outbox(ours), await store.pool.fetchval(query("now"))
        outbox.stock_command(product_id, command.encode())
        await with_producer(lambda producer: producer.send(outbox.handovers()), STOCK_COMMANDS)
        deadline = time.monotonic() + HELD_BACK_S
        while time.monotonic() < deadline:
            decided = await store.stock_command(command_id)
            if decided is not None and content_of(decided) != command.content:
                raise OrderstreamError(f"order_id_reused: {command_id} is the id of another command already")
            if decided is not None and decided["outcome"] == "applied":
                return await _products(store, [product_id])
            if decided is not None and decided["decided_at"] >= began:
                raise OrderstreamError(f"{decided['outcome']}: product {product_id} {WHY[decided['outcome']]}")
            await asyncio.sleep(0.05)
        return None

    again = ["--command-id", command_id]
    with repeatable(lambda: again):
        rows = run(with_store(work))
    if rows is None:
        warn(f"command {command_id} was sent and not decided within {HELD_BACK_S:.0f} s: is a worker running?")
        say_again(*again)
        raise typer.Exit(1)
    return rows


CommandId = Annotated[str | None, typer.Option("--command-id", help="A UUID: a repeated command changes nothing.")]


def body_of(command: str, command_id: str | None, product_id: str, **more: Any) -> dict[str, Any]:
    """Return a stock command as its record is; with a new id where none is given."""
    known = uuid_of(command_id, "command id") if command_id else str(uuid.uuid4())
    return {"command": command, "command_id": known, "product_id": product_id, **actor(), **more}


def actor() -> dict[str, str]:
    """Return who gives commands, as a member of them; nothing where this account has no name."""
    with contextlib.suppress(OSError, KeyError):
        return {"actor": getpass.getuser()}
    return {}


@app.command("receive")
def stock_receive(
    product_id: Annotated[str, typer.Argument(help="Product.")],
    quantity: Annotated[int, typer.Argument(min=1, help="Units that came in.")],
    command_id: CommandId = None,
) -> None:
    """Add units that came in.

    orderstream stock receive 1 50
    """
    show_products(command_stock(body_of("receive", command_id, product_id, quantity=quantity)))


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
    show_products(command_stock(body_of("adjust", command_id, product_id, quantity=quantity, reason=reason)))


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
    show_products(command_stock(body_of("set", command_id, product_id, quantity=quantity, reason=reason)))


@app.command("import")
def stock_import(
    file: Annotated[
        Path,
        typer.Argument(
            help="A table with product and quantity; name and price too, for new products; - for the input."
        ),
    ],
    reason: Annotated[str, typer.Option(help="Why: kept in the ledger.")] = "import",
    *,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="COLUMN=FIELD",
            help="Which column is which: product, quantity, name or price (like 2.55). May be repeated.",
        ),
    ] = None,
    run_as: Annotated[
        str | None, typer.Option("--run", help="Repeat the run of this id, as it was named: it counts once.")
    ] = None,
) -> None:
    """Set the units of many products to what a file says is in the house, held ones included; name and price them.

    The file is read whole first: where any row is at fault, nothing is sent. Each product's units are decided at their turn,
    as `stock set` has them. The exit code is 1 where anything was refused.

        orderstream stock import counted.tsv --reason stocktaking
    """
    from orderstream.console import Bar
    from orderstream.jobs.stocktaking import Taken, check_known, read_stock, take_stock
    from orderstream.streams.commands import WHY
    from orderstream.streams.topics import STOCK_COMMANDS

    given = map_of(columns)
    if given.form is not None:
        raise typer.BadParameter(f"{given.form!r}: expected COLUMN=FIELD", param_hint="--map")
    ours, run_id = settings(), uuid.UUID(uuid_of(run_as, "run")) if run_as else uuid.uuid4()
    reading, rows = read_stock(file, {"reason": reason, **actor()}, run_id, given)

    def refuse_faults() -> None:
        if reading.faults:
            show_faults(file, reading.faults)
            warn(f"{file}: {len(reading.faults)} faults; nothing was sent")
            raise typer.Exit(1)

    async def work(store: Store) -> Taken:
        await check_known(store, rows, reading)
        refuse_faults()
        with Bar("decided", len(rows)) as bar:
            return await with_producer(
                lambda producer: take_stock(ours, store, producer, rows, timeout_s=HELD_BACK_S, progress=bar.update),
                STOCK_COMMANDS,
            )

    refuse_faults()
    again = ["--run", str(run_id)]
    with repeatable(lambda: again):
        taken = run(with_store(work))
    say(f"{file}: {taken.set} products set")
    for product_id, outcome in [*taken.refused.items()][:FAULTS_SHOWN_MAX]:
        warn(f"{file}: {outcome}: product {product_id} {WHY[outcome]}")
    if taken.refused:
        warn(f"{file}: {len(taken.refused)} products refused")
    if taken.open:
        warn(f"{file}: {taken.open} products not decided within {HELD_BACK_S:.0f} s: is a worker running?")
        say_again(*again)
    if taken.refused or taken.open:
        raise typer.Exit(1)


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
        (row,) = command_stock(body_of("limit", command_id, product_id, limit_per_user=units))
    else:
        (row,) = run(with_store(lambda store: _products(store, [product_id])))
    limit = row["limit_per_user"]
    say(f"{product_id}  " + (f"at most {limit} units a user" if limit is not None else "no limit"))
