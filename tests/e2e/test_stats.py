"""The pages of real workers: each answers for the other's products and orders, and people see orders flow in a browser."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from orderstream.streams.partitions import product_partition
from tests.browser import Visit, find_chromium, visit
from tests.conftest import ROOT
from tests.harness import Pipeline, Worker

pytestmark = pytest.mark.engines

EVIL = "<script>document.title='taken'</script>"
SLASH = "a/b ?&#%"


def get(worker: Worker, path: str) -> tuple[int, str, Any]:
    """Return status, content type and document of a worker's answer."""
    try:
        with urllib.request.urlopen(worker.url + path, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], json.load(error)


async def ask(worker: Worker, path: str, status: int = 200) -> Any:
    """Return what a worker answers, once it has this status: a table is written a moment after the order's end."""
    for _ in range(100):
        got, kind, body = await asyncio.to_thread(get, worker, path)
        if got == status:
            assert kind == ("application/json" if status == 200 else "application/problem+json")
            return body
        await asyncio.sleep(0.1)
    raise AssertionError(f"{path}: {got}, not {status}: {body}")


async def test_each_worker_answers_for_the_other_ones_products_and_orders(pipeline: Callable[..., Pipeline]) -> None:
    shop = pipeline(partitions=4, stall_timeout_s=60)
    products = {**{str(n): 50 for n in range(24)}, EVIL: 5, SLASH: 5}
    await shop.start(products, workers=2)
    ids = await shop.produce(
        [*(shop.order((str(n), 2)) for n in range(20)), shop.order((EVIL, 1)), shop.order((SLASH, 9))]
    )
    assert await shop.finished(ids) == {"CONFIRMED": 21, "CANCELLED insufficient_stock": 1}
    urls = {worker.url for worker in shop.workers}

    owners: dict[int, str] = {}
    for product_id, left, sold in (*((str(n), 48, 2) for n in range(20)), ("23", 50, 0), (EVIL, 4, 1), (SLASH, 5, 0)):
        path = f"/stats/products/{quote(product_id, safe='')}"
        for worker in shop.workers:
            body = await ask(worker, path)
            for _ in range(100):  # the table is written a moment after the order's row
                if body["sold"] == sold:
                    break
                await asyncio.sleep(0.1)
                body = await ask(worker, path)
            assert body["product_id"] == product_id
            assert (body["available"], body["reserved"], body["sold"]) == (left, 0, sold)
            assert body["partition"] == product_partition(product_id, 4)
            assert owners.setdefault(body["partition"], body["owner"]) == body["owner"]
    assert set(owners.values()) == urls

    answering = set()
    for order_id in ids:
        for worker in shop.workers:
            body = await ask(worker, f"/stats/orders/{order_id.upper()}")
            assert body["order_id"] == order_id
            assert body["status"] in ("CONFIRMED", "CANCELLED")
            assert len(body["lines"]) == 1
            answering.add(body["owner"])
    assert answering == urls

    for worker in shop.workers:
        for n in range(30, 38):  # of all partitions, hence of both workers
            body = await ask(worker, f"/stats/products/{n}", 404)
            assert body["type"] == "urn:orderstream:problem:product-not-found"
            body = await ask(worker, f"/stats/orders/{uuid.uuid4()}", 404)
            assert body["type"] == "urn:orderstream:problem:order-not-found"
        body = await ask(worker, "/stats/partitions")
        assert {one["url"]: one["answers"] for one in body["workers"]} == dict.fromkeys(urls, True)
        assert sum(one["partitions"] for one in body["workers"]) == len(body["partitions"]) == 5 * 4
        assert all(row["end"] is not None for row in body["partitions"] if row["topic"] == "orders")
        for row in body["partitions"]:
            assert row["owner"] == owners[row["partition"]]
        summary = await ask(worker, "/stats/summary")
        assert documented() <= summary.keys()

    survivor, lost = shop.workers
    lost.kill()
    moved = next(n for n in range(20) if owners[product_partition(str(n), 4)] == lost.url)
    status, kind, body = await asyncio.to_thread(get, survivor, f"/stats/products/{moved}")
    assert (status, kind) == (503, "application/problem+json")
    assert body["type"] == "urn:orderstream:problem:owner-unavailable"
    body = await ask(survivor, "/stats/partitions")
    assert {one["url"]: one["answers"] for one in body["workers"]} == {survivor.url: True, lost.url: False}
    await shop.settled(1)
    body = await ask(survivor, f"/stats/products/{moved}")
    assert (body["owner"], body["sold"]) == (survivor.url, 2)


async def test_an_order_that_waits_is_shown_by_its_home_and_by_the_next_one(pipeline: Callable[..., Pipeline]) -> None:
    shop = pipeline(payment_latency_min_s=8.0, payment_latency_max_s=8.0)
    await shop.start({"one": 10})
    (order_id,) = await shop.produce([shop.order(("one", 2))])

    async def waits(worker: Worker, number: int) -> None:
        for _ in range(300):
            if await asyncio.to_thread(worker.metric, "orders_waiting") == number:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"not {number} orders wait\n{worker.tail()}")

    for _ in range(2):
        worker = shop.workers[-1]
        await waits(worker, 1)
        body = await ask(worker, f"/stats/orders/{order_id}")
        assert (body["status"], body["open"]) == ("RESERVED", True)
        assert await asyncio.to_thread(worker.metric, "orders_open", status="RESERVED") == 1
        assert (await ask(worker, "/stats/products/one"))["reserved"] == 2
        if len(shop.workers) == 1:
            worker.kill()
            shop.add_worker()
            await shop.settled(1)
    assert await shop.finished([order_id]) == {"CONFIRMED": 1}
    await waits(shop.workers[-1], 0)
    assert not (await ask(shop.workers[-1], f"/stats/orders/{order_id}"))["open"]


def documented() -> set[str]:
    """Return the members of the summary that docs/STATS.md explains."""
    text = (ROOT / "docs" / "STATS.md").read_text()
    columns = re.findall(r"^\| [^|]+ \| (`[^|]+`) \|", text.partition("| in the summary |")[2], re.MULTILINE)
    found = {name for column in columns for name in re.findall(r"`(\w+)", column)}
    assert {"orders", "lag", "unavailable", "state"} <= found
    return found


@pytest.fixture(scope="session")
def chromium() -> Path:
    """Return where Chromium is."""
    return find_chromium()


async def numbers_move(seen: Visit) -> None:
    """Wait until the number of orders taken in on the page has grown twice."""
    total = "#steps > div:nth-child(1) .t"
    for _ in range(2):
        before = await seen.number(total)
        for _ in range(100):
            if await seen.number(total) > before:
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError(f"{before} orders taken in, for ten seconds")


async def test_people_see_the_orders_flow(pipeline: Callable[..., Pipeline], chromium: Path, tmp_path: Path) -> None:
    shop = pipeline()
    await shop.start({"1": 100_000, EVIL: 100_000, "few": 3}, workers=1)
    (worker,) = shop.workers
    sent: list[str] = []

    async def flow() -> None:
        while True:
            orders = [shop.order(("1", 1)), shop.order((EVIL, 1)), shop.order(("few", 2))]
            sent.extend(await shop.produce(orders))
            await asyncio.sleep(0.2)

    flowing = asyncio.create_task(flow())
    try:
        async with visit(
            chromium, tmp_path / "light", viewport={"width": 1280, "height": 900}, color_scheme="light"
        ) as seen:
            page = seen.page
            await page.goto(f"{worker.url}/stats/")
            await page.wait_for_selector('#state[data-state="running"]')
            await numbers_move(seen)
            # Chart, tables, engines
            assert await page.locator(".plot canvas").count() == 3
            await page.locator("#engines .dot.ok").nth(2).wait_for()
            await page.locator("#verdicts tbody", has_text="insufficient stock").wait_for()
            assert await page.locator("#partitions tbody tr").count() == shop.settings.partitions
            # What strangers wrote is text
            await page.locator("#stock tbody th", has_text=EVIL).wait_for()
            assert "taken" not in await page.title()
            assert await page.locator("main script").count() == 0
            # Keyboard: from the first field of the form to its answer
            await page.focus("#ask-id")
            await page.keyboard.type(EVIL)
            await page.keyboard.press("Enter")
            await page.locator("#answer tr", has_text="available").wait_for()
            await page.fill("#ask-id", sent[0])
            await page.keyboard.press("Tab")
            await page.keyboard.press("Enter")
            await page.locator("#answer tr", has_text="CONFIRMED").first.wait_for()
            assert not seen.faults
            # A hidden tab asks nothing, and catches up when it is seen again
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            await show_tab(seen, False)
            await asyncio.sleep(0.5)  # what was under way
            asked.clear()
            await asyncio.sleep(2.5)
            assert not asked
            await show_tab(seen, True)
            await numbers_move(seen)
            assert asked
            light = await page.evaluate("getComputedStyle(document.body).backgroundColor")

            async with visit(
                chromium,
                tmp_path / "dark",
                viewport={"width": 360, "height": 740},
                color_scheme="dark",
                device_scale_factor=2,
            ) as phone:
                await phone.page.goto(f"{worker.url}/stats/")
                await phone.page.wait_for_selector('#state[data-state="running"]')
                await numbers_move(phone)
                # A fresh page shows what the worker remembers of before it was opened.
                rows = await phone.page.evaluate("store.rows.length")
                assert rows > 4
                assert await phone.overflow() == 0
                assert await phone.page.evaluate("getComputedStyle(document.body).backgroundColor") != light
                assert not phone.faults
                assert phone.hosts == {worker.url.removeprefix("http://")}

            assert await seen.overflow() == 0
            assert not seen.faults
            assert seen.hosts == {worker.url.removeprefix("http://")}
            flowing.cancel()
            with suppress(asyncio.CancelledError):
                await flowing
            worker.kill()
            alarm = page.locator("#alarm")
            await alarm.wait_for(state="visible", timeout=20_000)
            assert "No answer from this worker" in await alarm.inner_text()
            assert await page.locator("#state").inner_text() == "no answer"
    finally:
        flowing.cancel()


async def show_tab(seen: Visit, shown: bool) -> None:
    """Make the page believe that its tab is seen, or not."""
    await seen.page.evaluate(
        "shown => { Object.defineProperty(document, 'hidden', {configurable: true, get: () => !shown});"
        " document.dispatchEvent(new Event('visibilitychange')); }",
        shown,
    )
