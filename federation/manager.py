"""``FederatedLearningManager``: one learner's training, aggregation and a new main version, as the original offers them.

It works on values and files; which learners take part, consent to contribute, the gate and the promotion are matters of a
round (``federation.rounds``), which a main version made here has not passed: it is a candidate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from django.db import transaction
from django.utils.translation import gettext as _

from aivo_core.engine.contract import EngineError, LearnerTask, LocalTrainingConfig
from aivo_core.network import FloatArray
from aivo_core.privacy import PrivacyError, clip, global_norm
from aivo_core.samples import Samples
from aivo_site.audit.services import record
from federation import engines, strategies
from federation.errors import LocalTrainingError, ManagerError
from federation.learner_preparation import why_not, why_not_model
from federation.privacy import accountant
from federation.privacy_periods import current_period
from federation.rounds.candidate import candidate_tail
from federation.strategies import StrategyError
from learners.registration import with_learner_id
from models_store import store, versions
from models_store.clones import base_of
from models_store.files import name_below_root
from models_store.models import MainModelVersion, PersonalizedModel, VersionOrigin, VersionStatus
from models_store.store import LEARNER_MODELS, LoadedVersion


@dataclass(frozen=True)
class LocalModelConfig:
    """How one learner's model is trained.

    Attributes:
        learner_model_path: the learner's id, or the learner's folder or tail file in the learner store; empty starts from
            the active main version's own tail.
        clip_norm: largest L2 norm of the whole update; None leaves it as it is.
        noise_multiplier: must be None or 0: noise without accounting is no privacy.
        proximal_mu: of the term that holds the tail to the base version's; 0 trains without.
        seed: with the samples all that the result depends on.
    """

    learner_model_path: str = ""
    local_epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 1e-3
    clip_norm: float | None = None
    noise_multiplier: float | None = None
    proximal_mu: float = 1.0
    adaptation: str = "tail"
    seed: int = 0


@dataclass(frozen=True)
class LocalUpdate:
    """What one learner's training would change.

    Attributes:
        key: the learner's subject key, or ``main`` where no learner was named.
        delta: (tail_size,) float32, tail after training minus the tail it started from, clipped if asked.
        norm: L2 norm of ``delta``. unclipped_norm: before clipping.
        losses: mean objective per epoch.
    """

    key: str
    base_version: str
    delta: FloatArray
    samples: int
    norm: float
    unclipped_norm: float
    losses: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class AggregationOutcome:
    """The update made of many.

    Attributes:
        aggregated_weights: (tail_size,) float32, to be added to the base's tail times the server learning rate.
        weights: each update's share, by key.
    """

    aggregated_weights: FloatArray
    base_version: str
    strategy: str
    contributing_learners: tuple[str, ...]
    samples: int
    weights: Mapping[str, float]


class FederatedLearningManager:
    """Trains, aggregates, and makes candidate versions.

    Args:
        engine: name of a local training engine. actor: who acts, for the audit log.

    Raises:
        EngineUnavailable: no such engine here.
    """

    def __init__(self, *, engine: str = "cohort", actor: str = "FederatedLearningManager") -> None:
        engines.check_engine(engine)
        self._engine = engine
        self._actor = actor

    def train_local_model(self, config: LocalModelConfig | Mapping[str, Any], data: Samples) -> LocalUpdate:
        """Train on one learner's samples and give what that changes; nothing is stored.

        Args:
            config: a ``LocalModelConfig`` or a mapping of its fields.
            data: samples encoded by the base version's encoder.

        Raises:
            ManagerError: ``unknown_field``, ``bad_config``, ``bad_path``, ``privacy_not_available``.
            LocalTrainingError: the learner may not be trained, or training failed; the code says why.
            StoreError: the learner's tail or the version is damaged. NoMainModel: there is no active version.
        """
        values = _config(config)
        training = _training_config(values)
        key, base, start = _start(values.learner_model_path)
        task = LearnerTask(key, data, start, base.tail, values.seed)
        engine = engines.get_engine(self._engine)
        result = next(engine.train(spec=base.spec, weights=base.weights, config=training, tasks=iter([task])))
        if result.error_code or result.tail is None:
            raise LocalTrainingError(result.error_message, code=result.error_code)
        change = result.tail - start
        delta = change if values.clip_norm is None else clip(change, values.clip_norm)
        return LocalUpdate(
            key=key,
            base_version=base.version,
            delta=delta,
            samples=len(data),
            norm=global_norm(delta),
            unclipped_norm=global_norm(change),
            losses=result.losses,
            seconds=result.seconds,
        )

    def aggregate_updates(
        self,
        updates: Sequence[LocalUpdate],
        strategy: str = "fedavg",
        *,
        quality: Mapping[str, float] | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> AggregationOutcome:
        """One update from many of the same base version, whatever their order.

        Args:
            strategy: a name of ``federation.strategies``.
            quality: measured quality by key, for strategies that use it. parameters: of the strategy.

        Raises:
            ManagerError: no updates, two of one learner, different bases, an unknown strategy, or what it refuses.
        """
        ordered = _checked_updates(updates)
        measured = None if quality is None else [quality[update.key] for update in ordered]
        try:
            chosen = strategies.get(strategy)
            weights = chosen.weigh([update.samples for update in ordered], quality=measured, parameters=parameters)
            vector = _combined(chosen, [update.delta for update in ordered], weights, parameters)
        except StrategyError as error:
            raise ManagerError(str(error), code=error.code) from error
        return AggregationOutcome(
            aggregated_weights=vector.astype(np.float32),
            base_version=ordered[0].base_version,
            strategy=strategy,
            contributing_learners=tuple(update.key for update in ordered),
            samples=sum(update.samples for update in ordered),
            weights=dict(zip((update.key for update in ordered), (weights / weights.sum()).tolist(), strict=True)),
        )

    def update_main_model(
        self, path: str, weights: npt.NDArray[np.floating[Any]] | AggregationOutcome, learning_rate: float = 1.0
    ) -> MainModelVersion:
        """A candidate version: the tail of the version at ``path``, moved by ``learning_rate`` times the update.

        The version at ``path`` stays as it is. The same call again gives the same candidate.

        Args:
            path: a version's name, its path in the store, or the store's own path for the active version.
            weights: the aggregated update, (tail_size,) floats, or the outcome that holds it.
            learning_rate: the server's, positive.

        Raises:
            ManagerError: a rate that is not positive, an update of another shape or base or with a number that is not finite;
                ``privacy_period_open``: what is made here is not charged, and would belie the period's ε.
            UnknownVersion: ``path`` names none. RoundFailed: ``not_finite``: the moved tail does not fit into float32.
        """
        if not 0.0 < learning_rate < float("inf"):
            raise ManagerError(_("learning_rate must be a positive number, not %s") % learning_rate)
        if current_period() is not None:
            text = _("A privacy period is open: only a round, which is charged, may make a version of learners' updates.")
            raise ManagerError(text, code="privacy_period_open")
        parent = versions.resolve_version(path)
        base = store.load_version(parent)
        update = _checked_weights(weights, base)
        tail = candidate_tail(base, update, learning_rate)
        lineage = {
            "origin": str(VersionOrigin.FEDERATED),
            "parent": base.version,
            "update_sha256": hashlib.sha256(update.tobytes()).hexdigest(),
            "server_learning_rate": learning_rate,
        }
        identity = f"{base.manifest['files']} {lineage}"
        row = versions.reserve_version(
            origin=VersionOrigin.FEDERATED,
            parent=parent,
            training_fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
            architecture=parent.architecture,
            encoder_sha256=parent.encoder_sha256,
            metadata={"lineage": lineage},
        )
        return row if row.status != VersionStatus.TRAINING else self._publish(row, base, tail, lineage)

    def calculate_privacy_budget(
        self, epochs: int, batch_size: int, dataset_size: int, noise_multiplier: float, delta: float
    ) -> float:
        """Epsilon of DP-SGD for one training sample under add-or-remove-one, by the RDP accountant.

        T = ceil(epochs n / b) steps on Poisson batches of rate b / n. For a noise multiplier of .1 it is in the thousands.

        Raises:
            AccountantError: a value outside its range; ``no_noise``: epsilon is infinite.
        """
        return accountant.sample_level_epsilon(
            epochs=epochs, batch_size=batch_size, dataset_size=dataset_size, noise_multiplier=noise_multiplier, delta=delta
        ).epsilon

    def _publish(self, row: MainModelVersion, base: LoadedVersion, tail: FloatArray, lineage: dict[str, Any]) -> MainModelVersion:
        metrics: dict[str, Any] = {"accuracy": None, "loss": None, "epochs": None, "samples": None}
        files = store.write_version_files(
            version=row.version,
            spec=base.spec,
            weights=base.spec.with_tail(base.weights, tail),
            encoder=base.encoder,
            content_mix=base.content_mix,
            metrics=metrics,
            lineage=lineage,
            card=_card(row, base, float(lineage["server_learning_rate"])),
        )
        with transaction.atomic():
            versions.publish(
                row=row,
                files=files,
                status=VersionStatus.CANDIDATE,
                content_mix=base.content_mix,
                architecture=base.spec.to_json(),
                training_metrics=metrics,
            )
            record(
                action="version.created",
                actor=self._actor,
                object_type="MainModelVersion",
                object_id=str(row.pk),
                data={"version": row.version, **lineage},
            )
        return row


def _config(config: LocalModelConfig | Mapping[str, Any]) -> LocalModelConfig:
    if isinstance(config, LocalModelConfig):
        return config
    known = [f.name for f in fields(LocalModelConfig)]
    unknown = sorted(set(config) - set(known))
    if unknown:
        text = _("config may have the fields %(allowed)s, not %(given)s")
        raise ManagerError(text % {"allowed": ", ".join(known), "given": ", ".join(map(str, unknown))}, code="unknown_field")
    return LocalModelConfig(**config)


def _training_config(values: LocalModelConfig) -> LocalTrainingConfig:
    if values.noise_multiplier:
        raise ManagerError(
            _("noise_multiplier must be 0 or None: differential privacy is not available yet, and noise alone is none."),
            code="privacy_not_available",
        )
    _check_types(values)
    try:
        if values.clip_norm is not None:
            clip(np.zeros(1, dtype=np.float32), values.clip_norm)
        return LocalTrainingConfig(
            epochs=values.local_epochs,
            batch_size=values.batch_size,
            learning_rate=values.learning_rate,
            proximal_mu=values.proximal_mu,
            adaptation=values.adaptation,
        )
    except (EngineError, PrivacyError) as error:
        raise ManagerError(str(error), code="bad_config") from error


def _check_types(values: LocalModelConfig) -> None:
    for names, allowed, text in ((_WHOLE, int, _("a whole number")), (_NUMBERS, (int, float), _("a number"))):
        for name in names:
            value = getattr(values, name)
            if isinstance(value, bool) or not isinstance(value, allowed):
                raise ManagerError(
                    _("%(field)s must be %(allowed)s, not %(given)s")
                    % {"field": name, "allowed": text, "given": ascii(value)[:80]}
                )
    if values.clip_norm is not None and (isinstance(values.clip_norm, bool) or not isinstance(values.clip_norm, int | float)):
        raise ManagerError(_("clip_norm must be a positive number or None, not %s") % ascii(values.clip_norm)[:80])


_WHOLE = ("local_epochs", "batch_size", "seed")
_NUMBERS = ("learning_rate", "proximal_mu")


def _start(path: str) -> tuple[str, LoadedVersion, FloatArray]:
    """Key, base version and start tail of the learner that ``path`` means, or of the active version."""
    if not path:
        loaded = store.load_version(versions.active_version())
        return "main", loaded, loaded.tail
    model = _find_model(path)
    code = why_not(model.learner) or why_not_model(model)
    if code:
        raise LocalTrainingError(
            _("The learner at %(path)s may not be trained: %(code)s") % {"path": path, "code": code}, code=code
        )
    base = base_of(model)
    return str(model.learner.subject_key), base, store.read_tail(model=model, spec=base.spec)


def _find_model(path: str) -> PersonalizedModel:
    models = PersonalizedModel.objects.select_related("learner", "source_version")
    named: PersonalizedModel | None = None
    if "\0" not in path:
        name = name_below_root(alias=LEARNER_MODELS, text=path)
        if name:
            named = models.filter(weights_path__startswith=f"{name.split('/')[0]}/").first()
        if named is None and "/" not in (name or path):
            named = with_learner_id(models, path.rstrip("/").rpartition("/")[2], field="learner__learner_id").first()
    if named is None:
        raise ManagerError(
            _("learner_model_path must be a learner's id or a path of a learner's model in the learner store, not %s")
            % ascii(path[:80]),
            code="bad_path",
        )
    return named


def _combined(
    strategy: strategies.Strategy,
    deltas: Sequence[FloatArray],
    weights: npt.NDArray[np.float64],
    parameters: Mapping[str, Any] | None,
) -> npt.NDArray[np.floating[Any]]:
    """The update by a strategy of either shape; the weights are the strategy's own."""
    if not isinstance(strategy, strategies.FoldStrategy):
        return strategy.aggregate(deltas, weights, **dict(parameters or {}))
    fold = strategy.start(deltas[0].size, parameters=parameters)
    for delta, weight in zip(deltas, weights, strict=True):
        fold.add(delta, float(weight))
    return fold.finish().vector


def _checked_updates(updates: Sequence[LocalUpdate]) -> list[LocalUpdate]:
    """Ordered by key."""
    if not updates:
        raise ManagerError(_("updates is empty: there is nothing to aggregate"), code="no_updates")
    ordered = sorted(updates, key=lambda update: update.key)
    if len({update.key for update in ordered}) != len(ordered):
        raise ManagerError(_("updates holds two of the same learner"), code="duplicate_learner")
    bases = sorted({update.base_version for update in ordered})
    if len(bases) != 1:
        raise ManagerError(_("updates must all be of one base version, not of %s") % ", ".join(bases), code="different_bases")
    return ordered


def _checked_weights(weights: npt.NDArray[np.floating[Any]] | AggregationOutcome, base: LoadedVersion) -> FloatArray:
    if isinstance(weights, AggregationOutcome):
        if weights.base_version != base.version:
            raise ManagerError(
                _("weights are relative to %(own)s and cannot move %(base)s")
                % {"own": weights.base_version, "base": base.version},
                code="different_bases",
            )
        weights = weights.aggregated_weights
    update = np.asarray(weights)
    if update.shape != (base.spec.tail_size,) or update.dtype.kind != "f":
        raise ManagerError(
            _("weights must be floats of shape (%(size)d,), not %(dtype)s %(shape)s")
            % {"size": base.spec.tail_size, "dtype": update.dtype, "shape": update.shape},
            code="wrong_shape",
        )
    if not np.isfinite(update).all():
        raise ManagerError(_("weights hold a number that is not finite"), code="not_finite")
    return update.astype(np.float32)


def _card(row: MainModelVersion, base: LoadedVersion, rate: float) -> str:
    return "\n".join(
        (
            f"# {row.version}",
            "",
            _("Made from %(base)s by update_main_model with server learning rate %(rate)g; it has passed no gate.")
            % {"base": base.version, "rate": rate},
            _("Only the tail differs from the base version; trunk, normalisation statistics and encoder are the base's own."),
            "",
        )
    )
