"""The command line against a pipeline that runs: orders, stock, files, verify."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orderstream.engines.child import Child
from orderstream.jobs.init import init
from orderstream.jobs.invoices import read_catalogue
from orderstream.settings import project_dir
from tests.harness import Pipeline

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]
SAMPLE = project_dir() / "data" / "online-retail-sample.csv"


async def test_orders_and_stock_by_hand(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"1": 10, "2": 10})
    placed = await shop.orderstream("order", "place", "--user", "me", "--item", "1=2", "--item", "2=1", "--key", "k")
    assert placed.returncode == 0, placed.stderr
    order_id, status = placed.stdout.split()
    assert status == "CONFIRMED"
    again = await shop.orderstream("order", "place", "--user", "me", "--item", "1=2", "--item", "2=1", "--key", "k")
    assert again.stdout.split() == [order_id, "CONFIRMED"]
    too_many = await shop.orderstream("order", "place", "--item", "1=11")
    assert (too_many.returncode, too_many.stdout.split()[1:]) == (1, ["CANCELLED", "insufficient_stock"])

    order = json.loads((await shop.orderstream("order", "get", order_id, "--json")).stdout)
    assert (order["status"], order["total_cents"], len(order["lines"])) == ("CONFIRMED", 300, 2)
    shown = await shop.orderstream("order", "get", order_id)
    assert "CONFIRMED" in shown.stdout
    for _ in range(2):  # the second one gets the answer of the first
        cancelled = await shop.orderstream("order", "cancel", order_id)
        assert (cancelled.returncode, "CANCELLED" in cancelled.stdout) == (0, True), cancelled.stderr
    for missing in (("order", "get"), ("order", "cancel")):
        answer = await shop.orderstream(*missing, "6f1b2c1e-2f52-5d2b-9a55-5d0e5a0c9a11")
        assert (answer.returncode, "no order" in answer.stderr) == (1, True)

    assert (await shop.orderstream("stock", "receive", "1", "5")).returncode == 0
    adjusted = await shop.orderstream("stock", "adjust", "1", "-3", "--reason", "broken")
    assert adjusted.returncode == 0, adjusted.stderr
    counted = await shop.orderstream("stock", "set", "1", "11", "--reason", "stocktaking")
    assert counted.returncode == 0, counted.stderr
    (one,) = json.loads((await shop.orderstream("stock", "get", "1", "--json")).stdout)
    assert {k: one[k] for k in ("available", "reserved", "sold", "received", "adjusted")} == {
        "available": 11,
        "reserved": 0,
        "sold": 0,
        "received": 5,
        "adjusted": -4,
    }
    assert len(json.loads((await shop.orderstream("stock", "list", "--json")).stdout)) == 2
    nothing = await shop.orderstream("stock", "receive", "none", "5")
    assert (nothing.returncode, "no product none" in nothing.stderr) == (1, True)

    good = await shop.orderstream("verify")
    assert (good.returncode, "all hold" in good.stdout) == (0, True), good.stdout + good.stderr
    await (await shop.store()).pool.execute(
        "UPDATE stock SET sold = sold + 1, initial = initial + 1 WHERE product_id = '1'"
    )
    bad = await shop.orderstream("verify")
    assert bad.returncode == 1
    assert "the ledger explains the counts: 1: " in bad.stderr


async def test_a_file_of_invoices_twice_is_the_same_orders(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({}, workers=0)
    await init(shop.settings, read_catalogue(SAMPLE, 0.66))
    worker = Child("worker", shop.settings, shop.folder / "worker.log")  # as a user starts it
    try:
        first = await shop.orderstream("produce", str(SAMPLE), "--wait")
        assert first.returncode == 0, first.stderr
        assert "61 orders with 931 lines sent" in first.stdout
        assert "skipped: 10 credit notes" in first.stdout
        sold = await (await shop.store()).pool.fetchval("SELECT sum(sold) FROM stock")
        assert sold > 0
        second = await shop.orderstream("produce", str(SAMPLE), "--wait")
        assert second.returncode == 0, second.stderr
        assert await (await shop.store()).pool.fetchval("SELECT sum(sold) FROM stock") == sold
        assert await (await shop.store()).pool.fetchval("SELECT count(*) FROM orders") == 61
        assert await shop.violations() == []
    finally:
        code = await asyncio.to_thread(worker.stop)
    assert code == 0, worker.tail()


async def test_faulty_lines_of_a_file_are_reported_and_the_rest_is_sent(pipeline: Make, tmp_path: Path) -> None:
    shop = pipeline()
    await shop.start({"1": 10})
    good = json.dumps({"user_id": "u", "items": [{"product_id": 1, "quantity": 2}], "payment_method": "card"})
    file = tmp_path / "orders.jsonl"
    file.write_text(f"{good}\n{{\n{good}\n")
    answer = await shop.orderstream("produce", str(file), "--wait")
    assert answer.returncode == 1
    assert f"{file}: line 2" in answer.stderr
    assert "2 orders with 2 lines sent" in answer.stdout
    assert "CONFIRMED" in answer.stdout
    assert await shop.has_counts("1", 6, 0, 4)
