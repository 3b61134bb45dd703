"""The original document's programming interface, each name by the call that the document shows, in snake_case.

The document is the source of the names, the order of the tests and the values in the calls; docs/original-map.md says what
became of each and why where it differs.
"""

from __future__ import annotations

from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from django.apps import apps
from django.core.files.storage import storages
from django.core.management import get_commands
from django.db import models
from django.utils import timezone
from django_q.models import Schedule

from aivo_core.encoding.columns import COLUMN_GROUPS
from aivo_core.network import NetworkSpec
from aivo_core.samples import Samples
from aivo_site import environment
from aivo_site.errors import UsageError
from aivo_site.jobs.models import Job
from aivo_site.jobs.schedules import setup_schedules
from federation import engines
from federation.errors import ManagerError
from federation.local_training import FederatedLearningManager, train_learners
from federation.models import AggregationRound, FederatedUpdate, ModelTrainingSession
from federation.policies import PolicyError, RoundPolicy
from federation.registry import ModelRegistry
from federation.rounds.service import AggregationConfig, FederatedAggregationService
from learners.models import Learner
from models_store import store
from models_store.cloning import ModelCloner
from models_store.learning_data import learner_samples
from models_store.models import MainModelVersion, PersonalizedModel, PersonalizedModelStatus, VersionStatus
from models_store.provisioning import AivoModelCloner
from models_store.training import MainModelTrainer, TrainingData
from models_store.version_writer import version_writer
from models_store.versions import active_version
from tests.federation.rounds_world import ShrinkingEngine, make_world, person, set_policy, train_personally, with_events
from tests.models_store.factories import SMALL, make_learner, make_version, small_fit
from tests.synthetic_samples import make_samples, make_weights

pytestmark = pytest.mark.django_db

WIDTH = 12
NARROW = NetworkSpec(input_dim=WIDTH, hidden_layers=(16, 8), dropout_rates=(0.3, 0.2), freeze_layers=())


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ShrinkingEngine:
    own = ShrinkingEngine()
    monkeypatch.setattr(engines, "get_engine", lambda name: own)
    return own


def main_path(version: MainModelVersion) -> str:
    """The version's folder as a path, as the document's calls give it."""
    return str(Path(storages["main_models"].path(version.model_path)))


def samples_of(learner: Learner, version: MainModelVersion) -> Samples:
    ((_learner, samples),) = learner_samples(learners=Learner.objects.filter(pk=learner.pk), loaded=store.load_version(version))
    return samples


# --- 1. MainModelTrainer -------------------------------------------------------------------------------------------------


def test_the_network_is_the_documents() -> None:
    spec = NetworkSpec()
    assert (spec.input_dim, spec.hidden_layers) == (256, (512, 256, 128, 64))
    assert {head.name: head.units for head in spec.heads} == {"content_output": 128, "difficulty_output": 10, "path_output": 32}
    assert COLUMN_GROUPS == {"content": (0, 128), "subject": (128, 192), "learner": (192, 224), "session": (224, 256)}


def test_main_model_trainer_builds_the_network_with_normalisation_dropout_and_three_heads() -> None:
    trainer = MainModelTrainer(input_dim=256, hidden_layers=[512, 256, 128, 64], learning_rate=0.001, epochs=100)
    model = trainer.build_model()
    names = [layer.name for layer in model.layers]
    for block in (1, 2, 3, 4):
        assert {f"shared_dense_{block}", f"shared_bn_{block}", f"shared_dropout_{block}"} <= set(names)
    assert model.count_params() == trainer.spec.parameter_count == 318_954
    outputs = model(np.zeros((2, 256), dtype=np.float32), training=False)
    heads = outputs if isinstance(outputs, dict) else dict(zip((h.name for h in trainer.spec.heads), outputs, strict=True))
    assert {name: tuple(value.shape) for name, value in heads.items()} == {
        "content_output": (2, 128),
        "difficulty_output": (2, 10),
        "path_output": (2, 32),
    }


def test_main_model_trainer_trains_on_curriculum_data_and_saves_a_version() -> None:
    trainer = MainModelTrainer(input_dim=WIDTH, hidden_layers=[16, 8], learning_rate=0.001, epochs=2, batch_size=64)
    data = TrainingData(training=make_samples(NARROW, 120, 1), validation=make_samples(NARROW, 30, 2))
    result = trainer.train(data)
    row = trainer.save_model(result, version_writer(encoder=small_fit().encoder))
    saved = store.load_version(row)
    assert result.epochs == 2 and saved.spec == result.spec
    assert all(np.array_equal(saved.weights[name], value) for name, value in result.weights.items())


# --- 2. ModelCloner ------------------------------------------------------------------------------------------------------


def test_model_cloner_clones_with_the_documents_options_and_figures() -> None:
    version = make_version()
    make_learner("learner-123")
    clone_info = ModelCloner().clone_model(
        main_model_path=main_path(version),
        learner_model_path=str(Path(storages["learner_models"].path("learner-123"))),
        learner_id="learner-123",
        freeze_layers=["shared_dense_1", "shared_bn_1"],
    )
    first_block = SMALL.with_freeze_layers(["shared_dense_1", "shared_bn_1"])
    assert Path(clone_info.cloned_model_path).is_file()
    assert clone_info.architecture.trainable_params == first_block.tail_size < SMALL.parameter_count
    assert clone_info.architecture.total_params == SMALL.parameter_count


def test_a_clone_of_the_default_network_freezes_two_blocks_and_trains_52586_numbers() -> None:
    spec = NetworkSpec()
    version = make_version(spec=spec)
    make_learner("learner-123")
    clone_info = ModelCloner().clone_model(main_path(version), "", "learner-123")
    assert (clone_info.architecture.total_params, clone_info.architecture.trainable_params) == (318_954, 52_586)
    assert clone_info.architecture.freeze_layers == spec.freeze_layers and spec.frozen_blocks == 2


def test_files_of_the_default_network_are_no_larger_than_the_document_says() -> None:
    spec = NetworkSpec()
    version = make_version(spec=spec)
    make_learner("learner-123")
    model = ModelCloner().clone_model(main_path(version), "", "learner-123").model
    delta = store.write_delta(learner_id="learner-123", session_id=model.pk, spec=spec, delta=store.load_version(version).tail)
    main_bytes = sum(path.stat().st_size for path in Path(main_path(version)).iterdir())
    clone_bytes = Path(storages["learner_models"].path(model.weights_path)).stat().st_size
    assert 4 * spec.parameter_count < main_bytes < 2_000_000
    assert 4 * spec.tail_size < clone_bytes < 215_000
    assert 100 * clone_bytes < 25_000_000
    assert 4 * spec.tail_size < delta.size < 215_000


def test_model_cloner_extracts_deltas_and_compares() -> None:
    version = make_version()
    make_learner("learner-123")
    cloner = ModelCloner()
    model = cloner.clone_model(main_path(version), "", "learner-123").model
    assert not cloner.extract_delta(model).any()
    change = np.full(SMALL.tail_size, 0.01, dtype=np.float32)
    train_personally(model, delta=change)
    assert cloner.extract_delta(model) == pytest.approx(change, abs=1e-6)
    comparison = cloner.compare(version, model)
    assert comparison.layers["shared_dense_1"].distance == 0.0 < comparison.layers["content_output"].distance
    assert model.version == 2


# --- 3. FederatedLearningManager -----------------------------------------------------------------------------------------


def test_the_manager_trains_a_learners_model_clips_aggregates_and_makes_a_candidate() -> None:
    version = make_version()
    manager = FederatedLearningManager()
    updates = []
    for number in (1, 2, 3):
        learner = with_events(person(f"learner-{number}"), number)
        ModelCloner().clone_model(main_path(version), "", learner.learner_id)
        update = manager.train_local_model(
            {
                "learner_model_path": str(Path(storages["learner_models"].path(store.learner_folder(learner.learner_id)))),
                "local_epochs": 5,
                "batch_size": 32,
                "learning_rate": 0.001,
                "clip_norm": 0.01,
                "noise_multiplier": None,
            },
            samples_of(learner, version),
        )
        assert update.key == str(learner.subject_key) and update.delta.shape == (SMALL.tail_size,)
        assert 0.0 < update.norm <= 0.01 * (1 + 1e-6) < update.unclipped_norm
        assert len(update.losses) == 5
        updates.append(update)

    aggregation_result = manager.aggregate_updates(updates, "fedavg")
    total = sum(update.samples for update in updates)
    mean = sum(update.delta.astype(np.float64) * (update.samples / total) for update in updates)
    assert aggregation_result.aggregated_weights == pytest.approx(mean, abs=1e-7)

    candidate = manager.update_main_model(main_path(version), aggregation_result.aggregated_weights, 1.0)
    assert candidate.status == VersionStatus.CANDIDATE and candidate.parent == version
    assert store.load_version(candidate).tail == pytest.approx(store.load_version(version).tail + mean, abs=1e-6)
    assert active_version() == version


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "weighted"])
def test_the_manager_knows_the_documents_three_strategies(engine: ShrinkingEngine, strategy: str) -> None:
    version = make_version()
    manager = FederatedLearningManager()
    people = [with_events(person(f"learner-{number}"), number) for number in (1, 2)]
    for learner in people:
        ModelCloner().clone_model(main_path(version), "", learner.learner_id)
    updates = [
        manager.train_local_model({"learner_model_path": p.learner_id, "seed": n}, samples_of(p, version))
        for n, p in enumerate(people)
    ]
    quality = {update.key: 1.0 for update in updates} if strategy == "weighted" else None
    outcome = manager.aggregate_updates(updates, strategy, quality=quality)
    assert outcome.strategy == strategy and outcome.weights == pytest.approx({update.key: 0.5 for update in updates})
    assert outcome.aggregated_weights == pytest.approx((updates[0].delta + updates[1].delta) / 2, abs=1e-6)


def test_noise_without_accounting_is_refused_and_never_ignored(engine: ShrinkingEngine) -> None:
    make_version()
    with pytest.raises(ManagerError) as refused:
        FederatedLearningManager().train_local_model({"noise_multiplier": 0.1}, make_samples(SMALL, 60, 1))
    assert refused.value.code == "privacy_not_available"


def test_the_privacy_budget_of_the_documents_example_is_in_the_thousands() -> None:
    epsilon = FederatedLearningManager().calculate_privacy_budget(
        epochs=5, batch_size=32, dataset_size=1000, noise_multiplier=0.1, delta=1e-5
    )
    assert 1_000 < epsilon < 20_000
    assert f"{epsilon:.4f}"
    with_real_noise = FederatedLearningManager().calculate_privacy_budget(
        epochs=5, batch_size=32, dataset_size=1000, noise_multiplier=1.1, delta=1e-5
    )
    assert 0.1 < with_real_noise < 10.0


# --- 4. ModelRegistry ----------------------------------------------------------------------------------------------------


def test_the_registry_registers_models_as_documented() -> None:
    registry = ModelRegistry()
    registry.initialize()
    files = store.write_version_files(
        version="aivo-main-v1",
        spec=SMALL,
        weights=make_weights(SMALL, 1),
        encoder=small_fit().encoder,
        content_mix=0.0,
        metrics={},
        lineage={},
        card="# v1\n",
    )
    made = timezone.now() - timedelta(days=3)
    row = registry.register_main_model(
        version="aivo-main-v1",
        model_path=str(Path(storages["main_models"].path(files.model_path))),
        created_at=made,
        training_metrics={"accuracy": 0.85, "loss": 0.42, "epochs": 100, "samples": 10000},
        architecture=SMALL.to_json(),
        federated_updates=[],
    )
    assert row.training_metrics == {"accuracy": 0.85, "loss": 0.42, "epochs": 100, "samples": 10000}
    assert row.metadata["created_at"] == made.isoformat()

    make_learner("learner-123")
    stored = store.write_tail(learner_id="learner-123", number=1, spec=SMALL, tail=store.load_version(row).tail)
    registry.register_learner_model(
        learner_id="learner-123",
        model_path=str(Path(storages["learner_models"].path(stored.path))),
        source_version="aivo-main-v1",
        cloned_at=made,
        training_history=[],
        performance_metrics={"accuracy": 0.80, "loss": 0.50, "improvement": 0},
        status="active",
    )
    learner = registry.get_learner_model("learner-123")
    assert learner is not None
    assert (learner.source_version, learner.status, learner.cloned_at) == ("aivo-main-v1", "ACTIVE", made)
    assert learner.training_history == []
    assert learner.performance_metrics == {"accuracy": 0.80, "loss": 0.50, "improvement": 0.0}


@pytest.mark.parametrize(
    ("options", "code"),
    [({"federated_updates": [{}]}, "not_recorded_here"), ({"created_at": timezone.now().replace(tzinfo=None)}, "bad_time")],
)
def test_the_registry_does_not_take_a_history_or_a_time_without_zone_from_a_caller(options: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as refused:
        ModelRegistry().register_main_model(version="aivo-main-v1", model_path="aivo-main-v1", **options)
    assert refused.value.code == code
    assert not MainModelVersion.objects.exists()


def test_the_registry_lists_who_is_ready_and_tells_the_documents_statistics() -> None:
    world = make_world(learners=3, evaluators=0)
    long_ago = timezone.now() - timedelta(days=9)
    ModelTrainingSession.objects.filter(personalized_model=world.model(0)).update(created_at=long_ago)
    PersonalizedModel.objects.filter(pk=world.model(0).pk).update(last_trained_at=long_ago)
    PersonalizedModel.objects.update(performance_metrics={"accuracy": 0.25, "loss": 3.0, "improvement": 0.1})
    registry = ModelRegistry()
    registry.initialize()
    eligible = registry.get_eligible_for_aggregation(7)
    assert sorted(learner.learner_id for learner in eligible) == ["fed-1", "fed-2"]
    assert len(registry.get_eligible_for_aggregation(10)) == 3

    stats = registry.get_statistics()
    assert (stats.active_learner_models, stats.total_federated_updates) == (3, 0)
    assert f"{stats.average_performance:.2f}" == "0.25"
    learner = registry.get_learner_model("fed-1")
    assert learner is not None and len(learner.training_history) == 1
    assert (learner.performance_metrics["accuracy"], learner.performance_metrics["improvement"]) == (0.25, 0.1)
    assert registry.get_learner_model("nobody") is None


# --- 5. FederatedAggregationService --------------------------------------------------------------------------------------


def documented_config(version: MainModelVersion, **changes: Any) -> dict[str, Any]:
    config = {
        "main_model_path": main_path(version),
        "aggregation_strategy": "weighted",
        "minimum_learners": 5,
        "max_stale_days": 7,
        "learning_rate": 0.1,
        "enable_differential_privacy": False,
        "noise_multiplier": 0.1,
        "clip_norm": 1.0,
    }
    return {**config, **changes}


def test_the_service_has_exactly_the_documents_options() -> None:
    assert set(documented_config(make_version())) == {field.name for field in fields(AggregationConfig)}


def test_the_service_runs_a_scheduled_aggregation_and_tells_how_it_ended(engine: ShrinkingEngine) -> None:
    world = make_world()
    service = FederatedAggregationService(documented_config(world.version))
    service.initialize()
    job_id = service.run_scheduled_aggregation()
    assert isinstance(job_id, str) and Job.objects.get(pk=UUID(job_id)).kind == "run_federated_aggregation"
    job = service.get_job_status(job_id)
    assert job is not None and job.aggregation_results is not None
    assert sorted(job.contributing_learners) == sorted(str(learner.subject_key) for learner in world.learners)
    improvement = job.aggregation_results.performance_improvement
    assert improvement == pytest.approx(FederatedUpdate.objects.get().performance_improvement) and improvement > 0
    kept = AggregationRound.objects.get().policy
    assert (kept["strategy"], kept["server_learning_rate"], kept["minimum_learners"]) == ("weighted", 0.1, 5)


def test_with_too_few_learners_there_is_no_job(engine: ShrinkingEngine) -> None:
    world = make_world(learners=4)
    service = FederatedAggregationService(documented_config(world.version))
    service.initialize()
    assert service.run_scheduled_aggregation() is None
    assert engine.trained == 0 and not AggregationRound.objects.exists()


def test_a_service_that_is_asked_for_differential_privacy_refuses_instead_of_ignoring_it() -> None:
    version = make_version()
    for strategy, code in (("weighted", "strategy_not_private"), ("fedavg", "epsilon_too_large")):
        config = documented_config(version, enable_differential_privacy=True, aggregation_strategy=strategy)
        with pytest.raises(PolicyError) as refused:
            FederatedAggregationService(config).initialize()
        assert refused.value.code == code


# --- 6. AivoModelCloner and the environment ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["USE_FEDERATED_LEARNING", "AIVO_MAIN_MODEL_PATH", "OPENAI_API_KEY", "PINECONE_API_KEY", "PINECONE_INDEX"]
)
def test_each_of_the_documents_environment_variables_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    assert name in environment.NAMES
    monkeypatch.setattr(environment, "BASE_DIR", tmp_path)
    field = {"AIVO_MAIN_MODEL_PATH": "main_model_path"}.get(name, name.lower())
    monkeypatch.setenv(name, "true")
    expected = {"USE_FEDERATED_LEARNING": True, "AIVO_MAIN_MODEL_PATH": tmp_path / "true"}.get(name, "true")
    assert getattr(environment.read_environment(), field) == expected


def test_the_documents_main_model_path_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "BASE_DIR", tmp_path)
    monkeypatch.delenv("AIVO_MAIN_MODEL_PATH")
    monkeypatch.delenv("AIVO_LEARNER_MODELS_PATH")
    values = environment.read_environment()
    assert values.main_model_path == tmp_path / "models/main-aivo"
    assert values.learner_models_path == tmp_path / "models/learners"


# --- Database schema -----------------------------------------------------------------------------------------------------

SCHEMA = {
    "models_store.MainModelVersion": "id version model_path architecture training_metrics status created_at updated_at",
    "federation.FederatedUpdate": (
        "id main_model_version aggregation_strategy contributing_learners performance_improvement privacy_budget metadata "
        "created_at"
    ),
    "federation.ModelTrainingSession": (
        "id personalized_model epochs batch_size samples final_loss final_accuracy contributed_to_federation federated_update "
        "metadata created_at"
    ),
    "models_store.PersonalizedModel": (
        "id learner model_id system_prompt vector_store_id configuration status summary version performance_metrics "
        "last_trained_at metadata created_at updated_at training_sessions"
    ),
}
"""The document's models with their fields; a field ``xId`` beside its relation ``x`` is the relation's own column here."""


@pytest.mark.parametrize("model", SCHEMA)
def test_every_field_of_the_documents_schema_exists(model: str) -> None:
    there = {field.name for field in apps.get_model(model)._meta.get_fields()}
    assert set(SCHEMA[model].split()) <= there


def test_what_the_schema_makes_unique_related_and_default_is_so_here() -> None:
    assert MainModelVersion._meta.get_field("version").unique
    assert isinstance(PersonalizedModel._meta.get_field("learner"), models.OneToOneField)
    assert FederatedUpdate._meta.get_field("main_model_version").related_model is MainModelVersion
    assert ModelTrainingSession._meta.get_field("personalized_model").related_model is PersonalizedModel
    assert ModelTrainingSession._meta.get_field("federated_update").related_model is FederatedUpdate
    assert ModelTrainingSession._meta.get_field("contributed_to_federation").default is False
    assert PersonalizedModel._meta.get_field("status").default == PersonalizedModelStatus.PENDING
    assert PersonalizedModel._meta.get_field("version").default == 1


def test_the_statuses_are_complete() -> None:
    assert set(VersionStatus.values) == {"TRAINING", "CANDIDATE", "ACTIVE", "ARCHIVED", "DEPRECATED", "REJECTED"}
    assert set(PersonalizedModelStatus.values) == {"PENDING", "TRAINING", "ACTIVE", "UPDATING", "FAILED", "ERROR"}


# --- Workflow ------------------------------------------------------------------------------------------------------------


def test_each_script_of_the_document_is_a_command() -> None:
    scripts = ("prepare-curriculum-data", "train-main-model", "run-federated-aggregation")
    assert {script.replace("-", "_") for script in scripts} <= set(get_commands())


def test_the_weekly_aggregation_is_scheduled_for_sunday_night() -> None:
    setup_schedules()
    assert Schedule.objects.get(name="weekly_aggregation").cron == "0 23 * * 0"


def test_the_defaults_are_the_documents_or_the_deliberate_ones() -> None:
    policy = RoundPolicy()
    assert (policy.minimum_learners, policy.max_stale_days) == (5, 7)
    assert (policy.local_epochs, policy.batch_size, policy.learning_rate) == (5, 32, 0.001)
    assert (policy.strategy, policy.server_learning_rate, policy.proximal_mu) == ("fedprox", 1.0, 1.0)
    assert (policy.differential_privacy, policy.noise_multiplier, policy.clip_norm) == (False, None, None)
    trainer = MainModelTrainer()
    assert (trainer.learning_rate, trainer.epochs, trainer.batch_size, trainer.loss_weights) == (1e-3, 12, 512, (1.0, 2.0, 1.0))


def test_a_learner_is_provisioned_trained_aggregated_and_marked_as_in_the_documents_workflow(engine: ShrinkingEngine) -> None:
    world = make_world(learners=5)
    learner = with_events(person("learner-123"), 7)

    provisioned = AivoModelCloner().clone_model({"learner_id": "learner-123"})
    model = provisioned.model
    assert Path(provisioned.cloned_model_path).parent.name == store.learner_folder("learner-123")
    assert model.metadata["federatedLearning"] is True
    assert model.metadata["freeze_layers"] == list(SMALL.freeze_layers)

    train_learners(learners=Learner.objects.filter(pk=learner.pk), actor="test")
    model.refresh_from_db()
    session = ModelTrainingSession.objects.get(personalized_model=model)
    assert model.version == 2 and model.last_trained_at is not None
    assert not session.contributed_to_federation
    registry = ModelRegistry().initialize()
    assert "learner-123" in {one.learner_id for one in registry.get_eligible_for_aggregation(7)}

    service = FederatedAggregationService({"main_model_path": main_path(world.version)}).initialize()
    job = service.get_job_status(service.run_scheduled_aggregation() or "")
    assert job is not None and str(learner.subject_key) in job.contributing_learners
    update = FederatedUpdate.objects.get()
    assert str(learner.subject_key) in update.contributing_learners
    assert active_version() == update.main_model_version != world.version
    assert model.training_sessions.get(contributed_to_federation=True).federated_update == update
    assert registry.get_statistics().total_federated_updates == 1


def test_a_round_on_sessions_takes_each_delta_once(engine: ShrinkingEngine) -> None:
    make_world()
    set_policy(contribution_source="sessions")
    service = FederatedAggregationService().initialize()
    assert service.run_scheduled_aggregation() is not None
    assert ModelTrainingSession.objects.filter(purpose="PERSONAL", contributed_to_federation=True).count() == 6
    assert ModelRegistry().get_eligible_for_aggregation(7) == []
