"""The models: what exists and where its weights are."""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.utils.translation import gettext_lazy as _

from aivo_site.database import Row
from learners.models import Learner, OfLearnerQuerySet


class VersionStatus(models.TextChoices):
    TRAINING = "TRAINING", _("being made")
    CANDIDATE = "CANDIDATE", _("waiting for a decision")
    ACTIVE = "ACTIVE", _("active")
    ARCHIVED = "ARCHIVED", _("archived")
    DEPRECATED = "DEPRECATED", _("deprecated")
    REJECTED = "REJECTED", _("rejected")


class VersionOrigin(models.TextChoices):
    TRAINED = "TRAINED", _("curriculum training")
    FEDERATED = "FEDERATED", _("federated round")
    IMPORTED = "IMPORTED", _("imported")


class PersonalizedModelStatus(models.TextChoices):
    PENDING = "PENDING", _("waiting to be made")
    TRAINING = "TRAINING", _("in training")
    ACTIVE = "ACTIVE", _("active")
    UPDATING = "UPDATING", _("being rebased")
    FAILED = "FAILED", _("failed: a job failed and may be retried")
    ERROR = "ERROR", _("error: a file is damaged")


class ServingChoice(models.TextChoices):
    MAIN = "MAIN", _("the main model serves")
    PERSONAL = "PERSONAL", _("the learner's own model serves")
    BLEND = "BLEND", _("a blend of both serves")


class Backend(models.TextChoices):
    FEDERATED = "FEDERATED", _("clone of the main model")
    OPENAI_FINE_TUNING = "OPENAI_FINE_TUNING", _("OpenAI fine-tuning")


class CurriculumPreparation(Row):
    """An encoder fitted on the curriculum learners, with the split it was fitted for."""

    encoder_sha256 = models.CharField(_("encoder"), max_length=64)
    data_sha256 = models.CharField(
        _("data"), max_length=64, unique=True, help_text=_("Of the learners, their split and their events.")
    )
    path = models.CharField(_("path"), max_length=200)
    report = models.JSONField(_("report"), default=dict)
    training_keys = models.JSONField(_("training learners"), default=list, help_text=_("Subject keys."))
    validation_keys = models.JSONField(_("validation learners"), default=list, help_text=_("Subject keys."))

    class Meta:
        verbose_name = _("curriculum preparation")
        verbose_name_plural = _("curriculum preparations")
        ordering = ("-created_at",)

    def __str__(self) -> str:
        return self.encoder_sha256[:12]


class MainModelVersion(Row):
    """One immutable version of the shared network."""

    version = models.CharField(_("version"), max_length=64, unique=True)
    sequence = models.PositiveIntegerField(_("sequence"), unique=True)
    parent = models.ForeignKey(
        "self", verbose_name=_("parent"), null=True, blank=True, on_delete=models.PROTECT, related_name="children"
    )
    model_path = models.CharField(
        _("model path"), max_length=200, blank=True, help_text=_("Folder inside the main model storage.")
    )
    manifest_sha256 = models.CharField(_("manifest checksum"), max_length=64, blank=True)
    architecture = models.JSONField(_("architecture"), default=dict)
    training_metrics = models.JSONField(_("training metrics"), default=dict, blank=True)
    encoder_sha256 = models.CharField(_("encoder"), max_length=64, blank=True)
    content_mix = models.FloatField(
        _("content mix"), default=0.0, help_text=_("Weight of the encoder's own forecast in the content head's, 0..0.4.")
    )
    status = models.CharField(
        _("status"),
        max_length=16,
        choices=VersionStatus.choices,
        default=VersionStatus.TRAINING,
        help_text=_("Archived was active and can be brought back; deprecated cannot."),
    )
    origin = models.CharField(_("origin"), max_length=16, choices=VersionOrigin.choices, default=VersionOrigin.TRAINED)
    training_fingerprint = models.CharField(
        _("training fingerprint"),
        max_length=64,
        null=True,
        blank=True,
        unique=True,
        help_text=_("Of data, encoder, recipe and seed: training the same twice gives one version."),
    )
    promoted_at = models.DateTimeField(_("promoted at"), null=True, blank=True)
    metadata = models.JSONField(_("metadata"), default=dict, blank=True)

    class Meta:
        verbose_name = _("main model version")
        verbose_name_plural = _("main model versions")
        ordering = ("-sequence",)
        indexes = (models.Index(fields=["status", "-sequence"], name="version_status"),)
        constraints = (
            models.UniqueConstraint(fields=["status"], condition=Q(status=VersionStatus.ACTIVE), name="version_one_active"),
            models.CheckConstraint(condition=Q(status__in=VersionStatus.values), name="version_status_known"),
            models.CheckConstraint(condition=Q(origin__in=VersionOrigin.values), name="version_origin_known"),
            models.CheckConstraint(
                condition=Q(status__in=[VersionStatus.TRAINING, VersionStatus.REJECTED])
                | (~Q(model_path="") & ~Q(manifest_sha256="") & ~Q(encoder_sha256="")),
                name="version_has_files",
            ),
            models.CheckConstraint(condition=Q(sequence__gte=1), name="version_sequence_positive"),
            models.CheckConstraint(condition=Q(content_mix__gte=0.0, content_mix__lte=1.0), name="version_content_mix_bounds"),
        )

    def __str__(self) -> str:
        return self.version


class PersonalizedModel(Row):
    """A learner's own copy: a main version plus the learner's own tail, or a fine-tuned model of the legacy path."""

    learner = models.OneToOneField(
        Learner, verbose_name=_("learner"), on_delete=models.CASCADE, related_name="personalized_model"
    )
    source_version = models.ForeignKey(
        MainModelVersion,
        verbose_name=_("source version"),
        null=True,
        blank=True,
        on_delete=models.PROTECT,
        related_name="personalized_models",
    )
    model_id = models.CharField(_("fine-tuned model id"), max_length=200, blank=True)
    system_prompt = models.TextField(_("system prompt"), blank=True)
    vector_store_id = models.CharField(_("vector store id"), max_length=200, blank=True)
    configuration = models.JSONField(_("configuration"), default=dict, blank=True)
    status = models.CharField(
        _("status"), max_length=16, choices=PersonalizedModelStatus.choices, default=PersonalizedModelStatus.PENDING
    )
    status_reason = models.TextField(_("status reason"), blank=True)
    summary = models.TextField(_("summary"), blank=True)
    version = models.PositiveIntegerField(_("version"), default=1)
    weights_path = models.CharField(_("weights path"), max_length=300, blank=True)
    weights_sha256 = models.CharField(_("weights checksum"), max_length=64, blank=True)
    performance_metrics = models.JSONField(
        _("performance metrics"), default=dict, blank=True, help_text=_("accuracy, loss, improvement")
    )
    serving_choice = models.CharField(
        _("serving choice"), max_length=16, choices=ServingChoice.choices, default=ServingChoice.MAIN
    )
    serving_evidence = models.JSONField(_("evidence for the serving choice"), default=dict, blank=True)
    blend = models.FloatField(_("blend"), default=0.0, help_text=_("0 is the main model's tail, 1 the learner's own."))
    last_trained_at = models.DateTimeField(_("last trained at"), null=True, blank=True)
    metadata = models.JSONField(_("metadata"), default=dict, blank=True)
    backend = models.CharField(_("backend"), max_length=24, choices=Backend.choices, default=Backend.FEDERATED)

    objects = OfLearnerQuerySet.as_manager()

    class Meta:
        verbose_name = _("personalized model")
        verbose_name_plural = _("personalized models")
        ordering = ("learner__learner_id",)
        indexes = (
            models.Index(fields=["status", "last_trained_at"], name="personal_status_trained"),
            models.Index(fields=["serving_choice"], name="personal_serving"),
        )
        constraints = (
            models.CheckConstraint(condition=Q(status__in=PersonalizedModelStatus.values), name="personal_status_known"),
            models.CheckConstraint(condition=Q(backend__in=Backend.values), name="personal_backend_known"),
            models.CheckConstraint(condition=Q(blend__gte=0.0, blend__lte=1.0), name="personal_blend_bounds"),
            models.CheckConstraint(
                condition=~Q(status=PersonalizedModelStatus.ACTIVE)
                | ~Q(backend=Backend.FEDERATED)
                | (Q(source_version__isnull=False) & ~Q(weights_path="") & ~Q(weights_sha256="")),
                name="personal_active_has_weights",
            ),
            models.CheckConstraint(
                condition=Q(serving_choice=ServingChoice.MAIN, blend=0.0)
                | Q(serving_choice=ServingChoice.PERSONAL, blend=1.0)
                | Q(serving_choice=ServingChoice.BLEND, blend__gt=0.0, blend__lt=1.0),
                name="personal_blend_matches_choice",
            ),
        )

    def __str__(self) -> str:
        return str(self.learner)
