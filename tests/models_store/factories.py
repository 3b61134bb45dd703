"""Small, seeded things that tests of the store need: an encoder, versions, learners."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
from django.db import transaction
from django.utils import timezone

from aivo_core.encoding.events import Event
from aivo_core.encoding.fit import FittedEncoder, fit_encoder
from aivo_core.network import FloatArray, NetworkSpec
from learners.history_stamps import stamp_histories
from learners.models import Interaction, Learner, Organisation, Pool
from models_store.models import MainModelVersion, VersionOrigin, VersionStatus
from models_store.store import write_version_files
from models_store.versions import activate, publish, reserve_version
from tests.synthetic_samples import make_weights

SMALL = NetworkSpec(hidden_layers=(12, 10, 8), dropout_rates=(0.1, 0.1, 0.1))
"""The default network's inputs and heads on small layers; the first two blocks are the trunk."""


def events_of(seed: int, count: int = 24) -> list[Event]:
    """A learner who walks through categories and gets easy items right more often."""
    rng = np.random.default_rng(seed)
    ability = rng.normal(0.0, 1.0)
    category = int(rng.integers(0, 6))
    events = []
    for position in range(count):
        if rng.random() < 0.4:
            category = (category + 1) % 6
        item = int(rng.integers(0, 5))
        chance = 1.0 / (1.0 + np.exp(-(ability + 1.0 - 0.5 * item)))
        events.append(
            Event(
                category=f"category {category}",
                item=f"item {category}.{item}",
                subject=f"subject {category // 3}",
                score=float(rng.random() < chance),
                seconds=60.0 * position,
                response_ms=float(rng.integers(500, 20_000)),
                attempts=1.0,
            )
        )
    return events


@cache
def small_fit() -> FittedEncoder:
    return fit_encoder([(f"learner {seed}", events_of(seed)) for seed in range(12)])


def make_version(
    *,
    seed: int = 0,
    active: bool = True,
    spec: NetworkSpec = SMALL,
    content_mix: float = 0.1,
    parent: MainModelVersion | None = None,
) -> MainModelVersion:
    """A complete version with random weights."""
    row = reserve_version(origin=VersionOrigin.TRAINED, parent=parent)
    files = write_version_files(
        version=row.version,
        spec=spec,
        weights=make_weights(spec, seed),
        encoder=small_fit().encoder,
        content_mix=content_mix,
        metrics={"loss": 1.0},
        lineage={"parent": parent.version if parent else None},
        card="# A version\n",
    )
    publish(row=row, files=files, status=VersionStatus.CANDIDATE, content_mix=content_mix, architecture=spec.to_json())
    if active:
        activate(row=row, actor="test", reason="made by a test")
    return row


_numbers = itertools.count(1)


def make_learner(learner_id: str = "", **fields: Any) -> Learner:
    """A learner of the federated pool with both consents."""
    organisation, _ = Organisation.objects.get_or_create(slug="school", defaults={"name": "School"})
    values = {"pool": Pool.FEDERATED, "consent_training": True, "consent_contribution": True, **fields}
    return Learner.objects.create(learner_id=learner_id or f"learner-{next(_numbers)}", organisation=organisation, **values)


def add_events(learner: Learner, events: list[Event], *, first_seq: int = 1) -> None:
    """Interactions in the order of the events, ordered by ``seq``."""
    now = timezone.now()
    with transaction.atomic():
        stamp_histories([learner.pk])
        Interaction.objects.bulk_create(
            Interaction(
                learner=learner,
                event_id=f"e{seq}",
                seq=seq,
                occurred_at=None,
                arrival=seq,
                category=event.category,
                item_id=event.item,
                subject=event.subject,
                score=event.score,
                response_ms=None if event.response_ms is None else int(event.response_ms),
                attempts=None if event.attempts is None else int(event.attempts),
                created_at=now,
            )
            for seq, event in enumerate(events, start=first_seq)
        )


def random_tail(spec: NetworkSpec, seed: int) -> FloatArray:
    return np.random.default_rng(seed).normal(scale=0.1, size=spec.tail_size).astype(np.float32)
