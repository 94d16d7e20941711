"""Where a key belongs: Kafka's default partitioner, so that Java, aiokafka and Faust producers agree with us.

Source of the hash: ``org.apache.kafka.common.utils.Utils.murmur2``.  librdkafka clients need
``partitioner=murmur2_random``; a record of theirs in another partition is sent on to its owner.
"""

from __future__ import annotations

import struct
from functools import lru_cache

_M = 0x5BD1E995
_MASK = 0xFFFFFFFF
_SEED = 0x9747B28C


def murmur2(data: bytes) -> int:
    """Return the 32-bit murmur2 hash of ``data`` as Kafka's Java client computes it, unsigned."""
    length = len(data)
    h = _SEED ^ length
    words = length >> 2
    for k in struct.unpack_from(f"<{words}I", data):
        k = k * _M & _MASK  # noqa: PLW2901
        h = (h * _M & _MASK) ^ ((k ^ (k >> 24)) * _M & _MASK)
    rest = length & 3
    if rest:
        tail = words << 2
        if rest == 3:
            h ^= data[tail + 2] << 16
        if rest >= 2:
            h ^= data[tail + 1] << 8
        h = (h ^ data[tail]) * _M & _MASK
    h = (h ^ (h >> 13)) * _M & _MASK
    return h ^ (h >> 15)


def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition, ``0 … partitions-1``, that Kafka's default partitioner gives to ``key``."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


@lru_cache(maxsize=131_072)  # a catalogue of 100,000 products fits; an entry is about 200 bytes
def product_partition(product_id: str, partitions: int) -> int:
    """Return the partition of the worker that owns this product's stock."""
    return partition_of(product_id.encode(), partitions)


@lru_cache(maxsize=65_536)  # an order is asked for about five times in its life; some seconds of orders fit
def order_partition(order_id: str, partitions: int) -> int:
    """Return the partition of the worker that owns this order's life."""
    return partition_of(order_id.encode(), partitions)
