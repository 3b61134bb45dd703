"""Small seeded samples and weights for tests of the network, where what is learnt does not matter."""

from __future__ import annotations

import numpy as np

from aivo_core.network import CONTENT_HEAD, DIFFICULTY_HEAD, PATH_HEAD, FloatArray, HeadSpec, NetworkSpec
from aivo_core.samples import Samples

TINY = NetworkSpec(
    input_dim=6,
    hidden_layers=(5, 4, 3),
    dropout_rates=(0.3, 0.2, 0.2),
    heads=(HeadSpec(CONTENT_HEAD, 4), HeadSpec(DIFFICULTY_HEAD, 10), HeadSpec(PATH_HEAD, 3)),
    freeze_layers=("shared_dense_1", "shared_bn_1", "shared_dropout_1"),
)


def make_samples(spec: NetworkSpec, n: int, seed: int) -> Samples:
    """n samples whose labels depend on the features, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    units = {head.name: head.units for head in spec.heads}
    first = rng.normal(size=(n, spec.input_dim)).astype(np.float32)
    second = first + rng.normal(scale=0.2, size=first.shape).astype(np.float32)
    level = rng.uniform(0.5, 9.5, n).astype(np.float32)
    return Samples(
        first=first,
        second=second,
        content=(np.abs(first[:, 0]) * 2).astype(np.int64) % units[CONTENT_HEAD],
        path=(first[:, 1] > 0).astype(np.int64),
        level=level,
        score=(5 + 4 * first[:, 2] > level).astype(np.float32),
        position=np.arange(1, n + 1, dtype=np.int64),
        content_prior=np.full((n, units[CONTENT_HEAD]), 1.0 / units[CONTENT_HEAD], dtype=np.float32),
        events=n + 1,
    )


def make_weights(spec: NetworkSpec, seed: int) -> dict[str, FloatArray]:
    """Random weights, moving statistics and normalisation parameters all far from their initial values."""
    rng = np.random.default_rng(seed)
    weights: dict[str, FloatArray] = {}
    for tensor in spec.tensors:
        if tensor.name.endswith("/kernel"):
            value = rng.normal(scale=np.sqrt(1.0 / tensor.shape[0]), size=tensor.shape)
        elif tensor.name.endswith(("/moving_variance", "/gamma")):
            value = rng.uniform(0.5, 2.0, size=tensor.shape)
        else:
            value = rng.normal(scale=0.3, size=tensor.shape)
        weights[tensor.name] = value.astype(np.float32)
    return weights


def logits_in_double(spec: NetworkSpec, weights: dict[str, FloatArray], x: np.ndarray) -> dict[str, np.ndarray]:
    """The network layer by layer in float64, nothing folded, moving statistics used: what the fast code is compared with."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    hidden = x.astype(np.float64)
    for i in range(1, len(spec.hidden_layers) + 1):
        hidden = np.maximum(hidden @ w[f"shared_dense_{i}/kernel"] + w[f"shared_dense_{i}/bias"], 0.0)
        bn = f"shared_bn_{i}"
        hidden = (hidden - w[f"{bn}/moving_mean"]) / np.sqrt(w[f"{bn}/moving_variance"] + 1e-3) * w[f"{bn}/gamma"] + w[
            f"{bn}/beta"
        ]
    return {head.name: hidden @ w[f"{head.name}/kernel"] + w[f"{head.name}/bias"] for head in spec.heads}


def softmax_in_double(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
