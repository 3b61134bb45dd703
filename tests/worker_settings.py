"""Settings of the worker processes that tests start: the product's own, quick times, and a few kinds of jobs for tests."""

from __future__ import annotations

import os

os.environ.setdefault("SECRET_KEY", "only-for-tests-0123456789-abcdefghijklmnopqrstuvwxyz-ABCDEF")
os.environ.setdefault("HTTPS", "false")

from aivo_site.settings import *  # noqa: F403
from aivo_site.settings import INSTALLED_APPS, Q_CLUSTER

INSTALLED_APPS = [*INSTALLED_APPS, "tests.site.job_kinds"]

_TRAINING_TIMEOUT = int(os.environ.get("TEST_TRAINING_TIMEOUT", "6"))

JOB_LEASE_SECONDS = 3
JOB_CANCEL_GRACE_SECONDS = 1
JOB_TERMINATE_GRACE_SECONDS = 1
JOB_RESEND_AFTER_SECONDS = 2

Q_CLUSTER = {
    **Q_CLUSTER,
    "poll": 0.1,
    "guard_cycle": 0.2,
    "ALT_CLUSTERS": {
        "training": {**Q_CLUSTER["ALT_CLUSTERS"]["training"], "timeout": _TRAINING_TIMEOUT, "retry": 100, "poll": 0.1}
    },
}
