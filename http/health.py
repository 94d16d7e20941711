"""``/health``: the process lives.  ``/ready``: the three engines answer, asked now.  ``/metrics``: Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from orderstream.http.orders import json

READY_TIMEOUT_S = 2.0

Probe = Callable[[], Awaitable[Any]]


async def health(request: web.Request) -> web.Response:
    """Answer 200: the process lives."""
    return json(200, {"status": "ok"})


async def metrics(request: web.Request) -> web.Response:
    """Answer what this process has counted."""
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _ask(probe: Probe) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        await asyncio.wait_for(probe(), READY_TIMEOUT_S)
    except Exception as error:  # noqa: BLE001  (whatever it is, the engine is not ready, and the answer says why)
        return {"ready": False, "error": type(error).__name__}
    return {"ready": True, "latency_ms": round((time.perf_counter() - start) * 1000, 2)}


def ready(engines: dict[str, tuple[str, Probe]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Return the handler of ``/ready`` over engines: name to address (without credentials) and probe."""

    async def answer(request: web.Request) -> web.Response:
        told = await asyncio.gather(*(_ask(probe) for _, probe in engines.values()))
        report = {
            name: {"address": address, **found}
            for (name, (address, _)), found in zip(engines.items(), told, strict=True)
        }
        good = all(found["ready"] for found in told)
        return json(200 if good else 503, {"status": "ready" if good else "not ready", "engines": report})

    return answer
