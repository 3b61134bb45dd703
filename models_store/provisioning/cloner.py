"""``AivoModelCloner``: one learner's model from one learner's profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.utils import timezone
from django.utils.translation import gettext as _

from learners.errors import RegistrationError
from learners.models import Learner, Pool
from models_store.cloning import REUSABLE, ModelCloner
from models_store.errors import CloneError, StoreError
from models_store.files import LEARNER_MODELS, MAIN_MODELS, location, read_file
from models_store.models import Backend, MainModelVersion, PersonalizedModel, PersonalizedModelStatus
from models_store.provisioning.decision import Decision, check_configured, decide
from models_store.provisioning.errors import ProvisioningError
from models_store.provisioning.profiles import LearnerProfile
from models_store.version_files import read_manifest
from models_store.versions import resolve_version

DECISION = "provisioning"
"""Key of the decision in ``PersonalizedModel.configuration``."""


@dataclass(frozen=True)
class ProvisionedModel:
    """A learner's model and why it is of its kind; ``created`` is False when it was there already."""

    learner_id: str
    model: PersonalizedModel
    decision: Decision
    created: bool

    @property
    def cloned_model_path(self) -> str:
        """Where the clone's file lies; empty for a model that is no clone."""
        path = self.model.weights_path
        return location(alias=LEARNER_MODELS, path=path) if path else ""


class AivoModelCloner:
    """Gives learners their models, as the configuration says.

    Args:
        actor: user name, or the command or schedule that acts.
    """

    def __init__(self, *, actor: str = "AivoModelCloner") -> None:
        self._actor = actor

    def clone_model(self, profile: LearnerProfile | Any) -> ProvisionedModel:
        """The learner's model; a model that the learner has already is returned as it is, of whichever kind.

        A learner who is not known yet is registered first and stays registered when the model is refused, so that the
        consent can be recorded. A failure while the clone is made leaves the model FAILED with its error; the next call
        tries again.

        Args:
            profile: a mapping or dataclass with the fields of ``LearnerProfile``.

        Raises:
            ProvisioningError: ``not_configured``, ``legacy_not_available``; see there for the others.
            NoMainModel: see ``decide``.
        """
        check_configured()
        wanted = LearnerProfile.of(profile)
        try:
            existing = _existing(wanted.find())
            if existing is not None:
                return existing
            decision = decide()
            if decision.backend == Backend.OPENAI_FINE_TUNING:
                raise ProvisioningError(
                    _("This learner's model would be made by OpenAI fine-tuning (%(reason)s), which is not available yet.")
                    % {"reason": decision.reason},
                    code="legacy_not_available",
                )
            learner = wanted.find_or_register()
        except RegistrationError as error:
            raise ProvisioningError(str(error), code=error.code) from error
        return self._clone(learner, decision)

    def _clone(self, learner: Learner, decision: Decision) -> ProvisionedModel:
        version = resolve_version(str(decision.main_version))
        try:
            _check_files(version)
            with transaction.atomic():
                info = ModelCloner(actor=self._actor).clone_model(version.version, "", learner.learner_id)
                _keep(decision, info.model)
        except CloneError as error:
            raise ProvisioningError(str(error), code=error.code) from error
        except StoreError as error:
            _mark_failed(learner, version, decision, error)
            raise ProvisioningError(
                _("The clone of %(version)s could not be made: %(error)s") % {"version": version.version, "error": error},
                code=error.code,
            ) from error
        return ProvisionedModel(learner.learner_id, info.model, decision, created=info.created)


def _existing(learner: Learner | None) -> ProvisionedModel | None:
    """What the learner has, unless it waits to be made."""
    model = PersonalizedModel.objects.filter(learner=learner).first() if learner is not None else None
    if learner is None or model is None or (model.status in REUSABLE and not model.weights_path and not model.model_id):
        return None
    if model.backend == Backend.FEDERATED:
        _check_consent(learner)
    kept = model.configuration.get(DECISION)
    if kept is not None:
        decision = Decision.from_json(kept)
    else:
        source = model.source_version.version if model.source_version is not None else None
        decision = Decision(Backend(model.backend), "decided_before", _("the learner had this model already"), source)
    return ProvisionedModel(learner.learner_id, model, decision, created=False)


def _check_consent(learner: Learner) -> None:
    code = "withdrawn" if learner.withdrawn_at is not None else "" if learner.consent_training else "no_consent_training"
    if code:
        message = _("Learner %(id)s has a model that may not be used: %(reason)s.")
        raise ProvisioningError(message % {"id": learner.learner_id, "reason": code}, code=code)


def _check_files(version: MainModelVersion) -> None:
    """Read every file of the version with its checksum, whatever this process remembers of it.

    Raises:
        StoreError: one is missing or damaged.
    """
    manifest = read_manifest(model_path=version.model_path, sha256=version.manifest_sha256)
    for name, entry in manifest["files"].items():
        read_file(alias=MAIN_MODELS, path=f"{version.model_path}/{name}", sha256=entry["sha256"])


def _keep(decision: Decision, model: PersonalizedModel) -> None:
    model.configuration = {**model.configuration, DECISION: decision.to_json()}
    model.save(update_fields=["configuration", "updated_at"])


def _mark_failed(learner: Learner, version: MainModelVersion, decision: Decision, error: StoreError) -> None:
    """Leave a row that says what failed, where the learner may have a model at all and none was made meanwhile."""
    if not learner.consent_training or learner.withdrawn_at is not None or learner.pool != Pool.FEDERATED:
        return
    values = {
        "status": PersonalizedModelStatus.FAILED,
        "status_reason": _("The clone of %(version)s could not be made: %(error)s")
        % {"version": version.version, "error": error},
        "configuration": {DECISION: decision.to_json()},
    }
    model, created = PersonalizedModel.objects.get_or_create(learner=learner, defaults=values)
    if not created:
        waiting = PersonalizedModel.objects.filter(pk=model.pk, status__in=REUSABLE, weights_path="", model_id="")
        waiting.update(**values, updated_at=timezone.now())
