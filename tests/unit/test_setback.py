"""What a take-over compares Postgres with, where another stage lets go of everything meanwhile."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orderstream.agents.desk import Desk
from orderstream.agents.setback import Findings, Setback, Told
from orderstream.errors import OwnershipLost
from orderstream.settings import Settings
from orderstream.sql.stages import Lane
from orderstream.streams.events import rejected
from orderstream.streams.headers import LANE

STATE = {"set_backs": 0, "folded": 0, "gates": 0, "system": "s", "is_other": False}


async def look(generation: int) -> None:
    """Look at the gate: it is the one that it was."""


async def until_available(engine: str, call: Any) -> Any:
    return await call()


def lanes(claim: int, sequence: int) -> tuple[Lane, Lane]:
    pair = Lane(), Lane()
    for lane in pair:
        lane.claims, lane.sequences = {1: claim}, {1: sequence}
    return pair


class Comparing(Setback):
    """Compares without engines: Postgres answers as it should, and the topics have nothing against it."""

    def __init__(self, desk: Any, lets_go: bool) -> None:
        super().__init__(cast("Desk", desk))
        self.asked: list[str] = []
        self._lets_go = lets_go

    async def _ask(self, name: str, *arguments: Any) -> list[Any]:
        self.asked.append(name)
        answers: dict[str, list[Any]] = {"pipeline_state": [STATE], "note_set_back": [{"noted": False}]}
        return answers.get(name, [])

    async def _compare(self, *arguments: Any) -> Findings:
        desk = self._desk
        if self._lets_go:
            desk.former = (desk.intake, desk.settle)
            desk.intake, desk.settle = Lane(), Lane()
        return Findings()


def comparing(*, lets_go: bool, sequence: int) -> Comparing:
    stage = SimpleNamespace(
        settings=Settings(),
        until_available=until_available,
        gate=SimpleNamespace(look=look),
        app=SimpleNamespace(consumer=None),
    )
    intake, settle = lanes(2, sequence)
    desk = SimpleNamespace(stage=stage, intake=intake, settle=settle, partitions={1}, former=lanes(1, 5))
    return Comparing(desk, lets_go)


async def test_a_stage_that_lets_go_meanwhile_does_not_look_like_a_postgres_that_was_set_back() -> None:
    comparison = comparing(lets_go=True, sequence=5)
    with pytest.raises(OwnershipLost):
        await comparison.check()
    assert comparison.asked == ["pipeline_state", "marks_of"], "nothing is noted, and nothing is read from elsewhere"


def test_of_records_that_are_no_orders_those_under_removed_ids_are_heard() -> None:
    told, at = Told(1), datetime.now(UTC)
    place = {"partition": 1, "offset": 7}
    one, other = (str(uuid.UUID(int=n)) for n in (1, 2))
    reasons, lane = {one: "order_removed", other: "invalid_order"}, [(LANE, b"3:4")]
    told.add(
        SimpleNamespace(value=rejected(order_id, at, reason, "why", place), headers=lane)
        for order_id, reason in reasons.items()
    )
    assert (told.removed, told.rows()) == ({one}, [])


@pytest.mark.parametrize(("sequence", "is_found"), [(4, True), (5, False), (6, False)])
async def test_lanes_that_are_behind_what_this_worker_knew_are_found(sequence: int, is_found: bool) -> None:
    comparison = comparing(lets_go=False, sequence=sequence)
    if is_found:
        with pytest.raises(OwnershipLost):
            await comparison.check()
    else:
        await comparison.check()
    assert ("note_set_back" in comparison.asked) is is_found
