"""Whether the process lives, whether it can do its work, and whether its engines answer."""

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
    """An engine to check.

    Attributes:
        name: as in the answer.
        address: without credentials.
        check: a call that fails when it does not answer.
        is_needed: without it this process can't do its work; without another one it works, degraded.
    """

    name: str
    address: str
    check: Callable[[], Awaitable[object]]
    is_needed: bool = True


async def health(_request: web.Request) -> web.Response:
    """Answer that the process lives; nothing is checked."""
    return _json({"status": "ok"})


async def ready(engines: Sequence[Engine], unable: str | None = None) -> web.Response:
    """Answer whether this process can do its work; all engines are asked, side by side, and timed.

    Args:
        engines: what it works with.
        unable: why it does not work now, whatever the engines do, or None.

    Raises:
        Problem: ``not-ready``, it can't; with ``engines``, and ``degraded``, which are those that do not answer.
    """
    found = dict(await asyncio.gather(*(check(engine) for engine in engines)))
    silent = [engine for engine in engines if not found[engine.name]["ready"]]
    state: dict[str, Any] = {"degraded": [engine.name for engine in silent], "engines": found}
    if unable is not None:
        raise Problem("not-ready", unable, **state)
    needed = [engine.name for engine in silent if engine.is_needed]
    if needed:
        raise Problem("not-ready", f"No answer from {', '.join(needed)}.", **state)
    return _json({"status": "degraded" if silent else "ready", **state})


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
