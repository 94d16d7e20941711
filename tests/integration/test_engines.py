"""Local engines with the real servers: started once, revived with their data, stopped alone."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
import redis
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from orderstream.engines.local import NAMES, LocalEngines
from orderstream.engines.probes import run_async
from orderstream.engines.servers import Name
from orderstream.settings import ENGINES_FILE, Settings
from tests.conftest import ENGINES, ROOT, MakeSettings

pytestmark = pytest.mark.engines


@pytest.fixture
def own(engines: LocalEngines, run_id: str) -> Iterator[LocalEngines]:
    """A second set of engines, in a folder of its own."""
    local = LocalEngines(
        engines.local_dir.with_suffix(f".{run_id}"), kafka_libs=ROOT / ".local" / "kafka" / "libs", say=print
    )
    yield local
    local.remove()


def pids(local: LocalEngines) -> dict[Name, int | None]:
    return {name: local.pid(name) for name in NAMES}


async def write(addresses: dict[str, str]) -> None:
    """Leave one mark in each engine."""
    admin = AIOKafkaAdminClient(bootstrap_servers=addresses["kafka"])
    await admin.start()
    await admin.create_topics([NewTopic("mark", num_partitions=1, replication_factor=1)])
    await admin.close()
    producer = AIOKafkaProducer(bootstrap_servers=addresses["kafka"], acks="all")
    await producer.start()
    await producer.send_and_wait("mark", b"kept")
    await producer.stop()
    connection = await asyncpg.connect(addresses["database_url"])
    await connection.execute("CREATE TABLE mark AS SELECT 'kept' AS word")
    await connection.close()
    with redis.Redis.from_url(addresses["redis_url"]) as client:
        client.set("mark", "kept")


async def read(addresses: dict[str, str]) -> list[object]:
    """Read the marks again."""
    consumer = AIOKafkaConsumer(bootstrap_servers=addresses["kafka"])
    await consumer.start()
    consumer.assign([TopicPartition("mark", 0)])
    await consumer.seek_to_beginning()
    record = await asyncio.wait_for(consumer.getone(), 30)
    await consumer.stop()
    connection = await asyncpg.connect(addresses["database_url"])
    word = await connection.fetchval("SELECT word FROM mark")
    await connection.close()
    with redis.Redis.from_url(addresses["redis_url"], decode_responses=True) as client:
        return [record.value, client.get("mark"), word]


def test_engines_are_started_once_revived_with_their_data_and_stopped(engines: LocalEngines, own: LocalEngines) -> None:
    others = pids(engines)

    addresses = own.up()
    assert addresses == own.addresses()
    first = pids(own)
    assert None not in first.values()
    run_async(lambda: write(addresses))

    assert own.up() == addresses
    assert pids(own) == first

    # A new object knows them too: a later command is another process.
    again = LocalEngines(own.local_dir, kafka_libs=own.kafka_libs)
    rows = again.status()
    assert [(row.name, row.state) for row in rows] == [(name, "running") for name in NAMES]
    assert all(row.version and row.data and row.data.is_dir() for row in rows)

    for name in NAMES:
        again.kill(name)  # all of them wrote their marks to the system before they answered
        assert own.pid(name) is None
        assert next(row.state for row in own.status() if row.name == name) == "stopped"
    assert own.up() == addresses, "the ports stay"
    second = pids(own)
    assert not set(second.values()) & set(first.values())
    assert run_async(lambda: read(addresses)) == [b"kept", "kept", "kept"]

    own.stop("redis")
    assert set(own.addresses()) == {"kafka", "database_url"}
    assert own.start("redis") == addresses["redis_url"]
    assert {**pids(own), "redis": None} == {**second, "redis": None}

    again.down()
    assert set(pids(own).values()) == {None}
    assert not (own.local_dir / ENGINES_FILE).exists()
    assert {row.state for row in own.status()} == {"stopped"}
    again.down()

    assert pids(engines) == others
    assert {row.state for row in engines.status()} == {"running"}


def test_an_engine_that_a_setting_gives_is_not_started(engines: LocalEngines, tmp_path: Path) -> None:
    said: list[str] = []
    given = engines.addresses()
    local = LocalEngines(tmp_path / "local", given=given, say=said.append)
    assert local.up() == given
    assert [line.partition(":")[0] for line in said] == list(NAMES)
    assert "ORDERSTREAM_REDIS_URL" in said[1]
    assert [(row.state, row.detail) for row in local.status()] == [
        ("elsewhere", "ORDERSTREAM_KAFKA"),
        ("elsewhere", "ORDERSTREAM_REDIS_URL"),
        ("elsewhere", "ORDERSTREAM_DATABASE_URL"),
    ]
    before = pids(engines)
    local.down()
    assert pids(engines) == before
    assert not local.addresses()


@pytest.mark.usefixtures("engines")  # they install what is missing
@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs Postgres under another account")
def test_postgres_gets_along_with_a_checkout_that_its_account_cannot_enter(tmp_path: Path) -> None:
    said: list[str] = []
    tmp_path.chmod(0o700)
    local = LocalEngines(tmp_path / "local", say=said.append)
    try:
        local.up(["postgres"])
        (row,) = [row for row in local.status() if row.state == "running"]
        assert row.data is not None
        assert not row.data.is_relative_to(tmp_path)
        assert sum(str(row.data) in line for line in said) == 1
        local.restart("postgres")
        assert sum(str(row.data) in line for line in said) == 1, "where the data is was said once"
    finally:
        local.remove()
    assert not row.data.exists()


def test_two_at_once_start_one_set(engines: LocalEngines, own: LocalEngines) -> None:
    script = (
        "import sys; from pathlib import Path; from orderstream.engines.local import LocalEngines;"
        "print(LocalEngines(Path(sys.argv[1])).up(['redis', 'postgres']))"
    )
    command = [sys.executable, "-c", script, str(own.local_dir)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed[0] == printed[1]
    # They outlive the commands that started them.
    assert {row.name for row in own.status() if row.state == "running"} == {"redis", "postgres"}


def test_settings_of_a_test_are_its_own(engines: LocalEngines, make_settings: MakeSettings, run_id: str) -> None:
    settings: Settings = make_settings(partitions=3)
    assert settings.kafka == engines.addresses()["kafka"]
    assert settings.database_url.endswith(f"/{run_id}")
    assert settings.topic("orders") == f"{run_id}.orders"
    assert settings.partitions == 3
    assert ENGINES in engines.local_dir.parents
