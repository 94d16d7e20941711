"""Whatever goes wrong in a handler reaches the client as a problem document, with nothing that is not for it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient, TestServer

from orderstream.errors import EngineUnavailable
from orderstream.http.problems import KINDS, RETRY_AFTER_S, TYPE_PREFIX, Problem, engine_unavailable, problems, refused
from orderstream.streams.orders import Reason

API = Path(__file__).resolve().parents[2] / "docs" / "API.md"

Client = TestClient[web.Request, web.Application]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    async def raised(request: web.Request) -> web.Response:
        raise ERRORS[request.match_info["name"]]

    app = web.Application(middlewares=[problems], client_max_size=100)
    app.router.add_post("/echo", echo)
    app.router.add_get("/raised/{name}", raised)
    async with TestClient(TestServer(app)) as client:
        yield client


ERRORS: dict[str, Exception] = {
    "bug": RuntimeError("password=hunter2"),
    "gone": web.HTTPGone(),
    "media": web.HTTPUnsupportedMediaType(),
    "elsewhere": web.HTTPFound("/echo"),
    "unavailable": engine_unavailable(
        EngineUnavailable("Kafka", "10.1.2.3:9092", "refused"), "Come again.", order_id="o-1"
    ),
    "refused": refused("o-1", Reason.INSUFFICIENT_STOCK, "/api/v1/orders/o-1"),
    "invalid": Problem("invalid-order", "items: empty", faults=[{"field": "items", "message": "empty"}]),
}


async def document(answer: ClientResponse) -> dict[str, Any]:
    assert answer.content_type == "application/problem+json"
    body: dict[str, Any] = await answer.json()
    assert body["status"] == answer.status
    return body


async def test_what_goes_well_is_left_alone(client: Client) -> None:
    answer = await client.post("/echo", data=b"x")
    assert (answer.status, await answer.read()) == (200, b"x")


async def test_a_path_that_does_not_exist(client: Client) -> None:
    body = await document(await client.get("/nowhere"))
    assert (body["status"], body["type"]) == (404, TYPE_PREFIX + "not-found")
    assert "/nowhere" in body["detail"]


async def test_a_method_that_the_path_does_not_know(client: Client) -> None:
    answer = await client.delete("/echo")
    body = await document(answer)
    assert (body["status"], body["type"]) == (405, TYPE_PREFIX + "method-not-allowed")
    assert answer.headers["Allow"] == "POST"


async def test_a_body_beyond_the_bound(client: Client) -> None:
    assert (await client.post("/echo", data=b"x" * 100)).status == 200
    body = await document(await client.post("/echo", data=b"x" * 101))
    assert (body["status"], body["type"]) == (413, TYPE_PREFIX + "too-large")
    assert "100 bytes" in body["detail"]


async def test_another_error_of_the_server_has_no_type_of_its_own(client: Client) -> None:
    body = await document(await client.get("/raised/gone"))
    assert body == {"type": "about:blank", "title": "Gone", "status": 410}
    body = await document(await client.get("/raised/media"))
    assert body["type"] == TYPE_PREFIX + "unsupported-media-type"


async def test_a_redirection_is_no_error(client: Client) -> None:
    answer = await client.get("/raised/elsewhere", allow_redirects=False)
    assert (answer.status, answer.headers["Location"]) == (302, "/echo")


async def test_a_fault_of_ours_is_logged_under_the_id_that_the_client_gets(client: Client) -> None:
    with structlog.testing.capture_logs() as logged:
        body = await document(await client.get("/raised/bug"))
    assert (body["status"], body["type"]) == (500, TYPE_PREFIX + "internal")
    assert "hunter2" not in str(body)
    assert "RuntimeError" not in str(body)
    (line,) = logged
    assert line["incident"] == body["incident"]
    assert line["exc_info"]
    assert body["instance"] == f"urn:uuid:{body['incident']}"


async def test_an_engine_that_is_unavailable_is_named_and_its_address_is_not(client: Client) -> None:
    answer = await client.get("/raised/unavailable")
    body = await document(answer)
    assert (body["status"], body["engine"], body["order_id"]) == (503, "Kafka", "o-1")
    assert answer.headers["Retry-After"] == str(RETRY_AFTER_S)
    assert "10.1.2.3" not in str(body)


async def test_a_refused_order_says_why(client: Client) -> None:
    body = await document(await client.get("/raised/refused"))
    assert (body["status"], body["type"]) == (409, TYPE_PREFIX + "insufficient-stock")
    assert (body["order_id"], body["order_status"], body["reason"]) == ("o-1", "CANCELLED", "insufficient_stock")
    assert body["instance"] == "/api/v1/orders/o-1"


async def test_clients_of_the_published_service_find_its_members(client: Client) -> None:
    body = await document(await client.get("/raised/invalid"))
    assert (body["error"], body["details"]) == (body["title"], "items: empty")
    assert body["faults"] == [{"field": "items", "message": "empty"}]


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_of_a_cancelled_order_has_its_problem(reason: Reason) -> None:
    problem = refused("o-1", reason, "/api/v1/orders/o-1")
    assert KINDS[problem.kind].status == 409
    assert problem.members["reason"] == reason


def test_the_types_are_stable_names_and_the_docs_list_each_with_its_status() -> None:
    listed = dict(re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \|", API.read_text(), flags=re.MULTILINE))
    assert listed == {name: str(kind.status) for name, kind in KINDS.items()}
