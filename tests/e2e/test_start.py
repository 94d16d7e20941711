"""A worker whose engines become unavailable just as it starts says so, and ends as if they had been so before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from orderstream.jobs.init import init
from tests.harness import Pipeline, Worker

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]


@asynccontextmanager
async def leaving(kafka: str, connections: int) -> AsyncIterator[str]:
    """Relay Kafka for so many connections to it by its first address, and refuse after them."""
    host, _, port = kafka.rpartition(":")
    left = connections
    server: asyncio.Server

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            server.close()
        there = await asyncio.open_connection(host, int(port))
        await asyncio.gather(carry(reader, there[1]), carry(there[0], writer), return_exceptions=True)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    if left == 0:
        server.close()
    try:
        yield address
    finally:
        server.close()


async def test_a_worker_that_starts_when_kafka_goes_says_so(pipeline: Make) -> None:
    shop = pipeline()
    await init(shop.settings, ())

    async def start(connections: int) -> None:
        async with leaving(shop.settings.kafka, connections) as kafka:
            worker = Worker(shop.settings, shop.folder / f"worker-{connections}.log", kafka=kafka)
            try:
                code = await asyncio.to_thread(worker.process.wait, 60)
            finally:
                worker.process.kill()
        log = worker.log.read_text()
        assert (connections, code) == (connections, 2), log
        assert f"orderstream: Kafka does not answer at {kafka}" in log
        assert "Traceback" not in log

    # Unavailable before its own check, its producer, Faust's producer, and Faust's consumer, which has a thread of its own.
    await asyncio.gather(*(start(connections) for connections in range(4)))


async def test_a_worker_of_another_pipeline_is_refused(pipeline: Make) -> None:
    shop = pipeline()
    await init(shop.settings, ())
    worker = Worker(shop.settings, shop.folder / "worker-other.log", app_id="another-shop")
    try:
        code = await asyncio.to_thread(worker.process.wait, 60)
    finally:
        worker.process.kill()
    log = worker.log.read_text()
    assert code == 1, log
    assert "is the database of another pipeline" in log
    assert "Traceback" not in log
