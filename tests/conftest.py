"""Engines, databases and settings for the tests: their own, never those of whoever runs them."""

from __future__ import annotations

import asyncio
import gc
import os
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orderstream.engines.local import LocalEngines
from orderstream.engines.locks import file_lock
from orderstream.engines.probes import create_database, delete_topics, drop_database
from orderstream.engines.process import Process
from orderstream.engines.programs import Programs
from orderstream.settings import PREFIX, Settings, load

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ROOT / ".local" / "test"  # one folder for each process of pytest: <pid>-<birth>, and more sets with a suffix

MakeSettings = Callable[..., Settings]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say of a test that took too long what its tasks were waiting for: its own traceback ends in the event loop."""
    report = yield
    if call.when == "call" and call.excinfo is not None and "Timeout (>" in str(call.excinfo.value):
        report.sections.append(("What the tasks of asyncio wait for", "\n".join(pending_tasks())))
    return report


def pending_tasks() -> Iterator[str]:
    """Yield the tasks that have not ended, each with the lines at which it and what it awaits stand, outermost first."""
    for task in [one for one in gc.get_objects() if isinstance(one, asyncio.Task) and not one.done()]:
        yield f"{task.get_name()}:"
        awaited: Any = task.get_coro()
        while awaited is not None:
            frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
            if frame is None:
                yield f"    {awaited!r}"
            else:
                yield f"    {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}"
            awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)


@pytest.fixture(scope="session", autouse=True)
def _no_outer_settings() -> Iterator[None]:
    """Keep the caller's ORDERSTREAM_* variables out of the tests and the processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.upper().startswith(PREFIX)]:
            patch.delenv(variable)
        yield


@contextmanager
def engines_of_this_run(suffix: str = "") -> Iterator[LocalEngines]:
    """Start a Kafka, a Redis and a Postgres for this run of pytest; remove them and their data at the end."""
    me = Process.of(os.getpid())
    assert me is not None
    folder = ENGINES / f"{me.pid}-{me.birth.rpartition('/')[2]}{suffix}"
    local = LocalEngines(folder, kafka_libs=ROOT / ".local" / "kafka" / "libs", say=print)
    try:
        with file_lock(ENGINES / "start.lock", print):  # what is missing is installed once, by the first of them
            local.up()
        yield local
    finally:
        local.remove()


def find_program(program: str, packages: Sequence[Sequence[str]]) -> Path:
    """Return where a program is; installs it from Debian packages as root, else skips the test."""
    programs = Programs()
    with file_lock(ENGINES / "start.lock", print):  # apt-get runs once at a time, for the engines too
        found = programs.find(program)
        if found is None:
            if programs.apt_get() is None:
                pytest.skip(
                    f"{program} is not installed: install Debian's package {packages[0][0]}, or run this as root"
                )
            programs.install(packages, ENGINES / "apt.log", print)
            found = programs.find(program)
            assert found is not None
    return found


@pytest.fixture(scope="session")
def engines() -> Iterator[LocalEngines]:
    """Give the engines of this run of pytest."""
    with file_lock(ENGINES / "orphans.lock", print):
        remove_orphans(ENGINES)
    with engines_of_this_run() as local:
        yield local


@pytest.fixture(scope="session")
def own_engines() -> Iterator[LocalEngines]:
    """Give a second set, for tests that end engines; each begins with ``up()``."""
    with engines_of_this_run(".own") as local:
        yield local


def remove_orphans(folder: Path) -> None:
    """Remove the engines of test runs that were killed before they could do it."""
    for left in folder.glob("[0-9]*-*"):
        pid, _, birth = left.stem.partition("-")
        run = Process.of(int(pid))
        if run is None or run.birth.rpartition("/")[2] != birth:
            LocalEngines(left).remove()


@pytest.fixture
def run_id() -> str:
    """Return a name that no other test has: lower case letters and digits, a letter first."""
    return f"t{uuid.uuid4().hex[:10]}"


@pytest.fixture
def database_url(engines: LocalEngines, run_id: str) -> Iterator[str]:
    """Create an empty database, and drop it after the test."""
    url = create_database(engines.addresses()["database_url"], run_id)
    yield url
    drop_database(url)


@pytest.fixture
def topic_prefix(request: pytest.FixtureRequest, run_id: str) -> Iterator[str]:
    """Return a prefix for topics; those of this test, changelogs too, are deleted after it if it used the engines."""
    yield f"{run_id}."
    if "engines" in request.fixturenames:
        local: LocalEngines = request.getfixturevalue("engines")
        delete_topics(local.addresses()["kafka"], run_id)


@pytest.fixture
def redis_prefix(run_id: str) -> str:
    """Return a prefix for Redis keys and channels."""
    return run_id


@pytest.fixture
def make_settings(
    engines: LocalEngines, database_url: str, topic_prefix: str, redis_prefix: str, run_id: str, tmp_path: Path
) -> MakeSettings:
    """Return a function that makes settings for this test: real engines, names and ports of its own."""

    def make(**overrides: Any) -> Settings:
        ours: dict[str, Any] = {
            **engines.addresses(),
            "database_url": database_url,
            "topic_prefix": topic_prefix,
            "redis_prefix": redis_prefix,
            "app_id": run_id,
            "local_dir": tmp_path / "local",
            "web_port": 0,
            "http_port": 0,
            "drain_s": 0.0,
            "_env_file": None,
        }
        return load(**{**ours, **overrides})

    return make
