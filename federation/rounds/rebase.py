"""Rebase: moving personalized models from their old base version to the active one.

    tail <- new main tail + lambda (tail - old main tail),    lambda in {0, 1/2, 1}

Lambda is the one with the least total loss on the latest fifth of the learner's *training* samples, as the blend; the 30 %
that evaluates is never looked at. The tail was trained on that fifth and nearly always wins there. So the losses are those
of the learner's last session, whose choice of the blend stands on a tail that had not seen it (a blend by 0, 1/2, 1 is the
same mixture with the old main); only a tail without such a session is measured on the fifth itself. Measured on 100
learners of real logs: by its own fit, every tail would have taken lambda = 1. On later interactions the moved tails lose
.0064 less than with lambda = 1 where the copies were trained with mu = 1, and .0012 more where with mu = 10, where there is
little to take back. Evidence is applied once: a tail that was moved by it and not trained since keeps what is left of it.

Everything stays with the learner: nothing of it goes into a round. Each learner is moved by one file and two conditional
UPDATEs, so that a run that dies is gone on with by the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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

HELD_OUT, FITTED = "held_out", "fitted"
"""Whether the samples that chose lambda were unknown to the tail, or ones that it was trained on."""

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
    basis: str = FITTED


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


def choose_lambda(
    new: LoadedVersion, *, old_tail: FloatArray, tail: FloatArray, samples: Samples, evidence: Mapping[str, Any]
) -> Choice:
    """The lambda with the least total loss on the latest fifth of the learner's training samples; 1 without any.

    Args:
        old_tail, tail: (tail_size,) float32, of the old base and of the learner.
        samples: all of the learner's, encoded by the new version.
        evidence: ``serving_evidence`` of the model, which has the losses of a tail that did not see that fifth.

    Raises:
        EvaluationError: a loss is not finite.
    """
    known = _held_out_choice(evidence)
    if known is not None:
        return known
    chosen_on = latest_fifth(samples)
    if not len(chosen_on):
        return Choice(1.0, {}, 0)
    activations = trunk_activations(new, chosen_on)
    losses = {}
    for factor in LAMBDAS:
        forecast = forecast_tail(new, moved_tail(new, old_tail, tail, factor), activations)
        losses[factor] = learner_losses("own", forecast, chosen_on, new.content_mix).total
    return _best(losses, len(chosen_on), FITTED)


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


def is_applied(model: PersonalizedModel) -> bool:
    """Whether an earlier rebase moved the tail by the evidence that the model still has: it is not applied twice."""
    rebases = model.metadata.get("rebases", [])
    return (
        bool(rebases)
        and rebases[-1].get("basis") == HELD_OUT
        and rebases[-1].get("session") == model.serving_evidence.get("session")
    )


def _held_out_choice(evidence: Mapping[str, Any]) -> Choice | None:
    """The lambda by the losses that the learner's last session measured; None where it measured none."""
    kept = evidence.get("losses") or {}
    if not evidence.get("held_out_samples") or any(f"{factor:g}" not in kept for factor in LAMBDAS):
        return None
    losses = {factor: float(kept[f"{factor:g}"]["total"]) for factor in LAMBDAS}
    return _best(losses, int(evidence["held_out_samples"]), HELD_OUT)


def _best(losses: Mapping[float, float], samples: int, basis: str) -> Choice:
    best = min(LAMBDAS, key=lambda factor: losses[factor])
    return Choice(best, {f"{factor:g}": losses[factor] for factor in LAMBDAS}, samples, basis)


def served_after(model: PersonalizedModel, factor: float) -> dict[str, Any]:
    """Serving choice and blend of a moved tail, so that what is served keeps its distance from main.

    main + b (tail - main) is main + (b / lambda) (moved tail - main), as far as the moved tail reaches.
    """
    blend = min(1.0, model.blend / factor) if factor > 0.0 else 0.0
    choice = ServingChoice.BLEND if 0.0 < blend < 1.0 else ServingChoice.PERSONAL if blend else ServingChoice.MAIN
    return {"serving_choice": choice, "blend": blend}


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
        choice = _choice_of(model, new, old_tail=base.tail, tail=tail)
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


def _choice_of(model: PersonalizedModel, new: LoadedVersion, *, old_tail: FloatArray, tail: FloatArray) -> Choice:
    """The model's lambda; the learner's events are read only where nothing held out has decided already.

    Raises:
        EncodingError: an event that cannot be encoded; it stops nobody else's rebase. EvaluationError: as ``choose_lambda``.
    """
    if is_applied(model):
        return Choice(1.0, {}, 0, HELD_OUT)
    known = _held_out_choice(model.serving_evidence)
    if known is not None:
        return known
    samples = samples_of(model.learner, new)
    return choose_lambda(new, old_tail=old_tail, tail=tail, samples=samples, evidence=model.serving_evidence)


def _finish(
    model: PersonalizedModel, old: MainModelVersion, target: MainModelVersion, choice: Choice, stored: store.StoredFile
) -> bool:
    entry = {
        "from": old.version,
        "to": target.version,
        "lambda": choice.factor,
        "losses": choice.losses,
        "samples": choice.samples,
        "basis": choice.basis,
        "session": model.serving_evidence.get("session"),
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
        **served_after(model, choice.factor),
        "metadata": {**model.metadata, "rebases": [*model.metadata.get("rebases", []), entry]},
        "updated_at": timezone.now(),
    }
    rows = PersonalizedModel.objects.filter(
        pk=model.pk, version=model.version, status=PersonalizedModelStatus.UPDATING, source_version=old
    )
    return rows.update(**values) == 1


def _mark_failed(model: PersonalizedModel, status: PersonalizedModelStatus, reason: str) -> None:
    PersonalizedModel.objects.filter(pk=model.pk, status=PersonalizedModelStatus.UPDATING).update(
        status=status, status_reason=reason, updated_at=timezone.now()
    )
