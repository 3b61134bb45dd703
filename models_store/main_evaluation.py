"""A main model on the evaluation pool, which it never saw, with the baselines on the same samples beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from django.utils.translation import gettext as _

from aivo_core.encoding.encoder import Encoder
from aivo_core.inference import FoldedNetwork
from aivo_core.samples import TRAIN_SHARE, Samples
from learners.histories import iter_histories
from learners.models import Pool
from models_store.baselines import Baselines
from models_store.curriculum import MIN_EVENTS, excluded_learners, shared_model_learners
from models_store.errors import PreparationError
from models_store.evaluation import Evaluated, choose_mix, main_metrics
from models_store.forecasting import forecast_network


def choose_content_mix(network: FoldedNetwork, samples: Sequence[Samples]) -> float:
    """Weight of the encoder's own forecast in the content head's, 0..0.4, chosen on the validation learners' samples."""
    return choose_mix([forecast_network(network, part) for part in samples], samples)


def evaluate_on_pool(*, network: FoldedNetwork, encoder: Encoder, content_mix: float, baselines: Baselines) -> dict[str, Any]:
    """Figures on the later 30 % of each evaluation learner, and by length of history over all their samples.

    Returns:
        ``metrics``, ``evaluated_on``, ``by_history`` as ``evaluation.main_metrics``, and ``baselines``.

    Raises:
        PreparationError: ``no_evaluation_learners``.
    """
    learners, cases = [], []
    for learner, events in iter_histories(shared_model_learners(Pool.EVALUATION)):
        if len(events) < MIN_EVENTS:
            continue
        samples, _state = encoder.encode(events)
        key = str(learner.subject_key)
        learners.append(
            Evaluated(
                key=key,
                samples=_labels_of(samples),
                forecast=forecast_network(network, samples),
                expected_level=encoder.expected_levels(samples.first),
                item_mean=baselines.item_means(events, samples),
            )
        )
        cases.append((key, events, learners[-1].samples.split_at(TRAIN_SHARE)[1]))
    if not learners:
        raise no_evaluation_learners()
    return {**main_metrics(learners, mix=content_mix), "baselines": baselines.evaluate(cases)}


def _labels_of(samples: Samples) -> Samples:
    """The samples without their rows: two thirds of the memory, which nothing reads once the forecast is made."""
    no_rows = np.zeros((len(samples), 0), dtype=np.float32)
    return replace(samples, first=no_rows, second=no_rows)


def no_evaluation_learners() -> PreparationError:
    """The refusal to train what could not be measured."""
    excluded = ", ".join(f"{reason}: {n}" for reason, n in excluded_learners(Pool.EVALUATION).items()) or _("none left out")
    message = _(
        "There is no evaluation learner with consent to contribution and at least %(events)s interactions (%(excluded)s): "
        "import some with import_interactions --pool EVALUATION --consent contribution."
    )
    return PreparationError(message % {"events": MIN_EVENTS, "excluded": excluded}, code="no_evaluation_learners")
