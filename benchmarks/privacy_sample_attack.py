"""A membership attack on private local training: was one training sample among a learner's?

As ``benchmarks.privacy_attack``, for the other claim. The attacker knows the start, the settings, all other samples and the
canary, and sees the tail after training. By gradient descent with a small step the tail moves against the sum of all noised
sums; each of them holds the canary's gradient, clipped to norm C in a known direction, or does not. The statistic is the way
along that direction, less what the other samples are expected to add, so scaled that the canary moves it by 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aivo_core.engine.contract import LearnerTask, LocalTrainingConfig
from aivo_core.engine.private import sample_privacy
from aivo_core.engine.private_reference import NumpyPrivateTail
from aivo_core.engine.tail import tail_base
from aivo_core.network import FloatArray, NetworkSpec, Weights
from aivo_core.samples import Samples
from benchmarks.privacy_attack import Bound, bound

Trains = Callable[[LearnerTask], FloatArray]
"""The tail after a private training of the task, (tail_size,) float32."""


@dataclass(frozen=True)
class Target:
    """What is attacked; the canary is the last of ``samples``.

    Attributes:
        config: gradient descent without momentum, dropout and proximal term, so that the attacker loses nothing to them.
    """

    spec: NetworkSpec
    weights: Weights
    start: FloatArray
    samples: Samples
    config: LocalTrainingConfig

    def task(self, *, with_canary: bool) -> LearnerTask:
        count = len(self.samples) - (0 if with_canary else 1)
        return LearnerTask("audited", self.samples.take(slice(0, count)), self.start, self.start, 0)


def attack_training(target: Target, train: Trains, *, delta: float, trainings: int, confidence: float) -> Bound:
    """Train ``trainings`` times with and as many times without the canary, and bound ε.

    Raises:
        ValueError: the settings would blunt the attack, or the canary's gradient is shorter than C.
    """
    config = target.config
    if config.optimiser != "sgd" or config.momentum or config.dropout or config.proximal_mu:
        raise ValueError("the attack needs plain gradient descent: sgd, no momentum, no dropout, proximal_mu 0")
    direction, others = _gradients(target)

    def statistic(with_canary: bool) -> float:
        task = target.task(with_canary=with_canary)
        released = sample_privacy(config, len(task.samples))
        moved = (train(task).astype(np.float64) - target.start) @ direction
        rate = released.q_num / released.q_den
        along = -moved * released.q_num / (config.learning_rate * released.clip_norm * released.steps)
        return float(along / rate - others)

    pairs = np.array([(statistic(True), statistic(False)) for _ in range(trainings)])
    normal = config.batch_size >= len(target.samples)
    return bound(pairs[:, 0], pairs[:, 1], delta=delta, confidence=confidence, normal=normal)


def _gradients(target: Target) -> tuple[npt.NDArray[np.float64], float]:
    """The canary's direction, (tail_size,), and how far all others together move along it, in C."""
    base = tail_base(target.spec, target.weights)
    tail = NumpyPrivateTail(base, target.config, target.task(with_canary=True))
    clip_norm = float(target.config.sample_clip_norm or 0.0)
    last = len(target.samples) - 1

    def clipped(rows: list[int]) -> npt.NDArray[np.float64]:
        tail.clipped_sum(np.array(rows, dtype=np.int32), np.zeros(len(rows), dtype=np.uint64))
        return tail.last_sum().astype(np.float64)

    own = clipped([last])
    norm = float(np.linalg.norm(own))
    if norm < 0.99 * clip_norm:
        raise ValueError(f"the canary's gradient has norm {norm:.3g}, below the clipping norm {clip_norm}: it would hide")
    direction = own / norm
    return direction, float(clipped(list(range(last))) @ direction) / clip_norm
