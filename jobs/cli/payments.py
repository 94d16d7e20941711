"""Commands about money that the provider does not give back: list, retry, close."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from orderstream.console import say, warn
from orderstream.jobs.cli.base import HELD_BACK_S, Json, run, settings, uuid_of, with_producer, with_store
from orderstream.jobs.cli.shown import printable, refusal_as_json, show_json, show_refusals

if TYPE_CHECKING:
    from orderstream.sql.store import Store

app = typer.Typer(no_args_is_help=True, help="Money that the provider does not give back: ask again, or close.")

OrderIds = Annotated[list[str] | None, typer.Argument(help="Orders, as `list` shows them.", metavar="ID")]

WHY_CHARS_MAX = 500
"""As much as the reason of a close may say."""

RETRIED_MAX = 10_000
"""Orders that `retry --all` has asked about at once, the oldest first."""


def _ids(ids: list[str] | None) -> list[str]:
    return list(dict.fromkeys(uuid_of(text, "order id") for text in ids or ()))


@app.command("list")
def payments_list(
    closed: Annotated[
        bool, typer.Option("--all", help="Also those that were closed, or given back after all.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The oldest so many.")] = 100,
    as_json: Json = False,
) -> None:
    """List the orders whose refund or void the provider has refused for good, the oldest first.

    The money of each is to be given back by other means, or left where it is; then close it.
    """
    from orderstream.jobs.refusals import listing

    rows = run(with_store(lambda store: listing(store, closed=closed, limit=limit)))
    if as_json:
        show_json([refusal_as_json(row) for row in rows])
    else:
        show_refusals(rows)


@app.command("retry")
def payments_retry(
    ids: OrderIds = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="All that are open; only shown, without --yes.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="With --all: do it, instead of showing what would be done.")
    ] = False,
) -> None:
    """Have the provider asked again to give money back; the exit code is 1 where it does not. What is closed is not asked.

    orderstream payments retry --all --yes
    """
    from orderstream.jobs.refusals import CLOSED, listing, retry

    chosen = _ids(ids)
    if bool(chosen) == everything:
        raise typer.BadParameter("expected orders' ids, or --all")

    async def work(store: Store) -> dict[str, str]:
        wanted = chosen or [row["order_id"] for row in await listing(store, closed=False, limit=RETRIED_MAX)]
        if everything and not yes:
            return dict.fromkeys(wanted, "would be asked again")
        return await with_producer(lambda producer: retry(settings(), store, producer, wanted, HELD_BACK_S))

    found = run(with_store(work))
    for order_id, stands in found.items():
        say(f"{order_id}  {printable(stands)}")
    if not found:
        say("no money is refused")
    elif everything and not yes:
        say("nothing was done: --yes does it")
    if any(stands.startswith(CLOSED) for stands in found.values()):
        warn("of what is closed the provider was not asked: if it is not dealt with, give it back by other means")
    if not (everything and not yes) and not {"REFUNDED", "VOIDED"}.issuperset(found.values()):
        raise typer.Exit(1)


@app.command("close")
def payments_close(
    ids: OrderIds = None,
    *,
    why: Annotated[str, typer.Option(help="What was done about the money: kept with the order.")],
) -> None:
    """Note that people have dealt with the money of orders: the provider is not asked again, the alert ends.

    orderstream payments close 5e6e7e1c-… --why "bank transfer 4711"
    """
    from orderstream.jobs.refusals import close

    chosen = _ids(ids)
    if not chosen:
        raise typer.BadParameter("expected orders' ids")
    if not why.strip() or not why.isprintable() or len(why) > WHY_CHARS_MAX:
        raise typer.BadParameter(f"--why: expected 1 to {WHY_CHARS_MAX} printable characters")

    async def work(store: Store) -> Any:
        return await close(store, chosen, why)

    closed = set(run(with_store(work)))
    for order_id in chosen:
        if order_id in closed:
            say(f"{order_id}  closed")
        else:
            warn(f"{order_id}  not closed: no money of it is refused, or it was closed before")
    if len(closed) < len(chosen):
        raise typer.Exit(1)
