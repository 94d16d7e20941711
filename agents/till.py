"""Charges, voids and refunds that the payment provider is asked for: each until its outcome is known, none blocking others.

Half of room and rate is kept for charges that are asked for the first time: these are not held up by what is asked again,
what waited in Postgres, and money that goes back, each of which has its turn when its pause is over.  A provider that does
not work, or refuses the token, is left alone but for one request after each pause; one that is silent has the room that it
takes, and no more.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog

from orderstream import metrics
from orderstream.agents.lifecycle import Charged, Declined, Event, GivenBack, Refused, Rejected
from orderstream.agents.provider import Back, Cause, Charge, OutcomeUnknown, Provider, Verdict
from orderstream.exits import end_process
from orderstream.failpoints import failpoint

ASK_AGAIN_MIN_S = 0.2
"""First pause between two questions about the same order; doubles up to the setting ``retry_wait_max_s``."""

REJECTED_MAX = 5
"""Requests of an order that the provider rejects one after the other, before they are taken to be rejected for good."""

FAILURES_MAX = 20
"""Requests that fail one after the other, before the provider is left alone."""

BURST_S = 0.25
"""Requests that may be made at once, in seconds of the rate."""

UNKNOWN_LOG_S = 10.0
"""How often outcomes that are not known are logged, of each cause."""

HELD = {
    Cause.UNAVAILABLE: "the payment provider does not work: everything that it is asked waits until it does",
    Cause.MISCONFIGURED: "the payment provider refuses us (token, URL, account): every charge waits, nobody is declined",
}
"""Why the provider is left alone, as it is logged once."""

log = structlog.get_logger("pay")


class Answer(NamedTuple):
    """What the provider said about an order."""

    order_id: str
    event: Event


@dataclass(slots=True, eq=False)
class Ask:
    """What the provider is asked about an order, until it is known.

    Attributes:
        what: ``charge``, ``void`` or ``refund``.
        charge: as it was, or would be, charged.
        charge_id: what is to be refunded.
        is_late: it has no claim on the half that is kept for what is asked for the first time.
        first: the answer to its first request, begun already.
        tries: how often its outcome was not known.
        rejected: how often in a row it was rejected.
        request: the one under way.
        is_probe: that was made to see whether the provider works again.
        then_void: its order has ended meanwhile.
    """

    what: str
    charge: Charge
    charge_id: str
    is_late: bool
    first: Any = None
    tries: int = 0
    rejected: int = 0
    request: asyncio.Task[Event | OutcomeUnknown] | None = None
    is_probe: bool = False
    then_void: bool = False
    since: float = field(default_factory=time.perf_counter)


class _Rate:
    """A bound in requests a second."""

    def __init__(self, per_s: float) -> None:
        self._per_s, self._most = per_s, max(1.0, per_s * BURST_S)
        self._left, self._at = self._most, 0.0

    def wait_s(self, now: float) -> float:
        """Return after how many seconds a request may be made; 0: now."""
        self._left = min(self._most, self._left + (now - self._at) * self._per_s)
        self._at = now
        return 0.0 if self._left >= 1 else (1 - self._left) / self._per_s

    def take(self) -> None:
        """Note that one is made."""
        self._left -= 1


class Till:
    """What the provider is asked by one worker.

    Attributes:
        answers: what it said, until the pay stage takes it.
        tired: orders whose pauses have become the longest; they wait in Postgres.
    """

    def __init__(
        self, provider: Provider, in_flight_max: int, rate_max: float, pause_max_s: float, wake: asyncio.Event
    ) -> None:
        self._provider = provider
        self._in_flight_max, self._late_max = in_flight_max, max(1, in_flight_max // 2)
        self._rate, self._late_rate = _Rate(rate_max), _Rate(rate_max / 2)
        self._pause_max_s = pause_max_s
        self._wake = wake
        self._asks: dict[str, Ask] = {}
        self._fresh: OrderedDict[str, Ask] = OrderedDict()
        self._late: OrderedDict[str, Ask] = OrderedDict()
        self._pausing: list[tuple[float, int, Ask]] = []  # by when they are asked again
        self._paused = 0
        self._requests: set[Ask] = set()
        self._late_requests = 0
        self._was_late = False
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._unlogged: dict[Cause, tuple[float, int]] = {}
        self._has_void = True
        # The breaker
        self._failures = 0
        self._held: Cause | None = None
        self._held_s = self._probe_at = 0.0
        self.answers: deque[Answer] = deque()
        self.tired: list[str] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, order_id: object) -> bool:
        return order_id in self._asks

    @property
    def is_full(self) -> bool:
        """Whether as much is to be asked for the first time as may be asked at once, or nothing may."""
        untried = len(self._fresh) + sum(not ask.tries for ask in self._late.values())
        return self._held is not None or untried >= self._in_flight_max

    def charge(self, charge: Charge, *, is_late: bool) -> Verdict | None:
        """Ask for a charge; return its verdict when the provider knows it at once, else it comes among ``answers``.

        Args:
            charge: of an order that was not cancelled.
            is_late: the order waits in Postgres, so its charge may have been asked for before.
        """
        if charge.order_id in self._asks:
            return None
        first: Any = None
        if len(self._requests) < self._in_flight_max and self._held is None:
            first = self._provider.charge(charge)
            if isinstance(first, Verdict):
                return first
        self._add(Ask("charge", charge, "", is_late, first))
        return None

    def refund(self, charge: Charge, charge_id: str) -> None:
        """Have a charge given back."""
        if charge.order_id not in self._asks:
            self._add(Ask("refund", charge, charge_id, is_late=True))

    def void(self, charge: Charge) -> None:
        """Have no charge of this order stand, now or later; a request of its own that is under way has its answer first."""
        ask = self._asks.get(charge.order_id)
        if ask is not None and ask.what == "charge":
            if ask.request is not None:
                ask.then_void = True
                return
            self._remove(ask)
        elif ask is not None:
            return
        self._add(Ask("void", charge, "", is_late=True))

    def keep(self, order_ids: Iterable[str]) -> None:
        """Stop asking about other orders than these: they have another owner now, who asks under the same keys."""
        kept = set(order_ids)
        for ask in [ask for order_id, ask in self._asks.items() if order_id not in kept]:
            self._remove(ask)
        self.answers = deque(answer for answer in self.answers if answer.order_id in kept)

    def drop(self, order_id: str) -> bool:
        """Stop asking about an order, unless a request is under way; return whether nothing is asked about it now."""
        ask = self._asks.get(order_id)
        if ask is not None and ask.request is None:
            self._remove(ask)
        return ask is None or ask.request is None

    def close(self) -> None:
        """Stop asking: whoever takes these orders over asks under the same keys."""
        self._is_closed = True
        self.keep(())
        if self._timer is not None:
            self._timer.cancel()

    # What is asked next

    def _add(self, ask: Ask) -> None:
        self._asks[ask.charge.order_id] = ask
        (self._late if ask.is_late else self._fresh)[ask.charge.order_id] = ask
        self._ask_next()

    def _remove(self, ask: Ask) -> None:
        order_id = ask.charge.order_id
        self._asks.pop(order_id, None)
        self._fresh.pop(order_id, None)
        self._late.pop(order_id, None)
        if ask.first is not None:
            ask.first.close()
            ask.first = None
        if ask.request is not None:
            ask.request.cancel()

    def _ask_next(self) -> None:
        while not self._is_closed and len(self._requests) < self._in_flight_max:
            now = time.monotonic()
            while self._pausing and self._pausing[0][0] <= now:
                ask = heapq.heappop(self._pausing)[2]
                if self._asks.get(ask.charge.order_id) is ask:
                    self._late[ask.charge.order_id] = ask
            queue, again_at = self._turn(now)
            if queue is None:
                self._ask_at(min(again_at, self._pausing[0][0] if self._pausing else again_at))
                return
            self._begin(queue)

    def _turn(self, now: float) -> tuple[OrderedDict[str, Ask] | None, float]:
        """Return from which queue the next request is made; None: from none before this time."""
        if not (self._fresh or self._late):
            return None, float("inf")
        if self._held is not None:
            return (self._fresh or self._late, now) if now >= self._probe_at else (None, self._probe_at)
        if wait_s := self._rate.wait_s(now):
            return None, now + wait_s
        again_at = float("inf")
        if self._late and self._late_requests < self._late_max and not (self._fresh and self._was_late):
            if not (wait_s := self._late_rate.wait_s(now)):
                return self._late, now
            again_at = now + wait_s
        return (self._fresh, now) if self._fresh else (None, again_at)

    def _begin(self, queue: OrderedDict[str, Ask]) -> None:
        is_held = self._held is not None
        # Of what may be the fault of these orders alone the newest knows least.
        _, ask = queue.popitem(last=is_held and queue is self._fresh)
        self._was_late, ask.is_probe = ask.is_late, is_held
        if is_held:
            self._probe_at = time.monotonic() + self._held_s
            self._held_s = min(2 * self._held_s, self._pause_max_s)
        self._rate.take()
        if ask.is_late:
            self._late_rate.take()
            self._late_requests += 1
        if ask.what == "charge" and ask.tries:
            metrics.PAYMENT_ATTEMPTS.inc()
        self._requests.add(ask)
        ask.request = asyncio.create_task(self._request(ask))
        ask.request.add_done_callback(lambda request: self._ended(ask, request))
        metrics.PAYMENT_IN_FLIGHT.set(len(self._requests))

    def _ask_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if at < float("inf"):
            self._timer = asyncio.get_running_loop().call_later(max(0.0, at - time.monotonic()), self._ask_next)

    # One request

    async def _request(self, ask: Ask) -> Event | OutcomeUnknown:
        try:
            match ask.what:
                case "charge":
                    return await self._charge(ask)
                case "refund":
                    failpoint("pay.before_refund")
                    event = _given(
                        await self._provider.refund(ask.charge.order_id, ask.charge_id, ask.charge.amount_cents)
                    )
                    failpoint("pay.after_refund")
                    return event
                case _:
                    failpoint("pay.before_void")
                    back = await self._provider.void(ask.charge.order_id)
                    event = await self._without_void(ask.charge) if back is Back.NO_VOID else _given(back)
                    failpoint("pay.after_void")
                    return event
        except OutcomeUnknown as error:
            return error

    async def _charge(self, ask: Ask) -> Event:
        first, ask.first = ask.first, None
        verdict = await _verdict(first if first is not None else self._provider.charge(ask.charge))
        return Declined() if verdict.charge_id is None else Charged(verdict.charge_id, verdict.amount_cents)

    async def _without_void(self, charge: Charge) -> Event:
        """Ask for the charge again, under its key, and have it given back if it stands: the provider has no void."""
        if self._has_void:
            self._has_void = False
            log.warning("the payment provider has no void: charges of unpaid orders are asked again and refunded")
        if not charge.amount_cents:
            return Refused()  # charged before Postgres was set back, perhaps, and nobody knows over what
        verdict = await _verdict(self._provider.charge(charge))
        if verdict.charge_id is None:
            return GivenBack()
        self._answer(charge.order_id, Charged(verdict.charge_id))
        amount_cents = charge.amount_cents if verdict.amount_cents is None else verdict.amount_cents
        return _given(await self._provider.refund(charge.order_id, verdict.charge_id, amount_cents))

    def _ended(self, ask: Ask, request: asyncio.Task[Event | OutcomeUnknown]) -> None:
        order_id = ask.charge.order_id
        ask.request = None
        self._requests.discard(ask)
        self._late_requests -= ask.is_late
        metrics.PAYMENT_IN_FLIGHT.set(len(self._requests))
        if not request.cancelled():
            if (fault := request.exception()) is not None:
                end_process("asking the payment provider failed", fault)
            outcome = request.result()
            self._judge(outcome, is_probe=ask.is_probe)
            event = self._unknown(ask, outcome) if isinstance(outcome, OutcomeUnknown) else outcome
            if self._asks.get(order_id) is ask:
                if event is None and not ask.then_void:
                    self._pause(ask)
                else:
                    self._remove(ask)
                if event is not None:
                    self._answer(order_id, event)
                    if ask.what == "charge":
                        metrics.PAYMENT_LATENCY.observe(time.perf_counter() - ask.since)
                if ask.then_void:
                    self.void(ask.charge)
        self._ask_next()

    def _answer(self, order_id: str, event: Event) -> None:
        self.answers.append(Answer(order_id, event))
        self._wake.set()

    def _unknown(self, ask: Ask, error: OutcomeUnknown) -> Event | None:
        """Note that a request had no verdict; return what follows where it is rejected each time."""
        metrics.PAYMENT_UNKNOWN.inc()
        self._log(ask, error)
        if error.stray is not None:
            order_id, verdict = error.stray
            self._answer(order_id, Charged(verdict.charge_id or "", verdict.amount_cents))
        ask.rejected = ask.rejected + 1 if error.cause is Cause.REJECTED else 0
        if ask.rejected < REJECTED_MAX:
            return None
        return Rejected() if ask.what == "charge" else Refused()

    def _log(self, ask: Ask, error: OutcomeUnknown) -> None:
        now = time.monotonic()
        at, unlogged = self._unlogged.get(error.cause, (now - UNKNOWN_LOG_S, 0))
        if now - at < UNKNOWN_LOG_S:
            self._unlogged[error.cause] = (at, unlogged + 1)
            return
        self._unlogged[error.cause] = (now, 0)
        log.warning(
            "no verdict from the payment provider, asking again",
            order_id=ask.charge.order_id,
            asked=ask.what,
            cause=error.cause,
            error=str(error)[:500],
            more_like_it=unlogged,
        )

    def _pause(self, ask: Ask) -> None:
        pause_s = min(ASK_AGAIN_MIN_S * 2**ask.tries, self._pause_max_s)
        ask.tries, ask.is_late = min(ask.tries + 1, 30), True
        if pause_s == self._pause_max_s:
            self.tired.append(ask.charge.order_id)
            self._wake.set()
        self._paused += 1
        heapq.heappush(self._pausing, (time.monotonic() + pause_s * random.uniform(0.5, 1.0), self._paused, ask))

    # The breaker

    def _judge(self, outcome: Event | OutcomeUnknown, *, is_probe: bool) -> None:
        """Note whether the provider works; leave it alone while it does not, but for one request after each pause."""
        cause = outcome.cause if isinstance(outcome, OutcomeUnknown) else None
        if cause not in (Cause.UNAVAILABLE, Cause.MISCONFIGURED):
            self._failures = 0
            if self._held is not None:
                log.warning("the payment provider works again", was=self._held)
                self._hold(None)
            return
        self._failures += 1
        if self._held is None and self._failures >= FAILURES_MAX:
            self._held_s, self._probe_at, is_probe = 2 * ASK_AGAIN_MIN_S, time.monotonic() + ASK_AGAIN_MIN_S, True
        if is_probe and cause is not self._held:
            self._hold(cause)
            log.error(HELD[cause], error=str(outcome)[:500])

    def _hold(self, cause: Cause | None) -> None:
        self._held = cause
        for known in HELD:
            metrics.PAYMENTS_HELD.labels(known).set(known is cause)


async def _verdict(answer: Any) -> Verdict:
    """Return what the provider says of a charge, known at once or to be waited for."""
    verdict: Verdict = answer if isinstance(answer, Verdict) else await answer
    return verdict


def _given(back: Back) -> Event:
    return GivenBack() if back is Back.GIVEN else Refused()
