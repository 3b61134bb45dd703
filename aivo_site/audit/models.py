"""The audit log: append-only, each event carrying the hash of the one before."""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.utils.translation import gettext_lazy as _

from aivo_site.database import AppendOnlyRow


class AuditEvent(AppendOnlyRow):
    """One thing that changed state or read a secret."""

    sequence = models.PositiveBigIntegerField(_("sequence"), unique=True)
    at = models.DateTimeField(_("at"))
    actor = models.CharField(_("actor"), max_length=150, help_text=_("User name, or the command or schedule that acted."))
    action = models.CharField(_("action"), max_length=64)
    object_type = models.CharField(_("object type"), max_length=64, blank=True)
    object_id = models.CharField(_("object id"), max_length=64, blank=True)
    data = models.JSONField(_("data"), default=dict, help_text=_("Ids, numbers and words; learners by subject key."))
    previous_hash = models.CharField(_("previous hash"), max_length=64)
    hash = models.CharField(_("hash"), max_length=64, unique=True)

    class Meta:
        verbose_name = _("audit event")
        verbose_name_plural = _("audit events")
        ordering = ("-sequence",)
        indexes = (
            models.Index(fields=["object_type", "object_id"], name="audit_object"),
            models.Index(fields=["action", "-sequence"], name="audit_action"),
        )
        constraints = (models.CheckConstraint(condition=Q(sequence__gte=1), name="audit_sequence_positive"),)

    def __str__(self) -> str:
        return f"{self.sequence} {self.action}"
