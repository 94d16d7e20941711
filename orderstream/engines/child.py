"""The processes that the demonstration, the bench and the tests start: workers, ingresses, what stands in for one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orderstream.engines.process import Say, free_port, mute, tail
from orderstream.errors import OrderstreamError
from orderstream.settings import PREFIX, Settings

READY_S = 60.0
STOP_S = 30.0  # it finishes its batches first
PAGE_S = 5.0


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment that gives a process these settings, and none of the caller's."""
    env = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
    return {**env, **{PREFIX + name.upper(): str(value) for name, value in settings.model_dump().items()}}


class ChildFailed(OrderstreamError):
    """A process ended before its work was done, or did not begin with it."""


class Child:
    """A worker or an ingress, on its own as in production.

    Args:
        what: ``worker`` or ``ingress``; of another ``program``, its name in messages.
        settings: all that it gets.
        log: for its output; its folder is made.
        program: Python's arguments; ``-m orderstream <what>`` when empty.
        port: where it answers; a free one when 0.
        say: gets one line when it has to be killed.
    """

    def __init__(
        self,
        what: str,
        settings: Settings,
        log: Path,
        *,
        program: Sequence[str] = (),
        port: int = 0,
        say: Say = mute,
    ) -> None:
        self.what, self.log, self.port, self._say = what, log, port or free_port(), say
        self.url = f"http://127.0.0.1:{self.port}"
        mine = {"http_port" if what == "ingress" else "web_port": self.port, "drain_s": 0.0}  # no balancer is before it
        self.settings = settings.model_copy(update=mine)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.process = self._start(program or ("-m", "orderstream", what))

    def _start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, *arguments],
                env=environment(self.settings),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def page(self, path: str, timeout_s: float = PAGE_S) -> str:
        """Return what it answers.

        Raises:
            OSError: nothing, or a fault.
        """
        with urllib.request.urlopen(self.url + path, timeout=timeout_s) as answer:
            text: bytes = answer.read()
            return text.decode()

    def summary(self) -> dict[str, Any] | None:
        """Return what a worker says of itself, or None while it does not answer."""
        try:
            found: dict[str, Any] = json.loads(self.page("/stats/summary"))
            return found
        except (OSError, json.JSONDecodeError):
            return None

    def check_alive(self) -> None:
        """Raise when it has ended.

        Raises:
            ChildFailed: with the last lines of its log.
        """
        status = self.process.poll()
        if status is not None:
            raise ChildFailed(f"the {self.what} ended with {status}\n{tail(self.log)}")

    def is_ready(self) -> bool:
        """Tell whether it does its work: a worker owns partitions, an ingress says so.

        Raises:
            OSError: it does not answer.
        """
        if self.what == "ingress":
            return bool(self.page("/ready"))
        return bool(json.loads(self.page("/stats/summary"))["owned"])

    def await_ready(self, timeout_s: float = READY_S) -> None:
        """Wait until it does its work.

        Raises:
            ChildFailed: it has ended, or is not ready after this time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self.check_alive()
            why = ""
            try:
                if self.is_ready():
                    return
            except OSError as error:
                why = f": {error}"
            if time.monotonic() > deadline:
                raise ChildFailed(f"the {self.what} is not ready after {timeout_s:.0f} s{why}\n{tail(self.log)}")
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill it as a crash does: no clean-up."""
        self.process.kill()
        self.process.wait()

    def stop(self, timeout_s: float = STOP_S) -> int:
        """Ask it to leave, and kill it when it does not; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            self._say(f"the {self.what} did not leave within {timeout_s:.0f} s and was killed\n{tail(self.log)}")
            return self.process.returncode

    def tail(self, lines: int = 30) -> str:
        """Return the end of its log."""
        return tail(self.log, lines=lines)
