"""Real queue workers for tests: started in sessions of their own on the test run's database, and always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from django.db import connection

from aivo_site.environment import BASE_DIR
from aivo_site.jobs.models import Job, JobState, WorkerHeartbeat

TERMINAL = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.SKIPPED)


def database_url() -> str:
    """The database that this test run uses, for another process."""
    config = connection.settings_dict
    if connection.vendor == "sqlite":
        return f"sqlite:///{config['NAME']}"
    login = config["USER"] + (f":{config['PASSWORD']}" if config["PASSWORD"] else "")
    return f"postgres://{login}@{config['HOST'] or '127.0.0.1'}:{config['PORT'] or 5432}/{config['NAME']}"


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("Q_CLUSTER_NAME", "OMP_NUM_THREADS")}
    return {**kept, "DJANGO_SETTINGS_MODULE": "tests.worker_settings", "DATABASE_URL": database_url()}


@contextmanager
def started(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """``manage.py`` with these arguments; afterwards nothing that descends from it is left."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, str(BASE_DIR / "manage.py"), *arguments],
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a started process and all its descendants at once, as a service manager kills a control group."""
    found = descendants(process.pid)
    for pid in (process.pid, *found):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Process ids of children, their children, and so on."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [*children, *(deeper for child in children for deeper in descendants(child))]


def until(condition: Callable[[], Any], *, seconds: float = 15.0, what: str = "", pause: float = 0.05) -> Any:
    """The first true value of the condition, which is asked every ``pause`` seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(pause)
    raise AssertionError(f"not within {seconds} s: {what or condition}")


def ended(job: Job, *, seconds: float = 15.0) -> Job:
    """The job once it has a terminal state."""

    def look() -> bool:
        job.refresh_from_db()
        return job.state in TERMINAL

    until(look, seconds=seconds, what=f"job {job.kind} {job.params} is {job.state} {job.error_message}")
    return job


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of the queue workers below a started process that have said that they live."""
    below = descendants(process.pid)
    return [pid for pid in WorkerHeartbeat.objects.values_list("pid", flat=True) if pid in below]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def living_workers(queue: str) -> list[int]:
    """Process ids of the queue's workers that have said that they live, and do."""
    return [pid for pid in WorkerHeartbeat.objects.filter(queue=queue).values_list("pid", flat=True) if alive(pid)]
