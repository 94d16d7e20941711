"""A client whose broker is unavailable does not ask without a pause."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka.client import AIOKafkaClient

from orderstream.streams.upstream.pacing import PAUSE_MAX_S, PAUSE_MIN_S, pace


async def test_failed_tries_are_followed_by_growing_pauses_and_a_good_one_by_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)

    answers = [False] * 7 + [True, False]

    async def update(*_: Any) -> bool:
        return answers.pop(0)

    client = AIOKafkaClient(bootstrap_servers="127.0.0.1:1")
    monkeypatch.setattr(client, "_metadata_update", update)
    monkeypatch.setattr("orderstream.backoff.asyncio.sleep", sleep)
    pace(client)
    updated = [await client._metadata_update(client.cluster, []) for _ in range(9)]
    assert updated == [False] * 7 + [True, False]
    most = [min(PAUSE_MIN_S * 2**n, PAUSE_MAX_S) for n in range(7)] + [PAUSE_MIN_S]
    assert all(pause / 2 <= found <= pause for found, pause in zip(slept, most, strict=True)), slept


async def test_the_clients_own_synchronizer_goes_through_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    async def update(*_: Any) -> bool:
        nonlocal tries
        tries += 1
        return False

    client = AIOKafkaClient(bootstrap_servers="127.0.0.1:1")
    monkeypatch.setattr(client, "_metadata_update", update)
    pace(client)
    synchronizer = asyncio.create_task(client._md_synchronizer())
    try:
        async with asyncio.timeout(0.5):
            while True:
                await client.force_metadata_update()
    except TimeoutError:
        pass
    finally:
        synchronizer.cancel()
    assert 1 < tries < 20
