"""The commands that these tests interrupt, the moments at which they do, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from django.utils import timezone

from aivo_site.jobs.models import Job, JobState, WorkerHeartbeat
from federation.models import AggregationRound, ModelTrainingSession, RoundState, SessionPurpose
from tests.faults.installation import Installation, rows
from tests.site.worker_processes import TERMINAL, alive, descendants, until

TRAIN_MAIN = ("train_main_model", "--epochs", "6", "--batch-size", "6", "--seed", "3")
CLONE = ("clone_learner_models",)
TRAIN_LEARNERS = ("train_learner_models",)
AGGREGATE = ("run_federated_aggregation",)

LEARNERS = 8
_TIGHT = 0.004


# --- Moments --------------------------------------------------------------------------------------------------------------


def an_epoch_is_kept(installation: Installation) -> None:
    """The main training has written its first checkpoint."""
    folder = installation.folder / "main" / "checkpoints"
    until(lambda: any(folder.glob("[!.]*.checkpoint")), seconds=60, what="a checkpoint", pause=_TIGHT)


def some_learners_are_trained(installation: Installation) -> None:
    """A part of the learners' own models is stored."""
    _some_sessions(SessionPurpose.PERSONAL)


def some_contributions_are_trained(installation: Installation) -> None:
    """A part of the round's contributions is stored."""
    _some_sessions(SessionPurpose.CONTRIBUTION)


def the_gate_compares(installation: Installation) -> None:
    """The aggregate is there and the gate has not decided."""
    until(lambda: rows(AggregationRound).filter(state=RoundState.EVALUATING).exists(), seconds=60, what="the gate", pause=_TIGHT)


def _some_sessions(purpose: SessionPurpose) -> None:
    sessions = rows(ModelTrainingSession).filter(purpose=purpose)
    until(lambda: sessions.count() >= 2, seconds=60, what=f"sessions {purpose}", pause=_TIGHT)


# --- Kills ----------------------------------------------------------------------------------------------------------------


def queue_worker() -> int:
    """Process id of the one living worker of the training queue."""
    (pid,) = until(
        lambda: [pid for pid in rows(WorkerHeartbeat).values_list("pid", flat=True) if alive(pid)], what="a queue worker"
    )
    return int(pid)


def job_process() -> int:
    """Process id of the child in which the running job is."""
    worker = queue_worker()
    (pid,) = Path(f"/proc/{worker}/task/{worker}/children").read_text(encoding="ascii").split()
    return int(pid)


def kill_worker(worker: subprocess.Popen[bytes]) -> None:
    """The cluster's main process and all its others at once, save the job's, which must end by itself."""
    child = job_process()
    for pid in (worker.pid, *descendants(worker.pid)):
        if pid != child:
            _kill(pid)
    worker.wait()
    until(lambda: not alive(child), what="the job's process ended with its worker")


def kill_main_process(worker: subprocess.Popen[bytes]) -> None:
    """Only the cluster's main process; the others must end by themselves, or a restart would add a second cluster."""
    others = descendants(worker.pid)
    worker.kill()
    worker.wait()
    until(lambda: not any(alive(pid) for pid in others), what="all ended with the main process")


def kill_queue_worker(_worker: subprocess.Popen[bytes]) -> None:
    """Only the process that supervises the job; its cluster starts another."""
    child = job_process()
    _kill(queue_worker())
    until(lambda: not alive(child), what="the job's process ended with its worker")


def kill_job_process(_worker: subprocess.Popen[bytes]) -> None:
    """Only the process in which the job is, as when memory runs out."""
    _kill(job_process())


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# --- Jobs -----------------------------------------------------------------------------------------------------------------


def started_job(installation: Installation, command: tuple[str, ...]) -> Job:
    """The job that the command left to the worker."""
    job: Job = rows(Job).get(pk=installation.done(*command, "--background")["job"])
    return job


def ended(job: Job) -> Job:
    def has_ended() -> bool:
        job.refresh_from_db()
        return job.state in TERMINAL

    until(has_ended, seconds=60, what=f"the end of {job.kind}")
    return job


def lease_runs_out(job: Job) -> None:
    """Wait until nobody can hold the job any more; it must still look as its dead process left it."""
    job.refresh_from_db()
    assert job.state == JobState.RUNNING and job.lease_expires_at is not None
    expires = job.lease_expires_at
    until(lambda: timezone.now() > expires, what="the lease's end")
    job.refresh_from_db()
    assert (job.state, job.lease_expires_at) == (JobState.RUNNING, expires)


def runs_again(installation: Installation, job: Job) -> Job:
    """The job after the janitor has found its process dead, and the worker has taken it once more."""
    lease_runs_out(job)
    assert installation.done("janitor")["requeued"] == 1
    ended(job)
    assert (job.state, job.starts) == (JobState.SUCCEEDED, 2), job.error_message
    return job


def assert_sound(installation: Installation) -> None:
    """Every file that a row points to is there and whole, and no job waits or runs."""
    assert not rows(Job).filter(state__in=(JobState.RUNNING, JobState.QUEUED)).exists()
    report = installation.done("verify_store")
    assert (report["missing"], report["corrupt"], report["active_pointer"]) == (0, 0, "ok"), report


def assert_leftovers_are_collected(installation: Installation) -> None:
    """What killed and replaced work left behind is garbage of known kinds, and nothing that a row points to goes with it."""
    before = installation.done("verify_store")["files"]
    collected = installation.done("collect_garbage", "--older-than-hours", "0")
    assert collected["removed"] and collected["unknown"] == []
    after = installation.done("verify_store")
    assert (after["files"], after["missing"], after["corrupt"], after["orphaned"]) == (before, 0, 0, 0), after
