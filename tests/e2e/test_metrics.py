"""What a worker and an ingress export to Prometheus: all that the docs name, and what every query of deploy/ asks for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import redis.asyncio as redis
import yaml
from prometheus_client.parser import text_string_to_metric_families

from orderstream import metrics
from orderstream.engines.process import free_port
from orderstream.jobs.reconcile.reconcile import Reconcile
from orderstream.jobs.reconcile.repair import repair_all
from orderstream.lua.gate import Keys
from orderstream.sql.store import query
from orderstream.streams.dead_letters import REASONS
from tests.harness import Pipeline, ingress
from tests.promql import grouped_by, of_alerts, of_dashboard, selectors, steps_of

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]
ROOT = Path(__file__).resolve().parents[2]
PATH = "/api/v1/orders"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "orderstream.json"
METRICS = ROOT / "docs" / "METRICS.md"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"

COUNTED = (
    "batch_records_count", "dead_letters_total", "http_produce_seconds_count",
    "http_requests_total", "inventory_reservations_failed_total", "lines_held_total", "orders_cancelled_total",
    "orders_confirmed_total", "orders_created_total", "orders_paid_total", "orders_reserved_total", "partitions_owned",
    "order_latency_seconds_count", "payment_attempts_total", "payment_failed_total",
    "payment_processing_latency_seconds_count", "payment_success_total", "rebalances",
    "reconcile_last_run_timestamp_seconds", "reconcile_records",
    "redis_epochs_total", "redis_products_loaded_total", "stage_step_seconds_count", "stock_units",
)  # fmt: skip
"""Samples that can't be 0, or missing, after what the test does."""

NEVER_HERE = {"reconcile_drift", "open_transaction_seconds"}
"""These need a fault: drift, a transaction that stays open."""

Samples = dict[str, list[dict[str, str]]]


async def scrape(
    client: aiohttp.ClientSession, url: str
) -> tuple[dict[str, tuple[str, str]], Samples, dict[str, float]]:
    """Return families with type and help, samples with their labels, and the sum of each sample's values."""
    async with client.get(url) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/plain"
        text = await answer.text()
    families, samples, sums = {}, Samples(), dict[str, float]()
    for family in text_string_to_metric_families(text):
        families[family.name] = (family.type, family.documentation)
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample.labels)
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return families, samples, sums


def documented(role: str = "") -> dict[str, tuple[str, str, set[str]]]:
    """Return type, meaning and labels of every metric that docs/METRICS.md names, or of those of a role."""
    found = {}
    for row in metrics.document().splitlines()[2:]:
        assert row in METRICS.read_text()
        _, name, kind, of, labels, meaning, _ = row.split("|")
        if role in of:
            found[name.strip(" `")] = (kind.strip(), meaning.strip(), set(re.findall(r"`(\w+)`", labels)))
    return found


async def test_every_metric_is_documented_and_every_query_of_deploy_finds_its_metrics(
    pipeline: Make, tmp_path: Path
) -> None:
    shop = pipeline(
        verdict_timeout_s=20.0, payment_success_rate=0.6, payment_latency_min_s=0.001, payment_latency_max_s=0.002
    )
    await shop.start({"1": 1_000, "2": 1_000, "3": 1})
    (worker,) = shop.workers
    async with ingress(shop) as (client, address):

        async def some_orders() -> list[str]:
            placed = []
            for items in ([("1", 1)], [("1", 1), ("2", 2)], [("2", 1)], [("3", 5)], [("nothing", 1)]):
                lines = [{"product_id": product_id, "quantity": units} for product_id, units in items]
                answer = await client.post(PATH, json={"user_id": 1, "items": lines, "payment_method": "mock"})
                placed.append((await answer.json())["order_id"])
            return placed

        ids = [order_id for _ in range(4) for order_id in await some_orders()]
        await shop.produce_raw(b"{")
        await shop.finished(ids)
        async with Reconcile(shop.settings, file=None) as job:
            report = await job.run()
            await job.note(report)
        assert not report.differences
        families, samples, sums = await scrape(client, f"{worker.url}/metrics")
        there, theirs, sums_there = await scrape(client, f"{address}/metrics")

        # The docs name all of it, and nothing else, of each what it counts.
        foreign = ("python_", "process_")
        for role, side in (("worker", families), ("ingress", there)):
            ours = {name: about for name, about in side.items() if not name.startswith(foreign)}
            named = {name.removesuffix("_total"): about for name, about in documented(role).items()}
            assert {name: about[:2] for name, about in named.items()} == ours
        assert {one["reason"] for one in samples["dead_letters_total"]} == set(REASONS)
        for found in (samples, theirs):
            for name, labelled in found.items():
                base = re.sub(r"_(bucket|sum|count|created)$", "", name)
                labels = next(
                    (about[2] for n, about in documented().items() if n in (name, base, f"{base}_total")), None
                )
                if labels is not None:
                    assert all(set(one) - {"le"} == labels for one in labelled), name
        assert [name for name in COUNTED if not sums.get(name, 0.0) + sums_there.get(name, 0.0)] == []
        assert {one["topic"] for one in samples["consumer_lag_records"]} >= {"orders"}
        assert sums["lines_held_total"] == 16
        assert sums["orders_created_total"] == len(ids)
        taken = {(one["stage"], one["step"]) for one in samples["stage_step_seconds_count"]}
        assert taken <= {(stage, step) for stage, steps in steps_of(METRICS.read_text()).items() for step in steps}
        assert {stage for stage, _ in taken} == {"reserve", "pay", "commit"}
        assert sums["payment_success_total"] + sums["payment_failed_total"] == sums["orders_reserved_total"] == 12

        # Every query asks for a metric, labels and values that one of the two has.
        known: Samples = {"up": [{"job": "worker"}, {"job": "ingress"}]}
        for found in (samples, theirs):
            for name, labelled in found.items():
                known.setdefault(name, []).extend({**one, "instance": "", "job": ""} for one in labelled)
        asked = of_dashboard(json.loads(DASHBOARD.read_text())) + of_alerts(yaml.safe_load(ALERTS.read_text()))
        for expression in asked:
            by = grouped_by(expression)
            for selector in selectors(expression):
                if selector.metric in NEVER_HERE and selector.metric not in known:
                    continue
                rows = known.get(selector.metric)
                assert rows, f"{selector.metric} has no sample: {expression}"
                assert any(selector.labels.items() <= one.items() for one in rows), expression
                assert all(by <= {*one, "job", "instance"} for one in rows), expression

        # Drift, repaired by the same run: found, and nothing left.
        store = await shop.store()
        keys = Keys(shop.settings.redis_prefix)
        client_of_redis: redis.Redis = redis.Redis.from_url(shop.settings.redis_url)
        await client_of_redis.hincrby(keys.stock("1"), "on_hand", 5)
        await client_of_redis.aclose()
        for repairing, left in ((False, {"redis.counts": 1}), (True, {})):
            async with Reconcile(shop.settings, file=None, settle_s=0.5) as job:
                report = await job.run()
                if repairing:
                    report.repairs = await repair_all(job, report.differences)
                    async with Reconcile(shop.settings, file=None, settle_s=0.5) as again:
                        report.after = await again.run()
                await job.note(report)
            row = await store.pool.fetchrow(query("last_reconcile"))
            assert (json.loads(row["drift"]), json.loads(row["unrepaired"])) == ({"redis.counts": 1}, left)

        if shutil.which("prometheus") is not None:
            await ask_prometheus(tmp_path, worker.url, address, some_orders)


async def ask_prometheus(folder: Path, worker: str, ingress_: str, some_orders: Callable[[], Any]) -> None:
    """Have a real Prometheus scrape both, and ask it every query."""
    config = yaml.safe_load((ALERTS.parent / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    for job, url in zip(config["scrape_configs"], (worker, ingress_), strict=True):
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(ALERTS, folder / "alerts.yml")
    port = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
               f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(folder / "prometheus.log").open("wb"))  # noqa: ASYNC220

    def ask(path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["data"]

    def silent() -> list[str]:
        """Return the queries without an answer; those about faults that are not there have none."""
        found = []
        for expression in of_dashboard(json.loads(DASHBOARD.read_text())):
            if not any(selector.metric in NEVER_HERE for selector in selectors(expression)):
                answer = ask("query", query=expression.replace("$__rate_interval", "20s"))
                found += [] if answer["result"] else [expression]
        return found

    try:
        deadline = time.monotonic() + 60
        unanswered = ["it has not started"]
        while unanswered:
            assert time.monotonic() < deadline, (unanswered, (folder / "prometheus.log").read_text()[-2000:])
            await some_orders()
            with contextlib.suppress(OSError):
                unanswered = await asyncio.to_thread(silent)
        rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
        assert len(rules) == len(of_alerts(yaml.safe_load(ALERTS.read_text())))
        assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}
    finally:
        process.terminate()
        process.wait()
