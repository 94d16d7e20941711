"""A standby of a Postgres of the tests: made by ``pg_basebackup``, frozen, promoted."""

from __future__ import annotations

import asyncio
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

    def __init__(self, data: Path, user: User | None) -> None:
        self._data, self._user, self._port = data, user, free_port()
        self._server: subprocess.Popen[bytes] | None = None

    @classmethod
    async def of(cls, url: str, data: Path) -> Standby:
        """Copy the server at ``url`` to a folder that does not exist yet, and follow it."""
        user, found = User.unprivileged(), Programs().postgres(None)
        assert found is not None, "the engines' own Postgres runs"
        standby, server = cls(data, user), urlsplit(url)
        data.mkdir(mode=0o700)
        if user is not None:
            os.chown(data, user.uid, user.gid)
        source = ["-h", str(server.hostname), "-p", str(server.port), "-U", str(server.username)]
        copy = [str(found / "pg_basebackup"), *source, "-D", str(data), "-R", "-X", "stream", "-c", "fast"]
        await asyncio.to_thread(lambda: subprocess.run(copy, check=True, cwd=data, **as_user(user)))
        connection = await asyncpg.connect(url)
        options = {
            "port": standby._port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "hot_standby": "on",  # what is copied may say otherwise
            "max_connections": await connection.fetchval("SHOW max_connections"),  # a standby needs as many
        }
        await connection.close()
        standby._server = subprocess.Popen(  # noqa: ASYNC220
            [found / "postgres", "-D", data, *(part for k, v in options.items() for part in ("-c", f"{k}={v}"))],
            cwd=data,
            stdout=subprocess.DEVNULL,
            **as_user(user),
        )
        try:
            async with asyncio.timeout(START_S):
                while not await standby._answers(database_of(url, "postgres")):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        except BaseException:
            standby.close()
            raise
        return standby

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
        """Make it a primary, on a timeline of its own."""
        connection = await asyncpg.connect(self.url(url))
        try:
            assert await connection.fetchval("SELECT pg_promote(wait_seconds => 60)")
        finally:
            await connection.close()

    def close(self) -> None:
        """End it, and remove its data."""
        if self._server is not None and self._server.poll() is None:
            self.thaw()
            self._server.send_signal(signal.SIGQUIT)
            self._server.wait(START_S)
        shutil.rmtree(self._data)


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
