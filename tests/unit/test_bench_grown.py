"""A grown store: how large it is, and which of its products are ordered."""

from __future__ import annotations

from orderstream.bench import grown
from orderstream.bench.load import catalogue
from orderstream.bench.scenarios import PRODUCTS


def test_a_whole_run_has_the_whole_history_and_a_short_one_less() -> None:
    assert grown.Size.of(50_000) == (1_000_000, 100_000)
    assert grown.Size.of(500_000) == (1_000_000, 100_000)
    assert grown.Size.of(1_000) == (20_000, 2_000)
    assert grown.Size.of(100).products >= PRODUCTS  # there is always enough to draw from


def test_few_products_are_drawn_from_all_over_the_catalogue() -> None:
    whole = catalogue(100_000)
    drawn = grown.few(whole, 100, "a")
    assert len(set(drawn)) == 100
    assert set(drawn) <= set(whole)
    assert drawn == grown.few(whole, 100, "a") != grown.few(whole, 100, "b")
    assert drawn[0] < "p10000" < "p90000" < drawn[-1]


def test_units_last_for_the_history_and_for_every_load() -> None:
    assert (
        grown.units(1_000, 2, 25, 10) == 2_003
    )  # at worst all orders are of one product; the history is dealt out evenly
    assert grown.units(1_000, 1, 0, 10) == 1_000
