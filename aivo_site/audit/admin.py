"""The audit log in the console: read only."""

from __future__ import annotations

from django.contrib import admin

from aivo_site.audit.models import AuditEvent
from aivo_site.console.admin_base import ReadOnlyAdmin


@admin.register(AuditEvent)
class AuditEventAdmin(ReadOnlyAdmin):
    """What was changed, when and by whom."""

    list_display = ("sequence", "at", "actor", "action", "object_type", "object_id")
    list_filter = ("action", "object_type")
    search_fields = ("=object_id", "=actor")
    date_hierarchy = "at"
