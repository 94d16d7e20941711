"""The file descriptors of a process: each connection takes one.  A process without any left can't even say so."""

from __future__ import annotations

import resource

import structlog

KEPT = 256
"""Descriptors for what is not a client's: the engines' connections, files, and connections that are refused with a word."""

MANY = 1_048_576
"""Of a process without a limit."""

log = structlog.get_logger("descriptors")


def free() -> int:
    """Return how many connections of clients this process may have at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, (MANY if soft == resource.RLIM_INFINITY else soft) - KEPT)


def raise_limit(wanted: int) -> None:
    """Raise the limit of this process as far as it may, and log when that leaves fewer connections than are wanted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:  # macOS takes no infinite one
            log.warning("the limit of descriptors could not be raised", soft=soft, hard=hard, error=str(error))
    if free() < wanted:
        log.warning(
            "few descriptors: raise the hard limit (LimitNOFILE, ulimit -Hn)",
            limit=free() + KEPT,
            connections=free(),
            wanted=wanted,
        )
