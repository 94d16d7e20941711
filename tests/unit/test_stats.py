"""What a worker's pages say, without engines: when products sell out, many workers as one, why an order was refused."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderstream.http.stats.catalogue import catalogue, wanted_of
from orderstream.http.stats.fleet import added_up, merged
from orderstream.http.stats.found import place_of, why
from orderstream.http.stats.fresh import Fresh
from orderstream.http.stats.html import link, markup, money, share, tag
from orderstream.http.stats.shelf import KEEP_S, LEAST_S, ORDERS, SHOWN, Pace, Product, select, totals
from orderstream.http.stats.troubles import SHOWN_BYTES, pretty, shown

# id, name, price; available, reserved, sold; revenue, limit, rate
A_LAMP = Product("L1", "Red lamp", 500, 60, 4, 36, 18_000, None, 0.5)
A_CUP = Product("C1", "Blue cup", 250, 0, 0, 50, 12_500, 2, 1.0)
A_BOX = Product("B1", "Box, red", 900, 10, 0, 0, 0, None, 0.0)
ALL = [A_CUP, A_LAMP, A_BOX]


def text_of(parts: Any) -> str:
    """Return what a reader reads of markup."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", markup(parts))).split())


@given(st.text(), st.text())
def test_no_text_becomes_markup(inside: str, attribute: str) -> None:
    made = tag("p", inside, [inside], title=attribute)
    body = made.removeprefix("<p").removesuffix("</p>")
    assert body.count("<") == body.count(">") - 1 == 0
    assert made.count('"') == 2
    assert link("", "/p", inside).split('"')[1].count("/") == 2


def test_a_link_leads_to_the_product_whatever_its_id() -> None:
    assert link("it", "/stats/products", "a/b ?&#%") == '<a href="/stats/products/a%2Fb%20%3F%26%23%25">it</a>'


def test_amounts_and_shares_are_as_people_write_them() -> None:
    assert [money(n) for n in (None, 0, 5, 123_456_789, -250)] == [
        "\N{EN DASH}",
        "0.00",
        "0.05",
        "1,234,567.89",
        "-2.50",
    ]
    assert [share(n, 100_000) for n in (0, 1, 99_999, 100_000)] == ["0.0 %", "<0.1 %", "99.9 %", "100 %"]


def test_a_product_is_sold_out_when_its_units_are_at_the_rate_of_the_last_minutes() -> None:
    assert A_LAMP.lasts_s == 120
    assert A_LAMP.running_out
    assert (A_CUP.lasts_s, A_CUP.running_out, A_CUP.sold_out) == (0, False, True)
    assert A_BOX.lasts_s is None
    assert A_LAMP.sell_through == 0.36
    assert totals(ALL) == (3, 1, 1, 70, 4, 86, 30_500)


def test_a_rate_is_that_of_the_last_minutes_and_not_known_before_some_seconds() -> None:
    pace = Pace()
    assert pace.rate("a", 0, 5) is None
    for at in range(0, 900, 10):
        pace.note(float(at), {"a": at, "b": 1_000 - at} if at < 600 else {"a": 600, "new": at})
    assert pace.rate("a", 890, 600) == pytest.approx(10 / KEEP_S)  # what went 290 s ago, and before
    assert pace.rate("b", 590 + LEAST_S, 0) == 0, "units that came back are no sales"
    assert pace.rate("new", 890, 890) == pytest.approx(1.0)
    assert pace.rate("unknown", 890, 5) is None
    assert Pace().rate("a", 0, 0) is None


def test_products_are_found_by_every_word_of_name_or_id_and_sorted() -> None:
    def ids(text: str = "", show: str = "all", by: str = "sold", *, descending: bool = True) -> str:
        return " ".join(one.product_id for one in select(ALL, text, show, by, descending=descending))

    assert ids("RED") == "L1 B1"
    assert ids("red b1") == "B1"
    assert ids("no such") == ""
    assert {show: ids(show=show) for show in SHOWN} == {"all": "C1 L1 B1", "soon": "L1", "out": "C1", "unsold": "B1"}
    assert ids(by="lasts", descending=False) == "L1 C1 B1", "what is sold out stands behind what will be"
    assert ids(by="name", descending=False) == "C1 B1 L1"
    assert {ids(by=by) for by in ORDERS if by != "lasts"} >= {"C1 L1 B1", "B1 L1 C1", "L1 C1 B1"}


def test_sold_out_looks_sold_out_and_a_thousand_products_have_pages() -> None:
    many = [A_LAMP._replace(product_id=str(n), name=f"<b>{n}", sold=n) for n in range(1_000)]
    made = markup(catalogue([A_CUP, *many], totals([A_CUP, *many]), wanted_of({"sort": "sold", "page": "20"})))
    assert made.count("<tr") == 51
    assert "951 to 1,000 of 1,001" in text_of(made)
    assert '<a href="/stats/products?sort=sold&amp;page=21">Next</a>' in made
    assert "<b>9" not in made
    (row,) = re.findall(r'<tr class="gone">.*?</tr>', markup(catalogue(ALL, totals(ALL), wanted_of({}))))
    assert "Blue cup" in row
    assert 'class="badge out">sold out<' in row


@given(st.dictionaries(st.sampled_from(["q", "show", "sort", "dir", "page", "before"]), st.text()))
def test_whatever_is_asked_for_is_a_list(asked: dict[str, str]) -> None:
    wanted = wanted_of(asked)
    assert catalogue(ALL, totals(ALL), wanted)
    assert wanted_of(wanted.link(page=wanted.page).query) == wanted
    assert place_of(asked) is None


def test_of_many_workers_rates_are_added_and_the_slowest_one_stands_for_times() -> None:
    columns = ("at", "created", "p95", "busy_pay")
    one = [(10.2, 5.0, 0.1, 0.5), (11.2, 6.0, None, 0.5), (12.2, 7.0, 0.3, 0.5)]
    two = [(10.9, 1.0, 0.4, 0.9), (11.9, None, 0.2, 0.1), (13.0, 9.0, 9.0, 1.0)]
    assert merged(columns, [one, two], 9, 12) == [[10, 6, 0.4, 0.9], [11, 6, 0.2, 0.5], [12, 7, 0.3, 0.5]]
    assert merged(columns, [one, two], 11, 12) == [[12, 7, 0.3, 0.5]]


def test_the_pipeline_is_all_of_its_workers_and_one_that_does_not_answer_is_told() -> None:
    def summary(orders: int, p95: float | None, url: str) -> dict[str, Any]:
        stage = {"records": 10, "batches": 2, "records_per_s": 5.0, "busy": orders / 100}
        return {
            "version": "1",
            "state": "running",
            "now": 9.0,
            "started_at": 1.0,
            "orders": {
                "created": orders,
                "reserved": 1,
                "paid": 1,
                "confirmed": 1,
                "revoked": 1,
                "cancelled": {"expired": 2},
            },
            "rates": {"created": 1.5},
            "time_to_end": {"window_s": 60, "sampled": 3, "p50": p95, "p95": p95, "p99": None},
            "stages": dict.fromkeys(("reserve", "pay", "commit"), stage),
            "open": {"CREATED": 1},
            "charges_in_flight": 2,
            "dead_letters": {"not_json": 1},
            "sent_on": 0,
            "lag": 7,
            "engines": {},
            "unavailable": ["redis"] if orders == 30 else [],
            "partitions": [{"topic": "orders", "partition": orders // 10, "owner": url, "lag": 7}],
        }

    first, other = summary(10, 0.2, "a"), summary(30, 0.9, "b")
    found = added_up("a", first, {"a": first, "b": other, "c": None}, {("orders", 0): "c"}, 4)
    assert found["orders"] == {
        "created": 40,
        "reserved": 2,
        "paid": 2,
        "confirmed": 2,
        "revoked": 2,
        "cancelled": {"expired": 4},
    }
    assert found["time_to_end"] == {"window_s": 60, "sampled": 6, "p50": 0.9, "p95": 0.9, "p99": None}
    assert found["stages"]["pay"] == {"records": 20, "batches": 4, "records_per_s": 10, "busy": 0.3}
    assert (found["lag"], found["rates"], found["unavailable"]) == (14, {"created": 3}, ["redis"])
    assert [(one["url"], one["answers"], one["partitions"]) for one in found["workers"]] == [
        ("a", True, 1),
        ("b", True, 1),
        ("c", False, 1),
    ]
    assert len(found["partitions"]) == 20


async def test_many_who_ask_at_once_have_it_made_once() -> None:
    made, now = [], 0.0

    async def make() -> int:
        made.append(now)
        await asyncio.sleep(0)
        if now == 1:
            raise OSError("away")
        return len(made)

    fresh = Fresh(make, 1.0, lambda: now)
    assert await asyncio.gather(*(fresh.get() for _ in range(50))) == [1] * 50
    now = 1.0
    for _ in range(2):
        with pytest.raises(OSError, match="away"):
            await fresh.get()
    now = 2.0
    assert await fresh.get() == 3


def refused(reason: str, **more: Any) -> dict[str, Any]:
    line = {"product_id": "L1", "quantity": 5, "reason": reason if reason in LINES else None}
    return {"lines": [line], "reason": reason, "total_cents": 1_000, "paid_at": None, **more}


LINES = ("insufficient_stock", "unknown_product", "user_limit")


@pytest.mark.parametrize(
    ("order", "left", "said"),
    [
        (refused("insufficient_stock"), 3, "It wanted 5 of Red lamp ; 3 were left."),
        (refused("insufficient_stock"), 1, "It wanted 5 of Red lamp ; 1 was left."),
        (refused("insufficient_stock"), 0, "It wanted 5 of Red lamp ; none was left."),
        (refused("insufficient_stock"), None, "It wanted 5 of Red lamp ; there were fewer."),
        (refused("insufficient_stock"), 6, "It wanted 5 of Red lamp ; there were fewer at that moment."),
        (refused("unknown_product"), None, "There was no product L1 in the catalogue."),
        (refused("user_limit"), None, "With 5 of Red lamp its customer would have had more than one may, 2 today."),
        (refused("payment_declined"), None, "The provider declined the charge of 10.00."),
        (refused("expired"), None, "Its hold's time was over before it was charged."),
        (refused("cancelled_by_user"), None, "It was cancelled before it was paid."),
        (
            refused("cancelled_by_user", paid_at=datetime(2026, 1, 1, tzinfo=UTC)),
            None,
            "It was cancelled after it was paid: what was sold came back.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refused_order_says_why(order: dict[str, Any], left: int | None, said: str) -> None:
    assert text_of(why(order, {"L1": "Red lamp"}, {"L1": left}, {"L1": 2})) == said


def test_what_strangers_sent_can_be_read_and_does_no_harm() -> None:
    assert pretty(b'{"a":[1]}') == '{\n  "a": [\n    1\n  ]\n}'
    assert shown("a\u202eb\x1b[31m\n".encode() + b"\xff") == "a\\u202eb\\x1b[31m\n\\xff"
    assert pretty(b"x" * (SHOWN_BYTES + 1)).endswith("x …")
    assert len(pretty(b"[" * 1_000_000)) == SHOWN_BYTES + 2


def luminance(colour: str) -> float:
    """Return how bright a colour is: WCAG 2.2, relative luminance."""
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_ink_can_be_read_on_every_ground(scheme: int) -> None:
    text = (Path(__file__).resolve().parents[2] / "http" / "static" / "stats.css").read_text()
    colours = dict(re.findall(r"^  --(\w+): light-dark\((#\w+, #\w+)\);", text, re.MULTILINE))
    shade = {name: luminance(pair.split(", ")[scheme]) for name, pair in colours.items()}
    assert len(shade) == 13
    low = {}
    for ink in ("text", "dim", "blue", "green", "amber", "red", "violet"):
        for ground in ("page", "card", "gone"):
            light, dark = sorted((shade[ink], shade[ground]), reverse=True)
            ratio = (light + 0.05) / (dark + 0.05)
            if ratio < 4.5:
                low[ink, ground] = round(ratio, 2)
    assert low == {}
