"""The files of one main model version: manifest, weights, encoder and model card; all immutable.

The manifest lists the other files with their sums; the row's ``manifest_sha256`` stands for all of them. A version that
was begun and never finished leaves files without a row behind: a later try then takes a folder of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from aivo_core.encoding.encoder import Encoder
from aivo_core.encoding.errors import EncodingError
from aivo_core.network import FloatArray, NetworkError, NetworkSpec, Weights, check_weights
from aivo_core.tensors import DEFAULT_MAX_HEADER, LENGTH_BYTES, TensorFileError, read_any, read_tensors, write_tensors
from models_store.cache import RecentlyUsed
from models_store.errors import StoreError
from models_store.files import MAIN_MODELS, StoredFile, checksum, read_file, read_unverified, replace_file, write_files
from models_store.models import MainModelVersion

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
ENCODER_JSON = "encoder.json"
ENCODER_TENSORS = "encoder.safetensors"
MODEL_CARD = "MODEL_CARD.md"
VERSION_FILES = (MANIFEST, WEIGHTS, ENCODER_JSON, ENCODER_TENSORS, MODEL_CARD)
ACTIVE_POINTER = "ACTIVE.json"

MANIFEST_KIND = "aivo-main-model"
MANIFEST_FORMAT = 1
MAX_JSON_BYTES = 64 * 1024 * 1024
MAX_FOLDER_TRIES = 100
CACHED_VERSIONS = 4


@dataclass(frozen=True)
class VersionFiles:
    """Where a version's files are, and the sums that its row keeps."""

    model_path: str
    manifest_sha256: str
    encoder_sha256: str
    weights_sha256: str


@dataclass(frozen=True)
class LoadedVersion:
    """A main model version in memory; shared between its users, so its arrays are read-only.

    Attributes:
        weights: float32 tensors by the names of ``spec.tensors``.
        tail: (spec.tail_size,) float32, the tail within ``weights``.
        content_mix: weight of the encoder's own forecast in the content head's, 0..0.4.
    """

    version: str
    spec: NetworkSpec
    weights: dict[str, FloatArray]
    tail: FloatArray
    encoder: Encoder
    content_mix: float
    manifest: dict[str, Any]

    @property
    def weights_sha256(self) -> str:
        return str(self.manifest["files"][WEIGHTS]["sha256"])

    def with_freeze_layers(self, freeze_layers: Sequence[str]) -> LoadedVersion:
        """The same version with another end of its trunk: the tail of a clone that freezes more or fewer layers.

        Raises:
            NetworkError: the list is no prefix of the network.
        """
        if tuple(freeze_layers) == self.spec.freeze_layers:
            return self
        spec = self.spec.with_freeze_layers(freeze_layers)
        return replace(self, spec=spec, tail=spec.flatten_tail(self.weights))


def write_version_files(
    *,
    version: str,
    spec: NetworkSpec,
    weights: Weights,
    encoder: Encoder,
    content_mix: float,
    metrics: Mapping[str, Any],
    lineage: Mapping[str, Any],
    card: str,
) -> VersionFiles:
    """Write all files of a version; durable on return, and nothing points to them yet.

    Args:
        metrics, lineage: JSON-ready; numbers must be finite.
        card: text of ``MODEL_CARD.md``.

    Raises:
        NetworkError: a tensor is missing or wrong.
        StoreError: ``bad_file`` for weights that are not finite, ``bad_path`` for a bad version name.
    """
    check_weights(weights, spec.tensors)
    tensors = {tensor.name: np.ascontiguousarray(weights[tensor.name]) for tensor in spec.tensors}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise StoreError(f"tensor {name} holds values that are infinite or not a number", code="bad_file")
    files = {
        WEIGHTS: write_tensors(tensors, metadata={"kind": MANIFEST_KIND, "version": version}),
        **encoder_files(encoder),
        MODEL_CARD: card.encode(),
    }
    manifest = {
        "kind": MANIFEST_KIND,
        "format": MANIFEST_FORMAT,
        "version": version,
        "spec": spec.to_json(),
        "tensors": [{"name": tensor.name, "shape": list(tensor.shape)} for tensor in spec.tensors],
        "tail_tensors": [tensor.name for tensor in spec.tail_tensors],
        "frozen_blocks": spec.frozen_blocks,
        "content_mix": content_mix,
        "encoder_sha256": encoder.sha256,
        "metrics": dict(metrics),
        "lineage": dict(lineage),
        "files": {name: {"sha256": checksum(data), "bytes": len(data)} for name, data in files.items()},
        "signature": {"algorithm": None, "key_id": None, "value": None},
    }
    manifest_data = canonical_json(manifest)
    folder = _write_into_own_folder(version, {**files, MANIFEST: manifest_data})
    return VersionFiles(
        model_path=folder,
        manifest_sha256=checksum(manifest_data),
        encoder_sha256=encoder.sha256,
        weights_sha256=checksum(files[WEIGHTS]),
    )


def load_version(row: MainModelVersion) -> LoadedVersion:
    """The version in memory; every sum is verified when it is not there yet.

    Raises:
        StoreError: ``missing_file`` (a row without files too), ``checksum_mismatch``, ``bad_path``, ``bad_file``.
    """
    return load_version_files(
        version=row.version, model_path=row.model_path, manifest_sha256=row.manifest_sha256, encoder_sha256=row.encoder_sha256
    )


def load_version_files(*, version: str, model_path: str, manifest_sha256: str, encoder_sha256: str) -> LoadedVersion:
    """As ``load_version``, of a version whose row need not be read again.

    Raises:
        StoreError: as ``load_version``.
    """
    if not model_path or not manifest_sha256:
        raise StoreError(f"version {version} has no files yet", code="missing_file")
    key = (version, model_path, manifest_sha256)
    return _loaded.get_or_make(key, lambda: _load(version, model_path, manifest_sha256, encoder_sha256))


def read_manifest(*, model_path: str, sha256: str) -> dict[str, Any]:
    """A version's manifest.

    Raises:
        StoreError: as ``load_version``.
    """
    path = f"{model_path}/{MANIFEST}"
    data = _read_json(path, read_file(alias=MAIN_MODELS, path=path, sha256=sha256, max_bytes=MAX_JSON_BYTES))
    if data.get("kind") != MANIFEST_KIND or data.get("format") != MANIFEST_FORMAT:
        raise StoreError(f"{path}: kind and format must be {MANIFEST_KIND} {MANIFEST_FORMAT}", code="bad_file")
    files = data.get("files")
    if not isinstance(files, dict) or set(files) != set(VERSION_FILES) - {MANIFEST}:
        raise StoreError(f"{path}: files must name {', '.join(VERSION_FILES[1:])}", code="bad_file")
    return data


def encoder_files(encoder: Encoder) -> dict[str, bytes]:
    """An encoder's two files by name."""
    text, tensors = encoder.to_files()
    return {ENCODER_JSON: text, ENCODER_TENSORS: write_tensors(tensors)}


def read_encoder(*, folder: str, sums: Mapping[str, str], encoder_sha256: str) -> Encoder:
    """The encoder whose files lie in ``folder``.

    Args:
        sums: sha256 of each of the two files, by name.
        encoder_sha256: the encoder's own hash, over its content.

    Raises:
        StoreError: as ``load_version``; ``checksum_mismatch`` too when it is another encoder.
    """
    text, tensor_data = (
        read_file(alias=MAIN_MODELS, path=f"{folder}/{name}", sha256=sums[name]) for name in (ENCODER_JSON, ENCODER_TENSORS)
    )
    try:
        tensors: dict[str, npt.NDArray[np.generic]] = dict(read_any(tensor_data))
        encoder = Encoder.from_files(text, tensors)
    except (TensorFileError, EncodingError) as error:
        raise StoreError(f"the encoder in {folder} cannot be read: {error}", code="bad_file") from error
    if encoder.sha256 != encoder_sha256:
        raise StoreError(f"{folder} holds encoder {encoder.sha256}, expected {encoder_sha256}", code="checksum_mismatch")
    return encoder


def write_active_pointer(*, version: MainModelVersion) -> StoredFile:
    """Write ``ACTIVE.json`` for programs without the database."""
    return replace_file(alias=MAIN_MODELS, path=ACTIVE_POINTER, data=canonical_json(active_pointer(version)))


def read_active_pointer() -> dict[str, Any] | None:
    """What ``ACTIVE.json`` says, None when there is none.

    Raises:
        StoreError: ``bad_file`` when it is no JSON object.
    """
    try:
        data = read_unverified(alias=MAIN_MODELS, path=ACTIVE_POINTER, max_bytes=MAX_JSON_BYTES)
    except StoreError as error:
        if error.code == "missing_file":
            return None
        raise
    return _read_json(ACTIVE_POINTER, data)


def active_pointer(version: MainModelVersion) -> dict[str, Any]:
    """What ``ACTIVE.json`` must say while ``version`` is active."""
    return {
        "version": version.version,
        "sequence": version.sequence,
        "path": version.model_path,
        "manifest_sha256": version.manifest_sha256,
        "encoder_sha256": version.encoder_sha256,
    }


def canonical_json(data: Mapping[str, Any]) -> bytes:
    """Sorted, indented JSON with finite numbers only: the same data gives the same bytes."""
    return (json.dumps(data, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def clear_loaded_versions() -> None:
    """Forget all loaded versions of this process."""
    _loaded.clear()


_loaded: RecentlyUsed[tuple[str, str, str], LoadedVersion] = RecentlyUsed(CACHED_VERSIONS)


def _write_into_own_folder(version: str, files: Mapping[str, bytes]) -> str:
    """Write into ``<version>``, or ``<version>.2`` and so on where an unfinished try left other files."""
    for attempt in range(1, MAX_FOLDER_TRIES + 1):
        folder = version if attempt == 1 else f"{version}.{attempt}"
        try:
            write_files(alias=MAIN_MODELS, files=[(f"{folder}/{name}", data) for name, data in files.items()])
        except StoreError as error:
            if error.code != "already_exists":
                raise
        else:
            return folder
    raise StoreError(f"{MAX_FOLDER_TRIES} folders of version {version} are taken already", code="already_exists")


def _load(version: str, model_path: str, manifest_sha256: str, encoder_sha256: str) -> LoadedVersion:
    manifest = read_manifest(model_path=model_path, sha256=manifest_sha256)
    if manifest["version"] != version:
        raise StoreError(f"{model_path} holds version {manifest['version']}, not {version}", code="bad_file")
    sums = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    encoder = read_encoder(folder=model_path, sums=sums, encoder_sha256=encoder_sha256)
    path = f"{model_path}/{WEIGHTS}"
    try:
        spec = NetworkSpec.from_json(manifest["spec"])
        largest = 4 * spec.parameter_count + DEFAULT_MAX_HEADER + LENGTH_BYTES
        data = read_file(alias=MAIN_MODELS, path=path, sha256=sums[WEIGHTS], max_bytes=largest)
        weights = read_tensors(data, expected=spec.tensors)
    except (NetworkError, TensorFileError) as error:
        raise StoreError(f"{path} cannot be used: {error}", code="bad_file") from error
    tail = spec.flatten_tail(weights)
    for array in (*weights.values(), tail):
        array.flags.writeable = False
    return LoadedVersion(
        version=version,
        spec=spec,
        weights=weights,
        tail=tail,
        encoder=encoder,
        content_mix=float(manifest["content_mix"]),
        manifest=manifest,
    )


def _read_json(path: str, data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is no JSON", code="bad_file") from error
    if not isinstance(parsed, dict):
        raise StoreError(f"{path} must hold a JSON object", code="bad_file")
    return parsed
