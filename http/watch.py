"""Orders that clients follow, polled in Postgres: one statement a tick for all of them, however many clients there are."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

from orderstream.errors import EngineUnavailable
from orderstream.exits import end_process_on_failure
from orderstream.http.answers import rejected, unknown
from orderstream.http.postgres import Postgres
from orderstream.http.problems import Problem, overloaded
from orderstream.settings import Settings

ORDERS_MAX = 1_000
"""Orders of one statement."""

ANSWER_S = 2.0
"""Longest wait for Postgres's answer."""

FIRST_READ_S = 5.0
"""Longest wait until an order is read for the first time."""

UNAVAILABLE_PAUSE_S = 0.5
"""How long a Postgres that did not answer is not asked."""


class View:
    """An order as Postgres had it last.

    Attributes:
        order_id: the order.
        customer: who alone may see it; None: anybody.
        row: of the query ``order_histories``; None while Postgres does not know such an order.
        hidden: it is another customer's.
        reads: how often Postgres has answered about it.
        unavailable: the last question to Postgres had no answer.
        leaving: this process leaves: requests are to stop waiting.
    """

    def __init__(self, order_id: str, customer: str | None) -> None:
        self.order_id = order_id
        self.customer = customer
        self.row: Any = None
        self.hidden = False
        self.reads = 0
        self.unavailable = False
        self.leaving = False
        self._changed = asyncio.Event()

    @property
    def status(self) -> str | None:
        """Its status, None while Postgres does not know the order."""
        return None if self.row is None else self.row["status"]

    def note(self, row: Any) -> None:
        """Take in what Postgres has; wakes the request that waits when that is news."""
        if row is not None and self.customer not in (None, row["user_id"]):
            row, self.hidden = None, True
        news = self.reads == 0 or self.unavailable or row != self.row
        self.row, self.unavailable = row, False
        self.reads += 1
        if news:
            self._changed.set()

    def wake(self, *, unavailable: bool = False, leaving: bool = False) -> None:
        """Wake the request that waits."""
        self.unavailable, self.leaving = self.unavailable or unavailable, self.leaving or leaving
        self._changed.set()

    async def changed(self, timeout_s: float) -> bool:
        """Wait for news, so many seconds at most; return whether there are any."""
        if not self.leaving:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
        news = self._changed.is_set()
        self._changed.clear()
        return news


class Watch:
    """The orders that are watched, and the task that polls them."""

    def __init__(self, settings: Settings, postgres: Postgres, tick_s: float, meanwhile: str) -> None:
        self._settings, self._postgres = settings, postgres
        self._tick_s, self._meanwhile = tick_s, meanwhile
        self._views: dict[str, list[View]] = {}
        self._added = asyncio.Event()
        self._leaving = False
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return sum(map(len, self._views.values()))

    def start(self) -> None:
        """Poll from now on, while any order is watched."""
        self._task = asyncio.create_task(self._poll(), name="polling watched orders")
        self._task.add_done_callback(end_process_on_failure)

    async def close(self) -> None:
        """Stop polling."""
        self.leave()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def leave(self) -> None:
        """Wake every request that waits: this process leaves."""
        self._leaving = True
        for views in self._views.values():
            for view in views:
                view.wake(leaving=True)

    @contextlib.contextmanager
    def watching(self, order_id: str, customer: str | None) -> Iterator[View]:
        """Watch an order, for this customer (None: for anybody); it is read at once."""
        view = View(order_id, customer)
        view.leaving = self._leaving
        views = self._views.setdefault(order_id, [])
        views.append(view)
        self._added.set()
        try:
            yield view
        finally:
            views.remove(view)
            if not views:
                del self._views[order_id]

    async def until_read(self, view: View) -> None:
        """Wait until an order has been read, if it has not.

        Raises:
            EngineUnavailable: Postgres does not answer, or this process leaves.
            Problem: ``overloaded``, no connection to Postgres became free.
        """
        deadline = time.monotonic() + FIRST_READ_S
        while not view.reads or view.unavailable:
            left_s = deadline - time.monotonic()
            if view.unavailable or view.leaving:
                raise EngineUnavailable("Postgres", self._postgres.presence.address, "it did not answer")
            if left_s <= 0:
                raise overloaded("postgres_pool", "All connections to Postgres are at work. Come again.")
            await view.changed(left_s)

    async def until_there(self, view: View, within_s: float) -> None:
        """Wait for an order: one that was accepted a moment ago may be on its way.

        Raises:
            EngineUnavailable: see :meth:`until_read`.
            Problem: ``order-not-found`` or ``order-rejected``, it has not come in time, or this process leaves; see
                :meth:`until_read` too.
        """
        deadline = time.monotonic() + within_s
        await self.until_read(view)
        while view.row is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or view.leaving:
                raise await self.rejection(view) or unknown(view.order_id)
            await view.changed(left_s)
            await self.until_read(view)

    async def rejection(self, view: View) -> Problem | None:
        """Return the problem of an order that is not there, if what was sent under its id is none, or it was removed.

        Raises:
            EngineUnavailable: Postgres does not answer.
            Problem: ``overloaded``, no connection to Postgres became free.
        """
        if view.hidden:
            return None
        found = await self._postgres.ask(lambda store: store.rejection(view.order_id), ANSWER_S, self._meanwhile)
        if found is not None:
            return rejected(view.order_id, found, self._settings)
        if view.customer is not None:
            return None  # it may have been another's
        gone = await self._postgres.ask(lambda store: store.removed([view.order_id]), ANSWER_S, self._meanwhile)
        return unknown(view.order_id, was_removed=True) if gone else None

    async def _poll(self) -> None:
        while True:
            while not self._views:
                self._added.clear()
                await self._added.wait()
            self._added.clear()
            ids = sorted(self._views)
            try:
                for start in range(0, len(ids), ORDERS_MAX):
                    part = ids[start : start + ORDERS_MAX]
                    rows = await self._postgres.ask(
                        lambda store, part=part: store.order_histories(part),  # type: ignore[misc]
                        ANSWER_S,
                        self._meanwhile,
                    )
                    for order_id in part:
                        for view in self._views.get(order_id, ()):
                            view.note(rows.get(order_id))
            except Problem:
                continue  # no connection became free: it has waited for its next turn already
            except EngineUnavailable:
                for views in self._views.values():
                    for view in views:
                        view.wake(unavailable=True)
                await asyncio.sleep(UNAVAILABLE_PAUSE_S)
                continue
            with contextlib.suppress(TimeoutError):  # a newcomer is read at once
                async with asyncio.timeout(self._tick_s):
                    await self._added.wait()
