"""Aggregation: the accepted contributions folded into one update, once per attempt, as one atomic file.

The fold reads one delta at a time, ordered by subject key, in fixed blocks. An attempt is one set (its digest), one charge
where the policy is private, one file; every later state of the round only reads that file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from federation.rounds import cohort, intake, lifecycle
from federation.rounds.candidate import reserve_candidate
from federation.rounds.cohort import DamagedContribution
from federation.rounds.errors import RoundConflict, RoundSkipped
from federation.rounds.intake import IntakeContext
from federation.rounds.lineage import lineage_of
from federation.rounds.quality import NEUTRAL, measure_quality
from federation.strategies.base import Aggregate, PrivacyMechanism
from federation.strategies.blocks import SumSource
from models_store import store
from models_store.errors import StoreError
from models_store.store import LoadedVersion

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Weighted:
    """One contribution of the set with all that the result depends on.

    Attributes:
        deltas: checksum and staleness discount of each session's delta, in order.
    """

    pk: UUID
    subject_key: UUID
    weight: float
    deltas: tuple[tuple[str, float], ...]


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
            result = fold_contributions(round_, policy=policy, base=base, members=members, progress=progress)
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


def weigh(round_: AggregationRound, policy: RoundPolicy) -> list[Weighted]:
    """The accepted set in subject key order with its weights, which the contribution rows keep."""
    rows = list(cohort.accepted_rows(round_).prefetch_related("sessions"))
    strategy = strategies.get(policy.strategy)
    quality = [NEUTRAL if row.quality is None else row.quality for row in rows] if strategy.info.uses_quality else None
    try:
        weights = strategy.weigh([row.samples for row in rows], quality=quality, parameters=policy.strategy_parameters)
    except strategies.StrategyError as error:
        if error.code == "zero_weight":
            raise RoundSkipped(str(error), code=error.code) from error
        raise
    behind = lineage_of(round_.base_version)
    members = []
    for row, weight in zip(rows, weights, strict=True):
        row.weight = float(weight)
        deltas = tuple(
            (session.delta_sha256, cohort.staleness_discount(behind[session.base_version_id], policy.staleness_exponent))
            for session in cohort.sessions_of(row)
        )
        members.append(Weighted(row.pk, row.subject_key, row.weight, deltas))
    Contribution.objects.bulk_update(rows, ["weight"], batch_size=500)
    return members


def set_digest(members: Sequence[Weighted], *, strategy: str, parameters: Mapping[str, Any], base: str) -> str:
    """sha256 over the ordered set: who, which delta files with which discount, what weight; strategy, parameters, base."""
    digest = hashlib.sha256()
    head = {"strategy": strategy, "parameters": dict(parameters), "base": base}
    digest.update(json.dumps(head, sort_keys=True).encode())
    for member in members:
        line = [str(member.subject_key), [[sha, discount.hex()] for sha, discount in member.deltas], member.weight.hex()]
        digest.update(b"\n" + json.dumps(line).encode())
    return digest.hexdigest()


def fold_contributions(
    round_: AggregationRound,
    *,
    policy: RoundPolicy,
    base: LoadedVersion,
    members: Sequence[Weighted],
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
    fold = strategies.get(policy.strategy).start(base.spec.tail_size, mechanism=mechanism, parameters=policy.strategy_parameters)
    by_pk = {member.pk: member for member in members}
    done = 0
    for block in cohort.blocks(Contribution.objects.filter(pk__in=by_pk, round=round_).order_by("subject_key")):
        for contribution in block:
            member = by_pk[contribution.pk]
            discounts = [discount for _sha, discount in member.deltas]
            fold.add(cohort.read_accepted(contribution, spec=base.spec, discounts=discounts), member.weight)
        done += len(block)
        progress(done, len(members), _("aggregating"))
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


def _measure(round_: AggregationRound, policy: RoundPolicy, base: LoadedVersion, progress: Progress) -> None:
    if not strategies.get(policy.strategy).info.uses_quality:
        return
    behind = lineage_of(round_.base_version)

    def context_of(block: list[Contribution]) -> IntakeContext:
        return intake.intake_context(round_, policy, base.spec, behind, block)

    measure_quality(round_, base=base, context_of=context_of, progress=progress)


def _begin_attempt(round_: AggregationRound, policy: RoundPolicy, members: Sequence[Weighted]) -> RoundAttempt:
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
