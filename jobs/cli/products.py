"""Commands about products: put and retire."""

from __future__ import annotations

from typing import Annotated

import typer

from orderstream.jobs.cli.shown import show_products
from orderstream.jobs.cli.stock import CommandId, body_of, command_stock

app = typer.Typer(no_args_is_help=True, help="Name and price products, make new ones, retire them.")


@app.command("put")
def product_put(
    product_id: Annotated[str, typer.Argument(help="Product.")],
    name: Annotated[str | None, typer.Option(help="Its name.")] = None,
    price_cents: Annotated[int | None, typer.Option(min=0, help="Its price; orders held before keep theirs.")] = None,
    command_id: CommandId = None,
) -> None:
    """Change a product's name or price; with both, make one that is not there, without units.

    orderstream product put cup --name "Tea cup" --price-cents 300
    """
    given = {"name": name, "price_cents": price_cents}
    given = {member: value for member, value in given.items() if value is not None}
    show_products(command_stock(body_of("product", command_id, product_id, **given)))


@app.command("retire")
def product_retire(
    product_id: Annotated[str, typer.Argument(help="Product.")],
    back: Annotated[bool, typer.Option("--back", help="Take it back: orders may have it again.")] = False,
    command_id: CommandId = None,
) -> None:
    """Retire a product: no order may have it any more. What orders hold and bought of it stays.

    orderstream product retire cup
    """
    show_products(command_stock(body_of("product", command_id, product_id, retired=not back)))
