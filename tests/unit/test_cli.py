"""The command line without engines: help that teaches, faults reported plainly, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orderstream import __version__
from tests import forked

COMMANDS = [
    "up",
    "down",
    "status",
    "init",
    "config",
    "worker",
    "ingress",
    "produce",
    "order",
    "stock",
    "product",
    "dead-letters",
    "payments",
    "verify",
    "reconcile",
    "prune",
    "demo",
    "bench",
    "schema",
]

ORDERS = Path(__file__).parents[1] / "data" / "orders"
ORDER = "6f1b2c1e-2f52-5d2b-9a55-5d0e5a0c9a11"


def orderstream(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return forked.orderstream(clean() | {"COLUMNS": "200", "TERM": "dumb"} | env, *arguments)


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("ORDERSTREAM_")}


def test_the_command_line_is_a_module_and_a_program() -> None:
    for program in ([sys.executable, "-m", "orderstream"], [str(Path(sys.executable).with_name("orderstream"))]):
        answer = subprocess.run([*program, "config"], env=clean(), capture_output=True, text=True, check=False)
        assert (answer.returncode, "ORDERSTREAM_KAFKA" in answer.stdout) == (0, True), answer.stderr


def test_help_lists_every_command() -> None:
    answer = orderstream("--help")
    assert answer.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in answer.stdout


@pytest.mark.parametrize(
    "command",
    [
        *COMMANDS,
        *("order get", "order list", "order place", "order cancel"),
        *("stock get", "stock list", "stock receive", "stock adjust", "stock import"),
        *("dead-letters list", "dead-letters show", "dead-letters retry", "dead-letters drop"),
        *("payments list", "payments retry", "payments close"),
    ],
)
def test_every_command_teaches(command: str) -> None:
    answer = orderstream(*command.split(), "--help")
    assert answer.returncode == 0
    assert "Usage: " in answer.stdout


def test_all_faulty_settings_are_listed_at_once_and_without_a_traceback() -> None:
    answer = orderstream(
        "verify", ORDERSTREAM_KAFKA="nowhere", ORDERSTREAM_PARTITIONS="0", ORDERSTREAM_HOLD_TTL_S="soon"
    )
    assert answer.returncode == 2
    for name in ("ORDERSTREAM_KAFKA", "ORDERSTREAM_PARTITIONS", "ORDERSTREAM_HOLD_TTL_S"):
        assert name in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    "command",
    [
        "verify",
        "reconcile",
        "stock list",
        "worker",
        "ingress",
        f"order get {ORDER}",
        "dead-letters list",
        "prune --keep-days 9",
    ],
)
def test_an_unavailable_engine_is_named_with_its_address_and_what_to_do(command: str, tmp_path: Path) -> None:
    answer = orderstream(
        *command.split(),
        ORDERSTREAM_DATABASE_URL="postgresql://someone:secret@127.0.0.1:9/orders",
        ORDERSTREAM_LOCAL_DIR=str(tmp_path),
    )
    assert answer.returncode == 2
    assert "Postgres does not answer at postgresql://127.0.0.1:9/orders" in answer.stderr
    assert "orderstream up" in answer.stderr
    assert "secret" not in answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("produce", "no-such-file.csv"), "no such file"),
        (("produce", __file__), "expected a table (.csv"),
        (("produce", "o.csv", "--map", "etsy"), "expected COLUMN=FIELD, or one of online-retail, shopify"),
        (("produce", "o.csv", "--dates", "european"), "expected day-first, month-first"),
        (
            ("produce", f"{ORDERS}/f08-scientific.csv", "--map", "shopify"),
            "shopify lacks order, in a column called Name",
        ),
        (("stock", "import", f"{ORDERS}/f08-scientific.csv"), "stock lacks product, in a column called product or"),
        (("order", "place", "--item", "1=²"), "PRODUCT=UNITS"),
        (("order", "place", "--item", "1"), "PRODUCT=UNITS"),
        (("order", "place", "--item", "1=0"), "quantity"),
        (("order", "get", "x"), "no order id"),
        (("stock", "adjust", "1", "-3", "--reason", " "), "reason"),
        (("reconcile", "--yes"), "--yes goes with --repair"),
        (("prune", "--keep-days", "0"), "from 7, the topics' retention, to 36500"),
        (("stock", "receive", "1", "0"), "greater than or equal to 1"),
        (("dead-letters", "show", "3:17"), "PARTITION/OFFSET"),
        (("dead-letters", "list", "--reason", "ugly"), "not_json"),
        (("dead-letters", "list", "--topic", "order-events"), "stock-commands"),
        (("payments", "retry"), "or --all"),
        (("payments", "retry", ORDER, "--all"), "or --all"),
        (("payments", "close", "--why", "x"), "orders' ids"),
        (("payments", "close", ORDER, "--why", " "), "printable"),
        (("payments", "close", "5", "--why", "x"), "UUID"),
        (("dead-letters", "retry"), "or --all"),
        (("dead-letters", "retry", "0/1", "--all"), "or --all"),
        (("dead-letters", "retry", "0/1", "--reason", "empty"), "go with --all"),
        (("dead-letters", "retry", "0/1", "0/2", "--value", "-"), "for one letter"),
        (("dead-letters", "retry", "0/1", "--value", "no-such-file"), "No such file"),
        (("dead-letters", "drop", "0/1"), "--why"),
        (("dead-letters", "drop", "0/1", "--why", "\x1b"), "printable"),
    ],
)
def test_wrong_use_is_explained_plainly(arguments: tuple[str, ...], message: str) -> None:
    answer = orderstream(*arguments)
    assert answer.returncode in (1, 2)
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_config_shows_no_token_and_says_which_are_set() -> None:
    answer = orderstream("config", ORDERSTREAM_ADMIN_TOKEN="s3cret-s3cret-s3cret", ORDERSTREAM_PAYMENT_TOKEN="hunter2")
    assert answer.returncode == 0
    assert "s3cret" not in answer.stdout + answer.stderr
    assert "hunter2" not in answer.stdout
    assert answer.stdout.count("***") == 2
    short = orderstream("config", ORDERSTREAM_ADMIN_TOKEN="s3cret")
    assert short.returncode == 2
    assert "ORDERSTREAM_ADMIN_TOKEN" in short.stderr
    assert "s3cret" not in short.stdout + short.stderr


def test_the_version_is_that_of_the_package() -> None:
    assert orderstream("--version").stdout == f"orderstream {__version__}\n"


@pytest.mark.parametrize(("what", "begins"), [("openapi", '{\n  "openapi": "3.1.0"'), ("asyncapi", "# Made by")])
def test_schema_prints_what_programs_read(what: str, begins: str) -> None:
    answer = orderstream("schema", what)
    assert (answer.returncode, answer.stdout[: len(begins)]) == (0, begins)
    assert orderstream("schema", "swagger").returncode == 2
