"""A real browser for the tests of pages: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import BrowserContext, Page, async_playwright

from tests.conftest import find_program

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PACKAGES = (("chromium",), ("fonts-dejavu-core",))


def find_chromium() -> Path:
    """Return where Chromium is; installs it on a Debian machine as root, else skips the test."""
    return find_program("chromium", PACKAGES)


class Visit:
    """A page in a browser, and what went wrong in it.

    Attributes:
        page: Playwright's.
        faults: what its console called an error, and uncaught exceptions.
        hosts: of everything that it fetched.
    """

    def __init__(self, context: BrowserContext, page: Page) -> None:
        self.context, self.page = context, page
        self.faults: list[str] = []
        self.hosts: set[str] = set()
        page.on("console", lambda line: self.faults.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))

    async def number(self, selector: str) -> float:
        """Return the first number of an element's text; thousands are set apart by commas."""
        text = (await self.page.locator(selector).first.inner_text()).split()[0].replace(",", "")
        return float(text) if text[0].isdigit() else 0.0

    async def overflow(self) -> int:
        """Return by how many pixels the page is wider than its window."""
        wider: int = await self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        return wider


@asynccontextmanager
async def visit(chromium: Path, profile: Path, **options: Any) -> AsyncIterator[Visit]:
    """Open a browser with a profile of its own and an empty page.

    Args:
        chromium: the program.
        profile: a folder that does not exist yet.
        options: Playwright's for a context, like ``viewport`` and ``color_scheme``.
    """
    async with async_playwright() as playwright:
        context = await playwright.chromium.launch_persistent_context(
            str(profile), executable_path=str(chromium), headless=True, args=list(FLAGS), **options
        )
        try:
            yield Visit(context, context.pages[0])
        finally:
            await context.close()
