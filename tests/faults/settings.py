"""Settings of the installations that these tests break: the product's own, with short leases and quick queues."""

from __future__ import annotations

from aivo_site.settings import *  # noqa: F403
from aivo_site.settings import Q_CLUSTER

JOB_LEASE_SECONDS = 3
JOB_RESEND_AFTER_SECONDS = 2

Q_CLUSTER = {
    **Q_CLUSTER,
    "poll": 0.1,
    "guard_cycle": 0.2,
    "ALT_CLUSTERS": {"training": {**Q_CLUSTER["ALT_CLUSTERS"]["training"], "poll": 0.1, "guard_cycle": 0.2}},
}
