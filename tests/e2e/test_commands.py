"""Commands: cancelling orders, receiving, adjusting and setting stock, loading products."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from orderstream.errors import OrderstreamError
from orderstream.jobs.init import SEED, Product, init
from orderstream.streams.producer import Outbox
from orderstream.streams.topics import STOCK_COMMANDS
from tests.harness import Pipeline

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]


async def stock_command(shop: Pipeline, product_id: str, **body: Any) -> None:
    outbox = Outbox(shop.settings)
    outbox.stock_command(product_id, orjson.dumps({"product_id": product_id, **body}))
    await (await shop.producer()).send(outbox.handovers())


async def cancel(shop: Pipeline, order_id: str) -> None:
    outbox = Outbox(shop.settings)
    outbox.order_command(order_id, orjson.dumps({"command": "cancel", "order_id": order_id}))
    await (await shop.producer()).send(outbox.handovers())


async def test_an_order_is_cancelled_before_its_payment_and_its_units_come_back(pipeline: Make) -> None:
    shop = pipeline(payment_latency_min_s=2.0, payment_latency_max_s=2.0)
    await shop.start({"one": 10, "two": 10})
    ids = await shop.produce([shop.order(("one", 3)), shop.order(("one", 1), ("two", 2))])
    await shop.eventually("SELECT count(*) FROM orders WHERE status = 'RESERVED'", 2)
    for order_id in ids:
        await cancel(shop, order_id)
        await cancel(shop, order_id)
    assert await shop.finished(ids) == {"CANCELLED cancelled_by_user": 2}
    assert await shop.has_counts("one", 10, 0, 0)
    assert await shop.has_counts("two", 10, 0, 0)
    # The provider says yes all the same: both are given back.
    await shop.eventually("SELECT count(*) FROM payments WHERE status = 'VOIDED'", 2)
    assert await shop.violations() == []


async def test_an_order_that_is_sold_is_cancelled_refunded_and_its_units_can_be_had_again(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"one": 10, "two": 10})
    ids = await shop.produce([shop.order(("one", 10)), shop.order(("two", 3), ("one", 11)), shop.order(("two", 4))])
    assert await shop.finished(ids) == {"CONFIRMED": 2, "CANCELLED insufficient_stock": 1}
    for order_id in (ids[0], ids[1], ids[0], str(uuid.uuid4())):  # of no order: kept, nothing else
        await cancel(shop, order_id)
    assert await shop.has_counts("one", 10, 0, 0)
    assert await shop.has_counts("two", 6, 0, 4)
    assert await shop.outcomes(ids) == {
        "CONFIRMED": 1,
        "CANCELLED insufficient_stock": 1,
        "CANCELLED cancelled_by_user": 1,
    }
    await shop.eventually("SELECT status FROM payments WHERE order_id = $1::uuid", "REFUNDED", ids[0])
    again = await shop.produce([shop.order(("one", 10), ("two", 6))])
    assert await shop.finished(again) == {"CONFIRMED": 1}
    await cancel(shop, again[0])
    await cancel(shop, again[0])
    assert await shop.has_counts("one", 10, 0, 0)
    assert await shop.has_counts("two", 6, 0, 4)
    published = await shop.published([*ids, *again])
    assert published[ids[0]] == published[again[0]] == ["CREATED", "RESERVED", "PAID", "CONFIRMED", "CANCELLED"]
    assert await shop.violations(grace_s=0.0) == []


async def test_stock_is_received_adjusted_and_set_once_for_each_command(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"one": 5, "set": 5})
    receive, adjust = str(uuid.uuid4()), str(uuid.uuid4())
    for _ in range(3):
        await stock_command(shop, "one", command="receive", command_id=receive, quantity=10)
        await stock_command(shop, "one", command="adjust", command_id=adjust, quantity=-2, reason="broken")
    assert await shop.has_counts("one", 13, 0, 0)
    assert await shop.finished(await shop.produce(shop.order(("one", 1)) for _ in range(20))) == {
        "CONFIRMED": 13,
        "CANCELLED insufficient_stock": 7,
    }

    # What came of a set is a record, and is told again where it comes again.
    counted = {"command": "set", "command_id": str(uuid.uuid4()), "quantity": 20, "reason": "counted"}
    for units in (21, 22):
        await stock_command(shop, "set", **counted)
        await stock_command(shop, "set", command="receive", command_id=str(uuid.uuid4()), quantity=1)
        assert await shop.has_counts("set", units, 0, 0)
    told = [orjson.loads(record.value) for record in await shop.records(STOCK_COMMANDS.name)]
    assert [body.get("change") for body in told if body["command"] == "set"].count(15) == 2
    assert await shop.dead_letters() == []
    assert await shop.violations() == []


async def test_a_stock_command_that_cannot_be_or_has_the_id_of_another_is_a_dead_letter(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"few": 5, "one": 5, "two": 5})
    await stock_command(shop, "few", command="adjust", command_id=str(uuid.uuid4()), quantity=-6, reason="lost")
    await stock_command(shop, "few", command="adjust", command_id=str(uuid.uuid4()), quantity=-1)
    await stock_command(shop, "few", command="receive", command_id="no uuid", quantity=1)
    await stock_command(shop, "none", command="receive", command_id=str(uuid.uuid4()), quantity=1)
    await stock_command(shop, "few", command="receive", command_id=str(uuid.uuid4()), quantity=1)
    assert await shop.has_counts("few", 6, 0, 0)
    await shop.finished(await shop.produce([shop.order(("none", 1))]))
    cannot_be = ["insufficient_stock", "invalid_command", "invalid_command", "unknown_product"]
    assert sorted(letter["reason"] for letter in await shop.dead_letters()) == cannot_be

    one = {"command": "adjust", "command_id": str(uuid.uuid4()), "quantity": 1, "reason": "found"}
    await stock_command(shop, "one", **one)
    await stock_command(shop, "one", **one)
    assert await shop.has_counts("one", 6, 0, 0)
    others = [("two", one), ("one", {**one, "quantity": 2}), ("one", {**one, "reason": "given"})]
    others.append(("one", {name: one[name] for name in ("command_id", "quantity")} | {"command": "receive"}))
    for product_id, command in others:
        await stock_command(shop, product_id, **command)
    await shop.finished(await shop.produce([shop.order(("one", 1)), shop.order(("two", 1))]))
    letters = await shop.dead_letters(len(cannot_be) + len(others), timeout_s=15)
    assert sorted(letter["reason"] for letter in letters) == sorted([*cannot_be, *["order_id_reused"] * 4])
    assert await shop.has_counts("one", 5, 0, 1)
    assert await shop.has_counts("two", 4, 0, 1)


async def test_once_a_worker_has_been_there_products_are_loaded_by_commands(pipeline: Make) -> None:
    shop = pipeline(partitions=2)
    await shop.start({"1": 7}, workers=1)
    done = await init(shop.settings, [*SEED, Product("6", "Desk", 100, 0)])
    assert (done.products_new, done.products_there) == (5, 1)
    store = await shop.store()
    rows = {row["product_id"]: (row["name"], row["price_cents"], row["available"]) for row in await store.products()}
    assert rows == {"1": ("1", 100, 7), "6": ("Desk", 100, 0)} | {p.product_id: p[1:] for p in SEED[1:]}
    assert (await init(shop.settings, SEED)).products_new == 0
    assert await shop.violations() == []


async def test_without_a_worker_products_are_sent_once_and_this_is_said(
    pipeline: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = pipeline(partitions=2)
    await shop.start({"1": 7}, workers=1)
    await shop.eventually("SELECT count(*) FROM lanes WHERE lane = 'settle'", 2)  # a worker has been here
    assert await asyncio.to_thread(shop.workers[0].stop) == 0
    monkeypatch.setattr("orderstream.jobs.init.LOAD_S", 0.2)
    for _ in range(2):
        with pytest.raises(OrderstreamError, match="4 products were sent to the workers"):
            await init(shop.settings)
    shop.add_worker()
    await shop.settled(1)
    await shop.eventually("SELECT count(*) FROM stock_commands", 8)
    assert [await shop.has_counts(p.product_id, p.units, 0, 0) for p in SEED[1:]]
    assert await shop.dead_letters() == []
