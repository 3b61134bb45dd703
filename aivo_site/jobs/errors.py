"""What the jobs app refuses, each with a stable code."""

from __future__ import annotations

from aivo_site.errors import DomainError, UsageError


class UnknownKind(UsageError):
    """No job kind of this name is registered."""

    default_code = "unknown_job_kind"


class BadParams(UsageError):
    """The parameters of a job are not a plain JSON object."""

    default_code = "bad_params"


class IdempotencyConflict(DomainError):
    """The idempotency key was used before for something else."""

    default_code = "idempotency_conflict"


class UnknownQueue(DomainError):
    """The settings declare no such queue: a message sent there would never be read."""

    default_code = "unknown_queue"


class JobFinished(DomainError):
    """The job has ended, and ended jobs never change."""

    default_code = "job_finished"


class JobNotFinished(DomainError):
    """The job has not ended, so there is nothing to try again."""

    default_code = "job_not_finished"


class NotClaimable(DomainError):
    """The job is not waiting: another process runs it, or it has ended."""

    default_code = "job_not_claimable"


class JobCancelled(DomainError):
    """Raised inside a handler that was asked to stop; the job ends as CANCELLED."""

    default_code = "cancelled"


class ChildDied(DomainError):
    """The process that ran the job ended without saying how the job ended."""

    default_code = "child_died"


class UnknownSchedule(UsageError):
    """No schedule of this name is declared."""

    default_code = "unknown_schedule"


class ShardFailed(DomainError):
    """A part of the job failed in another worker; ``code`` and message are that failure's."""

    default_code = "shard_failed"


class ShardStopped(Exception):
    """Raised inside a shard's handler that ends before the shard is done; the shard waits again."""
