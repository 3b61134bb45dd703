"""The registry: main versions, learners' models, their sessions and figures behind the original's interface.

The rows are the registry; this class only reads and writes them. What is registered must lie in the stores already, whole
and with the checksums that its manifest names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from django.db import transaction
from django.utils.translation import gettext as _

from aivo_core.tensors import TensorFileError, read_flat
from aivo_site.audit import services as audit
from aivo_site.errors import DomainError, UsageError
from federation.models import FederatedUpdate, ModelTrainingSession
from federation.policies import RoundPolicy, default_policy
from federation.rounds.eligibility import consent_refusal, select_learners
from federation.status import active_learner_models, average_performance
from learners.models import Learner, Pool
from learners.registration import find_learner, with_learner_id
from models_store import store, versions
from models_store.errors import StoreError
from models_store.files import name_below_root
from models_store.models import (
    Backend,
    MainModelVersion,
    PersonalizedModel,
    PersonalizedModelStatus,
    VersionOrigin,
    VersionStatus,
)
from models_store.version_files import MANIFEST, MAX_JSON_BYTES

ACTOR = "ModelRegistry"
MAX_TAIL_BYTES = 64 * 1024 * 1024
LEARNER_STATUSES = ("active", "training", "pending")


class RegistryError(DomainError):
    """What is to be registered is refused; ``code`` says why.

    ``code``: ``already_registered``, ``not_matching``, ``bad_model``, or the store's.
    """

    default_code = "bad_model"


@dataclass(frozen=True)
class RegistryStatistics:
    """``average_performance`` is the mean accuracy of measured ACTIVE models, None without any."""

    main_models: int
    active_version: str | None
    learner_models: int
    active_learner_models: int
    total_training_sessions: int
    total_federated_updates: int
    average_performance: float | None


@dataclass(frozen=True)
class RegisteredLearner:
    """A learner's model as the registry knows it.

    Attributes:
        training_history: one mapping per training session, oldest first.
        performance_metrics: ``accuracy``, ``loss``, ``improvement`` where they were measured.
    """

    learner_id: str
    subject_key: str
    model_path: str
    source_version: str | None
    status: str
    cloned_at: datetime
    last_trained_at: datetime | None
    training_history: list[dict[str, Any]]
    performance_metrics: dict[str, Any]


class ModelRegistry:
    """The original's ``ModelRegistry`` over the database and the two stores."""

    def initialize(self) -> ModelRegistry:
        """Check that the files of the active version are whole, if one is active; returns the registry.

        Raises:
            StoreError: they are not.
        """
        active = MainModelVersion.objects.filter(status=VersionStatus.ACTIVE).first()
        if active is not None:
            _check_files(active.model_path, store.read_manifest(model_path=active.model_path, sha256=active.manifest_sha256))
        return self

    def register_main_model(
        self,
        *,
        version: str,
        model_path: str,
        training_metrics: Mapping[str, Any] | None = None,
        architecture: Mapping[str, Any] | None = None,
        created_at: datetime | None = None,
        federated_updates: Sequence[Any] = (),
    ) -> MainModelVersion:
        """Make a version whose files lie in the main store known, as a CANDIDATE; registering it again changes nothing.

        Args:
            version: must be the name in the manifest.
            model_path: folder of the version inside the store.
            training_metrics: kept beside the manifest's own figures.
            architecture: checked against the manifest's where given.
            created_at: aware; when the model was made elsewhere, kept in the row's metadata.
            federated_updates: must be empty: only rounds record updates.

        Raises:
            UsageError: ``bad_path``: outside the store; ``bad_time``; ``not_recorded_here`` for updates.
            StoreError: a file is missing or damaged.
            RegistryError: ``already_registered`` with other files; ``not_matching``: another version or architecture.
        """
        _refuse_history("federated_updates", federated_updates)
        made_at = _iso("created_at", created_at)
        folder = name_below_root(alias=store.MAIN_MODELS, text=model_path) if model_path and "\0" not in model_path else None
        if not folder:
            text = _("model_path must be a folder inside the main model store, not %s")
            raise UsageError(text % ascii(model_path[:80]), code="bad_path")
        data = store.read_unverified(alias=store.MAIN_MODELS, path=f"{folder}/{MANIFEST}", max_bytes=MAX_JSON_BYTES)
        sha256 = store.checksum(data)
        existing = MainModelVersion.objects.filter(version=version).first()
        if existing is not None:
            if (existing.model_path, existing.manifest_sha256) != (folder, sha256):
                raise RegistryError(_("Version %s is registered with other files.") % version, code="already_registered")
            return existing
        manifest = store.read_manifest(model_path=folder, sha256=sha256)
        _check_manifest(manifest, version, architecture)
        _check_files(folder, manifest)
        return _register(version, folder, sha256, manifest, training_metrics or {}, made_at)

    def register_learner_model(
        self,
        *,
        learner_id: str,
        model_path: str,
        source_version: str,
        performance_metrics: Mapping[str, Any] | None = None,
        status: str = "active",
        cloned_at: datetime | None = None,
        training_history: Sequence[Any] = (),
    ) -> PersonalizedModel:
        """Make a tail that lies in the learner's folder the learner's own; registering the same one again changes nothing.

        Args:
            model_path: the tail's file inside the learner store, or the learner's folder for the model that is there.
            source_version: the main version that the tail is relative to.
            performance_metrics: numbers by name; added to what was measured.
            status: ``active``; ``training`` and ``pending`` register the row without making it serve.
            cloned_at: aware; when the clone was made elsewhere. training_history: must be empty: only training records it.

        Raises:
            UsageError: unknown learner, version or status; a path that is not in the learner's folder; metrics that are no
                numbers; a time without zone; a history.
            StoreError: the file is missing or no tail of that version.
            RegistryError: ``not_matching``: the learner may have no model (consent, pool).
        """
        _refuse_history("training_history", training_history)
        cloned = _iso("cloned_at", cloned_at)
        learner = _learner(learner_id)
        version = versions.resolve_version(source_version)
        if status not in LEARNER_STATUSES:
            allowed = ", ".join(LEARNER_STATUSES)
            raise UsageError(
                _("status must be one of %(allowed)s, not %(given)s") % {"allowed": allowed, "given": ascii(status[:40])}
            )
        metrics = _numbers(performance_metrics or {})
        stored = _tail_of(learner, model_path, version)
        return _register_tail(learner, stored, version, PersonalizedModelStatus[status.upper()], metrics, cloned)

    def get_eligible_for_aggregation(self, days: int | None = None) -> list[RegisteredLearner]:
        """Learners who may contribute to a round now, by the rule that rounds use.

        Args:
            days: the last local training may be this old; None takes the policy's.

        Raises:
            NoMainModel: no version is active.
            UsageError: a policy that cannot be run, such as days below 1.
        """
        policy = RoundPolicy.from_row(default_policy())
        if days is not None:
            policy = replace(policy, max_stale_days=days)
        policy.validate()
        selection = select_learners(policy=policy, base=versions.active_version())
        keys = [verdict.model_pk for verdict in selection.eligible]
        models = {model.pk: model for start in range(0, len(keys), 500) for model in _models(pk__in=keys[start : start + 500])}
        return [_describe(models[key]) for key in keys if key in models]

    def get_statistics(self) -> RegistryStatistics:
        """The registry in figures."""
        active = MainModelVersion.objects.filter(status=VersionStatus.ACTIVE).first()
        return RegistryStatistics(
            main_models=MainModelVersion.objects.count(),
            active_version=None if active is None else active.version,
            learner_models=PersonalizedModel.objects.count(),
            active_learner_models=active_learner_models(),
            total_training_sessions=ModelTrainingSession.objects.count(),
            total_federated_updates=FederatedUpdate.objects.count(),
            average_performance=average_performance(),
        )

    def get_learner_model(self, learner_id: str) -> RegisteredLearner | None:
        """The learner's model, None where there is none."""
        model = with_learner_id(_models(), learner_id, field="learner__learner_id").first()
        return None if model is None else _describe(model)

    def get_main_model(self, version: str | None = None) -> MainModelVersion:
        """A version by name or path; the active one when not given.

        Raises:
            UnknownVersion, NoMainModel: none.
        """
        return versions.active_version() if version is None else versions.resolve_version(version)

    def get_federated_updates(self) -> list[FederatedUpdate]:
        """What promoted rounds changed, oldest first."""
        return list(FederatedUpdate.objects.select_related("main_model_version", "base_version", "round").order_by("created_at"))


def _models(**conditions: Any) -> Any:
    rows = PersonalizedModel.objects.select_related("learner", "source_version").filter(**conditions)
    return rows.prefetch_related("training_sessions__base_version")


def _describe(model: PersonalizedModel) -> RegisteredLearner:
    sessions = sorted(model.training_sessions.all(), key=lambda session: session.sequence)
    return RegisteredLearner(
        learner_id=model.learner.learner_id,
        subject_key=str(model.learner.subject_key),
        model_path=model.weights_path,
        source_version=None if model.source_version is None else model.source_version.version,
        status=str(model.status),
        cloned_at=datetime.fromisoformat(model.metadata["cloned_at"]) if "cloned_at" in model.metadata else model.created_at,
        last_trained_at=model.last_trained_at,
        training_history=[_describe_session(session) for session in sessions],
        performance_metrics=dict(model.performance_metrics),
    )


def _describe_session(session: ModelTrainingSession) -> dict[str, Any]:
    return {
        "sequence": session.sequence,
        "purpose": str(session.purpose),
        "trained_at": session.created_at,
        "base_version": session.base_version.version,
        "epochs": session.epochs,
        "batch_size": session.batch_size,
        "samples": session.samples,
        "final_loss": session.final_loss,
        "final_accuracy": session.final_accuracy,
        "contributed_to_federation": session.contributed_to_federation,
        "duration": session.duration,
    }


def _check_manifest(manifest: Mapping[str, Any], version: str, architecture: Mapping[str, Any] | None) -> None:
    if manifest["version"] != version:
        text = _("version must be %(found)s, as the manifest says, not %(given)s")
        raise RegistryError(text % {"found": ascii(manifest["version"]), "given": ascii(version[:80])}, code="not_matching")
    if architecture is not None and dict(architecture) != manifest["spec"]:
        raise RegistryError(_("architecture is not the one in the manifest of version %s") % version, code="not_matching")


def _check_files(folder: str, manifest: Mapping[str, Any]) -> None:
    """Read every file that the manifest names, past the versions that this process holds in memory already."""
    for name, entry in manifest["files"].items():
        store.read_file(alias=store.MAIN_MODELS, path=f"{folder}/{name}", sha256=str(entry["sha256"]))


def _register(
    version: str, folder: str, sha256: str, manifest: Mapping[str, Any], training_metrics: Mapping[str, Any], made_at: str
) -> MainModelVersion:
    with transaction.atomic():
        row = MainModelVersion.objects.create(
            version=version,
            sequence=versions.next_sequence(),
            model_path=folder,
            manifest_sha256=sha256,
            encoder_sha256=str(manifest["encoder_sha256"]),
            content_mix=float(manifest["content_mix"]),
            architecture=manifest["spec"],
            training_metrics={**manifest["metrics"], **training_metrics},
            status=VersionStatus.CANDIDATE,
            origin=VersionOrigin.IMPORTED,
            metadata={"created_at": made_at} if made_at else {},
        )
        # A version that cannot be decoded is not registered.
        store.load_version(row)
        data = {"version": version, "path": folder}
        audit.record(action="version.registered", actor=ACTOR, object_type="MainModelVersion", object_id=str(row.pk), data=data)
    return row


def _learner(learner_id: str) -> Learner:
    found = find_learner(learner_id=learner_id)
    refusal = consent_refusal(found)
    if found.pool != Pool.FEDERATED or refusal in ("withdrawn", "no_consent_training"):
        why = refusal or "wrong_pool"
        raise RegistryError(
            _("Learner %(id)s may have no model of their own: %(why)s.") % {"id": learner_id, "why": why}, code="not_matching"
        )
    return found


def _tail_of(learner: Learner, model_path: str, version: MainModelVersion) -> store.StoredFile:
    """The file a path means, read and checked as a tail of the version."""
    name = name_below_root(alias=store.LEARNER_MODELS, text=model_path) if model_path and "\0" not in model_path else None
    folder = store.learner_folder(learner.learner_id)
    own = PersonalizedModel.objects.filter(learner=learner).first()
    if name == folder and own is not None and own.weights_path:
        name = own.weights_path
    if name is None or not name.startswith(f"{folder}/"):
        text = _("model_path must be a file in the learner's folder %(folder)s of the learner store, not %(given)s")
        raise UsageError(text % {"folder": folder, "given": ascii(model_path[:80])}, code="bad_path")
    spec = store.load_version(version).spec
    data = store.read_unverified(alias=store.LEARNER_MODELS, path=name, max_bytes=MAX_TAIL_BYTES)
    try:
        read_flat(data, expected=spec.tail_tensors)
    except TensorFileError as error:
        raise StoreError(
            _("%(name)s is no tail of version %(version)s: %(why)s") % {"name": name, "version": version.version, "why": error}
        ) from error
    return store.StoredFile(path=name, sha256=store.checksum(data), size=len(data))


def _register_tail(
    learner: Learner,
    stored: store.StoredFile,
    version: MainModelVersion,
    status: PersonalizedModelStatus,
    metrics: Mapping[str, float],
    cloned_at: str,
) -> PersonalizedModel:
    with transaction.atomic():
        model: PersonalizedModel
        model, created = PersonalizedModel.objects.select_for_update().get_or_create(
            learner=learner, defaults={"backend": Backend.FEDERATED, "metadata": {"federatedLearning": True, "rebases": []}}
        )
        same = (model.weights_path, model.weights_sha256, model.source_version_id) == (stored.path, stored.sha256, version.pk)
        if not same:
            model.version += 0 if created else 1
            model.weights_path, model.weights_sha256, model.source_version = stored.path, stored.sha256, version
            model.backend = Backend.FEDERATED
            model.metadata = {**model.metadata, "freeze_layers": list(store.load_version(version).spec.freeze_layers)}
        if cloned_at:
            model.metadata = {**model.metadata, "cloned_at": cloned_at}
        model.status = status
        model.performance_metrics = {**model.performance_metrics, **metrics}
        model.save()
        if not same:
            data = {"subject_key": str(learner.subject_key), "version": version.version}
            audit.record(
                action="learner_model.registered",
                actor=ACTOR,
                object_type="PersonalizedModel",
                object_id=str(model.pk),
                data=data,
            )
    return model


def _refuse_history(name: str, given: Sequence[Any]) -> None:
    if given:
        raise UsageError(_("%s must be empty: it is recorded where it happens, not registered.") % name, code="not_recorded_here")


def _iso(name: str, moment: datetime | None) -> str:
    if moment is None:
        return ""
    if moment.tzinfo is None:
        raise UsageError(_("%s must have a time zone.") % name, code="bad_time")
    return moment.isoformat()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e9 < value < 1e9:
            raise UsageError(_("performance_metrics.%s must be a finite number") % ascii(str(name)[:40]), code="bad_metrics")
    return {str(name): float(value) for name, value in metrics.items()}
