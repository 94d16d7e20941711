"""Fixtures of the chaos tests: those of the end-to-end tests."""

from __future__ import annotations

from tests.e2e.conftest import pipeline

__all__ = ["pipeline"]
