"""The quick configurations of the protocol's model: each ends as it says, what must break included."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.model.__main__ import CONFIGURATIONS, Configuration, check, configurations

TESTS = Path(__file__).resolve().parents[1]

QUICK = [one for one in configurations() if one.quick]


@pytest.mark.parametrize("configuration", QUICK, ids=[one.name for one in QUICK])
def test_a_configuration_ends_as_it_says(configuration: Configuration) -> None:
    result = check(configuration)
    assert configuration.is_met(result), (configuration.about, result.broken, result.trace)


def test_every_rule_is_taken_out_somewhere() -> None:
    every = list(configurations())
    rules = {
        name for one in every for name, default in one.rules().items() if one.constants.get(name, default) != default
    }
    assert rules == {name for one in every for name in one.rules()}
    assert all(one.expect for one in every if one.name.startswith("f"))


def test_a_configuration_whose_expectation_is_not_met_is_noticed() -> None:
    holds, breaks = (next(configurations([name])) for name in ("h61", "f64"))
    assert not holds._replace(expect="taken in twice").is_met(check(holds))
    assert not breaks._replace(expect="").is_met(check(breaks))
    assert not breaks._replace(expect="another").is_met(check(breaks))


def test_each_interleaving_has_tests_that_are_there() -> None:
    text = CONFIGURATIONS.with_name("README.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[0]) for row in rows] == list(range(1, 25))
    for row in rows:
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", row[3])
        assert tests, row
        for file, name in tests:
            assert f"def {name}(" in (TESTS / file).read_text(), name
        assert all(any(configurations([name])) for name in re.findall(r"[fh]\d\d", row[4])), row
