from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivo_core.inference import HeadOutputs, blend, fold, fold_tail, fold_trunk, forward_each, trunk_features
from aivo_core.network import NetworkError, NetworkSpec, default_freeze_layers
from tests.synthetic_samples import TINY, logits_in_double, make_weights, softmax_in_double

HEADS = ("content", "difficulty", "path")


def rows(spec: NetworkSpec, n: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, spec.input_dim)).astype(np.float32)


def largest_gap(outputs: HeadOutputs, expected: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(getattr(outputs, name) - expected[f"{name}_output"]).max()) for name in HEADS)


@pytest.mark.parametrize("frozen", [0, 1, 2, 4])
def test_folded_network_agrees_with_the_unfolded_one_wherever_the_trunk_ends(frozen: int) -> None:
    spec = NetworkSpec(freeze_layers=default_freeze_layers(frozen))
    weights = make_weights(spec, 1)
    x = rows(spec, 50)
    expected = {name: softmax_in_double(value) for name, value in logits_in_double(spec, weights, x).items()}
    assert largest_gap(fold(spec, weights).forward(x), expected) < 1e-5


def test_folded_network_agrees_with_keras_to_1e_5_with_moved_statistics() -> None:
    from models_store.keras_network import build_network, write_weights

    spec = NetworkSpec()
    weights = make_weights(spec, 2)
    model = build_network(spec, 0)
    write_weights(model, spec, weights)
    x = rows(spec, 200)
    expected = {name: value.numpy() for name, value in model(x, training=False).items()}
    assert largest_gap(fold(spec, weights).forward(x), expected) < 1e-5


def test_trunk_features_are_the_keras_trunk_output() -> None:
    from models_store.keras_network import build_network, trunk_of, write_weights

    spec = NetworkSpec()
    weights = make_weights(spec, 3)
    model = build_network(spec, 0)
    write_weights(model, spec, weights)
    x = rows(spec, 40)
    features = trunk_features(fold_trunk(spec, weights), x)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, trunk_of(model, spec)(x).numpy(), atol=2e-5, rtol=1e-5)


def test_a_single_row_gives_what_it_gives_in_a_batch() -> None:
    spec = NetworkSpec()
    network = fold(spec, make_weights(spec, 4))
    x = rows(spec, 30)
    together = network.forward(x)
    for i in range(len(x)):
        alone = network.forward(x[i : i + 1])
        for name in HEADS:
            np.testing.assert_allclose(getattr(alone, name)[0], getattr(together, name)[i], atol=1e-6)


def test_a_learners_tail_stands_on_the_shared_trunk_and_reads_only_the_bases_statistics() -> None:
    weights = make_weights(TINY, 5)
    tail = TINY.flatten_tail(make_weights(TINY, 6))
    x = rows(TINY, 20)
    expected = fold(TINY, TINY.with_tail(weights, tail)).forward(x)
    folded = fold(TINY, weights).with_tail(fold_tail(TINY, weights, tail)).forward(x)
    own_tail_removed = {name: value for name, value in weights.items() if name not in {t.name for t in TINY.tail_tensors}}
    without = fold(TINY, weights).with_tail(fold_tail(TINY, own_tail_removed, tail)).forward(x)
    for field in fields(HeadOutputs):
        np.testing.assert_array_equal(getattr(folded, field.name), getattr(expected, field.name))
        np.testing.assert_array_equal(getattr(without, field.name), getattr(expected, field.name))


def test_probabilities_are_distributions_even_for_extreme_inputs() -> None:
    weights = make_weights(TINY, 7)
    outputs = fold(TINY, weights).forward(rows(TINY, 10) * np.float32(1e6))
    for name in HEADS:
        values = getattr(outputs, name)
        assert values.dtype == np.float32 and np.isfinite(values).all()
        np.testing.assert_allclose(values.sum(axis=1), 1.0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(b=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
def test_a_blend_lies_between_main_and_tail(b: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    main, tail = (rng.normal(size=20).astype(np.float32) for _ in range(2))
    mixed = blend(main, tail, b)
    assert mixed.dtype == np.float32
    assert (mixed >= np.minimum(main, tail) - 1e-5).all() and (mixed <= np.maximum(main, tail) + 1e-5).all()
    np.testing.assert_allclose(mixed, (1 - b) * main.astype(float) + b * tail.astype(float), atol=1e-5)


def test_a_blend_of_0_is_main_and_of_1_the_tail_bit_for_bit_and_a_copy() -> None:
    main, tail = np.full(3, 0.1, np.float32), np.full(3, 1e7, np.float32)
    assert blend(main, tail, 0).tobytes() == main.tobytes() and blend(main, tail, 0) is not main
    assert blend(main, tail, 1).tobytes() == tail.tobytes() and blend(main, tail, 1) is not tail


@pytest.mark.parametrize(
    ("x", "code"),
    [
        (np.zeros((2, 5), np.float32), "wrong_shape"),
        (np.zeros(6, np.float32), "wrong_shape"),
        (np.zeros((2, 6), np.float64), "wrong_dtype"),
    ],
)
def test_rows_of_another_shape_or_dtype_are_refused(x: np.ndarray, code: str) -> None:
    with pytest.raises(NetworkError) as caught:
        fold(TINY, make_weights(TINY, 8)).forward(x)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("main", "tail", "b", "code"),
    [
        (np.zeros(3, np.float32), np.zeros(4, np.float32), 0.5, "wrong_shape"),
        (np.zeros(3, np.float32), np.zeros(3), 0.5, "wrong_dtype"),
        (np.zeros(3, np.float32), np.zeros(3, np.float32), 1.5, "bad_blend"),
        (np.zeros(3, np.float32), np.zeros(3, np.float32), float("nan"), "bad_blend"),
    ],
)
def test_blends_that_make_no_sense_are_refused(main: np.ndarray, tail: np.ndarray, b: float, code: str) -> None:
    with pytest.raises(NetworkError) as caught:
        blend(main, tail, b)
    assert caught.value.code == code


def test_folding_refuses_what_it_cannot_fold() -> None:
    weights = make_weights(TINY, 9)
    for broken, code in (
        ({**weights, "shared_bn_2/moving_variance": -weights["shared_bn_2/moving_variance"]}, "bad_statistics"),
        ({**weights, "shared_bn_1/moving_variance": np.full(5, np.nan, np.float32)}, "bad_statistics"),
        ({k: v for k, v in weights.items() if k != "shared_bn_1/gamma"}, "wrong_name"),
        ({**weights, "path_output/bias": np.zeros(1, np.float32)}, "wrong_shape"),
    ):
        with pytest.raises(NetworkError) as caught:
            fold(TINY, broken)
        assert caught.value.code == code
    with pytest.raises(NetworkError) as caught:
        fold_tail(TINY, weights, np.zeros(TINY.tail_size + 1, np.float32))
    assert caught.value.code == "wrong_shape"
    other = NetworkSpec(
        input_dim=6, hidden_layers=(7, 3), dropout_rates=(0.1, 0.1), heads=TINY.heads, freeze_layers=default_freeze_layers(1)
    )
    with pytest.raises(NetworkError, match="units"):
        fold(other, make_weights(other, 1)).with_tail(fold_tail(TINY, weights, TINY.flatten_tail(weights)))


# --- Many tails -------------------------------------------------------------------------------------------------------


@given(tails=st.integers(1, 7), rows_each=st.integers(1, 5), frozen=st.sampled_from([0, 1, 2]))
@settings(deadline=None, max_examples=30)
def test_each_tail_on_its_own_rows_gives_what_it_gives_alone(tails: int, rows_each: int, frozen: int) -> None:
    spec = NetworkSpec(hidden_layers=(12, 10, 8), dropout_rates=(0.1, 0.1, 0.1), freeze_layers=default_freeze_layers(frozen))
    weights = make_weights(spec, 4)
    trunk = fold_trunk(spec, weights)
    rng = np.random.default_rng(tails)
    base = spec.flatten_tail(weights)
    folded = [
        fold_tail(spec, weights, base + rng.normal(size=base.shape).astype(np.float32) * np.float32(0.1)) for _ in range(tails)
    ]
    activations = trunk.activations(rows(spec, tails * rows_each)).reshape(tails, rows_each, -1)
    together = forward_each(folded, activations)
    for index, tail in enumerate(folded):
        alone = tail.forward(np.ascontiguousarray(activations[index]))
        for name in HEADS:
            np.testing.assert_allclose(getattr(together, name)[index], getattr(alone, name), atol=1e-6)


def test_many_tails_refuse_rows_or_tails_that_do_not_belong_together() -> None:
    spec = NetworkSpec(hidden_layers=(12, 10, 8), dropout_rates=(0.1, 0.1, 0.1), freeze_layers=default_freeze_layers(2))
    other = NetworkSpec(hidden_layers=(12, 10, 6, 8), dropout_rates=(0.1,) * 4, freeze_layers=default_freeze_layers(2))
    tail, deeper = (
        fold_tail(s, w, s.flatten_tail(w)) for s, w in ((spec, make_weights(spec, 4)), (other, make_weights(other, 4)))
    )
    good = np.zeros((2, 1, 10), dtype=np.float32)
    for tails, activations, code in (
        ([], good[:0], "wrong_shape"),
        ([tail], good, "wrong_shape"),
        ([tail, tail], good[:, 0], "wrong_shape"),
        ([tail, tail], good[:, :, :9], "wrong_shape"),
        ([tail, tail], good.astype(np.float64), "wrong_dtype"),
        ([tail, deeper], good, "bad_network"),
    ):
        with pytest.raises(NetworkError) as caught:
            forward_each(tails, activations)
        assert caught.value.code == code
