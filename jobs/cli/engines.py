"""Commands for the engines and what is prepared in them: up, down, status, init, config, schema."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orderstream.console import say, table
from orderstream.jobs.cli.base import Columns, Json, map_of, run, settings
from orderstream.jobs.cli.shown import show_faults

if TYPE_CHECKING:
    from orderstream.engines.local import LocalEngines

app = typer.Typer()


def local() -> LocalEngines:
    """Return the local engines of these settings."""
    from orderstream import access
    from orderstream.engines.local import LocalEngines, given_addresses

    ours = settings()
    return LocalEngines(ours.local_dir, given=given_addresses(), say=say, entry=access.kafka(ours))


@app.command()
def up() -> None:
    """Start Kafka, Redis and Postgres of your own, under `.local/`.

    What runs already is left alone. An engine whose address is given (ORDERSTREAM_KAFKA, ORDERSTREAM_REDIS_URL,
    ORDERSTREAM_DATABASE_URL) is not started.
    """
    local().up()


@app.command()
def down() -> None:
    """Stop the engines that `up` started; their data stays."""
    local().down()


@app.command()
def status(as_json: Json = False) -> None:
    """Show which engines run, where, and which version."""
    found = local().status()
    if as_json:
        say(json.dumps([{name: str(getattr(one, name)) for name in one.__dataclass_fields__} for one in found]))
    else:
        rows = [[one.name, one.state, one.address or "", one.pid or "", one.version or ""] for one in found]
        table("", ["engine", "state", "address", "pid", "version"], rows)
    if any(one.state not in ("running", "elsewhere") for one in found):
        raise typer.Exit(1)


@app.command()
def init(
    catalogue: Annotated[
        Path | None,
        typer.Option(help="A table of orders, as `produce` reads it: load its products instead of the five."),
    ] = None,
    stock_share: Annotated[
        float, typer.Option(min=0, max=100, help="With --catalogue: units in stock, as a share of each one's demand.")
    ] = 0.66,
    columns: Columns = None,
) -> None:
    """Create topics, make the database ready, load products. Safe to repeat.

    Products that are there keep their stock and price. A price in the catalogue is the last one that is not 0.
    """
    from orderstream.jobs import init as setup
    from orderstream.jobs.invoices import Fault, read_catalogue

    free: list[Fault] = []
    products: Sequence[setup.Product] = setup.SEED
    if catalogue is not None:
        products = read_catalogue(catalogue, stock_share, given=map_of(columns), told=free)
    show_faults(catalogue, free)
    done = run(setup.init(settings(), products))
    say(f"topics: {len(done.topics_created)} created, {len(done.topics_there)} there")
    if done.topics_altered:
        say(
            f"  their records have the broker's time from now on, not their producers': {', '.join(done.topics_altered)}"
        )
    say(f"database: {'made ready' if done.database_made else 'ready'}")
    say(f"products: {done.products_new} loaded, {done.products_there} there")


@app.command()
def config(as_json: Json = False) -> None:
    """List every setting: its variable, its value here, and what it is for."""
    from orderstream.settings import secret

    ours = settings()
    rows = []
    for name, field in type(ours).model_fields.items():
        value = getattr(ours, name)
        shown = "***" if secret(name) and value else _shown(str(value))
        rows.append([f"ORDERSTREAM_{name.upper()}", shown, field.description or ""])
    if as_json:
        say(json.dumps([dict(zip(("variable", "value", "description"), row, strict=True)) for row in rows], indent=2))
    else:
        table("", ["variable", "value", "what it is for"], rows)


def _shown(value: str) -> str:
    from orderstream.settings import public

    return public(value) if "://" in value else value


@app.command()
def schema(
    what: Annotated[str, typer.Argument(help="openapi, the HTTP API as JSON; asyncapi, the topics' records as YAML.")],
) -> None:
    """Print a description for programs, made from the models that check what comes in.

    orderstream schema asyncapi > docs/asyncapi.yaml
    """
    if what == "openapi":
        from orderstream.http.openapi import describe

        say(json.dumps(describe(settings()), indent=2))
    elif what == "asyncapi":
        from orderstream.streams.catalog import text

        sys.stdout.write(text())
    else:
        raise typer.BadParameter(f"{what!r}: expected openapi or asyncapi")
