"""An explicit-state model checker: breadth first, each state once, so its counterexamples are the shortest.

A state is at rest where no step of kind PROGRESS is left.  Checked are the invariants of every state, further ones of states
at rest, and that from every state one at rest is in reach by PROGRESS alone: nothing is stuck, or circles for ever.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

PROGRESS, WHIM, FORMER = "+", "!", "z"
"""Kinds of steps: what has to happen some time; faults, time and customers; what a former owner of a partition does."""

STATES_MAX = 2_000_000
"""A search that finds more ends, and counts as broken: some 3 GB."""

S = TypeVar("S", bound=Hashable)


class Model(Protocol[S]):
    """What is checked."""

    def initial(self) -> S:
        """Return the state in which everything begins."""
        ...

    def steps(self, state: S) -> Iterable[tuple[str, str, S]]:
        """Return what can happen in a state: kind, what to call it, the state after it."""
        ...

    def broken(self, state: S) -> str | None:
        """Return the name of an invariant that a state breaks."""
        ...

    def broken_at_rest(self, state: S) -> str | None:
        """Return the name of an invariant that a state breaks when it is at rest."""
        ...


@dataclass
class Result:
    """What a search has found.

    Attributes:
        broken: an invariant, if one is broken; `trace` is the shortest way there.
        seconds: of CPU.
    """

    states: int = 0
    steps: int = 0
    depth: int = 0
    seconds: float = 0.0
    broken: str | None = None
    trace: list[str] = field(default_factory=list)


class _Search(Generic[S]):
    def __init__(self, model: Model[S]) -> None:
        start = model.initial()
        self.model = model
        self.index = {start: 0}
        self.states = [start]
        self.parents = array("i", [-1])
        self.sources, self.targets = array("i"), array("i")  # of steps of progress
        self.at_rest: list[int] = []

    def run(self, result: Result) -> None:
        """Visit every state; end at the first that breaks an invariant."""
        model, at, level_end = self.model, 0, 1
        if broken := model.broken(self.states[0]):
            self._end(result, broken, 0)
        while at < len(self.states) and result.broken is None:
            if at == level_end:
                result.depth, level_end = result.depth + 1, len(self.states)
            state, rests = self.states[at], True
            for kind, _, after in model.steps(state):
                result.steps += 1
                number = self.index.setdefault(after, len(self.states))
                if number == len(self.states):
                    self.states.append(after)
                    self.parents.append(at)
                    if broken := model.broken(after):
                        return self._end(result, broken, number)
                if kind == PROGRESS:
                    rests = False
                    self.sources.append(at)
                    self.targets.append(number)
            if rests:
                self.at_rest.append(at)
                if broken := model.broken_at_rest(state):
                    return self._end(result, f"at rest: {broken}", at)
            at += 1
            if len(self.states) > STATES_MAX:
                return self._end(result, f"more than {STATES_MAX:,} states", at)
        if result.broken is None and (stuck := self._stuck()) is not None:
            self._end(result, "never comes to rest", stuck)

    def _end(self, result: Result, broken: str, number: int) -> None:
        result.broken, chain = broken, [number]
        while (parent := self.parents[chain[-1]]) >= 0:
            chain.append(parent)
        chain.reverse()
        for n, following in pairwise(chain):
            wanted = self.states[following]
            result.trace.append(next(name for _, name, after in self.model.steps(self.states[n]) if after == wanted))

    def _stuck(self) -> int | None:
        """Return a state from which no state at rest is in reach: backwards over the steps of progress."""
        count = len(self.states)
        heads = array("i", bytes(4 * (count + 1)))  # where the sources of a target begin, in a counting sort
        for target in self.targets:
            heads[target + 1] += 1
        for n in range(count):
            heads[n + 1] += heads[n]
        places, sources = array("i", heads), array("i", bytes(4 * len(self.sources)))
        for source, target in zip(self.sources, self.targets, strict=True):
            sources[places[target]] = source
            places[target] += 1
        reached, todo = bytearray(count), list(self.at_rest)
        for n in todo:
            reached[n] = 1
        while todo:
            target = todo.pop()
            for place in range(heads[target], heads[target + 1]):
                source = sources[place]
                if not reached[source]:
                    reached[source] = 1
                    todo.append(source)
        stuck = reached.find(0)
        return None if stuck < 0 else stuck


def explore(model: Model[S]) -> Result:
    """Search all states of a model."""
    result, began = Result(), time.process_time()
    search = _Search(model)
    gc.disable()  # there is no garbage, and looking for it takes half of the time
    try:
        search.run(result)
    finally:
        gc.enable()
    result.states, result.seconds = len(search.states), time.process_time() - began
    return result
