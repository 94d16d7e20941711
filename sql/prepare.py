"""Makes an empty database ready for a pipeline whose orders stay at home; refuses one that is another's."""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

import asyncpg
from redis.exceptions import RedisError

from orderstream import connecting
from orderstream.errors import EngineRefused, OrderstreamError
from orderstream.settings import Settings, public
from orderstream.sql.store import Store, connect, gate_of

LOCK_ID = 0x6F72646572  # "order": any fixed number, so that two runs wait for each other

CONNECT_S = 30.0


class Owner(NamedTuple):
    """Whose database it is; see the table ``pipeline``."""

    app_id: str
    topic_prefix: str
    partitions: int


def schema() -> str:
    """Return the text that makes an empty database ready: tables, then functions."""
    folder = files("orderstream") / "sql"
    functions = sorted((folder / "functions").iterdir(), key=lambda file: file.name)
    return "\n".join([(folder / "tables.sql").read_text(), *(file.read_text() for file in functions)])


async def prepare(settings: Settings) -> bool:
    """Make the tables and functions where there are none; return whether they were made now.

    Raises:
        OrderstreamError: the database is of the first edition, another pipeline's, or not in UTF-8.
    """
    ours = Owner(settings.app_id, settings.topic_prefix, settings.partitions)
    where = public(settings.database_url)
    connection = await connect(settings.database_url, timeout=CONNECT_S, statement_cache_size=0)
    try:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK_ID)
            if await connection.fetchval("SELECT to_regclass('schema_migrations')") is not None:
                raise OrderstreamError(f"{where} has tables of the first edition: use another database")
            if await connection.fetchval("SELECT to_regclass('pipeline')") is None:
                encoding = await connection.fetchval("SHOW server_encoding")
                if encoding != "UTF8":
                    raise OrderstreamError(
                        f"{where} is a database in {encoding}, which can't hold every name: make one in UTF8, like\n"
                        "createdb --encoding=UTF8 --template=template0 orderstream"
                    )
                await connection.execute(schema())
                await connection.execute(
                    "INSERT INTO pipeline (app_id, topic_prefix, partitions) VALUES ($1, $2, $3)", *ours
                )
                return True
            await check(connection, settings)
            return False
    finally:
        await connection.close()


async def check_keys(store: Store, settings: Settings) -> None:
    """Check that the keys in Redis are this pipeline's.  A Redis that is away is no fault: it is checked when it is there.

    Raises:
        PrefixTaken: they are another one's.
        EngineRefused: Redis answers, and does not let us in.
    """
    gate = gate_of(settings, store)
    try:
        await gate.enter()
    except RedisError as error:
        if isinstance(found := connecting.fault("Redis", public(settings.redis_url), error), EngineRefused):
            raise found from error
    finally:
        await gate.close()


async def check(connection: asyncpg.Connection | asyncpg.Pool, settings: Settings) -> None:
    """Check that a database is this pipeline's.

    Raises:
        OrderstreamError: it is another one's.
        asyncpg.UndefinedTableError: it is nobody's yet.
    """
    ours = Owner(settings.app_id, settings.topic_prefix, settings.partitions)
    theirs = Owner(*await connection.fetchrow("SELECT app_id, topic_prefix, partitions FROM pipeline"))
    if theirs != ours:
        where = public(settings.database_url)
        raise OrderstreamError(f"{where} is the database of another pipeline: {theirs}; this one is {ours}")
