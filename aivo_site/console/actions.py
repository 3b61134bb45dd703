"""Actions of the console's lists that start background jobs, each behind a page that says what will happen.

The first POST shows the page, the second, with ``confirmed``, starts the job and goes to its page. Nothing changes on a
GET request.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from django import forms
from django.contrib import messages
from django.contrib.admin import helpers
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.translation import gettext as _
from unfold.widgets import UnfoldAdminTextareaWidget

from aivo_site.errors import DomainError
from aivo_site.jobs import services as jobs

MAX_SELECTED = 5_000
"""Rows that one action takes; more are started from the command line."""


class NoForm(forms.Form):
    """An action that asks nothing."""


class ReasonForm(forms.Form):
    """An action that is recorded with its reason."""

    reason = forms.CharField(min_length=5, max_length=500, widget=UnfoldAdminTextareaWidget(attrs={"rows": 3}))


@dataclass(frozen=True)
class JobAction:
    """One action that starts one job.

    Attributes:
        name: of the action, unique in its list.
        label, button: what the menu and the button say.
        kind: of the job.
        permission: ``app.codename`` that the user must hold.
        consequences: sentences shown before the click, from the selected rows; raises DomainError to refuse them.
        params: the job's parameters, from the selected rows and the form.
        form: what the operator is asked.
    """

    name: str
    label: Any
    button: Any
    kind: str
    permission: str
    consequences: Callable[[QuerySet[Any]], list[str]]
    params: Callable[[QuerySet[Any], Mapping[str, Any]], dict[str, Any]]
    form: type[forms.Form] = NoForm


def select_one(queryset: QuerySet[Any]) -> Any:
    """The one selected row.

    Raises:
        DomainError: ``select_one``: none or several are selected.
    """
    rows = list(queryset[:2])
    if len(rows) != 1:
        raise DomainError(_("Select exactly one row for this."), code="select_one")
    return rows[0]


def admin_action(action: JobAction) -> Callable[[Any, HttpRequest, QuerySet[Any]], HttpResponse | None]:
    """The function that a ModelAdmin lists in ``actions``."""

    def run(model_admin: Any, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        try:
            return _respond(action, model_admin, request, queryset)
        except DomainError as error:
            messages.error(request, str(error))
            return None

    run.__name__ = action.name
    run.short_description = action.label  # type: ignore[attr-defined]
    return run


def _respond(action: JobAction, model_admin: Any, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse:
    user = request.user
    if not user.is_authenticated or not user.has_perm(action.permission):
        raise DomainError(_("You may not do this: it needs the permission %s.") % action.permission, code="not_permitted")
    count = queryset.count()
    if count > MAX_SELECTED:
        raise DomainError(
            _("At most %(most)s rows at a time, not %(count)s: filter the list, or use the command line.")
            % {"most": MAX_SELECTED, "count": count},
            code="too_many_rows",
        )
    consequences = action.consequences(queryset)
    form = action.form(request.POST if "confirmed" in request.POST else None)
    if "confirmed" in request.POST and form.is_valid():
        job = jobs.enqueue(
            kind=action.kind,
            params=action.params(queryset, form.cleaned_data),
            requested_by=user,
            idempotency_key=f"console:{_token(request)}",
        )
        return HttpResponseRedirect(reverse("admin:jobs_job_change", args=[job.pk]))
    context = {
        **model_admin.admin_site.each_context(request),
        "title": action.label,
        "opts": model_admin.model._meta,
        "action": action,
        "count": count,
        "consequences": consequences,
        "rows": queryset[:20],
        "more": max(0, count - 20),
        "form": form,
        "token": request.POST.get("token") or uuid.uuid4(),
        "selected": queryset.values_list("pk", flat=True),
        "checkbox_name": helpers.ACTION_CHECKBOX_NAME,
    }
    return TemplateResponse(request, "console/confirm_action.html", context)


def _token(request: HttpRequest) -> uuid.UUID:
    """The page's own token: pressing its button twice starts one job."""
    try:
        return uuid.UUID(request.POST.get("token", ""))
    except ValueError as error:
        raise DomainError(_("This page is incomplete: open it again from the list."), code="stale_page") from error
