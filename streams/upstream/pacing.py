"""Pauses of an aiokafka client: between tries to reach a broker that is unavailable, and between fetches.

While no broker answers where a partition lives, a producer asks again at once: when connections are refused, ten thousand
times a second, with two log lines each (aio-libs/aiokafka#496, faust-streaming/faust#624).  Here a failed try is followed by
a pause, which all who wait for it share.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from aiokafka.protocol.fetch import FetchRequest

from orderstream.backoff import Backoff

PAUSE_MIN_S, PAUSE_MAX_S = 0.05, 1.0
"""Pauses after a failed try, in seconds."""


def pace(client: Any) -> None:
    """Make a client wait after each failed try to update its metadata.

    Args:
        client: ``aiokafka.client.AIOKafkaClient``, not started yet.
    """
    update, backoff = client._metadata_update, Backoff(PAUSE_MIN_S, PAUSE_MAX_S)

    async def paced(cluster: Any, topics: Any) -> bool:
        updated: bool = await update(cluster, topics)
        if updated:
            backoff.reset()
        else:
            await backoff.pause()
        return updated

    client._metadata_update = paced


def pace_consumer(consumer: Any) -> None:
    """Make a consumer's client wait likewise; aiokafka gives out a producer's client, not a consumer's.

    Args:
        consumer: ``aiokafka.AIOKafkaConsumer``, not started yet.
    """
    pace(consumer._client)


def space_fetches(client: Any, interval_s: float) -> None:
    """Make a consumer's client begin its fetches no sooner than ``interval_s`` seconds after one another.

    The fetcher asks again as soon as its records are taken, and a broker answers as soon as it has one record: at a
    thousand records a second that is a fetch for every few of them, each over all partitions (aio-libs/aiokafka#1081 asks
    about such a rate).  A fetch after a quiet while is not held back.

    Args:
        client: ``aiokafka.client.AIOKafkaClient``, not started yet.
        interval_s: between the beginnings of two fetches from the same broker.
    """
    send = client.send
    begun: dict[int, float] = {}

    async def spaced(node_id: int, request: Any, **options: Any) -> Any:
        if isinstance(request, FetchRequest):
            early_s = begun.get(node_id, float("-inf")) + interval_s - time.monotonic()
            if early_s > 0:
                await asyncio.sleep(early_s)
            begun[node_id] = time.monotonic()
        return await send(node_id, request, **options)

    client.send = spaced
