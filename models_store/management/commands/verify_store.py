"""verify_store: does every file that a row points to exist with its checksum?"""

from __future__ import annotations

from typing import Any, ClassVar

from django.utils.translation import gettext as _

from aivo_site.commands import EXIT_DONE, EXIT_FAILED, AivoCommand, Outcome, ProgressBar
from models_store.verification import verify_store


class Command(AivoCommand):
    help = "Check that every file a row points to exists with its checksum, and say what lies in the store besides."
    example: ClassVar[str] = "verify_store --json"
    result_keys: ClassVar[tuple[str, ...]] = ("files", "missing", "corrupt", "orphaned", "active_pointer")

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:  # noqa: ARG002
        report = verify_store(progress=progress)
        lines = [
            _(
                "%(files)s files checked: %(missing)s missing, %(corrupt)s damaged; %(orphaned)s others that no row points to, "
                "%(waiting)s replaced within the last day."
            )
            % {name: value for name, value in report.to_json().items() if isinstance(value, int)},
            *report.problems,
        ]
        return Outcome(report.to_json(), lines, EXIT_DONE if report.is_sound else EXIT_FAILED)
