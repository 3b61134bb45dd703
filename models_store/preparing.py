"""Preparation of the curriculum: evaluation learners set aside, a split by learner, and the encoder fitted on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import Count

from aivo_core.encoding.encoder import Encoder
from aivo_core.encoding.errors import EncodingError
from aivo_core.encoding.fit import FittedEncoder, fit_encoder
from learners.models import Learner, Pool
from models_store.curriculum import CurriculumData, excluded_learners, read_curriculum, set_aside_evaluation
from models_store.errors import PreparationError, StoreError
from models_store.files import MAIN_MODELS, checksum, replace_file, write_files
from models_store.models import CurriculumPreparation
from models_store.version_files import encoder_files, read_encoder

Progress = Callable[[int, int, str], None]
STEPS = 4


@dataclass(frozen=True)
class PreparationReport:
    """What was prepared.

    Attributes:
        created: False when the same learners, split and events had been prepared before.
        learners: all learners by pool.
        set_aside: curriculum learners moved to the evaluation pool by this call.
        samples: of the curriculum learners used.
        categories: different ones among the training learners; overflow_share: of their events, in the overflow slot.
    """

    row: CurriculumPreparation
    created: bool
    learners: Mapping[str, int]
    set_aside: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        report = self.row.report
        return {
            "learners": dict(self.learners),
            "samples": report["samples"],
            "categories": report["categories"],
            "overflow_share": report["overflow_share"],
            "encoder_sha256": self.row.encoder_sha256,
            "seconds": round(self.seconds, 3),
            "set_aside": self.set_aside,
            "created": self.created,
            "training_learners": len(self.row.training_keys),
            "validation_learners": len(self.row.validation_keys),
            "excluded": report["excluded"],
            "encoder": report["encoder"],
        }


@dataclass(frozen=True)
class PreparedCurriculum:
    """A preparation with everything that training needs, in memory."""

    report: PreparationReport
    data: CurriculumData
    fitted: FittedEncoder


def prepare_curriculum(*, actor: str, progress: Progress | None = None) -> PreparationReport:
    """Prepare what the main model learns from; doing it again with the same learners and events gives the same row.

    Only curriculum learners who consent to contribution and have not withdrawn are read. Where the evaluation pool is empty,
    a tenth of them is moved there first.

    Raises:
        PreparationError: too few learners, or interactions that cannot be encoded.
    """
    started = time.monotonic()
    set_aside, data = _read(actor, progress or _quiet)
    existing = CurriculumPreparation.objects.filter(data_sha256=data.sha256).first()
    if existing is not None and _is_sound(existing):
        (progress or _quiet)(STEPS, STEPS, "")
        return _report(existing, created=False, set_aside=set_aside, started=started)
    return _fit(data, set_aside, started, progress or _quiet).report


def prepare_for_training(*, actor: str, progress: Progress | None = None) -> PreparedCurriculum:
    """As ``prepare_curriculum``, with histories and the fit in memory.

    Raises:
        PreparationError: as ``prepare_curriculum``.
    """
    started = time.monotonic()
    set_aside, data = _read(actor, progress or _quiet)
    return _fit(data, set_aside, started, progress or _quiet)


def read_prepared_encoder(row: CurriculumPreparation) -> Encoder:
    """The preparation's encoder, verified.

    Raises:
        StoreError: missing or damaged.
    """
    return read_encoder(folder=row.path, sums=row.report["files"], encoder_sha256=row.encoder_sha256)


def _read(actor: str, progress: Progress) -> tuple[int, CurriculumData]:
    set_aside = set_aside_evaluation(actor=actor)
    progress(1, STEPS, "reading interactions")
    return set_aside, read_curriculum()


def _fit(data: CurriculumData, set_aside: int, started: float, progress: Progress) -> PreparedCurriculum:
    progress(2, STEPS, "fitting the encoder")
    try:
        fitted = fit_encoder((history.learner_id, history.events) for history in data.training)
    except EncodingError as error:
        raise PreparationError(str(error), code=error.code) from error
    progress(3, STEPS, "writing the encoder")
    row, created = _store(data, fitted)
    progress(STEPS, STEPS, "")
    report = _report(row, created=created, set_aside=set_aside, started=started)
    return PreparedCurriculum(report=report, data=data, fitted=fitted)


def _store(data: CurriculumData, fitted: FittedEncoder) -> tuple[CurriculumPreparation, bool]:
    encoder = fitted.encoder
    folder = f"prepared/{encoder.sha256[:8]}"
    files = encoder_files(encoder)
    _write_encoder(folder, files)
    excluded = excluded_learners(Pool.CURRICULUM)
    if data.without_events:
        excluded["too_few_interactions"] = data.without_events
    values = {
        "encoder_sha256": encoder.sha256,
        "path": folder,
        "report": {
            "samples": data.samples,
            "categories": fitted.report["categories"],
            "overflow_share": fitted.report["overflow_share"],
            "excluded": excluded,
            "encoder": fitted.report,
            "files": {name: checksum(content) for name, content in files.items()},
        },
        "training_keys": [history.subject_key for history in data.training],
        "validation_keys": [history.subject_key for history in data.validation],
    }
    existing = CurriculumPreparation.objects.filter(data_sha256=data.sha256).first()
    if existing is None:
        try:
            with transaction.atomic():
                return CurriculumPreparation.objects.create(data_sha256=data.sha256, **values), True
        except IntegrityError:
            existing = CurriculumPreparation.objects.get(data_sha256=data.sha256)  # another process prepared the same
    if existing.encoder_sha256 != encoder.sha256:
        # Another release of the encoder fits the same data to another result: the row follows the files that are there now.
        CurriculumPreparation.objects.filter(pk=existing.pk).update(**values)
        existing.refresh_from_db()
    return existing, False


def _write_encoder(folder: str, files: Mapping[str, bytes]) -> None:
    """Write the encoder's files; the folder's name stands for their content, so that what differs there is damaged."""
    named = [(f"{folder}/{name}", content) for name, content in files.items()]
    try:
        write_files(alias=MAIN_MODELS, files=named)
    except StoreError as error:
        if error.code != "already_exists":
            raise
        for path, content in named:
            replace_file(alias=MAIN_MODELS, path=path, data=content)


def _is_sound(row: CurriculumPreparation) -> bool:
    try:
        read_prepared_encoder(row)
    except StoreError:
        return False
    return True


def _report(row: CurriculumPreparation, *, created: bool, set_aside: int, started: float) -> PreparationReport:
    counts = dict(Learner.objects.order_by().values_list("pool").annotate(n=Count("pk")))
    return PreparationReport(
        row=row,
        created=created,
        learners={pool: counts.get(pool, 0) for pool in Pool.values},
        set_aside=set_aside,
        seconds=time.monotonic() - started,
    )


def _quiet(_done: int, _total: int, _message: str) -> None:
    return None
