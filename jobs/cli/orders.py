"""Commands about orders: produce, order get, list, place and cancel."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orderstream.console import say, warn
from orderstream.errors import NotFound, OrderstreamError
from orderstream.jobs.cli.base import (
    HELD_BACK_S,
    Columns,
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
from orderstream.jobs.cli.shown import FAULTS_SHOWN_MAX, show_order, show_orders, show_outcome, show_reading

if TYPE_CHECKING:
    from orderstream.jobs.produce import Outcome, Sent
    from orderstream.settings import Settings
    from orderstream.sql.store import Store
    from orderstream.streams.orders import Order

top = typer.Typer()
app = typer.Typer(no_args_is_help=True, help="Show and list orders; place and cancel them.")

ENDS = ("CONFIRMED", "CANCELLED")

LIST_READ_MAX = 5_000
"""Orders that one statement of `order list` reads, of which it may keep none."""


def _limits(ours: Settings) -> Any:
    from orderstream.streams.orders import Limits

    return Limits(ours.order_lines_max, ours.line_quantity_max, ours.order_bytes_max)


@top.command()
def produce(
    file: Annotated[
        Path,
        typer.Argument(
            help="Orders: a table (.csv, .tsv, .txt) or a record a line (.jsonl); .gz, .zip too; - for the input."
        ),
    ],
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until every order has ended, and report how.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="With --wait: how long, in seconds.")] = 300.0,
    rate: Annotated[float | None, typer.Option(min=0.1, help="Orders a second at most.")] = None,
    columns: Columns = None,
    dates: Annotated[
        str | None, typer.Option(help="How a table writes dates: day-first, month-first, or a pattern like %d.%m.%Y.")
    ] = None,
    run_as: Annotated[
        str | None,
        typer.Option("--run", help="Records without id and key: repeat the run of this id, as it was named."),
    ] = None,
) -> None:
    """Send orders from a file to the topic.

    A table is read whole first: an invoice goes with all of its rows or not at all. What can't be read is reported with its
    place and left out; the rest is sent. Sent again, a file of invoices is the same orders: their numbers are their
    idempotency keys. The exit code is 1 where anything was refused: a row, or, with --wait, an order.

        orderstream produce data/online-retail-sample.csv --wait

        orderstream produce orders_export.csv.gz --map shopify --wait

        orderstream produce sales.csv --map "Beleg=order" --map "Artikel=product" --map "Menge=quantity" --dates day-first
    """
    from orderstream.console import Bar
    from orderstream.jobs.invoices import day_or_pattern, read_orders
    from orderstream.jobs.produce import send
    from orderstream.jobs.produce import wait as wait_for
    from orderstream.streams.orders import new_order_id
    from orderstream.streams.topics import ORDERS

    ours, given = settings(), map_of(columns)
    if dates is not None and not day_or_pattern(dates):
        raise typer.BadParameter(
            f"{dates!r}: expected day-first, month-first, or a pattern like %d.%m.%Y %H:%M", param_hint="--dates"
        )
    run_id = uuid.UUID(uuid_of(run_as or new_order_id(), "run"))
    if run_id.version != 7:
        raise typer.BadParameter(f"{run_as!r}: expected the id that a run before named", param_hint="--run")
    reading, orders = read_orders(file, _limits(ours), given=given, dates=dates, run=run_id)

    def again() -> list[str]:
        return ["--run", str(run_id)] if reading.unnamed else []

    async def sending() -> dict[str, Sent]:
        with Bar("sent") as bar:
            sent = await with_producer(lambda producer: send(ours, producer, orders, bar.update, rate), ORDERS)
        show_reading(reading, len(sent))
        return sent

    async def waiting(store: Store) -> tuple[dict[str, Sent], Outcome]:
        await store.ended([])  # before anything is sent: it has its tables
        sent = await sending()
        with Bar("ended", len(sent)) as bar:
            return sent, await wait_for(store, sent, timeout_s=timeout, progress=bar.update)

    with repeatable(again):
        if not wait:
            run(sending())
            refused = False
        else:
            sent, outcome = run(with_store(waiting))
            show_outcome(outcome)
            for order_id in outcome.reused[:FAULTS_SHOWN_MAX]:
                named = sent[order_id].key or order_id
                warn(
                    f"{file}: {named}: order_id_reused: its key stands for another order, {order_id}, which stays as it is"
                )
            if outcome.open:
                warn("is a worker running? What can't be taken in is among the dead letters.")
                say_again(*again())
            refused = bool(outcome.open or outcome.refused)
    if reading.faults or refused:
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


async def _ended(store: Store, order_id: str, timeout_s: float, ends: Sequence[str] = ENDS) -> dict[str, Any] | None:
    deadline = time.monotonic() + timeout_s
    while True:
        order = await store.order(order_id)
        if (order is not None and order["status"] in ends) or time.monotonic() > deadline:
            return order
        await asyncio.sleep(0.05)


@app.command("list")
def order_list(
    user: Annotated[str | None, typer.Option(help="Of this user only.")] = None,
    status: Annotated[
        str | None, typer.Option(help="In this status only: CREATED, RESERVED, PAID, CONFIRMED, CANCELLED.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many.")] = 20,
    as_json: Json = False,
) -> None:
    """List orders, the newest first.

    orderstream order list --user me --status CONFIRMED
    """
    from orderstream.streams.orders import Status

    wanted = None if status is None else status.upper()
    if wanted is not None and wanted not in [*Status]:
        raise typer.BadParameter(f"{status!r}: expected one of {', '.join(Status)}", param_hint="--status")

    orders = run(with_store(lambda store: _newest(store, user, wanted, limit)))
    if as_json:
        say(json.dumps(orders, default=str, indent=2))
    else:
        show_orders(orders)


async def _newest(store: Store, user: str | None, status: str | None, limit: int) -> list[dict[str, Any]]:
    from orderstream.http.reading import END

    place, found = END, list[dict[str, Any]]()
    while len(found) < limit:
        rows = await store.orders_page(user, status, place, limit - len(found), LIST_READ_MAX)
        found += [{name: value for name, value in row.items() if name != "edge"} for row in rows if not row["edge"]]
        if (edge := next((row for row in rows if row["edge"]), None)) is None:
            break
        place = (edge["created_at"], edge["order_id"])
    return found


@app.command("place")
def order_place(
    item: Annotated[list[str], typer.Option(help="PRODUCT=UNITS; may be given several times.")],
    user: Annotated[str, typer.Option(help="Who orders.")] = "me",
    method: Annotated[str, typer.Option(help="How it is paid.")] = "card",
    key: Annotated[str | None, typer.Option(help="Idempotency key: the same one is the same order.")] = None,
    order_id: Annotated[
        str | None, typer.Option("--order-id", help="A UUID, as a command before named it: the same order.")
    ] = None,
) -> None:
    """Place one order and wait for its end.

    orderstream order place --user me --item 1=2 --item 3=1
    """
    from pydantic import ValidationError

    from orderstream.jobs.produce import send
    from orderstream.streams.orders import OrderRecord, check, describe, new_order_id
    from orderstream.streams.topics import ORDERS

    items = []
    for text in item:
        product_id, _, units = text.rpartition("=")
        if not product_id or not (units.isascii() and units.isdigit() and len(units) < 20):
            raise typer.BadParameter(f"{text!r}: expected PRODUCT=UNITS, like 1=2")
        items.append({"product_id": product_id, "quantity": int(units)})
    ours, known = settings(), uuid_of(order_id, "order id") if order_id else None
    body = {"user_id": user, "items": items, "payment_method": method, "idempotency_key": key}
    try:
        record = OrderRecord.model_validate({**body, "order_id": known and uuid.UUID(known)})
    except ValidationError as error:
        raise OrderstreamError(describe(error)) from None
    placed = check(record, _limits(ours), fallback_id=new_order_id)

    again = ["--order-id", placed.order_id] if key is None else []

    async def work(store: Store) -> dict[str, Any] | None:
        _refuse_another(await store.order(placed.order_id), placed)
        if await store.removed([placed.order_id]):
            raise OrderstreamError(
                f"order_removed: {placed.idempotency_key or placed.order_id} is the key or id of an order that was removed\n"
                "a new order needs one of its own"
            )
        await with_producer(lambda producer: send(ours, producer, [placed]), ORDERS)
        order = await _ended(store, placed.order_id, HELD_BACK_S)
        _refuse_another(order, placed)
        return order

    with repeatable(lambda: again):
        order = run(with_store(work))
    state = "CREATED (not taken in yet: is a worker running?)" if order is None else order["status"]
    say(f"{placed.order_id}  {state}" + (f"  {order['reason']}" if order and order["reason"] else ""))
    if order is None or order["status"] not in ENDS:
        say_again(*again)
    if order is None or order["status"] != "CONFIRMED":
        raise typer.Exit(1)


def _refuse_another(there: dict[str, Any] | None, placed: Order) -> None:
    from orderstream.jobs.produce import content_of

    if there is None:
        return
    lines = [(line["product_id"], line["quantity"]) for line in there["lines"]]
    if content_of(there["user_id"], there["payment_method"], lines) != content_of(
        placed.user_id, placed.payment_method, placed.lines
    ):
        raise OrderstreamError(
            f"order_id_reused: {placed.idempotency_key or placed.order_id} stands for another order, {placed.order_id}\n"
            "it stays as it is: `orderstream order get` shows it; a new order needs a key of its own"
        )


@app.command("cancel")
def order_cancel(order_id: Annotated[str, typer.Argument(help="The order's id.")]) -> None:
    """Cancel an order, and report what became of it.

    One that is paid or confirmed is refunded, and its units return to stock. One that is not known yet is cancelled when it
    comes.
    """
    from orderstream.streams.producer import Outbox
    from orderstream.streams.topics import ORDER_COMMANDS

    ours, order_id = settings(), uuid_of(order_id, "order id")

    async def command(store: Store) -> dict[str, Any]:
        before = await store.order(order_id)
        if before is not None and before["status"] == "CANCELLED":
            return before
        if before is None and await store.removed([order_id]):
            raise NotFound(f"no order {order_id}: it ended long ago and was removed; nothing was commanded")
        outbox, home = Outbox(ours), None if before is None else before["home"]
        outbox.order_command(order_id, json.dumps({"command": "cancel", "order_id": order_id}).encode(), home)
        await with_producer(lambda producer: producer.send(outbox.handovers()), ORDER_COMMANDS)
        if before is None:
            raise NotFound(f"no order {order_id} yet: if it comes, it is cancelled at once")
        return await _ended(store, order_id, HELD_BACK_S, ("CANCELLED",)) or before

    with repeatable():
        order = run(with_store(command))
    if order["status"] == "CANCELLED":
        say(f"{order_id}  CANCELLED  {order['reason']}")
        return
    warn(f"{order_id}  {order['status']}  not cancelled yet: is a worker running?")
    say_again()
    raise typer.Exit(1)
