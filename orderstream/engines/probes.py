"""Asking an engine whether it answers; making databases, and removing them and topics."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError
from redis.exceptions import RedisError

from orderstream.access import redis_client
from orderstream.errors import EngineUnavailable
from orderstream.settings import public

T = TypeVar("T")

PROBE_TIMEOUT_S = 3.0  # one question to an engine on this machine


def run_async(make: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine to its end from synchronous code, also where an event loop runs in this thread already."""

    async def main() -> T:
        return await asyncio.wait_for(make(), 10 * PROBE_TIMEOUT_S)

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(lambda: asyncio.run(main())).result()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's logger silent; what it would say comes as an exception as well."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def probe_kafka(bootstrap: str, entry: Mapping[str, Any] | None = None) -> str:
    """Ask for the cluster's metadata; return an empty string, because the protocol doesn't say the version.

    Args:
        bootstrap: host and port.
        entry: how it is entered; see :func:`orderstream.access.kafka`.

    Raises:
        EngineUnavailable: no broker answered within :data:`PROBE_TIMEOUT_S`.
    """

    async def ask() -> None:
        made_with = {"bootstrap_servers": bootstrap, **(entry or {})}
        client = AIOKafkaClient(**made_with, request_timeout_ms=int(PROBE_TIMEOUT_S * 1000))
        try:
            await asyncio.wait_for(client.bootstrap(), PROBE_TIMEOUT_S)
            if not client.cluster.brokers():
                raise EngineUnavailable("kafka", bootstrap, "it knows of no broker")
        finally:
            await client.close()

    try:
        with _quiet("aiokafka"):
            run_async(ask)
    except (KafkaError, OSError, TimeoutError) as error:
        raise EngineUnavailable("kafka", bootstrap, _why(error)) from error
    return ""


def probe_redis(url: str) -> str:
    """Send PING; return the server's version.

    Raises:
        EngineUnavailable: no PONG within :data:`PROBE_TIMEOUT_S`.
    """

    async def ask() -> str:
        client = redis_client(url, timeout_s=PROBE_TIMEOUT_S)
        try:
            await client.ping()
            return str((await client.info("server"))["redis_version"])
        finally:
            await client.aclose()

    try:
        return run_async(ask)
    except (RedisError, OSError) as error:
        raise EngineUnavailable("redis", public(url), _why(error)) from error


def probe_postgres(url: str) -> str:
    """Run ``SELECT 1``; return the server's version.

    Raises:
        EngineUnavailable: no answer within :data:`PROBE_TIMEOUT_S`.
    """

    async def ask() -> str:
        bounds = {"timeout": PROBE_TIMEOUT_S, "command_timeout": PROBE_TIMEOUT_S}
        connection = await asyncpg.connect(url, **bounds, statement_cache_size=0)  # a pooler may stand before it
        try:
            await connection.fetchval("SELECT 1")
            return str(await connection.fetchval("SHOW server_version")).split()[0]
        finally:
            await connection.close()

    try:
        return run_async(ask)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise EngineUnavailable("postgres", public(url), _why(error)) from error


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ").splitlines()[0]


async def _admin_execute(url: str, *statements: str) -> None:
    admin = await asyncpg.connect(database_of(url, "postgres"), timeout=PROBE_TIMEOUT_S)
    try:
        for statement in statements:
            await admin.execute(statement)
    finally:
        await admin.close()


def database_of(url: str, name: str) -> str:
    """Return the URL of another database on the server of ``url``."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def create_database(url: str, name: str) -> str:
    """Create a database on the server of ``url``, unless it is there; return its URL.

    Raises:
        EngineUnavailable: the server did not do it.
    """
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name):
        raise ValueError(f"not a name for a database: {name!r}")
    try:
        run_async(lambda: _admin_execute(url, f"CREATE DATABASE {name}"))
    except asyncpg.DuplicateDatabaseError:
        return database_of(url, name)
    except (asyncpg.PostgresError, OSError, TimeoutError) as error:
        raise EngineUnavailable("postgres", public(url), f"can't create database {name}: {_why(error)}") from error
    return database_of(url, name)


def drop_database(url: str) -> None:
    """Drop the database of ``url``, whoever is connected.

    Raises:
        EngineUnavailable: the server did not do it.
    """
    name = urlsplit(url).path.lstrip("/")
    try:
        run_async(lambda: _admin_execute(url, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
    except (asyncpg.PostgresError, OSError, TimeoutError) as error:
        raise EngineUnavailable("postgres", public(url), f"can't drop database {name}: {_why(error)}") from error


def delete_topics(kafka: str, prefix: str) -> None:
    """Delete the topics whose names begin so, changelogs too: thousands of them would slow the broker down."""

    async def delete() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
        await admin.start()
        try:
            topics = [topic for topic in await admin.list_topics() if topic.startswith(prefix)]
            if topics:
                await admin.delete_topics(topics)
        finally:
            await admin.close()

    run_async(delete)
