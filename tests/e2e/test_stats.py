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

from orderstream.jobs.reconcile.reconcile import Reconcile
from orderstream.streams.partitions import product_partition
from tests.browser import Visit, find_chromium, visit
from tests.conftest import ROOT
from tests.harness import Pipeline, Worker

pytestmark = pytest.mark.engines

EVIL = "<script>document.title='taken'</script>"
SLASH = "a/b ?&#%"
WAITS = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND relation = 'orders'::regclass"


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
    for worker in shop.workers:
        able = await ask(worker, "/ready")
        assert (able["status"], able["degraded"], len(able["engines"])) == ("ready", [], 3)

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
        body = await ask(worker, "/stats/pipeline")
        assert {one["url"]: one["answers"] for one in body["workers"]} == dict.fromkeys(urls, True)
        assert sum(one["partitions"] for one in body["workers"]) == len(body["partitions"]) == 5 * 4
        assert all(row["end"] is not None for row in body["partitions"] if row["topic"] == "orders")
        for row in body["partitions"]:
            assert row["owner"] == owners[row["partition"]]
        assert (body["orders"]["confirmed"], body["orders"]["cancelled"]) == (21, {"insufficient_stock": 1})
        assert documented() <= (await ask(worker, "/stats/summary")).keys()
        assert documented() - {"stock"} <= body.keys()

    survivor, lost = shop.workers
    lost.kill()
    moved = next(n for n in range(20) if owners[product_partition(str(n), 4)] == lost.url)
    status, kind, body = await asyncio.to_thread(get, survivor, f"/stats/products/{moved}")
    assert (status, kind) == (503, "application/problem+json")
    assert body["type"] == "urn:orderstream:problem:owner-unavailable"
    for _ in range(100):  # an answer is good for a while
        body = await ask(survivor, "/stats/pipeline")
        if not all(one["answers"] for one in body["workers"]):
            break
        await asyncio.sleep(0.1)
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
    worker = shop.workers[-1]
    assert not (await ask(worker, f"/stats/orders/{order_id}"))["open"]

    # While it finishes a batch, a worker that leaves lives, and is not ready.
    async with (await shop.store()).pool.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
        await shop.produce([shop.order(("one", 1))])
        while not await connection.fetchval(WAITS):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        worker.process.terminate()
        assert (await ask(worker, "/ready", 503))["detail"] == "This worker is leaving."
        assert await ask(worker, "/health") == {"status": "ok"}
    assert await asyncio.to_thread(worker.process.wait, 30) == 0


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
    shop = pipeline(partitions=4)
    await shop.start({"1": 100_000, EVIL: 100_000, SLASH: 9, "few": 3, "elsewhere": 3}, workers=2)
    worker = shop.workers[0]
    host = worker.url.removeprefix("http://")
    sent: list[str] = []

    async def flow() -> None:
        while True:
            orders = [shop.order(("1", 1)), shop.order((EVIL, 1), user_id=EVIL), shop.order(("few", 5))]
            orders += [shop.order(("1", 1), ("elsewhere", 4))]
            sent.extend(await shop.produce(orders))
            await asyncio.sleep(0.2)

    await shop.produce([shop.order((SLASH, 9))])
    await shop.produce_raw(f'{{"user_id": "{EVIL}"}}'.encode())
    flowing = asyncio.create_task(flow())
    try:
        async with visit(chromium, tmp_path / "light", viewport={"width": 1280, "height": 900}) as seen:
            page = seen.page
            await page.goto(f"{worker.url}/stats/")
            await page.wait_for_selector('#state[data-state="running"]')
            await numbers_move(seen)
            # The whole pipeline: charts, both workers, every partition, what is behind the numbers
            assert await page.locator(".plot canvas").count() == 3
            await page.locator("#engines .dot.ok").nth(2).wait_for()
            await page.locator("#verdicts tbody", has_text="insufficient stock").wait_for()
            assert await page.locator("#workers tbody tr", has_text="running").count() == 2
            assert await page.locator("#partitions tbody tr").count() == 4
            assert await page.locator("#shop dd", has_text="of 5 products").count() == 1
            # Keyboard: to the content, to the search; what strangers wrote is text, and is found
            await page.keyboard.press("Tab")
            await page.keyboard.press("Enter")
            assert await page.evaluate("document.activeElement.id") == "main"
            await page.keyboard.press("/")
            await page.keyboard.type(EVIL)
            await page.keyboard.press("Enter")
            await page.locator("#customer tbody th").first.wait_for()
            await page.locator("#asked tbody th").first.wait_for()
            assert (await page.title()).startswith(f"Orders: {EVIL}")
            assert await page.locator("main script").count() == 0
            await page.focus("#asked tbody th a")
            await page.keyboard.press("Enter")
            await page.locator("#history li", has_text="orders, partition").first.wait_for()
            # Products: searched while one types, sorted, sold out
            await page.goto(f"{worker.url}/stats/products")
            await page.keyboard.press("/")
            await page.keyboard.type("script")
            await page.locator("#said", has_text="1 to 1 of 1").wait_for()
            assert "q=script" in page.url
            await page.goto(f"{worker.url}/stats/products?show=out")
            (gone,) = await page.locator("tr.gone").all()
            assert SLASH in await gone.inner_text()
            assert await gone.locator(".badge.out").inner_text() == "sold out"
            assert "9.00" in await gone.locator("[data-label=revenue]").inner_text()
            await gone.locator("a").click()
            await page.locator("#asked tbody tr", has_text="confirmed").wait_for()
            # Why an order was refused, by its home's product and by another worker's
            for n, product_id, wanted in ((2, "few", 5), (3, "elsewhere", 4)):
                await page.goto(f"{worker.url}/stats/orders?q={sent[n].upper()}")
                said = await page.locator("#why").inner_text()
                assert said == f"It wanted {wanted} of {product_id}; 3 were left."
            # Letters and runs of reconcile, behind their numbers
            await page.goto(f"{worker.url}/stats/")
            await page.click("text=Dead letters >> nth=1")
            await page.locator("summary", has_text="invalid order").click()
            assert EVIL in await page.locator("pre").inner_text()
            await page.goto(f"{worker.url}/stats/reconcile")
            assert "never run" in await page.locator("#runs").inner_text()
            async with Reconcile(shop.settings, file=tmp_path / "checkpoint.json", settle_s=20.0) as job:
                await job.note(await job.run())
            await page.reload()
            assert "all agree" in await page.locator("#runs tbody").inner_text()
            # A hidden tab asks nothing, and catches up when it is seen again
            await page.goto(f"{worker.url}/stats/")
            await numbers_move(seen)
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

            phone_like = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2}
            async with visit(chromium, tmp_path / "dark", color_scheme="dark", **phone_like) as phone:
                for path in (
                    "",
                    "products",
                    "orders",
                    f"orders/{sent[2]}",
                    "dead-letters",
                    "reconcile",
                    "products/few",
                ):
                    await phone.page.goto(f"{worker.url}/stats/{path}")
                    await phone.page.wait_for_selector('#state[data-state="running"]')
                    assert await phone.overflow() == 0, path
                assert await phone.page.evaluate("getComputedStyle(document.body).backgroundColor") != light
                assert not phone.faults
                assert phone.hosts == {host}

            async with visit(chromium, tmp_path / "plain", java_script_enabled=False) as plain:
                await plain.page.goto(f"{worker.url}/stats/")
                assert await plain.number("#steps > div:nth-child(1) .t") > 0
                await plain.page.click("text=Products >> nth=0")
                await plain.page.click("th >> text=sold >> nth=0")
                assert await plain.page.locator('th[aria-sort="descending"]').inner_text() == "sold \N{DOWNWARDS ARROW}"
                await plain.page.click("tbody th a >> nth=0")
                assert await plain.page.locator("#asked tbody tr").count() > 1

            assert await seen.overflow() == 0
            assert not seen.faults
            assert seen.hosts == {host}
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
