"""Installations to break, each made once per test run up to a stage, and copied for every test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.faults.installation import Installation
from tests.faults.steps import AGGREGATE, CLONE, TRAIN_LEARNERS, TRAIN_MAIN

Opened = Callable[[Installation], Installation]


@pytest.fixture(scope="session")
def stages(django_db_blocker: Any) -> Iterator[None]:
    """Database access without the test run's own database."""
    with django_db_blocker.unblock():
        yield


@pytest.fixture(scope="session")
def imported(stages: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Learners of every pool with their interactions, and nothing learnt."""
    made = Installation(tmp_path_factory.mktemp("faults") / "imported")
    made.create()
    try:
        with made.started("-m", "tests.faults.seed", str(made.folder)) as process:
            _out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err.decode()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="session")
def main_trained(imported: Installation) -> Iterator[Installation]:
    """A main version that was trained without interruption, and clones of it."""
    yield from _next_stage(imported, "main-trained", TRAIN_MAIN, CLONE)


@pytest.fixture(scope="session")
def learners_trained(main_trained: Installation) -> Iterator[Installation]:
    """Every learner's own model trained once, without interruption."""
    yield from _next_stage(main_trained, "learners-trained", TRAIN_LEARNERS)


@pytest.fixture(scope="session")
def aggregated(learners_trained: Installation) -> Iterator[Installation]:
    """One round, without interruption."""
    yield from _next_stage(learners_trained, "aggregated", AGGREGATE)


def _next_stage(before: Installation, name: str, *commands: tuple[str, ...]) -> Iterator[Installation]:
    made = before.copy_to(before.folder.parent / name)
    try:
        for command in commands:
            made.done(*command)
        yield made
    finally:
        made.remove()


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[Opened]:
    """A copy of a stage for this test alone, whose rows this process can read."""
    with ExitStack() as stack:

        def copy(stage: Installation) -> Installation:
            made = stage.copy_to(tmp_path / "installation")
            stack.callback(made.remove)
            stack.enter_context(made.opened())
            return made

        yield copy
