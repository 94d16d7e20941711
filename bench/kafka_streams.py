"""Kafka Streams: orders of the same topic, three chained stages in Java, rows in Postgres by JDBC batches, the same events.

The application stands in ``bench/peers/kafka_streams``, with a page on how it was tuned.  Maven builds it once; it is built
again when its sources change.

One process sells everything: it warms up while it tries each commit interval, then takes the fastest.  Its orders are on
the topic before the clock starts, which favours it: the pipeline's are produced while it sells.  The clock stops when the
last row is durable and the last event can be read.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlencode, urlsplit

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from orderstream.bench.load import Drawn, Load, draw, produce, steps
from orderstream.bench.measure import WARM_UP_ORDERS, Demand, Run, missed, watched
from orderstream.bench.pipeline import PRICE_CENTS, Bench, Pipeline
from orderstream.engines.child import ChildFailed
from orderstream.engines.locks import file_lock
from orderstream.engines.process import Say, tail
from orderstream.engines.programs import JAVA_MIN, Programs, run_logged
from orderstream.errors import EngineMissing
from orderstream.settings import Settings
from orderstream.streams.orders import Status
from orderstream.streams.partitions import product_partition
from orderstream.streams.producer import Producer, Record
from orderstream.streams.topics import ORDER_EVENTS, ORDERS

Guarantee = Literal["at_least_once", "exactly_once_v2"]
AT_LEAST_ONCE: Guarantee = "at_least_once"
EXACTLY_ONCE: Guarantee = "exactly_once_v2"

SOURCES = Path(__file__).parent / "peers" / "kafka_streams"
STAMP = "sources.sha256"

THREADS = 2
"""Stream threads."""

COMMIT_INTERVALS_MS = (100, 30, 100, 1_000)
"""Commit intervals that are tried, to take the best; the first one twice, since nothing was warm."""

PROBE_ORDERS = 20_000
"""Orders of one such trial: all of them together are also what the JVM compiles by."""

JVM = ("-Xms512m", "-Xmx512m", "-XX:+UseSerialGC", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")

TABLE = "kafka_streams_orders"
ROWS = f"""
CREATE TABLE {TABLE} (
    order_id uuid PRIMARY KEY, home int NOT NULL, source_offset bigint NOT NULL, status text NOT NULL, reason text,
    user_id text NOT NULL, payment_method text NOT NULL, product_id text NOT NULL, quantity int NOT NULL,
    price_cents bigint, total_cents bigint, charge_id text, created_at timestamptz NOT NULL, reserved_at timestamptz,
    paid_at timestamptz, confirmed_at timestamptz, cancelled_at timestamptz
)
"""
"""The pipeline's row of an order of one line, with no index but the primary key, which favours the peer."""

_OUTCOMES = f"""
SELECT concat_ws(' ', status, reason) AS outcome, count(*) AS orders FROM {TABLE}
WHERE order_id = ANY ($1::uuid[]) GROUP BY 1 ORDER BY 1
"""

EVENTS = (Status.CREATED, Status.RESERVED, Status.PAID, Status.CONFIRMED)
"""Of each order that is sold."""

ANSWER_S = 600.0
APPEAR_S = 30.0
STOP_S = 60.0
QUIET_MS = 1_000
"""The end of a topic is where nothing came for so long."""


def missing(programs: Programs) -> list[str]:
    """Return the Debian packages that have what the application is built and run with, and that are not installed."""
    home = os.environ.get("JAVA_HOME") if programs.path is None else None
    compiler = (home and shutil.which("javac", path=str(Path(home, "bin")))) or programs.find("javac")
    wanted = [] if programs.java() and compiler else [f"openjdk-{JAVA_MIN}-jdk-headless"]
    return wanted if programs.find("mvn") else [*wanted, "maven"]


def digest() -> str:
    """Return what names the sources: another build is made when it changes."""
    files = [SOURCES / "pom.xml", *sorted(SOURCES.glob("src/**/*.java"))]
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(SOURCES)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()


def build(folder: Path, say: Say, programs: Programs | None = None) -> Path:
    """Return the folder with the application's jars; build them where they are not there, or of other sources.

    Args:
        folder: of this peer, under ``.local``.
        say: gets a line when something is built.
        programs: where Maven and Java are.

    Raises:
        EngineMissing: Maven or Java is not installed, or the build failed.
    """
    programs, libs = programs or Programs(), folder / "libs"
    stamp, wanted = libs / STAMP, digest()

    def ready() -> bool:
        return stamp.is_file() and stamp.read_text() == wanted

    if absent := missing(programs):
        raise EngineMissing(f"Kafka Streams needs a Java compiler and Maven: apt-get install {' '.join(absent)}")
    with file_lock(folder / "libs.lock", say):
        if not ready():
            say("Kafka Streams: building the peer with Maven (once, its jars are about 90 MB)")
            draft, built = folder / "libs.draft", folder / "built"
            for old in (draft, built):
                shutil.rmtree(old, ignore_errors=True)
            run_logged(
                [
                    *(str(programs.find("mvn")), "-q", "-B", "-f", str(SOURCES / "pom.xml")),
                    *("package", "dependency:copy-dependencies", f"-Dbuilt={built}", f"-DoutputDirectory={draft}"),
                ],
                folder / "maven.log",
            )
            shutil.move(built / "peer.jar", draft)
            shutil.rmtree(built)
            (draft / STAMP).write_text(wanted)
            shutil.rmtree(libs, ignore_errors=True)
            draft.rename(libs)
    return libs


def jdbc_url(url: str) -> str:
    """Return a Postgres URL as JDBC writes it, with multi-row inserts."""
    parts = urlsplit(url)
    options = {"user": unquote(parts.username or ""), "reWriteBatchedInserts": "true"}
    if parts.password:
        options["password"] = unquote(parts.password)
    return f"jdbc:postgresql://{parts.hostname}:{parts.port or 5432}{parts.path}?{urlencode(options)}"


class Application:
    """The process in Java: a line of JSON in, a line of JSON out; see ``Main.java``."""

    def __init__(self, process: Any, log: Path) -> None:
        self.process, self._log = process, log

    def write(self, line: Mapping[str, Any]) -> None:
        """Send a line that has no answer."""
        self.process.stdin.write(orjson.dumps(line) + b"\n")

    async def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Have it do something; return its answer.

        Raises:
            ChildFailed: it ended, or does not answer within :data:`ANSWER_S`.
        """
        self.write({"do": do, **more})
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), ANSWER_S)
        except TimeoutError:
            raise ChildFailed(f"Kafka Streams: no end of `{do}` in {ANSWER_S:.0f} s\n{tail(self._log)}") from None
        if not line:
            raise ChildFailed(f"Kafka Streams ended during `{do}`\n{tail(self._log, lines=40)}")
        answer: dict[str, Any] = orjson.loads(line)
        return answer


@asynccontextmanager
async def application(pipeline: Pipeline, libs: Path, guarantee: Guarantee) -> AsyncIterator[Application]:
    """Start the process; end it, whatever happened."""
    settings = pipeline.settings
    java = str(Programs().java())
    with pipeline.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(java, *JVM, "-cp", str(libs / "*"), "orderstream.streams.Main"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    made = Application(process, pipeline.log)
    try:
        made.write(
            {
                "kafka": settings.kafka,
                "jdbc_url": jdbc_url(settings.database_url),
                "table": TABLE,
                "application_id": f"{settings.app_id}-kafka-streams",
                "state_dir": str(settings.local_dir / "kafka_streams"),
                "guarantee": guarantee,
                "threads": THREADS,
                "partitions": settings.partitions,
                "orders": settings.topic(ORDERS.name),
                "deliveries": deliveries(settings),
                "events": settings.topic(ORDER_EVENTS.name),
            }
        )
        yield made
        process.stdin.close()  # type: ignore[union-attr]
        await asyncio.wait_for(process.wait(), STOP_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def deliveries(settings: Settings) -> str:
    """Return the topic that the peer's stock comes from."""
    return settings.topic("kafka-streams-deliveries")


async def _led(admin: Any, topic: str, partitions: int) -> None:
    """Wait until every partition of a new topic has its leader.

    Raises:
        TimeoutError: one has none within :data:`APPEAR_S`.
    """
    deadline = time.monotonic() + APPEAR_S
    while True:
        (found,) = await admin.describe_topics([topic])
        if sum(partition["leader"] >= 0 for partition in found["partitions"]) == partitions:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"topic {topic} has no leaders after {APPEAR_S:.0f} s")
        await asyncio.sleep(0.1)


async def deliver(settings: Settings, products: Sequence[str], units: int) -> None:
    """Make the topic of deliveries, and put so many units of each product on it."""
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(deliveries(settings), settings.partitions, 1)])
        await _led(admin, deliveries(settings), settings.partitions)
    finally:
        await admin.close()
    value = orjson.dumps({"units": units, "price_cents": PRICE_CENTS})
    step: dict[tuple[str, int], list[Record]] = {}
    for product_id in products:
        place = deliveries(settings), product_partition(product_id, settings.partitions)
        step.setdefault(place, []).append((product_id.encode(), value, ()))
    producer = Producer(settings, client_id="orderstream-bench")
    await producer.start()
    try:
        await producer.send(step)
    finally:
        await producer.stop()


def units_needed(orders: int) -> int:
    """Return the units of each product that are there for every order of a run, whichever product it is of."""
    return orders + WARM_UP_ORDERS + PROBE_ORDERS * len(COMMIT_INTERVALS_MS)


class Events:
    """Reads the topic ``order-events`` from where it ends now, as who must not see what a transaction may take back."""

    def __init__(self, settings: Settings) -> None:
        topic = settings.topic(ORDER_EVENTS.name)
        self._partitions = [TopicPartition(topic, n) for n in range(settings.partitions)]
        self._consumer: Any = AIOKafkaConsumer(
            bootstrap_servers=settings.kafka, enable_auto_commit=False, isolation_level="read_committed"
        )

    async def __aenter__(self) -> Events:
        """Note the ends; nothing is fetched before :meth:`counted`."""
        await self._consumer.start()
        self._ends = await self._consumer.end_offsets(self._partitions)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.stop()

    async def counted(self) -> Counter[tuple[str, str]]:
        """Return how often each event came, by order id and status."""
        self._consumer.assign(self._partitions)
        for partition, offset in self._ends.items():
            self._consumer.seek(partition, offset)
        found: Counter[tuple[str, str]] = Counter()
        while fetched := await self._consumer.getmany(timeout_ms=QUIET_MS):
            for records in fetched.values():
                for record in records:
                    event = orjson.loads(record.value)
                    found[event["order_id"], event["status"]] += 1
        return found


def wrong_events(found: Mapping[tuple[str, str], int], ids: Sequence[str], guarantee: Guarantee) -> list[str]:
    """Return what is wrong with the events of orders that were sold: lost ones and, where none may be, repeats."""
    expected = {(order_id, str(status)) for order_id in ids for status in EVENTS}
    lost = len(expected - set(found))
    unknown = len(set(found) - expected)
    repeated = sum(times > 1 for times in found.values()) if guarantee == EXACTLY_ONCE else 0
    counts = {"lost": lost, "of no order": unknown, "repeated": repeated}
    return [f"events: {count} {what}" for what, count in counts.items() if count]


def wrong_stock(counts: Mapping[str, int], received: int, sold: int, guarantee: Guarantee) -> list[str]:
    """Return what is wrong with the sums of the state store, in units."""
    faults = [] if counts["reserved"] == 0 else [f"stock: {counts['reserved']} units are still held"]
    if counts["on_hand"] + counts["sold"] != received:
        faults.append(f"stock: {counts['on_hand']} on hand and {counts['sold']} sold are not {received} received")
    if counts["sold"] < sold or (guarantee == EXACTLY_ONCE and counts["sold"] != sold):
        faults.append(f"stock: {counts['sold']} units sold instead of {sold}")
    return faults


async def sold(app: Application, settings: Settings, orders: Sequence[Drawn]) -> tuple[float, float]:
    """Produce orders while the application sells them.

    Returns:
        When the first was given to the producer, and when all were done, in seconds since 1970.
    """
    packed = steps(settings, orders)
    await app.ask("expect", orders=len(orders))
    produced = await produce(settings, packed)
    found = await app.ask("sell")
    return produced.start, found["end"]


async def stocked(app: Application, units: int) -> None:
    """Wait until all deliveries have been read.

    Raises:
        TimeoutError: they are not within :data:`APPEAR_S`.
    """
    async with asyncio.timeout(APPEAR_S):
        while (await app.ask("counts"))["on_hand"] < units:  # noqa: ASYNC110  (it is another process)
            await asyncio.sleep(0.1)


async def probe(app: Application, settings: Settings, load: Load, seed: str, units: int) -> dict[int, float]:
    """Return orders/s by commit interval in milliseconds."""
    rates = {}
    for n, interval in enumerate(COMMIT_INTERVALS_MS):
        await app.ask("start", commit_interval_ms=interval)
        if not n:
            await stocked(app, units)
        start, end = await sold(app, settings, list(draw(load, PROBE_ORDERS, f"{seed}/probe/{n}")))
        await app.ask("stop")
        rates[interval] = round(PROBE_ORDERS / (end - start), 1)
    return rates


async def sell(pipeline: Pipeline, libs: Path, guarantee: Guarantee, demand: Demand, seed: str) -> Run:
    """Have the application warm up and sell; check its rows, its events and its stock.

    Returns:
        Figures ``orders_per_s``, ``lines_per_s`` and ``last_verdict_s``; in ``detail`` the commit interval that it had, and
        the rates of all that were tried.

    Raises:
        ChildFailed: the application ended before its work.
    """
    settings, load = pipeline.settings, demand.load
    connection = await asyncpg.connect(settings.database_url, timeout=30)
    try:
        await connection.execute(ROWS)
        units = units_needed(demand.orders)
        await deliver(settings, load.products, units)
        async with application(pipeline, libs, guarantee) as app:
            rates = await probe(app, settings, load, seed, units * len(load.products))
            best = max(rates, key=lambda interval: rates[interval])
            await app.ask("start", commit_interval_ms=best)
            await sold(app, settings, list(draw(load, WARM_UP_ORDERS, f"{seed}/warm-up")))
            orders = list(draw(load, demand.orders, seed))
            async with Events(settings) as events:
                pipeline = replace(pipeline, pids={**pipeline.pids, "worker": app.process.pid})
                async with watched(pipeline, connection) as seen:
                    start, end = await sold(app, settings, orders)
                counts = await app.ask("counts")
                await app.ask("stop")
                told = await events.counted()
        seen.detail.update({"commit_interval_ms": best, "probes": {str(ms): rate for ms, rate in rates.items()}})
        ids = [orjson.loads(one.value)["order_id"] for one in orders]
        outcomes = {row["outcome"]: row["orders"] for row in await connection.fetch(_OUTCOMES, ids)}
        faults = missed(demand.expected, outcomes)
        faults += wrong_events(told, ids, guarantee)
        faults += wrong_stock(counts, units * len(load.products), units, guarantee)
        seconds = end - start
        figures = {
            "orders_per_s": demand.orders / seconds,
            "lines_per_s": sum(order.lines for order in orders) / seconds,
            "last_verdict_s": seconds,
        }
        return Run(figures, faults, seen.usage, {"orders": demand.orders, "outcomes": outcomes, **seen.detail})
    finally:
        await connection.close()


def streams_run(bench: Bench, guarantee: Guarantee, load: Load, orders: int, seed: str) -> Run:
    """Measure the application on fresh topics and a fresh database; each of its orders must end CONFIRMED.

    Raises:
        EngineMissing: it can't be built.
    """
    libs = build(bench.folder.parent / "kafka_streams", bench.say)
    demand = Demand(load, orders, {Status.CONFIRMED: orders}, warm_up=load)
    with bench.pipeline(dict.fromkeys(load.products, orders), workers=0) as pipeline:
        return asyncio.run(sell(pipeline, libs, guarantee, demand, seed))
