"""Takes the pictures of the docs again: ``make screenshots``.

Engines, two workers, the real invoices of ``data/`` over and over, a run of reconcile, and a browser.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from orderstream.engines.probes import create_database, drop_database
from orderstream.jobs.demo import flash_orders
from orderstream.jobs.init import Product, init
from orderstream.jobs.invoices import read_catalogue, read_orders
from orderstream.jobs.produce import send
from orderstream.jobs.reconcile.reconcile import Reconcile
from orderstream.settings import Settings, load
from orderstream.streams.orders import Limits, Order
from tests.browser import find_chromium, visit
from tests.conftest import ROOT, engines_of_this_run
from tests.harness import Pipeline

SECONDS = 200
"""How long orders flow before the pictures are taken: most of a chart."""

FILE = ROOT / "data" / "online-retail-sample.csv"
FLASH = "FLASH"
DESKTOP = {"viewport": {"width": 1280, "height": 720}}
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2}
PICTURES: dict[str, tuple[dict[str, Any], str, str]] = {
    "stats-light.png": (DESKTOP, "light", ""),
    "stats-dark.png": (DESKTOP, "dark", ""),
    "stats-phone.png": (PHONE, "dark", ""),
    "stats-products.png": (DESKTOP, "light", "products"),
    "stats-order.png": (DESKTOP, "dark", "orders/{refused}"),
}
"""By file: the browser's window, its colours, and the page."""

SCARCE = 10
"""Products that are sold out on the pictures: one invoice has them, so the others are sold on."""


def stocked(catalogue: list[Product], invoices: list[Order]) -> list[Product]:
    """Return the products with stock for hours or minutes, a few for less."""
    drawn, asked = random.Random(1), Counter(product_id for order in invoices for product_id, _ in order.lines)
    scarce = [product.product_id for product in catalogue if asked[product.product_id] == 1][::12][:SCARCE]
    return [
        one._replace(units=one.units * (20 if one.product_id in scarce else int(110 * 40 ** drawn.random())))
        for one in catalogue
    ]


async def flow(shop: Pipeline, invoices: list[Order]) -> None:
    """Send the invoices over and over, as new orders, with a flash sale now and then."""
    producer, drawn = await shop.producer(), random.Random(1)
    for step in range(10**9):
        orders = [
            order._replace(order_id=str(uuid.uuid4()), idempotency_key=None)
            for order in drawn.choices(invoices, k=drawn.randint(3, 9))
        ]
        if step % 60 < 4:
            orders += flash_orders(FLASH, drawn.randint(20, 60))
        await send(shop.settings, producer, orders)
        if step % 150 == 20:
            await shop.produce_raw(b'{"user_id": "me", "items": []}', product_id=str(step))
        await asyncio.sleep(0.4)


async def take(settings: Settings, folder: Path) -> None:
    """Run it all, and write the pictures."""
    _, drawn = read_orders(FILE, Limits(settings.order_lines_max, settings.line_quantity_max, settings.order_bytes_max))
    invoices = list(drawn)
    few = [Product(FLASH, "Flash sale", 1_999, 700), Product("LAST-3", "TEA SET, LAST PIECES", 4_500, 3)]
    await init(settings, [*stocked(read_catalogue(FILE, 0.66), invoices), *few])
    shop = Pipeline(settings, folder)
    chromium = find_chromium()
    try:
        worker, _ = shop.add_worker(), shop.add_worker()
        await shop.settled(2)
        flowing = asyncio.create_task(flow(shop, invoices))
        (refused,) = await shop.produce([shop.order(("LAST-3", 5), user_id="customer-17")])
        await asyncio.sleep(SECONDS)
        async with Reconcile(settings, file=None, settle_s=20.0) as job:
            await job.note(await job.run())
        for name, (options, scheme, path) in PICTURES.items():
            async with visit(chromium, folder / name, color_scheme=scheme, **options) as seen:
                await seen.page.goto(f"{worker.url}/stats/{path.format(refused=refused)}")
                await seen.page.locator("#engines .dot.ok").nth(2).wait_for()
                await asyncio.sleep(4)
                await seen.page.screenshot(path=ROOT / "docs" / name)
                print(f"docs/{name}: {(ROOT / 'docs' / name).stat().st_size // 1024} kB")
        flowing.cancel()
        with suppress(asyncio.CancelledError):
            await flowing
    finally:
        await shop.close()


def main() -> None:
    """See the module."""
    with engines_of_this_run(".pictures") as local, tempfile.TemporaryDirectory() as folder:
        run = f"t{uuid.uuid4().hex[:10]}"
        url = create_database(local.addresses()["database_url"], run)
        settings = load(
            **{**local.addresses(), "database_url": url},
            topic_prefix=f"{run}.",
            redis_prefix=run,
            app_id=run,
            local_dir=Path(folder) / "local",
            payment_success_rate=0.95,
            payment_latency_min_s=0.01,
            payment_latency_max_s=0.15,
            _env_file=None,
        )
        try:
            asyncio.run(take(settings, Path(folder)))
        finally:
            drop_database(url)


if __name__ == "__main__":
    main()
