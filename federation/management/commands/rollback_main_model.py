"""rollback_main_model: make an earlier version active again, with a reason."""

from __future__ import annotations

from typing import Any, ClassVar

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import AivoCommand, Outcome, ProgressBar
from aivo_site.jobs import services as jobs


class Command(AivoCommand):
    help = "Make an archived version the active one again. What learners contributed to later versions stays used."
    example: ClassVar[str] = 'rollback_main_model --to aivo-main-v2 --reason "path recommendations got worse"'
    result_keys: ClassVar[tuple[str, ...]] = ("active_version", "previous_version", "rebase")

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--to", help=_("an archived version; the parent of the active one when not given"))
        parser.add_argument("--reason", required=True, help=_("why; kept in the audit log"))
        parser.add_argument("--no-rebase", action="store_true", help=_("do not move learners' models to it"))

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:
        params = {"version": options["to"], "reason": options["reason"], "rebase": not options["no_rebase"]}
        job = jobs.run_inline(kind="rollback_main_model", params=params, progress=progress)
        result = job.result or {}
        return Outcome(result, [_("%s is active again.") % result["active_version"]])
