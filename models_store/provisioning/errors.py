"""What provisioning refuses."""

from __future__ import annotations

from aivo_site.errors import DomainError


class ProvisioningError(DomainError):
    """A learner gets no model now; the code says why.

    ``code``: ``not_configured``, ``legacy_not_available``, ``bad_profile``, the reasons of ``CloneError`` (such as
    ``no_consent_training``), those of ``RegistrationError`` (such as ``unknown_organisation``), those of ``StoreError``.
    """

    default_code = "not_configured"
