"""Repairs jobs by hand or from cron."""

from __future__ import annotations

from typing import Any

from django.utils.translation import gettext as _

from aivo_site.commands import AivoCommand, Outcome, ProgressBar
from aivo_site.jobs.janitor import sweep


class Command(AivoCommand):
    help = _("End or requeue jobs whose process has died, send lost messages again, delete old rows. A schedule runs it too.")
    example = "janitor --json"
    result_keys = ("requeued", "failed", "cancelled", "resent", "released", "pruned")

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:  # noqa: ARG002
        result = sweep().to_json()
        return Outcome(result, [f"{name}: {count}" for name, count in result.items()])
