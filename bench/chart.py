"""Charts for the docs: bars with their spread, as SVG written by hand.

A plotting library would bring a dozen packages and 30 MB for rectangles, and other bytes with each of its versions.  This is
forty lines, the same bytes for the same figures, and follows the reader's light or dark theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from orderstream.bench.measure import Summary

WIDTH, LABEL_WIDTH, VALUE_WIDTH, ROW, MARGIN = 760, 250, 110, 30, 16

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 15px } .small { font-size: 11px; fill: #57606a } .value { font-weight: 600 }
.bar { fill: #2f81f7 } .spread { stroke: #24292f; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .bar { fill: #388bfd } .spread { stroke: #e6edf3 }
}
"""


class Bar(NamedTuple):
    """One bar: as long as the median, with a line from the least to the greatest value."""

    label: str
    summary: Summary


def shown(value: float) -> str:
    """Return a number for people: digits as far as they mean something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}"


def svg(title: str, unit: str, bars: Sequence[Bar], captions: Sequence[str]) -> str:
    """Return a chart; its axis begins at 0."""
    top = max((bar.summary.max for bar in bars), default=0.0) or 1.0
    scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH - 2 * MARGIN) / top
    left, first = MARGIN + LABEL_WIDTH, MARGIN + 44
    height = first + ROW * len(bars) + 18 * len(captions) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text class="title" x="{MARGIN}" y="{MARGIN + 12}">{escape(title)}</text>',
        f'<text class="small" x="{MARGIN}" y="{MARGIN + 30}">{escape(unit)}; median, line: least to greatest</text>',
    ]
    for n, (label, summary) in enumerate(bars):
        y = first + ROW * n
        middle, right = y + ROW // 2 - 2, left + summary.max * scale
        parts += [
            f'<text x="{left - 10}" y="{middle + 5}" text-anchor="end">{escape(label)}</text>',
            f'<rect class="bar" x="{left}" y="{y + 3}" width="{summary.median * scale:.1f}" height="{ROW - 10}" rx="2"/>',
            f'<line class="spread" x1="{left + summary.min * scale:.1f}" x2="{right:.1f}" y1="{middle}" y2="{middle}"/>',
            f'<text class="value" x="{right + 8:.1f}" y="{middle + 5}">{shown(summary.median)}</text>',
        ]
    for n, caption in enumerate(captions):
        y = first + ROW * len(bars) + 18 * (n + 1)
        parts.append(f'<text class="small" x="{MARGIN}" y="{y}">{escape(caption)}</text>')
    return "\n".join([*parts, "</svg>", ""])
