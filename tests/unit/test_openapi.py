"""The OpenAPI document says what the ingress does: every route, every problem, nothing else; its page needs nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema_rs import validator_for
from schemathesis.specs.openapi.definitions import OPENAPI_31

from orderstream.http import openapi
from orderstream.http.problems import KINDS, TYPE_PREFIX
from orderstream.http.server import create_app
from orderstream.settings import load


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
