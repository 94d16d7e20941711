"""What a long run shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from orderstream.bench import scenarios, soak


def test_fifths_are_all_orders() -> None:
    assert soak.fifths(1_000_000) == [200_000] * 5
    assert soak.fifths(103) == [21, 21, 21, 20, 20]


def test_growth_is_from_the_first_look_to_the_last() -> None:
    readings = [{name: float(n) for name in soak.READINGS} for n in (100, 101, 102, 103, 130)]
    found = soak.figures([10.0, 9.0, 9.0, 9.0, 8.0], readings)
    assert found["rss_growth"] == pytest.approx(1.3)
    assert found["last_of_first"] == pytest.approx(0.8)
    assert (found["kafka_mib_fifth"], found["kafka_mib_whole"]) == (100.0, 130.0)
    scenario = scenarios.SCENARIOS["soak"]
    assert {name for figure in scenario.figures for name in (figure.name, *figure.more)} == set(found)
    assert scenario.figures[-1].name == "rss_growth"


def test_logs_of_other_pipelines_and_indexes_do_not_count(tmp_path: Path) -> None:
    for name, size in (("a.orders-0/00.log", 3), ("a-stock-changelog-1/00.log", 4), ("a.orders-0/00.index", 50)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "b.orders-0").mkdir()
    (tmp_path / "b.orders-0" / "00.log").write_bytes(b"x" * 9)
    assert soak.log_bytes(tmp_path, "a") == 7
