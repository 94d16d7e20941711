"""The quick configurations of the protocol's model: each ends as it says, what must break included."""

from __future__ import annotations

import pytest

from docs.model.__main__ import Configuration, check, configurations

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
