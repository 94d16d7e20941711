"""The loud end of a process, and the exit codes that say why to a supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import structlog

log = structlog.get_logger("exit")

EXIT_FAULT = 70
"""Exit code of a worker that ended itself: sysexits.h calls it an internal software error."""


def end_process(why: str, error: BaseException | None = None) -> None:
    """End the process at once, saying why; no clean-up, so nothing is acknowledged that was not done."""
    log.critical(why, error=repr(error), exc_info=error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_FAULT)


def leave_when_asked() -> None:
    """Have SIGTERM end this process with 0 until it has more to end than itself: then its own handler takes over."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def end_process_on_failure(task: asyncio.Task[None]) -> None:
    """End the process if a task failed that runs as long as the process does: a callback for ``add_done_callback``."""
    if not task.cancelled() and (error := task.exception()) is not None:
        end_process(f"{task.get_name()} failed", error)
