"""Postgres becomes unavailable, and its answers get lost when the commit is made."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import asyncpg
import pytest

from orderstream.engines.local import LocalEngines
from tests.chaos.scenario import Scenario
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]


class CuttingProxy:
    """A proxy between workers and Postgres; cuts a connection when the answer to a statement comes back.

    The statement is done then, its outcome unknown to its client.

    Attributes:
        cut: connections that were cut so.
    """

    def __init__(self, url: str, seed: int, pause_s: float) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._draw = random.Random(seed)
        self._pause_s = pause_s
        self._next = time.monotonic() + pause_s
        self.on = False
        self.cut = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Proxy one connection."""
        there_reader, there_writer = await asyncio.open_connection(self._host, self._port)

        async def requests() -> None:
            while data := await reader.read(1 << 16):
                there_writer.write(data)

        asking = asyncio.create_task(requests())
        try:
            answered = 0
            while data := await there_reader.read(1 << 16):
                answered += 1
                if self.on and answered > 20 and time.monotonic() > self._next:
                    self._next = time.monotonic() + self._pause_s * self._draw.uniform(0.5, 1.5)
                    self.cut += 1
                    break
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            asking.cancel()
            for end in (writer, there_writer):
                end.close()


@asynccontextmanager
async def cutting_proxy(url: str, seed: int, pause_s: float) -> AsyncIterator[tuple[CuttingProxy, str]]:
    """Run one; yield it and the URL that leads through it."""
    proxy = CuttingProxy(url, seed, pause_s)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    parts = urlsplit(url)
    try:
        yield proxy, parts._replace(netloc=f"{parts.username}@127.0.0.1:{port}").geturl()
    finally:
        server.close()


async def test_answers_that_get_lost_after_the_commit_count_once(pipeline: Make) -> None:
    shop = pipeline(partitions=4, retry_wait_max_s=0.5)
    scenario = Scenario(6_000)
    async with cutting_proxy(shop.settings.database_url, seed=1, pause_s=0.2) as (proxy, url):
        await shop.start(scenario.products, database_url=url)
        proxy.on = True
        await scenario.flow(shop, over_s=8)
        proxy.on = False
        await scenario.check(shop)
        assert proxy.cut > 5, "hardly an answer was lost: the test shows nothing"
        print(f"{proxy.cut} answers lost")
        assert shop.workers[0].process.poll() is None
        assert await asyncio.to_thread(shop.workers[0].stop) == 0


async def test_connections_that_are_ended_by_the_server_lose_nothing(pipeline: Make) -> None:
    shop = pipeline(partitions=4, retry_wait_max_s=0.5)
    scenario = Scenario(6_000)
    await shop.start(scenario.products)
    flowing = asyncio.create_task(scenario.flow(shop, over_s=8))
    connection = await asyncpg.connect(shop.settings.database_url)
    ended = 0
    try:
        while not flowing.done():
            ended += await connection.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() AND state = 'active'"
            )
            await asyncio.sleep(0.03)
    finally:
        await connection.close()
    await shop.reconnect()
    await flowing
    await scenario.check(shop)
    print(f"{ended} statements ended")
    assert ended > 5, "hardly a statement was ended: the test shows nothing"
    assert shop.workers[0].process.poll() is None


async def test_postgres_restarts_and_is_unavailable_for_ten_seconds(
    own_pipeline: Make, own_engines: LocalEngines
) -> None:
    shop = own_pipeline()
    scenario = Scenario(6_000)
    await shop.start(scenario.products, workers=2)
    flowing = asyncio.create_task(scenario.flow(shop, over_s=18))
    await asyncio.sleep(2)
    await asyncio.to_thread(own_engines.restart, "postgres")
    await asyncio.sleep(3)
    await asyncio.to_thread(own_engines.kill, "postgres")
    await asyncio.sleep(10)
    await asyncio.to_thread(own_engines.start, "postgres")
    await shop.reconnect()
    await flowing
    await scenario.check(shop)
    assert [worker.process.poll() for worker in shop.workers] == [None, None]


OUT_OF_MEMORY = """
CREATE FUNCTION no_memory() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'out of memory' USING ERRCODE = 'out_of_memory';
END $$;
CREATE TRIGGER no_memory BEFORE UPDATE ON lanes FOR EACH ROW EXECUTE FUNCTION no_memory();
"""


async def test_faults_of_a_postgres_that_answers_are_waited_for(pipeline: Make) -> None:
    shop = pipeline(partitions=4, retry_wait_max_s=0.5)
    scenario = Scenario(6_000)
    await shop.start(scenario.products)
    worker = shop.workers[0]
    flowing = asyncio.create_task(scenario.flow(shop, over_s=15))
    connection = await asyncpg.connect(shop.settings.database_url)
    name = await connection.fetchval("SELECT quote_ident(current_database())")

    async def renew() -> None:
        """End all other sessions: the next ones have the settings of now."""
        await connection.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    async def retries() -> float:
        return await asyncio.to_thread(worker.metric, "engine_retries_total", engine="postgres")

    try:
        await asyncio.sleep(1)
        before = await retries()
        await connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        await renew()
        await asyncio.sleep(2)
        await connection.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        await asyncio.sleep(1)  # sessions that began as read-only are given up by themselves
        assert before < (before := await retries())

        await connection.execute(f"ALTER DATABASE {name} SET lock_timeout = '50ms'")
        await renew()
        async with connection.transaction():
            await connection.execute("SELECT FROM lanes FOR UPDATE")
            await asyncio.sleep(2)
        await connection.execute(f"ALTER DATABASE {name} RESET lock_timeout")
        assert before < (before := await retries())

        await connection.execute(OUT_OF_MEMORY)
        await asyncio.sleep(2)
        await connection.execute("DROP TRIGGER no_memory ON lanes; DROP FUNCTION no_memory()")
        assert before < (before := await retries())

        for setting in ("idle_session_timeout", "idle_in_transaction_session_timeout"):
            await connection.execute(f"ALTER DATABASE {name} SET {setting} = '5ms'")
        await renew()
        await asyncio.sleep(2)
        for setting in ("idle_session_timeout", "idle_in_transaction_session_timeout"):
            await connection.execute(f"ALTER DATABASE {name} RESET {setting}")
        await renew()
    finally:
        await connection.close()
    await shop.reconnect()
    await flowing
    await scenario.check(shop)
    assert worker.process.poll() is None, worker.tail()
    assert await asyncio.to_thread(worker.stop) == 0
