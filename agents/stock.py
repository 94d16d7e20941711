"""Stock commands: what people and deliveries move and change of a product, applied by its owner in the settle lane."""

from __future__ import annotations

import uuid
from typing import Any

from orderstream import metrics
from orderstream.agents.batches import Batch
from orderstream.agents.desk import Desk
from orderstream.agents.intake import reject, take_in
from orderstream.agents.stage import StageOutbox
from orderstream.errors import InvalidRecord
from orderstream.lua.gate import Counts
from orderstream.sql import stages
from orderstream.streams.commands import WHY, StockCommand, decode_stock_command
from orderstream.streams.producer import Outbox
from orderstream.streams.topics import STOCK_COMMANDS

REASONS = {"reused": "order_id_reused", "too_many_units": "invalid_command"}


def sort(desk: Desk, batch: Batch, outbox: Outbox) -> list[tuple[StockCommand, Any]]:
    """Return the stock commands of a batch with their records; those over other partitions' products are sent on."""
    commands: list[tuple[StockCommand, Any]] = []
    topic = desk.stage.settings.topic(STOCK_COMMANDS.name)
    for record, command in take_in(batch.records(topic), lambda r: decode_stock_command(r.value), outbox):
        if desk.owner_of(str(command.product_id)) == record.partition:
            commands.append((command, record))
        else:
            outbox.stock_command(str(command.product_id), record.value)
            metrics.SENT_ON.inc()
    return commands


async def apply(desk: Desk, batch: Batch, outbox: StageOutbox) -> None:
    """Apply the stock commands of a batch, in one transaction; those that can't be applied are rejected."""
    stage, lane, commands = desk.stage, desk.settle, sort(desk, batch, outbox)
    moving = [(command, record) for command, record in commands if command.command != "recount"]
    counts: dict[str, Counts] = {}
    if moving:
        given = [stages.Commanded(command, record.partition, record.offset) for command, record in moving]
        partitions, marks = {record.partition for _, record in moving}, desk.take_marks()
        partitions |= {mark.partition for mark in marks}

        async def write() -> stages.Written:
            step = lane.step(partitions, marks)
            return await stages.apply_commands(stage.store.pool, lane, step, given, uuid.uuid4())

        written = await stage.until_available("postgres", write, batch)
        counts.update(written.counts)
        desk.views.counted(written.counts, written.sold)
        each = zip(moving, written.row["each_outcome"], written.row["each_change"], strict=True)
        for (command, record), outcome, change in each:
            if outcome not in WHY and command.is_open:  # what came of it: told again where it comes again
                outbox.stock_command(str(command.product_id), command.model_copy(update={"change": change}).encode())
            elif outcome in WHY:
                reason = REASONS.get(outcome, outcome)
                reject(InvalidRecord(reason, f"product {command.product_id} {WHY[outcome]}"), record, outbox)
    recounted = {str(command.product_id): record for command, record in commands if command.command == "recount"}
    if recounted:
        rows = await stage.until_available("postgres", lambda: stage.store.products(list(recounted)), batch)
        known = stage.store.counts_of(rows)
        counts.update(known)
        desk.views.counted(known, {row["product_id"]: row["sold"] for row in rows}, recounted=recounted)
        for product_id, record in recounted.items():
            if product_id not in known:
                reject(
                    InvalidRecord("unknown_product", f"product {product_id} is not in the catalogue"), record, outbox
                )
    if counts:
        await stage.update_gate(counts, batch=batch)
    if commands:
        outbox.steps.done("stock")
