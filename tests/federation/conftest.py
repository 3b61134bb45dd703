"""Fixtures of the federation's tests."""

from __future__ import annotations

import pytest

from tests.federation.rounds_world import ShrinkingEngine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ShrinkingEngine:
    """Rounds train with this engine instead of a real one."""
    from federation import engines

    own = ShrinkingEngine()
    monkeypatch.setattr(engines, "get_engine", lambda name: own)
    return own
