"""Where a run of ``reconcile`` ended: a file from which the next one continues.

It holds the next offset of each partition, the sums of what has ended and agreed, and whatever had not.  It is written in
one step (a new file, flushed to the disk, replaces the old one) and belongs to one pipeline on one Kafka cluster.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from orderstream.errors import OrderstreamError
from orderstream.jobs.reconcile.fold import Move, Trace
from orderstream.settings import Settings

FORMAT = 5
ADVICE = "use another one with --checkpoint, or read it all with --from-beginning"


class UnusableCheckpoint(OrderstreamError):
    """A checkpoint from which this pipeline can't continue."""

    def __init__(self, file: Path, why: str) -> None:
        super().__init__(f"{file}: {why}\n{ADVICE}")


@dataclass(frozen=True, slots=True)
class Identity:
    """Which pipeline a checkpoint is of."""

    cluster_id: str
    app_id: str
    topic_prefix: str
    partitions: int

    @classmethod
    def of(cls, settings: Settings, cluster_id: str) -> Identity:
        """Return the identity of the pipeline of these settings."""
        return cls(cluster_id, settings.app_id, settings.topic_prefix, settings.partitions)


@dataclass(slots=True)
class Checkpoint:
    """See the module.

    Attributes:
        pipeline: whose it is.
        at: when Postgres was read last, by its own clock.
        offsets: next offset by topic and partition.
        sums: received, adjusted and sold units of each product, by what has ended and agreed.
        orders: traces of the others.
        moves: stock commands that are not in the sums.
        dead: partitions and offsets of those of their records that are dead letters.
        asked: of these orders, those that their customers cancelled, with the place of the command.
        claims: the newest claim of each home that has told an event.
    """

    pipeline: Identity
    at: datetime
    offsets: dict[tuple[str, int], int]
    sums: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    orders: dict[str, Trace] = field(default_factory=dict)
    moves: dict[str, list[Move]] = field(default_factory=dict)
    dead: list[tuple[int, int]] = field(default_factory=list)
    asked: dict[str, tuple[int, int]] = field(default_factory=dict)
    claims: dict[int, int] = field(default_factory=dict)


def default_file(settings: Settings) -> Path:
    """Return the file of a pipeline's checkpoint, by default."""
    return settings.local_dir / "reconcile" / f"{settings.app_id}.json"


_KEPT = (
    "user_id",
    "method",
    "lines",
    "partition",
    "offset",
    "astray",
    "published",
    "reason",
    "total_cents",
    "prices",
    "charge_id",
)
"""What a checkpoint keeps of a trace, in the order in which it is stored; the trace's rivals come last."""


def _stored(trace: Trace) -> list[Any]:
    return [*(getattr(trace, name) for name in _KEPT), [_stored(rival) for rival in trace.rivals or ()]]


def _restored(stored: list[Any]) -> Trace:
    *values, rivals = stored
    kept = dict(zip(_KEPT, values, strict=True))
    lines = tuple((str(p), int(q)) for p, q in kept["lines"])
    trace = Trace(kept["user_id"], kept["method"], lines, kept["partition"], kept["offset"])
    for name in ("astray", "published", "reason", "total_cents", "prices", "charge_id"):
        setattr(trace, name, kept[name])
    trace.rivals = [_restored(rival) for rival in rivals] or None
    return trace


def save(file: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint that is there, or leave it as it is.

    Raises:
        OSError: it can't be written.
    """
    offsets: dict[str, dict[str, int]] = {}
    for (topic, partition), offset in checkpoint.offsets.items():
        offsets.setdefault(topic, {})[str(partition)] = offset
    body = {
        "format": FORMAT,
        "pipeline": asdict(checkpoint.pipeline),
        "at": checkpoint.at,
        "offsets": offsets,
        "sums": checkpoint.sums,
        "orders": {order_id: _stored(trace) for order_id, trace in checkpoint.orders.items()},
        "moves": {command_id: [[*move] for move in moves] for command_id, moves in checkpoint.moves.items()},
        "dead": checkpoint.dead,
        "asked": checkpoint.asked,
        "claims": {str(home): claim for home, claim in checkpoint.claims.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with fresh.open("wb") as out:
            out.write(orjson.dumps(body))
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(file: Path, pipeline: Identity) -> Checkpoint | None:
    """Return the checkpoint of a pipeline; None when there is no such file.

    Raises:
        UnusableCheckpoint: it is no checkpoint, of another format, or of another pipeline.
    """
    try:
        body = orjson.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UnusableCheckpoint(file, f"can't be read: {error}") from None
    if not isinstance(body, Mapping) or "format" not in body:
        raise UnusableCheckpoint(file, "is no checkpoint")
    if body["format"] != FORMAT:
        raise UnusableCheckpoint(file, f"has format {body['format']}, this version reads {FORMAT}")
    try:
        theirs = Identity(**body["pipeline"])
        for name, value in asdict(pipeline).items():
            if value != getattr(theirs, name):
                raise UnusableCheckpoint(
                    file, f"is of another pipeline: {name} {getattr(theirs, name)!r}, here {value!r}"
                )
        return Checkpoint(
            pipeline=theirs,
            at=datetime.fromisoformat(body["at"]),
            offsets={
                (topic, int(p)): offset for topic, parts in body["offsets"].items() for p, offset in parts.items()
            },
            sums={product_id: (int(r), int(a), int(s)) for product_id, (r, a, s) in body["sums"].items()},
            orders={order_id: _restored(stored) for order_id, stored in body["orders"].items()},
            moves={command_id: [Move(*move) for move in moves] for command_id, moves in body["moves"].items()},
            dead=[(int(partition), int(offset)) for partition, offset in body["dead"]],
            asked={order_id: (int(partition), int(offset)) for order_id, (partition, offset) in body["asked"].items()},
            claims={int(home): int(claim) for home, claim in body["claims"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnusableCheckpoint(file, f"is damaged: {error!r}") from None
