"""The registry and the aggregation service, by the names of the original."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest
from django.core.files.storage import storages

from aivo_site.errors import UsageError
from aivo_site.jobs.models import Job, JobState
from federation.models import AggregationRound
from federation.registry import ModelRegistry, RegistryError
from federation.rounds.service import AggregationConfig, FederatedAggregationService
from models_store import store
from models_store.errors import NoMainModel, StoreError
from models_store.models import MainModelVersion, PersonalizedModel
from models_store.versions import active_version
from tests.federation.rounds_world import ShrinkingEngine, make_world, set_policy, train_personally, with_events
from tests.models_store.factories import SMALL, make_learner, make_version, random_tail, small_fit
from tests.synthetic_samples import make_weights

pytestmark = pytest.mark.django_db


def write_version(version: str = "aivo-main-v40", seed: int = 4) -> store.VersionFiles:
    return store.write_version_files(
        version=version,
        spec=SMALL,
        weights=make_weights(SMALL, seed),
        encoder=small_fit().encoder,
        content_mix=0.1,
        metrics={"accuracy": 0.5},
        lineage={},
        card="# elsewhere\n",
    )


def test_a_main_model_whose_files_are_whole_is_registered_once_as_a_candidate() -> None:
    files = write_version()
    registry = ModelRegistry().initialize()
    row = registry.register_main_model(
        version="aivo-main-v40", model_path=files.model_path, training_metrics={"loss": 0.42}, architecture=SMALL.to_json()
    )
    assert (row.status, row.origin) == ("CANDIDATE", "IMPORTED")
    assert row.training_metrics == {"accuracy": 0.5, "loss": 0.42}
    assert store.load_version(row).spec == SMALL
    assert registry.register_main_model(version="aivo-main-v40", model_path=files.model_path) == row
    full_path = str(Path(storages["main_models"].location) / files.model_path)  # type: ignore[attr-defined]
    assert registry.register_main_model(version="aivo-main-v40", model_path=full_path) == row
    assert MainModelVersion.objects.count() == 1


def test_a_main_model_that_is_not_there_or_not_what_it_says_is_refused() -> None:
    files = write_version()
    registry = ModelRegistry()
    with pytest.raises(StoreError) as missing:
        registry.register_main_model(version="aivo-main-v40", model_path=str(storages["main_models"].path("nowhere")))
    assert missing.value.code == "missing_file"
    for outside in ("../elsewhere", "/etc", "", "a\0b"):
        with pytest.raises(UsageError) as refused:
            registry.register_main_model(version="aivo-main-v40", model_path=outside)
        assert refused.value.code == "bad_path"
    with pytest.raises(RegistryError) as other:
        registry.register_main_model(version="aivo-main-v41", model_path=files.model_path)
    assert other.value.code == "not_matching"
    with pytest.raises(RegistryError):
        registry.register_main_model(version="aivo-main-v40", model_path=files.model_path, architecture={"input_dim": 3})
    assert MainModelVersion.objects.count() == 0


def test_a_main_model_with_a_damaged_file_is_not_registered() -> None:
    files = write_version()
    storage, name = storages["main_models"], f"{files.model_path}/weights.safetensors"
    with storage.open(name) as file:
        data = bytearray(file.read())
    data[-1] ^= 1
    storage.delete(name)
    store.write_file(alias=store.MAIN_MODELS, path=name, data=bytes(data))
    with pytest.raises(StoreError) as refused:
        ModelRegistry().register_main_model(version="aivo-main-v40", model_path=files.model_path)
    assert refused.value.code == "checksum_mismatch" and MainModelVersion.objects.count() == 0


def test_a_learners_model_is_registered_from_a_tail_in_their_folder() -> None:
    version = make_version()
    learner = with_events(make_learner("learner-123"), 1)
    tail = random_tail(SMALL, 3)
    stored = store.write_tail(learner_id="learner-123", number=1, spec=SMALL, tail=tail)
    registry = ModelRegistry().initialize()
    model = registry.register_learner_model(
        learner_id="learner-123",
        model_path=stored.path,
        source_version=version.version,
        performance_metrics={"accuracy": 0.80, "loss": 0.50, "improvement": 0},
        status="active",
    )
    np.testing.assert_array_equal(store.read_tail(model=model, spec=SMALL), tail)
    assert (model.learner, model.status, model.version) == (learner, "ACTIVE", 1)
    again = registry.register_learner_model(
        learner_id="LEARNER-123", model_path=store.learner_folder("learner-123"), source_version=version.version
    )
    assert (again.pk, again.version) == (model.pk, 1)

    known = registry.get_learner_model("learner-123")
    assert known is not None
    assert known.performance_metrics == {"accuracy": 0.80, "loss": 0.50, "improvement": 0.0}
    assert (known.source_version, known.model_path, known.training_history) == (version.version, stored.path, [])
    assert registry.get_learner_model("nobody") is None and registry.get_learner_model("a\0") is None


def test_a_learners_model_is_refused_where_it_cannot_be_theirs() -> None:
    version = make_version()
    learner = make_learner("learner-1")
    make_learner("learner-2")
    stored = store.write_tail(learner_id="learner-2", number=1, spec=SMALL, tail=random_tail(SMALL, 3))
    own = store.write_tail(learner_id="learner-1", number=1, spec=SMALL, tail=random_tail(SMALL, 3))
    registry = ModelRegistry()

    def register(**changes: object) -> PersonalizedModel:
        values = {"learner_id": "learner-1", "model_path": own.path, "source_version": version.version, **changes}
        return registry.register_learner_model(**values)  # type: ignore[arg-type]

    wrong = [
        {"model_path": stored.path},
        {"model_path": "../../etc/passwd"},
        {"learner_id": "nobody"},
        {"source_version": "aivo-main-v9"},
        {"status": "archived"},
        {"performance_metrics": {"accuracy": "high"}},
        {"performance_metrics": {"accuracy": float("nan")}},
    ]
    for changes in wrong:
        with pytest.raises(UsageError):
            register(**changes)
    learner.consent_training = False
    learner.save()
    with pytest.raises(RegistryError):
        register()
    assert PersonalizedModel.objects.count() == 0


def test_a_file_that_is_no_tail_is_refused() -> None:
    version = make_version()
    make_learner("learner-1")
    path = f"{store.learner_folder('learner-1')}/v0001-00000000.safetensors"
    store.write_file(alias=store.LEARNER_MODELS, path=path, data=b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(StoreError):
        ModelRegistry().register_learner_model(learner_id="learner-1", model_path=path, source_version=version.version)
    assert PersonalizedModel.objects.count() == 0


def test_the_statistics_and_the_history_are_what_the_rows_say(engine: ShrinkingEngine) -> None:
    world = make_world()
    train_personally(world.model(0), seed=30)
    PersonalizedModel.objects.filter(learner=world.learners[0]).update(performance_metrics={"accuracy": 0.25})
    FederatedAggregationService().initialize().run_scheduled_aggregation()
    registry = ModelRegistry().initialize()

    stats = registry.get_statistics()
    assert (stats.active_learner_models, stats.total_federated_updates, stats.main_models) == (6, 1, 2)
    assert stats.average_performance == pytest.approx(0.25)
    known = registry.get_learner_model("fed-0")
    assert known is not None
    history = [(entry["sequence"], entry["purpose"]) for entry in known.training_history]
    assert history == [(1, "PERSONAL"), (2, "PERSONAL"), (3, "CONTRIBUTION")]
    assert known.training_history[-1]["contributed_to_federation"]
    updates = registry.get_federated_updates()
    assert [update.main_model_version for update in updates] == [active_version()]


def test_a_registry_of_a_damaged_active_version_does_not_initialize() -> None:
    version = make_version()
    storages["main_models"].delete(f"{version.model_path}/weights.safetensors")
    with pytest.raises(StoreError):
        ModelRegistry().initialize()


# --- The aggregation service ------------------------------------------------------------------------------------------------


def test_a_scheduled_aggregation_gives_a_job_with_its_contributors_and_improvement(engine: ShrinkingEngine) -> None:
    world = make_world()
    service = FederatedAggregationService(
        {
            "main_model_path": world.version.version,
            "aggregation_strategy": "weighted",
            "minimum_learners": 5,
            "max_stale_days": 7,
            "learning_rate": 0.5,
            "enable_differential_privacy": False,
            "noise_multiplier": 0.1,
            "clip_norm": 1.0,
        }
    ).initialize()

    job_id = service.run_scheduled_aggregation()

    assert job_id is not None
    job = service.get_job_status(job_id)
    assert job is not None and (job.status, job.round_state) == ("SUCCEEDED", "PROMOTED")
    assert sorted(job.contributing_learners) == sorted(str(learner.subject_key) for learner in world.learners)
    assert job.aggregation_results is not None and job.aggregation_results.performance_improvement is not None
    assert job.aggregation_results.performance_improvement > 0
    assert AggregationRound.objects.get().policy["server_learning_rate"] == 0.5


def test_nothing_is_scheduled_with_too_few_learners_or_beside_an_open_round(engine: ShrinkingEngine) -> None:
    make_world(learners=4)
    assert FederatedAggregationService(minimum_learners=5).run_scheduled_aggregation() is None
    assert Job.objects.count() == 0
    set_policy(promotion="manual", minimum_learners=4)
    assert FederatedAggregationService().run_scheduled_aggregation() is not None
    assert FederatedAggregationService().run_scheduled_aggregation() is None
    assert AggregationRound.objects.count() == 1


def test_in_the_background_the_job_waits_for_a_worker(engine: ShrinkingEngine) -> None:
    make_world()
    service = FederatedAggregationService(AggregationConfig(minimum_learners=2))
    job_id = service.run_scheduled_aggregation(background=True)
    assert job_id is not None
    status = service.get_job_status(job_id)
    assert status is not None and status.status == JobState.QUEUED
    assert status.contributing_learners == [] and status.aggregation_results is None
    assert AggregationRound.objects.count() == 0


def test_a_job_of_a_round_that_failed_says_why(engine: ShrinkingEngine) -> None:
    make_world()
    service = FederatedAggregationService(learning_rate=1e39)
    job_id = service.run_scheduled_aggregation()
    assert job_id is not None
    status = service.get_job_status(job_id)
    assert status is not None and (status.status, status.round_state) == ("FAILED", "FAILED")
    assert "float32" in status.reason


def test_a_configuration_that_cannot_be_run_is_refused_before_anything(engine: ShrinkingEngine) -> None:
    with pytest.raises(UsageError):
        FederatedAggregationService(minimum_learner=5)
    with pytest.raises(UsageError) as private:
        FederatedAggregationService(enable_differential_privacy=True, noise_multiplier=0.1, clip_norm=1.0).initialize()
    assert private.value.code == "epsilon_too_large" and "96.12" in str(private.value)
    with pytest.raises(NoMainModel):
        FederatedAggregationService().initialize()
    world = make_world()
    other = make_version(seed=3, active=False)
    with pytest.raises(UsageError) as elsewhere:
        FederatedAggregationService(main_model_path=other.version).initialize()
    assert world.version.version in str(elsewhere.value)
    for unknown in ("no id", str(uuid.uuid4())):
        assert FederatedAggregationService().get_job_status(unknown) is None
