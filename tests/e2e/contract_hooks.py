"""What schemathesis is not to take for valid: rules of the API that a schema can't say.  Loaded by ``test_contract.py``."""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis.generation import GenerationMode


def has_fraction(value: Any) -> bool:
    """Tell whether a whole number is written with a fraction, like 2.0: JSON Schema's integer, and refused by the API."""
    if isinstance(value, dict):
        return any(has_fraction(member) for member in value.values())
    if isinstance(value, list):
        return any(has_fraction(member) for member in value)
    return isinstance(value, float)


@schemathesis.hook
def filter_case(_context: Any, case: Any) -> bool:
    """Keep a case, unless it is called valid and is not."""
    if case.meta is None or case.meta.generation.mode != GenerationMode.POSITIVE:
        return True
    if case.operation.path.endswith("/events"):
        return False  # of an order that does not exist: it is waited for; test_cancel.py follows those that do
    if "cursor" in (case.query or {}):
        return False  # drawn by nobody who got it from the API
    body = case.body if isinstance(case.body, dict) else {}
    keyed = body.get("idempotency_key") is not None or "Idempotency-Key" in (case.headers or {})
    if body.get("order_id") is not None and keyed:
        return False  # the id follows from the key
    return not has_fraction(body)
