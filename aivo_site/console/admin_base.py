"""What every page of the console has in common: organisation scope, read-only tables, lists that stay fast."""

from __future__ import annotations

from typing import Any

from django.db.models import QuerySet
from django.http import HttpRequest
from unfold.admin import ModelAdmin


class ConsoleAdmin(ModelAdmin):  # type: ignore[misc]
    """Base of the console's lists: shows a user only the rows of their organisations."""

    list_per_page = 50
    show_full_result_count = False
    list_filter_submit = True
    warn_unsaved_form = True

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        queryset: QuerySet[Any] = super().get_queryset(request)
        scoped: QuerySet[Any] = queryset.visible_to(request.user) if hasattr(queryset, "visible_to") else queryset
        return scoped


class ReadOnlyAdmin(ConsoleAdmin):
    """A table that only the product writes: shown, searched, never edited by hand."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False
