"""Traces: one order from its POST to its end, over every stage, by OpenTelemetry.

Off unless the environment names a collector (``OTEL_EXPORTER_OTLP_ENDPOINT`` or ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT``); the
other ``OTEL_*`` variables mean what the specification says.  The ingress begins a trace, or continues its client's.  The
order's record carries it in the header ``traceparent``; a record of an inner topic, which holds rows of many orders, carries
the contexts of the sampled ones in the header ``traces``: JSON, order id to traceparent.

Only orders that carry a sampled context cost anything.  A trace never decides: what can't be read is no trace, and what a
worker that ends had not exported yet is missing.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import orjson
from opentelemetry import trace as api
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags

from orderstream import __version__
from orderstream.streams.dead_letters import Headers

TRACEPARENT = "traceparent"
"""Header of an order's record, as W3C Trace Context writes it."""

TRACES = "traces"
"""Header of a record of an inner topic."""

CLOSE_S = 2.0
"""Longest wait for the last spans to be exported when a process leaves."""

# OpenTelemetry's propagator would parse an unsampled context in 6.7 µs, where this takes 1.6; it also takes blanks around a
# context, passes on flags that say nothing here, and logs a warning for each long header that any client may send.
_WRITTEN = re.compile(rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?", re.DOTALL)


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is to trace."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip() in ("none", ""):
        return False
    named = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return any(environment.get(name, "").strip() for name in named)


def sampled(written: bytes | None) -> SpanContext | None:
    """Return the context that a traceparent names, or None: it is none, or it is not sampled."""
    match = _WRITTEN.fullmatch(written or b"")
    if match is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in match.groups())
    if not (trace_id and span_id and flags & TraceFlags.SAMPLED):
        return None
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def written(context: SpanContext) -> str:
    """Return a context as a traceparent."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def of_headers(headers: Iterable[tuple[str, bytes | None]]) -> SpanContext | None:
    """Return the sampled context that an order's record carries, or None."""
    for name, value in headers:
        if name == TRACEPARENT:
            return sampled(value)
    return None


def of_rows(headers: Iterable[tuple[str, bytes | None]]) -> dict[str, SpanContext]:
    """Return the contexts that a record of an inner topic carries, by order id."""
    for name, value in headers:
        if name == TRACES:
            try:
                carried = orjson.loads(value or b"")
            except ValueError:
                return {}
            if not isinstance(carried, dict):
                return {}
            read = ((order_id, sampled(str(one).encode())) for order_id, one in carried.items())
            return {order_id: context for order_id, context in read if context is not None}
    return {}


def in_rows(order_ids: Iterable[str], contexts: Mapping[str, SpanContext]) -> Headers:
    """Return the headers of a record of an inner topic with rows about these orders."""
    carried = {order_id: written(contexts[order_id]) for order_id in order_ids if order_id in contexts}
    return ((TRACES, orjson.dumps(carried)),) if carried else ()


class Tracing:
    """The spans of one process.

    Args:
        role: ``worker`` or ``ingress``; names the service unless ``OTEL_SERVICE_NAME`` does.

    Attributes:
        contexts: of the orders that this process follows, by their ids; see :mod:`orderstream.agents.tracing`.
    """

    def __init__(self, role: str) -> None:
        # Slow to import, and only here needed.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": f"orderstream-{role}", "service.version": __version__})
        self._provider = TracerProvider(
            resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("orderstream", __version__)
        self.contexts: dict[str, SpanContext] = {}

    async def close(self) -> None:
        """Export what is left, in bounded time: a collector that is unavailable holds no process back."""
        thread = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, CLOSE_S)

    def start(
        self,
        name: str,
        contexts: Sequence[SpanContext],
        kind: SpanKind,
        attributes: Mapping[str, Any],
        begun_ns: int | None = None,
    ) -> Span:
        """Start a span under the first of these contexts, linked to the others."""
        return self._tracer.start_span(
            name,
            api.set_span_in_context(NonRecordingSpan(contexts[0])) if contexts else None,
            kind,
            dict(attributes),
            [Link(context) for context in contexts[1:]],
            begun_ns,
        )

    # The ingress

    @contextmanager
    def serving(self, method: str, path: str, traceparent: str | None) -> Iterator[Span]:
        """Trace a request; what is traced within it is beneath."""
        parent = _context(traceparent)
        context = api.set_span_in_context(NonRecordingSpan(parent)) if parent is not None else None
        attributes = {"http.request.method": method, "http.route": path}
        with self._tracer.start_as_current_span(f"{method} {path}", context, SpanKind.SERVER, attributes) as span:
            yield span

    @contextmanager
    def producing(self, order_id: str, topic: str) -> Iterator[Headers]:
        """Trace an order into Kafka; gives the header that its record takes along."""
        attributes = {"order.id": order_id, "messaging.system": "kafka", "messaging.destination.name": topic}
        with self._tracer.start_as_current_span(
            f"produce {topic}", kind=SpanKind.PRODUCER, attributes=attributes
        ) as span:
            yield ((TRACEPARENT, written(span.get_span_context()).encode()),)

    # Logs

    def name_in_log(self, line: MutableMapping[str, Any]) -> None:
        """Add the trace to a line of the log: that of the request in hand, or of the order that the line names."""
        context = api.get_current_span().get_span_context()
        if not context.is_valid:
            followed = self.contexts.get(str(line.get("order_id")))
            if followed is None:
                return
            context = followed
        line.setdefault("trace_id", f"{context.trace_id:032x}")
        line.setdefault("span_id", f"{context.span_id:016x}")


def _context(traceparent: str | None) -> SpanContext | None:
    """Return a client's context, sampled or not: the sampler decides by it."""
    match = _WRITTEN.fullmatch((traceparent or "").encode())
    if match is None or not (int(match[1], 16) and int(match[2], 16)):
        return None
    return SpanContext(int(match[1], 16), int(match[2], 16), True, TraceFlags(int(match[3], 16) & TraceFlags.SAMPLED))
