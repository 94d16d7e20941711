"""A worker's pages before it has joined its group, and what they are made of: no engine is needed for that."""

from __future__ import annotations

import gzip
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from orderstream import sample
from orderstream.agents.app import create_app
from orderstream.http.stats import figures, window
from orderstream.http.stats.owners import advertised_url
from orderstream.http.stats.pages import PAGE, STATIC
from orderstream.settings import Settings, load

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "http" / "static"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load(local_dir=tmp_path, kafka="127.0.0.1:1", web_port=6066, _env_file=None)


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[TestClient]:  # type: ignore[type-arg]
    app = create_app(settings)
    async with TestClient(TestServer(app.web.web_app)) as client:
        yield client


@pytest.mark.parametrize("path", ["/stats/summary", "/stats/partitions"])
async def test_a_worker_that_has_not_joined_says_that_it_starts(client: TestClient, path: str) -> None:  # type: ignore[type-arg]
    answer = await client.get(path)
    assert (answer.status, answer.content_type) == (503, "application/problem+json")
    assert answer.headers["Retry-After"]
    assert (await answer.json())["type"] == "urn:orderstream:problem:starting"


@pytest.mark.parametrize("path", ["/stats/products/1", "/stats/orders/6f1b2c1e-2f52-5d2b-9a55-5d0e5a0c9a11"])
async def test_while_no_worker_owns_a_key_the_answer_is_to_ask_again(client: TestClient, path: str) -> None:  # type: ignore[type-arg]
    answer = await client.get(path)
    assert answer.status == 503
    assert (await answer.json())["type"] == "urn:orderstream:problem:owner-unavailable"


async def test_the_page_is_there_at_once_and_every_part_of_it(client: TestClient) -> None:  # type: ignore[type-arg]
    answer = await client.get("/")
    assert (answer.status, answer.url.path, answer.content_type) == (200, "/stats/", "text/html")
    text = await answer.text()
    parts = set(re.findall(r'(?:src|href)="(/stats/static/[^"]+)"', text))
    assert {f"/stats/static/{name}" for name in STATIC} == parts
    for part in parts:
        got = await client.get(part)
        assert (got.status, got.content_type) == (200, STATIC[part.rpartition("/")[2]])
        again = await client.get(part, headers={"If-None-Match": got.headers["ETag"]})
        assert again.status == 304


@pytest.mark.parametrize("path", ["/stats/", "/stats/static/uplot.min.js", "/stats/summary", "/nowhere", "/metrics"])
async def test_every_answer_forbids_foreign_hosts_frames_and_guesses(client: TestClient, path: str) -> None:  # type: ignore[type-arg]
    for method in ("GET", "HEAD"):
        answer = await client.request(method, path)
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in policy
        assert not re.search(r"unsafe|https?:|\*|data:", policy)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_head_answers_as_get_does_without_a_body(client: TestClient) -> None:  # type: ignore[type-arg]
    for path in ("/stats/", "/stats/static/stats.js", "/stats/summary"):
        get, head = await client.get(path), await client.head(path)
        assert (head.status, head.content_type) == (get.status, get.content_type)
        assert await head.read() == b""


async def test_errors_are_problem_documents(client: TestClient) -> None:  # type: ignore[type-arg]
    for method, path, status, name in (
        ("GET", "/nowhere", 404, "not-found"),
        ("GET", "/stats/static/..%2f..%2fproblems.py", 404, "not-found"),
        ("GET", "/stats/static/stats.html", 404, "not-found"),
        ("POST", "/stats/summary", 405, "method-not-allowed"),
        ("GET", "/stats/orders/17", 400, "invalid-order-id"),
        ("GET", "/stats/summary?since=soon", 400, "invalid-request"),
        ("GET", "/stats/summary?since=nan", 400, "invalid-request"),
    ):
        answer = await client.request(method, path)
        body = await answer.json(content_type="application/problem+json")
        assert (answer.status, body["type"]) == (status, f"urn:orderstream:problem:{name}"), path


def test_no_file_of_the_page_names_another_host_or_carries_markup_that_runs() -> None:
    for name in (PAGE, "stats.css", "stats.js", "uplot.min.css"):
        text = (FOLDER / name).read_text()
        hosts = set(re.findall(r"https?://([\w.-]+)", text)) - {"www.w3.org"}  # the name of SVG's namespace
        assert not hosts, name
    page = (FOLDER / PAGE).read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", page)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", (FOLDER / "stats.js").read_text()
    )


def test_the_chart_library_is_whole_licensed_and_the_page_small() -> None:
    assert {file.name for file in FOLDER.iterdir()} == {PAGE, *STATIC}
    assert b"uPlot (v1.6.32)" in (FOLDER / "uplot.min.js").read_bytes()[:100]
    assert "MIT" in (FOLDER / "uplot.LICENSE.txt").read_text()
    assert sum(len(gzip.compress(file.read_bytes())) for file in FOLDER.iterdir()) < 50_000


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({}, "http://127.0.0.1:6066"),
        ({"web_host": "::1"}, "http://[::1]:6066"),
        ({"web_host": "0.0.0.0"}, "http://box:6066"),
        ({"web_host": "0.0.0.0", "web_url": "http://worker-7.example:80"}, "http://worker-7.example"),
    ],
)
def test_a_worker_goes_by_a_url_that_is_its_own(
    given: dict[str, str], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    settings = load(local_dir=tmp_path, web_port=6066, _env_file=None, **given)
    assert str(advertised_url(settings)).rstrip("/") == url


def test_the_pages_are_on_loopback_by_default(settings: Settings) -> None:
    assert settings.web_host == "127.0.0.1"


def test_the_docs_have_the_numbers_of_the_code(settings: Settings) -> None:
    text = " ".join((ROOT / "docs" / "STATS.md").read_text().split())
    spelled = {5: "five"}
    for sentence in (
        f"http://{settings.web_host}:{load(_env_file=None).web_port}/stats/",
        f"means of the last {spelled[figures.MEAN_ROWS]} seconds",
        f"that ended in the last {window.WINDOW_S:g} s (in the chart: {window.RECENT_S:g} s)",
        f"the rows of the last {spelled[int(window.ROWS_MAX * window.INTERVAL_S / 60)]} minutes",
        f"about {sample.SAMPLE_PER_S} orders a second",
        f"which follows {sample.FOLLOWED_MAX:,} at most",
        f"the {figures.STOCK_ROWS_MAX} with the most movements",
        f"asked every {spelled[int(figures.ENGINES_S)]} seconds",
    ):
        assert sentence in text
