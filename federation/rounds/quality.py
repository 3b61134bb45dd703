"""Measured quality of a contribution: what it does on the learner's own later interactions, which it was not trained on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from django.db.models import QuerySet

from aivo_core.network import FloatArray
from aivo_core.samples import TRAIN_SHARE, Samples
from federation.models import AggregationRound, Contribution
from federation.policies import RoundPolicy
from federation.rounds import cohort
from federation.rounds.intake import intake_context
from federation.rounds.lineage import lineage_of
from federation.rounds.own_samples import samples_of
from models_store.evaluation import learner_losses
from models_store.forecasting import forecast_tail, trunk_activations
from models_store.store import DeltaReader, LoadedVersion

NEUTRAL = 0.5
"""Quality of a contribution that changes nothing, and of a learner without later interactions to measure on."""

FULL_AT = 0.1
"""Relative fall of the learner's own held-out loss from which quality is 1; a rise by as much is 0."""


def quality_of_change(before: float, after: float) -> float:
    """1/2 + r / (2 x 0.1) within [0, 1], r the relative fall of the total loss from ``before`` to ``after``.

    Raises:
        ValueError: a loss is not finite, or ``before`` is not positive.
    """
    if not (np.isfinite(before) and np.isfinite(after) and before > 0.0):
        raise ValueError(f"quality needs finite losses, the first positive, not {before} and {after}")
    fall = (before - after) / before
    return float(np.clip(NEUTRAL + NEUTRAL * fall / FULL_AT, 0.0, 1.0))


def measure_quality(
    rows: QuerySet[Contribution], *, round_: AggregationRound, policy: RoundPolicy, base: LoadedVersion
) -> Iterator[Contribution]:
    """Measure those of the contributions that have no quality yet, one after the other; each is given back when it has one.

    Deltas and samples of one learner are held at a time.

    Raises:
        DamagedContribution: a delta cannot be read any more.
    """
    behind = lineage_of(round_.base_version)
    reader = DeltaReader(base.spec)
    for block in cohort.blocks(rows.filter(quality=None)):
        context = intake_context(round_, policy, reader, behind, block)
        for contribution in block:
            discounts = context.discounts(cohort.sessions_of(contribution))
            delta = cohort.read_accepted(contribution, reader=reader, discounts=discounts)
            samples = samples_of(context.learners[contribution.subject_key], base)
            Contribution.objects.filter(pk=contribution.pk).update(quality=_quality(base, delta, samples))
            yield contribution


def _quality(base: LoadedVersion, delta: FloatArray, samples: Samples) -> float:
    _earlier, later = samples.split_at(TRAIN_SHARE)
    if not len(later):
        return NEUTRAL
    activations = trunk_activations(base, later)
    before, after = (
        learner_losses("own", forecast_tail(base, tail, activations), later, base.content_mix).total
        for tail in (base.tail, base.tail + delta)
    )
    return quality_of_change(before, after)
