"""Sets how many units of a product one user may have over all of their orders."""

from __future__ import annotations

import uuid

import orjson

from orderstream.settings import Settings
from orderstream.sql.store import Store
from orderstream.streams.producer import Outbox, Producer


async def set_limit(settings: Settings, store: Store, producer: Producer, product_id: str, units: int | None) -> bool:
    """Set a product's limit, and have its owner tell Redis: a gate that is not told goes on refusing by an older limit.

    Postgres enforces it from its commit on.  Safe to repeat: an attempt that failed on its way is completed.

    Args:
        settings: of the pipeline.
        store: Postgres.
        producer: Kafka.
        product_id: the product.
        units: that one user may have, at least 1; None for any number.

    Returns:
        Whether there is such a product.

    Raises:
        KafkaError: Kafka does not answer; Postgres has the limit, and the owner was perhaps not told.
    """
    if not await store.set_limit(product_id, units):
        return False
    recount = {"command": "recount", "command_id": str(uuid.uuid4()), "product_id": product_id}
    outbox = Outbox(settings)
    outbox.stock_command(product_id, orjson.dumps(recount))
    await producer.send(outbox.handovers())
    return True
