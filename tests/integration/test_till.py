"""The till against a provider over HTTP that does its worst: nothing is asked for ever, for nothing, too often, or twice."""

from __future__ import annotations

import asyncio
import gzip
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from orderstream import metrics
from orderstream.agents import pay
from orderstream.agents import till as module
from orderstream.agents.batches import Batch
from orderstream.agents.desk import AHEAD_MAX, IN_HAND_MAX, WAITING_AFTER_S, About, Desk, Entry
from orderstream.agents.lifecycle import Charged, Declined, Event, GivenBack, Order, Refused, Rejected
from orderstream.agents.provider import ANSWER_BYTES_MAX, Charge, HttpProvider
from orderstream.agents.till import FAILURES_MAX, REJECTED_MAX, Till
from orderstream.errors import OwnershipLost
from orderstream.streams.orders import Status
from tests.chaos.bank import Bank, Said

PATIENCE_S = 20.0
SILENCE = Said(0)
Say = Callable[[str, str, dict[str, Any]], Said | None]


def a_charge(cents: int = 100) -> Charge:
    """Return a charge that the bank makes: it declines one order of five."""
    while Bank.declines(order_id := str(uuid.uuid4())):
        pass
    return Charge(order_id, "u", "card", cents)


def said(status: int, /, **body: Any) -> Said:
    return Said(status, orjson.dumps(body))


def instead(say: Say) -> Callable[[str, str, dict[str, Any]], Awaitable[Said | None]]:
    async def answer(path: str, key: str, body: dict[str, Any]) -> Said | None:
        return say(path, key, body)

    return answer


class Asking:
    """A till, and what it has heard."""

    def __init__(self, bank: Bank, till: Till) -> None:
        self.bank, self.till = bank, till
        self.heard: dict[str, list[Event]] = {}

    def charge(self, charge: Charge, *, is_late: bool = False) -> Charge:
        assert self.till.charge(charge, is_late=is_late) is None
        return charge

    async def until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < deadline, (self.heard, self.bank.asked)
            await asyncio.sleep(0.01)
            self.hear()

    def hear(self) -> None:
        while self.till.answers:
            order_id, event = self.till.answers.popleft()
            self.heard.setdefault(order_id, []).append(event)

    async def answered(self, *charges: Charge) -> list[list[Event]]:
        """Wait until nothing is asked about these any more; return what was heard of each."""
        await self.until(lambda: not any(charge.order_id in self.till for charge in charges))
        self.hear()
        return [self.heard.get(charge.order_id, []) for charge in charges]

    def times(self, path: str, key: str | None = None) -> list[float]:
        return [at for at, asked, of in self.bank.requests if asked == path and key in (None, of)]


@asynccontextmanager
async def asking(
    *, in_flight: int = 50, rate: float = 10_000, pause_s: float = 0.4, timeout_s: float = 10.0, **bank: Any
) -> AsyncIterator[Asking]:
    async with Bank(**{"latency_s": 0.0, **bank}) as there:
        provider = HttpProvider(there.url, token="", timeout_s=timeout_s)
        till = Till(provider, in_flight, rate, pause_s, asyncio.Event())
        try:
            yield Asking(there, till)
        finally:
            till.close()
            await provider.close()


# A provider without void


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_without_a_void_a_charge_that_stands_is_found_under_its_key_and_refunded(status: int) -> None:
    async with asking() as shop:
        shop.bank.instead = instead(lambda path, key, body: Said(status) if path == "/voids" else None)
        one = shop.charge(a_charge())
        assert await shop.answered(one) == [[Charged(f"c-{one.order_id}", 100)]]
        shop.till.void(one)
        assert (await shop.answered(one))[0][1:] == [Charged(f"c-{one.order_id}"), GivenBack()]
        assert not shop.bank.standing
        assert shop.bank.asked[one.order_id] == 2


async def test_without_a_void_nothing_is_refunded_where_the_charge_is_declined() -> None:
    async with asking() as shop:
        shop.bank.instead = instead(
            lambda path, key, body: Said(404) if path == "/voids" else said(402) if path == "/charges" else None
        )
        one = a_charge()
        shop.till.void(one)
        assert await shop.answered(one) == [[GivenBack()]]
        assert not shop.times("/refunds")


async def test_without_a_void_people_have_to_look_where_the_charge_is_rejected_or_its_amount_not_known() -> None:
    async with asking(pause_s=0.05) as shop:
        shop.bank.instead = instead(lambda path, key, body: Said(404) if path == "/voids" else Said(400))
        one, other = a_charge(), a_charge(0)
        shop.till.void(one)
        shop.till.void(other)
        assert await shop.answered(one, other) == [[Refused()], [Refused()]]
        assert len(shop.times("/charges")) == REJECTED_MAX


# Configuration


@pytest.mark.parametrize("status", [401, 403, 404, 405])
async def test_a_provider_that_refuses_us_is_asked_little_declines_nobody_and_goes_on_by_itself(status: int) -> None:
    async with asking() as shop:
        broken = True
        shop.bank.instead = instead(lambda path, key, body: Said(status) if broken else None)
        with capture_logs() as lines:
            charges = [shop.charge(a_charge()) for _ in range(40)]
            await shop.until(lambda: held("misconfigured") == 1)
            await asyncio.sleep(0.3)
            charges += [shop.charge(a_charge()) for _ in range(100)]
            before = len(shop.bank.requests)
            await asyncio.sleep(1.5)
            assert len(shop.bank.requests) - before <= 8, "one request after each pause"
            assert not shop.heard
            broken = False
            assert await shop.answered(*charges) == [[Charged(f"c-{one.order_id}", 100)] for one in charges]
        assert held("misconfigured") == 0
        said_of_it = [line for line in lines if line["event"] in module.HELD.values()]
        assert len(said_of_it) == 1
        assert len(lines) < 6, lines
        assert len(shop.bank.standing) == 140


def held(why: str) -> float:
    return metrics.PAYMENTS_HELD.labels(why)._value.get()  # type: ignore[no-any-return]


async def test_one_order_that_is_refused_does_not_hold_the_others() -> None:
    async with asking(pause_s=0.05) as shop:
        bad = a_charge()
        shop.bank.instead = instead(lambda path, key, body: Said(403) if key == bad.order_id else None)
        shop.charge(bad)
        await shop.until(lambda: len(shop.times("/charges", bad.order_id)) > FAILURES_MAX + 2)  # alone, it does
        for _ in range(20):
            one = shop.charge(a_charge())
            assert await shop.answered(one) == [[Charged(f"c-{one.order_id}", 100)]]
        assert bad.order_id not in shop.heard


# A provider that does not work


@pytest.mark.parametrize("status", [500, 429, 302])
async def test_a_provider_that_fails_is_left_alone_until_it_works(status: int) -> None:
    async with asking(in_flight=10) as shop:
        broken = True
        shop.bank.instead = instead(lambda path, key, body: Said(status) if broken else None)
        charges = [shop.charge(a_charge()) for _ in range(500)]
        await shop.until(lambda: held("unavailable") == 1)
        await asyncio.sleep(0.5)
        before = len(shop.bank.requests)
        await asyncio.sleep(1.5)
        assert 2 <= len(shop.bank.requests) - before <= 8
        broken = False
        await shop.answered(*charges)
        assert len(shop.bank.standing) == 500
        assert set(shop.bank.asked.values()) == {1}


async def test_orders_that_a_provider_fails_at_do_not_hold_those_that_come_after_them() -> None:
    async with asking(in_flight=10) as shop:
        bad = {charge.order_id: charge for charge in (a_charge() for _ in range(300))}
        shop.bank.instead = instead(lambda path, key, body: Said(500) if key in bad else None)
        for charge in bad.values():
            shop.charge(charge)
        await shop.until(lambda: held("unavailable") == 1)
        for _ in range(30):
            began = time.monotonic()
            await shop.answered(shop.charge(a_charge()))
            assert time.monotonic() - began < 5.0
        assert not bad.keys() & shop.heard.keys()


# Requests a second


async def test_requests_keep_to_the_rate_and_what_is_asked_again_to_half_of_it() -> None:
    async with asking(in_flight=1_000, rate=200, pause_s=0.05) as shop:
        shop.bank.instead = instead(lambda path, key, body: said(202, status="pending"))
        for _ in range(2_000):
            shop.charge(a_charge(), is_late=True)
        await asyncio.sleep(3.0)
        began = shop.bank.requests[0][0]
        stuck = sum(at - began <= 2.5 for at, _, _ in shop.bank.requests)
        assert 150 < stuck <= 1.2 * 100 * (2.5 + module.BURST_S)
        shop.bank.instead = instead(lambda path, key, body: None if key in fresh else said(202, status="pending"))
        fresh = {charge.order_id for charge in (a_charge() for _ in range(50))}
        asked_at = time.monotonic()
        charges = [shop.charge(Charge(order_id, "u", "card", 100)) for order_id in fresh]
        assert all(await shop.answered(*charges))
        assert time.monotonic() - asked_at < 8, "50 orders at half of 200 a second, though 2,000 others wait"


async def test_what_waited_longer_is_asked_first() -> None:
    async with asking(in_flight=1, rate=200) as shop:
        charges = [shop.charge(a_charge(), is_late=True) for _ in range(30)]
        await shop.answered(*charges)
        assert [key for _, _, key in shop.bank.requests] == [charge.order_id for charge in charges]


async def test_with_room_for_one_request_every_other_one_is_the_first_of_its_order() -> None:
    async with asking(in_flight=1, latency_s=0.01) as shop:
        late = [shop.charge(a_charge(), is_late=True) for _ in range(30)]
        fresh = [shop.charge(a_charge()) for _ in range(10)]
        await shop.answered(*late, *fresh)
        asked = [key for _, _, key in shop.bank.requests]
        assert max(asked.index(charge.order_id) for charge in fresh) <= 2 * len(fresh)


async def test_orders_about_which_the_provider_is_silent_do_not_stop_the_others() -> None:
    async with asking(in_flight=20, timeout_s=4.0) as shop:
        silent = [a_charge() for _ in range(200)]
        ids = {charge.order_id for charge in silent}
        shop.bank.instead = instead(lambda path, key, body: SILENCE if key in ids else None)
        for charge in silent:
            shop.charge(charge, is_late=True)
        await asyncio.sleep(0.2)
        for _ in range(5):
            began = time.monotonic()
            await shop.answered(*(shop.charge(a_charge()) for _ in range(20)))
            assert time.monotonic() - began < 4.0, "no time-out of another order is waited for"


async def test_orders_about_which_the_provider_is_silent_leave_room_for_those_that_wait_in_postgres() -> None:
    async with asking(in_flight=10, timeout_s=0.1) as shop:
        shop.bank.instead = instead(lambda path, key, body: SILENCE)
        for _ in range(60):  # more than have their turn within a pause
            shop.charge(a_charge(), is_late=True)
        assert shop.till.is_full
        await shop.until(lambda: not shop.till.is_full)


# What is not accepted


@pytest.mark.parametrize("status", [400, 409, 422])
async def test_a_charge_that_is_rejected_each_time_ends_the_order_without_a_verdict(status: int) -> None:
    async with asking(pause_s=0.05) as shop:
        shop.bank.instead = instead(lambda path, key, body: Said(status) if path == "/charges" else None)
        one = shop.charge(a_charge())
        assert await shop.answered(one) == [[Rejected()]]
        assert len(shop.bank.requests) == REJECTED_MAX


async def test_a_charge_that_is_in_conflict_for_a_moment_is_made() -> None:
    async with asking(pause_s=0.05) as shop:
        shop.bank.instead = instead(
            lambda path, key, body: said(409) if len(shop.bank.requests) < REJECTED_MAX else None
        )
        one = shop.charge(a_charge())
        assert await shop.answered(one) == [[Charged(f"c-{one.order_id}", 100)]]


@pytest.mark.parametrize("path", ["/refunds", "/voids"])
async def test_money_that_is_refused_for_good_is_not_asked_for_again(path: str) -> None:
    async with asking(pause_s=0.05) as shop:
        shop.bank.instead = instead(lambda asked, key, body: said(200, status="refused") if asked == path else None)
        one = shop.charge(a_charge())
        await shop.answered(one)
        shop.till.refund(one, f"c-{one.order_id}") if path == "/refunds" else shop.till.void(one)
        assert (await shop.answered(one))[0][1:] == [Refused()]
        assert len(shop.times(path)) == 1


@pytest.mark.parametrize("status", [400, 402, 409, 422])
async def test_a_refund_that_is_rejected_each_time_is_refused(status: int) -> None:
    async with asking(pause_s=0.05) as shop:
        shop.bank.instead = instead(lambda path, key, body: Said(status))
        one = a_charge()
        shop.till.refund(one, "ch")
        assert await shop.answered(one) == [[Refused()]]
        assert len(shop.times("/refunds")) == REJECTED_MAX


BOMB = Said(200, gzip.compress(b"0" * 10_000_000), "Content-Encoding: gzip\r\n")
SENT: dict[str, Said] = {
    "a gzip bomb": BOMB,
    "a charge id of 3 MB": said(200, status="succeeded", charge_id="x" * 3_000_000),
    "an answer just too large": said(200, status="declined", more="x" * ANSWER_BYTES_MAX),
    "a charge id that is too long": said(200, status="succeeded", charge_id="x" * 256),
    "a number as charge id": said(200, status="succeeded", charge_id=7),
    "a true amount": said(200, status="succeeded", charge_id="c", amount_cents=True),
    "an amount as text": said(200, status="succeeded", charge_id="c", amount_cents="100"),
    "deeply nested": Said(200, b"[" * 8_000),
    "a header of 1 MB": Said(200, b"{}", f"X: {'x' * 1_000_000}\r\n"),
    "a header that is none": Said(200, b"{}", "no header\r\n"),
    "two lengths": Said(200, b"{}", "Content-Length: 7\r\n"),
    "pending for ever": said(202, status="pending"),
}


@pytest.mark.parametrize("sent", SENT.values(), ids=SENT.keys())
async def test_what_no_row_can_hold_is_an_unknown_outcome_and_asked_again(sent: Said) -> None:
    async with asking(pause_s=0.05) as shop:
        shop.bank.instead = instead(lambda path, key, body: sent if len(shop.bank.requests) < 4 else None)
        one = shop.charge(a_charge())
        assert await shop.answered(one) == [[Charged(f"c-{one.order_id}", 100)]]
        assert len(shop.bank.requests) == 4


async def test_unknown_outcomes_are_logged_once_in_a_while() -> None:
    async with asking(pause_s=0.05) as shop:
        shop.bank.instead = instead(lambda path, key, body: Said(200, b"no"))
        with capture_logs() as lines:
            for _ in range(200):
                shop.charge(a_charge())
            await shop.until(lambda: len(shop.bank.requests) > 1_000)
        assert len(lines) == 1


# Voids and charges of one order


async def test_a_void_waits_for_the_request_under_way_and_not_for_its_verdict() -> None:
    async with asking(timeout_s=0.4) as shop:
        shop.bank.instead = instead(lambda path, key, body: SILENCE if path == "/charges" else None)
        one = shop.charge(a_charge())
        await shop.until(lambda: len(shop.till) == 1 and len(shop.bank.requests) == 1)
        shop.till.void(one)
        assert await shop.answered(one) == [[GivenBack()]]
        asked = [path for _, path, _ in shop.bank.requests]
        assert asked == ["/charges", "/voids"]
        assert shop.times("/voids")[0] - shop.times("/charges")[0] >= 0.35


async def test_a_void_takes_the_place_of_a_charge_that_waits_to_be_asked_again() -> None:
    async with asking(pause_s=5.0) as shop:
        shop.bank.instead = instead(lambda path, key, body: Said(500) if path == "/charges" else None)
        one = shop.charge(a_charge())
        await shop.until(lambda: len(shop.bank.requests) == 2)
        await shop.until(lambda: not len(shop.till))
        shop.till.void(one)
        assert await shop.answered(one) == [[GivenBack()]]


async def test_a_void_that_overtakes_its_charge_leaves_no_charge() -> None:
    async with asking(timeout_s=0.3) as shop:
        voided = asyncio.Event()

        async def delay(path: str, key: str, body: dict[str, Any]) -> Said | None:
            if path == "/voids":
                asyncio.get_running_loop().call_later(0.2, voided.set)
            if path == "/charges":
                await voided.wait()
            return None

        shop.bank.instead = delay
        one = shop.charge(a_charge())
        await shop.until(lambda: len(shop.till) == 1)
        shop.till.void(one)
        assert await shop.answered(one) == [[GivenBack()]]
        await shop.until(lambda: shop.bank.asked[one.order_id] == 1)
        assert not shop.bank.standing
        assert not shop.bank.charges


async def test_a_success_that_is_heard_in_the_place_of_another_answer_is_handed_on() -> None:
    async with asking(pause_s=0.05) as shop:
        other, bad = str(uuid.uuid4()), "no order's id"
        answers = [
            said(200, status="succeeded", charge_id="stray", amount_cents=7, order_id=other),
            said(200, status="succeeded", charge_id="stray", order_id=bad),
            said(200, status="declined", order_id=other),
        ]
        shop.bank.instead = instead(lambda path, key, body: answers.pop(0) if answers else None)
        one = shop.charge(a_charge())
        assert await shop.answered(one) == [[Charged(f"c-{one.order_id}", 100)]]
        assert shop.heard[other] == [Charged("stray", 7)]
        assert shop.heard.keys() == {other, one.order_id}


# The end


async def test_a_till_that_is_closed_asks_nothing_and_is_silent() -> None:
    async with asking(in_flight=5, latency_s=0.2) as shop:
        charges = [shop.charge(a_charge()) for _ in range(50)]
        await shop.until(lambda: len(shop.bank.requests) > 3)
        shop.till.close()
        await asyncio.sleep(0.5)
        asked = len(shop.bank.requests)
        assert asked < 20
        shop.till.charge(a_charge(), is_late=False)  # of a batch that is still being finished
        await asyncio.sleep(0.5)
        assert len(shop.bank.requests) == asked
        assert not any(charge.order_id in shop.till for charge in charges)


async def test_what_has_another_owner_now_is_not_asked_any_more() -> None:
    async with asking(in_flight=1, latency_s=0.1) as shop:
        charges = [shop.charge(a_charge()) for _ in range(10)]
        shop.till.keep({charge.order_id for charge in charges[5:]})
        heard = await shop.answered(*charges)
        assert [bool(one) for one in heard] == [False] * 5 + [True] * 5
        assert Counter(shop.bank.asked).keys() <= {charge.order_id for charge in charges[:1] + charges[5:]}


async def test_an_order_can_be_let_go_of_until_its_request_is_under_way() -> None:
    async with asking(in_flight=1, latency_s=0.3) as shop:
        one, two = shop.charge(a_charge()), shop.charge(a_charge())
        await shop.until(lambda: len(shop.till) == 1)
        assert not shop.till.drop(one.order_id)
        assert shop.till.drop(two.order_id)
        assert shop.till.drop("of no order")
        assert await shop.answered(one, two) == [[Charged(f"c-{one.order_id}", 100)], []]


async def test_what_the_bank_declines_is_declined() -> None:
    async with asking() as shop:
        shop.bank.instead = instead(lambda path, key, body: said(402))
        one = shop.charge(a_charge())
        assert await shop.answered(one) == [[Declined()]]


async def test_orders_asked_about_in_vain_are_let_go_of_where_many_are_in_hand() -> None:
    """They wait in Postgres, and come again in their turn: others that wait there get theirs."""
    async with asking() as shop:
        desk = Desk(SimpleNamespace(traces=None), SimpleNamespace())  # type: ignore[arg-type]
        desk.till = shop.till
        at = datetime(2026, 1, 1, tzinfo=UTC)
        for n in range(IN_HAND_MAX // 2 + 2):
            order = Order(f"o{n}", 0, "u", "card", (("p", 1),), Status.RESERVED, "h", at, total_cents=1)
            desk.add(Entry(order, is_waiting=n != 1))
        shop.till.tired += [f"o{n}" for n in range(10)]
        pay.hear(desk, shop.till)
        assert len(desk.entries) == IN_HAND_MAX // 2
        assert desk.entries.keys() >= {"o1", *(f"o{n}" for n in range(3, 10))}
        assert not shop.till.tired
        desk.let_go(Entry(desk.entries["o3"].order, is_waiting=True), 0)  # from before it was taken in hand again
        assert "o3" in desk.entries


def test_orders_wait_once_they_have_been_in_hand_for_a_moment_those_taken_in_hand_again_later() -> None:
    desk = Desk(SimpleNamespace(traces=None), SimpleNamespace())  # type: ignore[arg-type]
    old, at = time.monotonic() - 2 * WAITING_AFTER_S, datetime(2026, 1, 1, tzinfo=UTC)

    def taken(n: int, since: float, **more: Any) -> Entry:
        order = Order(f"o{n}", 0, "u", "card", (("p", 1),), Status.RESERVED, "h", at, total_cents=1)
        desk.add(entry := Entry(order, since=since, **more))
        return entry

    first, second = taken(1, old), taken(2, old)
    taken(3, old)
    taken(4, old)
    over = taken(5, old)
    taken(6, old, is_waiting=True)
    del desk.entries[over.order.order_id]
    twice, again = taken(4, old + 0.1), taken(3, time.monotonic())
    assert desk.has_grown()
    assert desk.grown() == [first, second, twice]
    assert (desk.has_grown(), desk.grown()) == (False, [])
    again.since = old
    desk.young[0] = (old, desk.young[0][1])
    assert desk.grown() == [again]


async def test_no_more_orders_are_taken_in_while_commit_is_behind() -> None:
    desk = Desk(SimpleNamespace(traces=None), SimpleNamespace())  # type: ignore[arg-type]
    app: Any = SimpleNamespace(consumer_generation_id=1, pulse=SimpleNamespace(stood_still=lambda *_: False))
    app.conf = SimpleNamespace(broker_session_timeout=60.0)
    desk.inbox += [About("another", None)] * AHEAD_MAX
    await desk.room(Batch(app, []))
    desk.inbox.append(About("another", None))
    waiting = asyncio.create_task(desk.room(Batch(app, [])))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    desk.inbox.popleft()
    await asyncio.wait_for(waiting, PATIENCE_S)
    desk.inbox.append(About("another", None))
    waiting = asyncio.create_task(desk.room(Batch(app, [])))
    await asyncio.sleep(0)
    app.consumer_generation_id = 2
    with pytest.raises(OwnershipLost):  # never through a rebalance
        await waiting


async def test_no_more_is_read_while_much_waits_to_be_decided_and_the_provider_is_asked_meanwhile() -> None:
    async with asking() as shop:
        desk = Desk(SimpleNamespace(traces=None), SimpleNamespace())  # type: ignore[arg-type]
        order_id, at = a_charge().order_id, datetime(2026, 1, 1, tzinfo=UTC)
        desk.add(Entry(Order(order_id, 0, "u", "card", (("p", 1),), Status.RESERVED, "h", at, total_cents=1)))
        desk.inbox += [About("another", None)] * (pay.INBOX_MAX + 1)
        app: Any = SimpleNamespace(consumer_generation_id=1, pulse=SimpleNamespace(stood_still=lambda *_: False))
        app.conf = SimpleNamespace(broker_session_timeout=60.0)
        waiting = asyncio.create_task(pay.wait_for_room(desk, shop.till, Batch(app, [])))
        desk.pay(desk.entries[order_id])
        async with asyncio.timeout(PATIENCE_S):
            while len(desk.inbox) == pay.INBOX_MAX + 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert desk.inbox[-1] == About(order_id, Charged(f"c-{order_id}", 1))
        assert not waiting.done()
        desk.inbox.clear()
        await waiting
        desk.inbox += [About("another", None)] * (pay.INBOX_MAX + 1)
        waiting = asyncio.create_task(pay.wait_for_room(desk, shop.till, Batch(app, [])))
        await asyncio.sleep(0)
        app.consumer_generation_id = 2
        with pytest.raises(OwnershipLost):  # never through a rebalance
            await waiting
