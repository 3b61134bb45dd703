"""Rounds done in shards, in one process: the same bytes however they are cut, damage, withdrawal, cancelling, leftovers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
from django.core.files.storage import storages
from django.db import transaction
from django.utils import timezone

from aivo_site.jobs import lease, services, shard_helpers, shards
from aivo_site.jobs.models import Job, JobShard, JobState, ShardState, WorkerHeartbeat
from aivo_site.jobs.shard_context import ShardContext
from federation import strategies
from federation.models import AggregationRound, Contribution, ModelTrainingSession, RoundAttempt, RoundState, Verdict
from federation.rounds import intake, lifecycle, partial_sums, running, service, sharing
from federation.strategies import FedAvg
from federation.strategies.base import Aggregate
from learners.models import Learner
from models_store.garbage import collect_garbage
from models_store.verification import verify_store
from tests.federation.rounds_world import ShrinkingEngine, World, make_world

pytestmark = pytest.mark.django_db

KIND = "run_federated_aggregation"
BLOCK = strategies.BLOCK_SIZE
LEARNERS = 2 * BLOCK + 9
"""Two full blocks and a short one."""


@pytest.fixture
def world(engine: ShrinkingEngine) -> World:
    return make_world(learners=LEARNERS, events=16, policy={"min_samples": 3})


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Cut every phase into so many shards, and let there be other workers, so that the aggregation is shared."""

    def into(count: int) -> None:
        size = BLOCK * -(-ModelTrainingSession.objects.count() // (BLOCK * count))
        monkeypatch.setattr(sharing, "TRAINED_TOGETHER", size)
        monkeypatch.setattr(sharing, "READ_TOGETHER", size)
        seen = {"version": "1", "last_seen_at": timezone.now()}
        for pid in (1, 2):
            WorkerHeartbeat.objects.get_or_create(host="here", pid=pid, queue="training", defaults=seen)

    return into


def aggregate_file() -> bytes:
    attempt = RoundAttempt.objects.exclude(aggregate_path="").get()
    with storages["main_models"].open(attempt.aggregate_path) as file:
        return bytes(file.read())


@pytest.mark.parametrize(("strategy", "learners"), [("fedprox", 4 * BLOCK + 9), ("weighted", LEARNERS), ("median", LEARNERS)])
def test_a_round_gives_the_same_bytes_however_it_is_cut(
    strategy: str, learners: int, engine: ShrinkingEngine, cut: Callable[[int], None]
) -> None:
    make_world(learners=learners, events=16, policy={"min_samples": 3})
    most = -(-learners // BLOCK)
    found: dict[str, tuple[bytes, list[Any]]] = {}
    for name, count in (("without a job", 1), ("one shard", 1), ("two shards", 2), ("a shard for each block", most)):
        with transaction.atomic():
            cut(count)
            if name == "without a job":
                result = service.aggregate(overrides={"strategy": strategy}, with_rebase=False)
            else:
                job = services.run_inline(kind=KIND, params={"overrides": {"strategy": strategy}, "rebase": False})
                result = job.result or {}
                phases = 3 if strategy == "fedprox" else 4 if strategy == "weighted" else 2
                assert job.shards.count() == (0 if count == 1 else phases * count)
                assert set(job.shards.values_list("state", flat=True)) <= {ShardState.DONE}
            assert result["state"] == RoundState.PROMOTED and result["accepted"] == learners
            verdicts = Contribution.objects.order_by("subject_key").values_list("subject_key", "weight", "norm", "quality")
            found[name] = (aggregate_file(), list(verdicts))
            assert ModelTrainingSession.objects.filter(contributed_to_federation=True).count() == learners
            transaction.set_rollback(True)
    first, *others = found.values()
    assert all(other == first for other in others)


def test_partial_sums_are_gone_when_the_aggregate_is_there(world: World, cut: Callable[[int], None]) -> None:
    cut(3)
    job = services.run_inline(kind=KIND, params={})
    assert [shard.result for shard in job.shards.filter(phase__startswith="aggregate")] == [{}] * 3
    report = verify_store()
    assert (report.missing, report.corrupt) == ([], [])
    assert storages["main_models"].listdir("rounds/1") == ([], ["attempt-1.safetensors"])


def test_partial_sums_are_kept_while_their_job_runs_and_garbage_afterwards(
    world: World, cut: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(3)
    looked: list[list[str]] = []

    def merge(results: list[dict[str, Any]], **_options: Any) -> Aggregate:
        removed = collect_garbage(older_than=timedelta(0)).removed
        looked.append([path for path in removed if "blocks-" in path])
        assert not verify_store().corrupt
        raise MemoryError

    monkeypatch.setattr(partial_sums, "merge", merge)
    monkeypatch.setattr(partial_sums, "discard", lambda *_anything: None)
    with pytest.raises(MemoryError):
        services.run_inline(kind=KIND, params={})
    assert looked == [[]]
    removed = collect_garbage(older_than=timedelta(seconds=-0.0)).removed
    assert len([path for path in removed if "blocks-" in path]) == 3


def damage(contribution: Contribution) -> None:
    path = contribution.sessions.get().delta_path
    file = storages["learner_models"].path(path)
    with open(file, "r+b") as opened:  # noqa: PTH123
        opened.seek(-4, 2)
        opened.write(b"\0\0\0\1")


@pytest.mark.parametrize("strategy", ["fedprox", "weighted"])
def test_a_contribution_that_is_damaged_by_then_is_rejected_and_the_rest_aggregated(
    strategy: str, world: World, cut: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(3)
    real, broken = intake.recheck_consent, []

    def recheck(round_: AggregationRound) -> int:
        if not broken:
            rows = list(Contribution.objects.order_by("subject_key"))
            broken.extend([rows[3], rows[130]])
            for row in broken:
                damage(row)
        return real(round_)

    monkeypatch.setattr(intake, "recheck_consent", recheck)
    job = services.run_inline(kind=KIND, params={"overrides": {"strategy": strategy}})
    assert job.result is not None and job.result["state"] == RoundState.PROMOTED
    assert job.result["rejected"] == {"checksum_mismatch": 2} and job.result["accepted"] == LEARNERS - 2
    refused = Contribution.objects.filter(verdict=Verdict.REJECTED).order_by("subject_key")
    assert [row.pk for row in refused] == [row.pk for row in broken] and all("sha256" in row.reason for row in refused)
    attempts = RoundAttempt.objects.order_by("n").values_list("contributions", flat=True)
    assert list(attempts) == [*([LEARNERS] if strategy == "fedprox" else []), LEARNERS - 2]


def test_a_set_that_changed_since_the_attempt_began_is_not_summed(
    world: World, cut: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An erasure removes the row of a contribution while workers already fold."""
    cut(3)
    real, erased = partial_sums.fold_shared, []

    def fold_shared(*args: Any, **options: Any) -> Any:
        if not erased:
            erased.append(Contribution.objects.order_by("subject_key")[100])
            erased[0].delete()
        return real(*args, **options)

    monkeypatch.setattr(partial_sums, "fold_shared", fold_shared)
    job = services.run_inline(kind=KIND, params={})
    assert job.result is not None and (job.result["state"], job.result["accepted"]) == (RoundState.PROMOTED, LEARNERS - 1)
    assert [attempt.contributions for attempt in RoundAttempt.objects.order_by("n")] == [LEARNERS, LEARNERS - 1]


def test_a_learner_who_withdraws_while_contributions_are_trained_is_left_out(
    world: World, cut: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(3)
    last = max(world.learners, key=lambda learner: str(learner.subject_key))
    real = sharing.train_shard

    def train(context: ShardContext) -> dict[str, Any]:
        Learner.objects.filter(pk=last.pk).update(withdrawn_at=timezone.now())
        return real(context)

    monkeypatch.setattr(sharing, "train_shard", train)
    job = services.run_inline(kind=KIND, params={})
    assert job.result is not None and job.result["rejected"] == {"withdrawn": 1}
    assert job.result["accepted"] == LEARNERS - 1


@pytest.mark.parametrize("phase", ["train_shard", "intake_shard"])
def test_shards_of_a_round_that_was_cancelled_stop_and_nothing_is_made_of_them(
    phase: str, world: World, cut: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(3)
    monkeypatch.setattr(sharing, "_LOOK_SECONDS", 0.0)
    real, begun = getattr(sharing, phase), []

    def cancelled_meanwhile(context: ShardContext) -> Mapping[str, Any]:
        begun.append(context)
        if len(begun) == 2:
            lifecycle.cancel_round(round_=AggregationRound.objects.get(), actor="steward", reason="not tonight")
        result: Mapping[str, Any] = real(context)
        return result

    monkeypatch.setattr(sharing, phase, cancelled_meanwhile)
    with pytest.raises(running.RoundStopped, match="not tonight"):
        services.run_inline(kind=KIND, params={})
    assert len(begun) == 2
    assert AggregationRound.objects.get().state == RoundState.CANCELLED
    assert not RoundAttempt.objects.exists()


def test_a_round_past_its_deadline_stops_within_a_shard(
    world: World, cut: Callable[[int], None], engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(2)
    monkeypatch.setattr(sharing, "_LOOK_SECONDS", 0.0)
    real = sharing.cohort.attach_session

    def late(contribution: Contribution, session: ModelTrainingSession) -> None:
        real(contribution, session)
        AggregationRound.objects.update(deadline=timezone.now())
        claims[0].deadline = timezone.now()

    claims: list[AggregationRound] = []
    claim = lifecycle.claim_round

    def claim_round(**options: Any) -> lifecycle.Claim:
        found = claim(**options)
        claims.append(found.round)
        return found

    monkeypatch.setattr(lifecycle, "claim_round", claim_round)
    monkeypatch.setattr(sharing.cohort, "attach_session", late)
    with pytest.raises(running.RoundFailed) as failed:
        services.run_inline(kind=KIND, params={})
    assert failed.value.code == "deadline_passed"
    assert ModelTrainingSession.objects.filter(purpose="CONTRIBUTION").count() == 1


# --- Runs that die ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Passes through every handler, as a kill would."""


@pytest.fixture
def queued() -> Job:
    return services.enqueue(kind=KIND, params={"rebase": False})


def run_once(job: Job) -> dict[str, Any]:
    """One run of the job, as a worker that dies within it leaves it: the lease runs out, and the job waits again."""
    claimed = lease.claim(job.pk, token=uuid4())
    assert claimed is not None
    try:
        return service.aggregate(with_rebase=False, job=claimed)
    except Killed:
        Job.objects.filter(pk=job.pk).update(lease_expires_at=timezone.now() - timedelta(seconds=1), state=JobState.QUEUED)
        raise


@pytest.mark.parametrize("phase", ["train", "intake", "aggregate"])
def test_a_run_that_died_between_shards_is_gone_on_with(
    phase: str, world: World, queued: Job, cut: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(3)
    with transaction.atomic():
        service.aggregate(with_rebase=False)
        expected = aggregate_file()
        transaction.set_rollback(True)

    real, finished = shards.finish, []

    def finish(shard: JobShard, result: Mapping[str, Any]) -> bool:
        kept = real(shard, result)
        if shard.phase.startswith(phase):
            finished.append(shard.index)
            if len(finished) == 2:
                raise Killed
        return kept

    with monkeypatch.context() as patched:
        patched.setattr(shards, "finish", finish)
        with pytest.raises(Killed):
            run_once(queued)
    trained = ModelTrainingSession.objects.filter(purpose="CONTRIBUTION").count()
    result = run_once(queued)
    assert result["state"] == RoundState.PROMOTED and result["resumed"]
    assert finished == [0, 1] and trained == (2 * BLOCK if phase == "train" else LEARNERS)
    assert ModelTrainingSession.objects.filter(contributed_to_federation=True).count() == LEARNERS
    assert aggregate_file() == expected, "neither the attempt's number nor its time is in it"
    assert set(queued.shards.values_list("starts", flat=True)) <= {0, 1}, "no shard was done twice"
    assert storages["main_models"].listdir("rounds/1")[0] == [], "of the first attempt no partial sums are left either"


def test_a_helper_trains_checks_and_folds_what_the_parent_would(
    world: World, queued: Job, cut: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent only waits: every shard is done by another job."""
    cut(3)
    with transaction.atomic():
        service.aggregate(with_rebase=False)
        expected = aggregate_file()
        transaction.set_rollback(True)
    real = shards.work

    def work(*, parent: Job, phase: str, worker: Job, **options: Any) -> shards.Worked:
        if worker.pk == parent.pk:
            services.run_inline(kind=shard_helpers.HELPER_KIND, params={"parent": parent.pk, "phase": phase})
        return real(parent=parent, phase=phase, worker=worker, **options)

    monkeypatch.setattr(shards, "work", work)
    result = run_once(queued)
    assert result["state"] == RoundState.PROMOTED
    assert set(queued.shards.values_list("worker_job__kind", flat=True)) == {shard_helpers.HELPER_KIND}
    assert aggregate_file() == expected


# --- A privacy mechanism ------------------------------------------------------------------------------------------------------


class CountingMechanism:
    """Clips to norm 1 and adds a constant where noise would be, counting how often."""

    name = "test"
    denominator = 100.0
    identity = (name, 1.0, denominator)

    def __init__(self) -> None:
        self.noised = 0

    def clip(self, delta: Any) -> Any:
        return delta / max(1.0, float(np.linalg.norm(delta)))

    def add_noise(self, total: Any) -> Any:
        self.noised += 1
        return total + 1.0


def test_partial_sums_are_clipped_and_carry_no_noise_which_is_drawn_once() -> None:
    deltas = np.random.default_rng(7).normal(size=(3 * BLOCK, 40)).astype(np.float32)
    mechanism = CountingMechanism()

    def fold(first_block: int, rows: Iterator[Any]) -> strategies.Fold:
        started = FedAvg().start(40, mechanism=mechanism, first_block=first_block)
        for row in rows:
            started.add(row, 1.0)
        return started

    whole = fold(0, iter(deltas)).finish()
    assert mechanism.noised == 1
    merging = FedAvg().start(40, mechanism=mechanism)
    for number in (2, 0, 1):
        tensors = strategies.blocks_to_tensors(fold(number, iter(deltas[number * BLOCK : (number + 1) * BLOCK])).parts())
        merging.add_blocks(strategies.blocks_from_tensors(tensors))
    assert mechanism.noised == 1
    shared = merging.finish()
    assert mechanism.noised == 2
    assert shared.vector.tobytes() == whole.vector.tobytes() and shared.denominator == 100.0


def test_a_range_of_keys_holds_the_learners_between_whoever_is_erased(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are ranges of subject keys: a learner who goes does not move the others into another shard."""
    version = world.version
    round_ = lifecycle.claim_round(policy=service.policy_with({}), base=version, job=None, actor="test").round
    rows = [Contribution(round=round_, subject_key=UUID(int=n << 64)) for n in range(1, 200)]
    Contribution.objects.bulk_create(rows)
    monkeypatch.setattr(sharing, "TRAINED_TOGETHER", 64)
    everyone = Contribution.objects.filter(round=round_).order_by("subject_key")
    plans = sharing.plans_to_train(round_, everyone)
    Contribution.objects.filter(subject_key__in=[UUID(int=n << 64) for n in (1, 64, 65, 199)]).delete()
    AggregationRound.objects.update(state=RoundState.INTAKE)
    found = []
    for entry in plans:
        context = ShardContext(shards.plain_object(entry.params), lambda: False, lambda _done: None)
        found.append(sharing.RoundShard.of(context, RoundState.INTAKE).within(everyone).count())
    assert [entry.size for entry in plans] == [64, 64, 64, 7] and found == [62, 63, 64, 6]
