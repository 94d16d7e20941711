"""Python's garbage collector, kept from stopping a process that is at work."""

from __future__ import annotations

import gc


def settle(young_objects: int) -> None:
    """Let what stands now stand, and look for cycles seldom; called when a process is about to begin its work.

    Stages and handlers make thousands of objects for a batch or a request, and no cycles: reference counts free them.  The
    collector's own rhythm took a quarter of a worker's main thread, and stopped an ingress for a tenth of a second at a time
    to look through modules and connections again.  Cycles, those of a failed call for instance, are still found.

    Args:
        young_objects: how many more must have been made than freed before it looks at these. A stop is as long as they are
            many: a hundred thousand dead ones are 0.15 s.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(young_objects, 50, 100)
