"""The broker becomes unavailable, cleanly and not, or stands still and closes no connection."""

from __future__ import annotations

import asyncio
import signal
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from orderstream.engines.local import LocalEngines
from orderstream.engines.process import Process
from tests.chaos.scenario import Scenario
from tests.harness import Pipeline

pytestmark = [pytest.mark.engines, pytest.mark.chaos]
Make = Callable[..., Pipeline]


async def test_the_broker_is_unavailable_for_ten_seconds_and_is_killed(
    own_pipeline: Make, own_engines: LocalEngines
) -> None:
    shop = own_pipeline()
    scenario = Scenario(8_000)
    await shop.start(scenario.products, workers=0)
    async with shop.keep(2) as keeper:
        await shop.settled(2)
        flowing = asyncio.create_task(scenario.flow(shop, over_s=20))
        await asyncio.sleep(2)
        await asyncio.to_thread(own_engines.stop, "kafka")
        await asyncio.sleep(10)
        await asyncio.to_thread(own_engines.start, "kafka")
        await asyncio.sleep(6)
        await asyncio.to_thread(own_engines.kill, "kafka")
        await asyncio.to_thread(own_engines.start, "kafka")
        await flowing
        await scenario.check(shop)
    print(f"workers that ended: {keeper.ended}")


AFTER_S = 15.0
"""How long the pipeline may stand still after a frozen broker goes on."""

VANISHED_S = 30.0
"""How long the pipeline may stand still after a broker has vanished: a request that nobody answers, and a rebalance."""


def stop(engines: LocalEngines, number: signal.Signals) -> None:
    process = Process.of(engines.pid("kafka") or 0)
    assert process is not None
    for member in (process, *process.children()):
        member.send(number)


@pytest.mark.parametrize("frozen_s", [3, 25], ids=["within the sessions", "beyond them"])
async def test_a_frozen_broker_holds_the_pipeline_up_for_no_longer_than_it_is_frozen(
    own_pipeline: Make, own_engines: LocalEngines, frozen_s: float
) -> None:
    shop = own_pipeline()
    scenario = Scenario(6_000)
    await shop.start(scenario.products, workers=2)
    flowing = asyncio.create_task(scenario.flow(shop, over_s=6, orders=scenario.orders[:3_000]))
    await asyncio.sleep(3)
    stop(own_engines, signal.SIGSTOP)
    try:
        await asyncio.sleep(frozen_s)
    finally:
        stop(own_engines, signal.SIGCONT)
    began = time.monotonic()
    later = asyncio.create_task(scenario.flow(shop, over_s=1, orders=scenario.orders[3_000:3_100]))
    await shop.finished(scenario.ids(scenario.orders[3_000:3_100]), timeout_s=AFTER_S)
    print(f"goes on {time.monotonic() - began:.1f} s after the broker")
    await asyncio.gather(flowing, later)
    await scenario.flow(shop, over_s=3, orders=scenario.orders[3_100:])
    await scenario.check(shop)
    assert [worker.process.poll() for worker in shop.workers] == [None, None]


class VanishingProxy:
    """A broker's address whose connections fall silent, both ways, and stay open: as if it had lost its power.

    It puts itself in the place of the broker in what the broker tells of its address.

    Attributes:
        address: of the proxy.
        open: the connections that are not silent.
    """

    def __init__(self, broker: str) -> None:
        self._host, _, port = broker.rpartition(":")
        self._port = int(port)
        self.address = ""
        self.open: set[asyncio.StreamReader] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Proxy one connection."""
        there_reader, there_writer = await asyncio.open_connection(self._host, self._port)
        self.open.add(reader)
        told, ours = (
            self._host.encode() + struct.pack(">i", int(port)) for port in (self._port, self.address.rpartition(":")[2])
        )

        async def requests() -> None:
            while data := await reader.read(1 << 16):
                if reader in self.open:
                    there_writer.write(data)

        asking = asyncio.create_task(requests())
        try:
            while data := await there_reader.read(1 << 16):
                if reader in self.open:
                    writer.write(data.replace(told, ours))
            await asking  # the broker closes what is silent, and nobody learns of it
        except ConnectionError:
            pass
        finally:
            asking.cancel()
            self.open.discard(reader)
            for end in (writer, there_writer):
                end.close()


@asynccontextmanager
async def vanishing_proxy(broker: str) -> AsyncIterator[VanishingProxy]:
    """Run one."""
    proxy = VanishingProxy(broker)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()


async def test_a_broker_that_vanishes_without_closing_its_connections_is_connected_anew(pipeline: Make) -> None:
    shop = pipeline()
    scenario = Scenario(3_000)
    async with vanishing_proxy(shop.settings.kafka) as proxy:
        await shop.start(scenario.products, kafka=proxy.address)
        flowing = asyncio.create_task(scenario.flow(shop, over_s=4))
        await asyncio.sleep(2)
        assert len(proxy.open) > 3, "the worker goes round the proxy: the test shows nothing"
        proxy.open.clear()
        began = time.monotonic()
        await flowing
        await shop.finished(scenario.ids(scenario.orders), timeout_s=VANISHED_S)
        print(f"done {time.monotonic() - began:.1f} s after the broker vanished")
        await scenario.check(shop)
        assert [worker.process.poll() for worker in shop.workers] == [None]
        assert await asyncio.to_thread(shop.workers[0].stop) == 0
