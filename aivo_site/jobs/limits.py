"""The times that govern jobs, in seconds, from the settings."""

from __future__ import annotations

from datetime import timedelta

from django.conf import settings


def lease() -> timedelta:
    """How long a run may be silent before it counts as dead."""
    return timedelta(seconds=settings.JOB_LEASE_SECONDS)


def cancel_grace() -> float:
    """How long a child process may take to stop by itself after a cancel was asked for."""
    return float(settings.JOB_CANCEL_GRACE_SECONDS)


def terminate_grace() -> float:
    """How long a child process may take to end after SIGTERM before SIGKILL."""
    return float(settings.JOB_TERMINATE_GRACE_SECONDS)


def resend_after() -> timedelta:
    """How old a message must be before the janitor asks whether it was lost."""
    return timedelta(seconds=settings.JOB_RESEND_AFTER_SECONDS)
