from django.apps import AppConfig
from django.db.models.signals import post_migrate
from django.utils.translation import gettext_lazy as _


class ConsoleConfig(AppConfig):
    name = "aivo_site.console"
    label = "console"
    verbose_name = _("Console")

    def ready(self) -> None:
        from aivo_site.console.roles import ensure_groups

        post_migrate.connect(ensure_groups, sender=self)
