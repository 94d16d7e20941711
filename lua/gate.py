"""The gate: Redis in front of the stock counts.

It refuses what can't be had without a row lock in Postgres.  It may become unavailable at any moment: then every verdict is
``UNDECIDED`` and Postgres decides alone.  What it knows about a product is invalid as soon as the Redis process or its
replication history, the Postgres server, database or timeline, or the product's generation in Postgres, is another one than
when it was loaded.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from importlib.resources import files
from typing import Any, NamedTuple

import redis.asyncio as redis
import structlog
from redis.exceptions import NoScriptError, RedisError, ResponseError

from orderstream import metrics
from orderstream.access import ask_at_once, redis_client
from orderstream.errors import OrderstreamError

log = structlog.get_logger("gate")


class GateVerdict(IntEnum):
    """What the gate says about a line."""

    TAKEN = 1
    """The units are taken for the order, now or before."""
    REFUSED = 0
    """There are not enough left."""
    LIMITED = 3
    """There are enough left, and the line's user may not have as many."""
    UNDECIDED = -1
    """Only Postgres can say."""
    NOT_OURS = 2
    """The product has another owner; said by the stage, the gate is not asked."""


_VERDICTS = {1: GateVerdict.TAKEN, 0: GateVerdict.REFUSED, 3: GateVerdict.LIMITED, 4: GateVerdict.UNDECIDED}
"""By the codes of ``reserve.lua``; its PERHAPS is Postgres' to decide."""

INVALID = -1
"""What every script answers when it does not hold the product under the generation of the caller."""

SUPERSEDED = -2
"""What ``reserve.lua`` answers to a worker after whom another one has claimed the product's partition."""

SCRIPTS = ("reserve", "decided", "release", "counts", "load", "users")
_USER_SCRIPTS = frozenset({"load", "users"})
LOAD_PRODUCTS_MAX = 500
"""Products loaded under one set of row locks: bounds how long the locks are held."""

EPOCH_CHARS = 16
"""Of the hash that names an epoch: 64 bits."""

UNAVAILABLE_PAUSE_S = 0.25
"""How long a gate that did not answer is not asked again, so that an outage costs each batch no timeout."""

_ATTEMPTS = 3


class Counts(NamedTuple):
    """The counts of one product as Postgres has them, in units; ``claim``: of its partition, where its row was locked."""

    on_hand: int
    reserved: int
    version: int
    generation: int
    claim: int = 0


class GateState(NamedTuple):
    """All that Redis has of one product, at one moment.  ``takes`` is the sum of the single takes."""

    version: int
    on_hand: int
    reserved: int
    taken: int
    takes: int


class UserLimit(NamedTuple):
    """How many units of a product one user may have, and who has how many."""

    limit: int
    units: Mapping[str, int]


class Ground(NamedTuple):
    """What, beside the Redis that is there, makes up an epoch.

    Attributes:
        pipeline: its id.
        gates: how often its Redis was another one than before.
        postgres: server, database and timeline.
    """

    pipeline: str
    gates: int
    postgres: str


class NotEntered(RedisError):
    """Postgres could not be asked about the Redis that is there: so it is as good as away."""


class PrefixTaken(OrderstreamError):
    """Another pipeline keeps its counts under the same keys."""


UserUnits = Mapping[str, Sequence[tuple[str, int]]]
"""By limited product: users, and the units that Postgres counts for each."""

Loaded = Callable[[Mapping[str, Counts], Mapping[str, UserLimit]], Awaitable[None]]
Loader = Callable[[Sequence[str], Loaded], Awaitable[None]]
"""Reads products from Postgres, calls back while it holds their row locks."""
Enter = Callable[[str, bool], Awaitable[Ground]]
"""Takes what names the Redis that is there, and whether Postgres is to note it; raises :class:`NotEntered`."""


def script_text(name: str, epoch: str) -> str:
    """Return the text of a script with its includes, for one epoch."""
    folder = files("orderstream") / "lua"

    def include(match: re.Match[str]) -> str:
        return (folder / "includes" / f"{match[1]}.lua").read_text()

    text = re.sub(r"^--@include (\w+)$", include, (folder / f"{name}.lua").read_text(), flags=re.MULTILINE)
    return text.replace("@EPOCH@", epoch)


class Keys:
    """All Redis keys and channels are made here; both keys of a product share a hash tag, hence a cluster slot."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    @property
    def pipeline(self) -> str:
        """The id of the pipeline whose keys these are."""
        return f"{self.prefix}:pipeline"

    def stock(self, product_id: str) -> str:
        """Hash with epoch, version, on_hand, reserved, taken, claim."""
        return f"{self.prefix}:{{{product_id}}}:stock"

    def takes(self, product_id: str) -> str:
        """Hash from order id to units, of takes that Postgres does not know yet."""
        return f"{self.prefix}:{{{product_id}}}:takes"

    def users(self, product_id: str) -> str:
        """Hash from user to units and version, of a limited product, as Postgres counts them."""
        return f"{self.prefix}:{{{product_id}}}:users"

    def claims(self, product_id: str) -> str:
        """Hash from user to units, of a limited product: the sums of the takes."""
        return f"{self.prefix}:{{{product_id}}}:claims"

    def replies(self, name: str) -> str:
        """Channel on which one ingress receives verdicts."""
        return f"{self.prefix}:replies:{name}"


async def check_prefix(client: redis.Redis, keys: Keys, pipeline: str) -> None:
    """Check that the keys in Redis are this pipeline's, by its id, or nobody's.

    Raises:
        PrefixTaken: they are another one's.
        redis.RedisError: Redis did not answer.
    """
    theirs: Any = await client.get(keys.pipeline)
    if theirs not in (None, pipeline.encode()):
        raise PrefixTaken(
            f"the Redis prefix {keys.prefix} is another pipeline's, {theirs.decode()}; this one is {pipeline}\n"
            f"set ORDERSTREAM_REDIS_PREFIX to a name of its own; if the other one is gone, remove the key {keys.pipeline}"
        )


class Gate:
    """Redis as the stages use it.  One object a process, shared by its agents."""

    def __init__(self, url: str, prefix: str, load: Loader, enter: Enter, *, timeout_s: float = 2.0) -> None:
        self.keys = Keys(prefix)
        self.client = redis_client(url, timeout_s=timeout_s)
        self._load_from_truth, self._enter_by_truth = load, enter
        self._shas: dict[str, str] = {}
        self._redis = self._epoch = ""
        self._ground = Ground("", 0, "")
        self._generations: dict[str, int] = {}
        self._limited: set[str] = set()
        self._unavailable_until = 0.0
        self.is_unavailable = False

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    # What the stages call

    async def take(
        self,
        lines: Sequence[tuple[str, str, int]],
        user_of: Callable[[int], str] = lambda n: "",
        claim_of: Callable[[str], int] = lambda product_id: 0,
    ) -> tuple[list[GateVerdict], bool]:
        """Ask for units.

        Args:
            lines: ``(product id, order id, units)`` in the order of arrival.
            user_of: the user of line n; asked only about lines of products with a limit.
            claim_of: the caller's claim of a product's partition.

        Returns:
            A verdict for each line, and whether Redis was unavailable.  Then all are ``UNDECIDED``, though Redis may have
            taken units before its answer got lost.  ``UNDECIDED`` is also a line of a product that Postgres does not know,
            one for which the units would suffice if some takes were in the counts already, and one whose product has another
            owner by now: what the caller writes in Postgres is refused there.

        Raises:
            Exception: whatever Postgres raised while products were loaded from it; may be asked again.
        """
        verdicts = [GateVerdict.UNDECIDED] * len(lines)
        if not lines:
            return verdicts, self._resting()
        if self._resting():
            metrics.REDIS_FALLBACKS.inc()
            return verdicts, True
        by_product: dict[str, list[int]] = {}
        for n, (product_id, _, _) in enumerate(lines):
            by_product.setdefault(product_id, []).append(n)
        try:
            waiting = list(by_product)
            for _ in range(_ATTEMPTS):
                await self._ensure_loaded(p for p in waiting if p not in self._generations)
                waiting = [p for p in waiting if p in self._generations]  # the others are not in Postgres
                calls = []
                for product_id in waiting:
                    arguments: list[Any] = [self._generations[product_id], claim_of(product_id)]
                    limited = product_id in self._limited
                    for n in by_product[product_id]:
                        arguments += lines[n][1:]
                        if limited:
                            arguments.append(user_of(n))
                    calls.append(("reserve", product_id, arguments))
                answers = await self._run(calls)
                invalid = []
                for product_id, answer in zip(waiting, answers, strict=True):
                    if answer == [INVALID]:
                        invalid.append(product_id)
                        metrics.REDIS_INVALID.inc()
                        self._generations.pop(product_id, None)
                    elif answer != [SUPERSEDED]:
                        for n, verdict in zip(by_product[product_id], answer, strict=True):
                            verdicts[n] = _VERDICTS[verdict]
                if not invalid:
                    break
                waiting = invalid
            self._note_available()
            return verdicts, False
        except RedisError as error:
            self._note_unavailable(error)
            metrics.REDIS_FALLBACKS.inc()
            return [GateVerdict.UNDECIDED] * len(lines), True

    async def decided(
        self,
        counts: Mapping[str, Counts],
        takes: Mapping[str, Sequence[str]],
        replies: Iterable[tuple[str, bytes]] = (),
        users: UserUnits | None = None,
        claim_of: Callable[[str], int] = lambda product_id: 0,
    ) -> bool:
        """Update Redis with what Postgres committed, and publish the replies.

        Args:
            counts: by product; those that changed, and those that have takes.
            takes: order ids by product whose takes are decided now.
            replies: ``(channel, message)``.
            users: of limited products among these: who has how many units now.
            claim_of: the caller's claim of a product's partition.

        Returns:
            False when Redis did not take it: the caller then invalidates what Redis knows of these products.
        """
        self.invalidated({product_id: now.generation for product_id, now in counts.items()})
        calls: list[tuple[str, str, list[Any]]] = []
        for product_id, now in counts.items():
            state = [self._generations[product_id], now.version, now.on_hand, now.reserved]
            orders = takes.get(product_id)
            if orders:
                calls.append(("decided", product_id, [*state, claim_of(product_id), *orders]))
            else:
                calls.append(("counts", product_id, state))
        for product_id, orders in takes.items():
            if product_id not in counts and product_id in self._generations:
                calls.append(("release", product_id, [self._generations[product_id], claim_of(product_id), *orders]))
        for product_id, units in (users or {}).items():
            if units:
                pairs = [part for one in units for part in one]
                calls.append(("users", product_id, [self._generations[product_id], counts[product_id].version, *pairs]))
        messages = list(replies)
        if not calls and not messages:
            return True
        if self._resting():
            return False
        try:
            for (_, product_id, _), answer in zip(calls, await self._run(calls, messages), strict=True):
                if answer == INVALID:
                    metrics.REDIS_INVALID.inc()
                    self._generations.pop(product_id, None)
            self._note_available()
            return True
        except RedisError as error:
            self._note_unavailable(error)
            return False

    def invalidated(self, generations: Mapping[str, int]) -> None:
        """Note new generations: what Redis knows of these products from older ones is invalid.

        A generation never goes back: counts may come late that were read before another stage invalidated the product.
        """
        for product_id, generation in generations.items():
            self._generations[product_id] = max(generation, self._generations.get(product_id, 0))

    def forget(self) -> None:
        """Forget what is believed of all products: what Redis knows of them may be of another Postgres."""
        self._shas = {}
        self._generations.clear()
        self._limited.clear()

    async def inspect(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, GateState]:
        """Return what Redis has of products, without takes of former owners; products it does not hold are left out.

        Args:
            rows: of the products: ``product_id``, ``generation``, and ``claim`` of its partition's intake lane.

        Raises:
            redis.RedisError: Redis did not answer.
        """
        async with self.client.client() as one:
            await self._learn(one, notes=False)
        found: dict[str, GateState] = {}
        wanted = list(rows)
        for start in range(0, len(wanted), LOAD_PRODUCTS_MAX):
            part = wanted[start : start + LOAD_PRODUCTS_MAX]
            pipe = self.client.pipeline(transaction=True)  # counts and takes of one moment
            for row in part:
                pipe.hmget(
                    self.keys.stock(row["product_id"]), ["epoch", "version", "on_hand", "reserved", "taken", "claim"]
                )
                pipe.hvals(self.keys.takes(row["product_id"]))
            answers = await pipe.execute()
            for row, (epoch, *counts, claim), takes in zip(part, answers[::2], answers[1::2], strict=True):
                if epoch is not None and epoch.decode() == f"{self._epoch}:{row['generation']}":
                    version, on_hand, reserved, taken = map(int, counts)
                    held = sum(int(take.partition(b":")[0]) for take in takes)
                    if int(claim) < row["claim"]:
                        taken = held = 0  # whoever takes next drops them
                    found[row["product_id"]] = GateState(version, on_hand, reserved, taken, held)
        return found

    async def inspect_users(self, row: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
        """Return, of a limited product, what Redis has: units of each user as Postgres counted them, and units claimed.

        Args:
            row: as for :meth:`inspect`.

        Raises:
            redis.RedisError: Redis did not answer.
        """
        pipe, product_id = self.client.pipeline(transaction=True), row["product_id"]
        pipe.hgetall(self.keys.users(product_id))
        pipe.hgetall(self.keys.claims(product_id))
        pipe.hget(self.keys.stock(product_id), "claim")
        users, claims, claim = await pipe.execute()
        is_void = int(claim or 0) < row["claim"]
        return (
            {user.decode(): int(value.partition(b":")[0]) for user, value in users.items()},
            {} if is_void else {user.decode(): int(value) for user, value in claims.items()},
        )

    async def load(self, counts: Mapping[str, Counts], limits: Mapping[str, UserLimit] | None = None) -> None:
        """Load products that Redis does not hold under these generations; the caller holds their row locks in Postgres.

        Args:
            counts: by product.
            limits: of those that have one.

        Raises:
            redis.RedisError: Redis did not answer.
        """
        limits = limits or {}
        calls: list[tuple[str, str, list[Any]]] = []
        for product_id, now in counts.items():
            arguments: list[Any] = [now.generation, now.version, now.on_hand, now.reserved, "", now.claim]
            if (limited := limits.get(product_id)) is not None:
                arguments[4] = limited.limit
                arguments += [part for one in limited.units.items() for part in one]
            calls.append(("load", product_id, arguments))
        await self._run(calls)
        self._limited.difference_update(counts)
        self._limited.update(limits)
        self.invalidated({product_id: now.generation for product_id, now in counts.items()})

    # Redis, available or not

    def _resting(self) -> bool:
        return time.monotonic() < self._unavailable_until

    def _note_unavailable(self, error: BaseException) -> None:
        self._unavailable_until = time.monotonic() + UNAVAILABLE_PAUSE_S
        self._shas = {}  # the one that answers next may be another
        if not self.is_unavailable:
            self.is_unavailable = True
            log.warning("redis is unavailable, Postgres decides alone", error=repr(error))

    def _note_available(self) -> None:
        if self.is_unavailable:
            self.is_unavailable = False
            log.warning("redis is available again")

    # Which Redis it is

    async def enter(self) -> None:
        """Learn which Redis this is, have Postgres note it, and load the scripts for the epoch that follows.

        Raises:
            PrefixTaken: the keys are another pipeline's.
            redis.RedisError: Redis did not answer, or Postgres did not (:class:`NotEntered`).
        """
        async with self.client.client() as one:  # one connection: the texts are for the process that said which it is
            await self._learn(one, notes=True)
            await one.set(self.keys.pipeline, self._ground.pipeline, nx=True)
            await check_prefix(one, self.keys, self._ground.pipeline)
            shas = {}
            for name in SCRIPTS:
                text = script_text(name, self._epoch)
                await one.script_load(text)
                shas[name] = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._shas = shas

    async def look(self, gates: int) -> None:
        """Have Redis entered again before it is next asked, where it is another one, or was; ``gates``: by Postgres."""
        if not self._shas:
            return
        try:
            is_same = gates == self._ground.gates and await self._identity(self.client) == self._redis
        except (RedisError, OSError):
            return  # whoever asks it next notes that it is away, and enters it again
        if not is_same:
            self._shas = {}

    async def _learn(self, one: redis.Redis, *, notes: bool) -> None:
        now = await self._identity(one)
        if notes or now != self._redis:
            self._ground = await self._enter_by_truth(now, notes)
            named = ":".join((now, *map(str, self._ground)))
            epoch = hashlib.sha1(named.encode(), usedforsecurity=False).hexdigest()[:EPOCH_CHARS]
            metrics.REDIS_EPOCHS.inc(epoch != self._epoch)
            self._redis, self._epoch = now, epoch

    @staticmethod
    async def _identity(one: redis.Redis) -> str:
        """Return what names a Redis: its process, and its replication history, which changes when it is promoted."""
        return f"{(await one.info('server'))['run_id']}:{(await one.info('replication'))['master_replid']}"

    # Scripts

    async def _ensure_loaded(self, product_ids: Iterable[str]) -> None:
        missing = list(dict.fromkeys(product_ids))
        if not missing:
            return
        if not self._shas:
            await self.enter()  # now: it asks Postgres, and soon a connection to that is taken, with locks
        with metrics.REDIS_REBUILD.time():
            for start in range(0, len(missing), LOAD_PRODUCTS_MAX):
                await self._load_from_truth(missing[start : start + LOAD_PRODUCTS_MAX], self.load)
        metrics.REDIS_LOADED.inc(len(missing))

    async def _run(
        self, calls: Sequence[tuple[str, str, Sequence[Any]]], messages: Sequence[tuple[str, bytes]] = ()
    ) -> list[Any]:
        """Run scripts in one round trip; every script is safe to run again, so a lost script cache costs a second one.

        Raises:
            RedisError: Redis did not answer, or not as it should.
        """
        if not calls and not messages:
            return []
        try:
            return await self._run_all(calls, messages)
        except OSError as error:  # one that redis-py did not wrap; callers must not take it for an OSError of Postgres
            raise redis.ConnectionError(repr(error)) from error

    async def _run_all(
        self, calls: Sequence[tuple[str, str, Sequence[Any]]], messages: Sequence[tuple[str, bytes]]
    ) -> list[Any]:
        for attempt in range(_ATTEMPTS):
            if not self._shas:
                await self.enter()
            commands: list[tuple[Any, ...]] = []
            for name, product_id, arguments in calls:
                keys = [self.keys.stock(product_id), self.keys.takes(product_id)]
                if name in _USER_SCRIPTS or (name == "reserve" and product_id in self._limited):
                    keys += [self.keys.users(product_id), self.keys.claims(product_id)]
                commands.append(("EVALSHA", self._shas[name], len(keys), *keys, *arguments))
            commands += (("PUBLISH", channel, message) for channel, message in messages)
            answers = await ask_at_once(self.client, commands)
            faults = [answer for answer in answers if isinstance(answer, Exception)]
            if not faults:
                return answers[: len(calls)]
            if not any(isinstance(fault, NoScriptError) for fault in faults) or attempt == _ATTEMPTS - 1:
                raise faults[0]
            self._shas = {}
        raise ResponseError("unreachable")
