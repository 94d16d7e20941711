"""The three kinds of server: what each needs, how it is started, how it shows that it works."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import signal
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from orderstream.engines.locks import file_lock
from orderstream.engines.probes import create_database, database_of, probe_kafka, probe_postgres, probe_redis
from orderstream.engines.process import Process, Say
from orderstream.engines.programs import JAVA_MIN, POSTGRES_MIN, Programs, User, run_logged
from orderstream.errors import EngineMissing
from orderstream.settings import project_dir

Name = Literal["kafka", "redis", "postgres"]

KAFKA_HEAP_MB = 512  # a development broker with a few hundred partitions stays below 300 MB; the machine is shared


# Where Postgres data goes when the server's user can't enter the checkout.  Survives a restart of the machine.
POSTGRES_DATA_FALLBACK = Path("/var/tmp")


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
        """The files that say why it failed."""
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
        """Return the server's version; raise EngineUnavailable when it doesn't answer."""

    def finish(self, address: str) -> None:  # noqa: B027  (most engines need nothing)
        """Do what the first use needs, once the server answers."""


class Kafka(Engine):
    """Kafka in KRaft mode, broker and controller in one process, from the jars of Maven Central."""

    name = "kafka"
    setting = "kafka"
    example = "127.0.0.1:9092"
    ports_needed = 2  # the second one is the controller's
    format_options: tuple[str, ...] = ()

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
        # Paths in it are relative to the folder that the broker runs in: no path needs quoting.
        (self.folder / "server.properties").write_text("\n".join((*self.properties(state), "")))
        if not (self.folder / "data" / "meta.properties").is_file():
            cluster = "A" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]
            tool = [*self._java("-Xmx128m"), "kafka.tools.StorageTool"]
            format_it = [*tool, "format", "-t", cluster, "-c", "server.properties"]
            run_logged([*format_it, *self.format_options], self.log, cwd=self.folder)
        return replace(state, data=str(self.folder / "data"))

    def properties(self, state: State) -> tuple[str, ...]:
        """Return the lines of its configuration."""
        port, controller = state.ports[:2]
        cores = os.cpu_count() or 1
        return (
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
        )

    def _java(self, *options: str) -> list[str]:
        logging_options = [f"-Dlog4j2.configurationFile={self.recipe / 'log4j2.xml'}", "-Dkafka.logs.dir=."]
        return [str(self.programs.java()), *options, *logging_options, "-cp", str(self.libs / "*")]

    def command(self, state: State) -> list[str]:
        """The JVM itself, so that its pid is the broker's."""
        # The serial collector: on a few cores that it shares with everything else, G1 costs the broker half of its time.
        options = (
            f"-Xmx{KAFKA_HEAP_MB}m",
            "-XX:+UseSerialGC",
            "-Djava.awt.headless=true",
            "-XX:+ExitOnOutOfMemoryError",
        )
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
        """All of its configuration is on the command line."""
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
        """What differs from Postgres's defaults is on the command line."""
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
        return database_of(self.address(state), "postgres")

    def finish(self, address: str) -> None:
        """Create the database."""
        create_database(address, "orderstream")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
