"""Whether the process lives, whether its engines answer, what it has counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import orjson
import structlog
from aiohttp import web

from orderstream.errors import EngineUnavailable
from orderstream.http.problems import Problem

log = structlog.get_logger("ingress")

CHECK_S = 2.0
"""An engine that takes longer to answer counts as away."""


class Presence:
    """Whether an engine answered when it was last asked; the log hears of each change once."""

    def __init__(self, engine: str, address: str) -> None:
        self.engine, self.address = engine, address
        self.unavailable = False

    def gone(self, error: BaseException, meanwhile: str) -> EngineUnavailable:
        """Note that it did not answer.

        Args:
            error: what it did instead.
            meanwhile: what this process does without it; for the log.

        Returns:
            The error to raise.
        """
        if not self.unavailable:
            self.unavailable = True
            log.warning("an engine is away", engine=self.engine, address=self.address, error=repr(error), so=meanwhile)
        return EngineUnavailable(self.engine, self.address, repr(error))

    def back(self) -> None:
        """Note that it answered."""
        if self.unavailable:
            self.unavailable = False
            log.warning("an engine is back", engine=self.engine, address=self.address)


class Engine(NamedTuple):
    """An engine to check: its name, its address without credentials, and a call that fails when it is away."""

    name: str
    address: str
    check: Callable[[], Awaitable[object]]


async def health(_request: web.Request) -> web.Response:
    """Tell that the process lives; nothing is checked."""
    return _json({"status": "ok"})


async def ready(engines: Sequence[Engine]) -> web.Response:
    """Ask all engines, side by side; tell whether each answers now, and how long it took.

    Raises:
        Problem: ``not-ready``, one does not.
    """
    found = dict(await asyncio.gather(*(check(engine) for engine in engines)))
    away = [name for name, told in found.items() if not told["ready"]]
    if away:
        raise Problem("not-ready", f"No answer from {', '.join(away)}.", engines=found)
    return _json({"status": "ready", "engines": found})


async def check(engine: Engine) -> tuple[str, dict[str, Any]]:
    """Ask one engine; return its name, and whether it answers, how fast, or what it did instead."""
    start = time.perf_counter()
    told: dict[str, Any] = {"ready": True, "address": engine.address}
    try:
        async with asyncio.timeout(CHECK_S):
            await engine.check()
    except TimeoutError:
        told |= {"ready": False, "error": f"no answer within {CHECK_S:g} s"}
    except Exception as error:  # noqa: BLE001  (whatever it is: the engine can't be worked with, and why is told)
        told |= {"ready": False, "error": str(error) or repr(error)}
    told["latency_ms"] = round((time.perf_counter() - start) * 1000, 1)
    return engine.name, told


def _json(document: dict[str, Any]) -> web.Response:
    return web.Response(body=orjson.dumps(document), content_type="application/json")
