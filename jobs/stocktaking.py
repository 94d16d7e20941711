"""The units of many products from a table: checked whole, sent as stock commands, and what became of each."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orderstream.jobs.forms import AS_IT_IS, Form, Map, columns_of
from orderstream.jobs.invoices import Reading, cents_of, mark_of, units_of
from orderstream.jobs.produce import Progress
from orderstream.jobs.sheets import read_sheet
from orderstream.settings import Settings
from orderstream.sql.store import Store, query
from orderstream.streams.commands import StockCommand
from orderstream.streams.orders import describe
from orderstream.streams.producer import Outbox, Producer

STOCK = Form(
    {
        "product": ("product", "product_id", "sku", "Variant SKU"),
        "quantity": ("quantity", "units", "on_hand", "stock", "qty", "Variant Inventory Qty"),
        "name": ("name", "product_name", "description", "title"),
        "price": ("price", "unit_price", "Variant Price"),
        "cents": ("price_cents",),
    },
    needs=("product", "quantity"),
)
"""A table of products.  ``price`` is in the currency, like 2.55; ``cents`` whole numbers."""

SENT_MAX = 2_000
"""Commands sent, and asked about, in one go: a second's work of a worker, about."""


@dataclass(slots=True)
class Row:
    """What a row says of a product, as commands: its name and price if it has any, then its units."""

    line: int
    product_id: str
    commands: list[StockCommand]


@dataclass(slots=True)
class Taken:
    """What became of the products of a table.

    Attributes:
        set: how many have the units that it says.
        refused: by product, why nothing was set.
        open: how many have not been decided when the time was up.
    """

    set: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    open: int = 0


def read_stock(file: Path, why: Mapping[str, str], run: uuid.UUID, given: Map = AS_IT_IS) -> tuple[Reading, list[Row]]:
    """Read a table of products whole.

    Args:
        file: with a product and its units in the house a row, and perhaps its name and price.
        why: the reason for which the units are set, and the actor if there is one, for the ledger.
        run: names the commands: the same ones in each run of this id.
        given: which columns are which.

    Raises:
        OrderstreamError: it can't be read.
    """
    sheet, reading = read_sheet(file), Reading(file)
    columns = columns_of(sheet, given, {"stock": STOCK}, STOCK)
    cells = {line: (dict(zip(columns.at, (row[at] for at in columns.at.values()), strict=True)) if not fault else {}, fault)
             for line, row, fault in sheet.rows(columns.delimiter)}  # fmt: skip
    mark = mark_of(columns, (row.get("price", "") for row, _ in cells.values()))
    rows: dict[str, Row] = {}
    for line, (row, fault) in cells.items():
        if fault:
            reading.fault(line, "-", fault)
            continue
        product_id, of = row["product"], "quantity"
        try:
            given_product: dict[str, Any] = {"name": row["name"]} if row.get("name") else {}
            quantity = units_of(row["quantity"])
            if row.get("cents"):
                of = "cents"
                given_product["price_cents"] = units_of(row["cents"])
            if row.get("price"):
                of = "price"
                price = cents_of(row["price"], mark)
                if (cents := given_product.setdefault("price_cents", price)) != price:
                    raise ValueError(f"{row['price']}, but {columns.names['cents']} is {cents}")
            of = "product"
            bodies: list[dict[str, Any]] = [{"command": "set", "quantity": quantity, **why}]
            if given_product:
                bodies.insert(0, {**why, "command": "product", "reason": "", **given_product})
            commands = [
                StockCommand.model_validate(
                    {
                        **body,
                        "product_id": product_id,
                        "command_id": uuid.uuid5(run, f"{body['command']}\0{product_id}"),
                    }
                )
                for body in bodies
            ]
        except ValidationError as error:
            reading.fault(line, "-", describe(error))
            continue
        except ValueError as error:
            reading.fault(line, columns.names[of], str(error))
            continue
        first = rows.setdefault(product_id, Row(line, product_id, commands))
        if first.line != line:
            reading.fault(line, columns.names["product"], f"{product_id} is in line {first.line} already")
    return reading, [*rows.values()]


async def check_known(store: Store, rows: Sequence[Row], reading: Reading) -> None:
    """Note as faults the products that are not there, of which the table has no name and price to make them."""
    there = {row["product_id"] for row in await store.products([row.product_id for row in rows])}
    for row in rows:
        made = row.commands[0]
        if row.product_id not in there and (made.name is None or made.price_cents is None):
            reading.fault(row.line, "-", f"no product {row.product_id}: with a name and a price it would be made")


async def take_stock(
    settings: Settings,
    store: Store,
    producer: Producer,
    rows: Sequence[Row],
    *,
    timeout_s: float,
    progress: Progress = lambda _: None,
) -> Taken:
    """Send the commands of a table, and wait until each is decided, or nothing was for so long.

    Args:
        settings: of the pipeline.
        store: connected.
        producer: started.
        rows: as :func:`read_stock` returned them.
        timeout_s: how long to wait for the next decision, in seconds.
        progress: called with the number of products that are decided so far.
    """
    began, taken, done = await store.pool.fetchval(query("now")), Taken(), 0
    for start in range(0, len(rows), SENT_MAX):
        part, outbox = rows[start : start + SENT_MAX], Outbox(settings)
        for row in part:
            for command in row.commands:
                outbox.stock_command(row.product_id, command.encode())
        await producer.send(outbox.handovers())
        open_ones = {str(command.command_id): row for row in part for command in row.commands}
        deadline = time.monotonic() + timeout_s
        while open_ones and time.monotonic() < deadline:
            decided = await _decided(store, [*open_ones], began)
            for command_id, outcome in decided.items():
                row = open_ones.pop(command_id)
                if outcome != "applied":
                    taken.refused[row.product_id] = outcome
            if decided:
                deadline = time.monotonic() + timeout_s
            undecided = {row.product_id for row in open_ones.values()}
            progress(done + len(part) - len(undecided))
            await asyncio.sleep(0.02)
        done += len(part)
        if open_ones:
            taken.open = len({row.product_id for row in open_ones.values()}) + len(rows) - done
            break
    taken.set = len(rows) - taken.open - len(taken.refused)
    return taken


async def _decided(store: Store, command_ids: Sequence[str], began: datetime) -> dict[str, str]:
    rows = await store.pool.fetch(query("commands_decided"), command_ids, began)
    return {row["command_id"]: row["outcome"] for row in rows}
