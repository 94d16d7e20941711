"""The programs that the engines need: where they are, how they are installed and run."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from orderstream.engines.process import Say, tail
from orderstream.errors import EngineMissing

JAVA_MIN, REDIS_MIN, POSTGRES_MIN = 17, 7, 15  # the oldest major versions that are tried: Kafka 4.1 needs Java 17

INSTALL_TIMEOUT_S = 900.0  # apt-get or Maven, over a slow line


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
    """Return the major version that a program says of itself; 0 when it says none."""
    try:
        shown = subprocess.run(
            [str(program), flag], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0  # not to be run here: as good as not installed
    version = re.search(r"(?:version |v=|\) )\"?(\d+)", shown.stdout + shown.stderr)
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
                **as_user(user),
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
            ["/bin/sh", "-c", 'cd -- "$0"', str(folder)], capture_output=True, check=False, **as_user(self)
        )
        return entered.returncode == 0


def as_user(user: User | None) -> dict[str, Any]:
    """Return the arguments of :class:`subprocess.Popen` that run a program under an account; none for ours."""
    return {"user": user.uid, "group": user.gid, "extra_groups": []} if user else {}
