"""Aggregation: the accepted contributions folded into one update, once per attempt, as one atomic file.

The deltas are read by ``folding``, one at a time or some coordinates at a time. An attempt is one set (its digest), one charge
where the policy is private, one file; every later state of the round only reads that file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from django.db import transaction
from django.db.models import Max
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_core.privacy import global_norm
from federation import strategies
from federation.models import AggregationRound, Contribution, RoundAttempt, RoundState
from federation.policies import RoundPolicy
from federation.rounds import cohort, folding, intake, lifecycle
from federation.rounds.candidate import reserve_candidate
from federation.rounds.cohort import DamagedContribution, DiscountedDelta
from federation.rounds.errors import RoundConflict, RoundSkipped
from federation.rounds.folding import Member
from federation.rounds.intake import IntakeContext
from federation.rounds.lineage import lineage_of
from federation.rounds.quality import NEUTRAL, measure_quality
from federation.strategies import StrategyError
from federation.strategies.base import Aggregate, PrivacyMechanism
from federation.strategies.blocks import SumSource
from models_store import store
from models_store.errors import StoreError
from models_store.store import DeltaFile, DeltaReader, LoadedVersion

Progress = Callable[[int, int, str], None]

WEIGHED_TOGETHER = 500
"""Contributions whose rows are read and written at a time."""


def aggregate_round(round_: AggregationRound, *, policy: RoundPolicy, base: LoadedVersion, progress: Progress) -> RoundAttempt:
    """Fold the accepted contributions, write the file, reserve the candidate and move the round to EVALUATING.

    Consents are checked again right before. Run again after a crash it begins a new attempt over what is accepted then; the
    same set gives the same bytes.

    Raises:
        RoundSkipped: ``too_few_learners`` accepted, or ``zero_weight``.
        RoundConflict: the round was changed by another run.
        StrategyError: the strategy refuses.
    """
    while True:
        intake.recheck_consent(round_)
        require_enough(policy, cohort.accepted_rows(round_).count())
        try:
            _measure(round_, policy, base, progress)
            members = weigh(round_, policy)
            attempt = _begin_attempt(round_, policy, members)
            result = fold_contributions(policy=policy, base=base, members=members, progress=progress)
        except DamagedContribution as damaged:
            # The attempt has no file and stays without one; the next one is over the set without this contribution.
            intake.reject(damaged.contribution, damaged.code, str(damaged))
            continue
        stored = _write(round_, attempt, base, policy, result)
        if stored is not None:
            return _complete(round_, attempt, stored, result)


def require_enough(policy: RoundPolicy, count: int) -> None:
    """Check a number of learners against the policy's minimum and the strategy's own.

    Raises:
        RoundSkipped: ``too_few_learners``.
    """
    needed = max(policy.minimum_learners, strategies.get(policy.strategy).info.minimum_cohort)
    if count < needed:
        text = _("%(n)d learners can contribute, at least %(needed)d are needed.") % {"n": count, "needed": needed}
        raise RoundSkipped(text, code="too_few_learners")


def weigh(round_: AggregationRound, policy: RoundPolicy) -> list[Member]:
    """The accepted set in subject key order with its weights, which the contribution rows keep."""
    rows = list(cohort.accepted_rows(round_).values_list("pk", "subject_key", "samples", "quality"))
    strategy = strategies.get(policy.strategy)
    quality = [NEUTRAL if row[3] is None else row[3] for row in rows] if strategy.info.uses_quality else None
    try:
        weights = strategy.weigh([row[2] for row in rows], quality=quality, parameters=policy.strategy_parameters)
    except strategies.StrategyError as error:
        if error.code == "zero_weight":
            raise RoundSkipped(str(error), code=error.code) from error
        raise
    behind = lineage_of(round_.base_version)
    members: list[Member] = []
    for begin in range(0, len(rows), WEIGHED_TOGETHER):
        chunk = rows[begin : begin + WEIGHED_TOGETHER]
        deltas = _deltas_of([row[0] for row in chunk], behind, policy.staleness_exponent)
        for offset, (pk, subject_key, _samples, _quality) in enumerate(chunk):
            members.append(Member(pk, subject_key, float(weights[begin + offset]), deltas[pk]))
        weighed = [Contribution(pk=member.contribution, weight=member.weight) for member in members[begin:]]
        Contribution.objects.bulk_update(weighed, ["weight"])
    return members


def set_digest(members: Sequence[Member], *, strategy: str, parameters: Mapping[str, Any], base: str) -> str:
    """sha256 over the ordered set: who, which delta files with which discount, what weight; strategy, parameters, base."""
    digest = hashlib.sha256()
    head = {"strategy": strategy, "parameters": dict(parameters), "base": base}
    digest.update(json.dumps(head, sort_keys=True).encode())
    for member in members:
        line = [str(member.subject_key), [[part.file.sha256, part.discount.hex()] for part in member.deltas], member.weight.hex()]
        digest.update(b"\n" + json.dumps(line).encode())
    return digest.hexdigest()


def fold_contributions(
    *,
    policy: RoundPolicy,
    base: LoadedVersion,
    members: Sequence[Member],
    progress: Progress,
    mechanism: PrivacyMechanism | None = None,
    masked_sums: SumSource | None = None,
) -> Aggregate:
    """Fold the deltas of ``members`` into one update; memory does not grow with their number.

    Args:
        mechanism: clips each delta and noises the sum; None for a round without differential privacy.
        masked_sums: sums whose summands the server never sees; None where every delta is read here.

    Raises:
        DamagedContribution: a delta file cannot be read any more; nothing was written.
    """
    strategy = strategies.get(policy.strategy)

    def told(done: int, total: int) -> None:
        progress(done, total, _("aggregating"))

    if isinstance(strategy, strategies.CoordinateStrategy):
        if mechanism is not None or masked_sums is not None:
            raise StrategyError(f"strategy {strategy.info.name} cannot be combined with privacy", code="not_private")
        return folding.combine_members(
            members, strategy=strategy, spec=base.spec, parameters=policy.strategy_parameters, progress=told
        )
    fold = folding.fold_members(
        members,
        strategy=strategies.get_fold(policy.strategy),
        spec=base.spec,
        parameters=policy.strategy_parameters,
        mechanism=mechanism,
        progress=told,
    )
    if masked_sums is not None:
        fold.add_sums(masked_sums)
    return fold.finish()


def aggregate_of(round_: AggregationRound) -> RoundAttempt:
    """The attempt whose file the round goes on with.

    Raises:
        RoundConflict: none has a file.
    """
    attempt = round_.attempts.exclude(aggregate_path="").order_by("-n").first()
    if attempt is None:
        raise RoundConflict(_("Round %d has no aggregate.") % round_.sequence)
    return attempt


def _deltas_of(
    contributions: Sequence[UUID], behind: Mapping[UUID, int], exponent: float
) -> dict[UUID, tuple[DiscountedDelta, ...]]:
    """Each contribution's delta files in the order of training."""
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
        discount = cohort.staleness_discount(behind[version], exponent)
        found[contribution].append(DiscountedDelta(DeltaFile(path, sha256), discount))
    return {contribution: tuple(deltas) for contribution, deltas in found.items()}


def _measure(round_: AggregationRound, policy: RoundPolicy, base: LoadedVersion, progress: Progress) -> None:
    if not strategies.get(policy.strategy).info.uses_quality:
        return
    behind = lineage_of(round_.base_version)

    reader = DeltaReader(base.spec)

    def context_of(block: list[Contribution]) -> IntakeContext:
        return intake.intake_context(round_, policy, reader, behind, block)

    measure_quality(round_, base=base, context_of=context_of, progress=progress)


def _begin_attempt(round_: AggregationRound, policy: RoundPolicy, members: Sequence[Member]) -> RoundAttempt:
    """The attempt's row, before anything is folded: where a private round will be charged."""
    parameters = {**policy.strategy_parameters, "server_learning_rate": policy.server_learning_rate}
    digest = set_digest(members, strategy=policy.strategy, parameters=parameters, base=round_.base_version.version)
    with transaction.atomic():
        _check_owner(round_)
        last = round_.attempts.aggregate(last=Max("n"))["last"] or 0
        return RoundAttempt.objects.create(
            round=round_,
            n=last + 1,
            set_digest=digest,
            contributions=len(members),
            weight_total=sum(member.weight for member in members),
        )


def _write(
    round_: AggregationRound, attempt: RoundAttempt, base: LoadedVersion, policy: RoundPolicy, result: Aggregate
) -> store.StoredFile | None:
    """The attempt's file; None where the store holds another one of this name, from before the database was restored."""
    metadata = {"round": round_.sequence, "set_digest": attempt.set_digest, "strategy": policy.strategy, "base": base.version}
    try:
        return store.write_aggregate(
            round_sequence=round_.sequence, attempt=attempt.n, spec=base.spec, aggregate=result.vector, metadata=metadata
        )
    except StoreError as error:
        if error.code != "already_exists":
            raise
        return None


def _complete(round_: AggregationRound, attempt: RoundAttempt, stored: store.StoredFile, result: Aggregate) -> RoundAttempt:
    with transaction.atomic():
        changed = RoundAttempt.objects.filter(pk=attempt.pk, aggregate_path="").update(
            aggregate_path=stored.path,
            aggregate_sha256=stored.sha256,
            aggregate_norm=global_norm(result.vector),
            updated_at=timezone.now(),
        )
        if changed != 1:
            raise RoundConflict(_("Attempt %d has an aggregate already.") % attempt.n)
        lifecycle.advance(round_, to=RoundState.EVALUATING, candidate_version=reserve_candidate(round_))
    attempt.refresh_from_db()
    return attempt


def _check_owner(round_: AggregationRound) -> None:
    rows = AggregationRound.objects.filter(lifecycle.owner_is(round_), pk=round_.pk, state=RoundState.AGGREGATING)
    if rows.update(updated_at=timezone.now()) != 1:
        raise RoundConflict(_("Round %d was changed by another run or an operator.") % round_.sequence)
