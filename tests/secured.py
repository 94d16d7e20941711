"""Engines that ask who comes, for the tests: certificates, a Kafka, Redis with Sentinel, PgBouncer, a server of tokens."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from orderstream.engines.local import LocalEngines
from orderstream.engines.process import free_port, tail
from orderstream.engines.programs import User, as_user
from orderstream.engines.servers import Kafka, State

USER = "shop"
KAFKA_PASSWORD, REDIS_PASSWORD, SENTINEL_PASSWORD = "k4fka-s3cret", "r3dis-s3cret:/@?#%", "s3ntinel-s3cret+&"
POSTGRES_PASSWORD = "p0stgres-s3cret @:/?#[]%25&+='\"\\é"
KEY_PASSWORD = "k3y-s3cret"
SIGN = "s3cret"
"""Stands in each of them, however it is quoted: no log and no message may show it."""

UP_S = 30.0


class Certificates:
    """An authority with a certificate for this machine and one for a client, and another authority; made by openssl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca, self.other_ca = self._authority("ca"), self._authority("other-ca")
        self.server, self.server_key = self._signed("server", "localhost")
        self.client, self.client_key = self._signed("client", USER, "-passout", f"pass:{KEY_PASSWORD}")
        self.keystore = folder / "server-with-key.pem"
        self.keystore.write_text(self.server_key.read_text() + self.server.read_text())
        for file in (self.server_key, self.keystore):
            file.chmod(0o644)  # for servers that run under an account of their own; a key of a test

    def _authority(self, name: str) -> Path:
        return self._made(name, name, "-nodes")[0]

    def _signed(self, name: str, subject: str, *options: str) -> tuple[Path, Path]:
        by = ("-CA", str(self.ca), "-CAkey", str(self.ca.with_suffix(".key")))
        names = ("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
        leaf = ("-addext", "basicConstraints=critical,CA:FALSE")
        return self._made(name, subject, *by, *names, *leaf, *(options or ("-nodes",)))

    def _made(self, name: str, subject: str, *options: str) -> tuple[Path, Path]:
        file, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        kind = ("-x509", "-days", "2", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
        where = ("-keyout", str(key), "-out", str(file))
        subprocess.run(
            ["openssl", "req", *kind, "-subj", f"/CN={subject}", *where, *options], check=True, capture_output=True
        )
        return file, key


class SecuredKafka(Kafka):
    """A broker with two more listeners: SASL_SSL with every mechanism, and SSL that asks for a certificate."""

    ports_needed = 4
    certificates: Certificates
    format_options = tuple(
        part
        for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
        for part in ("--add-scram", f"{mechanism}=[name={USER},password={KAFKA_PASSWORD}]")
    )

    def properties(self, state: State) -> tuple[str, ...]:
        """Add to the lines of the others; the last one of a name counts."""
        plain, controller, sasl, mutual = state.ports
        modules = "org.apache.kafka.common.security"
        by = "listener.name.sasl"
        scram = f"{modules}.scram.ScramLoginModule required;"
        listeners = f"PLAINTEXT://127.0.0.1:{plain},SASL://127.0.0.1:{sasl},MUTUAL://127.0.0.1:{mutual}"
        return (
            *super().properties(state),
            f"listeners={listeners},CONTROLLER://127.0.0.1:{controller}",
            f"advertised.listeners={listeners.replace('127.0.0.1', 'localhost')}",
            "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL:SASL_SSL,MUTUAL:SSL",
            "ssl.keystore.type=PEM",
            f"ssl.keystore.location={self.certificates.keystore}",
            "ssl.truststore.type=PEM",
            f"ssl.truststore.location={self.certificates.ca}",
            "listener.name.mutual.ssl.client.auth=required",
            "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
            f'{by}.plain.sasl.jaas.config={modules}.plain.PlainLoginModule required user_{USER}="{KAFKA_PASSWORD}";',
            f"{by}.scram-sha-256.sasl.jaas.config={scram}",
            f"{by}.scram-sha-512.sasl.jaas.config={scram}",
            f"{by}.oauthbearer.sasl.jaas.config={modules}.oauthbearer.OAuthBearerLoginModule required;",
        )


class SecuredEngines(LocalEngines):
    """Local engines whose Kafka is a :class:`SecuredKafka`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.kafka_libs is not None
        self._kafka = SecuredKafka(self.local_dir / "kafka", self.programs, self.kafka_libs)
        self._engines["kafka"] = self._kafka

    def up_with(self, certificates: Certificates) -> None:
        """Start Kafka."""
        SecuredKafka.certificates = certificates
        self.up(["kafka"])

    @property
    def sasl(self) -> str:
        """Where it asks for a password or a token."""
        return f"localhost:{self._state(self._kafka).ports[2]}"

    @property
    def mutual(self) -> str:
        """Where it asks for a certificate."""
        return f"localhost:{self._state(self._kafka).ports[3]}"


class Server:
    """A server of one test, in the foreground, with its output in a file."""

    def __init__(self, name: str, command: Sequence[str | Path], folder: Path, user: User | None = None) -> None:
        self.log = folder / f"{name}.out.log"
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, **as_user(user))

    def await_answer(self, ask: Callable[[], object], faults: tuple[type[Exception], ...]) -> None:
        """Wait until a question is answered."""
        deadline = time.monotonic() + UP_S
        while True:
            try:
                ask()
                return
            except faults:
                assert self.process.poll() is None, tail(self.log)
                assert time.monotonic() < deadline, tail(self.log)
                time.sleep(0.05)

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait()


@contextmanager
def ended(servers: list[Server]) -> Iterator[list[Server]]:
    """Kill these servers at the end, also those that join the list meanwhile."""
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()


def redis_command(program: Path, port: int, certificates: Certificates, *options: str) -> list[str | Path]:
    """Return the command of a Redis that listens by TLS only, with a password for whoever has no name."""
    tls = {
        "port": "0",
        "tls-port": str(port),
        "bind": "127.0.0.1",
        "tls-cert-file": str(certificates.server),
        "tls-key-file": str(certificates.server_key),
        "tls-ca-cert-file": str(certificates.ca),
        "tls-auth-clients": "no",
        "tls-replication": "yes",
    }
    return [program, *(part for name, value in tls.items() for part in (f"--{name}", value)), *options]


def sentinel_file(folder: Path, primary: int) -> Path:
    """Write the file of a sentinel, which it keeps up itself; return it."""
    file = folder / f"sentinel-{free_port()}.conf"
    lines = (
        f"sentinel monitor {USER} 127.0.0.1 {primary} 2",
        f"sentinel down-after-milliseconds {USER} 1000",
        f"sentinel failover-timeout {USER} 3000",
        f"sentinel auth-pass {USER} {REDIS_PASSWORD}",
    )
    file.write_text("\n".join((*lines, "")))
    return file


@contextmanager
def pgbouncer(program: Path, folder: Path, postgres: int, certificates: Certificates, mode: str) -> Iterator[int]:
    """Run a PgBouncer before the Postgres at this port; give its port.  Each transaction gets another connection."""
    user = User.unprivileged()
    folder.mkdir()
    port = free_port()
    quoted = POSTGRES_PASSWORD.replace('"', '""')
    (folder / "users.txt").write_text(f'"{USER}" "{quoted}"\n', encoding="utf-8")
    for file in (certificates.server, certificates.server_key):
        (folder / file.name).write_bytes(file.read_bytes())
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "scram-sha-256",
        "auth_file": "users.txt",
        "pool_mode": mode,
        "default_pool_size": 30,
        "server_round_robin": 1,
        "client_tls_sslmode": "require",
        "client_tls_cert_file": "server.pem",
        "client_tls_key_file": "server.key",
    }
    lines = ("[databases]", f"* = host=127.0.0.1 port={postgres}", "[pgbouncer]")
    text = "\n".join((*lines, *(f"{name} = {value}" for name, value in settings.items()), ""))
    (folder / "pgbouncer.ini").write_text(text)
    if user is not None:
        for path in (folder, *folder.iterdir()):
            os.chown(path, user.uid, user.gid)
    try:
        with ended([Server("pgbouncer", [program, "pgbouncer.ini"], folder, user)]) as (server,):
            server.await_answer(lambda: _connects(port), (OSError,))
            yield port
    finally:
        shutil.rmtree(folder)


def _connects(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), 1).close()


@asynccontextmanager
async def token_server() -> AsyncIterator[str]:
    """Run a server that gives out tokens without a signature, as Kafka takes them unless told otherwise; give its URL."""

    async def token(request: web.Request) -> web.Response:
        form = await request.post()
        entry = base64.b64encode(f"{USER}:{KAFKA_PASSWORD}".encode()).decode()
        if request.headers.get("Authorization") != f"Basic {entry}" or form["grant_type"] != "client_credentials":
            return web.json_response({"error": "invalid_client"}, status=401)
        return web.json_response({"access_token": unsigned_token(), "expires_in": 3600, "token_type": "Bearer"})

    app = web.Application()
    app.router.add_post("/token", token)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}/token"
    finally:
        await runner.cleanup()


def unsigned_token() -> str:
    """Return a token without a signature."""

    def part(content: Mapping[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")

    now = int(time.time())
    return f"{part({'alg': 'none'})}.{part({'sub': USER, 'iat': now, 'exp': now + 3600})}."
