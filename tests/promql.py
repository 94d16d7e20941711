"""Which metrics and labels a PromQL expression speaks of: enough to find a query that can't ever answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_WORDS = frozenset(
    """sum max min avg count topk by without rate increase changes deriv time vector histogram_quantile or and unless on
    ignoring group_left bool""".split()  # noqa: SIM905
)


class Selector(NamedTuple):
    """A metric as a query names it, and the label values that it asks for (exact ones)."""

    metric: str
    labels: dict[str, str]


def selectors(expression: str) -> Iterator[Selector]:
    """Yield what an expression selects."""
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)|\boffset\s+\w+", " ", expression)
    for match in re.finditer(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?", re.sub(r"\[[^\]]*\]", "", bare)):
        if match[1] not in _WORDS:
            yield Selector(match[1], dict(re.findall(r'(\w+)="([^"]*)"', match[2] or "")))


def grouped_by(expression: str) -> set[str]:
    """Return the labels by which an expression groups."""
    return {label.strip() for group in re.findall(r"\bby\s*\(([^)]*)\)", expression) for label in group.split(",")} - {
        "le"
    }


def of_dashboard(dashboard: dict[str, Any]) -> list[str]:
    """Return every query of a Grafana dashboard."""
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def of_alerts(rules: dict[str, Any]) -> list[str]:
    """Return every query of a file of rules."""
    return [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def steps_of(docs: str) -> dict[str, set[str]]:
    """Return the steps of each stage that docs/METRICS.md names."""
    rows = re.findall(r"^\| `(\w+)` \| (`\w+`.*) \|$", docs.partition("| stage | steps |")[2], re.MULTILINE)
    return {stage: set(re.findall(r"`(\w+)`", steps)) for stage, steps in rows}
