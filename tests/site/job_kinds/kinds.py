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
from aivo_site.jobs.shard_context import ShardContext, ShardPlan
from aivo_site.jobs.shard_helpers import do_in_shards
from aivo_site.jobs.shards import MAX_STARTS


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


def in_child(params: Mapping[str, Any]) -> bool:
    return bool(params.get("child", True))


def share(context: JobContext) -> Mapping[str, Any]:
    """``shards`` of two steps, each ``step_seconds``; ``lethal`` ones kill the process that does them."""
    lethal = context.params.get("lethal", [])
    plans = [
        ShardPlan({"number": number, "seconds": context.params.get("step_seconds", 0), "lethal": number in lethal}, size=2)
        for number in range(int(context.params.get("shards", 6)))
    ]
    found = do_in_shards(
        job=context.job,
        phase="square",
        make=lambda: plans,
        handler=square,
        should_stop=context.should_stop,
        progress=lambda done, total: context.progress(done, total, "squaring"),
    )
    if found is None:
        context.check_cancelled()
        raise DomainError("stopped for no reason", code="stopped")
    return {"squares": [entry["square"] for entry in found], "pids": sorted({entry["pid"] for entry in found})}


def square(context: ShardContext) -> Mapping[str, Any]:
    for step in range(2):
        if context.params["lethal"]:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(context.params["seconds"])
        context.progress(step + 1)
        context.check_stopped()
    return {"square": context.params["number"] ** 2, "pid": os.getpid()}


def register_kinds() -> None:
    register(JobKind(name="follow", label="follow", run=follow))
    register(JobKind(name="follow_child", label="follow in a child", run=follow, child_process=True))
    register(JobKind(name="follow_training", label="follow in a child, long", run=follow, queue="training", child_process=True))
    register(JobKind(name="follow_twice", label="follow, two starts", run=follow, max_starts=2))
    shared = {"queue": "training", "max_starts": MAX_STARTS + 2, "shard_handlers": {"square": square}}
    register(JobKind(name="share", label="share", run=share, **shared))
    register(JobKind(name="share_child", label="share in children", run=share, child_process=in_child, **shared))
