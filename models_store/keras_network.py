"""The one place that builds the Keras network from a ``NetworkSpec`` and moves weights in and out of it by name.

TensorFlow is imported inside the functions, at call time: the web process and a queue worker's parent may import this
module, they must not call it (a process that has run TensorFlow and then forks leaves a child that hangs).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from aivo_core.network import (
    BATCH_NORM_EPSILON,
    CONTENT_HEAD,
    DIFFICULTY_HEAD,
    PATH_HEAD,
    FloatArray,
    HeadSpec,
    NetworkSpec,
    TensorSpec,
    Weights,
    block_layers,
    check_weights,
)
from aivo_core.ordinal import CLASSES, MIN_PROBABILITY
from models_store.quiet_import import without_start_notices

BATCH_NORM_MOMENTUM = 0.99
"""Share of the old moving statistic that one training step keeps, Keras's default."""

DEFAULT_THREADS = 1

_configured_threads: int | None = None


class KerasSetupError(RuntimeError):
    """TensorFlow cannot be set up as asked, or the network is not one that it can train; ``code`` is stable."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


def configure_tensorflow(threads: int | None = None) -> int:
    """Set TensorFlow's threads and deterministic operations; call it before anything else of TensorFlow in a process.

    Args:
        threads: intra-op and inter-op threads of this process, at least 1. None keeps what an earlier call set, or
            sets one thread: several worker processes with all cores each only wait for one another.

    Returns:
        The threads now in force.

    Raises:
        KerasSetupError: ``threads`` below 1 (``bad_threads``); TensorFlow already runs with another number, which
            cannot be changed within a process (``already_configured``); Keras runs on another backend (``bad_backend``).
    """
    global _configured_threads
    if threads is not None and threads < 1:
        raise KerasSetupError(f"threads must be at least 1, not {threads}", code="bad_threads")
    if _configured_threads is not None and threads in (None, _configured_threads):
        return _configured_threads
    wanted = threads or DEFAULT_THREADS
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with without_start_notices():
        import keras
        import tensorflow as tf

        tf.config.list_physical_devices()

    if keras.backend.backend() != "tensorflow":
        raise KerasSetupError(f"Keras must run on tensorflow, not on {keras.backend.backend()}", code="bad_backend")
    try:
        tf.config.threading.set_intra_op_parallelism_threads(wanted)
        tf.config.threading.set_inter_op_parallelism_threads(wanted)
    except RuntimeError as error:
        raise KerasSetupError(
            f"TensorFlow already runs in this process and cannot be set to {wanted} threads any more", code="already_configured"
        ) from error
    tf.config.experimental.enable_op_determinism()
    _configured_threads = wanted
    return wanted


def tensorflow_version() -> str:
    """Version of the TensorFlow that this process uses."""
    configure_tensorflow()
    import tensorflow as tf

    return str(tf.__version__)


def backend_name() -> str:
    """How results name what computed them."""
    return f"tensorflow {tensorflow_version()}"


def layer_seeds(seed: int, count: int) -> list[int]:
    """Independent seeds below 2^31 for ``count`` layers, drawn from one non-negative ``seed``."""
    return [int(word) & 0x7FFFFFFF for word in np.random.SeedSequence(seed).generate_state(count)]


def build_network(spec: NetworkSpec, seed: int) -> Any:
    """Build the functional Keras model of ``spec``, with fresh weights from ``seed``.

    Layers carry the names of ``spec.layer_names``; hidden kernels are he_normal (He et al. 2015, equation 10), head
    kernels Glorot-uniform, biases zero. Frozen blocks are a fixed function even under ``model(x, training=True)``: their
    layers are ``trainable=False``, which keeps batch normalisation and its statistics in inference mode, and their dropout
    layer has rate 0. (Keras 3 hands the call's ``training`` to every layer, past a ``training=False`` given when the model
    was put together, so that would not freeze them.)

    Returns:
        ``keras.Model``, float32 (n, input_dim) -> dict of head name to probabilities, float32 (n, units).
    """
    configure_tensorflow()
    import keras

    blocks = range(1, len(spec.hidden_layers) + 1)
    seeds = iter(layer_seeds(seed, 2 * len(blocks) + len(spec.heads)))
    inputs = keras.Input((spec.input_dim,), dtype="float32", name="features")
    hidden = inputs
    for index in blocks:
        hidden = _apply_block(spec, index, hidden, next(seeds), next(seeds))
    outputs = {head.name: _head_layer(head, next(seeds))(hidden) for head in spec.heads}
    return keras.Model(inputs, outputs, name="aivo_network")


def _apply_block(spec: NetworkSpec, index: int, x: Any, kernel_seed: int, dropout_seed: int) -> Any:
    import keras

    dense_name, norm_name, dropout_name = block_layers(index)
    frozen = index <= spec.frozen_blocks
    dense = keras.layers.Dense(
        spec.hidden_layers[index - 1],
        activation="relu",
        kernel_initializer=keras.initializers.HeNormal(seed=kernel_seed),
        name=dense_name,
        trainable=not frozen,
    )
    norm = keras.layers.BatchNormalization(
        epsilon=BATCH_NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM, name=norm_name, trainable=not frozen
    )
    rate = 0.0 if frozen else spec.dropout_rates[index - 1]
    dropout = keras.layers.Dropout(rate, seed=dropout_seed, name=dropout_name, trainable=not frozen)
    return dropout(norm(dense(x)))


def _head_layer(head: HeadSpec, seed: int) -> Any:
    import keras

    initializer = keras.initializers.GlorotUniform(seed=seed)
    return keras.layers.Dense(head.units, activation="softmax", kernel_initializer=initializer, name=head.name)


def variables_of(model: Any, tensors: Iterable[TensorSpec]) -> list[Any]:
    """The Keras variables of ``tensors``, in their order."""
    found = []
    for tensor in tensors:
        layer, _, part = tensor.name.partition("/")
        found.append(getattr(model.get_layer(layer), part))
    return found


def read_weights(model: Any, spec: NetworkSpec) -> dict[str, FloatArray]:
    """Copy all weights out of ``model``: float32 arrays by the names of ``spec.tensors``."""
    return {
        tensor.name: np.array(variable.numpy(), dtype=np.float32)
        for tensor, variable in zip(spec.tensors, variables_of(model, spec.tensors), strict=True)
    }


def write_weights(model: Any, spec: NetworkSpec, weights: Weights) -> None:
    """Set all weights of ``model``; nothing is set when anything is missing or wrong.

    Raises:
        NetworkError: a tensor of ``spec.tensors`` is missing or has another shape or dtype.
    """
    check_weights(weights, spec.tensors)
    for tensor, variable in zip(spec.tensors, variables_of(model, spec.tensors), strict=True):
        variable.assign(weights[tensor.name])


def body_of(model: Any, spec: NetworkSpec) -> Any:
    """The part of ``model`` below the heads, sharing its layers: float32 (n, input_dim) -> (n, last hidden units)."""
    import keras

    last_dropout = block_layers(len(spec.hidden_layers))[2]
    return keras.Model(model.input, model.get_layer(last_dropout).output, name="aivo_body")


def trunk_of(model: Any, spec: NetworkSpec) -> Any | None:
    """The frozen part of ``model``, sharing its layers: (n, input_dim) -> (n, feature_dim); None when nothing is frozen."""
    import keras

    if spec.frozen_blocks == 0:
        return None
    last_dropout = block_layers(spec.frozen_blocks)[2]
    return keras.Model(model.input, model.get_layer(last_dropout).output, name="aivo_trunk")


def apply_tail_body(model: Any, spec: NetworkSpec, features: Any, *, dropout: bool) -> Any:
    """Run the hidden blocks above the trunk on trunk features, batch normalisation in inference mode.

    Args:
        features: float32 tensor (n, feature_dim).
        dropout: whether dropout runs in training mode, drawing from each layer's own seed generator.

    Returns:
        float32 tensor (n, last hidden units).
    """
    hidden = features
    for index in range(spec.frozen_blocks + 1, len(spec.hidden_layers) + 1):
        dense, norm, drop = (model.get_layer(name) for name in block_layers(index))
        hidden = drop(norm(dense(hidden), training=False), training=dropout)
    return hidden


def head_logits(model: Any, head: str, hidden: Any) -> Any:
    """Log-odds of one head before its softmax: float32 (n, last hidden units) -> (n, units).

    Losses start here: the logarithm of a softmax keeps its gradient where the probability itself has rounded to 0.
    """
    import tensorflow as tf

    layer = model.get_layer(head)
    return tf.matmul(hidden, layer.kernel.value) + layer.bias.value


def class_losses(logits: Any, labels: Any) -> Any:
    """Cross entropy per row, natural logarithm: float32 (n, units), int (n,) -> float32 (n,)."""
    import tensorflow as tf

    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def ordinal_losses(logits: Any, level: Any, score: Any) -> Any:
    """Censored ordinal likelihood per row (``aivo_core.ordinal.score_log_loss``) in TensorFlow.

    Args:
        logits: float32 (n, 10) of the difficulty head.
        level, score: float32 (n,).

    Returns:
        float32 (n,).
    """
    import tensorflow as tf

    allowed = tf.clip_by_value(tf.range(1, CLASSES + 1, dtype=tf.float32)[None, :] - level[:, None], 0.0, 1.0)
    success = tf.reduce_sum(tf.nn.softmax(logits) * allowed, axis=-1)
    success = tf.clip_by_value(success, MIN_PROBABILITY, 1.0 - MIN_PROBABILITY)
    return -(score * tf.math.log(success) + (1.0 - score) * tf.math.log1p(-success))


def proximal_term(values: Sequence[Any], anchors: Sequence[Any], mu: Any) -> Any:
    """FedProx's mu/2 ||w - w_anchor||^2 over all tensors (Li et al. 2020, equation 2): a scalar tensor."""
    import tensorflow as tf

    return 0.5 * mu * tf.add_n([tf.reduce_sum(tf.square(v - a)) for v, a in zip(values, anchors, strict=True)])


def check_trainable(spec: NetworkSpec) -> None:
    """Check that ``spec`` has the three heads that the objectives are defined on.

    Raises:
        KerasSetupError: ``bad_heads``, naming what is expected.
    """
    units = {head.name: head.units for head in spec.heads}
    if set(units) != {CONTENT_HEAD, DIFFICULTY_HEAD, PATH_HEAD} or units[DIFFICULTY_HEAD] != CLASSES:
        raise KerasSetupError(
            f"heads must be {CONTENT_HEAD}, {DIFFICULTY_HEAD} (with {CLASSES} units) and {PATH_HEAD}, not {units}",
            code="bad_heads",
        )


def dropout_states(model: Any, spec: NetworkSpec) -> dict[str, Any]:
    """State variables, integers of shape (2,), of the dropout layers' seed generators, by layer name.

    A frozen layer, or one of rate 0, draws nothing and has none.
    """
    blocks = range(spec.frozen_blocks + 1, len(spec.hidden_layers) + 1)
    drawing = [block_layers(index)[2] for index in blocks if spec.dropout_rates[index - 1] > 0.0]
    return {name: model.get_layer(name).seed_generator.state for name in drawing}


def seed_dropout(model: Any, spec: NetworkSpec, seed: int) -> None:
    """Restart every dropout layer's seed generator, each with its own seed drawn from ``seed``."""
    states = dropout_states(model, spec)
    for variable, layer_seed in zip(states.values(), layer_seeds(seed, len(states)), strict=True):
        variable.assign(np.array([layer_seed, 0], dtype=variable.numpy().dtype))


def compiled(function: Callable[..., Any], signature: Sequence[Any]) -> Any:
    """``tf.function`` with a fixed signature: it is traced once, and a call that does not fit is an error."""
    import tensorflow as tf

    return tf.function(function, input_signature=list(signature), autograph=False, reduce_retracing=False)
