"""Training of the main model on the curriculum learners' samples.

Adam (Kingma and Ba 2015) on first- and second-pass rows mixed in each batch; content and path losses are means over the
batch's first-pass rows, the difficulty loss over all its rows. The learning rate falls on a plateau of the validation
learners' loss, training stops early and the best epoch's weights are kept. TensorFlow is imported at call time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from aivo_core.engine.contract import EngineError
from aivo_core.engine.session import check_samples
from aivo_core.network import (
    DEFAULT_DROPOUT,
    DEFAULT_HIDDEN,
    FloatArray,
    NetworkSpec,
    Weights,
    default_freeze_layers,
)
from aivo_core.samples import Samples
from models_store import keras_network
from models_store.training_checkpoint import (
    Checkpoint,
    CheckpointError,
    EpochRecord,
    TrainingState,
    decode_state,
    encode_state,
    read_fingerprint,
)
from models_store.training_run import TrainingError, TrainingRun, TrainingStopped

__all__ = [
    "MainModelTrainer",
    "TrainingData",
    "TrainingError",
    "TrainingResult",
    "TrainingStopped",
]

logger = logging.getLogger(__name__)

PLATEAU_MIN_DELTA = 1e-4
"""Fall of the validation loss below which an epoch counts as a plateau, Keras's default."""

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingData:
    """Samples to learn from, and samples of *other* learners that decide on learning rate and stopping."""

    training: Samples
    validation: Samples


@dataclass(frozen=True)
class TrainingResult:
    """A trained main model.

    Attributes:
        spec: its declaration, freeze point included.
        weights: float32 tensors by name, of the best epoch.
        epochs, best_epoch: epochs run, and which of them (from 1) the weights are of.
        history: one record per epoch run.
        seconds: wall time over all epochs, those before a resume included.
        resumed_from: epochs that came from a checkpoint.
        notes: what an operator should know, such as a checkpoint that was ignored and why.
    """

    spec: NetworkSpec
    weights: dict[str, FloatArray]
    epochs: int
    best_epoch: int
    history: tuple[EpochRecord, ...]
    seconds: float
    resumed_from: int = 0
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> EpochRecord:
        """The record of the epoch that the weights are of."""
        return self.history[self.best_epoch - 1]


class MainModelTrainer:
    """Trains the main network; the same data, settings and seed give the same bytes on one machine and library version.

    Args:
        input_dim, hidden_layers: of the network.
        learning_rate: Adam's at the start.
        epochs: at most so many.
        batch_size: rows in a step, at least 2 (two rows per sample; batch normalisation needs more than one row).
        loss_weights: of content, difficulty and path.
        dropout_rates: per hidden block; None takes the defaults, the last one repeated for further blocks.
        freeze_layers: of the resulting declaration, where its trunk ends; nothing is frozen in this training. None
            freezes the first two blocks, or all but the last where there are fewer than three.
        patience: epochs without a better validation loss after which training stops.
        plateau_patience, plateau_factor: epochs without progress after which the learning rate is multiplied.
        seed: of initial weights, order of rows and dropout, at least 0.
        threads: as for ``keras_network.configure_tensorflow``.

    Raises:
        TrainingError: ``bad_config``, naming the field.
        NetworkError: the network cannot be declared so.
    """

    def __init__(
        self,
        input_dim: int = 256,
        hidden_layers: Sequence[int] = DEFAULT_HIDDEN,
        learning_rate: float = 1e-3,
        epochs: int = 12,
        *,
        batch_size: int = 512,
        loss_weights: tuple[float, float, float] = (1.0, 2.0, 1.0),
        dropout_rates: Sequence[float] | None = None,
        freeze_layers: Sequence[str] | None = None,
        patience: int = 3,
        plateau_patience: int = 1,
        plateau_factor: float = 0.4,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        _check(math.isfinite(learning_rate) and learning_rate > 0.0, f"learning_rate must be positive, not {learning_rate}")
        _check(epochs >= 1, f"epochs must be at least 1, not {epochs}")
        _check(batch_size >= 2, f"batch_size must be at least 2, not {batch_size}")
        _check_loss_weights(loss_weights)
        _check(patience >= 1, f"patience must be at least 1, not {patience}")
        _check(plateau_patience >= 1, f"plateau_patience must be at least 1, not {plateau_patience}")
        _check(0.0 < plateau_factor < 1.0, f"plateau_factor must lie between 0 and 1, not {plateau_factor}")
        _check(seed >= 0, f"seed must be 0 or more, not {seed}")
        blocks = len(hidden_layers)
        if dropout_rates is None:
            dropout_rates = (DEFAULT_DROPOUT + (DEFAULT_DROPOUT[-1],) * blocks)[:blocks]
        if freeze_layers is None:
            freeze_layers = default_freeze_layers(max(0, min(2, blocks - 1)))
        self.spec = NetworkSpec(
            input_dim=input_dim,
            hidden_layers=tuple(hidden_layers),
            dropout_rates=tuple(dropout_rates),
            freeze_layers=tuple(freeze_layers),
        )
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.batch_size = batch_size
        self.loss_weights = loss_weights
        self.patience = patience
        self.plateau_patience = plateau_patience
        self.plateau_factor = plateau_factor
        self.seed = seed
        self.threads = threads

    def build_model(self) -> Any:
        """The untrained ``keras.Model`` that training starts from: nothing frozen, weights from ``seed``."""
        keras_network.configure_tensorflow(self.threads)
        return keras_network.build_network(self.spec.with_freeze_layers(()), self.seed)

    def train(
        self,
        data: TrainingData,
        *,
        checkpoint: Checkpoint | None = None,
        on_epoch: Callable[[EpochRecord], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> TrainingResult:
        """Train until ``epochs``, or until ``patience`` epochs brought no better validation loss.

        Args:
            checkpoint: after each epoch, all of the state goes there. What it holds at the start is gone on from, if it
                is of the same data, settings and TensorFlow; else it is ignored, with a note. It is not cleared:
                ``save_model`` does that once the model is safe.
            on_epoch: called after each epoch run here, once its checkpoint is kept.
            should_stop: asked every few steps.

        Raises:
            TrainingError: ``no_samples``, ``wrong_shape``, ``not_finite``, ``bad_labels`` (data that cannot be trained on,
                with the field), ``diverged`` (the loss is not finite).
            TrainingStopped: ``should_stop`` returned True.
        """
        self._check_data(data)
        run = TrainingRun(
            spec=self.spec.with_freeze_layers(()),
            model=self.build_model(),
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            loss_weights=self.loss_weights,
            seed=self.seed,
        )
        notes: list[str] = []
        fingerprint = self._fingerprint(data) if checkpoint else ""
        state = _load_checkpoint(checkpoint, fingerprint, notes) if checkpoint else None
        if state is None:
            state = run.initial_state()
        else:
            run.restore(state)
        resumed_from = len(state.history)
        while not state.progress.finished:
            record = run.epoch(data.training, data.validation, len(state.history) + 1, should_stop or _never)
            self._account(run, state, record)
            if checkpoint:
                checkpoint.save(encode_state(state, fingerprint=fingerprint))
            if on_epoch:
                on_epoch(record)
        return TrainingResult(
            spec=self.spec,
            weights=state.best,
            epochs=len(state.history),
            best_epoch=state.progress.best_epoch,
            history=tuple(state.history),
            seconds=sum(record.seconds for record in state.history),
            resumed_from=resumed_from,
            notes=tuple(notes),
        )

    def save_model(
        self,
        result: TrainingResult,
        writer: Callable[[NetworkSpec, Weights, dict[str, Any]], T],
        *,
        checkpoint: Checkpoint | None = None,
    ) -> T:
        """Hand the model to ``writer(spec, weights, metrics)``, return what it returns, then clear ``checkpoint``.

        ``metrics`` is JSON-ready: ``loss`` (validation, best epoch), ``epochs``, ``best_epoch``, ``seconds``,
        ``validation`` per head, ``history``, ``settings``.
        """
        best = result.best
        metrics: dict[str, Any] = {
            "loss": best.validation_loss,
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "seconds": result.seconds,
            "validation": dict(zip(("content", "difficulty", "path"), best.validation, strict=True)),
            "history": [
                {
                    "epoch": record.epoch,
                    "loss": record.loss,
                    "validation_loss": record.validation_loss,
                    "learning_rate": record.learning_rate,
                    "seconds": record.seconds,
                }
                for record in result.history
            ],
            "settings": self.settings(),
        }
        written = writer(result.spec, result.weights, metrics)
        if checkpoint:
            checkpoint.clear()
        return written

    def settings(self) -> dict[str, Any]:
        """All that the result depends on besides the data and TensorFlow, JSON-ready."""
        return {
            "architecture": self.spec.to_json(),
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "loss_weights": list(self.loss_weights),
            "patience": self.patience,
            "plateau_patience": self.plateau_patience,
            "plateau_factor": self.plateau_factor,
            "seed": self.seed,
        }

    def _check_data(self, data: TrainingData) -> None:
        for name, samples in (("training", data.training), ("validation", data.validation)):
            try:
                check_samples(self.spec, samples)
            except EngineError as error:
                raise TrainingError(f"{name}: {error}", code=error.code) from error

    def _fingerprint(self, data: TrainingData) -> str:
        digest = hashlib.sha256()
        settings = {"tensorflow": keras_network.tensorflow_version(), **self.settings()}
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for samples in (data.training, data.validation):
            digest.update(f"{len(samples)};".encode())
            for array in (samples.first, samples.second, samples.content, samples.path, samples.level, samples.score):
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _account(self, run: TrainingRun, state: TrainingState, record: EpochRecord) -> None:
        """Take an epoch into the state: best weights, plateau, early stopping (as Keras's callbacks of these names)."""
        state.history.append(record)
        progress = state.progress
        run.store(state)
        if record.validation_loss < progress.best_loss:
            progress.best_loss, progress.best_epoch = record.validation_loss, record.epoch
            progress.epochs_without_best = 0
            state.best = state.weights
        else:
            progress.epochs_without_best += 1
        self._account_plateau(run, state, record)
        progress.finished = record.epoch >= self.epochs or progress.epochs_without_best >= self.patience

    def _account_plateau(self, run: TrainingRun, state: TrainingState, record: EpochRecord) -> None:
        progress = state.progress
        if record.validation_loss < progress.plateau_loss - PLATEAU_MIN_DELTA:
            progress.plateau_loss, progress.plateau_epochs = record.validation_loss, 0
            return
        progress.plateau_epochs += 1
        if progress.plateau_epochs >= self.plateau_patience:
            progress.plateau_epochs = 0
            run.reduce_learning_rate(self.plateau_factor)
            run.store_optimiser(state)


def _load_checkpoint(checkpoint: Checkpoint, fingerprint: str, notes: list[str]) -> TrainingState | None:
    data = checkpoint.load()
    if data is None:
        return None
    try:
        if read_fingerprint(data) == fingerprint:
            return decode_state(data)
        note = "the checkpoint was ignored: it belongs to other data, settings or another TensorFlow version"
    except CheckpointError as error:
        note = f"the checkpoint was ignored: {error}"
    logger.warning("%s", note)
    notes.append(note)
    return None


def _check_loss_weights(weights: Sequence[float]) -> None:
    good = len(weights) == 3 and all(math.isfinite(w) and w >= 0.0 for w in weights) and sum(weights) > 0.0
    _check(good, f"loss_weights must be three numbers of 0 or more (content, difficulty, path), one positive, not {weights}")


def _never() -> bool:
    return False


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise TrainingError(message, code="bad_config")
