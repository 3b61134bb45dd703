"""Runs one job in this process."""

from __future__ import annotations

from argparse import SUPPRESS
from typing import Any
from uuid import UUID

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import AivoCommand, Outcome, ProgressBar
from aivo_site.errors import UsageError
from aivo_site.jobs import services
from aivo_site.jobs.child import run_leased
from aivo_site.jobs.models import Job


class Command(AivoCommand):
    help = _("Run one waiting job in this process, whatever its queue. Workers use it for jobs that need a process of their own.")
    example = "run_job 6f1f0b3c-6a0f-4a53-9a77-0d6f3f0f0a01"
    result_keys = ("job", "kind", "state", "result", "error")
    requires_system_checks = []

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("job", type=UUID, help=_("the job's id"))
        parser.add_argument("--lease", type=UUID, help=SUPPRESS)
        parser.add_argument("--parent", type=int, help=SUPPRESS)

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:
        job_id: UUID = options["job"]
        if options["lease"]:
            run_leased(job_id, token=options["lease"], parent=options["parent"])
            return Outcome({"job": job_id})
        job = Job.objects.filter(id=job_id).first()
        if job is None:
            raise UsageError(_("There is no job %(id)s.") % {"id": job_id})
        job = services.run_here(job=job, progress=progress)
        return Outcome(
            {"job": job.id, "kind": job.kind, "state": job.state, "result": job.result},
            [_("Job %(id)s: %(state)s.") % {"id": job.id, "state": job.get_state_display()}],
        )
