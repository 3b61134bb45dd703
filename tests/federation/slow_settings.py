"""Settings of worker processes that run rounds slowly, in small shards."""

from __future__ import annotations

from tests.worker_settings import *  # noqa: F403
from tests.worker_settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.federation.slow_rounds"]
