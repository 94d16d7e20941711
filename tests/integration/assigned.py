"""A worker without Faust, as far as its stages ask: for tests that run a stage on real engines."""

from __future__ import annotations

from collections.abc import Coroutine
from collections.abc import Set as AbstractSet
from types import SimpleNamespace
from typing import Any

from faust.types import TP


def assigned(places: AbstractSet[TP]) -> Any:
    """Return the app of a worker that has these partitions of ``orders``; nothing is acknowledged, nothing is lost."""
    return SimpleNamespace(
        consumer_generation_id=1,
        conf=SimpleNamespace(broker_session_timeout=60.0),
        pulse=SimpleNamespace(stood_still=lambda *_: False),
        consumer=SimpleNamespace(
            ack_chunk=lambda _: None,
            is_current=lambda _: True,
            committed_offset=lambda _: None,
            assignment=lambda: places,
        ),
    )


async def to_its_end(step: Coroutine[Any, Any, Any]) -> None:
    """Await a batch of a stage, step by step."""
    following: Coroutine[Any, Any, Any] | None = step
    while following is not None:
        following = await following
