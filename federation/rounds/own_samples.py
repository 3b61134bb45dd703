"""One learner's own samples."""

from __future__ import annotations

from aivo_core.samples import Samples
from learners.models import Learner
from models_store.learning_data import learner_samples
from models_store.store import LoadedVersion


def samples_of(learner: Learner, loaded: LoadedVersion) -> Samples:
    """All samples of one learner through the version's encoder; none for a learner with fewer than two events.

    Raises:
        EncodingError: an interaction that cannot be encoded.
    """
    _learner, samples = next(learner_samples(learners=Learner.objects.filter(pk=learner.pk), loaded=loaded))
    return samples
