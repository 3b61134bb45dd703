"""Completing baseline assessments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from django.db import transaction
from django.utils import timezone
from django.utils.translation import gettext as _

from learners.errors import RegistrationError
from learners.models import BaselineAssessment, Learner
from learners.signals import assessment_completed


def complete_assessment(
    *, learner: Learner, assessment_id: str, domains: Mapping[str, Mapping[str, Any]], completed_at: datetime | None = None
) -> tuple[BaselineAssessment, bool]:
    """Store the summary of a completed baseline assessment and tell ``assessment_completed``, both in one transaction.

    Its answers are interactions and come by their own way. Completing the same ``assessment_id`` again changes nothing and
    sends no signal.

    Args:
        domains: domain -> ``score`` 0..1 and ``level`` 1..9 (a whole number).
        completed_at: aware; by default now.

    Returns:
        The stored assessment, and whether it is new.

    Raises:
        RegistrationError: ``bad_assessment_id``, ``bad_domains``, ``time_without_zone``.
    """
    if not 1 <= len(assessment_id) <= 64:
        raise RegistrationError(_("assessment_id must have 1 to 64 characters."), code="bad_assessment_id")
    when = completed_at or timezone.now()
    if timezone.is_naive(when):
        raise RegistrationError(_("completed_at must have a time zone."), code="time_without_zone")
    checked = {_domain_name(name): _summary(name, summary) for name, summary in domains.items()}
    with transaction.atomic():
        assessment, created = BaselineAssessment.objects.get_or_create(
            learner=learner, assessment_id=assessment_id, defaults={"completed_at": when, "domains": checked}
        )
        if created:
            assessment_completed.send(sender=Learner, learner=learner, assessment=assessment)
    return assessment, created


def _domain_name(name: object) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= 100:
        raise RegistrationError(_("Names in domains must be texts of 1 to 100 characters."), code="bad_domains")
    return name


def _summary(name: str, summary: object) -> dict[str, float | int]:
    if not isinstance(summary, Mapping) or set(summary) != {"score", "level"}:
        message = _("Domain %(name)r must have exactly the fields score and level.") % {"name": name[:40]}
        raise RegistrationError(message, code="bad_domains")
    score, level = summary["score"], summary["level"]
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score) or not 0 <= score <= 1:
        raise RegistrationError(_("Domain %(name)r: score must lie from 0 to 1.") % {"name": name[:40]}, code="bad_domains")
    if isinstance(level, bool) or not isinstance(level, int) or not 1 <= level <= 9:
        message = _("Domain %(name)r: level must be a whole number from 1 to 9.") % {"name": name[:40]}
        raise RegistrationError(message, code="bad_domains")
    return {"score": float(score), "level": level}
