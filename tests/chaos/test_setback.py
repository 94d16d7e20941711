"""Postgres is set back under the pipeline, logs lose records: what was told stays true, nobody is charged for nothing."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from orderstream.engines.local import LocalEngines
from orderstream.engines.probes import create_database, delete_topics, drop_database
from orderstream.settings import load
from tests.chaos.bank import Bank
from tests.chaos.homes import Homes

pytestmark = [pytest.mark.engines, pytest.mark.chaos]

PRODUCTS = {f"p{n}": 60 for n in range(20)}

MakeShop = Callable[..., Any]


class Shop(Homes):
    """A pipeline on engines of its own, whose Postgres can be set back."""

    def __init__(self, engines: LocalEngines, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.engines = engines

    @property
    def _data(self) -> Path:
        return Path(json.loads((self.engines.local_dir / "postgres" / "state.json").read_text())["data"])

    @property
    def _copy(self) -> Path:
        return self._data.with_name("copy")

    async def copy_postgres(self) -> None:
        """Stop Postgres, copy its data directory, start it again."""
        await asyncio.to_thread(self.engines.stop, "postgres")
        await asyncio.to_thread(subprocess.check_call, ["cp", "-a", self._data, self._copy])
        await asyncio.to_thread(self.engines.start, "postgres")

    async def set_back(self) -> None:
        """Put the copy in the place of what Postgres has now."""
        await asyncio.to_thread(self.engines.stop, "postgres")
        await asyncio.to_thread(shutil.rmtree, self._data)
        self._copy.rename(self._data)
        await asyncio.to_thread(self.engines.start, "postgres")

    async def ended(self, number: int) -> None:
        """Wait until so many orders have ended, as Postgres has them."""
        async with asyncio.timeout(90):
            while await self.pool.fetchval("SELECT count(*) FROM orders WHERE status >= 'CONFIRMED'") < number:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    def logged(self, text: str) -> bool:
        """Tell whether a worker has logged this."""
        return any(text in worker.log.read_text(errors="replace") for worker in self.workers)


@pytest.fixture
async def shops(own_engines: LocalEngines, run_id: str, tmp_path: Path) -> AsyncIterator[MakeShop]:
    """Return a function that starts a bank and a pipeline; both end after the test."""
    own_engines.up()
    addresses = own_engines.addresses()
    url = create_database(addresses["database_url"], run_id)
    made: list[Shop] = []

    async def make(bank: Bank, products: dict[str, int] = PRODUCTS, **overrides: Any) -> Shop:
        await bank.__aenter__()
        ours: dict[str, Any] = {
            **addresses,
            "database_url": url,
            "topic_prefix": f"{run_id}.",
            "redis_prefix": run_id,
            "app_id": run_id,
            "local_dir": tmp_path / "local",
            "web_port": 0,
            "http_port": 0,
            "partitions": 4,
            "retry_wait_max_s": 1.0,
            "session_timeout_s": 6.0,
            "payment_provider": "http",
            "payment_url": bank.url,
            "payment_timeout_s": 1.0,
            "_env_file": None,
        }
        made.append(Shop(own_engines, load(**{**ours, **overrides}), tmp_path, bank))
        await made[-1].start(dict(products))
        return made[-1]

    try:
        yield make
    finally:
        own_engines.up()
        for one in made:
            await one.close()
            await one.bank.__aexit__()
        drop_database(url)
        delete_topics(addresses["kafka"], run_id)


async def told_confirmed(shop: Shop) -> set[str]:
    return {order_id for order_id, told in (await shop.events()).items() if told[-1] == "CONFIRMED"}


@pytest.mark.parametrize("lost_s", [0.2, 3.0])
@pytest.mark.parametrize("lives", [True, False], ids=["the workers live", "the workers end with it"])
async def test_what_was_told_stays_true_when_postgres_is_set_back(shops: MakeShop, lost_s: float, lives: bool) -> None:
    shop = await shops(Bank(3, latency_s=0.2))
    workers = [shop.worker(), shop.worker()]
    await shop.send(200, cancel_share=0.1)
    await shop.ended(50)
    await shop.copy_postgres()
    await shop.send(300, cancel_share=0.1)
    await shop.ended(210)
    await asyncio.sleep(lost_s)
    if not lives:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    confirmed = await told_confirmed(shop)
    await shop.set_back()
    if not lives:
        workers = [shop.worker(), shop.worker()]
    await shop.send(100, cancel_share=0.1)
    await shop.rest()
    assert shop.logged("the topics are folded into Postgres")
    assert await shop.judge() == []
    still = await told_confirmed(shop)
    assert confirmed - still <= shop.cancelled
    assert [worker.process.poll() for worker in workers] == [None, None]
