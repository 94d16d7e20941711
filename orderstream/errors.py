"""The errors that orderstream raises on purpose.  Each says what its reader can do."""

from __future__ import annotations

from collections.abc import Sequence


class OrderstreamError(Exception):
    """Something that the reader can fix; printed without a traceback by the command line."""


class SettingsError(OrderstreamError):
    """Settings that can't be used, all of them listed at once."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        super().__init__("these settings can't be used:\n" + "\n".join(f"  - {fault}" for fault in self.faults))


class EngineUnavailable(OrderstreamError):
    """An engine (Kafka, Redis, Postgres) does not answer at its address."""

    verb = "does not answer"
    advice = "start it with `orderstream up`, or point to another one"

    def __init__(self, engine: str, address: str, why: str, advice: str = "") -> None:
        self.engine, self.address = engine, address
        super().__init__(f"{engine} {self.verb} at {address}: {why}\n{advice or self.advice}")


class EngineRefused(EngineUnavailable):
    """An engine answers and does not let us in, or shows a certificate that we don't trust."""

    verb = "does not let us in"


class EngineMissing(OrderstreamError):
    """A program that a local engine needs is not installed, and can't be installed from here."""


class TopicsMisfit(OrderstreamError):
    """A topic has another number of partitions than the pipeline."""


class RecordTooLarge(OrderstreamError):
    """A topic takes no record as large as this one.

    Attributes:
        topic: as the broker names it.
        record: key, value and headers.
    """

    def __init__(self, topic: str, record: tuple[bytes | None, bytes | None, Sequence[tuple[str, bytes]]]) -> None:
        self.topic, self.record = topic, record
        key, value, headers = record
        size = len(key or b"") + len(value or b"") + sum(len(name) + len(data or b"") for name, data in headers)
        super().__init__(
            f"topic {topic} takes no record of {size} bytes, which is needed there\n"
            "raise its max.message.bytes (kafka-configs.sh --alter)"
        )


class NotFound(OrderstreamError):
    """An order or a product with this id does not exist."""


class InvalidRecord(OrderstreamError):
    """A record that no stage can process.  It goes to ``dead-letters`` and the stream continues.

    Args:
        reason: machine-readable, from the closed list in :mod:`orderstream.streams.dead_letters`.
        detail: for the person who has to fix the producer.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


class OwnershipLost(Exception):
    """The partition of a batch was revoked while the batch waited; the batch is dropped, the new owner has it."""
