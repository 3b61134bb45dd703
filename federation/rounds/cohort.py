"""The cohort: one contribution row per selected learner, and the delta that each row stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import numpy as np
import numpy.typing as npt
from django.db import transaction
from django.db.models import Count, QuerySet

from aivo_core.network import FloatArray
from federation import strategies
from federation.models import AggregationRound, Contribution, ModelTrainingSession, Verdict
from federation.policies import RoundPolicy
from federation.rounds.eligibility import LearnerVerdict
from models_store.errors import StoreError
from models_store.models import PersonalizedModel
from models_store.store import DeltaFile, DeltaReader

BLOCK = strategies.BLOCK_SIZE
"""Learners that are read together, ordered by subject key: as many as the fold sums in one block."""


class DamagedContribution(Exception):
    """A delta that intake accepted cannot be read any more; ``code`` is the store's."""

    def __init__(self, contribution: UUID, error: StoreError) -> None:
        super().__init__(str(error))
        self.contribution = contribution
        self.code = error.code


@dataclass(frozen=True, slots=True)
class DiscountedDelta:
    """One session's delta file and the factor that its age gives it."""

    file: DeltaFile
    discount: float


def create_cohort(round_: AggregationRound, selected: Sequence[LearnerVerdict], policy: RoundPolicy) -> None:
    """Write the contribution rows of the selected learners, with the sessions of the source ``sessions``.

    Call within the transaction that moves the round on; a row that is there already stays.
    """
    rows = [_row(round_, verdict, policy) for verdict in selected]
    Contribution.objects.bulk_create(rows, batch_size=500, ignore_conflicts=True)
    ids = dict(Contribution.objects.filter(round=round_).values_list("subject_key", "id"))
    through = Contribution.sessions.through
    through.objects.bulk_create(
        [
            through(contribution_id=ids[verdict.subject_key], modeltrainingsession_id=session.id)
            for verdict in selected
            for session in verdict.sessions
        ],
        batch_size=500,
        ignore_conflicts=True,
    )


def attach_session(contribution: Contribution, session: ModelTrainingSession) -> None:
    """Make a session the round trained the one that a contribution stands for; again changes nothing."""
    with transaction.atomic():  # with a session and without its samples the learner would not be asked again, and be rejected
        contribution.sessions.add(session)
        Contribution.objects.filter(pk=contribution.pk, verdict=Verdict.PENDING).update(samples=session.samples)


def pending_rows(round_: AggregationRound) -> QuerySet[Contribution]:
    """Contributions without a verdict, ordered by subject key."""
    return Contribution.objects.filter(round=round_, verdict=Verdict.PENDING).order_by("subject_key")


def untrained_rows(round_: AggregationRound) -> QuerySet[Contribution]:
    """Contributions without a verdict for which nothing was trained yet, ordered by subject key."""
    return pending_rows(round_).annotate(trained=Count("sessions")).filter(trained=0)


def models_to_train(rows: QuerySet[Contribution]) -> QuerySet[PersonalizedModel]:
    """Personalized models of the learners of these contributions, ordered by subject key."""
    keys = rows.values_list("subject_key", flat=True)
    models = PersonalizedModel.objects.select_related("learner").filter(learner__subject_key__in=list(keys))
    ordered: QuerySet[PersonalizedModel] = models.order_by("learner__subject_key")
    return ordered


def accepted_rows(round_: AggregationRound) -> QuerySet[Contribution]:
    """Accepted contributions, ordered by subject key."""
    return Contribution.objects.filter(round=round_, verdict=Verdict.ACCEPTED).order_by("subject_key")


def blocks(rows: QuerySet[Contribution]) -> Iterator[list[Contribution]]:
    """The rows in blocks of ``BLOCK``, their sessions read with them; each block is read when it is asked for.

    The rows are fixed when the walk begins: what happens to them meanwhile does not move the blocks.
    """
    keys: list[UUID] = list(rows.values_list("pk", flat=True))
    for start in range(0, len(keys), BLOCK):
        part = Contribution.objects.filter(pk__in=keys[start : start + BLOCK]).order_by("subject_key")
        yield list(part.prefetch_related("sessions__personalized_model__learner"))


def sessions_of(contribution: Contribution) -> list[ModelTrainingSession]:
    """The contribution's sessions in the order in which they were trained."""
    return sorted(contribution.sessions.all(), key=lambda session: session.sequence)


def discounted_deltas(sessions: Sequence[ModelTrainingSession], discounts: Sequence[float]) -> tuple[DiscountedDelta, ...]:
    """What a contribution of these sessions is made of.

    Raises:
        ValueError: not one discount per session.
    """
    return tuple(
        DiscountedDelta(DeltaFile(session.delta_path, session.delta_sha256), discount)
        for session, discount in zip(sessions, discounts, strict=True)
    )


def delta_files(
    contributions: Sequence[UUID], *, behind: Mapping[UUID, int], exponent: float
) -> dict[UUID, tuple[DiscountedDelta, ...]]:
    """Each contribution's delta files in the order of training.

    Args:
        behind: how far behind each version of the lineage is. exponent: of the discount by it.
    """
    rows = (
        Contribution.sessions.through.objects.filter(contribution__in=contributions)
        .order_by("modeltrainingsession__sequence")
        .values_list(
            "contribution_id",
            "modeltrainingsession__delta_path",
            "modeltrainingsession__delta_sha256",
            "modeltrainingsession__base_version_id",
        )
    )
    found: dict[UUID, list[DiscountedDelta]] = {contribution: [] for contribution in contributions}
    for contribution, path, sha256, version in rows:
        discount = staleness_discount(behind[version], exponent)
        found[contribution].append(DiscountedDelta(DeltaFile(path, sha256), discount))
    return {contribution: tuple(deltas) for contribution, deltas in found.items()}


def compose(deltas: Sequence[DiscountedDelta], read: Callable[[DeltaFile], FloatArray]) -> FloatArray:
    """A contribution's delta: its sessions' deltas, each times its discount, summed; float32.

    Each session's delta is relative to where that session started, so that the sum is what the learner's own training
    changed, whatever the main model did in between. Summed in float64 in the order of training. The same arithmetic for
    whole deltas and for some coordinates of them, as ``read`` gives them.

    Raises:
        StoreError: what ``read`` raises: a file is missing, damaged, or of another shape.
    """
    if len(deltas) == 1 and deltas[0].discount == 1.0:
        return read(deltas[0].file)
    total: npt.NDArray[np.float64] | float = 0.0
    for part in deltas:
        total = total + part.discount * read(part.file).astype(np.float64)
    with np.errstate(over="ignore"):
        return np.asarray(total).astype(np.float32)  # a sum beyond float32 is infinite: intake refuses what is not finite


def read_contribution(contribution: Contribution, *, reader: DeltaReader, discounts: Sequence[float]) -> FloatArray:
    """The contribution's delta, (tail_size,) float32; its numbers stay until the next one is read.

    Raises:
        StoreError: a file is missing, damaged, or of another shape.
        ValueError: not one discount per session.
    """
    return compose(discounted_deltas(sessions_of(contribution), discounts), reader.read)


def read_accepted(contribution: Contribution, *, reader: DeltaReader, discounts: Sequence[float]) -> FloatArray:
    """As ``read_contribution``, of one that intake has read before.

    Raises:
        DamagedContribution: it cannot be read any more.
    """
    try:
        return read_contribution(contribution, reader=reader, discounts=discounts)
    except StoreError as error:
        raise DamagedContribution(contribution.pk, error) from error


def staleness_discount(versions_behind: int, exponent: float) -> float:
    """(1 + versions behind)^-a, in (0, 1] (Xie et al. 2019, "Asynchronous Federated Optimization", polynomial)."""
    return float((1.0 + versions_behind) ** -exponent)


def _row(round_: AggregationRound, verdict: LearnerVerdict, policy: RoundPolicy) -> Contribution:
    behind = max((session.versions_behind for session in verdict.sessions), default=0)
    return Contribution(
        round=round_,
        subject_key=verdict.subject_key,
        # The same interactions come again in later sessions: the largest session counts, not their sum.
        samples=max((session.samples for session in verdict.sessions), default=0),
        versions_behind=behind,
        discount=staleness_discount(behind, policy.staleness_exponent),
    )
