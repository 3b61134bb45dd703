"""Refusals of the learners app."""

from __future__ import annotations

from aivo_site.errors import DomainError, UsageError


class LearnersError(DomainError):
    """Something about learners or their data is refused; ``code`` is stable."""

    default_code = "learners_refused"


class ImportFileError(LearnersError):
    """A file cannot be read as a whole, so nothing of it was imported."""

    default_code = "import_file_refused"


class ConsentError(LearnersError):
    """A consent cannot be recorded as asked."""

    default_code = "consent_refused"


class RegistrationError(LearnersError):
    """A learner, an organisation or an assessment cannot be recorded as asked."""

    default_code = "registration_refused"


class UnknownName(RegistrationError, UsageError):
    """No learner or organisation is called so. ``code``: ``unknown_learner``, ``unknown_organisation``."""
