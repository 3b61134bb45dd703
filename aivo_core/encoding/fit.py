"""Fitting an encoder on the curriculum learners, and their training rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from aivo_core.encoding.assemble import sample_states, samples
from aivo_core.encoding.columns import CONTEXT_SLOTS, OVERFLOW_SLOT, SCALED, SLOTS, SUBJECT_SLOTS
from aivo_core.encoding.counts import Counts, ExpectedMeans, Log, fit_transitions, fold_of, fold_scales, full_scale
from aivo_core.encoding.encoder import Encoder
from aivo_core.encoding.errors import EncodingError
from aivo_core.encoding.events import Event
from aivo_core.encoding.leave_one_out import LeaveOneOut
from aivo_core.encoding.rows import RawRows, Scaler, raw_rows
from aivo_core.encoding.scan import Trail, check_event, scan
from aivo_core.encoding.state import EncoderState
from aivo_core.encoding.tables import CATEGORY_PRIOR, MIN_LEARNERS, Forecast, Scale, Vocabulary, most_frequent
from aivo_core.ordinal import LEVELS
from aivo_core.samples import Samples

Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
History = tuple[str, Sequence[Event]]

SCALER_FLOOR = 1e-3
"""Added to every standard deviation."""


def fit_encoder(histories: Iterable[History]) -> FittedEncoder:
    """Fit all tables and scalers on the given learners only.

    Args:
        histories: (key, events in the learner's order), learners in any order; the key decides the learner's fold. Held in
            memory once.

    Raises:
        EncodingError: ``bad_event`` naming learner, event and field; ``duplicate_learner``; ``too_few_learners`` below
            three learners, or where no learner has two events.
    """
    # Sorted, so that sums, and with them the encoder's hash, do not depend on the order in which learners come.
    learners = sorted(((key, list(events)) for key, events in histories), key=lambda history: history[0])
    _check(learners)
    vocabulary = _vocabulary(learners)
    log = _log(vocabulary, learners)
    counts = Counts.of(log)
    if not counts.steps:
        raise EncodingError("an encoder needs at least one learner with two events", code="too_few_learners")
    scale = full_scale(log)
    folds = [fold_of(key) for key, _ in learners]
    outside = fold_scales(log, folds)
    unscaled = Encoder(
        vocabulary=vocabulary,
        scale=scale,
        transitions=fit_transitions(log, counts, ExpectedMeans.of(log, scale)),
        scaler=Scaler(mean=np.zeros(SCALED), deviation=np.ones(SCALED)),
        context_slots=np.argsort(-counts.slot_count, kind="stable")[:CONTEXT_SLOTS].astype(np.int64),
        success_by_level=success_by_level(log, scale, outside, folds),
    )
    training = TrainingTables(
        counts=counts,
        events=len(log.slot),
        scales=outside,
        expected=tuple(ExpectedMeans.of(log, fold_scale) for fold_scale in outside),
        fingerprints={key: _fingerprint(vocabulary, events) for key, events in learners},
    )
    encoder = replace(unscaled, scaler=_fit_scaler(unscaled, training, learners))
    return FittedEncoder(encoder=encoder, training=training, report=_report(learners, log, counts, encoder))


@dataclass(frozen=True)
class TrainingTables:
    """What training rows need and prediction does not: counts with their learners, and scales without each fold."""

    counts: Counts
    events: int
    scales: tuple[Scale, ...]
    expected: tuple[ExpectedMeans, ...]
    fingerprints: dict[str, bytes]

    @cached_property
    def folds(self) -> tuple[LeaveOneOut, ...]:
        return tuple(
            LeaveOneOut(counts=self.counts, events=self.events, scale=scale, expected=expected)
            for scale, expected in zip(self.scales, self.expected, strict=True)
        )


@dataclass(frozen=True)
class FittedEncoder:
    """An encoder together with what training rows of its own learners need.

    Attributes:
        encoder: the immutable artefact; travels with the main version.
        training: stays where the fit was made: it holds counts of cells with fewer than three learners.
        report: learners, events, samples, categories, overflow_share (events in slot 127), overflow_categories, subjects,
            items, items_known, mean_score, and the suppressed cells of the transition tables.
    """

    encoder: Encoder
    training: TrainingTables
    report: dict[str, Any]

    def training_scale(self, key: str) -> Scale:
        """The scale that the training rows of a learner use: item means without the learner's fold."""
        return self.training.scales[fold_of(key)]

    def training_samples(self, key: str, events: Sequence[Event]) -> Samples:
        """Leave-one-out samples of a learner of the fit.

        Args:
            key, events: exactly as they were fitted.

        Raises:
            EncodingError: ``unknown_learner``: not in the fit, or with other events than those fitted.
        """
        if self.training.fingerprints.get(key) != _fingerprint(self.encoder.vocabulary, events):
            raise EncodingError(
                f"learner {key} was not fitted with these events: training rows exist for the histories of the fit only",
                code="unknown_learner",
            )
        tables = self.training.folds[fold_of(key)]
        trail, states, forecast, raw = _training_rows(self.encoder, tables, events)
        return samples(
            trail,
            states,
            forecast=forecast,
            raw=raw,
            scale=tables.scale,
            scaler=self.encoder.scaler,
            context_slots=self.encoder.context_slots,
        )


def success_by_level(log: Log, scale: Scale, outside: Sequence[Scale], folds: Sequence[int]) -> Float64Array:
    """(9,) share of right answers at levels 1..9, never rising.

    The level of an event comes from item means without its learner's fold, so that its own score is not in it. A level's
    rate is shrunk with 20 pseudo-counts towards the mean that the level has on the scale, then made monotone by pooling
    adjacent violators (Ayer et al. 1955).
    """
    fold = np.asarray(folds, dtype=np.int64)[log.learner]
    level = np.empty(len(log.slot), dtype=np.int64)
    for index, fold_scale in enumerate(outside):
        mask = fold == index
        hardness = fold_scale.hardness(fold_scale.item_mean(log.item[mask], log.slot[mask]))
        level[mask] = np.clip(np.ceil(LEVELS * hardness), 1, LEVELS)
    count = np.bincount(level - 1, minlength=LEVELS).astype(np.float64)
    right = np.bincount(level - 1, weights=log.score, minlength=LEVELS)
    easier_share = 1.0 - (np.arange(LEVELS) + 0.5) / LEVELS
    middle = np.searchsorted(scale.cumulative[1:], easier_share * scale.cumulative[-1])
    rate = (right + CATEGORY_PRIOR * scale.points[middle]) / (count + CATEGORY_PRIOR)
    return falling(rate, count + CATEGORY_PRIOR)


def falling(rate: Float64Array, weight: Float64Array) -> Float64Array:
    """The never rising sequence nearest to ``rate`` in weighted squares."""
    blocks: list[tuple[float, float, int]] = []
    for value, mass in zip(rate.tolist(), weight.tolist(), strict=True):
        block = (value, mass, 1)
        while blocks and blocks[-1][0] < block[0]:
            other = blocks.pop()
            total = other[1] + block[1]
            block = ((other[0] * other[1] + block[0] * block[1]) / total, total, other[2] + block[2])
        blocks.append(block)
    return np.concatenate([np.full(length, value) for value, _, length in blocks])


def _check(learners: Sequence[tuple[str, list[Event]]]) -> None:
    keys = {key for key, _ in learners}
    if len(keys) != len(learners):
        raise EncodingError("histories names a learner twice", code="duplicate_learner")
    if len(learners) < MIN_LEARNERS:
        raise EncodingError(
            f"an encoder needs at least {MIN_LEARNERS} learners, not {len(learners)}: no table cell may stand on fewer",
            code="too_few_learners",
        )
    for key, events in learners:
        for position, event in enumerate(events):
            try:
                check_event(event, position)
            except EncodingError as error:
                raise EncodingError(f"learner {key}, {error}", code=error.code) from error


def _vocabulary(learners: Sequence[tuple[str, list[Event]]]) -> Vocabulary:
    behind: dict[str, int] = {}
    for _, events in learners:
        for item in {event.item for event in events if event.item}:
            behind[item] = behind.get(item, 0) + 1
    return Vocabulary(
        categories=most_frequent((event.category for _, events in learners for event in events), OVERFLOW_SLOT),
        subjects=most_frequent((event.subject for _, events in learners for event in events), SUBJECT_SLOTS - 1),
        items=tuple(sorted(item for item, count in behind.items() if count >= MIN_LEARNERS)),
    )


def _log(vocabulary: Vocabulary, learners: Sequence[tuple[str, list[Event]]]) -> Log:
    flat = [event for _, events in learners for event in events]
    return Log(
        learner=np.repeat(np.arange(len(learners)), [len(events) for _, events in learners]).astype(np.int64),
        slot=np.array([vocabulary.slot(event.category) for event in flat], dtype=np.int64),
        item=np.array([vocabulary.item(event.item) for event in flat], dtype=np.int64),
        score=np.array([event.score for event in flat], dtype=np.float64),
        learners=len(learners),
        items=len(vocabulary.items),
    )


def _fingerprint(vocabulary: Vocabulary, events: Sequence[Event]) -> bytes:
    """Hash of what the counts took from a history."""
    digest = hashlib.sha256()
    digest.update(np.array([vocabulary.slot(event.category) for event in events], dtype=np.int64).tobytes())
    digest.update(np.array([vocabulary.item(event.item) for event in events], dtype=np.int64).tobytes())
    digest.update(np.array([event.score for event in events], dtype=np.float64).tobytes())
    return digest.digest()


def _training_rows(encoder: Encoder, tables: LeaveOneOut, events: Sequence[Event]) -> tuple[Trail, IntArray, Forecast, RawRows]:
    state = EncoderState.new(encoder="", mean=tables.scale.mean)
    trail = scan(encoder.vocabulary, tables.scale, state, events, ruler=encoder.scale)
    states = sample_states(trail)
    slot = np.array([encoder.vocabulary.slot(event.category) for event in events], dtype=np.int64)
    item = np.array([encoder.vocabulary.item(event.item) for event in events], dtype=np.int64)
    forecast = tables.forecast(slot, item)
    return trail, states, forecast, raw_rows(trail, states, forecast, encoder.context_slots)


def _fit_scaler(encoder: Encoder, training: TrainingTables, learners: Sequence[tuple[str, list[Event]]]) -> Scaler:
    """Mean and deviation of the leave-one-out rows' last 64 columns (merged as Chan et al. 1983)."""
    count, mean, squares = 0, np.zeros(SCALED), np.zeros(SCALED)
    for key, events in learners:
        if len(events) < 2:
            continue
        _, _, _, raw = _training_rows(encoder, training.folds[fold_of(key)], events)
        n = len(raw.scaled)
        part_mean = raw.scaled.mean(axis=0)
        shift = part_mean - mean
        squares += ((raw.scaled - part_mean) ** 2).sum(axis=0) + shift**2 * (count * n / (count + n))
        mean += shift * (n / (count + n))
        count += n
    return Scaler(mean=mean, deviation=np.sqrt(squares / count) + SCALER_FLOOR)


def _report(learners: Sequence[tuple[str, list[Event]]], log: Log, counts: Counts, encoder: Encoder) -> dict[str, Any]:
    categories = {event.category for _, events in learners for event in events}
    items = {event.item for _, events in learners for event in events if event.item}
    return {
        "learners": len(learners),
        "events": len(log.slot),
        "samples": counts.steps,
        "categories": len(categories),
        "overflow_categories": len(categories) - len(encoder.categories),
        "overflow_share": float((log.slot == SLOTS - 1).mean()),
        "subjects": len({event.subject for _, events in learners for event in events}),
        "items": len(items),
        "items_known": len(encoder.vocabulary.items),
        "mean_score": float(log.score.mean()),
        "suppressed": counts.suppressed(),
    }
