"""How the federation stands, in figures: the same for the command, the console and the registry."""

from __future__ import annotations

from typing import Any

from django.db.models import Avg, Count, FloatField, Model, QuerySet
from django.db.models.fields.json import KeyTextTransform
from django.db.models.functions import Cast

from aivo_site.jobs.models import Job
from federation import ledger, privacy_periods
from federation.models import AggregationRound, FederatedUpdate, ModelTrainingSession
from models_store.models import Backend, MainModelVersion, PersonalizedModel, PersonalizedModelStatus, VersionStatus


def federation_status() -> dict[str, Any]:
    """The JSON object of the command ``federation_status``; what does not exist is null."""
    active = MainModelVersion.objects.filter(status=VersionStatus.ACTIVE).first()
    return {
        "active_version": None if active is None else active.version,
        "main_versions": _by(MainModelVersion.objects.all(), "status"),
        "learners": _by(PersonalizedModel.objects.all(), "status"),
        "active_learner_models": active_learner_models(),
        "sessions": ModelTrainingSession.objects.count(),
        "total_federated_updates": FederatedUpdate.objects.count(),
        "average_performance": average_performance(),
        "rounds": _by(AggregationRound.objects.all(), "state"),
        "last_round": _last_round(),
        "privacy": _privacy(),
        "jobs": _by(Job.objects.all(), "state"),
    }


def active_learner_models() -> int:
    """Personalized models that are clones of the main model and ACTIVE."""
    return PersonalizedModel.objects.filter(status=PersonalizedModelStatus.ACTIVE, backend=Backend.FEDERATED).count()


def average_performance() -> float | None:
    """Mean accuracy over the ACTIVE personalized models that were measured; None without any."""
    accuracy = Cast(KeyTextTransform("accuracy", "performance_metrics"), FloatField())
    rows = PersonalizedModel.objects.filter(status=PersonalizedModelStatus.ACTIVE, performance_metrics__accuracy__isnull=False)
    mean: float | None = rows.annotate(accuracy=accuracy).aggregate(mean=Avg("accuracy"))["mean"]
    return mean


def _by(rows: QuerySet[Any] | QuerySet[Model], field: str) -> dict[str, int]:
    counts = rows.order_by(field).values_list(field).annotate(n=Count("pk"))
    return {str(value): int(n) for value, n in counts}


def _privacy() -> dict[str, Any] | None:
    """What the open privacy period has spent; None where none is open."""
    period = privacy_periods.current_period()
    if period is None:
        return None
    spent = ledger.federation_epsilon(period, delta=period.delta)
    return {
        "period": period.number,
        "epsilon": spent.epsilon,
        "epsilon_cap": period.epsilon_cap,
        "delta": spent.delta,
        "accountant": spent.accountant,
        "entries": period.entries.count(),
    }


def _last_round() -> dict[str, Any] | None:
    row = AggregationRound.objects.select_related("base_version", "candidate_version").order_by("-sequence").first()
    if row is None:
        return None
    return {
        "round": row.sequence,
        "state": str(row.state),
        "reason": row.reason or None,
        "base_version": row.base_version.version,
        "candidate_version": None if row.candidate_version is None else row.candidate_version.version,
        "performance_improvement": row.performance_improvement,
        "started_at": row.created_at.isoformat(),
        "finished_at": None if row.finished_at is None else row.finished_at.isoformat(),
    }
