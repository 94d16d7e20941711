"""The command line against a pipeline that runs: orders, stock, files, verify."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
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
CASES = project_dir() / "tests" / "data" / "orders"
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
    held = await shop.orderstream("stock", "adjust", "1", "-12", "--reason", "broken")
    assert (held.returncode, "insufficient_stock: product 1 has fewer units" in held.stderr) == (1, True)
    put = await shop.orderstream("product", "put", "cup", "--name", "Tea cup", "--price-cents", "300")
    assert (put.returncode, "Tea cup" in put.stdout) == (0, True), put.stderr
    for option, retired in (((), True), (("--back",), False)):
        answer = await shop.orderstream("product", "retire", "cup", *option)
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.split()[-1] == ("yes" if retired else "no")
        assert await (await shop.store()).pool.fetchval("SELECT retired FROM stock WHERE product_id = 'cup'") is retired

    other = await shop.orderstream("order", "place", "--user", "me", "--item", "1=3", "--key", "k")
    assert (other.returncode, "order_id_reused: k stands for another order" in other.stderr) == (1, True)
    listed = json.loads((await shop.orderstream("order", "list", "--user", "me", "--json")).stdout)
    assert [(one["status"], one["reason"]) for one in listed] == [
        ("CANCELLED", "insufficient_stock"),
        ("CANCELLED", "cancelled_by_user"),
    ]
    assert order_id in (await shop.orderstream("order", "list", "--limit", "9")).stdout
    assert (await shop.orderstream("order", "list", "--status", "paid", "--json")).stdout.strip() == "[]"

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
        assert (first.returncode, "CANCELLED insufficient_stock" in first.stdout) == (1, True), first.stderr
        assert "61 orders with 931 lines sent" in first.stdout
        assert "skipped: 10 credit notes" in first.stdout
        sold = await (await shop.store()).pool.fetchval("SELECT sum(sold) FROM stock")
        assert sold > 0
        second = await shop.orderstream("produce", str(SAMPLE), "--wait")
        assert second.stdout.splitlines()[:6] == first.stdout.splitlines()[:6], second.stderr
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


async def test_the_files_of_shops_sell_what_they_say(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({f"F10{n}": 2_000 for n in range(10)})
    await shop.limit("F109", 2)

    async def produced(*names: str) -> dict[str, subprocess.CompletedProcess[str]]:
        runs = [shop.orderstream("produce", str(CASES / name), "--wait") for name in names]
        return dict(zip(names, await asyncio.gather(*runs), strict=True))

    first = await produced("f06-interleaved.csv", "f07-badrow.csv", "f08-scientific.csv", "f22-day1.csv")
    first |= await produced("f25-guests.csv", "f27-key-twice.jsonl")
    then = await produced("f07-mended.csv", "f22-day2.csv")
    assert {name: answer.returncode for name, answer in {**first, **then}.items()} == {
        "f06-interleaved.csv": 0,
        "f07-badrow.csv": 1,
        "f08-scientific.csv": 1,
        "f22-day1.csv": 0,
        "f25-guests.csv": 0,
        "f27-key-twice.jsonl": 1,
        "f07-mended.csv": 0,
        "f22-day2.csv": 1,
    }
    assert "1 invoices left out whole: 760001" in first["f07-badrow.csv"].stderr
    assert "0 orders with 0 lines sent" in first["f08-scientific.csv"].stdout
    assert "line 2, idempotency_key: order_id_reused: web-1" in first["f27-key-twice.jsonl"].stderr
    assert "890001: order_id_reused: its key stands for another order" in then["f22-day2.csv"].stderr
    rows = await (await shop.store()).pool.fetch(
        "SELECT idempotency_key, status::text, product_ids, quantities FROM orders ORDER BY 1"
    )
    assert [(row[0], row[1], dict(zip(row[2], row[3], strict=True))) for row in rows] == [
        ("750001", "CONFIRMED", {"F100": 6, "F101": 2, "F102": 1}),
        ("750002", "CONFIRMED", {"F100": 1, "F101": 3}),
        ("760001", "CONFIRMED", {"F100": 6, "F101": 1200, "F102": 1}),
        ("760002", "CONFIRMED", {"F103": 2}),
        ("890001", "CONFIRMED", {"F100": 1}),
        *((f"90000{n}", "CONFIRMED", {"F109": 1}) for n in (1, 2, 3, 4)),
        ("web-1", "CONFIRMED", {"F100": 1}),
    ]
    letters = await shop.dead_letters(1)  # it is told behind the order that has the key
    assert [letter["reason"] for letter in letters] == ["order_id_reused"]
    assert await shop.violations() == []


async def test_what_is_missing_is_found_before_anything_is_sent(pipeline: Make, tmp_path: Path) -> None:
    shop, place, receive = pipeline(), ["order", "place", "--item", "1=1"], ["stock", "receive", "1", "5"]
    file = tmp_path / "orders.jsonl"
    file.write_text('{"user_id": "u", "items": [{"product_id": 1, "quantity": 2}], "payment_method": "card"}\n' * 3)
    for command in (place, ["produce", str(file)], receive):
        answer = await shop.orderstream(*command)
        assert (answer.returncode, "orderstream init" in answer.stderr) == (2, True), answer.stderr
    await shop.start({"1": 10}, workers=0)
    other = pipeline(database_url="postgresql://127.0.0.1:9/none")
    for command in (place, ["produce", str(file), "--wait"]):
        answer = await other.orderstream(*command)
        assert (answer.returncode, "Postgres does not answer" in answer.stderr) == (2, True), answer.stderr
    assert await shop.records("orders") == []

    # Nobody takes them in: the repeat that is named is the same orders, and the same command.
    given = (place, ["produce", str(file), "--wait", "--timeout", "1"], receive)
    waited = await asyncio.gather(*(shop.orderstream(*command) for command in given))
    repeats = [re.search(r"nothing counts twice: orderstream (.*)", answer.stderr) for answer in waited]
    assert [answer.returncode for answer in waited] == [1, 1, 1]
    shop.add_worker()
    await shop.settled(1)
    for repeat in repeats:
        assert repeat is not None
        answer = await shop.orderstream(*shlex.split(repeat[1]))
        assert answer.returncode == 0, answer.stdout + answer.stderr
    assert await shop.has_counts("1", 8, 0, 7)
    assert await (await shop.store()).pool.fetchval("SELECT count(*) FROM orders") == 4
    assert await shop.violations() == []


async def test_the_stock_of_a_file_is_set_or_refused_whole(pipeline: Make, tmp_path: Path) -> None:
    shop = pipeline()
    await shop.start({"a": 10, "b": 10})
    file = tmp_path / "counted.csv"
    file.write_text("SKU;Units;Name;Price\na;7;;\nb;9;Bowl;2,50\nnew;5;;\na;8;;\n")
    refused = await shop.orderstream("stock", "import", str(file))
    assert (refused.returncode, "line 5, SKU: a is in line 2 already" in refused.stderr) == (1, True)
    file.write_text("SKU;Units;Name;Price\na;7;;\nb;9;Bowl;2,50\nnew;5;;\n")
    refused = await shop.orderstream("stock", "import", str(file))
    assert (refused.returncode, "line 4, -: no product new" in refused.stderr) == (1, True)
    assert [row["available"] for row in await (await shop.store()).products()] == [10, 10]

    rows = "".join(f"n{n};{n};Thing {n};1,99\n" for n in range(5_000))
    file.write_text("SKU;Units;Name;Price\na;7;;\nb;9;Bowl;2,50\n" + rows)
    taken = await shop.orderstream("stock", "import", str(file), "--reason", "stocktaking")
    assert (taken.returncode, f"{file}: 5002 products set" in taken.stdout) == (0, True), taken.stderr
    found = {row["product_id"]: row for row in await (await shop.store()).products()}
    assert {p: (found[p]["available"], found[p]["name"], found[p]["price_cents"]) for p in ("a", "b", "n4999")} == {
        "a": (7, "a", 100),
        "b": (9, "Bowl", 250),
        "n4999": (4999, "Thing 4999", 199),
    }
    assert sum(row["available"] for row in found.values()) == 16 + sum(range(5_000))

    assert await shop.violations() == []

    # What is held can't be set aside: that one is refused, and told.
    await (await shop.store()).pool.execute("UPDATE stock SET reserved = 3 WHERE product_id = 'a'")
    file.write_text("product,quantity\na,2\nb,8\n")
    partly = await shop.orderstream("stock", "import", str(file))
    assert (partly.returncode, "insufficient_stock: product a" in partly.stderr) == (1, True), partly.stderr
    assert f"{file}: 1 products set" in partly.stdout
