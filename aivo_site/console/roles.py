"""The groups that a new installation has, and what each may do.

Operator: everything of the federation. Auditor: sees and verifies, changes nothing.
"""

from __future__ import annotations

from typing import Any

from django.apps import apps as installed_apps
from django.contrib.auth.models import Group, Permission

APPS = ("jobs", "audit", "learners", "models_store", "federation")
OPERATOR_MAY = {
    "jobs": ("change_job",),
    "learners": ("add_organisation", "change_organisation"),
    "models_store": ("add_personalizedmodel", "change_mainmodelversion"),
    "federation": (
        "add_aggregationround",
        "change_aggregationround",
        "add_modeltrainingsession",
        "add_federationpolicy",
        "change_federationpolicy",
    ),
}


def ensure_groups(**_kwargs: Any) -> None:
    """Create the groups and add the permissions they lack; permissions that someone added stay.

    Runs after every migration; permissions of apps migrated later come with their own run.
    """
    labels = [label for label in APPS if label in installed_apps.app_configs]
    seen = Permission.objects.filter(content_type__app_label__in=labels, codename__startswith="view_")
    operator, _created = Group.objects.get_or_create(name="Operator")
    auditor, _created = Group.objects.get_or_create(name="Auditor")
    auditor.permissions.add(*seen)
    operator.permissions.add(*seen)
    for label, names in OPERATOR_MAY.items():
        operator.permissions.add(*Permission.objects.filter(content_type__app_label=label, codename__in=names))
