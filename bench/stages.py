"""How busy a worker's stages were while a run was measured, from what the worker itself counts."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from orderstream.engines.child import Child

STAGES = ("reserve", "pay", "commit")

METRICS_S = 30.0  # a busy worker takes its time to answer


@dataclass(frozen=True)
class Counted:
    """What a stage counted since the worker's start: batches, their records, their seconds, and these by step."""

    batches: float
    records: float
    seconds: float
    steps: dict[str, float]


@dataclass(frozen=True)
class Stage:
    """One stage during a run.

    ``records`` are those of its topics: orders for reserve, lists of lines for the stages behind.  ``busy_share`` is the
    part of the run in which it had a batch in hand; a stage near 1 is the one that all others wait for.  ``steps`` says
    what a batch's seconds went into, in their order.
    """

    batches: int
    records_per_batch: float
    seconds_per_batch: float
    busy_share: float
    steps: dict[str, float]


def counted_by(worker: Child) -> dict[str, Counted]:
    """Return what a worker's stages have counted so far.

    Raises:
        OSError: it does not answer.
    """
    return counted(worker.page("/metrics", METRICS_S))


def counted(exposition: str) -> dict[str, Counted]:
    """Read the worker's ``/metrics``."""
    found: dict[tuple[str, str], float] = {}
    steps: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if "step" in sample.labels and sample.name.endswith("_sum"):
                steps[sample.labels["stage"]][sample.labels["step"]] = sample.value
            elif "stage" in sample.labels and "le" not in sample.labels:
                found[sample.labels["stage"], sample.name] = sample.value
    return {
        stage: Counted(
            found.get((stage, "batch_records_count"), 0.0),
            found.get((stage, "batch_records_sum"), 0.0),
            found.get((stage, "batch_latency_seconds_sum"), 0.0),
            steps[stage],
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
            steps = {k: (v - before[stage].steps.get(k, 0.0)) / batches for k, v in after[stage].steps.items()}
            found[stage] = Stage(int(batches), records / batches, spent / batches, spent / seconds, steps)
    return found
