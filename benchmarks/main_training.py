"""Training of the main model: epoch time and samples per second against a plain Keras ``fit`` of the same network and data.

    python -m benchmarks.main_training [--full] [--json]

Both train every layer on both rows of each sample with the same losses, loss weights and batch size, and evaluate on
validation samples after each epoch. After each epoch the product's training also copies all of its state out of Keras, as a
checkpoint needs it. The first epoch, which traces the functions, is told apart from the later ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.harness import Benchmark, Report, Table, in_child, ratio, rounded, usable_cores

BATCH_ROWS = 512
VALIDATION_SHARE = 10
"""A tenth as many samples validate."""

WAYS = {"product": "MainModelTrainer", "keras_fit": "plain Keras fit"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, help="training samples (2000, or 10000 with --full)")
    parser.add_argument("--epochs", type=int, default=4, help="epochs, of which the first is the warm-up")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads (all cores; with --full also one)")


def run(options: argparse.Namespace) -> Report:
    samples = options.samples or (10_000 if options.full else 2000)
    threads = options.threads or sorted({1, usable_cores()} if options.full else {usable_cores()})
    if options.epochs < 2:
        raise SystemExit("--epochs must be at least 2")
    settings = []
    for count in threads:
        found = {way: _measured(way, samples, options.epochs, count) for way in WAYS}
        found["product"]["over_keras_fit"] = ratio(
            found["product"]["samples_per_second"], found["keras_fit"]["samples_per_second"]
        )
        settings.append({"threads": count, **found})
    last = settings[-1]
    figures = {
        "samples": samples,
        "batch_rows": BATCH_ROWS,
        "medians": {way: last[way]["epoch_s"] for way in WAYS},
        "settings": settings,
        "hundred_epochs_s": rounded(100 * last["product"]["epoch_s"]),
    }
    rows = [
        (
            WAYS[way],
            setting["threads"],
            setting[way]["epoch_s"],
            setting[way]["first_epoch_s"],
            setting[way]["samples_per_second"],
            setting[way]["samples_per_cpu_second"],
            setting[way]["peak_rss_mb"],
        )
        for setting in settings
        for way in WAYS
    ]
    headers = ("way", "threads", "epoch s", "first epoch s", "samples/s", "samples/CPU s", "peak MB")
    table = Table(f"Main training: {samples} samples, both passes, {BATCH_ROWS} rows a batch", headers, rows)
    return Report(figures=figures, tables=[table], packages=("tensorflow", "keras"))


def train_product(samples: int, epochs: int, threads: int) -> dict[str, float]:
    """Wall and CPU seconds of each epoch through ``MainModelTrainer``; in a child process."""
    from models_store.training import MainModelTrainer, TrainingData

    trainer = MainModelTrainer(epochs=epochs, batch_size=BATCH_ROWS, patience=epochs, threads=threads)
    ends = _Ends()
    trainer.train(TrainingData(*_data(samples)), on_epoch=lambda _record: ends.mark())
    return ends.figures()


def train_with_fit(samples: int, epochs: int, threads: int) -> dict[str, float]:
    """Wall and CPU seconds of each epoch through ``Model.fit``; in a child process."""
    import keras

    from aivo_core.network import CONTENT_HEAD, DIFFICULTY_HEAD, PATH_HEAD, NetworkSpec
    from benchmarks.keras_baselines import both_passes, limit_threads, ordinal_loss, plain_network

    limit_threads(threads)
    model = plain_network(NetworkSpec(freeze_layers=()))
    cross_entropy = "sparse_categorical_crossentropy"
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss={CONTENT_HEAD: cross_entropy, DIFFICULTY_HEAD: ordinal_loss, PATH_HEAD: cross_entropy},
        loss_weights={CONTENT_HEAD: 1.0, DIFFICULTY_HEAD: 2.0, PATH_HEAD: 1.0},
    )
    training, validation = _data(samples)
    rows, labels, weights = both_passes(training)
    ends = _Ends()
    model.fit(
        rows,
        labels,
        sample_weight=weights,
        validation_data=both_passes(validation),
        validation_batch_size=2048,
        epochs=epochs,
        batch_size=BATCH_ROWS,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=lambda _epoch, _logs: ends.mark())],
    )
    return ends.figures()


class _Ends:
    """When epochs ended."""

    def __init__(self) -> None:
        self._marks = [(time.perf_counter(), time.process_time())]

    def mark(self) -> None:
        self._marks.append((time.perf_counter(), time.process_time()))

    def figures(self) -> dict[str, float]:
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        walls = [after[0] - before[0] for before, after in pairs]
        cpus = [after[1] - before[1] for before, after in pairs]
        return {
            "first_epoch_s": walls[0],
            "epoch_s": statistics.median(walls[1:]),
            "epoch_cpu_s": statistics.median(cpus[1:]),
        }


def _data(samples: int) -> tuple[Any, Any]:
    from aivo_core.network import NetworkSpec
    from benchmarks.synthetic import random_samples

    spec = NetworkSpec()
    return (
        random_samples(spec, samples=samples, seed=1),
        random_samples(spec, samples=max(2, samples // VALIDATION_SHARE), seed=2),
    )


def _measured(way: str, samples: int, epochs: int, threads: int) -> dict[str, float]:
    function = {"product": "train_product", "keras_fit": "train_with_fit"}[way]
    arguments = {"samples": samples, "epochs": epochs, "threads": threads}
    child = in_child(f"benchmarks.main_training:{function}", arguments, threads=threads)
    found = child.result
    return {
        **{name: rounded(value) for name, value in found.items()},
        "samples_per_second": rounded(samples / found["epoch_s"]),
        "samples_per_cpu_second": rounded(samples / found["epoch_cpu_s"]),
        "peak_rss_mb": child.peak_rss_mb,
    }


BENCHMARK = Benchmark(name="main_training", description=__doc__, run=run, add_arguments=add_arguments)

if __name__ == "__main__":
    BENCHMARK.main()
