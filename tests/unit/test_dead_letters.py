"""Dead letters: the bytes as they came, the reason in the headers, and no record that ends a stage instead."""

from __future__ import annotations

import ast
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from aiokafka.structs import ConsumerRecord
from faust.types import TP
from hypothesis import given
from hypothesis import strategies as st

from orderstream.agents import commit, pay, reserve, stock
from orderstream.agents.batches import Batch
from orderstream.agents.desk import Desk, Slip
from orderstream.agents.stage import StageOutbox
from orderstream.errors import InvalidRecord
from orderstream.settings import Settings
from orderstream.streams import headers
from orderstream.streams.codec import encode_rows
from orderstream.streams.dead_letters import CARRIED_BYTES_MAX, DETAIL_BYTES_MAX, REASONS, DeadLetter, dead_letter
from orderstream.streams.lines import LineStands, LineWanted
from orderstream.streams.partitions import product_partition
from orderstream.streams.producer import REQUEST_BYTES_MAX
from orderstream.streams.topics import DEAD_LETTERS
from orderstream.streams.upstream.consumer import Chunk

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(_env_file=None)
ORDER_ID = str(uuid.UUID(int=5))
FAULT = InvalidRecord("not_json", "record: no")


def letter(fault: InvalidRecord = FAULT, **changed: Any) -> DeadLetter:
    place = {"topic": "orders", "partition": 3, "offset": 17, "timestamp": 9}
    return dead_letter(fault, **{**place, "key": b"k", "value": b"\xff\0v", "headers": (), **changed})


# What a dead letter holds


def test_key_and_value_stay_the_bytes_that_they_were_and_the_headers_say_why() -> None:
    assert letter() == (
        b"k",
        b"\xff\0v",
        [
            ("reason", b"not_json"),
            ("detail", b"record: no"),
            ("source-topic", b"orders"),
            ("source-partition", b"3"),
            ("source-offset", b"17"),
            ("source-timestamp", b"9"),
        ],
    )


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [(b"k", None, (b"k", None)), (None, b"v", (None, b"v")), (b"", b"", (b"", b"")), (None, None, (None, b""))],
)
def test_an_absent_key_or_value_stays_absent_as_far_as_kafka_lets_it(
    key: bytes | None, value: bytes | None, kept: tuple[bytes | None, bytes | None]
) -> None:
    assert letter(key=key, value=value)[:2] == kept


def test_the_records_own_headers_stay_behind_ours_and_never_speak_for_them() -> None:
    own = [
        ("reply-to", b"x"),
        ("reason", b"forged"),
        ("trace", b"1"),
        ("trace", b"2"),
        ("source-offset", b"0"),
        ("n", None),
    ]
    headers = list(letter(headers=own).headers)
    assert headers[6:] == [("reply-to", b"x"), ("trace", b"1"), ("trace", b"2"), ("n", None)]
    assert [value for name, value in headers if name == "reason"] == [b"not_json"]
    assert [value for name, value in headers if name == "source-offset"] == [b"17"]


@given(st.text(max_size=800) | st.just("é" * 5_000) | st.just("x" + "\U0001f600" * 5_000))
def test_a_detail_is_bounded_and_stays_readable(detail: str) -> None:
    kept = dict(letter(InvalidRecord("invalid_order", detail)).headers)["detail"]
    assert len(kept) <= DETAIL_BYTES_MAX
    assert detail.startswith(kept.decode())
    assert kept.decode() == detail or len(kept) > DETAIL_BYTES_MAX - 4


@pytest.mark.parametrize(
    "large",
    [
        {"value": b"v" * 10_000_000},
        {"key": b"k" * 10_000_000},
        {"key": None, "value": b"v" * CARRIED_BYTES_MAX, "headers": [("trace", b"1")]},
        {"headers": [("trace", b"t" * 1_000_000)] * 5},
        {"headers": [("\U0001f600" * 1_000_000, b"")]},
    ],
    ids=["value", "key", "all of it", "headers", "a header's name"],
)
def test_what_compression_had_hidden_is_cut_to_what_the_broker_takes(large: dict[str, Any]) -> None:
    cut = letter(**large)
    headers = dict(cut.headers)
    carried = len(cut.key or b"") + len(cut.value or b"") + sum(len(n.encode()) + len(v) for n, v in cut.headers)
    assert carried < REQUEST_BYTES_MAX - 100_000
    assert int(headers["cut-from"]) > CARRIED_BYTES_MAX
    assert headers["reason"] == b"not_json"
    whole = {"key": b"k", "value": b"\xff\0v"} | large
    assert (whole["key"] or b"").startswith(cut.key or b"")
    assert whole["value"].startswith(cut.value)


def test_what_the_broker_takes_uncompressed_is_not_cut() -> None:
    value = b"v" * 1_048_588  # Kafka's default message.max.bytes
    kept = letter(value=value, headers=[("trace", b"1"), ("cut-from", b"forged")])
    assert kept.value == value
    assert dict(kept.headers)["trace"] == b"1"
    assert "cut-from" not in dict(kept.headers)


def test_every_reason_that_the_code_gives_is_in_the_list_and_the_list_holds_no_other() -> None:
    given_reasons = set()
    for file in [*(ROOT / "streams").glob("*.py"), *(ROOT / "agents").glob("*.py")]:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "InvalidRecord":
                first = node.args[0]
                # A name instead of a text is one of the texts that the code compares or sets it to.
                near = [first] if isinstance(first, ast.Constant) else list(ast.walk(tree))
                given_reasons |= {n.value for n in near if isinstance(n, ast.Constant) and n.value in REASONS}
                assert not isinstance(first, ast.Constant) or first.value in REASONS, f"{file.name}:{node.lineno}"
    assert given_reasons == set(REASONS)


# What the stages make dead letters of: none of these records may end the process, or it ends it over and over


def batch(topic: str, partition: int, value: bytes | None, headers: Any = (), key: bytes | None = b"k") -> Batch:
    name = SETTINGS.topic(topic)
    record = ConsumerRecord(
        topic=name,
        partition=partition,
        offset=40,
        timestamp=1_700_000_000_000,
        timestamp_type=0,
        key=key,
        value=value,
        checksum=None,
        serialized_key_size=1,
        serialized_value_size=len(value or b""),
        headers=tuple(headers),
    )
    app: Any = SimpleNamespace(consumer_generation_id=1)
    return Batch(app, [Chunk(TP(name, partition), [record])])


def rejected(topic: str, partition: int, value: bytes | None, headers: Any = ()) -> list[dict[str, bytes]]:
    """Have the stage that reads this topic sort one record; return the dead letters that it makes."""
    stage: Any = SimpleNamespace(settings=SETTINGS)
    views: Any = SimpleNamespace()
    desk, outbox, one = Desk(stage, views), StageOutbox(SETTINGS, "test"), batch(topic, partition, value, headers)
    slip = Slip(stage, one)
    taken: list[Any] = []
    match topic:
        case "orders":
            taken += reserve.sort(one, stage, outbox, slip, [])
        case "order-lines":
            commit.sort(desk, one, slip, outbox)
        case "stock-commands":
            taken += stock.sort(desk, one, outbox)
        case _:
            pay.sort(desk, one, slip, outbox)
    taken += desk.inbox
    assert slip.left == 1 + len(desk.inbox), "acknowledged with what becomes of it"
    letters = [
        dict(headers) | {"value": value or b""}
        for (name, _), records in outbox.publications().items()
        for _, value, headers in records
        if name == SETTINGS.topic(DEAD_LETTERS.name)
    ]
    assert not (taken and letters), "a record that is put aside must not be processed as well"
    assert taken or letters or outbox.handovers(), "nothing may vanish"
    return letters


INNER: dict[str, Any] = {
    "order-lines": LineWanted("hold", ORDER_ID, "1", 1, 0, "u"),
    "reservations": LineStands(ORDER_ID, "1", "h", 100, None),
}
OWNER = product_partition("1", 8)
COMMANDS: dict[str, dict[str, Any]] = {
    "order-commands": {"command": "cancel", "order_id": ORDER_ID},
    "stock-commands": {"command": "receive", "command_id": ORDER_ID, "product_id": "1", "quantity": 1},
}
ORDER = {"user_id": "u", "items": [{"product_id": "1", "quantity": 1}], "payment_method": "card"}


@pytest.mark.parametrize("topic", INNER)
@pytest.mark.parametrize(
    "value",
    [None, b"", b"\xff", b"[]", b'{"v":1}', b'{"v":1,"rows":[1]}', b'{"v":1,"rows":[[]]}', b'{"v":9,"rows":[]}'],
)
def test_a_record_on_an_inner_topic_that_no_stage_wrote_is_rejected(topic: str, value: bytes | None) -> None:
    (one,) = rejected(topic, 0, value)
    assert (one["reason"], one["source-topic"], one["source-offset"]) == (b"invalid_rows", topic.encode(), b"40")
    assert one["value"] == (value or b"")


@pytest.mark.parametrize("topic", INNER)
def test_a_row_of_the_wrong_shape_rejects_its_whole_record(topic: str) -> None:
    row = [*INNER[topic]]
    for wrong in (row[:-1], [*row, 1], [None, *row[1:]], [*row[:3], 1.5, *row[4:]]):
        (one,) = rejected(topic, OWNER, orjson.dumps({"v": 1, "rows": [row, wrong]}))
        assert one["reason"] == b"invalid_rows"


@pytest.mark.parametrize(
    ("topic", "field", "value"),
    [
        ("order-lines", "action", "sell"),
        ("order-lines", "order_id", "17"),
        ("order-lines", "quantity", -1),
        ("order-lines", "quantity", 2**31),
        ("order-lines", "home", -1),
        ("order-lines", "home", 8),
        ("order-lines", "user_id", "u\0"),
        ("reservations", "order_id", ORDER_ID + "0"),
        ("reservations", "state", "hh"),
        ("reservations", "price_cents", -1),
        ("reservations", "price_cents", 2**63),
        ("reservations", "reason", "none"),
    ],
)
def test_a_row_that_no_stage_writes_is_rejected_before_postgres_is_asked(topic: str, field: str, value: Any) -> None:
    (one,) = rejected(topic, OWNER, orjson.dumps({"v": 1, "rows": [[*INNER[topic]._replace(**{field: value})]]}))
    assert one["reason"] == b"invalid_rows"
    assert b"no stage wrote this" in one["detail"]


@pytest.mark.parametrize("topic", INNER)
def test_a_record_that_a_stage_wrote_is_not_rejected(topic: str) -> None:
    (value,) = encode_rows([INNER[topic]], 200)
    assert rejected(topic, OWNER, value) == []


def test_a_line_of_a_product_of_another_partition_rejects_its_record() -> None:
    (value,) = encode_rows([INNER["order-lines"]], 200)
    (one,) = rejected("order-lines", OWNER + 1 & 7, value)
    assert one["reason"] == b"invalid_rows"


@pytest.mark.parametrize("topic", ["orders", *COMMANDS])
@pytest.mark.parametrize(
    ("value", "reason"),
    [(None, "empty"), (b"", "empty"), (b"{", "not_json"), (b"[]", "invalid_"), (b'{"x":1}', "invalid_")],
)
def test_what_others_write_wrongly_is_rejected(topic: str, value: bytes | None, reason: str) -> None:
    (one,) = rejected(topic, 0, value)
    assert one["reason"].decode().startswith(reason)
    assert one["reason"].decode() in REASONS


@pytest.mark.parametrize("topic", ["orders", *COMMANDS])
def test_a_sound_record_is_not_rejected_and_one_in_a_foreign_partition_is_sent_on(topic: str) -> None:
    value = orjson.dumps(COMMANDS.get(topic, ORDER))
    assert rejected(topic, OWNER, value) == []
    assert rejected(topic, OWNER + 1 & 7, value) == []


def test_a_reply_channel_of_any_length_can_not_swell_the_inner_records() -> None:
    owner, value = OWNER, orjson.dumps(ORDER)
    most = b"r" * headers.REPLY_TO_CHARS_MAX
    assert rejected("orders", owner, value, [("reply-to", most)]) == []
    (one,) = rejected("orders", owner, value, [("reply-to", most + b"r")])
    assert one["reason"] == b"invalid_order"
    assert one["detail"] == b"header reply-to: 201 characters, at most 200"


def test_an_order_whose_headers_would_outgrow_the_broker_when_it_is_sent_on_is_rejected() -> None:
    owner, value = OWNER, orjson.dumps(ORDER)
    for partition in (owner, owner + 1 & 7):
        assert rejected("orders", partition, value, [("trace", b"t" * (headers.HEADERS_BYTES_MAX - 5))]) == []
        (one,) = rejected("orders", partition, value, [("trace", b"t" * (headers.HEADERS_BYTES_MAX - 4))])
        assert (one["reason"], one["detail"]) == (b"too_large", b"headers: 16385 bytes, at most 16384")


@pytest.mark.parametrize(
    "headers", [[("reply-to", None)], [("reply-to", b"\xff\xfe")], [("", b"")], [("reply-to", b"")]]
)
def test_headers_of_any_kind_do_no_harm(headers: Any) -> None:
    assert rejected("orders", OWNER, orjson.dumps(ORDER), headers) == []
