"""The job kinds of the jobs app itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from django.utils.translation import gettext_lazy as _

from aivo_site.jobs.janitor import JANITOR_KIND
from aivo_site.jobs.registry import JobKind, register

if TYPE_CHECKING:
    from aivo_site.jobs.context import JobContext


def _run_janitor(_context: JobContext) -> Mapping[str, Any]:
    from aivo_site.jobs.janitor import sweep

    return sweep().to_json()


def _work_on_shards(context: JobContext) -> Mapping[str, Any]:
    from aivo_site.jobs.shard_helpers import run_helper

    return run_helper(context)


def _helper_needs_child(params: Mapping[str, Any]) -> bool:
    from aivo_site.jobs.shard_helpers import helper_needs_child

    return helper_needs_child(params)


def register_kinds() -> None:
    """Called when the app starts."""
    register(JobKind(name=JANITOR_KIND, label=_("repair and prune jobs"), run=_run_janitor, max_starts=1))
    register(
        JobKind(
            name="work_on_shards",
            label=_("help with a job that workers share"),
            run=_work_on_shards,
            queue="training",
            child_process=_helper_needs_child,
        )
    )
