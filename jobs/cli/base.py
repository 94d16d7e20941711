"""What every group of commands shares: the settings, connections for one use, checks of arguments."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from orderstream.settings import Settings
    from orderstream.sql.store import Store
    from orderstream.streams.producer import Producer

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

HELD_BACK_S = 10.0
"""How long the command line waits for what it commanded, in seconds."""


def settings(**overrides: Any) -> Settings:
    """Read the settings."""
    from orderstream.settings import load

    return load(**{name: value for name, value in overrides.items() if value is not None})


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end."""
    return asyncio.run(work)


async def with_store(use: Callable[[Store], Awaitable[T]]) -> T:
    """Connect Postgres for one use.

    Raises:
        EngineUnavailable: it does not answer, or was never initialised.
    """
    from orderstream import connecting
    from orderstream.sql.store import Store

    ours = settings()
    with connecting.postgres(ours):
        store = await Store.connect(ours.database_url, connections_max=2, timeout_s=30)
    try:
        with connecting.postgres(ours, faults=()):
            return await use(store)
    finally:
        await store.close()


async def with_producer(use: Callable[[Producer], Awaitable[T]]) -> T:
    """Connect Kafka for one use.

    Raises:
        EngineUnavailable: it does not answer.
    """
    from orderstream import connecting
    from orderstream.streams.producer import Producer

    ours = settings()
    producer = Producer(ours, client_id="orderstream-cli")
    with connecting.kafka(ours):
        await producer.start()
    try:
        return await use(producer)
    finally:
        await producer.stop()


def uuid_of(text: str, what: str) -> str:
    """Return an id in its canonical form.

    Raises:
        BadParameter: it is none.
    """
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no {what}: expected a UUID") from None
