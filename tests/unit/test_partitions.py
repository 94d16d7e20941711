"""Ownership by partition: every producer that uses Kafka's default partitioner sends a key where we look for it."""

from __future__ import annotations

import random
import uuid

import pytest
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.partitioner import murmur2 as aiokafka_murmur2
from hypothesis import given
from hypothesis import strategies as st

from orderstream.streams.partitions import murmur2, order_partition, partition_of, product_partition

COUNTS = (1, 2, 3, 8, 100, 1024)


def agrees(key: bytes, partitions: int) -> bool:
    every = list(range(partitions))
    return bool(partition_of(key, partitions) == DefaultPartitioner()(key, every, every))


def test_thousands_of_keys_go_where_aiokafkas_default_partitioner_puts_them() -> None:
    seeded = random.Random(7)
    keys = [str(n).encode() for n in range(2_000)]
    keys += [str(uuid.UUID(int=seeded.getrandbits(128))).encode() for _ in range(2_000)]
    keys += [seeded.randbytes(seeded.randrange(1, 70)) for _ in range(2_000)]  # every remainder of a length by four
    assert all(agrees(key, partitions) for key in keys for partitions in COUNTS)


@given(st.binary(min_size=0, max_size=300), st.sampled_from(COUNTS))
def test_any_key_goes_there(key: bytes, partitions: int) -> None:
    assert agrees(key, partitions)
    assert murmur2(key) == aiokafka_murmur2(key) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("key", "hashed"),
    [
        # org.apache.kafka.common.utils.UtilsTest.testMurmur2: what the Java client computes, as signed 32-bit numbers.
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_the_hash_is_that_of_the_java_client(key: bytes, hashed: int) -> None:
    assert murmur2(key) == hashed & 0xFFFFFFFF


@given(st.text(min_size=1, max_size=64), st.sampled_from(COUNTS))
def test_ids_are_hashed_as_the_utf8_text_that_is_the_records_key(text: str, partitions: int) -> None:
    assert product_partition(text, partitions) == partition_of(text.encode(), partitions)
    assert order_partition(text, partitions) == partition_of(text.encode(), partitions)
    assert 0 <= product_partition(text, partitions) < partitions


def test_orders_spread_over_all_partitions() -> None:
    seeded = random.Random(1)
    orders = [str(uuid.UUID(int=seeded.getrandbits(128))) for _ in range(8_000)]
    counts = [0] * 8
    for order_id in orders:
        counts[order_partition(order_id, 8)] += 1
    assert min(counts) > 800  # of 1,000 each on average
