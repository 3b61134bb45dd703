"""Rebase: moving personalized models from their old base version to the active one.

    tail <- new main tail + lambda (tail - old main tail),    lambda in {0, 1/2, 1}

Lambda is the one with the least loss on the latest fifth of the learner's *training* samples; the 30 % that evaluates is
never looked at. Everything stays with the learner: nothing of it goes into a round. Each learner is moved by one file and
two conditional UPDATEs, so that a run that dies is gone on with by the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any
from uuid import UUID

import numpy as np
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_core.encoding.errors import EncodingError
from aivo_core.network import FloatArray
from aivo_core.samples import TRAIN_SHARE, Samples
from federation.rounds.errors import RoundSkipped, RoundStopped
from federation.rounds.lineage import root_of
from federation.rounds.own_samples import samples_of
from models_store import clones, store, versions
from models_store.errors import StoreError
from models_store.evaluation import EvaluationError, learner_losses
from models_store.forecasting import forecast_tail, trunk_activations
from models_store.models import Backend, MainModelVersion, PersonalizedModel, PersonalizedModelStatus, ServingChoice
from models_store.store import LoadedVersion

LAMBDAS = (1.0, 0.5, 0.0)
"""In the order in which equal losses are preferred: as much of the learner's own as possible."""

CHOICE_SHARE = 5
"""The latest 1/5 of the training samples chooses lambda, as it chooses the blend."""

BLOCK = 64
_MOVABLE = (PersonalizedModelStatus.ACTIVE, PersonalizedModelStatus.UPDATING)


@dataclass
class RebaseReport:
    """What came of a rebase.

    Attributes:
        rebased: models moved. by_lambda: how many with which lambda.
        skipped, failed: models by reason code. ``other_trunk``: the old base does not share the new one's trunk, so that
            the learner has to be cloned again.
        off_chain: models moved whose old base is no ancestor of the new one (after a rollback), by base version.
    """

    version: str
    rebased: int = 0
    by_lambda: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    off_chain: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "rebased": self.rebased,
            "by_lambda": dict(sorted(self.by_lambda.items())),
            "skipped": dict(sorted(self.skipped.items())),
            "failed": dict(sorted(self.failed.items())),
            "off_chain": dict(sorted(self.off_chain.items())),
        }


@dataclass(frozen=True)
class Choice:
    """The lambda of one learner: its losses by lambda are empty where there was nothing to choose on."""

    factor: float
    losses: dict[str, float]
    samples: int


def rebase_models(
    *,
    target: MainModelVersion,
    progress: Callable[[int, int, str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> RebaseReport:
    """Move every personalized model that stands on another version of the same trunk to ``target``, the active version.

    Models in training are left out (``in_training``) and come with the next rebase. Again it changes nothing.

    Raises:
        RoundSkipped: ``not_active``: another version is active by now.
        RoundStopped: asked to stop; the rest is for the next run.
        StoreError: the target's own files are damaged.
    """
    if versions.active_version() != target:
        raise RoundSkipped(_("Version %s is not active any more.") % target.version, code="not_active")
    new = store.load_version(target)
    report = RebaseReport(version=target.version)
    _release_finished(target)
    rows = PersonalizedModel.objects.filter(backend=Backend.FEDERATED, source_version__isnull=False).exclude(
        source_version=target
    )
    for status, number in Counter(rows.exclude(status__in=_MOVABLE).values_list("status", flat=True)).items():
        report.skipped["in_training" if status == PersonalizedModelStatus.TRAINING else "not_active"] += number
    keys = list(
        rows.filter(status__in=_MOVABLE).order_by("source_version__sequence", "learner__subject_key").values_list("pk", flat=True)
    )
    bases = _Bases(target, new)
    for start in range(0, len(keys), BLOCK):
        if should_stop is not None and should_stop():
            raise RoundStopped(_("Stopped after %(done)d of %(all)d models.") % {"done": start, "all": len(keys)})
        _rebase_block(keys[start : start + BLOCK], bases, report)
        if progress is not None:
            progress(min(start + BLOCK, len(keys)), len(keys), _("moving learners' models"))
    return report


def choose_lambda(new: LoadedVersion, *, old_tail: FloatArray, tail: FloatArray, samples: Samples) -> Choice:
    """The lambda with the least total loss on the latest fifth of the learner's training samples; 1 without any.

    Args:
        old_tail, tail: (tail_size,) float32, of the old base and of the learner.
        samples: all of the learner's, encoded by the new version.

    Raises:
        EvaluationError: a loss is not finite.
    """
    chosen_on = latest_fifth(samples)
    if not len(chosen_on):
        return Choice(1.0, {}, 0)
    activations = trunk_activations(new, chosen_on)
    losses = {}
    for factor in LAMBDAS:
        forecast = forecast_tail(new, moved_tail(new, old_tail, tail, factor), activations)
        losses[factor] = learner_losses("own", forecast, chosen_on, new.content_mix).total
    best = min(LAMBDAS, key=lambda factor: losses[factor])
    return Choice(best, {f"{factor:g}": loss for factor, loss in losses.items()}, len(chosen_on))


def latest_fifth(samples: Samples) -> Samples:
    """The latest fifth of the earlier 70 %: (ceil(n / 5) samples)."""
    earlier, _later = samples.split_at(TRAIN_SHARE)
    return earlier.take(slice(len(earlier) - ceil(len(earlier) / CHOICE_SHARE), len(earlier)))


def moved_tail(new: LoadedVersion, old_tail: FloatArray, tail: FloatArray, factor: float) -> FloatArray:
    """new main tail + factor (tail - old main tail), float32; computed in float64 and rounded once."""
    if factor == 0.0:
        return new.tail
    moved = new.tail.astype(np.float64) + factor * (tail.astype(np.float64) - old_tail.astype(np.float64))
    with np.errstate(over="ignore"):
        return moved.astype(np.float32)


class _Bases:
    """The versions that models stand on: whether their tails can be moved to the target, and the tails."""

    def __init__(self, target: MainModelVersion, new: LoadedVersion) -> None:
        self.target = target
        self.new = new
        self._root = root_of(target)
        self._rows: dict[UUID, MainModelVersion] = {}
        self._same_trunk: dict[UUID, bool] = {}
        self._ancestors = set(_ancestors(target))

    def row(self, key: UUID) -> MainModelVersion:
        if key not in self._rows:
            self._rows[key] = MainModelVersion.objects.select_related("parent").get(pk=key)
        return self._rows[key]

    def same_trunk(self, key: UUID) -> bool:
        if key not in self._same_trunk:
            row = self.row(key)
            self._same_trunk[key] = root_of(row) == self._root and row.encoder_sha256 == self.target.encoder_sha256
        return self._same_trunk[key]

    def is_ancestor(self, key: UUID) -> bool:
        return key in self._ancestors


def _ancestors(version: MainModelVersion) -> Iterator[UUID]:
    current = version.parent
    while current is not None:
        yield current.pk
        current = current.parent


def _release_finished(target: MainModelVersion) -> None:
    """Models that a dead run left UPDATING although they stand on the target already (it was rolled back to)."""
    PersonalizedModel.objects.filter(source_version=target, status=PersonalizedModelStatus.UPDATING).update(
        status=PersonalizedModelStatus.ACTIVE, updated_at=timezone.now()
    )


def _rebase_block(keys: Sequence[UUID], bases: _Bases, report: RebaseReport) -> None:
    for model in PersonalizedModel.objects.select_related("learner", "source_version").filter(pk__in=keys):
        code = _refusal(model, bases)
        if code:
            report.skipped[code] += 1
        elif _begin(model):
            _rebase_model(model, bases, report)
        else:
            report.skipped["in_training"] += 1


def _refusal(model: PersonalizedModel, bases: _Bases) -> str:
    if model.source_version_id is None or not bases.same_trunk(model.source_version_id):
        return "other_trunk"
    if model.learner.withdrawn_at is not None:
        return "withdrawn"
    return "" if model.learner.consent_training else "no_consent_training"


def _begin(model: PersonalizedModel) -> bool:
    """Mark the model UPDATING, so that nothing trains it meanwhile; False where something else came first."""
    rows = PersonalizedModel.objects.filter(pk=model.pk, version=model.version, status__in=_MOVABLE)
    return rows.update(status=PersonalizedModelStatus.UPDATING, updated_at=timezone.now()) == 1


def _rebase_model(model: PersonalizedModel, bases: _Bases, report: RebaseReport) -> None:
    source = model.source_version_id
    if source is None:
        raise AssertionError("only models with a base are rebased")
    old = bases.row(source)
    try:
        base = clones.base_of(model)
        new = bases.new.with_freeze_layers(base.spec.freeze_layers)
        tail = store.read_tail(model=model, spec=base.spec)
        # One learner at a time: an event that cannot be encoded stops nobody else's rebase.
        samples = samples_of(model.learner, new)
        choice = choose_lambda(new, old_tail=base.tail, tail=tail, samples=samples)
        moved = moved_tail(new, base.tail, tail, choice.factor)
        stored = store.write_tail(learner_id=model.learner.learner_id, number=model.version + 1, spec=new.spec, tail=moved)
    except StoreError as error:
        _mark_failed(model, PersonalizedModelStatus.ERROR, str(error))
        report.failed[error.code] += 1
        return
    except (EvaluationError, EncodingError) as error:
        _mark_failed(model, PersonalizedModelStatus.FAILED, str(error))
        report.failed[error.code] += 1
        return
    if not _finish(model, old, bases.target, choice, stored):
        report.skipped["changed_meanwhile"] += 1
        return
    report.rebased += 1
    report.by_lambda[f"{choice.factor:g}"] += 1
    if not bases.is_ancestor(source):
        report.off_chain[old.version] += 1


def _finish(
    model: PersonalizedModel, old: MainModelVersion, target: MainModelVersion, choice: Choice, stored: store.StoredFile
) -> bool:
    entry = {
        "from": old.version,
        "to": target.version,
        "lambda": choice.factor,
        "losses": choice.losses,
        "samples": choice.samples,
        "at": timezone.now().isoformat(),
        "previous_weights_path": model.weights_path,
        "previous_weights_sha256": model.weights_sha256,
    }
    values: dict[str, Any] = {
        "status": PersonalizedModelStatus.ACTIVE,
        "source_version": target,
        "version": model.version + 1,
        "weights_path": stored.path,
        "weights_sha256": stored.sha256,
        "metadata": {**model.metadata, "rebases": [*model.metadata.get("rebases", []), entry]},
        "updated_at": timezone.now(),
    }
    if choice.factor == 0.0:
        # Nothing of the learner's own is left in the tail: it is the main model's.
        values.update(serving_choice=ServingChoice.MAIN, blend=0.0)
        values["serving_evidence"] = {**model.serving_evidence, "rebased_to": target.version, "lambda": 0.0}
    rows = PersonalizedModel.objects.filter(
        pk=model.pk, version=model.version, status=PersonalizedModelStatus.UPDATING, source_version=old
    )
    return rows.update(**values) == 1


def _mark_failed(model: PersonalizedModel, status: PersonalizedModelStatus, reason: str) -> None:
    PersonalizedModel.objects.filter(pk=model.pk, status=PersonalizedModelStatus.UPDATING).update(
        status=status, status_reason=reason, updated_at=timezone.now()
    )
