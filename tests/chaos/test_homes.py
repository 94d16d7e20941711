"""Kills at random, the bank at its worst, cancels at any time; a judge of its own asks topic, bank and tables."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.bank import Bank
from tests.chaos.homes import Homes

pytestmark = [pytest.mark.engines, pytest.mark.chaos]

PRODUCTS = {f"p{n}": 60 for n in range(20)}


@pytest.fixture
async def homes(make_settings: Callable[..., Any], tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Return a function that starts a bank and a pipeline; both end after the test."""
    made: list[Homes] = []

    async def make(bank: Bank, **overrides: Any) -> Homes:
        await bank.__aenter__()
        settings = make_settings(
            payment_provider="http",
            payment_url=bank.url,
            partitions=4,
            retry_wait_max_s=1.0,
            session_timeout_s=6.0,
            payment_timeout_s=1.0,
            **overrides,
        )
        made.append(Homes(settings, tmp_path, bank))
        await made[-1].start(dict(PRODUCTS))
        return made[-1]

    yield make
    for one in made:
        await one.close()
        await one.bank.__aexit__()


async def test_kills_at_random_with_two_workers_and_a_bank_at_its_worst(homes: Callable[..., Any]) -> None:
    shop = await homes(Bank(5, failing=0.2, silent=0.05, doubled=0.1, latency_s=0.2), hold_ttl_s=20)
    over, draw = asyncio.Event(), random.Random(11)
    keeper = asyncio.create_task(shop.keep(2, over))
    for _ in range(8):
        await shop.send(150, cancel_share=0.2)
        await asyncio.sleep(draw.uniform(0.5, 2.0))
        alive = [worker for worker in shop.workers if worker.process.poll() is None]
        if alive:
            draw.choice(alive).process.kill()
    await shop.rest(150)
    over.set()
    codes = await keeper
    assert set(codes) <= {-9}, codes
    assert await shop.judge() == []
