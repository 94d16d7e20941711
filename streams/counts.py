"""How many partitions the topics have: as many as the pipeline, which fixes whose each order and product is."""

from __future__ import annotations

from typing import Any

from orderstream.settings import Settings
from orderstream.streams.topics import TOPICS
from orderstream.streams.upstream.clients import partition_counts

LOOK_S = 2.0
"""How often workers and ingresses look."""


async def misfit(client: Any, settings: Settings) -> str | None:
    """Return what is wrong with a topic that has another number of partitions, and what to do.

    Args:
        client: ``aiokafka.client.AIOKafkaClient``, connected.
        settings: of the pipeline.

    Returns:
        None where all topics fit, as far as the broker answers and has them.
    """
    counts = await partition_counts(client, [settings.topic(spec.name) for spec in TOPICS])
    wrong = (say(name, found, settings.partitions) for name, found in counts.items() if found != settings.partitions)
    return next(wrong, None)


def say(topic: str, found: int, wanted: int) -> str:
    """Say that a topic has another number of partitions, and what to do."""
    return (
        f"topic {topic} has {found} partitions, this pipeline has {wanted}: a number that is fixed once orders have flowed\n"
        'stop what produces to it; docs/OPERATIONS.md, "A topic with another number of partitions", says how its records '
        "are moved"
    )
