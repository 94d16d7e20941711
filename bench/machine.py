"""What a figure depends on: the machine, the versions, the settings, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import asyncpg
import redis

from orderstream.engines.local import LocalEngines
from orderstream.engines.probes import run_async
from orderstream.settings import Settings, project_dir

PACKAGES = (
    "faust-streaming",
    "mode-streaming",
    "aiokafka",
    "asyncpg",
    "redis",
    "orjson",
    "pydantic",
    "uvloop",
    "aiohttp",
)
PEERS = ("dbos", "sqlalchemy", "psycopg")
"""Packages of the extra ``bench``; named where they are installed."""

SETTINGS = (
    "partitions",
    "batch_records_max",
    "batch_interval_s",
    "handoff_outcomes_max",
    "commit_interval_s",
    "postgres_pool_max",
    "payment_provider",
    "payment_success_rate",
    "payment_latency_max_s",
    "payment_in_flight_max",
    "hold_ttl_s",
)
"""The settings that figures depend on; always named.  Of the others, those that differ from their default are."""

_PLACES = {
    *("kafka", "redis_url", "database_url", "local_dir", "app_id", "topic_prefix", "redis_prefix"),
    *("http_host", "http_port", "web_host", "web_port", "payment_token"),
}
"""Where a run takes place: names and addresses of its own, which change nothing (or are private)."""


def machine() -> dict[str, str | int | float]:
    """Return the processor's model, the cores that this process may use, and memory in GiB."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = lines[0] if lines else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model, "cores": cores, "memory_gib": round(memory, 1), "system": platform.platform()}


def versions(engines: LocalEngines) -> dict[str, str]:
    """Return the versions of Python, of the packages that carry the load, and of the engines."""
    found = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    for name in PEERS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    # The client's package has the engine's name.
    found["redis-py"] = found.pop("redis")
    return {**found, **{status.name: status.version for status in engines.status()}}


def settings_shown(settings: Settings) -> dict[str, Any]:
    """Return the settings that matter, by name."""
    values = settings.model_dump(mode="json")
    defaults = Settings.model_construct().model_dump(mode="json")
    changed = [name for name in values if name not in _PLACES and values[name] != defaults.get(name)]
    return {name: values[name] for name in dict.fromkeys((*SETTINGS, *changed))}


def durability(settings: Settings) -> dict[str, str]:
    """Ask the engines what they promise of what they acknowledge."""

    async def ask() -> dict[str, str]:
        connection = await asyncpg.connect(settings.database_url, timeout=10)
        try:
            names = ("fsync", "synchronous_commit", "full_page_writes")
            return {f"postgres {name}": str(await connection.fetchval(f"SHOW {name}")) for name in names}
        finally:
            await connection.close()

    client = redis.Redis.from_url(settings.redis_url, decode_responses=True)
    try:
        found: Any = client.config_get("append*")
    finally:
        client.close()
    kept = {f"redis {name}": str(found[name]) for name in ("appendonly", "appendfsync")}
    return {"kafka acks": "all", **run_async(ask), **kept}


def commit() -> str:
    """Return the commit that is checked out, with ``+changes`` where files differ from it; empty outside of git."""
    commands = (["git", "rev-parse", "--short=12", "HEAD"], ["git", "status", "--porcelain"])
    try:
        head, changed = (
            subprocess.run(command, cwd=project_dir(), capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head}+changes" if changed else head
