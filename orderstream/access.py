"""How Kafka and Redis are entered: what each client of theirs is made with.  Of Postgres its URL says all of it."""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import hiredis
import orjson
import redis.asyncio as redis
from aiokafka.abc import AbstractTokenProvider
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import AuthenticationFailedError, KafkaConnectionError, KafkaError
from aiokafka.protocol.metadata import MetadataRequest
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, ReadOnlyError

from orderstream.errors import SettingsError
from orderstream.settings import PREFIX, Settings, public

TOKEN_S = 10.0
"""Longest wait for an access token, in seconds."""

TOKEN_LIFE_S = 60.0
"""How long a token is taken to live whose server does not say it, in seconds."""

TOKEN_PART = 0.8
"""After this part of its life a token is replaced."""

GREET_S = 3.0
"""Longest wait for a broker to say why it lets nobody in, in seconds."""

CONNECTIONS_MAX = 16
"""Of one client of Redis."""


# Kafka


class KafkaRefusal(KafkaConnectionError):
    """A broker does not let us in.  To a process that runs already it is as good as away, and asked again."""


class Tokens(AbstractTokenProvider):
    """Access tokens for Kafka: by the client credentials grant (RFC 6749, 4.4), or from a file that somebody else renews."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._token, self._until = "", 0.0

    async def token(self) -> str:
        """Return a token that is still valid.

        Raises:
            AuthenticationFailedError: there is none for us.
            KafkaConnectionError: the server of tokens does not answer.
        """
        if time.monotonic() >= self._until:
            url = self._settings.kafka_sasl_oauth_url
            if urlsplit(url).scheme == "file":
                try:
                    return Path(url2pathname(urlsplit(url).path)).read_text().strip()
                except OSError as error:
                    raise AuthenticationFailedError(f"no token in {url}: {error.strerror}") from None
            self._token, life_s = await self._fetch(url)
            self._until = time.monotonic() + TOKEN_PART * life_s
        return self._token

    async def _fetch(self, url: str) -> tuple[str, float]:
        import aiohttp  # not needed by most, and no small one

        ours = self._settings
        form = {"grant_type": "client_credentials", **({"scope": s} if (s := ours.kafka_sasl_oauth_scope) else {})}
        entry = base64.b64encode(f"{ours.kafka_sasl_username}:{ours.kafka_sasl_password}".encode()).decode()
        headers = {"Authorization": f"Basic {entry}"}
        bound = aiohttp.ClientTimeout(total=TOKEN_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=bound) as http,
                http.post(url, data=form, headers=headers) as answer,
            ):
                status, body = answer.status, await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:  # its repr holds the request's headers
            raise KafkaConnectionError(f"no token from {public(url)}: {type(error).__name__}") from None
        try:
            found = orjson.loads(body)
            return str(found["access_token"]), float(found.get("expires_in", TOKEN_LIFE_S))
        except (ValueError, KeyError, TypeError, AttributeError):
            why = found.get("error") if body[:1] == b"{" and isinstance(found, dict) else None
            raise AuthenticationFailedError(f"no token from {public(url)}: {status} {why or ''}".rstrip()) from None


def kafka(settings: Settings) -> dict[str, Any]:
    """Return the arguments that every client of aiokafka is made with: the brokers, and how they are entered.

    Raises:
        SettingsError: a certificate or a key can't be used.
    """
    entry: dict[str, Any] = {
        "bootstrap_servers": settings.kafka,
        "security_protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_security_protocol.endswith("SSL"):
        entry["ssl_context"] = _tls(settings)
    if settings.kafka_security_protocol.startswith("SASL"):
        entry["sasl_mechanism"] = settings.kafka_sasl_mechanism
        if settings.kafka_sasl_mechanism == "OAUTHBEARER":
            entry["sasl_oauth_token_provider"] = Tokens(settings)
        else:
            entry["sasl_plain_username"] = settings.kafka_sasl_username
            entry["sasl_plain_password"] = settings.kafka_sasl_password
    return entry


def _tls(settings: Settings) -> ssl.SSLContext:
    name = "KAFKA_SSL_CA_FILE"
    try:
        context = ssl.create_default_context(cafile=settings.kafka_ssl_ca_file or None)
        if settings.kafka_ssl_cert_file:
            name = "KAFKA_SSL_CERT_FILE"
            # With a password, though it is empty: without one OpenSSL asks for it on the terminal.
            context.load_cert_chain(
                settings.kafka_ssl_cert_file, settings.kafka_ssl_key_file or None, settings.kafka_ssl_key_password
            )
    except OSError as error:
        raise SettingsError([f"{PREFIX}{name}: it, its key or the key's password can't be used: {error}"]) from None
    return context


async def start_kafka(client: Any, settings: Settings) -> None:
    """Start a producer, a consumer or an admin client of aiokafka.

    Raises:
        KafkaRefusal: the broker does not let us in.
        KafkaError: no broker answers.
    """
    try:
        await client.start()
    except KafkaConnectionError as error:  # aiokafka leaves the reason to its log
        refusal = await _refusal(settings)
        if refusal is None:
            raise  # not from itself: its causes would have no end
        raise refusal from error


async def _refusal(settings: Settings) -> KafkaConnectionError | None:
    """Return why a broker that is there has nothing to do with us; None where none is there."""
    entry = kafka(settings)
    for host, port, _ in collect_hosts(entry.pop("bootstrap_servers"), randomize=False):
        met = None
        try:
            async with asyncio.timeout(GREET_S):
                met = await create_conn(host, port, request_timeout_ms=int(GREET_S * 1000), **entry)
                await met.send(MetadataRequest([]))
        except (KafkaError, OSError) as error:
            for told in causes(error):
                if isinstance(told, ssl.SSLError) and not isinstance(told, ssl.SSLEOFError):
                    return KafkaRefusal(str(told))
                if isinstance(told, KafkaError) and not isinstance(told, KafkaConnectionError):
                    return KafkaRefusal(str(told))
            if isinstance(error, KafkaConnectionError | ssl.SSLEOFError | ConnectionResetError):
                how = settings.kafka_security_protocol
                return KafkaConnectionError(f"it hangs up on us, who come by {how}: is that its security protocol?")
        finally:
            if met is not None:
                met.close()
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what led to it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


# Redis


class _Packed:
    """A connection whose commands hiredis packs.  redis-py packs them in Python here, an argument a microsecond."""

    def pack_command(self, *args: Any) -> list[bytes]:
        """See redis-py; a command's name may be several words."""
        return [hiredis.pack_command((*args[0].split(), *args[1:]) if isinstance(args[0], str) else args)]

    def pack_commands(self, commands: Iterable[Iterable[Any]]) -> list[bytes]:
        """See redis-py."""
        return [b"".join(part for command in commands for part in self.pack_command(*command))]


async def ask_at_once(client: redis.Redis, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Send commands in one write; return their answers, and the errors that the server has said among them.

    So does redis-py's pipeline, which measures time, looks up callbacks and sets a timeout for each answer: two thirds of
    what a hundred of them cost.

    Raises:
        redis.RedisError, OSError: the server did not answer, or is no primary any more.
    """
    pool: Any = client.connection_pool
    connection = await pool.get_connection()
    try:
        await connection.send_packed_command(connection.pack_commands(commands))  # it has a timeout of its own
        async with asyncio.timeout(connection.socket_timeout):
            read = connection._parser.read_response
            answers = [await read() for _ in commands]
        if any(isinstance(answer, ReadOnlyError) for answer in answers):
            raise redis.ConnectionError("it was a primary, and is a replica")
        return answers
    except BaseException:
        await connection.disconnect(nowait=True)  # answers to these are not to be taken for answers to others
        raise
    finally:
        await pool.release(connection)


class _Connection(_Packed, redis.Connection): ...


class _SentinelConnection(_Packed, SentinelManagedConnection): ...


class _SentinelTlsConnection(_Packed, SentinelManagedSSLConnection): ...


class _Sentinels(Sentinel):
    async def discover_master(self, service_name: str) -> Any:
        """Say in a few words that none is found: redis-py shows all its objects, and makes an outage of a refusal."""
        try:
            return await super().discover_master(service_name)
        except MasterNotFoundError as error:
            kind = AuthenticationError if "AuthenticationError" in str(error) else MasterNotFoundError
            raise kind(f"no sentinel that answers and lets us in knows of a primary {service_name}") from None


class _SentinelPool(SentinelConnectionPool):
    async def aclose(self) -> None:
        """Close the connections to the sentinels as well."""
        await super().aclose()
        await self.sentinel_manager.aclose()


def redis_client(url: str, *, timeout_s: float) -> redis.Redis:
    """Make a client of Redis, or of the primary that Sentinel names; nothing is connected yet.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://`` as redis-py has it, or
            ``redis+sentinel://user:password@host:port,host:port/service/db``, with ``rediss+`` for TLS; the sentinels'
            own user and password are ``sentinel_username`` and ``sentinel_password``.
        timeout_s: longest wait for a connection, and for an answer, in seconds.
    """
    bounds: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
    }
    parts = urlsplit(url)
    kind, _, how = parts.scheme.partition("+")
    if how != "sentinel":
        # for redis://; the others pack as they like
        return redis.Redis.from_url(url, **bounds, max_connections=CONNECTIONS_MAX, connection_class=_Connection)
    entry, at, hosts = parts.netloc.rpartition("@")
    service, _, db = parts.path.strip("/").partition("/")
    sentinels = [urlsplit(f"//{host}") for host in hosts.split(",")]
    ours: dict[str, Any] = {
        **parse_url(parts._replace(scheme=kind, netloc=f"{entry}{at}-", path=f"/{db or 0}").geturl())
    }
    named = {name: ours.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in ours}
    tls = {name: value for name, value in ours.items() if name.startswith("ssl_")}
    for name in ("host", "connection_class"):
        ours.pop(name, None)
    manager = _Sentinels(  # type: ignore[no-untyped-call]
        [(one.hostname, one.port or 26379) for one in sentinels],
        sentinel_kwargs={**bounds, **tls, **named, "ssl": kind == "rediss"},
    )
    client: redis.Redis = manager.master_for(
        service,
        connection_pool_class=_SentinelPool,
        connection_class=_SentinelTlsConnection if kind == "rediss" else _SentinelConnection,
        max_connections=CONNECTIONS_MAX,
        **ours,
        **bounds,
    )
    return client
