"""Every product with what it sold and what that brought, and when it will be sold out: read once for all who look.

The rows come from the view ``product_sales``.  How fast units go is known from what was read in the last minutes, which is
noted in the background, so a page that is opened knows it at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from orderstream.http.stats.fresh import Fresh
from orderstream.sql.store import TRANSIENT, Store, query

READ_S = 1.0
"""The products are read once a second at most, whoever looks."""

NOTE_S, KEEP_S = 10.0, 300.0
"""Every ten seconds it is noted how many units each product has given; a rate is that of the last five minutes."""

LEAST_S = 20.0
"""What was seen for a shorter time makes no rate."""

PRODUCTS_MAX = 20_000
"""Products that are read, those that sold most: reading more of them would hold the orders up."""

SOON_S = 3_600.0
"""A product that will be sold out within this time is running out."""


class Product(NamedTuple):
    """A product as people read it.

    Attributes:
        available: units left to be ordered; further ones are reserved.
        revenue_cents: what the units brought that are sold.
        rate: units that orders took per second, in the last minutes; None while that is not known.
    """

    product_id: str
    name: str
    price_cents: int
    available: int
    reserved: int
    sold: int
    revenue_cents: int
    limit_per_user: int | None
    rate: float | None = None

    @property
    def sell_through(self) -> float:
        """How much of what was there is sold: 0 to 1."""
        had = self.available + self.reserved + self.sold
        return self.sold / had if had else 0.0

    @property
    def sold_out(self) -> bool:
        """Whether no unit is left to be ordered."""
        return self.available <= 0

    @property
    def lasts_s(self) -> float | None:
        """In how many seconds it will be sold out at this rate: 0 if it is, None where nothing says so."""
        if self.sold_out:
            return 0.0
        return self.available / self.rate if self.rate else None

    @property
    def running_out(self) -> bool:
        """Whether it will be sold out soon."""
        return not self.sold_out and self.lasts_s is not None and self.lasts_s <= SOON_S


class Totals(NamedTuple):
    """Sums over all products; units but for ``products``, ``sold_out`` and ``running_out``."""

    products: int
    sold_out: int
    running_out: int
    available: int
    reserved: int
    sold: int
    revenue_cents: int


def totals(products: Sequence[Product]) -> Totals:
    """Return the sums."""
    return Totals(
        len(products),
        sum(one.sold_out for one in products),
        sum(one.running_out for one in products),
        sum(one.available for one in products),
        sum(one.reserved for one in products),
        sum(one.sold for one in products),
        sum(one.revenue_cents for one in products),
    )


class Pace:
    """How fast orders take units: what each product had given, noted now and then."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, Mapping[str, int]]] = deque()

    def note(self, now: float, given: Mapping[str, int]) -> None:
        """Note how many units each product has given: sold and held ones."""
        self._seen.append((now, given))
        while now - self._seen[0][0] > KEEP_S:
            self._seen.popleft()

    def rate(self, product_id: str, now: float, given: int) -> float | None:
        """Return the units per second since the oldest note that has the product; never negative, None without one."""
        for at, before in self._seen:
            if now - at < LEAST_S:
                return None
            if product_id in before:
                return max(0.0, (given - before[product_id]) / (now - at))
        return None


class Shelf:
    """The products of a pipeline.

    Args:
        store: connected before the first read.
        clock: seconds, going forward only.
    """

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock
        self._pace = Pace()
        self._read = Fresh(self._products, READ_S, clock)

    async def _products(self) -> list[Product]:
        rows = await self._store.pool.fetch(query("product_sales"), PRODUCTS_MAX)
        now = self._clock()
        found = []
        for row in rows:
            rate = self._pace.rate(row["product_id"], now, row["sold"] + row["reserved"])
            found.append(Product(**{**row, "revenue_cents": int(row["revenue_cents"])}, rate=rate))
        return found

    async def products(self) -> list[Product]:
        """Return all products, those that sold most first, as of a second ago.

        Raises:
            TRANSIENT: Postgres does not answer.
        """
        return await self._read.get()

    async def product(self, product_id: str) -> Product | None:
        """Return one product."""
        return next((one for one in await self.products() if one.product_id == product_id), None)

    async def note(self) -> None:
        """Note what each product has given; called every :data:`NOTE_S`."""
        with suppress(*TRANSIENT):  # the stages tell that Postgres does not answer
            given = {one.product_id: one.sold + one.reserved for one in await self.products()}
            self._pace.note(self._clock(), given)


# Search and order

SHOWN: Mapping[str, tuple[str, Callable[[Product], bool]]] = {
    "all": ("All", lambda one: True),
    "soon": ("Running out", lambda one: one.running_out),
    "out": ("Sold out", lambda one: one.sold_out),
    "unsold": ("Nothing sold", lambda one: one.sold == 0),
}
"""What a list may be narrowed to: its name, and which products."""

_NEVER = math.inf

ORDERS: Mapping[str, tuple[Callable[[Product], float | str], bool]] = {
    "name": (lambda one: one.name.casefold(), False),
    "price": (lambda one: one.price_cents, True),
    "left": (lambda one: one.available, False),
    "held": (lambda one: one.reserved, True),
    "sold": (lambda one: one.sold, True),
    "through": (lambda one: one.sell_through, True),
    "revenue": (lambda one: one.revenue_cents, True),
    "rate": (lambda one: one.rate or 0.0, True),
    "lasts": (lambda one: _NEVER if one.sold_out or one.lasts_s is None else one.lasts_s, False),
}
"""What a list may be ordered by, and whether its largest come first where nothing else is asked for.

By ``lasts`` those come first that will be sold out next; those that are, are behind them.
"""


def select(products: Sequence[Product], text: str, show: str, by: str, *, descending: bool) -> list[Product]:
    """Return the products whose name or id has every word of a text, in order; equal ones by what they sold.

    Args:
        products: those that sold most first.
        text: words in any case; empty for all.
        show: of :data:`SHOWN`.
        by: of :data:`ORDERS`.
        descending: largest first.
    """
    words, wanted, key = text.casefold().split(), SHOWN[show][1], ORDERS[by][0]
    found = [
        one
        for one in products
        if wanted(one) and all(word in one.name.casefold() or word in one.product_id.casefold() for word in words)
    ]
    return sorted(found, key=key, reverse=descending)
