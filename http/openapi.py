"""The OpenAPI document: every route with what it takes and answers, made from the models; and a page that shows it.

A route that is not in :data:`OPERATIONS` fails ``tests/unit/test_openapi.py``.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from orderstream import __version__
from orderstream.http import models
from orderstream.http.problems import CONTENT_TYPE, KINDS, TYPE_PREFIX
from orderstream.settings import Settings
from orderstream.streams.commands import ProductId
from orderstream.streams.orders import KEY_CHARS_MAX, OrderRecord

JSON = "application/json"
TEXT = "text/plain"

KEY = r"^[!#-~]([ !#-~]*[!#-~])?$"
"""A key in a header; RFC 8941's quotes around it are taken too."""

HEADERS: Mapping[str, dict[str, Any]] = {
    "Idempotency-Key": {"maxLength": KEY_CHARS_MAX, "pattern": KEY},
    "Last-Event-ID": {"pattern": "^[0-9]{0,9}$"},
}
STREAM = "text/event-stream"
_EVENT = {name: {"type": "string"} for name in ("data", "event", "id")} | {"retry": {"type": "integer"}}

UUID = r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"


@dataclass(frozen=True)
class Answer:
    """What a request is answered when it went well; an empty ``media``: without a body."""

    description: str
    model: type[BaseModel] | None = None
    media: str = JSON
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    Attributes:
        method: in small letters.
        path: as the router has it.
        name: unique; clients make the names of their functions from it.
        tag: the chapter.
        summary: one line.
        answers: by status.
        problems: names of :data:`~orderstream.http.problems.KINDS`, besides those that every route may answer.
        description: more than a line, in Markdown.
        query: its query.
        body: its body.
        headers: of the request: name, whether required, what for.
        admin: an admin's token is needed.
        customer: it is about orders of the customer that the request names, where the settings ask for one.
    """

    method: str
    path: str
    name: str
    tag: str
    summary: str
    answers: Mapping[int, Answer]
    problems: Sequence[str] = ()
    description: str = ""
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    headers: Sequence[tuple[str, bool, str]] = ()
    admin: bool = False
    customer: bool = False


ALWAYS = ("malformed-request", "uri-too-long", "expectation-failed", "headers-too-large", "internal", "overloaded")
API = ("rate-limited", "invalid-request")
"""Of every request under ``/api``."""
BODY = ("not-json", "incomplete-body", "request-timeout", "too-large", "unsupported-media-type")
ADMIN = ("unauthorized", "admin-off")
ENDED = ("unknown-product", "insufficient-stock", "user-limit", "payment-declined", "expired", "cancelled-by-user")
LOCATION = {"Location": "the path of what was made"}
TAGGED = {"ETag": "of the product as it is, for `If-Match`: what people change of it, and its counts"}
MATCH = "`If-Match` with its `ETag`: only if nobody has changed the product since; orders change nothing."
"""Not as parameters: what is drawn for one fits no product, and is a valid request all the same."""
PAGED = "Pages are found by `next`: pass it as `cursor`. A page may be short, even empty, and still have a `next`."

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "post",
        "/api/v1/orders",
        "placeOrder",
        "orders",
        summary="Place an order; the answer says whether its stock is held",
        answers={
            201: Answer("every unit is held for the order, which is charged next", models.Placed, headers=LOCATION),
            202: Answer("the order is taken in; its verdict is not known yet", models.Placed, headers=LOCATION),
        },
        problems=(
            *BODY,
            "invalid-order",
            "too-many-units",
            "idempotency-key-reused",
            "request-in-progress",
            "order-removed",
            *ENDED,
            "forbidden",
            "engine-unavailable",
        ),
        description="A refused order is a 409 with the reason. With a key, a repeat is the same order.",
        body=OrderRecord,
        headers=(
            ("Idempotency-Key", False, "names this order among its user's; the member `idempotency_key` wins"),
            ("Prefer", False, "`respond-async`: do not wait for the verdict"),
        ),
        customer=True,
    ),
    Operation(
        "get",
        "/api/v1/orders",
        "listOrders",
        "orders",
        summary="List a customer's orders, newest first",
        answers={200: Answer("a page of orders", models.OrdersPage)},
        problems=("forbidden", *ADMIN, "engine-unavailable"),
        description=f"Without `user_id`: an admin finds the orders of all customers, a named customer own ones. {PAGED}",
        query=models.OrdersQuery,
        customer=True,
    ),
    Operation(
        "get",
        "/api/v1/orders/{id}",
        "readOrder",
        "orders",
        summary="Read an order: lines, payment, history",
        answers={200: Answer("the order", models.OrderDetail)},
        problems=("invalid-order-id", "order-not-found", "order-rejected", "engine-unavailable"),
        customer=True,
    ),
    Operation(
        "post",
        "/api/v1/orders/{id}/cancel",
        "cancelOrder",
        "orders",
        summary="Cancel an order; one that is paid is refunded, its units return to stock",
        answers={
            200: Answer("it is cancelled, by this request or before", models.Cancelled, headers=LOCATION),
            202: Answer("it is commanded, and not carried out yet", models.Cancelling, headers=LOCATION),
        },
        problems=(*BODY, "invalid-order-id", "order-not-found", "order-rejected", "engine-unavailable"),
        description=(
            "Repeating it is safe, and answers the same. One that comes before its order is kept for it."
            " An order is cancelled whole: there is nothing to say in a body or in parameters."
        ),
        headers=(("Prefer", False, "`respond-async`: do not wait until it is carried out"),),
        customer=True,
    ),
    Operation(
        "get",
        "/api/v1/orders/{id}/events",
        "followOrder",
        "orders",
        summary="Follow an order by server-sent events",
        answers={
            200: Answer(
                "an event for each entry of the order's history: `data` is a `Step` with the `order_id`, `id` its index",
                media=STREAM,
            ),
            204: Answer("nothing follows the event that the client has", media=""),
        },
        problems=("invalid-order-id", "invalid-event-id", "order-not-found", "order-rejected", "engine-unavailable"),
        description="First what happened, then what happens. The stream ends with CONFIRMED or CANCELLED.",
        headers=(
            ("Last-Event-ID", False, "the id of the last event that the client has: the stream continues behind it"),
        ),
        customer=True,
    ),
    Operation(
        "get",
        "/api/v1/products",
        "listProducts",
        "products",
        summary="List the catalogue, by product id",
        answers={200: Answer("a page of products", models.ProductsPage)},
        problems=("engine-unavailable",),
        query=models.ProductsQuery,
    ),
    Operation(
        "get",
        "/api/v1/products/{id}",
        "readProduct",
        "products",
        summary="Read a product and its units",
        answers={
            200: Answer("the product", models.Product, headers=TAGGED),
            304: Answer("as the client has it", media="", headers=TAGGED),
        },
        problems=("product-not-found", "engine-unavailable"),
        description="With the `ETag` that the client has in `If-None-Match`: 304, unless something has changed.",
    ),
    Operation(
        "put",
        "/api/v1/products/{id}",
        "putProduct",
        "products",
        summary="Create a product, without units, or change it",
        answers={
            200: Answer("changed", models.Product, headers=TAGGED),
            201: Answer("created", models.Product, headers=TAGGED | LOCATION),
            202: Answer("on its way; the same request again is safe", models.StockPending),
        },
        problems=(*BODY, "precondition-failed", "engine-unavailable"),
        description=(
            "Orders held before keep their price. Who has more than a new limit keeps it and gets no more."
            f" {MATCH} `If-None-Match: *`: only if there is no such product."
        ),
        body=models.ProductChange,
        admin=True,
    ),
    Operation(
        "post",
        "/api/v1/products/{id}/stock",
        "moveStock",
        "products",
        summary="Receive stock, or adjust or set it with a reason",
        answers={
            200: Answer("carried out", models.StockChanged),
            202: Answer("on its way; repeat the request with the same key", models.StockPending),
        },
        problems=(
            *BODY,
            "idempotency-key-missing",
            "idempotency-key-reused",
            "request-in-progress",
            "product-not-found",
            "stock-too-low",
            "stock-too-high",
            "engine-unavailable",
        ),
        description="A repeat with the same key is the same change: it counts once, and is answered as the first time.",
        body=models.StockChange,
        headers=(("Idempotency-Key", True, "names this change among those of the product"),),
        admin=True,
    ),
    Operation(
        "get",
        "/api/v1/products/{id}/ledger",
        "readLedger",
        "products",
        summary="List what people and deliveries moved of a product, newest first",
        answers={200: Answer("a page of movements", models.LedgerPage)},
        problems=("product-not-found", "engine-unavailable"),
        query=models.PageQuery,
        admin=True,
    ),
    Operation(
        "get",
        "/health",
        "health",
        "operation",
        summary="Whether the process lives; nothing is checked",
        answers={200: Answer("it does", models.Health)},
    ),
    Operation(
        "get",
        "/ready",
        "ready",
        "operation",
        summary="Whether the process can do its work, and which engines answer",
        answers={200: Answer("it can; `degraded` names engines that do not answer meanwhile", models.Ready)},
        problems=("not-ready",),
    ),
    Operation(
        "get",
        "/metrics",
        "metrics",
        "operation",
        summary="What the process has counted, for Prometheus",
        answers={200: Answer("the metrics", media=TEXT)},
    ),
    Operation(
        "get",
        "/openapi.json",
        "openapi",
        "operation",
        summary="This document",
        answers={200: Answer("an OpenAPI 3.1 document", media=JSON)},
    ),
    Operation(
        "get",
        "/docs",
        "docs",
        "operation",
        summary="This document, to be read",
        answers={200: Answer("a page", media="text/html")},
    ),
)


def described() -> set[tuple[str, str]]:
    """Return every method and path that the document has."""
    return {(operation.method.upper(), operation.path) for operation in OPERATIONS}


def describe(settings: Settings) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of an ingress with these settings."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, settings)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "orderstream",
            "version": __version__,
            "summary": "Orders in, stock held, paid, committed.",
            "description": "Money is in cents, times are UTC. Every error is a problem document (RFC 9457).",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in dict.fromkeys(operation.tag for operation in OPERATIONS)],
        "paths": paths,
        "components": {
            "schemas": _schemas(settings),
            "securitySchemes": _schemes(settings),
        },
    }


def _models() -> Iterator[type[BaseModel]]:
    yield models.ProblemDocument
    for operation in OPERATIONS:
        yield from (answer.model for answer in operation.answers.values() if answer.model is not None)
        if operation.body is not None:
            yield operation.body


def _schemas(settings: Settings) -> dict[str, Any]:
    wanted = list(dict.fromkeys(_models()))
    asked = {operation.body for operation in OPERATIONS}
    modes = [(model, "validation" if model in asked else "serialization") for model in wanted]
    _, found = models_json_schema(modes, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas: dict[str, Any] = found["$defs"]
    schemas["OrderLine"]["properties"]["quantity"]["maximum"] = settings.line_quantity_max
    del schemas["OrderLine"]["properties"]["quantity"]["exclusiveMaximum"]
    # The id follows from the key: the document asks for one of the two, the server also takes both when they fit.
    schemas["OrderRecord"]["not"] = {
        "required": ["order_id", "idempotency_key"],
        "properties": {name: {"type": "string"} for name in ("order_id", "idempotency_key")},
    }
    change = schemas["StockChange"]
    change["oneOf"] = [
        {"properties": {"command": {"const": "receive"}, "quantity": {"minimum": 1}}},
        {
            "properties": {
                "command": {"const": "adjust"},
                "quantity": {"not": {"const": 0}},
                "reason": {"type": "string"},
            },
            "required": ["reason"],
        },
        {
            "properties": {"command": {"const": "set"}, "quantity": {"minimum": 0}, "reason": {"type": "string"}},
            "required": ["reason"],
        },
    ]
    return schemas


def _schemes(settings: Settings) -> dict[str, Any]:
    schemes: dict[str, Any] = {"admin": {"type": "http", "scheme": "bearer", "description": "an admin's token"}}
    if settings.customer_auth == "header":
        said = "the customer, as the proxy names it"
        schemes["customer"] = {
            "type": "apiKey",
            "in": "header",
            "name": settings.customer_header,
            "description": said,
        }
    elif settings.customer_auth == "jwt":
        said = f"a customer's token, named by its claim `{settings.jwt_claim}`"
        schemes["customer"] = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": said}
    return schemes


def _security(operation: Operation, settings: Settings) -> list[dict[str, list[str]]]:
    """Return which schemes let a request pass, any one of them; an empty one: without any."""
    if operation.customer and settings.customer_auth != "none":
        return [{"customer": []}, {"admin": []}]
    if operation.name == "listOrders":
        return [{}, {"admin": []}]
    return [{"admin": []}] if operation.admin else []


def _operation(operation: Operation, settings: Settings) -> dict[str, Any]:
    security = _security(operation, settings)
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": list(_parameters(operation)),
        "responses": _responses(operation, ("unauthorized",) if {"customer": []} in security else ()),
    }
    if operation.description:
        described["description"] = operation.description
    if operation.body is not None:
        schema = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    if security:
        described["security"] = security
    return described


def _parameters(operation: Operation) -> Iterator[dict[str, Any]]:
    if "/orders/{id}" in operation.path:
        schema: dict[str, Any] = {"type": "string", "format": "uuid", "pattern": UUID}
        yield {"name": "id", "in": "path", "required": True, "schema": schema, "example": models.ORDER}
    elif "{id}" in operation.path:
        ids = TypeAdapter(ProductId).json_schema()
        schema = ids["anyOf"][0] | {"not": ids["not"]}
        yield {"name": "id", "in": "path", "required": True, "schema": schema, "example": "cup"}
    if operation.query is not None:
        for name, field in operation.query.model_fields.items():
            schema = _given(TypeAdapter(field.rebuild_annotation()).json_schema())
            if field.default is not None:
                schema["default"] = field.default
            yield {"name": name, "in": "query", "description": field.description, "schema": schema}
    for name, required, what in operation.headers:
        schema = {"type": "string", **HEADERS.get(name, {})}
        yield {"name": name, "in": "header", "required": required, "description": what, "schema": schema}


def _given(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a member that may be left out as that of a parameter: one that is there is never null."""
    definitions = schema.pop("$defs", {})
    schema.pop("default", None)
    schema.pop("description", None)
    options = [option for option in schema.pop("anyOf", []) if option != {"type": "null"}]
    if options:
        schema |= options[0]
    if "$ref" in schema:
        schema |= definitions[schema.pop("$ref").rpartition("/")[2]]
    return {name: value for name, value in schema.items() if name not in ("title", "description")}


def _responses(operation: Operation, more: Sequence[str]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, answer in operation.answers.items():
        schema: dict[str, Any] = {"type": "object"} if answer.media in (JSON, STREAM) else {"type": "string"}
        if answer.media == STREAM:  # of each event
            schema |= {"properties": _EVENT, "required": ["data"]}
        if answer.model is not None:
            schema = {"$ref": f"#/components/schemas/{answer.model.__name__}"}
        responses[str(status)] = {"description": answer.description}
        if answer.media:
            responses[str(status)]["content"] = {answer.media: {"schema": schema}}
        if answer.headers:
            responses[str(status)]["headers"] = {
                name: {"description": what, "required": True, "schema": {"type": "string"}}
                for name, what in answer.headers.items()
            }
    api = API if operation.path.startswith("/api/") else ()
    names = dict.fromkeys([*operation.problems, *(ADMIN if operation.admin else more), *api, *ALWAYS])
    for status, kinds in _by_status(names).items():
        titles = "; ".join(f"`{kind}`: {KINDS[kind].title}" for kind in kinds)
        schema = {
            "allOf": [
                {"$ref": "#/components/schemas/ProblemDocument"},
                {"properties": {"type": {"enum": [TYPE_PREFIX + kind for kind in kinds]}, "status": {"const": status}}},
            ]
        }
        example = {"type": TYPE_PREFIX + kinds[0], "title": KINDS[kinds[0]].title, "status": status}
        content = {CONTENT_TYPE: {"schema": schema, "example": example}}
        responses[str(status)] = {"description": titles, "content": content}
        if status in (429, 503):
            retry = {
                "description": "seconds to wait",
                "required": True,
                "schema": {"type": "string", "pattern": "^[0-9]+$"},
            }
            responses[str(status)]["headers"] = {"Retry-After": retry}
    return dict(sorted(responses.items()))


def _by_status(names: Mapping[str, None]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(KINDS[name].status, []).append(name)
    return found


# The page

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { margin: 3rem 0 0; border-bottom: 1px solid #ccc; text-transform: capitalize; }
h3 { margin: 2rem 0 0; font-size: 1.1rem; } h4 { margin: 1rem 0 0; font-size: 1rem; }
code, pre { font: 14px/1.5 ui-monospace, monospace; background: #f4f4f4; } pre { padding: .6rem; overflow: auto; }
table { border-collapse: collapse; } td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; }
h3, td, p, a { overflow-wrap: anywhere; }
.method { display: inline-block; min-width: 4rem; font-weight: 700; } .admin { color: #a00; font-weight: 400; }
@media (max-width: 40rem) {  /* a phone: a row of a table is a paragraph */
  body { margin: 1rem auto; } h2 { margin-top: 2rem; }
  table, tbody, tr { display: block; } tr { padding: .4rem 0; border-bottom: 1px solid #8884; }
  td { display: inline; padding: 0; } td:empty { display: none; }
  td::after { content: " "; } td:last-child { display: block; }
}
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; } code, pre { background: #282828; } a { color: #8bf; } .admin { color: #f88; }
}
"""

PAGE_POLICY = (
    "default-src 'none'; frame-ancestors 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    + "'"
)
"""What the page may load: its own style, and nothing else."""


def render(document: Mapping[str, Any]) -> str:
    """Return the document as a page that needs nothing from elsewhere, no script and no other file."""
    parts = [
        "<!DOCTYPE html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>{_e(document['info']['title'])}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_e(document['info']['title'])} {_e(document['info']['version'])}</h1>",
        f"<p>{_e(document['info']['description'])} The same for programs: <a href=/openapi.json>openapi.json</a>.</p>",
    ]
    for tag in document["tags"]:
        parts.append(f"<h2>{_e(tag['name'])}</h2>")
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                if tag["name"] in operation["tags"]:
                    parts += _operation_html(path, method, operation)
    parts.append("<h2 id=schemas>Schemas</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(
            f"<h3 id='{_e(name)}'>{_e(name)}</h3><p>{_prose(schema.get('description', ''))}</p>{_schema_html(schema)}"
            + "".join(f"<pre>{_e(json.dumps(example, indent=2))}</pre>" for example in schema.get("examples", ()))
        )
    return "".join(parts) + "</body></html>"


def _operation_html(path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    admin = " <span class=admin>admin</span>" if operation.get("security") == [{"admin": []}] else ""
    name = _e(operation["operationId"])
    yield f"<h3 id='{name}'><span class=method>{method.upper()}</span><code>{_e(path)}</code>{admin}</h3>"
    yield f"<p>{_prose(operation['summary'])}. {_prose(operation.get('description', ''))}</p>"
    if operation["parameters"]:
        yield "<h4>Parameters</h4><table>"
        for one in operation["parameters"]:
            need = "required" if one.get("required") else ""
            yield (
                f"<tr><td><code>{_e(one['name'])}</code><td>{one['in']} {need}<td>{_type_html(one['schema'])}"
                f"<td>{_prose(one.get('description') or '')}"
            )
        yield "</table>"
    if "requestBody" in operation:
        yield f"<h4>Body</h4><p>{_type_html(operation['requestBody']['content'][JSON]['schema'])}</p>"
    yield "<h4>Answers</h4><table>"
    for status, answer in operation["responses"].items():
        (media, content), *_ = answer.get("content", {"no body": {"schema": {}}}).items()
        shown = _type_html(content["schema"]) if "$ref" in content["schema"] else _e(media)
        yield f"<tr><td>{status}<td>{shown}<td>{_prose(answer['description'])}"
    yield "</table>"


def _schema_html(schema: Mapping[str, Any]) -> str:
    if "properties" not in schema:
        return f"<pre>{_e(json.dumps(schema, indent=2))}</pre>"
    required = set(schema.get("required", ()))
    rows = (
        f"<tr><td><code>{_e(name)}</code><td>{'required' if name in required else ''}<td>{_type_html(member)}"
        f"<td>{_prose(member.get('description', ''))}"
        for name, member in schema["properties"].items()
    )
    return f"<table>{''.join(rows)}</table>"


def _type_html(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = _e(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(_type_html(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " ".join(f"<code>{_e(str(value))}</code>" for value in schema["enum"])
    if "const" in schema:
        return f"<code>{_e(str(schema['const']))}</code>"
    if schema.get("type") == "array":
        return f"list of {_type_html(schema['items'])}"
    bounds = {"minimum": "from ", "maximum": "to ", "minLength": "at least ", "maxLength": "at most ", "format": ""}
    limits = [f"{word}{schema[name]}" for name, word in bounds.items() if name in schema]
    return _e(", ".join([str(schema.get("type", "any")), *limits]))


def _prose(text: object) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", _e(text))


def _e(text: object) -> str:
    return html.escape(str(text))
