"""Writes the scheduler's rows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from django.utils.translation import gettext as _

from aivo_site.commands import AivoCommand, Outcome, ProgressBar
from aivo_site.jobs.schedules import setup_schedules


class Command(AivoCommand):
    help = _("Create or correct the schedules: weekly aggregation, garbage collection, janitor. A second time changes nothing.")
    example = "setup_schedules"
    result_keys = ("created", "updated", "unchanged", "removed")

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:  # noqa: ARG002
        result = asdict(setup_schedules())
        return Outcome(result, [f"{name}: {', '.join(names) or '-'}" for name, names in result.items()])
