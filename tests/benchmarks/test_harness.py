"""The harness: what it measures, what a child gives back, what is printed."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from benchmarks import harness
from benchmarks.harness import Benchmark, Report, Table, in_child, measure, memory_pass


def test_measure_runs_warmups_and_repeats_and_tells_wall_from_cpu() -> None:
    calls: list[str] = []

    def rest() -> None:
        calls.append("run")
        time.sleep(0.02)

    timing = measure(rest, repeats=3, warmups=2, before=lambda: calls.append("before"))
    assert calls == ["before", "run"] * 5
    assert timing.repeats == 3
    assert timing.wall_lowest <= timing.wall <= timing.wall_highest
    assert timing.cpu < timing.wall  # asleep, not at work


def test_rates_are_per_wall_and_per_cpu_second() -> None:
    timing = harness.Timing(wall=2.0, cpu=4.0, wall_lowest=1.0, wall_highest=3.0, repeats=3)
    assert timing.rates(100) == {"per_second": 50.0, "per_cpu_second": 25.0}


def test_memory_pass_takes_at_least_one_row() -> None:
    assert memory_pass(1, repeats=1).wall > 0.0


def remember(size_mb: int) -> dict[str, Any]:
    """Called in a child process."""
    block = np.ones(size_mb * 2**20, dtype=np.uint8)
    return {"sum": int(block.sum()), "threads": os.environ["OMP_NUM_THREADS"], "extra": os.environ["AIVO_BENCH_TEST"]}


def fail() -> None:
    """Called in a child process."""
    raise ValueError("no such learner")


def test_a_child_gives_its_result_and_its_own_peak_memory() -> None:
    here = np.ones(300 * 2**20, dtype=np.uint8)  # the parent's memory must not count as the child's
    target = f"{__name__}:remember"
    child = in_child(target, {"size_mb": 64}, threads=1, environment={"AIVO_BENCH_TEST": "yes"})
    assert child.result == {"sum": 64 * 2**20, "threads": "1", "extra": "yes"}
    assert child.base_rss_mb + 60 < child.peak_rss_mb < 300
    assert here.nbytes == 300 * 2**20


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="no such learner"):
        in_child(f"{__name__}:fail")


def test_the_peak_can_be_counted_from_anew() -> None:
    block = np.ones(200 * 2**20, dtype=np.uint8)
    high = harness.peak_rss_mb()
    del block
    harness.reset_peak_rss()
    assert harness.peak_rss_mb() < high - 150


def run_nothing(options: argparse.Namespace) -> Report:
    figures: Mapping[str, Any] = {"medians": {"full": options.full}}
    return Report(
        figures=figures, tables=[Table("Nothing", ("what", "number"), [("one", 1234567), ("none", None)])], notes=["Done."]
    )


NOTHING = Benchmark(name="nothing", description="Nothing.", run=run_nothing)


def test_json_is_one_object_with_machine_and_versions(capsys: pytest.CaptureFixture[str]) -> None:
    NOTHING.main(["--json", "--full"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["benchmark"] == "nothing" and printed["size"] == "full" and printed["medians"] == {"full": True}
    assert set(printed["machine"]) == {"cpu", "cores", "memory_mb", "os"}
    assert {"python", "product", "numpy", "numba"} <= set(printed["versions"])


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    NOTHING.main([])
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index("Nothing") + 1 : lines.index("Nothing") + 5]
    assert table == ["what     number", "----  ---------", "one   1,234,567", "none          -"]
    assert lines[-1] == "Done."


@pytest.mark.parametrize("repeats", ["0", "-1", "many"])
def test_bad_repeats_are_refused(repeats: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        NOTHING.main(["--repeats", repeats])
    assert stopped.value.code == 2
    assert "--repeats" in capsys.readouterr().err
