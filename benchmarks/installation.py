"""A temporary installation for benchmarks of whole services: SQLite, both stores, and simulated learners, in one folder.

``temporary(size)`` fills one in child processes through the product's own services and commands: simulate, import, fit the
encoder, train a main version, clone. ``opened(folder)`` makes this process one that works on it; a process opens one
installation in its life, since Django reads its settings once.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import in_child, usable_cores

EVENTS = 144
"""Interactions of a learner: the earlier 70 % of them are 100 training samples."""

SEED = 7


@dataclass(frozen=True)
class Size:
    """How many learners of each pool, and epochs of the main training."""

    federated: int
    curriculum: int = 60
    evaluation: int = 60
    epochs: int = 10


@contextmanager
def temporary(size: Size, *, clones: bool = True) -> Iterator[str]:
    """The folder of a filled installation, which is removed afterwards.

    Args:
        clones: whether the federated learners have their copies already.
    """
    with TemporaryDirectory(prefix="aivo-bench-") as folder:
        in_child("benchmarks.installation:fill", {"folder": folder, "size": asdict(size)})
        in_child("benchmarks.installation:train", {"folder": folder, "epochs": size.epochs}, threads=usable_cores())
        if clones:
            in_child("benchmarks.installation:clone", {"folder": folder})
        yield folder


def opened(folder: str) -> None:
    """Set Django up on the installation in ``folder``, with an up-to-date database."""
    os.environ.update(
        {
            "DJANGO_SETTINGS_MODULE": "aivo_site.settings",
            "SECRET_KEY": "only-for-benchmarks-0123456789-abcdefghijklmnopqrstuvwxyz",
            "DATABASE_URL": f"sqlite:///{Path(folder) / 'db.sqlite3'}",
            "AIVO_MAIN_MODEL_PATH": str(Path(folder) / "main"),
            "AIVO_LEARNER_MODELS_PATH": str(Path(folder) / "learners"),
            "USE_FEDERATED_LEARNING": "true",
            "DEBUG": "false",
        }
    )
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)


def fill(folder: str, size: dict[str, int]) -> dict[str, Any]:
    """Simulate and import the learners of all pools, with consent. Called in a child process."""
    opened(folder)
    from learners.models import Pool
    from learners.registration import register_organisation
    from learners.simulator import Simulator

    counts = Size(**size)
    everyone = counts.curriculum + counts.evaluation + counts.federated
    simulator = Simulator(SEED, learners=everyone, prefix="bench")
    organisation = register_organisation(slug="bench", name="Simulated learners of a benchmark")
    pools = {
        Pool.CURRICULUM: range(counts.curriculum),
        Pool.EVALUATION: range(counts.curriculum, counts.curriculum + counts.evaluation),
        Pool.FEDERATED: range(counts.curriculum + counts.evaluation, everyone),
    }
    return {str(pool): _import(simulator, organisation, pool, indices) for pool, indices in pools.items()}


def train(folder: str, epochs: int) -> dict[str, Any]:
    """Train the first main version, which becomes active. Called in a child process: it loads TensorFlow."""
    opened(folder)
    from aivo_site.jobs.services import run_inline

    return dict(run_inline(kind="train_main_model", params={"epochs": epochs}).result or {})


def clone(folder: str) -> dict[str, Any]:
    """Give every federated learner a copy. Called in a child process."""
    opened(folder)
    from aivo_site.jobs.services import run_inline

    return dict(run_inline(kind="clone_learner_models", params={}).result or {})


def use_engine(engine: str) -> None:
    """Let the installation's policy train with ``engine``."""
    from federation.policies import default_policy

    row = default_policy()
    row.engine = engine
    row.full_clean()
    row.save()


def _import(simulator: Any, organisation: Any, pool: Any, indices: range) -> int:
    from learners.consents import ConsentGiven
    from learners.importing import import_interactions
    from learners.models import ConsentKind
    from learners.registration import register_learner
    from learners.simulator import ROW_COLUMNS

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ROW_COLUMNS)
    writer.writeheader()
    for index in indices:
        learner = simulator.learner(index)
        register_learner(
            learner_id=learner.learner_id,
            organisation=organisation,
            pool=pool,
            grade_band=learner.grade_band,
            profile=learner.profile,
        )
        writer.writerows(learner.answer(learner.next_task()) for _ in range(EVENTS))
    report = import_interactions(
        source=io.BytesIO(text.getvalue().encode()),
        pool=pool,
        organisation=organisation,
        consent=ConsentGiven(
            kinds=(ConsentKind.TRAINING, ConsentKind.CONTRIBUTION), authority="simulated learners", recorded_by="benchmark"
        ),
        actor="benchmark",
    )
    if report.rows_rejected:
        raise RuntimeError(f"simulated rows were refused: {report.rejected_by_reason}")
    return report.rows_imported
