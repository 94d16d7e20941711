"""The batch helper acknowledges late: an exception in the middle of a batch loses nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from orderstream.exits import EXIT_FAULT
from orderstream.streams.producer import Producer
from tests.forked import Forked

pytestmark = pytest.mark.engines
RECORDS, PARTITIONS = 4_000, 4


@pytest.mark.parametrize(("mode", "lost"), [("late", False), ("early", True)])
async def test_a_batch_that_fails_in_its_middle_is_not_acknowledged(
    make_settings: Callable[..., Any], tmp_path: Path, mode: str, lost: bool
) -> None:
    settings = make_settings(partitions=PARTITIONS)
    topic = settings.topic("late-ack")
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka)
    await admin.start()
    await admin.create_topics([NewTopic(topic, PARTITIONS, 1)])
    await admin.close()
    producer = Producer(settings)
    await producer.send(
        {(topic, p): [(None, b"%d" % n, ()) for n in range(RECORDS // PARTITIONS)] for p in range(PARTITIONS)}
    )
    await producer.stop()

    out = tmp_path / "done"
    out.touch()
    app = Path(__file__).with_name("late_ack_app.py")

    def run(fail_at: int) -> Forked:
        arguments = [settings.kafka, topic, settings.app_id, str(out), str(fail_at), mode]
        return Forked([str(app), *arguments], os.environ, tmp_path / "log")

    assert run(fail_at=3).wait(60) == EXIT_FAULT
    before = len(out.read_text().splitlines())
    assert 0 < before < RECORDS
    second = run(fail_at=0)
    deadline, size, since = time.monotonic() + 90, out.stat().st_size, time.monotonic() + 30  # it has to start
    while time.monotonic() < deadline and time.monotonic() - since < 3:
        if len(set(out.read_text().splitlines())) == RECORDS:
            break
        if size != (size := out.stat().st_size):
            since = time.monotonic()
        time.sleep(0.1)  # noqa: ASYNC251
    second.kill()
    second.wait()
    done = set(out.read_text().splitlines())
    assert (len(done) < RECORDS) == lost, f"{len(done)} of {RECORDS} done\n{(tmp_path / 'log').read_text()[-2000:]}"
