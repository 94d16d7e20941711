"""What every client of Kafka is told, and what its errors mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiokafka import errors
from aiokafka.cluster import ClusterMetadata
from aiokafka.errors import KafkaError

READ_COMMITTED = "read_committed"
"""Isolation level: of aborted transactions nothing is read, of open ones nothing yet.  A partition ends at its last stable
offset, where the oldest open transaction begins."""

COMMITTED_BY = "orderstream"
"""Metadata of the offsets that workers commit: of those that somebody else has set, nobody knows what was done."""

REQUEST_TIMEOUT_MS = 10_000
"""Longest wait for the answer to one request, in milliseconds: a broker may vanish without closing its connections."""

TOO_LARGE = (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError)
"""A batch or a record is larger than its topic takes."""

_PASSING = (
    errors.KafkaTimeoutError,
    errors.KafkaUnavailableError,
    errors.BrokerNotAvailableError,
    errors.ReplicaNotAvailableError,
    errors.UnknownError,
    errors.CorruptRecordException,
    errors.OffsetOutOfRangeError,
    errors.IllegalStateError,
    errors.CommitFailedError,
    errors.RebalanceInProgressError,
    errors.IllegalGenerationError,
    errors.UnknownMemberIdError,
    errors.ReassignmentInProgress,
    errors.ProducerClosed,
    errors.ProducerFenced,
    errors.OutOfOrderSequenceNumber,
    errors.DuplicateSequenceNumber,
    errors.InvalidProducerEpoch,
    errors.InvalidProducerIdMapping,
    errors.UnknownProducerId,
)
"""aiokafka calls these not retriable, since the same client can't go on; another try makes a new one."""


def passes(error: KafkaError) -> bool:
    """Tell whether an error is one of a broker that is unavailable, or was for a moment: else the next try fails as well.

    A bare ``KafkaError`` is what aiokafka makes of whatever ended one of its tasks.
    """
    return error.retriable or isinstance(error, _PASSING) or type(error) is KafkaError


async def partition_counts(client: Any, topics: Iterable[str]) -> dict[str, int]:
    """Return how many partitions these topics have, as far as the broker answers and has them.

    Args:
        client: ``aiokafka.client.AIOKafkaClient``, started.
        topics: their names.
    """
    cluster = ClusterMetadata()
    await client._metadata_update(cluster, topics)
    return {topic: len(found) for topic in topics if (found := cluster.partitions_for_topic(topic))}
