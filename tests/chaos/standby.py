"""A standby of a Postgres of the tests: made by ``pg_basebackup``, frozen, promoted."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg

from orderstream.engines.local import LocalEngines
from orderstream.engines.probes import database_of
from orderstream.engines.process import Process, free_port
from orderstream.engines.programs import Programs, User, as_user

START_S = 60.0


class Standby:
    """A Postgres that follows another one; reads may go to it, and writes once it is promoted."""

    def __init__(self, data: Path) -> None:
        self._data, self._user, self._port = data, User.unprivileged(), free_port()
        self._server: subprocess.Popen[bytes] | None = None

    async def follow(self, url: str) -> None:
        """Copy the server at ``url`` to a folder that does not exist yet, and follow it."""
        found = Programs().postgres(None)
        assert found is not None, "the engines' own Postgres runs"
        server = urlsplit(url)
        self._data.mkdir(mode=0o700)
        if self._user is not None:
            os.chown(self._data, self._user.uid, self._user.gid)
        source = ["-h", str(server.hostname), "-p", str(server.port), "-U", str(server.username)]
        copy = [str(found / "pg_basebackup"), *source, "-D", str(self._data), "-R", "-X", "stream", "-c", "fast"]
        await asyncio.to_thread(lambda: subprocess.run(copy, check=True, cwd=self._data, **as_user(self._user)))
        connection = await asyncpg.connect(url)
        options = {
            "port": self._port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "hot_standby": "on",  # what is copied may say otherwise
            "max_connections": await connection.fetchval("SHOW max_connections"),  # a standby needs as many
        }
        await connection.close()
        self._server = subprocess.Popen(  # noqa: ASYNC220
            [found / "postgres", "-D", self._data, *(part for k, v in options.items() for part in ("-c", f"{k}={v}"))],
            cwd=self._data,
            stdout=subprocess.DEVNULL,
            **as_user(self._user),
        )
        async with asyncio.timeout(START_S):
            while not await self._answers(database_of(url, "postgres")):  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def _answers(self, url: str) -> bool:
        try:
            await (await asyncpg.connect(self.url(url))).close()
        except (OSError, asyncpg.PostgresError):
            return False
        return True

    def url(self, url: str) -> str:
        """Return the address here of a database of the server that is followed."""
        parts = urlsplit(url)
        return parts._replace(netloc=f"{parts.username}@127.0.0.1:{self._port}").geturl()

    def beside(self, url: str) -> str:
        """Return the address of a database on either of them: the one that can be written to is meant."""
        parts = urlsplit(url)
        return parts._replace(netloc=f"{parts.username}@127.0.0.1:{self._port},127.0.0.1:{parts.port}").geturl()

    def _signal(self, signum: int) -> None:
        assert self._server is not None
        process = Process.of(self._server.pid)
        assert process is not None
        for member in (process, *process.children()):
            member.send(signum)

    def freeze(self) -> None:
        """Stop: nothing is received any more, and no connection ends."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Continue."""
        self._signal(signal.SIGCONT)

    async def promote(self, url: str) -> None:
        """Make it a primary, on a timeline of its own; ``url`` is of the server that it follows."""
        connection = await asyncpg.connect(self.url(url))
        try:
            assert await connection.fetchval("SELECT pg_promote(wait_seconds => 60)")
        finally:
            await connection.close()

    async def cut_off(self, url: str) -> None:
        """Have it hear nothing more of what the server at ``url`` writes."""
        connection = await asyncpg.connect(self.url(url))
        try:
            await connection.execute("ALTER SYSTEM SET primary_conninfo = 'host=127.0.0.1 port=1'")
            await connection.execute("SELECT pg_reload_conf()")
            async with asyncio.timeout(START_S):
                while await connection.fetchval("SELECT count(*) FROM pg_stat_wal_receiver"):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        finally:
            await connection.close()

    async def fail_over(self, url: str, engines: LocalEngines) -> None:
        """Kill the engines' Postgres, at ``url``, and have its address serve what this one has."""
        await asyncio.to_thread(engines.kill, "postgres")
        await self.promote(url)
        self._end(signal.SIGINT)
        shutil.rmtree(data := data_of(engines, "postgres"))
        self._data.rename(data)
        await asyncio.to_thread(engines.start, "postgres")

    def _end(self, signum: int) -> None:
        if self._server is not None and self._server.poll() is None:
            self.thaw()
            self._server.send_signal(signum)
            self._server.wait(START_S)

    def close(self) -> None:
        """End it, and remove its data, where they have not taken the place of others."""
        self._end(signal.SIGQUIT)
        if self._data.exists():
            shutil.rmtree(self._data)


@asynccontextmanager
async def standby_of(url: str, data: Path) -> AsyncIterator[Standby]:
    """Run a standby of the server at ``url``, with its data in a folder that does not exist yet."""
    standby = Standby(data)
    try:
        await standby.follow(url)
        yield standby
    finally:
        standby.close()


def data_of(engines: LocalEngines, name: str) -> Path:
    """Return where one of the engines keeps its data."""
    return Path(json.loads((engines.local_dir / name / "state.json").read_text())["data"])


@asynccontextmanager
async def synchronous(engines: LocalEngines, url: str, standby: str = "*") -> AsyncIterator[None]:
    """Have each commit of the engines' Postgres wait for a standby of that name.  One that was killed runs again after."""
    await _configure(url, f"ALTER SYSTEM SET synchronous_standby_names = '{standby}'")
    try:
        yield
    finally:
        await asyncio.to_thread(engines.start, "postgres")
        await _configure(url, "ALTER SYSTEM RESET synchronous_standby_names")


async def _configure(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
        await connection.execute("SELECT pg_reload_conf()")
    finally:
        await connection.close()
