"""What the docs name and quote is what the code has: settings, commands, links, files, output, numbers."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from orderstream import settings
from orderstream.agents import app as worker
from orderstream.agents import commit, desk, provider, prune, setback, timers
from orderstream.bench.scenarios import SCENARIOS
from orderstream.exits import EXIT_FAULT
from orderstream.failpoints import POINTS
from orderstream.jobs import demo
from orderstream.jobs.cli.main import app
from orderstream.jobs.init import SEED
from orderstream.jobs.invoices import read_catalogue, read_orders
from orderstream.jobs.reconcile import reconcile
from orderstream.jobs.verify import KAFKA_PROMISE, REDIS_PROMISE
from orderstream.lua.gate import SCRIPTS
from orderstream.sql.differences import Kind
from orderstream.sql.store import statements
from orderstream.streams.commands import COMMAND_BYTES_MAX
from orderstream.streams.headers import HEADERS_BYTES_MAX
from orderstream.streams.orders import Limits, Reason
from orderstream.streams.topics import TABLES, TOPICS
from orderstream.streams.upstream import consumer, fetch_list
from tests.chaos.test_failpoints import REVOKING
from tests.chaos.test_monkey import MINUTES, Monkey
from tests.chaos.test_poison import POISON
from tests.chaos.test_workers import SESSION_S, STANDSTILL_MAX_S
from tests.unit.test_layout import FLOORS

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


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@of_each_page
def test_every_heading_that_the_docs_link_to_exists(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text())
    lost = [
        f"{file}#{anchor}"
        for file, anchor in links
        if anchor not in anchors((page.parent / file if file else page).read_text())
    ]
    assert lost == []


@of_each_page
def test_every_target_of_make_that_the_docs_name_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets, variables = (
        set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE)),
        set(re.findall(r"\$\(([A-Z]+)\)", makefile)),
    )
    for code in code_of(page.read_text()):
        for target, rest in re.findall(r"(?:^|[\s$])make ([a-z]+)((?: [A-Z]+=(?:\"[^\"]*\"|\S+))*)", code):
            assert target in targets, code
            assert set(re.findall(r" ([A-Z]+)=", rest)) <= variables | {"KEEP"}, code


# Numbers and lists


def section(page: str, head: str) -> str:
    """Return a page's section, with what is below it, up to the next heading of its level."""
    level, _, name = head.partition(" ")
    text = (ROOT / page).read_text()
    found = re.search(rf"^{level} {re.escape(name)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page} has no section {head!r}"
    return found[1]


def test_the_promises_are_counted_and_listed() -> None:
    promises = [*statements("invariants.sql"), REDIS_PROMISE, KAFKA_PROMISE]
    counted = {
        f"{page.name}: {line}"
        for page in PAGES
        for line in page.read_text().splitlines()
        if (number := re.search(r"(\d+) promises\b", line)) and int(number[1]) != len(promises)
    }
    assert counted == set()
    shown = re.findall(r"^(\S.*?) {2,}holds", section("docs/QUICKSTART.md", "## Check it"), re.MULTILINE)
    assert shown == promises
    assert f"of which {len(promises) - 2} are queries" in section("docs/RELIABILITY.md", "## The promises")


SETTINGS = settings.Settings.model_construct()
NOTHING: Any = None
QUOTED = [
    ("RELIABILITY", f"{len(POINTS)} failpoints, `kill -9` at each"),
    ("RELIABILITY", f"{sum(map(len, POISON.values()))} kinds of poison on all five input topics"),
    (
        "RELIABILITY",
        f"the monkey: {len(Monkey(NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, 1).faults)} kinds of faults",
    ),
    ("RELIABILITY", f"the home asks again after {timers.RESTING_S:g} s"),
    ("RELIABILITY", f"the session timeout + {STANDSTILL_MAX_S - SESSION_S:g} s"),
    ("RELIABILITY", f"after the session timeout ({SETTINGS.session_timeout_s:g} s)"),
    ("RELIABILITY", f"`ORDERSTREAM_STALL_TIMEOUT_S` ({SETTINGS.stall_timeout_s:g} s)"),
    ("RELIABILITY", f"after {worker.LEAVE_S:g} s at most it ends as it is"),
    ("RELIABILITY", f"(exit code {EXIT_FAULT})"),
    ("ARCHITECTURE", f"(exit code {EXIT_FAULT})"),
    ("ARCHITECTURE", f"up to {commit.ITEMS_MAX:,} things at a time"),
    ("ARCHITECTURE", f"commit is {desk.AHEAD_MAX:,} things behind"),
    ("ARCHITECTURE", f"An order that is not over after {desk.WAITING_AFTER_S:g} s is **waiting**"),
    (
        "ARCHITECTURE",
        f"{desk.TAKEN_UP_MAX:,} after a rebalance, then as long as fewer than {desk.IN_HAND_MAX:,} are in hand",
    ),
    (
        "ARCHITECTURE",
        f"fetches begin {fetch_list.FETCH_INTERVAL_MIN_S * 1000:g} to {fetch_list.FETCH_INTERVAL_MAX_S * 1000:g} ms apart: "
        f"as long as {fetch_list.FETCH_WORTH} records take",
    ),
    ("ARCHITECTURE", f"one acknowledgement for up to {consumer.CHUNK_RECORDS_MAX} records"),
    ("OPERATIONS", f"{worker.EXIT_UNAVAILABLE} a setting is wrong, or an engine did not answer"),
    ("OPERATIONS", f"{EXIT_FAULT} it ended itself"),
    ("OPERATIONS", f"more workers than `ORDERSTREAM_PARTITIONS` ({SETTINGS.partitions}) are of no use"),
    ("OPERATIONS", f"`ORDERSTREAM_POSTGRES_POOL_MAX` ({SETTINGS.postgres_pool_max})"),
    ("OPERATIONS", f"the newest {reconcile.RUNS_KEPT:,} are kept"),
    ("OPERATIONS", f"every five minutes, {prune.BATCH} orders a transaction, with pauses four times as long"),
    (
        "QUICKSTART",
        f"At most {SETTINGS.order_lines_max} products, {SETTINGS.line_quantity_max:,} units a line, "
        f"{SETTINGS.order_bytes_max // 1024} KiB",
    ),
    (
        "QUICKSTART",
        f"headers of {HEADERS_BYTES_MAX:,} bytes in all, names included. A command has at most {COMMAND_BYTES_MAX:,}",
    ),
    ("PROVIDER", f"JSON, at most {provider.ANSWER_BYTES_MAX:,} bytes, not compressed"),
    ("PROVIDER", f"`charge_id` is text of 1 to {provider.CHARGE_ID_CHARS_MAX} printable characters"),
    ("QUICKSTART", f"CANCELLED for one of {', '.join(f'`{reason}`' for reason in Reason)}"),
]
"""What a page says of a number or a list that the code has; line breaks don't count."""


@pytest.mark.parametrize(("page", "words"), QUOTED)
def test_the_docs_quote_what_the_code_has(page: str, words: str) -> None:
    assert words in " ".join((DOCS / f"{page}.md").read_text().split())


def test_every_exit_code_is_one_of_the_programs() -> None:
    codes = {(page.name, code) for page in PAGES for code in re.findall(r"exit code (\d+)", page.read_text())}
    assert {int(code) for _, code in codes} <= {0, 1, worker.EXIT_UNAVAILABLE, EXIT_FAULT}, codes


def test_numbers_that_are_words_are_the_codes() -> None:
    assert (len(POISON), len(REVOKING)) == (5, 7), "RELIABILITY: five input topics, seven kills in a row"
    assert MINUTES * 60 == 24, "RELIABILITY: the monkey for 24 seconds"
    assert (setback.WATCH_S, setback.SLACK_S) == (2, 600), "ARCHITECTURE: every two seconds, from ten minutes before"
    assert (prune.ROUND_S, prune.PAUSE_PART) == (300, 4), "OPERATIONS: every five minutes, pauses four times as long"


def test_every_test_of_chaos_is_in_the_table() -> None:
    named = set(
        re.findall(r"\| `(test_\w+\.py)` \|$", section("docs/RELIABILITY.md", "## Attacked, and how"), re.MULTILINE)
    )
    assert named == {file.name for file in (ROOT / "tests" / "chaos").glob("test_*.py")}


def test_the_topics_are_listed() -> None:
    text = " ".join((DOCS / "ARCHITECTURE.md").read_text().split())
    for which, inner in (("of the inner topics", True), ("that others read or write", False)):
        listed = re.search(rf"Records {which} \(([^)]*)\)", text)
        assert listed is not None
        assert set(re.findall(r"`([\w-]+)`", listed[1])) == {topic.name for topic in TOPICS if topic.inner == inner}
    drawn = section("docs/ARCHITECTURE.md", "## The way of an order").split("```")[1]
    assert [topic.name for topic in TOPICS if not re.search(rf"(?<![\w-]){topic.name}(?![\w-])", drawn)] == []
    retained = re.findall(r"^\| (?:Kafka)? ?\| ((?:`[\w-]+`(?:, )?)+) \|.*`ORDERSTREAM_RETENTION_(INNER_)?HOURS` \|$",
                          (DOCS / "OPERATIONS.md").read_text(), re.MULTILINE)  # fmt: skip
    for names, kept in retained:
        assert set(re.findall(r"`([\w-]+)`", names)) == {topic.name for topic in TOPICS if topic.inner == bool(kept)}
    assert len(retained) == 2


def test_the_tables_and_what_they_say_of_payments_are_described() -> None:
    schema = (ROOT / "sql" / "tables.sql").read_text()
    rows = re.findall(
        r"^\| ((?:`\w+`(?:, )?)+) \|", section("docs/ARCHITECTURE.md", "## What stands in Postgres"), re.MULTILINE
    )
    listed = [table for names in rows for table in re.findall(r"`(\w+)`", names)]
    assert sorted(listed) == sorted(re.findall(r"^CREATE TABLE (\w+)", schema, re.MULTILINE))
    enum = re.search(r"^CREATE TYPE payment AS ENUM \((.*)\);", schema, re.MULTILINE)
    assert enum is not None
    named = re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \|", section("docs/ARCHITECTURE.md", "## Money"), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(named))) == sorted(re.findall(r"'(\w+)'", enum[1]))


def test_the_scripts_of_the_gate_are_described() -> None:
    described = set(re.findall(r"`(\w+)\.lua`", section("docs/ARCHITECTURE.md", "## Who knows how many are left")))
    assert described == set(SCRIPTS)


def test_the_floors_are_described() -> None:
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", section("docs/ARCHITECTURE.md", "## The house"), re.MULTILINE)
    floors = {int(number): set(re.findall(r"`(\w+)/`", names)) for number, names in rows}
    assert floors == {number: set(folders) for number, folders in enumerate(FLOORS, 1)}


def test_the_scenarios_are_described() -> None:
    heads = re.findall(r"^## ([a-z-]+)$", (DOCS / "PERFORMANCE.md").read_text(), re.MULTILINE)
    assert heads == [*SCENARIOS]
    for page in PAGES:
        assert set(re.findall(r"SCENARIO=([a-z-]+)", page.read_text())) <= set(SCENARIOS), page.name


def test_the_readmes_figures_are_those_of_the_runs() -> None:
    rows = re.findall(
        r"\| ([\d,]+) · ([\d,]+) · ([\d,]+) (\w+) \|.*SCENARIO=([a-z-]+)", section("README.md", "## Figures")
    )
    assert len(rows) == 4
    for *figures, unit, scenario in rows:
        name = "lines_per_s" if unit == "lines" else "orders_per_s"
        assert f"| `{name}` | {' | '.join(figures)} |" in section("docs/PERFORMANCE.md", f"## {scenario}")


def test_the_alerts_are_those_that_there_are() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    listed = re.findall(r"^\| `(\w+)` \|", section("docs/OPERATIONS.md", "## When an alert fires"), re.MULTILINE)
    assert listed == [rule["alert"] for rule in rules]


# Output


def form(node: ast.AST, assigned: Mapping[str, ast.AST]) -> str:
    """Return the pattern of what an expression of text makes: numbers where it formats one, else anything.

    Args:
        node: of the expression.
        assigned: the expressions of the names in its function.
    """
    if isinstance(node, ast.Constant):
        return re.escape(str(node.value).strip("\n"))
    if isinstance(node, ast.JoinedStr):
        return "".join(form(part, assigned) for part in node.values)
    if isinstance(node, ast.IfExp):
        return f"(?:{form(node.body, assigned)}|{form(node.orelse, assigned)})"
    if isinstance(node, ast.BinOp):
        return form(node.left, assigned) + form(node.right, assigned)
    if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
        if re.search(r"[,f%]'$", ast.unparse(node.format_spec)):
            return r" *[\d,.]+%?"
        return form(node.value, assigned) + " *"
    value = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(value, ast.Name) and isinstance(assigned.get(value.id), (ast.JoinedStr, ast.IfExp)):
        return form(assigned[value.id], assigned)
    if value is not node and isinstance(value, (ast.JoinedStr, ast.IfExp)):
        return form(value, assigned)
    return ".+"


def forms_of(file: str, *functions: str) -> list[str]:
    """Return the patterns of the lines that functions of a file say."""
    found = []
    for function in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) and function.name in functions:
            nodes = [*ast.walk(function)]
            assigned = {
                target.id: node.value
                for node in nodes
                if isinstance(node, ast.Assign)
                for target in node.targets
                if isinstance(target, ast.Name)
            }
            found += [
                form(node.args[0], assigned)
                for node in nodes
                if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in {"say", "self.say"}
            ]
    assert found, f"{file}: {functions} say nothing"
    return found


def unlike(lines: list[str], forms: list[str]) -> list[str]:
    """Return the lines that have none of the forms."""
    return [line for line in lines if not any(re.fullmatch(one, line) for one in forms)]


def test_the_readme_quotes_what_the_demo_prints() -> None:
    block = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    lines = [line for line in block[1].splitlines() if line.strip() not in ("", "…")]
    forms = [
        *forms_of("jobs/demo.py", "show", "show_verdicts"),
        *forms_of("jobs/cli/shown.py", "show_outcome"),
        *forms_of("orderstream/engines/local.py", "up"),
    ]
    assert unlike(lines, forms) == []
    assert unlike(["verify: 14 promises over some orders: every promise holds"], forms) != []

    file = ROOT / "data" / "online-retail-sample.csv"
    products = len(SEED) + len(read_catalogue(file, demo.STOCK_SHARE)) + 1
    reading, orders = read_orders(
        file, Limits(SETTINGS.order_lines_max, SETTINGS.line_quantity_max, SETTINGS.order_bytes_max)
    )
    assert len([*orders]) == reading.orders
    skipped = ", ".join(f"{number} {kind}" for kind, number in reading.skipped.items())
    for line in (
        f"products: {products} loaded, 0 there; {len(TOPICS) + len(TABLES)} topics created",
        f"  {reading.orders} orders with {reading.lines} lines; skipped: {skipped}",
    ):
        assert line in lines
    over = re.search(r"promises over ([\d,]+) orders", block[1])
    assert over is not None
    assert over[1] == f"{reading.orders + 10_000:,}"


@pytest.mark.parametrize("page", ["OPERATIONS", "QUICKSTART"])
def test_the_docs_quote_what_the_checks_print(page: str) -> None:
    lines = [
        line
        for line in code_of((DOCS / f"{page}.md").read_text())
        if re.search(r"promises over|records read|DIFFER|agrees", line)
    ]
    assert lines
    forms = forms_of("jobs/cli/shown.py", "show_verdicts", "show_reconciled")
    assert unlike(lines, [one for one in forms if one != ".+"]) == []


def test_the_docs_name_kinds_of_drift_that_there_are() -> None:
    named = re.findall(
        r"\b(?:order|stock|redis|table)\.[a-z_]+\b(?!\()", section("docs/OPERATIONS.md", "## Backup and restore")
    )
    assert named
    assert [kind for kind in named if kind not in {*Kind}] == []
