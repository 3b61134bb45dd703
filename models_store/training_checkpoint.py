"""What a main training needs to go on after a crash, as bytes, and where the bytes are kept."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from aivo_core.network import FloatArray
from aivo_core.tensors import TensorFileError, peek_metadata, read_any, write_tensors

FORMAT = 1


class CheckpointError(ValueError):
    """Bytes that are no checkpoint, or one cut short; the message says what is wrong."""


class Checkpoint(Protocol):
    """Keeps the latest checkpoint of one training."""

    def load(self) -> bytes | None:
        """The bytes of the last ``save``; None when there are none."""
        ...

    def save(self, data: bytes) -> None:
        """Replace what is kept, as a whole or not at all."""
        ...

    def clear(self) -> None:
        """Forget what is kept; nothing happens when there is nothing."""
        ...


@dataclass(frozen=True)
class FileCheckpoint:
    """A checkpoint in one local file, replaced atomically: temporary name in the same folder, fsync, rename, fsync."""

    path: Path

    def load(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def save(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(self.path.parent)

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave.

    Attributes:
        epoch: from 1.
        loss: mean training loss, batches weighted by their rows.
        validation_loss: weighted sum of the heads' validation losses, which early stopping looks at.
        validation: content, difficulty and path loss on the validation learners, each a mean over its own rows.
        learning_rate: that the epoch was trained with.
        seconds: wall time of the epoch.
    """

    epoch: int
    loss: float
    validation_loss: float
    validation: tuple[float, float, float]
    learning_rate: float
    seconds: float


@dataclass
class Progress:
    """Where early stopping and the learning-rate plateau stand after an epoch."""

    best_epoch: int = 0
    best_loss: float = float("inf")
    epochs_without_best: int = 0
    plateau_loss: float = float("inf")
    plateau_epochs: int = 0
    finished: bool = False


@dataclass
class TrainingState:
    """All that changes while the main model trains.

    Attributes:
        weights, best: the network's tensors now and at the best epoch, by name.
        optimiser: the optimiser's variables in Keras's order, iteration and learning rate among them.
        dropout: seed-generator state (2,) of each dropout layer, by layer name.
    """

    weights: dict[str, FloatArray]
    best: dict[str, FloatArray]
    optimiser: list[npt.NDArray[Any]]
    dropout: dict[str, npt.NDArray[Any]]
    progress: Progress = field(default_factory=Progress)
    history: list[EpochRecord] = field(default_factory=list)


def encode_state(state: TrainingState, *, fingerprint: str) -> bytes:
    """One safetensors file, progress and history in its metadata; ``fingerprint`` names the training it belongs to.

    Integers are kept as int64, whatever Keras counts in.
    """
    tensors: dict[str, npt.NDArray[Any]] = {}
    for group, values in (("weights", state.weights), ("best", state.best), ("dropout", state.dropout)):
        tensors.update({f"{group}/{name}": _storable(value) for name, value in values.items()})
    tensors.update({f"optimiser/{number:06}": _storable(value) for number, value in enumerate(state.optimiser)})
    header = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "progress": asdict(state.progress),
        "history": [asdict(record) for record in state.history],
        "sha256": _digest(tensors),
    }
    return write_tensors(tensors, metadata={"training": json.dumps(header)})


def read_fingerprint(data: bytes) -> str:
    """The fingerprint that ``encode_state`` was given.

    Raises:
        CheckpointError: not a checkpoint.
    """
    return str(_read(data)[0]["fingerprint"])


def decode_state(data: bytes) -> TrainingState:
    """Inverse of ``encode_state``.

    Raises:
        CheckpointError: not a checkpoint, one of another format, cut short or altered.
    """
    header, tensors = _read(data)
    try:
        progress = Progress(**header["progress"])
        history = [EpochRecord(**{**record, "validation": tuple(record["validation"])}) for record in header["history"]]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"the checkpoint's header cannot be read: {error}") from error
    return TrainingState(
        weights=_group(tensors, "weights"),
        best=_group(tensors, "best"),
        optimiser=[value for _, value in sorted(_group(tensors, "optimiser").items())],
        dropout=_group(tensors, "dropout"),
        progress=progress,
        history=history,
    )


def _read(data: bytes) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    try:
        header = json.loads(peek_metadata(data)["training"])
        tensors = read_any(data)
    except (TensorFileError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint is damaged: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or "fingerprint" not in header:
        raise CheckpointError(f"the checkpoint is not of format {FORMAT}")
    if header.get("sha256") != _digest(tensors):
        raise CheckpointError("the checkpoint is damaged: its tensors are not those that were written")
    return header, tensors


def _storable(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return value.astype(np.int64) if value.dtype.kind in "iu" else value


def _digest(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name};{tensors[name].shape};".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _group(tensors: Mapping[str, npt.NDArray[Any]], group: str) -> dict[str, npt.NDArray[Any]]:
    return {name.partition("/")[2]: value.copy() for name, value in tensors.items() if name.startswith(f"{group}/")}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
