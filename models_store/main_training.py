"""Training of the main model from the curriculum pool to a published version, exactly once per data, recipe and seed.

The version's row is reserved under a fingerprint before training; a training that was killed goes on from its last epoch
under the same row, and one that is complete is returned as it is.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from django.db import transaction
from django.utils.translation import gettext as _

from aivo_core.inference import fold
from aivo_core.network import DEFAULT_HIDDEN, NetworkError, NetworkSpec, Weights
from aivo_core.samples import Samples, concatenate
from aivo_site.errors import UsageError
from learners.models import Pool
from models_store.baselines import Baselines, fit_baselines
from models_store.curriculum import learners_with_samples
from models_store.errors import MainTrainingError, TrainingInterrupted, VersionConflict
from models_store.learning_data import gather
from models_store.main_evaluation import choose_content_mix, evaluate_on_pool, no_evaluation_learners
from models_store.model_card import CardContent, model_card
from models_store.models import MainModelVersion, VersionOrigin, VersionStatus
from models_store.preparing import PreparedCurriculum, prepare_for_training
from models_store.references import checkpoint_path
from models_store.stored_checkpoint import StoredCheckpoint
from models_store.training import MainModelTrainer, TrainingData, TrainingError, TrainingResult, TrainingStopped
from models_store.version_files import write_version_files
from models_store.versions import activate, publish, reserve_version

if TYPE_CHECKING:
    from models_store.training_checkpoint import EpochRecord

Progress = Callable[[int, int, str], None]

STEPS_AROUND = 3
"""Steps of the progress beside the epochs: preparing, encoding, evaluating."""


@dataclass(frozen=True)
class MainTrainingReport:
    """A main version and what was measured of it.

    Attributes:
        created: False when a complete version of the same data, recipe and seed was there already.
        resumed_from: epochs that an earlier, interrupted run had trained.
    """

    row: MainModelVersion
    created: bool
    seconds: float
    resumed_from: int = 0
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        figures = self.row.training_metrics
        return {
            "version": self.row.version,
            "sha256": self.row.metadata.get("weights_sha256"),
            "metrics": figures.get("metrics"),
            "baselines": figures.get("baselines"),
            "evaluated_on": figures.get("evaluated_on"),
            "by_history": figures.get("by_history"),
            "epochs": figures.get("epochs"),
            "seconds": round(self.seconds, 3),
            "status": self.row.status,
            "created": self.created,
            "resumed_from": self.resumed_from,
            "content_mix": self.row.content_mix,
            "manifest_sha256": self.row.manifest_sha256,
            "samples": figures.get("samples"),
            "training_seconds": figures.get("training_seconds"),
            "notes": list(self.notes),
        }


def train_main(
    *,
    epochs: int = 12,
    seed: int = 0,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    hidden_layers: Sequence[int] = DEFAULT_HIDDEN,
    actor: str,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> MainTrainingReport:
    """Prepare the curriculum, train, evaluate, publish; the first version becomes active, later ones are candidates.

    Args:
        epochs: at most so many; training stops early by the validation learners.
        should_stop: asked every few steps; what was trained until the last epoch is kept.

    Raises:
        UsageError: ``bad_config``: a value outside its range; ``bad_network``.
        PreparationError: the curriculum is too small, or there is nobody to evaluate on.
        TrainingInterrupted: ``should_stop`` said so.
        MainTrainingError: ``diverged`` and other codes of the trainer.
    """
    started = time.monotonic()
    report = progress or _quiet
    trainer = _trainer(epochs=epochs, seed=seed, batch_size=batch_size, learning_rate=learning_rate, hidden_layers=hidden_layers)
    total = epochs + STEPS_AROUND
    report(0, total, _("preparing the curriculum"))
    prepared = prepare_for_training(actor=actor)
    if not learners_with_samples(Pool.EVALUATION).exists():
        raise no_evaluation_learners()
    fingerprint = training_fingerprint(prepared, trainer)
    row = reserve_version(
        origin=VersionOrigin.TRAINED,
        training_fingerprint=fingerprint,
        architecture=trainer.spec.to_json(),
        encoder_sha256=prepared.fitted.encoder.sha256,
    )
    if row.status != VersionStatus.TRAINING:
        _activate_if_first(row, actor)
        report(total, total, _("already trained"))
        return MainTrainingReport(row, created=False, seconds=time.monotonic() - started)
    run = _Run(trainer, prepared, row, actor, report, total)
    return run.finish(run.train(should_stop or _never), started)


def training_fingerprint(prepared: PreparedCurriculum, trainer: MainModelTrainer) -> str:
    """sha256 of all that decides what a training gives: data, split, encoder, recipe, seed."""
    parts = {
        "data": prepared.data.sha256,
        "encoder": prepared.fitted.encoder.sha256,
        "settings": trainer.settings(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Run:
    """One training under a reserved row."""

    def __init__(
        self,
        trainer: MainModelTrainer,
        prepared: PreparedCurriculum,
        row: MainModelVersion,
        actor: str,
        progress: Progress,
        total: int,
    ) -> None:
        self._trainer = trainer
        self._prepared = prepared
        self._row = row
        self._actor = actor
        self._progress = progress
        self._total = total
        self._checkpoint = StoredCheckpoint(checkpoint_path(row.training_fingerprint or ""))
        self._validation: list[Samples] = []
        self._training_samples = 0

    def train(self, should_stop: Callable[[], bool]) -> TrainingResult:
        self._progress(1, self._total, _("encoding samples"))
        data = self._training_data()
        try:
            return self._trainer.train(data, checkpoint=self._checkpoint, on_epoch=self._report_epoch, should_stop=should_stop)
        except TrainingStopped as stopped:
            message = _("The training was stopped in epoch %(epoch)s; running it again goes on from there.")
            raise TrainingInterrupted(message % {"epoch": stopped.epoch}) from stopped
        except TrainingError as error:
            raise MainTrainingError(str(error), code=error.code) from error

    def finish(self, result: TrainingResult, started: float) -> MainTrainingReport:
        """Evaluate, write, publish; another process that was faster with the same training wins."""
        self._progress(self._total - 1, self._total, _("evaluating"))

        def writer(spec: NetworkSpec, weights: Weights, metrics: dict[str, Any]) -> None:
            self._write(spec, weights, metrics)

        created = True
        try:
            self._trainer.save_model(result, writer, checkpoint=self._checkpoint)
        except VersionConflict:
            self._row.refresh_from_db()
            if self._row.status == VersionStatus.TRAINING:
                raise
            created = False
        _activate_if_first(self._row, self._actor)
        self._progress(self._total, self._total, self._row.version)
        return MainTrainingReport(
            self._row,
            created=created,
            seconds=time.monotonic() - started,
            resumed_from=result.resumed_from,
            notes=result.notes,
        )

    def _training_data(self) -> TrainingData:
        fitted, data = self._prepared.fitted, self._prepared.data
        count = sum(len(history.events) - 1 for history in data.training)
        training = gather((fitted.training_samples(history.learner_id, history.events) for history in data.training), count)
        self._validation = [fitted.encoder.encode(history.events)[0] for history in data.validation]
        self._training_samples = len(training)
        return TrainingData(training=training, validation=concatenate(self._validation))

    def _report_epoch(self, record: EpochRecord) -> None:
        message = _("epoch %(epoch)s of %(epochs)s: loss %(loss).4f, validation %(validation).4f")
        values = {
            "epoch": record.epoch,
            "epochs": self._trainer.epochs,
            "loss": record.loss,
            "validation": record.validation_loss,
        }
        self._progress(1 + record.epoch, self._total, message % values)

    def _write(self, spec: NetworkSpec, weights: Weights, training: dict[str, Any]) -> None:
        network = fold(spec, weights)
        content_mix = choose_content_mix(network, self._validation)
        encoder = self._prepared.fitted.encoder
        figures = evaluate_on_pool(network=network, encoder=encoder, content_mix=content_mix, baselines=self._baselines())
        summary = {**_original_keys(figures, training, self._training_samples), **figures, "validation": training}
        files = write_version_files(
            version=self._row.version,
            spec=spec,
            weights=weights,
            encoder=encoder,
            content_mix=content_mix,
            metrics=summary,
            lineage=self._lineage(),
            card=model_card(self._card(spec, figures)),
        )
        publish(
            row=self._row,
            files=files,
            content_mix=content_mix,
            architecture=spec.to_json(),
            training_metrics=summary,
            metadata={"weights_sha256": files.weights_sha256, "preparation": str(self._prepared.report.row.pk)},
        )

    def _baselines(self) -> Baselines:
        histories = ((history.learner_id, history.events) for history in self._prepared.data.training)
        return fit_baselines(self._prepared.fitted, histories)

    def _lineage(self) -> dict[str, Any]:
        return {
            "origin": VersionOrigin.TRAINED.value,
            "parent": None,
            "training_fingerprint": self._row.training_fingerprint,
            "data_sha256": self._prepared.data.sha256,
            "settings": self._trainer.settings(),
        }

    def _card(self, spec: NetworkSpec, figures: dict[str, Any]) -> CardContent:
        data, on = self._prepared.data, figures["evaluated_on"]
        return CardContent(
            version=self._row.version,
            origin="Trained from scratch on the interactions of the curriculum learners.",
            spec=spec,
            data=[
                f"{len(data.training)} curriculum learners trained it ({self._training_samples} samples).",
                f"{len(data.validation)} other curriculum learners decided when to stop and how to mix the content forecast.",
                f"{on['learners']} evaluation learners, whom it never saw, gave the figures: the later 30 % of their events "
                f"({on['samples']} samples).",
                "All of them, or whoever decides for them, consented to contribute; nobody who withdrew is among them.",
            ],
            metrics=figures["metrics"],
            baselines=figures["baselines"],
        )


def _activate_if_first(row: MainModelVersion, actor: str) -> None:
    """Make a finished version active where none is; a run that was killed just before this is made good by the next."""
    if row.status != VersionStatus.CANDIDATE or MainModelVersion.objects.filter(status=VersionStatus.ACTIVE).exists():
        return
    try:
        with transaction.atomic():
            activate(row=row, actor=actor, reason="the first main version")
    except VersionConflict:
        row.refresh_from_db()  # another version became active first: this one waits for a decision


def _trainer(*, epochs: int, seed: int, batch_size: int, learning_rate: float, hidden_layers: Sequence[int]) -> MainModelTrainer:
    try:
        return MainModelTrainer(
            hidden_layers=hidden_layers, learning_rate=learning_rate, epochs=epochs, batch_size=batch_size, seed=seed
        )
    except (TrainingError, NetworkError) as error:
        raise UsageError(str(error), code=error.code) from error


def _original_keys(figures: dict[str, Any], training: dict[str, Any], samples: int) -> dict[str, Any]:
    """``accuracy, loss, epochs, samples``: content top-1 and total loss on the evaluation pool, as served."""
    metrics = figures["metrics"]
    loss = metrics["content_mixed"]["log_loss"] + metrics["path"]["log_loss"] + metrics["difficulty"]["log_loss"]
    return {
        "accuracy": metrics["content_mixed"]["top1"],
        "loss": loss,
        "epochs": training["epochs"],
        "samples": samples,
        "training_seconds": training["seconds"],
    }


def _never() -> bool:
    return False


def _quiet(_done: int, _total: int, _message: str) -> None:
    return None
