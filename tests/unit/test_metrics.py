"""docs/METRICS.md names every metric, and what it says is true."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from prometheus_client import REGISTRY

from orderstream import metrics
from orderstream.agents.till import HELD
from orderstream.http.stats.fleet import STAGE_TOPICS
from tests.promql import steps_of

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "METRICS.md"


def test_the_table_in_the_docs_is_the_one_of_the_code() -> None:
    between = re.search(r"<!-- begin: [^>]* -->\n(.*)\n<!-- end -->", DOCS.read_text(), re.DOTALL)
    assert between is not None
    assert between[1] == metrics.document(), "put what orderstream.metrics.document() says into docs/METRICS.md"


def test_every_step_of_every_stage_is_named() -> None:
    """The docs name the steps that the stages mark; tests/e2e/test_metrics.py compares which stage takes which."""
    code = "".join(file.read_text() for file in (ROOT / "agents").glob("*.py"))
    emitted = {"letters", "sent_on"}
    assert all(f'"{step}")' in (ROOT / "agents" / "stage.py").read_text() for step in emitted)
    marked = set(re.findall(r'steps\.done\("(\w+)"\)', code)) | emitted
    assert set().union(*steps_of(DOCS.read_text()).values()) == marked


def test_series_with_few_labels_are_there_from_the_start() -> None:
    code = (
        "from orderstream import metrics; from orderstream.http.exporter import begin; begin('worker')\n"
        "print(metrics.exported('worker').decode())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for cause in HELD:
        assert f'payments_held{{why="{cause}"}} 0.0' in said
    for spec in STAGE_TOPICS:
        assert f'records_lost_total{{topic="{spec.name}"}} 0.0' in said


def test_steps_add_up_to_the_batch() -> None:
    start = time.perf_counter()
    steps = metrics.Steps("a-test")
    steps.marks = []
    for step in ("one", "two", "one"):
        time.sleep(0.002)
        steps.done(step)
    took = time.perf_counter() - start

    def sample(name: str, step: str) -> float:
        return REGISTRY.get_sample_value(f"stage_step_seconds_{name}", {"stage": "a-test", "step": step}) or 0.0

    assert (sample("count", "one"), sample("count", "two")) == (2, 1)
    total = sample("sum", "one") + sample("sum", "two")
    assert 0.006 <= total <= took
    assert [step for step, _ in steps.marks] == ["one", "two", "one"]
    assert [at for _, at in steps.marks] == sorted(at for _, at in steps.marks)
