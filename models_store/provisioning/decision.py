"""Which kind of model a new learner gets, from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.utils.translation import gettext as _

from models_store.errors import NoMainModel
from models_store.models import Backend, MainModelVersion, VersionStatus
from models_store.provisioning.errors import ProvisioningError


@dataclass(frozen=True)
class Decision:
    """The kind of model, and why.

    Attributes:
        reason_code: ``federated_learning`` (switched on, and there is an active main version), ``federated_learning_off``,
            ``no_main_model`` (both: fine-tuning), ``decided_before`` (a model that no decision was kept for).
        main_version: of a clone, the version it is made from.
    """

    backend: Backend
    reason_code: str
    reason: str
    main_version: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "backend": self.backend.value,
            "reason_code": self.reason_code,
            "reason": self.reason,
            "main_version": self.main_version,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Decision:
        """Inverse of ``to_json``."""
        return cls(Backend(data["backend"]), str(data["reason_code"]), str(data["reason"]), data["main_version"])


def check_configured() -> None:
    """Refuse where neither kind of model is configured.

    Raises:
        ProvisioningError: ``not_configured``, naming both settings.
    """
    if not settings.USE_FEDERATED_LEARNING and not settings.OPENAI_API_KEY:
        raise ProvisioningError(
            _(
                "No kind of learner model is configured: set USE_FEDERATED_LEARNING=true to clone the main model, "
                "or OPENAI_API_KEY for OpenAI fine-tuning."
            ),
            code="not_configured",
        )


def check_cloning_allowed() -> None:
    """Refuse to clone in bulk where federated learning is switched off.

    Raises:
        ProvisioningError: ``not_configured``, or ``federated_learning_off`` where learners get fine-tuned models instead.
    """
    check_configured()
    if not settings.USE_FEDERATED_LEARNING:
        raise ProvisioningError(
            _("USE_FEDERATED_LEARNING is off: learners get fine-tuned models (OPENAI_API_KEY is set). Set it to true to clone."),
            code="federated_learning_off",
        )


def decide() -> Decision:
    """A clone where federated learning is on and a main version is active, otherwise fine-tuning where a key is set.

    Whether the active version's files are whole is no part of it: a damaged version is a failure to be repaired, not a
    reason to send a learner's data elsewhere.

    Raises:
        ProvisioningError: ``not_configured``.
        NoMainModel: federated learning is on, no version is active, and there is no key.
    """
    check_configured()
    if not settings.USE_FEDERATED_LEARNING:
        reason = _("USE_FEDERATED_LEARNING is off and OPENAI_API_KEY is set")
        return Decision(Backend.OPENAI_FINE_TUNING, "federated_learning_off", reason)
    active = MainModelVersion.objects.filter(status=VersionStatus.ACTIVE).first()
    if active is not None:
        reason = _("USE_FEDERATED_LEARNING is on and %(version)s is active") % {"version": active.version}
        return Decision(Backend.FEDERATED, "federated_learning", reason, active.version)
    if settings.OPENAI_API_KEY:
        reason = _("USE_FEDERATED_LEARNING is on, but no main model version is active; OPENAI_API_KEY is set")
        return Decision(Backend.OPENAI_FINE_TUNING, "no_main_model", reason)
    raise NoMainModel(_("USE_FEDERATED_LEARNING is on, but no main model version is active: train one with train_main_model."))
