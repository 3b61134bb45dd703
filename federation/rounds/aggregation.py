"""Aggregation: the accepted contributions folded into one update, once per attempt, as one atomic file.

The deltas are read by ``folding``, one at a time or some coordinates at a time. An attempt is one set (its digest), one charge
where the policy is private, one file; every later state of the round only reads that file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from django.db import transaction
from django.db.models import Max
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_core.privacy import global_norm
from federation import strategies
from federation.models import AggregationRound, Contribution, RoundAttempt, RoundState, Verdict
from federation.policies import RoundPolicy
from federation.rounds import cohort, folding, intake, lifecycle, partial_sums, private
from federation.rounds.candidate import reserve_candidate
from federation.rounds.cohort import DamagedContribution
from federation.rounds.errors import RoundConflict, RoundSkipped
from federation.rounds.folding import Member
from federation.rounds.lineage import lineage_of
from federation.rounds.quality import NEUTRAL
from federation.rounds.sharing import QUALITY, Sharing, phase, plans_to_read, quality_shard, reject_damaged
from federation.strategies import StrategyError
from federation.strategies.base import Aggregate, PrivacyMechanism
from federation.strategies.blocks import SumSource
from models_store import store
from models_store.errors import StoreError
from models_store.store import LoadedVersion

Progress = Callable[[int, int, str], None]

WEIGHED_TOGETHER = 500
"""Contributions whose rows are read and written at a time."""


def aggregate_round(
    round_: AggregationRound, *, policy: RoundPolicy, base: LoadedVersion, sharing: Sharing
) -> RoundAttempt | None:
    """Fold the accepted contributions, write the file, reserve the candidate and move the round to EVALUATING.

    Consents are checked again right before. A contribution that is damaged by now is rejected, and a new attempt is begun over
    the set without it. Run again after a crash it begins a new attempt over what is accepted then; the same set gives the same
    bytes, whoever folded which part.

    Returns:
        None where it was asked to stop before the file was there.

    Raises:
        RoundSkipped: ``too_few_learners`` accepted, or ``zero_weight``.
        RoundConflict: the round was changed by another run.
        StrategyError: the strategy refuses.
    """
    while not sharing.should_stop():
        privacy = private.privacy_of(policy)
        intake.recheck_consent(round_)
        if privacy is None:
            require_enough(policy, cohort.accepted_rows(round_).count())
        if not _measured(round_, policy, sharing):
            continue
        members = weigh(round_, policy)
        attempt = _begin_attempt(round_, policy, members, privacy)
        stored = None
        mechanism = None if privacy is None else privacy.mechanism()
        with _folded(round_, attempt, policy=policy, base=base, members=members, sharing=sharing, mechanism=mechanism) as result:
            if result is not None:
                stored = _write(round_, attempt, base, policy, result)
            if stored is not None and result is not None:
                return _complete(round_, attempt, stored, result)
    return None


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
    rows = list(cohort.accepted_rows(round_).values_list("pk", "subject_key", "samples", "quality", "norm"))
    weights = _weights(policy, [row[2] for row in rows], [row[3] for row in rows])
    behind = lineage_of(round_.base_version)
    members: list[Member] = []
    for begin in range(0, len(rows), WEIGHED_TOGETHER):
        chunk = rows[begin : begin + WEIGHED_TOGETHER]
        deltas = cohort.delta_files([row[0] for row in chunk], behind=behind, exponent=policy.staleness_exponent)
        weighed = []
        for offset, (pk, subject_key, _samples, _quality, norm) in enumerate(chunk):
            members.append(Member(pk, subject_key, weights[begin + offset], deltas[pk]))
            weighed.append(Contribution(pk=pk, weight=weights[begin + offset], clipped_norm=_clipped(norm, policy)))
        Contribution.objects.bulk_update(weighed, ["weight", "clipped_norm"])
    return members


def _weights(policy: RoundPolicy, samples: Sequence[int], quality: Sequence[float | None]) -> Sequence[float]:
    """One weight per contribution; under differential privacy all are 1."""
    if policy.differential_privacy:
        return [1.0] * len(samples)
    strategy = strategies.get(policy.strategy)
    measured = [NEUTRAL if value is None else value for value in quality] if strategy.info.uses_quality else None
    try:
        weights = strategy.weigh(samples, quality=measured, parameters=policy.strategy_parameters)
    except strategies.StrategyError as error:
        if error.code == "zero_weight":
            raise RoundSkipped(str(error), code=error.code) from error
        raise
    return [float(weight) for weight in weights]


def _clipped(norm: float | None, policy: RoundPolicy) -> float | None:
    if not policy.differential_privacy or norm is None or policy.clip_norm is None:
        return None
    return min(norm, policy.clip_norm)


def set_digest(members: Sequence[Member], *, strategy: str, parameters: Mapping[str, Any], base: str) -> str:
    """sha256 over the ordered set: who, which delta files with which discount, what weight; strategy, parameters, base."""
    digest = hashlib.sha256()
    head = {"strategy": strategy, "parameters": dict(parameters), "base": base}
    digest.update(json.dumps(head, sort_keys=True).encode())
    for member in members:
        digest.update(b"\n" + member.line().encode())
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


def _measured(round_: AggregationRound, policy: RoundPolicy, sharing: Sharing) -> bool:
    """Measure quality where the strategy needs it; False where a contribution was rejected, or it was asked to stop."""
    if not strategies.get(policy.strategy).info.uses_quality:
        return True
    unmeasured = cohort.accepted_rows(round_).filter(quality=None)
    attempt = round_.attempts.aggregate(last=Max("n"))["last"] or 0
    rejected = round_.contributions.filter(verdict=Verdict.REJECTED).count()
    results = sharing.do(
        phase(QUALITY, round_, attempt, rejected),
        make=lambda: plans_to_read(round_, unmeasured),
        handler=quality_shard,
        message=_("measuring quality"),
    )
    return results is not None and not reject_damaged(results)


@contextmanager
def _folded(
    round_: AggregationRound,
    attempt: RoundAttempt,
    *,
    policy: RoundPolicy,
    base: LoadedVersion,
    members: Sequence[Member],
    sharing: Sharing,
    mechanism: PrivacyMechanism | None,
) -> Iterator[Aggregate | None]:
    """The attempt's update; None where a contribution was rejected or it was asked to stop: the attempt stays without a file.

    Partial sums are removed at the end, whatever became of them.
    """
    job = sharing.job
    if job is None or not partial_sums.worth_sharing(sharing, policy=policy, members=len(members)):
        try:
            result = fold_contributions(policy=policy, base=base, members=members, progress=sharing.progress, mechanism=mechanism)
        except DamagedContribution as damaged:
            intake.reject(damaged.contribution, damaged.code, str(damaged))
            yield None
        else:
            yield result
        return
    results = partial_sums.fold_shared(sharing, round_=round_, attempt=attempt, members=members)
    if results is None:
        yield None  # a later run of the job finds the files or leaves them to garbage collection
        return
    changed = reject_damaged(results) > 0 or any(partial_sums.CHANGED in entry for entry in results)
    try:
        yield None if changed else partial_sums.merge(results, policy=policy, base=base, mechanism=mechanism)
    finally:
        partial_sums.discard(job, round_)


def _begin_attempt(
    round_: AggregationRound, policy: RoundPolicy, members: Sequence[Member], privacy: private.RoundPrivacy | None
) -> RoundAttempt:
    """The attempt's row, and with it a private round's charge, committed before anything is folded."""
    parameters: dict[str, Any] = {**policy.strategy_parameters, "server_learning_rate": policy.server_learning_rate}
    if privacy is not None:
        parameters["mechanism"] = privacy.mechanism().identity
    digest = set_digest(members, strategy=policy.strategy, parameters=parameters, base=round_.base_version.version)
    with transaction.atomic():
        _check_owner(round_)
        last = round_.attempts.aggregate(last=Max("n"))["last"] or 0
        return RoundAttempt.objects.create(
            round=round_,
            n=last + 1,
            charge=None if privacy is None else privacy.charge(round_),
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
