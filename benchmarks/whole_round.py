"""A whole federated round: select, train, intake, aggregate, gate, publish, promote; and what comes before and after it.

    python -m benchmarks.whole_round [--full] [--json] [--engine cohort] [--profile]

Learners are simulated and imported into a temporary installation (SQLite, files synchronised to disk), with 100 training
samples each, a main version trained for a few epochs, and copies that were trained once, all through the product's own
services. Then rounds run through ``federation.rounds.service`` in one process, as the command runs them. The time of each
step is its wall time in the round; ``personal_training`` is the learners' own training before it, ``rebase`` the move of
all copies to the promoted version after it. With ``--repeats`` above 1, later rounds start from what the first promoted.

``--profile`` also prints where one round's time goes, function by function (which slows it down).
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks import installation
from benchmarks.harness import Benchmark, ChildRun, Report, Table, in_child, rounded, share, usable_cores

PARTS = {
    "gate": ("federation.rounds.evidence", "run_gate"),
    "publish": ("federation.rounds.candidate", "publish_candidate"),
    "promote": ("federation.rounds.promotion", "promote_round"),
}
"""Parts of the step EVALUATING and where they are."""

STEPS = ("select", "train", "intake", "aggregate", "gate", "publish", "promote", "rest")
PROFILE_LINES = 45


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--learners", type=int, help="learners of the round (64, or 1000 with --full)")
    parser.add_argument("--engine", default="cohort", help="engine of local training")
    parser.add_argument("--profile", action="store_true", help="print a profile of one round to standard error")


def run(options: argparse.Namespace) -> Report:
    learners = options.learners or (1000 if options.full else 64)
    if learners < 20:
        raise SystemExit("--learners must be at least 20: a round needs some")
    arguments = {"engine": options.engine, "rounds": options.repeats, "profile": options.profile}
    with installation.temporary(installation.Size(federated=learners)) as folder:
        child = in_child("benchmarks.whole_round:rounds", {"folder": folder, **arguments})
    found = child.result
    if options.profile:
        print(found["profile"], file=sys.stderr)
    figures = _figures(learners, found, child)
    wall = figures["medians"]["wall_s"]
    rows = [
        (name, figures["steps"][name]["wall_s"], share(figures["steps"][name]["wall_s"], wall), figures["steps"][name]["queries"])
        for name in STEPS
    ]
    rows.append(("whole round", wall, share(wall, wall), sum(row[3] for row in rows)))
    beside = [
        (name, figures[name]["wall_s"], figures[name]["cpu_s"], learners / figures[name]["wall_s"], figures[name]["queries"])
        for name in ("personal_training", "round", "rebase")
        if figures[name] is not None
    ]
    return Report(
        figures=figures,
        tables=[
            Table(f"A round of {learners} learners, engine {figures['backend']}", ("step", "wall s", "share", "queries"), rows),
            Table("Before and after", ("what", "wall s", "CPU s", "learners/s", "queries"), beside),
        ],
        notes=[_note(figures)],
        packages=("django", "scipy"),
    )


def _note(figures: Mapping[str, Any]) -> str:
    ended = "; ".join(f"{state}: {reason}" for state, reason in zip(figures["states"], figures["reasons"], strict=True))
    return f"{ended}. Peak memory of the process: {figures['peak_rss_mb']} MB."


def _figures(learners: int, found: Mapping[str, Any], child: ChildRun) -> dict[str, Any]:
    runs = found["rounds"]
    wall, cpu = (statistics.median(run[name] for run in runs) for name in ("wall_s", "cpu_s"))
    steps = {
        name: {
            "wall_s": rounded(statistics.median(run["steps"].get(name, 0.0) for run in runs)),
            "queries": int(statistics.median(run["queries"].get(name, 0) for run in runs)),
        }
        for name in STEPS
    }
    return {
        "learners": learners,
        "samples_each": found["samples_each"],
        "cores": usable_cores(),
        "backend": found["backend"],
        "medians": {"wall_s": rounded(wall), "cpu_s": rounded(cpu), "rounds": len(runs)},
        "learners_per_second": rounded(learners / wall),
        "learners_per_cpu_second": rounded(learners / cpu),
        "steps": steps,
        "shares": {name: rounded(steps[name]["wall_s"] / wall, 3) for name in STEPS},
        "round": {"wall_s": rounded(wall), "cpu_s": rounded(cpu), "queries": sum(step["queries"] for step in steps.values())},
        "personal_training": found["personal_training"],
        "rebase": found["rebase"],
        "states": [run["state"] for run in runs],
        "reasons": [run["reason"] for run in runs],
        "peak_rss_mb": child.peak_rss_mb,
    }


# --- In the child process -------------------------------------------------------------------------------------------------


def rounds(folder: str, engine: str, rounds: int, profile: bool) -> dict[str, Any]:
    """Train the copies once, run the rounds, move the copies after the last promotion; in a child process."""
    installation.opened(folder)
    installation.use_engine(engine)
    from federation import engines
    from federation.rounds import service
    from models_store import versions

    warm = getattr(engines.get_engine(engine), "warm_up", None)
    if warm is not None:
        warm()
    personal = _personal_training()
    base = versions.active_version()
    runs = [_round() for _ in range(rounds)]
    promoted = versions.active_version()
    rebase = None
    if promoted != base:
        clock = Clock()
        with clock.part("rebase"):
            service.rebase_if_active(promoted)
        rebase = clock.only("rebase")
    return {
        "rounds": runs,
        "rebase": rebase,
        "personal_training": personal,
        "profile": _profile() if profile else None,
        **_trained(),
    }


@dataclass
class Clock:
    """Wall seconds, CPU seconds and database queries by part; a part inside another one counts for itself only."""

    walls: Counter[str] = field(default_factory=Counter)  # type: ignore[type-arg, unused-ignore]
    cpus: Counter[str] = field(default_factory=Counter)
    queries: Counter[str] = field(default_factory=Counter)
    _stack: list[str] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        from django.db import connection

        started, cpu = time.perf_counter(), time.process_time()
        outer = self._stack[-1] if self._stack else None
        self._stack.append(name)
        try:
            if outer is None:
                with connection.execute_wrapper(self._count):
                    yield
            else:
                yield
        finally:
            self._stack.pop()
            for counter, spent in ((self.walls, time.perf_counter() - started), (self.cpus, time.process_time() - cpu)):
                counter[name] += spent  # type: ignore[assignment, unused-ignore]
                if outer is not None:
                    counter[outer] -= spent  # type: ignore[assignment, unused-ignore]

    def _count(self, execute: Any, sql: Any, params: Any, many: Any, context: Any) -> Any:
        self.queries[self._stack[-1]] += 1
        return execute(sql, params, many, context)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        return call

    def only(self, name: str) -> dict[str, Any]:
        return {"wall_s": rounded(self.walls[name]), "cpu_s": rounded(self.cpus[name]), "queries": self.queries[name]}


@contextmanager
def _watched(clock: Clock) -> Iterator[None]:
    """Let a round's steps and parts report to ``clock``."""
    import importlib

    from federation.rounds import running

    names = {"SELECTING": "select", "TRAINING": "train", "INTAKE": "intake", "AGGREGATING": "aggregate", "EVALUATING": "rest"}
    steps = dict(running.STEPS)
    parts = {name: (importlib.import_module(module), function) for name, (module, function) in PARTS.items()}
    originals = {name: getattr(module, function) for name, (module, function) in parts.items()}
    running.STEPS.update({state: clock.timed(names[str(state)], step) for state, step in steps.items()})
    for name, (module, function) in parts.items():
        setattr(module, function, clock.timed(name, originals[name]))
    try:
        yield
    finally:
        running.STEPS.update(steps)
        for name, (module, function) in parts.items():
            setattr(module, function, originals[name])


def _round() -> dict[str, Any]:
    from federation.rounds import service

    clock = Clock()
    with _watched(clock), clock.part("rest"):
        result = service.aggregate(with_rebase=False)
    return {
        "state": result["state"],
        "reason": result["reason"],
        "wall_s": sum(clock.walls.values()),
        "cpu_s": sum(clock.cpus.values()),
        "steps": dict(clock.walls),
        "queries": dict(clock.queries),
    }


def _personal_training() -> dict[str, Any]:
    """Every learner's own copy trained once; a round takes only learners who have trained."""
    from aivo_site.jobs.services import run_inline

    clock = Clock()
    with clock.part("personal_training"):
        result = run_inline(kind="train_learner_models", params={}).result or {}
    if result["failed"] or not result["trained"]:
        raise RuntimeError(f"the learners' own training failed: {result}")
    return clock.only("personal_training")


def _trained() -> dict[str, Any]:
    from federation.models import ModelTrainingSession, SessionPurpose

    session = ModelTrainingSession.objects.filter(purpose=SessionPurpose.CONTRIBUTION).order_by("created_at").last()
    if session is None:
        raise RuntimeError("no round trained anything")
    return {"samples_each": session.samples, "backend": f"{session.engine} ({session.backend})"}


def _profile() -> str:
    from federation.rounds import service

    profiler = cProfile.Profile()
    profiler.runcall(service.aggregate, with_rebase=False)
    text = io.StringIO()
    statistics_ = pstats.Stats(profiler, stream=text).strip_dirs()
    statistics_.sort_stats("cumulative").print_stats(PROFILE_LINES)
    statistics_.sort_stats("tottime").print_stats(PROFILE_LINES)
    return text.getvalue()


BENCHMARK = Benchmark(name="whole_round", description=__doc__, run=run, add_arguments=add_arguments)

if __name__ == "__main__":
    BENCHMARK.main()
