"""A worker with a fault: its reserve stage never returns from a batch.  ``stuck_worker.py waits|blocks``."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from orderstream.agents import reserve
from orderstream.agents.app import run_worker
from orderstream.settings import load


async def waits(*_: Any) -> None:
    """Wait for what never comes."""
    await asyncio.Event().wait()


async def blocks(*_: Any) -> None:
    """Keep the event loop from coming round."""
    time.sleep(3600)  # noqa: ASYNC251


if __name__ == "__main__":
    fault: Any = {"waits": waits, "blocks": blocks}[sys.argv[1]]
    reserve.reserve = fault
    run_worker(load())
