"""Making known organisations and learners."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import QuerySet
from django.db.models.functions import Lower
from django.utils.translation import gettext as _

from learners.errors import RegistrationError, UnknownName
from learners.models import LEARNER_ID_PATTERN, Learner, Organisation, Pool

DEFAULT_ORGANISATION = "default"
"""Slug of the organisation of learners for whom none is named."""

PROFILE_KEYS = ("needs", "accommodations", "language")


def find_organisation(*, slug: str) -> Organisation:
    """The organisation with this slug.

    Raises:
        UnknownName: ``unknown_organisation``, with the slugs that exist (the first twenty).
    """
    # Anything that is no slug may hold what a database refuses to look up.
    organisation: Organisation | None = Organisation.objects.filter(slug=slug).first() if _is_slug(slug) else None
    if organisation is None:
        known = ", ".join(Organisation.objects.values_list("slug", flat=True)[:20]) or _("none yet")
        message = _("Organisation %(slug)r is unknown; known: %(known)s.") % {"slug": slug[:60], "known": known}
        raise UnknownName(message, code="unknown_organisation")
    return organisation


def register_organisation(*, slug: str, name: str = "") -> Organisation:
    """The organisation with this slug, created if there is none; ``name`` defaults to the slug.

    Raises:
        RegistrationError: ``bad_slug``.
    """
    if not _is_slug(slug):
        message = _("slug must have 1 to 50 letters, digits, hyphens or underscores.")
        raise RegistrationError(message, code="bad_slug")
    organisation: Organisation
    organisation, _created = Organisation.objects.get_or_create(slug=slug, defaults={"name": (name or slug)[:200]})
    return organisation


def find_learner(*, learner_id: str, related: Sequence[str] = ()) -> Learner:
    """The learner with this id; upper and lower case do not matter.

    Args:
        related: relations to fetch with it, as ``select_related`` takes them.

    Raises:
        UnknownName: ``unknown_learner``.
    """
    rows = Learner.objects.select_related(*related) if related else Learner.objects.all()
    learner: Learner | None = with_learner_id(rows, learner_id).first()
    if learner is None:
        raise unknown_learner(learner_id)
    return learner


def with_learner_id(rows: QuerySet[Any], learner_id: str, *, field: str = "learner_id") -> QuerySet[Any]:
    """The rows whose learner has this id, upper and lower case alike; none for what is no id and a database may refuse.

    Args:
        field: where the id stands, seen from ``rows``.
    """
    if re.match(LEARNER_ID_PATTERN, learner_id) is None:
        return rows.none()
    # By the index on the small letters; ``iexact`` would read the whole table on SQLite.
    lowered: QuerySet[Any] = rows.annotate(lowered_id=Lower(field)).filter(lowered_id=learner_id.lower())
    return lowered


def unknown_learner(learner_id: str) -> UnknownName:
    """The error for an id that names no learner."""
    return UnknownName(_("learner_id names no learner: %(id)s") % {"id": ascii(learner_id[:80])}, code="unknown_learner")


def register_learner(
    *,
    learner_id: str,
    organisation: Organisation,
    pool: str = Pool.FEDERATED,
    grade_band: str = "",
    profile: Mapping[str, Any] | None = None,
) -> Learner:
    """Create a learner, without any consent. The same learner again (id, organisation and pool) is returned unchanged.

    Args:
        profile: ``needs`` and ``accommodations`` (lists of words) and ``language`` (a word); no names.

    Raises:
        RegistrationError: ``bad_learner_id``, ``unknown_pool``, ``bad_grade_band``, ``bad_profile``, ``learner_exists`` (the id
            is taken, perhaps in other case, in another pool or another organisation).
    """
    if not re.match(LEARNER_ID_PATTERN, learner_id):
        message = _("learner_id: A-Z a-z 0-9 . _ - , at most 64, beginning with a letter or digit.")
        raise RegistrationError(message, code="bad_learner_id")
    if pool not in Pool.values:
        message = _("Pool %(pool)r is unknown; allowed: %(allowed)s.")
        raise RegistrationError(message % {"pool": str(pool)[:40], "allowed": ", ".join(Pool.values)}, code="unknown_pool")
    if len(grade_band) > 32:
        raise RegistrationError(_("grade_band may have at most 32 characters."), code="bad_grade_band")
    values = {"organisation": organisation, "pool": pool, "grade_band": grade_band, "profile": checked_profile(profile or {})}
    try:
        with transaction.atomic():
            return Learner.objects.create(learner_id=learner_id, **values)
    except IntegrityError:
        existing = find_learner(learner_id=learner_id)
    if (existing.learner_id, existing.organisation_id, existing.pool) != (learner_id, organisation.pk, pool):
        message = _("learner_id is taken: by another spelling of it, in another pool or in another organisation.")
        raise RegistrationError(message, code="learner_exists")
    return existing


def checked_profile(profile: Mapping[str, Any]) -> dict[str, Any]:
    """``profile`` if it has the allowed form.

    Raises:
        RegistrationError: ``bad_profile``.
    """
    for key, value in profile.items():
        if key not in PROFILE_KEYS:
            message = _("profile has no field %(key)r; allowed: %(allowed)s.")
            allowed = ", ".join(PROFILE_KEYS)
            raise RegistrationError(message % {"key": str(key)[:40], "allowed": allowed}, code="bad_profile")
        if not _is_word(value) if key == "language" else not (isinstance(value, list) and all(map(_is_word, value))):
            message = _("profile field %(key)r must be %(form)s.")
            form = _("a word") if key == "language" else _("a list of words")
            raise RegistrationError(message % {"key": key, "form": form}, code="bad_profile")
    return dict(profile)


def _is_slug(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_-]{1,50}", text) is not None


def _is_word(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value) is not None
