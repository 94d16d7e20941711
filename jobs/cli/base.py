"""What every group of commands shares: the settings, connections for one use, checks of arguments."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from orderstream.console import warn
from orderstream.errors import EngineUnavailable

if TYPE_CHECKING:
    from orderstream.jobs.forms import Map
    from orderstream.settings import Settings
    from orderstream.sql.store import Store
    from orderstream.streams.producer import Producer
    from orderstream.streams.topics import TopicSpec

T = TypeVar("T")

Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="COLUMN=FIELD",
        help="Which column of a table is which: an export (online-retail, shopify, woocommerce, amazon, olist), or"
        " COLUMN=FIELD with order, product, quantity, customer, date, payment, price, name, status, cancelled, line. May be"
        " repeated.",
    ),
]

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
        EngineUnavailable: it does not answer, or no longer, or was never initialised.
    """
    from orderstream import connecting
    from orderstream.sql.store import TRANSIENT, Store

    ours = settings()
    with connecting.postgres(ours):
        store = await Store.connect(ours.database_url, connections_max=2, timeout_s=30)
    try:
        with connecting.postgres(
            ours, faults=(*(fault for fault in TRANSIENT if fault is not OSError), ConnectionError)
        ):
            return await use(store)
    finally:
        await store.close()


async def with_producer(use: Callable[[Producer], Awaitable[T]], *topics: TopicSpec) -> T:
    """Connect Kafka for one use, once it is seen to have these topics.

    Raises:
        EngineUnavailable: it does not answer, or has no such topics.
        SettingsError: they have another number of partitions.
    """
    from aiokafka.errors import KafkaError

    from orderstream import connecting
    from orderstream.streams.producer import Producer

    ours = settings()
    producer = Producer(ours, client_id="orderstream-cli")
    with connecting.kafka(ours):
        await producer.start()
    try:
        with connecting.kafka(ours):
            await producer.check_partitions([ours.topic(spec.name) for spec in topics])
        with connecting.kafka(ours, faults=(KafkaError,)):
            return await use(producer)
    finally:
        await producer.stop()


def say_again(*more: str) -> None:
    """Name the command that may be repeated, this one with an option more: what was sent already counts once."""
    said = sys.argv[1:]
    command = ["orderstream", *said, *(() if set(more[:1]) <= {*said} else more)]
    warn(f"safe to repeat, nothing counts twice: {shlex.join(command)}")


@contextlib.contextmanager
def repeatable(more: Callable[[], Sequence[str]] = tuple) -> Iterator[None]:
    """Name the repeat that is safe where an engine goes away when something may have been sent.

    Raises:
        EngineUnavailable: it did.
    """
    try:
        yield
    except EngineUnavailable:
        say_again(*more())
        raise


def uuid_of(text: str, what: str) -> str:
    """Return an id in its canonical form.

    Raises:
        BadParameter: it is none.
    """
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no {what}: expected a UUID") from None


def map_of(columns: list[str] | None) -> Map:
    """Read the values of ``--map``.

    Raises:
        BadParameter: one is neither an export nor COLUMN=FIELD.
    """
    from orderstream.jobs.forms import read_map

    try:
        return read_map(columns or ())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
