"""How engines are entered, as far as no engine is needed for it; tests/e2e/test_access.py goes in."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from aiokafka.errors import AuthenticationFailedError, KafkaConnectionError
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import AuthenticationError, ConnectionError

from orderstream import connecting
from orderstream.access import KafkaRefusal, Tokens, redis_client
from orderstream.errors import EngineRefused
from orderstream.settings import hosts_of, load
from tests.unit.test_layout import ROOT, sources


def test_a_url_of_several_hosts_is_one_for_each() -> None:
    found = hosts_of("postgresql://u:p%40@a:1,[::1],c/x?sslmode=require")
    assert found == [f"postgresql://u:p%40@{host}/x?sslmode=require" for host in ("a:1", "[::1]", "c")]


@settings(deadline=None, max_examples=30)
@given(user=st.text(min_size=1), password=st.text(min_size=1))
def test_any_password_gets_to_redis_and_to_its_sentinels(user: str, password: str) -> None:
    entry = f"{quote(user, safe='')}:{quote(password, safe='')}"
    direct = redis_client(f"rediss://{entry}@h:1/2", timeout_s=1).connection_pool.connection_kwargs
    assert (direct["username"], direct["password"], direct["db"]) == (user, password, 2)

    theirs = f"sentinel_username=s&sentinel_password={quote(password, safe='')}"
    url = f"rediss+sentinel://{entry}@a:1,b,[::1]:3/shop/2?{theirs}&ssl_check_hostname=false"
    pool: Any = redis_client(url, timeout_s=1).connection_pool
    given_to = pool.connection_kwargs
    assert (given_to["username"], given_to["password"], given_to["db"]) == (user, password, 2)
    assert (pool.service_name, given_to["ssl_check_hostname"]) == ("shop", False)
    asked = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
    assert [(one["host"], one["port"], one["password"]) for one in asked] == [
        ("a", 1, password),
        ("b", 26379, password),
        ("::1", 3, password),
    ]
    assert all(one["ssl_check_hostname"] is False for one in asked)


def caused(by: Exception) -> Exception:
    error = ConnectionError("Error 1 connecting to h:1.")
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("engine", "error", "is_refused"),
    [
        ("Kafka", KafkaRefusal("Authentication failed"), True),
        ("Kafka", KafkaConnectionError("Unable to bootstrap"), False),
        ("Postgres", asyncpg.InvalidPasswordError("password authentication failed"), True),
        ("Postgres", asyncpg.ProtocolViolationError("SASL authentication failed"), True),
        ("Postgres", asyncpg.ProtocolViolationError('database "x" does not exist'), True),
        ("Postgres", asyncpg.ProtocolViolationError("pgbouncer cannot connect to server"), False),
        ("Postgres", asyncpg.TooManyConnectionsError("sorry, too many clients already"), False),
        ("Postgres", ssl.SSLCertVerificationError("certificate verify failed"), True),
        ("Postgres", ConnectionRefusedError(111, "Connect call failed"), False),
        ("Redis", AuthenticationError("WRONGPASS"), True),
        ("Redis", caused(ssl.SSLCertVerificationError("certificate verify failed")), True),
        ("Redis", caused(ssl.SSLEOFError("EOF occurred in violation of protocol")), False),
        ("Redis", MasterNotFoundError("no sentinel knows of it"), False),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_refusal_is_no_outage(engine: str, error: Exception, is_refused: bool) -> None:
    found = connecting.fault(engine, "h:1", error)
    assert isinstance(found, EngineRefused) == is_refused
    assert ("check user, password" in str(found)) == is_refused
    assert ("orderstream up" in str(found)) != is_refused


async def test_a_token_is_read_from_its_file_each_time(tmp_path: Path) -> None:
    file = tmp_path / "a token"
    ours = load(
        _env_file=None,
        kafka_security_protocol="SASL_SSL",
        kafka_sasl_mechanism="OAUTHBEARER",
        kafka_sasl_oauth_url=file.as_uri(),
    )
    tokens = Tokens(ours)
    with pytest.raises(AuthenticationFailedError, match="No such file"):
        await tokens.token()
    for text in ("one", "two"):
        file.write_text(f"{text}\n")
        assert await tokens.token() == text


def test_every_client_of_kafka_and_redis_is_made_in_one_place() -> None:
    """A client that is made with an address only comes without password and certificate."""
    own = {"orderstream/access.py", "orderstream/engines/probes.py"}
    made = re.compile(r"bootstrap_servers=|Redis\.from_url\(")
    others = [str(file.relative_to(ROOT)) for file in sources() if made.search(file.read_text())]
    assert [name for name in others if name not in own and not name.startswith("bench/")] == []
