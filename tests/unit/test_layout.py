"""The layout: links, floors, folders, dead code, and what keeps the package from shadowing other modules."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "orderstream"
FOLDERS = ("agents", "bench", "http", "jobs", "lua", "sql", "streams", "tables")

FLOORS = (("orderstream",), ("streams", "lua"), ("sql", "tables"), ("http",), ("agents",), ("jobs",), ("bench",))
"""A file imports from its own folder and from folders on lower floors."""

DOORS = {
    ("orderstream.__main__", "orderstream.jobs.cli.main"),
    ("orderstream.jobs.cli.processes", "orderstream.bench.run"),
}
"""The only imports that go up: ``python -m orderstream``, and the command ``orderstream bench``."""

REGISTERED = ("app.command", "app.callback", "top.command")
"""Decorators of functions that the command line calls."""

CALLED_FROM_OUTSIDE = {("orderstream.metrics", "document"), ("orderstream.settings", "document")}
"""They make the tables of the docs, for whoever changes them; test_docs.py and test_metrics.py compare them."""

ALL_TOGETHER = {"invariants.sql"}
"""Files of queries that ``verify`` runs one after the other, without their names."""


def sources() -> list[Path]:
    return [file for folder in ("orderstream", *FOLDERS) for file in sorted((ROOT / folder).glob("**/*.py"))]


def test_the_links_point_to_the_folders_beside_the_package() -> None:
    links = {entry.name: os.readlink(entry) for entry in PACKAGE.iterdir() if entry.is_symlink()}
    assert links == {name: f"../{name}" for name in FOLDERS}
    assert all((PACKAGE / name).is_dir() for name in FOLDERS)


def test_git_keeps_the_links_as_links() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "orderstream"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    links = {line.split()[3] for line in listed.splitlines() if line.startswith("120000")}
    assert links == {f"orderstream/{name}" for name in FOLDERS}


def test_no_folder_at_the_top_is_a_package() -> None:
    packages = [entry.name for entry in ROOT.iterdir() if (entry / "__init__.py").is_file()]
    assert packages == ["orderstream"]


@pytest.mark.parametrize("module", ["http.client", "http.server"])
def test_the_standard_library_is_not_shadowed(module: str) -> None:
    file = subprocess.run(
        [sys.executable, "-c", f"import {module} as m; print(m.__file__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert not Path(file.strip()).is_relative_to(ROOT / "http")


def test_imports_are_absolute_and_go_through_the_package() -> None:
    twice = set(FOLDERS) - {"http"}  # `http` is the standard library's
    faults = []
    for file in sources():
        for node in ast.walk(ast.parse(file.read_bytes())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            relative = isinstance(node, ast.ImportFrom) and node.level > 0
            if relative or any(name.partition(".")[0] in twice for name in names):
                faults.append(f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    assert not faults


class Import(NamedTuple):
    """What one module imports from another: the module, and the name if it is not the whole of it."""

    importer: str
    imported: str
    name: str | None = None


def modules() -> dict[str, Path]:
    """Return the files of the package by the names that they are imported by."""
    found = {}
    for file in sources():
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "orderstream" and len(parts) > 2 and parts[1] in FOLDERS:
            continue  # the same file, through its link
        found[".".join(parts if parts[0] == "orderstream" else ("orderstream", *parts))] = file
    return found


@cache
def parsed(text: str) -> ast.Module:
    """Parse a module, once for all tests."""
    return ast.parse(text)


def imports_of(module: str, text: str, known: Container[str]) -> Iterator[Import]:
    """Yield what a module imports from the package, wherever in its text."""
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "orderstream":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(module, whole) if whole in known else Import(module, node.module or "", alias.name)


def folder_of(module: str) -> str:
    """Return the top-level folder of a module."""
    second = module.split(".")[1] if "." in module else ""
    return second if second in FOLDERS else "orderstream"


def climbs(one: Import) -> bool:
    """Return whether an import goes to another folder that is not on a lower floor."""
    floor = {folder: n for n, folders in enumerate(FLOORS) for folder in folders}
    source, target = folder_of(one.importer), folder_of(one.imported)
    return source != target and floor[target] >= floor[source]


def is_private(one: Import) -> bool:
    """Return whether an import takes what its module keeps to itself."""
    parts = [*one.imported.split("."), one.name or ""]
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


def circles(arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the groups of modules each of which imports, in some steps, all others of its group."""
    graph: dict[str, set[str]] = {}
    for source, target in arrows:
        graph.setdefault(source, set()).add(target)

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        ways = [start]
        while ways:
            for target in graph.get(ways.pop(), ()):
                if target not in found:
                    found.add(target)
                    ways.append(target)
        return found

    reach = {module: reached(module) for module in graph}
    groups = {frozenset(m for m in reach[one] if one in reach.get(m, ())) for one in graph if one in reach[one]}
    return sorted(sorted(group) for group in groups)


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    known = modules()
    return [one for module, file in known.items() for one in imports_of(module, file.read_text(), known)]


def test_imports_go_down(imports: list[Import]) -> None:
    arrows = {(folder_of(one.importer), folder_of(one.imported)) for one in imports}
    up = {(one.importer, one.imported) for one in imports if climbs(one)}
    print(f"{sum(a != b for a, b in arrows)} arrows between folders; up: {len(up)}, all of them doors: {up == DOORS}")
    assert up == DOORS


def test_no_file_imports_itself_in_a_circle(imports: list[Import]) -> None:
    found = circles((one.importer, one.imported) for one in imports)
    print(f"circles: {len(found)}")
    assert found == []


def test_what_a_module_keeps_to_itself_no_other_module_takes(imports: list[Import]) -> None:
    assert [one for one in imports if is_private(one)] == []


def test_no_folder_holds_more_than_a_fifth_of_the_code() -> None:
    lines = Counter[Path]()
    for file in modules().values():
        lines[file.parent.relative_to(ROOT)] += len(file.read_text().splitlines())
    (largest, most), all_lines = lines.most_common(1)[0], lines.total()
    print(f"largest folder: {largest}, {most / all_lines:.0%} of {all_lines:,} lines")
    assert most / all_lines <= 0.2


def test_an_arrow_up_a_circle_and_a_private_name_would_be_noticed() -> None:
    known = {"orderstream.lua.gate", "orderstream.http.reading", "orderstream.sql.store", "orderstream.agents.pay"}
    text = "def f():\n    from orderstream.http.reading import _KEY\n    from orderstream.lua import gate\n"
    up, down = imports_of("orderstream.sql.store", text, known)
    assert (up, down) == (
        Import("orderstream.sql.store", "orderstream.http.reading", "_KEY"),
        Import("orderstream.sql.store", "orderstream.lua.gate"),
    )
    assert [climbs(one) for one in (up, down)] == [True, False]
    assert [is_private(one) for one in (up, down)] == [True, False]
    assert climbs(Import("orderstream.sql.store", "orderstream.tables.stock")), "the same floor is not below"
    assert circles([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "e")]) == [["a", "b", "c"], ["e"]]


def definitions(text: str) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the functions, classes and constants at the top of a module that only their names lead to."""
    for node in parsed(text).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if not any(ast.unparse(decorator).partition("(")[0] in REGISTERED for decorator in node.decorator_list):
                yield node.name, node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (leaf for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name))
            yield from ((name.id, node) for name in names if not name.id.startswith("__"))


def taken_from_others(module: str, text: str, known: Container[str]) -> Iterator[tuple[str, str]]:
    """Yield what a module takes from others, as (module, name): imported by name, or as an attribute of the module."""
    aliases = {}
    tree = parsed(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in known:
                    aliases[alias.asname or alias.name] = whole
    for one in imports_of(module, text, known):
        if one.name is not None:
            yield one.imported, one.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield aliases[node.value.id], node.attr


def unused(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the definitions of modules that nothing else in them refers to, as (module, name)."""
    taken = {one for module, text in texts.items() for one in taken_from_others(module, text, texts)}
    found = []
    for module, text in texts.items():
        read: dict[str, list[int]] = {}
        for leaf in ast.walk(parsed(text)):
            if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Load):
                read.setdefault(leaf.id, []).append(leaf.lineno)
        for name, node in definitions(text):
            within = range(node.lineno, (node.end_lineno or node.lineno) + 1)  # where a reference to itself is none
            if (module, name) not in taken and all(line in within for line in read.get(name, ())):
                found.append((module, name))
    return found


def test_everything_at_the_top_of_a_module_is_referred_to() -> None:
    """Dead code goes: what only tests refer to is dead as well."""
    found = unused({module: file.read_text() for module, file in modules().items()})
    assert [one for one in found if one not in CALLED_FROM_OUTSIDE] == []
    assert set(found) >= CALLED_FROM_OUTSIDE, "an exception that is none any more"


def test_every_query_is_asked_by_its_name() -> None:
    trees = [parsed(file.read_text()) for file in modules().values()]
    texts = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    queries = {
        (file.name, name)
        for file in (ROOT / "sql").glob("*.sql")
        for name in re.findall(r"^-- name: (.+)$", file.read_text(), re.MULTILINE)
    }
    assert len(queries) > 50
    assert [(file, name) for file, name in sorted(queries) if name not in texts and file not in ALL_TOGETHER] == []


def test_dead_code_would_be_noticed() -> None:
    texts = {
        "orderstream.a": "USED = 1\nDEAD = 2\n\ndef again():\n    return again()\n\n@app.command()\ndef shown(): ...\n",
        "orderstream.b": "from orderstream import a\nfrom orderstream.c import f\n\nOWN = a.USED\nprint(OWN, f)\n",
        "orderstream.c": "def f(): ...\n\nclass G: ...\n\ndef g(): ...\n",
    }
    assert unused(texts) == [
        ("orderstream.a", "DEAD"),
        ("orderstream.a", "again"),
        ("orderstream.c", "G"),
        ("orderstream.c", "g"),
    ]


def test_hatch_follows_the_links_and_packs_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"] == {"build": {"only-include": ["orderstream"]}}


def test_the_wheel_holds_code_and_data(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("orderstream/")}
    expected = {
        f"orderstream/{file.relative_to(ROOT)}"
        for folder, pattern in (
            ("lua", "**/*.lua"),
            ("sql", "**/*.sql"),
            ("http", "static/*"),
            *((name, "**/*.py") for name in FOLDERS),
        )
        for file in (ROOT / folder).glob(pattern)
    }
    assert any(name.endswith(".lua") for name in expected)
    assert any(name.startswith("orderstream/sql/functions/") for name in expected)
    assert expected <= packed
    assert {"orderstream/__init__.py", "orderstream/py.typed"} <= packed
