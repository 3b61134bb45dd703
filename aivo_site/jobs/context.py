"""What a handler gets: its job, its parameters, and ways to report and to notice that it should stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.utils.translation import gettext as _

from aivo_site.jobs.errors import JobCancelled
from aivo_site.jobs.models import Job
from aivo_site.jobs.reporter import Reporter

ProgressCallback = Callable[[int, int, str], None]


class JobContext:
    """One run of one job, as its handler sees it."""

    def __init__(self, job: Job, reporter: Reporter, *, progress: ProgressCallback | None = None) -> None:
        self.job = job
        self.params: dict[str, Any] = dict(job.params)
        self._reporter = reporter
        self._progress = progress

    @property
    def actor(self) -> str:
        """Who acts, as the audit log names them: the user that asked for the job, else its kind."""
        user = self.job.requested_by
        return user.get_username() if user is not None else self.job.kind

    def progress(self, done: int, total: int, message: str = "") -> None:
        """Say how far the work is; cheap enough to call for every learner (written at most twice a second)."""
        self._reporter.report(done, total, message)
        if self._progress is not None:
            self._progress(done, total, message)

    def log(self, message: str, level: str = "INFO") -> None:
        """Add a line to the job's log. ``level``: INFO, WARNING or ERROR. No profile data."""
        self._reporter.log(message, level)

    def should_stop(self) -> bool:
        """Whether the work should end now: a cancel was asked for, or another run owns the job."""
        return self._reporter.poll()

    def check_cancelled(self) -> None:
        """Call between steps.

        Raises:
            JobCancelled: ``should_stop`` is true; let it pass through.
        """
        if self.should_stop():
            raise JobCancelled(_("The job was asked to stop."))
