"""Limits how many units of a product one user may have over all orders: in Postgres, and through its owner in Redis.

Used by ``orderstream limit``; the API does the same with its own producer (:mod:`orderstream.http.products`).
"""

from __future__ import annotations

import uuid

import orjson

from orderstream.settings import Settings
from orderstream.sql.store import Store
from orderstream.streams.producer import Outbox, Producer


async def set_limit(settings: Settings, store: Store, producer: Producer, product_id: str, units: int | None) -> bool:
    """Set a product's limit in Postgres, then have its owner recount it: until then Redis refuses by an older limit.

    Postgres enforces it from its commit on.  Safe to repeat: a repeat completes an attempt that failed halfway.

    Args:
        settings: of the pipeline.
        store: Postgres.
        producer: Kafka.
        product_id: the product.
        units: that one user may have, at least 1; None for any number.

    Returns:
        Whether there is such a product.

    Raises:
        KafkaError: Kafka does not answer; Postgres has the limit, and the recount may not be published.
    """
    if not await store.set_limit(product_id, units):
        return False
    recount = {"command": "recount", "command_id": str(uuid.uuid4()), "product_id": product_id}
    outbox = Outbox(settings)
    outbox.stock_command(product_id, orjson.dumps(recount))
    await producer.send(outbox.handovers())
    return True
