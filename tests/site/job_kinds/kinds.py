"""What the kinds do: each follows its parameters, in the worker or in a child process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from aivo_site.errors import DomainError, Skipped
from aivo_site.jobs.context import JobContext
from aivo_site.jobs.registry import JobKind, register


def follow(context: JobContext) -> Mapping[str, Any]:
    """``steps`` of ``step_seconds`` each; then ``then``: return, fail, skip, crash, break or kill."""
    steps = int(context.params.get("steps", 1))
    cooperative = context.params.get("cooperative", True)
    for step in range(steps):
        context.progress(step, steps, f"step {step}")
        if cooperative:
            context.check_cancelled()
        time.sleep(float(context.params.get("step_seconds", 0)))
    context.progress(steps, steps, "all steps")
    context.log("all steps done")
    return _end(context)


def _end(context: JobContext) -> Mapping[str, Any]:
    then = context.params.get("then", "return")
    if then == "fail":
        raise DomainError("steps must be even", code="odd_steps")
    if then == "skip":
        raise Skipped("nothing new", code="nothing_new")
    if then == "break":
        raise ZeroDivisionError("broken on purpose")
    if then == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "starts": context.job.starts,
    }


def register_kinds() -> None:
    register(JobKind(name="follow", label="follow", run=follow))
    register(JobKind(name="follow_child", label="follow in a child", run=follow, child_process=True))
    register(JobKind(name="follow_training", label="follow in a child, long", run=follow, queue="training", child_process=True))
    register(JobKind(name="follow_twice", label="follow, two starts", run=follow, max_starts=2))
