"""Learners' samples: histories through a version's own encoder, and many learners' samples in one block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from django.db.models import QuerySet

from aivo_core.samples import Samples
from learners.histories import iter_histories
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


def gather(parts: Iterable[Samples], count: int) -> Samples:
    """The samples of many learners one after the other, as ``samples.concatenate``, in the memory of one copy.

    Args:
        parts: made one at a time, so that no two copies of all of them exist at once; at least one.
        count: samples in all, at least 1.

    Raises:
        ValueError: the parts do not have ``count`` samples.
    """
    block: Samples | None = None
    filled = events = 0
    for part in parts:
        if block is None:
            block = _empty_like(part, count)
        if filled + len(part) > count:
            raise ValueError(f"the parts have more than {count} samples")
        for name in _ARRAYS:
            getattr(block, name)[filled : filled + len(part)] = getattr(part, name)
        filled += len(part)
        events += part.events
    if block is None or filled != count:
        raise ValueError(f"the parts have {filled} samples, expected {count}")
    return replace(block, events=events)


_ARRAYS = ("first", "second", "content", "path", "level", "score", "position", "content_prior")


def _empty_like(part: Samples, count: int) -> Samples:
    arrays = {name: getattr(part, name) for name in _ARRAYS}
    return Samples(**{name: np.empty((count, *array.shape[1:]), array.dtype) for name, array in arrays.items()}, events=0)
