"""Failpoints: places between two effects where a test can make the process fail.

Each is passed once a batch, and switched on by a setting, in tests only: ``ORDERSTREAM_FAILPOINT=reserve.after_hold:kill``.
``stage.place:action[:nth]``; ``kill`` ends the process as ``kill -9`` does, ``freeze`` stops it until it gets a SIGCONT,
``raise`` raises, at the nth passage (1 by default).  Off, a failpoint costs a read of an empty variable.
"""

from __future__ import annotations

import os
import signal
from typing import NamedTuple

POINTS = (
    "reserve.before_lua",
    "reserve.after_lua",
    "reserve.after_hold",
    "reserve.after_gate",
    "reserve.after_letters",
    "reserve.after_sent_on",
    "pay.before_charge",
    "pay.after_charge",
    "pay.before_refund",
    "pay.after_refund",
    "pay.before_void",
    "pay.after_void",
    "pay.after_letters",
    "commit.before_settle",
    "commit.after_settle",
    "commit.after_update",
    "commit.after_events",
    "commit.after_letters",
    "commit.after_sent_on",
    "desk.after_ack",
)
"""Every failpoint.  ``after_x`` of one effect is ``before`` the next one of its stage.

``…_letters`` and ``…_sent_on`` are passed only where a record can't be read, or is of another partition; ``…_refund`` and
``…_void`` only where money is given back.
"""

ACTIONS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "raise": None}
"""What a failpoint does, and the signal that does it."""


class Armed(NamedTuple):
    """The failpoint that is switched on."""

    point: str
    action: str
    nth: int


class Failed(Exception):
    """A failpoint raised."""


_armed: Armed | None = None
_passed = 0


def parse(text: str) -> Armed | None:
    """Return what a setting switches on, None for an empty one.

    Raises:
        ValueError: no such failpoint or action.
    """
    if not text:
        return None
    point, _, rest = text.partition(":")
    action, _, nth = rest.partition(":")
    if point not in POINTS:
        raise ValueError(f"no such failpoint: {point!r}; there are {', '.join(POINTS)}")
    if action not in ACTIONS or (nth and not (nth.isdigit() and int(nth))):
        raise ValueError(f"expected {point}:{'|'.join(ACTIONS)}[:nth]")
    return Armed(point, action, int(nth or 1))


def arm(text: str) -> None:
    """Switch a failpoint on, or all off with an empty text."""
    global _armed, _passed
    _armed, _passed = parse(text), 0


def failpoint(point: str) -> None:
    """Fail here, if this is the failpoint that is switched on."""
    global _passed
    if _armed is None or _armed.point != point:
        return
    _passed += 1
    if _passed == _armed.nth:
        sent = ACTIONS[_armed.action]
        if sent is None:
            raise Failed(point)
        os.kill(os.getpid(), sent)
