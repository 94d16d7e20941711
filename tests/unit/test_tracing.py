"""What travels of a trace: read when it is one, dropped when it is not, carried with the rows of its orders alone."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags

from orderstream import logs
from orderstream.agents.lifecycle import Order, Payment
from orderstream.agents.stage import Stage
from orderstream.agents.tracing import FOLLOWED_MAX, BatchTrace, Traces
from orderstream.engines.process import free_port
from orderstream.metrics import Steps
from orderstream.settings import Settings
from orderstream.streams import tracing
from orderstream.streams.lines import LineStands
from orderstream.streams.orders import Status

SETTINGS = Settings(_env_file=None, handoff_outcomes_max=2)
CONTEXT = SpanContext(0xABC, 0xDEF, True, TraceFlags(1))
WRITTEN = b"00-00000000000000000000000000000abc-0000000000000def-01"


def test_a_context_is_written_as_it_is_read() -> None:
    assert tracing.written(CONTEXT).encode() == WRITTEN
    assert tracing.sampled(WRITTEN) == CONTEXT


@pytest.mark.parametrize(
    "value",
    [
        None, b"", b"00", WRITTEN[:-2] + b"00", WRITTEN.upper(), b"ff" + WRITTEN[2:], WRITTEN.replace(b"abc", b"000"),
        WRITTEN.replace(b"def", b"000"), WRITTEN + b"x", b" " + WRITTEN, WRITTEN.replace(b"-", b"_"),
    ],
)  # fmt: skip
def test_what_is_no_sampled_context_is_none(value: bytes | None) -> None:
    assert tracing.sampled(value) is None


def test_a_later_version_may_say_more() -> None:
    assert tracing.sampled(b"01" + WRITTEN[2:] + b"-what-may-come") == CONTEXT


@given(st.binary() | st.none())
def test_a_header_never_breaks_a_stage(value: bytes | None) -> None:
    tracing.sampled(value)
    assert tracing.of_headers([(tracing.TRACEPARENT, value)]) is None or value is not None
    assert isinstance(tracing.of_rows([(tracing.TRACES, value)]), dict)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_nor_does_any_json(value: Any) -> None:
    assert tracing.of_rows([(tracing.TRACES, json.dumps(value).encode())]) == {}


def stage_of(settings: Settings, *traced: str) -> Stage:
    """Return a stage that follows these orders; none: that traces nothing."""
    none: Any = None
    stage = Stage(settings, none, none, none, none)
    if traced:
        tracing_of_process: Any = SimpleNamespace(contexts=dict.fromkeys(traced, CONTEXT))
        stage.traces = Traces(tracing_of_process)
    return stage


def records_of(stage: Stage, rows: list[LineStands]) -> list[tuple[list[str], Any]]:
    """Return the orders of each record that carries these rows, and its headers."""
    return [
        ([row[0] for row in orjson.loads(value or b"")["rows"]], headers) for _, value, headers in stage.packed(rows)
    ]


def rows(number: int, product_id: str = "p") -> list[LineStands]:
    return [LineStands(f"o{n}", product_id, "h", 1, None) for n in range(number)]


def test_without_a_trace_nothing_is_carried() -> None:
    found = records_of(stage_of(SETTINGS), rows(5))
    assert found == [(["o0", "o1"], ()), (["o2", "o3"], ()), (["o4"], ())]


def test_each_record_carries_the_contexts_of_its_own_orders() -> None:
    found = records_of(stage_of(SETTINGS, "o1", "o4", "elsewhere"), rows(5))
    assert [orders for orders, _ in found] == [["o0", "o1"], ["o2", "o3"], ["o4"]]
    assert [tracing.of_rows(headers) for _, headers in found] == [{"o1": CONTEXT}, {}, {"o4": CONTEXT}]
    assert [len(headers) for _, headers in found] == [1, 0, 1]


def test_a_record_that_is_cut_for_its_size_carries_them_in_both_halves() -> None:
    settings = Settings(_env_file=None, handoff_outcomes_max=200)
    found = records_of(stage_of(settings, "o7"), rows(100, "p" * 4_000))
    assert len(found) == 2
    assert [tracing.of_rows(headers) for _, headers in found] == [{"o7": CONTEXT}, {"o7": CONTEXT}]


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Traces:
    """Return the traces of a worker whose collector is away."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    return Traces(tracing.Tracing("test"))


def an_order(status: Status) -> Order:
    at = datetime.now(UTC)
    return Order("o", 0, "u", "card", [("p", 1)], status, "h", created_at=at, total_cents=100)


def test_an_order_that_is_over_is_followed_no_longer(traces: Traces) -> None:
    trace = BatchTrace(traces, Steps("test"))
    trace.taken_in("o", CONTEXT, ["p: held"])
    order = an_order(Status.RESERVED)
    traces.asked(order)
    pay, charge = traces.homes["o"].pay, traces.homes["o"].charge
    assert isinstance(pay, ReadableSpan)
    assert isinstance(charge, ReadableSpan)
    traces.answered("o", "ch-1")
    order.status, order.payment, order.states = Status.CONFIRMED, Payment.SUCCESS, "c"
    trace.moved(order, Status.RESERVED, ["p: commit"])
    trace.finish()
    assert not traces.homes
    assert not traces.tracing.contexts
    assert pay.end_time is not None
    assert dict(charge.attributes or {})["payment.outcome"] == "charged"


def test_an_order_that_ends_without_an_answer_ends_its_spans(traces: Traces) -> None:
    trace = BatchTrace(traces, Steps("test"))
    trace.taken_in("o", CONTEXT, ["p: held"])
    order = an_order(Status.RESERVED)
    traces.asked(order)
    charge = traces.homes["o"].charge
    assert isinstance(charge, ReadableSpan)
    order.status, order.reason, order.payment = Status.CANCELLED, "expired", Payment.VOID_DUE
    trace.moved(order, Status.RESERVED, ["p: release"])
    assert charge.end_time is not None
    assert "o" in traces.homes, "its void is still to come"
    traces.forget()
    assert not traces.homes


def test_orders_that_are_followed_are_bounded(traces: Traces) -> None:
    trace = BatchTrace(traces, Steps("test"))
    for n in range(FOLLOWED_MAX + 10):
        trace.taken_in(f"o{n}", CONTEXT, [])
    assert len(traces.homes) == len(traces.tracing.contexts) == FOLLOWED_MAX
    assert "o9" not in traces.homes


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "True"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_environment_switches_it_on(environment: dict[str, str], on: bool) -> None:
    assert tracing.wanted(environment) is on


def test_a_line_about_an_order_names_its_trace_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    one = tracing.Tracing("test")
    span = one.start("pay", [CONTEXT], SpanKind.CONSUMER, {})
    one.contexts["an-order"] = span.get_span_context()
    root = logging.getLogger()
    before, level, stderr = root.handlers[:], root.level, io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    try:
        logs.configure(Settings(_env_file=None, log_format="json"))
        logs.name_traces(one.name_in_log)
        log = structlog.get_logger("pay")
        log.warning("no verdict", order_id="an-order", error="slow")
        log.warning("no verdict", order_id="another")
        logging.getLogger("a.library").warning("said %s", "something")
    finally:
        logs._name_trace.clear()
        root.handlers[:] = before
        root.setLevel(level)
        structlog.reset_defaults()
    ours, other, library = map(json.loads, stderr.getvalue().splitlines())
    assert (ours["event"], ours["logger"], ours["level"]) == ("no verdict", "pay", "warning")
    assert ours["trace_id"] == f"{CONTEXT.trace_id:032x}"
    assert int(ours["span_id"], 16) == span.get_span_context().span_id
    assert "trace_id" not in other
    assert library["event"] == "said something"
    assert ours["timestamp"].endswith("Z")


async def test_a_collector_that_is_away_holds_nobody_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "4")
    one = tracing.Tracing("test")
    one.start("pay", [CONTEXT], SpanKind.CONSUMER, {}).end()
    start = time.monotonic()
    await one.close()
    assert time.monotonic() - start < 2 * tracing.CLOSE_S
