"""Private local training: what clipping each sample and drawing noise cost beside plain training on the same engine.

    python -m benchmarks.private_training [--full] [--json]

Learners with 100 samples (``--full``: also 20 and 1000) train the default network's tail for 5 epochs, batches of 32, with the
product's loss on both passes; private training expects as many samples in a batch and so takes as many steps, up to the last
batch of an epoch. Both run in turn in one process on one thread; figures are CPU time, medians of the repeats.
``private_over_plain`` is what must stay below 3 with Numba. ``noise_ms_per_step`` is one step's noise for the whole tail
alone, and ``system_noise_ms_per_step`` the same straight from the operating system's generator, as NumPy draws it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.harness import TAIL_NUMBERS, Benchmark, Report, Table, in_child, ratio, rounded

EPOCHS = 5
BATCH = 32
BACKENDS = ("numba", "numpy")
NOISE_DRAWS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--learners", type=int, help="learners per run (20, or 100 with --full)")
    parser.add_argument("--samples", type=int, nargs="+", help="training samples of a learner (100; with --full 20, 100, 1000)")


def run(options: argparse.Namespace) -> Report:
    learners = options.learners or (100 if options.full else 20)
    sizes = options.samples or ([20, 100, 1000] if options.full else [100])
    settings = [_setting(backend, samples, learners, options.repeats) for backend in BACKENDS for samples in sizes]
    noise = in_child("benchmarks.private_training:draw_noise", threads=1).result
    figures = {
        "learners": learners,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "settings": settings,
        "medians": {f"{row['backend']}_{row['samples']}": row["private_ms"] for row in settings},
        "private_over_plain": {f"{row['backend']}_{row['samples']}": row["private_over_plain"] for row in settings},
        **noise,
    }
    headers = ("backend", "samples", "steps", "plain ms", "private ms", "times plain", "private ms per step", "peak MB")
    names = ("backend", "samples", "steps", "plain_ms", "private_ms", "private_over_plain", "private_ms_per_step", "peak_rss_mb")
    rows = [tuple(row[name] for name in names) for row in settings]
    noises = [(name, value) for name, value in noise.items()]
    tables = [Table("One learner, CPU time", headers, rows), Table("Noise of one step", ("way", "ms"), noises)]
    return Report(figures=figures, tables=tables, packages=("scipy",))


def _setting(backend: str, samples: int, learners: int, repeats: int) -> dict[str, Any]:
    arguments = {"backend": backend, "samples": samples, "learners": learners, "repeats": repeats}
    child = in_child("benchmarks.private_training:train", arguments, threads=1)
    plain, private, steps = (child.result[name] for name in ("plain_s", "private_s", "steps"))
    return {
        **arguments,
        "steps": steps,
        "plain_ms": rounded(1000 * plain),
        "private_ms": rounded(1000 * private),
        "private_ms_per_step": rounded(1000 * private / steps),
        "private_over_plain": ratio(private, plain),
        "peak_rss_mb": child.peak_rss_mb,
    }


def train(backend: str, samples: int, learners: int, repeats: int) -> dict[str, Any]:
    """CPU seconds per learner of plain and of private training; in a child process."""
    from aivo_core.engine.cohort import CohortEngine
    from aivo_core.engine.contract import LocalTrainingConfig
    from aivo_core.network import NetworkSpec
    from benchmarks.synthetic import random_weights, sample_pool, tasks

    spec = NetworkSpec()
    weights = random_weights(spec)
    tail, pool = spec.flatten_tail(weights), sample_pool(spec, learners=learners, samples=samples)
    engine = CohortEngine(threads=1, backend=backend)
    plain = LocalTrainingConfig(epochs=EPOCHS, batch_size=BATCH, adaptation="tail")
    private = LocalTrainingConfig(
        epochs=EPOCHS, batch_size=BATCH, adaptation="tail", sample_clip_norm=1.0, sample_noise_multiplier=1.0
    )

    def timed(config: LocalTrainingConfig, count: int) -> tuple[float, int]:
        started = time.process_time()
        results = list(engine.train(spec=spec, weights=weights, config=config, tasks=tasks(tail, pool, count)))
        taken = time.process_time() - started
        failed = [result.error_message for result in results if result.error_code]
        if failed:
            raise RuntimeError(f"{len(failed)} learners could not be trained: {failed[0]}")
        return taken / count, results[0].steps

    for config in (plain, private):
        timed(config, 1)
    runs = [(timed(plain, learners), timed(private, learners)) for _ in range(repeats)]
    return {
        "plain_s": statistics.median(one[0] for one, _ in runs),
        "private_s": statistics.median(other[0] for _, other in runs),
        "steps": runs[0][1][1],
    }


def draw_noise() -> dict[str, float]:
    """Milliseconds for one step's noise; in a child process."""
    from aivo_core.engine.private import SystemChance
    from aivo_core.engine.private_kernel import ChaChaChance

    found = {}
    for name, chance in (("noise_ms_per_step", ChaChaChance()), ("system_noise_ms_per_step", SystemChance())):
        chance.noise(TAIL_NUMBERS, 1.0)
        started = time.process_time()
        for _ in range(NOISE_DRAWS):
            chance.noise(TAIL_NUMBERS, 1.0)
        found[name] = rounded(1000 * (time.process_time() - started) / NOISE_DRAWS)
    return found


BENCHMARK = Benchmark(name="private_training", description=__doc__, run=run, add_arguments=add_arguments)

if __name__ == "__main__":
    BENCHMARK.main()
