"""Which learners a door's request means: by learner id or primary key, by organisation, by pool."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from django.db.models import Q, QuerySet
from django.db.models.functions import Lower
from django.utils.translation import gettext as _

from aivo_site.errors import UsageError
from learners.errors import UnknownName
from learners.models import LEARNER_ID_PATTERN, Learner, Pool
from learners.registration import find_organisation

NAMES_PER_QUERY = 500


def select_learners(*, learner_ids: Sequence[str] = (), organisation: str = "", pool: str = Pool.FEDERATED) -> QuerySet[Any]:
    """The learners that a request names, in the order of their ids.

    Args:
        learner_ids: exactly these, of whatever pool, by learner id or primary key; empty: all of ``pool``.
        organisation: slug; only learners of it.

    Raises:
        UnknownName: ``unknown_learner`` naming the first, ``unknown_organisation``.
        UsageError: ``unknown_pool``.
    """
    if pool not in Pool.values:
        message = _("pool must be one of %(allowed)s, not %(pool)s.")
        raise UsageError(message % {"allowed": ", ".join(Pool.values), "pool": ascii(pool[:40])}, code="unknown_pool")
    learners: QuerySet[Any] = Learner.objects.order_by("learner_id")
    if organisation:
        learners = learners.filter(organisation=find_organisation(slug=organisation))
    return learners.filter(pk__in=_keys_of(learner_ids)) if learner_ids else learners.filter(pool=pool)


def check_limit(limit: int | None) -> None:
    """Refuse a limit below 1.

    Raises:
        UsageError: ``bad_limit``.
    """
    if limit is not None and limit < 1:
        raise UsageError(_("limit must be at least 1, not %(limit)s.") % {"limit": limit}, code="bad_limit")


def _keys_of(learner_ids: Sequence[str]) -> list[UUID]:
    """Primary keys of the named learners."""
    wanted = {str(name).lower(): str(name) for name in learner_ids}
    found: dict[str, UUID] = {}
    names = [name for name in wanted if re.match(LEARNER_ID_PATTERN, name)]
    for start in range(0, len(names), NAMES_PER_QUERY):
        part = names[start : start + NAMES_PER_QUERY]
        by_key = Q(pk__in=[key for key in map(_as_uuid, part) if key is not None])
        rows = Learner.objects.annotate(lowered=Lower("learner_id")).filter(by_key | Q(lowered__in=part))
        for learner_id, key in rows.values_list("learner_id", "pk"):
            found[learner_id.lower()] = key
            found[str(key)] = key
    for name, given in wanted.items():
        if name not in found:
            raise UnknownName(_("learner_id names no learner: %(id)s") % {"id": ascii(given[:80])}, code="unknown_learner")
    return [found[name] for name in wanted]


def _as_uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
