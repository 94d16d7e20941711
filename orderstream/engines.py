"""Local engines: a Kafka, a Redis and a Postgres of the project's own, for development and tests.

Everything that they write stands under one folder (``settings.local_dir``, normally ``.local/``)::

    engines.json            the addresses of the engines that run, by setting name; absent when none does
    engines.lock            held while engines are started or stopped
    <engine>/state.json     port and process of the engine; the port is kept for the next start
    <engine>/data           its data
    <engine>/*.log          its output
    kafka/libs              the broker's jars

A process is known by its pid *and* the moment of its birth, so that a pid which the system has given to something else
in the meantime is never taken for an engine, and never gets a signal.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import hashlib
import json
import logging
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import redis
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from orderstream.errors import EngineAway, EngineMissing
from orderstream.settings import ENGINES_FILE, PREFIX, Settings, load, project_dir

T = TypeVar("T")
Say = Callable[[str], None]
Name = Literal["kafka", "redis", "postgres"]
NAMES: tuple[Name, ...] = ("kafka", "redis", "postgres")
ADDRESSES = ("kafka", "redis_url", "database_url")  # the settings that hold their addresses, in the same order

KAFKA_HEAP_MB = 512  # a development broker with a few hundred partitions stays below 300 MB; the machine is shared
JAVA_MIN, REDIS_MIN, POSTGRES_MIN = 17, 7, 15  # the oldest major versions that are tried: Kafka 4.1 needs Java 17

START_TIMEOUT_S = 120.0  # a broker that recovers its logs after a kill, on a busy machine
STOP_TIMEOUT_S = 30.0  # then SIGKILL
PROBE_TIMEOUT_S = 3.0  # one question to an engine on this machine
DEATH_TIMEOUT_S = 10.0  # after SIGKILL
INSTALL_TIMEOUT_S = 900.0  # apt-get or Maven, over a slow line
LOCK_TIMEOUT_S = INSTALL_TIMEOUT_S + START_TIMEOUT_S
POLL_S = 0.05
START_TRIES = 3  # each on another port, where somebody else took the first one in between
LOG_BYTES_MAX = 10_000_000  # a longer log is put aside at the next start; one old log is kept
TAIL_LINES = 15

# Below the range that Linux (32768) and macOS (49152) hand out to clients: a client that keeps connecting to a stopped
# engine's port in that range can end up connected to itself, and then holds the port.
PORTS = range(20_000, 30_000)

# Where Postgres data goes when the server's user can't enter the checkout.  Survives a restart of the machine.
POSTGRES_DATA_FALLBACK = Path("/var/tmp")


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A process that can't be confused with a later one of the same pid."""

    pid: int
    birth: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Return the process that has this pid now; None when none has, or when it only waits to be reaped."""
        proc = Path("/proc", str(pid))
        if not sys.platform.startswith("linux"):
            shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
            return cls(pid, shown.stdout.strip()) if shown.stdout.strip() else None
        try:
            fields = (proc / "stat").read_text().rpartition(")")[2].split()
            threads = len(list((proc / "task").iterdir()))
        except (FileNotFoundError, ProcessLookupError):
            return None
        # Fields 3 (state) and 22 (start, in clock ticks after boot) of proc(5); the name before them may hold anything.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Where the first thread has ended and others haven't yet, the process still holds its files and ports.
        ended = fields[0] in "ZX" and threads <= 1
        return None if ended else cls(pid, f"{boot}/{fields[19]}")

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return Process.of(self.pid) == self

    def send(self, signum: int) -> None:
        """Send a signal, unless the process has ended or its pid belongs to another one."""
        if self.alive:
            try:
                os.kill(self.pid, signum)
            except ProcessLookupError:
                return  # it ended between the look and the signal: what the signal was for

    def children(self) -> list[Process]:
        """Return the direct children; empty where there is no /proc."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(entry.read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            child = Process.of(int(entry.parent.name)) if parent == self.pid else None
            found += [child] if child else []
        return found

    def wait(self, timeout_s: float) -> bool:
        """Wait until the process has ended; False when it still runs after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True


def port_free(port: int) -> bool:
    """Whether a server can listen on this loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port(taken: Iterable[int] = ()) -> int:
    """Return a loopback port that nobody listens on.

    Raises:
        EngineMissing: no free port was found in :data:`PORTS`.
    """
    taken = set(taken)
    for port in random.sample(PORTS, k=200):
        if port not in taken and port_free(port):
            return port
    raise EngineMissing(f"no free loopback port between {PORTS.start} and {PORTS.stop - 1} for a local engine")


def tail(*logs: Path) -> str:
    """Return the last lines of the logs, for an error message."""
    parts = []
    for log in logs:
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        parts += [f"  last lines of {log}:", *(f"    {line}" for line in lines[-TAIL_LINES:])] if lines else []
    return "\n".join(parts) or f"  nothing was written to {', '.join(map(str, logs))}"


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(file)


# --- asking an engine -------------------------------------------------------------------------------------------------


def run_async(make: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine to its end from synchronous code, also where an event loop runs in this thread already."""

    async def main() -> T:
        return await asyncio.wait_for(make(), 10 * PROBE_TIMEOUT_S)

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(lambda: asyncio.run(main())).result()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's logger silent; what it would say comes as an exception as well."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def probe_kafka(bootstrap: str) -> str:
    """Ask for the cluster's metadata; return an empty string, because the protocol doesn't tell the version.

    Raises:
        EngineAway: no broker answered within :data:`PROBE_TIMEOUT_S`.
    """

    async def ask() -> None:
        client = AIOKafkaClient(bootstrap_servers=bootstrap, request_timeout_ms=int(PROBE_TIMEOUT_S * 1000))
        try:
            await asyncio.wait_for(client.bootstrap(), PROBE_TIMEOUT_S)
            if not client.cluster.brokers():
                raise EngineAway("kafka", bootstrap, "it knows of no broker")
        finally:
            await client.close()

    try:
        with _quiet("aiokafka"):
            run_async(ask)
    except (KafkaError, OSError, TimeoutError) as error:
        raise EngineAway("kafka", bootstrap, _why(error)) from error
    return ""


def probe_redis(url: str) -> str:
    """Send PING; return the server's version.

    Raises:
        EngineAway: no PONG within :data:`PROBE_TIMEOUT_S`.
    """
    client = redis.Redis.from_url(url, socket_timeout=PROBE_TIMEOUT_S, socket_connect_timeout=PROBE_TIMEOUT_S)
    try:
        client.ping()
        return str(client.info("server")["redis_version"])
    except (redis.RedisError, OSError) as error:
        raise EngineAway("redis", url, _why(error)) from error
    finally:
        client.close()


def probe_postgres(url: str) -> str:
    """Run ``SELECT 1``; return the server's version.

    Raises:
        EngineAway: no answer within :data:`PROBE_TIMEOUT_S`.
    """

    async def ask() -> str:
        connection = await asyncpg.connect(url, timeout=PROBE_TIMEOUT_S, command_timeout=PROBE_TIMEOUT_S)
        try:
            await connection.fetchval("SELECT 1")
            return str(await connection.fetchval("SHOW server_version")).split()[0]
        finally:
            await connection.close()

    try:
        return run_async(ask)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise EngineAway("postgres", url, _why(error)) from error


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ").splitlines()[0]


async def _admin_execute(url: str, *statements: str) -> None:
    admin = await asyncpg.connect(_database(url, "postgres"), timeout=PROBE_TIMEOUT_S)
    try:
        for statement in statements:
            await admin.execute(statement)
    finally:
        await admin.close()


def _database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def create_database(url: str, name: str) -> str:
    """Create a database on the server of ``url``, unless it is there; return its URL.

    Raises:
        EngineAway: the server did not do it.
    """
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name):
        raise ValueError(f"not a name for a database: {name!r}")
    try:
        run_async(lambda: _admin_execute(url, f"CREATE DATABASE {name}"))
    except asyncpg.DuplicateDatabaseError:
        return _database(url, name)
    except (asyncpg.PostgresError, OSError, TimeoutError) as error:
        raise EngineAway("postgres", url, f"can't create database {name}: {_why(error)}") from error
    return _database(url, name)


def drop_database(url: str) -> None:
    """Drop the database of ``url``, whoever is connected.

    Raises:
        EngineAway: the server did not do it.
    """
    name = urlsplit(url).path.lstrip("/")
    try:
        run_async(lambda: _admin_execute(url, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
    except (asyncpg.PostgresError, OSError, TimeoutError) as error:
        raise EngineAway("postgres", url, f"can't drop database {name}: {_why(error)}") from error


# --- programs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Programs:
    """The programs that the engines need: where they are, and how they get here.

    Args:
        path: folders to look in, as in PATH; None for this process's PATH.
        postgres_home: where Debian keeps one folder per version of Postgres, none of them on PATH.
    """

    path: str | None = None
    postgres_home: Path = Path("/usr/lib/postgresql")

    def find(self, program: str) -> Path | None:
        """Return where a program is; None when it is not here."""
        found = shutil.which(program, path=self.path)
        return Path(found) if found else None

    def java(self) -> Path | None:
        """Return a Java that runs Kafka: the one of JAVA_HOME, else that on PATH."""
        home = os.environ.get("JAVA_HOME") if self.path is None else None
        candidates = [Path(home, "bin", "java") if home else None, self.find("java")]
        return next((java for java in candidates if java and _major(java, "-version") >= JAVA_MIN), None)

    def redis(self) -> Path | None:
        """Return a redis-server that is new enough."""
        found = self.find("redis-server")
        return found if found and _major(found, "--version") >= REDIS_MIN else None

    def postgres(self, major: int | None = None) -> Path | None:
        """Return the folder of initdb and postgres: of this major version, or else of the oldest that is new enough."""
        homes = self.postgres_home.glob("[0-9]*/bin/initdb")
        folders = {int(initdb.parent.parent.name): initdb.parent for initdb in homes}
        on_path = self.find("initdb")
        if on_path:
            folders.setdefault(_major(on_path, "--version"), on_path.parent)
        fit = sorted(version for version in folders if version >= POSTGRES_MIN and major in (None, version))
        return folders[fit[0]] if fit else None

    def apt_get(self) -> Path | None:
        """Return apt-get where it can be used: on Debian and its like, as root."""
        return self.find("apt-get") if os.geteuid() == 0 else None

    def install(self, wanted: Sequence[Sequence[str]], log: Path, say: Say) -> None:
        """Install Debian packages; of each group of alternatives, the first that this Debian has.

        Raises:
            EngineMissing: apt-get failed, with what it said last.
        """
        apt_get = self.apt_get()
        if apt_get is None:
            raise EngineMissing("installing Debian packages needs root and apt-get")
        say(f"not installed: {', '.join(group[0] for group in wanted)}; asking apt-get for its lists")
        self._apt([str(apt_get), "update", "-q"], log)
        packages = [next((p for p in group if self._known(p)), group[0]) for group in wanted]
        say(f"installing with apt-get: {', '.join(packages)} (services that Debian may start with them are not used)")
        lock = ["-o", "DPkg::Lock::Timeout=300"]
        self._apt([str(apt_get), "install", "-q", "-y", "--no-install-recommends", *lock, *packages], log)
        _major.cache_clear()

    def _known(self, package: str) -> bool:
        shown = subprocess.run(["apt-cache", "show", package], capture_output=True, check=False)
        return shown.returncode == 0 and bool(shown.stdout.strip())

    def _apt(self, command: list[str], log: Path) -> None:
        run_logged(command, log, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


@lru_cache(maxsize=16)
def _major(program: Path, flag: str) -> int:
    """Return the major version that a program tells; 0 when it tells none."""
    try:
        told = subprocess.run(
            [str(program), flag], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0  # not to be run here: as good as not installed
    version = re.search(r"(?:version |v=|\) )\"?(\d+)", told.stdout + told.stderr)
    return int(version[1]) if version else 0


def run_logged(
    command: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    user: User | None = None,
) -> None:
    """Run a program to its end, with its output in ``log``.

    Raises:
        EngineMissing: it failed or took longer than :data:`INSTALL_TIMEOUT_S`, with the last lines of the log.
    """
    with log.open("ab") as out:
        try:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                check=False,
                timeout=INSTALL_TIMEOUT_S,
                **_as(user),
            ).returncode
            why = f"ended with {status}" if status else ""
        except subprocess.TimeoutExpired:
            why = f"did not end within {INSTALL_TIMEOUT_S:.0f} s"
    if why:
        raise EngineMissing(f"{' '.join(command[:3])} … {why}\n{tail(log)}")


@dataclass(frozen=True)
class User:
    """An account to run a server under."""

    name: str
    uid: int
    gid: int

    @classmethod
    def unprivileged(cls) -> User | None:
        """Return the account for a server that refuses to run as root; None where this process isn't root.

        Raises:
            EngineMissing: this process is root, and there is no such account.
        """
        if os.geteuid() != 0:
            return None
        for name in ("postgres", "nobody"):
            try:
                entry = pwd.getpwnam(name)
            except KeyError:
                continue  # the next candidate; none at all is an error below
            return cls(name, entry.pw_uid, entry.pw_gid)
        raise EngineMissing("Postgres refuses to run as root, and there is no account `postgres` or `nobody` to run it")

    def can_enter(self, folder: Path) -> bool:
        """Whether this account gets into a folder: every folder above it has to let it through."""
        entered = subprocess.run(
            ["/bin/sh", "-c", 'cd -- "$0"', str(folder)], capture_output=True, check=False, **_as(self)
        )
        return entered.returncode == 0


def _as(user: User | None) -> dict[str, Any]:
    return {"user": user.uid, "group": user.gid, "extra_groups": []} if user else {}


# --- the engines ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What is remembered of an engine between two commands.  Without a process it is stopped."""

    ports: tuple[int, ...] = ()
    data: str = ""
    process: Process | None = None

    @property
    def alive(self) -> bool:
        """Whether the process that was started still runs."""
        return self.process is not None and self.process.alive


@dataclass(frozen=True)
class EngineStatus:
    """One row of ``orderstream status``.

    ``state``: running; stopped; silent (its process runs, but does not answer); elsewhere (not ours, by a setting).
    """

    name: Name
    state: Literal["running", "stopped", "silent", "elsewhere"]
    address: str = ""
    pid: int | None = None
    data: Path | None = None
    version: str = ""
    detail: str = ""


class Engine(ABC):
    """One kind of server: what it needs, how it is started, and how it shows that it works."""

    name: Name
    setting: str
    example: str
    stop_signal: int = signal.SIGTERM
    ports_needed: int = 1  # the first one is the clients'

    def __init__(self, folder: Path, programs: Programs) -> None:
        self.folder, self.programs = folder, programs

    @property
    def log(self) -> Path:
        """Where the process's own output goes."""
        return self.folder / f"{self.name}.out.log"

    @property
    def logs(self) -> tuple[Path, ...]:
        """The files that tell why it failed."""
        return (self.log,)

    @property
    def user(self) -> User | None:
        """The account that it runs under; None for ours."""
        return None

    @abstractmethod
    def missing(self) -> list[Sequence[str]]:
        """Return the Debian packages (groups of alternatives) that have what isn't installed."""

    @abstractmethod
    def prepare(self, state: State, say: Say) -> State:
        """Make the data folder and configuration ready; return the state with the data folder in it."""

    @abstractmethod
    def command(self, state: State) -> list[str]:
        """Return the command that runs the server in the foreground, in its own folder."""

    @abstractmethod
    def address(self, state: State) -> str:
        """Return what the setting of this engine has to be."""

    def probe_address(self, state: State) -> str:
        """Return what to ask whether our server is up."""
        return self.address(state)

    @abstractmethod
    def probe(self, address: str) -> str:
        """Return the server's version; raise EngineAway when it doesn't answer."""

    def finish(self, address: str) -> None:  # noqa: B027  (most engines need nothing)
        """Do what the first use needs, once the server answers."""


class Kafka(Engine):
    """Kafka in KRaft mode, broker and controller in one process, from the jars of Maven Central."""

    name = "kafka"
    setting = "kafka"
    example = "127.0.0.1:9092"
    ports_needed = 2  # the second one is the controller's

    def __init__(self, folder: Path, programs: Programs, libs: Path) -> None:
        super().__init__(folder, programs)
        self.libs = libs
        self.recipe = project_dir() / "deploy" / "kafka"

    @property
    def logs(self) -> tuple[Path, ...]:
        """The broker's own log as well."""
        return (self.folder / "kafka.log", self.log)

    @property
    def _libs_ready(self) -> bool:
        stamp = self.libs / "pom.sha256"
        pom = self.recipe / "pom.xml"
        return stamp.is_file() and (not pom.is_file() or stamp.read_text() == _digest(pom))

    def missing(self) -> list[Sequence[str]]:
        """A Java, and Maven as long as the jars aren't here."""
        wanted: list[Sequence[str]] = []
        if self.programs.java() is None:
            wanted.append((f"openjdk-{JAVA_MIN}-jre-headless", "default-jre-headless"))
        if not self._libs_ready and self.programs.find("mvn") is None:
            wanted.append(("maven",))
        return wanted

    def _fetch_libs(self, say: Say) -> None:
        pom, mvn = self.recipe / "pom.xml", self.programs.find("mvn")
        if not pom.is_file() or mvn is None:
            raise EngineMissing(f"Kafka's jars are fetched with Maven by {pom}, in a source checkout of orderstream")
        say("kafka: fetching its jars with Maven (once, about 45 MB)")
        self.libs.parent.mkdir(parents=True, exist_ok=True)
        draft = self.libs.with_name("libs.draft")
        if draft.exists():
            shutil.rmtree(draft)
        run_logged(
            [str(mvn), "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", f"-DoutputDirectory={draft}"],
            self.folder / "maven.log",
        )
        (draft / "pom.sha256").write_text(_digest(pom))
        if self.libs.exists():
            shutil.rmtree(self.libs)
        draft.rename(self.libs)

    def prepare(self, state: State, say: Say) -> State:
        """Fetch the jars, write the configuration, format the data folder where it is new."""
        if not self._libs_ready:
            with file_lock(self.libs.with_name("libs.lock"), say):
                if not self._libs_ready:  # another command may have fetched them in the meantime
                    self._fetch_libs(say)
        port, controller = state.ports
        cores = os.cpu_count() or 1
        # Paths in it are relative to the folder that the broker runs in: no path needs quoting.
        (self.folder / "server.properties").write_text(
            "\n".join(
                (
                    "process.roles=broker,controller",
                    "node.id=1",
                    f"controller.quorum.voters=1@127.0.0.1:{controller}",
                    f"listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
                    f"advertised.listeners=PLAINTEXT://127.0.0.1:{port}",
                    "controller.listener.names=CONTROLLER",
                    "inter.broker.listener.name=PLAINTEXT",
                    "log.dirs=data",
                    "auto.create.topics.enable=false",
                    "offsets.topic.replication.factor=1",
                    "offsets.topic.num.partitions=8",
                    # As many threads as there is work for: each request wakes one of either kind.
                    f"num.network.threads={max(1, cores // 2)}",
                    f"num.io.threads={max(2, cores)}",
                    "transaction.state.log.replication.factor=1",
                    "transaction.state.log.min.isr=1",
                    "transaction.state.log.num.partitions=4",
                    "share.coordinator.state.topic.replication.factor=1",
                    "share.coordinator.state.topic.min.isr=1",
                    "# A broker that was killed is let in again once its old session is over (9 s by default).",
                    "broker.session.timeout.ms=4000",
                    "broker.heartbeat.interval.ms=1000",
                    "# A group starts at once, and a dead worker is missed as soon as its settings say.",
                    "group.initial.rebalance.delay.ms=0",
                    "group.min.session.timeout.ms=1000",
                    "",
                )
            )
        )
        if not (self.folder / "data" / "meta.properties").is_file():
            cluster = "A" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]
            tool = [*self._java("-Xmx128m"), "kafka.tools.StorageTool"]
            run_logged([*tool, "format", "-t", cluster, "-c", "server.properties"], self.log, cwd=self.folder)
        return replace(state, data=str(self.folder / "data"))

    def _java(self, *options: str) -> list[str]:
        logging_options = [f"-Dlog4j2.configurationFile={self.recipe / 'log4j2.xml'}", "-Dkafka.logs.dir=."]
        return [str(self.programs.java()), *options, *logging_options, "-cp", str(self.libs / "*")]

    def command(self, state: State) -> list[str]:
        """The JVM itself, so that its pid is the broker's."""
        # The serial collector: on a few cores that it shares with everything else, G1 costs the broker half of its time.
        options = (f"-Xmx{KAFKA_HEAP_MB}m", "-XX:+UseSerialGC", "-Djava.awt.headless=true", "-XX:+ExitOnOutOfMemoryError")
        return [*self._java(*options), "kafka.Kafka", "server.properties"]

    def address(self, state: State) -> str:
        """Host and port."""
        return f"127.0.0.1:{state.ports[0]}"

    def probe(self, address: str) -> str:
        """The version is that of the jars."""
        probe_kafka(address)
        jar = next(self.libs.glob("kafka_2*.jar"), None)
        return jar.stem.rpartition("-")[2] if jar else ""


class Redis(Engine):
    """Redis with an append-only file."""

    name = "redis"
    setting = "redis_url"
    example = "redis://127.0.0.1:6379/0"

    def missing(self) -> list[Sequence[str]]:
        """The server."""
        return [] if self.programs.redis() else [("redis-server",)]

    def prepare(self, state: State, say: Say) -> State:
        """Make the data folder."""
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        return replace(state, data=str(data))

    def command(self, state: State) -> list[str]:
        """All of its configuration stands on the command line."""
        options = {
            "bind": "127.0.0.1",
            "port": str(state.ports[0]),
            "dir": "data",
            "appendonly": "yes",
            "appendfsync": "everysec",  # what Redis loses in a crash is rebuilt from Postgres
            "save": "",
            "maxmemory-policy": "noeviction",  # a hold that is thrown out would be sold twice
            "daemonize": "no",
        }
        return [str(self.programs.redis()), *(part for key, value in options.items() for part in (f"--{key}", value))]

    def address(self, state: State) -> str:
        """A URL with the database number."""
        return f"redis://127.0.0.1:{state.ports[0]}/0"

    def probe(self, address: str) -> str:
        """PING."""
        return probe_redis(address)


class Postgres(Engine):
    """Postgres, under an account of its own where we are root."""

    name = "postgres"
    setting = "database_url"
    example = "postgresql://127.0.0.1:5432/orderstream"
    stop_signal = signal.SIGINT  # fast shutdown; SIGTERM would wait until the last client goes

    @property
    def user(self) -> User | None:
        """Postgres refuses to run as root."""
        return User.unprivileged()

    def missing(self) -> list[Sequence[str]]:
        """The server, in any version that fits; the one that made the data is asked for later."""
        return [] if self.programs.postgres() else [(f"postgresql-{POSTGRES_MIN}", "postgresql")]

    def _data(self, state: State, say: Say) -> Path:
        if state.data and Path(state.data).is_dir():
            return Path(state.data)
        user = self.user
        if user is None or user.can_enter(self.folder):
            return self.folder / "data"
        data = POSTGRES_DATA_FALLBACK / f"orderstream-postgres-{hashlib.sha256(bytes(self.folder)).hexdigest()[:12]}"
        say(f"postgres: its account `{user.name}` can't enter {self.folder}; its data goes to {data}")
        return data

    def prepare(self, state: State, say: Say) -> State:
        """Make the data folder with initdb where it is new."""
        data, user = self._data(state, say), self.user
        state = replace(state, data=str(data))
        if not data.exists():
            # Made aside: an initdb that is interrupted leaves nothing that looks like a database.
            draft = data.with_name(f"{data.name}.draft")
            if draft.exists():
                shutil.rmtree(draft)
            draft.mkdir(mode=0o700)
            if user:
                os.chown(draft, user.uid, user.gid)
            options = ["--username=orderstream", "--auth=trust", "--encoding=UTF8", "--locale=C", "--data-checksums"]
            initdb = str(self._bin(state) / "initdb")
            run_logged([initdb, *options, "-D", str(draft)], self.log, cwd=draft, user=user)
            draft.rename(data)
        if data.is_symlink() or data.stat().st_uid != (user.uid if user else os.geteuid()):
            raise EngineMissing(f"postgres: {data} belongs to another account; remove it, or use that account")
        self._drop_stale_lock(data)
        return state

    def _bin(self, state: State) -> Path:
        """Return the programs of the version that made the data.

        Raises:
            EngineMissing: it is not installed any more.
        """
        made_by = Path(state.data, "PG_VERSION")
        major = int(made_by.read_text().split(".")[0]) if made_by.is_file() else None
        found = self.programs.postgres(major)
        if found is None:
            raise EngineMissing(
                f"postgres: {state.data} needs Postgres {major}: install postgresql-{major}, or remove it"
            )
        return found

    def _drop_stale_lock(self, data: Path) -> None:
        """Remove the lock of a server that was killed, where its pid belongs to another program by now."""
        lock = data / "postmaster.pid"
        if not lock.is_file():
            return
        program = Path(f"/proc/{lock.read_text().split()[0]}/comm")
        if program.is_file() and program.read_text().strip() != "postgres":
            lock.unlink()

    def command(self, state: State) -> list[str]:
        """What differs from Postgres's defaults stands on the command line."""
        options = {
            "listen_addresses": "127.0.0.1",  # and initdb's pg_hba.conf trusts loopback only
            "port": str(state.ports[0]),
            "unix_socket_directories": "",  # the path of a socket may have 107 bytes, that of a checkout more
            "max_connections": "200",
            "shared_buffers": "256MB",
            "synchronous_commit": "on",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        server = [str(self._bin(state) / "postgres"), "-D", state.data]
        return [*server, *(part for key, value in options.items() for part in ("-c", f"{key}={value}"))]

    def address(self, state: State) -> str:
        """A URL with the user and database that the first start creates."""
        return f"postgresql://orderstream@127.0.0.1:{state.ports[0]}/orderstream"

    def probe(self, address: str) -> str:
        """SELECT 1."""
        return probe_postgres(address)

    def probe_address(self, state: State) -> str:
        """The database that is there from the start."""
        return _database(self.address(state), "postgres")

    def finish(self, address: str) -> None:
        """Create the database."""
        create_database(address, "orderstream")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def file_lock(file: Path, say: Say) -> Iterator[None]:
    """Hold a lock between processes; it goes with the process that holds it.

    Raises:
        EngineAway: another one has held it for :data:`LOCK_TIMEOUT_S`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    told = False
    with file.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise EngineAway("the lock", str(file), f"held for {LOCK_TIMEOUT_S:.0f} s") from None
                if not told:
                    say(f"waiting for another command that holds {file}")
                    told = True
                time.sleep(POLL_S)
        yield


# --- all of them ------------------------------------------------------------------------------------------------------


def given_addresses() -> dict[str, str]:
    """Return the engines that the environment or ``.env`` points to, by setting name.

    Raises:
        SettingsError: a setting is wrong.
    """
    load()  # lists all that is wrong at once
    chosen = Settings()
    return {name: str(getattr(chosen, name)) for name in ADDRESSES if name in chosen.model_fields_set}


def _mute(line: str) -> None:
    """Say nothing."""


@dataclass
class LocalEngines:
    """The engines under one folder.

    Args:
        local_dir: their folder; made when it isn't there.
        kafka_libs: the broker's jars, to share them; ``local_dir/kafka/libs`` when None.
        given: addresses by setting name (see :func:`given_addresses`); those engines are somebody else's.
        say: gets one line for everything that takes time or that a human should know.
        programs: where the servers' programs are looked for.
    """

    local_dir: Path
    kafka_libs: Path | None = None
    given: Mapping[str, str] = field(default_factory=dict)
    say: Say = _mute
    programs: Programs = field(default_factory=Programs)

    def __post_init__(self) -> None:
        self.local_dir = self.local_dir.absolute()
        libs = self.kafka_libs.absolute() if self.kafka_libs else self.local_dir / "kafka" / "libs"
        kinds: tuple[Engine, ...] = (
            Kafka(self.local_dir / "kafka", self.programs, libs),
            Redis(self.local_dir / "redis", self.programs),
            Postgres(self.local_dir / "postgres", self.programs),
        )
        self._engines: dict[Name, Engine] = {engine.name: engine for engine in kinds}
        self._started: dict[Name, subprocess.Popen[bytes]] = {}

    # What the CLI does

    def up(self, which: Iterable[Name] = NAMES) -> dict[str, str]:
        """Start what doesn't run; return the addresses, by setting name, of all engines asked for.

        Engines that run and answer stay as they are, and those that a setting gives are left to whoever runs them.

        Raises:
            EngineMissing: a program is not installed and can't be installed, or failed.
            EngineAway: an engine was started and doesn't answer; with the last lines of its log.
        """
        asked = [self._engines[name] for name in which]
        for engine in asked:
            if engine.setting in self.given:
                variable = PREFIX + engine.setting.upper()
                self.say(f"{engine.name}: not started, {variable} says {self.given[engine.setting]}")
        with file_lock(self.local_dir / "engines.lock", self.say):
            ours = [engine for engine in asked if engine.setting not in self.given]
            stopped = [engine for engine in ours if not self._state(engine).alive]
            self._ensure_programs(stopped)
            began = time.monotonic()
            for engine in stopped:
                self._launch(engine)
            for engine in ours:
                state = self._await_answer(engine)
                shown = f"{engine.address(state)} (pid {state.process.pid if state.process else '?'})"
                spent = f"started in {time.monotonic() - began:.1f} s" if engine in stopped else "runs already"
                self.say(f"{engine.name}: {spent}, {shown}")
            return {engine.setting: self.given.get(engine.setting) or self._publish(engine) for engine in asked}

    def down(self) -> None:
        """Stop the engines that were started here, all at once; data and ports stay for the next ``up``.

        What runs elsewhere, and whatever has taken over the pid of an engine that died, is not touched.
        """
        if not self.local_dir.is_dir():
            return
        with file_lock(self.local_dir / "engines.lock", self.say):
            self._stop(self._engines.values())

    def status(self) -> list[EngineStatus]:
        """Look at all engines; asks each that should answer whether it does."""
        return [self._status(engine) for engine in self._engines.values()]

    def addresses(self) -> dict[str, str]:
        """Return the addresses of the engines that were started here, by setting name."""
        file = self.local_dir / ENGINES_FILE
        return dict(json.loads(file.read_text())) if file.is_file() else {}

    def remove(self) -> None:
        """Stop the engines and delete their whole folder, data and all."""
        self.down()
        states = [self._state(engine) for engine in self._engines.values()]
        for folder in [self.local_dir, *(Path(state.data) for state in states if state.data)]:
            if folder.exists():
                shutil.rmtree(folder)

    # What the chaos tests do

    def start(self, name: Name) -> str:
        """Start one engine, with its data and on its port; return its address."""
        return self.up([name])[self._engines[name].setting]

    def stop(self, name: Name) -> None:
        """Stop one engine cleanly."""
        with file_lock(self.local_dir / "engines.lock", self.say):
            self._stop([self._engines[name]])

    def kill(self, name: Name) -> None:
        """End one engine with SIGKILL, its child processes too, as a power cut would; its address stays published."""
        engine = self._engines[name]
        with file_lock(self.local_dir / "engines.lock", self.say):
            process = self._state(engine).process
            if process is None:
                return
            family = [process, *process.children()]
            for member in family:
                member.send(signal.SIGKILL)
            self._reap(engine, DEATH_TIMEOUT_S)
            for member in family:
                member.wait(DEATH_TIMEOUT_S)
            self._forget_process(engine)

    def restart(self, name: Name) -> str:
        """Stop one engine cleanly and start it again, with its data and on its port; return its address."""
        self.stop(name)
        return self.start(name)

    def pid(self, name: Name) -> int | None:
        """Return the pid of an engine that runs; None when it doesn't."""
        process = self._state(self._engines[name]).process
        return process.pid if process and process.alive else None

    # How

    def _state(self, engine: Engine) -> State:
        file = engine.folder / "state.json"
        if not file.is_file():
            return State()
        kept = json.loads(file.read_text())
        process = Process(**kept["process"]) if kept["process"] else None
        return State(tuple(kept["ports"]), kept["data"], process)

    def _keep(self, engine: Engine, state: State) -> State:
        _write_json(engine.folder / "state.json", asdict(state))
        return state

    def _forget_process(self, engine: Engine) -> None:
        if engine.folder.is_dir():
            self._keep(engine, replace(self._state(engine), process=None))

    def _publish(self, engine: Engine) -> str:
        address = engine.address(self._state(engine))
        _write_json(self.local_dir / ENGINES_FILE, {**self.addresses(), engine.setting: address})
        return address

    def _withdraw(self, engines: Iterable[Engine]) -> None:
        gone = {engine.setting for engine in engines}
        left = {setting: address for setting, address in self.addresses().items() if setting not in gone}
        if left:
            _write_json(self.local_dir / ENGINES_FILE, left)
        else:
            (self.local_dir / ENGINES_FILE).unlink(missing_ok=True)

    def _ensure_programs(self, engines: Sequence[Engine]) -> None:
        missing = {engine: groups for engine in engines if (groups := engine.missing())}
        if not missing:
            return
        if self.programs.apt_get():
            self.local_dir.mkdir(parents=True, exist_ok=True)
            self.programs.install(
                [g for groups in missing.values() for g in groups], self.local_dir / "apt.log", self.say
            )
            missing = {engine: groups for engine in engines if (groups := engine.missing())}
        if missing:
            packages = " ".join(group[0] for groups in missing.values() for group in groups)
            variables = " ".join(f"{PREFIX}{engine.setting.upper()}={engine.example}" for engine in missing)
            raise EngineMissing(
                f"can't start {' and '.join(engine.name for engine in missing)}: not installed (or too old) here; "
                f"install the Debian packages {packages}, or point to servers that already run: {variables}"
            )

    def _launch(self, engine: Engine) -> None:
        engine.folder.mkdir(parents=True, exist_ok=True)
        if engine.log.is_file() and engine.log.stat().st_size > LOG_BYTES_MAX:
            engine.log.replace(engine.log.with_suffix(".old.log"))
        state = self._keep(engine, engine.prepare(self._with_ports(engine), self.say))
        with engine.log.open("ab") as out:
            child = subprocess.Popen(
                engine.command(state),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=state.data if engine.user else engine.folder,
                start_new_session=True,  # it outlives the command that started it, and its Ctrl-C
                **_as(engine.user),
            )
        self._started[engine.name] = child
        self._keep(engine, replace(state, process=Process.of(child.pid)))

    def _with_ports(self, engine: Engine) -> State:
        """Keep the ports of the last start where they are free, so that clients find the engine again."""
        state = self._state(engine)
        others = {port for other in self._engines.values() for port in self._state(other).ports}
        ports = [port for port in state.ports if port_free(port)]
        if len(ports) < len(state.ports):
            self.say(f"{engine.name}: a port that it had, of {', '.join(map(str, state.ports))}, is taken by now")
            ports = []
        while len(ports) < engine.ports_needed:
            ports.append(free_port({*others, *ports}))
        return replace(state, ports=tuple(ports), process=None)

    def _await_answer(self, engine: Engine) -> State:
        """Wait until the engine answers; where it ended because somebody took its port, start it on another one."""
        tries = 1
        while (away := self._first_answer(engine)) is not None:
            state = self._state(engine)
            address = engine.address(state)
            if state.alive:
                why = f"no answer within {START_TIMEOUT_S:.0f} s"
                raise EngineAway(engine.name, address, why, tail(*engine.logs)) from away
            self._reap(engine, 0)
            self._forget_process(engine)
            if tries == START_TRIES or all(port_free(port) for port in state.ports):
                raise EngineAway(engine.name, address, "it ended while starting", tail(*engine.logs)) from away
            tries += 1
            self._launch(engine)
        state = self._state(engine)
        engine.finish(engine.address(state))
        return state

    def _first_answer(self, engine: Engine) -> EngineAway | None:
        """Ask until our process answers; return why it doesn't once it has ended or its time is over."""
        state = self._state(engine)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                engine.probe(engine.probe_address(state))
            except EngineAway as error:
                away = error
            else:
                if state.alive:
                    return None
                away = EngineAway(engine.name, engine.address(state), "somebody else's server answers there")
            if not state.alive or time.monotonic() > deadline:
                return away
            time.sleep(POLL_S)

    def _stop(self, engines: Iterable[Engine]) -> None:
        running = [(engine, process) for engine in engines if (process := self._state(engine).process) is not None]
        for engine, process in running:
            process.send(engine.stop_signal)
        for engine, process in running:
            if not self._reap(engine, STOP_TIMEOUT_S):
                self.say(f"{engine.name}: still there {STOP_TIMEOUT_S:.0f} s after its signal to stop; killing it")
                for member in [process, *process.children()]:
                    member.send(signal.SIGKILL)
                self._reap(engine, DEATH_TIMEOUT_S)
            self._forget_process(engine)
            self.say(f"{engine.name}: stopped (pid {process.pid})")
        self._withdraw(engines)

    def _reap(self, engine: Engine, timeout_s: float) -> bool:
        """Wait for the end of an engine's process, and bury it where it is our child; False when it goes on."""
        process = self._state(engine).process
        ended = process is None or process.wait(timeout_s)
        child = self._started.get(engine.name)
        if child is not None and child.poll() is not None:
            del self._started[engine.name]
        return ended

    def _status(self, engine: Engine) -> EngineStatus:
        if engine.setting in self.given:
            address = self.given[engine.setting]
            row = EngineStatus(engine.name, "elsewhere", address, detail=PREFIX + engine.setting.upper())
            try:
                version = engine.probe(address)
            except EngineAway as away:
                return replace(row, detail=str(away).splitlines()[0])
            # The broker doesn't tell its version, and the jars here say nothing about somebody else's.
            return row if engine.name == "kafka" else replace(row, version=version)
        state = self._state(engine)
        data = Path(state.data) if state.data else None
        if state.process is None or not state.alive:
            return EngineStatus(engine.name, "stopped", data=data)
        row = EngineStatus(engine.name, "running", engine.address(state), state.process.pid, data)
        try:
            return replace(row, version=engine.probe(engine.probe_address(state)))
        except EngineAway as away:
            return replace(row, state="silent", detail=str(away).splitlines()[0])
