"""What travels of a trace: read when it is one, dropped when it is not, carried with the rows of its orders alone."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from typing import Any

import orjson
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags

from orderstream import logs
from orderstream.agents.stage import StageOutbox
from orderstream.engines.process import free_port
from orderstream.settings import Settings
from orderstream.streams import tracing
from orderstream.streams.reservations import LineReserved
from orderstream.streams.settlements import Settlement

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


def rows_of(outbox: StageOutbox) -> list[tuple[list[str], Any]]:
    """Return what is handed over, in order: the orders of each record, and its headers."""
    return [
        ([row[0] for row in orjson.loads(value or b"")["rows"]], headers)
        for records in outbox.handovers().values()
        for _, value, headers in records
    ]


def outbox_with_rows() -> StageOutbox:
    outbox = StageOutbox(SETTINGS, "pay")
    for n in range(5):
        outbox.settlement(Settlement(f"o{n}", "p", 1, "commit"), "p")
    return outbox


def test_without_a_trace_nothing_is_carried() -> None:
    assert rows_of(outbox_with_rows()) == [(["o0", "o1"], ()), (["o2", "o3"], ()), (["o4"], ())]


def test_each_record_carries_the_contexts_of_its_own_orders() -> None:
    outbox = outbox_with_rows()
    trace: Any = type("Trace", (), {"handed": {"o1": CONTEXT, "o4": CONTEXT, "elsewhere": CONTEXT}})()
    outbox.trace = trace
    records = rows_of(outbox)
    assert [orders for orders, _ in records] == [["o0", "o1"], ["o2", "o3"], ["o4"]]
    assert [tracing.of_rows(headers) for _, headers in records] == [{"o1": CONTEXT}, {}, {"o4": CONTEXT}]
    assert [len(headers) for _, headers in records] == [1, 0, 1]


def test_a_record_that_is_cut_for_its_size_carries_them_in_both_halves() -> None:
    outbox = StageOutbox(Settings(_env_file=None, handoff_outcomes_max=200), "reserve")
    trace: Any = type("Trace", (), {"handed": {"o7": CONTEXT}})()
    outbox.trace = trace
    for n in range(100):
        outbox.reservation(
            LineReserved(
                order_id=f"o{n}",
                product_id="p",
                quantity=1,
                unit_price_cents=1,
                reason=None,
                line_count=1,
                user_id="u" * 4_000,
                payment_method="card",
                reply_to=None,
                again=False,
            ),
            "one-owner",
        )
    records = rows_of(outbox)
    assert len(records) == 2
    assert [tracing.of_rows(headers) for _, headers in records] == [{"o7": CONTEXT}, {"o7": CONTEXT}]


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
    one.pending["an-order"] = tracing.Pending(span, None)
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
