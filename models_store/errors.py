"""What this app refuses, and why; each error has a stable ``code``."""

from __future__ import annotations

from aivo_site.errors import DomainError, UsageError


class StoreError(DomainError):
    """A stored file that is not there, is damaged, or may not be addressed.

    ``code``: ``missing_file``, ``checksum_mismatch``, ``bad_path``, ``bad_file``, ``already_exists``.
    """

    default_code = "bad_file"


class NoMainModel(DomainError):
    """There is no active main model version."""

    default_code = "no_main_model"


class VersionConflict(DomainError):
    """A main model version is not in the state that the change needs, or another change came first."""

    default_code = "version_conflict"


class UnknownVersion(UsageError):
    """No main model version of that name or path."""

    default_code = "unknown_version"


class PreparationError(DomainError):
    """The curriculum cannot be prepared.

    ``code``: ``no_curriculum_learners``, ``no_evaluation_learners``, ``too_few_learners``, or the encoder's (``bad_event``).
    """

    default_code = "no_curriculum_learners"


class MainTrainingError(DomainError):
    """The main model could not be trained; the code is the trainer's (``diverged``, ``no_samples``, ...)."""

    default_code = "training_failed"


class TrainingInterrupted(MainTrainingError):
    """The training was asked to stop; what it has learnt so far is kept and gone on from."""

    default_code = "stopped"


class CloneError(DomainError):
    """A learner's model cannot be cloned or compared; the code is the reason.

    ``code``: ``wrong_pool``, ``no_consent_training``, ``withdrawn``, ``already_cloned``, ``other_backend``, ``erased``,
    ``no_tail``, ``no_samples``, ``different_architecture``, ``different_encoder``.
    """

    default_code = "already_cloned"
