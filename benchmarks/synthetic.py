"""Learners whose samples are random: speed and memory do not depend on what is learnt. No TensorFlow, no Django."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from aivo_core.engine.contract import LearnerTask
from aivo_core.network import CONTENT_HEAD, PATH_HEAD, FloatArray, NetworkSpec
from aivo_core.samples import Samples

POOL = 100
"""Different learners' samples that are held; more learners than that use them again, each with a seed of its own."""


def random_weights(spec: NetworkSpec, seed: int = 0) -> dict[str, FloatArray]:
    """Every tensor of ``spec``: kernels as he_normal draws them, moving variances and gammas around 1, the rest around 0."""
    rng = np.random.default_rng(seed)
    weights = {}
    for tensor in spec.tensors:
        if tensor.name.endswith("/kernel"):
            value = rng.normal(0.0, np.sqrt(2.0 / tensor.shape[0]), tensor.shape)
        elif tensor.name.endswith(("/gamma", "/moving_variance")):
            value = rng.uniform(0.8, 1.2, tensor.shape)
        else:
            value = rng.normal(0.0, 0.05, tensor.shape)
        weights[tensor.name] = value.astype(np.float32)
    return weights


def random_samples(spec: NetworkSpec, *, samples: int, seed: int) -> Samples:
    """``samples`` samples; the second pass differs from the first in a few columns, as the encoder's does."""
    units = {head.name: head.units for head in spec.heads}
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(samples, spec.input_dim)).astype(np.float32)
    second = first.copy()
    second[:, : spec.input_dim // 16] += np.float32(0.1)
    return Samples(
        first=first,
        second=second,
        content=rng.integers(0, units[CONTENT_HEAD], samples),
        path=rng.integers(0, units[PATH_HEAD], samples),
        level=rng.uniform(0.5, 9.5, samples).astype(np.float32),
        score=rng.integers(0, 2, samples).astype(np.float32),
        position=np.arange(1, samples + 1),
        content_prior=np.full((samples, units[CONTENT_HEAD]), 1.0 / units[CONTENT_HEAD], dtype=np.float32),
        events=samples + 1,
    )


def sample_pool(spec: NetworkSpec, *, learners: int, samples: int) -> list[Samples]:
    """Samples of at most ``POOL`` learners."""
    return [random_samples(spec, samples=samples, seed=seed) for seed in range(min(learners, POOL))]


def tasks(tail: FloatArray, pool: Sequence[Samples], learners: int, first_seed: int = 0) -> Iterator[LearnerTask]:
    """One task per learner, made when it is asked for; all start from ``tail``."""
    for number in range(first_seed, first_seed + learners):
        yield LearnerTask(str(number), pool[number % len(pool)], tail, tail, number)
