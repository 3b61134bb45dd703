from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class JobsConfig(AppConfig):
    name = "aivo_site.jobs"
    label = "jobs"
    verbose_name = _("Jobs")

    def ready(self) -> None:
        from django.core import checks
        from django_q.signals import post_spawn

        from aivo_site.jobs import checks as job_checks
        from aivo_site.jobs import tasks, workers

        tasks.register_kinds()
        post_spawn.connect(workers.worker_started, dispatch_uid="aivo-worker-started")
        for check in job_checks.CHECKS:
            checks.register(check, "jobs")
