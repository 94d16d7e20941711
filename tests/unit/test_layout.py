"""The import package of links, and what keeps it from shadowing anybody's modules (docs/ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "orderstream"
FOLDERS = ("agents", "bench", "http", "lua", "sql", "streams", "tables")


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
    told = subprocess.run(
        [sys.executable, "-c", f"import {module} as m; print(m.__file__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert not Path(told.strip()).is_relative_to(ROOT / "http")


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
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
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
    assert any(name.startswith("orderstream/sql/migrations/") for name in expected)
    assert expected <= packed
    assert {"orderstream/__init__.py", "orderstream/py.typed"} <= packed
