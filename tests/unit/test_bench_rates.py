"""What an order costs at each rate: which cells are measured, and what their figures are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orderstream.bench import rates, report, scenarios
from orderstream.bench.measure import Run
from orderstream.bench.usage import Usage
from orderstream.errors import OrderstreamError

LATENCIES = {
    f"kafka_500_{status}_p{percent}_ms": float(percent)
    for status in ("reserved", "confirmed")
    for percent in (50, 95, 99)
}
COSTS = {"worker": 0.5, "kafka": 0.3, "postgres": 0.1, "redis": 0.04, "bench": 9.0, "ingress": 0.0}


def run(**figures: float) -> Run:
    return Run(figures, (), Usage(20.0, COSTS, 0.0, 0.0), {"orders": 1_000})


def test_what_an_order_costs_is_told_by_process_and_the_bench_is_left_out() -> None:
    found = rates.figures("500x48", run(**LATENCIES))
    told = report.lines(scenarios.SCENARIOS["rates"], [replace(run(), figures=found)])
    assert told == [
        "latency at 500 orders/s, 48 partitions -> RESERVED: p50 50.0 ms, p95 95.0 ms, p99 99.0 ms (median of 1)",
        "latency at 500 orders/s, 48 partitions -> CONFIRMED: p50 50.0 ms, p95 95.0 ms, p99 99.0 ms (median of 1)",
        "CPU time an order at 500 orders/s, 48 partitions: 940 µs, worker 500, kafka 300, postgres 100, redis 40"
        " (median of 1)",
    ]
    assert rates.figures("500x48", run()) == {}  # it lost its orders


def test_some_cells_can_be_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def paced(bench: Any, way: str, rate: int, orders: int, seed: str, *, partitions: int = 8) -> Run:
        asked.append((rate, partitions))
        return run(**{name.replace("500", str(rate)): value for name, value in LATENCIES.items()})

    monkeypatch.setattr(rates, "paced", paced)
    monkeypatch.setattr(rates, "warmed_up", lambda *_: run())
    (scenario,) = scenarios.chosen("rates:500x*")
    measured = scenario.measure(None, 1_000, "rates/1")
    assert asked == [(500, 1), (500, 8), (500, 48)]
    assert {name.partition("_")[0] for name in measured.figures} == {"500x1", "500x8", "500x48"}
    asked.clear()
    scenarios.SCENARIOS["rates"].measure(None, 1_000, "rates/1")
    assert asked == [*rates.CELLS.values()]


@pytest.mark.parametrize("name", ["rates:7x7", "hot:1"])
def test_a_part_that_there_is_not_is_answered_with_those_that_there_are(name: str) -> None:
    with pytest.raises(OrderstreamError, match=r"has no part .*: choose (10x1, 10x8, .*1000x48|all of it)"):
        scenarios.chosen(name)
