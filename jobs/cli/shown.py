"""What the command line shows of bytes that strangers wrote, and of what a job found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import orjson

from orderstream.console import say, table, warn

if TYPE_CHECKING:
    from orderstream.jobs.produce import Outcome
    from orderstream.jobs.reconcile.reconcile import Report
    from orderstream.sql.removal import Pruned


SHOWN_CHARS_MAX = 16 * 1024
"""Of bytes that strangers wrote, as text."""

SHOWN_BYTES_MAX = 512
"""Of such bytes that are no text, as numbers."""

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s"{}\[\],:]+')


def printable(text: str, chars_max: int = 10_000) -> str:
    """Return text that a terminal only shows, on one line, cut to a length: what would command it is told in escapes."""
    told = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:chars_max])
    return told + "…" if len(text) > chars_max else told


def form_of(data: bytes) -> str:
    """Return the form that :func:`shown` gives to bytes: ``JSON``, ``text`` or ``no text``."""
    try:
        orjson.loads(data)
        return "JSON"
    except ValueError:
        pass
    try:
        data.decode()
        return "text"
    except ValueError:
        return "no text"


def shown(data: bytes) -> list[str]:
    """Return bytes that strangers wrote as lines for people, within the bounds: JSON indented, text, else a hex dump."""
    form = form_of(data)
    if form == "no text":
        lines = [
            f"{at:08x}  {data[at : at + 16].hex(' '):<47}  "
            + "".join(chr(b) if 32 <= b < 127 else "." for b in data[at : at + 16])
            for at in range(0, min(len(data), SHOWN_BYTES_MAX), 16)
        ]
        return lines if len(data) <= SHOWN_BYTES_MAX else [*lines, f"… {len(data) - SHOWN_BYTES_MAX:,} bytes more"]
    text, whole = "", True
    for piece in _indented(data.decode()) if form == "JSON" else (data.decode(),):
        text += piece[: SHOWN_CHARS_MAX + 1]
        if len(text) > SHOWN_CHARS_MAX:
            text, whole = text[:SHOWN_CHARS_MAX], False
            break
    lines = [printable(line, SHOWN_CHARS_MAX) for line in text.split("\n")]
    return lines if whole else [*lines, f"… {len(data):,} bytes in all"]


def _indented(text: str) -> Iterator[str]:
    """Yield the tokens of well-formed JSON as they were written, a member a line; nothing is dropped, as a reader might."""
    depth, before = 0, ""
    for found in _JSON_TOKEN.finditer(text):
        token = found[0]
        if token in ("}", "]"):
            depth -= 1
        if (token in ("}", "]") and before not in ("{", "[")) or (
            token not in ("}", "]", ":") and before in ("{", "[", ",")
        ):
            yield "\n" + "  " * depth
        yield ": " if token == ":" else token
        if token in ("{", "["):
            depth += 1
        before = token


def show_outcome(outcome: Outcome) -> None:
    """Print what became of orders."""
    for status, number in sorted(outcome.ended.items()):
        say(f"  {number:>8,}  {status}")
    if outcome.open:
        warn(f"  {outcome.open:>8,}  still open when the time was up")
    if outcome.elapsed_s > 0:  # else they had all ended before they were sent now
        p50, p95, p99 = (outcome.percentile(share) for share in (0.50, 0.95, 0.99))
        say(f"  {outcome.rate:,.0f} orders/s; time to the end p50 {p50:.3f} s, p95 {p95:.3f} s, p99 {p99:.3f} s")


def show_pruned(found: Pruned, whys: Mapping[str, str], *, really: bool) -> None:
    """Print which orders went, or would go, and what holds others back."""
    went = "removed" if really else "would be removed"
    say(f"{found.looked:,} orders were taken in before {found.until:%Y-%m-%d %H:%M:%S %Z}")
    say(f"  {found.removed:>8,}  {went}")
    for why, number in found.kept.most_common():
        say(f"  {number:>8,}  stay: they {whys[why]}")
    if found.kept["kafka"] and found.topics.oldest is not None:
        say(f"Kafka's oldest record is of {found.topics.oldest:%Y-%m-%d %H:%M:%S %Z}, in {found.topics.held_by}")
    for number, what in (
        (found.users, "entries of users who have nothing of a limited product any more"),
        (found.letters, "notes about dead letters that are gone from their topic"),
    ):
        if number:
            say(f"  {number:>8,}  {what} {went}")
    if not really and (found.removed or found.users or found.letters):
        say("nothing was changed: --yes does it")


def show_reconciled(report: Report, limit: int) -> None:
    """Print what ``reconcile`` found: the first differences, then what was covered."""
    for note in report.notes:
        warn(f"note: {note}")
    if report.differences:
        rows = [[d.kind, d.subject, _said(d.must), _said(d.found), d.repair] for d in report.differences[:limit]]
        table("", ["difference", "of", "must be", "is", "repair"], rows)
        if len(report.differences) > limit:
            say(f"… and {len(report.differences) - limit:,} more: --limit, or --json for all of them")
    if report.repairs:
        table(
            "", ["repair", "of", "", "what was done"], [[r.kind, r.subject, r.outcome, r.told] for r in report.repairs]
        )
    if report.after is not None and report.after.differences:
        left = [[d.kind, d.subject, _said(d.must), _said(d.found)] for d in report.after.differences[:limit]]
        table("", ["still different", "of", "must be", "is"], left)
    where = "from the checkpoint on" if report.resumed else "from the beginning"
    offsets = [
        [topic, len(parts), sum(end - start for start, end in parts.values()), _span(parts)]
        for topic, parts in report.covered.items()
    ]
    table("", ["topic", "partitions", "offsets", "from…to"], offsets)
    say(
        f"{report.records:,} records read {where} in {report.seconds:.2f} s ({report.records_per_second:,.0f} records/s); "
        f"{report.orders:,} orders and {report.products:,} products compared, {report.open:,} orders are open"
    )
    if report.in_flight:
        flying = ", ".join(f"{number:,} {kind}" for kind, number in sorted(report.in_flight.items()))
        say(f"in flight, hence no drift: {flying}")
    if report.checkpoint is not None:
        say(f"checkpoint: {report.checkpoint}")
    counted = Counter(str(d.kind) for d in report.differences)
    told = ", ".join(f"{number:,} {kind}" for kind, number in counted.items())
    if report.after is not None:
        told += f"; after the repairs {_what_is_left(report.after)}"
    say(f"{len(report.differences):,} DIFFERENCES: {told}" if counted else "everything agrees")


def _what_is_left(after: Report) -> str:
    if after.differences:
        return f"{len(after.differences):,} DIFFER STILL"
    flying = sum(after.in_flight.values())
    return "everything agrees" + (f", {flying:,} in flight: look again in a while" if flying else "")


def _said(value: Any) -> str:
    return ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)


def _span(parts: dict[int, tuple[int, int]]) -> str:
    """Return the offsets of a topic's partitions, each from…to; the empty ones left out, a long list cut."""
    told = [f"{partition}: {start}…{end}" for partition, (start, end) in parts.items() if end > start]
    return "  ".join(told[:8]) + (" …" if len(told) > 8 else "")
