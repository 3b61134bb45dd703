"""Policies, rounds and what they left in the console."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from django.contrib import admin
from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.forms import ChoiceField, ModelForm
from django.http import HttpRequest
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy
from unfold.admin import TabularInline
from unfold.decorators import display

from aivo_site.console.actions import JobAction, ReasonForm, admin_action, select_one
from aivo_site.console.admin_base import ConsoleAdmin, ReadOnlyAdmin
from aivo_site.errors import DomainError
from federation import strategies
from federation.models import (
    AggregationRound,
    Contribution,
    FederatedUpdate,
    FederationPolicy,
    ModelTrainingSession,
    PrivacyLedgerEntry,
    PrivacyPeriod,
    RoundAttempt,
    RoundState,
    Strategy,
)
from federation.policies import check_row

ROUND_COLOURS = {
    RoundState.PROMOTED: "success",
    RoundState.REJECTED: "danger",
    RoundState.FAILED: "danger",
    RoundState.AWAITING_DECISION: "info",
}


def _waiting(queryset: QuerySet[Any]) -> AggregationRound:
    """The one selected round, if it waits for a decision."""
    row: AggregationRound = select_one(queryset)
    if row.state != RoundState.AWAITING_DECISION:
        raise DomainError(
            _("Only a round that waits for a decision can be decided; round %(n)s is “%(state)s”.")
            % {"n": row.sequence, "state": row.get_state_display()},
            code="not_waiting",
        )
    return row


def _promote_consequences(queryset: QuerySet[Any]) -> list[str]:
    row = _waiting(queryset)
    return [
        _("%s becomes the active version; the active one is archived and can be brought back by a rollback.")
        % row.candidate_version,
        _("What the learners contributed to it is used up, and their own models are moved to it by a job."),
    ]


def _reject_consequences(queryset: QuerySet[Any]) -> list[str]:
    row = _waiting(queryset)
    return [
        _("%s is rejected; the active version stays.") % row.candidate_version,
        _("What the learners contributed may be used again in a later round."),
    ]


def _decision(decision: str) -> Callable[[QuerySet[Any], Mapping[str, Any]], dict[str, Any]]:
    def params(queryset: QuerySet[Any], cleaned: Mapping[str, Any]) -> dict[str, Any]:
        return {"round": str(_waiting(queryset).pk), "decision": decision, "reason": cleaned["reason"]}

    return params


PROMOTE_CANDIDATE = JobAction(
    name="promote_candidate",
    label=gettext_lazy("Promote the candidate…"),
    button=gettext_lazy("Promote"),
    kind="decide_round",
    permission="federation.change_aggregationround",
    consequences=_promote_consequences,
    params=_decision("promote"),
    form=ReasonForm,
)
REJECT_CANDIDATE = JobAction(
    name="reject_candidate",
    label=gettext_lazy("Reject the candidate…"),
    button=gettext_lazy("Reject"),
    kind="decide_round",
    permission="federation.change_aggregationround",
    consequences=_reject_consequences,
    params=_decision("reject"),
    form=ReasonForm,
)


class PolicyForm(ModelForm):  # type: ignore[type-arg]
    """Refuses a policy that no round could run."""

    class Meta:
        model = FederationPolicy
        fields = [field.name for field in FederationPolicy._meta.concrete_fields if field.editable]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "strategy" in self.fields:  # the database knows words of strategies that this version does not have
            runnable = [choice for choice in Strategy.choices if choice[0] in strategies.names()]
            cast(ChoiceField, self.fields["strategy"]).choices = runnable

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        if not self.errors:
            try:
                check_row(FederationPolicy(**cleaned))
            except DomainError as error:
                raise ValidationError(str(error)) from error
        return cleaned


@admin.register(FederationPolicy)
class FederationPolicyAdmin(ConsoleAdmin):
    """How rounds run; one default for the installation."""

    form = PolicyForm
    list_display = (
        "name",
        "organisation",
        "strategy",
        "contribution_source",
        "minimum_learners",
        "promotion",
        "differential_privacy",
    )
    list_select_related = ("organisation",)

    def has_delete_permission(self, request: HttpRequest, obj: FederationPolicy | None = None) -> bool:
        return obj is not None and obj.organisation_id is not None and super().has_delete_permission(request, obj)


class _ReadOnlyInline(TabularInline):  # type: ignore[misc]
    extra = 0
    can_delete = False

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:  # noqa: ARG002
        return tuple(self.fields)

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False


class RoundAttemptInline(_ReadOnlyInline):
    model = RoundAttempt
    fields = ("n", "charge", "contributions", "weight_total", "aggregate_norm", "set_digest", "created_at")


@admin.register(AggregationRound)
class AggregationRoundAdmin(ReadOnlyAdmin):
    """Every round: how far it came, and why it ended as it did."""

    list_display = (
        "sequence",
        "shown_state",
        "base_version",
        "candidate_version",
        "eligible",
        "improvement",
        "reason_code",
        "created_at",
        "finished_at",
    )
    list_filter = ("state",)
    search_fields = ("=sequence",)
    list_select_related = ("base_version", "candidate_version")
    inlines = (RoundAttemptInline,)
    actions = (admin_action(PROMOTE_CANDIDATE), admin_action(REJECT_CANDIDATE))

    @display(description=gettext_lazy("state"), ordering="state", label=ROUND_COLOURS)
    def shown_state(self, row: AggregationRound) -> tuple[str, str]:
        return row.state, row.get_state_display()

    @display(description=gettext_lazy("fall of the loss"))
    def improvement(self, row: AggregationRound) -> str:
        return f"{row.performance_improvement:+.2%}" if row.performance_improvement is not None else "-"


@admin.register(Contribution)
class ContributionAdmin(ReadOnlyAdmin):
    """Contributions with their verdicts."""

    list_display = ("round", "subject_key", "verdict", "reason_code", "samples", "norm", "weight", "versions_behind")
    list_filter = ("verdict", "reason_code")
    search_fields = ("=subject_key", "=round__sequence")
    list_select_related = ("round",)


@admin.register(ModelTrainingSession)
class ModelTrainingSessionAdmin(ReadOnlyAdmin):
    """Runs of local training."""

    list_display = (
        "personalized_model",
        "sequence",
        "purpose",
        "base_version",
        "samples",
        "epochs",
        "final_loss",
        "delta_norm",
        "contributed_to_federation",
        "created_at",
    )
    list_filter = ("purpose", "contributed_to_federation", "engine", "base_version")
    search_fields = ("^personalized_model__learner__learner_id",)
    search_help_text = gettext_lazy("Beginning of the learner id")
    list_select_related = ("personalized_model__learner", "base_version")

    def get_queryset(self, request: HttpRequest) -> Any:
        from learners.models import Learner

        visible = Learner.objects.visible_to(request.user)
        return super().get_queryset(request).filter(personalized_model__learner__in=visible)


@admin.register(FederatedUpdate)
class FederatedUpdateAdmin(ReadOnlyAdmin):
    """What promoted rounds changed."""

    list_display = (
        "main_model_version",
        "base_version",
        "aggregation_strategy",
        "performance_improvement",
        "privacy_budget",
        "created_at",
    )
    list_filter = ("aggregation_strategy",)
    list_select_related = ("main_model_version", "base_version")


@admin.register(PrivacyPeriod)
class PrivacyPeriodAdmin(ReadOnlyAdmin):
    list_display = ("number", "population", "delta", "epsilon_cap", "started_at", "ended_at")


@admin.register(PrivacyLedgerEntry)
class PrivacyLedgerEntryAdmin(ReadOnlyAdmin):
    """Every charge."""

    list_display = (
        "sequence",
        "period",
        "round",
        "unit",
        "sampling",
        "noise_multiplier",
        "steps",
        "epsilon",
        "epsilon_total",
        "delta",
    )
    list_filter = ("unit", "sampling")
    list_select_related = ("period", "round")
