"""The guards around local engines, with real processes, real ports and folders of made-up programs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from orderstream.engines.child import Child, ChildFailed, environment
from orderstream.engines.local import EngineStatus, LocalEngines, given_addresses
from orderstream.engines.locks import file_lock
from orderstream.engines.probes import probe_kafka, probe_postgres, probe_redis, run_async
from orderstream.engines.process import PORTS, Process, free_port, port_free, tail
from orderstream.engines.programs import JAVA_MIN, Programs
from orderstream.engines.servers import State
from orderstream.errors import EngineMissing, EngineUnavailable
from orderstream.settings import Settings


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, and is no engine."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def program(folder: Path, name: str, says: str) -> Path:
    """Make a program that says one line."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\necho '{says}'\n")
    file.chmod(0o755)
    return file


def remember(local: LocalEngines, process: Process | None, port: int) -> Path:
    """Write what `up` writes after it has started Redis."""
    folder = local.local_dir / "redis"
    folder.mkdir(parents=True)
    state = folder / "state.json"
    state.write_text(json.dumps(asdict(State(ports=(port,), data=str(folder / "data"), process=process))))
    (local.local_dir / "engines.json").write_text(json.dumps({"redis_url": f"redis://127.0.0.1:{port}/0"}))
    return state


# Processes


def test_a_process_is_known_by_its_birth(sleeper: subprocess.Popen[bytes]) -> None:
    process = Process.of(sleeper.pid)
    assert process is not None
    assert process.alive
    assert process == Process.of(sleeper.pid)
    assert not replace(process, birth="another").alive
    me = Process.of(os.getpid())
    assert me is not None
    assert process in me.children()


def test_a_process_that_waits_to_be_reaped_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert Process.of(child.pid) is None
    assert child.wait() == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a process ends with its first thread")
def test_a_process_whose_first_thread_has_ended_is_alive_while_others_are() -> None:
    script = (
        "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start();"
        "print(flush=True); ctypes.CDLL(None).pthread_exit(None)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    stat = Path(f"/proc/{child.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    process = Process.of(child.pid)
    assert process is not None
    assert process.alive
    process.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not process.alive
    child.stdout.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="where psutil finds the boot is the system's own")
def test_a_birth_is_counted_from_the_boot(sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    before = Process.of(sleeper.pid)
    for moved_s in (-3_600, 1, 3_600):  # the clock is set: psutil gives both moments by it

        def boot_time(moved: float = psutil.boot_time() + moved_s) -> float:
            return moved

        monkeypatch.setattr(psutil, "boot_time", boot_time)
        monkeypatch.setattr("psutil._pslinux.boot_time", boot_time)
        assert Process.of(sleeper.pid) == before
        monkeypatch.undo()


def test_the_children_of_a_pid_that_belongs_to_another_process_by_now_are_not_its_own(
    sleeper: subprocess.Popen[bytes],
) -> None:
    assert Process(os.getpid(), "an earlier birth").children() == []


@pytest.mark.parametrize("end", ["down", "kill", "stop"])
def test_a_pid_that_belongs_to_another_process_by_now_gets_no_signal(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], end: str
) -> None:
    local = LocalEngines(tmp_path)
    state = remember(local, Process(sleeper.pid, "an earlier birth"), free_port())
    assert local.pid("redis") is None
    assert EngineStatus("redis", "stopped", data=tmp_path / "redis" / "data") in local.status()
    if end == "down":
        local.down()
    else:
        getattr(local, end)("redis")
    assert sleeper.poll() is None
    assert json.loads(state.read_text())["process"] is None
    assert (end == "kill") == bool(local.addresses()), "only a crash leaves the address behind"


def test_a_process_that_was_started_is_stopped(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    said: list[str] = []
    local = LocalEngines(tmp_path, say=said.append)
    remember(local, Process.of(sleeper.pid), free_port())
    assert local.pid("redis") == sleeper.pid
    reaper = threading.Thread(target=sleeper.wait)
    reaper.start()
    local.down()
    reaper.join()
    assert sleeper.returncode == -15
    assert said == [f"redis: stopped (pid {sleeper.pid})"]
    assert not (tmp_path / "engines.json").exists()


def test_what_ignores_the_signal_to_stop_is_killed_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orderstream.engines.local.STOP_TIMEOUT_S", 0.2)
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    said: list[str] = []
    local = LocalEngines(tmp_path, say=said.append)
    remember(local, Process.of(child.pid), free_port())
    local.down()
    assert child.wait() == -9
    child.stdout.close()
    assert "killing it" in said[0]


def test_a_process_that_runs_but_does_not_answer_is_silent(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    local = LocalEngines(tmp_path)
    remember(local, Process.of(sleeper.pid), free_port())
    row = next(row for row in local.status() if row.name == "redis")
    assert (row.state, row.pid) == ("silent", sleeper.pid)
    assert "does not answer" in row.detail


# Ports


def test_a_free_port_is_one_that_no_process_has() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert not port_free(server.getsockname()[1])
    port = free_port()
    assert port in PORTS
    assert port_free(port)


def test_ports_are_kept_and_given_up_only_when_another_process_has_them(tmp_path: Path) -> None:
    said: list[str] = []
    local = LocalEngines(tmp_path, say=said.append)
    port = free_port()
    remember(local, None, port)
    redis = local._engines["redis"]
    assert local._with_ports(redis).ports == (port,)
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        (other,) = local._with_ports(redis).ports
    assert other != port
    assert str(port) in said[0]


@pytest.mark.parametrize(
    ("probe", "address"),
    [
        (probe_kafka, "127.0.0.1:{port}"),
        (probe_redis, "redis://127.0.0.1:{port}/0"),
        (probe_postgres, "postgresql://x@127.0.0.1:{port}/x"),
    ],
)
def test_an_engine_that_is_unavailable_is_named_with_its_address(probe: object, address: str) -> None:
    assert callable(probe)
    address = address.format(port=free_port())
    with pytest.raises(EngineUnavailable) as caught:
        probe(address)
    assert caught.value.address == address.replace("x@", ""), "without its user"
    assert caught.value.address in str(caught.value)
    assert "orderstream up" in str(caught.value)


async def test_probes_work_inside_a_running_loop() -> None:
    async def answer() -> int:
        await asyncio.sleep(0)
        return 42

    assert run_async(answer) == 42


# Programs


def test_missing_programs_are_named_in_one_line(tmp_path: Path) -> None:
    nothing = Programs(path=str(tmp_path / "bin"), postgres_home=tmp_path / "postgresql")
    local = LocalEngines(tmp_path / "local", programs=nothing)
    with pytest.raises(EngineMissing) as caught:
        local.up()
    line = str(caught.value)
    assert "\n" not in line
    for word in (
        "kafka",
        "redis",
        "postgres",
        f"openjdk-{JAVA_MIN}-jre-headless",
        "maven",
        "redis-server",
        "postgresql-15",
    ):
        assert word in line
    for variable in ("ORDERSTREAM_KAFKA", "ORDERSTREAM_REDIS_URL", "ORDERSTREAM_DATABASE_URL"):
        assert f"{variable}=" in line
    assert not local.addresses()


def test_only_what_is_asked_for_and_not_given_has_to_be_there(tmp_path: Path) -> None:
    nothing = Programs(path=str(tmp_path / "bin"), postgres_home=tmp_path / "postgresql")
    given = {"kafka": "k:1", "database_url": "postgresql://d/d"}
    with pytest.raises(EngineMissing) as caught:
        LocalEngines(tmp_path / "local", programs=nothing, given=given).up()
    assert "redis-server" in str(caught.value)
    assert "maven" not in str(caught.value)
    assert LocalEngines(tmp_path / "local", programs=nothing, given=given).up(["kafka"]) == {"kafka": "k:1"}


def test_engines_that_are_given_are_shown_without_their_passwords(tmp_path: Path) -> None:
    unused, said = free_port(), list[str]()
    given = {
        "kafka": f"127.0.0.1:{unused}",
        "redis_url": f"redis://:hunter2@127.0.0.1:{unused}/0",
        "database_url": f"postgresql://bob:hunter2@127.0.0.1:{unused}/x?password=hunter2",
    }
    local = LocalEngines(tmp_path / "local", given=given, say=said.append)
    assert local.up() == given
    rows = local.status()
    assert [row.address.partition("://")[2] for row in rows[1:]] == [f"127.0.0.1:{unused}/{name}" for name in "0x"]
    assert "hunter2" not in f"{said} {rows}"


def test_programs_that_are_too_old_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    found = Programs(path=str(folder), postgres_home=tmp_path / "postgresql")
    program(folder, "java", 'openjdk version "11.0.2" 2019-01-15')
    program(folder, "redis-server", "Redis server v=6.0.16 sha=00000000:0")
    program(tmp_path / "postgresql" / "13" / "bin", "initdb", "")
    assert (found.java(), found.redis(), found.postgres()) == (None, None, None)


def test_programs_that_are_new_enough_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    found = Programs(path=str(folder), postgres_home=tmp_path / "postgresql")
    java = program(folder, "java", 'openjdk version "21" 2023-09-19')
    redis = program(folder, "redis-server", "Redis server v=7.0.15 sha=00000000:0")
    for version in ("13", "15", "17"):
        program(tmp_path / "postgresql" / version / "bin", "initdb", "")
    program(folder, "initdb", "initdb (PostgreSQL) 16.4")
    assert (found.java(), found.redis()) == (java, redis)
    assert found.postgres() == tmp_path / "postgresql" / "15" / "bin"
    assert found.postgres(17) == tmp_path / "postgresql" / "17" / "bin"
    assert found.postgres(16) == folder, "one on PATH counts too"
    assert found.postgres(18) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="installs only as root")
def test_missing_packages_are_installed_as_root_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    server = program(tmp_path, "redis-server", "Redis server v=7.0.15 sha=0")
    folder.mkdir()
    # An apt-get that installs redis-server, and an apt-cache that knows no openjdk-17.
    apt_get = program(folder, "apt-get", "")
    apt_get.write_text(
        f'#!/bin/sh\necho "$DEBIAN_FRONTEND $@" >> {calls}\n[ "$1" = update ] || cp {server} {folder}/redis-server\n'
    )
    program(folder, "apt-cache", "").write_text(
        '#!/bin/sh\n[ "$2" != openjdk-17-jre-headless ] && echo "Package: $2"\n'
    )
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    said: list[str] = []
    programs = Programs(path=str(folder), postgres_home=tmp_path / "postgresql")
    with pytest.raises(EngineMissing) as caught:
        LocalEngines(tmp_path / "local", programs=programs, say=said.append).up(["kafka", "redis"])
    update, install = calls.read_text().splitlines()
    assert update == "noninteractive update -q"
    assert install.startswith("noninteractive install -q -y --no-install-recommends")
    assert install.endswith("default-jre-headless maven redis-server")
    assert any("installing with apt-get: default-jre-headless, maven, redis-server" in line for line in said)
    assert "redis" not in str(caught.value).partition(":")[0], "what could be installed is not complained about"


def test_an_engine_that_ends_at_once_shows_its_last_words(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    server = program(folder, "redis-server", "")
    server.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "Redis server v=7.0.0" && exit\necho "no memory for this"\nexit 1\n'
    )
    local = LocalEngines(tmp_path / "local", programs=Programs(path=str(folder)))
    with pytest.raises(EngineUnavailable) as caught:
        local.up(["redis"])
    assert "ended while starting" in str(caught.value)
    assert "no memory for this" in str(caught.value)
    assert local.pid("redis") is None


# Files


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with file_lock(tmp_path / "lock", order.append):
            order.append("second")

    other = threading.Thread(target=second)
    other.start()
    with file_lock(tmp_path / "lock", order.append):
        inside.set()
        while not order:  # until the other one says that it waits
            other.join(0.01)
        order.append("first")
    other.join()
    assert order == [f"waiting for another command that holds {tmp_path / 'lock'}", "first", "second"]


def test_a_lock_that_is_held_for_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orderstream.engines.locks.LOCK_TIMEOUT_S", 0.1)
    lock = tmp_path / "lock"
    with file_lock(lock, print), pytest.raises(EngineUnavailable, match="held for") as caught, file_lock(lock, print):
        pass
    assert caught.value.address == str(lock)


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from orderstream.engines.locks import file_lock\n"
        "with file_lock(Path(sys.argv[1]), print): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    said: list[str] = []
    killer = threading.Timer(0.3, holder.kill)
    killer.start()
    with file_lock(tmp_path / "lock", said.append):
        assert holder.wait() == -signal.SIGKILL
    assert len(said) == 1
    holder.stdout.close()


def test_the_end_of_a_log_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {number}" for number in range(100)))
    shown = tail(log)
    assert "line 99" in shown
    assert "line 1\n" not in shown
    assert "nothing was written" in tail(tmp_path / "no log")


# Our own processes


def test_a_child_gets_the_settings_and_none_of_the_callers_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("orderstream_partitions", "3")
    monkeypatch.setenv("ORDERSTREAM_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("HOME", "/home")
    env = environment(Settings(_env_file=None, app_id="mine", partitions=5))
    assert (env["ORDERSTREAM_APP_ID"], env["ORDERSTREAM_PARTITIONS"], env["HOME"]) == ("mine", "5", "/home")
    assert not {"orderstream_partitions", "ORDERSTREAM_PORT"} & set(env)


def test_a_child_that_ends_shows_its_last_lines(tmp_path: Path) -> None:
    settings, log = Settings(_env_file=None), tmp_path / "logs" / "one.log"
    child = Child("worker", settings, log, program=("-c", "print('no memory for this'); raise SystemExit(3)"))
    with pytest.raises(ChildFailed, match="the worker ended with 3") as caught:
        child.await_ready()
    assert "no memory for this" in str(caught.value)
    assert child.summary() is None
    assert child.stop() == 3


def test_a_child_that_does_not_leave_is_killed_and_that_is_said(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('here', flush=True); time.sleep(600)"
    said: list[str] = []
    child = Child("ingress", Settings(_env_file=None), tmp_path / "log", program=("-c", stubborn), say=said.append)
    while not child.log.read_text():
        time.sleep(0.01)
    with pytest.raises(ChildFailed, match="the ingress is not ready after 0 s"):
        child.await_ready(0.2)
    assert child.stop(0.2) == -signal.SIGKILL
    assert "did not leave" in said[0]


# Addresses


def test_engines_given_by_the_environment_are_not_those_of_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engines.json").write_text(json.dumps({"kafka": "127.0.0.1:1", "redis_url": "redis://127.0.0.1:2/0"}))
    monkeypatch.setenv("ORDERSTREAM_LOCAL_DIR", str(tmp_path))
    assert given_addresses() == {}
    monkeypatch.setenv("ORDERSTREAM_KAFKA", "broker:9092")
    assert given_addresses() == {"kafka": "broker:9092"}
    (tmp_path / ".env").write_text("ORDERSTREAM_DATABASE_URL=postgresql://elsewhere/db\n")
    assert given_addresses() == {"kafka": "broker:9092", "database_url": "postgresql://elsewhere/db"}
