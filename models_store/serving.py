"""Recommendations: which category next, at which level, by what kind of step. NumPy only, no TensorFlow.

Two forward passes: content and path from the learner's state, then the success curve once the category is chosen; the level
whose success chance is nearest the target is recommended. Content is the network's forecast mixed with the encoder's own.
Both passes carry the rows without each feature group along, which say why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from django.utils.translation import gettext as _

from aivo_core.encoding.encoder import Encoder, Prediction
from aivo_core.encoding.errors import EncodingError
from aivo_core.encoding.labels import PATHS, path_name
from aivo_core.inference import EachOutputs, FoldedTail, FoldedTrunk, forward_each
from aivo_core.network import FloatArray
from aivo_core.ordinal import attained_level, success_curve
from aivo_site.errors import UsageError
from learners.registration import unknown_learner
from models_store.evaluation import mix_content
from models_store.explanation import contributions, with_groups_left_out
from models_store.learner_inputs import LearnerInputs, clear_learner_inputs, inputs_of, inputs_of_many
from models_store.models import ServingChoice
from models_store.recommendation import NotRecommended, Recommendation, ServedBy
from models_store.served_models import ServedModel, clear_served_models, served_model
from models_store.serving_stamps import ServingStamp, read_stamp, read_stamps
from models_store.version_files import LoadedVersion

DEFAULT_TARGET = 0.7
REACH = 0.1
"""A target counts as reachable where some level's success chance lies so near."""

LEARNERS_AT_ONCE = 16
"""Learners of a batch computed together: their tails stay in the processor's cache from the first pass to the second."""

BASIS_LEARNER, BASIS_CURRICULUM = "learner", "curriculum"


def recommend(learner_id: str, *, target: float = DEFAULT_TARGET) -> Recommendation:
    """Recommend the next step.

    Warm, this is one query and two forward passes; whatever was written before, by any process, is seen.

    Args:
        target: wanted chance of a right answer, between 0 and 1.

    Raises:
        UsageError: ``unknown_learner``; ``bad_target``.
        NoMainModel: no version is active.
        StoreError: the main version cannot be read.
        EncodingError: ``bad_event``: an interaction of the learner cannot be encoded.
    """
    _check_target(target)
    stamp = read_stamp(learner_id)
    if stamp is None:
        raise unknown_learner(learner_id)
    model = served_model(stamp)
    inputs = inputs_of(stamp, model.loaded.encoder)
    if inputs.prediction is None:
        return _by_curriculum(stamp, model.loaded, target)
    return next(_by_learner([_Asked(stamp, model, inputs, inputs.prediction)], target))


def recommend_many(learner_ids: Sequence[str], *, target: float = DEFAULT_TARGET) -> list[Recommendation | NotRecommended]:
    """Recommend to many learners: few queries for all, the trunk once per group of rows, every tail read once.

    One entry per id, in their order; a learner who is unknown or cannot be encoded does not hold up the others. The numbers
    are those of ``recommend`` up to float32 rounding.

    Raises:
        UsageError: ``bad_target``.
        NoMainModel: no version is active.
        StoreError: the main version cannot be read.
    """
    _check_target(target)
    stamps = read_stamps(learner_ids)
    models = {key: served_model(stamp) for key, stamp in stamps.items()}
    results: dict[str, Recommendation | NotRecommended] = {}
    for together in _same_network(models):
        asked = []
        loaded = models[together[0]].loaded
        inputs = inputs_of_many((stamps[key] for key in together), loaded.encoder)
        for key in together:
            stamp, found = stamps[key], inputs[stamps[key].learner]
            if isinstance(found, EncodingError):
                results[key] = NotRecommended(stamp.learner_id, found.code, str(found))
            elif found.prediction is None:
                results[key] = _by_curriculum(stamp, loaded, target)
            else:
                asked.append(_Asked(stamp, models[key], found, found.prediction))
        for start in range(0, len(asked), LEARNERS_AT_ONCE):
            for answer in _by_learner(asked[start : start + LEARNERS_AT_ONCE], target):
                results[answer.learner_id.lower()] = answer
    return [results.get(text.lower()) or _unknown(text) for text in learner_ids]


def clear_serving_cache() -> None:
    """Forget the folded networks and the learners' inputs of this process."""
    clear_served_models()
    clear_learner_inputs()


@dataclass(frozen=True)
class _Asked:
    stamp: ServingStamp
    model: ServedModel
    inputs: LearnerInputs
    prediction: Prediction


def _check_target(target: float) -> None:
    if not 0.0 < target < 1.0:
        raise UsageError(_("target must lie between 0 and 1, not %(target)s.") % {"target": target}, code="bad_target")


def _unknown(learner_id: str) -> NotRecommended:
    error = unknown_learner(learner_id)
    return NotRecommended(learner_id, error.code, str(error))


def _same_network(models: Mapping[str, ServedModel]) -> list[list[str]]:
    """Keys of the learners whose tails stand on one trunk and whose rows come from one encoder."""
    groups: defaultdict[tuple[str, str, int], list[str]] = defaultdict(list)
    for key, model in models.items():
        loaded = model.loaded
        groups[loaded.version, loaded.weights_sha256, loaded.spec.frozen_blocks].append(key)
    return list(groups.values())


def _by_learner(block: Sequence[_Asked], target: float) -> Iterator[Recommendation]:
    """Answers for learners with events, all on one trunk."""
    loaded, trunk = block[0].model.loaded, block[0].model.network.trunk
    encoder = loaded.encoder
    tails = [asked.model.network.tail for asked in block]
    predictions = [asked.prediction for asked in block]
    first = _forward(trunk, tails, np.array([asked.inputs.rows for asked in block]))
    priors = np.array([prediction.content_prior for prediction in predictions])[:, None]
    content = mix_content(first.content, np.broadcast_to(priors, first.content.shape), loaded.content_mix)
    slots = content[:, 0, : len(encoder.categories)].argmax(axis=1)
    rows = with_groups_left_out(encoder, encoder.second_passes(predictions, slots))
    difficulty = _forward(trunk, tails, rows).difficulty.astype(np.float64)
    curves = success_curve(difficulty)
    for index, asked in enumerate(block):
        slot, curve = int(slots[index]), curves[index, 0]
        level = _level(curve, target)
        path = first.path[index, 0]
        step = int(path[:PATHS].argmax())
        yield Recommendation(
            learner_id=asked.stamp.learner_id,
            basis=BASIS_LEARNER,
            events=asked.inputs.events,
            **_choice(encoder, content[index, 0], slot, curve, level, target),
            attained_level=float(attained_level(difficulty[index, 0])),
            path=path_name(step),
            path_probability=float(path[step]),
            difficulty=_floats(difficulty[index, 0]),
            path_probabilities=_floats(path),
            served_by=asked.model.served_by,
            why=contributions(content[index, :, slot], curves[index, :, level - 1].astype(np.float32)),
        )


def _forward(trunk: FoldedTrunk, tails: Sequence[FoldedTail], rows: FloatArray) -> EachOutputs:
    """(learners, rows, 256) through one trunk and each learner's own tail."""
    activations = trunk.activations(rows.reshape(-1, rows.shape[-1]))
    return forward_each(tails, activations.reshape(*rows.shape[:2], -1))


def _by_curriculum(stamp: ServingStamp, loaded: LoadedVersion, target: float) -> Recommendation:
    """The curriculum's own rates: the network has nothing to go on before the first event."""
    encoder = loaded.encoder
    content = encoder.base_rates.astype(np.float32)
    slot = _best_slot(encoder, content)
    curve = encoder.success_by_level
    return Recommendation(
        learner_id=stamp.learner_id,
        basis=BASIS_CURRICULUM,
        events=0,
        **_choice(encoder, content, slot, curve, _level(curve, target), target),
        attained_level=None,
        path=None,
        path_probability=None,
        difficulty=None,
        path_probabilities=None,
        served_by=ServedBy(ServingChoice.MAIN.value, 0.0, loaded.version),
        why=(),
    )


def _best_slot(encoder: Encoder, content: FloatArray) -> int:
    """The most probable slot that has a name: "some rare category" cannot be recommended."""
    return int(content[: len(encoder.categories)].argmax())


def _level(curve: np.ndarray[Any, Any], target: float) -> int:
    """The level 1..9 whose success chance is nearest the target; the lower one of two."""
    return int(np.abs(curve - target).argmin()) + 1


def _choice(
    encoder: Encoder, content: FloatArray, slot: int, curve: np.ndarray[Any, Any], level: int, target: float
) -> Mapping[str, Any]:
    names = encoder.categories
    success = float(curve[level - 1])
    above: bool | None = None
    if abs(success - target) > REACH:
        above = True if curve.min() > target else False if curve.max() < target else None
    return {
        "category": names[slot],
        "category_probability": float(content[slot]),
        "level": level,
        "success_probability": success,
        "target": target,
        "target_reached": abs(success - target) <= REACH,
        "above_target": above,
        "content": _floats(content),
        "categories": (*names, *[""] * (len(content) - len(names))),
        "success": _floats(curve),
    }


def _floats(values: np.ndarray[Any, Any]) -> tuple[float, ...]:
    return tuple(values.astype(float).tolist())
