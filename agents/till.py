"""Charges and refunds under way at the payment provider, each asked until its outcome is known."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import structlog

from orderstream import metrics
from orderstream.agents.provider import Charge, OutcomeUnknown, Provider, Verdict
from orderstream.backoff import Backoff
from orderstream.exits import end_process
from orderstream.failpoints import failpoint

ASK_AGAIN_MIN_S = 0.2
"""First pause between two questions about the same charge; doubles up to the setting ``retry_wait_max_s``."""

log = structlog.get_logger("pay")


class Answer(NamedTuple):
    """What came of a charge (``verdict``) or of a refund (``verdict`` None)."""

    order_id: str
    verdict: Verdict | None


class Till:
    """Charges and refunds under way: many at once, none blocking another, each asked until its outcome is known."""

    def __init__(self, provider: Provider, in_flight_max: int, pause_max_s: float, wake: asyncio.Event) -> None:
        self._provider = provider
        self._room = asyncio.Semaphore(in_flight_max)
        self._pause_max_s = pause_max_s
        self._wake = wake
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.answers: deque[Answer] = deque()

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, order_id: object) -> bool:
        return order_id in self._tasks

    @property
    def is_full(self) -> bool:
        """Whether as many requests are under way as may be."""
        return self._room.locked()

    def charge(self, charge: Charge) -> Verdict | None:
        """Ask for a charge; return its verdict when the provider knows it at once, else it comes among ``answers``."""
        if charge.order_id in self._tasks:
            return None
        first = None
        try:
            if not self._room.locked():
                answer = self._provider.charge(charge)
                if isinstance(answer, Verdict):
                    return answer
                first = answer
        except OutcomeUnknown as error:
            self._unknown(charge.order_id, error)
        self._start(charge.order_id, self._charging(charge, first))
        return None

    def refund(self, order_id: str, charge_id: str, amount_cents: int) -> None:
        """Give a charge back, however often it takes."""
        if order_id not in self._tasks:
            self._start(order_id, self._refunding(order_id, charge_id, amount_cents))

    def void(self, order_id: str) -> None:
        """Have no charge of this order stand, now or later, however often it takes."""
        if order_id not in self._tasks:
            self._start(order_id, self._voiding(order_id))

    def keep(self, order_ids: Iterable[str]) -> None:
        """Stop asking about other orders than these: they have another owner now, who asks under the same keys."""
        kept = set(order_ids)
        for order_id in [order_id for order_id in self._tasks if order_id not in kept]:
            self._tasks.pop(order_id).cancel()
        self.answers = deque(answer for answer in self.answers if answer.order_id in kept)

    def _start(self, order_id: str, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks[order_id] = task
        task.add_done_callback(lambda done: self._ended(order_id, done))
        metrics.PAYMENT_IN_FLIGHT.set(len(self._tasks))

    def _ended(self, order_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(order_id) is task:
            del self._tasks[order_id]
        metrics.PAYMENT_IN_FLIGHT.set(len(self._tasks))
        if not task.cancelled() and (error := task.exception()) is not None:
            end_process("asking the payment provider failed", error)

    def _unknown(self, order_id: str, error: OutcomeUnknown) -> None:
        metrics.PAYMENT_UNKNOWN.inc()
        log.warning("no verdict from the payment provider, asking again", order_id=order_id, error=str(error))

    async def _charging(self, charge: Charge, first: Any) -> None:
        start = time.perf_counter()
        backoff = Backoff(ASK_AGAIN_MIN_S, self._pause_max_s)
        while True:
            try:
                async with self._room:
                    answer = first if first is not None else self._provider.charge(charge)
                    first = None
                    verdict = answer if isinstance(answer, Verdict) else await answer
                break
            except OutcomeUnknown as error:
                self._unknown(charge.order_id, error)
                await backoff.pause()
                metrics.PAYMENT_ATTEMPTS.inc()
        metrics.PAYMENT_LATENCY.observe(time.perf_counter() - start)
        self.answers.append(Answer(charge.order_id, verdict))
        self._wake.set()

    async def _refunding(self, order_id: str, charge_id: str, amount_cents: int) -> None:
        backoff = Backoff(ASK_AGAIN_MIN_S, self._pause_max_s)
        while True:
            try:
                async with self._room:
                    failpoint("pay.before_refund")
                    await self._provider.refund(order_id, charge_id, amount_cents)
                break
            except OutcomeUnknown as error:
                self._unknown(order_id, error)
                await backoff.pause()
        failpoint("pay.after_refund")
        self.answers.append(Answer(order_id, None))
        self._wake.set()

    async def _voiding(self, order_id: str) -> None:
        backoff = Backoff(ASK_AGAIN_MIN_S, self._pause_max_s)
        while True:
            try:
                async with self._room:
                    failpoint("pay.before_void")
                    await self._provider.void(order_id)
                break
            except OutcomeUnknown as error:
                self._unknown(order_id, error)
                await backoff.pause()
        failpoint("pay.after_void")
        self.answers.append(Answer(order_id, None))
        self._wake.set()
