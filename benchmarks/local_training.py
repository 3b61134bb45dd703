"""Local training: learners per second of the product's engines against Keras as it is usually written.

    python -m benchmarks.local_training [--full] [--json]

Every learner has 100 samples and trains the default network's tail for 5 epochs in batches of 32, the first two blocks
frozen. Two tables:

``first_pass``  first-pass rows only, plain cross entropy on the three heads, so that the figures compare with other
                frameworks (``naive_keras``, ``keras_resident_fit``, ``keras_resident``: see ``benchmarks.keras_baselines``);
``product``     the product's own loss on both passes; ``keras_resident`` is here the engine ``keras``.

``numpy`` and ``cohort`` are the engine ``cohort`` on its NumPy and on its best backend. Each setting runs in a process of
its own: ``peak_rss_mb`` is that process's, ``startup_s`` runs from before the interpreter starts to the first delta (best
of the repeats; warm: whatever was compiled before is found; cold: the compiled code's cache is empty). BLAS runs on one
thread in the product's engines; ``threads`` are theirs, and TensorFlow's for Keras. ``gemm_limit_share`` is the time of
one learner's matrix products alone (``benchmarks.gemm_limit``) over the CPU time that one learner took.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import Benchmark, Report, in_child, ratio, rounded, usable_cores
from benchmarks.local_training_tables import tables

SAMPLES = 100
EPOCHS = 5
BATCH = 32
NAIVE_LEARNERS = 10
WARM_UP = 2

OBJECTIVES = ("first_pass", "product")
ENGINES: Mapping[str, tuple[str, ...]] = {
    "first_pass": ("naive_keras", "keras_resident_fit", "keras_resident", "numpy", "cohort"),
    "product": ("naive_keras", "keras_resident", "numpy", "cohort"),
}
SLOW = ("naive_keras", "keras_resident_fit")
COHORT_BACKENDS = {"numpy": "numpy", "cohort": "numba"}
COHORT_OBJECTIVES = {"first_pass": "first_pass_cross_entropy", "product": "product"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--learners", type=int, help="learners per run of the faster engines (20, or 100 with --full)")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES["first_pass"], default=list(ENGINES["first_pass"]))
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads (all cores; with --full also one)")
    parser.add_argument("--dropout", nargs="+", choices=("on", "off"), help="(on; with --full both)")
    parser.add_argument("--naive-learners", type=int, default=NAIVE_LEARNERS, help=f"learners of {' and '.join(SLOW)}")
    parser.add_argument("--cold", action=argparse.BooleanOptionalAction, default=True, help="measure cold starts, 25 s")
    parser.add_argument("--growth", type=int, nargs="*", help="learners of the growth table (100, 200; --full: 100, 1000, 10000)")


def run(options: argparse.Namespace) -> Report:
    learners = options.learners or (100 if options.full else 20)
    threads = options.threads or (sorted({1, usable_cores()}) if options.full else [usable_cores()])
    dropouts = options.dropout or (["on", "off"] if options.full else ["on"])
    growth = options.growth if options.growth is not None else ([100, 1000, 10_000] if options.full else [100, 200])
    limits = {objective: _limit(objective, options.repeats) for objective in options.objectives}
    settings = [
        _setting(objective, engine, count, dropout == "on", *_amount(engine, learners, options), limits[objective])
        for objective in options.objectives
        for dropout in dropouts
        for count in threads
        for engine in ENGINES[objective]
        if engine in options.engines
    ]
    startup = _startup(options.repeats, options.cold) if "cohort" in options.engines else None
    grown = [_grown(count, max(threads)) for count in growth] if "cohort" in options.engines else []
    main = {
        objective: _main_engines(settings, objective, max(threads), dropouts[0] == "on", startup)
        for objective in options.objectives
    }
    figures = {
        "samples": SAMPLES,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "learners": learners,
        "medians": {
            objective: {name: found["learner_ms"] for name, found in engines.items()} for objective, engines in main.items()
        },
        "engines": main[options.objectives[0]],
        **{f"engines_{objective}": engines for objective, engines in main.items()},
        "settings": settings,
        "ratios": [_ratio(settings, *key) for key in _compared(settings)],
        "gemm_limit": limits,
        "startup": startup,
        "growth": grown,
    }
    return Report(figures=figures, tables=tables(figures), packages=("scipy", "tensorflow", "keras"))


# --- Measuring, each setting in a child -----------------------------------------------------------------------------------


def _limit(objective: str, repeats: int) -> dict[str, Any]:
    arguments = {"objective": objective, "samples": SAMPLES, "epochs": EPOCHS, "batch_size": BATCH, "repeats": repeats}
    found = in_child("benchmarks.gemm_limit:limit_seconds", arguments, threads=1).result
    return {
        "learner_ms": rounded(1000 * found["seconds"]),
        "learners_per_cpu_second": rounded(1 / found["seconds"]),
        "gflop_per_learner": rounded(found["gflop"]),
        "gflop_per_second": rounded(found["gflop"] / found["seconds"]),
        "by_library_ms": {name: rounded(1000 * seconds) for name, seconds in found["by_library"].items()},
    }


def _setting(
    objective: str, engine: str, threads: int, dropout: bool, learners: int, repeats: int, limit: Mapping[str, Any]
) -> dict[str, Any]:
    arguments = {
        "objective": objective,
        "engine": engine,
        "threads": threads,
        "dropout": dropout,
        "learners": learners,
        "repeats": repeats,
    }
    blas = 1 if engine in COHORT_BACKENDS else threads
    child = in_child("benchmarks.local_training:train", arguments, threads=blas)
    wall, cpu = child.result["wall_s"], child.result["cpu_s"]
    return {
        **arguments,
        "backend": child.result["backend"],
        "learner_ms": rounded(1000 * wall),
        "learners_per_second": rounded(1 / wall),
        "learners_per_cpu_second": rounded(1 / cpu),
        "gemm_limit_share": rounded(limit["learner_ms"] / (1000 * cpu), 3),
        "peak_rss_mb": child.peak_rss_mb,
    }


def _amount(engine: str, learners: int, options: argparse.Namespace) -> tuple[int, int]:
    """Learners per run, and runs; the slow ones are timed learner by learner, in one run."""
    return (options.naive_learners, 1) if engine in SLOW else (learners, options.repeats)


def _startup(repeats: int, cold: bool) -> dict[str, Any]:
    """Seconds from before the interpreter to the first delta, and what the process then holds."""
    found: dict[str, Any] = {}
    _first_delta("numba", {})  # fills the cache that the warm runs find
    for name, backend in (("warm", "auto"), ("warm_compiled", "numba"), ("numpy", "numpy")):
        found[name] = min((_first_delta(backend, {}) for _ in range(repeats)), key=lambda run: run["startup_s"])
    for name, backend in (("cold", "auto"), ("cold_compiled", "numba")) if cold else ():
        with TemporaryDirectory(prefix="aivo-bench-") as empty:
            found[name] = _first_delta(backend, {"NUMBA_CACHE_DIR": empty})
    found["keras"] = _first_delta("keras", {})
    return found


def _first_delta(backend: str, environment: Mapping[str, str]) -> dict[str, Any]:
    target = "benchmarks.local_training:first_delta"
    child = in_child(target, {"backend": backend, "started": time.time()}, threads=1, environment=environment)
    return {**child.result, "peak_rss_mb": child.peak_rss_mb}


def _grown(learners: int, threads: int) -> dict[str, Any]:
    child = in_child("benchmarks.local_training:train_many", {"learners": learners, "threads": threads}, threads=1)
    wall, cpu = child.result["wall_s"], child.result["cpu_s"]
    return {
        "learners": learners,
        "threads": threads,
        "learners_per_second": rounded(learners / wall),
        "learners_per_cpu_second": rounded(learners / cpu),
        "peak_rss_mb": child.peak_rss_mb,
    }


# --- In the child processes -----------------------------------------------------------------------------------------------


def train(objective: str, engine: str, threads: int, dropout: bool, learners: int, repeats: int) -> dict[str, Any]:
    """Median wall and CPU seconds per learner."""
    if engine in COHORT_BACKENDS:
        return _train_on_engine(_cohort(COHORT_BACKENDS[engine], threads, objective), dropout, learners, repeats)
    if engine == "keras_resident" and objective == "product":
        from federation.keras_engine import KerasEngine

        return _train_on_engine(KerasEngine(threads=threads), dropout, learners, repeats)
    return _train_on_keras(objective, engine, threads, dropout, learners, repeats)


def train_many(learners: int, threads: int) -> dict[str, Any]:
    """The product's objective on so many learners in one call."""
    engine = _cohort(COHORT_BACKENDS["cohort"], threads, "product")
    _run(engine, learners=WARM_UP, dropout=True)
    wall, cpu = _run(engine, learners=learners, dropout=True)
    return {"wall_s": wall, "cpu_s": cpu}


def first_delta(backend: str, started: float) -> dict[str, Any]:
    """Import, build the engine and train one learner; ``started`` is when the interpreter was asked for."""
    if backend == "keras":
        from federation.keras_engine import KerasEngine

        engine: Any = KerasEngine()
    else:
        engine = _cohort(backend, 1, "product")
    used = _run_one(engine)
    return {"startup_s": rounded(time.time() - started), "backend": used}


def _cohort(backend: str, threads: int, objective: str) -> Any:
    from aivo_core.engine.cohort import CohortEngine

    return CohortEngine(threads=threads, backend=backend, objective=COHORT_OBJECTIVES[objective])


def _train_on_engine(engine: Any, dropout: bool, learners: int, repeats: int) -> dict[str, Any]:
    _run(engine, learners=WARM_UP, dropout=dropout)
    runs = [_run(engine, learners=learners, dropout=dropout) for _ in range(repeats)]
    return {
        "wall_s": statistics.median(wall for wall, _ in runs) / learners,
        "cpu_s": statistics.median(cpu for _, cpu in runs) / learners,
        "backend": engine.backend,
    }


def _train_on_keras(objective: str, engine: str, threads: int, dropout: bool, learners: int, repeats: int) -> dict[str, Any]:
    from aivo_core.network import NetworkSpec
    from benchmarks import keras_baselines
    from benchmarks.harness import versions
    from benchmarks.synthetic import sample_pool

    keras_baselines.limit_threads(threads)
    spec = NetworkSpec() if dropout else NetworkSpec(dropout_rates=(0.0,) * 4)
    pool = sample_pool(spec, learners=learners, samples=SAMPLES)
    if engine == "naive_keras":
        train = keras_baselines.naive_trainer(spec, objective)
    elif engine == "keras_resident_fit":
        train = keras_baselines.resident_fit_trainer(spec, objective)
    else:
        train = keras_baselines.resident_trainer(spec)
    keras_baselines.timed(train, pool, WARM_UP)
    timings = keras_baselines.timed(train, pool, learners * repeats)
    return {
        "wall_s": statistics.median(wall for wall, _ in timings),
        "cpu_s": statistics.median(cpu for _, cpu in timings),
        "backend": f"tensorflow {versions('tensorflow')['tensorflow']}",
    }


def _run(engine: Any, *, learners: int, dropout: bool) -> tuple[float, float]:
    """Wall and CPU seconds of training ``learners`` learners; their samples are there before, and used in turn."""
    from aivo_core.engine.contract import LocalTrainingConfig
    from aivo_core.network import NetworkSpec
    from benchmarks.synthetic import random_weights, sample_pool, tasks

    spec = NetworkSpec()
    weights = random_weights(spec)
    tail = spec.flatten_tail(weights)
    pool = sample_pool(spec, learners=learners, samples=SAMPLES)
    config = LocalTrainingConfig(epochs=EPOCHS, batch_size=BATCH, adaptation="tail", dropout=dropout)
    wall, cpu = time.perf_counter(), time.process_time()
    trained = 0
    for result in engine.train(spec=spec, weights=weights, config=config, tasks=tasks(tail, pool, learners)):
        if result.error_code:
            raise RuntimeError(f"a learner could not be trained: {result.error_code}: {result.error_message}")
        trained += 1
    if trained != learners:
        raise RuntimeError(f"{trained} of {learners} learners were trained")
    return time.perf_counter() - wall, time.process_time() - cpu


def _run_one(engine: Any) -> str:
    _run(engine, learners=1, dropout=True)
    return str(engine.backend)


# --- Figures and tables ---------------------------------------------------------------------------------------------------


def _main_engines(
    settings: list[dict[str, Any]], objective: str, threads: int, dropout: bool, startup: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """The promised figures by engine, on all threads, with dropout where it was measured."""
    starts = {"cohort": "warm", "numpy": "numpy", "keras_resident": "keras"} if startup is not None else {}
    names = ("learner_ms", "learners_per_second", "learners_per_cpu_second", "gemm_limit_share", "peak_rss_mb")
    return {
        row["engine"]: {
            **{name: row[name] for name in names},
            "startup_s": startup[starts[row["engine"]]]["startup_s"] if startup and row["engine"] in starts else None,
        }
        for row in settings
        if (row["objective"], row["threads"], row["dropout"]) == (objective, threads, dropout)
    }


def _compared(settings: list[dict[str, Any]]) -> list[tuple[str, int, bool]]:
    """Settings in which both ends of the comparison were measured."""
    by_key: dict[tuple[str, int, bool], set[str]] = {}
    for row in settings:
        by_key.setdefault((row["objective"], row["threads"], row["dropout"]), set()).add(row["engine"])
    return [key for key, engines in by_key.items() if {"naive_keras", "cohort"} <= engines]


def _ratio(settings: list[dict[str, Any]], objective: str, threads: int, dropout: bool) -> dict[str, Any]:
    rates = {
        row["engine"]: row["learners_per_second"]
        for row in settings
        if (row["objective"], row["threads"], row["dropout"]) == (objective, threads, dropout)
    }
    return {
        "objective": objective,
        "threads": threads,
        "dropout": dropout,
        "cohort_over_naive_keras": ratio(rates["cohort"], rates["naive_keras"]),
        **{f"cohort_over_{name}": ratio(rates["cohort"], rates[name]) for name in ("keras_resident", "numpy") if name in rates},
    }


BENCHMARK = Benchmark(name="local_training", description=__doc__, run=run, add_arguments=add_arguments)

if __name__ == "__main__":
    BENCHMARK.main()
