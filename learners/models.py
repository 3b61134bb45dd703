"""The people and what they did."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from django.conf import settings
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import Q
from django.db.models.functions import Lower
from django.utils.translation import gettext_lazy as _

from aivo_site.database import AppendOnlyRow, Row

LEARNER_ID_PATTERN = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"


class Pool(models.TextChoices):
    CURRICULUM = "CURRICULUM", _("curriculum")
    FEDERATED = "FEDERATED", _("federated")
    EVALUATION = "EVALUATION", _("evaluation")


class ConsentKind(models.TextChoices):
    TRAINING = "TRAINING", _("training of the learner's own copy")
    CONTRIBUTION = "CONTRIBUTION", _("contribution to the shared model")
    EXTERNAL_TRANSFER = "EXTERNAL_TRANSFER", _("transfer to an outside service")


class ScopedQuerySet(models.QuerySet[Any]):
    """Organisation scope, the same for every door."""

    organisation_field = "organisation"

    def visible_to(self, user: Any) -> ScopedQuerySet:
        """Rows that ``user`` may see: of their organisations, or all for an operator without organisation scope."""
        if user is None or not user.is_active:
            return self.none()
        organisations = list(OrganisationMembership.objects.filter(user=user).values_list("organisation_id", flat=True))
        return self.filter(**{f"{self.organisation_field}__in": organisations}) if organisations else self.all()


class OfLearnerQuerySet(ScopedQuerySet):
    organisation_field = "learner__organisation"


class Organisation(Row):
    """A school or district."""

    slug = models.SlugField(_("slug"), unique=True)
    name = models.CharField(_("name"), max_length=200)

    class Meta:
        verbose_name = _("organisation")
        verbose_name_plural = _("organisations")
        ordering = ("slug",)

    def __str__(self) -> str:
        return self.name


class OrganisationMembership(Row):
    """Limits a user to an organisation; a user with none has no organisation scope."""

    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, verbose_name=_("user"), on_delete=models.CASCADE, related_name="organisation_memberships"
    )
    organisation = models.ForeignKey(
        Organisation, verbose_name=_("organisation"), on_delete=models.CASCADE, related_name="memberships"
    )

    class Meta:
        verbose_name = _("organisation membership")
        verbose_name_plural = _("organisation memberships")
        constraints = (models.UniqueConstraint(fields=["user", "organisation"], name="membership_once"),)

    def __str__(self) -> str:
        return f"{self.user_id} {self.organisation_id}"


class Learner(Row):
    """A child, known by a pseudonym; append-only tables know only ``subject_key``."""

    learner_id = models.CharField(
        _("learner id"),
        max_length=64,
        validators=[RegexValidator(LEARNER_ID_PATTERN)],
        help_text=_("Pseudonym: letters, digits, dot, underscore and hyphen, at most 64, beginning with a letter or digit."),
    )
    subject_key = models.UUIDField(_("subject key"), default=uuid.uuid4, unique=True, editable=False)
    organisation = models.ForeignKey(
        Organisation, verbose_name=_("organisation"), on_delete=models.PROTECT, related_name="learners"
    )
    pool = models.CharField(
        _("pool"),
        max_length=16,
        choices=Pool.choices,
        default=Pool.FEDERATED,
        help_text=_(
            "Curriculum trains the main model; federated has a personal model and may contribute; evaluation only measures."
        ),
    )
    grade_band = models.CharField(_("grade band"), max_length=32, blank=True)
    profile = models.JSONField(_("profile"), default=dict, blank=True, help_text=_("Needs, accommodations, language; no names."))
    consent_training = models.BooleanField(_("consent to training"), default=False)
    consent_contribution = models.BooleanField(_("consent to contribution"), default=False)
    consent_external_transfer = models.BooleanField(_("consent to external transfer"), default=False)
    withdrawn_at = models.DateTimeField(_("withdrawn at"), null=True, blank=True)
    history_stamp = models.UUIDField(
        _("stamp of the history"),
        default=uuid.uuid4,
        editable=False,
        help_text=_("Another one after every change of the learner's interactions."),
    )

    objects = ScopedQuerySet.as_manager()

    class Meta:
        verbose_name = _("learner")
        verbose_name_plural = _("learners")
        ordering = ("learner_id",)
        indexes = (
            models.Index(fields=["pool", "consent_contribution"], name="learner_pool_contribution"),
            models.Index(fields=["organisation", "pool"], name="learner_organisation_pool"),
        )
        constraints = (
            models.UniqueConstraint(Lower("learner_id"), name="learner_id_unique_without_case"),
            models.CheckConstraint(condition=~Q(learner_id=""), name="learner_id_not_empty"),
            models.CheckConstraint(condition=Q(pool__in=Pool.values), name="learner_pool_known"),
        )

    def __str__(self) -> str:
        return self.learner_id

    def save(self, *args: Any, update_fields: Iterable[str] | None = None, **kwargs: Any) -> None:
        """A row read earlier never brings an old ``history_stamp`` back, which would make stale states look current."""
        if update_fields is None and not self._state.adding:
            fields = (field for field in self._meta.concrete_fields if not field.primary_key)
            update_fields = [field.name for field in fields if field.name != "history_stamp"]
        super().save(*args, update_fields=update_fields, **kwargs)


class ConsentEvent(AppendOnlyRow):
    """One consent given or withdrawn, by whose authority."""

    subject_key = models.UUIDField(_("subject key"), db_index=True)
    kind = models.CharField(_("kind"), max_length=24, choices=ConsentKind.choices)
    given = models.BooleanField(_("given"))
    authority = models.CharField(
        _("authority"), max_length=200, help_text=_("Who may decide for the learner, and how they said so.")
    )
    recorded_by = models.CharField(_("recorded by"), max_length=150)
    note = models.TextField(_("note"), blank=True)

    class Meta:
        verbose_name = _("consent event")
        verbose_name_plural = _("consent events")
        ordering = ("-created_at",)
        constraints = (
            models.CheckConstraint(condition=Q(kind__in=ConsentKind.values), name="consent_kind_known"),
            models.CheckConstraint(condition=~Q(authority=""), name="consent_has_authority"),
        )

    def __str__(self) -> str:
        return f"{self.kind} {self.given}"


class BaselineAssessment(Row):
    """The summary of a learner's baseline assessment; its answers are interactions with action ``assessment``."""

    learner = models.ForeignKey(Learner, verbose_name=_("learner"), on_delete=models.CASCADE, related_name="assessments")
    assessment_id = models.CharField(
        _("assessment id"), max_length=64, help_text=_("The app's own id: completing it twice changes nothing.")
    )
    completed_at = models.DateTimeField(_("completed at"))
    domains = models.JSONField(
        _("domains"), default=dict, help_text=_("{domain: {score: 0..1, level: 1..9}}; a summary, never a feature.")
    )

    objects = OfLearnerQuerySet.as_manager()

    class Meta:
        verbose_name = _("baseline assessment")
        verbose_name_plural = _("baseline assessments")
        ordering = ("-completed_at",)
        constraints = (models.UniqueConstraint(fields=["learner", "assessment_id"], name="assessment_once"),)

    def __str__(self) -> str:
        return self.assessment_id


class Interaction(Row):
    """One thing a learner did: a task answered.

    A learner is ordered by ``seq`` if all rows have one, else by ``occurred_at`` and then ``arrival``. Whoever stores, changes
    or removes one calls ``history_stamps.stamp_histories`` in the same transaction.
    """

    learner = models.ForeignKey(
        Learner, verbose_name=_("learner"), on_delete=models.CASCADE, related_name="interactions", db_index=False
    )
    event_id = models.CharField(_("event id"), max_length=64)
    seq = models.PositiveBigIntegerField(_("sequence"), null=True, blank=True)
    occurred_at = models.DateTimeField(_("occurred at"), null=True, blank=True)
    arrival = models.PositiveBigIntegerField(_("arrival"), help_text=_("Order of arrival: breaks ties of time."))
    subject = models.CharField(_("subject"), max_length=100, blank=True)
    category = models.CharField(_("category"), max_length=200)
    item_id = models.CharField(_("item id"), max_length=200, blank=True)
    difficulty = models.FloatField(
        _("difficulty"), null=True, blank=True, help_text=_("As the source says it: stored and shown, never encoded.")
    )
    action = models.CharField(_("action"), max_length=32, blank=True)
    score = models.FloatField(_("score"), validators=[MinValueValidator(0.0), MaxValueValidator(1.0)])
    response_ms = models.PositiveIntegerField(_("response time in ms"), null=True, blank=True)
    hints = models.PositiveIntegerField(_("hints"), null=True, blank=True)
    attempts = models.PositiveIntegerField(_("attempts"), null=True, blank=True)
    session_id = models.CharField(_("session id"), max_length=64, blank=True)

    objects = OfLearnerQuerySet.as_manager()

    class Meta:
        verbose_name = _("interaction")
        verbose_name_plural = _("interactions")
        indexes = (models.Index(fields=["learner", "occurred_at", "arrival"], name="interaction_learner_time"),)
        constraints = (
            models.UniqueConstraint(fields=["learner", "event_id"], name="interaction_event_once"),
            models.UniqueConstraint(fields=["learner", "seq"], name="interaction_seq_once"),
            models.CheckConstraint(condition=Q(score__gte=0.0, score__lte=1.0), name="interaction_score_bounds"),
            models.CheckConstraint(condition=~Q(category=""), name="interaction_category_not_empty"),
            models.CheckConstraint(condition=Q(seq__isnull=False) | Q(occurred_at__isnull=False), name="interaction_has_order"),
        )

    def __str__(self) -> str:
        return f"{self.category} {self.score}"


class EncoderState(Row):
    """Where the encoder stands in a learner's history, so that nothing is replayed."""

    learner = models.ForeignKey(Learner, verbose_name=_("learner"), on_delete=models.CASCADE, related_name="encoder_states")
    encoder_sha256 = models.CharField(_("encoder"), max_length=64)
    state = models.JSONField(_("state"))
    events = models.PositiveBigIntegerField(_("events encoded"), default=0)
    last_seq = models.PositiveBigIntegerField(_("last sequence"), null=True, blank=True)
    last_occurred_at = models.DateTimeField(_("last time"), null=True, blank=True)
    history_stamp = models.UUIDField(
        _("stamp of the history"),
        null=True,
        editable=False,
        help_text=_("The learner's when the history was read: while it is still the learner's, the state is current."),
    )

    objects = OfLearnerQuerySet.as_manager()

    class Meta:
        verbose_name = _("encoder state")
        verbose_name_plural = _("encoder states")
        constraints = (models.UniqueConstraint(fields=["learner", "encoder_sha256"], name="encoder_state_once"),)

    def __str__(self) -> str:
        return f"{self.learner_id} {self.encoder_sha256[:8]}"
