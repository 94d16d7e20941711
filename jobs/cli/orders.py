"""Commands about orders: produce, order get, place and cancel."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orderstream.console import say, warn
from orderstream.errors import NotFound, OrderstreamError
from orderstream.jobs.cli.base import HELD_BACK_S, Json, run, settings, uuid_of, with_producer, with_store
from orderstream.jobs.cli.shown import show_order, show_outcome

if TYPE_CHECKING:
    from orderstream.settings import Settings
    from orderstream.sql.store import Store

top = typer.Typer()
app = typer.Typer(no_args_is_help=True, help="Show orders; place and cancel them.")


def _limits(ours: Settings) -> Any:
    from orderstream.streams.orders import Limits

    return Limits(ours.order_lines_max, ours.line_quantity_max, ours.order_bytes_max)


@top.command()
def produce(
    file: Annotated[Path, typer.Argument(help="Orders: .jsonl, a record a line, or .csv, the Online Retail form.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait until every order has ended, and report how.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="With --wait: how long, in seconds.")] = 300.0,
    rate: Annotated[float | None, typer.Option(min=0.1, help="Orders a second at most.")] = None,
) -> None:
    """Send orders from a file to the topic.

    A line that can't be read is reported with its place and left out; the rest is sent, and the exit code is 1 at the end.
    Sent again, a file of invoices is the same orders: their numbers are their idempotency keys.

        orderstream produce data/online-retail-sample.csv --wait
    """
    from orderstream.console import Bar
    from orderstream.jobs.invoices import read_orders
    from orderstream.jobs.produce import send
    from orderstream.jobs.produce import wait as wait_for

    ours = settings()
    reading, orders = read_orders(file, _limits(ours))

    async def work() -> Any:
        with Bar("sent") as bar:
            sent = await with_producer(lambda producer: send(ours, producer, orders, bar.update, rate))
        if not wait or not sent:
            return sent, None
        with Bar("ended", len(sent)) as bar:
            return sent, await with_store(lambda store: wait_for(store, sent, timeout_s=timeout, progress=bar.update))

    sent, outcome = run(work())
    say(f"{file}: {len(sent)} orders with {reading.lines} lines sent")
    for kind, number in reading.skipped.items():
        say(f"  skipped: {number} {kind}")
    for fault in reading.faults[:50]:
        warn(f"{file}: line {fault.line}, {fault.column}: {fault.why}")
    if reading.faults:
        warn(f"{file}: {len(reading.faults)} faults; what they concern was left out")
    if outcome is not None:
        show_outcome(outcome)
    if reading.faults or (outcome is not None and outcome.open):
        raise typer.Exit(1)


async def _order(store: Store, order_id: str) -> dict[str, Any]:
    order = await store.order(order_id)
    if order is None:
        raise NotFound(
            f"no order {order_id}: check the id; one that was just sent is here once a worker has taken it in"
        )
    return order


@app.command("get")
def order_get(order_id: Annotated[str, typer.Argument(help="The order's id.")], as_json: Json = False) -> None:
    """Show an order: status, lines, payment, history."""
    known = uuid_of(order_id, "order id")
    order = run(with_store(lambda store: _order(store, known)))
    if as_json:
        say(json.dumps(order, default=str, indent=2))
    else:
        show_order(order)


async def _ended(
    store: Store, order_id: str, timeout_s: float, ends: Sequence[str] = ("CONFIRMED", "CANCELLED")
) -> dict[str, Any] | None:
    deadline = time.monotonic() + timeout_s
    while True:
        order = await store.order(order_id)
        if (order is not None and order["status"] in ends) or time.monotonic() > deadline:
            return order
        await asyncio.sleep(0.05)


@app.command("place")
def order_place(
    item: Annotated[list[str], typer.Option(help="PRODUCT=UNITS; may be given several times.")],
    user: Annotated[str, typer.Option(help="Who orders.")] = "me",
    method: Annotated[str, typer.Option(help="How it is paid.")] = "card",
    key: Annotated[str | None, typer.Option(help="Idempotency key: the same one is the same order.")] = None,
) -> None:
    """Place one order and wait for its end.

    orderstream order place --user me --item 1=2 --item 3=1
    """
    from pydantic import ValidationError

    from orderstream.jobs.produce import send
    from orderstream.streams.orders import OrderRecord, check, describe, new_order_id

    items = []
    for text in item:
        product_id, _, units = text.rpartition("=")
        if not product_id or not units.isdigit():
            raise typer.BadParameter(f"{text!r}: expected PRODUCT=UNITS, like 1=2")
        items.append({"product_id": product_id, "quantity": int(units)})
    ours = settings()
    try:
        record = OrderRecord.model_validate(
            {"user_id": user, "items": items, "payment_method": method, "idempotency_key": key}
        )
    except ValidationError as error:
        raise OrderstreamError(describe(error)) from None
    placed = check(record, _limits(ours), fallback_id=new_order_id)

    async def work() -> dict[str, Any] | None:
        await with_producer(lambda producer: send(ours, producer, [placed]))
        return await with_store(lambda store: _ended(store, placed.order_id, HELD_BACK_S))

    order = run(work())
    state = "CREATED (not taken in yet: is a worker running?)" if order is None else order["status"]
    say(f"{placed.order_id}  {state}" + (f"  {order['reason']}" if order and order["reason"] else ""))
    if order is None or order["status"] != "CONFIRMED":
        raise typer.Exit(1)


@app.command("cancel")
def order_cancel(order_id: Annotated[str, typer.Argument(help="The order's id.")]) -> None:
    """Cancel an order, and report what became of it.

    One that is paid or confirmed is refunded, and its units return to stock. One that is not known yet is cancelled when it
    comes.
    """
    from orderstream.streams.producer import Outbox

    ours, order_id = settings(), uuid_of(order_id, "order id")

    async def command(store: Store) -> dict[str, Any]:
        before = await store.order(order_id)
        if before is not None and before["status"] == "CANCELLED":
            return before
        outbox, home = Outbox(ours), None if before is None else before["home"]
        outbox.order_command(order_id, json.dumps({"command": "cancel", "order_id": order_id}).encode(), home)
        await with_producer(lambda producer: producer.send(outbox.handovers()))
        if before is None:
            raise NotFound(f"no order {order_id} yet: if it comes, it is cancelled at once")
        return await _ended(store, order_id, HELD_BACK_S, ("CANCELLED",)) or before

    order = run(with_store(command))
    if order["status"] == "CANCELLED":
        say(f"{order_id}  CANCELLED  {order['reason']}")
        return
    warn(f"{order_id}  {order['status']}  not cancelled yet: is a worker running?")
    raise typer.Exit(1)
