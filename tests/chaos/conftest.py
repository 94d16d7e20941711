"""Pipelines of the chaos tests, on engines that they may end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orderstream.engines.local import LocalEngines
from orderstream.engines.probes import create_database, delete_topics, drop_database
from orderstream.settings import Settings, load
from tests.chaos.bank import Bank
from tests.e2e.conftest import pipeline as unpaid_pipeline
from tests.harness import Pipeline

__all__ = ["unpaid_pipeline"]

Make = Callable[..., Pipeline]


@pytest.fixture
async def bank() -> AsyncIterator[Bank]:
    """Give the bank that charges in this test, at its best until the test says otherwise."""
    async with Bank() as bank:
        yield bank


def paid(bank: Bank, **overrides: Any) -> dict[str, Any]:
    """Return settings with which the bank charges."""
    return {"payment_provider": "http", "payment_url": bank.url, **overrides}


@pytest.fixture
def pipeline(unpaid_pipeline: Make, bank: Bank) -> Make:
    """Return a function that makes a pipeline on the engines of all tests, for which the bank charges."""
    return lambda **overrides: unpaid_pipeline(**paid(bank, **overrides))


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
async def own_pipeline(own_engines: LocalEngines, run_id: str, tmp_path: Path, bank: Bank) -> AsyncIterator[Make]:
    """Return a function that makes the pipeline of this test on engines that the test may end; all run again after it."""
    own_engines.up()
    addresses = own_engines.addresses()
    url = create_database(addresses["database_url"], run_id)
    made: list[Pipeline] = []

    def make(**overrides: Any) -> Pipeline:
        ours = paid(bank, session_timeout_s=4.0) | overrides
        settings = own_settings(addresses, url, run_id, tmp_path, ours)
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
