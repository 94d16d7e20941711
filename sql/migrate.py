"""Migrations: numbered SQL files, each applied once, in a transaction, and recorded."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files

import asyncpg

from orderstream.errors import OrderstreamError

LOCK_ID = 0x6F72646572  # "order": any fixed number, so that two runs wait for each other

_LEDGER = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    name       text PRIMARY KEY,
    sha256     text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""


def migrations() -> list[tuple[str, str]]:
    """Return ``(name, text)`` of every migration, in order."""
    folder = files("orderstream") / "sql" / "migrations"
    found = sorted(
        (file.name, file.read_text()) for file in folder.iterdir() if re.match(r"\d{4}_\w+\.sql$", file.name)
    )
    return found


async def migrate(url: str) -> list[str]:
    """Bring the database at ``url`` up to date; return the names of the migrations that were applied now.

    Raises:
        OrderstreamError: the database has a migration that this version does not know, or knows with another text.
    """
    connection = await asyncpg.connect(url, timeout=30)
    applied = []
    try:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK_ID)
            await connection.execute(_LEDGER)
            done = {row["name"]: row["sha256"] for row in await connection.fetch("SELECT * FROM schema_migrations")}
            known = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in migrations()}
            for name, sha in done.items():
                if name not in known:
                    raise OrderstreamError(
                        f"the database has migration {name}, which this version does not know: update"
                    )
                if known[name] != sha:
                    raise OrderstreamError(f"migration {name} was changed after it was applied: add a new one instead")
            for name, text in migrations():
                if name not in done:
                    await connection.execute(text)
                    await connection.execute(
                        "INSERT INTO schema_migrations (name, sha256) VALUES ($1, $2)", name, known[name]
                    )
                    applied.append(name)
    finally:
        await connection.close()
    return applied
