"""federation_status: versions, learners, rounds and jobs in figures."""

from __future__ import annotations

from typing import Any, ClassVar

from django.utils.translation import gettext as _

from aivo_site.commands import AivoCommand, Outcome, ProgressBar
from federation.status import federation_status


class Command(AivoCommand):
    help = "Say how the federation stands: active version, learners' models, sessions, rounds and jobs."
    example: ClassVar[str] = "federation_status --json"
    result_keys: ClassVar[tuple[str, ...]] = (
        "active_version",
        "main_versions",
        "learners",
        "active_learner_models",
        "sessions",
        "total_federated_updates",
        "average_performance",
        "rounds",
        "last_round",
        "privacy",
        "jobs",
    )

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:  # noqa: ARG002
        result = federation_status()
        lines = [f"{name.replace('_', ' '):<24} {_shown(value)}" for name, value in result.items()]
        return Outcome(result, lines)


def _shown(value: Any) -> str:
    if value is None:
        return _("none")
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) or _("none")
    return f"{value:.4f}" if isinstance(value, float) else str(value)
