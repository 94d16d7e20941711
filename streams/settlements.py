"""What travels from pay to commit: held lines whose order was decided (topic ``settlements``, lists as in reservations)."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Action(StrEnum):
    """What becomes of a held line."""

    COMMIT = "commit"
    RELEASE = "release"


class Settlement(NamedTuple):
    """Commit or release one held line; for the owner of its product."""

    order_id: str
    product_id: str
    quantity: int
    action: str
