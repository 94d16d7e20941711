"""One error for an engine that does not answer, wherever a command or a worker's start meets it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import asyncpg
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from redis.exceptions import RedisError

from orderstream.errors import EngineUnavailable
from orderstream.settings import Settings, public

Faults = tuple[type[BaseException], ...]

KAFKA_FAULTS: Faults = (KafkaError, TimeoutError)
POSTGRES_FAULTS: Faults = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError)
REDIS_FAULTS: Faults = (RedisError, OSError)

INIT = "run `orderstream init` first"


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
        raise EngineUnavailable("Kafka", settings.kafka, repr(error)) from error


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
        raise EngineUnavailable("Postgres", public(settings.database_url), repr(error)) from error


@contextlib.contextmanager
def redis(settings: Settings, faults: Faults = REDIS_FAULTS) -> Iterator[None]:
    """Raise Redis' faults as :class:`EngineUnavailable`.

    Raises:
        EngineUnavailable: one of them happened.
    """
    try:
        yield
    except faults as error:
        raise EngineUnavailable("Redis", public(settings.redis_url), repr(error)) from error
