"""Commands about dead letters: list, show, retry, drop."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orderstream.console import say
from orderstream.errors import OrderstreamError
from orderstream.jobs.cli.base import Json, T, run, settings, with_producer, with_store
from orderstream.jobs.cli.shown import (
    letter_as_json,
    show_json,
    show_letter,
    show_letter_outcomes,
    show_letters,
    whole_letter_as_json,
)

if TYPE_CHECKING:
    from orderstream.jobs.letters import Outcome, Plan
    from orderstream.sql.letters import Handling
    from orderstream.sql.store import Store
    from orderstream.streams.letters import Letter, LetterId, Reader
    from orderstream.streams.producer import Producer

app = typer.Typer(no_args_is_help=True, help="Show what was refused and why; send it again, or drop it.")

LetterIds = Annotated[
    list[str] | None, typer.Argument(help="Letters, PARTITION/OFFSET as `list` shows them.", metavar="ID")
]

OfReason = Annotated[str | None, typer.Option("--reason", help="Only letters of this reason.")]

OfTopic = Annotated[str | None, typer.Option("--topic", help="Only records that came from this topic.")]

Yes = Annotated[bool, typer.Option("--yes", help="With --all: do it, instead of showing what would be done.")]

AgainToo = Annotated[bool, typer.Option("--again", help="Also letters that were retried or dropped before.")]

WHY_CHARS_MAX = 500
"""As much as the reason of a drop may say."""


def _letter_id(text: str) -> LetterId:
    from orderstream.streams.letters import parse_id

    try:
        return parse_id(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _wanted(reason: str | None, topic: str | None) -> Callable[[Letter], bool]:
    from orderstream.jobs.letters import SOURCES
    from orderstream.streams.dead_letters import REASONS

    ours = settings()
    topics = {name: ours.topic(spec.name) for spec in SOURCES for name in (spec.name, ours.topic(spec.name))}
    if reason is not None and reason not in REASONS:
        raise typer.BadParameter(f"{reason!r} is no reason: expected one of {', '.join(REASONS)}")
    if topic is not None and topic not in topics:
        names = ", ".join(spec.name for spec in SOURCES)
        raise typer.BadParameter(f"{topic!r} is no topic that letters come from: expected one of {names}")
    return lambda letter: (
        (reason is None or letter.reason == reason)
        and (topic is None or (letter.source is not None and letter.source.topic == topics[topic]))
    )


def with_letters(use: Callable[[Store, Reader], Awaitable[T]]) -> T:
    """Open Postgres and the topic of dead letters for one use, and run it to the end."""
    from orderstream.jobs.letters import reading

    async def work(store: Store) -> T:
        async with reading(settings()) as reader:
            return await use(store, reader)

    return run(with_store(work))


@app.command("list")
def letters_list(
    closed: Annotated[bool, typer.Option("--all", help="Also those that were retried or dropped.")] = False,
    reason: OfReason = None,
    topic: OfTopic = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many.")] = 100,
    as_json: Json = False,
) -> None:
    """List what was refused and is still open, the newest last.

    State `retrying` is a retry that was begun and not finished: retry the letter again, it counts once.

        orderstream dead-letters list --reason not_json --topic orders
    """
    from orderstream.console import Bar
    from orderstream.jobs.letters import listing

    wanted = _wanted(reason, topic)

    async def work(store: Store, reader: Reader) -> Any:
        with Bar("read", reader.total) as bar:
            return await listing(store, reader, wanted, closed=closed, limit=limit, progress=bar.update)

    found = with_letters(work)
    if as_json:
        show_json([letter_as_json(letter, handling) for letter, handling in found.letters])
    else:
        show_letters(found, "no dead letters" + ("" if closed else " open") + (" of these" if reason or topic else ""))


@app.command("show")
def letters_show(
    letter_id: Annotated[str, typer.Argument(help="PARTITION/OFFSET, as `list` shows it.", metavar="ID")],
    raw: Annotated[str | None, typer.Option(help="Write the value's exact bytes here; - for the output.")] = None,
    as_json: Json = False,
) -> None:
    """Show a letter: why it was refused, where it came from, what it holds, what was done about it.

    What is no printable text is escaped, or shown as a hex dump. To fix one:

        orderstream dead-letters show 3/17 --raw order.json

        orderstream dead-letters retry 3/17 --value order.json
    """
    from orderstream.sql.letters import handlings

    known = _letter_id(letter_id)
    if raw == "-" and sys.stdout.isatty():
        raise typer.BadParameter("--raw - needs a file or a pipe: the bytes may command a terminal")

    async def work(store: Store, reader: Reader) -> tuple[Letter, Handling]:
        letter = await reader.one(known)
        return letter, (await handlings(store, [letter]))[known]

    letter, handling = with_letters(work)
    if raw == "-":
        sys.stdout.buffer.write(letter.value or b"")
        sys.stdout.buffer.flush()
    elif raw is not None:
        try:
            Path(raw).write_bytes(letter.value or b"")
        except OSError as error:
            raise OrderstreamError(f"{raw}: can't be written: {error.strerror}") from None
        say(f"{raw}: {len(letter.value or b''):,} bytes")
    elif as_json:
        show_json(whole_letter_as_json(letter, handling))
    else:
        show_letter(letter, handling)


def _chosen(ids: list[str] | None, everything: bool, reason: str | None, topic: str | None) -> list[LetterId]:
    if bool(ids) == everything:
        raise typer.BadParameter("expected letters' ids, or --all")
    if not everything and (reason or topic):
        raise typer.BadParameter("--reason and --topic go with --all")
    return list(dict.fromkeys(map(_letter_id, ids or ())))


async def _each_page(
    store: Store,
    reader: Reader,
    ids: list[LetterId],
    wanted: Callable[[Letter], bool],
    act: Callable[[list[Letter]], Awaitable[list[Outcome]]],
) -> list[Outcome]:
    """Act on the letters of these ids or, without any, on all open ones that are wanted, page by page."""
    from orderstream.console import Bar
    from orderstream.sql.letters import handlings

    if ids:
        return await act([await reader.one(letter_id) for letter_id in ids])
    outcomes: list[Outcome] = []
    seen = 0
    with Bar("read", reader.total) as bar:
        async for page in reader.pages():
            asked = [letter for letter in page if wanted(letter)]
            there = await handlings(store, asked)
            done = await act([letter for letter in asked if not there[letter.id].closed])
            outcomes += [one._replace(letter=one.letter._replace(value=None, headers=())) for one in done]
            seen += len(page)
            bar.update(seen)
    return outcomes


def _finish(outcomes: list[Outcome], what: str, *, dry: bool) -> None:
    """Show what became of letters; exit 1 when one was refused, unless nothing was to be done."""
    show_letter_outcomes(outcomes, what, dry=dry)
    if not dry and not all(one.done for one in outcomes):
        raise typer.Exit(1)


VALUE_BYTES_MAX = 1024 * 1024
"""Of a corrected value; the broker takes no larger record."""


def _corrected(file: str) -> bytes:
    try:
        if file == "-":
            value = sys.stdin.buffer.read(VALUE_BYTES_MAX + 1)
        else:
            with Path(file).open("rb") as opened:
                value = opened.read(VALUE_BYTES_MAX + 1)
    except OSError as error:
        raise OrderstreamError(f"{file}: can't be read: {error.strerror}") from None
    if len(value) > VALUE_BYTES_MAX:
        raise OrderstreamError(f"{file}: more than {VALUE_BYTES_MAX:,} bytes, which no record can hold")
    return value


@app.command("retry")
def letters_retry(
    ids: LetterIds = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="All that are open; only shown, without --yes.")] = False,
    reason: OfReason = None,
    topic: OfTopic = None,
    value: Annotated[
        str | None, typer.Option(help="One letter: send this file's bytes instead of its own; - for the input.")
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Leave the record's own headers out.")] = False,
    again: AgainToo = False,
    yes: Yes = False,
) -> None:
    """Send refused records again to the topics that they came from, each once.

    What would be refused again is not sent; the exit code is 1 then. An order without id keeps the id that its first place
    gave it. So a retry that a crash interrupted can be repeated, and is still one order.

        orderstream dead-letters retry 3/17 --value order.json

        orderstream dead-letters retry --all --reason unknown_product --yes
    """
    from orderstream.jobs.letters import Outcome, carry_out, plan

    chosen, wanted, ours = _chosen(ids, everything, reason, topic), _wanted(reason, topic), settings()
    if value is not None and len(chosen) != 1:
        raise typer.BadParameter("--value is for one letter")
    if again and everything:
        raise typer.BadParameter("--again is for letters named by their ids")
    corrected = None if value is None else _corrected(value)
    dry = everything and not yes

    async def work(store: Store, reader: Reader) -> list[Outcome]:
        async def planned(letters: list[Letter]) -> tuple[list[Plan], list[Outcome]]:
            return await plan(store, ours, letters, value=corrected, again=again, own_headers=not bare)

        async def preview(letters: list[Letter]) -> list[Outcome]:
            plans, refused = await planned(letters)
            there = [f"would be sent to {one.sending.topic}/{one.sending.partition}" for one in plans]
            return [*(Outcome(p.letter, True, text) for p, text in zip(plans, there, strict=True)), *refused]

        async def retry(producer: Producer) -> list[Outcome]:
            async def send(letters: list[Letter]) -> list[Outcome]:
                plans, refused = await planned(letters)
                return [*await carry_out(store, producer, plans, again=again), *refused]

            return await _each_page(store, reader, chosen, wanted, send)

        return await (_each_page(store, reader, chosen, wanted, preview) if dry else with_producer(retry))

    _finish(with_letters(work), "sent again", dry=dry)


@app.command("drop")
def letters_drop(
    why: Annotated[str, typer.Option(help="Why they are not wanted: kept with the letter.")],
    ids: LetterIds = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="All that are open; only shown, without --yes.")] = False,
    reason: OfReason = None,
    topic: OfTopic = None,
    again: AgainToo = False,
    yes: Yes = False,
) -> None:
    """Note that letters are not wanted any more. Nothing is deleted: `list --all` and `show` still show them.

    orderstream dead-letters drop 3/17 --why "a test of the shop's"
    """
    from orderstream.jobs.letters import Outcome, drop

    chosen, wanted = _chosen(ids, everything, reason, topic), _wanted(reason, topic)
    if not why.strip() or not why.isprintable() or len(why) > WHY_CHARS_MAX:
        raise typer.BadParameter(f"--why: expected 1 to {WHY_CHARS_MAX} printable characters")
    if again and everything:
        raise typer.BadParameter("--again is for letters named by their ids")
    dry = everything and not yes

    async def work(store: Store, reader: Reader) -> list[Outcome]:
        async def act(letters: list[Letter]) -> list[Outcome]:
            if dry:
                return [Outcome(letter, True, "would be dropped") for letter in letters]
            return await drop(store, letters, why, again=again)

        return await _each_page(store, reader, chosen, wanted, act)

    _finish(with_letters(work), "dropped", dry=dry)
