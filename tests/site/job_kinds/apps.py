from django.apps import AppConfig


class JobKindsConfig(AppConfig):
    name = "tests.site.job_kinds"
    label = "test_job_kinds"

    def ready(self) -> None:
        from tests.site.job_kinds import kinds

        kinds.register_kinds()
