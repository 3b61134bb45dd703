"""Main model versions and personalized models in the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django import forms
from django.contrib import admin
from django.db.models import QuerySet
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy
from unfold.decorators import display

from aivo_site.console.actions import JobAction, ReasonForm, admin_action, select_one
from aivo_site.console.admin_base import ReadOnlyAdmin
from aivo_site.errors import DomainError
from models_store.models import CurriculumPreparation, MainModelVersion, PersonalizedModel, VersionStatus

VERSION_COLOURS = {
    VersionStatus.TRAINING: "warning",
    VersionStatus.CANDIDATE: "info",
    VersionStatus.ACTIVE: "success",
    VersionStatus.ARCHIVED: "",
    VersionStatus.DEPRECATED: "",
    VersionStatus.REJECTED: "danger",
}


class AggregateForm(forms.Form):
    """What an operator may decide for one round."""

    dry_run = forms.BooleanField(
        required=False,
        label=gettext_lazy("Dry run"),
        help_text=gettext_lazy("Only say who would take part and who is left out, and why; change nothing."),
    )


def _aggregate_consequences(queryset: QuerySet[Any]) -> list[str]:
    row: MainModelVersion = select_one(queryset)
    if row.status != VersionStatus.ACTIVE:
        raise DomainError(_("A round starts from the active version; %s is not active.") % row.version, code="not_active")
    return [
        _("A round starts from %s: each eligible learner's contribution is trained, checked and combined.") % row.version,
        _("The new version is compared with this one on learners who took no part; it becomes active only if it is better."),
        _("The learners' own models are moved to the new version afterwards."),
    ]


def _promote_consequences(queryset: QuerySet[Any]) -> list[str]:
    row: MainModelVersion = select_one(queryset)
    allowed = (VersionStatus.CANDIDATE, VersionStatus.REJECTED)
    if row.status not in allowed:
        raise DomainError(
            _("Only a version that waits for a decision or was rejected can be promoted; %(version)s is “%(status)s”.")
            % {"version": row.version, "status": row.get_status_display()},
            code="not_promotable",
        )
    sentences = [
        _("%s becomes the active version; the active one is archived and can be brought back by a rollback.") % row.version,
        _("Every learner served by the main model gets recommendations of %s at once.") % row.version,
    ]
    if row.status == VersionStatus.REJECTED:
        sentences.append(_("The gate rejected this version: your reason is kept in the audit log beside the gate's."))
    return sentences


def _rollback_consequences(queryset: QuerySet[Any]) -> list[str]:
    row: MainModelVersion = select_one(queryset)
    if row.status != VersionStatus.ARCHIVED:
        raise DomainError(
            _("Only an archived version can be made active again; %(version)s is “%(status)s”.")
            % {"version": row.version, "status": row.get_status_display()},
            code="not_archived",
        )
    return [
        _("%s becomes the active version again.") % row.version,
        _("What learners contributed to the versions after it stays used and does not come back in a later round."),
    ]


def _version_params(queryset: QuerySet[Any], cleaned: Mapping[str, Any]) -> dict[str, Any]:
    return {"version": select_one(queryset).version, "reason": cleaned["reason"]}


AGGREGATE = JobAction(
    name="aggregate",
    label=gettext_lazy("Start a round from the active version…"),
    button=gettext_lazy("Start the round"),
    kind="run_federated_aggregation",
    permission="federation.add_aggregationround",
    consequences=_aggregate_consequences,
    params=lambda _queryset, cleaned: {"dry_run": bool(cleaned["dry_run"])},
    form=AggregateForm,
)
PROMOTE = JobAction(
    name="promote",
    label=gettext_lazy("Promote…"),
    button=gettext_lazy("Promote"),
    kind="promote_main_model",
    permission="models_store.change_mainmodelversion",
    consequences=_promote_consequences,
    params=_version_params,
    form=ReasonForm,
)
ROLLBACK = JobAction(
    name="roll_back",
    label=gettext_lazy("Roll back to this version…"),
    button=gettext_lazy("Roll back"),
    kind="rollback_main_model",
    permission="models_store.change_mainmodelversion",
    consequences=_rollback_consequences,
    params=_version_params,
    form=ReasonForm,
)


@admin.register(MainModelVersion)
class MainModelVersionAdmin(ReadOnlyAdmin):
    """Every version of the shared network, with the actions that make and move versions."""

    list_display = ("version", "shown_status", "origin", "parent", "content_top1", "created_at", "promoted_at")
    list_filter = ("status", "origin")
    search_fields = ("^version",)
    list_select_related = ("parent",)
    actions = (admin_action(AGGREGATE), admin_action(PROMOTE), admin_action(ROLLBACK))
    exclude = ("training_fingerprint",)

    @display(description=gettext_lazy("status"), ordering="status", label=VERSION_COLOURS)
    def shown_status(self, row: MainModelVersion) -> tuple[str, str]:
        return row.status, row.get_status_display()

    @display(description=gettext_lazy("next category forecast right"))
    def content_top1(self, row: MainModelVersion) -> str:
        accuracy = row.training_metrics.get("accuracy")
        return f"{accuracy:.1%}" if isinstance(accuracy, int | float) else "-"


@admin.register(PersonalizedModel)
class PersonalizedModelAdmin(ReadOnlyAdmin):
    """Each learner's own model: where it stands and which model serves."""

    list_display = (
        "learner",
        "status",
        "backend",
        "source_version",
        "version",
        "serving_choice",
        "improvement",
        "last_trained_at",
    )
    list_filter = ("status", "serving_choice", "backend", "source_version")
    search_fields = ("^learner__learner_id",)
    search_help_text = gettext_lazy("Beginning of the learner id")
    list_select_related = ("learner", "source_version")

    @display(description=gettext_lazy("loss against main"))
    def improvement(self, model: PersonalizedModel) -> str:
        value = model.performance_metrics.get("improvement")
        return f"{-value:+.2%}" if isinstance(value, int | float) else "-"


@admin.register(CurriculumPreparation)
class CurriculumPreparationAdmin(ReadOnlyAdmin):
    """The encoders that were fitted."""

    list_display = ("encoder_sha256", "created_at")
    exclude = ("training_keys", "validation_keys")
