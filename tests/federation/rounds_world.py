"""A small federation for tests of rounds: an active version, learners with models and sessions, a fast exact engine."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from django.utils import timezone

from aivo_core.engine.contract import LearnerResult, LearnerTask, LocalTrainingConfig
from aivo_core.network import FloatArray, NetworkSpec, Weights
from federation.models import FederationPolicy, ModelTrainingSession, SessionPurpose
from federation.policies import default_policy
from learners.models import Learner, Pool
from models_store import store
from models_store.models import MainModelVersion, PersonalizedModel
from tests.models_store.factories import SMALL, add_events, events_of, make_learner, make_version

EVENTS = 24


class ShrinkingEngine:
    """A ``LocalTrainingEngine`` without a network: the tail moves by ``factor`` times itself, plus seeded noise.

    A random network forecasts badly and surely; shrinking its tail makes it less sure, which helps everyone, and growing
    it (``factor`` above 0) harms everyone. The result depends on seed and start alone.
    """

    name = "cohort"
    backend = "test"

    def __init__(self, factor: float = -0.2, noise: float = 0.01) -> None:
        self.factor = factor
        self.noise = noise
        self.trained = 0

    def train(
        self, *, spec: NetworkSpec, weights: Weights, config: LocalTrainingConfig, tasks: Iterable[LearnerTask]
    ) -> Iterator[LearnerResult]:
        for task in tasks:
            self.trained += 1
            noise = np.random.default_rng(task.seed).normal(scale=self.noise, size=spec.tail_size)
            delta = (self.factor * task.start_tail + noise).astype(np.float32)
            yield LearnerResult(
                key=task.key,
                tail=task.start_tail + delta,
                tail_pass_delta=delta,
                losses=(2.0, 1.0),
                samples=len(task.samples),
                steps=1,
                seconds=0.001,
                backend=self.backend,
            )


@dataclass
class World:
    """What ``make_world`` made."""

    version: MainModelVersion
    learners: list[Learner]
    evaluators: list[Learner] = field(default_factory=list)

    def model(self, index: int) -> PersonalizedModel:
        return PersonalizedModel.objects.get(learner=self.learners[index])


def make_world(
    *, learners: int = 6, evaluators: int = 12, events: int = EVENTS, sessions: bool = True, policy: Any = None
) -> World:
    """An active version, federated learners with a clone and a personal session, and evaluation learners."""
    set_policy(**{"min_samples": 5, **(policy or {})})
    version = make_version()
    people = [with_model(person(f"fed-{i}"), version, seed=i, events=events, session=sessions) for i in range(learners)]
    judges = [with_events(person(f"eval-{i}", pool=Pool.EVALUATION), 100 + i, events) for i in range(evaluators)]
    return World(version, people, judges)


def person(learner_id: str, **fields: Any) -> Learner:
    """A learner whose subject key, and with it every seed, is the same in each run."""
    return make_learner(learner_id, subject_key=uuid.uuid5(uuid.NAMESPACE_OID, learner_id), **fields)


def set_policy(**values: Any) -> FederationPolicy:
    """The installation's policy with some fields changed."""
    row = default_policy()
    for name, value in values.items():
        setattr(row, name, value)
    row.save()
    return row


def with_events(learner: Learner, seed: int, count: int = EVENTS) -> Learner:
    add_events(learner, events_of(seed, count))
    return learner


def with_model(
    learner: Learner, version: MainModelVersion, *, seed: int = 0, events: int = EVENTS, session: bool = True
) -> Learner:
    """Give a learner events, a clone of the version and, with ``session``, a personal training session."""
    with_events(learner, seed, events)
    loaded = store.load_version(version)
    stored = store.write_tail(learner_id=learner.learner_id, number=1, spec=loaded.spec, tail=loaded.tail)
    model = PersonalizedModel.objects.create(
        learner=learner, source_version=version, status="ACTIVE", weights_path=stored.path, weights_sha256=stored.sha256
    )
    if session:
        train_personally(model, seed=seed)
    return learner


def train_personally(
    model: PersonalizedModel,
    *,
    seed: int = 0,
    delta: FloatArray | None = None,
    samples: int = 15,
    base: MainModelVersion | None = None,
    at: datetime | None = None,
) -> ModelTrainingSession:
    """A PERSONAL session whose tail pass changed the learner's tail by ``delta``; the tail follows."""
    version = base or model.source_version
    loaded = store.load_version(version)
    change = make_delta(seed, loaded.tail) if delta is None else delta
    session = ModelTrainingSession(
        personalized_model=model,
        base_version=version,
        sequence=model.training_sessions.count() + 1,
        purpose=SessionPurpose.PERSONAL,
        epochs=5,
        batch_size=32,
        samples=samples,
    )
    file = store.write_delta(learner_id=model.learner.learner_id, session_id=session.id, spec=loaded.spec, delta=change)
    session.delta_path, session.delta_sha256 = file.path, file.sha256
    session.save()
    if at is not None:
        ModelTrainingSession.objects.filter(pk=session.pk).update(created_at=at)
    tail = store.read_tail(model=model, spec=loaded.spec) + change
    stored = store.write_tail(learner_id=model.learner.learner_id, number=model.version + 1, spec=loaded.spec, tail=tail)
    PersonalizedModel.objects.filter(pk=model.pk).update(
        version=model.version + 1, weights_path=stored.path, weights_sha256=stored.sha256, last_trained_at=at or timezone.now()
    )
    model.refresh_from_db()
    return session


def make_delta(seed: int, tail: FloatArray | None = None, *, scale: float = 0.01, factor: float = -0.2) -> FloatArray:
    """As ``ShrinkingEngine`` would make it; only noise without a tail."""
    noise = np.random.default_rng(seed).normal(scale=scale, size=SMALL.tail_size)
    return (noise if tail is None else factor * tail + noise).astype(np.float32)
