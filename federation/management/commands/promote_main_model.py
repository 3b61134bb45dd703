"""promote_main_model: make a candidate or rejected version active, with a reason."""

from __future__ import annotations

from typing import Any, ClassVar

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import AivoCommand, Outcome, ProgressBar
from aivo_site.jobs import services as jobs


class Command(AivoCommand):
    help = "Make a version that waits for a decision, or that the gate rejected, the active one. The round keeps its verdict."
    example: ClassVar[str] = 'promote_main_model aivo-main-v3 --reason "reviewed by the data steward"'
    result_keys: ClassVar[tuple[str, ...]] = ("active_version", "previous_version", "rebase")

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("version", help=_("name of the version, or its path in the store"))
        parser.add_argument("--reason", required=True, help=_("why; kept in the audit log"))
        parser.add_argument("--no-rebase", action="store_true", help=_("do not move learners' models to it"))

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:
        params = {"version": options["version"], "reason": options["reason"], "rebase": not options["no_rebase"]}
        job = jobs.run_inline(kind="promote_main_model", params=params, progress=progress)
        result = job.result or {}
        return Outcome(result, [_("%s is active.") % result["active_version"]])
