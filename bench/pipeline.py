"""A fresh pipeline for each run: topics, database, Redis keys and its processes, on engines that only the bench uses."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from aiokafka.admin import AIOKafkaAdminClient

from orderstream.bench.stages import Counted, counted
from orderstream.engines.local import NAMES, LocalEngines
from orderstream.engines.locks import file_lock
from orderstream.engines.probes import create_database, drop_database
from orderstream.engines.process import free_port, tail
from orderstream.errors import OrderstreamError
from orderstream.jobs.init import init
from orderstream.settings import PREFIX, Settings, load
from orderstream.sql.store import Store

PRICE_CENTS = 100
START_S = 60.0
PAGE_S = 30.0
STOP_S = 30.0
"""A process that is told to leave finishes its batches first; after that it is killed."""

Say = Callable[[str], None]
Profile = Callable[[int], AbstractContextManager[None]]
"""Watches the process of this pid while a run is measured."""


def unwatched(_: int) -> AbstractContextManager[None]:
    """Watch nothing."""
    return nullcontext()


class WorkerDied(OrderstreamError):
    """A process ended in the middle of a run, or never began."""


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment that gives a process these settings, and none of the caller's."""
    env = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
    return {**env, **{PREFIX + name.upper(): str(value) for name, value in settings.model_dump().items()}}


class Child:
    """A process of a pipeline, on its own as in production."""

    def __init__(self, what: str, arguments: Sequence[str], settings: Settings, log: Path) -> None:
        self.what, self.log = what, log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def check_alive(self) -> None:
        """Raise when it has ended.

        Raises:
            WorkerDied: with the last lines of its log.
        """
        status = self._process.poll()
        if status is not None:
            raise WorkerDied(f"the {self.what} ended with {status}\n{tail(self.log)}")

    def is_ready(self) -> bool:
        """Tell whether it does its work.

        Raises:
            OSError: it does not answer.
        """
        raise NotImplementedError

    def await_ready(self) -> None:
        """Wait until it does its work.

        Raises:
            WorkerDied: it has ended, or is not ready after :data:`START_S`.
        """
        deadline = time.monotonic() + START_S
        while True:
            self.check_alive()
            why = ""
            try:
                if self.is_ready():
                    return
            except OSError as error:
                why = f": {error}"
            if time.monotonic() > deadline:
                raise WorkerDied(f"the {self.what} is not ready after {START_S:.0f} s{why}\n{tail(self.log)}")
            time.sleep(0.1)

    def counted(self) -> dict[str, Counted]:
        """Return what its stages have counted so far, where it counts.

        Raises:
            OSError: it does not answer.
        """
        return counted("")

    def stop(self) -> None:
        """Tell it to leave, and wait until it has."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def page(url: str) -> str:
    """Return what a process answers.

    Raises:
        OSError: nothing, or a fault.
    """
    with urllib.request.urlopen(url, timeout=PAGE_S) as answer:
        text: bytes = answer.read()
        return text.decode()


class Worker(Child):
    """A worker; ready when it owns partitions, as its pages tell."""

    def __init__(self, settings: Settings, log: Path) -> None:
        settings = settings.model_copy(update={"web_port": free_port()})
        self._pages = f"http://127.0.0.1:{settings.web_port}"
        super().__init__("worker", ("orderstream", "worker"), settings, log)

    def is_ready(self) -> bool:
        """See :class:`Child`."""
        return bool(json.loads(page(f"{self._pages}/stats/summary"))["owned"])

    def counted(self) -> dict[str, Counted]:
        """See :class:`Child`."""
        return counted(page(f"{self._pages}/metrics"))


class Ingress(Child):
    """An ingress; ready when it says so."""

    def __init__(self, settings: Settings, log: Path) -> None:
        settings = settings.model_copy(update={"http_port": free_port()})
        self.url = f"http://127.0.0.1:{settings.http_port}"
        super().__init__("ingress", ("orderstream", "ingress"), settings, log)

    def is_ready(self) -> bool:
        """See :class:`Child`."""
        return bool(page(f"{self.url}/ready"))


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
    ingress: Ingress | None = None

    def check_alive(self) -> None:
        """Raise when a process has ended.

        Raises:
            WorkerDied: which has not done its work.
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
        worker: MakeWorker = Worker,
        ingress: bool = False,
        fill: Fill | None = None,
        **overrides: Any,
    ) -> Iterator[Pipeline]:
        """Make a pipeline with these products and take it away afterwards, whatever happened.

        Args:
            products: units by id.
            workers: how many; 0 for what brings a process of its own.
            worker: starts one.
            ingress: start an ingress as well.
            fill: puts more than the products into the database.
            overrides: of settings.

        Raises:
            EngineUnavailable: an engine does not answer.
            WorkerDied: a process does not start.
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
            undo.callback(lambda: asyncio.run(delete_topics(settings.kafka, run_id)))
            asyncio.run(_prepare(settings, products, fill))
            pids: dict[str, int | None] = {name: self.engines.pid(name) for name in NAMES}
            started: list[Child] = []
            for n in range(workers):
                started.append(worker(settings, log))
                undo.callback(started[-1].stop)
                pids["worker" if n == 0 else f"worker-{n + 1}"] = started[-1].pid
            way_in = None
            if ingress:
                way_in = Ingress(settings, log)
                undo.callback(way_in.stop)
                pids["ingress"] = way_in.pid
            for child in (*started, *([way_in] if way_in else [])):
                child.await_ready()
            yield Pipeline(settings, tuple(started), pids, self.profile, log, way_in)

    def _flush_redis(self) -> None:
        # The whole server is the bench's: nobody else's keys are in it.
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
            [(product_id, product_id, PRICE_CENTS, units) for product_id, units in products.items()]
        )
    finally:
        await store.close()
    if fill is not None:
        await fill(settings)


async def delete_topics(kafka: str, prefix: str) -> None:
    """Delete the topics whose names begin so, changelogs too."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        topics = [topic for topic in await admin.list_topics() if topic.startswith(prefix)]
        if topics:
            await admin.delete_topics(topics)
    finally:
        await admin.close()


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
