"""Background jobs: the row is the truth, the queue carries its id and nothing else."""

from __future__ import annotations

from django.conf import settings
from django.db import models
from django.db.models import F, Q
from django.utils.translation import gettext_lazy as _

from aivo_site.database import Row


class JobState(models.TextChoices):
    QUEUED = "QUEUED", _("waiting")
    RUNNING = "RUNNING", _("running")
    SUCCEEDED = "SUCCEEDED", _("done")
    FAILED = "FAILED", _("failed")
    CANCELLED = "CANCELLED", _("cancelled")
    SKIPPED = "SKIPPED", _("skipped")


TERMINAL_JOB_STATES = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.SKIPPED)
OPEN_JOB_STATES = (JobState.QUEUED, JobState.RUNNING)


class Queue(models.TextChoices):
    DEFAULT = "default", _("short jobs")
    TRAINING = "training", _("long jobs")
    INLINE = "inline", _("in the command itself")


class LogLevel(models.TextChoices):
    INFO = "INFO", _("information")
    WARNING = "WARNING", _("warning")
    ERROR = "ERROR", _("error")


class Job(Row):
    """One piece of work: what was asked, how far it is, how it ended."""

    kind = models.CharField(_("kind"), max_length=64)
    queue = models.CharField(_("queue"), max_length=16, choices=Queue.choices, default=Queue.DEFAULT)
    params = models.JSONField(
        _("parameters"), default=dict, blank=True, help_text=_("Ids, numbers and words; never profile data.")
    )
    state = models.CharField(_("state"), max_length=16, choices=JobState.choices, default=JobState.QUEUED)
    progress_done = models.PositiveBigIntegerField(_("steps done"), default=0)
    progress_total = models.PositiveBigIntegerField(_("steps in all"), default=0)
    progress_message = models.CharField(_("current step"), max_length=200, blank=True)
    result = models.JSONField(_("result"), null=True, blank=True)
    error_code = models.CharField(_("error code"), max_length=64, blank=True)
    error_message = models.TextField(_("error"), blank=True)
    error_traceback = models.TextField(_("traceback"), blank=True)
    requested_by = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        verbose_name=_("requested by"),
        null=True,
        blank=True,
        on_delete=models.SET_NULL,
        related_name="+",
    )
    idempotency_key = models.CharField(_("idempotency key"), max_length=200, null=True, blank=True, unique=True)
    starts = models.PositiveIntegerField(_("starts"), default=0, help_text=_("How often a worker began it."))
    owner = models.UUIDField(_("lease owner"), null=True, blank=True, help_text=_("Token of the run that holds the lease."))
    lease_expires_at = models.DateTimeField(_("lease expires at"), null=True, blank=True)
    heartbeat_at = models.DateTimeField(_("last heartbeat"), null=True, blank=True)
    cancel_requested_at = models.DateTimeField(_("cancel requested at"), null=True, blank=True)
    sent_at = models.DateTimeField(_("message sent at"), null=True, blank=True)
    started_at = models.DateTimeField(_("started at"), null=True, blank=True)
    finished_at = models.DateTimeField(_("finished at"), null=True, blank=True)

    class Meta:
        verbose_name = _("job")
        verbose_name_plural = _("jobs")
        ordering = ("-created_at",)
        indexes = (
            models.Index(fields=["state", "lease_expires_at"], name="job_state_lease"),
            models.Index(fields=["kind", "state"], name="job_kind_state"),
            models.Index(fields=["-created_at"], name="job_created"),
        )
        constraints = (
            models.CheckConstraint(condition=Q(state__in=JobState.values), name="job_state_known"),
            models.CheckConstraint(
                condition=Q(state__in=[*TERMINAL_JOB_STATES], finished_at__isnull=False)
                | Q(state__in=[*OPEN_JOB_STATES], finished_at__isnull=True),
                name="job_finished_when_terminal",
            ),
            models.CheckConstraint(
                condition=~Q(state=JobState.RUNNING) | Q(lease_expires_at__isnull=False, owner__isnull=False),
                name="job_running_has_lease",
            ),
            models.CheckConstraint(condition=Q(progress_done__lte=F("progress_total")), name="job_progress_bounds"),
        )

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL_JOB_STATES


class ShardState(models.TextChoices):
    WAITING = "WAITING", _("waiting")
    RUNNING = "RUNNING", _("running")
    DONE = "DONE", _("done")
    FAILED = "FAILED", _("failed")


class JobShard(Row):
    """A bounded part of a job's work, which any worker may do.

    A running shard belongs to the run that claimed it: its job (``worker_job``) and that run's lease token (``holder``). When
    that run is dead, another may claim the shard.
    """

    parent = models.ForeignKey(Job, verbose_name=_("job"), on_delete=models.CASCADE, related_name="shards")
    phase = models.CharField(_("phase"), max_length=64)
    index = models.PositiveIntegerField(_("number"), help_text=_("Results are put together in this order."))
    size = models.PositiveIntegerField(_("steps"), default=1, help_text=_("How much of the job's progress it is."))
    params = models.JSONField(_("parameters"), default=dict, blank=True, help_text=_("Ids, numbers and words."))
    state = models.CharField(_("state"), max_length=16, choices=ShardState.choices, default=ShardState.WAITING)
    worker_job = models.ForeignKey(
        Job, verbose_name=_("done by"), null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )
    holder = models.UUIDField(_("lease token of the run that has it"), null=True, blank=True)
    starts = models.PositiveIntegerField(_("starts"), default=0, help_text=_("How often a worker began it."))
    result = models.JSONField(_("result"), null=True, blank=True)
    error_code = models.CharField(_("error code"), max_length=64, blank=True)
    error_message = models.TextField(_("error"), blank=True)

    class Meta:
        verbose_name = _("part of a job")
        verbose_name_plural = _("parts of jobs")
        ordering = ("parent", "created_at", "index")
        constraints = (
            models.UniqueConstraint(fields=["parent", "phase", "index"], name="job_shard_once"),
            models.CheckConstraint(condition=Q(state__in=ShardState.values), name="job_shard_state_known"),
            models.CheckConstraint(
                condition=~Q(state=ShardState.RUNNING) | Q(holder__isnull=False), name="job_shard_running_has_holder"
            ),
            models.CheckConstraint(
                condition=~Q(state=ShardState.DONE) | Q(result__isnull=False), name="job_shard_done_has_result"
            ),
        )

    def __str__(self) -> str:
        return f"{self.phase} {self.index}"


class JobLog(models.Model):
    """One line a job wrote."""

    job = models.ForeignKey(Job, verbose_name=_("job"), on_delete=models.CASCADE, related_name="log_lines")
    at = models.DateTimeField(_("at"), auto_now_add=True)
    level = models.CharField(_("level"), max_length=8, choices=LogLevel.choices, default=LogLevel.INFO)
    message = models.TextField(_("message"))

    class Meta:
        verbose_name = _("job log line")
        verbose_name_plural = _("job log lines")
        ordering = ("id",)

    def __str__(self) -> str:
        return self.message[:80]


class WorkerHeartbeat(Row):
    """A queue worker that says it lives."""

    host = models.CharField(_("host"), max_length=255)
    pid = models.PositiveIntegerField(_("process id"))
    queue = models.CharField(_("queue"), max_length=16)
    version = models.CharField(_("version"), max_length=32)
    current_job = models.ForeignKey(
        Job, verbose_name=_("current job"), null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )
    last_seen_at = models.DateTimeField(_("last seen at"))

    class Meta:
        verbose_name = _("worker")
        verbose_name_plural = _("workers")
        constraints = (models.UniqueConstraint(fields=["host", "pid", "queue"], name="worker_once"),)

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"


class ScheduleRun(Row):
    """A schedule's firing on one local date: the unique key that makes a double firing harmless."""

    schedule = models.CharField(_("schedule"), max_length=100)
    local_date = models.DateField(_("local date"))
    slot = models.CharField(
        _("slot"), max_length=32, blank=True, help_text=_("Within the day, for schedules that run more than once.")
    )
    job = models.ForeignKey(Job, verbose_name=_("job"), null=True, blank=True, on_delete=models.SET_NULL, related_name="+")

    class Meta:
        verbose_name = _("schedule run")
        verbose_name_plural = _("schedule runs")
        constraints = (models.UniqueConstraint(fields=["schedule", "local_date", "slot"], name="schedule_run_once"),)

    def __str__(self) -> str:
        return f"{self.schedule} {self.local_date} {self.slot}".strip()
