"""What local training of one learner needs before it starts: the samples, the tail, the seed, and whether it may."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

import numpy as np
from django.db.models import Max, QuerySet

from aivo_core.encoding.events import Event
from aivo_core.engine.contract import LocalTrainingConfig
from aivo_core.network import FloatArray
from aivo_core.samples import TRAIN_SHARE, Samples
from federation.models import ModelTrainingSession, SessionPurpose
from federation.rounds.own_samples import samples_of
from learners.models import Learner, Pool
from learners.selection import check_limit, select_learners
from models_store.models import Backend, PersonalizedModel, PersonalizedModelStatus
from models_store.version_files import LoadedVersion


@dataclass(frozen=True)
class Prepared:
    """One learner, ready to be trained.

    Attributes:
        base: the version that the tail is relative to, with the model's own freeze list.
        training: the latest samples of the earlier 70 % of events, at most ``max_samples``.
        later: the samples of the later 30 %.
        start_tail: (tail_size,) float32, the learner's own.
        sequence: of the session to come. seed: depends on learner and sequence only.
        inputs_sha256: of the training samples, the configuration and the base.
    """

    model: PersonalizedModel
    base: LoadedVersion
    training: Samples
    later: Samples
    start_tail: FloatArray
    sequence: int
    seed: int
    inputs_sha256: str

    @property
    def key(self) -> str:
        return str(self.model.learner.subject_key)

    @property
    def can_choose(self) -> bool:
        """Whether there are samples both to train and to choose the blend on."""
        return len(self.training) >= 2


def why_not(learner: Learner | None) -> str:
    """Reason code of a learner whose own copy may not be trained now; empty when it may."""
    if learner is None:
        return "erased"
    if learner.withdrawn_at is not None:
        return "withdrawn"
    if learner.pool != Pool.FEDERATED:
        return "wrong_pool"
    return "" if learner.consent_training else "no_consent_training"


def why_not_model(model: PersonalizedModel | None) -> str:
    """Reason code of a model that cannot be trained now; empty when it can."""
    if model is None:
        return "no_model"
    if model.backend != Backend.FEDERATED:
        return "other_backend"
    return "" if model.status == PersonalizedModelStatus.ACTIVE else "not_active"


def learners_to_train(*, learner_ids: Sequence[str] = (), organisation: str = "", limit: int | None = None) -> QuerySet[Any]:
    """The learners that a door's request means.

    Args:
        learner_ids: exactly these, by learner id or primary key; empty: the whole federated pool, of one organisation's slug
            if one is given.
        limit: at most so many of those who have an active clone and may be trained; those trained longest ago first.

    Raises:
        UsageError: as ``select_learners``, or ``bad_limit``.
    """
    check_limit(limit)
    learners = select_learners(learner_ids=learner_ids, organisation=organisation)
    if limit is None:
        return learners
    trainable = learners.filter(
        pool=Pool.FEDERATED,
        consent_training=True,
        withdrawn_at=None,
        personalized_model__backend=Backend.FEDERATED,
        personalized_model__status=PersonalizedModelStatus.ACTIVE,
    )
    chosen = trainable.order_by("personalized_model__last_trained_at", "subject_key").values_list("pk", flat=True)
    # Never trained sorts first on one database and last on the other.
    never = list(chosen.filter(personalized_model__last_trained_at=None)[:limit])
    rest = chosen.filter(personalized_model__last_trained_at__isnull=False)[: limit - len(never)]
    return learners.filter(pk__in=[*never, *rest])


def split_samples(samples: Samples, max_samples: int) -> tuple[Samples, Samples]:
    """The latest ``max_samples`` of the earlier 70 %, which train, and the later 30 %."""
    earlier, later = samples.split_at(TRAIN_SHARE)
    return earlier.take(slice(max(0, len(earlier) - max_samples), len(earlier))), later


def learner_parts(learner: Learner, base: LoadedVersion, max_samples: int) -> tuple[Samples, Samples]:
    """Training and later samples of one learner through the base's encoder.

    Raises:
        EncodingError: an interaction that cannot be encoded.
    """
    return split_samples(samples_of(learner, base), max_samples)


def history_parts(events: Sequence[Event], base: LoadedVersion, max_samples: int) -> tuple[Samples, Samples]:
    """As ``learner_parts``, of a learner whose events were read already."""
    samples, _state = base.encoder.encode(events)
    return split_samples(samples, max_samples)


def inputs_digest(*, base: LoadedVersion, config: LocalTrainingConfig, training: Samples) -> str:
    """What a session's result depends on beside start tail and seed."""
    digest = hashlib.sha256(f"{base.weights_sha256} {base.spec.to_json()} {sorted(asdict(config).items())}".encode())
    for array in (training.first, training.second, training.content, training.path, training.level, training.score):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def training_seed(subject_key: UUID, purpose: str, number: int) -> int:
    """A seed in 0 .. 2^63 - 1 from who is trained and for the how-manieth time; the same on every machine."""
    digest = hashlib.sha256(f"{subject_key} {purpose} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def next_sequence(model: PersonalizedModel) -> int:
    """Number of the model's next session, from 1."""
    highest: int | None = model.training_sessions.aggregate(highest=Max("sequence"))["highest"]
    return (highest or 0) + 1


def is_nothing_new(model: PersonalizedModel, inputs_sha256: str) -> bool:
    """Whether the model's tail is the result of training on exactly these inputs."""
    last = (
        ModelTrainingSession.objects.filter(personalized_model=model, purpose=SessionPurpose.PERSONAL)
        .order_by("-sequence")
        .first()
    )
    if last is None:
        return False
    kept = (last.metadata.get("inputs_sha256"), last.metadata.get("tail_sha256"))
    return kept == (inputs_sha256, model.weights_sha256)
