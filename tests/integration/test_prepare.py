"""A database is made ready once, and belongs to one pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from orderstream.errors import OrderstreamError
from orderstream.sql.prepare import prepare

pytestmark = pytest.mark.engines


async def test_tables_are_made_once_whoever_comes_first(make_settings: Callable[..., Any]) -> None:
    settings = make_settings()
    assert sorted(await asyncio.gather(*(prepare(settings) for _ in range(4)))) == [False, False, False, True]


@pytest.mark.parametrize("other", [{"app_id": "another"}, {"topic_prefix": "another."}, {"partitions": 5}])
async def test_a_database_of_another_pipeline_is_refused(
    make_settings: Callable[..., Any], other: dict[str, Any]
) -> None:
    await prepare(make_settings())
    with pytest.raises(OrderstreamError, match="another pipeline"):
        await prepare(make_settings(**other))


async def test_a_database_of_the_first_edition_is_refused(make_settings: Callable[..., Any]) -> None:
    settings = make_settings()
    connection = await asyncpg.connect(settings.database_url)
    await connection.execute("CREATE TABLE schema_migrations (name text)")
    await connection.close()
    with pytest.raises(OrderstreamError, match="first edition"):
        await prepare(settings)
