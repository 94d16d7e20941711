"""The worker's tables: what is written waits for a flush, belongs to a partition, and never goes back."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from orderstream.agents.app import create_app
from orderstream.lua.gate import Counts
from orderstream.settings import load
from orderstream.streams.partitions import product_partition
from orderstream.tables.views import Views

SINCE = datetime(2026, 1, 1, tzinfo=UTC)
ALL = range(8)


class Broker:
    """Takes what is flushed; ``then`` happens before it is acknowledged."""

    def __init__(self) -> None:
        self.records: list[tuple[int, str, Any]] = []
        self.then: Any = lambda: None

    async def send(self, step: Any) -> None:
        for (_, partition), records in step.items():
            self.records += [(partition, orjson.loads(key), value and orjson.loads(value)) for key, value, _ in records]
        self.then()


@pytest.fixture
def views(tmp_path: Path) -> Views:
    return create_app(load(local_dir=tmp_path, kafka="127.0.0.1:1", partitions=8, _env_file=None)).views


def stored(views: Views) -> dict[str, tuple[int, Any]]:
    return {key: (partition, value) for key, partition, value in views.open_orders.entries()}


async def test_what_is_written_is_seen_at_once_and_stands_in_its_home_when_it_is_flushed(views: Views) -> None:
    broker = Broker()
    views.waits("o", 3, "RESERVED", None, SINCE)
    entry = {"status": "RESERVED", "payment": None, "since": SINCE.timestamp()}
    assert stored(views) == {"o": (3, entry)}
    await views.flush(ALL, broker.send)
    assert stored(views) == {"o": (3, entry)}
    assert broker.records == [(3, "o", entry)]
    views.waits("o", 3, "RESERVED", None, SINCE)  # as it stood: nothing to say
    await views.flush(ALL, broker.send)
    assert len(broker.records) == 1
    views.over([(3, "o")])
    assert not stored(views)
    await views.flush(ALL, broker.send)
    assert not stored(views)
    assert broker.records[1:] == [(3, "o", None)]


async def test_an_order_that_waited_between_two_flushes_leaves_no_trace(views: Views) -> None:
    broker = Broker()
    views.waits("o", 3, "RESERVED", None, SINCE)
    views.over([(3, "o")])
    await views.flush(ALL, broker.send)
    assert not broker.records


async def test_what_is_over_while_it_is_being_flushed_is_removed_by_the_next_flush(views: Views) -> None:
    broker = Broker()
    views.waits("o", 3, "RESERVED", None, SINCE)
    broker.then = lambda: views.over([(3, "o")])
    await views.flush(ALL, broker.send)
    broker.then = lambda: None
    await views.flush(ALL, broker.send)
    assert not stored(views)
    assert [value for _, _, value in broker.records][1:] == [None]


async def test_what_was_written_of_a_partition_that_is_gone_is_dropped(views: Views) -> None:
    broker = Broker()
    views.waits("o", 3, "RESERVED", None, SINCE)
    views.waits("mine", 4, "RESERVED", None, SINCE)
    await views.flush({4}, broker.send)
    await views.flush(ALL, broker.send)
    assert [key for _, key, _ in broker.records] == ["mine"]


async def test_counts_never_go_back_unless_they_are_counted_again(views: Views) -> None:
    broker = Broker()

    async def count(on_hand: int, version: int, **more: Any) -> Any:
        views.counted({"p": Counts(on_hand, 1, version, 1)}, {"p": 2}, **more)
        await views.flush(ALL, broker.send)
        return views.stock.stored("p")

    assert await count(10, 5) == {"available": 9, "reserved": 1, "sold": 2, "version": 5}
    assert (await count(20, 4))["available"] == 9
    assert (await count(20, 4, recounted={"p"}))["available"] == 19
    assert {partition for partition, _, _ in broker.records} == {product_partition("p", 8)}
