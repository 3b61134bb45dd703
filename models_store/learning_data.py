"""Learners' samples under a main version: their histories through the version's own encoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.db.models import QuerySet
from learners.histories import iter_histories

from aivo_core.samples import Samples
from learners.models import Learner
from models_store.version_files import LoadedVersion


def learner_samples(*, learners: QuerySet[Any], loaded: LoadedVersion) -> Iterator[tuple[Learner, Samples]]:
    """Each learner with all samples of the learner's history, one learner in memory at a time.

    Args:
        learners: a queryset of ``Learner``; its order is kept. A learner without any event has no samples.

    Raises:
        EncodingError: ``bad_event``: an interaction that cannot be encoded, naming event and field.
    """
    for learner, events in iter_histories(learners):
        samples, _ = loaded.encoder.encode(events)
        yield learner, samples
