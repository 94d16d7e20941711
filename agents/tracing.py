"""Spans of one batch of a stage, for the orders in it that carry a sampled trace context."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import Span, SpanContext, SpanKind

from orderstream.streams.orders import Status
from orderstream.streams.tracing import Pending, Tracing, of_headers, of_rows

if TYPE_CHECKING:
    from orderstream.agents.batches import Batch
    from orderstream.agents.intake import Intake
    from orderstream.agents.lifecycle import OpenOrder
    from orderstream.metrics import Steps
    from orderstream.sql.store import Decision, LineToDecide, Reserved


PENDING_MAX = 10_000
"""Sampled orders whose charge is in progress, in one worker; beyond that the oldest one's span ends early."""

_ENDED = frozenset({Status.PAID, Status.CONFIRMED, Status.CANCELLED})


class BatchTrace:
    """The sampled orders of one batch of a stage.

    Attributes:
        handed: the context that is handed over with an order's rows, by order id.
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
        attributes = {"order.id": order_id, **attributes}
        span = self._tracing.start(name, contexts, SpanKind.CONSUMER, attributes, self._begun_ns)
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
        outcomes = [
            f"{line.product_id}: {verdict.reason or 'held'}" for line, verdict in zip(lines, verdicts, strict=True)
        ]
        self._ending.append(self._start("reserve", order_id, contexts, **{"order.lines": outcomes}))

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
                attributes = {
                    "order.id": order_id,
                    "payment.amount_cents": order.total_cents if order is not None else 0,
                }
                asked_ns = self._at("look_up")
                charge = self._tracing.start("charge", [span.get_span_context()], SpanKind.CLIENT, attributes, asked_ns)
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
        for order_id, outcomes in ours.items():
            span = self._start("commit", order_id, self._carried[order_id], **{"order.lines": outcomes})
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


def begin(tracing: Tracing, steps: Steps, batch: Batch, inner: frozenset[str]) -> BatchTrace:
    """Begin a batch of a stage.

    Args:
        tracing: of this process.
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
    return BatchTrace(tracing, steps, carried)
