"""Every benchmark runs in its smallest size and prints one JSON object with what it promises; no figure is judged."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from aivo_site.environment import BASE_DIR
from benchmarks.__main__ import MODULES


@dataclass(frozen=True)
class Smallest:
    """The options of a module's smallest run, and the keys it promises beside those of every benchmark."""

    options: str
    keys: frozenset[str]


ALWAYS = frozenset({"benchmark", "size", "seconds", "machine", "versions"})
SMALLEST = {
    "aggregation": Smallest("--deltas 70", frozenset({"numbers_each", "threads", "sizes", "microseconds_per_delta"})),
    "cloning": Smallest(
        "--learners 5", frozenset({"medians", "ms_each", "learners_per_second", "learners_per_cpu_second", "keras_over_product"})
    ),
    "serving": Smallest(
        "--learners 30 --calls 50", frozenset({"service", "keras", "predict_over_service", "batch_over_memory_pass"})
    ),
    "encoding": Smallest("--learners 5", frozenset({"bulk", "histories", "database", "needed_rows_per_second"})),
    "main_training": Smallest("--samples 300 --epochs 2", frozenset({"medians", "settings", "hundred_epochs_s"})),
    "keras_memory": Smallest(
        "--learners 3 --warm-up 1 --samples 20", frozenset({"rss_slope_mb_per_learner", "learners_per_cpu_second"})
    ),
    "local_training": Smallest(
        "--learners 3 --naive-learners 1 --no-cold --growth 3 --objectives first_pass --threads 1",
        frozenset({"medians", "engines", "engines_first_pass", "settings", "ratios", "gemm_limit", "startup", "growth"}),
    ),
    "private_training": Smallest(
        "--learners 2 --samples 20",
        frozenset({"medians", "settings", "private_over_plain", "noise_ms_per_step", "system_noise_ms_per_step"}),
    ),
    "whole_round": Smallest(
        "--learners 20 --engine cohort",
        frozenset({"medians", "steps", "shares", "states", "personal_training", "rebase", "peak_rss_mb"}),
    ),
    "shared_round": Smallest(
        "--learners 20", frozenset({"medians", "workers", "times_as_fast", "training_times_as_fast", "helped_share"})
    ),
    "privacy_audit": Smallest("--releases 60 --tail-releases 4", frozenset({"delta", "confidence", "rows", "not_as_expected"})),
    "privacy_utility": Smallest(
        "--learners 20", frozenset({"learners", "numbers", "norms", "plain_mean", "noise_alone", "evaluation_learners", "best"})
    ),
}


@functools.cache
def run(name: str) -> dict[str, Any]:
    """The object that a benchmark printed."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", "--repeats", "1", *SMALLEST[name].options.split()]
    done = subprocess.run(command, cwd=BASE_DIR, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_benchmark_is_run_by_make_bench_and_here() -> None:
    found = {path.stem for path in (BASE_DIR / "benchmarks").glob("*.py") if "BENCHMARK.main()" in path.read_text()}
    assert found - {"harness"} == set(MODULES) == set(SMALLEST)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_prints_one_object_with_the_promised_keys(name: str) -> None:
    printed = run(name)
    assert ALWAYS | SMALLEST[name].keys <= set(printed)
    assert printed["benchmark"] == name and printed["size"] == "quick"


@pytest.mark.slow
def test_engines_of_local_training_have_the_promised_figures() -> None:
    engines = run("local_training")["engines"]
    assert {"naive_keras", "keras_resident", "numpy", "cohort"} <= set(engines)
    for figures in engines.values():
        promised = {"learners_per_second", "learners_per_cpu_second", "gemm_limit_share", "peak_rss_mb", "startup_s"}
        assert promised <= set(figures)
