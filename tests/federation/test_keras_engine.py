from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aivo_core.engine.contract import EngineError, LearnerResult, LearnerTask, LocalTrainingConfig
from aivo_core.engine.session import BIAS_PASS, DROPOUT_STREAM, TAIL_PASS, plan_batches
from aivo_core.network import DIFFICULTY_HEAD, FloatArray, NetworkError, NetworkSpec, block_layers, default_freeze_layers
from aivo_core.ordinal import score_log_loss
from federation.keras_engine import KerasEngine, resident_network
from models_store import keras_network
from tests.shared import SHARED, needs_vectors
from tests.synthetic_samples import TINY, logits_in_double, make_samples, make_weights, softmax_in_double

WEIGHTS = make_weights(TINY, 1)
BASE_TAIL = TINY.flatten_tail(WEIGHTS)
QUICK = LocalTrainingConfig(epochs=2, batch_size=8, bias_epochs=2)


def task(key: str = "a", n: int = 20, seed: int = 3, spec: NetworkSpec = TINY, tail: FloatArray = BASE_TAIL) -> LearnerTask:
    return LearnerTask(key, make_samples(spec, n, seed), tail, tail, seed)


def train(config: LocalTrainingConfig, *tasks: LearnerTask, spec: NetworkSpec = TINY, weights=WEIGHTS) -> list[LearnerResult]:
    results = list(KerasEngine().train(spec=spec, weights=weights, config=config, tasks=tasks))
    assert [result.key for result in results] == [t.key for t in tasks]
    return results


def trained(config: LocalTrainingConfig, one: LearnerTask, **arguments) -> FloatArray:
    (result,) = train(config, one, **arguments)
    assert result.error_code == "", result.error_message
    return result.tail


def objective_in_double(tail: np.ndarray, one: LearnerTask, mu: float) -> float:
    """The contract's objective over all the task's samples, in float64, without dropout."""
    weights = {**{k: v.astype(np.float64) for k, v in WEIGHTS.items()}}
    slices = TINY.tail_slices()
    weights |= {t.name: tail[slices[t.name]].reshape(t.shape) for t in TINY.tail_tensors}
    samples = one.samples
    first = logits_in_double(TINY, weights, samples.first)
    second = logits_in_double(TINY, weights, samples.second)
    everyone = np.arange(len(samples))
    total = -np.log(softmax_in_double(first["content_output"])[everyone, samples.content])
    total -= np.log(softmax_in_double(first["path_output"])[everyone, samples.path])
    for logits in (first, second):
        total += 0.5 * score_log_loss(softmax_in_double(logits[DIFFICULTY_HEAD]), samples.level, samples.score)
    return float(total.mean() + mu / 2 * np.sum((tail - one.anchor_tail) ** 2))


def test_one_gradient_step_follows_the_finite_differences_of_the_objective() -> None:
    anchor = BASE_TAIL + np.random.default_rng(0).normal(scale=0.2, size=TINY.tail_size).astype(np.float32)
    one = replace(task(n=13), anchor_tail=anchor)
    config = LocalTrainingConfig(epochs=1, batch_size=16, learning_rate=0.5, proximal_mu=0.7, optimiser="sgd", dropout=False)
    (result,) = train(config, one)
    start = one.start_tail.astype(np.float64)
    assert result.losses[0] == pytest.approx(objective_in_double(start, one, 0.7), abs=1e-5)
    gradient = (start - result.tail) / 0.5
    step = 1e-5
    for i in range(TINY.tail_size):
        up, down = start.copy(), start.copy()
        up[i] += step
        down[i] -= step
        slope = (objective_in_double(up, one, 0.7) - objective_in_double(down, one, 0.7)) / (2 * step)
        assert gradient[i] == pytest.approx(slope, abs=2e-5), TINY.tail_tensors


def through_the_whole_network(config: LocalTrainingConfig, one: LearnerTask, spec: NetworkSpec, weights) -> FloatArray:
    """The same training eagerly, features through all layers of the network in every step, Keras's own optimiser."""
    import keras
    import tensorflow as tf

    model = keras_network.build_network(spec, 9)
    keras_network.write_weights(model, spec, {**weights, **spec.unflatten_tail(one.start_tail)})
    tail = [v.value for v in model.trainable_variables]
    anchors = [tf.constant(v.numpy()) for v in tail]

    def hidden_of(rows):
        for i in range(1, len(spec.hidden_layers) + 1):
            dense, norm, drop = (model.get_layer(name) for name in block_layers(i))
            rows = drop(norm(dense(rows), training=False), training=config.dropout and i > spec.frozen_blocks)
        return rows

    def passes(kind, epochs, optimiser, variables):
        words = np.random.SeedSequence([one.seed, DROPOUT_STREAM, kind]).generate_state(1)
        keras_network.seed_dropout(model, spec, int(words[0]))
        s = one.samples
        plan = plan_batches(samples=len(s), batch_size=config.batch_size, epochs=epochs, seed=one.seed, training_pass=kind)
        for index, mask in zip(plan.index, plan.mask, strict=True):
            with tf.GradientTape() as tape:
                rows = s.second[index] if kind == BIAS_PASS else np.concatenate([s.first[index], s.second[index]])
                hidden = hidden_of(rows)
                p = {head.name: model.get_layer(head.name)(hidden) for head in spec.heads}
                times = len(rows) // len(index)
                allowed = np.clip(np.arange(1, 11) - np.tile(s.level[index], times)[:, None], 0, 1).astype(np.float32)
                g = tf.clip_by_value(tf.reduce_sum(p[DIFFICULTY_HEAD] * allowed, axis=1), 1e-6, 1 - 1e-6)
                score = np.tile(s.score[index], times)
                losses = -(score * tf.math.log(g) + (1 - score) * tf.math.log(1 - g)) / times
                loss = tf.reduce_sum(losses * np.tile(mask, times)) / mask.sum()
                if kind == TAIL_PASS:
                    half = len(index)
                    for head, labels in (("content_output", s.content), ("path_output", s.path)):
                        ce = keras.losses.sparse_categorical_crossentropy(labels[index], p[head][:half])
                        loss += tf.reduce_sum(ce * mask) / mask.sum()
                    loss += config.proximal_mu / 2 * sum(tf.reduce_sum((v - a) ** 2) for v, a in zip(tail, anchors, strict=True))
            optimiser.apply(tape.gradient(loss, [v.value for v in variables]), variables)

    if config.trains_tail:
        kind = keras.optimizers.Adam if config.optimiser == "adam" else keras.optimizers.SGD
        extra = {} if config.optimiser == "adam" else {"momentum": config.momentum}
        passes(TAIL_PASS, config.epochs, kind(config.learning_rate, **extra), model.trainable_variables)
    if config.trains_bias:
        adam = keras.optimizers.Adam(config.bias_learning_rate)
        passes(BIAS_PASS, config.bias_epochs, adam, [model.get_layer(DIFFICULTY_HEAD).bias])
    after = keras_network.read_weights(model, spec)
    assert all(np.array_equal(after[t.name], weights[t.name]) for t in spec.tensors if t not in spec.tail_tensors)
    return spec.flatten_tail(after)


@pytest.mark.parametrize(
    "config",
    [
        replace(QUICK, dropout=False),
        QUICK,
        replace(QUICK, optimiser="sgd", momentum=0.9, learning_rate=0.05),
        replace(QUICK, adaptation="tail_then_bias"),
        replace(QUICK, adaptation="difficulty_bias"),
    ],
)
@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_training_on_trunk_features_equals_training_through_the_whole_network(config: LocalTrainingConfig, frozen: int) -> None:
    spec = TINY.with_freeze_layers(default_freeze_layers(frozen))
    one = task(spec=spec, n=21, tail=spec.flatten_tail(WEIGHTS))
    tail = trained(config, one, spec=spec)
    expected = through_the_whole_network(config, one, spec, WEIGHTS)
    assert not np.array_equal(tail, one.start_tail)
    np.testing.assert_allclose(tail, expected, atol=2e-5)


def test_a_learners_bytes_do_not_depend_on_who_was_trained_before_or_after() -> None:
    config = replace(QUICK, adaptation="tail_then_bias")
    a, b, c = task("a", 20, 1), task("b", 33, 2), task("c", 7, 3)
    alone = [trained(config, one).tobytes() for one in (a, b, c)]
    assert [r.tail.tobytes() for r in train(config, c, a, b)] == [alone[2], alone[0], alone[1]]
    train(replace(config, optimiser="sgd", learning_rate=0.1), b)
    assert trained(config, a).tobytes() == alone[0]
    assert trained(config, replace(a, key="another")).tobytes() == alone[0]
    assert trained(config, replace(a, seed=99)).tobytes() != alone[0]


def test_two_rounds_on_different_bases_may_interleave() -> None:
    other = make_weights(TINY, 50)
    tasks = [task("a", 20, 1), task("b", 20, 2)]
    first = [r.tail.tobytes() for r in train(QUICK, *tasks)]
    second = [r.tail.tobytes() for r in train(QUICK, *tasks, weights=other)]
    assert first != second
    engine = KerasEngine()
    one, two = (engine.train(spec=TINY, weights=w, config=QUICK, tasks=tasks) for w in (WEIGHTS, other))
    interleaved = [(x.tail.tobytes(), y.tail.tobytes()) for x, y in zip(one, two, strict=True)]
    assert interleaved == list(zip(first, second, strict=True))


def test_nothing_is_traced_twice_over_learners_of_any_size() -> None:
    config = replace(QUICK, adaptation="tail_then_bias")
    train(config, *(task(str(n), n, n) for n in (1, 3, 8, 9, 40)))
    counts = resident_network(TINY).trace_counts()
    assert counts["trunk"] == 1 and {"tail/8/adam/0.0/True", "difficulty_bias/8/adam/0.0/True"} <= set(counts)
    assert set(counts.values()) == {1}


def test_trunk_and_moving_statistics_stay_what_the_base_says() -> None:
    train(replace(QUICK, adaptation="tail_then_bias"), task("a"), task("b", seed=5))
    held = keras_network.read_weights(resident_network(TINY).model, TINY)
    tail = {tensor.name for tensor in TINY.tail_tensors}
    assert all(held[name].tobytes() == WEIGHTS[name].tobytes() for name in WEIGHTS if name not in tail)


def test_the_bias_pass_changes_ten_numbers_and_nothing_else() -> None:
    (result,) = train(replace(QUICK, adaptation="difficulty_bias"), task())
    changed = np.flatnonzero(result.tail != BASE_TAIL)
    part = TINY.tail_slices()["difficulty_output/bias"]
    assert list(changed) == list(range(part.start, part.stop))
    assert not result.tail_pass_delta.any()
    assert result.steps == 2 * 3 and len(result.losses) == 2


def test_tail_then_bias_is_the_tail_pass_and_the_bias_pass_on_top() -> None:
    one = task()
    both = train(replace(QUICK, adaptation="tail_then_bias"), one)[0]
    tail = train(QUICK, one)[0]
    bias = train(replace(QUICK, adaptation="difficulty_bias"), replace(one, start_tail=tail.tail))[0]
    assert both.tail.tobytes() == bias.tail.tobytes()
    assert both.tail_pass_delta.tobytes() == tail.tail_pass_delta.tobytes() == (tail.tail - one.start_tail).tobytes()
    assert both.losses == tail.losses + bias.losses and both.steps == tail.steps + bias.steps


def test_training_lowers_the_objective_on_the_learners_own_samples() -> None:
    one = task(n=100)
    config = LocalTrainingConfig(epochs=10, learning_rate=5e-3, proximal_mu=0.0)
    result = train(config, one)[0]
    assert objective_in_double(result.tail.astype(float), one, 0) < objective_in_double(BASE_TAIL.astype(float), one, 0) - 0.1
    assert len(result.losses) == 10 and result.losses[-1] < result.losses[0]


def test_without_a_proximal_term_the_anchor_means_nothing() -> None:
    plain = replace(QUICK, proximal_mu=0.0)
    elsewhere = np.full(TINY.tail_size, 3.0, np.float32)
    assert trained(plain, task()).tobytes() == trained(plain, replace(task(), anchor_tail=elsewhere)).tobytes()
    assert trained(QUICK, task()).tobytes() != trained(QUICK, replace(task(), anchor_tail=elsewhere)).tobytes()


def test_the_drift_falls_with_mu_and_vanishes_for_a_large_one() -> None:
    drifts = []
    for mu in (0.0, 1.0, 10.0, 100.0, 1000.0):
        config = LocalTrainingConfig(epochs=5, batch_size=8, learning_rate=1e-3, proximal_mu=mu, optimiser="sgd")
        drifts.append(float(np.linalg.norm(trained(config, task(n=60)) - BASE_TAIL)))
    assert drifts == sorted(drifts, reverse=True) and len(set(drifts)) == len(drifts)
    assert drifts[-1] < 0.15 * drifts[0]


def test_a_mu_of_1000_keeps_adam_near_the_anchor() -> None:
    config = LocalTrainingConfig(epochs=5, batch_size=8, proximal_mu=0.0)
    free = np.linalg.norm(trained(config, task(n=60)) - BASE_TAIL)
    held = np.linalg.norm(trained(replace(config, proximal_mu=1000.0), task(n=60)) - BASE_TAIL)
    assert held < 0.25 * free


@needs_vectors
def test_the_proximal_term_reproduces_the_reference_runs() -> None:
    import keras
    import tensorflow as tf

    reference = json.loads((Path(SHARED) / "vectors" / "strategies.json").read_text())["fedprox"]
    for case in reference["cases"]:
        kind = np.dtype(case["dtype"])
        x = np.array(reference["x"], kind)
        anchors = [tf.constant(np.array(reference[f"global_{name}"], kind)) for name in ("kernel", "bias")]
        variables = [
            keras.Variable(np.array(reference[f"{case['start']}_{n}"], kind), dtype=case["dtype"]) for n in ("kernel", "bias")
        ]
        batches = [range(9)] * 3 if case["batches"] == "full" else [range(3), range(3, 6), range(6, 9)]
        sgd = keras.optimizers.SGD(reference["learning_rate"])
        for rows, expected in zip(batches, case["steps"], strict=True):
            rows = list(rows)
            values = [v.value for v in variables]
            with tf.GradientTape() as tape:
                out = tf.matmul(x[rows], values[0]) + values[1]
                if case["loss"] == "mse":
                    loss = tf.reduce_mean((out - np.array(reference["y_regression"], kind)[rows]) ** 2)
                else:
                    loss = tf.reduce_mean(keras_network.class_losses(out, np.array(reference["y_class"])[rows]))
                term = keras_network.proximal_term(values, anchors, tf.constant(case["mu"], kind))
                total = loss + term
            sgd.apply(tape.gradient(total, values), variables)
            tolerance = reference["tolerance"]["float32"]
            assert float(term) == pytest.approx(expected["prox_term"], rel=tolerance["rtol"], abs=tolerance["atol"])
            for variable, name in zip(variables, ("kernel", "bias"), strict=True):
                np.testing.assert_allclose(variable.numpy(), expected[name], **tolerance)


def test_a_bad_task_gives_an_error_result_and_leaves_its_neighbours_alone() -> None:
    good = [task("a", 20, 1), task("b", 20, 2)]
    alone = [r.tail.tobytes() for r in train(QUICK, *good)]
    one = task("x")
    nan = one.samples.first.copy()
    nan[2, 1] = np.nan
    bad = [
        (replace(one, samples=one.samples.take(slice(0, 0))), "no_samples"),
        (replace(one, samples=replace(one.samples, first=nan)), "not_finite"),
        (replace(one, samples=replace(one.samples, content=one.samples.content + 4)), "bad_labels"),
        (replace(one, start_tail=BASE_TAIL[:-1]), "wrong_shape"),
        (replace(one, samples=replace(one.samples, first=one.samples.first * np.float32(1e30))), "diverged"),
    ]
    results = train(QUICK, good[0], *(t for t, _ in bad), good[1])
    assert [r.error_code for r in results[1:-1]] == [code for _, code in bad]
    assert all(r.tail is None and r.tail_pass_delta is None and r.error_message for r in results[1:-1])
    assert [results[0].tail.tobytes(), results[-1].tail.tobytes()] == alone


def test_base_weights_that_lack_a_tensor_are_refused_before_any_learner() -> None:
    lacking = {name: value for name, value in WEIGHTS.items() if name != "shared_bn_1/gamma"}
    with pytest.raises(NetworkError, match="shared_bn_1/gamma"):
        KerasEngine().train(spec=TINY, weights=lacking, config=QUICK, tasks=[task()])


def test_tasks_are_read_one_at_a_time() -> None:
    read = []

    def tasks():
        for key in "abc":
            read.append(key)
            yield task(key)

    results = KerasEngine().train(spec=TINY, weights=WEIGHTS, config=QUICK, tasks=tasks())
    next(results)
    assert read == ["a"]


def test_the_engine_names_itself_and_its_library() -> None:
    engine = KerasEngine()
    assert engine.name == "keras" and engine.backend.startswith("tensorflow 2.")


def test_memory_stays_level_over_learners_in_one_process() -> None:
    from benchmarks.keras_memory import measure

    figures = measure(learners=20, warm_up=10, samples=60)
    assert figures["learners"] == 20
    assert figures["rss_slope_mb_per_learner"] < 0.2


def test_private_training_is_refused_and_never_done_without_noise() -> None:
    config = LocalTrainingConfig(adaptation="tail", sample_clip_norm=1.0, sample_noise_multiplier=1.0)
    with pytest.raises(EngineError, match="sample_noise_multiplier must be None with the engine keras") as caught:
        KerasEngine().train(spec=TINY, weights=WEIGHTS, config=config, tasks=[task()])
    assert caught.value.code == "bad_config"
