"""Recommendations through the whole service, against ``model.predict`` and a ``tf.function``; a batch against a memory pass.

    python -m benchmarks.serving [--full] [--json]

The service runs on a temporary SQLite installation whose learners all have tails of their own: one query, two forward passes
of five rows each (the row itself and without each feature group), explanation. ``model.predict`` and the ``tf.function`` compute
one forward pass of one row of the same network, in a process of their own. The batch is 1,000 tails with one row and two
passes each, the trunk included, against ``harness.memory_pass`` over the same bytes, and beside it the fastest way to read
them at all (``sum``).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from aivo_core.inference import FoldedTail, FoldedTrunk, HeadOutputs, fold_tail, fold_trunk, forward_each
from aivo_core.network import FloatArray, NetworkSpec
from benchmarks import installation
from benchmarks.harness import Benchmark, Report, Table, in_child, measure, memory_pass, ratio, rounded
from benchmarks.synthetic import random_weights

BATCH_TAILS = 1000
TAILS_AT_ONCE = 16
"""As many as the service computes together."""

PREDICTIONS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--learners", type=int, help="learners with tails of their own (200, or 1000 with --full)")
    parser.add_argument("--calls", type=int, help="warm calls (2000, or 10000 with --full)")


def run(options: argparse.Namespace) -> Report:
    learners = options.learners or (1000 if options.full else 200)
    calls = options.calls or (10_000 if options.full else 2000)
    with installation.temporary(installation.Size(federated=learners, epochs=1)) as folder:
        in_child("benchmarks.serving:give_tails", {"folder": folder})
        service = in_child("benchmarks.serving:serve", {"folder": folder, "calls": calls, "repeats": options.repeats}, threads=1)
    compute = in_child("benchmarks.serving:compute_batch", {"repeats": options.repeats}, threads=1)
    keras = in_child("benchmarks.serving:predict_with_keras", threads=1)
    figures: dict[str, Any] = {
        "learners": learners,
        "calls": calls,
        "service": {**service.result, "peak_rss_mb": service.peak_rss_mb},
        "batch_compute": {**compute.result, "peak_rss_mb": compute.peak_rss_mb},
        "keras": {**keras.result, "peak_rss_mb": keras.peak_rss_mb},
        "predict_over_service": ratio(keras.result["predict"]["p50_us"], service.result["warm"]["p50_us"]),
        "tf_function_over_service": ratio(keras.result["tf_function"]["p50_us"], service.result["warm"]["p50_us"]),
        "batch_over_memory_pass": ratio(compute.result["us_each"], compute.result["memory_pass_us_each"]),
    }
    return Report(figures=figures, tables=_tables(figures), packages=("tensorflow", "keras", "django"))


def give_tails(folder: str) -> dict[str, int]:
    """Give every clone another tail, served by itself, and let every learner's state be stored once. In a child process."""
    installation.opened(folder)
    from models_store.clones import base_of
    from models_store.cloning import save_tail
    from models_store.models import PersonalizedModel, ServingChoice
    from models_store.serving import recommend

    models = PersonalizedModel.objects.select_related("learner", "source_version")
    for number, model in enumerate(models):
        base = base_of(model)
        change = np.random.default_rng(number).normal(scale=0.01, size=base.tail.shape).astype(np.float32)
        save_tail(
            model=model,
            spec=base.spec,
            tail=base.tail + change,
            fields={"serving_choice": ServingChoice.BLEND, "blend": 0.5},
        )
        recommend(model.learner.learner_id)
    return {"models": len(models)}


def serve(folder: str, calls: int, repeats: int) -> dict[str, Any]:
    """The service's figures, in a child process that must stay without TensorFlow."""
    started = time.perf_counter()
    installation.opened(folder)
    from learners.models import Learner, Pool
    from models_store.serving import clear_serving_cache, recommend, recommend_many

    ids = list(Learner.objects.filter(pool=Pool.FEDERATED).values_list("learner_id", flat=True))
    opened = time.perf_counter()
    recommend(ids[0])
    first = time.perf_counter()
    cold = [_seconds(lambda learner_id=learner_id: recommend(learner_id)) for learner_id in ids[1:]]
    rng = np.random.default_rng(0)
    warm, warm_cpu = [], []
    for index in rng.integers(0, len(ids), calls):
        cpu = time.thread_time()
        warm.append(_seconds(lambda learner_id=ids[index]: recommend(learner_id)))
        warm_cpu.append(time.thread_time() - cpu)
    batch = measure(lambda: recommend_many(ids), repeats=repeats)
    cold_batch = measure(lambda: recommend_many(ids), repeats=repeats, before=clear_serving_cache)
    answers = recommend_many(ids)
    if any(getattr(answer, "served_by", None) is None or answer.served_by.choice != "BLEND" for answer in answers):  # type: ignore[union-attr]
        raise RuntimeError("not every learner was served by an own tail")
    if "tensorflow" in sys.modules or "keras" in sys.modules:
        raise RuntimeError("serving has loaded TensorFlow")
    return {
        "start_s": rounded(opened - started),
        "first_call_ms": rounded(1000 * (first - opened)),
        "cold": _quantiles(cold),
        "warm": _quantiles(warm),
        "warm_cpu": _quantiles(warm_cpu),
        "batch_us_each": rounded(1e6 * batch.wall / len(ids)),
        "cold_batch_us_each": rounded(1e6 * cold_batch.wall / len(ids)),
    }


def compute_batch(repeats: int) -> dict[str, Any]:
    """Forward passes of 1,000 learners, one row and two passes each, against one pass over their tails' memory."""
    spec = NetworkSpec()
    weights = random_weights(spec)
    trunk = fold_trunk(spec, weights)
    base = spec.flatten_tail(weights)
    tails = [fold_tail(spec, weights, base * np.float32(1 + seed / BATCH_TAILS)) for seed in range(BATCH_TAILS)]
    rows = np.random.default_rng(0).normal(size=(2, BATCH_TAILS, 1, spec.input_dim)).astype(np.float32)
    size = sum(tail.nbytes for tail in tails)
    both = measure(lambda: _two_passes(trunk, tails, rows), repeats=repeats)
    one = measure(lambda: _one_pass(trunk, tails, rows[0]), repeats=repeats)
    baseline = memory_pass(size, repeats=repeats)
    flat = np.ones(size // 4, dtype=np.float32)
    reading = measure(flat.sum, repeats=repeats)
    return {
        "tails": BATCH_TAILS,
        "bytes": size,
        "us_each": rounded(1e6 * both.wall / BATCH_TAILS),
        "one_pass_us_each": rounded(1e6 * one.wall / BATCH_TAILS),
        "memory_pass_us_each": rounded(1e6 * baseline.wall / BATCH_TAILS),
        "sum_us_each": rounded(1e6 * reading.wall / BATCH_TAILS),
        "over_sum": ratio(both.wall, reading.wall),
        "one_pass_over_sum": ratio(one.wall, reading.wall),
    }


def predict_with_keras() -> dict[str, Any]:
    """One row through ``model.predict`` and through a ``tf.function``; in a child process."""
    import tensorflow as tf

    from benchmarks.keras_baselines import limit_threads, plain_network

    limit_threads(1)
    spec = NetworkSpec()
    model = plain_network(spec)
    row = np.random.default_rng(0).normal(size=(1, spec.input_dim)).astype(np.float32)
    compiled = tf.function(lambda x: model(x, training=False), input_signature=[tf.TensorSpec((1, spec.input_dim), tf.float32)])

    def call_compiled() -> None:
        for output in compiled(tf.constant(row)).values():
            output.numpy()

    ways: dict[str, Callable[[], object]] = {"predict": lambda: model.predict(row, verbose=0), "tf_function": call_compiled}
    found = {}
    for name, way in ways.items():
        for _ in range(20):
            way()
        found[name] = _quantiles([_seconds(way) for _ in range(PREDICTIONS)])
    return found


def _one_pass(trunk: FoldedTrunk, tails: list[FoldedTail], rows: FloatArray) -> HeadOutputs:
    outputs = forward_each(tails, _activations(trunk, rows))
    return HeadOutputs(outputs.content, outputs.difficulty, outputs.path)


def _two_passes(trunk: FoldedTrunk, tails: list[FoldedTail], rows: FloatArray) -> list[FloatArray]:
    """The second pass of some learners directly after their first, so that a tail is read from memory once."""
    first, second = _activations(trunk, rows[0]), _activations(trunk, rows[1])
    found = []
    for start in range(0, len(tails), TAILS_AT_ONCE):
        part = slice(start, start + TAILS_AT_ONCE)
        outputs = forward_each(tails[part], first[part])
        found += [outputs.content, outputs.path, forward_each(tails[part], second[part]).difficulty]
    return found


def _activations(trunk: FoldedTrunk, rows: FloatArray) -> FloatArray:
    return trunk.activations(rows[:, 0])[:, None]


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _quantiles(seconds: list[float]) -> dict[str, float]:
    p50, p99 = 1e6 * np.quantile(seconds, (0.5, 0.99))
    return {"p50_us": rounded(p50), "p99_us": rounded(p99), "mean_us": rounded(1e6 * float(np.mean(seconds)))}


def _tables(figures: dict[str, Any]) -> list[Table]:
    service, keras, batch = figures["service"], figures["keras"], figures["batch_compute"]
    warm = service["warm"]["p50_us"]
    one = [
        (name, found["p50_us"], found["p99_us"], ratio(found["p50_us"], warm))
        for name, found in (
            ("service, warm", service["warm"]),
            ("service, warm, CPU time of the thread", service["warm_cpu"]),
            ("service, learner not in memory", service["cold"]),
            ("model.predict, one row, one pass", keras["predict"]),
            ("tf.function, one row, one pass", keras["tf_function"]),
        )
    ]
    pass_us = batch["memory_pass_us_each"]
    many = [
        (name, value, ratio(value, pass_us))
        for name, value in (
            ("one memory pass over the tails", pass_us),
            ("one sum over the tails", batch["sum_us_each"]),
            ("one forward pass, one row", batch["one_pass_us_each"]),
            ("both forward passes, one row", batch["us_each"]),
            ("service, warm: five rows, both passes", service["batch_us_each"]),
            ("service, no learner in memory", service["cold_batch_us_each"]),
        )
    ]
    return [
        Table("One recommendation", ("way", "p50 us", "p99 us", "times the service"), one),
        Table("Many at once", ("way", "us per learner", "times the memory pass"), many),
    ]


BENCHMARK = Benchmark(name="serving", description=__doc__, run=run, add_arguments=add_arguments)

if __name__ == "__main__":
    BENCHMARK.main()
