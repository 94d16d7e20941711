"""Traces: one order's way from its POST to its end, over every stage, by OpenTelemetry.

Off unless the environment names a collector (``OTEL_EXPORTER_OTLP_ENDPOINT`` or ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT``); the
other ``OTEL_*`` variables mean what the specification says.  The ingress begins a trace, or goes on with its client's.  The
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
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from opentelemetry import trace as api
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags

from orderstream import __version__
from orderstream.streams.dead_letters import Headers
from orderstream.streams.orders import Status

if TYPE_CHECKING:
    from orderstream.agents.batches import Batch
    from orderstream.agents.lifecycle import OpenOrder
    from orderstream.agents.reserve import Intake
    from orderstream.metrics import Steps
    from orderstream.sql.store import Decision, LineToDecide, Reserved

TRACEPARENT = "traceparent"
"""Header of an order's record, as W3C Trace Context writes it."""

TRACES = "traces"
"""Header of a record of an inner topic."""

PENDING_MAX = 10_000
"""Sampled orders whose charge is under way, in one worker; beyond that the oldest one's span ends early."""

CLOSE_S = 2.0
"""Longest wait for the last spans to be exported when a process leaves."""

_WRITTEN = re.compile(rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?", re.DOTALL)
_ENDED = frozenset({Status.PAID, Status.CONFIRMED, Status.CANCELLED})


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this process is to trace."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip() in ("none", ""):
        return False
    named = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return any(environment.get(name, "").strip() for name in named)


def sampled(written: bytes | None) -> SpanContext | None:
    """Return the context that a traceparent names, or None: it is none, or nobody samples it."""
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
                told = orjson.loads(value or b"")
            except ValueError:
                return {}
            if not isinstance(told, dict):
                return {}
            read = ((order_id, sampled(str(one).encode())) for order_id, one in told.items())
            return {order_id: context for order_id, context in read if context is not None}
    return {}


def in_rows(rows: Iterable[tuple[Any, ...]], contexts: Mapping[str, SpanContext]) -> Headers:
    """Return the headers of a record of an inner topic with these rows, each of which begins with its order's id."""
    carried = {row[0]: written(contexts[row[0]]) for row in rows if row[0] in contexts}
    return ((TRACES, orjson.dumps(carried)),) if carried else ()


class Pending(NamedTuple):
    """An order in the pay stage: its span, and that of its charge once that is asked for."""

    span: Span
    charge: Span | None


class Tracing:
    """The spans of one process.

    Args:
        role: ``worker`` or ``ingress``; names the service unless ``OTEL_SERVICE_NAME`` does.
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
        self.pending: dict[str, Pending] = {}

    async def close(self) -> None:
        """Export what is left, in bounded time: a collector that is away holds no process back."""
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

    def begin(self, steps: Steps, batch: Batch, inner: frozenset[str]) -> BatchTrace:
        """Begin a batch of a stage.

        Args:
            steps: those of the batch; they become events of its spans.
            batch: the records.
            inner: the inner topics, by their names on the broker.
        """
        carried: dict[str, list[SpanContext]] = {}
        for chunk in batch.chunks:
            if chunk.tp.topic in inner:
                for record in chunk.records:
                    if record.headers:
                        for order_id, context in of_rows(record.headers).items():
                            contexts = carried.setdefault(order_id, [])
                            if context not in contexts:
                                contexts.append(context)
        return BatchTrace(self, steps, carried)

    # The ingress

    @contextmanager
    def serving(self, method: str, path: str, traceparent: str | None) -> Iterator[Span]:
        """Trace a request; what is traced within it is beneath."""
        parent = _context(traceparent)
        context = api.set_span_in_context(NonRecordingSpan(parent)) if parent is not None else None
        told = {"http.request.method": method, "http.route": path}
        with self._tracer.start_as_current_span(f"{method} {path}", context, SpanKind.SERVER, told) as span:
            yield span

    @contextmanager
    def producing(self, order_id: str, topic: str) -> Iterator[Headers]:
        """Trace the way of an order into Kafka; gives the header that its record takes along."""
        told = {"order.id": order_id, "messaging.system": "kafka", "messaging.destination.name": topic}
        with self._tracer.start_as_current_span(f"produce {topic}", kind=SpanKind.PRODUCER, attributes=told) as span:
            yield ((TRACEPARENT, written(span.get_span_context()).encode()),)

    # Logs

    def name_in_log(self, line: MutableMapping[str, Any]) -> None:
        """Add the trace to a line of the log: that of the request in hand, or of the order that the line names."""
        span = api.get_current_span()
        if not span.get_span_context().is_valid:
            pending = self.pending.get(str(line.get("order_id")))
            if pending is None:
                return
            span = pending.span
        context = span.get_span_context()
        line.setdefault("trace_id", f"{context.trace_id:032x}")
        line.setdefault("span_id", f"{context.span_id:016x}")


def _context(traceparent: str | None) -> SpanContext | None:
    """Return a client's context, sampled or not: the sampler decides by it."""
    match = _WRITTEN.fullmatch((traceparent or "").encode())
    if match is None or not (int(match[1], 16) and int(match[2], 16)):
        return None
    return SpanContext(int(match[1], 16), int(match[2], 16), True, TraceFlags(int(match[3], 16) & TraceFlags.SAMPLED))


class BatchTrace:
    """The sampled orders of one batch of a stage.

    Attributes:
        handed: the context that goes on with an order's rows, by order id.
    """

    def __init__(self, tracing: Tracing, steps: Steps, carried: dict[str, list[SpanContext]]) -> None:
        self._tracing = tracing
        self._carried = carried
        self._begun_ns = time.time_ns()
        self._marks: list[tuple[str, int]] = []
        steps.marks = self._marks
        self._ending: list[Span] = []
        self.handed: dict[str, SpanContext] = {}

    def _start(self, name: str, order_id: str, contexts: Sequence[SpanContext], **attributes: Any) -> Span:
        told = {"order.id": order_id, **attributes}
        span = self._tracing.start(name, contexts, SpanKind.CONSUMER, told, self._begun_ns)
        self.handed[order_id] = span.get_span_context()
        return span

    def _at(self, step: str) -> int:
        return next((at for name, at in self._marks if name == step), self._begun_ns)

    def reserved(self, intake: Intake, lines: Sequence[LineToDecide], reserved: Reserved) -> None:
        """Trace what the reserve stage decided of orders, and of lines handed over to it."""
        at_line = 0
        for order, record, _ in intake.arrivals:
            first, at_line = at_line, at_line + len(order.lines)
            context = of_headers(record.headers)
            if context is not None:
                self._reserved(order.order_id, [context], lines[first:at_line], reserved.lines[first:at_line])
        for order_id, contexts in self._carried.items():
            ours = [n for n in range(at_line, len(lines)) if lines[n].order_id == order_id]
            if ours:
                self._reserved(order_id, contexts, [lines[n] for n in ours], [reserved.lines[n] for n in ours])

    def _reserved(
        self, order_id: str, contexts: Sequence[SpanContext], lines: Sequence[LineToDecide], verdicts: Sequence[Any]
    ) -> None:
        told = [f"{line.product_id}: {verdict.reason or 'held'}" for line, verdict in zip(lines, verdicts, strict=True)]
        self._ending.append(self._start("reserve", order_id, contexts, **{"order.lines": told}))

    def paid(self, orders: Mapping[str, OpenOrder], decisions: Sequence[tuple[Decision, OpenOrder]]) -> None:
        """Trace what the pay stage decided; its spans stay open until an order's charge is known."""
        pending = self._tracing.pending
        for order_id, contexts in self._carried.items():
            open_one = pending.get(order_id)
            if open_one is None:
                pending[order_id] = Pending(self._start("pay", order_id, contexts), None)
                if len(pending) > PENDING_MAX:
                    _end(pending.pop(next(iter(pending))))
            else:
                for context in contexts:
                    open_one.span.add_link(context)
        if not pending:
            return
        outcomes = {one.order_id: one for one, _ in decisions if one.step in ("charged", "declined")}
        for order_id in [order_id for order_id in pending if order_id in orders or order_id in self._carried]:
            span, charge = pending[order_id]
            order, outcome = orders.get(order_id), outcomes.get(order_id)
            if charge is None and (outcome is not None or (order is not None and order.charge_asked)):
                told = {"order.id": order_id, "payment.amount_cents": order.total_cents if order is not None else 0}
                asked_ns = self._at("look_up")
                charge = self._tracing.start("charge", [span.get_span_context()], SpanKind.CLIENT, told, asked_ns)
                pending[order_id] = Pending(span, charge)
                answered_ns = self._at("decide")
            else:
                answered_ns = self._begun_ns
            if charge is not None and outcome is not None:
                charge.set_attribute("payment.outcome", outcome.step)
                charge.end(answered_ns)
            self.handed[order_id] = span.get_span_context()
            if order is None or (order.status in _ENDED and not order.charge_asked):
                span.set_attribute("order.status", str(order.status) if order is not None else "decided before")
                del pending[order_id]
                self._ending.append(span)

    def settled(self, lines: Iterable[tuple[str, str, str]], confirmed: Iterable[tuple[str, Any]]) -> None:
        """Trace what the commit stage settled.

        Args:
            lines: ``(order id, product id, action)``.
            confirmed: order id and time of those that are sold whole now.
        """
        if not self._carried:
            return
        ours: dict[str, list[str]] = {}
        for order_id, product_id, action in lines:
            if order_id in self._carried:
                ours.setdefault(order_id, []).append(f"{product_id}: {action}")
        sold = dict(confirmed)
        for order_id, told in ours.items():
            span = self._start("commit", order_id, self._carried[order_id], **{"order.lines": told})
            if order_id in sold:
                span.set_attribute("order.status", str(Status.CONFIRMED))
                span.add_event(str(Status.CONFIRMED), timestamp=int(sold[order_id].timestamp() * 1e9))
            self._ending.append(span)

    def finish(self) -> None:
        """End the spans of the batch: everything is handed over."""
        for span in self._ending:
            for step, at in self._marks:
                span.add_event(step, timestamp=at)
            span.end()
        self._ending = []


def _end(pending: Pending) -> None:
    if pending.charge is not None:
        pending.charge.end()
    pending.span.end()
