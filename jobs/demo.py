"""The whole path of an order on real input, as ``make run`` shows it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack

from orderstream.console import Bar, say, warn
from orderstream.engines.child import Child
from orderstream.engines.local import LocalEngines, given_addresses
from orderstream.engines.process import port_free
from orderstream.jobs.cli.shown import show_outcome
from orderstream.jobs.init import SEED, Product, init
from orderstream.jobs.invoices import read_catalogue, read_orders
from orderstream.jobs.produce import Outcome, send, wait
from orderstream.jobs.verify import Verdicts, verify
from orderstream.settings import Settings, load, project_dir
from orderstream.sql.store import Store
from orderstream.streams.orders import Limits, Order, new_order_id
from orderstream.streams.producer import Producer

STOCK_SHARE = 0.66
START_S, END_S = 90.0, 300.0
"""Longest waits for a process to start, and for orders to end, in seconds."""


def flash_orders(product_id: str, number: int) -> Iterator[Order]:
    """Yield orders of one unit each, all for the same product."""
    for n in range(number):
        yield Order(new_order_id(), f"customer-{n}", ((product_id, 1),), "card", None, None)


async def sell(
    settings: Settings, store: Store, producer: Producer, orders: Iterator[Order] | list[Order], worker: Child
) -> Outcome:
    """Send orders and wait for their ends, with progress."""
    with Bar("sent") as bar:
        sent = await send(settings, producer, orders, bar.update)
    with Bar("ended", len(sent)) as bar:
        return await wait(store, sent, timeout_s=END_S, progress=bar.update, alive=worker.check_alive)


async def show(settings: Settings, orders: int, units: int, keep: bool) -> bool:
    """Run the demonstration on engines that are up; return whether every promise held."""
    logs = settings.local_dir / "logs"
    file = project_dir() / "data" / "online-retail-sample.csv"
    flash = f"FLASH-{time.strftime('%Y%m%d-%H%M%S')}"
    catalogue = [*SEED, *read_catalogue(file, STOCK_SHARE), Product(flash, "Flash sale", 1_999, units)]
    made = await init(settings, ())
    children: list[Child] = []
    with ExitStack() as stack:
        for command, port in (("worker", settings.web_port), ("ingress", settings.http_port)):
            wanted = port if port and port_free(port) else 0
            child = Child(command, settings, logs / f"{command}.log", port=wanted, say=warn)
            stack.callback(child.stop)
            children.append(child)
        worker, ingress = children
        for child in children:
            await asyncio.to_thread(child.await_ready, START_S)
        done = await init(settings, catalogue)
        say(
            f"products: {done.products_new} loaded, {done.products_there} there; {len(made.topics_created)} topics created"
        )
        say(f"worker: pages at http://127.0.0.1:{worker.port}/stats/   ingress: http://127.0.0.1:{ingress.port}")

        store = await Store.connect(settings.database_url)
        producer = Producer(settings, client_id="orderstream-demo")
        await producer.start()
        try:
            limits = Limits(settings.order_lines_max, settings.line_quantity_max, settings.order_bytes_max)
            reading, invoices = read_orders(file, limits)
            say(f"\n{file.name}: invoices of a gift wholesaler, stock for {STOCK_SHARE:.0%} of the demand")
            before = await store.pool.fetchval("SELECT count(*) FROM orders WHERE idempotency_key IS NOT NULL")
            outcome = await sell(settings, store, producer, list(invoices), worker)
            say(f"  {reading.orders} orders with {reading.lines} lines; skipped: {_skipped(reading.skipped)}")
            if before:
                say("  (sent before: the same invoices are the same orders, nothing is sold twice)")
            show_outcome(outcome)

            say(f"\nflash sale: {orders:,} orders for {units:,} units of {flash}")
            sale = await sell(settings, store, producer, flash_orders(flash, orders), worker)
            show_outcome(sale)
        finally:
            await producer.stop()
            await store.close()

        say()
        report = await verify(settings)
        show_verdicts(report)
        complete = not outcome.open and not sale.open
        if keep:
            await stay(worker, ingress, flash)
    return report.holds and complete


def _skipped(kinds: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in kinds.items()) or "nothing"


def show_verdicts(report: Verdicts) -> None:
    """Print what verify found."""
    for check in report.checks:
        say(f"  {'BROKEN' if check.offenders else 'holds ':<7} {check.promise}")
        for subject, found in check.offenders[:3]:
            warn(f"          {subject}: {found}")
    verdict = "every promise holds" if report.holds else "A PROMISE IS BROKEN"
    say(f"verify: {len(report.checks)} promises over {report.orders:,} orders: {verdict}")


async def stay(worker: Child, ingress: Child, product_id: str) -> None:
    """Say what can be tried, and wait for Ctrl-C."""
    base = f"http://127.0.0.1:{ingress.port}"
    body = '{"user_id": "me", "items": [{"product_id": "22633", "quantity": 1}], "payment_method": "card"}'
    say(
        f"\nStill running; Ctrl-C stops it all. Try, in another terminal:\n"
        f"  curl -i -H 'Content-Type: application/json' -d '{body}' {base}/api/v1/orders\n"
        f"  curl {base}/api/v1/orders/ORDER_ID\n"
        f"  curl -N {base}/api/v1/orders/ORDER_ID/events\n"
        f"  curl -X POST {base}/api/v1/orders/ORDER_ID/cancel\n"
        f"  .venv/bin/orderstream stock get {product_id}\n"
        f"  pages: http://127.0.0.1:{worker.port}/stats/"
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)
    while not stop.is_set():
        worker.check_alive()
        ingress.check_alive()
        try:
            await asyncio.wait_for(stop.wait(), 1)
        except TimeoutError:
            continue


def run_demo(*, orders: int, units: int, keep: bool) -> int:
    """Run the demonstration; return the exit code: 0 only when every order has ended and every promise holds."""
    local = LocalEngines(load().local_dir, given=given_addresses(), say=say)
    ran = {one.name for one in local.status() if one.state == "running"}
    local.up()
    try:
        return 0 if asyncio.run(show(load(), orders, units, keep)) else 1
    finally:
        if ran:
            say("the engines ran before and stay up; `make down` stops them")
        else:
            local.down()
