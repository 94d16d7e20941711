"""Fixtures for tests that run the processes as a user runs them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from orderstream.engines.process import free_port
from tests.harness import Pipeline


@pytest.fixture
async def pipeline(make_settings: Callable[..., Any], tmp_path: Path) -> AsyncIterator[Callable[..., Pipeline]]:
    """Return a function that makes a pipeline with settings; all of them are closed after the test."""
    made: list[Pipeline] = []

    def make(**overrides: Any) -> Pipeline:
        folder = tmp_path / f"pipeline-{len(made)}"
        folder.mkdir()
        made.append(Pipeline(make_settings(**overrides), folder))
        return made[-1]

    yield make
    for one in made:
        await one.close()


@pytest.fixture
def redis_unavailable() -> str:
    """Return the URL of a Redis that does not run."""
    return f"redis://127.0.0.1:{free_port()}/0"
