"""Topics that somebody has altered: another number of partitions, smaller records than are needed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import orjson
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import MessageSizeTooLargeError

from orderstream.jobs.verify import KAFKA_PROMISE, verify
from orderstream.streams.partitions import product_partition
from orderstream.streams.topics import ORDERS
from tests.e2e.test_ingress import PATH, order
from tests.e2e.test_reconcile import found, reconcile
from tests.harness import Pipeline, ingress

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]

NOTICED_S = 10.0


async def test_a_changed_number_of_partitions_is_refused_within_seconds_and_whoever_looks_sees_all(
    pipeline: Make,
) -> None:
    shop = pipeline(partitions=3, verdict_timeout_s=5.0)
    await shop.start({"1": 10})
    (worker,) = shop.workers
    topic = shop.settings.topic(ORDERS.name)
    says = f"topic {topic} has 4 partitions, this pipeline has 3"
    async with ingress(shop) as (client, _):
        assert (await client.post(PATH, json=order((1, 1)))).status == 201
        admin = AIOKafkaAdminClient(bootstrap_servers=shop.settings.kafka)
        await admin.start()
        await admin.create_partitions({topic: NewPartitions(4)})
        await admin.close()
        altered = time.monotonic()
        assert await asyncio.to_thread(worker.process.wait, NOTICED_S) == 2, worker.tail()
        assert says in worker.log.read_text()
        assert "OPERATIONS.md" in worker.log.read_text()
        taken_in = 0
        while (await client.post(PATH, json=order((1, 1)), headers={"Prefer": "respond-async"})).status != 503:
            taken_in += 1
            assert time.monotonic() < altered + NOTICED_S
            await asyncio.sleep(0.2)
        ready = await client.get("/ready")
        assert (ready.status, says in await ready.text()) == (503, True)
        (log,) = shop.folder.glob("ingress-*.log")
        assert says in log.read_text()
    again = shop.add_worker()
    assert await asyncio.to_thread(again.process.wait, 30) == 2
    assert f"topic {topic} has 4 partitions" in again.log.read_text()
    lost = shop.order(("1", 1))
    await shop.produce_raw(orjson.dumps(lost), partition=3)
    checks = {check.promise: check.offenders for check in (await verify(shop.settings, grace_s=60)).checks}
    assert checks.pop(KAFKA_PROMISE) == [(f"{topic}/3", "1 records that no worker reads")]
    assert not any(checks.values())
    report = await reconcile(shop, settle_s=0.0)
    assert any(says in note for note in report.notes)
    assert report.covered[topic][3] == (0, 1)
    assert (found(report), report.in_flight["order.missing"]) == (set(), taken_in + 1)


async def test_an_order_that_outgrows_its_topic_when_it_is_sent_on_is_a_dead_letter(pipeline: Make) -> None:
    shop = pipeline(partitions=3)
    await shop.start({"1": 10})
    topic = shop.settings.topic(ORDERS.name)
    admin = AIOKafkaAdminClient(bootstrap_servers=shop.settings.kafka)
    await admin.start()
    await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": "3000"})])
    await admin.close()
    astray = (product_partition("1", 3) + 1) % 3
    value = orjson.dumps(shop.order(("1", 1)))
    async with AIOKafkaProducer(bootstrap_servers=shop.settings.kafka) as producer:
        for pad in range(3_000, 2_000, -1):  # the largest that the topic takes: one byte more is too much
            try:
                await producer.send_and_wait(topic, value, partition=astray, headers=[("pad", b"x" * pad)])
                break
            except MessageSizeTooLargeError:
                continue
    ids = await shop.produce([shop.order(("1", 1))])
    assert await shop.finished(ids) == {"CONFIRMED": 1}
    letters = await shop.dead_letters(1, timeout_s=20)
    assert {(letter["reason"], letter["source-partition"]) for letter in letters} == {("too_large", str(astray))}
    assert all(letter["value"] == value for letter in letters)
    assert shop.workers[0].process.poll() is None
    behind = await shop.produce([shop.order(("1", 1))])
    assert await shop.finished(behind) == {"CONFIRMED": 1}
    assert await shop.violations() == []
