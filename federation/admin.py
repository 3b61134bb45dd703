"""Policies, rounds and what they left in the console."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.core.exceptions import ValidationError
from django.forms import ModelForm
from django.http import HttpRequest
from django.utils.translation import gettext_lazy
from unfold.admin import TabularInline
from unfold.decorators import display

from aivo_site.console.admin_base import ConsoleAdmin, ReadOnlyAdmin
from aivo_site.errors import DomainError
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
)
from federation.policies import RoundPolicy

ROUND_COLOURS = {
    RoundState.PROMOTED: "success",
    RoundState.REJECTED: "danger",
    RoundState.FAILED: "danger",
    RoundState.AWAITING_DECISION: "info",
}


class PolicyForm(ModelForm):  # type: ignore[type-arg]
    """Refuses a policy that no round could run."""

    class Meta:
        model = FederationPolicy
        exclude = ()

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        if not self.errors:
            try:
                RoundPolicy.from_row(self.instance_with(cleaned)).validate()
            except DomainError as error:
                raise ValidationError(str(error)) from error
        return cleaned

    def instance_with(self, cleaned: dict[str, Any]) -> FederationPolicy:
        """The row as it would be saved."""
        names = {field.name for field in FederationPolicy._meta.concrete_fields}
        return FederationPolicy(**{name: value for name, value in cleaned.items() if name in names})


@admin.register(FederationPolicy)
class FederationPolicyAdmin(ConsoleAdmin):
    """How rounds run; one default for the installation."""

    form = PolicyForm
    list_display = ("name", "organisation", "strategy", "contribution_source", "minimum_learners", "promotion", "differential_privacy")
    list_select_related = ("organisation",)

    def has_delete_permission(self, request: HttpRequest, obj: FederationPolicy | None = None) -> bool:
        return obj is not None and obj.organisation_id is not None and super().has_delete_permission(request, obj)


class _ReadOnlyInline(TabularInline):  # type: ignore[misc]
    extra = 0
    can_delete = False
    show_change_link = False

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False


class RoundAttemptInline(_ReadOnlyInline):
    model = RoundAttempt
    fields = ("n", "contributions", "weight_total", "aggregate_norm", "set_digest", "created_at")


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

    list_display = ("main_model_version", "base_version", "aggregation_strategy", "performance_improvement", "privacy_budget", "created_at")
    list_filter = ("aggregation_strategy",)
    list_select_related = ("main_model_version", "base_version")


@admin.register(PrivacyPeriod)
class PrivacyPeriodAdmin(ReadOnlyAdmin):
    list_display = ("number", "population", "delta", "epsilon_cap", "started_at", "ended_at")


@admin.register(PrivacyLedgerEntry)
class PrivacyLedgerEntryAdmin(ReadOnlyAdmin):
    """Every charge."""

    list_display = ("sequence", "period", "round", "unit", "sampling", "noise_multiplier", "steps", "epsilon", "epsilon_total", "delta")
    list_filter = ("unit", "sampling")
    list_select_related = ("period", "round")
