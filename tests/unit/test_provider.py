"""Who charges: verdicts that never change, and outcomes that are known or reported as unknown, never guessed."""

from __future__ import annotations

import asyncio
import math
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from orderstream.agents.provider import (
    Back,
    Charge,
    HttpProvider,
    OutcomeUnknown,
    Provider,
    SimulatedProvider,
    Verdict,
    make_provider,
)
from orderstream.engines.process import free_port
from orderstream.settings import Settings, load

ORDERS = 20_000
IDS = [str(uuid.uuid5(uuid.NAMESPACE_OID, str(n))) for n in range(ORDERS)]
CHARGE = Charge("5e6e7e1c-2f52-4d2b-9a55-5d0e5a0c9a11", "u-1", "card", 1_250)


def simulated(rate: float, seed: int = 1, latency_s: tuple[float, float] = (0.0, 0.0)) -> SimulatedProvider:
    return SimulatedProvider(success_rate=rate, latency_min_s=latency_s[0], latency_max_s=latency_s[1], seed=seed)


def charged(provider: Provider, ids: list[str]) -> list[bool]:
    verdicts = [provider.charge(Charge(order_id, "u", "card", 100)) for order_id in ids]
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)
    return [isinstance(verdict, Verdict) and verdict.charge_id is not None for verdict in verdicts]


# Simulated


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.7, 0.99])
def test_the_share_of_charges_that_succeed_is_the_success_rate(rate: float) -> None:
    bound = 5 * math.sqrt(ORDERS * rate * (1 - rate))  # five standard deviations; the ids are always the same ones
    assert abs(sum(charged(simulated(rate), IDS)) - ORDERS * rate) < bound


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (1.0, ORDERS)])
def test_a_rate_of_0_or_1_is_exact(rate: float, expected: int) -> None:
    assert sum(charged(simulated(rate), IDS)) == expected


def test_the_verdict_on_an_order_never_changes() -> None:
    first = charged(simulated(0.5), IDS)
    provider = simulated(0.5)  # another process, after a crash
    assert charged(provider, IDS[::-1])[::-1] == first
    assert charged(provider, IDS) == first
    other = Charge(IDS[0], "somebody else", "cash", 1)
    assert simulated(0.5).charge(other) == simulated(0.5).charge(Charge(IDS[0], "u", "card", 100))


def test_the_verdict_does_not_hang_on_the_latency() -> None:
    async def slow() -> list[bool]:
        answers = [simulated(0.5, latency_s=(0.001, 0.002)).charge(Charge(i, "u", "card", 100)) for i in IDS[:200]]
        assert not any(isinstance(answer, Verdict) for answer in answers)
        verdicts = await asyncio.gather(*(answer for answer in answers if not isinstance(answer, Verdict)))
        return [verdict.charge_id is not None for verdict in verdicts]

    assert asyncio.run(slow()) == charged(simulated(0.5), IDS[:200])


def test_another_seed_declines_other_orders() -> None:
    one, other = charged(simulated(0.5), IDS), charged(simulated(0.5, seed=2), IDS)
    differing = sum(a != b for a, b in zip(one, other, strict=True))
    assert 0.45 < differing / ORDERS < 0.55


def test_a_higher_rate_declines_none_that_a_lower_one_charged() -> None:
    low, high = charged(simulated(0.3), IDS), charged(simulated(0.6), IDS)
    assert all(not was or still for was, still in zip(low, high, strict=True))


def test_each_charge_has_an_id_of_its_own() -> None:
    ids = {getattr(simulated(1.0).charge(Charge(i, "u", "card", 1)), "charge_id", None) for i in IDS[:1_000]}
    assert len(ids) == 1_000
    assert None not in ids


def test_a_charge_that_was_voided_is_declined_from_then_on() -> None:
    provider = simulated(1.0)
    asyncio.run(provider.void(CHARGE.order_id))
    assert provider.charge(CHARGE) == Verdict(None)


async def test_refunds_of_the_simulated_provider_are_done_at_once_and_may_be_repeated() -> None:
    provider = simulated(1.0)
    await provider.refund(IDS[0], "ch", 5)
    await provider.refund(IDS[0], "ch", 5)
    await provider.close()


@given(st.integers())
def test_every_seed_that_the_settings_take_works(seed: int) -> None:
    try:
        settings = Settings(payment_seed=seed, _env_file=None)
    except ValueError:
        assert not -(2**63) <= seed < 2**63
        return
    assert isinstance(make_provider(settings).charge(CHARGE), Verdict)


# Over HTTP

T = TypeVar("T")
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Shop:
    """A provider's server: answers as the test says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[tuple[str, str, Any, dict[str, str]]] = []
        self.answer: Answer = answering(json={"status": "succeeded", "charge_id": "ch-7"})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read() or b"null")
        self.asked.append((request.method, request.path, body, dict(request.headers)))
        return await self.answer(request)


def answering(status: int = 200, **what: Any) -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        if "json" in what:
            return web.Response(status=status, body=orjson.dumps(what["json"]), content_type="application/json")
        return web.Response(status=status, body=what.get("body", b""), headers=what.get("headers"))

    return answer


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    shop = Shop()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", shop.handle)
    server = TestServer(app)
    await server.start_server()
    shop.url = f"http://127.0.0.1:{server.port}/v1/"
    yield shop
    await server.close()


PATIENT_S, HASTY_S = 60.0, 0.3


@pytest.fixture
async def provider(shop: Shop) -> AsyncIterator[HttpProvider]:
    provider = HttpProvider(shop.url, token="t0ken", timeout_s=PATIENT_S)
    yield provider
    await provider.close()


@pytest.fixture
async def hasty(shop: Shop) -> AsyncIterator[HttpProvider]:
    provider = HttpProvider(shop.url, token="t0ken", timeout_s=HASTY_S)
    yield provider
    await provider.close()


async def test_a_charge_is_asked_for_under_the_orders_id(shop: Shop, provider: HttpProvider) -> None:
    assert await provider.charge(CHARGE) == Verdict("ch-7")
    ((method, path, body, headers),) = shop.asked
    assert (method, path) == ("POST", "/v1/charges")
    assert body == {
        "order_id": CHARGE.order_id,
        "user_id": "u-1",
        "payment_method": "card",
        "amount_cents": 1_250,
    }
    assert headers["Idempotency-Key"] == CHARGE.order_id
    assert headers["Authorization"] == "Bearer t0ken"
    assert headers["Content-Type"] == "application/json"


async def test_a_charge_that_is_asked_for_again_bears_the_same_key(shop: Shop, provider: HttpProvider) -> None:
    shop.answer = answering(503)
    with pytest.raises(OutcomeUnknown):
        await provider.charge(CHARGE)
    shop.answer = answering(json={"status": "succeeded", "charge_id": "ch-7"})
    await provider.charge(CHARGE)
    first, second = shop.asked
    assert (first[:3], first[3]["Idempotency-Key"]) == (second[:3], second[3]["Idempotency-Key"])


async def test_a_refund_bears_a_key_of_its_own(shop: Shop, provider: HttpProvider) -> None:
    await provider.charge(CHARGE)
    await provider.refund(CHARGE.order_id, "ch-7", 1_250)
    method, path, body, headers = shop.asked[1]
    assert (method, path) == ("POST", "/v1/refunds")
    assert body == {"order_id": CHARGE.order_id, "charge_id": "ch-7", "amount_cents": 1_250}
    assert headers["Idempotency-Key"] == f"refund-{CHARGE.order_id}"


async def test_a_void_names_the_order_alone_under_a_key_of_its_own(shop: Shop, provider: HttpProvider) -> None:
    await provider.void(CHARGE.order_id)
    ((method, path, body, headers),) = shop.asked
    assert (method, path, body) == ("POST", "/v1/voids", {"order_id": CHARGE.order_id})
    assert headers["Idempotency-Key"] == f"void-{CHARGE.order_id}"


async def test_without_a_token_none_is_sent(shop: Shop) -> None:
    provider = HttpProvider(shop.url, token="", timeout_s=5)
    await provider.charge(CHARGE)
    await provider.close()
    assert "Authorization" not in shop.asked[0][3]


@pytest.mark.parametrize(
    "answer",
    [
        answering(402),
        answering(402, json={"error": "card declined"}),
        answering(402, json=["declined"]),
        answering(402, body=b"Payment Required"),
        answering(200, json={"status": "declined"}),
        answering(201, json={"status": "declined", "charge_id": None}),
    ],
    ids=["402", "402 with JSON", "402 with a list", "402 with text", "declined", "declined, 201"],
)
async def test_a_declined_charge_is_a_verdict(shop: Shop, provider: HttpProvider, answer: Answer) -> None:
    shop.answer = answer
    assert await provider.charge(CHARGE) == Verdict(None)


async def never(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(10 * HASTY_S)
    return web.Response()


async def cut_off(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Length": "1000"})
    await answer.prepare(request)
    await answer.write(b'{"status": "succeeded", ')
    assert request.transport is not None
    request.transport.close()
    return answer


async def hung_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


UNKNOWN: dict[str, Answer] = {
    **{str(status): answering(status, body=b"no") for status in (400, 401, 403, 404, 409, 429, 500, 502, 503, 504)},
    "500 that claims success": answering(500, json={"status": "succeeded", "charge_id": "ch-7"}),
    "no body": answering(200),
    "204": answering(204),
    "text": answering(200, body=b"OK"),
    "half a JSON": answering(200, body=b'{"status": "succ'),
    "not UTF-8": answering(200, body=b'{"status": "\xff"}'),
    "a list": answering(200, json=[{"status": "succeeded", "charge_id": "ch-7"}]),
    "no status": answering(200, json={"charge_id": "ch-7"}),
    "another status": answering(200, json={"status": "pending", "charge_id": "ch-7"}),
    "no charge id": answering(200, json={"status": "succeeded"}),
    "an empty charge id": answering(200, json={"status": "succeeded", "charge_id": ""}),
    "a number as charge id": answering(200, json={"status": "succeeded", "charge_id": 7}),
    "a charge id that no row can hold": answering(200, json={"status": "succeeded", "charge_id": "a\0b"}),
    "a redirect": answering(302, headers={"Location": "/v1/elsewhere"}),
    "cut off": cut_off,
    "hung up": hung_up,
}


@pytest.mark.parametrize("answer", UNKNOWN.values(), ids=UNKNOWN.keys())
async def test_any_other_answer_is_an_unknown_outcome(shop: Shop, provider: HttpProvider, answer: Answer) -> None:
    shop.answer = answer
    with pytest.raises(OutcomeUnknown):
        await provider.charge(CHARGE)
    assert len(shop.asked) == 1, "asking again is the till's, with its pauses"


async def test_no_answer_in_time_is_an_unknown_outcome(shop: Shop, hasty: HttpProvider) -> None:
    shop.answer = never
    with pytest.raises(OutcomeUnknown):
        await hasty.charge(CHARGE)
    with pytest.raises(OutcomeUnknown):
        await hasty.refund(CHARGE.order_id, "ch-7", 1_250)


async def test_a_redirect_is_not_followed_to_somebody_elses_verdict(shop: Shop, provider: HttpProvider) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/charges"):
            return web.Response(status=303, headers={"Location": "/v1/elsewhere"})
        return web.json_response({"status": "succeeded", "charge_id": "not-ours"})

    shop.answer = answer
    with pytest.raises(OutcomeUnknown):
        await provider.charge(CHARGE)


async def test_a_provider_that_is_away_gives_an_unknown_outcome() -> None:
    provider = HttpProvider(f"http://127.0.0.1:{free_port()}", token="", timeout_s=5)
    with pytest.raises(OutcomeUnknown):
        await provider.charge(CHARGE)
    with pytest.raises(OutcomeUnknown):
        await provider.refund(CHARGE.order_id, "ch-7", 1)
    with pytest.raises(OutcomeUnknown):
        await provider.void(CHARGE.order_id)
    await provider.close()


@pytest.mark.parametrize(
    "answer", [answering(200), answering(204), answering(201, json={}), answering(200, body=b"OK")]
)
async def test_a_refund_or_a_void_is_done_with_any_2xx(shop: Shop, provider: HttpProvider, answer: Answer) -> None:
    shop.answer = answer
    assert await provider.refund(CHARGE.order_id, "ch-7", 1_250) is Back.GIVEN
    assert await provider.void(CHARGE.order_id) is Back.GIVEN
    assert len(shop.asked) == 2


@pytest.mark.parametrize("status", [200, 402, 409, 422])
async def test_money_is_refused_for_good_where_the_answer_says_so(
    shop: Shop, provider: HttpProvider, status: int
) -> None:
    shop.answer = answering(status, json={"status": "refused"})
    assert await provider.refund(CHARGE.order_id, "ch-7", 1_250) is Back.REFUSED
    assert await provider.void(CHARGE.order_id) is Back.REFUSED


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_a_provider_may_have_no_void(shop: Shop, provider: HttpProvider, status: int) -> None:
    shop.answer = answering(status)
    assert await provider.void(CHARGE.order_id) is Back.NO_VOID


async def test_a_provider_may_say_over_what_it_charged(shop: Shop, provider: HttpProvider) -> None:
    shop.answer = answering(json={"status": "succeeded", "charge_id": "ch-7", "amount_cents": 1_249})
    assert await provider.charge(CHARGE) == Verdict("ch-7", 1_249)


@pytest.mark.parametrize(
    "answer",
    [
        answering(402),
        answering(403),
        answering(202),
        answering(500),
        hung_up,
        answering(json={"order_id": "another's"}),
    ],
)
async def test_a_refund_or_a_void_that_is_not_told_to_be_done_is_unknown(
    shop: Shop, provider: HttpProvider, answer: Answer
) -> None:
    shop.answer = answer
    with pytest.raises(OutcomeUnknown):
        await provider.refund(CHARGE.order_id, "ch-7", 1_250)
    with pytest.raises(OutcomeUnknown):
        await provider.void(CHARGE.order_id)


async def test_a_provider_works_on_after_a_broken_connection(shop: Shop, provider: HttpProvider) -> None:
    good, shop.answer = shop.answer, hung_up
    with pytest.raises(OutcomeUnknown):
        await provider.charge(CHARGE)
    shop.answer = good
    assert await provider.charge(CHARGE) == Verdict("ch-7")


# Answers that come twice


class Stutterer:
    """A provider that gives answers a second time, 3 ms later, on the same connection.

    It declines one charge of five, and refuses to void one of seven.

    Attributes:
        naming: ``named``, ``bare``, or ``bare 402``: whether answers have an ``order_id``.
        doubled: share of the answers that it gives twice.
        charged: orders whose charge it was asked for.
        connections: how many were made.
    """

    def __init__(self, naming: str, doubled: float) -> None:
        self.naming, self.doubled, self.draw = naming, doubled, random.Random(7)
        self.charged: set[str] = set()
        self.voided: set[str] = set()
        self.connections = 0

    @staticmethod
    def verdict(path: str, order_id: str) -> str:
        number = int(order_id[:8], 16)
        if path == "/charges":
            return "succeeded" if number % 5 else "declined"
        return "succeeded" if number % 7 else "refused"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(line[16:] for line in head.lower().split("\r\n") if line.startswith("content-length: "))
                path, order_id = head.split()[1], orjson.loads(await reader.readexactly(int(length)))["order_id"]
                (self.charged if path == "/charges" else self.voided).add(order_id)
                answer = self.answer(path, order_id)
                writer.write(answer)
                if self.draw.random() < self.doubled:
                    asyncio.get_running_loop().call_later(0.003, writer.write, answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def answer(self, path: str, order_id: str) -> bytes:
        verdict = self.verdict(path, order_id)
        body = {"status": verdict, "charge_id": f"c-{order_id}", "order_id": order_id}
        status = 402 if verdict == "declined" and self.naming != "named" else 200
        if self.naming == "bare":
            del body["order_id"], body["charge_id"]
            body |= {"charge_id": "c"} if verdict == "succeeded" else {}
        text = b"" if status == 402 else orjson.dumps(body)
        return f"HTTP/1.1 {status} So\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text


@asynccontextmanager
async def stuttering(naming: str, doubled: float) -> AsyncIterator[tuple[Stutterer, HttpProvider]]:
    shop = Stutterer(naming, doubled)
    server = await asyncio.start_server(shop.serve, "127.0.0.1", 0)
    provider = HttpProvider(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", token="", timeout_s=PATIENT_S)
    try:
        yield shop, provider
    finally:
        await provider.close()
        server.close()


async def until_known(ask: Callable[[], Awaitable[T]]) -> T:
    for _ in range(100):
        with suppress(OutcomeUnknown):
            return await ask()
    raise AssertionError("never known")


@pytest.mark.parametrize("naming", ["named", "bare", "bare 402"])
async def test_an_answer_that_comes_twice_is_no_verdict_on_another_order_and_none_on_another_request(
    naming: str,
) -> None:
    async with stuttering(naming, 0.3) as (shop, provider):
        few, orders = asyncio.Semaphore(6), IDS[:600]

        async def one(order_id: str) -> None:
            async with few:
                verdict = await until_known(lambda: provider.charge(Charge(order_id, "u", "card", 100)))
                assert order_id in shop.charged, "told without being asked"
                assert (verdict.charge_id is not None) == (shop.verdict("/charges", order_id) == "succeeded")
                back = await until_known(lambda: provider.void(order_id))
                assert order_id in shop.voided
                assert back is (Back.GIVEN if shop.verdict("/voids", order_id) == "succeeded" else Back.REFUSED)

        async with asyncio.TaskGroup() as tasks:
            for order_id in orders:
                tasks.create_task(one(order_id))


@pytest.mark.parametrize(("naming", "connections"), [("named", 2), ("bare", 40)])
async def test_connections_are_kept_where_answers_name_their_order(naming: str, connections: int) -> None:
    async with stuttering(naming, 0.0) as (shop, provider):
        for order_id in IDS[:20]:
            await provider.charge(Charge(order_id, "u", "card", 100))
            await provider.void(order_id)
        assert shop.connections == connections


# Which one


def test_the_settings_name_the_provider() -> None:
    assert isinstance(make_provider(load(_env_file=None)), SimulatedProvider)
    assert isinstance(make_provider(load(_env_file=None, payment_provider="http")), HttpProvider)
