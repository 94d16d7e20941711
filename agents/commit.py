"""Reads ``settlements`` and ``stock-commands``.
Decides nothing that was not decided: lines are committed, released or returned, stock received or adjusted, each once, or
recounted.
Writes lines, counts, ledger and CONFIRMED in Postgres, in one commit; then Redis; then ``stock``, the table of counts.
Emits ``order-events`` (CONFIRMED; CANCELLED of orders that were paid, once all of their units are back).
"""

from __future__ import annotations

from typing import Any

import structlog

from orderstream import metrics
from orderstream.agents.batches import Batch, batches
from orderstream.agents.intake import inner_rows, reject, take_in
from orderstream.agents.stage import Stage, agent_body
from orderstream.errors import InvalidRecord, OwnershipLost
from orderstream.failpoints import failpoint
from orderstream.lua.gate import Counts, UserUnits
from orderstream.streams import events
from orderstream.streams.commands import StockCommand, decode_stock_command
from orderstream.streams.orders import Reason
from orderstream.streams.partitions import product_partition
from orderstream.streams.producer import Outbox
from orderstream.streams.settlements import Action, Settlement
from orderstream.streams.topics import SETTLEMENTS, STOCK_COMMANDS
from orderstream.tables.batched import BatchedTable
from orderstream.tables.stock import note_counts

log = structlog.get_logger("commit")

INTERVAL_PART = 0.5
"""Of the setting ``batch_interval_s``: reserve sets the rhythm, and what it hands over is not to wait as long again."""

Line = tuple[str, str, str, int, int]
"""A settlement as ``settle_batch`` takes it: order id, product id, action, partition and offset of the record."""


def sort(batch: Batch, stage: Stage, outbox: Outbox) -> tuple[list[Line], list[tuple[StockCommand, Any]]]:
    """Sort a batch into settlements, each line once, and stock commands with their records."""
    settings = stage.settings
    settlements: dict[tuple[str, str, str], Line] = {}
    records = batch.records(settings.topic(SETTLEMENTS.name))
    for record, rows in take_in(records, lambda record: inner_rows(record, Settlement), outbox):
        for order_id, product_id, _, action in rows:
            line = (order_id, product_id, action, record.partition, record.offset)
            settlements[order_id, product_id, action] = line
    commands: dict[str, tuple[StockCommand, Any]] = {}
    records = batch.records(settings.topic(STOCK_COMMANDS.name))
    for record, command in take_in(records, lambda record: decode_stock_command(record.value), outbox):
        if product_partition(str(command.product_id), settings.partitions) == record.partition:
            commands.setdefault(str(command.command_id), (command, record))
        else:
            outbox.stock_command(str(command.product_id), record.value)
            metrics.SENT_ON.inc()
    return list(settlements.values()), list(commands.values())


async def commit(stage: Stage, table: BatchedTable, batch: Batch) -> None:
    """Settle one batch, from the records to the events."""
    outbox = stage.outbox("commit", batch)
    settlements, commands = sort(batch, stage, outbox)
    outbox.steps.done("decode")
    counts: dict[str, Counts] = {}
    sold: dict[str, int] = {}
    users: UserUnits = {}
    gate_unavailable = stage.gate.is_unavailable
    returning = any(action == Action.RETURN for _, _, action, _, _ in settlements)
    if returning:
        failpoint("return.before_sql")
    failpoint("commit.before_sql")
    if settlements:
        settled = await stage.until_available(
            "postgres", lambda: stage.store.settle(settlements, gate_unavailable=gate_unavailable), batch
        )
        counts.update(settled.counts)
        sold.update(settled.sold)
        users = settled.users
        paid = {order_id for order_id, _, action, _, _ in settlements if action == Action.COMMIT}
        for order_id, at in settled.confirmed:
            if order_id in paid:
                outbox.event(order_id, events.confirmed(order_id, at))
        if outbox.trace is not None:
            outbox.trace.settled([line[:3] for line in settlements], settled.confirmed)
        for order_id, at in settled.returned:
            outbox.event(order_id, events.cancelled(order_id, at, Reason.CANCELLED_BY_USER))
        metrics.ORDERS_CONFIRMED.inc(sum(at == settled.at for _, at in settled.confirmed))
        for order_id in settled.misfits:
            log.error("a settlement that its order does not agree to was left out", order_id=order_id)
    recounts = [(command, record) for command, record in commands if command.command == "recount"]
    moving = [(command, record) for command, record in commands if command.command != "recount"]
    if moving:
        moves = [(str(c.command_id), str(c.product_id), c.command, c.quantity, c.reason) for c, _ in moving]
        outcomes, moved, moved_sold = await stage.until_available(
            "postgres", lambda: stage.store.move_stock(moves, gate_unavailable=gate_unavailable), batch
        )
        counts.update(moved)
        sold.update(moved_sold)
        for (command, record), outcome in zip(moving, outcomes, strict=True):
            if outcome in ("unknown_product", "insufficient_stock"):
                detail = "is not in the catalogue" if outcome == "unknown_product" else "has fewer units available"
                reject(InvalidRecord(outcome, f"product {command.product_id} {detail}"), record, outbox)
    if recounts:
        ids = sorted({str(command.product_id) for command, _ in recounts})
        recounted, recounted_sold = await stage.until_available("postgres", lambda: stage.store.counts(ids), batch)
        counts.update(recounted)
        sold.update(recounted_sold)
        for command, record in recounts:
            if str(command.product_id) not in recounted:
                fault = f"product {command.product_id} is not in the catalogue"
                reject(InvalidRecord("unknown_product", fault), record, outbox)
    failpoint("commit.after_sql")
    outbox.steps.done("sql")
    if returning:
        failpoint("return.after_sql")
    if counts:
        await stage.update_gate(counts, batch=batch, users=users)
        recounted_ids = {str(command.product_id) for command, _ in recounts}
        note_counts(table, counts, sold, stage.settings.partitions, recounted=recounted_ids)
    failpoint("commit.after_gate")
    outbox.steps.done("update_gate")
    if returning:
        failpoint("return.after_gate")
    await stage.emit(outbox, "commit", batch)
    if returning:
        failpoint("return.after_events")
    changelog = table.pending()
    if changelog:
        batch.check_owned()
        await stage.until_available("kafka", lambda: stage.producer.send(changelog), batch)
        table.settle()
        failpoint("commit.after_table")
        outbox.steps.done("table")


def register(stage: Stage, table: BatchedTable) -> Any:
    """Add the agent to the app."""
    settings, app = stage.settings, stage.app
    topic = app.topic(
        settings.topic(SETTLEMENTS.name),
        settings.topic(STOCK_COMMANDS.name),
        key_serializer="raw",
        value_serializer="raw",
        key_type=bytes,
        value_type=bytes,
    )

    @agent_body
    async def commit_agent(stream: Any) -> None:
        async for batch in batches(
            app,
            stream,
            "commit",
            records_max=settings.batch_records_max,
            interval_s=INTERVAL_PART * settings.batch_interval_s,
        ):
            try:
                with metrics.batch("commit", len(batch)):
                    await commit(stage, table, batch)
            except OwnershipLost:
                table.forget()
                batch.drop()

    return app.agent(topic, name="commit", concurrency=1)(commit_agent)
