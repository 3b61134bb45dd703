"""Memory and speed of local training through Keras, many learners in one process.

    python -m benchmarks.keras_memory --learners 300 --json

Prints the slope of the resident set over learners after a warm-up (least squares, MB per learner) and learners per second
of wall time and of CPU time. Features and labels are random: speed and memory do not depend on what is learnt.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from aivo_core.engine.contract import LocalTrainingConfig
from aivo_core.network import NetworkSpec
from benchmarks.harness import Benchmark, Report, Table, resident_mb
from benchmarks.synthetic import sample_pool, tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--learners", type=int, default=300, help="learners after the warm-up")
    parser.add_argument("--warm-up", type=int, default=20, help="learners before measuring starts")
    parser.add_argument("--samples", type=int, default=100, help="samples per learner")
    parser.add_argument("--adaptation", default="tail", choices=("tail", "difficulty_bias", "tail_then_bias"))


def run(options: argparse.Namespace) -> Report:
    if min(options.learners, options.samples) < 2 or options.warm_up < 1:
        raise SystemExit("--learners and --samples must be at least 2, --warm-up at least 1")
    figures = measure(learners=options.learners, warm_up=options.warm_up, samples=options.samples, adaptation=options.adaptation)
    table = Table(
        "Local training through Keras, one process",
        ("figure", "value"),
        [(name, value) for name, value in figures.items() if name != "medians"],
    )
    return Report(figures=figures, tables=[table], packages=("tensorflow", "keras"))


def measure(*, learners: int, warm_up: int, samples: int, adaptation: str = "tail") -> dict[str, Any]:
    """Train ``warm_up`` and then ``learners`` learners of ``samples`` samples, 5 epochs each; figures by name."""
    from federation.keras_engine import KerasEngine
    from models_store.keras_network import build_network, read_weights

    spec = NetworkSpec()
    weights = read_weights(build_network(spec, 0), spec)
    pool = sample_pool(spec, learners=learners + warm_up, samples=samples)
    tail = spec.flatten_tail(weights)
    engine = KerasEngine()
    config = LocalTrainingConfig(adaptation=adaptation)
    results = engine.train(spec=spec, weights=weights, config=config, tasks=tasks(tail, pool, learners + warm_up))
    for _ in range(warm_up):
        _check(next(results).error_code)
    resident = [resident_mb()]
    wall, cpu = time.perf_counter(), time.process_time()
    for result in results:
        _check(result.error_code)
        resident.append(resident_mb())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "engine": engine.name,
        "backend": engine.backend,
        "adaptation": adaptation,
        "learners": learners,
        "samples": samples,
        "epochs": config.epochs,
        "rss_slope_mb_per_learner": round(float(np.polyfit(np.arange(len(resident)), resident, 1)[0]), 5),
        "rss_start_mb": round(resident[0], 1),
        "rss_end_mb": round(resident[-1], 1),
        "medians": {"learner_ms": round(1000 * wall / learners, 3)},
        "learners_per_second": round(learners / wall, 2),
        "learners_per_cpu_second": round(learners / cpu, 2),
    }


def _check(error_code: str) -> None:
    if error_code:
        raise RuntimeError(f"a learner could not be trained: {error_code}")


BENCHMARK = Benchmark(name="keras_memory", description=__doc__, run=run, add_arguments=add_arguments)

if __name__ == "__main__":
    BENCHMARK.main()
