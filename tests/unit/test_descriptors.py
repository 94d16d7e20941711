"""A process takes all the descriptors that it may have, and says when these are few."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

RUN = "from orderstream import descriptors; descriptors.raise_limit(1_000); print(descriptors.free())"


@pytest.mark.parametrize(("soft", "hard", "told"), [(256, 4_096, False), (512, 512, True)])
def test_the_limit_is_raised_and_a_low_one_is_told(soft: int, hard: int, told: bool) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", RUN],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )
    assert ran.stdout.splitlines()[-1] == str(hard - 256)
    assert ("few descriptors" in ran.stdout) is told
