"""Logs: structlog for our own lines and for those of the libraries; readable on a terminal, JSON elsewhere."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog

from orderstream.settings import Settings

_CHATTY = ("faust", "mode", "aiokafka", "asyncio", "aiohttp.access", "kafka", "asyncpg", "orderstream")
"""Libraries that log each rebalance in tables: heard from WARNING on, and from INFO on at our debug level.

``orderstream`` is where mode logs the starts and stops of our subclasses of its services; our own loggers have short names.
"""

_REPETITIVE = ("faust", "mode", "aiokafka", "kafka", "opentelemetry")
REPEAT_S = 60.0
"""How often a library's line is logged again while it repeats itself, in seconds."""


class Damper(logging.Filter):
    """Lets a library's warning through once, not at each of its tries: again only after :data:`REPEAT_S`, with their number.

    Lines are the same when their logger and their text before the values are put in are, numbers in it aside: some put
    offsets into the text themselves.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._logged: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a record through, or count it."""
        if record.levelno < logging.WARNING or record.exc_info or not record.name.startswith(_REPETITIVE):
            return True
        key, now = (record.name, re.sub(r"\d+", "#", str(record.msg))), self._clock()
        at, left_out = self._logged.get(key, (now - REPEAT_S, 0))
        if now - at < REPEAT_S:
            self._logged[key] = (at, left_out + 1)
            return False
        self._logged[key] = (now, 0)
        if left_out:
            record.msg = f"{record.msg}  (and {left_out} like it in the last {now - at:.0f} s)"
        return True


_name_trace: list[Callable[[MutableMapping[str, Any]], None]] = []


def name_traces(name: Callable[[MutableMapping[str, Any]], None]) -> None:
    """Have every line from now on say which trace it belongs to, where it belongs to one."""
    _name_trace[:] = [name]


def _traced(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in _name_trace:
        name(line)
    return line


def configure(settings: Settings) -> None:
    """Set up logging of this process, to stderr."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    console = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _traced,
    ]
    # Without the values of variables: passwords are among them.
    traceback = structlog.dev.RichTracebackFormatter(show_locals=False)
    renderer: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=traceback)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    handler.addFilter(Damper())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.INFO if level <= logging.DEBUG else logging.WARNING)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
