"""One error for an engine that does not answer, or does not let us in, wherever a process meets it."""

from __future__ import annotations

import contextlib
import re
import ssl
from collections.abc import Iterator

import asyncpg
from aiokafka import errors as of_kafka
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from redis import exceptions as of_redis
from redis.exceptions import RedisError

from orderstream.access import KafkaRefusal, causes
from orderstream.errors import EngineRefused, EngineUnavailable
from orderstream.settings import PREFIX, Settings, public

Faults = tuple[type[BaseException], ...]

KAFKA_FAULTS: Faults = (KafkaError, TimeoutError)
POSTGRES_FAULTS: Faults = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # also: none of several hosts can be written to
    TimeoutError,
)
REDIS_FAULTS: Faults = (RedisError, OSError)

INIT = "run `orderstream init` first"

REFUSALS: Faults = (
    ssl.SSLError,
    KafkaRefusal,
    of_kafka.TopicAuthorizationFailedError,
    of_kafka.GroupAuthorizationFailedError,
    of_kafka.ClusterAuthorizationFailedError,
    of_redis.AuthenticationError,
    of_redis.AuthorizationError,
    of_redis.AuthenticationWrongNumberOfArgsError,
    of_redis.NoPermissionError,
    asyncpg.InvalidAuthorizationSpecificationError,  # a wrong password is one
    asyncpg.InsufficientPrivilegeError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.UndefinedObjectError,  # a parameter of the URL that the server does not know
    asyncpg.ClientConfigurationError,
)
"""An engine does not let us in: neither time nor a start of it will help."""

_REFUSING = re.compile(
    'authentication failed|no such (user|database)|(role|database) ".*" does not exist|no pg_hba.conf entry'
    "|unsupported startup parameter"
)
"""So says it PgBouncer, which has one kind of error for all."""

_BROKEN: Faults = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""Of these a connection that ended."""

_SETTINGS = {
    "Kafka": f"{PREFIX}KAFKA_SECURITY_PROTOCOL, {PREFIX}KAFKA_SASL_… and {PREFIX}KAFKA_SSL_…",
    "Redis": f"{PREFIX}REDIS_URL",
    "Postgres": f"{PREFIX}DATABASE_URL",
}


def fault(engine: str, address: str, error: BaseException) -> EngineUnavailable:
    """Make the error of an engine that was asked for something.

    Args:
        engine: Kafka, Redis or Postgres.
        address: without credentials.
        error: what came of it.

    Returns:
        :class:`EngineRefused` where it does not let us in.
    """
    for one in causes(error):
        if (isinstance(one, REFUSALS) and not isinstance(one, _BROKEN)) or _REFUSING.search(str(one)):
            advice = f"check user, password and certificates: {_SETTINGS[engine]}"
            return EngineRefused(engine, address, str(one).removeprefix(f"{type(one).__name__}: "), advice)
    # The repr of redis-py's says what kind it is, and not what happened.
    told = f"{type(error).__name__}: {error}" if isinstance(error, RedisError) else repr(error)
    return EngineUnavailable(engine, address, told)


@contextlib.contextmanager
def kafka(settings: Settings, faults: Faults = KAFKA_FAULTS) -> Iterator[None]:
    """Raise Kafka's faults as :class:`EngineUnavailable`.

    Raises:
        EngineUnavailable: one of them happened, or Kafka has no such topic.
    """
    try:
        yield
    except UnknownTopicOrPartitionError as error:
        raise EngineUnavailable("Kafka", settings.kafka, "it has no topics yet", INIT) from error
    except faults as error:
        raise fault("Kafka", settings.kafka, error) from error


@contextlib.contextmanager
def postgres(settings: Settings, faults: Faults = POSTGRES_FAULTS) -> Iterator[None]:
    """Raise Postgres' faults as :class:`EngineUnavailable`.

    Raises:
        EngineUnavailable: one of them happened, or Postgres has no tables.
        asyncpg.IntegrityConstraintViolationError: what was to be written breaks a rule of the schema.
    """
    try:
        yield
    except asyncpg.IntegrityConstraintViolationError:
        raise
    except asyncpg.UndefinedTableError as error:
        raise EngineUnavailable("Postgres", public(settings.database_url), "it has no tables yet", INIT) from error
    except faults as error:
        raise fault("Postgres", public(settings.database_url), error) from error


@contextlib.contextmanager
def redis(settings: Settings, faults: Faults = REDIS_FAULTS) -> Iterator[None]:
    """Raise Redis' faults as :class:`EngineUnavailable`.

    Raises:
        EngineUnavailable: one of them happened.
    """
    try:
        yield
    except faults as error:
        raise fault("Redis", public(settings.redis_url), error) from error
