"""A payment provider over HTTP that is slow, loses answers and fails: no order is charged twice, nothing is guessed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from orderstream.agents.till import BURST_S
from orderstream.streams.partitions import product_partition
from orderstream.streams.producer import Outbox
from tests.chaos.bank import Bank, Said
from tests.harness import Pipeline, Worker

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]


async def test_lost_answers_and_a_killed_worker_charge_no_order_twice(pipeline: Make) -> None:
    async with Bank(failing=0.3) as bank:
        shop = pipeline(payment_provider="http", payment_url=bank.url, payment_in_flight_max=300)
        await shop.start({"one": 10_000, "two": 10_000})
        ids = await shop.produce(shop.order(("one", 1), *([("two", 1)] if n % 3 else [])) for n in range(1_500))
        await shop.eventually("SELECT count(*) > 300 FROM payments", True)
        shop.workers[0].kill()
        shop.add_worker()
        outcome = await shop.finished(ids)
        assert outcome == {"CONFIRMED": bank.taken, "CANCELLED payment_declined": 1_500 - bank.taken}
        assert set(bank.charges) == set(ids)
        assert max(bank.asked.values()) > 1, "no answer was lost: the test shows nothing"
        assert 100 < bank.in_flight_most <= 300
        assert {charge["amount_cents"] for charge in bank.charges.values()} == {100, 200}
        assert await shop.charges() == (outcome["CONFIRMED"], outcome["CONFIRMED"])
        # What the killed worker had declined has ended already, while its lines elsewhere may still be held.
        await shop.eventually("SELECT count(*) FROM waiting", 0)
        assert await shop.violations() == []


async def test_a_success_that_comes_after_the_expiry_is_given_back_once(pipeline: Make) -> None:
    async with Bank(failing=0.2, latency_s=4.0) as bank:
        shop = pipeline(payment_provider="http", payment_url=bank.url, payment_in_flight_max=300, hold_ttl_s=2.0)
        await shop.start({"one": 1_000})
        ids = await shop.produce(shop.order(("one", 1)) for _ in range(200))
        outcome = await shop.finished(ids)
        assert outcome["CANCELLED expired"] > 0
        assert outcome["CONFIRMED"] > 0
        # Asked again and again until its outcome is known; a success is then given back.
        await shop.eventually("SELECT count(*) FROM waiting", 0)
        assert len(bank.standing) == outcome["CONFIRMED"]
        assert len(bank.voided) == outcome["CANCELLED expired"]
        assert bank.voided & bank.charges.keys(), "no charge came too late: the test shows nothing"
        await shop.eventually("SELECT count(*) FROM payments WHERE status = 'VOIDED'", outcome["CANCELLED expired"])
        assert await shop.outcomes(ids) == outcome
        assert await shop.violations() == []


# Interleaving 6, and the rest of the protocol's rules about money


def bank_of(shop_settings: dict[str, Any], bank: Bank) -> dict[str, Any]:
    return {
        "payment_provider": "http",
        "payment_url": bank.url,
        "retry_wait_max_s": 0.5,
        "partitions": 4,
    } | shop_settings


def said(status: int, /, **body: Any) -> Said:
    return Said(status, orjson.dumps(body))


def paid_for(shop: Pipeline, number: int, product_id: str = "one") -> list[dict[str, Any]]:
    """Return orders whose charge the bank makes: it declines one of five."""
    orders: list[dict[str, Any]] = []
    while len(orders) < number:
        if not Bank.declines((order := shop.order((product_id, 1)))["order_id"]):
            orders.append(order)
    return orders


async def test_a_token_that_expires_declines_nobody(pipeline: Make) -> None:
    async with Bank() as bank:
        shop = pipeline(**bank_of({}, bank))
        await shop.start({"one": 1_000})
        status = 0

        async def instead(path: str, key: str, body: dict[str, Any]) -> Said | None:
            return said(status, error="token expired") if status else None

        bank.instead = instead
        before = await shop.produce(paid_for(shop, 50))
        assert await shop.finished(before) == {"CONFIRMED": 50}
        status = 401
        refused = await shop.produce(paid_for(shop, 150))
        await shop.eventually("SELECT count(*) FROM orders WHERE status = 'RESERVED'", 150)
        await asyncio.sleep(3)
        assert await shop.outcomes(refused) == {"RESERVED": 150}
        (worker,) = shop.workers
        assert worker.metric("payments_held", why="misconfigured") == 1
        asked = len(bank.requests)
        await asyncio.sleep(2)
        assert len(bank.requests) - asked <= 10, "one request after each pause"
        status = 0
        assert await shop.finished(refused) == {"CONFIRMED": 150}
        assert worker.metric("payments_held", why="misconfigured") == 0
        assert worker.log.read_text().count("refuses us") == 1
        assert len(bank.standing) == 200
        assert await shop.violations() == []


async def test_without_a_void_what_was_charged_for_an_order_that_expired_is_refunded(pipeline: Make) -> None:
    async with Bank() as bank:
        shop = pipeline(**bank_of({"hold_ttl_s": 2.0, "payment_timeout_s": 1.0}, bank))
        is_slow = True

        async def instead(path: str, key: str, body: dict[str, Any]) -> Said | None:
            if path == "/charges" and is_slow:
                bank.charges.setdefault(key, {**body, "status": "succeeded", "charge_id": f"c-{key}"})
                return Said(0)
            return said(404) if path == "/voids" else None

        bank.instead = instead
        await shop.start({"one": 1_000})
        ids = await shop.produce(paid_for(shop, 40))
        assert await shop.finished(ids) == {"CANCELLED expired": 40}
        is_slow = False
        await shop.eventually("SELECT count(*) FROM payments WHERE status = 'VOIDED'", 40)
        await shop.eventually("SELECT count(*) FROM waiting", 0)
        assert len(bank.charges) == 40
        assert not bank.standing
        assert len(bank.refunds) == 40
        assert await shop.violations() == []


STUCK = {
    "400": said(400, error="bad"),
    "202": said(202, status="pending"),
    "silent": Said(0),
    "a number": said(200, status="succeeded", charge_id=7),
}


async def test_orders_that_get_no_verdict_end_and_do_not_stop_the_others(pipeline: Make) -> None:
    async with Bank() as bank:
        ours = {"payment_in_flight_max": 40, "payment_timeout_s": 1.0, "hold_ttl_s": 20.0, "session_timeout_s": 2.0}
        shop = pipeline(**bank_of(ours, bank))
        await shop.start({"one": 1_000, "bad": 1_000})
        bad = {how: paid_for(shop, 50, "bad") for how in STUCK}
        answers = {order["order_id"]: STUCK[how] for how, orders in bad.items() for order in orders}

        async def instead(path: str, key: str, body: dict[str, Any]) -> Said | None:
            return answers.get(key) if path == "/charges" else None

        bank.instead = instead
        for orders in zip(*bad.values(), strict=True):
            await shop.produce(orders)
        await asyncio.sleep(2)
        assert await shop.finished(await shop.produce(paid_for(shop, 50)), 15) == {"CONFIRMED": 50}
        shop.workers[0].kill()
        shop.add_worker()
        await shop.settled(1)
        assert await shop.finished(await shop.produce(paid_for(shop, 50)), 15) == {"CONFIRMED": 50}
        for how, orders in bad.items():
            ended = await shop.finished([order["order_id"] for order in orders])
            assert (ended.total(), ended["CONFIRMED"]) == (50, 0), how
        await shop.eventually("SELECT count(*) FROM waiting", 0)
        assert answers.keys() <= bank.voided
        assert len(bank.standing) == 100
        assert await shop.violations() == []


async def test_a_free_order_is_confirmed_and_nobody_is_asked(pipeline: Make) -> None:
    async with Bank() as bank:
        shop = pipeline(**bank_of({}, bank))
        await shop.start({"one": 10})
        await (await shop.store()).load_catalogue([("gift", "gift", 0, 10)], 4)
        ids = await shop.produce([shop.order(("gift", 1))])
        assert await shop.finished(ids) == {"CONFIRMED": 1}
        assert not bank.requests


async def test_money_that_was_taken_and_is_no_order_s_goes_back(pipeline: Make) -> None:
    """Another amount under the key; a success after a decline; a success for an order that its customer cancelled."""
    async with Bank() as bank:
        shop = pipeline(**bank_of({"payment_timeout_s": 20.0}, bank))
        await shop.start({"one": 1_000})
        other, late, gone, last = paid_for(shop, 4)
        declined = late["order_id"]
        is_slow = asyncio.Event()

        async def instead(path: str, key: str, body: dict[str, Any]) -> Said | None:
            charge = {**body, "status": "succeeded", "charge_id": f"c-{key}"}
            if path == "/charges" and key == other["order_id"]:
                bank.charges.setdefault(key, charge | {"amount_cents": 250})
            elif path == "/charges" and key == declined and key not in bank.charges:
                return said(402)
            elif path == "/charges" and key == gone["order_id"]:
                bank.charges.setdefault(key, charge)
                await is_slow.wait()
            elif path == "/charges" and key == last["order_id"] and declined not in bank.charges:
                bank.charges[declined] = charge | {"order_id": declined, "charge_id": "late"}  # answered twice
                return said(200, status="succeeded", order_id=declined, charge_id="late", amount_cents=100)
            return None

        bank.instead = instead
        ids = await shop.produce([other, late])
        assert await shop.finished(ids) == {"CANCELLED payment_declined": 2}
        await shop.eventually("SELECT count(*) FROM waiting", 0)
        await shop.produce([last, gone])
        assert await shop.finished([last["order_id"]]) == {"CONFIRMED": 1}
        await shop.eventually("SELECT payment::text FROM orders WHERE order_id = $1::uuid", "VOIDED", declined)
        await shop.eventually("SELECT status::text FROM orders WHERE order_id = $1::uuid", "RESERVED", gone["order_id"])
        outbox = Outbox(shop.settings)
        outbox.order_command(gone["order_id"], orjson.dumps({"command": "cancel", "order_id": gone["order_id"]}))
        await (await shop.producer()).send(outbox.handovers())
        assert await shop.finished([gone["order_id"]]) == {"CANCELLED cancelled_by_user": 1}
        is_slow.set()
        await shop.eventually("SELECT count(*) FROM waiting", 0)
        assert bank.standing == {last["order_id"]: 100}
        assert bank.voided == {other["order_id"], declined, gone["order_id"]}
        (worker,) = shop.workers
        assert [worker.metric("payment_unwanted_total", why=why) for why in ("unclear", "late")] == [1, 1]
        log = worker.log.read_text()
        assert log.count("no charge that is this order's") == log.count("charged after the order had ended") == 1
        assert declined in log
        assert await shop.violations() == []


async def test_money_that_is_refused_for_good_is_people_s_until_they_close_it(pipeline: Make) -> None:
    async with Bank() as bank:
        shop = pipeline(**bank_of({}, bank))
        await shop.start({"one": 1_000})
        refuses = True

        async def instead(path: str, key: str, body: dict[str, Any]) -> Said | None:
            return said(200, status="refused") if refuses and path == "/refunds" else None

        bank.instead = instead
        one, two = ids = await shop.produce(paid_for(shop, 2))
        assert await shop.finished(ids) == {"CONFIRMED": 2}
        assert "no money is refused" in (await shop.orderstream("payments", "list")).stdout
        for order_id in ids:
            assert (await shop.orderstream("order", "cancel", order_id)).returncode == 0
        await shop.eventually("SELECT count(*) FROM payments WHERE status = 'REFUSED'", 2)
        await shop.eventually("SELECT count(*) FROM waiting", 0)
        listed = orjson.loads((await shop.orderstream("payments", "list", "--json")).stdout)
        assert {row["order_id"]: (row["total_cents"], row["charge_id"]) for row in listed} == {
            order_id: (100, f"c-{order_id}") for order_id in ids
        }
        (worker,) = shop.workers
        assert worker.metric("payment_refused_total") == 2
        await shop_metric(worker, "payments_refused", 2)

        dry = await shop.orderstream("payments", "retry", "--all")
        assert (dry.returncode, "would be asked again" in dry.stdout) == (0, True)
        again = await shop.orderstream("payments", "retry", one)
        assert (again.returncode, again.stdout.split()) == (1, [one, "REFUSED"])
        assert bank.requests[-1][1:] == ("/refunds", f"refund-{one}")
        closed = await shop.orderstream("payments", "close", two, "--why", "bank transfer 4711")
        assert (closed.returncode, closed.stdout.split()) == (0, [two, "closed"])
        assert (await shop.orderstream("payments", "close", two, "--why", "twice")).returncode == 1
        asked, told = len(bank.requests), await shop.orderstream("payments", "retry", two)
        assert (told.returncode, told.stdout.strip()) == (1, f"{two}  closed: bank transfer 4711")
        assert "the provider was not asked" in told.stderr
        assert len(bank.requests) == asked
        refuses = False
        outbox = Outbox(shop.settings)  # what was commanded before it was closed, read again
        body = orjson.dumps({"command": "retry_payment", "order_id": two})
        outbox.order_command(two, body, product_partition("one", shop.settings.partitions))
        await (await shop.producer()).send(outbox.handovers())
        given = await shop.orderstream("payments", "retry", "--all", "--yes")
        assert (given.returncode, given.stdout.split()) == (0, [one, "REFUNDED"])
        for command in (("list",), ("retry", "--all"), ("retry", "--all", "--yes")):
            none = await shop.orderstream("payments", *command)
            assert (none.returncode, none.stdout) == (0, "no money is refused\n")
        assert "bank transfer 4711" in (await shop.orderstream("payments", "list", "--all")).stdout
        assert "bank transfer 4711" in (await shop.orderstream("order", "get", two)).stdout
        await shop_metric(worker, "payments_refused", 0)
        assert bank.standing.keys() == {two}
        assert await shop.violations() == []


async def shop_metric(worker: Worker, name: str, value: float) -> None:
    deadline = time.monotonic() + 25
    while (found := await asyncio.to_thread(worker.metric, name)) != value:
        assert time.monotonic() < deadline, (name, found)
        await asyncio.sleep(0.5)


async def test_a_worker_that_is_asked_to_leave_while_charges_are_under_way_leaves(pipeline: Make) -> None:
    async with Bank(latency_s=3.0) as bank:
        shop = pipeline(**bank_of({"payment_in_flight_max": 100}, bank))
        await shop.start({"one": 1_000})
        ids = await shop.produce(paid_for(shop, 300))
        for _ in range(2):
            await asyncio.sleep(1.5)
            assert shop.workers[-1].metric("payment_in_flight") > 50
            assert shop.workers[-1].stop() == 0, shop.workers[-1].tail()
            shop.add_worker()
            await shop.settled(1)
        assert await shop.finished(ids) == {"CONFIRMED": 300}
        await shop.eventually("SELECT count(*) FROM waiting", 0)
        assert len(bank.standing) == 300
        assert max(bank.asked.values()) > 1, "no request was under way when it left: the test shows nothing"
        assert await shop.violations() == []


async def test_the_provider_is_asked_at_a_bounded_rate_however_many_wait(pipeline: Make) -> None:
    async with Bank() as bank:
        rate = 250.0
        shop = pipeline(**bank_of({"payment_rate_max": rate, "hold_ttl_s": 3_600.0}, bank))
        stuck = True

        async def instead(path: str, key: str, body: dict[str, Any]) -> Said | None:
            return said(202, status="pending") if stuck else None

        bank.instead = instead
        await shop.start({"one": 100_000})
        orders = paid_for(shop, 3_000)
        await shop.produce(orders)
        await asyncio.sleep(5)
        shop.workers[0].kill()
        shop.add_worker()
        await shop.settled(1)
        await asyncio.sleep(10)
        times = [at for at, _, _ in bank.requests]
        most = max(sum(start <= at < start + 1 for at in times) for start in times[::20])
        assert 0.3 * rate < most <= rate * (1.2 + BURST_S), most
        stuck = False
        await shop.finished([order["order_id"] for order in orders], 150)
        assert len(bank.standing) == 3_000
        assert max(bank.asked.values()) == 1
