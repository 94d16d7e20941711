"""Commands that check and tidy: verify, reconcile, prune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orderstream.console import say, table, warn
from orderstream.jobs.cli.base import Json, run, settings, with_store

if TYPE_CHECKING:
    from orderstream.sql.store import Store

app = typer.Typer()


@app.command()
def verify(
    as_json: Json = False,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that an order may be late before it counts.")] = 30.0,
    settle: Annotated[
        float, typer.Option(min=0, help="Seconds to look again while Redis and Postgres differ for moments.")
    ] = 5.0,
) -> None:
    """Check every promise over Postgres and Redis; exit 1 on any violation.

    Works while orders flow: one snapshot of Postgres is judged.
    """
    from orderstream.jobs.verify import verify as check

    async def work(store: Store) -> Any:
        return await check(settings(), grace_s=grace, settle_s=settle)

    report = run(with_store(work))
    if as_json:
        told = [{"promise": c.promise, "offenders": c.offenders, "note": c.note} for c in report.checks]
        say(json.dumps({"holds": report.holds, "orders": report.orders, "products": report.products, "checks": told}))
    else:
        rows = [
            [c.promise, f"{len(c.offenders)} VIOLATIONS" if c.offenders else "holds", c.note] for c in report.checks
        ]
        table("", ["promise", "", ""], rows)
        for c in report.checks:
            for subject, found in c.offenders[:5]:
                warn(f"{c.promise}: {subject}: {found}")
        broken = sum(bool(c.offenders) for c in report.checks)
        say(
            f"{len(report.checks)} promises over {report.orders:,} orders and {report.products:,} products: "
            + (f"{broken} BROKEN" if broken else "all hold")
        )
    if not report.holds:
        raise typer.Exit(1)


@app.command()
def reconcile(
    *,
    as_json: Json = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Say how each difference is mended; with --yes mend it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --repair: do it.")] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Go on from this file and leave the next checkpoint there; one a pipeline otherwise."),
    ] = None,
    from_beginning: Annotated[
        bool, typer.Option("--from-beginning", help="Read everything again, whatever the checkpoint says.")
    ] = False,
    settle: Annotated[
        float, typer.Option(min=0, help="Seconds to look again at what differs: it may be in flight.")
    ] = 5.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that an order may be late before it is stuck.")] = 30.0,
    limit: Annotated[int, typer.Option(min=0, help="Differences to print; --json has all of them.")] = 50,
) -> None:
    """Read the topics again, work out what every order and product must be, and compare with what is there.

    Postgres, Redis and the tables' changelogs are compared, while orders flow: what is in flight is no difference. The next
    run goes on where this one ended. Exit 0: all agree, or all was mended; 1: there are differences; 2: it could not look.

        orderstream reconcile                    what differs, since the last run

        orderstream reconcile --from-beginning   what differs, all records read again

        orderstream reconcile --repair           and how each of it would be mended

        orderstream reconcile --repair --yes     mend it, and look again: exit 0 if nothing differs any more

        orderstream reconcile --json | jq '.differences[] | .kind'
    """
    from orderstream.console import Bar
    from orderstream.jobs.cli.shown import show_reconciled
    from orderstream.jobs.reconcile.checkpoint import UnusableCheckpoint, default_file
    from orderstream.jobs.reconcile.reconcile import Reconcile
    from orderstream.jobs.reconcile.reconcile import as_json as told_as_json
    from orderstream.jobs.reconcile.repair import repair_all

    if yes and not repair:
        raise typer.BadParameter("--yes goes with --repair")
    ours = settings()
    file = checkpoint or default_file(ours)

    async def work() -> Any:
        with Bar("records read") as bar:
            job = Reconcile(
                ours, file=file, from_beginning=from_beginning, grace_s=grace, settle_s=settle, told=bar.update
            )
            async with job:
                report = await job.run()
                if yes:
                    report.repairs = await repair_all(job, report.differences)
                    if report.repairs:
                        async with Reconcile(ours, file=file, grace_s=grace, settle_s=settle) as again:
                            report.after = await again.run()
                await job.note(report)
                return report

    try:
        report = run(work())
    except UnusableCheckpoint as error:
        warn(f"orderstream: {error}")
        raise typer.Exit(2) from None
    if as_json:
        say(json.dumps(told_as_json(report), indent=2, default=str))
    else:
        show_reconciled(report, limit)
        if report.differences and repair and not yes:
            say("nothing was changed: --repair --yes does it")
    if not report.agrees:
        raise typer.Exit(1)


@app.command()
def prune(
    *,
    as_json: Json = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without, it is only counted.")] = False,
    keep_days: Annotated[
        float | None, typer.Option(help="Remove what is older than so many days, instead of as the setting says.")
    ] = None,
) -> None:
    """Remove orders that ended long ago and that Kafka has forgotten too; the counts stay as they are.

    Works while orders flow. An order stays as long as anything is left to do about it, or a topic still has a record that
    may name it. Exit 0: done, or counted; 2: an engine is away, or it is not said how long orders are kept.

        orderstream prune                        how many would go, and what holds others back

        orderstream prune --yes                  remove them

        orderstream prune --keep-days 30 --yes   those of which nothing has changed for 30 days
    """
    from orderstream import connecting as away
    from orderstream.console import Bar
    from orderstream.jobs.cli.shown import show_pruned
    from orderstream.sql.removal import WHYS, look_at_topics
    from orderstream.sql.removal import as_json as told_as_json
    from orderstream.sql.removal import prune as remove

    ours = settings(keep_orders_days=keep_days)
    if not ours.keep_orders_days:
        raise typer.BadParameter("orders are kept for ever (ORDERSTREAM_KEEP_ORDERS_DAYS is 0): say --keep-days")

    async def work(store: Store) -> Any:
        with away.kafka(ours):
            topics = await look_at_topics(ours, charges=True)
        with Bar("orders looked at") as bar, away.postgres(ours):
            return await remove(ours, store.pool, topics, really=yes, told=bar.update)

    found = run(with_store(work))
    if as_json:
        say(json.dumps(told_as_json(found, ours.keep_orders_days, really=yes), indent=2))
    else:
        show_pruned(found, WHYS, really=yes)
