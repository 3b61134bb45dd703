"""Commands that move the active version for a written reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.jobs.job_command import JobCommand


class ActivationCommand(JobCommand):
    """Base of promotion and rollback: subclasses add the argument ``version`` and name the kind."""

    result_keys: ClassVar[tuple[str, ...]] = ("active_version", "previous_version", "rebase")

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--reason", required=True, help=_("why; kept in the audit log"))
        parser.add_argument("--no-rebase", action="store_true", help=_("do not move learners' models to it"))

    def params(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"version": options["version"], "reason": options["reason"], "rebase": not options["no_rebase"]}

    def lines(self, result: Mapping[str, Any]) -> list[str]:
        lines = [_("%(active_version)s is active; before it was %(previous_version)s.") % result]
        if result["rebase"]:
            lines.append(_("%(rebased)d learners' models were moved to it.") % result["rebase"])
        return lines
