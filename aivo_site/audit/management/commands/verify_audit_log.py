"""Checks the audit log's chain of hashes."""

from __future__ import annotations

from typing import Any

from django.utils.translation import gettext as _

from aivo_site.audit.services import verify
from aivo_site.commands import EXIT_DONE, EXIT_FAILED, AivoCommand, Outcome, ProgressBar


class Command(AivoCommand):
    help = _("Check that no audit event was altered, removed, inserted or moved. Exit 1 if one was.")
    example = "verify_audit_log --json"
    result_keys = ("verified", "events", "last_sequence", "last_hash", "problem_count", "problems")

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:  # noqa: ARG002
        report = verify()
        summary = _("%(events)d events, %(problems)d problems; the last is %(sequence)d with hash %(hash)s.") % {
            "events": report.events,
            "problems": report.problem_count,
            "sequence": report.last_sequence,
            "hash": report.last_hash,
        }
        lines = [summary, *(f"{problem.sequence}: {problem.message}" for problem in report.problems)]
        return Outcome(report.to_json(), lines, EXIT_DONE if report.verified else EXIT_FAILED)
