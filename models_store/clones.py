"""What a clone is worth measuring: its base, its difference from it, and how far two models lie apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aivo_core.network import FloatArray, NetworkSpec, TensorSpec
from aivo_core.ordinal import recommended_level
from aivo_core.samples import Samples
from models_store.errors import CloneError
from models_store.forecasting import forecast
from models_store.models import MainModelVersion, PersonalizedModel
from models_store.tail_files import read_tail
from models_store.version_files import LoadedVersion, load_version


@dataclass(frozen=True)
class LayerDifference:
    """How far two models lie apart in one layer.

    Attributes:
        numbers: how many the layer has.
        distance: Euclidean, of all its numbers.
        cosine: of the two vectors; 1 for equal ones, 0 where one of two different ones is zero.
    """

    numbers: int
    distance: float
    cosine: float


@dataclass(frozen=True)
class SamePredictions:
    """Shares of the probe's samples for which two models answer alike.

    Attributes:
        content, path: the most probable class is the same. level: the recommended difficulty level is the same.
    """

    samples: int
    content: float
    path: float
    level: float


@dataclass(frozen=True)
class Comparison:
    """Two models side by side; ``layers`` in network order, ``whole`` over all numbers, ``same`` None without a probe."""

    layers: Mapping[str, LayerDifference]
    whole: LayerDifference
    same: SamePredictions | None


def base_of(model: PersonalizedModel) -> LoadedVersion:
    """The main version that the model's tail is relative to, with the model's own freeze list.

    Raises:
        CloneError: ``no_tail``: the model was never cloned from a version.
        StoreError: the version cannot be read.
    """
    if model.source_version is None or not model.weights_path:
        raise CloneError("the model has no tail: it was not cloned from a main version", code="no_tail")
    loaded = load_version(model.source_version)
    return loaded.with_freeze_layers(model.metadata.get("freeze_layers", loaded.spec.freeze_layers))


def extract_delta(model: PersonalizedModel) -> FloatArray:
    """The model's tail minus the tail of its recorded base: (tail_size,) float32.

    Raises:
        CloneError, StoreError: as ``base_of``; the tail cannot be read.
    """
    base = base_of(model)
    return read_tail(model=model, spec=base.spec) - base.tail


def compare(
    first: MainModelVersion | PersonalizedModel, second: MainModelVersion | PersonalizedModel, *, probe: Samples | None = None
) -> Comparison:
    """Distance and cosine per layer, and with a probe how often both predict the same.

    Args:
        probe: samples encoded by the models' encoder.

    Raises:
        CloneError: ``different_architecture``; ``different_encoder`` with a probe: both cannot be asked the same.
        CloneError, StoreError: as ``base_of``.
    """
    (base, tail), (other_base, other_tail) = _loaded(first), _loaded(second)
    if base.spec.tensors != other_base.spec.tensors:
        raise CloneError("the models have different architectures and cannot be compared", code="different_architecture")
    if probe is not None and base.encoder.sha256 != other_base.encoder.sha256:
        raise CloneError("the models have different encoders: no sample means the same to both", code="different_encoder")
    weights, other = base.spec.with_tail(base.weights, tail), other_base.spec.with_tail(other_base.weights, other_tail)
    layers = {name: _difference(tensors, weights, other) for name, tensors in _by_layer(base.spec).items()}
    same = _same_predictions((base, tail), (other_base, other_tail), probe) if probe is not None else None
    return Comparison(layers=layers, whole=_difference(base.spec.tensors, weights, other), same=same)


def _loaded(model: MainModelVersion | PersonalizedModel) -> tuple[LoadedVersion, FloatArray]:
    if isinstance(model, MainModelVersion):
        loaded = load_version(model)
        return loaded, loaded.tail
    base = base_of(model)
    return base, read_tail(model=model, spec=base.spec)


def _by_layer(spec: NetworkSpec) -> dict[str, tuple[TensorSpec, ...]]:
    layers: dict[str, tuple[TensorSpec, ...]] = {}
    for tensor in spec.tensors:
        layer = tensor.name.partition("/")[0]
        layers[layer] = (*layers.get(layer, ()), tensor)
    return layers


def _difference(
    tensors: tuple[TensorSpec, ...], weights: Mapping[str, FloatArray], other: Mapping[str, FloatArray]
) -> LayerDifference:
    a, b = (np.concatenate([w[t.name].ravel() for t in tensors]).astype(np.float64) for w in (weights, other))
    distance = float(np.linalg.norm(a - b))
    return LayerDifference(numbers=len(a), distance=distance, cosine=_cosine(a, b) if distance else 1.0)


def _cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip(a @ b / norms, -1.0, 1.0)) if norms else 0.0


def _same_predictions(
    first: tuple[LoadedVersion, FloatArray], second: tuple[LoadedVersion, FloatArray], probe: Samples
) -> SamePredictions:
    if not len(probe):
        raise CloneError("the probe has no samples", code="no_samples")
    a, b = forecast(*first, probe), forecast(*second, probe)
    return SamePredictions(
        samples=len(probe),
        content=float(np.mean(a.content.argmax(axis=1) == b.content.argmax(axis=1))),
        path=float(np.mean(a.path.argmax(axis=1) == b.path.argmax(axis=1))),
        level=float(np.mean(recommended_level(a.difficulty_second) == recommended_level(b.difficulty_second))),
    )
