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
from orderstream.http.stats import figures, found, pages, shelf, window
from orderstream.http.stats.owners import advertised_url
from orderstream.http.stats.pages import STATIC
from orderstream.settings import Settings, load

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "http" / "static"
PERSON = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
ORDER_ID = "6f1b2c1e-2f52-5d2b-9a55-5d0e5a0c9a11"
PATHS = (
    "/stats/",
    "/stats/products",
    "/stats/products/1",
    "/stats/orders",
    f"/stats/orders/{ORDER_ID}",
    "/stats/dead-letters",
    "/stats/reconcile",
)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load(local_dir=tmp_path, kafka="127.0.0.1:1", web_port=6066, _env_file=None)


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[TestClient]:  # type: ignore[type-arg]
    app = create_app(settings)
    async with TestClient(TestServer(app.web.web_app)) as client:
        yield client


@pytest.mark.parametrize("path", ["/stats/summary", "/stats/pipeline", "/ready"])
async def test_a_worker_that_has_not_joined_says_that_it_starts(client: TestClient, path: str) -> None:  # type: ignore[type-arg]
    answer = await client.get(path)
    assert (answer.status, answer.content_type) == (503, "application/problem+json")
    assert (answer.headers["Server"], int(answer.headers["Retry-After"]) > 0) == ("orderstream", True)
    assert (await answer.json())["type"] == "urn:orderstream:problem:starting"


@pytest.mark.parametrize("path", ["/stats/products/1", f"/stats/orders/{ORDER_ID}"])
async def test_while_no_worker_owns_a_key_the_answer_is_to_ask_again(client: TestClient, path: str) -> None:  # type: ignore[type-arg]
    answer = await client.get(path)
    assert answer.status == 503
    assert (await answer.json())["type"] == "urn:orderstream:problem:owner-unavailable"


@pytest.mark.parametrize("path", PATHS)
async def test_people_are_told_that_a_worker_starts_in_a_page_that_asks_again(client: TestClient, path: str) -> None:  # type: ignore[type-arg]
    answer = await client.get(path, headers=PERSON)
    text = await answer.text()
    assert (answer.status, answer.content_type) == (503, "text/html")
    assert answer.headers["Retry-After"]
    assert "This worker has not joined its group yet" in text
    assert '<meta http-equiv="refresh" content="5">' in text
    assert 'data-every="1000"' in text
    assert text.count('aria-current="page"') == 1


async def test_every_part_of_the_pages_is_there(client: TestClient) -> None:  # type: ignore[type-arg]
    answer = await client.get("/", headers=PERSON)
    assert answer.url.path == "/stats/"
    named = set(re.findall(r'(?:src|href)="/stats/static/([^"]+)"', await answer.text()))
    assert named == STATIC.keys() - {"uplot.LICENSE.txt"}
    for name, kind in STATIC.items():
        part = f"/stats/static/{name}"
        got = await client.get(part)
        assert (got.status, got.content_type) == (200, kind)
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


async def test_a_worker_that_has_not_joined_lives(client: TestClient) -> None:  # type: ignore[type-arg]
    answer = await client.get("/health")
    assert (answer.status, await answer.json()) == (200, {"status": "ok"})


async def test_head_answers_as_get_does_without_a_body(client: TestClient) -> None:  # type: ignore[type-arg]
    for path in ("/stats/", "/stats/static/stats.js", "/stats/summary"):
        get, head = await client.get(path), await client.head(path)
        assert (head.status, head.content_type) == (get.status, get.content_type)
        assert await head.read() == b""


async def test_errors_are_problem_documents(client: TestClient) -> None:  # type: ignore[type-arg]
    for method, path, status, name in (
        ("GET", "/nowhere", 404, "not-found"),
        ("GET", "/stats/static/..%2f..%2fproblems.py", 404, "not-found"),
        ("POST", "/stats/summary", 405, "method-not-allowed"),
        ("GET", "/stats/orders/17", 400, "invalid-order-id"),
        ("GET", "/stats/summary?since=soon", 400, "invalid-request"),
        ("GET", "/stats/summary?since=nan", 400, "invalid-request"),
    ):
        answer = await client.request(method, path)
        body = await answer.json(content_type="application/problem+json")
        assert (answer.status, body["type"]) == (status, f"urn:orderstream:problem:{name}"), path


def test_no_file_of_the_page_names_another_host_or_carries_markup_that_runs() -> None:
    for name in ("stats.css", "stats.js", "uplot.min.css"):
        assert not re.findall(r"https?://", (FOLDER / name).read_text()), name
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", (FOLDER / "stats.js").read_text()
    )


def test_the_chart_library_is_whole_licensed_and_the_page_small() -> None:
    assert {file.name for file in FOLDER.iterdir()} == STATIC.keys()
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
    spelled = {5: "five", 10: "ten"}
    for sentence in (
        f"http://{settings.web_host}:{load(_env_file=None).web_port}/stats/",
        f"means of the last {spelled[figures.MEAN_ROWS]} seconds",
        f"that ended in the last {window.WINDOW_S:g} s (in the chart: {window.RECENT_S:g} s)",
        f"the rows of the last {spelled[int(window.ROWS_MAX * window.INTERVAL_S / 60)]} minutes",
        f"about {sample.SAMPLE_PER_S} orders a second",
        f"which follows {sample.FOLLOWED_MAX:,} at most",
        f"the {figures.STOCK_ROWS_MAX} with the most movements",
        f"every {spelled[int(figures.ENGINES_S)]} seconds: whether it answers",
        f"and every {spelled[int(shelf.NOTE_S)]} seconds while nobody does",
        f"held or sold, in the last {spelled[int(shelf.KEEP_S / 60)]} minutes",
        f"among the {found.LOOKED_MAX:,} orders that came last",
        f"more than {pages.LEFT_ROWS_MAX:,} rows",
    ):
        assert sentence in text
