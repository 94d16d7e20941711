"""Python's garbage collector, kept from stopping a process that is at work."""

from __future__ import annotations

import gc


def settle(young_objects: int) -> None:
    """Leave what exists now out of the collector's passes, and make those rare; called before a process begins its work.

    Stages and handlers make thousands of objects for a batch or a request, and no cycles: reference counts free them.  The
    collector's own rhythm took a quarter of a worker's main thread, and stopped an ingress for a tenth of a second at a time
    to search modules and connections again.  Cycles, those of a failed call for instance, are still found.

    Args:
        young_objects: how many more must have been made than freed before it checks these. A stop grows with their
            number: a hundred thousand dead ones are 0.15 s.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(young_objects, 50, 100)
