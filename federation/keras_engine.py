"""Local training through Keras: the oracle that faster engines are compared with.

One network per process and ``NetworkSpec`` stays resident; its weights are swapped for each learner, and every step
runs in a function that is traced once. The frozen trunk is a fixed function of the features, so it runs once per learner
and the tail trains on its output; a test compares this with training through the whole network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from aivo_core.engine.contract import EngineError, LearnerResult, LearnerTask, LocalTrainingConfig
from aivo_core.engine.session import (
    BIAS_PASS,
    DROPOUT_STREAM,
    TAIL_PASS,
    BatchPlan,
    check_finite,
    check_task,
    plan_bias_pass,
    plan_tail_pass,
)
from aivo_core.network import (
    CONTENT_HEAD,
    DIFFICULTY_HEAD,
    PATH_HEAD,
    FloatArray,
    NetworkSpec,
    Weights,
    check_weights,
)
from aivo_core.samples import Samples
from models_store import keras_network

_FunctionKey = tuple[str, int, str, float, bool]


class KerasEngine:
    """``LocalTrainingEngine`` on one resident Keras network (``aivo_core.engine.contract`` has the objective).

    A learner's result depends on the spec, the base's trunk and statistics, the configuration, and the task's data, tails
    and seed only: dropout generators and optimiser variables start afresh for each pass, bit for bit. Calls from several
    threads are safe and take turns.

    Args:
        threads: as for ``keras_network.configure_tensorflow``.

    Raises:
        KerasSetupError: TensorFlow already runs with another number of threads.
    """

    name = "keras"

    def __init__(self, *, threads: int | None = None) -> None:
        keras_network.configure_tensorflow(threads)
        self.backend = keras_network.backend_name()

    def train(
        self, *, spec: NetworkSpec, weights: Weights, config: LocalTrainingConfig, tasks: Iterable[LearnerTask]
    ) -> Iterator[LearnerResult]:
        """Train each task in turn, lazily: a task is read from ``tasks`` when the result before it has been taken.

        Args:
            weights: the base version's, all of ``spec.tensors``; its tail is not read.

        Raises:
            NetworkError: ``weights`` lack a tensor or hold one of another shape or dtype.
            KerasSetupError: ``spec`` has other heads than the objective needs.
            EngineError: ``bad_config``: private training, which the engine ``cohort`` has.
        """
        if config.is_private:
            raise EngineError(
                "sample_noise_multiplier must be None with the engine keras: it cannot train privately", code="bad_config"
            )
        resident = resident_network(spec)
        base = resident.check_base(weights)
        return (resident.train(base, config, task) for task in tasks)


_residents: dict[NetworkSpec, ResidentNetwork] = {}
_residents_lock = threading.Lock()


def resident_network(spec: NetworkSpec) -> ResidentNetwork:
    """The one resident network of ``spec`` in this process, built on first use."""
    keras_network.check_trainable(spec)
    with _residents_lock:
        if spec not in _residents:
            _residents[spec] = ResidentNetwork(spec)
        return _residents[spec]


class ResidentNetwork:
    """A Keras network whose weights are swapped for each learner, with its optimisers and traced functions."""

    def __init__(self, spec: NetworkSpec) -> None:
        self.spec = spec
        self._lock = threading.RLock()
        self.model = keras_network.build_network(spec, 0)
        self._trunk = self._compile_trunk()
        self._tail_variables = keras_network.variables_of(self.model, spec.tail_tensors)
        self._dropout_states = list(keras_network.dropout_states(self.model, spec).values())
        self._bias = self.model.get_layer(DIFFICULTY_HEAD).bias
        self._optimisers: dict[tuple[str, float, int], Any] = {}
        self._functions: dict[_FunctionKey, Any] = {}
        self._base: Weights | None = None

    def check_base(self, weights: Weights) -> Weights:
        """A shallow copy of the base version's weights, checked; its identity says what the network holds.

        Raises:
            NetworkError: a tensor is missing or wrong.
        """
        check_weights(weights, self.spec.tensors)
        return dict(weights)

    def trace_counts(self) -> dict[str, int]:
        """How often each function has been traced; 1 each, whatever the number of learners and samples."""
        counts = {"/".join(map(str, key)): int(f.experimental_get_tracing_count()) for key, f in self._functions.items()}
        if self._trunk is not None:
            counts["trunk"] = int(self._trunk.experimental_get_tracing_count())
        return counts

    def train(self, base: Weights, config: LocalTrainingConfig, task: LearnerTask) -> LearnerResult:
        """Train one learner's task on a base from ``check_base``; a refused or diverged one gives an error result."""
        started = time.perf_counter()
        try:
            check_task(self.spec, task)
            with self._lock:
                tail, after_tail_pass, losses, steps = self._train(base, config, task)
        except EngineError as error:
            return LearnerResult(
                key=task.key,
                samples=len(task.samples),
                seconds=time.perf_counter() - started,
                error_code=error.code,
                error_message=str(error),
                backend=keras_network.backend_name(),
            )
        return LearnerResult(
            key=task.key,
            tail=tail,
            tail_pass_delta=after_tail_pass - task.start_tail,
            losses=losses,
            samples=len(task.samples),
            steps=steps,
            seconds=time.perf_counter() - started,
            backend=keras_network.backend_name(),
        )

    def _train(
        self, base: Weights, config: LocalTrainingConfig, task: LearnerTask
    ) -> tuple[FloatArray, FloatArray, tuple[float, ...], int]:
        self._load_base(base)
        self._write_tail(task.start_tail)
        data = self._learner_tensors(task.samples)
        losses: tuple[float, ...] = ()
        steps = 0
        after_tail_pass = task.start_tail
        if config.trains_tail:
            epoch_losses, count = self._tail_pass(config, task, data)
            losses, steps = losses + epoch_losses, steps + count
            after_tail_pass = self._read_tail()
            check_finite(after_tail_pass, epoch_losses, config.learning_rate, "learning_rate")
        if config.trains_bias:
            epoch_losses, count = self._bias_pass(config, task, data)
            losses, steps = losses + epoch_losses, steps + count
        tail = self._read_tail()
        check_finite(tail, losses, config.bias_learning_rate, "bias_learning_rate")
        return tail, after_tail_pass, losses, steps

    def _load_base(self, base: Weights) -> None:
        if self._base is not base:
            keras_network.write_weights(self.model, self.spec, base)
            self._base = base

    def _write_tail(self, tail: FloatArray) -> None:
        for variable, value in zip(self._tail_variables, self.spec.unflatten_tail(tail).values(), strict=True):
            variable.assign(value)

    def _read_tail(self) -> FloatArray:
        return np.concatenate([variable.numpy().ravel() for variable in self._tail_variables])

    def _learner_tensors(self, samples: Samples) -> list[Any]:
        import tensorflow as tf

        first, second = tf.constant(samples.first), tf.constant(samples.second)
        if self._trunk is not None:
            first, second = self._trunk(first), self._trunk(second)
        return [
            first,
            second,
            tf.constant(samples.content.astype(np.int32)),
            tf.constant(samples.path.astype(np.int32)),
            tf.constant(samples.level.astype(np.float32)),
            tf.constant(samples.score.astype(np.float32)),
        ]

    def _tail_pass(self, config: LocalTrainingConfig, task: LearnerTask, data: list[Any]) -> tuple[tuple[float, ...], int]:
        plan = plan_tail_pass(config, task)
        optimiser = self._optimiser(config.optimiser, config.momentum, TAIL_PASS)
        key = ("tail", config.batch_size, config.optimiser, config.momentum, config.dropout)
        function = self._function(key, lambda: self._compile_tail_pass(optimiser, config.batch_size, config.dropout))
        start = self._start_arguments(config.learning_rate, task.seed, TAIL_PASS)
        return self._run(function, plan, [*start, *data, task.anchor_tail, np.float32(config.proximal_mu)])

    def _bias_pass(self, config: LocalTrainingConfig, task: LearnerTask, data: list[Any]) -> tuple[tuple[float, ...], int]:
        plan = plan_bias_pass(config, task)
        optimiser = self._optimiser("adam", 0.0, BIAS_PASS)
        key = ("difficulty_bias", config.batch_size, "adam", 0.0, config.dropout)
        function = self._function(key, lambda: self._compile_bias_pass(optimiser, config.batch_size, config.dropout))
        start = self._start_arguments(config.bias_learning_rate, task.seed, BIAS_PASS)
        _, second, _, _, level, score = data
        return self._run(function, plan, [*start, second, level, score])

    @staticmethod
    def _run(function: Any, plan: BatchPlan, data: list[Any]) -> tuple[tuple[float, ...], int]:
        losses = function(plan.index, plan.mask, *data).numpy()
        return plan.epoch_means(losses), len(losses)

    def _start_arguments(self, learning_rate: float, seed: int, training_pass: int) -> list[Any]:
        """What ``_start_pass`` takes: the learning rate, and each dropout layer's seed (layers,) int64."""
        words = np.random.SeedSequence([seed, DROPOUT_STREAM, training_pass]).generate_state(1)
        seeds = keras_network.layer_seeds(int(words[0]), len(self._dropout_states))
        return [np.float32(learning_rate), np.array(seeds, dtype=np.int64)]

    def _start_pass(self, optimiser: Any, learning_rate: Any, seeds: Any) -> None:
        """Fresh optimiser state and dropout generators, whatever was trained before; runs inside a traced function."""
        import tensorflow as tf

        for variable in optimiser.variables:
            variable.assign(tf.zeros(variable.shape, variable.dtype))
        optimiser.learning_rate.assign(learning_rate)
        for number, state in enumerate(self._dropout_states):
            state.assign(tf.cast(tf.stack([seeds[number], 0]), state.dtype))

    def _optimiser(self, name: str, momentum: float, training_pass: int) -> Any:
        import keras

        key = (name, momentum, training_pass)
        if key not in self._optimisers:
            optimiser = keras.optimizers.Adam() if name == "adam" else keras.optimizers.SGD(momentum=momentum)
            optimiser.build([self._bias] if training_pass == BIAS_PASS else self._tail_variables)
            self._optimisers[key] = optimiser
        return self._optimisers[key]

    def _function(self, key: _FunctionKey, compile_it: Callable[[], Any]) -> Any:
        if key not in self._functions:
            self._functions[key] = compile_it()
        return self._functions[key]

    def _compile_trunk(self) -> Any | None:
        import tensorflow as tf

        trunk = keras_network.trunk_of(self.model, self.spec)
        if trunk is None:
            return None
        signature = [tf.TensorSpec((None, self.spec.input_dim), tf.float32)]
        return keras_network.compiled(lambda rows: trunk(rows, training=False), signature)

    def _compile_tail_pass(self, optimiser: Any, batch_size: int, dropout: bool) -> Any:
        """(plan, learner's tensors, anchor, mu) -> objective per step; trains the tail variables."""
        import tensorflow as tf

        shapes = [tensor.shape for tensor in self.spec.tail_tensors]
        sizes = [tensor.size for tensor in self.spec.tail_tensors]

        def objective(rows: Any, mask: Any, data: list[Any], anchors: list[Any], mu: Any) -> Any:
            first, second, content, path, level, score = (tf.gather(values, rows) for values in data)
            hidden = self._tail_body(tf.concat([first, second], axis=0), dropout)
            first_hidden = hidden[:batch_size]
            difficulty = keras_network.head_logits(self.model, DIFFICULTY_HEAD, hidden)
            ordinal = keras_network.ordinal_losses(difficulty, tf.tile(level, [2]), tf.tile(score, [2]))
            per_sample = (
                keras_network.class_losses(keras_network.head_logits(self.model, CONTENT_HEAD, first_hidden), content)
                + keras_network.class_losses(keras_network.head_logits(self.model, PATH_HEAD, first_hidden), path)
                + 0.5 * (ordinal[:batch_size] + ordinal[batch_size:])
            )
            tail = [variable.value for variable in self._tail_variables]
            return tf.reduce_sum(per_sample * mask) / tf.reduce_sum(mask) + keras_network.proximal_term(tail, anchors, mu)

        def run(index: Any, mask: Any, learning_rate: Any, seeds: Any, *arguments: Any) -> Any:
            *data, anchor, mu = arguments
            self._start_pass(optimiser, learning_rate, seeds)
            anchors = [tf.reshape(a, shape) for a, shape in zip(tf.split(anchor, sizes), shapes, strict=True)]

            def step(number: Any) -> Any:
                with tf.GradientTape() as tape:
                    loss = objective(index[number], mask[number], data, anchors, mu)
                gradients = tape.gradient(loss, [variable.value for variable in self._tail_variables])
                optimiser.apply(gradients, self._tail_variables)
                return loss

            return _loop(step, tf.shape(index)[0])

        signature = [
            *self._pass_signature(batch_size),
            tf.TensorSpec((None, self.spec.feature_dim), tf.float32),
            tf.TensorSpec((None, self.spec.feature_dim), tf.float32),
            tf.TensorSpec((None,), tf.int32),
            tf.TensorSpec((None,), tf.int32),
            tf.TensorSpec((None,), tf.float32),
            tf.TensorSpec((None,), tf.float32),
            tf.TensorSpec((self.spec.tail_size,), tf.float32),
            tf.TensorSpec((), tf.float32),
        ]
        return keras_network.compiled(run, signature)

    def _compile_bias_pass(self, optimiser: Any, batch_size: int, dropout: bool) -> Any:
        """(plan, second-pass features, level, score) -> ordinal loss per step; trains the difficulty head's bias."""
        import tensorflow as tf

        def run(index: Any, mask: Any, learning_rate: Any, seeds: Any, second: Any, level: Any, score: Any) -> Any:
            self._start_pass(optimiser, learning_rate, seeds)

            def step(number: Any) -> Any:
                rows, weights = index[number], mask[number]
                hidden = self._tail_body(tf.gather(second, rows), dropout)
                with tf.GradientTape() as tape:
                    logits = keras_network.head_logits(self.model, DIFFICULTY_HEAD, hidden)
                    losses = keras_network.ordinal_losses(logits, tf.gather(level, rows), tf.gather(score, rows))
                    loss = tf.reduce_sum(losses * weights) / tf.reduce_sum(weights)
                optimiser.apply(tape.gradient(loss, [self._bias.value]), [self._bias])
                return loss

            return _loop(step, tf.shape(index)[0])

        signature = [
            *self._pass_signature(batch_size),
            tf.TensorSpec((None, self.spec.feature_dim), tf.float32),
            tf.TensorSpec((None,), tf.float32),
            tf.TensorSpec((None,), tf.float32),
        ]
        return keras_network.compiled(run, signature)

    def _pass_signature(self, batch_size: int) -> list[Any]:
        """Of index and mask of a plan, and of ``_start_arguments``."""
        import tensorflow as tf

        return [
            tf.TensorSpec((None, batch_size), tf.int32),
            tf.TensorSpec((None, batch_size), tf.float32),
            tf.TensorSpec((), tf.float32),
            tf.TensorSpec((len(self._dropout_states),), tf.int64),
        ]

    def _tail_body(self, features: Any, dropout: bool) -> Any:
        return keras_network.apply_tail_body(self.model, self.spec, features, dropout=dropout)


def _loop(step: Callable[[Any], Any], steps: Any) -> Any:
    """Run ``step(0) .. step(steps - 1)`` in order inside the graph; float32 (steps,) of what they return."""
    import tensorflow as tf

    def body(number: Any, losses: Any) -> tuple[Any, Any]:
        return number + 1, losses.write(number, step(number))

    losses = tf.TensorArray(tf.float32, size=steps)
    _, losses = tf.while_loop(lambda number, _: number < steps, body, (0, losses), parallel_iterations=1)
    return losses.stack()
