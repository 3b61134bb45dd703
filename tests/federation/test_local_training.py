"""Training of learners' own copies: who is trained, on what, what is stored, and what happens when something goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.core.files.storage import storages
from django.core.management import CommandError, call_command

from aivo_core.engine.contract import LearnerResult, LearnerTask, LocalTrainingConfig
from aivo_core.network import NetworkSpec, Weights
from aivo_site.audit.models import AuditEvent
from aivo_site.errors import UsageError
from federation import engines, training_run
from federation.learner_preparation import training_seed
from federation.local_training import TrainingReport, learners_to_train, train_learners, training_policy
from federation.models import ModelTrainingSession, SessionPurpose
from federation.policies import PolicyError, RoundPolicy
from learners.models import Learner, Pool
from models_store import store
from models_store.errors import NoMainModel
from models_store.models import PersonalizedModel
from models_store.verification import verify_store
from tests.federation.rounds_world import EVENTS, ShrinkingEngine, World, make_world, set_policy, with_events, with_model
from tests.models_store.factories import SMALL, add_events, events_of, make_learner, make_version

pytestmark = pytest.mark.django_db

TRAINING = 16
"""Of 24 events, those at positions 1..16 train: position < .7 x 24."""


def world(**kwargs: Any) -> World:
    return make_world(evaluators=0, sessions=False, **kwargs)


def train(**kwargs: Any) -> TrainingReport:
    return train_learners(learners=kwargs.pop("learners", learners_to_train()), actor="tester", **kwargs)


class Recording(ShrinkingEngine):
    """Also keeps what it was given, and lets a test act while a learner is trained."""

    def __init__(self, factor: float = -0.2, during: Callable[[LearnerTask], None] | None = None) -> None:
        super().__init__(factor=factor)
        self.tasks: list[LearnerTask] = []
        self.calls: list[int] = []
        self.config: LocalTrainingConfig | None = None
        self.during = during

    def train(
        self, *, spec: NetworkSpec, weights: Weights, config: LocalTrainingConfig, tasks: Iterable[LearnerTask]
    ) -> Iterator[LearnerResult]:
        self.config = config
        given = list(tasks)
        self.calls.append(len(given))
        results = super().train(spec=spec, weights=weights, config=config, tasks=given)
        for task, result in zip(given, results, strict=True):
            self.tasks.append(task)
            if self.during is not None:
                self.during(task)
            yield result


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[ShrinkingEngine], ShrinkingEngine]:
    def use_it(engine: ShrinkingEngine) -> ShrinkingEngine:
        monkeypatch.setattr(engines, "get_engine", lambda name: engine)
        return engine

    return use_it


# --- What is stored ------------------------------------------------------------------------------------------------------


def test_a_trained_learner_has_a_new_tail_a_session_and_its_delta(engine: ShrinkingEngine) -> None:
    made = world(learners=1)
    before = made.model(0)
    base = store.load_version(made.version)
    report = train()
    model, session = made.model(0), ModelTrainingSession.objects.get()
    assert (report.trained, dict(report.skipped), dict(report.failed)) == (1, {}, {})
    assert (model.version, model.status) == (before.version + 1, "ACTIVE")
    assert model.last_trained_at is not None
    delta = store.read_delta(path=session.delta_path, sha256=session.delta_sha256, spec=SMALL)
    assert np.array_equal(store.read_tail(model=model, spec=SMALL), base.tail + delta)
    assert session.delta_norm == pytest.approx(float(np.linalg.norm(delta.astype(np.float64))))
    assert (session.purpose, session.sequence, session.samples) == (SessionPurpose.PERSONAL, 1, TRAINING)
    assert (session.engine, session.backend, session.proximal_mu) == ("cohort", "test", 10.0)
    assert session.base_version == made.version
    assert session.metadata["tail_sha256"] == model.weights_sha256


@pytest.mark.parametrize("name", ["cohort", "keras"])
def test_a_session_says_which_engine_and_backend_made_its_result(name: str) -> None:
    made = world(learners=2)
    report = train(policy=RoundPolicy(engine=name, min_samples=5))
    sessions = ModelTrainingSession.objects.all()
    assert (report.trained, report.engine) == (2, name)
    assert {session.engine for session in sessions} == {name}
    assert {session.backend for session in sessions} == set(report.backend.split(", "))
    library = report.backend.split()[0]
    assert library == "tensorflow" if name == "keras" else library in ("numba", "numpy")
    assert all(made.model(i).version == 2 for i in range(2))


def test_a_report_names_every_backend_that_computed() -> None:
    report = TrainingReport(engine="cohort")
    for backend in ("numpy 2", "numpy 2", "numba 0.6", "numpy 2"):
        report.computed_by(backend)
    assert report.backend == "numpy 2, numba 0.6"


def test_the_old_tail_file_stays_and_nothing_is_missing_or_damaged(engine: ShrinkingEngine) -> None:
    made = world(learners=2)
    before = made.model(0)
    train()
    assert store.read_tail(model=before, spec=SMALL).shape == (SMALL.tail_size,)
    found = verify_store().to_json()
    assert (found["missing"], found["corrupt"]) == (0, 0)


def test_figures_of_the_session_are_of_samples_it_was_not_trained_on(use: Any) -> None:
    engine = use(Recording())
    world(learners=1)
    train()
    session = ModelTrainingSession.objects.get()
    full, fit = engine.tasks
    assert len(full.samples) == TRAINING
    assert np.array_equal(fit.samples.position, full.samples.position[: TRAINING - 4])
    assert session.head_metrics["own"]["samples"] == session.head_metrics["main"]["samples"] == 4
    assert (
        session.final_loss
        == session.head_metrics["own"]["content"] + session.head_metrics["own"]["path"] + (session.head_metrics["own"]["score"])
    )
    assert session.final_accuracy == session.head_metrics["own"]["content_top1"]


def test_the_blend_is_chosen_with_a_tail_that_never_saw_what_chooses(use: Any) -> None:
    """The learner's own tail has seen it in earlier sessions: the choosing run starts at the base."""
    engine = use(Recording())
    made = world(learners=1)
    train()
    add_events(made.learners[0], events_of(77, 6), first_seq=EVENTS + 1)
    train()
    base = store.load_version(made.version)
    _first, _first_fit, full, fit = engine.tasks
    assert not np.array_equal(full.start_tail, base.tail)
    assert np.array_equal(fit.start_tail, base.tail)
    assert np.array_equal(full.anchor_tail, base.tail)


def test_the_later_part_is_never_trained_on_and_always_measures(use: Any) -> None:
    engine = use(Recording())
    made = world(learners=1)
    train()
    assert all(task.samples.position.max() < 0.7 * EVENTS for task in engine.tasks)
    evaluation = made.model(0).serving_evidence["evaluation"]
    assert evaluation["served"]["samples"] == EVENTS - 1 - TRAINING


def test_only_the_latest_samples_train_where_there_are_too_many(use: Any) -> None:
    engine = use(Recording())
    world(learners=1, policy={"max_samples": 10})
    train()
    assert engine.tasks[0].samples.position.tolist() == list(range(TRAINING - 9, TRAINING + 1))


def test_a_learner_whose_copy_is_not_better_is_served_by_main_with_the_evidence(use: Any) -> None:
    use(ShrinkingEngine(factor=0.5))
    made = world(learners=3)
    report = train()
    for index in range(3):
        model = made.model(index)
        assert (model.serving_choice, model.blend) == ("MAIN", 0.0)
        losses = {float(blend): entry["total"] for blend, entry in model.serving_evidence["losses"].items()}
        assert losses[0.0] == min(losses.values())
        assert model.performance_metrics["improvement"] == 0.0
    assert report.to_json()["evaluation"]["serving_choice"] == {"MAIN": 3}
    assert report.to_json()["evaluation"]["mean_change"] == 0.0


def test_a_better_copy_serves_and_the_figures_are_of_what_is_served(engine: ShrinkingEngine) -> None:
    made = world(learners=3)
    report = train().to_json()
    models = [made.model(index) for index in range(3)]
    assert {model.serving_choice for model in models} <= {"PERSONAL", "BLEND", "MAIN"}
    assert any(model.serving_choice != "MAIN" for model in models)
    for model in models:
        evaluation = model.serving_evidence["evaluation"]
        totals = {name: sum(evaluation[name][head] for head in ("content", "path", "score")) for name in evaluation}
        assert model.performance_metrics["loss"] == pytest.approx(totals["served"])
        assert model.performance_metrics["improvement"] == pytest.approx(1.0 - totals["served"] / totals["main"])
    assert report["evaluation"]["learners"] == 3
    losses = [model.performance_metrics["loss"] for model in models]
    assert report["evaluation"]["metrics_personal"]["total"] == pytest.approx(np.mean(losses))


def test_every_trained_learner_is_compared_with_another_ones_copy(engine: ShrinkingEngine) -> None:
    world(learners=4)
    assert train().to_json()["evaluation"]["control"]["total"]["learners"] == 4


def test_a_single_learner_has_no_control(engine: ShrinkingEngine) -> None:
    world(learners=1)
    assert train().to_json()["evaluation"]["control"] is None


def test_bias_training_alone_leaves_no_delta_to_contribute(engine: ShrinkingEngine) -> None:
    world(learners=1, policy={"adaptation": "difficulty_bias"})
    train()
    session = ModelTrainingSession.objects.get()
    assert (session.delta_path, session.delta_norm, session.proximal_mu) == ("", None, 0.0)


def test_the_run_is_in_the_audit_log(engine: ShrinkingEngine) -> None:
    world(learners=2)
    train()
    event = AuditEvent.objects.get(action="learners.trained")
    assert (event.actor, event.data["trained"]) == ("tester", 2)


# --- Who is left out -----------------------------------------------------------------------------------------------------


def test_everyone_left_out_has_a_reason(engine: ShrinkingEngine) -> None:
    made = world(learners=5)
    Learner.objects.filter(pk=made.learners[0].pk).update(consent_training=False)
    Learner.objects.filter(pk=made.learners[1].pk).update(withdrawn_at="2026-01-01T00:00:00Z")
    PersonalizedModel.objects.filter(learner=made.learners[2]).update(status="UPDATING")
    PersonalizedModel.objects.filter(learner=made.learners[3]).update(backend="OPENAI_FINE_TUNING")
    with_events(make_learner("no-model"), 50)
    with_model(make_learner("newcomer"), made.version, events=6, session=False)
    judge = make_learner("judge", pool=Pool.EVALUATION)
    with_model(judge, made.version, session=False)
    report = train(learners=Learner.objects.all())
    assert dict(report.skipped) == {
        "no_consent_training": 1,
        "withdrawn": 1,
        "not_active": 1,
        "other_backend": 1,
        "no_model": 1,
        "too_few_samples": 1,
        "wrong_pool": 1,
    }
    assert report.trained == 1


def test_a_learner_without_events_has_too_few_samples(engine: ShrinkingEngine) -> None:
    made = world(learners=1)
    with_model(make_learner("silent"), made.version, events=0, session=False)
    report = train()
    assert dict(report.skipped) == {"too_few_samples": 1}
    assert (report.notes[0].learner_id, report.notes[0].message) == ("silent", "0 training samples; at least 5 are needed")


def test_the_same_samples_are_not_trained_on_twice(engine: ShrinkingEngine) -> None:
    made = world(learners=3)
    first = train()
    model = made.model(0)
    second = train()
    assert (second.trained, dict(second.skipped)) == (0, {"nothing_new": 3})
    assert made.model(0).version == model.version
    assert second.to_json()["evaluation"]["mean_change"] == first.to_json()["evaluation"]["mean_change"]
    assert second.to_json()["evaluation"]["serving_choice"] == first.to_json()["evaluation"]["serving_choice"]


def test_new_interactions_are_trained_on_from_the_learners_own_tail(use: Any) -> None:
    engine = use(Recording())
    made = world(learners=2)
    train()
    own = store.read_tail(model=made.model(0), spec=SMALL)
    add_events(made.learners[0], events_of(77, 10), first_seq=EVENTS + 1)
    report = train()
    assert (report.trained, dict(report.skipped)) == (1, {"nothing_new": 1})
    assert np.array_equal(engine.tasks[-2].start_tail, own)
    assert ModelTrainingSession.objects.filter(personalized_model=made.model(0)).count() == 2


def test_another_way_of_training_is_something_new(engine: ShrinkingEngine) -> None:
    world(learners=1)
    train()
    assert train(policy=training_policy({"local_epochs": 2})).trained == 1


def test_force_trains_again(engine: ShrinkingEngine) -> None:
    made = world(learners=1)
    train()
    assert train(force=True).trained == 1
    assert made.model(0).version == 3


def test_a_limit_takes_those_trained_longest_ago(engine: ShrinkingEngine) -> None:
    made = world(learners=4)
    assert train(learners=learners_to_train(limit=2)).trained == 2
    assert train(learners=learners_to_train(limit=2)).trained == 2
    assert {made.model(index).version for index in range(4)} == {2}


def test_learners_are_found_by_id_in_any_case_and_by_key(engine: ShrinkingEngine) -> None:
    made = world(learners=3)
    chosen = learners_to_train(learner_ids=["FED-0", str(made.learners[2].pk)])
    assert set(chosen) == {made.learners[0], made.learners[2]}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"learner_ids": ["fed-0", "nobody"]}, "unknown_learner"),
        ({"learner_ids": ["../fed-0"]}, "unknown_learner"),
        ({"learner_ids": ["fed-0\0"]}, "unknown_learner"),
        ({"organisation": "a\0b"}, "unknown_organisation"),
        ({"organisation": "nowhere"}, "unknown_organisation"),
        ({"limit": 0}, "bad_limit"),
    ],
)
def test_a_selection_of_nothing_known_is_refused(arguments: dict[str, Any], code: str) -> None:
    world(learners=1)
    with pytest.raises(UsageError) as caught:
        learners_to_train(**arguments)
    assert caught.value.code == code


def test_without_a_main_model_nobody_is_trained() -> None:
    with pytest.raises(NoMainModel):
        train()


def test_a_run_may_set_only_what_is_about_training() -> None:
    assert training_policy({"adaptation": "tail", "local_epochs": 2}).adaptation == "tail"
    for overrides in ({"minimum_learners": 1}, {"learning_rate": 0.0}, {"local_epochs": 0}):
        with pytest.raises(PolicyError):
            training_policy(overrides)


# --- What goes wrong -----------------------------------------------------------------------------------------------------


def test_a_damaged_tail_puts_its_model_into_error_and_stops_nobody(engine: ShrinkingEngine) -> None:
    made = world(learners=3)
    damaged = made.model(1)
    path = Path(storages["learner_models"].path(damaged.weights_path))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    report = train()
    model = made.model(1)
    assert (report.trained, dict(report.failed)) == (2, {"checksum_mismatch": 1})
    assert (model.status, model.version) == ("ERROR", damaged.version)
    assert damaged.weights_sha256 in model.status_reason
    assert dict(train().skipped) == {"nothing_new": 2, "not_active": 1}


def test_a_model_that_changes_meanwhile_is_a_conflict_and_nothing_is_stored(use: Any) -> None:
    made = world(learners=2)
    loser = made.learners[0]

    def change(task: LearnerTask) -> None:
        if task.key == str(loser.subject_key):
            PersonalizedModel.objects.filter(learner=loser).update(version=9)

    use(Recording(during=change))
    report = train()
    model = made.model(0)
    assert (report.trained, dict(report.failed)) == (1, {"conflict": 1})
    assert (model.version, model.serving_evidence, model.last_trained_at) == (9, {}, None)
    assert not ModelTrainingSession.objects.filter(personalized_model=model).exists()


def test_a_session_number_taken_meanwhile_is_a_conflict_and_nothing_is_stored(use: Any) -> None:
    made = world(learners=1)
    before = made.model(0)

    def insert(_task: LearnerTask) -> None:
        ModelTrainingSession.objects.get_or_create(
            personalized_model=before,
            sequence=1,
            defaults={"base_version": made.version, "purpose": "CONTRIBUTION", "epochs": 1, "batch_size": 1, "samples": 1},
        )

    use(Recording(during=insert))
    assert dict(train().failed) == {"conflict": 1}
    assert made.model(0).version == before.version


@pytest.mark.parametrize(("field", "value", "code"), [
    ("consent_training", False, "no_consent_training"),
    ("withdrawn_at", "2026-01-01T00:00:00Z", "withdrawn"),
])  # fmt: skip
def test_a_consent_withdrawn_meanwhile_stops_the_learner_before_anything_is_stored(
    use: Any, field: str, value: Any, code: str
) -> None:
    made = world(learners=1)
    use(Recording(during=lambda _task: Learner.objects.update(**{field: value}) and None))
    report = train()
    assert (report.trained, dict(report.skipped)) == (0, {code: 1})
    assert made.model(0).version == 1
    assert not ModelTrainingSession.objects.exists()


def test_a_learner_whose_training_fails_is_counted_by_its_code_and_stops_nobody(use: Any) -> None:
    made = world(learners=3)
    unlucky = str(made.learners[1].subject_key)

    class Diverging(ShrinkingEngine):
        def train(self, **kwargs: Any) -> Iterator[LearnerResult]:
            for result in super().train(**kwargs):
                yield (
                    LearnerResult(key=unlucky, error_code="diverged", error_message="lower the rate")
                    if result.key == unlucky
                    else result
                )

    use(Diverging())
    report = train()
    assert (report.trained, dict(report.failed)) == (2, {"diverged": 1})
    assert [(note.learner_id, note.code, note.message) for note in report.notes] == [("fed-1", "diverged", "lower the rate")]
    assert made.model(1).version == 1


def test_a_run_that_dies_is_gone_on_with_and_gives_the_same_tails(use: Any) -> None:
    made = world(learners=5)
    base = store.load_version(made.version)

    def die(_task: LearnerTask) -> None:
        if ModelTrainingSession.objects.count() == 2:
            raise KeyboardInterrupt

    use(Recording(during=die))
    with pytest.raises(KeyboardInterrupt):
        train()
    assert {model.status for model in PersonalizedModel.objects.all()} == {"ACTIVE"}
    use(ShrinkingEngine())
    report = train()
    assert (report.trained, dict(report.skipped)) == (3, {"nothing_new": 2})
    for index, learner in enumerate(made.learners):
        seed = training_seed(learner.subject_key, SessionPurpose.PERSONAL, 1)
        noise = np.random.default_rng(seed).normal(scale=0.01, size=SMALL.tail_size)
        expected = base.tail + (-0.2 * base.tail + noise).astype(np.float32)
        assert np.array_equal(store.read_tail(model=made.model(index), spec=SMALL), expected)
    assert report.to_json()["evaluation"]["learners"] == 5


def test_a_run_stops_when_asked_and_keeps_what_it_did(engine: ShrinkingEngine) -> None:
    world(learners=5)
    seen: list[int] = []
    report = train(progress=lambda done, total, message: seen.append(done), should_stop=lambda: len(seen) >= 2)
    assert (report.stopped, report.trained) == (True, 2)
    assert ModelTrainingSession.objects.count() == 2


def test_a_run_with_nothing_to_do_can_be_stopped_too(engine: ShrinkingEngine) -> None:
    world(learners=5)
    train()
    seen: list[tuple[int, int]] = []
    report = train(progress=lambda done, total, message: seen.append((done, total)), should_stop=lambda: len(seen) >= 2)
    assert (report.stopped, dict(report.skipped), seen) == (True, {"nothing_new": 2}, [(1, 5), (2, 5)])


def test_progress_counts_everyone_to_the_end(engine: ShrinkingEngine) -> None:
    made = world(learners=4)
    Learner.objects.filter(pk=made.learners[2].pk).update(consent_training=False)
    seen: list[tuple[int, int]] = []
    train(progress=lambda done, total, message: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_evidence_that_cannot_be_read_is_a_failure_of_its_learner_alone(engine: ShrinkingEngine) -> None:
    made = world(learners=2)
    train()
    PersonalizedModel.objects.filter(pk=made.model(0).pk).update(serving_evidence={"evaluation": {"main": 1}})
    report = train()
    assert (dict(report.failed), dict(report.skipped)) == ({"bad_evidence": 1}, {"nothing_new": 1})


def test_learners_are_held_in_blocks_of_one_base(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "BLOCK", 2)
    engine = use(Recording())
    made = world(learners=3)
    other = make_version(seed=1, active=False)
    for number in range(3):
        with_model(make_learner(f"other-{number}"), other, seed=20 + number, session=False)
    assert train().trained == 6
    assert engine.calls == [4, 2, 2, 4]
    assert made.version != other


def test_a_block_ends_before_it_holds_too_many_samples(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "BLOCK_SAMPLES", 2 * (EVENTS - 1))
    engine = use(Recording())
    world(learners=3)
    train()
    assert engine.calls == [4, 2]


def test_the_seed_depends_on_learner_purpose_and_number_only() -> None:
    key = make_learner("seeded").subject_key
    seeds = {training_seed(key, purpose, number) for purpose in ("PERSONAL", "CONTRIBUTION") for number in range(1, 50)}
    assert len(seeds) == 98
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert training_seed(key, "PERSONAL", 1) == training_seed(key, "PERSONAL", 1)


# --- Through the real engines, and through the command -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "backend"), [("cohort", "num"), ("keras", "tensorflow ")])
def test_an_engine_trains_a_learner_twice_to_the_same_tail_from_the_same_start(name: str, backend: str) -> None:
    made = world(learners=2, policy={"local_epochs": 2, "bias_epochs": 2, "engine": name})
    report = train()
    assert (report.trained, report.engine) == (2, name)
    assert report.backend.startswith(backend)
    first = made.model(0)
    session = ModelTrainingSession.objects.get(personalized_model=first)
    assert len(session.metadata["epoch_losses"]) == 4
    session.delete()
    store_row = {"version": 1, "weights_path": "", "weights_sha256": ""}
    base = store.load_version(made.version)
    file = store.write_tail(learner_id=first.learner.learner_id, number=1, spec=SMALL, tail=base.tail)
    store_row.update(weights_path=file.path, weights_sha256=file.sha256)
    PersonalizedModel.objects.filter(pk=first.pk).update(**store_row)
    train(learners=learners_to_train(learner_ids=["fed-0"]))
    assert made.model(0).weights_sha256 == first.weights_sha256


def test_the_command_prints_the_contract(engine: ShrinkingEngine, capsys: pytest.CaptureFixture[str]) -> None:
    world(learners=3)
    call_command("train_learner_models", "--json")
    result = json.loads(capsys.readouterr().out)
    assert {"trained", "skipped", "failed", "engine", "backend", "evaluation", "learners_per_second", "seconds"} <= set(result)
    assert {
        "learners", "share_gaining", "share_losing", "mean_change", "mean_change_interval", "worst_change", "metrics_main",
        "metrics_personal", "serving_choice",
    } <= set(result["evaluation"])  # fmt: skip
    assert (result["trained"], result["engine"], result["backend"]) == (3, "cohort", "test")


def test_the_command_says_in_words_what_it_measured(engine: ShrinkingEngine, capsys: pytest.CaptureFixture[str]) -> None:
    world(learners=3)
    call_command("train_learner_models")
    text = capsys.readouterr().out
    assert "3 learners trained" in text
    assert "another learner's model" in text


def test_a_second_command_is_skipped_with_the_reason(engine: ShrinkingEngine, capsys: pytest.CaptureFixture[str]) -> None:
    world(learners=2)
    call_command("train_learner_models", "--json")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call_command("train_learner_models", "--json")
    result = json.loads(capsys.readouterr().out)
    assert caught.value.code == 3
    assert (result["skipped"], result["evaluation"]["learners"]) == ({"nothing_new": 2}, 2)
    assert result["error"]["code"] == "nothing_trained"


def test_a_command_with_a_failed_learner_exits_1_and_reports(engine: ShrinkingEngine, capsys: pytest.CaptureFixture[str]) -> None:
    made = world(learners=2)
    storages["learner_models"].delete(made.model(0).weights_path)
    with pytest.raises(SystemExit) as caught:
        call_command("train_learner_models", "--json")
    assert caught.value.code == 1
    assert json.loads(capsys.readouterr().out)["failed"] == {"missing_file": 1}


@pytest.mark.parametrize("arguments", [
    ["--learner", "nobody"], ["--organisation", "nowhere"], ["--engine", "torch"], ["--epochs", "0"], ["--batch-size", "-1"],
    ["--learning-rate", "0"], ["--learning-rate", "nan"], ["--adaptation", "head"], ["--limit", "0"],
])  # fmt: skip
def test_a_wrong_option_exits_2_and_changes_nothing(engine: ShrinkingEngine, arguments: list[str]) -> None:
    made = world(learners=1)
    with pytest.raises(CommandError) as caught:
        call_command("train_learner_models", *arguments)
    assert caught.value.returncode == 2
    assert made.model(0).version == 1


def test_without_a_main_model_the_command_exits_1(engine: ShrinkingEngine, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call_command("train_learner_models", "--json")
    assert caught.value.code == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "no_main_model"


def test_a_policy_that_asks_for_privacy_in_local_training_is_refused(engine: ShrinkingEngine) -> None:
    made = world(learners=1)
    with pytest.raises(PolicyError) as caught:
        train(policy=RoundPolicy(sample_level_privacy=True))
    assert caught.value.code == "privacy_not_available"
    assert made.model(0).version == 1


def test_private_rounds_change_nothing_for_a_learners_own_training(engine: ShrinkingEngine) -> None:
    made = world(learners=1)
    set_policy(differential_privacy=True, clip_norm=1.0, noise_multiplier=1.0)
    train(policy=None)
    assert made.model(0).version == 2
