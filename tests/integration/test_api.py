"""Lists, products and limits of the ingress, on real engines; no worker runs, so Postgres holds what the test put there."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import asyncpg
import pytest
from aiohttp import web
from yarl import URL

from orderstream.http import listing
from orderstream.http import rate as limits
from orderstream.http.protocol import Runner, bounds
from orderstream.http.reading import END, EPOCH, moment_cursor
from orderstream.http.server import create_app
from orderstream.jobs.init import Product, init
from orderstream.settings import Settings
from orderstream.sql import stages
from orderstream.sql.store import Store, query
from orderstream.streams.commands import StockCommand
from orderstream.streams.partitions import product_partition
from tests.conftest import MakeSettings
from tests.integration.tables import Line, New, Worker

pytestmark = pytest.mark.engines

ORDERS, PRODUCTS = "/api/v1/orders", "/api/v1/products"
TOKEN = "0123456789abcdef"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
PARTITIONS = 2


@asynccontextmanager
async def serving(settings: Settings, products: int = 3) -> AsyncIterator[tuple[aiohttp.ClientSession, Store]]:
    """Serve on a free port; give a client, and the statements."""
    await init(settings, [Product(f"p{n:02}", f"product {n}", 100, 10) for n in range(products)])
    store = await Store.connect(settings.database_url, connections_max=2)
    runner = Runner(create_app(settings), bounds(settings), shutdown_timeout=1.0)
    try:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
            yield client, store
    finally:
        await runner.cleanup()
        await store.close()


async def json_of(answer: aiohttp.ClientResponse, status: int, kind: str | None = None) -> dict[str, Any]:
    body: dict[str, Any] = await answer.json(content_type=None)
    assert answer.status == status, body
    if kind is not None:
        assert (answer.content_type, body["type"]) == ("application/problem+json", f"urn:orderstream:problem:{kind}")
    return body


async def take_in(store: Store, user_id: str, orders: int, product_id: str = "p00") -> list[str]:
    """Take orders in, one batch: all have the same time.  The first ten units are held, the rest is refused."""
    home = product_partition(product_id, PARTITIONS)
    (product,) = await store.products([product_id])
    made = [
        New(
            uuid.uuid4().int >> 66,
            [Line(product_id, 1) if n < product["available"] else Line(product_id, 1, "x", "insufficient_stock")],
            home,
            user_id,
        )
        for n in range(orders)
    ]
    await (await Worker(store.pool).claim(home)).hold(*made)
    return [order.order_id for order in made]


async def move(store: Store, *commands: tuple[str, str, str, int, str]) -> list[str]:
    """Do what the owner of p00 does with stock commands, each (id, product, command, units, reason)."""
    home = product_partition("p00", PARTITIONS)
    lane = (await Worker(store.pool).claim(home)).settling
    names = ("command_id", "product_id", "command", "quantity", "reason")
    asked = [StockCommand.model_validate(dict(zip(names, one, strict=True))) for one in commands]
    given = [stages.Commanded(command, home) for command in asked]
    written = await stages.apply_commands(store.pool, lane, lane.step([home]), given, uuid.uuid4())
    outcomes: list[str] = written.row["each_outcome"]
    return outcomes


async def pages(client: aiohttp.ClientSession, path: str, member: str, **query_: Any) -> list[list[dict[str, Any]]]:
    found, cursor = [], None
    while True:
        asked = {**query_, **({"cursor": cursor} if cursor else {})}
        body = await json_of(await client.get(path, params=asked, headers=ADMIN), 200)
        found.append(body[member])
        cursor = body["next"]
        if cursor is None:
            return found


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    return make_settings(partitions=PARTITIONS, verdict_timeout_s=0.2, admin_token=TOKEN)


# Orders


async def test_pages_of_orders_hold_each_order_once_newest_first(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(settings) as (client, store):
        ours = [await take_in(store, "7", 6), await take_in(store, "7", 7)]
        await take_in(store, "8", 5, "p01")

        found = await pages(client, ORDERS, "orders", user_id="7", limit=4)
        assert [len(page) for page in found] == [4, 4, 4, 1]
        ids = [order["id"] for page in found for order in page]
        assert (set(ids[:7]), set(ids[7:])) == (set(ours[1]), set(ours[0]))
        every = [order for page in await pages(client, ORDERS, "orders", limit=5) for order in page]
        assert len(every) == len({order["id"] for order in every}) == 18
        assert every[0]["user_id"] == "8"

        for scanned in (5_000, 4):  # few of those that are read are in the status: pages come back short
            monkeypatch.setattr(listing, "SCANNED_MAX", scanned)
            short = await pages(client, ORDERS, "orders", status="CANCELLED", limit=3)
            refused = [order for page in short for order in page]
            assert len(refused) == len({order["id"] for order in refused}) == 3
            assert {(order["status"], order["reason"]) for order in refused} == {("CANCELLED", "insufficient_stock")}
        assert len(short) >= 18 // 4
        both = [
            order for page in await pages(client, ORDERS, "orders", user_id="8", status="RESERVED") for order in page
        ]
        assert len(both) == 5
        assert await pages(client, ORDERS, "orders", user_id="nobody") == [[]]

        head = every[0]
        whole = (await json_of(await client.get(f"{ORDERS}/{head['id']}"), 200))["order"]
        assert head == whole


async def test_a_page_of_a_customer_reads_his_orders_alone(settings: Settings) -> None:
    async with serving(settings) as (client, store):
        for n in range(60):
            await take_in(store, f"user-{n}", 50)
        await store.pool.execute("ANALYZE orders")
        asked = ("user-1", *END, 11, None, 11)
        for name, index in (("orders_of_user", "orders_of_user"), ("all_orders", "orders_created_at")):
            first = asked if name == "orders_of_user" else (None, *asked[1:])
            plan = await explained(store, query(name), first)
            assert f"using {index}" in plan, plan
            assert "Seq Scan on orders" not in plan
        assert (await client.get(ORDERS, params={"user_id": "user-1"})).status == 200


async def explained(store: Store, statement: str, arguments: tuple[Any, ...]) -> str:
    async with store.pool.acquire() as connection:
        await connection.execute("SET enable_seqscan = off")
        rows = await connection.fetch(f"EXPLAIN {statement}", *arguments)
        await connection.execute("RESET enable_seqscan")
    return "\n".join(row[0] for row in rows)


async def test_changes_of_an_order_stay_in_place(settings: Settings) -> None:
    """No index holds what changes: an order's row is updated without an entry in any index (HOT)."""
    async with serving(settings) as (_, store):
        columns = await store.pool.fetchval(
            "SELECT array_agg(DISTINCT a.attname::text) FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid"
            " AND (a.attnum = ANY (i.indkey) OR pg_get_expr(i.indpred, i.indrelid) LIKE '%' || a.attname || '%'"
            "      OR pg_get_expr(i.indexprs, i.indrelid) LIKE '%' || a.attname || '%')"
            " WHERE i.indrelid = 'orders'::regclass"
        )
        assert set(columns) == {"order_id", "user_id", "created_at"}


async def test_a_query_that_can_not_be_is_a_400(api: aiohttp.ClientSession) -> None:
    wrong: list[Any] = [
        {"limit": "0"},
        {"limit": "501"},
        {"limit": "ten"},
        {"status": "SOLD"},
        {"user_id": ""},
        {"user_id": "a\0"},
        {"colour": "red"},
        {"cursor": "0"},
        {"cursor": "1" * 18 + "_" + END[1]},
        {"cursor": moment_cursor(EPOCH, "no id")},
        [("limit", "1"), ("limit", "2")],
    ]
    for params in wrong:
        answer = await api.get(ORDERS, params=params, headers=ADMIN)
        assert answer.status == 400, params
        await json_of(answer, 400, "invalid-request")


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[aiohttp.ClientSession]:
    async with serving(settings) as (client, _):
        yield client


# Products


async def test_pages_of_products_and_of_a_ledger(settings: Settings) -> None:
    async with serving(settings, products=7) as (client, store):
        found = await pages(client, PRODUCTS, "products", limit=3)
        assert [[product["product_id"] for product in page] for page in found] == [
            ["p00", "p01", "p02"],
            ["p03", "p04", "p05"],
            ["p06"],
        ]
        assert found[0][0] == {
            "product_id": "p00",
            "name": "product 0",
            "price_cents": 100,
            "available": 10,
            "reserved": 0,
            "sold": 0,
            "limit_per_user": None,
            "retired": False,
        }
        await take_in(store, "7", 4)
        moves = [(str(uuid.uuid4()), "p00", "receive", n, f"delivery {n}") for n in range(1, 6)]
        await move(store, *moves)
        await move(store, (str(uuid.uuid4()), "p00", "adjust", -2, "broken"))
        entries = await pages(client, f"{PRODUCTS}/p00/ledger", "entries", limit=2)
        assert [len(page) for page in entries] == [2, 2, 2, 1]
        flat = [entry for page in entries for entry in page]
        assert (flat[0]["movement"], flat[0]["reason"], flat[-1]["movement"]) == ("adjust", "broken", "initial")
        assert {entry["source_id"] for entry in flat[1:-1]} == {move[0] for move in moves}
        now = await json_of(await client.get(f"{PRODUCTS}/p00"), 200)
        assert sum(entry["quantity"] for entry in flat) == now["available"] + now["reserved"] + now["sold"] == 23
        plan = await explained(store, query("ledger_page"), ("p00", *END, 11))
        assert "using ledger_of_commands" in plan, plan


async def test_an_id_that_no_path_can_name_is_no_products(api: aiohttp.ClientSession) -> None:
    root = str((await api.get("/health")).url.origin())
    body = {"name": "Tea cup", "price_cents": 300}
    for name in ("%2e", "%2e%2e", ".", "..", "%ff", "a%C3", "%ed%a0%80"):
        url = URL(f"{root}{PRODUCTS}/{name}", encoded=True)
        for answer in (await api.put(url, json=body, headers=ADMIN), await api.get(url)):
            assert "product id: " in (await json_of(answer, 400, "invalid-request"))["detail"]
    for name in ("%25ff", "...", "%C3%A9"):
        await json_of(await api.put(URL(f"{PRODUCTS}/{name}", encoded=True), json=body, headers=ADMIN), 202)
    for query_ in ("user_id=%ff", "user_id=7&status=%ff"):
        await json_of(await api.get(URL(f"{ORDERS}?{query_}", encoded=True)), 400, "invalid-request")


async def test_a_change_of_a_product_that_no_worker_decides_is_a_202(api: aiohttp.ClientSession) -> None:
    body = {"name": "Tea cup", "price_cents": 300}
    change = {"name": "Cup", "price_cents": 0}
    for given in (body, {**body, "limit_per_user": 3}):
        answer = await api.put(f"{PRODUCTS}/cup", json=given, headers=ADMIN)
        pending = await json_of(answer, 202)
        assert (pending["product_id"], pending["outcome"]) == ("cup", "pending")
    for limit in (0, -1, 1.5, "3", 2**31):
        wrong_limit = await api.put(f"{PRODUCTS}/cup", json={**change, "limit_per_user": limit}, headers=ADMIN)
        await json_of(wrong_limit, 400, "invalid-request")
    for wrong in ({"name": "x"}, {"name": "x", "price_cents": -1}, {"name": "x", "price_cents": 1.5}, {**body, "x": 1}):
        await json_of(await api.put(f"{PRODUCTS}/cup", json=wrong, headers=ADMIN), 400, "invalid-request")
    large = {"name": "x" * 5_000, "price_cents": 1}
    await json_of(await api.put(f"{PRODUCTS}/cup", json=large, headers=ADMIN), 413, "too-large")
    await json_of(await api.get(f"{PRODUCTS}/cup"), 404, "product-not-found")


async def test_a_customer_finds_own_orders_only_and_an_admin_all(settings: Settings) -> None:
    private = settings.model_copy(update={"customer_auth": "header"})
    async with serving(private) as (client, store):
        (ours,), (theirs,) = await take_in(store, "7", 1), await take_in(store, "8", 1)
        me = {"X-Customer-Id": "7"}
        body = {"user_id": "8", "items": [{"product_id": "p00", "quantity": 1}], "payment_method": "card"}

        async def ask(method: str, path: str, headers: dict[str, str], status: int, kind: str | None = None) -> Any:
            given = body if (method, path) == ("POST", "") else None
            async with client.request(method, ORDERS + path, headers=headers, json=given) as answer:
                if answer.status == 200 and answer.content_type == "text/event-stream":
                    return None
                return await json_of(answer, status, kind)

        every = [
            ("POST", ""),
            ("GET", ""),
            ("GET", f"/{ours}"),
            ("GET", f"/{ours}/events"),
            ("POST", f"/{ours}/cancel"),
        ]
        for method, path in every:
            await ask(method, path, {}, 401, "unauthorized")
        unknown = str(uuid.uuid4())
        for order_id in (theirs, unknown):  # the same answer: nobody learns that it is there
            for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel")):
                assert (await ask(method, f"/{order_id}{path}", me, 404, "order-not-found"))["order_id"] == order_id
        await ask("POST", "", me, 403, "forbidden")
        await ask("GET", "?user_id=8", me, 403, "forbidden")
        for query_ in ("", "?user_id=7"):
            assert [order["id"] for order in (await ask("GET", query_, me, 200))["orders"]] == [ours]
        assert (await ask("GET", f"/{ours}", me, 200))["order"]["id"] == ours
        await ask("GET", f"/{ours}/events", me, 200)
        assert (await ask("POST", f"/{ours}/cancel", me, 202))["status"] == "RESERVED"
        assert {order["id"] for order in (await ask("GET", "", ADMIN, 200))["orders"]} == {ours, theirs}
        assert (await ask("POST", f"/{unknown}/cancel", ADMIN, 202))["status"] == "CREATED"
        assert (await ask("POST", f"/{theirs}/cancel", ADMIN, 202))["status"] == "RESERVED"
        assert (await ask("POST", "", ADMIN, 202))["status"] == "CREATED"


async def test_an_id_whose_record_was_rejected_is_told_so_everywhere(settings: Settings) -> None:
    quick = settings.model_copy(update={"verdict_timeout_s": 0.2})
    me = {"X-Customer-Id": "7"}
    for customer_auth in ("none", "header"):
        async with serving(quick.model_copy(update={"customer_auth": customer_auth})) as (client, store):
            (theirs,) = await take_in(store, "8", 1)
            none = str(uuid.uuid4())
            for order_id in (none, theirs):
                reject = "INSERT INTO rejections VALUES ($1::uuid, 0, 7, 'invalid_order', 'no items', now())"
                await store.pool.execute(reject, order_id)
            asked = [
                ("GET", f"{ORDERS}/{none}"),
                ("GET", f"{ORDERS}/{none}/events"),
                ("POST", f"{ORDERS}/{none}/cancel"),
            ]
            for method, path in asked:
                async with client.request(method, path, headers=me) as answer:
                    body = await json_of(answer, 404, "order-rejected")
                    assert (body["order_id"], body["detail"], body["record"]["offset"]) == (none, "no items", 7)
            if customer_auth == "header":  # there is an order: nobody else learns of it
                for method, path in asked:
                    async with client.request(method, path.replace(none, theirs), headers=me) as answer:
                        await json_of(answer, 404, "order-not-found")


async def test_a_stream_ends_soon_after_its_client_has_left(settings: Settings) -> None:
    async with serving(settings) as (client, store):
        (order_id,) = await take_in(store, "7", 1)
        async with client.get(f"{ORDERS}/{order_id}/events") as answer:
            await answer.content.readline()
            assert b"http_event_streams 1.0" in await (await client.get("/metrics")).read()
        async with asyncio.timeout(5):
            left = b""
            while b"http_event_streams 0.0" not in left:
                await asyncio.sleep(0.1)
                left = await (await client.get("/metrics")).read()


@pytest.mark.usefixtures("patient")
async def test_what_a_browser_asks_for_itself_is_not_counted(settings: Settings) -> None:
    tight = {"cors_origins": "https://shop.example", "rate_limit_per_s": 0.01, "rate_limit_burst": 1}
    shop = {"Origin": "https://shop.example"}
    async with serving(settings.model_copy(update=tight)) as (client, _):
        for status in (200, 429):
            for _preflight in range(2):
                asked = {**shop, "Access-Control-Request-Method": "GET"}
                assert (await client.options(PRODUCTS, headers=asked)).status == 200
            answer = await client.get(PRODUCTS, headers=shop)
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, shop["Origin"])
        assert int(answer.headers["Retry-After"]) > 0


async def test_pages_of_the_origins_that_are_named_may_call_the_api(settings: Settings) -> None:
    asked = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "authorization, if-match"}
    shop, other = {"Origin": "https://shop.example"}, {"Origin": "https://evil.example"}
    async with serving(settings.model_copy(update={"cors_origins": "https://shop.example,https://b.example"})) as (
        client,
        _,
    ):
        for path in (f"{PRODUCTS}/p00", f"{ORDERS}?user_id=7"):
            for origin, status in ((shop, 200), (other, 403)):
                method = {"Access-Control-Request-Method": "GET"} if "?" in path else {}
                answer = await client.options(path, headers={**asked, **method, **origin})
                assert answer.status == status, await answer.text()
                if status == 403:
                    problem = await answer.json(content_type="application/problem+json")
                    assert (problem["type"], origin["Origin"] in problem["detail"]) == ("about:blank", True)
        preflight = (await client.options(f"{PRODUCTS}/p00", headers={**asked, **shop})).headers
        assert preflight["Access-Control-Allow-Methods"] == "PUT"
        assert set(preflight["Access-Control-Allow-Headers"].split(",")) == {"AUTHORIZATION", "IF-MATCH"}
        for path, status in ((f"{PRODUCTS}/p00", 200), (f"{PRODUCTS}/none", 404)):  # an error is to be read, too
            answer = await client.get(path, headers=shop)
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, shop["Origin"])
            assert answer.headers["Access-Control-Allow-Credentials"] == "true"
            assert "ETag" in answer.headers["Access-Control-Expose-Headers"].split(",")
            assert "Origin" in answer.headers["Vary"]
        assert "Access-Control-Allow-Origin" not in (await client.get(f"{PRODUCTS}/p00", headers=other)).headers
    async with serving(settings.model_copy(update={"cors_origins": "*"})) as (client, _):
        answer = await client.get(f"{PRODUCTS}/p00", headers=other)
        assert answer.headers["Access-Control-Allow-Origin"] == other["Origin"]
        assert "Access-Control-Allow-Credentials" not in answer.headers


async def test_all_orders_are_an_admins_also_where_no_customer_is_named(api: aiohttp.ClientSession) -> None:
    await json_of(await api.get(ORDERS), 401, "unauthorized")
    await json_of(await api.get(ORDERS, params={"user_id": "7"}), 200)


async def test_what_is_an_admins_is_an_admins(api: aiohttp.ClientSession, settings: Settings) -> None:
    off = settings.model_copy(update={"admin_token": ""})
    async with serving(off) as (client, _):
        for method, path in (("PUT", ""), ("POST", "/stock"), ("GET", "/ledger")):
            for headers in ({}, {"Authorization": "Bearer 0123456789abcdeg"}):
                answer = await api.request(method, f"{PRODUCTS}/p00{path}", headers=headers, data=b"not even read")
                await json_of(answer, 401, "unauthorized")
                assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
            answer = await client.request(method, f"{PRODUCTS}/p00{path}", headers=ADMIN)
            await json_of(answer, 403, "admin-off")


async def test_a_stock_command_that_no_worker_decides_is_a_202_and_its_repeat_has_the_outcome(
    settings: Settings,
) -> None:
    body = {"command": "receive", "quantity": 5}
    key = {**ADMIN, "Idempotency-Key": "d-1"}
    async with serving(settings) as (client, store):
        path = f"{PRODUCTS}/p00/stock"
        await json_of(await client.post(path, json=body, headers=ADMIN), 400, "idempotency-key-missing")
        await json_of(await client.post(f"{PRODUCTS}/none/stock", json=body, headers=key), 404, "product-not-found")
        first = asyncio.create_task(client.post(path, json=body, headers=key))
        await asyncio.sleep(0.1)
        other = asyncio.create_task(client.post(path, json={**body, "quantity": 6}, headers=key))
        again = await client.post(path, json=body, headers=key)
        await json_of(again, 409, "request-in-progress")
        assert again.headers["Retry-After"]
        await json_of(await other, 422, "idempotency-key-reused")
        late = await json_of(await first, 202)
        assert late["outcome"] == "pending"
        await move(store, (late["command_id"], "p00", "receive", 5, ""))
        done = await json_of(await client.post(path, json=body, headers=key), 200)
        assert (done["outcome"], done["command_id"]) == ("applied", late["command_id"])
        await json_of(await client.post(path, json={**body, "quantity": 6}, headers=key), 422, "idempotency-key-reused")
        for wrong in (
            {"command": "receive", "quantity": 0},
            {"command": "adjust", "quantity": 0, "reason": "x"},
            {"command": "adjust", "quantity": 1},
            {"command": "recount"},
            {"command": "receive", "quantity": "5"},
        ):
            await json_of(await client.post(path, json=wrong, headers=key), 400, "invalid-request")


async def test_the_last_decision_on_a_stock_command_is_kept(settings: Settings) -> None:
    async with serving(settings) as (_, store):
        command = (str(uuid.uuid4()), "p00", "adjust", -12, "lost")
        for outcome in ("insufficient_stock", "insufficient_stock", "applied", "known"):
            assert await move(store, command) == [outcome]
            kept = await store.stock_command(command[0])
            assert kept is not None
            assert kept["outcome"] == ("applied" if outcome == "known" else outcome)
            if outcome == "insufficient_stock":
                await move(store, (str(uuid.uuid4()), "p00", "receive", 1, ""))
        # The same id under another product: neither moves anything, nor unsays the decision.
        assert await move(store, (command[0], "none", "adjust", -12, "lost")) == ["reused"]
        kept = await store.stock_command(command[0])
        assert kept is not None
        assert (kept["outcome"], kept["product_id"]) == ("applied", "p00")
        with pytest.raises(asyncpg.CheckViolationError):
            await store.pool.execute("UPDATE stock_commands SET outcome = 'known'")


# How much of a client is taken


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for Redis, however busy the machine is: what it does not answer in time passes."""
    monkeypatch.setattr(limits, "ASK_S", 20.0)


@pytest.mark.usefixtures("patient")
async def test_a_client_that_asks_too_much_learns_when_to_come_again(settings: Settings) -> None:
    tight = settings.model_copy(update={"rate_limit_per_s": 0.5, "rate_limit_burst": 3, "forwarded_hops": 1})
    async with serving(tight) as (client, _):
        me, other = {"X-Forwarded-For": "1.2.3.4"}, {"X-Forwarded-For": "1.2.3.5"}
        for left in (2, 1, 0):
            answer = await client.get(PRODUCTS, headers=me)
            await json_of(answer, 200)
            assert answer.headers["RateLimit-Policy"] == '"client";q=3;w=6'
            assert answer.headers["RateLimit"].startswith(f'"client";r={left};t=')
        refused = await client.get(PRODUCTS, headers=me)
        await json_of(refused, 429, "rate-limited")
        assert 1 <= int(refused.headers["Retry-After"]) <= 2
        assert refused.headers["RateLimit"].startswith('"client";r=0;t=')
        wrong = await client.get(f"{PRODUCTS}/none", headers=other)  # an error counts, and says so
        await json_of(wrong, 404, "product-not-found")
        assert wrong.headers["RateLimit"].startswith('"client";r=2;t=')
        for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json"):
            answer = await client.get(path, headers=me)
            assert (answer.status, "RateLimit" in answer.headers) == (200, False)
        await asyncio.sleep(2.1)
        assert (await client.get(PRODUCTS, headers=me)).status == 200
        assert (await client.get(PRODUCTS, headers=me)).status == 429


@pytest.mark.usefixtures("patient")
async def test_all_ingresses_count_together_and_many_at_once_get_what_there_is(settings: Settings) -> None:
    tight = settings.model_copy(update={"rate_limit_per_s": 0.01, "rate_limit_burst": 10})
    async with serving(tight) as (one, _), serving(tight) as (two, _):
        answers = await asyncio.gather(*(client.get(PRODUCTS) for client in (one, two) for _ in range(15)))
        assert sorted(answer.status for answer in answers) == [200] * 10 + [429] * 20


async def test_without_redis_every_request_passes(settings: Settings, unused_tcp_port: int) -> None:
    lonely = settings.model_copy(
        update={"rate_limit_per_s": 0.01, "rate_limit_burst": 1, "redis_url": f"redis://127.0.0.1:{unused_tcp_port}/0"}
    )
    async with serving(lonely) as (client, _):
        answers = [await client.get(PRODUCTS) for _ in range(5)]
        assert [answer.status for answer in answers] == [200] * 5


async def test_without_a_limit_no_answer_has_one(api: aiohttp.ClientSession) -> None:
    answer = await api.get(PRODUCTS)
    assert "RateLimit" not in answer.headers
