"""``FederatedLearningManager``: the original's interface over this product's services."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aivo_core.privacy import global_norm
from federation import strategies
from federation.engines import EngineUnavailable
from federation.errors import LocalTrainingError, ManagerError
from federation.local_training import FederatedLearningManager
from federation.manager import LocalModelConfig, LocalUpdate
from federation.privacy.accountant import AccountantError
from learners.models import Learner
from models_store import store, versions
from models_store.errors import NoMainModel, UnknownVersion
from models_store.files import LEARNER_MODELS, MAIN_MODELS, location
from models_store.models import MainModelVersion
from tests.federation.rounds_world import ShrinkingEngine, make_world
from tests.federation.test_local_training import Recording, use
from tests.models_store.factories import SMALL, make_version
from tests.synthetic_samples import make_samples

__all__ = ["use"]
pytestmark = pytest.mark.django_db


@pytest.fixture
def manager() -> FederatedLearningManager:
    return FederatedLearningManager()


def data(n: int = 40) -> Any:
    return make_samples(SMALL, n, 0)


def update(key: str, seed: int, samples: int = 10, base: str = "aivo-main-v1") -> LocalUpdate:
    delta = np.random.default_rng(seed).normal(scale=0.01, size=SMALL.tail_size).astype(np.float32)
    return LocalUpdate(key, base, delta, samples, global_norm(delta), global_norm(delta), (1.0,), 0.1)


# --- train_local_model ---------------------------------------------------------------------------------------------------


def test_local_training_gives_what_it_would_change_and_stores_nothing(
    manager: FederatedLearningManager, engine: ShrinkingEngine
) -> None:
    made = make_world(learners=1, evaluators=0, sessions=False)
    base = store.load_version(made.version)
    before = made.model(0)
    result = manager.train_local_model({"learner_model_path": "fed-0", "local_epochs": 2}, data())
    assert (result.key, result.base_version, result.samples) == (str(made.learners[0].subject_key), made.version.version, 40)
    assert result.delta.shape == base.tail.shape
    assert result.norm == result.unclipped_norm == pytest.approx(global_norm(result.delta))
    after = made.model(0)
    assert (after.version, after.weights_sha256) == (before.version, before.weights_sha256)
    assert not after.training_sessions.exists()


def test_the_whole_update_is_clipped_to_one_norm(manager: FederatedLearningManager, engine: ShrinkingEngine) -> None:
    make_world(learners=1, evaluators=0, sessions=False)
    free = manager.train_local_model(LocalModelConfig("fed-0"), data())
    bound = manager.train_local_model(LocalModelConfig("fed-0", clip_norm=free.norm / 4), data())
    assert bound.norm <= free.norm / 4
    assert bound.unclipped_norm == free.norm
    assert np.allclose(bound.delta, free.delta / 4, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("place", ["id", "folder", "file", "full path", "without a learner"])
def test_a_learners_model_is_found_by_id_and_by_path(use: Any, place: str) -> None:
    engine = use(Recording())
    made = make_world(learners=2, evaluators=0, sessions=True)
    model = made.model(1)
    path = {
        "id": "fed-1",
        "folder": model.weights_path.rpartition("/")[0],
        "file": model.weights_path,
        "full path": location(alias=LEARNER_MODELS, path=model.weights_path),
        "without a learner": "",
    }[place]
    FederatedLearningManager().train_local_model({"learner_model_path": path}, data())
    base = store.load_version(made.version)
    expected = base.tail if place == "without a learner" else store.read_tail(model=model, spec=SMALL)
    assert np.array_equal(engine.tasks[0].start_tail, expected)
    assert np.array_equal(engine.tasks[0].anchor_tail, base.tail)


@pytest.mark.parametrize("path", ["nobody", "../../etc/passwd", "/etc/fed-0", "id-nobody/v0001-00000000.safetensors", "a\0b"])
def test_a_path_of_no_learners_model_is_refused(manager: FederatedLearningManager, engine: ShrinkingEngine, path: str) -> None:
    make_world(learners=1, evaluators=0, sessions=False)
    with pytest.raises(ManagerError) as caught:
        manager.train_local_model({"learner_model_path": path}, data())
    assert caught.value.code == "bad_path"


def test_a_learner_without_consent_is_not_trained(manager: FederatedLearningManager, engine: ShrinkingEngine) -> None:
    make_world(learners=1, evaluators=0, sessions=False)
    Learner.objects.update(consent_training=False)
    with pytest.raises(LocalTrainingError) as caught:
        manager.train_local_model({"learner_model_path": "fed-0"}, data())
    assert caught.value.code == "no_consent_training"


@pytest.mark.parametrize(("config", "code", "field"), [
    ({"local_epochs": 0}, "bad_config", "epochs"),
    ({"batch_size": 0}, "bad_config", "batch_size"),
    ({"learning_rate": -1.0}, "bad_config", "learning_rate"),
    ({"learning_rate": "fast"}, "bad_config", "learning_rate"),
    ({"local_epochs": 2.5}, "bad_config", "local_epochs"),
    ({"seed": True}, "bad_config", "seed"),
    ({"clip_norm": "1"}, "bad_config", "clip_norm"),
    ({"clip_norm": 0.0}, "bad_config", "clipping norm"),
    ({"adaptation": "head"}, "bad_config", "adaptation"),
    ({"noise_multiplier": 0.1}, "privacy_not_available", "noise_multiplier"),
    ({"localEpochs": 5}, "unknown_field", "local_epochs"),
])  # fmt: skip
def test_a_wrong_configuration_is_refused_by_field(
    manager: FederatedLearningManager, engine: ShrinkingEngine, config: dict[str, Any], code: str, field: str
) -> None:
    make_version()
    with pytest.raises(ManagerError, match=field) as caught:
        manager.train_local_model(config, data())
    assert caught.value.code == code
    assert engine.trained == 0


def test_noise_is_off_unless_asked_for(manager: FederatedLearningManager, engine: ShrinkingEngine) -> None:
    make_version()
    plain = manager.train_local_model({}, data())
    without = manager.train_local_model({"noise_multiplier": 0.0}, data())
    assert np.array_equal(plain.delta, without.delta)


def test_without_samples_or_a_main_model_nothing_is_trained(manager: FederatedLearningManager) -> None:
    with pytest.raises(NoMainModel):
        manager.train_local_model({}, data())
    make_version()
    with pytest.raises(LocalTrainingError) as caught:
        manager.train_local_model({}, data().take(slice(0, 0)))
    assert caught.value.code == "no_samples"


def test_an_unknown_engine_is_refused_at_once() -> None:
    with pytest.raises(EngineUnavailable):
        FederatedLearningManager(engine="torch")


# --- aggregate_updates ---------------------------------------------------------------------------------------------------


def test_aggregation_is_the_strategys_own_and_does_not_depend_on_the_order(manager: FederatedLearningManager) -> None:
    updates = [update(f"learner {i}", seed=i, samples=10 * (i + 1)) for i in range(5)]
    outcome = manager.aggregate_updates(updates, "fedavg")
    weights = np.array([u.samples for u in updates], dtype=np.float64)
    expected = (weights[:, None] * np.stack([u.delta for u in updates]).astype(np.float64)).sum(axis=0) / weights.sum()
    assert np.allclose(outcome.aggregated_weights, expected, rtol=1e-6, atol=1e-9)
    assert np.array_equal(outcome.aggregated_weights, manager.aggregate_updates(updates[::-1], "fedavg").aggregated_weights)
    assert (outcome.samples, sum(outcome.weights.values())) == (150, pytest.approx(1.0))


def test_measured_quality_counts_where_the_strategy_uses_it(manager: FederatedLearningManager) -> None:
    updates = [update("a", 1), update("b", 2)]
    outcome = manager.aggregate_updates(updates, "weighted", quality={"a": 1.0, "b": 0.5}, parameters={"weight_cap": 1.0})
    assert outcome.weights == pytest.approx({"a": 2 / 3, "b": 1 / 3})


@pytest.mark.parametrize(("updates", "strategy", "code"), [
    ([], "fedavg", "no_updates"),
    ([update("a", 1), update("a", 2)], "fedavg", "duplicate_learner"),
    ([update("a", 1), update("b", 2, base="aivo-main-v2")], "fedavg", "different_bases"),
    ([update("a", 1)], "fedsum", "unknown_strategy"),
    ([update("a", 1, samples=0)], "fedavg", "zero_weight"),
])  # fmt: skip
def test_updates_that_do_not_go_together_are_refused(
    manager: FederatedLearningManager, updates: list[LocalUpdate], strategy: str, code: str
) -> None:
    with pytest.raises(ManagerError) as caught:
        manager.aggregate_updates(updates, strategy)
    assert caught.value.code == code
    if code == "unknown_strategy":
        assert all(name in str(caught.value) for name in strategies.names())


# --- update_main_model ---------------------------------------------------------------------------------------------------


def test_a_new_main_model_is_a_candidate_and_the_old_one_stays(manager: FederatedLearningManager) -> None:
    version = make_version()
    base = store.load_version(version)
    outcome = manager.aggregate_updates([update("a", 1, base=version.version)], "fedavg")
    row = manager.update_main_model(version.version, outcome, 0.5)
    loaded = store.load_version(row)
    assert (row.status, row.parent, row.origin) == ("CANDIDATE", version, "FEDERATED")
    assert np.allclose(loaded.tail, base.tail + 0.5 * outcome.aggregated_weights, atol=1e-7)
    assert all(np.array_equal(loaded.weights[n], base.weights[n]) for n in loaded.weights if n.startswith("shared_dense_1"))
    assert versions.active_version() == version
    store.clear_loaded_versions()
    assert np.array_equal(store.load_version(version).tail, base.tail)


def test_the_same_update_twice_gives_one_version(manager: FederatedLearningManager) -> None:
    version = make_version()
    outcome = manager.aggregate_updates([update("a", 1, base=version.version)], "fedavg")
    first = manager.update_main_model(version.version, outcome)
    assert manager.update_main_model(version.version, outcome.aggregated_weights) == first
    assert manager.update_main_model(version.version, outcome, 0.5) != first
    assert MainModelVersion.objects.count() == 3


def test_the_stores_own_path_means_the_active_version(manager: FederatedLearningManager) -> None:
    version = make_version()
    row = manager.update_main_model(location(alias=MAIN_MODELS, path=""), update("a", 1).delta)
    assert row.parent == version


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_not_positive_is_refused(manager: FederatedLearningManager, rate: float) -> None:
    version = make_version()
    with pytest.raises(ManagerError, match="learning_rate"):
        manager.update_main_model(version.version, update("a", 1).delta, rate)
    assert MainModelVersion.objects.count() == 1


def test_weights_that_do_not_fit_are_refused_and_change_nothing(manager: FederatedLearningManager) -> None:
    version = make_version()
    broken = update("a", 1).delta.copy()
    broken[0] = np.nan
    other = manager.aggregate_updates([update("a", 1, base="aivo-main-v9")], "fedavg")
    for weights, code in ((np.zeros(3, np.float32), "wrong_shape"), (broken, "not_finite"), (other, "different_bases")):
        with pytest.raises(ManagerError) as caught:
            manager.update_main_model(version.version, weights)
        assert caught.value.code == code
    with pytest.raises(UnknownVersion):
        manager.update_main_model("aivo-main-v77", update("a", 1).delta)
    assert MainModelVersion.objects.count() == 1


# --- calculate_privacy_budget --------------------------------------------------------------------------------------------


def test_the_originals_default_noise_costs_thousands(manager: FederatedLearningManager) -> None:
    assert manager.calculate_privacy_budget(5, 32, 1000, 0.1, 1e-5) > 1000.0


def test_more_noise_costs_less_and_none_is_refused(manager: FederatedLearningManager) -> None:
    costs = [
        manager.calculate_privacy_budget(epochs=5, batch_size=32, dataset_size=1000, noise_multiplier=z, delta=1e-5)
        for z in (0.5, 1.0, 2.0)
    ]
    assert costs == sorted(costs, reverse=True)
    with pytest.raises(AccountantError):
        manager.calculate_privacy_budget(5, 32, 1000, 0.0, 1e-5)
