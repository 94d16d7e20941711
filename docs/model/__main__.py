"""``python -m docs.model [--quick] [NAME …]``: check configurations, two at a time.

Exits with 1 where one does not end as it says itself.

A name chooses the configurations that begin with it.  One that breaks as expected is as good as one that holds; the
shortest way there is printed with ``--traces``, and where it was not expected.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from docs.model.checker import Model, Result, explore
from docs.model.protocol import Constants, Orders
from docs.model.truncated import Log, LogConstants

CONFIGURATIONS = Path(__file__).parent / "cfg"
AT_ONCE = 2


class Configuration(NamedTuple):
    """A file of ``cfg/``.

    Attributes:
        about: its comment: the rule that it shows, and the situation.
        expect: part of the name of the invariant that breaks; empty: it holds.
        quick: it ends within a few seconds.
    """

    name: str
    about: str
    expect: str
    quick: bool
    kind: str
    constants: dict[str, Any]

    def model(self) -> Model[Any]:
        """Return what is to be checked."""
        return Log(LogConstants(**self.constants)) if self.kind == "log" else Orders(Constants(**self.constants))

    def rules(self) -> dict[str, Any]:
        """Return the rules that this model keeps, by default: constants that are no number and no list."""
        kind = LogConstants if self.kind == "log" else Constants
        every = {one.name: one.default for one in fields(kind)}
        return {name: value for name, value in every.items() if value is True or isinstance(value, str)}

    def is_met(self, result: Result) -> bool:
        """Tell whether a search ended as expected."""
        return (
            self.expect in result.broken if self.expect and result.broken else result.broken is None and not self.expect
        )


def configurations(names: Iterable[str] = ()) -> Iterator[Configuration]:
    """Yield the configurations whose names begin with one of these; all, where none is given."""
    for file in sorted(CONFIGURATIONS.glob("*.toml")):
        text = file.read_text()
        if file.stem.startswith(tuple(names) or ""):
            values = tomllib.loads(text)
            about = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
            expect, quick, kind = values.pop("expect"), values.pop("quick"), values.pop("model")
            yield Configuration(file.stem, about, expect, quick, kind, values)


def check(configuration: Configuration) -> Result:
    """Search all states of a configuration."""
    return explore(configuration.model())


def main() -> int:
    """Check the configurations named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m docs.model", description="check the model of the order protocol")
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings of configurations' names; all by default")
    parser.add_argument("--quick", action="store_true", help="only those that end within a few seconds")
    parser.add_argument("--traces", action="store_true", help="print the shortest way to what breaks, expected or not")
    arguments = parser.parse_args()
    chosen = [one for one in configurations(arguments.names) if one.quick or not arguments.quick]
    unexpected = 0
    with ProcessPoolExecutor(AT_ONCE) as pool:
        for configuration, result in zip(chosen, pool.map(check, chosen), strict=True):
            as_expected = configuration.is_met(result)
            unexpected += not as_expected
            ended = f"breaks: {result.broken}" if result.broken else f"holds (depth {result.depth})"
            note = "" if as_expected else f"  NOT AS EXPECTED: {configuration.expect or 'holds'}"
            sys.stdout.write(
                f"{configuration.name:28} {ended:72} {result.states:9,} states {result.seconds:6.1f} s{note}\n"
            )
            if arguments.traces or not as_expected:
                sys.stdout.writelines(f"    {n:3} {step}\n" for n, step in enumerate(result.trace, 1))
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen)} configurations, {unexpected} not as expected\n")
    return unexpected > 0


if __name__ == "__main__":
    sys.exit(main())
