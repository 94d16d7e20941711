"""Pauses between the tries of an aiokafka client to reach a broker that is away.

While no broker tells where a partition lives, a producer asks again at once: when connections are refused, ten thousand
times a second, with two log lines each.  Here a try that failed is followed by a pause, which all who wait for it share.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

PAUSE_MIN_S, PAUSE_MAX_S = 0.05, 1.0
"""Pauses after a failed try, in seconds."""


class Backoff:
    """Pauses that double, with jitter, for tries that are not made in one loop: else tenacity has them.

    Args:
        min_s: the first pause, in seconds; each is cut by up to a half.
        max_s: the longest.
    """

    def __init__(self, min_s: float, max_s: float) -> None:
        self._min_s, self._max_s = min_s, max_s
        self.reset()

    def reset(self) -> None:
        """Begin anew: a try went well."""
        self._next_s = self._min_s

    async def pause(self) -> None:
        """Wait; the next time twice as long."""
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, self._max_s)
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))


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
