"""Forecasts of a main version, or of a learner's tail on its trunk, in NumPy; the same numbers as Keras to 1e-5.

The trunk is folded once per version and its activations can be kept, so that many tails on the same samples (a blend, a
gate's candidate, a clone) cost only their own small layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aivo_core.inference import FoldedNetwork, FoldedTail, FoldedTrunk, HeadOutputs, fold_tail, fold_trunk
from aivo_core.network import FloatArray
from aivo_core.samples import Samples
from models_store.cache import RecentlyUsed
from models_store.evaluation import Forecast
from models_store.version_files import LoadedVersion

BATCH_SAMPLES = 4096
"""Samples computed at a time: bounds the memory of the hidden layers at some tens of megabytes."""

CACHED_TRUNKS = 8


@dataclass(frozen=True)
class Activations:
    """What a trunk makes of samples: first- and second-pass rows, (n, feature_dim) float32 each."""

    first: FloatArray
    second: FloatArray

    def __len__(self) -> int:
        return len(self.first)


def forecast(loaded: LoadedVersion, tail: FloatArray, samples: Samples) -> Forecast:
    """Probabilities of ``tail`` on the version's trunk, before the content mixture.

    Args:
        tail: (tail_size,) float32; ``loaded.tail`` for the main version itself.

    Raises:
        NetworkError: a tail or rows of a wrong shape or dtype.
    """
    return forecast_network(FoldedNetwork(folded_trunk(loaded), folded_tail(loaded, tail)), samples)


def forecast_network(network: FoldedNetwork, samples: Samples) -> Forecast:
    """As ``forecast``, of a network that need not be stored yet.

    Raises:
        NetworkError: rows of a wrong shape or dtype.
    """
    parts = [(network.forward(samples.first[part]), network.forward(samples.second[part])) for part in _batches(len(samples))]
    return _joined(parts)


def trunk_activations(loaded: LoadedVersion, samples: Samples) -> Activations:
    """Run the version's trunk once, for several calls of ``forecast_tail``.

    Raises:
        NetworkError: rows of a wrong shape or dtype.
    """
    trunk = folded_trunk(loaded)
    first = [trunk.activations(samples.first[part]) for part in _batches(len(samples))]
    second = [trunk.activations(samples.second[part]) for part in _batches(len(samples))]
    return Activations(np.concatenate(first), np.concatenate(second))


def forecast_tail(loaded: LoadedVersion, tail: FloatArray, activations: Activations) -> Forecast:
    """As ``forecast``, from the trunk's activations.

    Raises:
        NetworkError: a tail or activations of a wrong shape or dtype.
    """
    folded = folded_tail(loaded, tail)
    parts = [
        (folded.forward(activations.first[part]), folded.forward(activations.second[part])) for part in _batches(len(activations))
    ]
    return _joined(parts)


def folded_trunk(loaded: LoadedVersion) -> FoldedTrunk:
    """The version's trunk, folded once in this process."""
    key = (loaded.weights_sha256, loaded.spec.frozen_blocks)
    return _trunks.get_or_make(key, lambda: fold_trunk(loaded.spec, loaded.weights))


def folded_tail(loaded: LoadedVersion, tail: FloatArray) -> FoldedTail:
    """``tail`` ready for the version's trunk.

    Raises:
        NetworkError: a tail of a wrong shape or dtype.
    """
    return fold_tail(loaded.spec, loaded.weights, tail)


_trunks: RecentlyUsed[tuple[str, int], FoldedTrunk] = RecentlyUsed(CACHED_TRUNKS)


def _batches(count: int) -> Iterator[slice]:
    """At least one, so that no samples give arrays of no rows."""
    for start in range(0, max(count, 1), BATCH_SAMPLES):
        yield slice(start, start + BATCH_SAMPLES)


def _joined(parts: list[tuple[HeadOutputs, HeadOutputs]]) -> Forecast:
    return Forecast(
        content=np.concatenate([first.content for first, _ in parts]),
        path=np.concatenate([first.path for first, _ in parts]),
        difficulty_first=np.concatenate([first.difficulty for first, _ in parts]),
        difficulty_second=np.concatenate([second.difficulty for _, second in parts]),
    )
