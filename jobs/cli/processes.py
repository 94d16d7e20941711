"""Commands that run a process: worker, ingress, demo, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orderstream.exits import leave_when_asked
from orderstream.jobs.cli.base import settings

app = typer.Typer()


@app.command()
def worker(
    web_port: Annotated[int | None, typer.Option(help="Port of the stats pages; 0 takes a free one.")] = None,
    web: Annotated[bool | None, typer.Option("--web/--no-web", help="Serve the stats pages.")] = None,
) -> None:
    """Run a worker: the stages reserve, pay and commit, on the partitions that Kafka assigns to it.

    Start as many as there are partitions at most. It leaves on SIGTERM; killed at any moment, it loses nothing.
    """
    leave_when_asked()
    from orderstream.agents.app import run_worker

    run_worker(settings(web_port=web_port, web_enabled=web))


@app.command()
def ingress(
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    host: Annotated[str | None, typer.Option(help="Address; loopback by default.")] = None,
) -> None:
    """Run the ingress: orders over HTTP under `/api/v1/orders`; `/health`, `/ready`, `/metrics`."""
    leave_when_asked()
    from orderstream.http.server import run as serve

    serve(settings(http_port=port, http_host=host))


@app.command()
def demo(
    orders: Annotated[int, typer.Option(min=1, help="Orders of the flash sale.")] = 10_000,
    units: Annotated[int, typer.Option(min=1, help="Units of its product.")] = 1_000,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the worker, the ingress and the engines running.")] = False,
) -> None:
    """Run all of it on real input: engines, worker, ingress, real invoices, a flash sale, `verify`.

    The same as `make run`. Exits with 0 only when every promise holds.
    """
    from orderstream.jobs.demo import run_demo

    raise typer.Exit(run_demo(orders=orders, units=units, keep=keep))


@app.command()
def bench(
    scenario: Annotated[str, typer.Argument(help="A scenario, or `all`; after a colon, which of its parts.")] = "all",
    orders: Annotated[
        int | None, typer.Option(min=100, help="Orders of one run; by default 50,000, of a flash sale 100,000.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each scenario; the median counts.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.json and the charts; under .local/bench otherwise.")
    ] = None,
) -> None:
    """Measure, on engines and data of the benchmark's own. A run that breaks a promise is no result.

    Every run has fresh topics, a fresh database and a fresh worker; a warm-up goes before its clock.

        throughput   orders of one product, over 100 products: to CONFIRMED

        hot          the same, all of one product

        lines        orders of 1 to 5 products

        flash-sale   100,000 orders for 1,000 units: decisions/s, and the last verdict

        latency      an open loop at 500, 1,000, 2,000 orders/s, to the topic and by POST: p50, p95, p99

        rates        10 to 1,000 orders/s on 1, 8, 48 partitions: CPU an order, p50, p95, p99; in part: `rates:500x*`

        scale        1, 2, 4 workers, as far as there are cores

        floor        the same by the chained pass alone, without Faust and Redis: the limit

        replay       a reconciliation of 1,000,000 records: records/s, and its memory

        grown        1,000,000 orders and 100,000 products in the store already, against none

        soak         1,000,000 orders by one worker: its memory, its rate, what the stores keep

        peers        row locks, DBOS workflows, Kafka Streams in Java: how many times faster

    For a first impression: `orderstream bench peers --orders 5000 --runs 1`. Figures depend on the machine: they say what
    other processes took meanwhile.
    """
    from orderstream.bench.run import main as measure

    raise typer.Exit(measure(scenario, orders, runs, out))
