"""The writer that ``MainModelTrainer.save_model`` takes when a model was trained by hand, outside the curriculum pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aivo_core.encoding.encoder import Encoder
from aivo_core.network import NetworkSpec, Weights
from models_store.model_card import CardContent, model_card
from models_store.models import MainModelVersion, VersionOrigin
from models_store.version_files import write_version_files
from models_store.versions import publish, reserve_version

VersionWriter = Callable[[NetworkSpec, Weights, dict[str, Any]], MainModelVersion]


def version_writer(
    *,
    encoder: Encoder,
    content_mix: float = 0.0,
    parent: MainModelVersion | None = None,
    lineage: Mapping[str, Any] | None = None,
    data: Sequence[str] = (),
) -> VersionWriter:
    """A writer that makes a new candidate version of what it is given; it never overwrites one.

    Args:
        encoder: the one that the training samples were made with; the version can be used with no other.
        content_mix: weight of the encoder's own forecast in the content head's, 0..0.4, chosen on validation learners.
        lineage: JSON-ready, for the manifest.
        data: lines for the model card on what it was trained with; counts, never names.

    Returns:
        ``writer(spec, weights, metrics) -> MainModelVersion``, a row in status CANDIDATE. It raises ``StoreError`` and
        ``NetworkError`` for weights that cannot be stored.
    """

    def write(spec: NetworkSpec, weights: Weights, metrics: dict[str, Any]) -> MainModelVersion:
        row = reserve_version(origin=VersionOrigin.TRAINED, parent=parent, architecture=spec.to_json())
        card = CardContent(
            version=row.version,
            origin="Trained outside the curriculum pipeline; no comparison with baselines was made.",
            spec=spec,
            data=data or ("Not stated by whoever trained it.",),
        )
        files = write_version_files(
            version=row.version,
            spec=spec,
            weights=weights,
            encoder=encoder,
            content_mix=content_mix,
            metrics=metrics,
            lineage={"origin": row.origin, "parent": parent.version if parent else None, **(lineage or {})},
            card=model_card(card),
        )
        publish(
            row=row,
            files=files,
            content_mix=content_mix,
            training_metrics=metrics,
            metadata={"weights_sha256": files.weights_sha256},
        )
        return row

    return write
