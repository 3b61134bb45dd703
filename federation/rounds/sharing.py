"""A round's work on learners in shards, which workers share: training contributions, checking them, measuring quality.

A shard is a range of subject keys within one round. What is done for a learner does not depend on the others in the shard, and
doing it again changes nothing, so that the round's result does not depend on how it was cut or on who did what.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from django.db.models import QuerySet
from django.utils import timezone

from aivo_site.jobs.errors import ShardStopped
from aivo_site.jobs.models import Job
from aivo_site.jobs.shard_context import ShardContext, ShardHandler, ShardPlan
from aivo_site.jobs.shard_helpers import do_in_shards
from federation.models import AggregationRound, Contribution, RoundState
from federation.policies import RoundPolicy
from federation.rounds import cohort, intake
from federation.rounds.cohort import BLOCK, DamagedContribution
from federation.rounds.quality import measure_quality
from models_store import store
from models_store.store import LoadedVersion

AGGREGATION_KIND = "run_federated_aggregation"
"""The kind of the jobs that run rounds: whose shards these are."""

TRAIN, INTAKE, QUALITY, AGGREGATE = "train", "intake", "quality", "aggregate"
"""Names of the phases, as the job's kind has handlers for them."""

TRAINED_TOGETHER = BLOCK
"""Learners in a shard whose contributions are trained: small enough that workers end at about the same time."""

READ_TOGETHER = 8 * BLOCK
"""Learners in a shard whose deltas are only read."""

_LOOK_SECONDS = 1.0

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Sharing:
    """How one run of a round shares its work.

    Attributes:
        job: the job that runs the round, whose shards others may do; None: all is done in this process.
        should_stop: asked after each learner.
    """

    job: Job | None
    should_stop: Callable[[], bool]
    progress: Progress

    def do(
        self, phase: str, *, make: Callable[[], Sequence[ShardPlan]], handler: ShardHandler, message: str
    ) -> list[dict[str, Any]] | None:
        """Do a phase; see ``do_in_shards``. ``message``: the current step in words."""
        return do_in_shards(
            job=self.job,
            phase=phase,
            make=make,
            handler=handler,
            should_stop=self.should_stop,
            progress=lambda done, total: self.progress(done, total, message),
        )


def phase(name: str, round_: AggregationRound, *again: int) -> str:
    """The phase of one round; ``again``: what tells apart the times that it happens within the round."""
    return f"{name}:{'.'.join(map(str, (round_.sequence, *again)))}"


def plans_to_train(round_: AggregationRound, rows: QuerySet[Contribution]) -> list[ShardPlan]:
    """Shards of contributions, which come ordered by subject key, to be trained."""
    return _plans(round_, rows, TRAINED_TOGETHER)


def plans_to_read(round_: AggregationRound, rows: QuerySet[Contribution]) -> list[ShardPlan]:
    """Shards of contributions, which come ordered by subject key, whose deltas are read."""
    return _plans(round_, rows, READ_TOGETHER)


def _plans(round_: AggregationRound, rows: QuerySet[Contribution], together: int) -> list[ShardPlan]:
    keys = list(rows.values_list("subject_key", flat=True))
    parts = [keys[begin : begin + together] for begin in range(0, len(keys), together)]
    return [ShardPlan({"round": round_.pk, "first": part[0], "last": part[-1]}, size=len(part)) for part in parts]


@dataclass
class RoundShard:
    """One shard of a round, as its handler sees it.

    Attributes:
        state: that the round is in while the phase lasts; once it has moved on, the shard stops.
    """

    context: ShardContext
    round: AggregationRound
    state: RoundState
    policy: RoundPolicy
    _over: bool = field(default=False)
    _looked_at: float = field(default=0.0)

    @classmethod
    def of(cls, context: ShardContext, state: RoundState) -> RoundShard:
        """Raises ``ShardStopped`` where the round is not in ``state``."""
        round_ = AggregationRound.objects.select_related("base_version").filter(pk=context.params["round"], state=state).first()
        if round_ is None:
            raise ShardStopped
        return cls(context, round_, state, RoundPolicy.from_json(round_.policy))

    @property
    def base(self) -> LoadedVersion:
        return store.load_version(self.round.base_version)

    def within(self, rows: QuerySet[Contribution]) -> QuerySet[Contribution]:
        """Those of the round's contributions that belong to the shard."""
        return rows.filter(subject_key__gte=self.context.params["first"], subject_key__lte=self.context.params["last"])

    def should_stop(self) -> bool:
        """Asked to stop, past the deadline, or (looked up once a second) the round has moved on."""
        if time.monotonic() - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = time.monotonic()
            self._over = not AggregationRound.objects.filter(
                pk=self.round.pk, state=self.state, deadline__gt=timezone.now()
            ).exists()
        return self._over or self.context.should_stop()

    def step(self, done: int) -> None:
        """So many learners are done.

        Raises:
            ShardStopped
        """
        self.context.progress(done)
        if self.should_stop():
            raise ShardStopped


def train_shard(context: ShardContext) -> dict[str, Any]:
    """Train the contributions of the shard's learners who have none yet."""
    from federation.contributions import produce_contributions

    shard = RoundShard.of(context, RoundState.TRAINING)
    untrained = shard.within(cohort.untrained_rows(shard.round))
    rows = {row.subject_key: row for row in untrained}
    outcomes = produce_contributions(
        round=shard.round, base=shard.base, models=cohort.models_to_train(untrained), policy=shard.policy
    )
    trained = 0
    for done, outcome in enumerate(outcomes, start=1):
        row = rows[outcome.model.learner.subject_key]
        if outcome.session is not None:
            cohort.attach_session(row, outcome.session)
            trained += 1
        else:
            intake.reject_untrained(row, outcome.reason_code, outcome.reason)
        shard.step(done)
    return {"trained": trained}


def intake_shard(context: ShardContext) -> dict[str, Any]:
    """Give the shard's contributions their verdicts, as far as they need no cohort."""
    shard = RoundShard.of(context, RoundState.INTAKE)
    checked = 0
    for _contribution in intake.give_verdicts(
        shard.within(cohort.pending_rows(shard.round)), round_=shard.round, policy=shard.policy, base=shard.base
    ):
        checked += 1
        shard.step(checked)
    return {"checked": checked}


def quality_shard(context: ShardContext) -> dict[str, Any]:
    """Measure the quality of the shard's accepted contributions; a damaged one is named in the result."""
    shard = RoundShard.of(context, RoundState.AGGREGATING)
    measured = 0
    try:
        for _contribution in measure_quality(
            shard.within(cohort.accepted_rows(shard.round)), round_=shard.round, policy=shard.policy, base=shard.base
        ):
            measured += 1
            shard.step(measured)
    except DamagedContribution as damaged:
        return {"measured": measured, "damaged": damage(damaged)}
    return {"measured": measured}


def damage(damaged: DamagedContribution) -> dict[str, str]:
    """A damaged contribution in a shard's result."""
    return {"contribution": str(damaged.contribution), "code": damaged.code, "message": str(damaged)}


def reject_damaged(results: Sequence[Mapping[str, Any]]) -> int:
    """Reject the contributions that shards found damaged; returns how many."""
    found = [result["damaged"] for result in results if "damaged" in result]
    for entry in found:
        intake.reject(UUID(entry["contribution"]), entry["code"], entry["message"])
    return len(found)
