"""The gate, on a real Redis with a real Postgres behind it: no unit is given twice, and what it loses it learns again."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import asyncpg
import orjson
import pytest
from aiokafka.structs import ConsumerRecord
from faust.types import TP
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

from orderstream.access import ask_at_once, redis_client
from orderstream.agents.batches import Batch
from orderstream.agents.desk import Desk
from orderstream.agents.reserve import reserve
from orderstream.agents.stage import Stage
from orderstream.engines.local import LocalEngines
from orderstream.engines.probes import create_database, drop_database
from orderstream.jobs.init import create_topics
from orderstream.lua.gate import (
    UNAVAILABLE_PAUSE_S,
    Counts,
    Gate,
    GateVerdict,
    Ground,
    Loaded,
    NotEntered,
    PrefixTaken,
)
from orderstream.settings import Settings
from orderstream.sql.prepare import prepare
from orderstream.sql.store import Store
from orderstream.streams.producer import Producer
from orderstream.streams.topics import ORDERS
from orderstream.streams.upstream.app import App
from orderstream.streams.upstream.consumer import Chunk
from orderstream.tables.views import Views
from tests.conftest import MakeSettings
from tests.integration.assigned import assigned, to_its_end
from tests.integration.tables import Move, Worker, new

pytestmark = pytest.mark.engines

TAKEN, REFUSED, UNDECIDED = GateVerdict.TAKEN, GateVerdict.REFUSED, GateVerdict.UNDECIDED
PIECE = 1_000  # lua/includes/epoch.lua cuts long lists at this many values


def order(n: int) -> str:
    return str(uuid.UUID(int=n))


class GateCounts(NamedTuple):
    """What Redis has of a product, valid or not."""

    on_hand: int
    reserved: int
    taken: int
    version: int


class Shop:
    """A database with products, and gates in front of it."""

    def __init__(self, store: Store, redis_url: str, prefix: str) -> None:
        self.store = store
        self.worker = Worker(store.pool)
        self.url, self.prefix = redis_url, prefix
        self.gates: list[Gate] = []
        self.gate = self.another_gate()
        self.loads = 0

    def another_gate(self) -> Gate:
        """Return a gate as another process has it: it knows nothing yet."""

        async def load(product_ids: Sequence[str], loaded: Loaded) -> None:
            self.loads += 1
            await self.store.load_gate(product_ids, loaded)

        self.gates.append(Gate(self.url, self.prefix, load, self.store.enter_gate, timeout_s=5.0))
        return self.gates[-1]

    async def stock(self, **units: int) -> None:
        await self.store.load_catalogue([(product_id, product_id, 100, n) for product_id, n in units.items()], 1)
        await self.worker.claim(0)

    def claim_of(self, product_id: str) -> int:
        return self.worker.intake.claims[0]

    async def take(
        self, *lines: tuple[str, int, int], gate: Gate | None = None, claim: int | None = None
    ) -> list[GateVerdict]:
        """Take, each line (product id, order number, units), from a gate that answers; by default as the owner."""
        claim_of = self.claim_of if claim is None else lambda product_id: claim
        verdicts, unavailable = await (gate or self.gate).take(
            [(product_id, order(n), units) for product_id, n, units in lines], claim_of=claim_of
        )
        assert not unavailable
        return verdicts

    async def hold(self, *lines: tuple[str, int, int]) -> Mapping[str, Counts]:
        """Hold lines in Postgres, as reserve does; return its counts."""
        return (await self.worker.hold(*(new(n, (product_id, units)) for product_id, n, units in lines))).counts

    async def decided(
        self,
        counts: Mapping[str, Counts],
        takes: Mapping[str, Sequence[str]],
        replies: Sequence[tuple[str, bytes]] = (),
        *,
        claim: int | None = None,
    ) -> bool:
        """Tell the gate what Postgres decided; by default as the owner."""
        claim_of = self.claim_of if claim is None else lambda product_id: claim
        return await self.gate.decided(counts, takes, replies, claim_of=claim_of)

    async def counts(self, product_id: str) -> GateCounts | None:
        key = self.gate.keys.stock(product_id)
        found: list[Any] = await self.gate.client.hmget(key, ["on_hand", "reserved", "taken", "version"])
        return None if found[0] is None else GateCounts(*map(int, found))

    async def left(self, product_id: str) -> int | None:
        counts = await self.counts(product_id)
        return None if counts is None else counts.on_hand - counts.reserved - counts.taken

    async def same(self, product_id: str) -> bool:
        """Whether Redis and Postgres agree, with nothing on its way between them."""
        (row,) = await self.store.products([product_id])
        counts = await self.counts(product_id)
        assert counts is not None
        assert (counts.on_hand, counts.reserved, counts.taken) == (row["on_hand"], row["reserved"], 0)
        return True


@pytest.fixture
async def shop(
    engines: LocalEngines, make_settings: MakeSettings, database_url: str, redis_prefix: str
) -> AsyncIterator[Shop]:
    await prepare(make_settings())
    store = await Store.connect(database_url)
    shop = Shop(store, engines.addresses()["redis_url"], redis_prefix)
    await shop.stock(a=10, b=5)
    yield shop
    for gate in shop.gates:
        await gate.close()
    await store.close()


# Taking


async def test_units_are_taken_while_there_are_enough(shop: Shop) -> None:
    assert await shop.take(("a", 1, 4), ("a", 2, 6)) == [TAKEN, TAKEN]
    assert await shop.take(("a", 3, 1), ("a", 4, 11)) == [UNDECIDED, REFUSED]
    assert await shop.counts("a") == GateCounts(on_hand=10, reserved=0, taken=10, version=1)


async def test_units_that_are_missing_twice_do_not_refuse_an_order(shop: Shop) -> None:
    assert await shop.take(("a", 1, 4)) == [TAKEN]
    held = await shop.hold(("a", 1, 4))
    assert await shop.decided(held, {})  # by another stage: the counts contain the take, which is still there
    assert await shop.counts("a") == GateCounts(on_hand=10, reserved=4, taken=4, version=2)
    assert await shop.take(("a", 2, 7), ("a", 3, 6), ("a", 4, 2)) == [REFUSED, UNDECIDED, TAKEN]
    assert await shop.decided(held, {"a": [order(1)]})
    assert await shop.take(("a", 3, 6)) == [UNDECIDED]  # order 4 has not been decided yet
    assert await shop.take(("a", 3, 4)) == [TAKEN]


async def test_an_order_that_comes_again_gets_its_first_answer_and_takes_nothing_more(shop: Shop) -> None:
    assert await shop.take(("a", 1, 7)) == [TAKEN]
    assert await shop.take(("a", 1, 7)) == [TAKEN]
    assert await shop.take(("a", 1, 7), ("a", 2, 3), ("a", 1, 7)) == [TAKEN, TAKEN, TAKEN]
    assert await shop.left("a") == 0


async def test_of_two_orders_for_the_last_unit_the_first_gets_it(shop: Shop) -> None:
    assert await shop.take(("a", 1, 9)) == [TAKEN]
    assert await shop.take(("a", 2, 1), ("a", 3, 1)) == [TAKEN, UNDECIDED]  # Postgres may have the first take already
    assert await shop.decided(await shop.hold(("a", 1, 9)), {"a": [order(1)]})
    assert await shop.take(("a", 3, 1)) == [UNDECIDED]
    assert await shop.decided(await shop.hold(("a", 2, 1)), {"a": [order(2)]})
    assert await shop.take(("a", 3, 1)) == [REFUSED]


async def test_a_repeat_within_one_call_takes_once(shop: Shop) -> None:
    assert await shop.take(("a", 1, 3), ("a", 1, 3), ("a", 1, 3)) == [TAKEN] * 3
    assert await shop.left("a") == 7


async def test_a_refused_order_leaves_nothing_behind_and_a_smaller_one_goes_through(shop: Shop) -> None:
    assert await shop.take(("a", 1, 11), ("a", 2, 10), ("a", 1, 11)) == [REFUSED, TAKEN, REFUSED]
    assert await shop.left("a") == 0
    assert await shop.gate.client.hkeys(shop.gate.keys.takes("a")) == [order(2).encode()]


async def test_verdicts_stand_where_their_lines_stand(shop: Shop) -> None:
    lines = [("b", 1, 5), ("a", 1, 11), ("b", 2, 1), ("a", 2, 1), ("zz", 3, 1), ("b", 1, 5)]
    assert await shop.take(*lines) == [TAKEN, REFUSED, REFUSED, TAKEN, UNDECIDED, TAKEN]


async def test_a_product_that_postgres_does_not_know_is_undecided_and_redis_is_not_away(shop: Shop) -> None:
    assert await shop.take(("zz", 1, 1), ("zz", 2, 1)) == [UNDECIDED, UNDECIDED]
    assert await shop.counts("zz") is None
    await shop.stock(zz=1)
    assert await shop.take(("zz", 1, 1), ("zz", 2, 1)) == [TAKEN, REFUSED]


async def test_no_lines_ask_nothing(shop: Shop) -> None:
    assert await shop.gate.take([]) == ([], False)
    assert shop.loads == 0


@pytest.mark.parametrize("lines", [PIECE // 2 - 1, PIECE // 2, PIECE // 2 + 1, PIECE, 2_500])
async def test_more_lines_than_a_script_reads_at_once(shop: Shop, lines: int) -> None:
    await shop.stock(many=lines - 1)
    ask = [("many", n, 1) for n in range(lines)]
    assert await shop.take(*ask) == [TAKEN] * (lines - 1) + [REFUSED]
    assert await shop.take(*ask) == [TAKEN] * (lines - 1) + [UNDECIDED]
    assert await shop.counts("many") == GateCounts(lines - 1, 0, lines - 1, 1)
    assert await shop.decided({"many": Counts(lines - 1, 0, 1, 1)}, {"many": [order(n) for n in range(lines)]})
    assert await shop.counts("many") == GateCounts(lines - 1, 0, 0, 1)


@pytest.mark.parametrize("product_id", ["a b", "{x}", "x}:takes", "a:b", "名前", "*", "\\", "'; --"])
async def test_any_id_that_passes_the_border_is_a_product(shop: Shop, product_id: str) -> None:
    await shop.stock(**{product_id: 1, "x": 50})
    assert await shop.take(("x", 9, 1), (product_id, 1, 1), (product_id, 2, 1)) == [TAKEN, TAKEN, REFUSED]
    counts = await shop.hold((product_id, 1, 1))
    assert await shop.decided(counts, {product_id: [order(1)]})
    assert await shop.same(product_id)
    assert await shop.left("x") == 49


async def test_two_workers_at_once_never_take_more_than_there_is(shop: Shop) -> None:
    await shop.stock(hot=100)
    gates = [shop.gate, shop.another_gate()]
    calls = [shop.take(*(("hot", 100 * k + n, 1) for n in range(20)), gate=gates[k % 2]) for k in range(20)]
    verdicts = [verdict for answer in await asyncio.gather(*calls) for verdict in answer]
    assert verdicts.count(TAKEN) == 100
    assert await shop.left("hot") == 0


# Who may take


async def test_who_has_lost_the_product_takes_nothing_whatever_redis_has_forgotten(shop: Shop) -> None:
    zombie, before = shop.another_gate(), shop.claim_of("a")
    assert await shop.take(("a", 1, 4), gate=zombie) == [TAKEN]
    await shop.worker.claim(0)  # another worker takes the lanes over
    assert await shop.take(("a", 1, 4)) == [TAKEN], "the units were taken for it already"
    assert await shop.decided(await shop.hold(("a", 1, 4)), {"a": [order(1)]})
    assert await shop.take(("a", 1, 4), gate=zombie, claim=before) == [UNDECIDED], "order 1 is decided"
    await shop.gate.client.flushall()
    assert await shop.take(("a", 1, 4), gate=zombie, claim=before) == [UNDECIDED]
    assert await shop.take(("a", 2, 7)) == [REFUSED]
    assert await shop.same("a")


@pytest.mark.parametrize("script", ["decided", "release"])
async def test_an_owner_who_only_told_what_it_decided_is_the_newest_too(shop: Shop, script: str) -> None:
    zombie, before = shop.another_gate(), shop.claim_of("a")
    assert await shop.take(("a", 1, 4), gate=zombie) == [TAKEN]
    await shop.worker.claim(0)
    counts = await shop.hold(("a", 1, 4)) if script == "decided" else {}
    shop.gate.invalidated({"a": 1})
    assert await shop.decided(counts, {"a": [order(1)]})
    assert await shop.take(("a", 1, 4), gate=zombie, claim=before) == [UNDECIDED]
    assert await shop.same("a")


@pytest.mark.parametrize("limited", [False, True])
async def test_what_a_former_owner_took_ends_with_its_claim_unless_it_is_in_the_counts(
    shop: Shop, limited: bool
) -> None:
    if limited:
        await shop.store.pool.execute("SELECT set_limit('a', 10)")
    before = shop.claim_of("a")
    assert await shop.take(("a", 1, 4), ("a", 2, 3)) == [TAKEN, TAKEN]
    counts = await shop.hold(("a", 2, 3))
    await shop.worker.claim(0)  # order 1 has its home elsewhere by now, and nobody asks for it here again
    (row,) = await shop.store.products(["a"])
    assert (await shop.gate.inspect([row]))["a"].taken == 0, "they are void before anybody drops them"
    assert await shop.take(("a", 3, 8)) == [TAKEN], "Postgres has the last word, for order 2"
    await shop.decided(counts, {"a": [order(2), order(3)]}, claim=before)  # told late
    taken = (await shop.counts("a")).taken  # type: ignore[union-attr]
    assert taken == 8, "a former owner forgets no take of its successor"
    await shop.decided(counts, {"a": [order(3)]})
    assert await shop.take(("a", 4, 7)) == [TAKEN]
    await shop.decided(await shop.hold(("a", 4, 7)), {"a": [order(4)]})
    assert await shop.same("a")
    assert (await shop.gate.inspect_users(row))[1] == {}


# Deciding


async def test_what_postgres_decided_sets_the_counts_and_drops_the_takes(shop: Shop) -> None:
    await shop.take(("a", 1, 4), ("a", 2, 3))
    counts = await shop.hold(("a", 1, 4))
    assert await shop.decided(counts, {"a": [order(1)]})
    assert await shop.counts("a") == GateCounts(on_hand=10, reserved=4, taken=3, version=2)
    assert await shop.take(("a", 3, 4), ("a", 3, 7)) == [UNDECIDED, REFUSED]


async def test_deciding_the_same_takes_again_changes_nothing(shop: Shop) -> None:
    await shop.take(("a", 1, 4), ("a", 2, 3))
    counts = await shop.hold(("a", 1, 4))
    for _ in range(3):
        assert await shop.decided(counts, {"a": [order(1), order(99)]})
    assert await shop.counts("a") == GateCounts(on_hand=10, reserved=4, taken=3, version=2)


async def test_an_order_that_is_told_twice_in_one_call_gives_back_what_it_took_once(shop: Shop) -> None:
    await shop.take(("a", 1, 4), ("a", 1, 4), ("a", 2, 3))
    counts = await shop.hold(("a", 1, 4))
    assert await shop.decided(counts, {"a": [order(1), order(1)]})
    assert await shop.counts("a") == GateCounts(on_hand=10, reserved=4, taken=3, version=2)


async def test_takes_that_never_reached_postgres_are_given_back(shop: Shop) -> None:
    await shop.take(("a", 1, 4), ("a", 2, 6))
    assert await shop.decided({}, {"a": [order(1), order(1), order(99)]})
    assert await shop.counts("a") == GateCounts(on_hand=10, reserved=0, taken=6, version=1)
    assert await shop.take(("a", 3, 4)) == [TAKEN]


async def test_counts_that_are_older_than_those_here_are_not_taken(shop: Shop) -> None:
    await shop.take(("a", 1, 1))
    assert await shop.decided({"a": Counts(on_hand=10, reserved=5, version=7, generation=1)}, {})
    for late in (Counts(99, 0, 6, 1), Counts(99, 0, 7, 1)):
        assert await shop.decided({"a": late}, {})
        assert await shop.decided({"a": late}, {"a": [order(99)]})
    assert await shop.counts("a") == GateCounts(on_hand=10, reserved=5, taken=1, version=7)


async def test_older_counts_still_drop_the_takes_that_they_decided(shop: Shop) -> None:
    # The commit stage's newer counts may come first; the take is decided all the same.
    await shop.take(("a", 1, 4))
    held = await shop.hold(("a", 1, 4))
    assert await shop.decided({"a": Counts(on_hand=6, reserved=0, version=9, generation=1)}, {})
    assert await shop.decided(held, {"a": [order(1)]})
    assert await shop.counts("a") == GateCounts(on_hand=6, reserved=0, taken=0, version=9)


async def test_stock_that_came_in_can_be_taken(shop: Shop) -> None:
    assert await shop.take(("b", 1, 6)) == [REFUSED]
    assert await shop.decided((await shop.worker.command((1, "b", "receive", 1))).counts, {})
    assert await shop.take(("b", 1, 6)) == [TAKEN]


async def test_products_that_redis_never_heard_of_are_passed_over(shop: Shop) -> None:
    assert await shop.decided({"a": Counts(9, 0, 2, 1)}, {"a": [order(1)], "b": [order(1)]})
    assert await shop.counts("a") is None
    assert await shop.take(("a", 2, 10)) == [TAKEN]


async def test_who_waits_for_a_verdict_hears_it_with_the_counts_or_without(shop: Shop) -> None:
    channel = shop.gate.keys.replies("ingress-1")
    async with shop.gate.client.pubsub() as ears:
        await ears.subscribe(channel)
        assert (await ears.get_message(timeout=10) or {})["type"] == "subscribe"
        assert await shop.decided({}, {}, [(channel, b"one")])
        await shop.take(("a", 1, 1))
        assert await shop.decided(await shop.hold(("a", 1, 1)), {"a": [order(1)]}, [(channel, b"two")])
        heard = [(await ears.get_message(timeout=10) or {})["data"] for _ in range(2)]
    assert heard == [b"one", b"two"]
    assert await shop.same("a")


# Losing and learning again


async def test_after_flushall_the_counts_come_from_postgres_again(shop: Shop) -> None:
    await shop.take(("a", 1, 4), ("a", 2, 3))
    await shop.decided(await shop.hold(("a", 1, 4)), {"a": [order(1)]})
    await shop.gate.client.flushall()
    # Order 2 never reached Postgres, so no order was promised anything: its three units are free.
    assert await shop.take(("a", 3, 6), ("a", 2, 3)) == [TAKEN, REFUSED]
    assert await shop.counts("a") == GateCounts(on_hand=10, reserved=4, taken=6, version=2)


async def test_after_flushall_what_postgres_tells_is_not_put_on_nothing(shop: Shop) -> None:
    await shop.take(("a", 1, 4))
    held = await shop.hold(("a", 1, 4))
    await shop.gate.client.flushall()
    assert await shop.decided(held, {"a": [order(1)]})
    assert await shop.counts("a") is None
    assert await shop.take(("a", 2, 7)) == [REFUSED]
    assert await shop.same("a")


async def test_after_script_flush_the_state_stays(shop: Shop) -> None:
    await shop.take(("a", 1, 4))
    loads = shop.loads
    await shop.gate.client.script_flush()
    assert await shop.take(("a", 1, 4), ("a", 2, 6), ("a", 3, 11)) == [TAKEN, TAKEN, REFUSED]
    await shop.gate.client.script_flush()
    assert await shop.decided(await shop.hold(("a", 1, 4)), {"a": [order(1)]})
    assert await shop.counts("a") == GateCounts(on_hand=10, reserved=4, taken=6, version=2)
    assert shop.loads == loads


async def test_a_worker_that_knows_nothing_does_not_reload_what_is_there(shop: Shop) -> None:
    await shop.take(("a", 1, 4))
    assert await shop.take(("a", 2, 11), ("a", 1, 4), gate=shop.another_gate()) == [REFUSED, TAKEN]
    assert await shop.left("a") == 6


async def test_a_load_waits_for_whoever_is_changing_the_product(shop: Shop) -> None:
    async with shop.store.pool.acquire() as other, other.transaction():
        await other.execute("UPDATE stock SET reserved = 8 WHERE product_id = 'a'")
        taking = asyncio.create_task(shop.take(("a", 1, 3)))
        await asyncio.sleep(0.2)
        assert not taking.done()
    assert await taking == [REFUSED]


@pytest.mark.parametrize("knows", [True, False], ids=["learns of it", "does not learn of it"])
async def test_a_new_generation_invalidates_what_redis_knows(shop: Shop, knows: bool) -> None:
    await shop.take(("a", 1, 10), ("b", 1, 1))
    generations = await shop.store.invalidate_gate(["a"])
    assert generations == {"a": 2}
    if knows:
        shop.gate.invalidated(generations)
        assert await shop.take(("a", 2, 10)) == [TAKEN]
    else:
        # A worker that did not learn of it notices once another one has loaded the product again.
        assert await shop.take(("a", 2, 10), gate=shop.another_gate()) == [TAKEN]
        assert await shop.take(("a", 3, 11)) == [REFUSED]
    assert await shop.take(("b", 1, 1), ("b", 2, 6)) == [TAKEN, REFUSED]


async def test_counts_of_before_the_void_do_not_bring_the_old_generation_back(shop: Shop) -> None:
    # Reserve's counts were read before commit, beside it, could not reach Redis and invalidated the product.
    await shop.take(("a", 1, 4))
    held = await shop.hold(("a", 1, 4))
    shop.gate.invalidated(await shop.store.invalidate_gate(["a"]))
    assert await shop.decided(held, {"a": [order(1)]})
    assert await shop.take(("a", 2, 6), ("a", 3, 1)) == [TAKEN, REFUSED]
    epoch: Any = await shop.gate.client.hget(shop.gate.keys.stock("a"), "epoch")
    assert epoch.endswith(b":2"), "what Redis knew of generation 1 is still in use"


async def test_takes_decided_with_older_counts_are_dropped_from_the_new_generation(shop: Shop) -> None:
    await shop.take(("a", 1, 1))
    held = await shop.hold(("a", 1, 1))
    shop.gate.invalidated(await shop.store.invalidate_gate(["a"]))
    await shop.take(("a", 1, 1))  # loaded again, and the same record came again
    assert await shop.decided(held, {"a": [order(1)]})
    assert await shop.same("a")


# Unavailable and available again


@pytest.fixture(scope="module")
def own(engines: LocalEngines) -> Iterator[LocalEngines]:
    """A Redis that these tests may stop and kill."""
    local = LocalEngines(engines.local_dir.with_suffix(".gate"), say=print)
    local.up(["redis"])
    yield local
    local.remove()


@pytest.fixture
async def alone(
    own: LocalEngines, make_settings: MakeSettings, database_url: str, redis_prefix: str
) -> AsyncIterator[Shop]:
    """A shop whose Redis no other test needs."""
    await prepare(make_settings())
    store = await Store.connect(database_url)
    shop = Shop(store, own.start("redis"), redis_prefix)
    await shop.stock(a=10, b=5)
    yield shop
    for gate in shop.gates:
        await gate.close()
    await store.close()


async def back(shop: Shop, *lines: tuple[str, int, int]) -> list[GateVerdict]:
    """Take, as soon as the gate has noticed that Redis answers again."""
    asked = [(product_id, order(n), units) for product_id, n, units in lines]
    async with asyncio.timeout(60):
        while True:
            verdicts, unavailable = await shop.gate.take(asked, claim_of=shop.claim_of)
            if not unavailable:
                return verdicts
            await asyncio.sleep(UNAVAILABLE_PAUSE_S / 2)


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_after_a_restart_everything_is_void_whatever_the_data_files_bring_back(
    alone: Shop, own: LocalEngines, end: str
) -> None:
    await alone.take(("a", 1, 4), ("a", 2, 3), ("b", 1, 5))
    await alone.decided(await alone.hold(("a", 1, 4)), {"a": [order(1)]})
    run_id = (await alone.gate.client.info("server"))["run_id"]
    await asyncio.sleep(1.2)  # the append-only file is written out once a second
    await asyncio.to_thread(getattr(own, end), "redis")
    await asyncio.to_thread(own.start, "redis")

    # What changed meanwhile passed Redis by.
    await alone.hold(("a", 5, 5))
    assert await back(alone, ("a", 3, 2), ("a", 3, 1), ("b", 2, 5)) == [REFUSED, TAKEN, TAKEN]
    assert (await alone.gate.client.info("server"))["run_id"] != run_id
    counts = await alone.counts("a")
    assert counts is not None
    assert (counts.on_hand, counts.reserved, counts.taken) == (10, 9, 1)


async def test_while_redis_is_away_nothing_is_decided_here_and_then_it_is_back(alone: Shop, own: LocalEngines) -> None:
    assert await alone.take(("a", 1, 4)) == [TAKEN]
    await asyncio.to_thread(own.stop, "redis")
    assert await alone.gate.take([("a", order(2), 1), ("b", order(2), 1)]) == ([UNDECIDED, UNDECIDED], True)
    assert alone.gate.is_unavailable
    assert await alone.gate.take([("a", order(2), 1)], claim_of=alone.claim_of) == ([UNDECIDED], True)
    assert not await alone.decided({"a": Counts(10, 4, 2, 1)}, {"a": [order(1)]})
    assert not await alone.decided({}, {}, [("channel", b"message")])
    assert await alone.decided({}, {}), "there was nothing to update"
    await asyncio.to_thread(own.start, "redis")
    assert await back(alone, ("a", 3, 10)) == [TAKEN]
    assert not alone.gate.is_unavailable
    assert await alone.decided({"a": Counts(10, 0, 1, 1)}, {"a": [order(3)]})


async def test_a_redis_that_comes_back_while_it_is_told_counts_as_back(alone: Shop, own: LocalEngines) -> None:
    await asyncio.to_thread(own.stop, "redis")
    await alone.gate.take([("a", order(1), 1)])
    assert alone.gate.is_unavailable
    await asyncio.to_thread(own.start, "redis")
    heard = False
    async with asyncio.timeout(60):
        while not heard:
            await asyncio.sleep(UNAVAILABLE_PAUSE_S / 2)
            heard = await alone.decided({"a": Counts(10, 0, 1, 1)}, {})
    assert not alone.gate.is_unavailable


async def test_commands_at_once_get_their_own_answers_whatever_became_of_those_before(
    make_settings: MakeSettings,
) -> None:
    settings = make_settings()
    client, name = redis_client(settings.redis_url, timeout_s=0.3), f"{settings.redis_prefix}at-once"
    try:
        answers = await ask_at_once(client, [("SET", name, 1), ("EVALSHA", "0" * 40, 0), ("LPOP", name), ("GET", name)])
        assert answers[::3] == [b"OK", b"1"]
        assert [type(answer) for answer in answers[1:3]] == [NoScriptError, ResponseError]
        with pytest.raises(TimeoutError):
            await ask_at_once(client, [("GET", name), ("BLPOP", f"{name}:list", 5)])
        assert await ask_at_once(client, [("INCR", name)]) == [2]
        waiting = asyncio.create_task(ask_at_once(client, [("GET", name), ("BLPOP", f"{name}:list", 5)]))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert await ask_at_once(client, [("INCR", name), ("DEL", name)]) == [3, 1]
    finally:
        await client.aclose()


async def test_a_redis_that_refuses_to_write_is_away(alone: Shop) -> None:
    await alone.take(("a", 1, 1))
    await alone.gate.client.config_set("maxmemory", "1")
    try:
        assert await alone.gate.take([("a", order(2), 1)], claim_of=alone.claim_of) == ([UNDECIDED], True)
    finally:
        await alone.gate.client.config_set("maxmemory", "0")
    assert await back(alone, ("a", 2, 1)) == [TAKEN]


# Failing over


class Address:
    """Where clients find Redis: it leads to one of two servers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection."""
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._open |= {writer, there_writer}

        async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(1 << 16):
                sink.write(data)
            sink.close()

        await asyncio.gather(carry(reader, there_writer), carry(there_reader, writer), return_exceptions=True)
        self._open -= {writer, there_writer}

    async def lead_to(self, port: int, gate: Gate | None = None) -> None:
        """Lead to another server from now on; wait until a gate has noticed that it has lost its connections."""
        self._port = port
        for end in self._open:
            end.close()
        if gate is not None:
            await gate.client.connection_pool.disconnect()


class Pair(NamedTuple):
    """Two Redis servers, the first one a primary, and a shop that finds one of them at an address that moves."""

    shop: Shop
    address: Address
    clients: tuple[Redis, Redis]
    ports: tuple[int, int]

    async def replicate(self, replica: int, primary: int) -> None:
        """Make one the replica of the other, and wait until it has all of its data."""
        await self.clients[replica].replicaof("127.0.0.1", self.ports[primary])
        async with asyncio.timeout(60):
            while True:
                there, here = [await client.info("replication") for client in self.clients]
                offsets = {there["master_repl_offset"], here["master_repl_offset"]}
                link = (there if replica == 0 else here).get("master_link_status")
                if link == "up" and len(offsets) == 1 and await self.clients[replica].dbsize():
                    return
                await asyncio.sleep(0.1)

    async def fail_over(self, to: int, *, replicated: bool) -> None:
        """Promote the other one, and lead everybody there."""
        if replicated:
            await self.clients[to].replicaof("NO", "ONE")
        await self.address.lead_to(self.ports[to], self.shop.gate)
        if replicated:
            await self.replicate(1 - to, to)


@pytest.fixture
async def pair(
    own: LocalEngines, make_settings: MakeSettings, database_url: str, redis_prefix: str
) -> AsyncIterator[Pair]:
    await prepare(make_settings())
    store = await Store.connect(database_url)
    other = LocalEngines(own.local_dir.with_suffix(".other"), say=print)
    try:
        urls = own.start("redis"), other.up(["redis"])["redis_url"]
        ports = int(urls[0].split(":")[2][:-2]), int(urls[1].split(":")[2][:-2])
        address = Address(ports[0])
        server = await asyncio.start_server(address.serve, "127.0.0.1", 0)
        shop = Shop(store, f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", redis_prefix)
        await shop.stock(a=10, b=5)
        clients = Redis.from_url(urls[0]), Redis.from_url(urls[1])
        yield Pair(shop, address, clients, ports)
        await clients[0].replicaof("NO", "ONE")
        for gate in shop.gates:
            await gate.close()
        for client in clients:
            await client.aclose()
        server.close()
    finally:
        other.remove()
        await store.close()


@pytest.mark.parametrize("replicated", [True, False], ids=["replicated", "not replicated"])
async def test_what_a_redis_knew_stays_void_when_it_is_failed_back_to(pair: Pair, replicated: bool) -> None:
    shop = pair.shop
    other = shop.another_gate()  # of a worker that asks for nothing meanwhile
    assert await shop.take(("a", 1, 10)) == [TAKEN]
    assert await shop.decided(await shop.hold(("a", 1, 10)), {"a": [order(1)]})
    assert await shop.take(("a", 2, 1), gate=other) == [REFUSED]
    if replicated:
        await pair.replicate(1, 0)

    await pair.fail_over(1, replicated=replicated)
    assert await back(shop, ("b", 3, 1)) == [TAKEN]
    released = Move(1, "RESERVED", "CANCELLED", "expired", states="r")
    counts = (await shop.worker.settle(released, moved=[("release", 1, "a", 10)])).counts
    assert await shop.decided(counts, {})
    assert await shop.counts("a") == (GateCounts(10, 10, 0, 2) if replicated else None), "what is here is void"

    await pair.fail_over(0, replicated=replicated)
    assert await back(shop, ("a", 4, 10)) == [TAKEN], "refused, with ten units there"
    assert await back(shop, ("b", 3, 1), ("b", 5, 5)) == [TAKEN, REFUSED]
    assert await shop.decided(await shop.hold(("a", 4, 10)), {"a": [order(4)]})
    gates = await shop.store.pool.fetchval("SELECT gates FROM pipeline")
    assert gates == 3
    await other.look(gates)
    await other.client.connection_pool.disconnect()
    assert await shop.take(("a", 6, 1), gate=other) == [REFUSED]
    assert await shop.same("a")


async def test_a_redis_that_was_a_replica_for_a_moment_is_another_one(pair: Pair) -> None:
    shop = pair.shop
    assert await shop.take(("a", 1, 10)) == [TAKEN]
    await pair.replicate(1, 0)
    await pair.clients[0].replicaof("127.0.0.1", pair.ports[1])
    await pair.clients[0].replicaof("NO", "ONE")  # nobody has asked it anything meanwhile
    gates = await shop.store.pool.fetchval("SELECT gates FROM pipeline")
    await shop.gate.look(gates)
    assert await back(shop, ("a", 2, 10)) == [TAKEN], "a take that may be one of another history still counts"
    assert await shop.store.pool.fetchval("SELECT gates FROM pipeline") == gates + 1


async def test_a_look_at_the_same_redis_changes_nothing(shop: Shop) -> None:
    assert await shop.take(("a", 1, 4)) == [TAKEN]
    gates = await shop.store.pool.fetchval("SELECT gates FROM pipeline")
    await shop.gate.look(gates)
    assert await shop.take(("a", 2, 6), ("a", 3, 7)) == [TAKEN, REFUSED]
    assert (shop.loads, gates, await shop.store.pool.fetchval("SELECT gates FROM pipeline")) == (1, 1, 1)


# Two pipelines


async def test_two_pipelines_do_not_decide_by_each_others_counts(
    shop: Shop, make_settings: MakeSettings, database_url: str, run_id: str
) -> None:
    url = create_database(database_url, f"{run_id}x")
    try:
        await prepare(make_settings(database_url=url))
        store = await Store.connect(url)
        another = Shop(store, shop.url, shop.prefix)
        await another.stock(a=3)
        assert await shop.take(("a", 1, 4)) == [TAKEN]
        with pytest.raises(PrefixTaken, match="set ORDERSTREAM_REDIS_PREFIX"):
            await another.take(("a", 2, 1))
        await another.gate.client.delete(another.gate.keys.pipeline)  # as somebody may who does not read on
        assert await another.take(("a", 2, 4), ("a", 3, 3)) == [REFUSED, TAKEN]
        with pytest.raises(PrefixTaken):
            await shop.another_gate().enter()
        await another.gate.close()
        await store.close()
    finally:
        drop_database(url)


# Postgres unavailable while Redis is entered


async def test_a_redis_that_cannot_be_entered_is_away(shop: Shop) -> None:
    faults = 2

    async def enter(redis_now: str, notes: bool) -> Ground:
        nonlocal faults
        if faults:
            faults -= 1
            raise NotEntered("Postgres is away")
        return await shop.store.enter_gate(redis_now, notes)

    gate = Gate(shop.url, shop.prefix, shop.store.load_gate, enter)
    shop.gates.append(gate)
    assert await gate.take([("a", order(1), 1)]) == ([UNDECIDED], True)
    await asyncio.sleep(UNAVAILABLE_PAUSE_S)
    assert not await gate.decided({"a": Counts(10, 0, 1, 1)}, {})
    await asyncio.sleep(UNAVAILABLE_PAUSE_S)
    assert await shop.take(("a", 1, 1), gate=gate) == [TAKEN]


async def test_a_postgres_without_a_connection_to_spare_does_not_block_the_gate(
    shop: Shop, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orderstream.sql.store.ENTER_S", 0.1)
    store = await Store.connect(database_url, connections_max=1)
    async with store.pool.acquire():
        with pytest.raises(NotEntered):
            await store.enter_gate("redis", True)
    await store.close()


# Postgres unavailable while a product is loaded


@pytest.mark.parametrize(
    "error", [asyncpg.CannotConnectNowError("starting up"), ConnectionRefusedError(), TimeoutError()]
)
async def test_postgres_away_is_not_taken_for_redis_away(shop: Shop, error: Exception) -> None:
    async def load(product_ids: Sequence[str], loaded: Loaded) -> None:
        raise error

    gate = Gate(shop.url, shop.prefix, load, shop.store.enter_gate)
    shop.gates.append(gate)
    with pytest.raises(type(error)):
        await gate.take([("a", order(1), 1)])
    assert not gate.is_unavailable


# Through the reserve stage


class Deaf(Gate):
    """A gate that asks Redis and loses its answer, as a timeout does."""

    async def take(self, lines: Sequence[tuple[str, str, int]], *about: Any) -> tuple[list[GateVerdict], bool]:
        await super().take(lines, *about)
        return [UNDECIDED] * len(lines), True


class ReserveStage:
    """The reserve stage in this process, with real engines, one record at a time."""

    def __init__(self, shop: Shop, settings: Settings) -> None:
        self.shop, self.settings = shop, settings
        self.producer = Producer(settings)
        self.topic = settings.topic(ORDERS.name)
        self.views = Views(App(settings.app_id, store="memory://", autodiscover=False), settings.partitions)

    async def reserve(self, n: int, units: int, gate: Gate) -> None:
        """Have an order for product ``a`` reserved; the same one again when it is known."""
        items = [{"product_id": "a", "quantity": units}]
        body = {"order_id": order(n), "user_id": "u", "items": items, "payment_method": "card"}
        value = orjson.dumps(body)
        record = ConsumerRecord(self.topic, 0, n, 1_700_000_000_000, 0, b"a", value, None, 1, len(value), ())
        app = assigned({TP(self.topic, 0)})
        desk = Desk(Stage(self.settings, app, self.shop.store, gate, self.producer), self.views)
        batch = Batch(app, [Chunk(TP(self.topic, 0), [record])])
        await desk.take_over(batch)
        await to_its_end(reserve(desk, batch))


@pytest.fixture
async def stage(shop: Shop, make_settings: MakeSettings) -> AsyncIterator[ReserveStage]:
    settings = make_settings(partitions=1, retry_wait_max_s=0.05)
    await create_topics(settings)
    stage = ReserveStage(shop, settings)
    yield stage
    await stage.producer.stop()


async def test_what_redis_took_before_its_answer_got_lost_is_given_back(shop: Shop, stage: ReserveStage) -> None:
    deaf = Deaf(shop.url, shop.prefix, shop.store.load_gate, shop.store.enter_gate)
    shop.gates.append(deaf)
    for gate in (shop.gate, deaf, deaf):  # the record comes again after a crash, and its take's answer gets lost
        await stage.reserve(1, 4, gate)
        assert await shop.same("a")
        assert await shop.left("a") == 6


async def test_the_stage_waits_for_postgres_while_a_product_is_loaded(shop: Shop, stage: ReserveStage) -> None:
    faults: list[Exception] = [asyncpg.CannotConnectNowError("starting up"), ConnectionRefusedError(), TimeoutError()]

    async def load(product_ids: Sequence[str], loaded: Loaded) -> None:
        if faults:
            raise faults.pop()
        await shop.store.load_gate(product_ids, loaded)

    gate = Gate(shop.url, shop.prefix, load, shop.store.enter_gate)
    shop.gates.append(gate)
    await stage.reserve(1, 4, gate)
    assert faults == []
    assert await shop.same("a")
    assert await shop.left("a") == 6


async def test_the_last_units_are_held_while_redis_misses_others_twice(shop: Shop, stage: ReserveStage) -> None:
    await shop.take(("a", 1, 4))
    held = await shop.hold(("a", 1, 4))
    assert await shop.decided(held, {})  # commit updated the counts before reserve reported its takes
    await stage.reserve(2, 6, shop.gate)
    assert await shop.decided(held, {"a": [order(1)]})
    assert await shop.counts("a") == GateCounts(on_hand=10, reserved=10, taken=0, version=3)
    await stage.reserve(3, 1, shop.gate)  # now there is none, and Redis knows it
    assert await shop.counts("a") == GateCounts(on_hand=10, reserved=10, taken=0, version=3)
