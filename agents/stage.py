"""What every stage shares: the engines, patience with them, and a loud end.

A stage waits for an engine that is unavailable, with capped, jittered backoff, and logs each change of state once.  A batch
whose partitions were revoked meanwhile is dropped unacknowledged.  Any other exception ends the process at once, before
anything is acknowledged: its supervisor starts it again and the batch is read again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import orjson
import structlog
from aiokafka.errors import KafkaError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from orderstream import metrics
from orderstream.agents.batches import Batch
from orderstream.agents.intake import reject
from orderstream.agents.tracing import BatchTrace, Traces
from orderstream.errors import InvalidRecord, RecordTooLarge
from orderstream.exits import end_process
from orderstream.failpoints import failpoint
from orderstream.lua.gate import Counts, Gate, UserUnits
from orderstream.sample import Sample
from orderstream.settings import Settings
from orderstream.sql.store import TRANSIENT, Store
from orderstream.streams import tracing
from orderstream.streams.codec import encode_rows
from orderstream.streams.producer import Outbox, Producer, Record, Step
from orderstream.streams.topics import TOPICS
from orderstream.streams.upstream.app import App
from orderstream.streams.upstream.clients import passes

log = structlog.get_logger("stage")

FAULTS = (*TRANSIENT, KafkaError)


def is_passing(error: BaseException) -> bool:
    """Tell whether a fault is one of an engine that is unavailable, or was for a moment: what failed is tried again."""
    return isinstance(error, FAULTS) and (not isinstance(error, KafkaError) or passes(error))


T = TypeVar("T")


class StageOutbox(Outbox):
    """The outbox of one batch of a stage, which knows the batch's steps, and its trace where there is one."""

    def __init__(self, settings: Settings, stage: str) -> None:
        super().__init__(settings)
        self.steps = metrics.Steps(stage)
        self.trace: BatchTrace | None = None


@dataclass(slots=True)
class Stage:
    """What the stages of one worker share.  Made and closed by :mod:`orderstream.agents.app`."""

    settings: Settings
    app: App
    store: Store
    gate: Gate
    producer: Producer
    sample: Sample = field(default_factory=Sample)
    unavailable: set[str] = field(default_factory=set)
    traces: Traces | None = None
    is_folding: bool = False

    def outbox(self, stage: str, batch: Batch | None = None) -> StageOutbox:
        """Begin a batch of a stage: return its outbox."""
        outbox = StageOutbox(self.settings, stage)
        if self.traces is not None and batch is not None:
            outbox.trace = self.trace(outbox.steps)
            for spec in TOPICS:
                if spec.inner:
                    for record in batch.records(self.settings.topic(spec.name)):
                        self.traces.hear(record.headers)
        return outbox

    def trace(self, steps: metrics.Steps) -> BatchTrace | None:
        """Begin to trace a batch that takes these steps; None: nothing is traced."""
        return None if self.traces is None else BatchTrace(self.traces, steps)

    def packed(self, rows: Sequence[Any]) -> list[Record]:
        """Return the records of an inner topic that carry these rows, with the contexts of the orders that are traced.

        Args:
            rows: named tuples, each with an ``order_id``.
        """
        size = self.settings.handoff_outcomes_max
        if self.traces is None:
            return [(None, value, ()) for value in encode_rows(rows, size)]
        packed: list[Record] = []
        for part in (rows[start : start + size] for start in range(0, len(rows), size)):
            headers = tracing.in_rows((row.order_id for row in part), self.traces.tracing.contexts)
            packed += [(None, value, headers) for value in encode_rows(part, size)]
        return packed

    async def until_available(self, engine: str, call: Callable[[], Awaitable[T]], batch: Batch | None = None) -> T:
        """Await ``call()`` until the engine answers; the call must be safe to repeat.

        Raises:
            OwnershipLost: there was a rebalance while the engine was unavailable.
        """
        try:
            result = await call()
        except FAULTS as error:
            if not is_passing(error):
                raise
            result = await self._again(engine, call, batch, error)
        if engine in self.unavailable:
            self.unavailable.discard(engine)
            log.warning("an engine is available again", engine=engine)
        return result

    async def _again(
        self, engine: str, call: Callable[[], Awaitable[T]], batch: Batch | None, failed: BaseException | None
    ) -> T:
        """Try again what failed, after a pause.

        Its own method: each loop of tenacity leaves a cycle of some fifty objects that holds the batch; one a call were
        thousands a second, and the collector would stop everything for them.
        """

        def before_sleep(state: RetryCallState) -> None:
            metrics.RETRIES.labels(engine).inc()
            if engine not in self.unavailable:
                self.unavailable.add(engine)
                error = state.outcome.exception() if state.outcome else None
                log.warning("an engine is unavailable, waiting for it", engine=engine, error=repr(error))
            if batch is not None:
                batch.check_owned()

        async for attempt in AsyncRetrying(
            retry=retry_if_exception(is_passing),
            wait=wait_random_exponential(multiplier=0.05, max=self.settings.retry_wait_max_s),
            before_sleep=before_sleep,
        ):
            with attempt:
                if failed is not None:
                    known, failed = failed, None
                    raise known
                result = await call()
        return result

    async def update_gate(
        self,
        counts: dict[str, Counts],
        takes: Mapping[str, Sequence[str]] | None = None,
        replies: list[tuple[str, bytes]] | None = None,
        batch: Batch | None = None,
        *,
        users: UserUnits | None = None,
        claim_of: Callable[[str], int] = lambda product_id: 0,
    ) -> None:
        """Update Redis with what Postgres committed; where that fails, invalidate what it knows of these products.

        A lost reply is no fault: the ingress that waits for it asks Postgres when the time is up.
        """
        takes = takes or {}
        is_told = await self.gate.decided(counts, takes, replies or (), users, claim_of)
        if not is_told and (products := sorted({*counts, *takes})):
            await self.invalidate_gate(products, batch)

    async def invalidate_gate(self, product_ids: Sequence[str], batch: Batch | None = None) -> None:
        """Invalidate what Redis knows of these products: they are loaded again when they are asked for."""
        metrics.REDIS_GENERATIONS.inc(len(product_ids))
        self.gate.invalidated(
            await self.until_available("postgres", lambda: self.store.invalidate_gate(product_ids), batch)
        )

    async def emit(self, outbox: StageOutbox, stage: str, batch: Batch | None = None) -> None:
        """Produce: first the dead letters, then, once all replicas have them, what is sent on to where it belongs."""
        for step, place in ((outbox.publications(), "letters"), (outbox.handovers(), "sent_on")):
            if step:
                await self._emit(step, outbox, batch)
                failpoint(f"{stage}.after_{place}")
                outbox.steps.done(place)
        if outbox.trace is not None:
            outbox.trace.finish()

    async def _emit(self, step: Step, outbox: Outbox, batch: Batch | None) -> None:
        """Produce a step; what can't be sent on, since it would be larger there than a record may be, is rejected."""
        while True:
            if batch is not None:
                batch.check_owned()
            try:
                await self.until_available("kafka", lambda: self.producer.send(step), batch)
                return
            except RecordTooLarge as error:
                source = outbox.withdraw(error.record)
                if source is None:
                    raise
                letters = Outbox(self.settings)
                reject(InvalidRecord("too_large", f"it would have to be sent on: {error}"), source, letters)
                await self.until_available("kafka", lambda: self.producer.send(letters.publications()), batch)  # noqa: B023


def agent_body(body: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """Wrap an agent so that an exception that leaves it ends the process, before Faust can acknowledge anything."""

    @wraps(body)
    async def run(stream: Any) -> None:
        try:
            await body(stream)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001  (whatever it is, the process ends with it)
            end_process(f"the {body.__qualname__} agent failed", error)

    return run


def reply_messages(stage: Stage, verdicts: Sequence[tuple[str, str, str | None]]) -> list[tuple[str, bytes]]:
    """Make one message for each channel: a list of ``[order id, status, reason]``."""
    by_channel: dict[str, list[tuple[str, str, str | None]]] = {}
    for reply_to, order_id, reason in verdicts:
        status = "RESERVED" if reason is None else "CANCELLED"
        by_channel.setdefault(reply_to, []).append((order_id, status, reason))
    return [(stage.gate.keys.replies(name), orjson.dumps(replies)) for name, replies in by_channel.items()]
