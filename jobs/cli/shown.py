"""What the command line shows: bytes that others wrote, orders, stock, dead letters, and what a job found.

Everything that prints more than a line has its ``show_...`` here; the commands only decide what is shown.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from orderstream.console import say, table, warn

if TYPE_CHECKING:
    from pathlib import Path

    from orderstream.jobs.invoices import Fault, Reading
    from orderstream.jobs.letters import Listing
    from orderstream.jobs.letters import Outcome as LetterOutcome
    from orderstream.jobs.produce import Outcome
    from orderstream.jobs.reconcile.reconcile import Report
    from orderstream.jobs.verify import Verdicts
    from orderstream.sql.letters import Handling
    from orderstream.sql.removal import Pruned
    from orderstream.streams.letters import Letter


SHOWN_CHARS_MAX = 16 * 1024
"""Of bytes that others wrote, as text."""

SHOWN_BYTES_MAX = 512
"""Of such bytes that are no text, as numbers."""

FAULTS_SHOWN_MAX = 50
"""Faults of a file shown one by one."""

LETTERS_SHOWN_MAX = 50
"""Letters shown one by one, of many; headers of one letter, too."""

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s"{}\[\],:]+')


def printable(text: str, chars_max: int = 10_000) -> str:
    """Return text that a terminal only shows, on one line, cut to a length; what would command it is escaped."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:chars_max])
    return safe + "…" if len(text) > chars_max else safe


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
    """Return bytes that others wrote as lines for people, within the bounds: JSON indented, text, else a hex dump."""
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


# Orders and stock


def show_faults(file: Path | None, faults: Sequence[Fault]) -> None:
    """Print the places of a file that can't be read, or count for nothing."""
    for fault in faults[:FAULTS_SHOWN_MAX]:
        warn(f"{file}: line {fault.line}, {fault.column}: {printable(fault.why)}")


def show_reading(reading: Reading, orders: int) -> None:
    """Print what was read of a file of orders, and what not; so many orders of it were sent."""
    file = reading.file
    for note in reading.notes:
        warn(f"{file}: {note}")
    say(f"{file}: {orders} orders with {reading.lines} lines sent")
    for kind, number in reading.skipped.items():
        say(f"  skipped: {number} {kind}")
    show_faults(file, reading.faults)
    if reading.faults:
        warn(f"{file}: {len(reading.faults)} faults; what they concern was left out")
    if left := reading.left_out:
        more = ", …" if len(left) > FAULTS_SHOWN_MAX else ""
        warn(f"{file}: {len(left)} invoices left out whole: {printable(', '.join(left[:FAULTS_SHOWN_MAX]))}{more}")


def show_orders(orders: Sequence[Mapping[str, Any]]) -> None:
    """Print orders, a line each."""
    names = ("order_id", "status", "reason", "user_id", "total_cents", "idempotency_key")
    rows = [
        [f"{order['created_at']:%Y-%m-%d %H:%M:%S}", *("" if order[name] is None else order[name] for name in names)]
        for order in orders
    ]
    table("", ["created at (UTC)", *(name.replace("_", " ") for name in names)], rows)


def show_order(order: Mapping[str, Any]) -> None:
    """Print an order: what is known of it, when it reached each status, its lines."""
    facts = ("order_id", "status", "reason", "user_id", "payment_method", "total_cents", "payment_status", "charge_id")
    for name in facts:
        if order[name] is not None:
            say(f"{name:>16}  {order[name]}")
    for name in (
        "placed_at",
        "created_at",
        "reserved_at",
        "paid_at",
        "confirmed_at",
        "cancelled_at",
        "refunded_at",
        "refused_at",
        "retried_at",
        "closed_at",
    ):
        if order[name] is not None:
            say(f"{name:>16}  {order[name].isoformat()}")
    if order["closed_why"] is not None:
        say(f"{'closed_why':>16}  {printable(order['closed_why'])}")
    rows = [
        [line["product_id"], line["quantity"], line["unit_price_cents"] or "", line["state"], line["reason"] or ""]
        for line in order["lines"]
    ]
    table("", ["product", "units", "price (cents)", "state", "reason"], rows)


def show_products(products: Sequence[Mapping[str, Any]]) -> None:
    """Print the counts of products."""
    names = ("product_id", "name", "price_cents", "available", "reserved", "sold", "initial", "received", "adjusted")
    rows = [[*(product[name] for name in names), "yes" if product["retired"] else "no"] for product in products]
    table("", [*(name.replace("_", " ") for name in names), "retired"], rows, right=2)


def show_outcome(outcome: Outcome) -> None:
    """Print what became of orders."""
    for status, number in sorted(outcome.ended.items()):
        say(f"  {number:>8,}  {status}")
    if outcome.reused:
        warn(f"  {len(outcome.reused):>8,}  REFUSED order_id_reused")
    if outcome.open:
        warn(f"  {outcome.open:>8,}  still open when the time was up")
    if outcome.elapsed_s > 0:  # else they had all ended before they were sent now
        p50, p95, p99 = (outcome.percentile(share) for share in (0.50, 0.95, 0.99))
        say(f"  {outcome.rate:,.0f} orders/s; time to the end p50 {p50:.3f} s, p95 {p95:.3f} s, p99 {p99:.3f} s")


def refusal_as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an order whose money the provider has refused to give back as JSON: cents, times in UTC."""
    return {name: value.isoformat() if hasattr(value, "isoformat") else value for name, value in row.items()}


def show_refusals(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the orders whose money the provider has refused to give back."""
    if not rows:
        say("no money is refused")
        return
    shown_rows = [
        [
            row["order_id"],
            f"{row['refused_at']:%Y-%m-%d %H:%M:%S}",
            "void" if row["paid_at"] is None else "refund",
            "" if row["total_cents"] is None else f"{row['total_cents']:,}",
            printable(row["charge_id"] or "not known", 60),
            row["payment"] if row["closed_at"] is None else f"closed: {printable(row['why'], 60)}",
        ]
        for row in rows
    ]
    table("", ["order", "refused (UTC)", "asked", "cents", "charge", "state"], shown_rows, right=3)


# Dead letters


def text_of(data: bytes | None) -> str | None:
    """Return bytes as text, or as ``0x`` and hexadecimal digits where they are none."""
    if data is None:
        return None
    try:
        return data.decode()
    except ValueError:
        return "0x" + data.hex()


def letter_as_json(letter: Letter, handling: Handling) -> dict[str, Any]:
    """Return a letter without its headers and value, and what was done about it, as JSON."""
    source = letter.source
    return {
        "id": str(letter.id),
        "at": letter.at.isoformat(),
        "reason": letter.reason,
        "detail": letter.detail,
        "source": source and {**source._asdict(), "timestamp": letter.timestamp},
        "size": letter.size,
        "key": text_of(letter.key),
        "retry_of": letter.retry_of,
        "cut_from": letter.cut_from,
        "state": handling.state,
        "why": handling.why,
        "begun_at": handling.begun_at and handling.begun_at.isoformat(),
        "done_at": handling.done_at and handling.done_at.isoformat(),
    }


def whole_letter_as_json(letter: Letter, handling: Handling) -> dict[str, Any]:
    """Return all of a letter as JSON: ``value`` is text or null, ``value_hex`` takes its place where it is no text."""
    value = letter.value
    text = value is None or form_of(value) != "no text"
    return {
        **letter_as_json(letter, handling),
        "headers": [[name, text_of(data)] for name, data in letter.headers],
        **({"value": text_of(value)} if text else {"value_hex": (value or b"").hex()}),
    }


def show_json(body: Any) -> None:
    """Print JSON in which nothing commands a terminal: DEL is escaped as well."""
    say(json.dumps(body, indent=2).replace("\x7f", "\\u007f"))


def show_letters(found: Listing, nothing: str) -> None:
    """Print a list of letters and how many there are, or ``nothing``."""
    total = found.states.total()
    if not total:
        say(nothing)
        return
    rows = [
        [
            letter.id,
            f"{letter.at:%Y-%m-%d %H:%M:%S}",
            printable(letter.reason, 40),
            printable(str(letter.source or ""), 80),
            "" if letter.key is None else printable(text_of(letter.key) or "", 40),
            handling.state,
            f"{letter.size:,}",
        ]
        for letter, handling in found.letters
    ]
    table("", ["id", "when (UTC)", "reason", "source", "key", "state", "bytes"], rows, right=6)
    if len(rows) < total:
        say(f"the newest {len(rows):,} of {total:,}; --limit shows more")
    states = ", ".join(f"{number:,} {state}" for state, number in sorted(found.states.items()))
    say(f"{states}: " + ", ".join(f"{printable(name, 40)} {n:,}" for name, n in found.reasons.most_common()))


def show_letter(letter: Letter, handling: Handling) -> None:
    """Print all of a letter, and the value that was sent instead of its own."""
    facts = [
        ("letter", str(letter.id)),
        ("state", str(handling)),
        ("when", letter.at.isoformat(sep=" ", timespec="milliseconds")),
        ("reason", letter.reason),
        ("detail", letter.detail),
        ("source", str(letter.source or "not known")),
        ("retry of", letter.retry_of),
        ("cut from", None if letter.cut_from is None else f"{letter.cut_from:,} bytes: only a part of it is here"),
        *(("header", f"{name}: {text_of(data)}") for name, data in letter.headers[:LETTERS_SHOWN_MAX]),
        ("bytes", f"{letter.size:,}: value, key and headers"),
        ("key", "none" if letter.key is None else text_of(letter.key)),
    ]
    for name, fact in facts:
        if fact is not None:
            say(f"{name:>10}  {printable(fact, 4_000)}")
    for name, data in (("value", letter.value), ("sent as", handling.value)):
        if data is None:
            say(f"{name:>10}  none") if name == "value" else None
            continue
        say(f"{name:>10}  {len(data):,} bytes, {form_of(data) if data else 'empty'}")
        for line in shown(data) if data else ():
            say(f"{'':>12}{line}")


def show_letter_outcomes(outcomes: Sequence[LetterOutcome], what: str, *, dry: bool) -> None:
    """Print what became of letters, or would, when ``dry``; ``what`` says what was done with the good ones."""
    good = [one for one in outcomes if one.done]
    bad = [one for one in outcomes if not one.done]
    for one in good[:LETTERS_SHOWN_MAX]:
        say(f"{one.letter.id}  {one.text}")
    for one in bad[:LETTERS_SHOWN_MAX]:
        warn(f"{one.letter.id}  not {what}: {printable(one.text, 2_000)}")
    if not outcomes:
        say("no dead letters open of these")
    elif len(outcomes) > 1 or dry:
        say(f"{len(good):,} {'would be ' if dry else ''}{what}" + (f", {len(bad):,} not" if bad else ""))
    if dry and good:
        say("nothing was done: --yes does it")


# What jobs found


def verdicts_as_json(verdicts: Verdicts) -> dict[str, Any]:
    """Return what ``verify`` checked as JSON."""
    checks = [{"promise": c.promise, "offenders": c.offenders, "note": c.note} for c in verdicts.checks]
    return {"holds": verdicts.holds, "orders": verdicts.orders, "products": verdicts.products, "checks": checks}


def show_verdicts(verdicts: Verdicts) -> None:
    """Print every promise and whether it holds; the first offenders of each to stderr."""
    rows = [[c.promise, f"{len(c.offenders)} VIOLATIONS" if c.offenders else "holds", c.note] for c in verdicts.checks]
    table("", ["promise", "", ""], rows)
    for c in verdicts.checks:
        for subject, found in c.offenders[:5]:
            warn(f"{c.promise}: {subject}: {found}")
    broken = sum(bool(c.offenders) for c in verdicts.checks)
    say(
        f"{len(verdicts.checks)} promises over {verdicts.orders:,} orders and {verdicts.products:,} products: "
        + (f"{broken} BROKEN" if broken else "all hold")
    )


def show_pruned(found: Pruned, whys: Mapping[str, str], *, really: bool) -> None:
    """Print how many orders were removed, or would be, and why the others stay."""
    removed = "removed" if really else "would be removed"
    say(f"{found.checked:,} orders were taken in before {found.until:%Y-%m-%d %H:%M:%S %Z}")
    say(f"  {found.removed:>8,}  {removed}")
    for why, number in found.kept.most_common():
        say(f"  {number:>8,}  stay: they {whys[why]}")
    if found.kept["kafka"] and found.topics.oldest is not None:
        say(f"Kafka's oldest record is of {found.topics.oldest:%Y-%m-%d %H:%M:%S %Z}, in {found.topics.held_by}")
    for number, what in (
        (found.users, "entries of users who have nothing of a limited product any more"),
        (found.letters, "notes about dead letters that are no longer on their topic"),
        (found.cancels, "cancels of orders that never came"),
        (found.lines, "lines of orders that never came, which other workers own"),
    ):
        if number:
            say(f"  {number:>8,}  {what} {removed}")
    if not really and (found.removed or found.users or found.letters or found.cancels or found.lines):
        say("nothing was changed: --yes does it")


def show_reconciled(report: Report, limit: int) -> None:
    """Print what ``reconcile`` found: the first differences, then what was covered."""
    for note in report.notes:
        warn(f"note: {note}")
    if report.differences:
        rows = [[d.kind, d.subject, _words(d.must), _words(d.found), d.repair] for d in report.differences[:limit]]
        table("", ["difference", "of", "must be", "is", "repair"], rows)
        if len(report.differences) > limit:
            say(f"… and {len(report.differences) - limit:,} more: --limit, or --json for all of them")
    if report.youngest:
        rows = [
            [product_id, o.units[product_id], o.order_id, o.status, f"{o.created_at:%Y-%m-%d %H:%M:%S}", o.total_cents]
            for product_id, orders in report.youngest.items()
            for o in orders
        ]
        table("", ["owed of", "units", "youngest orders over it", "status", "since", "cents"], rows)
    if report.repairs:
        table(
            "", ["repair", "of", "", "what was done"], [[r.kind, r.subject, r.outcome, r.text] for r in report.repairs]
        )
    if report.after is not None and report.after.differences:
        left = [[d.kind, d.subject, _words(d.must), _words(d.found)] for d in report.after.differences[:limit]]
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
    summary = ", ".join(f"{number:,} {kind}" for kind, number in counted.items())
    if report.after is not None:
        summary += f"; after the repairs {_what_is_left(report.after)}"
    say(f"{len(report.differences):,} DIFFERENCES: {summary}" if counted else "everything agrees")


def _what_is_left(after: Report) -> str:
    if after.differences:
        return f"{len(after.differences):,} DIFFER STILL"
    flying = sum(after.in_flight.values())
    return "everything agrees" + (f", {flying:,} in flight: run it again in a while" if flying else "")


def _words(value: Any) -> str:
    return ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)


def _span(parts: dict[int, tuple[int, int]]) -> str:
    """Return the offsets of a topic's partitions, each from…to; the empty ones left out, a long list cut."""
    spans = [f"{partition}: {start}…{end}" for partition, (start, end) in parts.items() if end > start]
    return "  ".join(spans[:8]) + (" …" if len(spans) > 8 else "")
