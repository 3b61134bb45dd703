"""Learners in the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext
from unfold.decorators import display

from aivo_site.console.actions import JobAction, admin_action
from aivo_site.console.admin_base import ConsoleAdmin, ReadOnlyAdmin
from learners.models import (
    BaselineAssessment,
    ConsentEvent,
    EncoderState,
    Interaction,
    Learner,
    Organisation,
    OrganisationMembership,
    Pool,
)


def _learner_params(queryset: QuerySet[Any], _cleaned: Mapping[str, Any]) -> dict[str, Any]:
    return {"learner_ids": [str(pk) for pk in queryset.values_list("pk", flat=True)]}


def _clone_consequences(queryset: QuerySet[Any]) -> list[str]:
    ready = queryset.filter(
        pool=Pool.FEDERATED, consent_training=True, withdrawn_at__isnull=True, personalized_model__isnull=True
    ).count()
    rest = queryset.count() - ready
    return [
        ngettext(
            "%(n)s learner gets a copy of the active main model.", "%(n)s learners get a copy of the active main model.", ready
        )
        % {"n": ready},
        ngettext(
            "%(n)s learner is left out: of another pool, without consent to training, withdrawn, or with a model already.",
            "%(n)s learners are left out: of another pool, without consent to training, withdrawn, or with a model already.",
            rest,
        )
        % {"n": rest},
        _("Nothing is trained yet; each copy is a small file and a row."),
    ]


def _train_consequences(queryset: QuerySet[Any]) -> list[str]:
    ready = queryset.filter(consent_training=True, withdrawn_at__isnull=True, personalized_model__status="ACTIVE").count()
    rest = queryset.count() - ready
    return [
        ngettext(
            "The own model of %(n)s learner is trained on what this learner did.",
            "The own models of %(n)s learners are trained, each on what its learner did.",
            ready,
        )
        % {"n": ready},
        ngettext(
            "%(n)s learner is left out: without a model, without consent to training, or withdrawn.",
            "%(n)s learners are left out: without a model, without consent to training, or withdrawn.",
            rest,
        )
        % {"n": rest},
        _("Afterwards each model is compared with the main model; where a learner's own is not better, the main model serves."),
    ]


CLONE = JobAction(
    name="clone_models",
    label=gettext_lazy("Give a copy of the main model…"),
    button=gettext_lazy("Make the copies"),
    kind="clone_learner_models",
    permission="models_store.add_personalizedmodel",
    consequences=_clone_consequences,
    params=_learner_params,
)
TRAIN = JobAction(
    name="train_models",
    label=gettext_lazy("Train their own models…"),
    button=gettext_lazy("Train"),
    kind="train_learner_models",
    permission="federation.add_modeltrainingsession",
    consequences=_train_consequences,
    params=_learner_params,
)


@admin.register(Organisation)
class OrganisationAdmin(ConsoleAdmin):
    list_display = ("name", "slug", "created_at")
    search_fields = ("name", "slug")
    prepopulated_fields = {"slug": ("name",)}

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False


@admin.register(OrganisationMembership)
class OrganisationMembershipAdmin(ConsoleAdmin):
    """Limits users to organisations."""

    list_display = ("user", "organisation")
    list_filter = ("organisation",)
    list_select_related = ("user", "organisation")
    autocomplete_fields = ("user", "organisation")


@admin.register(Learner)
class LearnerAdmin(ReadOnlyAdmin):
    """Learners: pool, consents and model, with the actions that give and train models."""

    list_display = (
        "learner_id",
        "organisation",
        "pool",
        "grade_band",
        "may_train",
        "may_contribute",
        "model_status",
        "withdrawn_at",
    )
    list_filter = ("pool", "organisation", "grade_band", "consent_training", "consent_contribution", "personalized_model__status")
    search_fields = ("^learner_id", "=subject_key")
    search_help_text = gettext_lazy("Beginning of the learner id, or the whole subject key")
    list_select_related = ("organisation", "personalized_model")
    actions = (admin_action(CLONE), admin_action(TRAIN))
    fields = (
        "learner_id",
        "subject_key",
        "organisation",
        "pool",
        "grade_band",
        "profile",
        "consent_training",
        "consent_contribution",
        "consent_external_transfer",
        "withdrawn_at",
        "created_at",
    )

    @display(description=gettext_lazy("training"), boolean=True, ordering="consent_training")
    def may_train(self, learner: Learner) -> bool:
        return learner.consent_training and learner.withdrawn_at is None

    @display(description=gettext_lazy("contribution"), boolean=True, ordering="consent_contribution")
    def may_contribute(self, learner: Learner) -> bool:
        return learner.consent_contribution and learner.withdrawn_at is None

    @display(description=gettext_lazy("own model"))
    def model_status(self, learner: Learner) -> str:
        model = getattr(learner, "personalized_model", None)
        return str(model.get_status_display()) if model is not None else "-"


class _OfLearnerAdmin(ReadOnlyAdmin):
    list_select_related = ("learner",)
    search_fields = ("^learner__learner_id",)
    search_help_text = gettext_lazy("Beginning of the learner id")


@admin.register(Interaction)
class InteractionAdmin(_OfLearnerAdmin):
    """What learners did."""

    list_display = ("learner", "seq", "occurred_at", "subject", "category", "item_id", "score", "response_ms", "action")
    list_filter = ("subject", "action")
    ordering = ("-arrival",)


@admin.register(BaselineAssessment)
class BaselineAssessmentAdmin(_OfLearnerAdmin):
    list_display = ("learner", "assessment_id", "completed_at")


@admin.register(EncoderState)
class EncoderStateAdmin(_OfLearnerAdmin):
    list_display = ("learner", "encoder_sha256", "events", "updated_at")
    exclude = ("state",)


@admin.register(ConsentEvent)
class ConsentEventAdmin(ReadOnlyAdmin):
    """Consents given and withdrawn."""

    list_display = ("created_at", "subject_key", "kind", "given", "authority", "recorded_by")
    list_filter = ("kind", "given")
    search_fields = ("=subject_key",)
    search_help_text = gettext_lazy("The whole subject key")
