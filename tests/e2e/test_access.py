"""Engines as people have them: Kafka by TLS and SASL, Redis by TLS and Sentinel, Postgres behind PgBouncer."""

from __future__ import annotations

import asyncio
import os
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
import redis

from orderstream.agents.app import check_engines
from orderstream.engines.child import environment
from orderstream.engines.local import LocalEngines
from orderstream.engines.process import Process, free_port
from orderstream.engines.programs import Programs
from orderstream.errors import EngineRefused, EngineUnavailable
from orderstream.jobs.init import init
from orderstream.settings import Settings
from tests import forked, secured
from tests.conftest import ENGINES, ROOT, MakeSettings, find_program
from tests.harness import Pipeline, ingress
from tests.secured import SIGN, Certificates, SecuredEngines, Server

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]
PATH = "/api/v1/orders"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def kafka(certificates: Certificates) -> Iterator[SecuredEngines]:
    """A Kafka that asks for passwords, tokens or certificates."""
    me = Process.of(os.getpid())
    assert me is not None
    folder = ENGINES / f"{me.pid}-{me.birth.rpartition('/')[2]}.secured"
    local = SecuredEngines(folder, kafka_libs=ROOT / ".local" / "kafka" / "libs", say=print)
    try:
        local.up_with(certificates)
        yield local
    finally:
        local.remove()


@contextmanager
def pgbouncer(engines: LocalEngines, certificates: Certificates, mode: str, run_id: str) -> Iterator[int]:
    """Run a PgBouncer before the engines' Postgres; give its port."""
    program = find_program("pgbouncer", [("pgbouncer",)])
    postgres = urlsplit(engines.addresses()["database_url"]).port
    assert postgres is not None
    folder = Path(f"/var/tmp/orderstream-pgbouncer-{run_id}")  # its account can't enter ours
    with secured.pgbouncer(program, folder, postgres, certificates, mode) as port:
        yield port


def behind_pgbouncer(url: str, port: int, certificates: Certificates, **other: str) -> str:
    """Return the address of a database through a PgBouncer: the second of two hosts, the first does not exist."""
    user = f"{secured.USER}:{quote(other.get('password', secured.POSTGRES_PASSWORD), safe='')}"
    database = other.get("database", urlsplit(url).path[1:])
    ca = other.get("ca", certificates.ca)
    hosts = f"127.0.0.1:{free_port()},localhost:{port}"
    return f"postgresql://{user}@{hosts}/{database}?sslmode=verify-full&sslrootcert={ca}"


async def own(url: str) -> None:
    """Give a database to a user who is no superuser, and who has a password."""
    connection = await asyncpg.connect(url)
    try:
        if not await connection.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", secured.USER):
            password = await connection.fetchval("SELECT quote_literal($1)", secured.POSTGRES_PASSWORD)
            await connection.execute(f"CREATE ROLE {secured.USER} LOGIN PASSWORD {password}")
        await connection.execute(f"ALTER DATABASE {urlsplit(url).path[1:]} OWNER TO {secured.USER}")
    finally:
        await connection.close()


def admin_of(port: int, certificates: Certificates, password: str) -> redis.Redis:
    return redis.Redis(port=port, ssl=True, ssl_ca_certs=str(certificates.ca), password=password)


ACL = (
    "on >{password} ~{prefix}:* &{prefix}:* -@all +@read +@write +@scripting +@pubsub +@connection +@transaction +info"
)
"""As docs/ENGINES.md has it."""


@contextmanager
def redis_with_users(folder: Path, certificates: Certificates, prefix: str) -> Iterator[str]:
    """Run a Redis by TLS whose users may do what they need; give its address without its user."""
    program, port = Programs().redis(), free_port()
    assert program is not None
    users = {
        secured.USER: ACL.format(password=secured.REDIS_PASSWORD, prefix=prefix),
        "guest": f"on >{secured.REDIS_PASSWORD} -@all +@connection",
    }
    options = [part for name, rule in users.items() for part in ("--user", name, *rule.split(" "))]
    command = secured.redis_command(program, port, certificates, *options, "--requirepass", secured.REDIS_PASSWORD)
    with secured.ended([Server("redis", command, folder)]) as (server,):
        admin = admin_of(port, certificates, secured.REDIS_PASSWORD)
        server.await_answer(admin.ping, (redis.RedisError,))
        admin.close()
        yield f"localhost:{port}/0?ssl_ca_certs={certificates.ca}"


@contextmanager
def sentinels(folder: Path, certificates: Certificates) -> Iterator[tuple[str, Callable[[], None]]]:
    """Run a primary, its replica and three sentinels; give their address, and a call that kills the primary."""
    program = Programs().redis()
    assert program is not None
    primary, replica, *ports = (free_port() for _ in range(5))
    password = ("--requirepass", secured.REDIS_PASSWORD, "--masterauth", secured.REDIS_PASSWORD)
    with secured.ended([]) as servers:
        for name, port, more in (
            ("primary", primary, ()),
            ("replica", replica, ("--replicaof", "127.0.0.1", str(primary))),
        ):
            (folder / name).mkdir()
            command = secured.redis_command(program, port, certificates, *password, *more)
            servers.append(Server(name, command, folder / name))
        at_replica = admin_of(replica, certificates, secured.REDIS_PASSWORD)
        servers[1].await_answer(lambda: _in_step(at_replica), (redis.RedisError, KeyError))
        for port in ports:
            file = str(secured.sentinel_file(folder, primary))
            command = [program, file, "--sentinel", *secured.redis_command(program, port, certificates)[1:]]
            command += ["--requirepass", secured.SENTINEL_PASSWORD]
            servers.append(Server(f"sentinel-{port}", command, folder))
        for server, port in zip(servers[2:], ports, strict=True):
            watching = admin_of(port, certificates, secured.SENTINEL_PASSWORD)
            server.await_answer(partial(_sees_all, watching), (redis.RedisError, KeyError))
            watching.close()
        at_replica.close()
        options = {"sentinel_password": secured.SENTINEL_PASSWORD, "ssl_ca_certs": str(certificates.ca)}
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in options.items())
        hosts = ",".join(f"localhost:{port}" for port in (free_port(), *ports))
        entry = f":{quote(secured.REDIS_PASSWORD, safe='')}"
        yield f"rediss+sentinel://{entry}@{hosts}/{secured.USER}/0?{query}", servers[0].kill


def _in_step(replica: redis.Redis) -> None:
    found: Any = replica.info("replication")
    if found["master_link_status"] != "up":
        raise KeyError("it does not follow yet")


def _sees_all(sentinel: redis.Redis) -> None:
    state: Any = sentinel.sentinel_master(secured.USER)
    if (state["num-slaves"], state["num-other-sentinels"]) != (1, 2):
        raise KeyError("it does not see all of them yet")


def by_password(mechanism: str, certificates: Certificates, **more: Any) -> dict[str, Any]:
    return {
        "kafka_security_protocol": "SASL_SSL",
        "kafka_sasl_mechanism": mechanism,
        "kafka_sasl_username": secured.USER,
        "kafka_sasl_password": secured.KAFKA_PASSWORD,
        "kafka_ssl_ca_file": str(certificates.ca),
        **more,
    }


def by_certificate(certificates: Certificates) -> dict[str, Any]:
    return {
        "kafka_security_protocol": "SSL",
        "kafka_ssl_ca_file": str(certificates.ca),
        "kafka_ssl_cert_file": str(certificates.client),
        "kafka_ssl_key_file": str(certificates.client_key),
        "kafka_ssl_key_password": secured.KEY_PASSWORD,
    }


PLAINTEXT: dict[str, Any] = {
    name: field.default for name, field in Settings.model_fields.items() if name.startswith(("kafka_sasl", "kafka_ssl"))
}
"""What is not given of these stands as by default: a process gets the settings of its pipeline otherwise."""


async def orderstream(settings: Settings, *arguments: str) -> str:
    """Run a command that must succeed; return what it says."""
    ran = await asyncio.to_thread(forked.orderstream, environment(settings), *arguments)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


@asynccontextmanager
async def buying(shop: Pipeline) -> AsyncIterator[Callable[[], Any]]:
    """Run an ingress; give a call that places an order by HTTP, waits for its verdict and its end."""
    async with ingress(shop) as (client, _):

        async def buy() -> None:
            order = {"user_id": "u", "items": [{"product_id": "a", "quantity": 1}], "payment_method": "card"}
            answer = await client.post(PATH, json=order)
            held = await answer.json()
            assert (answer.status, held["status"]) == (201, "RESERVED"), held
            assert await shop.finished([held["order_id"]]) == {"CONFIRMED": 1}
            ready = await client.get("/ready")
            assert ready.status == 200, await ready.text()

        yield buy


def logs(shop: Pipeline) -> str:
    return "\n".join(log.read_text() for log in shop.folder.glob("*.log"))


class Ways(NamedTuple):
    """Engines that ask for passwords.

    Attributes:
        settings: by which all of them are entered.
        by_token: the same of Kafka, by a token.
        behind: what gives the address of the database behind PgBouncer.
        redis: what of Redis's address comes after user and password.
    """

    settings: dict[str, Any]
    by_token: dict[str, Any]
    behind: Callable[..., str]
    redis: str


@pytest.fixture
async def ways(
    kafka: SecuredEngines,
    engines: LocalEngines,
    certificates: Certificates,
    database_url: str,
    redis_prefix: str,
    run_id: str,
    tmp_path: Path,
) -> AsyncIterator[Ways]:
    """Engines that ask for passwords; a PgBouncer that shares by transaction."""
    await own(database_url)
    async with AsyncExitStack() as stack:
        port = stack.enter_context(pgbouncer(engines, certificates, "transaction", run_id))
        users = stack.enter_context(redis_with_users(tmp_path, certificates, redis_prefix))
        tokens_url = await stack.enter_async_context(secured.token_server())
        behind = partial(behind_pgbouncer, database_url, port, certificates)
        entries = {
            "kafka": kafka.sasl,
            **by_password("SCRAM-SHA-512", certificates),
            "redis_url": f"rediss://{secured.USER}:{quote(secured.REDIS_PASSWORD, safe='')}@{users}",
            "database_url": behind(),
        }
        by_token = {"kafka_sasl_mechanism": "OAUTHBEARER", "kafka_sasl_oauth_url": tokens_url}
        yield Ways(entries, by_token, behind, users)


async def test_passwords_and_tokens_behind_a_pgbouncer_that_shares_by_transaction(ways: Ways, pipeline: Make) -> None:
    async with AsyncExitStack() as stack:
        shop = pipeline(**ways.settings, verdict_timeout_s=20.0, log_level="debug", log_format="console")
        stack.push_async_callback(shop.close)
        await shop.start({"a": 200, "b": 1}, workers=2, **ways.by_token)
        async with buying(shop) as buy:
            await buy()
            ids = await shop.produce(shop.order(("a", 1), ("b", 1)) for _ in range(100))
            assert (await shop.finished(ids))["CONFIRMED"] == 1
            plain = shop.settings.model_copy(update={"kafka_sasl_mechanism": "PLAIN"})
            said = [await orderstream(plain, "order", "place", "--item", "a=1")]
            said += [await orderstream(plain, "reconcile", "--from-beginning") for _ in range(2)]
            said += [
                await orderstream(plain, *command) for command in (("init",), ("config",), ("status",), ("verify",))
            ]
            await buy()
        assert await shop.violations() == []
        store = await shop.store()
        processes = {await store.pool.fetchval("SELECT pg_backend_pid()") for _ in range(20)}
        assert len(processes) > 1, "one connection of PgBouncer's: the test shows nothing"
        assert all(worker.metric("redis_fallbacks_total") == 0 for worker in shop.workers)
        for worker in shop.workers:
            assert await asyncio.to_thread(worker.stop) == 0
        assert SIGN not in logs(shop) + "".join(said)


async def test_certificates_behind_a_pgbouncer_that_shares_by_session_and_a_failover_of_redis(
    kafka: SecuredEngines,
    engines: LocalEngines,
    certificates: Certificates,
    pipeline: Make,
    database_url: str,
    run_id: str,
    tmp_path: Path,
) -> None:
    await own(database_url)
    async with AsyncExitStack() as stack:
        port = stack.enter_context(pgbouncer(engines, certificates, "session", run_id))
        url, kill_primary = stack.enter_context(sentinels(tmp_path, certificates))
        shop = pipeline(
            **by_certificate(certificates),
            kafka=kafka.mutual,
            redis_url=url,
            database_url=behind_pgbouncer(database_url, port, certificates),
            verdict_timeout_s=20.0,
            postgres_pool_max=4,
        )
        stack.push_async_callback(shop.close)
        by_scram = by_password("SCRAM-SHA-256", certificates, kafka=kafka.sasl)
        await shop.start({"a": 200}, **{**PLAINTEXT, **by_scram})
        (worker,) = shop.workers
        async with buying(shop) as buy:
            await buy()
            epochs = worker.metric("redis_epochs_total")
            assert (worker.metric("redis_fallbacks_total"), epochs > 0) == (0, True)
            kill_primary()
            deadline = asyncio.get_running_loop().time() + 30
            while worker.metric("redis_epochs_total") == epochs:  # orders go on meanwhile, Postgres decides them
                assert asyncio.get_running_loop().time() < deadline, worker.tail()
                await shop.finished(await shop.produce([shop.order(("a", 1))]))
            await asyncio.sleep(1)  # the ingress subscribes at the new primary by itself
            await buy()
            said = await orderstream(shop.settings, "verify")
        assert await shop.violations() == []
        assert await asyncio.to_thread(worker.stop) == 0
        assert SIGN not in logs(shop) + said


async def test_who_is_not_let_in_is_told_so(
    ways: Ways, kafka: SecuredEngines, certificates: Certificates, make_settings: MakeSettings
) -> None:
    entries, password = ways.settings, quote(secured.REDIS_PASSWORD, safe="")
    await init(make_settings(**entries))
    wrong, other_ca = "wr0ng-s3cret", str(certificates.other_ca)
    elsewhere = ways.redis.replace(str(certificates.ca), other_ca)
    refused: list[tuple[dict[str, Any], str]] = [
        *(
            ({"kafka_sasl_mechanism": mechanism, "kafka_sasl_password": wrong}, "Kafka.*[Aa]uthentication failed")
            for mechanism in ("PLAIN", "SCRAM-SHA-512")
        ),
        ({**ways.by_token, "kafka_sasl_password": wrong}, "Kafka.*no token from .*401 invalid_client"),
        ({"kafka_ssl_ca_file": other_ca}, "Kafka.*certificate verify failed"),
        (
            {"redis_url": f"rediss://{secured.USER}:{wrong}@{ways.redis}"},
            "Redis.*(WRONGPASS|invalid username-password)",
        ),
        ({"redis_url": f"rediss://guest:{password}@{ways.redis}"}, "Redis.*no permissions"),
        ({"redis_url": f"rediss://{secured.USER}:{password}@{elsewhere}"}, "Redis.*certificate verify failed"),
        (
            {"database_url": ways.behind(password=wrong)},
            "Postgres.*authentication failed",
        ),
        (
            {"database_url": ways.behind(ca=other_ca)},
            "Postgres.*certificate verify failed",
        ),
        (
            {"database_url": ways.behind(database="nowhere")},
            'Postgres.*database "nowhere" does not exist',
        ),
    ]
    for change, told in refused:
        settings = make_settings(**{**entries, **change})
        with pytest.raises(EngineRefused, match=f"(?s){told}.*check user, password and certificates") as caught:
            await asyncio.to_thread(check_engines, settings)
        shown = "".join(traceback.format_exception(caught.value))
        assert SIGN not in shown
        assert "orderstream up" not in str(caught.value)
    # Where the broker says why, it may have hung up before that is read.
    nobody = {**PLAINTEXT, **by_certificate(certificates), "kafka": kafka.mutual, "kafka_ssl_cert_file": ""}
    for change, told in (
        ({**PLAINTEXT, "kafka_security_protocol": "PLAINTEXT"}, "it hangs up on us, who come by PLAINTEXT"),
        ({**nobody, "kafka_ssl_key_file": "", "kafka_ssl_key_password": ""}, "(?i:certificate)|hangs up"),
    ):
        with pytest.raises(EngineUnavailable, match=f"(?s)Kafka.*({told})"):
            await asyncio.to_thread(check_engines, make_settings(**{**entries, **change}))
    await asyncio.to_thread(check_engines, make_settings(**entries))
