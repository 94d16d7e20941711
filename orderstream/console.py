"""What the command line shows: lines, tables, outcomes, and progress of long work."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_INTERVAL_S = 2.0
WIDTH = 140
"""Of tables that do not go to a terminal."""


def say(text: str = "") -> None:
    """Print a line for people."""
    typer.echo(text)


def warn(text: str) -> None:
    """Print a line to stderr, for people who read only what went wrong."""
    typer.echo(text, err=True)


def table(title: str, columns: list[str], rows: list[list[Any]], right: int = 99) -> None:
    """Print a table; columns from ``right`` on are set to the right."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for n, column in enumerate(columns):
        drawn.add_column(column, justify="right" if n >= right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False, emoji=False).print(drawn)


class Bar:
    """Shows how many of how many; ``total`` None while that is not known."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self._what, self._total = what, total
        self._done = 0
        self._said_at = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            from rich.console import Console

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def update(self, done: int, total: int | None = None) -> None:
        """Show how far it is; and of how many, once that is known."""
        self._done = done
        self._total = self._total if total is None else total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total)
        elif time.monotonic() - self._said_at > LINE_INTERVAL_S:
            self._said_at = time.monotonic()
            of = f" of {self._total:,}" if self._total is not None else ""
            warn(f"  {done:,}{of} {self._what}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
