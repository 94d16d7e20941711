"""How a verdict comes back to the ingress that asked.

Each ingress listens on a Redis channel of its own, whose name it puts into the header of its orders.  The stage
that knows the verdict publishes it there.  Without Redis nobody answers; who waits then asks Postgres when the time is up.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Iterator
from typing import NamedTuple

import orjson
import redis.asyncio as redis
import structlog
from redis.exceptions import RedisError

from orderstream.lua.gate import Keys

log = structlog.get_logger("ingress")

PAUSE_MIN_S, PAUSE_MAX_S = 0.1, 5.0


class Answer(NamedTuple):
    """The verdict on an order: RESERVED, or CANCELLED with the reason."""

    status: str
    reason: str | None


class Replies:
    """The channel of one ingress, and who waits on it."""

    def __init__(self, url: str, keys: Keys, *, timeout_s: float) -> None:
        self.name = uuid.uuid4().hex
        self._channel = keys.replies(self.name)
        self._client: redis.Redis = redis.Redis.from_url(url, socket_connect_timeout=timeout_s, health_check_interval=5)
        self._waiting: dict[str, set[asyncio.Future[Answer]]] = {}
        self._task: asyncio.Task[None] | None = None
        self.listening = False

    async def start(self) -> None:
        """Begin to listen; goes on trying while Redis is away."""
        self._task = asyncio.create_task(self._listen(), name="replies")

    async def stop(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._client.aclose()

    async def ping(self) -> None:
        """Ask Redis for a sign of life."""
        await self._client.ping()

    @contextlib.contextmanager
    def expect(self, order_id: str) -> Iterator[asyncio.Future[Answer]]:
        """Give a future for an order's verdict; several requests may wait for the same order."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(order_id, set())
        waiting.add(future)
        try:
            yield future
        finally:
            waiting.discard(future)
            if not waiting:
                self._waiting.pop(order_id, None)

    def _tell(self, message: bytes) -> None:
        for order_id, status, reason in orjson.loads(message):
            for future in self._waiting.get(order_id, ()):
                if not future.done():
                    future.set_result(Answer(status, reason))

    async def _listen(self) -> None:
        pause = PAUSE_MIN_S
        while True:
            try:
                async with self._client.pubsub() as pubsub:
                    await pubsub.subscribe(self._channel)
                    async for message in pubsub.listen():
                        if message["type"] == "subscribe":
                            if not self.listening and pause > PAUSE_MIN_S:
                                log.warning("redis is back")
                            self.listening, pause = True, PAUSE_MIN_S
                        elif message["type"] == "message":
                            self._tell(message["data"])
            except (RedisError, OSError) as error:
                if self.listening or pause == PAUSE_MIN_S:
                    log.warning("redis is away, verdicts come from postgres when the time is up", error=repr(error))
                self.listening = False
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE_MAX_S)
