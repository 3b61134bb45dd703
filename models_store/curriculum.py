"""The curriculum learners: who they are, which of them train and which validate, and a pool to evaluate on.

All choices are made by a hash of the learner id, so that they can be repeated and depend on nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from django.db import transaction
from django.db.models import Count, QuerySet
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from aivo_core.encoding.events import Event
from aivo_core.encoding.tables import MIN_LEARNERS
from aivo_site.audit.services import record
from learners.histories import iter_histories
from learners.models import Learner, Pool
from models_store.errors import PreparationError

VALIDATION_SHARE = 0.1
EVALUATION_SHARE = 0.1
MIN_EVENTS = 2
"""A learner with fewer has no sample."""


@dataclass(frozen=True)
class History:
    """One learner of the curriculum; the events in the learner's order."""

    learner_id: str
    subject_key: str
    events: list[Event]


@dataclass(frozen=True)
class CurriculumData:
    """The curriculum learners' histories, split by learner.

    Attributes:
        sha256: of ids, split and events: equal exactly when all are.
        without_events: consenting learners with fewer than two interactions, left out.
    """

    training: tuple[History, ...]
    validation: tuple[History, ...]
    sha256: str
    without_events: int

    @property
    def samples(self) -> int:
        return sum(len(history.events) - 1 for history in (*self.training, *self.validation))


def shared_model_learners(pool: Pool) -> QuerySet[Any]:
    """Learners of a pool who may shape or judge the shared model: consent to contribution, not withdrawn; by id."""
    learners: QuerySet[Any] = Learner.objects.filter(pool=pool, consent_contribution=True, withdrawn_at=None)
    return learners.order_by("learner_id")


def learners_with_samples(pool: Pool) -> QuerySet[Any]:
    """Those of ``shared_model_learners`` who have at least one sample."""
    counted: QuerySet[Any] = shared_model_learners(pool).annotate(events=Count("interactions")).filter(events__gte=MIN_EVENTS)
    return counted


def excluded_learners(pool: Pool) -> dict[str, int]:
    """How many learners of a pool are left out, by reason."""
    withdrawn = Learner.objects.filter(pool=pool).exclude(withdrawn_at=None).count()
    unasked = Learner.objects.filter(pool=pool, withdrawn_at=None, consent_contribution=False).count()
    return {reason: n for reason, n in (("withdrawn", withdrawn), ("no_consent_contribution", unasked)) if n}


def set_aside_evaluation(*, actor: str) -> int:
    """Where nobody is in the evaluation pool, move a tenth of the curriculum learners there; how many were moved.

    A pool of learners who may not be read is not filled up: whoever put them there must know that consent is missing.

    Raises:
        PreparationError: ``no_curriculum_learners``, ``too_few_learners``.
    """
    if Learner.objects.filter(pool=Pool.EVALUATION).exists():
        return 0
    with transaction.atomic():
        candidates = list(learners_with_samples(Pool.CURRICULUM).values_list("pk", "learner_id", "subject_key"))
        _check_enough(len(candidates), needed=MIN_LEARNERS + 2)
        wanted = max(1, round(EVALUATION_SHARE * len(candidates)))
        chosen = sorted(candidates, key=lambda row: _hash("evaluation", row[1]))[:wanted]
        moved = Learner.objects.filter(pk__in=[row[0] for row in chosen], pool=Pool.CURRICULUM).update(pool=Pool.EVALUATION)
        if moved != len(chosen):
            raise PreparationError(_("Learners changed their pool meanwhile; try again."), code="too_few_learners")
        record(
            action="learners.set_aside_for_evaluation",
            actor=actor,
            object_type="Learner",
            data={"subject_keys": sorted(str(row[2]) for row in chosen), "of": len(candidates)},
        )
    return moved


def read_curriculum() -> CurriculumData:
    """Histories of the curriculum learners with at least two events, all in memory.

    Raises:
        PreparationError: ``no_curriculum_learners``; ``too_few_learners``: fewer than three to train and one to validate.
    """
    histories, without_events = [], 0
    for learner, events in iter_histories(shared_model_learners(Pool.CURRICULUM)):
        if len(events) < MIN_EVENTS:
            without_events += 1
        else:
            histories.append(History(learner.learner_id, str(learner.subject_key), list(events)))
    _check_enough(len(histories), needed=MIN_LEARNERS + 1)
    validation_ids = _validation_ids([history.learner_id for history in histories])
    training = tuple(history for history in histories if history.learner_id not in validation_ids)
    validation = tuple(history for history in histories if history.learner_id in validation_ids)
    return CurriculumData(training, validation, _data_sha256(training, validation), without_events)


def _validation_ids(learner_ids: Sequence[str]) -> frozenset[str]:
    """About a tenth; at least one, and never so many that too few are left to train."""
    ordered = sorted(learner_ids, key=lambda learner_id: _hash("validation", learner_id))
    below = sum(_hash("validation", learner_id) < VALIDATION_SHARE * 2**64 for learner_id in ordered)
    return frozenset(ordered[: min(max(1, below), len(ordered) - MIN_LEARNERS)])


def _hash(purpose: str, learner_id: str) -> int:
    """Uniform in [0, 2^64), independent between purposes."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{learner_id}".encode()).digest()[:8], "big")


def _check_enough(found: int, *, needed: int) -> None:
    if found >= needed:
        return
    excluded = ", ".join(f"{reason}: {n}" for reason, n in excluded_learners(Pool.CURRICULUM).items()) or _("none left out")
    if not found:
        message = _(
            "There is no curriculum learner with consent to contribution and at least %(events)s interactions (%(excluded)s): "
            "import some with import_interactions --pool CURRICULUM --consent contribution."
        )
        raise PreparationError(message % {"events": MIN_EVENTS, "excluded": excluded}, code="no_curriculum_learners")
    message = ngettext(
        "%(needed)s curriculum learner with interactions is needed, there are %(found)s (%(excluded)s).",
        "%(needed)s curriculum learners with interactions are needed, there are %(found)s (%(excluded)s).",
        needed,
    )
    raise PreparationError(message % {"needed": needed, "found": found, "excluded": excluded}, code="too_few_learners")


def _data_sha256(training: Iterable[History], validation: Iterable[History]) -> str:
    digest = hashlib.sha256()
    for split, histories in (("training", training), ("validation", validation)):
        for history in histories:
            digest.update(f"{split}:{history.learner_id}\n".encode())
            digest.update(repr([astuple(event) for event in history.events]).encode())
    return digest.hexdigest()
