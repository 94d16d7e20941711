"""The file from which the next run continues: whole or not at all, and never another pipeline's."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from orderstream.jobs.reconcile.checkpoint import Checkpoint, Identity, UnusableCheckpoint, default_file, load, save
from orderstream.jobs.reconcile.fold import CREATED, RESERVED, Move, Trace
from orderstream.settings import Settings

OURS = Identity("cluster", "shop", "p.", 2)
ID = "5e6e7e1c-2f52-4d2b-9a55-5d0e5a0c9a11"


def checkpoint() -> Checkpoint:
    trace = Trace("u", "card", (("1", 2), ("2", 1)), 1, 17)
    trace.published, trace.total_cents, trace.charge_id = CREATED | RESERVED, 300, "c"
    trace.prices = [100, 100]
    rival = Trace("v", "card", (("1", 2),), 0, 3)
    rival.astray = True
    trace.rivals = [rival]
    return Checkpoint(
        pipeline=OURS,
        at=datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=UTC),
        offsets={("p.orders", 0): 4, ("p.orders", 1): 18},
        sums={"1": (5, -1, 40)},
        orders={ID: trace},
        moves={ID: [Move("1", "receive", 5, 5, "why", "ann", 0, 1)]},
        dead=[(0, 1)],
        asked={ID: (0, 2)},
        claims={1: 1_795_000_000_000},
    )


def fields(trace: Trace) -> list[Any]:
    rivals = [fields(rival) for rival in trace.rivals or ()]
    return [getattr(trace, name) for name in trace.__slots__ if name != "rivals"] + rivals


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "here.json"
    save(file, checkpoint())
    loaded = load(file, OURS)
    assert loaded is not None
    ours = checkpoint()
    assert fields(loaded.orders.pop(ID)) == fields(ours.orders.pop(ID))
    assert loaded == ours
    assert [entry.name for entry in file.parent.iterdir()] == ["here.json"]


def test_without_a_file_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert load(tmp_path / "none.json", OURS) is None


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "here.json"
    save(file, checkpoint())
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left on the disk")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save(file, checkpoint())
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["here.json"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Identity("another", "shop", "p.", 2), "cluster_id 'cluster', here 'another'"),
        (Identity("cluster", "another", "p.", 2), "app_id"),
        (Identity("cluster", "shop", "", 2), "topic_prefix"),
        (Identity("cluster", "shop", "p.", 3), "partitions 2, here 3"),
    ],
)
def test_a_foreign_checkpoint_is_refused_and_what_is_foreign_is_named(
    tmp_path: Path, other: Identity, message: str
) -> None:
    save(tmp_path / "here.json", checkpoint())
    with pytest.raises(UnusableCheckpoint, match=r"is of another pipeline") as caught:
        load(tmp_path / "here.json", other)
    assert message in str(caught.value)
    assert "--from-beginning" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "can't be read"),
        (b"{", "can't be read"),
        (b"[]", "is no checkpoint"),
        (b"{}", "is no checkpoint"),
        (b'{"format": 99}', "has format 99"),
        (b'{"format": 5}', "is damaged"),
        (b'{"format": 5, "pipeline": {"cluster_id": "cluster"}}', "is damaged"),
        (b'{"format": 5, "pipeline": []}', "is damaged"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    file = tmp_path / "here.json"
    file.write_bytes(text)
    with pytest.raises(UnusableCheckpoint, match=message):
        load(file, OURS)


def test_a_cut_checkpoint_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    save(file, checkpoint())
    body = orjson.loads(file.read_bytes())
    for name in body:
        if name not in ("format",):
            file.write_bytes(orjson.dumps({key: value for key, value in body.items() if key != name}))
            with pytest.raises(UnusableCheckpoint, match="is damaged"):
                load(file, OURS)


def test_each_pipeline_has_a_file_of_its_own(tmp_path: Path) -> None:
    ours = Settings(_env_file=None, local_dir=tmp_path, app_id="shop")
    assert default_file(ours) == tmp_path / "reconcile" / "shop.json"
