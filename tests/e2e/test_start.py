"""A worker whose engines become unavailable just as it starts says so, and ends as if they had been so before."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from orderstream.engines.child import Child
from orderstream.engines.probes import create_database, drop_database
from orderstream.jobs.init import init
from orderstream.sql.prepare import prepare
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


async def refused(shop: Pipeline, **overrides: Any) -> tuple[int, str]:
    """Start a worker that can't be; return its exit code and the one line that says why."""
    file = shop.folder / "worker-refused.log"
    file.unlink(missing_ok=True)
    worker = Worker(shop.settings, file, **overrides)
    try:
        code = await asyncio.to_thread(worker.process.wait, 60)
    finally:
        worker.process.kill()
    log = worker.log.read_text()
    assert "Traceback" not in log, log
    assert log.startswith("orderstream: "), log
    return code, log


async def test_a_worker_of_another_pipeline_is_refused(pipeline: Make) -> None:
    shop = pipeline()
    await init(shop.settings, ())
    code, said = await refused(shop, app_id="another-shop")
    assert (code, "is the database of another pipeline" in said) == (1, True)
    code, said = await refused(shop, topic_prefix="another.")
    assert (code, "is the database of another pipeline" in said) == (1, True)


async def test_a_worker_of_a_pipeline_that_took_the_keys_of_another_is_refused(
    pipeline: Make, database_url: str, run_id: str
) -> None:
    shop = pipeline()
    await init(shop.settings, ())
    url = create_database(database_url, f"{run_id}x")
    try:
        another = shop.settings.model_copy(update={"database_url": url, "redis_prefix": f"{run_id}x"})
        await init(another, ())
        code, said = await refused(shop, database_url=url)
        assert (code, f"the Redis prefix {run_id} is another pipeline's" in said) == (1, True)
    finally:
        drop_database(url)


@pytest.mark.parametrize("what", ["worker", "ingress"])
async def test_a_process_that_is_asked_to_leave_while_it_starts_leaves(pipeline: Make, what: str) -> None:
    shop = pipeline()
    await init(shop.settings, ())
    for later_s in (0.0, 0.5, 1.0, 2.0):
        started = Child(what, shop.settings, shop.folder / f"{what}-{later_s}.log")
        try:
            while not catches_sigterm(started.process.pid):  # noqa: ASYNC110  (before that it has not come to our code)
                await asyncio.sleep(0.005)
            with pytest.raises(OSError, match="refused"):
                started.page("/health")
            await asyncio.sleep(later_s)
            started.process.terminate()
            assert await asyncio.to_thread(started.process.wait, 20) == 0, later_s
            assert "Traceback" not in started.log.read_text()
        finally:
            started.process.kill()


def catches_sigterm(pid: int) -> bool:
    """Tell whether a process has a handler for SIGTERM."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)


async def test_a_worker_whose_topics_have_other_partitions_is_refused(pipeline: Make) -> None:
    shop = pipeline(partitions=2)
    await init(shop.settings, ())
    name, admin = shop.settings.topic("stock-commands"), AIOKafkaAdminClient(bootstrap_servers=shop.settings.kafka)
    await admin.start()
    try:
        await admin.create_partitions({name: NewPartitions(3)})
    finally:
        await admin.close()
    code, said = await refused(shop)
    assert (code, f"ORDERSTREAM_PARTITIONS: 2, but topic {name} has 3 partitions" in said) == (2, True)


async def test_a_worker_without_topics_is_refused(pipeline: Make) -> None:
    shop = pipeline()
    await prepare(shop.settings)
    code, said = await refused(shop)
    assert (code, "it has no topics yet\nrun `orderstream init` first" in said) == (2, True)


async def test_a_worker_that_cannot_write_to_its_folder_is_refused(pipeline: Make, tmp_path: Path) -> None:
    shop = pipeline()
    await init(shop.settings, ())
    (tmp_path / "file").touch()
    code, said = await refused(shop, local_dir=tmp_path / "file" / "local")
    assert (code, "local/faust can't be written to: Not a directory\nset ORDERSTREAM_LOCAL_DIR" in said) == (1, True)
