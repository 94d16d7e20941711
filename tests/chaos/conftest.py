"""Pipelines of the chaos tests, on engines that they may end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orderstream.engines.local import LocalEngines
from orderstream.engines.probes import create_database, delete_topics, drop_database
from orderstream.settings import Settings, load
from tests.e2e.conftest import pipeline
from tests.harness import Pipeline

__all__ = ["pipeline"]


def own_settings(
    addresses: Mapping[str, str], url: str, run_id: str, folder: Path, overrides: Mapping[str, Any]
) -> Settings:
    """Return the settings of a pipeline of one test, on engines that it may end."""
    ours: dict[str, Any] = {
        **addresses,
        "database_url": url,
        "topic_prefix": f"{run_id}.",
        "redis_prefix": run_id,
        "app_id": run_id,
        "local_dir": folder / "local",
        "web_port": 0,
        "http_port": 0,
        "partitions": 4,
        "retry_wait_max_s": 1.0,
        "_env_file": None,
    }
    return load(**{**ours, **overrides})


@pytest.fixture
async def own_pipeline(
    own_engines: LocalEngines, run_id: str, tmp_path: Path
) -> AsyncIterator[Callable[..., Pipeline]]:
    """Return a function that makes the pipeline of this test on engines that the test may end; all run again after it."""
    own_engines.up()
    addresses = own_engines.addresses()
    url = create_database(addresses["database_url"], run_id)
    made: list[Pipeline] = []

    def make(**overrides: Any) -> Pipeline:
        settings = own_settings(addresses, url, run_id, tmp_path, {"session_timeout_s": 4.0, **overrides})
        made.append(Pipeline(settings, tmp_path))
        return made[-1]

    try:
        yield make
    finally:
        own_engines.up()
        for one in made:
            await one.close()
        drop_database(url)
        delete_topics(addresses["kafka"], run_id)
