"""Commands that check and tidy: verify, reconcile, prune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orderstream.console import say, warn
from orderstream.jobs.cli.base import Json, run, settings, with_store
from orderstream.jobs.cli.shown import show_pruned, show_reconciled, show_verdicts, verdicts_as_json

if TYPE_CHECKING:
    from orderstream.sql.store import Store

app = typer.Typer()


@app.command()
def verify(
    as_json: Json = False,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that an order may be late before it counts.")] = 30.0,
    settle: Annotated[
        float, typer.Option(min=0, help="Seconds to compare again while Redis and Postgres differ for moments.")
    ] = 5.0,
) -> None:
    """Check every promise over Postgres and Redis; exit 1 on any violation.

    Works while orders flow: one snapshot of Postgres is judged.
    """
    from orderstream.jobs.verify import verify as check

    async def work(store: Store) -> Any:
        return await check(settings(), grace_s=grace, settle_s=settle)

    verdicts = run(with_store(work))
    if as_json:
        say(json.dumps(verdicts_as_json(verdicts)))
    else:
        show_verdicts(verdicts)
    if not verdicts.holds:
        raise typer.Exit(1)


@app.command()
def reconcile(
    *,
    as_json: Json = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Say how each difference is repaired; with --yes repair it.")
    ] = False,
    resolve: Annotated[
        bool,
        typer.Option(
            "--resolve", help="Say which orders over units that are owed would be cancelled; with --yes cancel them."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --repair or --resolve: do it.")] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Continue from this file and leave the next checkpoint there; by default one a pipeline."),
    ] = None,
    from_beginning: Annotated[
        bool, typer.Option("--from-beginning", help="Read everything again, whatever the checkpoint says.")
    ] = False,
    settle: Annotated[
        float, typer.Option(min=0, help="Seconds to compare again what differs: it may be in flight.")
    ] = 5.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that an order may be late before it is stuck.")] = 30.0,
    limit: Annotated[int, typer.Option(min=0, help="Differences to print; --json has all of them.")] = 50,
) -> None:
    """Read the topics again, work out what every order and product must be, and compare with what is there.

    Postgres and Redis are compared, while orders flow: what is in flight is no difference. The next run continues where this
    one ended. Exit 0: all agree, or all is repaired; 1: there are differences; 2: it can't run.

        orderstream reconcile                    what differs, since the last run

        orderstream reconcile --from-beginning   what differs, all records read again

        orderstream reconcile --repair           and how each of it would be repaired

        orderstream reconcile --repair --yes     repair it, and compare again: exit 0 if nothing differs any more

        orderstream reconcile --resolve          which orders are cancelled where more was sold than there is (--yes: do it)

        orderstream reconcile --json | jq '.differences[] | .kind'
    """
    from orderstream.console import Bar
    from orderstream.jobs.reconcile.checkpoint import UnusableCheckpoint, default_file
    from orderstream.jobs.reconcile.reconcile import Reconcile
    from orderstream.jobs.reconcile.reconcile import as_json as report_as_json
    from orderstream.jobs.reconcile.repair import repair_all
    from orderstream.jobs.reconcile.resolve import plan
    from orderstream.jobs.reconcile.resolve import resolve as cancel_youngest

    if yes and not (repair or resolve):
        raise typer.BadParameter("--yes goes with --repair or --resolve")
    ours = settings()
    file = checkpoint or default_file(ours)

    async def work() -> Any:
        with Bar("records read") as bar:
            job = Reconcile(
                ours, file=file, from_beginning=from_beginning, grace_s=grace, settle_s=settle, on_progress=bar.update
            )
            async with job:
                report = await job.run()
                if resolve:
                    report.youngest = await plan(job, report.differences)
                if yes:
                    if repair:
                        report.repairs = await repair_all(job, report.differences)
                    if resolve:
                        report.repairs += await cancel_youngest(job, report.differences)
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
        say(json.dumps(report_as_json(report), indent=2, default=str))
    else:
        show_reconciled(report, limit)
        if report.differences and (repair or resolve) and not yes:
            say(f"nothing was changed: {'--repair ' * repair}{'--resolve ' * resolve}--yes does it")
    if not report.agrees:
        raise typer.Exit(1)


@app.command()
def prune(
    *,
    as_json: Json = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without, it is only counted.")] = False,
    keep_days: Annotated[
        float | None,
        typer.Option(
            help="Remove what is older than so many days, instead of as the setting says; not below the topics' "
            "retention (ORDERSTREAM_RETENTION_HOURS): Kafka may bring these orders again."
        ),
    ] = None,
) -> None:
    """Remove orders that ended long ago and that Kafka has removed too; the counts stay as they are.

    Works while orders flow. An order stays as long as anything is left to do about it, or a topic still has a record that
    may name it. Exit 0: done, or counted; 2: an engine is unavailable, or it is not set how long orders are kept.

        orderstream prune                        how many would be removed, and why others stay

        orderstream prune --yes                  remove them

        orderstream prune --keep-days 30 --yes   those of which nothing has changed for 30 days
    """
    from orderstream import connecting
    from orderstream.console import Bar
    from orderstream.sql.removal import STAY_REASONS, read_topics
    from orderstream.sql.removal import as_json as pruned_as_json
    from orderstream.sql.removal import prune as remove

    ours = settings(keep_orders_days=keep_days)
    if not ours.keep_orders_days:
        least = f"{ours.retention_hours / 24:g}, the topics' retention"
        why = "ORDERSTREAM_KEEP_ORDERS_DAYS is 0" if keep_days is None else "--keep-days is 0"
        raise typer.BadParameter(f"orders are kept for ever ({why}): give --keep-days, from {least}, to 36500")

    async def work(store: Store) -> Any:
        with connecting.kafka(ours):
            topics = await read_topics(ours)
        with Bar("orders checked") as bar, connecting.postgres(ours):
            return await remove(ours, store.pool, topics, really=yes, progress=bar.update)

    found = run(with_store(work))
    if as_json:
        say(json.dumps(pruned_as_json(found, ours.keep_orders_days, really=yes), indent=2))
    else:
        show_pruned(found, STAY_REASONS, really=yes)
