"""Local training as it is usually written in Keras: what the engines are compared with.

``naive``
    ``clone_model``, ``compile``, ``fit`` for every learner. Frozen blocks are ``trainable=False`` and called with
    ``training=False``.
``resident_fit``
    One compiled model for all learners; weights and optimiser state are set back for each, then ``fit``.
``resident``
    One resident model, the trunk once per learner, all steps of a pass in one ``tf.function`` that is traced once: the
    approach of the product's engine ``keras``.

Objectives: ``first_pass`` is cross entropy on the three heads over first-pass rows. ``product`` is the product's own loss
on two rows per sample; ``naive`` leaves out its proximal term and, as Keras does by itself, runs the trained blocks' batch
normalisation in training mode. Only child processes of a benchmark import TensorFlow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from aivo_core.network import CONTENT_HEAD, DIFFICULTY_HEAD, PATH_HEAD, NetworkSpec
from aivo_core.ordinal import CLASSES, MIN_PROBABILITY
from aivo_core.samples import Samples
from benchmarks.synthetic import random_weights

EPOCHS = 5
BATCH = 32
LEARNING_RATE = 1e-3


def limit_threads(threads: int) -> None:
    """Before TensorFlow's first use in the process."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def plain_network(spec: NetworkSpec) -> Any:
    """The network in plain Keras, with ``random_weights``; frozen blocks do not train and run in inference mode."""
    import keras

    inputs = hidden = keras.Input((spec.input_dim,))
    for index, units in enumerate(spec.hidden_layers):
        frozen = index < spec.frozen_blocks
        options: dict[str, Any] = {"training": False} if frozen else {}
        hidden = keras.layers.Dense(units, activation="relu", trainable=not frozen)(hidden)
        hidden = keras.layers.BatchNormalization(trainable=not frozen)(hidden, **options)
        hidden = keras.layers.Dropout(0.0 if frozen else spec.dropout_rates[index])(hidden, **options)
    outputs = {head.name: keras.layers.Dense(head.units, activation="softmax", name=head.name)(hidden) for head in spec.heads}
    model = keras.Model(inputs, outputs)
    # Keras keeps a layer's variables in the declared order, the trained ones before the moving statistics.
    model.set_weights(_keras_order(model, list(random_weights(spec).values())))
    return model


def naive_trainer(spec: NetworkSpec, objective: str) -> Callable[[Samples], None]:
    """A function that trains one learner from the beginning, with a model and an optimiser of its own."""
    import keras

    base = plain_network(spec)
    weights = base.get_weights()

    def train(samples: Samples) -> None:
        model = keras.models.clone_model(base)
        model.set_weights(weights)
        _compile(model, objective)
        _fit(model, objective, samples)

    return train


def resident_fit_trainer(spec: NetworkSpec, objective: str) -> Callable[[Samples], None]:
    """A function that trains one learner on the one model there is."""
    model = plain_network(spec)
    weights = model.get_weights()
    _compile(model, objective)
    model.optimizer.build(model.trainable_variables)

    def train(samples: Samples) -> None:
        model.set_weights(weights)
        for variable in model.optimizer.variables:
            if variable.path.rpartition("/")[2] != "learning_rate":
                variable.assign(np.zeros(variable.shape, dtype=variable.dtype))
        _fit(model, objective, samples)

    return train


def resident_trainer(spec: NetworkSpec) -> Callable[[Samples], None]:
    """As ``resident_fit_trainer`` for the objective ``first_pass``, with one traced function for a learner's whole pass."""
    import keras
    import tensorflow as tf

    model = plain_network(spec)
    weights = model.get_weights()
    trunk, tail = _split(model, spec)
    variables = [variable.value for variable in tail.trainable_variables]
    optimiser = keras.optimizers.Adam(LEARNING_RATE)
    optimiser.build(tail.trainable_variables)
    run_trunk = tf.function(lambda rows: trunk(rows, training=False), reduce_retracing=True)

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator, unused-ignore]
    def run(features: Any, labels: list[Any], index: Any, mask: Any) -> None:
        for step in tf.range(tf.shape(index)[0]):
            rows, weight = index[step], mask[step]
            with tf.GradientTape() as tape:
                outputs = tail(tf.gather(features, rows), training=True)
                losses = [
                    keras.losses.sparse_categorical_crossentropy(tf.gather(label, rows), outputs[head.name])
                    for label, head in zip(labels, spec.heads, strict=True)
                ]
                loss = tf.reduce_sum(tf.add_n(losses) * weight) / tf.reduce_sum(weight)
            optimiser.apply(tape.gradient(loss, variables), tail.trainable_variables)

    zeros = [(variable, np.zeros(variable.shape, dtype=variable.dtype)) for variable in optimiser.variables[2:]]

    def train(samples: Samples) -> None:
        model.set_weights(weights)
        optimiser.variables[0].assign(0)
        for variable, zero in zeros:
            variable.assign(zero)
        index, mask = _batches(len(samples))
        labels = [tf.constant(label) for label in first_pass_labels(samples)]
        run(run_trunk(tf.constant(samples.first)), labels, index, mask)

    return train


def first_pass_labels(samples: Samples) -> list[Any]:
    """Classes of content, difficulty and path, in the order of the heads: int64 (n,) each."""
    return [samples.content, np.clip(samples.level, 0, CLASSES - 1).astype(np.int64), samples.path]


def timed(train: Callable[[Samples], None], pool: Sequence[Samples], learners: int) -> list[tuple[float, float]]:
    """Wall and CPU seconds of each learner."""
    found = []
    for number in range(learners):
        wall, cpu = time.perf_counter(), time.process_time()
        train(pool[number % len(pool)])
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def _keras_order(model: Any, declared: list[Any]) -> list[Any]:
    """``declared`` has kernel, bias, gamma, beta, mean, variance per block and the heads last, as ``model.weights`` has."""
    for value, variable in zip(declared, model.weights, strict=True):
        if tuple(variable.shape) != value.shape:
            raise RuntimeError(f"{variable.path} has shape {tuple(variable.shape)}, not {value.shape}")
    return declared


def _split(model: Any, spec: NetworkSpec) -> tuple[Any, Any]:
    """Trunk and tail of a plain network, sharing its layers."""
    import keras

    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    frozen, rest = layers[: 3 * spec.frozen_blocks], layers[3 * spec.frozen_blocks :]
    inputs = hidden = keras.Input((spec.feature_dim,))
    heads = {head.name for head in spec.heads}
    for layer in (layer for layer in rest if layer.name not in heads):
        hidden = layer(hidden)
    tail = keras.Model(inputs, {name: model.get_layer(name)(hidden) for name in sorted(heads)})
    return keras.Model(model.input, frozen[-1].output), tail


def _compile(model: Any, objective: str) -> None:
    import keras

    difficulty = "sparse_categorical_crossentropy" if objective == "first_pass" else ordinal_loss
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE),
        loss={
            CONTENT_HEAD: "sparse_categorical_crossentropy",
            DIFFICULTY_HEAD: difficulty,
            PATH_HEAD: "sparse_categorical_crossentropy",
        },
    )


def _fit(model: Any, objective: str, samples: Samples) -> None:
    if objective == "first_pass":
        names = (CONTENT_HEAD, DIFFICULTY_HEAD, PATH_HEAD)
        labels = dict(zip(names, first_pass_labels(samples), strict=True))
        model.fit(samples.first, labels, epochs=EPOCHS, batch_size=BATCH, verbose=0)
        return
    rows, labels, weights = both_passes(samples)
    model.fit(rows, labels, sample_weight=weights, epochs=EPOCHS, batch_size=2 * BATCH, verbose=0)


def both_passes(samples: Samples) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Rows (2 n, input_dim), labels and weights by head: content and path count on first-pass rows only."""
    n = len(samples)
    attained = np.stack([samples.level, samples.score], axis=1)
    only_first = np.repeat(np.array([1.0, 0.0], dtype=np.float32), n)
    labels = {
        CONTENT_HEAD: np.tile(samples.content, 2),
        DIFFICULTY_HEAD: np.tile(attained, (2, 1)),
        PATH_HEAD: np.tile(samples.path, 2),
    }
    weights = {CONTENT_HEAD: only_first, DIFFICULTY_HEAD: np.ones(2 * n, dtype=np.float32), PATH_HEAD: only_first}
    return np.concatenate([samples.first, samples.second]), labels, weights


def ordinal_loss(attained: Any, probabilities: Any) -> Any:
    """``aivo_core.ordinal.score_log_loss`` of (n, 2) level and score."""
    import tensorflow as tf

    level, score = attained[:, :1], attained[:, 1]
    allowed = tf.clip_by_value(tf.range(1, CLASSES + 1, dtype=tf.float32)[None, :] - level, 0.0, 1.0)
    success = tf.reduce_sum(probabilities * allowed, axis=-1)
    success = tf.clip_by_value(success, MIN_PROBABILITY, 1.0 - MIN_PROBABILITY)
    return -(score * tf.math.log(success) + (1.0 - score) * tf.math.log1p(-success))


def _batches(samples: int) -> tuple[Any, Any]:
    """A permutation per epoch in batches: int64 and float32 (steps, BATCH); a place without a sample has weight 0."""
    steps = -(-samples // BATCH)
    index = np.zeros((EPOCHS, steps * BATCH), dtype=np.int64)
    mask = np.zeros((EPOCHS, steps * BATCH), dtype=np.float32)
    for epoch in range(EPOCHS):
        index[epoch, :samples] = np.random.default_rng(epoch).permutation(samples)
        mask[epoch, :samples] = 1.0
    return index.reshape(-1, BATCH), mask.reshape(-1, BATCH)
