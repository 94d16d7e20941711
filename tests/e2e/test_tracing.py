"""An order's trace, from its POST to CONFIRMED, as a collector receives it."""

from __future__ import annotations

import asyncio
import gzip
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from orderstream.streams.partitions import product_partition
from tests.harness import Pipeline, ingress

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]
PATH = "/api/v1/orders"


class Collector:
    """An OTLP/HTTP endpoint that keeps every span."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip" and body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        export = ExportTraceServiceRequest.FromString(body)
        for resource in export.resource_spans:
            self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf"
        )

    def trace(self, trace_id: str) -> list[Any]:
        return [span for span in self.spans if span.trace_id.hex() == trace_id]

    async def until(self, trace_id: str, complete: Callable[[list[Any]], bool]) -> list[Any]:
        """Return the spans of a trace once they are complete."""
        deadline = time.monotonic() + 20
        while not complete(self.trace(trace_id)):
            assert time.monotonic() < deadline, [(s.name, s.attributes) for s in self.trace(trace_id)]
            await asyncio.sleep(0.1)
        return self.trace(trace_id)


@asynccontextmanager
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    """Serve a collector on a free port; give it and its address."""
    one = Collector()
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/traces", one.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield one, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def attributes(span: Any) -> dict[str, Any]:
    """Return the attributes of a span, lists as lists."""
    found: dict[str, Any] = {}
    for one in span.attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


def traceparent(*, sampled: bool) -> tuple[str, str, str]:
    """Return a client's context: trace id, span id, and how it is written."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return trace_id, span_id, f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}"


def products_of_different_owners(number: int, partitions: int) -> list[str]:
    """Return product ids that lie in as many different partitions."""
    found: dict[int, str] = {}
    n = 0
    while len(found) < number:
        n += 1
        found.setdefault(product_partition(f"p{n}", partitions), f"p{n}")
    return list(found.values())


async def test_one_order_of_three_products_is_one_tree_of_spans(
    pipeline: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with collector() as (received, address):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        shop = pipeline(partitions=3, verdict_timeout_s=20.0, payment_latency_min_s=0.5, payment_latency_max_s=0.5)
        products = products_of_different_owners(3, shop.settings.partitions)
        await shop.start(dict.fromkeys(products, 10), workers=3)  # no owner is near another
        await shop.settled(3)
        async with ingress(shop) as (client, _):
            trace_id, client_span, written = traceparent(sampled=True)
            quiet_id, _, quiet = traceparent(sampled=False)
            body = {
                "user_id": 7,
                "items": [{"product_id": product, "quantity": 1} for product in products],
                "payment_method": "mock",
            }
            answer = await client.post(PATH, json=body, headers={"traceparent": written})
            assert answer.status == 201
            order_id = (await answer.json())["order_id"]
            unsampled = await client.post(PATH, json=body, headers={"traceparent": quiet})
            ids = [order_id, (await unsampled.json())["order_id"]]
            assert await shop.finished(ids) == {"CONFIRMED": 2}

            def complete(spans: list[Any]) -> bool:
                found = [attributes(span) for span in spans if span.name == "commit"]  # each owner sends its own
                lines = sum(len(one["order.lines"]) for one in found)
                return lines >= len(products) and any(one.get("order.status") == "CONFIRMED" for one in found)

            spans = await received.until(trace_id, complete)
    by_id = {span.span_id.hex(): span for span in spans}
    assert len(by_id) == len(spans)

    def parent(span: Any) -> Any:
        return by_id[span.parent_span_id.hex()]

    def named(name: str) -> list[Any]:
        return [span for span in spans if span.name == name]

    (post,), (produce,) = named(f"POST {PATH}"), named(f"produce {shop.settings.topic('orders')}")
    assert post.parent_span_id.hex() == client_span
    assert attributes(post)["http.response.status_code"] == 201
    assert parent(produce) is post

    reserves = named("reserve")
    (first,) = [span for span in reserves if parent(span) is produce]
    others = [span for span in reserves if span is not first]
    assert others
    assert all(parent(span) is first for span in others)
    assert sorted(attributes(first)["order.lines"]) == sorted(
        [f"{products[0]}: held", f"{products[1]}: pending", f"{products[2]}: pending"]
    )
    held = sorted(line for span in others for line in attributes(span)["order.lines"])
    assert held == sorted(f"{product}: held" for product in products[1:])

    (pay,), (charge,) = named("pay"), named("charge")
    assert parent(pay) is first
    assert {link.span_id for link in pay.links} == {span.span_id for span in others}
    assert parent(charge) is pay
    assert attributes(charge)["payment.outcome"] == "charged"
    assert attributes(charge)["payment.amount_cents"] == 300
    assert charge.end_time_unix_nano - charge.start_time_unix_nano > 40_000_000
    assert attributes(pay)["order.status"] == "PAID"

    commits = named("commit")
    assert all(parent(span) is pay for span in commits)
    assert sorted(line for span in commits for line in attributes(span)["order.lines"]) == sorted(
        f"{product}: commit" for product in products
    )
    reached = {attributes(span)["order.status"]: span for span in commits if "order.status" in attributes(span)}
    assert reached.keys() == {"PAID", "CONFIRMED"}
    assert attributes(reached["PAID"])["order.lines"] == [f"{products[0]}: commit"]
    assert [event.name for event in reached["CONFIRMED"].events if event.name == "CONFIRMED"] == ["CONFIRMED"]

    assert len(spans) == 2 + len(reserves) + 2 + len(commits)
    assert {attributes(span)["order.id"] for span in spans if span is not post} == {order_id}
    assert [event.name for event in first.events] == ["decode", "gate", "turn", "sql", "hand_over", "update_gate"]
    assert post.start_time_unix_nano <= produce.start_time_unix_nano <= first.end_time_unix_nano
    assert received.services == {"orderstream-ingress", "orderstream-worker"}
    assert not received.trace(quiet_id), "no client asked for the trace of the other order"
