"""The HTTP API held to its own OpenAPI document by schemathesis, and to what the published service's clients rely on."""

from __future__ import annotations

import asyncio
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from yarl import URL

from orderstream.http.protocol import Runner, bounds
from orderstream.http.server import create_app
from orderstream.settings import Settings
from tests.browser import find_chromium, visit
from tests.harness import Pipeline

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]

HERE = Path(__file__).resolve().parent
ORDERS, PRODUCTS = "/api/v1/orders", "/api/v1/products"
TOKEN = "0123456789abcdef"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}

CASES_MAX = 25
"""Drawn for each operation and phase; with the listed edge cases some 850 requests."""

SECONDS_MAX = 240.0
SEED = "1"


@asynccontextmanager
async def ingress(settings: Settings) -> AsyncIterator[str]:
    runner = Runner(create_app(settings), bounds(settings), shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_the_api_does_what_its_document_says_and_no_promise_breaks(pipeline: Make, tmp_path: Path) -> None:
    shop = pipeline(admin_token=TOKEN, verdict_timeout_s=0.05)  # so long an unknown order is waited for
    await shop.start({str(n): 1_000 for n in range(5)})
    async with ingress(shop.settings) as url:
        run = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "contract.toml")),
            *("run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {TOKEN}", "--no-color"),
            *("--seed", SEED, "--max-examples", str(CASES_MAX), "--checks", "all", "--continue-on-failure"),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(SECONDS_MAX):
                said, _ = await run.communicate()
        except TimeoutError:
            run.kill()
            await run.wait()
            raise
        assert run.returncode == 0, said.decode()
        assert "No issues found" in said.decode()
        assert TOKEN not in said.decode()
        phone = {"viewport": {"width": 360, "height": 740}}
        async with visit(find_chromium(), tmp_path / "profile", **phone) as seen:
            await seen.page.goto(f"{url}/docs")
            assert (await seen.overflow(), seen.faults, seen.hosts) == (0, [], {url.split("/")[2]})
    placed = await (await shop.store()).pool.fetch("SELECT order_id::text FROM orders")
    assert len(placed) > 10
    await shop.finished([row["order_id"] for row in placed])
    assert await shop.violations() == []


async def test_stock_moves_over_http_as_its_owner_decides(pipeline: Make, tmp_path: Path) -> None:
    tokens, ann = tmp_path / "tokens", {"Authorization": f"Bearer {TOKEN[::-1]}"}
    tokens.write_text(f"ann {TOKEN[::-1]}\n")
    shop = pipeline(admin_token=TOKEN, admin_token_file=str(tokens), verdict_timeout_s=20.0)
    await shop.start({"one": 5})
    async with ingress(shop.settings) as url, aiohttp.ClientSession(url) as client:

        async def move(key: str, who: dict[str, str] = ADMIN, **body: Any) -> tuple[int, dict[str, Any]]:
            headers = {**who, "Idempotency-Key": key}
            answer = await client.post(f"{PRODUCTS}/two/stock", json=body, headers=headers)
            return answer.status, await answer.json(content_type=None)

        made = await client.put(f"{PRODUCTS}/two", json={"name": "Two", "price_cents": 250}, headers=ADMIN)
        assert made.status == 201
        slashed = URL(f"{PRODUCTS}/tea%20%2F%20cup", encoded=True)
        change: dict[str, Any] = {"name": "Tea cup", "price_cents": 300}
        created = await client.put(slashed, json=change, headers=ADMIN)
        nothing = {"available": 0, "reserved": 0, "sold": 0, "limit_per_user": None, "retired": False}
        assert await created.json() == {"product_id": "tea / cup", **change, **nothing}
        assert (created.status, created.headers["Location"]) == (201, str(slashed))
        for given, limit in (
            ({"price_cents": 0}, None),
            ({"limit_per_user": 3}, 3),
            ({}, 3),
            ({"limit_per_user": None}, None),
        ):
            change |= {"name": "Cup", "price_cents": 0}
            changed = await client.put(slashed, json={**change, **given}, headers=ADMIN)
            assert changed.status == 200
            product = await changed.json()
            assert (product["name"], product["price_cents"], product["limit_per_user"]) == ("Cup", 0, limit)
        status, received = await move("d-1", command="receive", quantity=10)
        assert (status, received["outcome"], received["quantity"]) == (200, "applied", 10)
        assert await move("d-1", command="receive", quantity=10) == (200, received)
        assert (await move("d-1", command="receive", quantity=11))[0] == 422
        status, refused = await move("d-2", command="adjust", quantity=-11, reason="lost")
        assert (status, refused["type"]) == (409, "urn:orderstream:problem:stock-too-low")
        assert (await move("d-3", command="receive", quantity=5))[0] == 200
        assert await move("d-2", command="adjust", quantity=-11, reason="lost") == (409, refused)  # as the first time
        assert (await move("d-4", command="adjust", quantity=-2, reason="broken"))[0] == 200
        status, counted = await move("d-5", ann, command="set", quantity=12, reason="stocktaking")
        assert (status, counted["quantity"], counted["change"]) == (200, 12, -1)
        assert await move("d-5", command="set", quantity=12, reason="stocktaking") == (200, counted)
        assert (await move("d-6", command="set", quantity=-1, reason="stocktaking"))[0] == 400

        bought = await client.post(
            ORDERS, json={"user_id": 7, "items": [{"product_id": "two", "quantity": 3}], "payment_method": "card"}
        )
        assert bought.status == 201
        await shop.finished([(await bought.json())["order_id"]])
        assert await shop.has_counts("two", 9, 0, 3)
        product = await (await client.get(f"{PRODUCTS}/two")).json()
        assert (product["available"], product["reserved"], product["sold"]) == (9, 0, 3)
        limited = {"name": "Two", "price_cents": 250, "limit_per_user": 3}
        assert (await client.put(f"{PRODUCTS}/two", json=limited, headers=ADMIN)).status == 200
        more: dict[str, Any] = {"user_id": 7, "items": [{"product_id": "two", "quantity": 1}], "payment_method": "card"}
        over = await client.post(ORDERS, json=more)
        assert (over.status, (await over.json(content_type=None))["reason"]) == (409, "user_limit")
        ledger = (await (await client.get(f"{PRODUCTS}/two/ledger", headers=ADMIN)).json())["entries"]
        assert [(entry["movement"], entry["quantity"], entry["actor"]) for entry in ledger] == [
            ("adjust", -1, "ann"),
            ("adjust", -2, "admin"),
            ("receive", 5, "admin"),
            ("receive", 10, "admin"),
            ("initial", 0, None),
        ]

        # What people change of a product is compared, its counts are not; a retired one is sold to nobody.
        path, moved = f"{PRODUCTS}/two", {"command": "receive", "quantity": 1}
        tag = (await client.head(path)).headers["ETag"]
        assert (await client.get(path, headers={"If-None-Match": tag})).status == 304
        await client.post(f"{path}/stock", json=moved, headers={**ADMIN, "Idempotency-Key": "d-7"})
        sold = await client.get(path, headers={"If-None-Match": tag})
        assert (sold.status, sold.headers["ETag"].split(".")[0]) == (200, tag.split(".")[0])
        many = [
            client.put(path, json={**limited, "price_cents": n}, headers={**ADMIN, "If-Match": tag}) for n in range(4)
        ]
        assert sorted(answer.status for answer in await asyncio.gather(*many)) == [200, 412, 412, 412]
        for headers in ({"If-Match": tag}, {"If-None-Match": "*"}):
            assert (await client.put(path, json=limited, headers=ADMIN | headers)).status == 412
        assert (await client.put(f"{PRODUCTS}/3", json=limited, headers={**ADMIN, "If-Match": "*"})).status == 412
        twins = [client.put(f"{PRODUCTS}/3", json=limited, headers={**ADMIN, "If-None-Match": "*"}) for _ in range(2)]
        assert sorted(answer.status for answer in await asyncio.gather(*twins)) == [201, 412]
        assert (await (await client.put(path, json={**limited, "retired": True}, headers=ADMIN)).json())["retired"]
        order = {**more, "user_id": 8}
        for items in (order["items"], [{"product_id": "one", "quantity": 1}, *order["items"]]):
            gone = await client.post(ORDERS, json={**order, "items": items})
            assert (gone.status, (await gone.json(content_type=None))["reason"]) == (409, "unknown_product")
        names = [
            {p["product_id"] for p in (await (await client.get(PRODUCTS + q)).json())["products"]}
            for q in ("", "?retired=true")
        ]
        assert names == [{"one", "3", "tea / cup"}, {"two"}]
        assert (await client.delete(path, headers=ADMIN)).status == 405
        back = await client.put(path, json={**limited, "retired": False}, headers={**ADMIN, "If-Match": "*"})
        assert (back.status, (await back.json())["retired"]) == (200, False)
        kind = {"Content-Type": "application/vnd.shop.v1+json; charset=utf8"}
        assert (await client.post(ORDERS, data=orjson.dumps(order), headers=kind)).status == 201
    assert await shop.violations() == []


async def test_the_published_services_clients_find_what_they_rely_on(pipeline: Make) -> None:
    shop = pipeline(verdict_timeout_s=20.0)
    await shop.start({str(n): 100 for n in range(1, 6)})
    async with ingress(shop.settings) as url, aiohttp.ClientSession(url) as client:
        body = {
            "user_id": 42,
            "items": [{"product_id": 1, "quantity": 2}, {"product_id": 5, "quantity": 1}],
            "payment_method": "mock",
            "idempotency_key": "k6-1-1",
        }
        made = await client.post(ORDERS, json=body, headers={"Idempotency-Key": "the body wins"})
        placed = await made.json()
        assert (made.status, placed["status"]) == (201, "RESERVED")
        assert (await (await client.post(ORDERS, json=body)).json()) == placed
        await shop.finished([placed["order_id"]])
        read = await (await client.get(f"{ORDERS}/{placed['order_id']}")).json()
        assert {"id", "user_id", "total_amount", "status", "idempotency_key", "created_at", "updated_at"} <= set(
            read["order"]
        )
        assert (read["order"]["status"], read["order"]["idempotency_key"]) == ("CONFIRMED", "k6-1-1")
        for item in read["items"]:
            assert {"id", "order_id", "product_id", "quantity", "unit_price"} <= set(item)
        assert read["order"]["total_amount"] == sum(i["quantity"] * i["unit_price"] for i in read["items"]) == 300
        assert read["payment"]["status"] == "SUCCESS"

        bad = await client.post(ORDERS, json={**body, "items": []})
        assert bad.status == 400
        assert {"error", "details"} <= set(await bad.json(content_type=None))
        assert [(await client.get(path)).status for path in ("/health", "/ready", "/metrics")] == [200] * 3
        ours = await (await client.get("/metrics")).text()

    def scrape() -> str:
        with urllib.request.urlopen(f"{shop.workers[0].url}/metrics") as answer:
            return str(answer.read().decode())

    theirs = await asyncio.to_thread(scrape)
    for name in ("http_request_duration_seconds_bucket", "http_requests_total"):
        assert f"{name}{{" in ours
        assert 'method="POST",path="/api/v1/orders",status="201"' in ours
    for name in (
        *("orders_created_total 1.0", "orders_reserved_total 1.0", "orders_paid_total 1.0"),
        *("inventory_reserve_latency_seconds_count", "payment_attempts_total 1.0", "payment_success_total 1.0"),
        *("payment_failed_total 0.0", "payment_processing_latency_seconds_count"),
        *("# TYPE orders_cancelled_total", "# TYPE inventory_reservations_failed_total"),
    ):
        assert f"\n{name}" in theirs, name
