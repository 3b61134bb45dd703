"""Record consents given or withdrawn for one learner."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from django.db import transaction
from django.utils.translation import gettext as _

from aivo_site.commands import AivoCommand, Outcome, ProgressBar
from aivo_site.errors import UsageError
from learners.consents import known_kind, record_consent
from learners.errors import ConsentError
from learners.registration import find_learner


class Command(AivoCommand):
    help = _("Record that consents of one learner were given or withdrawn; a withdrawal stops everything at once.")
    example = 'record_consent 00f2bcefc310 --withdraw contribution --authority "guardian, letter of 2025-11-03"'
    result_keys = (
        "learner_id", "given", "kinds", "changed", "consent_training", "consent_contribution", "consent_external_transfer",
    )  # fmt: skip

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("learner_id")
        decision = parser.add_mutually_exclusive_group(required=True)
        kinds = _("comma separated: training, contribution, external_transfer, or all")
        decision.add_argument("--give", metavar="KINDS", help=kinds)
        decision.add_argument("--withdraw", metavar="KINDS", help=kinds)
        parser.add_argument("--authority", required=True, help=_("who decided for the learner, and how they said so"))
        parser.add_argument("--note", default="", help=_("kept with the event"))

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:  # noqa: ARG002
        given = options["give"] is not None
        kinds = _kinds(options["give"] if given else options["withdraw"])
        learner = find_learner(learner_id=options["learner_id"])
        try:
            with transaction.atomic():
                changes = [
                    record_consent(
                        learner=learner,
                        kind=kind,
                        given=given,
                        authority=options["authority"],
                        recorded_by="record_consent",
                        note=options["note"],
                    )
                    for kind in kinds
                ]
        except ConsentError as error:
            raise UsageError(str(error), code=error.code) from error
        changed = [change.kind.value.lower() for change in changes if change.changed]
        result = {
            "learner_id": learner.learner_id,
            "given": given,
            "kinds": [kind.value.lower() for kind in kinds],
            "changed": changed,
            "consent_training": learner.consent_training,
            "consent_contribution": learner.consent_contribution,
            "consent_external_transfer": learner.consent_external_transfer,
        }
        if changed:
            text = _("given: %(kinds)s") if given else _("withdrawn: %(kinds)s")
            return Outcome(result, [text % {"kinds": ", ".join(changed)}])
        return Outcome(result, [_("Nothing changed: it stood so already.")])


def _kinds(names: str) -> list[Any]:
    if names.strip().lower() == "all":
        names = "training,contribution,external_transfer"
    try:
        kinds = [known_kind(name.strip()) for name in names.split(",") if name.strip()]
    except ConsentError as error:
        raise UsageError(str(error), code=error.code) from error
    if not kinds:
        raise UsageError(_("name at least one kind: training, contribution, external_transfer, or all."), code="no_kind")
    return kinds
