"""Private training: sums against gradients laid out one by one, what one sample can do, noise, chance, accounting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
from hypothesis import given, settings

from aivo_core.engine import compiled_private
from aivo_core.engine.cohort import CohortEngine
from aivo_core.engine.contract import EngineError, LearnerResult, LearnerTask, LocalTrainingConfig, SamplePrivacy
from aivo_core.engine.generator import drop_threshold, kept_scale, layer_key, uniform_words
from aivo_core.engine.passes import FIRST_PASS_CROSS_ENTROPY
from aivo_core.engine.private import CLIP_ALLOWANCE, SQUARE_ALLOWANCE, SystemChance, train_privately
from aivo_core.engine.private_kernel import ChaChaChance, CompiledPrivateTail
from aivo_core.engine.private_reference import NumpyPrivateTail
from aivo_core.engine.reference import Learner
from aivo_core.engine.tail import TailBase, tail_base
from aivo_core.network import FloatArray, NetworkSpec, default_freeze_layers
from aivo_core.ordinal import level_weights
from aivo_core.privacy import DoubleArray
from federation.privacy.accountant import sample_level_release
from tests.core.test_cohort_engine import BASE_TAIL, LARGE, WEIGHTS, task, train
from tests.synthetic_samples import TINY, make_weights

FALSE_ALARM = 1e-6
PRIVATE = LocalTrainingConfig(
    epochs=2, batch_size=8, adaptation="tail", sample_clip_norm=0.5, sample_noise_multiplier=1.0, learning_rate=0.01
)
PrivateTail = NumpyPrivateTail | CompiledPrivateTail
Chance = SystemChance | ChaChaChance


@pytest.fixture(params=["numpy", "numba"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


class SeededChance:
    """Repeats itself, unlike the product's."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def random_bytes(self, count: int) -> bytes:
        return self._rng.bytes(count)

    def noise(self, size: int, std: float) -> DoubleArray:
        return self._rng.normal(0.0, std, size)


def private_tail(backend: str, base: TailBase, config: LocalTrainingConfig, one: LearnerTask) -> PrivateTail:
    if backend == "numpy":
        return NumpyPrivateTail(base, config, one)
    tail = CompiledPrivateTail(base, config)
    tail.begin(one)
    return tail


def sum_of(tail: PrivateTail, rows: list[int], keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    with np.errstate(all="ignore"):
        tail.clipped_sum(np.array(rows, dtype=np.int32), keys)
    return tail.last_sum().astype(np.float64)


def keys_of(count: int, seed: int = 7) -> npt.NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


# --- Brute force: the objective of one sample in double precision, differentiated by complex steps --------------------------


class Objective:
    """One sample's objective as a function of the tail; shares nothing with the engine but the layout and the mask's words."""

    def __init__(self, base: TailBase, one: LearnerTask, *, dropout: bool) -> None:
        self._base, self._task, self._dropout = base, one, dropout
        self._learner = Learner.of(base, one.samples)

    def gradient(self, tail: FloatArray, sample: int, key: int) -> npt.NDArray[np.float64]:
        step = 1e-30
        points = tail.astype(np.complex128) + 1j * step * np.eye(len(tail))
        return self._values(points, sample, key).imag / step

    def _values(self, tails: npt.NDArray[np.complex128], sample: int, key: int) -> npt.NDArray[np.complex128]:
        """(points, size) -> (points,)"""
        layout = self._base.layout
        hidden = [self._hidden(tails, rows[sample], key, n) for n, rows in enumerate((self._learner.first, self._learner.second))]
        value = np.zeros(len(tails), dtype=np.complex128)
        for head, labels in ((layout.content, self._learner.content), (layout.path, self._learner.path)):
            value -= log_softmax(self._logits(tails, head, hidden[0]))[:, labels[sample]]
        weights = level_weights(self._task.samples.level)[sample].astype(np.float64)
        score = float(self._task.samples.score[sample])
        for one_pass in hidden:
            success = np.exp(log_softmax(self._logits(tails, layout.difficulty, one_pass))) @ weights
            if 1e-6 <= success[0].real <= 1 - 1e-6:
                value -= 0.5 * (score * np.log(success) + (1 - score) * np.log(1 - success))
        return value

    def _hidden(self, tails: Any, features: FloatArray, key: int, one_pass: int) -> npt.NDArray[np.complex128]:
        values = np.broadcast_to(features.astype(np.complex128), (len(tails), len(features)))
        for layer, place in enumerate(self._base.layout.blocks):
            kernel = tails[:, place.kernel : place.kernel + place.rows * place.units].reshape(-1, place.rows, place.units)
            bias, gamma, beta = (tails[:, at : at + place.units] for at in (place.bias, place.gamma, place.beta))
            values = np.einsum("pk,pku->pu", values, kernel) + bias
            values = np.where(values.real > 0, values, 0)
            mean, inverse = (part[layer].astype(np.float64) for part in (self._base.mean, self._base.inverse_deviation))
            values = (values - mean) * inverse * gamma + beta
            if self._dropout:
                words = uniform_words(layer_key(key, one_pass, layer), place.units)
                values = values * np.where(words >= drop_threshold(place.rate), float(kept_scale(place.rate)), 0.0)
        return values

    def _logits(self, tails: Any, head: Any, hidden: Any) -> npt.NDArray[np.complex128]:
        width = hidden.shape[1]
        kernel = tails[:, head.kernel : head.kernel + width * head.units].reshape(-1, width, head.units)
        return np.einsum("pk,pku->pu", hidden, kernel) + tails[:, head.bias : head.bias + head.units]


def log_softmax(logits: npt.NDArray[np.complex128]) -> npt.NDArray[np.complex128]:
    shifted = logits - logits.real.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("share", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_the_sum_is_that_of_gradients_clipped_one_by_one(backend: str, frozen: int, dropout: bool, share: float) -> None:
    spec = TINY.with_freeze_layers(default_freeze_layers(min(frozen, len(TINY.hidden_layers))))
    weights = make_weights(spec, 1)
    one = task(n=12, spec=spec, tail=spec.flatten_tail(weights))
    base, keys, rows = tail_base(spec, weights), keys_of(6), [0, 2, 3, 7, 10, 11]
    objective = Objective(base, one, dropout=dropout)
    gradients = np.array([objective.gradient(one.start_tail, row, int(key)) for row, key in zip(rows, keys, strict=True)])
    norms = np.linalg.norm(gradients, axis=1)
    clip = share * float(np.median(norms))
    clipped = gradients * np.minimum(1.0, clip / norms)[:, None]
    found = sum_of(private_tail(backend, base, replace(PRIVATE, dropout=dropout, sample_clip_norm=clip), one), rows, keys)
    assert np.linalg.norm(found - clipped.sum(axis=0)) <= 1e-5 * np.linalg.norm(clipped, axis=1).sum()
    assert (norms > clip).sum() == {0.01: 6, 1.0: 3, 100.0: 0}[share]


# --- What one sample can do -------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=60, deadline=None)
@given(share=st.floats(1e-6, 2.0), seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1.0, 30.0]))
@pytest.mark.parametrize("computed_by", ["numpy", "numba"])
@pytest.mark.parametrize("spec", [TINY, LARGE], ids=["tiny", "large"])
def test_one_samples_gradient_is_within_the_clipping_norm_rounding_included(
    computed_by: str, spec: NetworkSpec, share: float, seed: int, scale: float
) -> None:
    weights = make_weights(spec, seed % 5)
    tail = spec.flatten_tail(weights) * np.float32(scale)
    one, base, keys = task(n=3, seed=seed % 1000, spec=spec, tail=tail), tail_base(spec, weights), keys_of(1, seed)
    whole = np.linalg.norm(sum_of(private_tail(computed_by, base, replace(PRIVATE, sample_clip_norm=1e12), one), [1], keys))
    clip = float(share * whole)
    if not 1e-12 <= clip <= 1e12:
        return
    norm = np.linalg.norm(sum_of(private_tail(computed_by, base, replace(PRIVATE, sample_clip_norm=clip), one), [1], keys))
    assert norm <= clip
    assert norm >= (1.0 - 1e-4) * min(clip, whole)


@pytest.mark.parametrize("clip", [1e-3, 0.5, 5.0])
@pytest.mark.parametrize("spec", [TINY, LARGE], ids=["tiny", "large"])
def test_one_sample_more_moves_the_sum_by_at_most_the_clipping_norm(backend: str, spec: NetworkSpec, clip: float) -> None:
    """And by its own clipped gradient: no other sample's dropout changes."""
    weights = make_weights(spec, 1)
    one, base = task(n=40, spec=spec, tail=spec.flatten_tail(weights)), tail_base(spec, weights)
    tail = private_tail(backend, base, replace(PRIVATE, sample_clip_norm=clip), one)
    rows, keys = list(range(0, 40, 2)), keys_of(20)
    whole = sum_of(tail, rows, keys)
    for place in (0, 7, 19):
        others = sum_of(tail, rows[:place] + rows[place + 1 :], np.delete(keys, place))
        alone = sum_of(tail, [rows[place]], keys[place : place + 1])
        moved = whole - others
        assert np.linalg.norm(moved) <= clip * (1.0 + 1e-5)
        assert np.linalg.norm(moved - alone) <= 1e-5 * clip


def test_both_passes_of_a_sample_are_clipped_as_one(backend: str) -> None:
    """Two rows clipped apart would move the sum by up to twice the clipping norm."""
    one = task(n=4)
    one = replace(one, samples=replace(one.samples, second=one.samples.first))
    tail = private_tail(backend, tail_base(TINY, WEIGHTS), replace(PRIVATE, sample_clip_norm=1e-3, dropout=False), one)
    for row in range(4):
        norm = np.linalg.norm(sum_of(tail, [row], keys_of(1)))
        assert (1.0 - 1e-4) * 1e-3 <= norm <= 1e-3


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_sample_whose_gradient_is_not_finite_adds_nothing(backend: str, frozen: int) -> None:
    """It overflows in the tail, or in the trunk already."""
    spec = TINY.with_freeze_layers(default_freeze_layers(frozen))
    weights = make_weights(spec, 1)
    weights["shared_dense_1/kernel"] *= np.float32(100.0)
    one = task(n=6, spec=spec, tail=spec.flatten_tail(weights) * np.float32(100.0))
    huge = one.samples.first.copy()
    huge[2] = np.float32(3e38)
    base, keys = tail_base(spec, weights), keys_of(6)
    with np.errstate(all="ignore"):
        tail = private_tail(backend, base, PRIVATE, replace(one, samples=replace(one.samples, first=huge)))
    with_it = sum_of(tail, [0, 1, 2, 3, 4, 5], keys)
    without = sum_of(tail, [0, 1, 3, 4, 5], np.delete(keys, 2))
    assert np.isfinite(with_it).all() and np.linalg.norm(without) > 0.1
    assert np.linalg.norm(with_it - without) <= 1e-5 * PRIVATE.sample_clip_norm
    assert not sum_of(tail, [2], keys[2:3]).any()


def test_a_batch_larger_than_expected_finds_room_and_keeps_what_was_trained(backend: str) -> None:
    one, base = task(n=100), tail_base(TINY, WEIGHTS)
    config = replace(PRIVATE, batch_size=2)
    grown, fresh = private_tail(backend, base, config, one), private_tail(backend, base, replace(config, batch_size=100), one)
    for tail in (grown, fresh):
        sum_of(tail, [3], keys_of(1))
        tail.noised_step(np.zeros(TINY.tail_size), 2, np.float32(0.01))
    assert sum_of(grown, list(range(100)), keys_of(100)).tobytes() == sum_of(fresh, list(range(100)), keys_of(100)).tobytes()
    assert grown.tail().tobytes() == fresh.tail().tobytes() != BASE_TAIL.tobytes()


# --- Steps ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"optimiser": "sgd", "momentum": 0.9}, {"proximal_mu": 0.0}, {"batch_size": 500}])
@pytest.mark.parametrize("spec", [TINY, LARGE], ids=["tiny", "large"])
def test_both_backends_take_the_same_steps_by_the_same_chance(spec: NetworkSpec, changes: dict[str, Any]) -> None:
    weights = make_weights(spec, 1)
    one, base = task(n=30, spec=spec, tail=spec.flatten_tail(weights)), tail_base(spec, weights)
    one = replace(one, anchor_tail=one.start_tail + np.float32(0.01))
    config = replace(PRIVATE, sample_noise_multiplier=0.1, **changes)
    numpy, numba = (
        train_privately(config, one, lambda b=b: private_tail(b, base, config, one), SeededChance(5)) for b in ("numpy", "numba")
    )
    moved = np.linalg.norm(numpy.tail - one.start_tail)
    assert moved > 0.01
    assert np.linalg.norm(numba.tail - numpy.tail) <= 1e-4 * moved
    assert numba.privacy == numpy.privacy and numba.steps == numpy.steps


@pytest.mark.parametrize("mu", [0.0, 3.0])
def test_a_step_is_sum_and_noise_over_the_expected_size_and_then_the_proximal_term(backend: str, mu: float) -> None:
    one, base = task(n=10), tail_base(TINY, WEIGHTS)
    one = replace(one, anchor_tail=one.start_tail + np.float32(0.5))
    tail = private_tail(backend, base, replace(PRIVATE, optimiser="sgd", proximal_mu=mu), one)
    total = sum_of(tail, [1, 4], keys_of(2))
    noise = np.random.default_rng(1).normal(size=TINY.tail_size)
    tail.noised_step(noise.copy(), 8, np.float32(0.25))
    expected = one.start_tail - 0.25 * ((total + noise) / 8 + mu * (one.start_tail - one.anchor_tail))
    assert tail.tail() == pytest.approx(expected, abs=1e-6)


# --- Noise ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1e-6, 2e-6])
def test_training_has_the_noise_that_is_accounted_for(backend: str, clip: float) -> None:
    """Gradients are clipped to next to nothing: what is left of T steps is a Gaussian of standard deviation z C sqrt(T) / b."""
    config = replace(
        PRIVATE, optimiser="sgd", learning_rate=1.0, proximal_mu=0.0, sample_clip_norm=clip, sample_noise_multiplier=1e6
    )
    results = train(config, *(task(str(i), 20, i) for i in range(12)), backend=backend)
    moved = np.concatenate([result.tail.astype(np.float64) - BASE_TAIL for result in results])
    steps = -(-2 * 20 // 8)
    std = 1e6 * clip * steps**0.5 / 8
    low, high = scipy.stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], moved.size)
    assert low <= np.sum(np.square(moved / std)) <= high
    assert scipy.stats.kstest(moved / std, "norm").pvalue > FALSE_ALARM
    assert abs(np.corrcoef(results[0].tail - BASE_TAIL, results[1].tail - BASE_TAIL)[0, 1]) < 5.0 / TINY.tail_size**0.5


def test_nothing_that_a_program_can_set_repeats_private_training(backend: str) -> None:
    found = []
    for _ in range(2):
        np.random.seed(0)
        found.append(train(PRIVATE, task(), backend=backend)[0].tail.tobytes())
    assert found[0] != found[1]


# --- What comes back --------------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=60, deadline=None)
@given(epochs=st.integers(1, 4), batch_size=st.integers(1, 50), samples=st.integers(1, 40))
def test_a_result_says_what_the_accountant_needs(epochs: int, batch_size: int, samples: int) -> None:
    config = replace(PRIVATE, epochs=epochs, batch_size=batch_size)
    (result,) = train(config, task(n=samples), backend="numba")
    release = sample_level_release(epochs=epochs, batch_size=batch_size, dataset_size=samples, noise_multiplier=1.0)
    assert result.privacy == SamplePrivacy(release.steps, release.q_num, release.q_den, 1.0, 0.5)
    assert result.steps == release.steps


def test_a_result_tells_no_loss_and_its_delta_is_the_pass(backend: str) -> None:
    (result,) = train(PRIVATE, task(), backend=backend)
    assert (result.error_code, result.losses) == ("", ())
    assert (result.tail_pass_delta == result.tail - BASE_TAIL).all() and result.tail_pass_delta.any()
    assert (
        train(replace(PRIVATE, sample_clip_norm=None, sample_noise_multiplier=None), task(), backend=backend)[0].privacy is None
    )


def test_threads_and_a_memory_limit_change_nothing_that_can_be_told(backend: str) -> None:
    results = train(PRIVATE, *(task(str(i), 5 + 20 * i, i) for i in range(6)), backend=backend, threads=2, memory_limit=10**8)
    assert [r.error_code for r in results] == [""] * 6
    assert all(np.isfinite(r.tail).all() for r in results)
    refused = train(PRIVATE, task(n=3000), backend=backend, memory_limit=2 * 10**6)[0]
    assert refused.error_code == "memory_limit"


def test_training_that_diverges_says_so_and_what_it_released(backend: str) -> None:
    config = replace(PRIVATE, optimiser="sgd", learning_rate=999.0, sample_clip_norm=1e12, sample_noise_multiplier=1e6)
    config = replace(config, epochs=40, proximal_mu=1e6)
    result: LearnerResult = train(config, task(), backend=backend)[0]
    assert result.error_code == "diverged" and result.tail is None
    assert result.privacy is not None and result.privacy.steps == 100


def test_private_training_with_much_less_noise_than_gradient_learns(backend: str) -> None:
    """Plain training's objective falls when the clipped and noised steps are taken."""
    config = replace(PRIVATE, epochs=60, sample_clip_norm=5.0, sample_noise_multiplier=0.01, proximal_mu=0.0)
    one = task(n=40)
    (trained,) = train(config, one, backend=backend)
    probe = LocalTrainingConfig(epochs=1, batch_size=40, adaptation="tail", proximal_mu=0.0, dropout=False, learning_rate=1e-9)
    before, after = (
        train(probe, replace(one, start_tail=tail), backend="numpy")[0].losses[0] for tail in (BASE_TAIL, trained.tail)
    )
    assert after < 0.8 * before


# --- Bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sample_clip_norm": None}, "sample_clip_norm"),
        ({"sample_noise_multiplier": None}, "sample_noise_multiplier"),
        *(({name: value}, name) for name in ("sample_clip_norm", "sample_noise_multiplier")
          for value in (0.0, -1.0, float("nan"), float("inf"), 1e-13, 1e13)),
        ({"adaptation": "tail_then_bias"}, "adaptation"),
        ({"adaptation": "difficulty_bias"}, "adaptation"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_not_private_as_a_whole_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(EngineError, match=field) as caught:
        replace(PRIVATE, **changes)
    assert caught.value.code == "bad_config"


def test_engines_that_cannot_train_privately_refuse(backend: str) -> None:
    engine = CohortEngine(backend=backend, objective=FIRST_PASS_CROSS_ENTROPY)
    with pytest.raises(EngineError, match="objective must be product") as caught:
        engine.train(spec=TINY, weights=WEIGHTS, config=PRIVATE, tasks=[task()])
    assert caught.value.code == "bad_config"


def test_both_backends_clip_with_the_same_allowances() -> None:
    assert (compiled_private.CLIP_ALLOWANCE, compiled_private.SQUARE_ALLOWANCE) == (CLIP_ALLOWANCE, SQUARE_ALLOWANCE)
