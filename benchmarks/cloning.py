"""Cloning: a copy of the main version for every learner, rows and files together, against a Keras ``clone_model``.

    python -m benchmarks.cloning [--full] [--json]

Each run clones onto a fresh copy of a temporary installation (SQLite, files synchronised to disk). The baseline is what a
copy costs as the original made it: ``keras.models.clone_model``, ``set_weights`` and ``save`` of the whole network.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import installation
from benchmarks.harness import Benchmark, Report, Table, in_child, ratio, rounded

KERAS_CLONES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--learners", type=int, help="learners to clone for (100, or 1000 with --full)")


def run(options: argparse.Namespace) -> Report:
    learners = options.learners or (1000 if options.full else 100)
    runs = []
    with installation.temporary(installation.Size(federated=learners, epochs=1), clones=False) as folder:
        for _ in range(options.repeats):
            with TemporaryDirectory(prefix="aivo-bench-") as copy:
                shutil.copytree(folder, copy, dirs_exist_ok=True)
                runs.append(in_child("benchmarks.cloning:clone_all", {"folder": copy}, threads=1))
    keras = in_child("benchmarks.cloning:clone_with_keras", threads=1)
    wall = statistics.median(run.result["wall_s"] for run in runs)
    cpu = statistics.median(run.result["cpu_s"] for run in runs)
    keras_wall = keras.result["seconds_each"]
    figures: dict[str, Any] = {
        "learners": learners,
        "medians": {"wall_s": rounded(wall), "cpu_s": rounded(cpu), "repeats": options.repeats},
        "ms_each": rounded(1000 * wall / learners),
        "learners_per_second": rounded(learners / wall),
        "learners_per_cpu_second": rounded(learners / cpu),
        "bytes_each": runs[0].result["bytes_each"],
        "peak_rss_mb": max(run.peak_rss_mb for run in runs),
        "keras_clone_and_save": {
            "ms_each": rounded(1000 * keras_wall),
            "bytes_each": keras.result["bytes_each"],
            "clones": KERAS_CLONES,
            "peak_rss_mb": keras.peak_rss_mb,
        },
        "keras_over_product": ratio(keras_wall, wall / learners),
    }
    rows = [
        ("product: tail, row, audit", learners, 1000 * wall / learners, figures["bytes_each"], figures["peak_rss_mb"], None),
        (
            "Keras: clone_model and save",
            KERAS_CLONES,
            1000 * keras_wall,
            keras.result["bytes_each"],
            keras.peak_rss_mb,
            figures["keras_over_product"],
        ),
    ]
    headers = ("way", "learners", "ms each", "bytes each", "peak MB", "times the product")
    return Report(figures=figures, tables=[Table("Cloning", headers, rows)], packages=("tensorflow", "keras", "django"))


def clone_all(folder: str) -> dict[str, float]:
    """Clone for every federated learner of the installation; in a child process."""
    installation.opened(folder)
    from learners.models import Learner, Pool
    from models_store.cloning import clone_learners
    from models_store.models import PersonalizedModel

    learners = Learner.objects.filter(pool=Pool.FEDERATED)
    wall, cpu = time.perf_counter(), time.process_time()
    report = clone_learners(learners=learners, actor="benchmark")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    expected = learners.count()
    if report.cloned != expected or PersonalizedModel.objects.count() != expected:
        raise RuntimeError(f"{report.cloned} of {expected} learners were cloned: {report.to_json()}")
    sizes = [path.stat().st_size for path in (Path(folder) / "learners").rglob("*.safetensors")]
    return {"wall_s": wall, "cpu_s": cpu, "bytes_each": sum(sizes) // len(sizes)}


def clone_with_keras() -> dict[str, float]:
    """Copy and save the whole network ``KERAS_CLONES`` times; in a child process."""
    import keras

    from aivo_core.network import NetworkSpec
    from benchmarks.keras_baselines import limit_threads, plain_network

    limit_threads(1)
    base = plain_network(NetworkSpec())
    seconds, sizes = [], []
    with TemporaryDirectory(prefix="aivo-bench-") as folder:
        for number in range(KERAS_CLONES + 1):
            path = Path(folder) / f"{number}.keras"
            started = time.perf_counter()
            model = keras.models.clone_model(base)
            model.set_weights(base.get_weights())
            model.save(path)
            seconds.append(time.perf_counter() - started)
            sizes.append(path.stat().st_size)
    return {"seconds_each": statistics.median(seconds[1:]), "bytes_each": sizes[0]}


BENCHMARK = Benchmark(name="cloning", description=__doc__, run=run, add_arguments=add_arguments)

if __name__ == "__main__":
    BENCHMARK.main()
