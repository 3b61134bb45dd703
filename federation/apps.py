from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class FederationConfig(AppConfig):
    name = "federation"
    verbose_name = _("Federation")

    def ready(self) -> None:
        from aivo_site.jobs.preparations import Preparation, register_preparation
        from federation import file_references, tasks

        tasks.register_kinds()
        register_preparation(Preparation(queue="training", module="aivo_core.engine.warm_up"))
        file_references.register_own_sources()
