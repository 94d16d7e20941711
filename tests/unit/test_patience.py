"""Patience with engines that are unavailable, and what it may cost while they are there."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from aiokafka.errors import (
    InvalidTopicError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    ProducerFenced,
    TopicAuthorizationFailedError,
    UnknownProducerId,
    UnsupportedVersionError,
)

from orderstream.agents.stage import Stage
from orderstream.errors import OwnershipLost
from orderstream.settings import Settings


@pytest.fixture
def stage() -> Stage:
    none: Any = None
    return Stage(Settings(retry_wait_max_s=0.01), none, none, none, none)


def failing(times: int, error: Callable[[], BaseException]) -> tuple[Callable[[], Any], list[int]]:
    calls: list[int] = []

    async def call() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error()
        return "done"

    return call, calls


async def test_an_answer_leaves_nothing_for_the_collector(stage: Stage) -> None:
    call, _ = failing(0, KafkaConnectionError)
    gc.collect()
    gc.disable()
    try:
        for _ in range(100):
            assert await stage.until_available("kafka", call) == "done"
        assert gc.collect() < 100  # less than one object a call; a loop of tenacity leaves some fifty
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [KafkaConnectionError, ConnectionRefusedError])
async def test_an_unavailable_engine_is_asked_until_it_answers(stage: Stage, error: Any) -> None:
    call, calls = failing(4, error)
    assert await stage.until_available("kafka", call) == "done"
    assert len(calls) == 5  # none is left out, none made twice
    assert not stage.unavailable  # it is available again


@pytest.mark.parametrize(
    "error", [ProducerFenced, KafkaTimeoutError, UnknownProducerId, lambda: KafkaError("a task ended")]
)
async def test_what_a_new_client_heals_is_tried_again(stage: Stage, error: Any) -> None:
    call, calls = failing(2, error)
    assert await stage.until_available("kafka", call) == "done"
    assert len(calls) == 3


@pytest.mark.parametrize(
    "error", [MessageSizeTooLargeError, TopicAuthorizationFailedError, InvalidTopicError, UnsupportedVersionError]
)
async def test_what_does_not_pass_is_not_waited_for(stage: Stage, error: Any) -> None:
    for times in (1, 2):
        call, calls = failing(times, error)
        with pytest.raises(error):
            await stage.until_available("kafka", call)
        assert len(calls) == 1
    assert not stage.unavailable
    faults = iter([KafkaConnectionError(), error()])

    async def first_unavailable() -> None:
        raise next(faults)

    with pytest.raises(error):
        await stage.until_available("kafka", first_unavailable)


async def test_any_other_fault_is_not_tried_again(stage: Stage) -> None:
    call, calls = failing(1, lambda: ValueError("a fault of ours"))
    with pytest.raises(ValueError, match="a fault of ours"):
        await stage.until_available("postgres", call)
    assert len(calls) == 1


async def test_no_stage_waits_for_an_engine_with_a_batch_that_is_lost(stage: Stage) -> None:
    class Lost:
        def check_owned(self) -> None:
            raise OwnershipLost

    lost: Any = Lost()
    call, calls = failing(9, KafkaConnectionError)
    with pytest.raises(OwnershipLost):
        await stage.until_available("kafka", call, lost)
    assert len(calls) == 1
    assert stage.unavailable == {"kafka"}


def test_what_exists_is_not_searched_again() -> None:
    program = (
        "import gc, orderstream.collector as c; kept = [[n] for n in range(10_000)];"
        "c.settle(777); print(gc.get_threshold()[0], gc.get_freeze_count() > 10_000, len(gc.get_objects()) < 1_000)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["777", "True", "True"]
