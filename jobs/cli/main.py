"""The command line.  Exit codes: 0 good; 1 a check failed or input was bad; 2 wrong use, or an engine is unavailable."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from orderstream import __version__
from orderstream.console import say, warn
from orderstream.errors import EngineMissing, EngineUnavailable, OrderstreamError, SettingsError, TopicsMisfit
from orderstream.jobs.cli import checks, engines, letters, orders, payments, processes, products, stock

app = typer.Typer(
    name="orderstream",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""
Orders on Kafka, stock held, paid, committed: nothing oversold, lost, charged twice or stuck.

A first try, on engines of its own: `orderstream demo`. By hand:

    orderstream up                       Kafka, Redis and Postgres, under .local/

    orderstream init                     topics, tables, five products

    orderstream worker                   (another terminal) reserve, pay, commit

    orderstream order place --user me --item 1=2

    orderstream verify                   every promise, checked

Settings come from ORDERSTREAM_… variables and from .env; `orderstream config` lists them all.
""",
)
app.add_typer(engines.app)
app.add_typer(processes.app)
app.add_typer(orders.top)
app.add_typer(checks.app)
app.add_typer(stock.app, name="stock")
app.add_typer(products.app, name="product")
app.add_typer(orders.app, name="order")
app.add_typer(letters.app, name="dead-letters")
app.add_typer(payments.app, name="payments")


def _version(asked: bool) -> None:
    if asked:
        say(f"orderstream {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Run the command line; every expected fault is one message and an exit code."""
    try:
        app()
    except (SettingsError, EngineUnavailable, EngineMissing, TopicsMisfit) as error:
        warn(f"orderstream: {error}")
        sys.exit(2)
    except OrderstreamError as error:
        warn(f"orderstream: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
