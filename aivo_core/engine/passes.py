"""What one learner's two passes consist of, laid out for the arithmetic: batches, step sizes, keys of the dropout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aivo_core.engine.contract import LearnerTask, LocalTrainingConfig, SamplePrivacy
from aivo_core.engine.generator import pass_key
from aivo_core.engine.session import BIAS_PASS, TAIL_PASS, BatchPlan, plan_bias_pass, plan_tail_pass
from aivo_core.network import FloatArray
from aivo_core.ordinal import CLASSES

ADAM_BETA_1 = 0.9
ADAM_BETA_2 = 0.999
ADAM_EPSILON = 1e-7
"""Keras's defaults (Kingma and Ba 2015, "Adam"; epsilon is added to the uncorrected root, their section 2, last lines)."""

PRODUCT = "product"
FIRST_PASS_CROSS_ENTROPY = "first_pass_cross_entropy"  # noqa: S105 - a name, not a password
OBJECTIVES = (PRODUCT, FIRST_PASS_CROSS_ENTROPY)
"""``product`` is the contract's. The other is for comparison with frameworks that know neither passes nor ordinal loss:
plain cross entropy of the three heads on first-pass rows, the difficulty head's class being the level's integer part."""


@dataclass(frozen=True)
class TrainingPass:
    """One pass of one learner.

    Attributes:
        plan: the batches; counts: (steps,) int64, samples in each, which come first.
        step_sizes: (steps,) float32; for Adam with the corrections of both moments in it.
        key: of the pass's dropout.
    """

    plan: BatchPlan
    counts: npt.NDArray[np.int64]
    step_sizes: FloatArray
    key: int

    @property
    def steps(self) -> int:
        return len(self.counts)

    def batches(self) -> Iterator[npt.NDArray[np.int32]]:
        """Sample numbers of each batch, without padding."""
        for index, count in zip(self.plan.index, self.counts, strict=True):
            yield index[:count]


@dataclass(frozen=True)
class PassOutcome:
    """What training made of one tail; nothing in it has been checked.

    Attributes:
        tail, after_tail_pass: (tail_size,) float32.
        tail_losses, bias_losses: mean objective per epoch; empty where there is no such pass.
        steps: of both passes.
        privacy: what private training has released; else None.
    """

    tail: FloatArray
    after_tail_pass: FloatArray
    tail_losses: tuple[float, ...]
    bias_losses: tuple[float, ...]
    steps: int
    privacy: SamplePrivacy | None = None


def tail_pass(config: LocalTrainingConfig, task: LearnerTask) -> TrainingPass | None:
    """The pass over the whole tail, where the configuration has one."""
    if not config.trains_tail:
        return None
    return _training_pass(
        plan_tail_pass(config, task), task.seed, TAIL_PASS, config.learning_rate, adam=config.optimiser == "adam"
    )


def bias_pass(config: LocalTrainingConfig, task: LearnerTask) -> TrainingPass | None:
    """The pass over the difficulty head's biases, where the configuration has one."""
    if not config.trains_bias:
        return None
    return _training_pass(plan_bias_pass(config, task), task.seed, BIAS_PASS, config.bias_learning_rate, adam=True)


def _training_pass(plan: BatchPlan, seed: int, number: int, rate: float, *, adam: bool) -> TrainingPass:
    counts = plan.mask.sum(axis=1).astype(np.int64)
    sizes = adam_step_sizes(rate, len(counts)) if adam else np.full(len(counts), rate, dtype=np.float32)
    return TrainingPass(plan=plan, counts=counts, step_sizes=sizes, key=pass_key(seed, number))


def adam_step_sizes(learning_rate: float, steps: int) -> FloatArray:
    """``rate * sqrt(1 - beta_2^t) / (1 - beta_1^t)`` for t = 1..steps, in float32 as Keras computes it: (steps,)."""
    t = np.arange(1, steps + 1, dtype=np.float32)
    one = np.float32(1.0)
    first, second = one - np.float32(ADAM_BETA_1) ** t, one - np.float32(ADAM_BETA_2) ** t
    sizes: FloatArray = np.float32(learning_rate) * np.sqrt(second) / first
    return sizes


def level_classes(level: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """Classes 0..9 of the difficulty head under ``first_pass_cross_entropy``: (n,) levels in [0, 10] -> (n,) int64."""
    classes: npt.NDArray[np.int64] = np.minimum(level, CLASSES - 1).astype(np.int64)
    return classes
