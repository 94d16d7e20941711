"""The AsyncAPI document says what is on the topics, all of them, as the code reads and writes it; and it is current."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from jsonschema import Draft202012Validator

from orderstream.streams import catalog, codec, events
from orderstream.streams.lines import LineStands, LineWanted
from orderstream.streams.orders import Reason, Status
from orderstream.streams.topics import TOPICS

FILE = Path(__file__).resolve().parents[2] / "docs" / "asyncapi.yaml"
ID, AT = "5e6e7e1c-2f52-4d2b-9a55-5d0e5a0c9a11", datetime(2025, 1, 31, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return catalog.describe()


def test_the_file_is_current() -> None:
    assert FILE.read_text() == catalog.text(), f"run: {catalog.MADE_BY} > docs/asyncapi.yaml"


def test_its_text_is_the_document(document: dict[str, Any]) -> None:
    assert yaml.safe_load(catalog.text()) == orjson.loads(orjson.dumps(document))


def test_every_topic_is_there_with_its_writers(document: dict[str, Any]) -> None:
    assert set(document["channels"]) == {spec.name for spec in TOPICS} == set(document["components"]["messages"])
    for spec in TOPICS:
        assert f"Written by: {', '.join(spec.writers)}." in document["channels"][spec.name]["description"]
    sent = {name for name, operation in document["operations"].items() if operation["action"] == "send"}
    assert len(sent) == sum("outside" in spec.writers for spec in TOPICS)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            mine = [value["$ref"]] if "$ref" in value else []
            return mine + [found for member in value.values() for found in references(member)]
        return [found for member in value for found in references(member)] if isinstance(value, list) else []

    found = references(document)
    assert found
    for reference in found:
        place: Any = document
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


WRITTEN: list[tuple[str, bytes]] = [
    ("order-events", events.created(ID, AT, "u", [("1", 2)])),
    ("order-events", events.reserved(ID, AT, 200)),
    ("order-events", events.reserved(ID, AT, 200, [100, 50])),
    ("order-events", events.paid(ID, AT, 200, "ch-1")),
    ("order-events", events.confirmed(ID, AT)),
    *(("order-events", events.cancelled(ID, AT, reason)) for reason in Reason),
    ("order-events", events.rejected(ID, AT, "invalid_order", "items: Field required", {"partition": 1, "offset": 2})),
    *(
        (topic, value)
        for topic, row in (
            ("order-lines", LineWanted("hold", ID, "1", 2, home=3, user_id="u")),
            ("reservations", LineStands(ID, "1", "h", 100, None)),
            ("reservations", LineStands(ID, "1", "x", 0, Reason.INSUFFICIENT_STOCK)),
        )
        for value in codec.encode_rows([row], 10)
    ),
    ("orders", b'{"user_id": 7, "items": [{"product_id": 1, "quantity": 2}], "payment_method": "card"}'),
    ("order-commands", orjson.dumps({"command": "cancel", "order_id": ID})),
    *(
        ("stock-commands", orjson.dumps({"command": command, "command_id": ID, "product_id": "1", **more}))
        for command, more in (
            ("recount", {}),
            ("receive", {"quantity": 5}),
            ("product", {"name": "Cup", "price_cents": 300, "actor": "ann"}),
            (
                "product",
                {"retired": True, "was": {"name": "Cup", "price_cents": 1, "limit_per_user": None, "retired": False}},
            ),
            ("limit", {"limit_per_user": None}),
        )
    ),
]


def validator(document: dict[str, Any], topic: str) -> Draft202012Validator:
    payload = document["components"]["messages"][topic]["payload"]
    return Draft202012Validator({**payload, "components": document["components"]})


@pytest.mark.parametrize(("topic", "value"), WRITTEN)
def test_what_is_written_is_as_the_document_says(document: dict[str, Any], topic: str, value: bytes) -> None:
    found = list(validator(document, topic).iter_errors(orjson.loads(value)))
    assert found == []


@pytest.mark.parametrize(("topic", "value"), WRITTEN)
def test_what_misses_a_member_or_has_one_more_is_not(document: dict[str, Any], topic: str, value: bytes) -> None:
    body = orjson.loads(value)
    judge = validator(document, topic)
    of_some = (
        {"quantity", "reason", "name", "price_cents", "limit_per_user", "retired", "was", "actor"}
        if topic == "stock-commands"
        else {"prices_cents"}
    )
    for name in set(body) - of_some:
        assert not judge.is_valid({key: member for key, member in body.items() if key != name}), name
    if "rows" in body:
        (row,) = body["rows"]
        assert not judge.is_valid({**body, "rows": [row[:-1]]})
        assert not judge.is_valid({**body, "rows": [[*row, 1]]})
    else:
        assert not judge.is_valid({**body, "colour": "red"})


def test_there_is_an_event_model_for_every_status() -> None:
    assert {orjson.loads(value)["status"] for topic, value in WRITTEN if topic == "order-events"} == {
        *Status,
        "REJECTED",
    }
