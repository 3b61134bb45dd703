"""The whole pipeline on simulated learners: a door that calls the same services and jobs as everyone else.

Nothing here is made up for the show: learners are simulated by ``learners.simulator``, and every figure comes from the
services that real learners use. Running it again changes what has something new to do and nothing else.
"""

from __future__ import annotations

import csv
import io
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from django.contrib.auth import get_user_model
from django.utils.translation import gettext as _

from aivo_site.errors import DomainError, Skipped
from aivo_site.jobs.services import run_inline
from learners.consents import ConsentGiven
from learners.importing import import_interactions
from learners.models import ConsentKind, Learner, Organisation, Pool
from learners.registration import register_learner, register_organisation
from learners.simulator import ROW_COLUMNS, Simulator

ORGANISATION = "demo-district"
PREFIX = "demo"
ADMIN_USER = "admin"
SEED = 20
"""Every demo has the same learners."""

Progress = Callable[[int, int, str], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoSize:
    """How many simulated learners, their mean events, and the epochs of the main training."""

    curriculum: int
    evaluation: int
    federated: int
    events: int
    epochs: int

    @property
    def learners(self) -> int:
        return self.curriculum + self.evaluation + self.federated


SIZES = {
    "small": DemoSize(curriculum=40, evaluation=16, federated=12, events=110, epochs=4),
    "normal": DemoSize(curriculum=150, evaluation=40, federated=60, events=130, epochs=10),
}


@dataclass
class DemoReport:
    """What there is after a demo; the keys of the command's JSON object."""

    versions: list[dict[str, Any]] = field(default_factory=list)
    learners: int = 0
    sessions: int = 0
    rounds: list[dict[str, Any]] = field(default_factory=list)
    active_version: str | None = None
    admin_user: str | None = None
    admin_password: str | None = None
    steps: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def run_demo(*, size: DemoSize, say: Say, progress: Progress | None = None) -> DemoReport:
    """Simulate, import, prepare, train main, clone, train locally, aggregate; then count what there is.

    Raises:
        DemoRefused: the installation holds learners that are not the demo's.
        DomainError: a step was refused or failed.
    """
    started = time.monotonic()
    _check_only_demo_learners()
    report = DemoReport()
    say(_("1/6 simulating and importing %(n)s learners") % {"n": size.learners})
    report.steps["import"] = _import(size)
    for number, (kind, text, params) in enumerate(_jobs(size), start=2):
        say(f"{number}/6 {text}")
        report.steps[kind] = _run(kind, params, say, progress)
    report.admin_user, report.admin_password = _ensure_admin()
    _count(report)
    report.seconds = time.monotonic() - started
    return report


class DemoRefused(DomainError):
    """The demo is for empty installations."""

    default_code = "demo_refused"


def _jobs(size: DemoSize) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        ("prepare_curriculum_data", _("fitting the encoder on the curriculum learners"), {}),
        ("train_main_model", _("training the main model"), {"epochs": size.epochs}),
        ("clone_learner_models", _("giving each federated learner a copy"), {}),
        ("train_learner_models", _("training each copy on its learner's own interactions"), {}),
        ("run_federated_aggregation", _("running a federated round"), {}),
    ]


def _run(kind: str, params: Mapping[str, Any], say: Say, progress: Progress | None) -> Any:
    """One job, run here; a step that has nothing to do says so and the demo goes on."""
    try:
        return run_inline(kind=kind, params=params, progress=progress).result
    except Skipped as skipped:
        say(f"    {skipped}")
        return {"skipped": str(skipped)}


def _check_only_demo_learners() -> None:
    others = Learner.objects.exclude(organisation__slug=ORGANISATION).count()
    if others:
        raise DemoRefused(
            _("The demo fills an empty installation with simulated learners; this one holds %(n)s others.") % {"n": others}
        )


def _import(size: DemoSize) -> dict[str, int]:
    organisation = register_organisation(slug=ORGANISATION, name=_("Demo district (simulated learners)"))
    simulator = Simulator(SEED, learners=size.learners, prefix=PREFIX)
    pools = {
        Pool.CURRICULUM: range(size.curriculum),
        Pool.EVALUATION: range(size.curriculum, size.curriculum + size.evaluation),
        Pool.FEDERATED: range(size.curriculum + size.evaluation, size.learners),
    }
    return {pool.value: _import_pool(simulator, organisation, pool, indices, size.events) for pool, indices in pools.items()}


def _import_pool(simulator: Simulator, organisation: Organisation, pool: Pool, indices: range, events: int) -> int:
    for index in indices:
        learner = simulator.learner(index)
        register_learner(
            learner_id=learner.learner_id,
            organisation=organisation,
            pool=pool,
            grade_band=learner.grade_band,
            profile=learner.profile,
        )
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ROW_COLUMNS)
    writer.writeheader()
    writer.writerows(simulator.rows(events=events, indices=indices))
    report = import_interactions(
        source=io.BytesIO(text.getvalue().encode()),
        pool=pool,
        organisation=organisation,
        consent=ConsentGiven(
            kinds=(ConsentKind.TRAINING, ConsentKind.CONTRIBUTION), authority="simulated learners of the demo", recorded_by="demo"
        ),
        actor="demo",
    )
    if report.rows_rejected:
        raise DemoRefused(_("The demo's own rows were refused: %(reasons)s") % {"reasons": report.rejected_by_reason})
    return report.rows_imported


def _ensure_admin() -> tuple[str, str | None]:
    """The name of an administrator; with a new password where none existed."""
    users = get_user_model().objects
    existing = users.filter(is_superuser=True, is_active=True).order_by("date_joined").first()
    if existing is not None:
        return existing.get_username(), None
    password = secrets.token_urlsafe(12)
    users.create_superuser(username=ADMIN_USER, email="", password=password)
    return ADMIN_USER, password


def _count(report: DemoReport) -> None:
    from federation.models import AggregationRound, ModelTrainingSession
    from models_store.models import MainModelVersion, VersionStatus

    report.versions = [
        {"version": row.version, "status": row.status, "origin": row.origin}
        for row in MainModelVersion.objects.order_by("sequence")
    ]
    active = MainModelVersion.objects.filter(status=VersionStatus.ACTIVE).first()
    report.active_version = active.version if active else None
    report.learners = Learner.objects.filter(organisation__slug=ORGANISATION).count()
    report.sessions = ModelTrainingSession.objects.count()
    report.rounds = [
        {
            "round": row.sequence,
            "state": row.state,
            "reason": row.reason,
            "performance_improvement": row.performance_improvement,
        }
        for row in AggregationRound.objects.order_by("sequence")
    ]
