"""Pauses between the tries of an aiokafka client to reach a broker that is away.

While no broker tells where a partition lives, a producer asks again at once: when connections are refused, ten thousand
times a second, with two log lines each.  Here a try that failed is followed by a pause, which all who wait for it share.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

PAUSE_MIN_S, PAUSE_MAX_S = 0.05, 1.0
"""Pauses after a failed try, doubling in between, with jitter.  In seconds."""


def pace(client: Any) -> None:
    """Make a client wait after each failed try to update its metadata.

    Args:
        client: ``aiokafka.client.AIOKafkaClient``, not started yet.
    """
    update = client._metadata_update
    pause_s = PAUSE_MIN_S

    async def paced(cluster: Any, topics: Any) -> bool:
        nonlocal pause_s
        updated: bool = await update(cluster, topics)
        if updated:
            pause_s = PAUSE_MIN_S
        else:
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, PAUSE_MAX_S)
        return updated

    client._metadata_update = paced
