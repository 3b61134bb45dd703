"""Files of flat tails: a learner's own, what a training session changed, and what a round made of many.

All three are safetensors with exactly the tail tensors of the network, float32 in declared order, and are read with
every check a foreign file gets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from aivo_core.network import FloatArray, NetworkSpec
from aivo_core.tensors import DEFAULT_MAX_HEADER, LENGTH_BYTES, TensorFileError, read_flat, write_tensors
from learners.models import LEARNER_ID_PATTERN
from models_store.errors import StoreError
from models_store.files import LEARNER_MODELS, MAIN_MODELS, StoredFile, checksum, read_file, write_file, write_files
from models_store.models import PersonalizedModel

FOLDER_PREFIX = "id-"

_LEARNER_ID = re.compile(LEARNER_ID_PATTERN)


@dataclass(frozen=True)
class TailToWrite:
    """A learner's tail, (tail_size,) float32, and the number of its version."""

    learner_id: str
    number: int
    tail: FloatArray


def learner_folder(learner_id: str) -> str:
    """Folder of a learner in the learner storage; different ids have different folders, also where case is ignored.

    A capital letter becomes ``_`` and its small one, ``_`` is doubled, a dot becomes ``_0``; the prefix keeps clear of names
    that some file systems reserve (``con``, ``nul``).

    Raises:
        StoreError: ``bad_path`` for what is no learner id.
    """
    if not _LEARNER_ID.match(learner_id):
        raise StoreError(f"learner_id must match {LEARNER_ID_PATTERN}, not {learner_id[:80]!a}", code="bad_path")
    return FOLDER_PREFIX + "".join(_encode(character) for character in learner_id)


def write_tail(*, learner_id: str, number: int, spec: NetworkSpec, tail: FloatArray) -> StoredFile:
    """Write version ``number`` (from 1) of a learner's tail.

    Raises:
        NetworkError: ``tail`` is not float32 of shape (spec.tail_size,).
        StoreError: ``bad_path``.
    """
    return write_tails(spec=spec, tails=[TailToWrite(learner_id, number, tail)])[0]


def write_tails(*, spec: NetworkSpec, tails: Sequence[TailToWrite]) -> list[StoredFile]:
    """Write tails of several learners; cheaper than one by one.

    Raises:
        as ``write_tail``.
    """
    files = []
    for entry in tails:
        data = _tail_bytes(spec, entry.tail, {"kind": "tail"})
        name = f"v{entry.number:04d}-{checksum(data)[:8]}.safetensors"
        files.append((f"{learner_folder(entry.learner_id)}/{name}", data))
    return write_files(alias=LEARNER_MODELS, files=files)


def read_tail(*, model: PersonalizedModel, spec: NetworkSpec) -> FloatArray:
    """The learner's own tail, (spec.tail_size,) float32, read-only.

    Raises:
        StoreError: ``missing_file`` (a row without one too), ``checksum_mismatch``, ``bad_path``, ``bad_file``.
    """
    if not model.weights_path:
        raise StoreError("the learner's model has no weights yet", code="missing_file")
    return _read_flat(LEARNER_MODELS, model.weights_path, model.weights_sha256, spec)


def read_tail_file(*, path: str, sha256: str, spec: NetworkSpec) -> FloatArray:
    """As ``read_tail``, of any tail whose path and sum are known."""
    return _read_flat(LEARNER_MODELS, path, sha256, spec)


def write_delta(*, learner_id: str, session_id: UUID | str, spec: NetworkSpec, delta: FloatArray) -> StoredFile:
    """Write what one training session changed: (spec.tail_size,) float32.

    Raises:
        as ``write_tail``.
    """
    data = _tail_bytes(spec, delta, {"kind": "delta"})
    path = f"{learner_folder(learner_id)}/deltas/{session_id}-{checksum(data)[:8]}.safetensors"
    return write_file(alias=LEARNER_MODELS, path=path, data=data)


def read_delta(*, path: str, sha256: str, spec: NetworkSpec) -> FloatArray:
    """A session's delta, (spec.tail_size,) float32, read-only.

    Raises:
        StoreError: as ``read_tail``.
    """
    return _read_flat(LEARNER_MODELS, path, sha256, spec)


def write_aggregate(
    *, round_sequence: int, attempt: int, spec: NetworkSpec, aggregate: FloatArray, metadata: Mapping[str, Any]
) -> StoredFile:
    """Write the aggregate of one attempt of a round: (spec.tail_size,) float32; ``metadata`` is JSON-ready.

    Raises:
        NetworkError: a wrong shape or dtype.
        StoreError: ``already_exists`` when the attempt has another aggregate already.
    """
    described = {key: json.dumps(value, sort_keys=True, allow_nan=False) for key, value in metadata.items()}
    data = _tail_bytes(spec, aggregate, {"kind": "aggregate", **described})
    return write_file(alias=MAIN_MODELS, path=f"rounds/{round_sequence}/attempt-{attempt}.safetensors", data=data)


def read_aggregate(*, path: str, sha256: str, spec: NetworkSpec) -> FloatArray:
    """A round's aggregate, (spec.tail_size,) float32, read-only.

    Raises:
        StoreError: as ``read_tail``.
    """
    return _read_flat(MAIN_MODELS, path, sha256, spec)


def _encode(character: str) -> str:
    if character == "_":
        return "__"
    if character == ".":
        return "_0"
    return f"_{character.lower()}" if character.isupper() else character


def _tail_bytes(spec: NetworkSpec, tail: FloatArray, metadata: Mapping[str, str]) -> bytes:
    return write_tensors(spec.unflatten_tail(tail), metadata=metadata)


def _read_flat(alias: str, path: str, sha256: str, spec: NetworkSpec) -> FloatArray:
    largest = 4 * spec.tail_size + DEFAULT_MAX_HEADER + LENGTH_BYTES
    data = read_file(alias=alias, path=path, sha256=sha256, max_bytes=largest)
    try:
        flat = read_flat(data, expected=spec.tail_tensors)
    except TensorFileError as error:
        raise StoreError(f"the file {path} cannot be used: {error}", code="bad_file") from error
    if flat.flags.writeable:
        flat.flags.writeable = False
    return flat
