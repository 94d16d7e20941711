"""Dead letters for an operator: listed with their reasons, fixed, sent again once, dropped."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.structs import TopicPartition

from orderstream.engines.child import environment
from orderstream.errors import InvalidRecord
from orderstream.jobs.letters import carry_out, plan, reading
from orderstream.sql.store import Store
from orderstream.streams.dead_letters import dead_letter
from orderstream.streams.headers import HEADERS_BYTES_MAX
from orderstream.streams.letters import Letter, parse_id
from orderstream.streams.orders import order_id_for_source
from orderstream.streams.partitions import product_partition
from orderstream.streams.producer import Outbox, Producer
from orderstream.streams.topics import DEAD_LETTERS, ORDERS
from tests.harness import Pipeline, ingress

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]

KILLED_AT_SEND = """
import os, signal
from orderstream.streams.producer import Producer
whole = Producer.send
async def send(self, step):
    {before}
    os.kill(os.getpid(), signal.SIGKILL)
Producer.send = send
from orderstream.jobs.cli.main import main
main()
"""


async def letters(shop: Pipeline, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[str]:
    answer = await shop.orderstream("dead-letters", *arguments, given=given, COLUMNS="200")
    assert "Traceback" not in answer.stderr, answer.stderr
    return answer


async def listed(shop: Pipeline, *arguments: str) -> list[dict[str, Any]]:
    answer = await letters(shop, "list", "--json", *arguments)
    assert answer.returncode == 0, answer.stderr
    found: list[dict[str, Any]] = json.loads(answer.stdout)
    return found


async def until_listed(shop: Pipeline, number: int) -> list[dict[str, Any]]:
    """Wait for so many dead letters; return the open ones."""
    for _ in range(200):
        if len(await shop.dead_letters()) >= number:
            break
        await asyncio.sleep(0.1)
    return await listed(shop)


async def reject(
    shop: Pipeline, value: bytes | None, *, topic: str = "orders", offset: int = 0, headers: Any = (), key: bytes = b"1"
) -> None:
    """Put a record of that place aside, as a stage does."""
    outbox = Outbox(shop.settings)
    fault = InvalidRecord("invalid_order", "a fault")
    source: dict[str, Any] = {"topic": shop.settings.topic(topic), "partition": 0, "offset": offset, "timestamp": 0}
    outbox.dead_letter(dead_letter(fault, **source, key=key, value=value, headers=headers))
    await (await shop.producer()).send(outbox.publications())


async def read_all(shop: Pipeline) -> list[Letter]:
    async with reading(shop.settings) as reader:
        return [letter async for page in reader.pages() for letter in page]


def without_id(*items: tuple[str, int]) -> dict[str, Any]:
    return {name: value for name, value in Pipeline.order(*items).items() if name != "order_id"}


async def test_an_order_that_no_stage_can_read_is_told_unless_there_is_one_under_its_id(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"1": 10})
    lost, sold = shop.order(("1", 1)), shop.order(("1", 1))
    bad = {"items": [{"product_id": "1", "quantity": 0}], "x\0": 1}
    await shop.produce([sold])
    await shop.finished([sold["order_id"]])
    await shop.produce_raw(orjson.dumps({**sold, **bad}))
    await shop.produce_raw(orjson.dumps({**lost, **bad}))
    laden = shop.order(("1", 1))
    headers = (("x", bytes(HEADERS_BYTES_MAX)),)
    place = shop.settings.topic("orders"), product_partition("1", shop.settings.partitions)
    await (await shop.producer()).send({place: [(b"1", orjson.dumps(laden), headers)]})
    await until_listed(shop, 3)
    told: list[dict[str, Any]] = []
    while len(told) < 2:
        await asyncio.sleep(0.05)
        told = [orjson.loads(r.value) for r in await shop.records("order-events") if b"REJECTED" in r.value]
    event, other = told
    assert (other["order_id"], other["reason"]) == (laden["order_id"], "too_large")
    assert (event["order_id"], event["reason"]) == (lost["order_id"], "invalid_order")
    assert "quantity" in event["detail"]
    async with ingress(shop) as (client, _):
        answer = await client.get(f"/api/v1/orders/{lost['order_id']}")
        body = await answer.json(content_type=None)
        assert (answer.status, body["type"]) == (404, "urn:orderstream:problem:order-rejected")
        assert (body["order_status"], body["reason"], body["detail"]) == ("REJECTED", "invalid_order", event["detail"])
        assert body["record"] == {"topic": shop.settings.topic("orders"), **event["record"]}
        found = await (await client.get(f"/api/v1/orders/{sold['order_id']}")).json()
        assert found["order"]["status"] == "CONFIRMED"
        await shop.produce([lost])  # mended: from now on there is an order
        await shop.finished([lost["order_id"]])
        found = await (await client.get(f"/api/v1/orders/{lost['order_id']}")).json()
        assert [step["status"] for step in found["history"]] == ["CREATED", "RESERVED", "PAID", "CONFIRMED"]
    checked = await shop.orderstream("reconcile")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert await shop.violations() == []


def stock(product_id: str, quantity: int) -> bytes:
    body = {"command": "receive", "command_id": str(uuid.uuid4()), "product_id": product_id, "quantity": quantity}
    return orjson.dumps(body)


async def test_what_was_refused_is_listed_shown_fixed_and_sent_again_once(pipeline: Make, tmp_path: Path) -> None:
    shop = pipeline()
    await shop.start({"1": 10})
    await shop.produce_raw(b"this is \x1b[31m no JSON")
    await shop.produce_raw(orjson.dumps(without_id(("1", 0))))
    await shop.produce_raw(orjson.dumps(shop.order(("1", 0))))
    outbox = Outbox(shop.settings)
    outbox.stock_command("new", stock("new", 7))
    await (await shop.producer()).send(outbox.handovers())
    orders, commands = shop.settings.topic("orders"), shop.settings.topic("stock-commands")
    found = await until_listed(shop, 4)
    places = {(one["source"]["topic"], one["source"]["offset"]): one["reason"] for one in found}
    assert places == {
        (orders, 0): "not_json",
        (orders, 1): "invalid_order",
        (orders, 2): "invalid_order",
        (commands, 0): "unknown_product",
    }
    answer = await letters(shop, "list", "--topic", "orders")
    assert "3 open: invalid_order 2, not_json 1" in answer.stdout

    # What it says can't hurt a terminal, and what is still bad is not sent.
    ids = {(one["source"]["topic"], one["source"]["offset"]): one["id"] for one in found}
    no_json, bad, none, refused = ids[orders, 0], ids[orders, 1], ids[orders, 2], ids[commands, 0]
    answer = await letters(shop, "show", no_json)
    assert "this is \\x1b[31m no JSON" in answer.stdout
    assert "\x1b" not in answer.stdout
    answer = await letters(shop, "retry", no_json, bad, none, refused)
    assert (answer.returncode, answer.stderr.count("would be a dead letter again")) == (1, 4)
    assert "items.0.quantity" in answer.stderr
    assert "product new is not in the catalogue" in answer.stderr
    assert len(await shop.records(ORDERS.name)) == 3

    # Fixed, it is the order that it would have been, once.
    file = tmp_path / "order.json"
    assert (await letters(shop, "show", bad, "--raw", str(file))).returncode == 0
    file.write_bytes(file.read_bytes().replace(b'"quantity":0', b'"quantity":2'))
    answer = await letters(shop, "retry", bad, "--value", str(file))
    assert (answer.returncode, answer.stderr) == (0, "")
    (at,) = (one["source"] for one in found if one["id"] == bad)
    order_id = order_id_for_source(at["topic"], at["partition"], at["offset"], at["timestamp"])
    assert await shop.finished([order_id]) == {"CONFIRMED": 1}
    answer = await letters(shop, "retry", bad)
    assert (answer.returncode, f"{bad}  not sent again: retried 20" in answer.stderr) == (1, True)
    assert (await letters(shop, "retry", bad, "--again")).returncode == 0
    assert len(await shop.records(ORDERS.name)) == 5

    # The product comes; the command is carried out once.
    await (await shop.store()).load_catalogue([("new", "new", 100, 0)], shop.settings.partitions)
    answer = await letters(shop, "retry", "--all", "--topic", "stock-commands")
    assert (answer.returncode, "nothing was done: --yes does it" in answer.stdout) == (0, True)
    answer = await letters(shop, "retry", "--all", "--yes")  # what is still bad is left out, and reported
    assert (answer.returncode, answer.stdout.splitlines()[-1]) == (1, "1 sent again, 2 not")
    assert await shop.has_counts("new", 7, 0, 0)
    assert (await letters(shop, "retry", refused, "--again")).returncode == 0

    answer = await letters(shop, "drop", no_json, none, "--why", "a test of the shop's")
    assert answer.returncode == 0, answer.stderr
    answer = await letters(shop, "list")
    assert (answer.returncode, answer.stdout) == (0, "no dead letters open\n")
    assert {one["id"]: one["state"] for one in await listed(shop, "--all")} == {
        no_json: "dropped",
        none: "dropped",
        bad: "retried",
        refused: "retried",
    }
    assert "a test of the shop's" in (await letters(shop, "show", no_json)).stdout
    await shop.finished(await shop.produce([shop.order(("1", 1))]))  # behind them all
    assert await shop.has_counts("1", 7, 0, 3)
    assert await shop.has_counts("new", 7, 0, 0)
    assert await shop.charges() == (2, 2)
    assert len(await shop.dead_letters()) == 4
    assert await shop.violations() == []


async def test_a_retry_that_was_killed_is_seen_and_completed_and_the_order_is_one(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"1": 10})
    good = orjson.dumps(without_id(("1", 1)))
    for offset in range(2):
        await reject(shop, b"{", offset=1_000 + offset)
    for letter, before in zip(await read_all(shop), ("pass", "await whole(self, step)"), strict=True):
        script = KILLED_AT_SEND.format(before=before)
        command = [sys.executable, "-c", script, "dead-letters", "retry", str(letter.id), "--value", "-"]
        run = asyncio.to_thread(subprocess.run, command, env=environment(shop.settings), input=good, check=False)
        assert (await run).returncode == -9
    assert [one["state"] for one in await listed(shop)] == ["retrying", "retrying"]
    answer = await letters(shop, "retry", "--all", "--yes")  # with the value that was given then
    assert answer.returncode == 0, answer.stderr
    assert len(await shop.records(ORDERS.name)) == 3
    ids = [order_id_for_source(shop.settings.topic("orders"), 0, 1_000 + offset, 0) for offset in range(2)]
    assert await shop.finished(ids) == {"CONFIRMED": 2}
    assert await shop.has_counts("1", 8, 0, 2)
    assert await listed(shop) == []
    assert await shop.violations() == []


async def test_a_record_that_is_refused_again_is_a_letter_that_tells_of_the_first(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"1": 10})
    for offset in range(2):
        await reject(shop, b"{", offset=1_000 + offset, headers=[("trace", b"t"), ("reply-to", b"r" * 300)])
    first, second = await read_all(shop)
    order, store, producer = shop.order(("1", 1)), await shop.store(), await shop.producer()
    plans = []
    for letter, user in ((first, "one"), (second, "two")):  # the same id for two orders, both unknown so far
        value = orjson.dumps({**order, "user_id": user})
        planned, refused = await plan(store, shop.settings, [letter], value=value)
        assert not refused
        plans += planned
    assert all(one.done for one in await carry_out(store, producer, plans))
    (again,) = await until_listed(shop, 3)
    assert (again["reason"], again["retry_of"]) == ("order_id_reused", str(second.id))
    answer = await letters(shop, "show", again["id"])
    assert f"retry of  {second.id}" in answer.stdout
    assert "trace: t" in answer.stdout
    assert "reply-to" not in answer.stdout
    answer = await letters(shop, "retry", again["id"])
    assert (answer.returncode, "order_id_reused" in answer.stderr) == (1, True)
    assert await shop.finished([order["order_id"]]) == {"CONFIRMED": 1}


async def test_of_operators_who_retry_at_once_one_sends(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"1": 10}, workers=0)
    orders = [orjson.dumps(shop.order(("1", 1))) for _ in range(20)]
    for offset, order in [*enumerate(orders), (7, orders[7]), (19, orders[19]), (7, orders[7])]:
        await reject(shop, order, offset=offset)  # a stage that ended before it acknowledged a record rejects it again
    found = await read_all(shop)
    assert [letter.source.offset for letter in found if letter.source] == list(range(20))
    assert [one["id"] for one in await listed(shop)] == [str(letter.id) for letter in found]
    answer = await letters(shop, "retry", "--all")
    assert (answer.returncode, "20 would be sent again" in answer.stdout) == (0, True)

    async def operator() -> int:
        store, producer = await Store.connect(shop.settings.database_url), Producer(shop.settings)
        try:
            plans, _ = await plan(store, shop.settings, found)
            return sum(one.done for one in await carry_out(store, producer, plans))
        finally:
            await producer.stop()
            await store.close()

    assert sum(await asyncio.gather(*(operator() for _ in range(4)))) == 20
    sent = [dict(record.headers)["retry-of"].decode() for record in await shop.records(ORDERS.name)]
    assert sorted(sent) == sorted(str(letter.id) for letter in found)


async def test_ids_that_are_not_there_and_unavailable_engines_are_named(pipeline: Make) -> None:
    shop = pipeline()
    answer = await letters(shop, "list")
    assert (answer.returncode, "run `orderstream init` first" in answer.stderr) == (2, True)
    await shop.start({}, workers=0)
    answer = await letters(shop, "list", "--all")
    assert (answer.returncode, answer.stdout) == (0, "no dead letters\n")
    for offset in range(2):
        await reject(shop, None, offset=offset)
    removed, kept = (letter.id for letter in await read_all(shop))
    admin = AIOKafkaAdminClient(bootstrap_servers=shop.settings.kafka)
    await admin.start()
    try:
        tp = TopicPartition(shop.settings.topic(DEAD_LETTERS.name), removed.partition)
        await admin.delete_records({tp: RecordsToDelete(before_offset=kept.offset)})
    finally:
        await admin.close()
    for text, why in (
        (str(removed), "removed after its time"),
        ("999/0", "never was"),
        (f"{removed.partition}/9", "never was"),
    ):
        answer = await letters(shop, "show", text)
        assert (answer.returncode, why in answer.stderr) == (1, True), answer
    assert [one["id"] for one in await listed(shop)] == [str(kept)]
    assert parse_id(str(kept)) == kept
    answer = await letters(shop, "drop", "--all", "--why", "no value")
    assert (answer.returncode, f"{kept}  would be dropped" in answer.stdout) == (0, True)
    unavailable = Pipeline(shop.settings.model_copy(update={"kafka": "127.0.0.1:9"}), shop.folder)
    answer = await letters(unavailable, "list")
    assert (answer.returncode, "Kafka does not answer at 127.0.0.1:9" in answer.stderr) == (2, True)
