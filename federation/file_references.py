"""Which files of the stores this app's rows point to: deltas of training sessions and aggregates of rounds."""

from __future__ import annotations

import re
from collections.abc import Iterator

from federation.models import ModelTrainingSession, RoundAttempt
from models_store.files import LEARNER_MODELS, MAIN_MODELS
from models_store.partial_sums import PARTIAL_SUMS
from models_store.references import FileReference, ReferenceSource, register_source


def register_own_sources() -> None:
    """Make the kinds of files of this app known to verification and garbage collection."""
    deltas = re.compile(r"id-[A-Za-z0-9_-]+/deltas/[0-9a-f-]{36}-[0-9a-f]{8}\.safetensors")
    register_source(ReferenceSource("deltas", LEARNER_MODELS, deltas, _delta_references))
    register_source(ReferenceSource("partial sums", MAIN_MODELS, PARTIAL_SUMS, _partial_sum_references))
    aggregates = re.compile(r"rounds/\d+/attempt-\d+\.safetensors")
    register_source(ReferenceSource("aggregates", MAIN_MODELS, aggregates, _aggregate_references))


def _delta_references() -> Iterator[FileReference]:
    rows = ModelTrainingSession.objects.exclude(delta_path="").order_by().values_list("delta_path", "delta_sha256")
    for path, sha256 in rows.iterator():
        yield FileReference(LEARNER_MODELS, path, sha256)


def _partial_sum_references() -> Iterator[FileReference]:
    from federation.rounds.partial_sums import files_in_use

    for path, sha256 in files_in_use():
        yield FileReference(MAIN_MODELS, path, sha256)


def _aggregate_references() -> Iterator[FileReference]:
    for path, sha256 in (
        RoundAttempt.objects.exclude(aggregate_path="").order_by().values_list("aggregate_path", "aggregate_sha256")
    ):
        yield FileReference(MAIN_MODELS, path, sha256)
