"""What a model has to beat: forecasts that need no network, fitted on the same training histories. NumPy only.

Content: the most frequent category, the last category again, Markov chains on the last category and on the last item.
Success: the item's mean, and Elo ratings of learner, category and item turned into a probability by logistic regression
(Pelanek 2016). Path: the most frequent kind of step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aivo_core.encoding.assemble import event_slots, sample_states
from aivo_core.encoding.columns import SLOTS
from aivo_core.encoding.encoder import Encoder
from aivo_core.encoding.events import Event
from aivo_core.encoding.fit import FittedEncoder
from aivo_core.encoding.scan import Trail, scan
from aivo_core.encoding.state import RECENT_SCORES, SNAPSHOT_INDEX, EncoderState
from aivo_core.encoding.tables import Scale, Vocabulary
from aivo_core.network import DEFAULT_HEADS, PATH_HEAD
from aivo_core.samples import Samples
from models_store.metrics import EvaluationError, class_figures, success_figures

Float64Array = npt.NDArray[np.float64]
History = tuple[str, Sequence[Event]]
Case = tuple[str, Sequence[Event], Samples]

PATH_UNITS = next(head.units for head in DEFAULT_HEADS if head.name == PATH_HEAD)
PSEUDO_COUNT = 0.1
RIDGE = 1e-6
"""Keeps the logistic regression solvable where a column is constant."""

NEWTON_STEPS = 50
NEWTON_TOLERANCE = 1e-10


@dataclass(frozen=True, eq=False)
class Baselines:
    """Fitted baselines.

    Attributes:
        encoder: its tables are the Markov chains and the item means.
        repeat_share: share of training steps that keep the category.
        path_shares: (32,) float64, shares of the path labels.
        elo_coefficients: (4,) float64: constant, learner's and category's rating, item's offset (hard = positive).
    """

    encoder: Encoder
    repeat_share: float
    path_shares: Float64Array
    elo_coefficients: Float64Array

    def item_means(self, events: Sequence[Event], samples: Samples) -> Float64Array:
        """(n,) mean score of each sample's item, by the encoder's tables. ``events``: the learner's whole history."""
        _check_events(events, samples)
        item = np.array([self.encoder.vocabulary.item(events[at].item) for at in samples.position.tolist()], dtype=np.int64)
        return self.encoder.scale.item_mean(item, samples.content)

    def elo(self, events: Sequence[Event], samples: Samples) -> Float64Array:
        """(n,) P(right) of each sample by Elo ratings. ``events``: the learner's whole history."""
        _check_events(events, samples)
        columns, _ = elo_columns(self.encoder.vocabulary, self.encoder.scale, events)
        return _sigmoid(columns[samples.position - 1] @ self.elo_coefficients)

    def content(self, events: Sequence[Event], samples: Samples) -> dict[str, Float64Array]:
        """Content forecasts (n, 128) by name of the baseline. ``events``: the learner's whole history."""
        _check_events(events, samples)
        last = np.array([self.encoder.slot(events[at - 1].category) for at in samples.position.tolist()], dtype=np.int64)
        row = np.arange(len(samples))
        rates = np.repeat(self.encoder.base_rates[None], len(samples), axis=0)
        repeat = rates.copy()
        repeat[row, last] = 0.0
        repeat *= ((1.0 - self.repeat_share) / repeat.sum(axis=1))[:, None]
        repeat[row, last] = self.repeat_share
        return {
            "most_frequent": rates,
            "repeat_last": repeat,
            "markov_category": self.encoder.transitions.category_next[last].astype(np.float64),
            "markov_item": samples.content_prior.astype(np.float64),
        }

    def evaluate(self, cases: Sequence[Case]) -> dict[str, dict[str, dict[str, float | None]]]:
        """Figures by baseline and head: ``{name: {head: figures}}``.

        Args:
            cases: (key, the learner's whole history, the samples to measure on), samples encoded by the same encoder.

        Raises:
            EvaluationError: ``no_samples``; ``wrong_shape``: samples that do not belong to the events.
        """
        cases = [case for case in cases if len(case[2])]
        if not cases:
            raise EvaluationError("there are no samples to measure baselines on", code="no_samples")
        label = np.concatenate([samples.content for _, _, samples in cases])
        path = np.concatenate([samples.path for _, _, samples in cases])
        score = np.concatenate([samples.score for _, _, samples in cases]).astype(np.float64)
        parts = [self.content(events, samples) for _, events, samples in cases]
        figures: dict[str, dict[str, dict[str, float | None]]] = {
            name: {"content": class_figures(np.concatenate([part[name] for part in parts]), label, 5)} for name in parts[0]
        }
        shares = np.repeat(self.path_shares[None], len(path), axis=0)
        figures["most_frequent"]["path"] = class_figures(shares, path)
        item_means = np.concatenate([self.item_means(events, samples) for _, events, samples in cases])
        elo = np.concatenate([self.elo(events, samples) for _, events, samples in cases])
        figures["item_mean"] = {"difficulty": success_figures(item_means, score)}
        figures["elo"] = {"difficulty": success_figures(elo, score)}
        return figures


def fit_baselines(fitted: FittedEncoder, histories: Iterable[History]) -> Baselines:
    """Fit on the histories that the encoder was fitted on; item offsets of a learner come without the learner's fold.

    Raises:
        EvaluationError: ``no_samples``: no history has two events.
    """
    vocabulary = fitted.encoder.vocabulary
    repeats, steps = 0, 0
    paths = np.full(PATH_UNITS, PSEUDO_COUNT)
    columns, scores = [], []
    for key, events in histories:
        if len(events) < 2:
            continue
        own_columns, trail = elo_columns(vocabulary, fitted.training_scale(key), events, ruler=fitted.encoder.scale)
        states = sample_states(trail)
        slot = event_slots(trail, states)
        repeats += int((trail.snapshots[states, SNAPSHOT_INDEX["slot"]] == slot).sum())
        steps += len(states)
        paths += np.bincount(trail.path[states], minlength=PATH_UNITS)
        columns.append(own_columns)
        scores.append(trail.scores[states + RECENT_SCORES])
    if not steps:
        raise EvaluationError("baselines need a learner with two events", code="no_samples")
    return Baselines(
        encoder=fitted.encoder,
        repeat_share=(repeats + 1.0) / (steps + SLOTS),
        path_shares=paths / paths.sum(),
        elo_coefficients=logistic_regression(np.concatenate(columns), np.concatenate(scores)),
    )


def elo_columns(
    vocabulary: Vocabulary, scale: Scale, events: Sequence[Event], *, ruler: Scale | None = None
) -> tuple[Float64Array, Trail]:
    """(n - 1, 4) constant, learner's rating, rating in the event's category, item's offset, before each event but the first.

    Returns:
        The columns, and the trail that they were read from.
    """
    trail = scan(vocabulary, scale, EncoderState.new(encoder="", mean=scale.mean), events, ruler=ruler)
    states = sample_states(trail)
    slot = event_slots(trail, states)
    offset = np.array([scale.place(vocabulary.item(event.item), vocabulary.slot(event.category)).offset for event in events[1:]])
    learner = trail.snapshots[states, SNAPSHOT_INDEX["ability"]]
    category = trail.ability[trail.versions[states, slot]].astype(np.float64)
    return np.stack([np.ones(len(states)), learner, category, offset], axis=1), trail


def logistic_regression(columns: Float64Array, score: Float64Array) -> Float64Array:
    """Coefficients of P(right) = sigmoid(columns . coefficients), by Newton's method with a tiny ridge.

    Args:
        columns: (n, k). score: (n,) in 0..1; a score between counts as a part of both answers.

    Raises:
        EvaluationError: ``no_samples``, ``not_finite``.
    """
    if not len(score):
        raise EvaluationError("logistic regression needs samples", code="no_samples")
    if not (np.all(np.isfinite(columns)) and np.all(np.isfinite(score))):
        raise EvaluationError("columns and score must be finite", code="not_finite")
    coefficients = np.zeros(columns.shape[1])
    penalty = RIDGE * len(score) * np.eye(columns.shape[1])
    for _ in range(NEWTON_STEPS):
        probability = _sigmoid(columns @ coefficients)
        gradient = columns.T @ (score - probability) - penalty @ coefficients
        weight = probability * (1.0 - probability)
        step = np.linalg.solve((columns * weight[:, None]).T @ columns + penalty, gradient)
        coefficients = coefficients + step
        if np.abs(step).max() < NEWTON_TOLERANCE:
            break
    return coefficients


def _sigmoid(logit: Float64Array) -> Float64Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logit)))


def _check_events(events: Sequence[Event], samples: Samples) -> None:
    if len(samples) and int(samples.position.max()) >= len(events):
        raise EvaluationError("the samples do not belong to these events", code="wrong_shape")
