from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class ModelsStoreConfig(AppConfig):
    name = "models_store"
    verbose_name = _("Models")

    def ready(self) -> None:
        from models_store import tasks
        from models_store.references import register_own_sources

        register_own_sources()
        tasks.register_kinds()
