"""What deploy/ holds is well formed; promtool says so too."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from orderstream import metrics
from tests.conftest import find_program
from tests.promql import Selector, grouped_by, of_alerts, of_dashboard, selectors

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "orderstream.json"


@pytest.fixture(scope="module")
def promtool() -> Path:
    """Return where promtool is; installs it on a Debian machine as root."""
    return find_program("promtool", [("prometheus",)])


@pytest.mark.parametrize(
    "arguments", ["check config prometheus.yml local.yml", "check rules alerts.yml", "test rules alerts_test.yml"]
)
def test_promtool_agrees(promtool: Path, arguments: str) -> None:
    ended = subprocess.run([promtool, *arguments.split()], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_query_names_metrics_that_the_code_has() -> None:
    """Their labels and values are asked of a running worker and ingress in tests/e2e/test_metrics.py."""
    documented = {row.split("`")[1] for row in metrics.document().splitlines()[2:]}
    given = {"up", "process_start_time_seconds", "process_cpu_seconds_total", "process_resident_memory_bytes",
             "process_open_fds", "process_max_fds"}  # fmt: skip
    asked = of_dashboard(json.loads(DASHBOARD.read_text())) + of_alerts(
        yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
    )
    assert len(asked) > 60
    for expression in asked:
        found = list(selectors(expression))
        assert found, expression
        for selector in found:
            name = selector.metric
            assert name in documented | given or re.sub("_(bucket|sum|count)$", "", name) in documented, expression


def test_the_parser_of_queries_sees_what_it_has_to() -> None:
    expression = (
        'histogram_quantile(0.5, sum by (le, stage) (rate(a_bucket{x="1", y=~"c.."}[5m])))'
        " > max(b offset 5m or vector(0))"
    )
    assert list(selectors(expression)) == [Selector("a_bucket", {"x": "1"}), Selector("b", {})]
    assert grouped_by(expression) == {"stage"}


def test_every_alert_says_what_it_means() -> None:
    rules = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]
    for rule in rules:
        assert {"summary", "what"} == set(rule["annotations"])
        assert rule["labels"]["severity"] in {"page", "warn"}
    operations = (ROOT / "docs" / "OPERATIONS.md").read_text()
    assert [rule["alert"] for rule in rules if f"`{rule['alert']}`" not in operations] == []


def test_the_dashboard_fits_its_provisioning() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    sources: dict[str, Any] = yaml.safe_load(
        (DEPLOY / "grafana" / "provisioning" / "datasources" / "orderstream.yml").read_text()
    )
    known = {source["uid"] for source in sources["datasources"]}
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} <= known
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    cells = [(x, y) for panel in panels for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
             for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])]  # fmt: skip
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounted = " ".join(compose["grafana"]["volumes"])
    for folder in ("deploy/grafana/provisioning", "deploy/grafana/dashboards"):
        assert f"./{folder}:" in mounted
    for source in sources["datasources"]:
        host = re.match(r"http://(\w+):", source["url"])
        assert host is not None
        assert host[1] in compose
    jobs = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert {name for job in jobs for dns in job["dns_sd_configs"] for name in dns["names"]} <= set(compose)
