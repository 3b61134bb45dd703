"""Copies of a main version for learners: made in bulk or one by one, and moved on to a new tail.

A clone is a row and a small file: the learner's own tail, a copy of the version's tail at first. The trunk stays the
version's. Files are immutable and a changed tail is a new file, so that changing one clone never changes another.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_core.network import FloatArray, NetworkError, NetworkSpec
from aivo_core.samples import Samples
from aivo_site.audit.services import record
from aivo_site.errors import UsageError
from learners.models import Learner, Pool
from learners.registration import find_learner
from learners.selection import check_limit, select_learners
from models_store import clones
from models_store.clones import Comparison
from models_store.errors import CloneError, StoreError, VersionConflict
from models_store.files import LEARNER_MODELS, StoredFile, location, name_below_root
from models_store.models import Backend, MainModelVersion, PersonalizedModel, PersonalizedModelStatus
from models_store.tail_files import TailToWrite, write_tail, write_tails
from models_store.version_files import LoadedVersion, load_version
from models_store.versions import active_version, resolve_version

CLONES_AT_ONCE = 64
"""Files synchronised and rows committed together."""

REUSABLE = (PersonalizedModelStatus.PENDING, PersonalizedModelStatus.FAILED)
"""A row in one of these, without weights, waits for its clone."""

Progress = Callable[[int, int, str], None]


@dataclass
class CloneReport:
    """What became of the learners: how many have a clone now, and per reason code how many were left out or failed."""

    cloned: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    stopped: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "cloned": self.cloned,
            "skipped": dict(sorted(self.skipped.items())),
            "failed": dict(sorted(self.failed.items())),
            "seconds": round(self.seconds, 3),
        }


def clone_learners(
    *,
    learners: QuerySet[Any] | Iterable[Learner],
    version: MainModelVersion | None = None,
    freeze_layers: Sequence[str] | None = None,
    actor: str,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> CloneReport:
    """Give each learner a clone of ``version`` (None: the active one); running it again changes nothing.

    Reason codes of who is left out: ``withdrawn``, ``wrong_pool`` (only the federated pool has models of its own),
    ``no_consent_training``, ``already_cloned``, ``other_backend`` (a fine-tuned model: migrate it instead).

    Args:
        learners: a queryset of ``Learner``, of which only the keys are held, or learners.
        freeze_layers: layers of the trunk; None takes the version's own.
        should_stop: asked between groups of learners; what was cloned until then stays.

    Raises:
        NoMainModel: no version was given and none is active.
        StoreError: the version cannot be read.
        UsageError: ``freeze_layers`` is no prefix of the network; the message lists its layers.
    """
    started = time.monotonic()
    row = version or active_version()
    base = _with_freeze_layers(load_version(row), freeze_layers)
    report = CloneReport()
    everyone = list(learners.values_list("pk", flat=True) if isinstance(learners, QuerySet) else (x.pk for x in learners))
    done = 0
    for keys in _groups(everyone, CLONES_AT_ONCE):
        if should_stop and should_stop():
            report.stopped = True
            break
        _clone_group(keys, row=row, base=base, actor=actor, report=report)
        done += len(keys)
        if progress:
            progress(done, len(everyone), row.version)
    report.seconds = time.monotonic() - started
    return report


def learners_to_clone(
    *, learner_ids: Sequence[str] = (), organisation: str = "", pool: str = Pool.FEDERATED, limit: int | None = None
) -> QuerySet[Any]:
    """The learners that a door's request means, by id.

    Args:
        learner_ids: exactly these, of whatever pool, by learner id or primary key; empty: all of ``pool``.
        limit: at most so many of those who may have a clone and have none yet.

    Raises:
        UsageError: as ``select_learners``, or ``bad_limit``.
    """
    check_limit(limit)
    learners = select_learners(learner_ids=learner_ids, organisation=organisation, pool=pool)
    if limit is None:
        return learners
    without = Q(personalized_model=None) | Q(personalized_model__weights_path="", personalized_model__status__in=REUSABLE)
    return learners.filter(without, consent_training=True, withdrawn_at=None)[:limit]


def check_freeze_layers(freeze_layers: Sequence[str]) -> None:
    """Refuse a list that the active version could not be cloned with.

    Raises:
        UsageError: it is no prefix of the network; the message lists the layers.
        NoMainModel, StoreError: there is no version to ask.
    """
    _with_freeze_layers(load_version(active_version()), freeze_layers)


def save_tail(
    *, model: PersonalizedModel, spec: NetworkSpec, tail: FloatArray, fields: Mapping[str, Any] | None = None
) -> StoredFile:
    """Give a model its next tail: a new file, then the row's next version; ``model`` is refreshed.

    Args:
        tail: (spec.tail_size,) float32.
        fields: other fields of the row to set in the same statement.

    Raises:
        VersionConflict: another process gave the model a new tail meanwhile; nothing was changed.
        NetworkError: a tail of a wrong shape or dtype.
    """
    number = model.version + 1
    stored = write_tail(learner_id=model.learner.learner_id, number=number, spec=spec, tail=tail)
    changed = PersonalizedModel.objects.filter(
        pk=model.pk, version=model.version, weights_sha256=model.weights_sha256, weights_path=model.weights_path
    ).update(
        **{
            **(fields or {}),
            "version": number,
            "weights_path": stored.path,
            "weights_sha256": stored.sha256,
            "updated_at": timezone.now(),
        }
    )
    if changed != 1:
        raise VersionConflict(_("The learner's model got another tail at the same moment; nothing was changed."))
    model.refresh_from_db()
    return stored


@dataclass(frozen=True)
class ClonedArchitecture:
    """What of a clone learns: numbers in all, those of the tail, and the frozen layers."""

    total_params: int
    trainable_params: int
    freeze_layers: tuple[str, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class CloneInfo:
    """One learner's clone; ``created`` is False when it was there already."""

    cloned_model_path: str
    architecture: ClonedArchitecture
    model: PersonalizedModel
    source_version: str
    created: bool


class ModelCloner:
    """Clones one model, and measures clones: the original's interface over this module's services."""

    def __init__(self, *, actor: str = "ModelCloner") -> None:
        self._actor = actor

    def clone_model(
        self,
        main_model_path: str,
        learner_model_path: str,
        learner_id: str,
        freeze_layers: Sequence[str] | None = None,
    ) -> CloneInfo:
        """Clone a version for one learner; a clone of the same version that is there already is returned.

        Args:
            main_model_path: a version's name, its path in the store, or the store's own path for the active version.
            learner_model_path: empty, or a path inside the learner store; the file goes into the learner's own folder.
            freeze_layers: layers of the trunk; None takes the version's own.

        Raises:
            UsageError: unknown version or learner, a path outside the store, a freeze list that is no prefix.
            CloneError: the reason code of ``clone_learners``.
            StoreError: the version cannot be read.
        """
        version = resolve_version(main_model_path)
        if learner_model_path and name_below_root(alias=LEARNER_MODELS, text=learner_model_path) is None:
            message = _("learner_model_path must lie inside the learner store, not %(path)s.")
            raise UsageError(message % {"path": ascii(learner_model_path[:80])}, code="bad_path")
        learner = find_learner(learner_id=learner_id)
        base = _with_freeze_layers(load_version(version), freeze_layers)
        report = clone_learners(learners=[learner], version=version, freeze_layers=freeze_layers, actor=self._actor)
        for reason in (*report.skipped, *report.failed):
            if reason != "already_cloned":
                raise CloneError(
                    _("Learner %(id)s was not cloned: %(reason)s.") % {"id": learner_id, "reason": reason}, code=reason
                )
        model = PersonalizedModel.objects.get(learner=learner)
        frozen = tuple(model.metadata.get("freeze_layers", ()))
        same = model.source_version_id == version.pk and frozen == base.spec.freeze_layers
        if not report.cloned and not same:
            message = _("Learner %(id)s has a clone of another version or with other frozen layers already.")
            raise CloneError(message % {"id": learner_id}, code="already_cloned")
        return CloneInfo(
            cloned_model_path=location(alias=LEARNER_MODELS, path=model.weights_path),
            architecture=ClonedArchitecture(
                total_params=base.spec.parameter_count,
                trainable_params=base.spec.tail_size,
                freeze_layers=base.spec.freeze_layers,
                layers=base.spec.layer_names,
            ),
            model=model,
            source_version=version.version,
            created=report.cloned == 1,
        )

    def extract_delta(self, model: PersonalizedModel) -> FloatArray:
        """See ``clones.extract_delta``."""
        return clones.extract_delta(model)

    def compare(
        self,
        first: MainModelVersion | PersonalizedModel,
        second: MainModelVersion | PersonalizedModel,
        *,
        probe: Samples | None = None,
    ) -> Comparison:
        """See ``clones.compare``."""
        return clones.compare(first, second, probe=probe)


def _with_freeze_layers(loaded: LoadedVersion, freeze_layers: Sequence[str] | None) -> LoadedVersion:
    if freeze_layers is None:
        return loaded
    try:
        return loaded.with_freeze_layers(freeze_layers)
    except NetworkError as error:
        raise UsageError(str(error), code=error.code) from error


def _groups(keys: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(keys), size):
        yield list(keys[start : start + size])


def _clone_group(keys: list[Any], *, row: MainModelVersion, base: LoadedVersion, actor: str, report: CloneReport) -> None:
    group = list(Learner.objects.filter(pk__in=keys).order_by("learner_id"))
    wanted = _eligible(group, report.skipped)
    stored = _write(wanted, base, report.failed)
    if not stored:
        return
    by_key = {learner.pk: learner for learner in wanted}
    with transaction.atomic():
        # Read again where nobody else can write in between: a withdrawal stops a clone that is half made.
        current = Learner.objects.select_for_update().filter(pk__in=list(stored))
        still = _eligible(list(current), report.skipped)
        for missing in set(stored) - {learner.pk for learner in current}:
            report.skipped["erased"] += 1
            by_key.pop(missing)
        cloned = _write_rows({learner.pk: stored[learner.pk] for learner in still}, row=row, base=base)
        report.skipped["already_cloned"] += len(still) - len(cloned)
        if cloned:
            record(
                action="learners.cloned",
                actor=actor,
                object_type="MainModelVersion",
                object_id=str(row.pk),
                data={"version": row.version, "subject_keys": sorted(str(by_key[key].subject_key) for key in cloned)},
            )
    report.cloned += len(cloned)
    report.skipped += Counter()  # drops counts of zero


def _eligible(group: list[Learner], skipped: Counter[str]) -> list[Learner]:
    models = {model.learner_id: model for model in PersonalizedModel.objects.filter(learner__in=group)}
    kept = []
    for learner in group:
        reason = _why_not(learner, models.get(learner.pk))
        if reason:
            skipped[reason] += 1
        else:
            kept.append(learner)
    return kept


def _why_not(learner: Learner, model: PersonalizedModel | None) -> str:
    if learner.withdrawn_at is not None:
        return "withdrawn"
    if learner.pool != Pool.FEDERATED:
        return "wrong_pool"
    if not learner.consent_training:
        return "no_consent_training"
    if model is None or _is_reusable(model):
        return ""
    return "already_cloned" if model.backend == Backend.FEDERATED else "other_backend"


def _is_reusable(model: PersonalizedModel) -> bool:
    return model.backend == Backend.FEDERATED and model.status in REUSABLE and not model.weights_path


def _write(learners: list[Learner], base: LoadedVersion, failed: Counter[str]) -> dict[Any, StoredFile]:
    """The first tail of each learner by primary key; whoever's cannot be written is counted and does not stop the others."""
    tails = [TailToWrite(learner.learner_id, 1, base.tail) for learner in learners]
    try:
        return dict(zip([learner.pk for learner in learners], write_tails(spec=base.spec, tails=tails), strict=True))
    except StoreError:
        written = {}
        for learner, tail in zip(learners, tails, strict=True):
            try:
                written[learner.pk] = write_tails(spec=base.spec, tails=[tail])[0]
            except StoreError as error:
                failed[error.code] += 1
        return written


def _write_rows(stored: Mapping[Any, StoredFile], *, row: MainModelVersion, base: LoadedVersion) -> list[Any]:
    """Write the models of these learners; those for whom it happened (not where another process was first)."""
    waiting = dict(
        PersonalizedModel.objects.filter(learner__in=list(stored), status__in=REUSABLE, weights_path="").values_list(
            "learner", "pk"
        )
    )
    written = [key for key, pk in waiting.items() if _fill_waiting(pk, stored[key], row, base)]
    new = [PersonalizedModel(learner_id=key, **_fields(stored[key], row, base)) for key in stored if key not in waiting]
    PersonalizedModel.objects.bulk_create(new, ignore_conflicts=True)
    ids = [model.pk for model in new]
    return [*written, *PersonalizedModel.objects.filter(pk__in=ids).values_list("learner", flat=True)]


def _fill_waiting(pk: Any, stored: StoredFile, row: MainModelVersion, base: LoadedVersion) -> bool:
    waiting = PersonalizedModel.objects.filter(pk=pk, status__in=REUSABLE, weights_path="")
    return waiting.update(**_fields(stored, row, base), status_reason="", updated_at=timezone.now()) == 1


def _fields(stored: StoredFile, row: MainModelVersion, base: LoadedVersion) -> dict[str, Any]:
    return {
        "source_version": row,
        "status": PersonalizedModelStatus.ACTIVE,
        "backend": Backend.FEDERATED,
        "version": 1,
        "weights_path": stored.path,
        "weights_sha256": stored.sha256,
        "summary": _("Clone of %(version)s") % {"version": row.version},
        "metadata": {"federatedLearning": True, "freeze_layers": list(base.spec.freeze_layers), "rebases": []},
    }
