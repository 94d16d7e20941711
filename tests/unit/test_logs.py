"""What the logs leave out: a library's warning that comes again and again."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest

from orderstream.logs import REPEAT_S, Damper, configure
from orderstream.settings import load


def record(
    text: str, *values: Any, name: str = "aiokafka.client", level: int = logging.ERROR, error: Any = None
) -> logging.LogRecord:
    return logging.LogRecord(name, level, "file.py", 1, text, values, error)


@pytest.fixture
def clock() -> list[float]:
    return [100.0]


@pytest.fixture
def damper(clock: list[float]) -> Damper:
    return Damper(lambda: clock[0])


def test_the_same_warning_is_logged_once_whatever_its_values(damper: Damper) -> None:
    assert [damper.filter(record("no node %s", node)) for node in (1, 1, 2)] == [True, False, False]
    assert damper.filter(record("no metadata"))
    assert damper.filter(record("no node %s", 1, name="aiokafka.producer"))


def test_numbers_in_the_text_itself_make_no_other_line(damper: Damper) -> None:
    passed = [damper.filter(record(f"unknown topic 'a-changelog', partition={n}, offset {7 * n}")) for n in range(3)]
    assert passed == [True, False, False]
    assert damper.filter(record("unknown topic 'another', partition=1, offset 7"))


def test_it_comes_again_after_a_while_with_the_number_of_those_left_out(damper: Damper, clock: list[float]) -> None:
    for _ in range(4):
        damper.filter(record("no node %s", 1))
    clock[0] += REPEAT_S
    again = record("no node %s", 1)
    assert damper.filter(again)
    assert again.getMessage() == "no node 1  (and 3 like it in the last 60 s)"
    clock[0] += REPEAT_S
    later = record("no node %s", 1)
    assert damper.filter(later)
    assert later.getMessage() == "no node 1"


@pytest.mark.parametrize("name", ["reserve", "asyncio", "orderstream.agents.app"])
def test_lines_of_others_are_never_left_out(damper: Damper, name: str) -> None:
    assert all(damper.filter(record("failed", name=name)) for _ in range(3))


def test_information_and_tracebacks_are_never_left_out(damper: Damper) -> None:
    assert all(damper.filter(record("started", level=logging.INFO)) for _ in range(3))
    try:
        raise RuntimeError
    except RuntimeError:
        assert all(damper.filter(record("failed", error=sys.exc_info())) for _ in range(3))


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_shows_no_values(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    configure(load(_env_file=None, log_format=form))
    password = "-".join(("hunter", "2"))
    try:
        raise RuntimeError(f"{len(password)} characters")
    except RuntimeError:
        root.exception("can't connect")
    shown = capsys.readouterr().err
    assert "characters" in shown
    assert password not in shown
