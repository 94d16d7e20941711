"""Pauses of an aiokafka client between tries to reach a broker that is unavailable.

While no broker answers where a partition lives, a producer asks again at once: when connections are refused, ten thousand
times a second, with two log lines each (aio-libs/aiokafka#496, faust-streaming/faust#624).  Here a failed try is followed by
a pause, which all who wait for it share.
"""

from __future__ import annotations

from typing import Any

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
