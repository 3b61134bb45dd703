"""Private local training: DP-SGD on training samples (Abadi et al. 2016, "Deep Learning with Differential Privacy").

A training sample is its first- and its second-pass row, drawn and clipped together. A step takes each of the n samples
independently with chance b / n, b being the batch size that is expected; sums the samples' gradients of

    content cross entropy + path cross entropy + 1/2 ordinal loss (first pass) + 1/2 ordinal loss (second pass)

by all numbers of the tail, each clipped as a whole to L2 norm C; adds one Gaussian draw of standard deviation z C to the
sum; and divides by b, whatever the number that was drawn. An empty batch takes its step like any other. The proximal
term's gradient depends on no data and comes on top without noise, and an optimiser's state is made of noised gradients
alone. There are ceil(epochs n / b) steps; n and b are taken to be public.

Dropout draws its masks from a fresh key per drawn sample and step, not from a sample's place in the batch: a sample more
or less then changes no other sample's mask, and nothing is claimed of the masks' randomness. A sample whose gradient is
not finite adds nothing to the sum. No loss is told: it would leave without noise.

What floating point adds to the ideal mechanism: one sample's gradient as computed has a norm of at most C, all roundings
of its own included. The sum over a batch is rounded to single precision in an order that depends on the batch, which can
move it by about 1e-6 C more; noise is drawn and added in double precision (``aivo_core.privacy`` has its limits).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from aivo_core.engine.contract import LearnerTask, LocalTrainingConfig, SamplePrivacy
from aivo_core.engine.passes import PassOutcome, adam_step_sizes
from aivo_core.network import FloatArray
from aivo_core.privacy import DoubleArray, gaussian
from aivo_core.privacy_sampling import Randomness, uniform_integers

Rows = npt.NDArray[np.int32]
Keys = npt.NDArray[np.uint64]

CLIP_ALLOWANCE = 2.0**-20
"""Times the norm that the gradient would have if nothing cancelled: above all roundings of a sample's gradient, which
are some 2^-23 of that."""

SQUARE_ALLOWANCE = 1e-12
"""As much of the squares for the rounding of the norm itself, in double precision."""


class ChanceSource(Protocol):
    """Where a private training takes its chance from; another than a secure one is for tests alone."""

    def random_bytes(self, count: int) -> bytes:
        """``count`` uniform bytes."""
        ...

    def noise(self, size: int, std: float) -> DoubleArray:
        """(size,) independent draws from N(0, std^2); the caller may change them and uses them before the next call."""
        ...


class SystemChance:
    """The operating system's secure generator."""

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)

    def noise(self, size: int, std: float) -> DoubleArray:
        return gaussian(size, std)


class PrivateTail(Protocol):
    """One learner's tail while it is trained privately."""

    def clipped_sum(self, rows: Rows, keys: Keys) -> None:
        """Sum the clipped gradients of the samples ``rows``; their dropout is by ``keys``, one per sample."""
        ...

    def noised_step(self, noise: DoubleArray, expected: int, size: np.float32) -> None:
        """Add (tail_size,) ``noise`` to the sum, divide by ``expected`` and take an optimiser's step of ``size``."""
        ...

    def tail(self) -> FloatArray:
        """(tail_size,) float32, a copy."""
        ...


def sample_privacy(config: LocalTrainingConfig, samples: int) -> SamplePrivacy:
    """What private training on so many samples will release; it is known before training begins.

    Raises:
        ValueError: the configuration is not private.
    """
    if config.sample_clip_norm is None or config.sample_noise_multiplier is None:
        raise ValueError("the configuration has no sample_clip_norm and sample_noise_multiplier")
    expected = min(config.batch_size, samples)
    return SamplePrivacy(
        steps=-(-config.epochs * samples // expected),
        q_num=expected,
        q_den=samples,
        noise_multiplier=config.sample_noise_multiplier,
        clip_norm=config.sample_clip_norm,
    )


def train_privately(
    config: LocalTrainingConfig, task: LearnerTask, new_tail: Callable[[], PrivateTail], chance: ChanceSource
) -> PassOutcome:
    """All steps of one learner's checked task."""
    samples = len(task.samples)
    privacy = sample_privacy(config, samples)
    std, size = privacy.noise_multiplier * privacy.clip_norm, task.start_tail.size
    with np.errstate(all="ignore"):  # a learner who diverges is told so by what comes out
        tail = new_tail()
        for step_size in _step_sizes(config, privacy.steps):
            rows = poisson_rows(samples, privacy.q_num, chance.random_bytes)
            tail.clipped_sum(rows, np.frombuffer(chance.random_bytes(8 * len(rows)), dtype=np.uint64))
            tail.noised_step(chance.noise(size, std), privacy.q_num, step_size)
    trained = tail.tail()
    return PassOutcome(trained, trained.copy(), (), (), privacy.steps, privacy)


def poisson_rows(samples: int, expected: int, randomness: Randomness) -> Rows:
    """Numbers of the samples that are drawn, each independently with chance ``expected / samples``, in order."""
    drawn: Rows = np.flatnonzero(uniform_integers(samples, samples, randomness=randomness) < np.uint64(expected)).astype(np.int32)
    return drawn


def _step_sizes(config: LocalTrainingConfig, steps: int) -> FloatArray:
    if config.optimiser == "adam":
        return adam_step_sizes(config.learning_rate, steps)
    return np.full(steps, config.learning_rate, dtype=np.float32)
