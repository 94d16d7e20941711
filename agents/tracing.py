"""Spans of the orders of one worker that carry a sampled trace context.

``reserve`` is the batch in which lines were decided, at home or at another owner; ``pay`` lasts from the hand-over to the
decision, with ``charge`` within; ``commit`` is a transaction that moved the order or its lines.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.trace import Span, SpanContext, SpanKind

from orderstream.agents.lifecycle import Order, is_over
from orderstream.metrics import Steps
from orderstream.streams.orders import Status
from orderstream.streams.tracing import Tracing, of_rows

FOLLOWED_MAX = 10_000
"""Sampled orders that one worker has to do with; beyond that the oldest one's spans end early."""


@dataclass(slots=True)
class Home:
    """What an order's home keeps of its trace.

    Attributes:
        heard: the spans of other owners who have decided its lines.
        pay: while its charge is asked for, and the answer is not written.
        charge: while the provider has not answered.
    """

    heard: list[SpanContext] = field(default_factory=list)
    pay: Span | None = None
    charge: Span | None = None

    def hear(self, context: SpanContext) -> None:
        """Note the span of an owner; one of several lines is noted once."""
        if context not in self.heard:
            self.heard.append(context)

    def end(self) -> None:
        """End the spans that are open."""
        for span in (self.charge, self.pay):
            if span is not None:
                span.end()


class Traces:
    """The traces of one worker.  What comes next of an order stands under its context in ``tracing.contexts``."""

    def __init__(self, tracing: Tracing) -> None:
        self.tracing = tracing
        self.homes: dict[str, Home] = {}

    def follow(self, order_id: str, context: SpanContext) -> None:
        """Have what comes next of an order stand under this span."""
        contexts = self.tracing.contexts
        contexts[order_id] = context
        if len(contexts) > FOLLOWED_MAX:
            self.let_go(next(iter(contexts)))

    def let_go(self, order_id: str) -> None:
        """Follow an order no longer."""
        self.tracing.contexts.pop(order_id, None)
        if (home := self.homes.pop(order_id, None)) is not None:
            home.end()

    def forget(self) -> None:
        """Follow no order any longer; spans that are open are not exported."""
        self.tracing.contexts.clear()
        self.homes.clear()

    def hear(self, headers: Sequence[tuple[str, bytes | None]]) -> None:
        """Take in the contexts of a record of an inner topic: of verdicts for homes, or of lines for their owners."""
        for order_id, context in of_rows(headers).items():
            if (home := self.homes.get(order_id)) is not None:
                home.hear(context)
            else:
                self.follow(order_id, context)

    def asked(self, order: Order) -> None:
        """Note that an order's charge is asked for."""
        home = self.homes.get(order.order_id)
        if home is None or home.charge is not None:
            return
        attributes = {"order.id": order.order_id}
        if home.pay is None:
            contexts = [self.tracing.contexts[order.order_id], *home.heard]
            home.pay = self.tracing.start("pay", contexts, SpanKind.CONSUMER, attributes)
            self.follow(order.order_id, home.pay.get_span_context())
        more = {"payment.amount_cents": order.total_cents or 0}
        home.charge = self.tracing.start(
            "charge", [home.pay.get_span_context()], SpanKind.CLIENT, {**attributes, **more}
        )

    def answered(self, order_id: str, charge_id: str | None) -> None:
        """Note what the provider said about an order's charge."""
        home = self.homes.get(order_id)
        if home is not None and home.charge is not None:
            home.charge.set_attribute("payment.outcome", "declined" if charge_id is None else "charged")
            home.charge.end()
            home.charge = None


class BatchTrace:
    """The spans of one batch of a stage; its steps are their events."""

    def __init__(self, traces: Traces, steps: Steps) -> None:
        self._traces = traces
        self._begun_ns = time.time_ns()
        self._marks: list[tuple[str, int]] = []
        steps.marks = self._marks
        self._ending: list[Span] = []

    def _start(self, name: str, order_id: str, context: SpanContext, attributes: Mapping[str, Any]) -> Span:
        given = {"order.id": order_id, **attributes}
        span = self._traces.tracing.start(name, [context], SpanKind.CONSUMER, given, self._begun_ns)
        self._ending.append(span)
        return span

    def taken_in(self, order_id: str, context: SpanContext, outcomes: Sequence[str]) -> None:
        """Trace an order that its home has taken in, or knows already, under the context of its record."""
        span = self._start("reserve", order_id, context, {"order.lines": outcomes})
        self._traces.homes[order_id] = Home()
        self._traces.follow(order_id, span.get_span_context())

    def moved(self, order: Order, was: Status, outcomes: Sequence[str]) -> None:
        """Trace an order of this home that a transaction has moved from the status ``was``."""
        home = self._traces.homes.get(order.order_id)
        if home is None or order.status is Status.RESERVED or not (order.status is not was or outcomes):
            return
        span = self._start(
            "commit", order.order_id, self._traces.tracing.contexts[order.order_id], {"order.lines": outcomes}
        )
        if order.status is not was:
            span.set_attribute("order.status", str(order.status))
            span.add_event(str(order.status))
        if home.pay is not None:
            home.pay.set_attribute("order.status", str(order.status))
            home.end()
            home.pay = home.charge = None
        if is_over(order):
            self._traces.let_go(order.order_id)

    def lines(self, order_id: str, name: str, outcomes: Sequence[str]) -> None:
        """Trace lines of another home's order that a transaction has decided (``reserve``) or settled (``commit``)."""
        context = self._traces.tracing.contexts.get(order_id)
        if context is None:
            return
        decided = self._start(name, order_id, context, {"order.lines": outcomes}).get_span_context()
        if (home := self._traces.homes.get(order_id)) is not None:
            home.hear(decided)
        else:
            self._traces.follow(order_id, decided)

    def finish(self) -> None:
        """End the spans of the batch: everything is handed over."""
        for span in self._ending:
            for step, at in self._marks:
                span.add_event(step, timestamp=at)
            span.end()
        self._ending = []
