"""Postgres as the ingress asks it: a request waits in turn for a connection of the pool, and then for the answer.

That every connection is at work says nothing about Postgres: such a request is one too many, and Postgres is not away.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from orderstream import metrics
from orderstream.http.health import Presence
from orderstream.http.problems import Problem, overloaded
from orderstream.sql.store import TRANSIENT, Store

T = TypeVar("T")

WAIT_S = 1.0
"""Longest wait for a connection of the pool."""


class Postgres:
    """The pool of an ingress.

    Args:
        store: the statements, on a pool that nothing else uses.
        presence: notes whether Postgres answers.
        connections: how many the pool has at most.
    """

    def __init__(self, store: Store, presence: Presence, connections: int) -> None:
        self.store, self.presence = store, presence
        self._connections = connections
        self._free = asyncio.Semaphore(connections)

    async def ask(self, question: Callable[[Store], Awaitable[T]], within_s: float, meanwhile: str) -> T:
        """Ask a question of one statement, once there is a connection for it.

        Args:
            question: asks the store; what it raises for a fault of ours passes through.
            within_s: longest wait for the answer, in seconds, after that for the connection.
            meanwhile: what this process does without the answer; for the log.

        Raises:
            Problem: ``overloaded``, no connection became free within :data:`WAIT_S`.
            EngineUnavailable: Postgres does not answer.
        """
        async with self._connection():
            try:
                async with asyncio.timeout(within_s):
                    answer = await question(self.store)
            except TRANSIENT as error:
                raise self.presence.unanswered(error, meanwhile) from error
        self.presence.answered()
        return answer

    async def check(self) -> None:
        """Ask whether Postgres answers.  While every connection is at work, the last answers say so.

        Raises:
            EngineUnavailable, Exception: it does not.
        """
        try:
            async with self._connection():
                await self.store.pool.fetchval("SELECT 1")
        except Problem:
            if self.presence.unavailable:
                raise

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[None]:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(WAIT_S):
                await self._free.acquire()
        except TimeoutError:
            detail = f"All {self._connections} connections to Postgres are at work. Come again."
            raise overloaded("postgres_pool", detail) from None
        finally:
            metrics.POOL_WAIT.observe(time.perf_counter() - began)
        try:
            yield
        finally:
            self._free.release()
