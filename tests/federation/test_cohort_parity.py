"""The fast engine against Keras: the same weights, batches and seeds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aivo_core.engine.cohort import CohortEngine
from aivo_core.engine.contract import LearnerTask, LocalTrainingConfig, LocalTrainingEngine
from aivo_core.network import FloatArray, NetworkSpec, default_freeze_layers
from federation.engines import get_engine
from federation.keras_engine import KerasEngine
from models_store.keras_network import build_network, read_weights
from tests.synthetic_samples import TINY, make_samples, make_weights

TOLERANCE = 1e-4
ADAM = LocalTrainingConfig(epochs=2, batch_size=32, dropout=False, bias_epochs=3)
SGD = replace(ADAM, optimiser="sgd", learning_rate=0.05)


def tasks_of(spec: NetworkSpec, base_tail: FloatArray, sizes: tuple[int, ...], personal: float) -> list[LearnerTask]:
    """A learner per size; ``personal`` is how far their tails have moved away from the base's."""
    rng = np.random.default_rng(7)
    moved = [base_tail + rng.normal(scale=personal, size=base_tail.shape).astype(np.float32) for _ in sizes]
    return [LearnerTask(str(n), make_samples(spec, n, n), tail, base_tail, n) for n, tail in zip(sizes, moved, strict=True)]


def compare(spec: NetworkSpec, weights, config: LocalTrainingConfig, tasks: list[LearnerTask], backend: str) -> None:
    engines: list[LocalTrainingEngine] = [KerasEngine(), CohortEngine(backend=backend, threads=2)]
    both = (engine.train(spec=spec, weights=weights, config=config, tasks=tasks) for engine in engines)
    for task, keras, cohort in zip(tasks, *both, strict=True):
        assert keras.error_code == cohort.error_code == ""
        delta = np.linalg.norm(keras.tail - task.start_tail)
        assert delta > 0.0
        assert np.linalg.norm(cohort.tail - keras.tail) <= TOLERANCE * delta
        assert np.linalg.norm(cohort.tail_pass_delta - keras.tail_pass_delta) <= TOLERANCE * delta
        assert cohort.losses == pytest.approx(keras.losses, rel=1e-5, abs=1e-5)
        assert (cohort.steps, cohort.samples) == (keras.steps, keras.samples)
        assert keras.backend.startswith("tensorflow ") and cohort.backend.split()[0] == backend


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize(
    ("config", "personal"),
    [
        (ADAM, 0.0),
        (replace(ADAM, proximal_mu=10.0, batch_size=7, epochs=5), 0.1),
        (replace(ADAM, proximal_mu=0.0, learning_rate=1e-2), 0.1),
        (replace(ADAM, adaptation="tail_then_bias"), 0.1),
        (replace(ADAM, adaptation="difficulty_bias", batch_size=16), 0.1),
        (SGD, 0.1),
        (replace(SGD, momentum=0.9, proximal_mu=0.5), 0.0),
    ],
)
@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_deltas_are_those_of_keras(frozen: int, config: LocalTrainingConfig, personal: float, backend: str) -> None:
    spec = TINY.with_freeze_layers(default_freeze_layers(frozen))
    weights = make_weights(spec, 1)
    compare(spec, weights, config, tasks_of(spec, spec.flatten_tail(weights), (1, 31, 32, 33, 100), personal), backend)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("config", [replace(ADAM, epochs=5, adaptation="tail_then_bias"), SGD], ids=["adam", "sgd"])
def test_deltas_are_those_of_keras_in_the_networks_own_size(config: LocalTrainingConfig, backend: str) -> None:
    spec = NetworkSpec()
    weights = read_weights(build_network(spec, 0), spec)
    compare(spec, weights, config, tasks_of(spec, spec.flatten_tail(weights), (100, 33), 0.01), backend)


def test_with_dropout_deltas_have_the_mean_and_the_spread_of_keras() -> None:
    """Over 400 seeds, along 20 directions. Both engines see the same batches, so that only dropout tells them apart.

    False alarm: |z| > 5.0 for one of 20 means (1.2e-5 in all), the ratio of two variances of 400 outside exp(+-0.5) for one
    of 20 (1.2e-5 in all; normal approximation of its logarithm, standard deviation 0.1).
    """
    config = LocalTrainingConfig(epochs=1, batch_size=8, learning_rate=0.01, optimiser="sgd", proximal_mu=0.0)
    weights = make_weights(TINY, 1)
    tail = TINY.flatten_tail(weights)
    samples = make_samples(TINY, 24, 5)
    tasks = [LearnerTask(str(seed), samples, tail, tail, seed) for seed in range(400)]
    directions = np.random.default_rng(0).normal(size=(TINY.tail_size, 20))

    def projections(engine: LocalTrainingEngine, how: LocalTrainingConfig) -> np.ndarray:
        results = engine.train(spec=TINY, weights=weights, config=how, tasks=tasks)
        return np.stack([result.tail_pass_delta for result in results]) @ directions

    def largest_z(difference: np.ndarray) -> float:
        return float(np.max(np.abs(difference.mean(axis=0)) / (difference.std(axis=0, ddof=1) / np.sqrt(len(difference)))))

    keras = projections(KerasEngine(), config)
    without = projections(CohortEngine(backend="numpy"), replace(config, dropout=False))
    assert largest_z(without - keras) > 10.0  # the test can tell
    spread = (keras - without).var(axis=0)
    for backend in ("numpy", "numba"):
        cohort = projections(CohortEngine(backend=backend), config)
        assert largest_z(cohort - keras) < 5.0
        assert np.max(np.abs(np.log((cohort - without).var(axis=0) / spread))) < 0.5


def test_the_factory_gives_the_engine_with_the_threads_of_the_settings(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from federation import engines

    monkeypatch.setattr(engines, "_engines", {})
    settings.ENGINE_THREADS = 3
    engine = get_engine("cohort")
    assert isinstance(engine, CohortEngine) and engine.threads == 3
    assert get_engine("cohort") is engine


@pytest.mark.django_db
def test_a_memory_limit_too_small_for_one_learner_stops_training_and_rounds_before_anything_starts(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from federation import engines
    from federation.local_training import train_learners
    from federation.models import AggregationRound, ModelTrainingSession
    from federation.rounds import service
    from learners.models import Learner
    from tests.federation.rounds_world import make_world

    make_world(learners=6)
    before = ModelTrainingSession.objects.count()
    monkeypatch.setattr(engines, "_engines", {})
    monkeypatch.setattr(engines, "MEGABYTE", 1000)  # the test's network is small
    settings.ENGINE_MEMORY_MB = 1
    for run in (
        lambda: train_learners(learners=Learner.objects.all(), actor="test"),
        lambda: service.aggregate(actor="test"),
    ):
        with pytest.raises(
            engines.EngineUnavailable, match="AIVO_ENGINE_MEMORY_MB is too small: memory_limit must be at least"
        ) as no:
            run()
        assert no.value.code == "memory_limit"
    assert not AggregationRound.objects.exists() and ModelTrainingSession.objects.count() == before
    settings.ENGINE_MEMORY_MB = 1_000_000
    monkeypatch.setattr(engines, "_engines", {})
    assert service.aggregate(actor="test")["accepted"] == 6
