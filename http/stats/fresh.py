"""An answer that many ask for, made once: for a moment all of them get the same one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")

SHARE, PAUSE_MAX_S = 0.02, 10.0
"""An answer that takes long to make is good for longer, up to ten seconds: little of the time goes into making it."""


class Fresh(Generic[T]):
    """See the module.

    Args:
        make: makes the answer; what it raises is the answer as well.
        least_s: how long an answer is good for, at least.
        clock: seconds, going forward only.
    """

    def __init__(
        self, make: Callable[[], Awaitable[T]], least_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make, self._least_s, self._clock = make, least_s, clock
        self._turn = asyncio.Lock()
        self._until = float("-inf")
        self._made: T | None = None
        self._fault: Exception | None = None

    async def get(self) -> T:
        """Return the answer, at most a moment old; raises what making it raised."""
        async with self._turn:
            start = self._clock()
            if start >= self._until:
                try:
                    self._made, self._fault = await self._make(), None
                except Exception as fault:  # noqa: BLE001 - whoever asks gets it
                    self._made, self._fault = None, fault
                end = self._clock()
                self._until = end + max(self._least_s, min(PAUSE_MAX_S, (end - start) / SHARE))
        if self._fault is not None:
            raise self._fault
        return self._made  # type: ignore[return-value]
