"""Admins are known by their tokens, and no answer has a token; what is no HTTP, or one too many, gets a problem document."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hmac
import inspect
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import jwt
import orjson
import pytest
import structlog
from aiohttp import web, web_protocol
from aiohttp.test_utils import make_mocked_request
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from orderstream import metrics
from orderstream.errors import SettingsError
from orderstream.http import protocol, security
from orderstream.http.exporter import begin
from orderstream.http.problems import Problem, problems
from orderstream.http.protocol import Bounds
from orderstream.http.rate import client_of
from orderstream.http.reading import read_body
from orderstream.http.security import Access, guard, read_keys, read_tokens
from orderstream.settings import load

TOKEN = "0123456789abcdef"


def access(**overrides: object) -> Access:
    return Access(load(_env_file=None, **overrides))


def refused(found: Access, *headers: str) -> Problem:
    request = make_mocked_request("PUT", "/", headers=[("Authorization", value) for value in headers])
    with pytest.raises(Problem) as caught:
        found.admin(request)
    return caught.value


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER   {TOKEN}"])
def test_an_admin_may_pass(header: str) -> None:
    access(admin_token=TOKEN).admin(make_mocked_request("PUT", "/", headers={"Authorization": header}))


@pytest.mark.parametrize(
    "header", ["", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer ", "Bearer é"]
)
def test_others_may_not_and_learn_nothing(header: str) -> None:
    problem = refused(access(admin_token=TOKEN), header)
    assert (problem.kind, problem.headers["WWW-Authenticate"].startswith("Bearer ")) == ("unauthorized", True)
    assert TOKEN not in str(problem) + str(problem.headers)


def test_one_without_a_token_and_one_with_two_may_not() -> None:
    assert refused(access(admin_token=TOKEN)).kind == "unauthorized"
    assert refused(access(admin_token=TOKEN), f"Bearer {TOKEN}", f"Bearer {TOKEN}").kind == "unauthorized"


@pytest.mark.parametrize("header", ["Bearer ", f"Bearer {TOKEN}"])
def test_without_a_token_in_the_settings_no_client_is_an_admin(header: str) -> None:
    assert refused(access(), header).kind == "admin-off"


def test_tokens_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    file = tmp_path / "tokens"
    file.write_text(f"# ops\n{TOKEN}2\n\nann@ops  {TOKEN}3\n")
    found = access(admin_token=TOKEN, admin_token_file=str(file))
    for token, name in ((TOKEN, "admin"), (f"{TOKEN}2", "admin"), (f"{TOKEN}3", "ann@ops")):
        compared.clear()
        assert found.admin(make_mocked_request("PUT", "/", headers={"Authorization": f"Bearer {token}"})) == name
        assert len(compared) == 3
        assert {len(digest) for pair in compared for digest in pair} == {32}


@pytest.mark.parametrize(
    "content",
    [b"", b"# nobody\n", b"short\n", b"sixteen signs and\n", b"ann x sixteen-signs-and\n", b"\xff" * 20, b"x" * 70_000],
)
def test_a_token_file_that_can_not_be_used_is_named_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_tokens(file)
    assert str(file) in str(caught.value)
    assert "short" not in str(caught.value)
    file.unlink()
    with pytest.raises(SettingsError, match="No such file"):
        read_tokens(file)
    file.touch(mode=stat.S_IWUSR)


# Customers

SECRET = "0123456789abcdef" * 4
RSA = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
SOON = {"exp": 4_000_000_000}


def named(found: Access, **headers: str) -> str | None:
    """Return the customer that a request with these headers names; "" where it is refused."""
    try:
        return found.customer(make_mocked_request("GET", "/", headers=headers))
    except Problem as problem:
        return "" if problem.kind == "unauthorized" and "WWW-Authenticate" in problem.headers else problem.kind


def signed(claims: dict[str, object], key: object = SECRET, algorithm: str = "HS256", **headers: str) -> str:
    return "Bearer " + jwt.encode(claims, key, algorithm, headers=headers)  # type: ignore[arg-type]


def test_without_a_setting_nobody_has_to_say_who_they_are() -> None:
    assert named(access(), Authorization="Bearer whatever") is None


def test_a_customer_is_who_the_proxy_names_once() -> None:
    found = access(customer_auth="header", customer_header="X-User", admin_token=TOKEN)
    assert named(found, **{"X-User": "7"}) == "7"
    assert named(found, Authorization=f"Bearer {TOKEN}", **{"X-User": "7"}) is None  # an admin
    for given in ({}, {"X-User": ""}, {"X-User": " "}, {"X-User": "x" * 65}, {"X-Customer-Id": "7"}):
        assert named(found, **given) == ""
    for headers, fault in (
        ([("X-User", "7"), ("X-User", "8")], "is given more than once"),
        ([], "is missing"),
        ([("X-User", "x" * 65)], "names no customer"),
    ):
        with pytest.raises(Problem, match=f"The header X-User {fault}") as caught:
            found.customer(make_mocked_request("GET", "/", headers=headers))
        assert caught.value.headers["WWW-Authenticate"] == 'Header realm="orderstream", name="X-User"'


def test_a_token_names_its_customer_as_long_as_it_is_valid() -> None:
    found = access(
        customer_auth="jwt", jwt_secret_token=SECRET, jwt_issuer="https://id", jwt_audience="shop", admin_token=TOKEN
    )
    claims: dict[str, object] = {**SOON, "sub": "7", "iss": "https://id", "aud": ["shop", "blog"]}
    assert named(found, Authorization=signed(claims)) == "7"
    assert named(found, Authorization=signed({**claims, "sub": 7})) == "7"
    assert named(found, Authorization=f"Bearer {TOKEN}") is None
    wrongs: list[dict[str, object]] = [
        {"exp": 1_000_000_000},
        {"exp": "4000000000"},
        {"exp": True},
        {"nbf": "1"},
        {"iat": "1"},
        {"nbf": 3_999_999_999},
        {"iss": "https://evil"},
        {"aud": "blog"},
        {"sub": ""},
        {"sub": None},
        {"sub": ["7"]},
        *(dict[str, object]({name: ...}) for name in claims),  # left out
    ]
    for wrong in wrongs:
        given = {name: value for name, value in {**claims, **wrong}.items() if value is not ...}
        assert named(found, Authorization=signed(given)) == "", wrong
    unsigned = jwt.encode(claims, "", algorithm="none")
    other = signed(claims, SECRET[::-1])
    for text in (
        "",
        f"Bearer {unsigned}",
        other,
        "Bearer a.b.c",
        signed(claims, algorithm="HS384"),
        signed(claims) + "x",
    ):
        assert named(found, **({"Authorization": text} if text else {})) == "", text
    assert (
        named(access(customer_auth="jwt", jwt_secret_token=SECRET), Authorization=signed(claims)) == ""
    )  # of an audience


def test_keys_are_a_set_or_one_in_pem_and_never_a_secret(tmp_path: Path) -> None:
    file, pem = tmp_path / "keys", RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    young = jwt.algorithms.RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True) | {"kid": "young", "alg": "RS256"}
    old_key = ec.generate_private_key(ec.SECP256R1())
    old = jwt.algorithms.ECAlgorithm.to_jwk(old_key.public_key(), as_dict=True) | {"kid": "old"}
    claims: dict[str, object] = {**SOON, "uid": "7"}

    file.write_bytes(orjson.dumps({"keys": [young, old]}))
    found = access(customer_auth="jwt", jwt_key_file=str(file), jwt_claim="uid")
    assert named(found, Authorization=signed(claims, RSA, "RS256", kid="young")) == "7"
    assert named(found, Authorization=signed(claims, old_key, "ES256", kid="old")) == "7"
    for token in (
        signed(claims, RSA, "RS256", kid="old"),
        signed(claims, RSA, "RS256", kid="lost"),
        signed(claims, RSA, "RS512", kid="young"),
    ):
        assert named(found, Authorization=token) == ""

    file.write_bytes(pem)
    found = access(customer_auth="jwt", jwt_key_file=str(file), jwt_claim="uid")
    assert named(found, Authorization=signed(claims, RSA, "RS256", kid="any")) == "7"
    head, body = (base64.urlsafe_b64encode(orjson.dumps(part)).rstrip(b"=") for part in ({"alg": "HS256"}, claims))
    mac = base64.urlsafe_b64encode(hmac.digest(pem, head + b"." + body, "sha256")).rstrip(b"=")
    assert named(found, Authorization=f"Bearer {b'.'.join((head, body, mac)).decode()}") == ""

    for content in (b"", b"secret", b"{}", b'{"keys": []}', b'{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}'):
        file.write_bytes(content)
        with pytest.raises(SettingsError, match="JWT_KEY_FILE"):
            read_keys(file)


@pytest.mark.parametrize(
    ("peer", "forwarded", "hops", "client"),
    [
        ("10.0.0.1", [], 0, "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4"], 0, "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4"], 1, "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4"], 1, "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6", "1.2.3.4, 10.0.0.2"], 2, "1.2.3.4"),
        ("10.0.0.1", [], 1, "10.0.0.1"),
        ("10.0.0.1", ["x" * 1_000], 1, "unknown"),
        ("2001:db8::1:2:3:4", [], 0, "2001:db8::/64"),
        ("::ffff:1.2.3.4", [], 0, "1.2.3.4"),
    ],
)
def test_a_client_is_who_the_nearest_trusted_hop_saw(peer: str, forwarded: list[str], hops: int, client: str) -> None:
    request = make_mocked_request("GET", "/", headers=[("X-Forwarded-For", entry) for entry in forwarded])
    assert client_of(request.clone(remote=peer), hops) == client


# Before there is a request


@asynccontextmanager
async def serving(limits: Bounds) -> AsyncIterator[int]:
    """Serve with these bounds; give the port."""

    async def health(_request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def take(request: web.Request) -> web.Response:
        return web.Response(body=await read_body(request))

    app = web.Application(middlewares=[problems])
    app.router.add_get("/health", health)
    app.router.add_post("/orders", take)
    app.on_response_prepare.append(guard)
    runner = protocol.Runner(app, limits, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with serving(Bounds(100, 100)) as found:
        yield found


async def exchange(port: int, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes; return status, headers and body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    found = await answer_of(reader)
    writer.close()
    return found


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Read until the end of the connection; return status, headers and body of the answer."""
    head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


@pytest.mark.parametrize(
    ("data", "status", "kind"),
    [
        (b"BLA\r\n\r\n", 400, "malformed-request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "malformed-request"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", 400, "malformed-request"),
        (
            b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            400,
            "malformed-request",
        ),
        (
            b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 200-maybe\r\n\r\n",
            417,
            "expectation-failed",
        ),
        (b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "uri-too-long"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 17_000 + b"\r\n\r\n", 431, "headers-too-large"),
    ],
    ids=["no http", "tls", "header", "two lengths", "expect", "line", "header size"],
)
async def test_what_can_not_be_read_is_a_problem_too(port: int, data: bytes, status: int, kind: str) -> None:
    found, headers, body = await exchange(port, data)
    problem = orjson.loads(body)
    assert (found, problem["status"], problem["type"]) == (status, status, f"urn:orderstream:problem:{kind}")
    assert headers["Content-Type"] == "application/problem+json"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Server"] == "orderstream"
    assert b"aiohttp" not in body + str(headers).encode()


async def test_every_answer_carries_the_headers_that_guard_it(port: int) -> None:
    for path in (b"/health", b"/nowhere"):
        _, headers, _ = await exchange(port, b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert security.HEADERS.items() <= headers.items()


async def test_a_connection_that_sends_no_whole_head_is_closed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "IDLE_S", 0.3)
    runner = protocol.Runner(web.Application(), Bounds(100, 100), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", runner.addresses[0][1])
        writer.write(b"GET /health HTTP/1.1\r\nHost")
        assert await asyncio.wait_for(reader.read(), 10) == b""
    finally:
        await runner.cleanup()


POST = b"POST /orders HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
CHUNKED, LONG = POST + b"Transfer-Encoding: chunked\r\n\r\n", POST + b"Content-Length: 100\r\n\r\n{}"


@pytest.mark.parametrize(
    ("parts", "end", "kind"),
    [
        ([LONG], "reset", None),
        ([LONG], "half", "incomplete-body"),
        ([CHUNKED + b"5\r\n{}"], "half", "incomplete-body"),
        ([POST + b"Expect: 100-continue\r\nContent-Length: 100\r\n\r\n"], "reset", None),
        ([LONG.replace(b"/orders", b"/nowhere")], "half", "not-found"),
        ([CHUNKED + b"2\r\n{}\r\n", b"zz\r\n"], "", "incomplete-body"),
        ([POST + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd"], "", "unsupported-media-type"),
        ([POST + b"Content-Encoding: br\r\nContent-Length: 4\r\n\r\nabcd"], "", "unsupported-media-type"),
        (
            [POST + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n14\r\n" + gzip.compress(b"")[:20]],
            "half",
            "unsupported-media-type",
        ),
        (
            [b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Encoding: gzip\r\n"
             b"Content-Length: 4\r\n\r\nabcd"],
            "",
            "",
        ),
    ],
    ids=["reset", "closed", "closed in a chunk", "reset before it", "closed, no path", "chunk", "gzip",
         "brotli", "gzip, closed", "get"],
)  # fmt: skip
async def test_a_body_that_does_not_come_whole_or_does_not_decode_is_no_fault_of_ours(
    port: int, parts: list[bytes], end: str, kind: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with structlog.testing.capture_logs() as logged:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.1)
        if end == "reset":
            writer.transport.abort()
        elif end == "half":
            writer.write_eof()
        if kind is None:
            assert end == "reset" or await asyncio.wait_for(reader.read(), 10) == b""
        else:
            status, _, body = await answer_of(reader)
            assert (status, body) == (200, b"ok") if not kind else orjson.loads(body)["type"].endswith(f":{kind}")
        writer.close()
        assert (await exchange(port, POST + b"Content-Length: 2\r\n\r\n{}"))[0] == 200
    assert logged == []
    assert [record for record in caplog.records if record.name.startswith("aiohttp")] == []


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        (HEALTH, [b"ok"]),
        (POST + b"Content-Length: 2\r\n\r\n{}", [b"{}"]),
        (HEALTH * 40, [b"ok"] * 40),
        (HEALTH + LONG, [b"ok", b"incomplete-body"]),
        (HEALTH[:-2], []),
        (b"", []),
    ],
    ids=["get", "post", "many", "half a body", "half a head", "nothing"],
)
@pytest.mark.parametrize("before", [b"", HEALTH])
async def test_who_sends_nothing_more_gets_the_answers_and_then_the_end(
    port: int, sent: bytes, answers: list[bytes], before: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    if before:
        writer.write(before)
        await asyncio.wait_for(reader.readuntil(b"ok"), 10)
    writer.write(sent)
    writer.write_eof()
    found = (await asyncio.wait_for(reader.read(), 5)).split(b"HTTP/1.1 ")[1:]
    assert len(found) == len(answers)
    assert all(answer in one for answer, one in zip(answers, found, strict=True))
    assert [record for record in caplog.records if record.name.startswith("aiohttp")] == []
    writer.close()


async def test_a_coding_that_is_none_is_taken(port: int) -> None:
    assert (await exchange(port, POST + b"Content-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}"))[0] == 200
    assert "other than `identity`" in (Path(__file__).resolve().parents[2] / "docs" / "API.md").read_text()


async def test_a_body_that_would_be_too_large_is_not_waited_for(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(POST + b"Content-Length: 99999999999\r\n\r\n{")
    assert await asyncio.wait_for(reader.readline(), 5) == b"HTTP/1.1 413 Request Entity Too Large\r\n"
    writer.close()


# More connections than are taken


async def idle(port: int, source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect, and send nothing."""
    return await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))


async def asked(one: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> bytes:
    """Ask for the health on a connection, which stays open."""
    one[1].write(HEALTH)
    return (await asyncio.wait_for(one[0].readuntil(b"ok"), 10)).splitlines()[0]


async def test_a_client_has_so_many_connections_without_a_request_and_others_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "SETTLED_S", 0.3)
    begin("ingress")

    def closed() -> float:
        return float(metrics.HTTP_OVERLOADED.labels("idle_connections")._value.get())

    before = closed()
    with structlog.testing.capture_logs() as logged:
        async with serving(Bounds(100, 5)) as port:
            burst = [await idle(port) for _ in range(8)]
            assert [await asked(one) for one in burst] == [b"HTTP/1.1 200 OK"] * 8, "none of a burst is refused"
            await asyncio.sleep(0.4)
            refused = await idle(port)  # it sends nothing
            status, headers, body = await answer_of(refused[0])
            assert (status, orjson.loads(body)["type"]) == (503, "urn:orderstream:problem:overloaded")
            assert security.HEADERS.items() <= headers.items()
            assert (headers["Connection"], int(headers["Retry-After"]) > 0) == ("close", True)
            assert (await exchange(port, HEALTH))[0] == 503
            assert await asked(await idle(port, "127.0.0.2")) == b"HTTP/1.1 200 OK"
            assert closed() - before == 5, "two refused, three closed"
            # Those beyond the bound were closed, and with a request in hand a connection is not idle.
            assert [await asyncio.wait_for(one[0].read(), 10) for one in burst[5:]] == [b""] * 3
            burst[0][1].close()
            await asyncio.sleep(0.1)
            assert await asked(await idle(port)) == b"HTTP/1.1 200 OK"
    (line,) = [line for line in logged if line["event"] == "connections are refused"]
    assert (line["client"], line["at_most"], line["why"]) == ("127.0.0.1", 5, "idle_connections")


async def test_at_the_bound_on_all_connections_a_further_one_is_told_so() -> None:
    begin("ingress")
    with structlog.testing.capture_logs() as logged:
        async with serving(Bounds(3, 100)) as port:
            first = [await idle(port) for _ in range(3)]
            assert await asked(first[0]) == b"HTTP/1.1 200 OK"
            status, _, body = await exchange(port, HEALTH)
            assert (status, orjson.loads(body)["detail"].startswith("3 connections are open.")) == (503, True)
            first[1][1].close()
            await asyncio.sleep(0.1)
            assert await asked(await idle(port)) == b"HTTP/1.1 200 OK"
    assert [line["why"] for line in logged if line["event"] == "connections are refused"] == ["connections"]


def test_aiohttp_has_what_the_protocol_replaces() -> None:
    assert list(inspect.signature(web_protocol.RequestHandler.handle_error).parameters) == [
        "self",
        "request",
        "status",
        "exc",
        "message",
    ]
    assert "await self._handle_request(request, start, request_handler)" in inspect.getsource(
        web_protocol.RequestHandler.start
    ).replace("coro =", "await")
    assert "self._connections[handler]" in inspect.getsource(web.Server.connection_made)
    assert "RequestHandler(self, loop=self._loop, **self._kwargs)" in inspect.getsource(web.Server.__call__)
    assert "self._app._make_handler(" in inspect.getsource(web.AppRunner._make_server)
