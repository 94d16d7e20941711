"""The benchmarks' own arithmetic: what is ordered, what several runs say, what a run costs, when one is no result."""

from __future__ import annotations

import io
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from orderstream.bench import machine, report, scenarios
from orderstream.bench.load import STEP_ORDERS_MAX, Load, Produced, catalogue, draw, steps
from orderstream.bench.measure import Run, broken, missed, rates, summarize
from orderstream.bench.pipeline import Bench
from orderstream.bench.profiler import own_times
from orderstream.bench.run import main
from orderstream.bench.stages import Stage, between, counted
from orderstream.bench.usage import Snapshot, Usage, cpu_s, memory_bytes
from orderstream.errors import OrderstreamError
from orderstream.settings import Settings
from orderstream.streams.orders import Limits, decode
from orderstream.streams.partitions import product_partition

SPREAD = Load(catalogue(100), 1, 5)


def run(figures: Mapping[str, float], *faults: str, orders: int = 1_000) -> Run:
    usage = Usage(1.0, dict.fromkeys(report.COSTS, 0.5), 0.1, 0.0)
    memory = {"worker_rss_bytes": 100 * 2**20, "worker_rss_max_bytes": 120 * 2**20}
    return Run(figures, faults, usage, {"orders": orders, "worker_main_thread_s": 0.4, **memory})


# Orders


def test_the_same_seed_draws_the_same_records() -> None:
    assert list(draw(SPREAD, 500, "a", at=7.0)) == list(draw(SPREAD, 500, "a", at=7.0))
    assert list(draw(SPREAD, 500, "a", at=7.0)) != list(draw(SPREAD, 500, "b", at=7.0))


def test_ids_grow_with_time() -> None:
    ids = [orjson.loads(one.value)["order_id"] for one in draw(SPREAD, 500, "a")]
    ids += [orjson.loads(one.value)["order_id"] for one in draw(SPREAD, 500, "b", at=time.time() + 1)]
    moments = [order_id[:13] for order_id in ids]
    assert moments == sorted(moments)
    assert moments[0] != moments[499]
    assert moments[499] < moments[500]


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    assert list(draw(SPREAD, 200, "a", at=7.0))[:50] == list(draw(SPREAD, 50, "a", at=7.0))


def test_drawn_orders_are_sound_and_each_is_one() -> None:
    ids = set()
    for drawn in draw(SPREAD, 1_000, "a"):
        order = decode(drawn.value, Limits(5, 1, 1_000), topic="orders", partition=0, offset=0, timestamp=0)
        assert order.lines[0][0] == drawn.product_id
        assert len(order.lines) == drawn.lines  # different products: nothing was merged
        assert uuid.UUID(order.order_id).version == 7
        ids.add(order.order_id)
    assert len(ids) == 1_000


def test_every_number_of_lines_and_every_product_is_drawn() -> None:
    drawn = list(draw(SPREAD, 5_000, "a"))
    assert set(Counter(order.lines for order in drawn)) == {1, 2, 3, 4, 5}
    assert {order.product_id for order in drawn} == set(SPREAD.products)
    assert {order.product_id for order in draw(Load(("hot",)), 100, "a")} == {"hot"}


@pytest.mark.parametrize("bounds", [(0, 1), (2, 1), (1, 101)])
def test_a_load_that_can_not_be_drawn_is_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="lines of 100 products"):
        Load(catalogue(100), *bounds)


def test_steps_hold_every_order_once_in_its_products_partition() -> None:
    settings = Settings(_env_file=None, topic_prefix="x.")
    count = 2 * STEP_ORDERS_MAX + 1
    drawn = list(draw(SPREAD, count, "a"))
    packed = steps(settings, drawn)
    assert [sum(len(records) for records in step.values()) for step in packed] == [STEP_ORDERS_MAX, STEP_ORDERS_MAX, 1]
    found = []
    for step in packed:
        for (topic, partition), records in step.items():
            assert topic == "x.orders"
            for key, value, headers in records:
                assert key is not None
                assert product_partition(key.decode(), settings.partitions) == partition
                assert not headers
                found.append(value)
    assert sorted(filter(None, found)) == sorted(order.value for order in drawn)
    assert steps(settings, []) == []


# Statistics


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3.0, 3.0, 3.0, 1)), ([5.0, 1.0, 3.0], (1.0, 3.0, 5.0, 3)), ([1.0, 2.0, 3.0, 10.0], (1.0, 2.5, 10.0, 4))],
)
def test_runs_are_summarized_by_least_middle_and_greatest(values: list[float], expected: tuple[float, ...]) -> None:
    assert summarize(values) == expected


def test_no_run_has_no_summary() -> None:
    with pytest.raises(ValueError, match="no run"):
        summarize([])


def test_rates_count_from_the_first_record_to_the_last_verdict() -> None:
    times = {"last": 110.0, "p10": 101.0, "p90": 109.0, "between": 1_600, "batches": 10}
    assert rates(times, Produced(100.0, 102.0), orders=2_000, lines=6_000) == {
        "orders_per_s": 200.0,
        "lines_per_s": 600.0,
        "last_verdict_s": 10.0,
        "steady_orders_per_s": 200.0,
    }


def test_orders_that_ended_in_a_few_batches_have_no_steady_rate() -> None:
    times = {"last": 101.0, "p10": 100.9, "p90": 101.0, "between": 80, "batches": 2}
    assert "steady_orders_per_s" not in rates(times, Produced(100.0, 100.5), orders=100, lines=100)


# When a run is no result


def test_a_lost_order_and_a_wrong_end_are_faults() -> None:
    assert missed({"CONFIRMED": 10}, {"CONFIRMED": 10}) == []
    assert missed({"CONFIRMED": 10}, {"CONFIRMED": 9}) == ["CONFIRMED: 9 orders instead of 10"]
    assert missed({"CONFIRMED": 10}, {"CONFIRMED": 10, "PAID": 1}) == ["PAID: 1 orders instead of 0"]


def test_a_broken_promise_is_a_fault() -> None:
    assert broken([("nothing is negative", [])]) == []
    (fault,) = broken([("stock adds up", [("p1", "1"), ("p2", "2"), ("p3", "3"), ("p4", "4")])])
    assert fault.startswith("stock adds up: 4 offenders")
    assert "p3" in fault
    assert "p4" not in fault


def test_a_run_with_a_fault_is_in_no_figure() -> None:
    scenario = scenarios.SCENARIOS["throughput"]
    good, bad = run({"orders_per_s": 5_432.1}), run({"orders_per_s": 99_999.0}, "CONFIRMED: 1 orders instead of 2")
    assert report.summaries(scenario, [good, bad])["orders_per_s"] == (5_432.1, 5_432.1, 5_432.1, 1)
    assert report.lines(scenario, [good, bad]) == [
        "throughput over 100 products: 5432 orders/s (median of 1)",
        "throughput: 1 of 2 runs gave NO RESULT",
    ]
    assert report.lines(scenario, [bad]) == ["throughput: 1 of 1 runs gave NO RESULT"]


class Engines:
    """Stands for the bench's engines: runs end as given."""

    def __init__(self, *runs: Run) -> None:
        self.runs = list(runs)

    def measure(self, bench: Any, orders: int, seed: str) -> Run:
        return self.runs.pop(0)


@pytest.mark.parametrize(("faults", "code"), [((), 0), (("nothing is negative: 1 offenders, p1",), 1)])
def test_the_exit_code_says_whether_every_promise_held(
    faults: tuple[str, ...],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextmanager
    def bench(*_: Any) -> Iterator[Any]:
        nothing: Any = None
        yield Bench(nothing, nothing, tmp_path, print)

    warm_up = run({"orders_per_s": 1.0})  # not counted
    engines = Engines(warm_up, run({"orders_per_s": 10.0, "last_verdict_s": 2.0}), run({"orders_per_s": 30.0}, *faults))
    scenario = scenarios.Scenario("one", "about", engines.measure, (scenarios.Figure("orders_per_s", "one: {} /s"),))
    monkeypatch.setattr("orderstream.bench.run.bench", bench)
    monkeypatch.setattr("orderstream.bench.run.chosen", lambda _: [scenario])
    for name in ("versions", "settings_shown", "durability"):
        monkeypatch.setattr(machine, name, lambda _: {})
    assert main("one", orders=1_000, runs=2, out=tmp_path / "new") == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("one: 1 of 2 runs gave NO RESULT" if code else "one: 20 /s (median of 2)")
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [one["faults"] for one in results["scenarios"]["one"]["runs"]] == [[], [*faults]]
    assert results["scenarios"]["one"]["figures"]["orders_per_s"]["median"] == (10.0 if code else 20.0)


# Scenarios


def test_scenarios_are_found_by_name() -> None:
    assert list(scenarios.SCENARIOS)[:4] == ["throughput", "hot", "lines", "flash-sale"]
    assert all(name == scenario.name and scenario.figures for name, scenario in scenarios.SCENARIOS.items())
    assert scenarios.chosen("hot") == [scenarios.SCENARIOS["hot"]]
    assert scenarios.chosen("all") == list(scenarios.SCENARIOS.values())


def test_an_unknown_scenario_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(OrderstreamError, match=r"throughput, hot, lines, flash-sale.* or all"):
        main("nothing")


@pytest.mark.parametrize("given", [{"orders": 0}, {"runs": 0}])
def test_nothing_can_not_be_measured(given: dict[str, int]) -> None:
    with pytest.raises(OrderstreamError, match="at least"):
        main("throughput", **given)  # type: ignore[arg-type]


def test_figures_are_shown_in_lines_for_grep() -> None:
    runs = [run({"orders_per_s": n, "last_verdict_s": 1.0, "steady_orders_per_s": n}) for n in (1.0, 5_431.7, 9_999.0)]
    sentences = {
        name: report.lines(scenarios.SCENARIOS[name], runs)[-1] for name in ("throughput", "hot", "flash-sale")
    }
    assert sentences["throughput"] == "throughput over 100 products: 5432 orders/s (median of 3)"
    assert sentences["hot"] == "throughput over 1 hot product: 5432 orders/s (median of 3)"
    assert sentences["flash-sale"] == "flash-sale of 1000 units: 5432 decisions/s (median of 3)"


def test_tables_show_figures_and_costs() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    scenario = scenarios.SCENARIOS["hot"]
    report.tables(console, [scenario], {"hot": [run({"orders_per_s": 1_234.0})]})
    text = console.export_text()
    assert "1,234" in text
    assert "5.00" in text  # 0.5 CPU s for 1,000 orders
    report.tables(console, [scenario], {"hot": [run({}, "lost")]})
    assert "hot" not in console.export_text()


# Costs


def test_cpu_seconds_of_a_process_grow_with_its_work() -> None:
    before, deadline = Snapshot.take({"worker": os.getpid(), "kafka": None}), time.process_time() + 0.2
    while time.process_time() < deadline:
        pass
    usage = Usage.between(before, Snapshot.take({"worker": os.getpid(), "kafka": None}))
    assert usage.cpu_s["worker"] > 0
    assert usage.cpu_s["kafka"] == 0
    assert usage.others_s >= 0


def test_a_process_that_has_ended_costs_nothing() -> None:
    assert cpu_s(2**22 + 1) == 0
    assert memory_bytes(2**22 + 1) == (0, 0)


def test_memory_is_now_and_at_most() -> None:
    now, peak = memory_bytes(os.getpid())
    assert 10 * 2**20 < now <= peak


def test_a_stage_is_as_busy_as_its_batches_took() -> None:
    def exposition(batches: int, records: int, seconds: float) -> str:
        return (
            "# TYPE batch_records histogram\n"
            f'batch_records_bucket{{le="+Inf",stage="pay"}} {batches}.0\n'
            f'batch_records_count{{stage="pay"}} {batches}.0\nbatch_records_sum{{stage="pay"}} {records}.0\n'
            f'# TYPE batch_latency_seconds histogram\nbatch_latency_seconds_sum{{stage="pay"}} {seconds}\n'
            "# TYPE stage_step_seconds histogram\n"
            f'stage_step_seconds_sum{{stage="pay",step="ask"}} {seconds / 2}\n'
        )

    found = between(counted(exposition(2, 100, 1.0)), counted(exposition(12, 5_100, 3.0)), seconds=4.0)
    assert found == {"pay": Stage(10, 500.0, 0.2, 0.5, {"ask": 0.1})}  # the others had no batch


def test_the_machine_and_the_settings_are_named() -> None:
    found = machine.machine()
    assert found["cpu"]
    assert found["cores"]
    plain = Settings(_env_file=None)
    assert list(machine.settings_shown(plain)) == list(machine.SETTINGS)
    changed = plain.model_copy(update={"order_lines_max": 7, "topic_prefix": "x", "payment_token": "secret"})
    assert set(machine.settings_shown(changed)) - set(machine.SETTINGS) == {"order_lines_max"}


def test_own_time_belongs_to_the_function_on_top() -> None:
    raw = "thread (1): A;f (a.py);g (b.py) 30\nthread (1): A;f (a.py) 10\nthread (2): B;h (c.py) 5\n"
    found = own_times(raw, 10)
    assert list(found) == ["thread (1): A", "thread (2): B"]
    assert found["thread (1): A"] == [("g (b.py)", 3.0, 0.75, 0.75), ("f (a.py)", 1.0, 0.25, 1.0)]
