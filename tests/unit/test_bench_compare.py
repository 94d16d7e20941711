"""What the benchmarks compare with: jobs of a peer, open loops and their percentiles, charts, ratios of one run."""

from __future__ import annotations

import asyncio
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from orderstream.bench import compare, report, scenarios
from orderstream.bench.chart import Bar, svg
from orderstream.bench.load import Load, catalogue, draw
from orderstream.bench.measure import Run, Summary, together
from orderstream.bench.open_loop import RATES, STATUSES, WAYS, Round, figure_name, pace_out, percentile
from orderstream.bench.peers.service import Job, drawn, probe, sell
from orderstream.bench.pipeline import Bench
from orderstream.bench.usage import Usage
from orderstream.jobs.cli.processes import bench as bench_command
from orderstream.settings import Settings
from orderstream.streams.orders import Order, Status

PLAIN = Settings(_env_file=None)
LOAD = Load(catalogue(3), 1, 2)


def run(*faults: str, **figures: float) -> Run:
    return Run(figures, faults, Usage(1.0, {"worker": 0.5}, 0.1, 0.0), {"orders": 10})


# Peers


class Shop:
    """A peer that sells at once, and notes how many orders it had in its hands."""

    tried: Sequence[int] = (1, 3)
    probe_orders = 20

    def __init__(self) -> None:
        self.sold: list[str] = []
        self.in_hand = self.most = 0

    async def start(self, settings: Settings) -> None: ...

    async def sell(self, order: Order) -> None:
        self.in_hand += 1
        self.most = max(self.most, self.in_hand)
        await asyncio.sleep(0)
        self.in_hand -= 1
        self.sold.append(order.order_id)

    async def close(self) -> None: ...


def test_a_job_is_read_as_it_was_told() -> None:
    job = Job(LOAD, 5, "a/1")
    assert Job.decode(job.encode()) == job


def test_a_peer_gets_the_orders_that_the_topic_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orderstream.bench.load.time.time", lambda: 7.0)  # ids have the time at which they are drawn
    ids = [orjson.loads(one.value)["order_id"] for one in draw(LOAD, 50, "a")]
    assert [order.order_id for order in drawn(PLAIN, LOAD, 50, "a")] == ids


async def test_every_order_is_sold_once_and_so_many_at_once() -> None:
    shop = Shop()
    orders = drawn(PLAIN, LOAD, 50, "a")
    start, end = await sell(shop, orders, 7)
    assert sorted(shop.sold) == sorted(order.order_id for order in orders)
    assert shop.most == 7
    assert start <= end


async def test_a_fault_of_a_peer_is_not_swallowed() -> None:
    class Broken(Shop):
        async def sell(self, order: Order) -> None:
            raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        await sell(Broken(), drawn(PLAIN, LOAD, 5, "a"), 2)


async def test_a_probe_tries_every_setting_with_orders_of_its_own() -> None:
    shop = Shop()
    rates = await probe(shop, PLAIN, Job(LOAD, 5, "a"))
    assert list(rates) == [1, 3]
    assert len(set(shop.sold)) == 60  # the first one twice


def test_stock_lasts_for_every_warm_up() -> None:
    from orderstream.bench.peers.dbos import Workflows
    from orderstream.bench.peers.rowlock import RowLock

    for peer in (RowLock(), Workflows()):
        assert (len(peer.tried) + 1) * peer.probe_orders < compare.SPARE_UNITS


# Runs of several parts


def test_a_fault_of_a_part_is_one_of_the_whole() -> None:
    whole = together({"a": run(x=1.0), "b": run("lost", x=2.0)}, {"ratio": 0.5})
    assert whole.faults == ["b: lost"]
    assert whole.usage.seconds == 2.0
    assert whole.usage.cpu_s == {"worker": 1.0}


def test_ratios_are_those_of_one_run() -> None:
    scenario = scenarios.SCENARIOS["peers"]
    runs = []
    for rate, peer in ((1_000.0, 100.0), (500.0, 20.0), (3_000.0, 128.2)):
        parts = {"pipeline": run(orders_per_s=rate), "row_locks": run(orders_per_s=peer)}
        runs.append(scenarios._compared(parts, {"vs_row_locks": ("pipeline", "row_locks")}))
    assert [round(one.figures["vs_row_locks"], 1) for one in runs] == [10.0, 25.0, 23.4]
    assert report.lines(scenario, runs)[-1] == "throughput vs row locks: 23.4 x"
    assert list(scenarios.SCENARIOS)[-1] == "peers"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Run]:
    """Return what measures the peers: the pipeline sells 1,130 orders/s, every peer 1,000, with exactly_once_v2 500."""

    def streams_run(_: Bench, guarantee: str, *__: object) -> Run:
        return run(orders_per_s=1_000.0 if guarantee == "at_least_once" else 500.0)

    monkeypatch.setattr(scenarios, "pipeline_run", lambda *_, **__: run(orders_per_s=1_130.0))
    monkeypatch.setattr(scenarios, "peer_run", lambda *_: run(orders_per_s=1_000.0))
    monkeypatch.setattr(scenarios, "streams_run", streams_run)
    monkeypatch.setattr(scenarios, "workflows_installed", lambda: True)
    monkeypatch.setattr(scenarios, "missing", lambda _: [])
    nothing: Any = None
    return lambda: scenarios.SCENARIOS["peers"].measure(Bench(nothing, nothing, Path(), print), 100, "peers/1")


def test_the_last_line_is_the_one_against_kafka_streams_that_stores_at_least_once(peers: Callable[[], Run]) -> None:
    measured = peers()
    assert measured.notes == []
    lines = report.lines(scenarios.SCENARIOS["peers"], [measured])
    assert lines[-2:] == [
        "throughput vs kafka streams, exactly_once_v2: 2.26 x",
        "throughput vs kafka streams: 1.13 x",
    ]
    assert "kafka streams over 100 products, at_least_once, orders stored: 1000 orders/s (median of 1)" in lines
    assert "throughput vs row locks: 1.1 x" in lines


def test_a_missing_library_is_one_clear_line(peers: Callable[[], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "workflows_installed", lambda: False)
    measured = peers()
    assert "vs_workflows" not in measured.figures
    assert measured.figures["vs_kafka_streams"] == 1.13
    (note,) = measured.notes
    assert "requirements-bench.lock" in note
    assert note in report.run_line(scenarios.SCENARIOS["peers"], 1, measured)


def test_without_maven_there_is_no_kafka_streams_and_one_clear_line(
    peers: Callable[[], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenarios, "missing", lambda _: ["maven"])
    told = peers()
    assert [name for name in told.parts if name.startswith("kafka")] == []
    assert report.lines(scenarios.SCENARIOS["peers"], [told])[-1] == "throughput vs row locks: 1.1 x"
    (note,) = told.notes
    assert note.endswith("apt-get install maven")


def test_every_other_run_goes_backwards() -> None:
    order: list[str] = []

    def measure(name: str) -> Run:
        order.append(name)
        return run()

    measures = {name: (lambda name=name: measure(name)) for name in "ab"}
    for number in (1, 2):
        assert list(scenarios._in_turn(f"x/{number}", measures)) == ["a", "b"]
    assert order == ["a", "b", "b", "a"]


def test_neighbours_that_take_the_cores_are_told() -> None:
    quiet = Run({}, [], Usage(10.0, {}, 1.0, 0.0))
    loud = Run({}, [], Usage(10.0, {}, 4.0, 1.0))
    assert report.disturbed([quiet], cores=2) is None
    note = report.disturbed([quiet, together({"a": quiet, "b": loud}, {})], cores=2)
    assert note is not None
    assert "1 of 2 runs" in note
    assert "25%" in note


# Open loops


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (95, 95), (99, 99), (99.9, 100), (0, 1)])
def test_percentiles_are_nearest_ranks(percent: float, expected: float) -> None:
    assert percentile(list(range(1, 101)), percent) == expected


def test_the_percentiles_of_one_and_of_none() -> None:
    assert percentile([7.0], 99) == 7.0
    with pytest.raises(ValueError, match="no order"):
        percentile([], 50)


def a_round(count: int = 100, rate: int = 1_000) -> Round:
    return Round.of(rate, list(draw(LOAD, count, "a")))


def test_latency_counts_from_the_scheduled_time() -> None:
    loop = a_round()
    loop.start = 1_000.0
    for order_id, n in loop.ids.items():
        # Everything stood still: all ends at once, and each order has waited since its own time.
        loop.saw(order_id, Status.CONFIRMED, 1_000.0 + 0.1)
        loop.saw(order_id, Status.CONFIRMED, 2_000.0)  # an event that comes again changes nothing
        loop.saw(order_id, Status.PAID, 1_000.0)
        assert loop.scheduled(n) == 1_000.0 + n / 1_000
    loop.saw("another client's", Status.CONFIRMED, 0.0)
    assert loop.done
    figures = loop.figures("kafka")
    assert set(figures) == {figure_name("kafka", 1_000, Status.CONFIRMED, p) for p in (50, 95, 99)}
    assert figures["kafka_1000_confirmed_p99_ms"] == pytest.approx(90.0)  # of the orders after the first tenth
    assert figures["kafka_1000_confirmed_p50_ms"] == pytest.approx(45.0, abs=1.0)


async def test_an_open_loop_sends_each_order_and_waits_for_none() -> None:
    loop = a_round(50, 10_000)
    answer = asyncio.Event()
    sent: list[int] = []
    all_sent = asyncio.Event()

    async def send(n: int) -> None:
        sent.append(n)
        if len(sent) == 50:
            all_sent.set()
        await answer.wait()  # a pipeline that does not move

    pacing = asyncio.create_task(pace_out(loop, send))
    async with asyncio.timeout(10):
        await all_sent.wait()
    assert sent == list(range(50))
    assert not pacing.done()
    answer.set()
    await pacing


def test_what_the_ingress_refused_is_not_waited_for() -> None:
    loop = a_round(10)
    loop.answers.update({201: 7, 202: 1, 503: 2})
    assert loop.refused == 2
    for order_id in list(loop.ids)[:8]:
        loop.saw(order_id, Status.CONFIRMED, 1.0)
    assert loop.done


def test_latencies_are_told_in_one_sentence_each() -> None:
    scenario = scenarios.SCENARIOS["latency"]
    names = [name for figure in scenario.figures for name in (figure.name, *figure.more)]
    assert len(names) == len(set(names)) == len(WAYS) * len(RATES) * len(STATUSES) * 3
    lines = report.lines(scenario, [run(**{name: float(n) for n, name in enumerate(names)})])
    assert lines[0] == "latency at 500 orders/s, produce -> RESERVED: p50 0.0 ms, p95 1.0 ms, p99 2.0 ms (median of 1)"
    assert {name for _, name in scenario.bars} <= set(names)


# Charts


def test_a_chart_is_sound_and_its_bars_begin_at_zero() -> None:
    bars = [Bar("a <b>", Summary(80.0, 100.0, 200.0, 3)), Bar("c", Summary(50.0, 50.0, 50.0, 3))]
    drawn_chart = svg("peers & more", "orders/s", bars, ["a machine"])
    root = ET.fromstring(drawn_chart)
    assert {element.text for element in root.iter() if element.text} >= {
        "a <b>",
        "c",
        "peers & more",
        "a machine",
        "100",
    }
    widths = [float(width) for width in re.findall(r'class="bar" .*?width="([0-9.]+)"', drawn_chart)]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    assert svg("peers & more", "orders/s", bars, ["a machine"]) == drawn_chart


def test_a_chart_is_written_where_there_is_something_to_draw(tmp_path: Path) -> None:
    scenario = scenarios.SCENARIOS["hot"]
    assert report.write_chart(tmp_path, {}, scenario, [run("lost", orders_per_s=1.0)]) is None
    file = report.write_chart(tmp_path, {"machine": {"cpu": "x", "cores": 2}}, scenario, [run(orders_per_s=1.0)])
    assert file == tmp_path / "hot.svg"
    ET.parse(file)


def test_every_bar_is_a_figure_that_is_told() -> None:
    for scenario in scenarios.SCENARIOS.values():
        names = {name for figure in scenario.figures for name in (figure.name, *figure.more)}
        assert {name for _, name in scenario.bars} <= names


def test_the_help_names_every_scenario() -> None:
    named = set(re.findall(r"^        ([a-z-]+)  ", bench_command.__doc__ or "", re.MULTILINE))
    assert named == set(scenarios.SCENARIOS)
