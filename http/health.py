"""Whether the process lives, and whether its engines answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import orjson
import structlog
from aiohttp import web

from orderstream import connecting
from orderstream.errors import EngineUnavailable
from orderstream.http.problems import Problem

log = structlog.get_logger("ingress")

CHECK_S = 2.0
"""An engine that takes longer to answer counts as unavailable."""


class Presence:
    """Whether an engine answered when it was last asked; each change is logged once."""

    def __init__(self, engine: str, address: str) -> None:
        self.engine, self.address = engine, address
        self.unavailable = False

    def unanswered(self, error: BaseException, meanwhile: str) -> EngineUnavailable:
        """Note that it did not answer.

        Args:
            error: what it did instead.
            meanwhile: what this process does without it; for the log.

        Returns:
            The error to raise.
        """
        fault = connecting.fault(self.engine, self.address, error)
        if not self.unavailable:
            self.unavailable = True
            log.warning(
                f"an engine {fault.verb}", engine=self.engine, address=self.address, error=repr(error), so=meanwhile
            )
        return fault

    def answered(self) -> None:
        """Note that it answered."""
        if self.unavailable:
            self.unavailable = False
            log.warning("an engine is available again", engine=self.engine, address=self.address)


class Engine(NamedTuple):
    """An engine to check: its name, its address without credentials, and a call that fails when it does not answer."""

    name: str
    address: str
    check: Callable[[], Awaitable[object]]


async def health(_request: web.Request) -> web.Response:
    """Answer that the process lives; nothing is checked."""
    return _json({"status": "ok"})


async def ready(engines: Sequence[Engine]) -> web.Response:
    """Ask all engines, side by side: whether each answers now, and how long it took.

    Raises:
        Problem: ``not-ready``, one does not.
    """
    found = dict(await asyncio.gather(*(check(engine) for engine in engines)))
    silent = [name for name, state in found.items() if not state["ready"]]
    if silent:
        raise Problem("not-ready", f"No answer from {', '.join(silent)}.", engines=found)
    return _json({"status": "ready", "engines": found})


async def check(engine: Engine) -> tuple[str, dict[str, Any]]:
    """Ask one engine; return its name, and whether it answers, how fast, or what it did instead."""
    start = time.perf_counter()
    state: dict[str, Any] = {"ready": True, "address": engine.address}
    try:
        async with asyncio.timeout(CHECK_S):
            await engine.check()
    except TimeoutError:
        state |= {"ready": False, "error": f"no answer within {CHECK_S:g} s"}
    except Exception as error:  # noqa: BLE001  (whatever it is: the engine can't be used, and the answer says why)
        state |= {"ready": False, "error": str(error) or repr(error)}
    state["latency_ms"] = round((time.perf_counter() - start) * 1000, 1)
    return engine.name, state


def _json(document: dict[str, Any]) -> web.Response:
    return web.Response(body=orjson.dumps(document), content_type="application/json")
