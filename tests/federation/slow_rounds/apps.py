from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from django.apps import AppConfig

from aivo_core.engine.contract import LearnerResult


class SlowRoundsConfig(AppConfig):
    name = "tests.federation.slow_rounds"
    label = "test_slow_rounds"

    def ready(self) -> None:
        from federation import engines
        from federation.rounds import sharing
        from tests.federation.rounds_world import ShrinkingEngine

        class SlowEngine(ShrinkingEngine):
            """TEST_ENGINE_DELAY: seconds per learner."""

            def train(self, **given: Any) -> Iterator[LearnerResult]:
                for result in super().train(**given):
                    time.sleep(float(os.environ.get("TEST_ENGINE_DELAY", "0")))
                    yield result

        engine = SlowEngine()
        engines.get_engine = lambda _name: engine
        sharing.TRAINED_TOGETHER = 16
        sharing.READ_TOGETHER = sharing.BLOCK
