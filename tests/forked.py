"""Processes of Python that have all modules of the product when they start: forked from one that has imported them.

Most of the time that a worker or a command takes to begin goes to these imports; the tests start hundreds of them.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "orderstream.agents.app",
        "orderstream.http.server",
        "orderstream.jobs.cli.main",
        "orderstream.jobs.reconcile.repair",
    ]
)

_LOCK = threading.Lock()
"""How a process ended is read once, from a pipe: by whichever thread asks first, or starts another one."""


class Forked(subprocess.Popen[bytes]):
    """Python with these arguments (``-m module …``, or a script's path and more), as ``subprocess.Popen`` has it.

    Args:
        arguments: Python's.
        env: all of its environment.
        out: what its output is added to.
        errors: what its other output is added to; ``out`` by default.
        given: its input.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str],
        out: Path,
        *,
        errors: Path | None = None,
        given: Path = Path(os.devnull),
    ) -> None:
        self.args, self.returncode, self._child_created = arguments, None, False
        files = [str(file) for file in (given, out, errors or out)]
        out.touch()
        self._process = CONTEXT.Process(target=_run, args=(list(arguments), dict(env), files), daemon=True)
        with _LOCK:
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return how it ended, None while it runs."""
        with _LOCK:
            self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return how it ended."""
        if not wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code


def _run(arguments: list[str], env: dict[str, str], files: list[str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    for fd, file in enumerate(files):
        opened = os.open(file, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(opened, fd)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (a child of multiprocessing has none)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def orderstream(
    env: Mapping[str, str], *arguments: str, given: bytes = b"", timeout_s: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run a command of ours to its end; return its exit code and all that it said.

    Args:
        env: all of its environment.
        arguments: of the command line.
        given: its input.
        timeout_s: how long it may take, in seconds; it is killed then.
    """
    with TemporaryDirectory() as folder:
        into, out, errors = (Path(folder, name) for name in ("in", "out", "errors"))
        into.write_bytes(given)
        process = Forked(("-m", "orderstream", *arguments), env, out, errors=errors, given=into)
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, code, out.read_text(), errors.read_text())
