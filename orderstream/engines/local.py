"""Local engines: a Kafka, a Redis and a Postgres of the project's own, for development and tests.

Everything that they write is under one folder (``settings.local_dir``, normally ``.local/``)::

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

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from orderstream.engines.locks import file_lock
from orderstream.engines.probes import probe_kafka
from orderstream.engines.process import (
    DEATH_TIMEOUT_S,
    LOG_BYTES_MAX,
    POLL_S,
    START_TIMEOUT_S,
    STOP_TIMEOUT_S,
    Process,
    Say,
    free_port,
    mute,
    port_free,
    tail,
    write_json,
)
from orderstream.engines.programs import Programs, as_user
from orderstream.engines.servers import Engine, Kafka, Name, Postgres, Redis, State
from orderstream.errors import EngineMissing, EngineUnavailable
from orderstream.settings import ENGINES_FILE, PREFIX, Settings, load, public

NAMES: tuple[Name, ...] = ("kafka", "redis", "postgres")

ADDRESSES = ("kafka", "redis_url", "database_url")  # the settings that hold their addresses, in the same order

START_TRIES = 3  # each on another port, where another process took the first one in between


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


def given_addresses() -> dict[str, str]:
    """Return the engines that the environment or ``.env`` points to, by setting name.

    Raises:
        SettingsError: a setting is wrong.
    """
    load()  # lists all that is wrong at once
    chosen = Settings()
    return {name: str(getattr(chosen, name)) for name in ADDRESSES if name in chosen.model_fields_set}


@dataclass
class LocalEngines:
    """The engines under one folder.

    Args:
        local_dir: their folder; made when it isn't there.
        kafka_libs: the broker's jars, to share them; ``local_dir/kafka/libs`` when None.
        given: addresses by setting name (see :func:`given_addresses`); those engines are run by others.
        say: gets one line for everything that takes time or that a human should know.
        programs: where the servers' programs are looked for.
        entry: how a Kafka that is run by others is entered; see :func:`orderstream.access.kafka`.
    """

    local_dir: Path
    kafka_libs: Path | None = None
    given: Mapping[str, str] = field(default_factory=dict)
    say: Say = mute
    programs: Programs = field(default_factory=Programs)
    entry: Mapping[str, Any] = field(default_factory=dict)

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
            EngineUnavailable: an engine was started and doesn't answer; with the last lines of its log.
        """
        asked = [self._engines[name] for name in which]
        for engine in asked:
            if engine.setting in self.given:
                variable = PREFIX + engine.setting.upper()
                self.say(f"{engine.name}: not started, {variable} says {_shown(self.given[engine.setting])}")
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
        """Return the state of all engines; asks each that should answer whether it does."""
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
        write_json(engine.folder / "state.json", asdict(state))
        return state

    def _forget_process(self, engine: Engine) -> None:
        if engine.folder.is_dir():
            self._keep(engine, replace(self._state(engine), process=None))

    def _publish(self, engine: Engine) -> str:
        address = engine.address(self._state(engine))
        write_json(self.local_dir / ENGINES_FILE, {**self.addresses(), engine.setting: address})
        return address

    def _withdraw(self, engines: Iterable[Engine]) -> None:
        withdrawn = {engine.setting for engine in engines}
        left = {setting: address for setting, address in self.addresses().items() if setting not in withdrawn}
        if left:
            write_json(self.local_dir / ENGINES_FILE, left)
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
                **as_user(engine.user),
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
        """Wait until the engine answers; where it ended because another process took its port, start it on another one."""
        tries = 1
        while (failure := self._first_answer(engine)) is not None:
            state = self._state(engine)
            address = engine.address(state)
            if state.alive:
                why = f"no answer within {START_TIMEOUT_S:.0f} s"
                raise EngineUnavailable(engine.name, address, why, tail(*engine.logs)) from failure
            self._reap(engine, 0)
            self._forget_process(engine)
            if tries == START_TRIES or all(port_free(port) for port in state.ports):
                raise EngineUnavailable(
                    engine.name, address, "it ended while starting", tail(*engine.logs)
                ) from failure
            tries += 1
            self._launch(engine)
        state = self._state(engine)
        engine.finish(engine.address(state))
        return state

    def _first_answer(self, engine: Engine) -> EngineUnavailable | None:
        """Ask until our process answers; return why it doesn't once it has ended or its time is over."""
        state = self._state(engine)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                engine.probe(engine.probe_address(state))
            except EngineUnavailable as error:
                failure = error
            else:
                if state.alive:
                    return None
                failure = EngineUnavailable(engine.name, engine.address(state), "another server answers there")
            if not state.alive or time.monotonic() > deadline:
                return failure
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
        """Wait for the end of an engine's process, and reap it where it is our child; False when it still runs."""
        process = self._state(engine).process
        ended = process is None or process.wait(timeout_s)
        child = self._started.get(engine.name)
        if child is not None and child.poll() is not None:
            del self._started[engine.name]
        return ended

    def _status(self, engine: Engine) -> EngineStatus:
        if engine.setting in self.given:
            address = self.given[engine.setting]
            row = EngineStatus(engine.name, "elsewhere", _shown(address), detail=PREFIX + engine.setting.upper())
            try:
                version = probe_kafka(address, self.entry) if engine.name == "kafka" else engine.probe(address)
            except EngineUnavailable as error:
                return replace(row, detail=str(error).splitlines()[0])
            return replace(row, version=version)
        state = self._state(engine)
        data = Path(state.data) if state.data else None
        if state.process is None or not state.alive:
            return EngineStatus(engine.name, "stopped", data=data)
        row = EngineStatus(engine.name, "running", engine.address(state), state.process.pid, data)
        try:
            return replace(row, version=engine.probe(engine.probe_address(state)))
        except EngineUnavailable as error:
            return replace(row, state="silent", detail=str(error).splitlines()[0])


def _shown(address: str) -> str:
    return public(address) if "://" in address else address
