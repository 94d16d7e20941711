"""The command line.  Exit codes: 0 good; 1 a check failed or some input was bad; 2 wrong use, or an engine is away."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from orderstream.console import say, show_outcome, table, warn
from orderstream.errors import EngineAway, EngineMissing, NotFound, OrderstreamError, SettingsError

if TYPE_CHECKING:
    from orderstream.engines import LocalEngines
    from orderstream.letters import Letter, LetterId, Outcome, Plan, Reader, Standing
    from orderstream.settings import Settings
    from orderstream.sql.store import Store
    from orderstream.streams.producer import Producer

T = TypeVar("T")
HELD_BACK_S = 10.0
"""How long a command waits for what it commanded, in seconds."""

app = typer.Typer(
    name="orderstream",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""
Orders on Kafka, stock held, paid, committed: nothing oversold, lost, charged twice or stuck.

A first round, on engines of its own: `orderstream demo`. By hand:

    orderstream up                       Kafka, Redis and Postgres, under .local/

    orderstream init                     topics, tables, five products

    orderstream worker                   (another terminal) reserve, pay, commit

    orderstream order place --user me --item 1=2

    orderstream verify                   every promise, checked

Settings come from ORDERSTREAM_… variables and from .env; `orderstream config` lists them all.
""",
)
stock_app = typer.Typer(no_args_is_help=True, help="Look at stock; receive and adjust it.")
order_app = typer.Typer(no_args_is_help=True, help="Look at orders; place and cancel them.")
app.add_typer(stock_app, name="stock")
app.add_typer(order_app, name="order")
letters_app = typer.Typer(no_args_is_help=True, help="Look at what was refused and why; send it again, or drop it.")
app.add_typer(letters_app, name="dead-letters")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def settings(**overrides: Any) -> Settings:
    """Read the settings."""
    from orderstream.settings import load

    return load(**{name: value for name, value in overrides.items() if value is not None})


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end."""
    return asyncio.run(work)


async def with_store(use: Callable[[Store], Awaitable[T]]) -> T:
    """Connect Postgres for one use.

    Raises:
        EngineAway: it does not answer, or was never initialised.
    """
    from orderstream import away
    from orderstream.sql.store import Store

    ours = settings()
    with away.postgres(ours):
        store = await Store.connect(ours.database_url, connections_max=2, timeout_s=30)
    try:
        with away.postgres(ours, faults=()):
            return await use(store)
    finally:
        await store.close()


async def with_producer(use: Callable[[Producer], Awaitable[T]]) -> T:
    """Connect Kafka for one use.

    Raises:
        EngineAway: it does not answer.
    """
    from orderstream import away
    from orderstream.streams.producer import Producer

    ours = settings()
    producer = Producer(ours, client_id="orderstream-cli")
    with away.kafka(ours):
        await producer.start()
    try:
        return await use(producer)
    finally:
        await producer.stop()


# Engines


def local() -> LocalEngines:
    """Return the local engines of these settings."""
    from orderstream.engines import LocalEngines, given_addresses

    return LocalEngines(settings().local_dir, given=given_addresses(), say=say)


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
    """Tell which engines run, where, and which version."""
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
        Path | None, typer.Option(help="An order CSV (Online Retail form): load its products instead of the five.")
    ] = None,
    stock_share: Annotated[
        float, typer.Option(min=0, max=100, help="With --catalogue: units in stock, as a share of each one's demand.")
    ] = 0.66,
) -> None:
    """Create topics, migrate the schema, load products. Safe to repeat.

    Products that are there keep their stock and price.
    """
    from orderstream import init as setup
    from orderstream.invoices import read_catalogue

    products = setup.SEED if catalogue is None else read_catalogue(catalogue, stock_share)
    done = run(setup.init(settings(), products))
    say(f"topics: {len(done.topics_created)} created, {len(done.topics_there)} there")
    say(f"migrations: {', '.join(done.migrations) or 'up to date'}")
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


# Processes


@app.command()
def worker(
    web_port: Annotated[int | None, typer.Option(help="Port of the stats pages; 0 takes a free one.")] = None,
    web: Annotated[bool | None, typer.Option("--web/--no-web", help="Serve the stats pages.")] = None,
) -> None:
    """Run a worker: the stages reserve, pay and commit, on the partitions that Kafka gives it.

    Start as many as there are partitions at most. It leaves on SIGTERM; killed at any moment, it loses nothing.
    """
    from orderstream.app import run_worker

    run_worker(settings(web_port=web_port, web_enabled=web))


@app.command()
def ingress(
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    host: Annotated[str | None, typer.Option(help="Address; loopback unless told otherwise.")] = None,
) -> None:
    """Run the ingress: orders over HTTP under `/api/v1/orders`; `/health`, `/ready`, `/metrics`."""
    from orderstream.http.server import run as serve

    serve(settings(http_port=port, http_host=host))


@app.command()
def demo(
    orders: Annotated[int, typer.Option(min=1, help="Orders of the flash sale.")] = 10_000,
    units: Annotated[int, typer.Option(min=1, help="Units of its product.")] = 1_000,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the worker, the ingress and the engines running.")] = False,
) -> None:
    """Run the whole way on real input: engines, worker, ingress, real invoices, a flash sale, `verify`.

    The same as `make run`. Exits with 0 only when every promise holds.
    """
    from orderstream.demo import run_demo

    raise typer.Exit(run_demo(orders=orders, units=units, keep=keep))


@app.command()
def bench(
    scenario: Annotated[str, typer.Argument(help="A scenario, or `all`.")] = "all",
    orders: Annotated[
        int | None, typer.Option(min=100, help="Orders of one run; 50,000, of a flash sale 100,000, unless told.")
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

        scale        1, 2, 4 workers, as far as there are cores

        floor        the same by plain aiokafka loops without Faust: the limit

        replay       a reconciliation of 1,000,000 records: records/s, and its memory

        grown        1,000,000 orders and 100,000 products in the store already, against none

        soak         1,000,000 orders by one worker: its memory, its rate, what the stores keep

        peers        asyncpg with row locks, and DBOS workflows, on the same tables: how many times faster

    A first look: `orderstream bench peers --orders 5000 --runs 1`. Figures are worth what the machine is: they tell what
    other processes took meanwhile.
    """
    from orderstream.bench.run import main as measure

    raise typer.Exit(measure(scenario, orders, runs, out))


# Orders


def _limits(ours: Settings) -> Any:
    from orderstream.streams.orders import Limits

    return Limits(ours.order_lines_max, ours.line_quantity_max, ours.order_bytes_max)


@app.command()
def produce(
    file: Annotated[Path, typer.Argument(help="Orders: .jsonl, a record a line, or .csv, the Online Retail form.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait until every order has ended, and tell how.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="With --wait: how long, in seconds.")] = 300.0,
    rate: Annotated[float | None, typer.Option(min=0.1, help="Orders a second at most.")] = None,
) -> None:
    """Send orders from a file to the topic.

    A line that can't be read is told with its place and left out; the rest goes on, and the exit code is 1 at the end.
    Sent again, a file of invoices is the same orders: their numbers are their idempotency keys.

        orderstream produce data/online-retail-sample.csv --wait
    """
    from orderstream.console import Bar
    from orderstream.invoices import read_orders
    from orderstream.produce import send
    from orderstream.produce import wait as wait_for

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


def _uuid(text: str, what: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no {what}: expected a UUID") from None


async def _order(store: Store, order_id: str) -> dict[str, Any]:
    order = await store.order(order_id)
    if order is None:
        raise NotFound(f"no order {order_id}")
    return order


@order_app.command("get")
def order_get(order_id: Annotated[str, typer.Argument(help="The order's id.")], as_json: Json = False) -> None:
    """Show an order: status, lines, payment, history."""
    known = _uuid(order_id, "order id")
    order = run(with_store(lambda store: _order(store, known)))
    if as_json:
        say(json.dumps(order, default=str, indent=2))
        return
    for name in (
        "order_id",
        "status",
        "reason",
        "user_id",
        "payment_method",
        "total_cents",
        "payment_status",
        "charge_id",
    ):
        if order[name] is not None:
            say(f"{name:>16}  {order[name]}")
    for name in ("placed_at", "created_at", "reserved_at", "paid_at", "confirmed_at", "cancelled_at", "refunded_at"):
        if order[name] is not None:
            say(f"{name:>16}  {order[name].isoformat()}")
    rows = [
        [line["product_id"], line["quantity"], line["unit_price_cents"] or "", line["state"], line["reason"] or ""]
        for line in order["lines"]
    ]
    table("", ["product", "units", "price (cents)", "state", "reason"], rows)


async def _ended(
    store: Store, order_id: str, timeout_s: float, ends: Sequence[str] = ("CONFIRMED", "CANCELLED")
) -> dict[str, Any] | None:
    deadline = time.monotonic() + timeout_s
    while True:
        order = await store.order(order_id)
        if (order is not None and order["status"] in ends) or time.monotonic() > deadline:
            return order
        await asyncio.sleep(0.05)


@order_app.command("place")
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

    from orderstream.produce import send
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


@order_app.command("cancel")
def order_cancel(order_id: Annotated[str, typer.Argument(help="The order's id.")]) -> None:
    """Cancel an order, and tell what became of it.

    One that is paid or confirmed is refunded, and its units return to stock.
    """
    from orderstream.streams.producer import Outbox

    ours, order_id = settings(), _uuid(order_id, "order id")

    async def command(store: Store) -> dict[str, Any]:
        before = await _order(store, order_id)
        if before["status"] == "CANCELLED":
            return before
        outbox = Outbox(ours)
        outbox.order_command(order_id, json.dumps({"command": "cancel", "order_id": order_id}).encode())
        await with_producer(lambda producer: producer.send(outbox.handed()))
        return await _ended(store, order_id, HELD_BACK_S, ("CANCELLED",)) or before

    order = run(with_store(command))
    if order["status"] == "CANCELLED":
        say(f"{order_id}  CANCELLED  {order['reason']}")
        return
    warn(f"{order_id}  {order['status']}  not cancelled yet: is a worker running?")
    raise typer.Exit(1)


# Stock


async def _products(store: Store, ids: list[str] | None) -> list[dict[str, Any]]:
    rows = await store.products(ids)
    missing = sorted(set(ids or ()) - {row["product_id"] for row in rows})
    if missing:
        raise NotFound(f"no product {', '.join(missing)}")
    return rows


def _show_products(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        say(json.dumps(rows, indent=2))
        return
    names = ("product_id", "name", "price_cents", "available", "reserved", "sold", "initial", "received", "adjusted")
    table("", [name.replace("_", " ") for name in names], [[row[name] for name in names] for row in rows], right=2)


@stock_app.command("get")
def stock_get(
    product_ids: Annotated[list[str], typer.Argument(help="Products.", metavar="PRODUCT…")], as_json: Json = False
) -> None:
    """Show the counts of products."""
    _show_products(run(with_store(lambda store: _products(store, product_ids))), as_json)


@stock_app.command("list")
def stock_list(as_json: Json = False) -> None:
    """Show the counts of all products."""
    _show_products(run(with_store(lambda store: _products(store, None))), as_json)


def _command_stock(body: dict[str, Any]) -> None:
    from pydantic import ValidationError

    from orderstream.streams.commands import StockCommand
    from orderstream.streams.orders import describe
    from orderstream.streams.producer import Outbox

    try:
        command = StockCommand.model_validate(body)
    except ValidationError as error:
        raise OrderstreamError(describe(error)) from None
    ours, product_id, command_id = settings(), str(command.product_id), str(command.command_id)

    async def work(store: Store) -> list[dict[str, Any]] | None:
        await _products(store, [product_id])
        outbox = Outbox(ours)
        outbox.stock_command(product_id, command.model_dump_json().encode())
        await with_producer(lambda producer: producer.send(outbox.handed()))
        deadline = time.monotonic() + HELD_BACK_S
        while not await store.stock_command_seen(command_id):
            if time.monotonic() > deadline:
                return None
            await asyncio.sleep(0.05)
        return await _products(store, [product_id])

    rows = run(with_store(work))
    if rows is None:
        warn(
            f"command {command_id} was sent and not carried out within {HELD_BACK_S:.0f} s: is a worker running, are "
            f"there as many units available?  A refused one is among the dead letters."
        )
        raise typer.Exit(1)
    _show_products(rows, False)


CommandId = Annotated[str | None, typer.Option("--command-id", help="A UUID: a repeated command changes nothing.")]


@stock_app.command("receive")
def stock_receive(
    product_id: Annotated[str, typer.Argument(help="Product.")],
    quantity: Annotated[int, typer.Argument(min=1, help="Units that came in.")],
    command_id: CommandId = None,
) -> None:
    """Add units that came in.

    orderstream stock receive 1 50
    """
    known = _uuid(command_id, "command id") if command_id else str(uuid.uuid4())
    _command_stock({"command": "receive", "command_id": known, "product_id": product_id, "quantity": quantity})


@stock_app.command("adjust", context_settings={"ignore_unknown_options": True})
def stock_adjust(
    product_id: Annotated[str, typer.Argument(help="Product.")],
    quantity: Annotated[int, typer.Argument(help="Units to add, or with a minus to remove.")],
    reason: Annotated[str, typer.Option(help="Why: stands in the ledger.")],
    command_id: CommandId = None,
) -> None:
    """Correct the count, and say why. Units that are held or gone can't be removed.

    orderstream stock adjust 1 -3 --reason "broken in the warehouse"
    """
    known = _uuid(command_id, "command id") if command_id else str(uuid.uuid4())
    body = {"command": "adjust", "command_id": known, "product_id": product_id, "quantity": quantity, "reason": reason}
    _command_stock(body)


@stock_app.command("limit")
def stock_limit(
    product_id: Annotated[str, typer.Argument(help="Product.")],
    units: Annotated[
        int | None, typer.Argument(min=1, max=2_147_483_647, help="Units that one user may have, over all orders.")
    ] = None,
    none: Annotated[bool, typer.Option("--none", help="No limit any more.")] = False,
) -> None:
    """Limit how many units of a product one user may have, over all of their orders; without units: tell the limit.

    Held and sold units count; what is released or returned does not. Who has more already keeps it, and gets no more.

    orderstream stock limit 1 2
    """
    if none and units is not None:
        raise typer.BadParameter("give units, or --none")

    from orderstream.limits import set_limit

    async def work(store: Store) -> list[dict[str, Any]]:
        if none or units is not None:
            await _products(store, [product_id])
            ours = settings()
            await with_producer(lambda producer: set_limit(ours, store, producer, product_id, units))
        return await _products(store, [product_id])

    (row,) = run(with_store(work))
    limit = row["limit_per_user"]
    say(f"{product_id}  " + (f"at most {limit} units a user" if limit is not None else "no limit"))


# Dead letters

LetterIds = Annotated[list[str] | None, typer.Argument(help="Letters, PARTITION/OFFSET as `list` tells.", metavar="ID")]
OfReason = Annotated[str | None, typer.Option("--reason", help="Only letters of this reason.")]
OfTopic = Annotated[str | None, typer.Option("--topic", help="Only records that stood on this topic.")]
Yes = Annotated[bool, typer.Option("--yes", help="With --all: do it, instead of telling what would be done.")]
AgainToo = Annotated[bool, typer.Option("--again", help="Also letters that were retried or dropped before.")]

LETTERS_TOLD_MAX = 50
"""Letters told one by one, of many."""

WHY_CHARS_MAX = 500
"""As much as the reason of a drop may say."""


def _letter_id(text: str) -> LetterId:
    from orderstream.letters import parse_id

    try:
        return parse_id(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _wanted(reason: str | None, topic: str | None) -> Callable[[Letter], bool]:
    from orderstream.letters import SOURCES
    from orderstream.streams.dead_letters import REASONS

    ours = settings()
    topics = {name: ours.topic(spec.name) for spec in SOURCES for name in (spec.name, ours.topic(spec.name))}
    if reason is not None and reason not in REASONS:
        raise typer.BadParameter(f"{reason!r} is no reason: expected one of {', '.join(REASONS)}")
    if topic is not None and topic not in topics:
        told = ", ".join(spec.name for spec in SOURCES)
        raise typer.BadParameter(f"{topic!r} is no topic that letters come from: expected one of {told}")
    return lambda letter: (
        (reason is None or letter.reason == reason)
        and (topic is None or (letter.source is not None and letter.source.topic == topics[topic]))
    )


def with_letters(use: Callable[[Store, Reader], Awaitable[T]]) -> T:
    """Open Postgres and the topic of dead letters for one use, and run it to the end."""
    from orderstream.letters import reading

    async def work(store: Store) -> T:
        async with reading(settings()) as reader:
            return await use(store, reader)

    return run(with_store(work))


def _text(data: bytes | None) -> str | None:
    if data is None:
        return None
    try:
        return data.decode()
    except ValueError:
        return "0x" + data.hex()


def _letter_json(letter: Letter, standing: Standing) -> dict[str, Any]:
    source = letter.source
    return {
        "id": str(letter.id),
        "at": letter.at.isoformat(),
        "reason": letter.reason,
        "detail": letter.detail,
        "source": source and {"topic": source.topic, "partition": source.partition, "offset": source.offset},
        "size": letter.size,
        "key": _text(letter.key),
        "retry_of": letter.retry_of,
        "cut_from": letter.cut_from,
        "state": standing.state,
        "why": standing.why,
        "begun_at": standing.begun_at and standing.begun_at.isoformat(),
        "done_at": standing.done_at and standing.done_at.isoformat(),
    }


def _say_json(told: Any) -> None:
    say(json.dumps(told, indent=2).replace("\x7f", "\\u007f"))


@letters_app.command("list")
def letters_list(
    closed: Annotated[bool, typer.Option("--all", help="Also those that were retried or dropped.")] = False,
    reason: OfReason = None,
    topic: OfTopic = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many.")] = 100,
    as_json: Json = False,
) -> None:
    """List what was refused and is still open, the newest last.

    State `retrying` is a retry that was begun and not finished: retry the letter again, it counts once.

        orderstream dead-letters list --reason not_json --topic orders
    """
    from orderstream.console import Bar, printable
    from orderstream.letters import listing

    wanted = _wanted(reason, topic)

    async def work(store: Store, reader: Reader) -> Any:
        with Bar("read", reader.total) as bar:
            return await listing(store, reader, wanted, closed=closed, limit=limit, progress=bar.update)

    found = with_letters(work)
    if as_json:
        _say_json([_letter_json(letter, standing) for letter, standing in found.letters])
        return
    total = found.states.total()
    if not total:
        say("no dead letters" + ("" if closed else " open") + (" of these" if reason or topic else ""))
        return
    rows = [
        [
            letter.id,
            f"{letter.at:%Y-%m-%d %H:%M:%S}",
            printable(letter.reason, 40),
            printable(str(letter.source or ""), 80),
            "" if letter.key is None else printable(_text(letter.key) or "", 40),
            standing.state,
            f"{letter.size:,}",
        ]
        for letter, standing in found.letters
    ]
    table("", ["id", "when (UTC)", "reason", "source", "key", "state", "bytes"], rows, right=6)
    if len(rows) < total:
        say(f"the newest {len(rows):,} of {total:,}; --limit tells more")
    states = ", ".join(f"{number:,} {state}" for state, number in sorted(found.states.items()))
    say(f"{states}: " + ", ".join(f"{printable(name, 40)} {n:,}" for name, n in found.reasons.most_common()))


@letters_app.command("show")
def letters_show(
    letter_id: Annotated[str, typer.Argument(help="PARTITION/OFFSET, as `list` tells.", metavar="ID")],
    raw: Annotated[str | None, typer.Option(help="Write the value's exact bytes here; - for the output.")] = None,
    as_json: Json = False,
) -> None:
    """Show a letter: why it was refused, where it stood, what it holds, what was done about it.

    What is no printable text is told in escapes, or as a hex dump. To mend one:

        orderstream dead-letters show 3/17 --raw order.json

        orderstream dead-letters retry 3/17 --value order.json
    """
    from orderstream.console import form_of
    from orderstream.letters import standings

    known = _letter_id(letter_id)
    if raw == "-" and sys.stdout.isatty():
        raise typer.BadParameter("--raw - needs a file or a pipe: the bytes may command a terminal")

    async def work(store: Store, reader: Reader) -> tuple[Letter, Standing]:
        letter = await reader.one(known)
        return letter, (await standings(store, [letter]))[known]

    letter, standing = with_letters(work)
    if raw == "-":
        sys.stdout.buffer.write(letter.value or b"")
        sys.stdout.buffer.flush()
    elif raw is not None:
        try:
            Path(raw).write_bytes(letter.value or b"")
        except OSError as error:
            raise OrderstreamError(f"{raw}: can't be written: {error.strerror}") from None
        say(f"{raw}: {len(letter.value or b''):,} bytes")
    elif as_json:
        headers = [[name, _text(data)] for name, data in letter.headers]
        value = letter.value
        text = value is None or form_of(value) != "no text"
        told = {"value": _text(value)} if text else {"value_hex": (value or b"").hex()}
        _say_json({**_letter_json(letter, standing), "headers": headers, **told})
    else:
        _show_letter(letter, standing)


def _show_letter(letter: Letter, standing: Standing) -> None:
    from orderstream.console import form_of, printable, shown

    facts = [
        ("letter", str(letter.id)),
        ("state", str(standing)),
        ("when", letter.at.isoformat(sep=" ", timespec="milliseconds")),
        ("reason", letter.reason),
        ("detail", letter.detail),
        ("source", str(letter.source or "not told")),
        ("retry of", letter.retry_of),
        ("cut from", None if letter.cut_from is None else f"{letter.cut_from:,} bytes: only a part of it is here"),
        *(("header", f"{name}: {_text(data)}") for name, data in letter.headers[:LETTERS_TOLD_MAX]),
        ("key", "none" if letter.key is None else _text(letter.key)),
    ]
    for name, told in facts:
        if told is not None:
            say(f"{name:>10}  {printable(told, 4_000)}")
    for name, data in (("value", letter.value), ("sent as", standing.value)):
        if data is None:
            say(f"{name:>10}  none") if name == "value" else None
            continue
        say(f"{name:>10}  {len(data):,} bytes, {form_of(data) if data else 'empty'}")
        for line in shown(data) if data else ():
            say(f"{'':>12}{line}")


def _chosen(ids: list[str] | None, everything: bool, reason: str | None, topic: str | None) -> list[LetterId]:
    if bool(ids) == everything:
        raise typer.BadParameter("expected letters' ids, or --all")
    if not everything and (reason or topic):
        raise typer.BadParameter("--reason and --topic go with --all")
    return list(dict.fromkeys(map(_letter_id, ids or ())))


async def _each_page(
    store: Store,
    reader: Reader,
    ids: list[LetterId],
    wanted: Callable[[Letter], bool],
    act: Callable[[list[Letter]], Awaitable[list[Outcome]]],
) -> list[Outcome]:
    """Act on the letters of these ids or, without any, on all open ones that are wanted, page by page."""
    from orderstream.console import Bar
    from orderstream.letters import standings

    if ids:
        return await act([await reader.one(letter_id) for letter_id in ids])
    outcomes: list[Outcome] = []
    seen = 0
    with Bar("read", reader.total) as bar:
        async for page in reader.pages():
            asked = [letter for letter in page if wanted(letter)]
            there = await standings(store, asked)
            done = await act([letter for letter in asked if not there[letter.id].closed])
            outcomes += [one._replace(letter=one.letter._replace(value=None, headers=())) for one in done]
            seen += len(page)
            bar.update(seen)
    return outcomes


def _tell_outcomes(outcomes: list[Outcome], what: str, dry: bool) -> None:
    """Tell what became of letters; exit 1 when one was refused, unless it was only asked what would be."""
    from orderstream.console import printable

    good = [one for one in outcomes if one.done]
    bad = [one for one in outcomes if not one.done]
    for one in good[:LETTERS_TOLD_MAX]:
        say(f"{one.letter.id}  {one.told}")
    for one in bad[:LETTERS_TOLD_MAX]:
        warn(f"{one.letter.id}  not {what}: {printable(one.told, 2_000)}")
    if not outcomes:
        say("no dead letters open of these")
    elif len(outcomes) > 1 or dry:
        say(f"{len(good):,} {'would be ' if dry else ''}{what}" + (f", {len(bad):,} not" if bad else ""))
    if dry and good:
        say("nothing was done: --yes does it")
    if bad and not dry:
        raise typer.Exit(1)


VALUE_BYTES_MAX = 1024 * 1024
"""Of a corrected value; the broker takes no larger record."""


def _corrected(file: str) -> bytes:
    try:
        if file == "-":
            value = sys.stdin.buffer.read(VALUE_BYTES_MAX + 1)
        else:
            with Path(file).open("rb") as opened:
                value = opened.read(VALUE_BYTES_MAX + 1)
    except OSError as error:
        raise OrderstreamError(f"{file}: can't be read: {error.strerror}") from None
    if len(value) > VALUE_BYTES_MAX:
        raise OrderstreamError(f"{file}: more than {VALUE_BYTES_MAX:,} bytes, which no record can hold")
    return value


@letters_app.command("retry")
def letters_retry(
    ids: LetterIds = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="All that are open; only told, without --yes.")] = False,
    reason: OfReason = None,
    topic: OfTopic = None,
    value: Annotated[
        str | None, typer.Option(help="One letter: send this file's bytes instead of its own; - for the input.")
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Leave the record's own headers out.")] = False,
    again: AgainToo = False,
    yes: Yes = False,
) -> None:
    """Send refused records again to the topics that they came from, each once.

    What would be refused again is not sent; the exit code is 1 then. An order without id keeps the id that its first place
    gave it, so a retry that a crash interrupted can be repeated and is still one order.

        orderstream dead-letters retry 3/17 --value order.json

        orderstream dead-letters retry --all --reason unknown_product --yes
    """
    from orderstream.letters import Outcome, carry_out, plan

    chosen, wanted, ours = _chosen(ids, everything, reason, topic), _wanted(reason, topic), settings()
    if value is not None and len(chosen) != 1:
        raise typer.BadParameter("--value is for one letter")
    if again and everything:
        raise typer.BadParameter("--again is for letters told by their ids")
    corrected = None if value is None else _corrected(value)
    dry = everything and not yes

    async def work(store: Store, reader: Reader) -> list[Outcome]:
        async def look(letters: list[Letter]) -> tuple[list[Plan], list[Outcome]]:
            return await plan(store, ours, letters, value=corrected, again=again, own_headers=not bare)

        async def tell(letters: list[Letter]) -> list[Outcome]:
            plans, refused = await look(letters)
            there = [f"would be sent to {one.sending.topic}/{one.sending.partition}" for one in plans]
            return [*(Outcome(p.letter, True, told) for p, told in zip(plans, there, strict=True)), *refused]

        async def retry(producer: Producer) -> list[Outcome]:
            async def send(letters: list[Letter]) -> list[Outcome]:
                plans, refused = await look(letters)
                return [*await carry_out(store, producer, plans, again=again), *refused]

            return await _each_page(store, reader, chosen, wanted, send)

        return await (_each_page(store, reader, chosen, wanted, tell) if dry else with_producer(retry))

    _tell_outcomes(with_letters(work), "sent again", dry)


@letters_app.command("drop")
def letters_drop(
    why: Annotated[str, typer.Option(help="Why nobody wants them: stands with the letter.")],
    ids: LetterIds = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="All that are open; only told, without --yes.")] = False,
    reason: OfReason = None,
    topic: OfTopic = None,
    again: AgainToo = False,
    yes: Yes = False,
) -> None:
    """Note that nobody wants letters any more. Nothing is deleted: `list --all` and `show` still tell them.

    orderstream dead-letters drop 3/17 --why "a test of the shop's"
    """
    from orderstream.letters import Outcome, drop

    chosen, wanted = _chosen(ids, everything, reason, topic), _wanted(reason, topic)
    if not why.strip() or not why.isprintable() or len(why) > WHY_CHARS_MAX:
        raise typer.BadParameter(f"--why: expected 1 to {WHY_CHARS_MAX} printable characters")
    if again and everything:
        raise typer.BadParameter("--again is for letters told by their ids")
    dry = everything and not yes

    async def work(store: Store, reader: Reader) -> list[Outcome]:
        async def act(letters: list[Letter]) -> list[Outcome]:
            if dry:
                return [Outcome(letter, True, "would be dropped") for letter in letters]
            return await drop(store, letters, why, again=again)

        return await _each_page(store, reader, chosen, wanted, act)

    _tell_outcomes(with_letters(work), "dropped", dry)


# Checks


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
    from orderstream.verify import verify as check

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
    from orderstream.checkpoint import UnusableCheckpoint, default_file
    from orderstream.console import Bar, show_reconciled
    from orderstream.reconcile import Reconcile
    from orderstream.reconcile import as_json as told_as_json
    from orderstream.repair import mend

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
                    report.repairs = await mend(job, report.differences)
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

    Works while orders flow. An order stays as long as anything is left to do about it, or a topic still has a record that may
    tell of it. Exit 0: done, or counted; 2: an engine is away, or it is not said how long orders are kept.

        orderstream prune                        how many would go, and what holds others back

        orderstream prune --yes                  remove them

        orderstream prune --keep-days 30 --yes   those of which nothing has changed for 30 days
    """
    from orderstream import away
    from orderstream.console import Bar, show_pruned
    from orderstream.prune import WHYS, look_at_topics
    from orderstream.prune import as_json as told_as_json
    from orderstream.prune import prune as remove

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


def main() -> NoReturn:
    """Run the command line; every expected fault is one message and an exit code."""
    try:
        app()
    except (SettingsError, EngineAway, EngineMissing) as error:
        warn(f"orderstream: {error}")
        sys.exit(2)
    except OrderstreamError as error:
        warn(f"orderstream: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
