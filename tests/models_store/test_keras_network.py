from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aivo_core.network import NetworkError, NetworkSpec, default_freeze_layers
from aivo_core.ordinal import score_log_loss
from models_store import keras_network
from models_store.keras_network import KerasSetupError, build_network, read_weights, write_weights
from tests.synthetic_samples import TINY, make_weights, softmax_in_double

ROOT = Path(__file__).resolve().parents[2]


def test_importing_the_modules_does_not_load_tensorflow() -> None:
    code = (
        "import sys, models_store.keras_network, models_store.training, federation.keras_engine, aivo_core.inference;"
        "sys.exit(any(name.split('.')[0] in ('tensorflow', 'keras') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_threads_are_set_once_and_cannot_change_afterwards() -> None:
    assert keras_network.configure_tensorflow() == keras_network.configure_tensorflow()
    in_force = keras_network.configure_tensorflow()
    build_network(TINY, 0)
    assert keras_network.configure_tensorflow(in_force) == in_force
    with pytest.raises(KerasSetupError, match="threads") as caught:
        keras_network.configure_tensorflow(0)
    assert caught.value.code == "bad_threads"
    with pytest.raises(KerasSetupError) as caught:
        keras_network.configure_tensorflow(in_force + 1)
    assert caught.value.code == "already_configured"


def test_the_default_network_has_the_declared_layers_and_numbers() -> None:
    spec = NetworkSpec()
    model = build_network(spec, 1)
    assert set(spec.layer_names) <= {layer.name for layer in model.layers}
    assert model.count_params() == spec.parameter_count == 318_954
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == spec.tail_size == 52_586
    assert model.get_layer("shared_bn_3").epsilon == 1e-3


def test_hidden_kernels_are_he_normal_and_a_seed_gives_the_same_bytes() -> None:
    spec = NetworkSpec()
    first, again, other = (read_weights(build_network(spec, seed), spec) for seed in (3, 3, 4))
    for name, value in first.items():
        assert value.tobytes() == again[name].tobytes()
    kernel = first["shared_dense_2/kernel"]
    assert kernel.std() == pytest.approx(np.sqrt(2.0 / 512), rel=0.02)
    assert not np.array_equal(kernel, other["shared_dense_2/kernel"])


def test_weights_go_in_and_out_by_name_unchanged() -> None:
    weights = make_weights(TINY, 1)
    model = build_network(TINY, 0)
    write_weights(model, TINY, weights)
    back = read_weights(model, TINY)
    assert list(back) == [tensor.name for tensor in TINY.tensors]
    assert all(back[name].tobytes() == weights[name].tobytes() for name in weights)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("path_output/bias", None, "wrong_name"),
        ("path_output/bias", np.zeros(1, np.float32), "wrong_shape"),
        ("path_output/bias", np.zeros(3, np.float64), "wrong_dtype"),
    ],
)
def test_wrong_weights_are_refused_and_change_nothing(name: str, value: np.ndarray | None, code: str) -> None:
    model = build_network(TINY, 0)
    before = read_weights(model, TINY)
    weights = make_weights(TINY, 1)
    del weights[name]
    if value is not None:
        weights[name] = value
    with pytest.raises(NetworkError, match=name) as caught:
        write_weights(model, TINY, weights)
    assert caught.value.code == code
    assert all(np.array_equal(value, before[key]) for key, value in read_weights(model, TINY).items())


def test_frozen_blocks_run_in_inference_mode_while_the_rest_trains() -> None:
    weights = make_weights(TINY, 2)
    model = build_network(TINY, 0)
    write_weights(model, TINY, weights)
    trunk = keras_network.trunk_of(model, TINY)
    x = np.random.default_rng(0).normal(size=(64, TINY.input_dim)).astype(np.float32)
    still = trunk(x, training=False).numpy()
    np.testing.assert_array_equal(trunk(x, training=True).numpy(), still)
    trained, again = (model(x, training=True)["content_output"].numpy() for _ in range(2))
    assert not np.array_equal(trained, again)
    after = read_weights(model, TINY)
    moved = {name for name in weights if not np.array_equal(after[name], weights[name])}
    assert moved == {f"shared_bn_{i}/moving_{part}" for i in (2, 3) for part in ("mean", "variance")}


def test_a_tails_batch_norm_keeps_its_statistics_but_trains_its_scale() -> None:
    import tensorflow as tf

    model = build_network(TINY, 0)
    write_weights(model, TINY, make_weights(TINY, 2))
    before = read_weights(model, TINY)
    features = np.random.default_rng(0).normal(size=(8, TINY.feature_dim)).astype(np.float32)
    with tf.GradientTape() as tape:
        hidden = keras_network.apply_tail_body(model, TINY, features, dropout=True)
    gradient = tape.gradient(hidden, model.get_layer("shared_bn_2").gamma.value)
    assert np.abs(gradient.numpy()).max() > 0
    assert all(np.array_equal(value, before[name]) for name, value in read_weights(model, TINY).items())


def test_nothing_frozen_leaves_everything_trainable_and_no_trunk() -> None:
    spec = TINY.with_freeze_layers(())
    model = build_network(spec, 0)
    assert len(model.trainable_variables) == 3 * 4 + 3 * 2
    assert keras_network.trunk_of(model, spec) is None


def test_the_ordinal_loss_in_tensorflow_is_the_one_in_numpy() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=4.0, size=(300, 10)).astype(np.float32)
    logits[0] = [60, *[0] * 9]
    level = rng.uniform(0.5, 9.5, 300).astype(np.float32)
    level[:3] = (9.0, 1.0, 9.5)
    score = rng.choice([0.0, 0.25, 1.0], 300).astype(np.float32)
    losses = keras_network.ordinal_losses(logits, level, score).numpy()
    np.testing.assert_allclose(
        losses, score_log_loss(softmax_in_double(logits.astype(float)), level, score), atol=2e-2, rtol=2e-4
    )
    plain = np.abs(losses) < 8
    expected = score_log_loss(softmax_in_double(logits.astype(float)), level, score)
    np.testing.assert_allclose(losses[plain], expected[plain], rtol=2e-4, atol=1e-5)


def test_cross_entropy_keeps_its_gradient_where_the_probability_rounds_to_zero() -> None:
    import tensorflow as tf

    logits = tf.constant([[0.0, 200.0]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = keras_network.class_losses(logits, tf.constant([0]))
    assert float(loss[0]) == pytest.approx(200.0)
    np.testing.assert_allclose(tape.gradient(loss, logits).numpy(), [[-1.0, 1.0]], atol=1e-6)


def test_a_network_with_other_heads_is_refused_for_training() -> None:
    spec = NetworkSpec(heads=NetworkSpec().heads[:2], freeze_layers=default_freeze_layers(1))
    with pytest.raises(KerasSetupError, match="heads"):
        keras_network.check_trainable(spec)


def test_restarted_dropout_draws_the_same_again() -> None:
    model = build_network(TINY, 0)
    x = np.ones((16, TINY.feature_dim), np.float32)
    outputs = []
    for seed in (5, 6, 5):
        keras_network.seed_dropout(model, TINY, seed)
        outputs.append(keras_network.apply_tail_body(model, TINY, x, dropout=True).numpy())
    np.testing.assert_array_equal(outputs[0], outputs[2])
    assert not np.array_equal(outputs[0], outputs[1])
