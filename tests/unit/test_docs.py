"""What the docs name is what the code has: settings, commands and their options, links, files."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from orderstream import settings
from orderstream.jobs.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BESIDE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "tests/README.md")
PAGES = [*sorted(DOCS.glob("*.md")), *(ROOT / name for name in BESIDE if (ROOT / name).is_file())]
SOURCES = {"py", "sql", "lua", "md", "js", "css", "html", "yml", "toml", "lock", "svg", "png", "csv"}
"""Endings of files that the project has; what else the docs name is made by whoever reads them."""

TO_COME = {"tests/migration/"}
"""Named as what comes with the first migration after a release."""


def code_of(page: str) -> Iterator[str]:
    """Yield the pieces of code of a page: what is between backticks, and the lines of its blocks."""
    blocks = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    for block in blocks.findall(page):
        yield from block.splitlines()[1:-1]
    yield from re.findall(r"`([^`\n]+)`", blocks.sub("", page))


def commands_in(code: str) -> Iterator[list[str]]:
    """Yield the words after each ``orderstream`` of a piece of code, up to the end of that command."""
    for words in re.findall(r"(?:^|(?<=[\s;&|]))orderstream((?: +[a-z-][^\s#&|;>)]*)(?: +[^\s#&|;>)]+)*)", code):
        yield words.split()


def fault_of(words: list[str]) -> str | None:
    """Return what is wrong with a command of the command line: the words after ``orderstream``."""
    command = get_command(app)
    rest = list(words)
    while isinstance(command, TyperGroup) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        found = command.commands.get(name)
        if found is None:
            return f"no command {name!r}"
        command = found
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    wrong = [word for word in rest if word.startswith("--") and word.partition("=")[0] not in {*options, "--help"}]
    return f"no option {wrong[0]}" if wrong else None


def paths_in(code: str) -> Iterator[str]:
    """Yield the files and folders that a piece of code names: below a folder of the project, or with a known ending."""
    for word in re.findall(r"[\w./*<>{}…-]+", code):
        path = word.rstrip(".").removeprefix("./")
        top, _, below = path.partition("/")
        if re.search(r"[*<>{}…]", path) or path.startswith("/"):
            continue  # a pattern, or a place on some machine
        if below:
            named = (ROOT / top).is_dir() and not top.startswith(".")
        else:
            named = re.fullmatch(rf"\w[\w-]*\.({'|'.join(SOURCES)})", path) is not None
        if named:
            yield path


def test_the_table_of_settings_is_current() -> None:
    text = (DOCS / "SETTINGS.md").read_text()
    between = re.search(r"<!-- begin: [^>]* -->\n(.*)\n<!-- end -->", text, re.DOTALL)
    assert between is not None
    assert between[1] == settings.document(), "put what orderstream.settings.document() says into docs/SETTINGS.md"
    assert len(between[1].splitlines()) == len(settings.Settings.model_fields) + 2


@cache
def file_names() -> frozenset[str]:
    """Return the names, without their folders, of the files that git keeps."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return frozenset(Path(line).name for line in listed.splitlines())


of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@of_each_page
def test_every_setting_that_the_docs_name_exists(page: Path) -> None:
    names = re.findall(rf"\b{settings.PREFIX}([A-Z_]*[A-Z])\b", page.read_text())
    assert [name for name in names if name.lower() not in settings.Settings.model_fields] == []


@of_each_page
def test_every_command_that_the_docs_name_exists_with_its_options(page: Path) -> None:
    commands = [words for code in code_of(page.read_text()) for words in commands_in(code)]
    faults = [(" ".join(words), fault_of(words)) for words in commands]
    assert [one for one in faults if one[1] is not None] == []


@of_each_page
def test_every_file_that_the_docs_link_to_exists(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@of_each_page
def test_every_file_that_the_docs_name_exists(page: Path) -> None:
    paths = {path for code in code_of(page.read_text()) for path in paths_in(code)} - TO_COME
    assert [path for path in sorted(paths) if not (ROOT / path).exists() and path not in file_names()] == []


def test_what_is_to_come_has_not_come() -> None:
    assert [path for path in TO_COME if (ROOT / path).exists()] == []


def test_what_the_docs_must_not_name_would_be_noticed() -> None:
    block = "```console\n$ orderstream down --hard & orderstream up\n```\n"
    page = f"`orderstream verify` and `orderstream stock sell 1`\n{block}"
    commands = [words for code in code_of(page) for words in commands_in(code)]
    assert [(words, fault_of(words)) for words in commands] == [
        (["down", "--hard"], "no option --hard"),
        (["up"], None),
        (["verify"], None),
        (["stock", "sell", "1"], "no command 'sell'"),
    ]
    assert [*commands_in("orderstream --help"), *commands_in("DROP DATABASE orderstream WITH (FORCE)")] == [["--help"]]
    named = "agents/pay.py sql/missing.sql gate.lua `.local/x.py` order.json jobs/*.py /etc/hosts.py 3/17"
    assert [*paths_in(named)] == ["agents/pay.py", "sql/missing.sql", "gate.lua"]
