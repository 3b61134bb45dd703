"""Recommendations: which category next, at which level, by what kind of step. NumPy only, no TensorFlow.

Two forward passes: content and path from the learner's state, then the success curve once the category is chosen; the level
whose success chance is nearest the target is recommended. Content is the network's forecast mixed with the encoder's own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_core.encoding.encoder import Encoder
from aivo_core.encoding.labels import PATHS, path_name
from aivo_core.encoding.state import EncoderState
from aivo_core.inference import FoldedNetwork, blend
from aivo_core.network import FloatArray
from aivo_core.ordinal import attained_level, success_curve
from aivo_site.errors import UsageError
from learners.models import Learner
from learners.registration import find_learner
from models_store.cache import RecentlyUsed
from models_store.clones import base_of
from models_store.errors import StoreError
from models_store.evaluation import mix_content
from models_store.explanation import Contribution, contributions, with_groups_left_out
from models_store.forecasting import folded_tail, folded_trunk
from models_store.learner_states import current_state
from models_store.models import Backend, MainModelVersion, PersonalizedModel, PersonalizedModelStatus, ServingChoice
from models_store.tail_files import read_tail
from models_store.version_files import LoadedVersion, load_version
from models_store.versions import active_version

logger = logging.getLogger(__name__)

DEFAULT_TARGET = 0.7
REACH = 0.1
"""A target counts as reachable where some level's success chance lies so near."""

CACHED_NETWORKS = 256
"""Folded tails kept per process, some 210 KB each."""

SERVING_STATUSES = (
    PersonalizedModelStatus.ACTIVE,
    PersonalizedModelStatus.TRAINING,
    PersonalizedModelStatus.UPDATING,
    PersonalizedModelStatus.FAILED,
)
"""In these the tail that the row points to is whole: a job at work or failed leaves the last good one."""

BASIS_LEARNER, BASIS_CURRICULUM = "learner", "curriculum"


@dataclass(frozen=True)
class ServedBy:
    """Which model answers: ``MAIN``, ``PERSONAL`` or ``BLEND``, the main version, and the learner's own version if any.

    ``note`` says why the learner's own model was passed over: ``withdrawn``, ``damaged``; empty otherwise.
    """

    choice: str
    blend: float
    main_version: str
    personal_version: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Recommendation:
    """The next step for a learner.

    Attributes:
        basis: ``learner``, or ``curriculum`` while the learner has no event: then nothing is about this learner.
        events: events of the learner that it stands on.
        category: name of the recommended category; ``category_probability`` its chance of coming next.
        level: 1..9; ``success_probability`` the chance of a right answer there; ``target`` the wanted one.
        target_reached: within .1 of the target; else ``above_target`` says whether even the hardest level is easier than
            wanted (True), or even the easiest one harder (False); None where the target is reached or lies between levels.
        attained_level: expected highest level the learner would get right in the category, 0..9; None by curriculum.
        path: name of the most probable kind of step; None by curriculum. ``path_probability`` its chance.
        content: (128,) chances of the category slots, the mixture. categories: names of the slots, "" for one without.
        difficulty: (10,) distribution of the attained level in the category; None by curriculum.
        success: (9,) chance of a right answer at the levels 1..9 in the category.
        path_probabilities: (32,) chances of the path ids; None by curriculum.
        why: contribution of each feature group; empty by curriculum.
    """

    learner_id: str
    basis: str
    events: int
    category: str
    category_probability: float
    level: int
    success_probability: float
    target: float
    target_reached: bool
    above_target: bool | None
    attained_level: float | None
    path: str | None
    path_probability: float | None
    content: tuple[float, ...]
    categories: tuple[str, ...]
    difficulty: tuple[float, ...] | None
    success: tuple[float, ...]
    path_probabilities: tuple[float, ...] | None
    served_by: ServedBy
    why: tuple[Contribution, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recommend(learner_id: str, *, target: float = DEFAULT_TARGET) -> Recommendation:
    """Recommend the next step.

    Args:
        target: wanted chance of a right answer, between 0 and 1.

    Raises:
        UsageError: ``unknown_learner``; ``bad_target``.
        NoMainModel: no version is active.
        StoreError: the main version cannot be read.
        EncodingError: ``bad_event``: an interaction of the learner cannot be encoded.
    """
    if not 0.0 < target < 1.0:
        raise UsageError(_("target must lie between 0 and 1, not %(target)s.") % {"target": target}, code="bad_target")
    learner = find_learner(learner_id=learner_id, related=("personalized_model__source_version",))
    loaded, network, served_by = _network_for(learner)
    state = current_state(learner, loaded.encoder)
    if not state.events:
        return _by_curriculum(learner, loaded, target)
    return _by_learner(learner, loaded, network, served_by, state, target)


def clear_serving_cache() -> None:
    """Forget the folded networks of this process."""
    _networks.clear()


_networks: RecentlyUsed[tuple[str, int, str, float], FoldedNetwork] = RecentlyUsed(CACHED_NETWORKS)


def _network_for(learner: Learner) -> tuple[LoadedVersion, FoldedNetwork, ServedBy]:
    """The learner's own model where it is chosen and whole, else the active version."""
    active = active_version()
    model: PersonalizedModel | None = getattr(learner, "personalized_model", None)
    if model is None or model.backend != Backend.FEDERATED or model.serving_choice == ServingChoice.MAIN:
        return _main(active)
    if learner.withdrawn_at is not None or not learner.consent_training:
        return _main(active, note="withdrawn")
    if model.status not in SERVING_STATUSES:
        return _main(active, note="damaged")
    try:
        loaded = base_of(model)
        network = _personal_network(model, loaded)
    except StoreError as error:
        _mark_damaged(model, error)
        return _main(active, note="damaged")
    served_by = ServedBy(model.serving_choice, model.blend, loaded.version, model.version)
    return loaded, network, served_by


def _main(active: MainModelVersion, note: str = "") -> tuple[LoadedVersion, FoldedNetwork, ServedBy]:
    loaded = load_version(active)
    key = (loaded.weights_sha256, loaded.spec.frozen_blocks, "", 0.0)
    network = _networks.get_or_make(key, lambda: FoldedNetwork(folded_trunk(loaded), folded_tail(loaded, loaded.tail)))
    return loaded, network, ServedBy(ServingChoice.MAIN.value, 0.0, loaded.version, note=note)


def _personal_network(model: PersonalizedModel, loaded: LoadedVersion) -> FoldedNetwork:
    key = (loaded.weights_sha256, loaded.spec.frozen_blocks, model.weights_sha256, model.blend)

    def make() -> FoldedNetwork:
        tail = blend(loaded.tail, read_tail(model=model, spec=loaded.spec), model.blend)
        return FoldedNetwork(folded_trunk(loaded), folded_tail(loaded, tail))

    return _networks.get_or_make(key, make)


def _mark_damaged(model: PersonalizedModel, error: StoreError) -> None:
    """A learner is served by the main version meanwhile; the row says what is wrong."""
    logger.error("model of learner %s is damaged: %s", model.learner_id, error)
    PersonalizedModel.objects.filter(pk=model.pk, weights_sha256=model.weights_sha256).update(
        status=PersonalizedModelStatus.ERROR, status_reason=str(error), updated_at=timezone.now()
    )


def _by_learner(
    learner: Learner,
    loaded: LoadedVersion,
    network: FoldedNetwork,
    served_by: ServedBy,
    state: EncoderState,
    target: float,
) -> Recommendation:
    encoder = loaded.encoder
    prediction = encoder.prediction(state)
    first = network.forward(with_groups_left_out(encoder, prediction.first))
    priors = np.repeat(prediction.content_prior[None], len(first.content), axis=0)
    content = mix_content(first.content, priors, loaded.content_mix)
    slot = _best_slot(encoder, content[0])
    second = network.forward(with_groups_left_out(encoder, encoder.second_pass(prediction, state, slot)))
    curves = success_curve(second.difficulty.astype(np.float64))
    level = _level(curves[0], target)
    path = first.path[0]
    step = int(path[:PATHS].argmax())
    return Recommendation(
        learner_id=learner.learner_id,
        basis=BASIS_LEARNER,
        events=state.events,
        **_choice(encoder, content[0], slot, curves[0], level, target),
        attained_level=float(attained_level(second.difficulty[0].astype(np.float64))),
        path=path_name(step),
        path_probability=float(path[step]),
        difficulty=_floats(second.difficulty[0]),
        path_probabilities=_floats(path),
        served_by=served_by,
        why=contributions(content[:, slot], curves[:, level - 1].astype(np.float32)),
    )


def _by_curriculum(learner: Learner, loaded: LoadedVersion, target: float) -> Recommendation:
    """The curriculum's own rates: the network has nothing to go on before the first event."""
    encoder = loaded.encoder
    content = encoder.base_rates.astype(np.float32)
    slot = _best_slot(encoder, content)
    curve = encoder.success_by_level
    return Recommendation(
        learner_id=learner.learner_id,
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
