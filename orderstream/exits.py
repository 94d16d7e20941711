"""The loud end of a process, and the exit codes that say why to a supervisor."""

from __future__ import annotations

import os
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
