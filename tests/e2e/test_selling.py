"""The pipeline as a whole, on real engines with real worker processes: what is sold, what is refused, what is given back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import orjson
import pytest

from orderstream.agents.commit import ITEMS_MAX
from orderstream.agents.desk import AHEAD_MAX
from orderstream.settings import ORDER_UNITS_MAX
from orderstream.streams.commands import ON_HAND_MAX, PRICE_CENTS_MAX
from orderstream.streams.orders import order_id_for_key
from orderstream.streams.partitions import product_partition
from orderstream.streams.topics import ORDER_EVENTS, ORDER_LINES, RESERVATIONS
from tests.harness import Pipeline

pytestmark = pytest.mark.engines
Make = Callable[..., Pipeline]


async def test_a_flash_sale_sells_each_unit_once_and_refuses_the_others(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"hot": 1_000})
    ids = await shop.produce(shop.order(("hot", 1)) for _ in range(10_000))
    assert await shop.finished(ids) == {"CONFIRMED": 1_000, "CANCELLED insufficient_stock": 9_000}
    assert await shop.has_counts("hot", 0, 0, 1_000)
    assert await shop.records(ORDER_LINES.name) == await shop.records(RESERVATIONS.name) == [], "all of it is at home"
    assert await shop.violations() == []


async def test_declined_payments_give_their_units_back(pipeline: Make) -> None:
    shop = pipeline(payment_success_rate=0.7)
    await shop.start({"hot": 1_000})
    ids = await shop.produce(shop.order(("hot", 1)) for _ in range(10_000))
    outcome = await shop.finished(ids)
    assert outcome["CANCELLED payment_declined"] > 0
    assert await shop.has_counts("hot", 1_000 - outcome["CONFIRMED"], 0, outcome["CONFIRMED"])
    assert await shop.violations() == []


async def test_an_order_is_sold_whole_at_the_catalogues_prices_or_not_at_all(pipeline: Make) -> None:
    shop = pipeline()
    products = {f"p{n}": 100 for n in range(20)}
    await shop.start({"much": 1_000, "other": 10, "third": 7, "few": 10, **products})
    refused = [
        shop.order(("much", 5_000), ("other", 1)),
        shop.order(("other", 1), ("much", 1_001), ("third", 2)),
        shop.order(("few", 6), ("few", 5)),  # lines of the same product are added up before anything is decided
        shop.order(("few", 6), ("other", 1), ("few", 5)),
    ]
    unknown = [shop.order(("no-such-thing", 1)), shop.order(("other", 1), ("no-such-thing", 1))]
    sold = [shop.order(("few", 4), ("few", 6)), shop.order(*((product_id, 2) for product_id in products))]
    ids = await shop.produce([*refused, *unknown, *sold])
    assert await shop.finished(ids[:4]) == {"CANCELLED insufficient_stock": 4}
    assert await shop.finished(ids[4:6]) == {"CANCELLED unknown_product": 2}
    assert await shop.finished(ids[6:]) == {"CONFIRMED": 2}
    for product_id, units in (("much", 1_000), ("other", 10), ("third", 7)):
        assert await shop.has_counts(product_id, units, 0, 0)
    assert await shop.has_counts("few", 0, 0, 10)
    order = await (await shop.store()).order(ids[-1])
    assert order is not None
    assert order["total_cents"] == 20 * 2 * 100
    assert {line["state"] for line in order["lines"]} == {"committed"}
    assert (order["payment_status"], order["amount_cents"]) == ("SUCCESS", 4_000)
    assert (await shop.published(ids[-1:]))[ids[-1]] == ["CREATED", "RESERVED", "PAID", "CONFIRMED"]
    assert await shop.violations() == []


async def test_a_record_a_key_or_a_place_names_one_order(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"thrice": 10, "one": 10, "two": 10, "taken": 10, "nameless": 10})

    async def behind_them_all(*products: str) -> None:
        await shop.finished(await shop.produce(shop.order((product_id, 1)) for product_id in products))

    orders = [shop.order(("thrice", 1)), shop.order(("thrice", 1), ("two", 2))]
    for _ in range(3):
        await shop.finished(await shop.produce(orders))
    await behind_them_all("thrice")
    assert await shop.has_counts("thrice", 7, 0, 3)
    assert await shop.has_counts("two", 8, 0, 2)
    assert await shop.charges() == (3, 3)

    first = {k: v for k, v in shop.order(("one", 1), idempotency_key="k-1").items() if k != "order_id"}
    await shop.produce([first, first, {**first, "user_id": "user-2"}])
    mine, theirs = order_id_for_key("user-1", "k-1"), order_id_for_key("user-2", "k-1")
    assert await shop.finished([mine, theirs]) == {"CONFIRMED": 2}
    # Another order under the same key is refused.
    other = {**first, "items": [{"product_id": "one", "quantity": 2}]}
    elsewhere = {**first, "items": [{"product_id": "two", "quantity": 1}]}
    await shop.produce([other, elsewhere])
    await behind_them_all("one", "two")
    assert [letter["reason"] for letter in await shop.dead_letters()] == ["order_id_reused"] * 2
    assert await shop.has_counts("one", 7, 0, 3)
    assert await shop.has_counts("two", 7, 0, 3)

    # Nobody takes the id of a key before its user does.
    id_of_key = order_id_for_key("user-1", "k-2")
    taken = shop.order(("taken", 1), user_id="user-2", order_id=id_of_key)
    await shop.produce([taken, taken | {"idempotency_key": "k-2"}])
    await shop.produce([{**shop.order(("taken", 2), idempotency_key="k-2"), "order_id": id_of_key}])
    assert await shop.finished([id_of_key]) == {"CONFIRMED": 1}
    reasons = sorted(letter["reason"] for letter in await shop.dead_letters())
    assert reasons == ["invalid_order"] * 2 + ["order_id_reused"] * 2
    assert await shop.has_counts("taken", 8, 0, 2)

    # Without id and key an order is named by where it stands.
    nameless = {k: v for k, v in shop.order(("nameless", 1)).items() if k != "order_id"}
    await shop.produce([nameless, nameless])
    await behind_them_all("nameless")
    assert await shop.has_counts("nameless", 7, 0, 3)
    assert await shop.violations() == []


async def test_the_largest_order_at_the_greatest_price_is_sold(pipeline: Make) -> None:
    shop = pipeline(order_lines_max=9, line_quantity_max=ORDER_UNITS_MAX // 9)
    await shop.start({})
    store, ids = await shop.store(), [f"p{n}" for n in range(9)]
    products = [(product_id, product_id, PRICE_CENTS_MAX, ON_HAND_MAX) for product_id in ids]
    await store.load_catalogue(products, shop.settings.partitions)
    largest = shop.order(*((product_id, shop.settings.line_quantity_max) for product_id in ids))
    alone = shop.order(("p0", shop.settings.line_quantity_max))
    sent = await shop.produce([largest, alone, shop.order(("p0", shop.settings.line_quantity_max + 1))])
    assert await shop.finished(sent[:2]) == {"CONFIRMED": 2}
    rows = await store.pool.fetch("SELECT total_cents FROM orders ORDER BY 1")
    assert [row["total_cents"] for row in rows] == [10**18, 9 * 10**18]
    assert [letter["reason"] for letter in await shop.dead_letters()] == ["invalid_order"]
    assert await shop.has_counts("p0", ON_HAND_MAX - 2_000_000, 0, 2_000_000)
    assert await shop.violations() == []


async def test_no_more_orders_are_taken_in_than_commit_can_follow(pipeline: Make) -> None:
    shop = pipeline(batch_records_max=1_000)
    await shop.start({"hot": 50_000})
    await shop.finished(await shop.produce([shop.order(("hot", 1))]))  # the lanes are claimed
    pool = (await shop.store()).pool
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT FROM lanes WHERE lane = 'settle' FOR UPDATE")
        ids = await shop.produce(shop.order(("hot", 1)) for _ in range(30_000))
        taken_in = before = -1
        while taken_in > before or taken_in < AHEAD_MAX:
            await asyncio.sleep(1)
            before, taken_in = taken_in, await pool.fetchval("SELECT count(*) FROM orders")
        # those that commit has in its hands, and reserve in its steps, may be more
        assert taken_in <= AHEAD_MAX + ITEMS_MAX + 4 * shop.settings.batch_records_max
    assert await shop.finished(ids) == {"CONFIRMED": 30_000}
    assert await shop.violations() == []


async def test_what_is_no_order_is_a_dead_letter_and_the_stream_goes_on(pipeline: Make) -> None:
    shop = pipeline()
    await shop.start({"1": 10})
    good = shop.order(("1", 1))
    bad = [
        b"this is no JSON",
        orjson.dumps({**good, "colour": "red"}),
        orjson.dumps({**good, "user_id": "u" * 100 * 1024}),
        orjson.dumps(shop.order(("1", 0))),
        b"",
        None,
    ]
    for value in bad:
        await shop.produce_raw(value)
    assert await shop.finished(await shop.produce([shop.order(("1", 1))])) == {"CONFIRMED": 1}
    letters = await shop.dead_letters()
    assert [letter["reason"] for letter in letters] == [
        "not_json",
        "invalid_order",
        "too_large",
        "invalid_order",
        "empty",
        "empty",
    ]
    assert [letter["value"] for letter in letters] == bad
    assert [int(letter["source-offset"]) for letter in letters] == list(range(6))
    assert {letter["source-topic"] for letter in letters} == {shop.settings.topic("orders")}
    assert await shop.has_counts("1", 9, 0, 1)


async def test_holds_expire_and_their_units_can_be_had_again(pipeline: Make) -> None:
    shop = pipeline(hold_ttl_s=2.0, payment_latency_min_s=30.0, payment_latency_max_s=30.0)
    await shop.start({"one": 5, "two": 5})
    ids = await shop.produce([shop.order(("one", 5)), shop.order(("two", 1), ("one", 0 + 1))])
    late = await shop.finished(ids)
    assert late == Counter({"CANCELLED expired": 1, "CANCELLED insufficient_stock": 1})
    assert await shop.has_counts("one", 5, 0, 0)
    assert await shop.has_counts("two", 5, 0, 0)
    assert await shop.violations() == []


async def test_other_workers_lines_are_asked_for_in_lists_within_their_bound(pipeline: Make) -> None:
    shop = pipeline(handoff_outcomes_max=50, partitions=2)
    await shop.start({f"p{n}": 10_000 for n in range(10)}, workers=2)
    ours, theirs = ([f"p{n}" for n in range(10) if product_partition(f"p{n}", 2) == partition] for partition in (0, 1))
    ids = await shop.produce(shop.order((ours[0], 1), (theirs[0], 1)) for _ in range(3_000))
    assert await shop.finished(ids) == {"CONFIRMED": 3_000}
    for topic in (ORDER_LINES, RESERVATIONS):
        rows = [len(orjson.loads(record.value)["rows"]) for record in await shop.records(topic.name)]
        assert sum(rows) >= 2 * 3_000  # held, committed
        assert max(rows) <= 50
        assert len(rows) < sum(rows) / 2
    assert len(await shop.records(ORDER_EVENTS.name)) == 4 * 3_000
