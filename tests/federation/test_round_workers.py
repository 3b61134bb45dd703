"""Rounds that real workers share, and that some of them do not survive: one version, the bytes of an undisturbed round."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from django.conf import Settings
from django.core.files.storage import storages
from django.db import transaction
from django_q.models import OrmQ

from aivo_site.environment import BASE_DIR
from aivo_site.jobs import janitor, services
from aivo_site.jobs.models import Job, JobState, ShardState, WorkerHeartbeat
from aivo_site.jobs.shard_helpers import HELPER_KIND
from federation.models import AggregationRound, Contribution, ModelTrainingSession, RoundAttempt, RoundState, Verdict
from federation.rounds import service
from models_store.models import MainModelVersion
from models_store.verification import verify_store
from tests.federation.rounds_world import ShrinkingEngine, make_world
from tests.site.worker_processes import ended, environment, kill_all, living_workers, until, workers_of

pytestmark = [pytest.mark.worker, pytest.mark.slow]

KIND = "run_federated_aggregation"
LEARNERS = 137
"""Two full blocks of the sum and a short one; nine shards of training."""

Cluster = subprocess.Popen[bytes]


@pytest.fixture
def undisturbed(transactional_db: None, settings: Settings, engine: ShrinkingEngine) -> Iterator[bytes]:
    """The aggregate of a round over a world that other processes see too; that round is undone."""
    settings.JOB_LEASE_SECONDS = 3
    make_world(learners=LEARNERS, events=16, policy={"min_samples": 3})
    with transaction.atomic():
        service.aggregate(with_rebase=False)
        expected = aggregate_file()
        transaction.set_rollback(True)
    yield expected
    OrmQ.objects.all().delete()


@pytest.fixture
def two(undisturbed: bytes, tmp_path: Path) -> Iterator[list[Cluster]]:
    """Two workers of the long jobs' queue."""
    with ExitStack() as stack:
        running = [stack.enter_context(worker(tmp_path)) for _ in range(2)]
        until(lambda: len(living_workers("training")) == 2, seconds=40, what=f"two workers are up, see {tmp_path / 'log'}")
        yield running


@contextmanager
def worker(folder: Path) -> Iterator[Cluster]:
    """A worker in a session of its own on this test's database and stores; afterwards nothing of it is left."""
    with (folder / "log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, str(BASE_DIR / "manage.py"), "worker", "--queue", "training"],
            env={
                **environment(),
                "DJANGO_SETTINGS_MODULE": "tests.federation.slow_settings",
                "AIVO_MAIN_MODEL_PATH": str(folder / "main_models"),
                "AIVO_LEARNER_MODELS_PATH": str(folder / "learner_models"),
                "TEST_ENGINE_DELAY": "0.05",
                "TEST_TRAINING_TIMEOUT": "30",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill_all(process)


def aggregate_file() -> bytes:
    attempt = RoundAttempt.objects.exclude(aggregate_path="").get()
    with storages["main_models"].open(attempt.aggregate_path) as file:
        return bytes(file.read())


def started_round() -> Job:
    return services.enqueue(kind=KIND, params={"rebase": False})


def helper_in(job: Job, phase: str) -> Job:
    """The helper, once it has begun a shard of the phase."""
    shard = until(
        lambda: job.shards.filter(worker_job__kind=HELPER_KIND, phase__startswith=phase).select_related("worker_job").first(),
        seconds=40,
        what=f"a helper in {phase}",
        pause=0.01,
    )
    helper: Job = shard.worker_job
    return helper


def kill_worker_of(job: Job, clusters: list[Cluster]) -> None:
    def find() -> Cluster | None:
        pid = WorkerHeartbeat.objects.filter(current_job=job).values_list("pid", flat=True).first()
        return next((cluster for cluster in clusters if pid in workers_of(cluster)), None)

    kill_all(until(find, what=f"the worker with {job.kind}"))


def assert_one_round_with_the_bytes_of(expected: bytes, job: Job) -> None:
    assert job.state == JobState.SUCCEEDED, job.error_message
    assert AggregationRound.objects.get().state == RoundState.PROMOTED
    assert MainModelVersion.objects.count() == 2
    assert Contribution.objects.filter(verdict=Verdict.ACCEPTED).count() == LEARNERS
    contributed = ModelTrainingSession.objects.filter(purpose="CONTRIBUTION")
    assert contributed.count() == contributed.filter(contributed_to_federation=True).count() == LEARNERS
    assert aggregate_file() == expected
    report = verify_store()
    assert not report.missing and not report.corrupt
    assert not Job.objects.filter(kind=HELPER_KIND, state=JobState.FAILED).exists()


def test_two_workers_share_a_round(two: list[Cluster], undisturbed: bytes) -> None:
    job = ended(started_round(), seconds=60)
    assert_one_round_with_the_bytes_of(undisturbed, job)
    trained = job.shards.filter(phase__startswith="train")
    assert set(trained.values_list("worker_job__kind", flat=True)) == {KIND, HELPER_KIND} and trained.count() == 9
    assert set(job.shards.values_list("state", flat=True)) == {ShardState.DONE}


def test_after_kill_9_of_a_helper_the_other_worker_ends_the_round(two: list[Cluster], undisturbed: bytes) -> None:
    job = started_round()
    kill_worker_of(helper_in(job, "train"), two)
    assert AggregationRound.objects.get().state == RoundState.TRAINING
    assert_one_round_with_the_bytes_of(undisturbed, ended(job, seconds=60))
    assert job.starts == 1


def test_after_kill_9_of_the_rounds_own_worker_the_helper_trains_on_and_then_ends_the_round(
    two: list[Cluster], undisturbed: bytes
) -> None:
    job = started_round()
    helper_in(job, "train")
    kill_worker_of(job, two)
    assert AggregationRound.objects.get().state == RoundState.TRAINING
    until(lambda: janitor.sweep().requeued, seconds=20, what="the round waits for a worker")
    assert_one_round_with_the_bytes_of(undisturbed, ended(job, seconds=60))
    assert job.starts == 2 and job.result is not None and job.result["resumed"]
    assert job.shards.filter(phase__startswith="train", worker_job__kind=HELPER_KIND).count() >= 2


def test_cancelling_a_round_stops_its_helper(two: list[Cluster], undisturbed: bytes, tmp_path: Path) -> None:
    job = started_round()
    helper = helper_in(job, "train")
    services.request_cancel(job=job, actor="steward")
    assert ended(job, seconds=30).state == JobState.CANCELLED
    assert ended(helper, seconds=30).state in (JobState.SUCCEEDED, JobState.SKIPPED)
    round_ = AggregationRound.objects.get()
    assert (round_.state, round_.reason_code) == (RoundState.CANCELLED, "cancelled")
    assert not RoundAttempt.objects.exists() and MainModelVersion.objects.count() == 1
