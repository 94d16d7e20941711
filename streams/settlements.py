"""What travels from pay to commit: lines whose order was decided (topic ``settlements``, lists as in reservations)."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Action(StrEnum):
    """What becomes of a line: sold, free again, or, where its order was cancelled after it was paid, taken back."""

    COMMIT = "commit"
    RELEASE = "release"
    RETURN = "return"


class Settlement(NamedTuple):
    """What becomes of one line; for the owner of its product."""

    order_id: str
    product_id: str
    quantity: int
    action: str
