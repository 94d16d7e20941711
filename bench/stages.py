"""How busy a worker's stages were while a run was measured, from what the worker itself counts."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from orderstream.engines.child import Child

STAGES = ("reserve", "pay", "commit")

METRICS_S = 30.0  # a busy worker takes its time to answer


@dataclass(frozen=True)
class Counted:
    """What a stage counted since the worker's start: batches, their records, and seconds from record to handover."""

    batches: float = 0.0
    records: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One stage during a run.

    ``records`` are those of its topics: orders for reserve, lists of lines for the stages behind.  ``busy_share`` is the
    part of the run in which it had a batch in hand; a stage near 1 is the one that all others wait for.
    """

    batches: int
    records_per_batch: float
    seconds_per_batch: float
    busy_share: float


def counted_by(worker: Child) -> dict[str, Counted]:
    """Return what a worker's stages have counted so far.

    Raises:
        OSError: it does not answer.
    """
    return counted(worker.page("/metrics", METRICS_S))


def counted(exposition: str) -> dict[str, Counted]:
    """Read the worker's ``/metrics``."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if "stage" in sample.labels and "le" not in sample.labels:
                found[sample.labels["stage"], sample.name] = sample.value
    return {
        stage: Counted(
            found.get((stage, "batch_records_count"), 0.0),
            found.get((stage, "batch_records_sum"), 0.0),
            found.get((stage, "batch_latency_seconds_sum"), 0.0),
        )
        for stage in STAGES
    }


def between(before: dict[str, Counted], after: dict[str, Counted], seconds: float) -> dict[str, Stage]:
    """Subtract; ``seconds`` is how long the run took."""
    found = {}
    for stage in STAGES:
        batches = after[stage].batches - before[stage].batches
        spent = after[stage].seconds - before[stage].seconds
        if batches:
            records = after[stage].records - before[stage].records
            found[stage] = Stage(int(batches), records / batches, spent / batches, spent / seconds)
    return found
