"""A round shared by several queue workers against the same round by one: what further workers bring.

    python -m benchmarks.shared_round [--full] [--json] [--workers 2]

Learners are simulated and imported into a temporary installation (SQLite) as in ``benchmarks.whole_round``. Each worker is a
real process that trains on one thread. The time of a round is that of its job, from the moment that a worker takes it; the
time of a phase is from the planning of its shards to the end of the last one. Rounds alternate between the numbers of workers.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks import installation
from benchmarks.harness import ROOT, Benchmark, Report, Table, in_child, ratio, rounded, usable_cores

PHASES = ("train", "intake", "aggregate")
_LONGEST_SECONDS = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--learners", type=int, help="learners of the round (320, or 1000 with --full)")
    parser.add_argument("--workers", type=int, default=2, help="workers that share the round")


def run(options: argparse.Namespace) -> Report:
    learners = options.learners or (1000 if options.full else 320)
    with installation.temporary(installation.Size(federated=learners)) as folder:
        arguments = {"folder": folder, "numbers": [1, options.workers], "repeats": options.repeats}
        found: dict[str, list[dict[str, Any]]] = in_child("benchmarks.shared_round:rounds", arguments).result
    medians = {
        number: {name: rounded(statistics.median(run[name] for run in runs)) for name in ("wall_s", *PHASES)}
        for number, runs in found.items()
    }
    one, several = medians["1"], medians[str(options.workers)]
    rows = [(name, one[name], several[name], _times_as_fast(one[name], several[name])) for name in ("wall_s", *PHASES)]
    helped = [run["helped_share"] for run in found[str(options.workers)]]
    return Report(
        figures={
            "learners": learners,
            "cores": usable_cores(),
            "workers": options.workers,
            "medians": medians,
            "times_as_fast": _times_as_fast(one["wall_s"], several["wall_s"]),
            "training_times_as_fast": _times_as_fast(one["train"], several["train"]),
            "helped_share": rounded(statistics.median(helped)),
        },
        tables=[
            Table(f"A round of {learners} learners", ("what", "1 worker, s", f"{options.workers} workers, s", "ratio"), rows)
        ],
        notes=[f"Of the learners, {statistics.median(helped):.0%} were trained by helpers."],
        packages=("django", "numpy"),
    )


def _times_as_fast(one: float, several: float) -> float | None:
    """None where there was too little to be cut into shards."""
    return ratio(one, several) if one and several else None


# --- In the child process -------------------------------------------------------------------------------------------------


def rounds(folder: str, numbers: list[int], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Train the copies once, then rounds by each number of workers in turn."""
    os.environ.update({"AIVO_ENGINE_THREADS": "1", "OMP_NUM_THREADS": "1"})
    installation.opened(folder)
    installation.use_engine("cohort")
    from aivo_site.jobs.services import run_inline
    from federation import engines

    warm = getattr(engines.get_engine("cohort"), "warm_up", None)
    if warm is not None:
        warm()
    run_inline(kind="train_learner_models", params={})
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _repeat in range(repeats):
        for number in numbers:
            with workers(number):
                found[str(number)].append(_round())
    return dict(found)


@contextmanager
def workers(number: int) -> Iterator[None]:
    """So many living workers of the training queue, of which nothing is left afterwards."""
    from aivo_site.jobs.models import WorkerHeartbeat

    WorkerHeartbeat.objects.all().delete()
    with ExitStack() as stack:
        for _worker in range(number):
            stack.enter_context(_worker_process())
        _until(lambda: WorkerHeartbeat.objects.filter(queue="training").count() == number)
        yield


@contextmanager
def _worker_process() -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "manage.py", "worker", "--queue", "training"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _round() -> dict[str, Any]:
    from aivo_site.jobs.models import TERMINAL_JOB_STATES
    from aivo_site.jobs.services import enqueue
    from aivo_site.jobs.shard_helpers import HELPER_KIND

    job = enqueue(kind="run_federated_aggregation", params={"rebase": False})

    def ended() -> bool:
        job.refresh_from_db()
        return job.state in TERMINAL_JOB_STATES

    _until(ended)
    if job.result is None or "round" not in job.result:
        raise RuntimeError(f"the round failed: {job.error_message}")
    spans = {name: list(job.shards.filter(phase__startswith=f"{name}:")) for name in PHASES}
    trained = spans["train"]
    helped = sum(shard.size for shard in trained if shard.worker_job is not None and shard.worker_job.kind == HELPER_KIND)
    return {
        "wall_s": (job.finished_at - job.started_at).total_seconds(),  # type: ignore[operator, unused-ignore]
        "helped_share": helped / max(1, sum(shard.size for shard in trained)),
        **{name: _span(shards) for name, shards in spans.items()},
    }


def _span(shards: list[Any]) -> float:
    """Seconds from planning to the last end; 0 where the phase was not cut into shards."""
    if not shards:
        return 0.0
    return float((max(shard.updated_at for shard in shards) - min(shard.created_at for shard in shards)).total_seconds())


def _until(condition: Any) -> None:
    end = time.monotonic() + _LONGEST_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError("the workers did not do it in time")
        time.sleep(0.1)


BENCHMARK = Benchmark(name="shared_round", description=__doc__, run=run, add_arguments=add_arguments)

if __name__ == "__main__":
    BENCHMARK.main()
