"""A fresh pipeline for each run: topics, database, Redis keys and its processes, on engines that only the bench uses."""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from orderstream.engines.child import Child
from orderstream.engines.local import NAMES, LocalEngines
from orderstream.engines.locks import file_lock
from orderstream.engines.probes import create_database, delete_topics, drop_database
from orderstream.engines.process import Say
from orderstream.jobs.init import init
from orderstream.settings import Settings, load
from orderstream.sql.store import Store

PRICE_CENTS = 100
Profile = Callable[[int], AbstractContextManager[None]]
"""Watches the process of this pid while a run is measured."""


def unwatched(_: int) -> AbstractContextManager[None]:
    """Watch nothing."""
    return nullcontext()


def worker_of(settings: Settings, log: Path) -> Child:
    """Start a worker."""
    return Child("worker", settings, log)


MakeWorker = Callable[[Settings, Path], Child]
Fill = Callable[[Settings], Awaitable[None]]
"""Puts into a fresh database what is to be there before a worker starts; the products are there."""


@dataclass(frozen=True)
class Pipeline:
    """What a run works with; ``pids`` are those of its engines and processes, by name."""

    settings: Settings
    workers: tuple[Child, ...]
    pids: Mapping[str, int | None]
    profile: Profile
    log: Path
    ingress: Child | None = None

    def check_alive(self) -> None:
        """Raise when a process has ended.

        Raises:
            ChildFailed: which has not done its work.
        """
        for child in (*self.workers, *([self.ingress] if self.ingress else [])):
            child.check_alive()


@dataclass(frozen=True)
class Bench:
    """The engines of the bench, and what all its runs share; ``store``: a pipeline that the runs of a scenario share."""

    engines: LocalEngines
    settings: Settings
    folder: Path
    say: Say
    profile: Profile = unwatched
    store: Pipeline | None = None

    @contextmanager
    def pipeline(
        self,
        products: Mapping[str, int],
        *,
        workers: int = 1,
        worker: MakeWorker = worker_of,
        ingress: bool = False,
        fill: Fill | None = None,
        **overrides: Any,
    ) -> Iterator[Pipeline]:
        """Make a pipeline with these products and remove it afterwards, whatever happened.

        Args:
            products: units by id.
            workers: how many; 0 for what brings a process of its own.
            worker: starts one.
            ingress: start an ingress as well.
            fill: puts more than the products into the database.
            overrides: of settings.

        Raises:
            EngineUnavailable: an engine does not answer.
            ChildFailed: a process does not start.
        """
        run_id = f"bench{uuid.uuid4().hex[:10]}"
        log = self.folder / "worker.log"
        log.unlink(missing_ok=True)
        with ExitStack() as undo:
            undo.callback(self._flush_redis)
            url = create_database(self.settings.database_url, run_id)
            undo.callback(drop_database, url)
            local = self.folder / "run" / run_id
            local.mkdir(parents=True)
            undo.callback(shutil.rmtree, local)
            settings = self.settings.model_copy(
                update={
                    "local_dir": local,
                    "database_url": url,
                    "app_id": run_id,
                    "topic_prefix": f"{run_id}.",
                    "redis_prefix": run_id,
                    **overrides,
                }
            )
            undo.callback(delete_topics, settings.kafka, run_id)
            asyncio.run(_prepare(settings, products, fill))
            pids: dict[str, int | None] = {name: self.engines.pid(name) for name in NAMES}
            started: list[Child] = []
            for n in range(workers):
                started.append(worker(settings, log))
                undo.callback(started[-1].stop)
                pids["worker" if n == 0 else f"worker-{n + 1}"] = started[-1].process.pid
            way_in = None
            if ingress:
                way_in = Child("ingress", settings, log)
                undo.callback(way_in.stop)
                pids["ingress"] = way_in.process.pid
            for child in (*started, *([way_in] if way_in else [])):
                child.await_ready()
            yield Pipeline(settings, tuple(started), pids, self.profile, log, way_in)

    def _flush_redis(self) -> None:
        # The whole server is the bench's: no other keys are in it.
        client = redis.Redis.from_url(self.settings.redis_url)
        try:
            client.flushdb()
        finally:
            client.close()


async def _prepare(settings: Settings, products: Mapping[str, int], fill: Fill | None) -> None:
    await init(settings)
    store = await Store.connect(settings.database_url, connections_max=1)
    try:
        await store.load_catalogue(
            [(product_id, product_id, PRICE_CENTS, units) for product_id, units in products.items()],
            settings.partitions,
        )
    finally:
        await store.close()
    if fill is not None:
        await fill(settings)


@contextmanager
def bench(say: Say, profile: Profile = unwatched) -> Iterator[Bench]:
    """Start engines for the bench alone, under ``.local/bench``; remove them and their data at the end.

    Settings come from the environment as everywhere, so that a setting's effect can be measured, but the addresses, the
    payment (simulated, always successful, at once) and the failpoints are the bench's.  One bench runs at a time.

    Raises:
        EngineMissing, EngineUnavailable: an engine can't be started.
    """
    local = load().local_dir.absolute()
    folder = local / "bench"
    with file_lock(local / "bench.lock", say), ExitStack() as undo:
        engines = LocalEngines(folder / "engines", kafka_libs=local / "kafka" / "libs", say=say)
        engines.remove()  # what a bench left that was killed
        undo.callback(engines.remove)
        start = time.monotonic()
        addresses = engines.up()
        say(f"engines are up after {time.monotonic() - start:.1f} s")
        settings = load(
            **addresses,
            local_dir=folder,
            web_host="127.0.0.1",
            web_enabled=True,
            payment_provider="simulated",
            payment_success_rate=1.0,
            payment_latency_min_s=0.0,
            payment_latency_max_s=0.0,
            failpoint="",
        )
        yield Bench(engines, settings, folder, say, profile)
