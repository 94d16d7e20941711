"""What the owner of a product makes of what another home wants of a line.  Pure, and the same however often it is asked.

::

    (none) ──hold──▶ h held ──commit──▶ c committed ──return──▶ n returned
       │                │
       │                └──release──▶ r released
       ├──hold, too few──▶ x refused
       └──release, which came before its hold──▶ r released
"""

from __future__ import annotations

from typing import NamedTuple

from orderstream.agents.lifecycle import LineHeld, LineRefused, LineSettled


class Held(NamedTuple):
    """A line as its owner has it; see the table ``holds``."""

    state: str
    price_cents: int | None
    reason: str | None


class Settling(NamedTuple):
    """What becomes of a line.

    Attributes:
        state: the new one; None: as it is.
        movement: of its units in the ledger, where they move.
    """

    state: str | None
    movement: str | None = None


NOTHING = Settling(None)

_STEPS = {
    ("h", "commit"): Settling("c", "commit"),
    ("h", "release"): Settling("r", "release"),
    ("h", "return"): Settling("n", "release"),  # its commit is on another way, and finds that it is too late
    ("c", "return"): Settling("n", "return"),
}


def settle(held: Held, action: str) -> Settling:
    """Decide about a line that its owner has: what ``commit``, ``release`` or ``return`` make of it."""
    return _STEPS.get((held.state, action), NOTHING)


def answer(product_id: str, held: Held) -> LineHeld | LineRefused | LineSettled:
    """Return what the line's home is told: where the line stands."""
    if held.state == "h":
        return LineHeld(product_id, held.price_cents or 0)
    if held.state == "x":
        return LineRefused(product_id, held.reason or "insufficient_stock")
    return LineSettled(product_id, held.state)
