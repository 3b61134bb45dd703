"""A management command in a process of its own, with the tests' engine instead of Keras.

    python -m tests.federation.round_process COMMAND [ARGUMENTS]

TEST_ENGINE_DELAY: seconds per learner. TEST_DIE_AT: a point of ``POINTS``, where the process kills itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import django

from aivo_core.engine.contract import LearnerResult, LearnerTask, LocalTrainingConfig
from aivo_core.network import NetworkSpec, Weights

Die = Callable[[], None]
Put = Callable[[Any, str, Any], None]


class Arrange(Protocol):
    """Arranges that the process dies at one point, through ``put(module, name, function)``."""

    def __call__(self, die: Die, put: Put = setattr) -> None: ...


def main() -> None:
    django.setup()
    from django.core.management import call_command

    from federation import engines
    from tests.federation.rounds_world import ShrinkingEngine

    class SlowEngine(ShrinkingEngine):
        def train(
            self, *, spec: NetworkSpec, weights: Weights, config: LocalTrainingConfig, tasks: Iterable[LearnerTask]
        ) -> Iterator[LearnerResult]:
            for result in super().train(spec=spec, weights=weights, config=config, tasks=tasks):
                time.sleep(float(os.environ.get("TEST_ENGINE_DELAY", "0")))
                yield result

    engine = SlowEngine()
    engines.get_engine = lambda _name: engine
    point = os.environ.get("TEST_DIE_AT", "")
    if point:
        POINTS[point](lambda: os.kill(os.getpid(), signal.SIGKILL))
    call_command(*sys.argv[1:])


def before(module: Any, name: str) -> Arrange:
    """Arrange that ``die`` is called instead of the function."""

    def arrange(die: Die, put: Put = setattr) -> None:
        def dying(*_args: Any, **_values: Any) -> Any:
            die()

        put(module, name, dying)

    return arrange


def after(module: Any, name: str, *, call: int = 1) -> Arrange:
    """Arrange that ``die`` is called after the function's ``call``-th call."""

    def arrange(die: Die, put: Put = setattr) -> None:
        real, calls = getattr(module, name), [0]

        def dying(*args: Any, **values: Any) -> Any:
            result = real(*args, **values)
            calls[0] += 1
            if calls[0] == call:
                die()
            return result

        put(module, name, dying)

    return arrange


def before_update(model: Any, *fields: str, call: int = 1) -> Arrange:
    """Arrange that ``die`` is called instead of the ``call``-th UPDATE of exactly these fields of a model."""
    from django.db.models import QuerySet

    def arrange(die: Die, put: Put = setattr) -> None:
        real, calls = QuerySet.update, [0]

        def dying(rows: QuerySet[Any], **values: Any) -> int:
            if rows.model is model and set(values) == set(fields):
                calls[0] += 1
                if calls[0] == call:
                    die()
            return real(rows, **values)

        put(QuerySet, "update", dying)

    return arrange


def _points() -> dict[str, Arrange]:
    from federation.models import Contribution
    from federation.rounds import aggregation, candidate, cohort, evidence, intake, lifecycle, promotion
    from models_store import store, versions

    return {
        "after the round's row": after(lifecycle, "claim_round"),
        "in the cohort": after(cohort, "create_cohort"),
        "between a contribution's session and its samples": before_update(Contribution, "samples", call=3),
        "after a contribution": after(cohort, "attach_session", call=3),
        "after a verdict": after(intake, "inspect", call=3),
        "before quarantine": before(intake, "quarantine_outliers"),
        "after consents were checked again": after(intake, "recheck_consent"),
        "after the attempt's row": before(aggregation, "fold_contributions"),
        "after the aggregate's file": after(store, "write_aggregate"),
        "in the transaction of the aggregate": after(aggregation, "reserve_candidate"),
        "after the aggregate's row": before(candidate, "candidate_tail"),
        "after the gate": after(evidence, "run_gate"),
        "after the candidate's files": after(store, "write_version_files"),
        "after the candidate's row": after(candidate, "publish_candidate"),
        "in the transaction of the promotion": after(versions, "activate"),
        "at the end of the promotion's transaction": after(promotion, "_record_update"),
        "after the promotion": after(promotion, "promote_round"),
    }


class _Points:
    """The points by name; looked up late, since the modules need Django to be set up."""

    names = (
        "after the round's row", "in the cohort", "between a contribution's session and its samples",
        "after a contribution", "after a verdict", "before quarantine",
        "after consents were checked again", "after the attempt's row", "after the aggregate's file",
        "in the transaction of the aggregate", "after the aggregate's row", "after the gate", "after the candidate's files",
        "after the candidate's row", "in the transaction of the promotion", "at the end of the promotion's transaction",
        "after the promotion",
    )  # fmt: skip

    def __getitem__(self, name: str) -> Arrange:
        return _points()[name]


POINTS = _Points()

if __name__ == "__main__":
    main()
