"""Exponential backoff for retries that are not made in one loop."""

from __future__ import annotations

import asyncio
import random


class Backoff:
    """Pauses that double, with jitter.  For retries that are made in one loop tenacity has them.

    Args:
        min_s: the first pause, in seconds; each is cut by up to a half.
        max_s: the longest.
    """

    def __init__(self, min_s: float, max_s: float) -> None:
        self._min_s, self._max_s = min_s, max_s
        self.reset()

    def reset(self) -> None:
        """Begin with the first pause again: a try succeeded."""
        self._next_s = self._min_s

    async def pause(self) -> None:
        """Wait; the next time twice as long."""
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, self._max_s)
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
