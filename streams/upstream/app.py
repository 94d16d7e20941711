"""Our Faust app: it reads through our consumer and serves its pages on a socket that is bound already."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import faust
from aiokafka.errors import KafkaError
from faust.auth import Credentials, OAuthCredentials, SASLCredentials, SSLCredentials

from orderstream import access
from orderstream.errors import EngineUnavailable
from orderstream.settings import Settings
from orderstream.streams.upstream.consumer import Consumer, Transport
from orderstream.streams.upstream.web import Web


def credentials(settings: Settings) -> Credentials | None:
    """Return how Kafka is entered, as Faust has it; None: as anybody."""
    entry = access.kafka(settings)
    tls = entry.get("ssl_context")
    if "sasl_oauth_token_provider" in entry:
        return OAuthCredentials(oauth_cb=entry["sasl_oauth_token_provider"], ssl_context=tls)
    if "sasl_mechanism" in entry:
        return SASLCredentials(
            mechanism=entry["sasl_mechanism"],
            username=entry["sasl_plain_username"],
            password=entry["sasl_plain_password"],
            ssl_context=tls,
        )
    return None if tls is None else SSLCredentials(tls)


class InHand:
    """The batches that agents are working on.  A worker that leaves lets them end and begins no more."""

    def __init__(self) -> None:
        self.leaving = False
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self._count += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self._none.set()

    async def finish(self) -> None:
        """Return when the batches in hand are done; no other is begun from now on."""
        self.leaving = True
        await self._none.wait()


class Pulse:
    """Notes whether this process was frozen for so long that its partitions may be another worker's now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.last = clock()
        self._stood_still = float("-inf")

    def beat(self, bound_s: float) -> None:
        """Show that the event loop comes round; note when it has not for longer than ``bound_s``."""
        now = self._clock()
        if now - self.last > bound_s:
            self._stood_still = now
        self.last = now

    def stood_still(self, since: float, bound_s: float) -> bool:
        """Return whether there was no beat for longer than ``bound_s``, at some time after ``since``."""
        return self._stood_still >= since or self._clock() - max(self.last, since) > bound_s


class App(faust.App):
    """A Faust app that reads through our transport.

    Attributes:
        in_hand: the batches that its agents are working on.
        pulse: whether the process was frozen.
        web_socket: bound already, for its pages; None: Faust binds one itself.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_hand = InHand()
        self.pulse = Pulse()
        self.web_socket: socket.socket | None = None

    @property
    def made_consumer(self) -> Consumer | None:
        """The consumer, None before there is one.  Faust's ``app.consumer`` would make it."""
        made: Consumer | None = self._consumer
        return made

    def kafka_unavailable(self, error: KafkaError) -> None:
        """Hear that the consumer could not connect; Faust ends with its traceback after this."""

    def out_of_range(self, offsets: Mapping[Any, int]) -> None:
        """Hear, again and again, that these positions are in no log: records were removed, or a topic was made anew."""

    def engine_unavailable(self, error: EngineUnavailable) -> None:
        """Hear that the app could not start without an engine.

        Raises:
            EngineUnavailable: the same, unless the app ends the process.
        """
        raise error

    def _on_rebalance_when_stopped(self) -> None:
        """Let the consumer stop in its own time.

        Upstream closes its client here, from a thread that it does not belong to: a commit in progress then never ends.
        No upstream issue found.
        """

    def _new_transport(self) -> Transport:
        return Transport(self.conf.broker_consumer, self)

    def _new_web(self) -> Web:
        return Web(self)
