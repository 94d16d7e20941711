"""What the docs list is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

from orderstream import settings

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_table_of_settings_is_current() -> None:
    text = (DOCS / "SETTINGS.md").read_text()
    between = re.search(r"<!-- begin: [^>]* -->\n(.*)\n<!-- end -->", text, re.DOTALL)
    assert between is not None
    assert between[1] == settings.document(), "put what orderstream.settings.document() says into docs/SETTINGS.md"
    assert len(between[1].splitlines()) == len(settings.Settings.model_fields) + 2


def test_every_setting_that_the_docs_name_exists() -> None:
    for file in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        for name in re.findall(rf"\b{settings.PREFIX}([A-Z_]*[A-Z])\b", file.read_text()):
            assert name.lower() in settings.Settings.model_fields, f"{file.name}: {settings.PREFIX}{name}"


def test_every_file_that_the_docs_link_to_exists() -> None:
    for file in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name}: {target}"
