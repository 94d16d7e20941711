"""The OpenAPI document and docs/API.md say what the ingress does: every route, every problem, its limits, nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator
from jsonschema_rs import validator_for
from schemathesis.specs.openapi.definitions import OPENAPI_31

from orderstream.http import (
    cancel,
    events,
    health,
    listing,
    models,
    openapi,
    producer,
    protocol,
    reading,
    replies,
    server,
)
from orderstream.http.problems import KINDS, TYPE_PREFIX
from orderstream.http.server import create_app
from orderstream.settings import load
from orderstream.streams.commands import NAME_CHARS_MAX, PRICE_CENTS_MAX, QUANTITY_MAX, REASON_CHARS_MAX
from orderstream.streams.orders import ID_CHARS_MAX, KEY_CHARS_MAX, Reason, Status, order_id_for_key

API = (Path(__file__).resolve().parents[2] / "docs" / "API.md").read_text()
SPELLED = {0.25: "a quarter of a second", 2: "two", 4: "four", 5: "five", 10: "ten"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi.describe(load(_env_file=None))


def test_every_route_is_described_and_every_description_is_a_route() -> None:
    routes = {
        (route.method, route.resource.canonical)
        for route in create_app(load(_env_file=None)).router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert openapi.described() == routes


def test_it_is_an_openapi_3_1_document(document: dict[str, Any]) -> None:
    validator_for(OPENAPI_31).validate(document)
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    wanted = set(re.findall(r"'\$ref': '#/components/schemas/(\w+)'", str(document)))
    assert wanted <= document["components"]["schemas"].keys()
    assert len({o.name for o in openapi.OPERATIONS}) == len(openapi.OPERATIONS)


def test_every_problem_is_listed_somewhere_under_its_status(document: dict[str, Any]) -> None:
    found = {
        kind.removeprefix(TYPE_PREFIX): int(status)
        for path in document["paths"].values()
        for operation in path.values()
        for status, answer in operation["responses"].items()
        for kind in re.findall(rf"{TYPE_PREFIX}[a-z-]+", str(answer))
    }
    elsewhere = {"not-found", "method-not-allowed", "starting", "owner-unavailable"}  # of no route; of a worker's pages
    assert found == {name: kind.status for name, kind in KINDS.items() if name not in elsewhere}


def test_the_limits_are_those_of_the_settings() -> None:
    tight = openapi.describe(load(_env_file=None, line_quantity_max=7))
    assert tight["components"]["schemas"]["OrderLine"]["properties"]["quantity"]["maximum"] == 7


@pytest.mark.parametrize(
    ("schema", "value", "fits"),
    [
        ("StockChange", {"command": "receive", "quantity": 1}, True),
        ("StockChange", {"command": "receive", "quantity": 0}, False),
        ("StockChange", {"command": "adjust", "quantity": -1}, False),
        ("StockChange", {"command": "adjust", "quantity": -1, "reason": "lost"}, True),
        ("StockChange", {"command": "set", "quantity": 0}, False),
        ("StockChange", {"command": "set", "quantity": -1, "reason": "counted"}, False),
        ("StockChange", {"command": "set", "quantity": 0, "reason": "counted"}, True),
        ("ProductChange", {"name": " x", "price_cents": 1}, False),
        ("ProductChange", {"name": "x", "price_cents": 1, "colour": "red"}, False),
        ("OrderRecord", {"user_id": 7, "items": [{"product_id": 1, "quantity": 2}], "payment_method": "card"}, True),
        ("OrderRecord", {"user_id": 7, "items": [], "payment_method": "card"}, False),
        ("OrderRecord", {"user_id": "a\nb", "items": [{"product_id": 1, "quantity": 2}], "payment_method": "c"}, False),
    ],
)
def test_what_the_models_refuse_the_schemas_refuse(
    document: dict[str, Any], schema: str, value: Any, fits: bool
) -> None:
    whole = {"$ref": f"#/components/schemas/{schema}", "components": document["components"]}
    assert Draft202012Validator(whole).is_valid(value) is fits


def test_every_body_and_answer_has_an_example_that_is_one(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for operation in openapi.OPERATIONS:
        wanted = [operation.body, *(answer.model for answer in operation.answers.values())]
        for model in filter(None, wanted):
            (example,) = schemas[model.__name__]["examples"]
            model.model_validate_json(json.dumps(example))
            whole = {"$ref": f"#/components/schemas/{model.__name__}", "components": document["components"]}
            assert Draft202012Validator(whole).is_valid(example)


def test_the_page_shows_every_operation_and_loads_nothing(document: dict[str, Any]) -> None:
    page = openapi.render(document)
    for operation in openapi.OPERATIONS:
        assert f"id='{operation.name}'" in page
    assert not re.search(r"<script|<link|<img|https?://|@import|url\(", page)
    ids = set(re.findall(r"id='?([\w.]+)'?", page))
    assert set(re.findall(r"href='#([\w.]+)'", page)) <= ids


def test_what_comes_from_the_document_is_text_on_the_page(document: dict[str, Any]) -> None:
    hostile = {**document, "info": {**document["info"], "description": "<script>alert(1)</script>"}}
    assert "<script>" not in openapi.render(hostile)


# docs/API.md


def test_the_docs_list_every_route() -> None:
    rows = "\n".join(line for line in API.splitlines() if line.startswith("| [`"))
    assert set(re.findall(r"`([A-Z]+) (/[^`]*)`", rows)) == openapi.described()


def quoted() -> list[str]:
    """Return what the docs say of the code's limits, with the code's numbers."""
    settings = load(_env_file=None)
    line, header, product = (
        size // 1024 for size in (protocol.LINE_BYTES_MAX, protocol.HEADER_BYTES_MAX, reading.PRODUCT_BYTES_MAX)
    )
    body_s, size = SPELLED[reading.BODY_S], settings.order_bytes_max // 1024
    states, payments = (
        ", ".join(f"`{value}`" for value in get_args(model.model_fields[field].annotation))
        for model, field in ((models.Item, "state"), (models.Payment, "status"))
    )
    return [
        f"http://{settings.http_host}:{settings.http_port}",
        f"`status`: {', '.join(f'`{status}`' for status in Status)}.",
        f"`reason` is one of {', '.join(f'`{reason}`' for reason in Reason)}.",
        f"`state`: {states}.".replace("`refused`", "`refused` (with a `reason`)"),
        f"`status`: {payments}.",
        f"text of 1 to {ID_CHARS_MAX} printable characters, or a whole number",
        f"text of 1 to {KEY_CHARS_MAX} characters",
        f"at most {settings.order_lines_max} products (`ORDERSTREAM_ORDER_LINES_MAX`)",
        f"{settings.line_quantity_max:,} units of each (`ORDERSTREAM_LINE_QUANTITY_MAX`)",
        f"at most {settings.order_bytes_max:,} bytes (`ORDERSTREAM_ORDER_BYTES_MAX`)",
        f"(`ORDERSTREAM_VERDICT_TIMEOUT_S`, {settings.verdict_timeout_s:g} s)",
        f"1 to {models.PAGE_MAX}, by default {models.PAGE_DEFAULT} |",
        f"a page reads {listing.SCANNED_MAX:,} orders",
        f"`name`: text of 1 to {NAME_CHARS_MAX} printable characters",
        f"`price_cents`: 0 to 10^{len(str(PRICE_CENTS_MAX)) - 1};",
        f"`quantity` is 10^{len(str(QUANTITY_MAX)) - 1} at most",
        f"(`reason`, 1 to {REASON_CHARS_MAX} printable characters)",
        f"a request line of {line} KiB, {protocol.HEADERS_MAX} headers of {header} KiB, a body of {size} KiB",
        f"({product} KiB for products) within {body_s} seconds; {protocol.IDLE_S:g} s for a whole head",
        f"{replies.WAITING_MAX:,} waiting orders",
        f"Connections: {settings.connections_max:,} at once",
        f"{settings.idle_connections_max:,} of one client without a request in hand",
        f"For {SPELLED[settings.drain_s]} more seconds (`ORDERSTREAM_DRAIN_S`)",
        f"later ones within {SPELLED[events.TICK_S]}",
        f"retry: {events.RETRY_MS} ",
        f"A comment comes every {SPELLED[events.PING_S]} seconds",
        f"serves {events.STREAMS_MAX:,} streams",
        f"takes nothing for {events.SEND_S:g} seconds",
        f"side by side, {SPELLED[health.CHECK_S]} seconds each",
        f"503 after {SPELLED[producer.PRODUCE_S]} seconds at most",
        f"read from Postgres, {SPELLED[round(1 / replies.POLL_S)]} times a second",
        f"did not come within {body_s} seconds",
        f"the request line is over {line} KiB",
        f"a header is over {header} KiB",
        f"{replies.WAITING_MAX:,} requests wait for verdicts, {cancel.WAITING_MAX:,} for cancellations",
        f"verdict after {SPELLED[server.FINISH_S]} seconds are answered 202",
        f"ends within {SPELLED[server.LEAVE_S + 2]} seconds",
    ]


@pytest.mark.parametrize("sentence", quoted())
def test_the_docs_have_the_numbers_of_the_code(sentence: str) -> None:
    assert sentence in " ".join(API.split())


def test_the_ids_of_keys_in_the_docs_are_those_that_follow_from_them() -> None:
    assert order_id_for_key("7", "cart-17") == models.ORDER
    assert set(re.findall(r"/api/v1/orders/([0-9a-f-]{36})", API)) == {models.ORDER}


def test_the_order_in_the_docs_has_the_members_of_an_answer() -> None:
    example = re.search(r"```json\n(.*?)```", API, re.DOTALL)
    assert example is not None
    models.OrderDetail.model_validate_json(example[1])
    order = json.loads(example[1])
    for members, model in (
        (order, models.OrderDetail),
        (order["order"], models.OrderHead),
        (order["items"][0], models.Item),
        (order["payment"], models.Payment),
        (order["history"][0]["record"], models.Record),
    ):
        assert members.keys() == model.model_fields.keys()
