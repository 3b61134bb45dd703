"""The learner that a request for a model is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Self

from django.utils.translation import gettext as _

from learners.errors import RegistrationError
from learners.models import Learner, Organisation, Pool
from learners.registration import (
    DEFAULT_ORGANISATION,
    checked_profile,
    find_organisation,
    register_learner,
    register_organisation,
    with_learner_id,
)
from models_store.provisioning.errors import ProvisioningError

_TEXTS = ("learner_id", "organisation", "grade_band", "language")
_LISTS = ("needs", "accommodations")


@dataclass(frozen=True)
class LearnerProfile:
    """Who a model is for; everything but ``learner_id`` counts only when the learner is not known yet.

    Attributes:
        organisation: slug of an organisation that exists; empty for the installation's default one.
        needs, accommodations: words. language: a word. No names.
    """

    learner_id: str
    organisation: str = ""
    grade_band: str = ""
    needs: Sequence[str] = ()
    accommodations: Sequence[str] = ()
    language: str = ""

    @classmethod
    def of(cls, profile: Any) -> Self:
        """From a mapping or a dataclass with these fields.

        Raises:
            ProvisioningError: ``bad_profile``, naming the field and what is allowed.
        """
        if is_dataclass(profile) and not isinstance(profile, type):
            profile = asdict(profile)
        if not isinstance(profile, Mapping):
            raise _bad(_("profile must be a mapping or a dataclass, not %s") % type(profile).__name__)
        known = [f.name for f in fields(cls)]
        unknown = sorted(str(name) for name in profile if name not in known)
        if unknown:
            given = ascii(", ".join(unknown)[:80])
            raise _bad(
                _("profile may have the fields %(allowed)s, not %(given)s") % {"allowed": ", ".join(known), "given": given}
            )
        if not profile.get("learner_id"):
            raise _bad(_("profile.learner_id is missing"))
        values = {name: value for name, value in profile.items() if value is not None}
        for name in _TEXTS:
            if not isinstance(values.get(name, ""), str):
                raise _bad(_("profile.%s must be a text") % name)
        for name in _LISTS:
            if not isinstance(values.get(name, ()), list | tuple):
                raise _bad(_("profile.%s must be a list of words") % name)
        return cls(**values)

    def details(self) -> dict[str, Any]:
        """Needs, accommodations and language as ``Learner.profile`` holds them.

        Raises:
            RegistrationError: ``bad_profile``.
        """
        values = {"needs": list(self.needs), "accommodations": list(self.accommodations), "language": self.language}
        return checked_profile({name: value for name, value in values.items() if value})

    def find(self) -> Learner | None:
        """The learner, None if not known yet.

        Raises:
            RegistrationError: ``learner_exists``: the id is taken in another organisation than the profile's.
        """
        learner: Learner | None = with_learner_id(Learner.objects.select_related("organisation"), self.learner_id).first()
        if learner is not None and self.organisation and learner.organisation.slug != self.organisation:
            raise RegistrationError(_("learner_id is taken in another organisation."), code="learner_exists")
        return learner

    def find_or_register(self) -> Learner:
        """The learner; one that is not known yet is registered in the federated pool, without any consent.

        Raises:
            RegistrationError: as ``register_learner``, ``find_organisation`` and ``find``.
        """
        return self.find() or register_learner(
            learner_id=self.learner_id,
            organisation=self._organisation(),
            pool=Pool.FEDERATED,
            grade_band=self.grade_band,
            profile=self.details(),
        )

    def _organisation(self) -> Organisation:
        if self.organisation and self.organisation != DEFAULT_ORGANISATION:
            return find_organisation(slug=self.organisation)
        return register_organisation(slug=DEFAULT_ORGANISATION)


def _bad(message: str) -> ProvisioningError:
    return ProvisioningError(message, code="bad_profile")
