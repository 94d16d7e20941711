"""The judge of the chaos tests shares no code with the product, and yet takes the same records for sound."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderstream.errors import InvalidRecord
from orderstream.settings import load
from orderstream.streams.orders import Limits, decode
from orderstream.streams.partitions import product_partition
from tests.chaos import auditor
from tests.chaos.test_poison import POISON

SETTINGS = load(_env_file=None)
LIMITS = Limits(SETTINGS.order_lines_max, SETTINGS.line_quantity_max, SETTINGS.order_bytes_max)
LATER = {"unknown_product", "insufficient_stock"}
"""Reasons that are not in the record."""


def test_it_imports_nothing_of_the_product() -> None:
    tree = ast.parse(Path(auditor.__file__).read_text())
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert not {name.split(".")[0] for name in names} & {"orderstream", "tests", "aiokafka", "faust"}


@given(st.text(min_size=1), st.integers(1, 1024))
def test_it_places_keys_as_the_product_does(key: str, partitions: int) -> None:
    assert auditor.partition_of(key, partitions) == product_partition(key, partitions)


def is_sound(topic: str, value: bytes | None) -> bool:
    """Tell whether the auditor takes a record for sound."""
    match topic:
        case "orders":
            return auditor.order_of(value, SETTINGS) is not None
        case "order-commands":
            return auditor.order_command_of(value) is not None
        case "stock-commands":
            return auditor.stock_command_of(value) is not None
    return auditor.rows_of(auditor.Record(topic, product_partition("p1", 4), 0, value, {}), 4) is not None


@pytest.mark.parametrize(
    ("topic", "value", "reason"),
    [
        pytest.param(topic, value, why, id=f"{topic}-{n}-{why}")  # ids in it are drawn anew in each process
        for topic, each in POISON.items()
        for n, (value, why) in enumerate(each)
    ],
)
def test_it_takes_poison_for_poison(topic: str, value: bytes | None, reason: str) -> None:
    assert is_sound(topic, value) == (reason in LATER)


odd = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 3), st.just(2**63), st.floats(), st.text(max_size=3), st.just([]),
    st.sampled_from(["\u00a0x", "a" * 64, "a" * 65, "1", "x y", "\x00", "2026-11-26T10:00:00Z", "2026-11-26T10:00:00",
                     "b7a7ad47-3b8c-4b1e-9a57-6c1d2f3e4a5b", "B7A7AD473B8C4B1E9A576C1D2F3E4A5B",
                     "b7a7ad47-3b8c-8b1e-9a57-6c1d2f3e4a5b"]),
)  # fmt: skip
items = st.lists(
    st.fixed_dictionaries({"product_id": odd, "quantity": odd}, optional={"colour": odd})
    | st.fixed_dictionaries({"product_id": st.sampled_from(["p", 7]), "quantity": st.integers(1, 6_000)}),
    max_size=3,
)
order_records = st.fixed_dictionaries(
    {"user_id": st.just("u") | odd, "items": items | odd, "payment_method": st.just("card") | odd},
    optional={"order_id": odd, "idempotency_key": odd, "placed_at": odd, "colour": odd},
)


@given(order_records)
def test_it_takes_an_order_for_what_the_product_takes_it_for(body: dict[str, object]) -> None:
    value = json.dumps(body).encode()
    found = auditor.order_of(value, SETTINGS)
    try:
        must = decode(value, LIMITS, topic="orders", partition=0, offset=0, timestamp=0)
    except InvalidRecord:
        # With a key the id has to be the one that follows from it: that is the product's to say.
        assert found is None or (found.order_id is not None and found.key is not None)
    else:
        assert found is not None
        assert (found.user_id, found.payment_method, list(found.lines.items())) == (
            must.user_id, must.payment_method, [*must.lines]
        )  # fmt: skip
