"""Which model answers for a learner, by the stamp alone: the learner's own where it is chosen and whole, else the active one.

Folded tails are kept in memory up to ``TAIL_BYTES``, so that a warm request reads no file.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_core.engine import blas
from aivo_core.inference import FoldedNetwork, FoldedTail, blend
from aivo_core.network import FloatArray
from models_store.cache import RecentlyUsed
from models_store.errors import NoMainModel, StoreError
from models_store.forecasting import folded_tail, folded_trunk
from models_store.models import Backend, PersonalizedModel, PersonalizedModelStatus, ServingChoice
from models_store.recommendation import ServedBy
from models_store.serving_stamps import ServingStamp
from models_store.tail_files import read_tail_file
from models_store.version_files import CACHED_VERSIONS, LoadedVersion, load_version_files

logger = logging.getLogger(__name__)

TAIL_BYTES = 256 * 2**20
"""Folded tails kept per process, some 210 KB each."""

SERVING_STATUSES = frozenset(
    status.value
    for status in (
        PersonalizedModelStatus.ACTIVE,
        PersonalizedModelStatus.TRAINING,
        PersonalizedModelStatus.UPDATING,
        PersonalizedModelStatus.FAILED,
    )
)
"""In these the tail that the row points to is whole: a job at work or failed leaves the last good one."""


@dataclass(frozen=True)
class ServedModel:
    """The version, the network in memory, and what to tell about them."""

    loaded: LoadedVersion
    network: FoldedNetwork
    served_by: ServedBy


def served_model(stamp: ServingStamp) -> ServedModel:
    """The model that answers for the learner.

    Raises:
        NoMainModel: no version is active.
        StoreError: the main version cannot be read.
    """
    if stamp.active_version is None:
        raise NoMainModel(_("There is no active main model version: train one with train_main_model."))
    if stamp.model is None or stamp.backend != Backend.FEDERATED.value or stamp.serving_choice == ServingChoice.MAIN.value:
        return _main(stamp)
    if stamp.withdrawn_at is not None or not stamp.consent_training:
        return _main(stamp, note="withdrawn")
    if stamp.status not in SERVING_STATUSES:
        return _main(stamp, note="damaged")
    try:
        return _personal(stamp)
    except StoreError as error:
        _mark_damaged(stamp, error)
        return _main(stamp, note="damaged")


def clear_served_models() -> None:
    """Forget the folded tails of this process."""
    _tails.clear()
    _bases.clear()


_TailKey = tuple[str, int, str, str, float]
_tails: RecentlyUsed[_TailKey, FoldedTail] = RecentlyUsed(TAIL_BYTES, size=lambda tail: tail.nbytes)
_bases: RecentlyUsed[tuple[str, str, str], LoadedVersion] = RecentlyUsed(CACHED_VERSIONS)
"""Versions with the freeze lists of the clones made of them."""


def _main(stamp: ServingStamp, note: str = "") -> ServedModel:
    loaded = load_version_files(
        version=str(stamp.active_version),
        model_path=stamp.active_path,
        manifest_sha256=stamp.active_manifest,
        encoder_sha256=stamp.active_encoder,
    )
    tail = _tails.get_or_make(_tail_key(loaded), lambda: _folded(loaded, loaded.tail))
    served_by = ServedBy(ServingChoice.MAIN.value, 0.0, loaded.version, note=note)
    return ServedModel(loaded, FoldedNetwork(folded_trunk(loaded), tail), served_by)


def _personal(stamp: ServingStamp) -> ServedModel:
    loaded = _base(stamp)
    key = _tail_key(loaded, stamp.weights_path, stamp.weights_sha256, stamp.blend)
    tail = _tails.get_or_make(key, lambda: _folded(loaded, _blended(stamp, loaded)))
    served_by = ServedBy(stamp.serving_choice, stamp.blend, loaded.version, stamp.number)
    return ServedModel(loaded, FoldedNetwork(folded_trunk(loaded), tail), served_by)


def _base(stamp: ServingStamp) -> LoadedVersion:
    if stamp.base_version is None or not stamp.weights_path:
        raise StoreError("the learner's model has no weights yet", code="missing_file")
    loaded = load_version_files(
        version=stamp.base_version,
        model_path=stamp.base_path,
        manifest_sha256=stamp.base_manifest,
        encoder_sha256=stamp.base_encoder,
    )
    if stamp.freeze_layers is None:
        return loaded
    key = (loaded.version, loaded.weights_sha256, stamp.freeze_layers)
    return _bases.get_or_make(key, lambda: loaded.with_freeze_layers(json.loads(str(stamp.freeze_layers))))


def _blended(stamp: ServingStamp, loaded: LoadedVersion) -> FloatArray:
    tail = read_tail_file(path=stamp.weights_path, sha256=stamp.weights_sha256, spec=loaded.spec)
    return blend(loaded.tail, tail, stamp.blend)


def _folded(loaded: LoadedVersion, tail: FloatArray) -> FoldedTail:
    """A process that serves computes products of few rows: threads of the library would only wait for one another."""
    blas.use_one_thread()
    return folded_tail(loaded, tail)


def _tail_key(loaded: LoadedVersion, path: str = "", sha256: str = "", share: float = 0.0) -> _TailKey:
    return loaded.weights_sha256, loaded.spec.frozen_blocks, path, sha256, share


def _mark_damaged(stamp: ServingStamp, error: StoreError) -> None:
    """A learner is served by the main version meanwhile; the row says what is wrong."""
    logger.error("model of learner %s is damaged: %s", stamp.learner, error)
    PersonalizedModel.objects.filter(learner=stamp.learner, weights_sha256=stamp.weights_sha256).update(
        status=PersonalizedModelStatus.ERROR, status_reason=str(error), updated_at=timezone.now()
    )
