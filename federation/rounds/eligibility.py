"""Who may contribute to a round: a verdict for every learner of the federated pool, each with its reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.db.models import OuterRef, QuerySet, Subquery, TextChoices
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from federation.models import ContributionSource, FederationPolicy, ModelTrainingSession, SessionPurpose
from federation.policies import RoundPolicy
from federation.rounds.lineage import lineage_of
from learners.models import Learner, Pool
from models_store.models import Backend, MainModelVersion, PersonalizedModelStatus

CHUNK = 2000


class Exclusion(TextChoices):
    """Why a learner takes no part in a round."""

    WITHDRAWN = "withdrawn", _("withdrew")
    NO_CONSENT_TRAINING = "no_consent_training", _("no consent to training")
    NO_CONSENT_CONTRIBUTION = "no_consent_contribution", _("no consent to contribution")
    ORGANISATION_LEFT_OUT = "organisation_left_out", _("the organisation takes no part in rounds")
    NO_MODEL = "no_model", _("no personalized model")
    OTHER_BACKEND = "other_backend", _("the model is no clone of the main model")
    NOT_ACTIVE = "not_active", _("the personalized model is not active")
    BASE_NOT_ON_LINEAGE = "base_not_on_lineage", _("the model's base is no ancestor of the active version")
    ENCODER_MISMATCH = "encoder_mismatch", _("the model's base has another encoder")
    NEVER_TRAINED = "never_trained", _("never trained")
    STALE = "stale", _("last trained too long ago")
    TOO_FEW_SAMPLES = "too_few_samples", _("too few samples")
    NOTHING_TO_CONTRIBUTE = "nothing_to_contribute", _("no training since the last contribution")
    PRIVACY_BUDGET_SPENT = "privacy_budget_spent", _("the learner's privacy budget is spent")
    TOO_MANY_VERSIONS_BEHIND = "too_many_versions_behind", _("what was trained is too many versions behind")


@dataclass(frozen=True)
class SessionRef:
    """A training session that a learner has not contributed yet."""

    id: UUID
    samples: int
    versions_behind: int


@dataclass(frozen=True)
class LearnerVerdict:
    """Whether one learner may contribute; ``reason_code`` is empty when so.

    Attributes:
        model_pk: of the personalized model, None without one.
        sessions: what the learner would contribute with the source ``sessions``, in order of training.
    """

    learner_pk: UUID
    learner_id: str
    subject_key: UUID
    model_pk: UUID | None
    reason_code: str
    sessions: tuple[SessionRef, ...] = ()

    @property
    def eligible(self) -> bool:
        return not self.reason_code

    @property
    def reason(self) -> str:
        return str(Exclusion(self.reason_code).label) if self.reason_code else ""


@dataclass(frozen=True)
class Selection:
    """The verdicts of the whole federated pool, ordered by subject key."""

    verdicts: tuple[LearnerVerdict, ...] = field(default=())

    @property
    def eligible(self) -> tuple[LearnerVerdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.eligible)

    @property
    def excluded(self) -> dict[str, int]:
        """Learners left out by reason code."""
        return dict(sorted(Counter(verdict.reason_code for verdict in self.verdicts if not verdict.eligible).items()))


def select_learners(
    *,
    policy: RoundPolicy,
    base: MainModelVersion,
    now: datetime | None = None,
    budget_spent: Callable[[Learner], bool] | None = None,
) -> Selection:
    """Decide for every learner of the federated pool whether it may contribute to a round from ``base``.

    ``max_stale_days`` counts from the learner's last PERSONAL session, whatever the contribution source.

    Args:
        budget_spent: of a private round: who has no privacy budget left.
    """
    context = _Context.of(policy, base, now or timezone.now(), budget_spent or _unlimited)
    return Selection(tuple(_verdict(learner, context) for learner in _pool().iterator(chunk_size=CHUNK)))


def _unlimited(_learner: Learner) -> bool:
    return False


def consent_refusal(learner: Learner | None) -> str:
    """Reason code of a learner who may not contribute now, whatever they trained; empty when they may."""
    if learner is None or learner.withdrawn_at is not None:
        return Exclusion.WITHDRAWN
    if not learner.consent_training:
        return Exclusion.NO_CONSENT_TRAINING
    if not learner.consent_contribution:
        return Exclusion.NO_CONSENT_CONTRIBUTION
    return ""


@dataclass(frozen=True)
class _Context:
    policy: RoundPolicy
    base: MainModelVersion
    behind: Mapping[UUID, int]
    encoders: Mapping[UUID, str]
    left_out: frozenset[UUID]
    trained_after: datetime
    sessions: Mapping[UUID, list[tuple[UUID, int, UUID]]]
    budget_spent: Callable[[Learner], bool]

    @classmethod
    def of(cls, policy: RoundPolicy, base: MainModelVersion, now: datetime, budget_spent: Callable[[Learner], bool]) -> _Context:
        behind = lineage_of(base)
        left_out = FederationPolicy.objects.filter(organisation__isnull=False, participates=False)
        return cls(
            policy=policy,
            base=base,
            behind=behind,
            encoders=dict(MainModelVersion.objects.filter(pk__in=behind).values_list("pk", "encoder_sha256")),
            left_out=frozenset(left_out.values_list("organisation_id", flat=True)),
            trained_after=now - timedelta(days=policy.max_stale_days),
            sessions=_waiting_sessions() if policy.contribution_source == ContributionSource.SESSIONS else {},
            budget_spent=budget_spent,
        )


def _pool() -> QuerySet[Any]:
    last = ModelTrainingSession.objects.filter(
        personalized_model__learner=OuterRef("pk"), purpose=SessionPurpose.PERSONAL
    ).order_by("-created_at", "-sequence")
    learners: QuerySet[Any] = (
        Learner.objects.filter(pool=Pool.FEDERATED)
        .select_related("personalized_model")
        .annotate(last_trained=Subquery(last.values("created_at")[:1]), last_samples=Subquery(last.values("samples")[:1]))
        .order_by("subject_key")
    )
    return learners


def _waiting_sessions() -> dict[UUID, list[tuple[UUID, int, UUID]]]:
    """Per personalized model: (session, samples, base version) of what was trained and not contributed, in order."""
    rows = (
        ModelTrainingSession.objects.filter(purpose=SessionPurpose.PERSONAL, contributed_to_federation=False)
        .exclude(delta_path="")
        .order_by("personalized_model_id", "sequence")
        .values_list("personalized_model_id", "id", "samples", "base_version_id")
    )
    found: dict[UUID, list[tuple[UUID, int, UUID]]] = defaultdict(list)
    for model, session, samples, base in rows.iterator(chunk_size=CHUNK):
        found[model].append((session, samples, base))
    return found


def _verdict(learner: Any, context: _Context) -> LearnerVerdict:
    model: Any = getattr(learner, "personalized_model", None)
    code = next((code for code in _refusals(learner, model, context) if code), "")
    sessions: tuple[SessionRef, ...] = ()
    if not code and model is not None and context.policy.contribution_source == ContributionSource.SESSIONS:
        code, sessions = _contributable(context.sessions.get(model.pk, []), context)
    return LearnerVerdict(
        learner_pk=learner.pk,
        learner_id=learner.learner_id,
        subject_key=learner.subject_key,
        model_pk=None if model is None else model.pk,
        reason_code=str(code),
        sessions=sessions,
    )


def _refusals(learner: Any, model: Any, context: _Context) -> Iterator[str]:
    """Reason codes in the order in which they are asked, empty where there is nothing to refuse."""
    yield consent_refusal(learner)
    yield Exclusion.PRIVACY_BUDGET_SPENT if context.budget_spent(learner) else ""
    yield Exclusion.ORGANISATION_LEFT_OUT if learner.organisation_id in context.left_out else ""
    if model is None:
        yield Exclusion.NO_MODEL
        return
    yield Exclusion.OTHER_BACKEND if model.backend != Backend.FEDERATED else ""
    yield Exclusion.NOT_ACTIVE if model.status != PersonalizedModelStatus.ACTIVE else ""
    yield Exclusion.BASE_NOT_ON_LINEAGE if model.source_version_id not in context.behind else ""
    yield Exclusion.ENCODER_MISMATCH if context.encoders.get(model.source_version_id) != context.base.encoder_sha256 else ""
    if learner.last_trained is None:
        yield Exclusion.NEVER_TRAINED
        return
    yield Exclusion.STALE if learner.last_trained < context.trained_after else ""
    yield Exclusion.TOO_FEW_SAMPLES if learner.last_samples < context.policy.min_samples else ""


def _contributable(waiting: list[tuple[UUID, int, UUID]], context: _Context) -> tuple[str, tuple[SessionRef, ...]]:
    """What of the waiting sessions can go into a round; those too far behind stay where they are."""
    if not waiting:
        return Exclusion.NOTHING_TO_CONTRIBUTE, ()
    related = [(session, samples, context.behind[base]) for session, samples, base in waiting if base in context.behind]
    if not related:
        return Exclusion.BASE_NOT_ON_LINEAGE, ()
    near = tuple(SessionRef(*entry) for entry in related if entry[2] <= context.policy.max_versions_behind)
    return ("", near) if near else (Exclusion.TOO_MANY_VERSIONS_BEHIND, ())
