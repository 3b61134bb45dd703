"""Personal training in shards: the report of one process, to the last bit; and the job that trains one learner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

import pytest
from django.db import transaction

from aivo_site.audit.models import AuditEvent
from aivo_site.errors import Skipped, UsageError
from aivo_site.jobs import lease, registry, services, shard_helpers, shards
from aivo_site.jobs.models import Job, JobShard, JobState
from federation import local_training, report_parts, shared_training
from federation.errors import LocalTrainingError, NothingToTrain
from federation.local_training import learners_to_train
from federation.models import ModelTrainingSession
from federation.training_report import TrainingReport
from federation.training_run import BLOCK
from learners.models import Learner
from models_store.models import PersonalizedModel
from models_store.versions import active_version
from tests.federation.rounds_world import ShrinkingEngine, World, make_world, set_policy, with_model
from tests.models_store.factories import add_events, events_of, make_learner, make_version

pytestmark = pytest.mark.django_db

KIND = "train_learner_models"
LEARNERS = 2 * BLOCK + 20


@pytest.fixture
def world(engine: ShrinkingEngine) -> World:
    """Learners on two versions, one without consent and one with too little to train on."""
    made = make_world(learners=LEARNERS - 12, evaluators=0, events=16, sessions=False, policy={"min_samples": 4})
    other = make_version(seed=1, active=False)
    for number in range(11):
        with_model(make_learner(f"other-{number}"), other, seed=900 + number, events=16, session=False)
    with_model(make_learner("short"), made.version, seed=990, events=4, session=False)
    Learner.objects.filter(pk=made.learners[70].pk).update(consent_training=False)
    return made


def figures(report: TrainingReport) -> dict[str, Any]:
    """Everything but times."""
    return {
        **{name: value for name, value in report.to_json().items() if "second" not in name},
        "evaluations": report.evaluations,
        "controls": report.controls,
    }


def running(kind: str = KIND) -> Job:
    job = lease.claim(services.enqueue(kind=kind, params={}).id, token=uuid4())
    assert job is not None
    return job


def train(job: Job | None = None, **options: Any) -> TrainingReport:
    return local_training.train_learners(learners=learners_to_train(), actor="tester", job=job, **options)


def tails() -> dict[str, str]:
    return dict(PersonalizedModel.objects.values_list("learner__learner_id", "weights_sha256"))


@pytest.mark.parametrize("again", [False, True], ids=["first time", "nothing new"])
def test_the_report_is_the_same_however_the_learners_are_cut(again: bool, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    if again:
        train()
    found = []
    for size in (None, 3 * BLOCK, 2 * BLOCK, BLOCK):
        with transaction.atomic():
            if size is not None:
                monkeypatch.setattr(shared_training, "TRAINED_TOGETHER", size)
            report = train(None if size is None else running())
            assert JobShard.objects.count() == {None: 0, 3 * BLOCK: 0, 2 * BLOCK: 2, BLOCK: 3}[size]
            found.append((figures(report), tails()))
            transaction.set_rollback(True)
    first, *others = found
    assert first[0]["trained"] == (0 if again else LEARNERS - 2)
    assert first[0]["skipped"]["too_few_samples"] == 1 and first[0]["notes"]
    assert first[0]["evaluation"]["control"] is not None or again
    assert all(other == first for other in others)


def test_a_part_of_a_report_is_small_and_exact(world: World) -> None:
    report = train()
    part = shards.plain_object(report_parts.part_of(report))
    assert figures(report_parts.merged([part], engine="")) == figures(report)
    assert len(str(part)) < 450 * report.trained


def test_no_part_makes_an_empty_report() -> None:
    report = report_parts.merged([], engine="cohort")
    assert (report.engine, report.trained, report.to_json()["evaluation"]["learners"]) == ("cohort", 0, 0)


def test_a_job_that_runs_again_trains_what_it_had_chosen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a limit chooses depends on who was trained last: the first run's choice stands."""
    monkeypatch.setattr(shared_training, "TRAINED_TOGETHER", BLOCK)
    real, finished = shards.finish, []

    def finish(shard: JobShard, result: Mapping[str, Any]) -> bool:
        if finished:
            raise KeyboardInterrupt
        finished.append(shard.index)
        return real(shard, result)

    job = running()
    chosen = set(learners_to_train(limit=BLOCK + 5).values_list("learner_id", flat=True))
    with monkeypatch.context() as patched:
        patched.setattr(shards, "finish", finish)
        with pytest.raises(KeyboardInterrupt):
            local_training.train_learners(learners=learners_to_train(limit=BLOCK + 5), actor="tester", job=job)
    Job.objects.filter(pk=job.pk).update(owner=uuid4())
    job.refresh_from_db()
    report = local_training.train_learners(learners=learners_to_train(limit=BLOCK + 5), actor="tester", job=job)
    assert (report.trained == BLOCK and report.skipped["nothing_new"] == 5) or report.skipped["too_few_samples"] == 1
    trained = set(ModelTrainingSession.objects.values_list("personalized_model__learner__learner_id", flat=True))
    assert trained <= chosen and len(trained) >= BLOCK + 4
    assert ModelTrainingSession.objects.count() == len(trained), "nobody was trained twice"


def test_a_stopped_job_reports_the_shards_that_were_done_and_audits_everyone_who_was_trained(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_training, "TRAINED_TOGETHER", BLOCK)
    report = train(running(), should_stop=lambda: ModelTrainingSession.objects.count() >= BLOCK + 10)
    assert report.stopped and report.trained + sum(report.skipped.values()) == BLOCK
    audited = AuditEvent.objects.filter(action="learners.trained").values_list("data", flat=True)
    assert sum(entry["trained"] for entry in audited) == ModelTrainingSession.objects.count() == BLOCK + 10


def test_the_policy_of_the_first_shard_is_that_of_the_last(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_training, "TRAINED_TOGETHER", BLOCK)
    real = shared_training.train_shard

    def changed_meanwhile(context: shards.ShardContext) -> dict[str, Any]:
        set_policy(local_epochs=9)
        return real(context)

    monkeypatch.setattr(shared_training, "train_shard", changed_meanwhile)
    train(running())
    assert set(ModelTrainingSession.objects.values_list("epochs", flat=True)) == {5}


def test_helpers_find_the_handler_of_the_kind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_training, "TRAINED_TOGETHER", BLOCK)
    real = shards.work

    def work(*, parent: Job, phase: str, worker: Job, **options: Any) -> shards.Worked:
        if worker.pk == parent.pk:
            services.run_inline(kind=shard_helpers.HELPER_KIND, params={"parent": parent.pk, "phase": phase})
        return real(parent=parent, phase=phase, worker=worker, **options)

    monkeypatch.setattr(shards, "work", work)
    job = services.run_inline(kind=KIND, params={})
    assert job.result is not None and job.result["trained"] == LEARNERS - 2
    assert set(job.shards.values_list("worker_job__kind", flat=True)) == {shard_helpers.HELPER_KIND}


# --- Where it runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KIND, "train_learner_model", "run_federated_aggregation"])
def test_only_keras_needs_a_process_of_its_own(kind: str) -> None:
    needs = registry.get_kind(kind).needs_child
    set_policy(engine="cohort")
    assert not needs({})
    set_policy(engine="keras")
    assert needs({})


def test_one_run_may_choose_its_engine() -> None:
    needs = registry.get_kind(KIND).needs_child
    set_policy(engine="cohort")
    assert needs({"overrides": {"engine": "keras"}})
    set_policy(engine="keras")
    assert not needs({"overrides": {"engine": "cohort"}})


def test_a_round_that_began_with_keras_goes_on_in_a_process_of_its_own() -> None:
    from federation.rounds import lifecycle, service

    make_world(learners=1, evaluators=0, policy={"engine": "keras"})
    lifecycle.claim_round(policy=service.policy_with({}), base=active_version(), job=None, actor="test")
    set_policy(engine="cohort")
    assert registry.get_kind("run_federated_aggregation").needs_child({})


# --- One learner ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one(engine: ShrinkingEngine) -> Iterator[Learner]:
    yield make_world(learners=2, evaluators=0, sessions=False).learners[0]


def train_one(learner_id: str) -> Job:
    return services.run_inline(kind="train_learner_model", params={"learner_id": learner_id})


def test_one_learner_is_trained_and_again_only_when_there_is_something_new(one: Learner) -> None:
    job = train_one(one.learner_id)
    assert job.result is not None and job.result["learner_id"] == one.learner_id
    assert job.result["serving_choice"] == PersonalizedModel.objects.get(learner=one).serving_choice
    assert set(job.result["evaluation"]) == {"main", "served", "personal"}
    assert ModelTrainingSession.objects.count() == 1

    with pytest.raises(NothingToTrain) as skipped:
        train_one(one.learner_id)
    assert skipped.value.code == "nothing_new"
    assert Job.objects.filter(state=JobState.SKIPPED, error_code="nothing_new").count() == 1
    assert ModelTrainingSession.objects.count() == 1

    add_events(one, events_of(77, 12), first_seq=100)
    train_one(one.learner_id)
    assert ModelTrainingSession.objects.filter(personalized_model__learner=one).count() == 2


def test_a_learner_who_may_not_be_trained_is_left_out_with_the_reason(one: Learner) -> None:
    Learner.objects.filter(pk=one.pk).update(consent_training=False)
    with pytest.raises(Skipped) as skipped:
        train_one(one.learner_id)
    assert skipped.value.code == "no_consent_training" and one.learner_id in str(skipped.value)


def test_a_damaged_tail_is_a_failure_of_the_job(one: Learner) -> None:
    PersonalizedModel.objects.filter(learner=one).update(weights_sha256="0" * 64)
    with pytest.raises(LocalTrainingError) as failed:
        train_one(one.learner_id)
    assert failed.value.code == "checksum_mismatch"
    assert Job.objects.get(kind="train_learner_model").state == JobState.FAILED


@pytest.mark.parametrize("params", [{}, {"learner_id": ""}, {"learner_id": "nobody"}, {"learner": "fed-0"}])
def test_a_job_for_nobody_is_refused(params: dict[str, Any], one: Learner) -> None:
    with pytest.raises(UsageError):
        services.run_inline(kind="train_learner_model", params=params)
    assert not ModelTrainingSession.objects.exists()
