"""An aggregation shared by workers: each folds a run of whole blocks into a file of partial sums, and the round's own run
adds the files in block order. The same bytes come out as when one process folds all (``federation.strategies.blocks``)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from django.utils.translation import gettext as _

from aivo_site.jobs import shard_helpers, shards
from aivo_site.jobs.models import Job, JobShard, ShardState
from aivo_site.jobs.shard_context import ShardContext, ShardPlan
from federation import strategies
from federation.models import AggregationRound, RoundAttempt, RoundState
from federation.policies import RoundPolicy
from federation.rounds import cohort, folding, private, sharing
from federation.rounds.cohort import BLOCK, DamagedContribution
from federation.rounds.folding import Member
from federation.rounds.lineage import lineage_of
from federation.rounds.sharing import AGGREGATE, AGGREGATION_KIND, RoundShard, Sharing, damage, phase
from federation.strategies.base import Aggregate, PrivacyMechanism
from models_store.partial_sums import delete_partial_sums, read_partial_sums, write_partial_sums
from models_store.store import LoadedVersion

CHANGED = "changed"
"""In a shard's result: its learners are not those of the attempt any more."""


def worth_sharing(how: Sharing, *, policy: RoundPolicy, members: int) -> bool:
    """Whether partial sums make the aggregation faster: there are several shards, and others to do them.

    A rule on coordinates needs all deltas in one place.
    """
    foldable = isinstance(strategies.get(policy.strategy), strategies.FoldStrategy)
    return foldable and members > sharing.READ_TOGETHER and how.job is not None and shard_helpers.other_workers(how.job) > 0


def fold_shared(
    how: Sharing, *, round_: AggregationRound, attempt: RoundAttempt, members: Sequence[Member]
) -> list[dict[str, Any]] | None:
    """Fold the attempt's members in shards; None where it was asked to stop.

    Returns:
        in block order ``{"path", "sha256"}`` of a file, ``{"damaged"}`` or ``{"changed"}``.
    """

    def plan_from(begin: int) -> ShardPlan:
        part = members[begin : begin + sharing.READ_TOGETHER]
        params = {
            "round": round_.pk,
            "first": part[0].subject_key,
            "last": part[-1].subject_key,
            "attempt": attempt.n,
            "first_block": begin // BLOCK,
            "digest": members_digest(part),
        }
        return ShardPlan(params, size=len(part))

    return how.do(
        phase_of(attempt),
        make=lambda: [plan_from(begin) for begin in range(0, len(members), sharing.READ_TOGETHER)],
        handler=aggregate_shard,
        message=_("aggregating"),
    )


def aggregate_shard(context: ShardContext) -> dict[str, Any]:
    """Fold the shard's blocks and write their sums."""
    shard = RoundShard.of(context, RoundState.AGGREGATING)
    params = context.params
    members = accepted_members(shard)
    if members_digest(members) != params["digest"]:
        return {CHANGED: True}
    strategy = strategies.get_fold(shard.policy.strategy)
    privacy = private.privacy_of(shard.policy)
    mechanism = None if privacy is None else privacy.mechanism()

    def told(done: int, _total: int) -> None:
        shard.step(done)

    try:
        fold = folding.fold_members(
            members,
            strategy=strategy,
            spec=shard.base.spec,
            parameters=shard.policy.strategy_parameters,
            first_block=params["first_block"],
            mechanism=mechanism,  # it clips; the noise is drawn once, by who adds the files
            progress=told,
        )
    except DamagedContribution as damaged:
        return {"damaged": damage(damaged)}
    stored = write_partial_sums(
        round_sequence=shard.round.sequence,
        attempt=params["attempt"],
        first_block=params["first_block"],
        tensors=strategies.blocks_to_tensors(fold.parts()),
    )
    return {"path": stored.path, "sha256": stored.sha256}


def merge(
    results: Sequence[Mapping[str, Any]], *, policy: RoundPolicy, base: LoadedVersion, mechanism: PrivacyMechanism | None = None
) -> Aggregate:
    """The update, from the files of all shards in block order; one file is held at a time.

    Args:
        mechanism: draws the noise; the shards have clipped with one of the same identity.

    Raises:
        StoreError: a file cannot be read. StrategyError: as the fold's ``finish``.
    """
    strategy = strategies.get_fold(policy.strategy)
    fold = strategy.start(base.spec.tail_size, mechanism=mechanism, parameters=policy.strategy_parameters)
    for result in results:
        tensors = read_partial_sums(path=result["path"], sha256=result["sha256"])
        fold.add_blocks(strategies.blocks_from_tensors(tensors))
    return fold.finish()


def discard(job: Job, round_: AggregationRound) -> None:
    """Remove the files of all attempts, once an aggregate is written or an attempt is given up; the rows forget them first."""
    for attempt in round_.attempts.all():
        paths = [result["path"] for result in shards.results(parent=job, phase=phase_of(attempt)) if "path" in result]
        shards.clear_results(parent=job, phase=phase_of(attempt))
        for path in paths:
            delete_partial_sums(path)


def files_in_use() -> list[tuple[str, str]]:
    """Path and sum of every file that a running aggregation still needs."""
    rows = JobShard.objects.filter(
        parent__kind=AGGREGATION_KIND,
        phase__startswith=f"{AGGREGATE}:",
        state=ShardState.DONE,
        parent__finished_at__isnull=True,
    ).values_list("result", flat=True)
    return [(result["path"], result["sha256"]) for result in rows if result and "path" in result]


def phase_of(attempt: RoundAttempt) -> str:
    return phase(AGGREGATE, attempt.round, attempt.n)


def accepted_members(shard: RoundShard) -> list[Member]:
    """The shard's accepted contributions with the weights that their rows keep."""
    rows = shard.within(cohort.accepted_rows(shard.round)).values_list("pk", "subject_key", "weight")
    return members_of(list(rows), round_=shard.round, policy=shard.policy)


def members_of(rows: Sequence[tuple[UUID, UUID, float]], *, round_: AggregationRound, policy: RoundPolicy) -> list[Member]:
    """Members from (contribution, subject key, weight), in their order, with the delta files of their sessions."""
    deltas = cohort.delta_files(
        [row[0] for row in rows], behind=lineage_of(round_.base_version), exponent=policy.staleness_exponent
    )
    return [Member(pk, subject_key, weight, deltas[pk]) for pk, subject_key, weight in rows]


def members_digest(members: Sequence[Member]) -> str:
    """sha256 over all that the sum of ``members`` depends on."""
    digest = hashlib.sha256()
    for member in members:
        digest.update(b"\n" + member.line().encode())
    return digest.hexdigest()
