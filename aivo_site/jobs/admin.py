"""Jobs and workers in the console: what runs, how far it is, and stopping it."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.shortcuts import get_object_or_404
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext
from django.views.decorators.http import require_POST
from unfold.admin import TabularInline
from unfold.decorators import display

from aivo_site.audit import services as audit
from aivo_site.console.admin_base import ReadOnlyAdmin
from aivo_site.errors import DomainError
from aivo_site.jobs import services
from aivo_site.jobs.models import Job, JobShard, JobState, ScheduleRun, WorkerHeartbeat

STATE_COLOURS = {
    JobState.QUEUED: "info",
    JobState.RUNNING: "warning",
    JobState.SUCCEEDED: "success",
    JobState.FAILED: "danger",
    JobState.CANCELLED: "",
    JobState.SKIPPED: "",
}
SILENT_AFTER_SECONDS = 60
LOG_LINES = 500


class JobShardInline(TabularInline):  # type: ignore[misc]
    """The parts of a job that workers share, a page of them at a time."""

    model = JobShard
    fk_name = "parent"
    fields = readonly_fields = ("phase", "index", "size", "shown_state", "starts", "worker", "error_message")
    ordering = ("created_at", "phase", "index")
    per_page = 20
    extra = max_num = 0
    can_delete = False
    show_change_link = False

    def get_queryset(self, request: HttpRequest) -> QuerySet[JobShard]:
        rows: QuerySet[JobShard] = super().get_queryset(request)
        return rows.select_related("worker_job").defer("params", "result")

    @display(description=gettext_lazy("state"))
    def shown_state(self, shard: JobShard) -> str:
        """In words: the theme's coloured labels are for lists, not for rows like these."""
        return str(shard.get_state_display())

    @display(description=gettext_lazy("done by"))
    def worker(self, shard: JobShard) -> str:
        job = shard.worker_job
        if job is None:
            return "-"
        return format_html('<a href="{}">{}</a>', reverse("admin:jobs_job_change", args=[job.pk]), job)

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        """Whoever may see the job."""
        return bool(request.user.has_perm("jobs.view_job"))


@admin.register(Job)
class JobAdmin(ReadOnlyAdmin):
    """One line per job; its page follows the progress while it runs."""

    list_display = ("kind", "shown_state", "shown_progress", "requested_by", "created_at", "finished_at")
    list_filter = ("state", "kind", "queue")
    search_fields = ("=id", "kind", "error_code")
    search_help_text = gettext_lazy("Kind, error code, or the whole id")
    list_select_related = ("requested_by",)
    date_hierarchy = "created_at"
    change_form_outer_before_template = "console/job_progress.html"
    fields = (
        "kind",
        "queue",
        "state",
        "params",
        "requested_by",
        "starts",
        "created_at",
        "started_at",
        "finished_at",
        "heartbeat_at",
        "error_code",
        "error_traceback",
    )

    class Media:
        css = {"all": ("console/console.css",)}
        js = ("console/job_progress.js",)

    @display(description=gettext_lazy("state"), ordering="state", label=STATE_COLOURS)
    def shown_state(self, job: Job) -> tuple[str, str]:
        return job.state, job.get_state_display()

    @display(description=gettext_lazy("progress"))
    def shown_progress(self, job: Job) -> str:
        return f"{job.progress_done} / {job.progress_total}" if job.progress_total else job.progress_message or "-"

    def get_urls(self) -> list[URLPattern]:
        return [
            path("<uuid:job_id>/progress/", self.admin_site.admin_view(self.progress_view), name="jobs_job_progress"),
            path("<uuid:job_id>/cancel/", require_POST(self.admin_site.admin_view(self.cancel_view)), name="jobs_job_cancel"),
            *super().get_urls(),
        ]

    def get_inlines(self, request: HttpRequest, obj: Job | None = None) -> tuple[type[JobShardInline], ...]:  # noqa: ARG002
        """Few jobs have parts."""
        return (JobShardInline,) if obj is not None and obj.shards.exists() else ()

    def render_change_form(self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any) -> HttpResponse:
        job = kwargs.get("obj")
        context["may_cancel"] = job is not None and not job.is_terminal and self._may_cancel(request)
        response: TemplateResponse = super().render_change_form(request, context, *args, **kwargs)
        return response

    def progress_view(self, request: HttpRequest, job_id: UUID) -> JsonResponse:
        """The job as JSON, with the log lines after the one given by ``after``."""
        job = get_object_or_404(Job, pk=job_id)
        if not self.has_view_permission(request, job):
            raise PermissionDenied
        after = request.GET.get("after", "0")
        lines = job.log_lines.filter(id__gt=int(after) if after.isdigit() else 0)[:LOG_LINES]
        return JsonResponse(
            {
                "state": job.state,
                "state_label": job.get_state_display(),
                "terminal": job.is_terminal,
                "done": job.progress_done,
                "total": job.progress_total,
                "message": job.progress_message,
                "left_label": _time_left(job),
                "notice": _notice(job),
                "error_message": job.error_message,
                "result": job.result,
                "log": [
                    {"id": line.pk, "at": timezone.localtime(line.at).strftime("%H:%M:%S"), "message": line.message}
                    for line in lines
                ],
            }
        )

    def cancel_view(self, request: HttpRequest, job_id: UUID) -> HttpResponse:
        """Ask a job to stop; POST only."""
        job = get_object_or_404(Job, pk=job_id)
        if not self._may_cancel(request):
            raise PermissionDenied
        try:
            with transaction.atomic():
                services.request_cancel(job=job, actor=request.user.get_username())
                audit.record(
                    action="job.cancel_requested", actor=request.user.get_username(), object_type="Job", object_id=str(job.pk)
                )
        except DomainError as error:
            messages.warning(request, str(error))
        else:
            messages.success(request, _("The job was asked to stop."))
        return HttpResponseRedirect(reverse("admin:jobs_job_change", args=[job.pk]))

    def _may_cancel(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("jobs.change_job"))


@admin.register(WorkerHeartbeat)
class WorkerHeartbeatAdmin(ReadOnlyAdmin):
    """Which workers live."""

    list_display = ("host", "pid", "queue", "version", "current_job", "last_seen_at", "seems_alive")
    list_filter = ("queue",)
    list_select_related = ("current_job",)

    @display(description=gettext_lazy("alive"), boolean=True)
    def seems_alive(self, worker: WorkerHeartbeat) -> bool:
        return (timezone.now() - worker.last_seen_at).total_seconds() < SILENT_AFTER_SECONDS


@admin.register(ScheduleRun)
class ScheduleRunAdmin(ReadOnlyAdmin):
    """When each schedule fired."""

    list_display = ("schedule", "local_date", "slot", "job", "created_at")
    list_filter = ("schedule",)
    list_select_related = ("job",)


def _time_left(job: Job) -> str:
    if job.is_terminal or not job.started_at or not job.progress_done or not job.progress_total:
        return ""
    elapsed = (timezone.now() - job.started_at).total_seconds()
    seconds = round(elapsed * (job.progress_total - job.progress_done) / job.progress_done)
    if seconds < 90:
        return ngettext("about %(n)s second left", "about %(n)s seconds left", seconds) % {"n": seconds}
    minutes = round(seconds / 60)
    return ngettext("about %(n)s minute left", "about %(n)s minutes left", minutes) % {"n": minutes}


def _notice(job: Job) -> str:
    """What an operator should know when nothing moves."""
    if job.state == JobState.QUEUED:
        newest = WorkerHeartbeat.objects.filter(queue=job.queue).order_by("-last_seen_at").first()
        if newest is None or (timezone.now() - newest.last_seen_at).total_seconds() > SILENT_AFTER_SECONDS:
            return (
                _("No worker of the queue “%s” has been seen in the last minute: the job waits until one is started.") % job.queue
            )
    if job.state == JobState.RUNNING and job.lease_expires_at and job.lease_expires_at < timezone.now():
        return _("The worker that ran this job has fallen silent; it will be taken up again or ended in a few minutes.")
    if job.cancel_requested_at and not job.is_terminal:
        return _("The job was asked to stop.")
    return ""
