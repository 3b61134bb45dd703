"""Aggregation: 100, 1,000 and 10,000 delta files into one update, against one memory pass over the same bytes.

    python -m benchmarks.aggregation [--full] [--deltas 100 1000 10000] [--json]

The deltas are those of the default network, written through the store's own writer, one learner's folder each. Two
baselines, both on one thread: the *memory pass* adds rows that lie in memory already into a float64 accumulator; the
*file pass* opens each file, reads it from the page cache into one buffer and adds it the same way, checking nothing.
The aggregation does that and also verifies every file: path, header, sha256, finite numbers. A round's aggregation comes after
its intake, which has verified the files; the process then knows them, and sums no checksum again while they are unchanged.
Both are measured: *first reading*, and *after intake*.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import numpy as np

from benchmarks import installation
from benchmarks.harness import (
    TAIL_NUMBERS,
    Benchmark,
    Report,
    Table,
    in_child,
    measure,
    memory_pass,
    ratio,
    reset_peak_rss,
    resident_mb,
    rounded,
    usable_cores,
)
from benchmarks.harness import peak_rss_mb as peak_mb

STRATEGIES = ("fedavg", "weighted", "median", "trimmed_mean")
STEPS_OVER = 500
"""Deltas over which the single steps are timed."""

Listed = list[tuple[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--deltas", type=int, nargs="+", help="numbers of deltas (100 1000, or up to 10000 with --full)")


def run(options: argparse.Namespace) -> Report:
    counts = sorted(options.deltas or ([100, 1000, 10_000] if options.full else [100, 1000]))
    sizes = {}
    with TemporaryDirectory(prefix="aivo-bench-") as folder:
        in_child("benchmarks.aggregation:write", {"folder": folder, "count": counts[-1]})
        for count in counts:
            sizes[str(count)] = _one_size(folder, count, options.repeats)
        steps = in_child("benchmarks.aggregation:steps", {"folder": folder, "count": counts[-1]}, threads=1).result
    figures = {"numbers_each": TAIL_NUMBERS, "threads": usable_cores(), "sizes": sizes, "microseconds_per_delta": steps}
    return Report(figures=figures, tables=[_table(sizes), _steps_table(steps)], packages=("django",))


def _one_size(folder: str, count: int, repeats: int) -> dict[str, Any]:
    arguments = {"folder": folder, "count": count, "repeats": repeats}
    passes = in_child("benchmarks.aggregation:passes", arguments, threads=1).result
    found: dict[str, Any] = {"bytes": 4 * TAIL_NUMBERS * count, "passes": passes, "strategies": {}}
    for name in STRATEGIES:
        for threads in sorted({1, usable_cores()}):
            done = in_child("benchmarks.aggregation:aggregate", {**arguments, "strategy": name}, threads=threads).result
            for reading in (done, done["after_intake"]):
                reading["over_memory_pass"] = ratio(reading["wall_s"], passes["memory_pass_s"])
                reading["over_file_pass"] = ratio(reading["wall_s"], passes["file_pass_s"])
            found["strategies"].setdefault(name, {})[f"threads_{threads}"] = done
    return found


def write(folder: str, count: int) -> None:
    """Write the delta files and the list of them. Called in a child process."""
    installation.opened(folder)
    from aivo_core.network import NetworkSpec
    from models_store import store

    spec = NetworkSpec()
    lines = []
    for number in range(count):
        delta = np.random.default_rng(number).normal(scale=1e-3, size=spec.tail_size).astype(np.float32)
        file = store.write_delta(learner_id=f"bench-{number:05d}", session_id=str(UUID(int=number)), spec=spec, delta=delta)
        lines.append(f"{file.path} {file.sha256}\n")
    (Path(folder) / "deltas.txt").write_text("".join(lines))


def passes(folder: str, count: int, repeats: int) -> dict[str, float]:
    """Seconds of the two baselines. Called in a child process."""
    in_memory = memory_pass(4 * TAIL_NUMBERS * count, repeats=repeats).wall
    paths = [str(Path(folder) / "learners" / path) for path, _sha in _listed(folder, count)]
    buffer = bytearray(Path(paths[0]).stat().st_size)
    start = 8 + int.from_bytes(Path(paths[0]).read_bytes()[:8], "little")
    row = np.frombuffer(buffer, dtype=np.float32, offset=start)
    accumulator = np.zeros(TAIL_NUMBERS)

    def one_pass() -> None:
        for path in paths:
            handle = os.open(path, os.O_RDONLY)
            if os.readv(handle, [buffer]) != len(buffer):
                raise RuntimeError(f"{path} is shorter than the others")
            os.close(handle)
            np.add(accumulator, row, out=accumulator)

    return {"memory_pass_s": rounded(in_memory), "file_pass_s": rounded(measure(one_pass, repeats=repeats).wall)}


def aggregate(folder: str, count: int, repeats: int, strategy: str) -> dict[str, Any]:
    """Time and memory of the product's aggregation as a round calls it. Called in a child process."""
    installation.opened(folder)
    from aivo_core.network import NetworkSpec
    from federation import strategies
    from federation.rounds import folding
    from federation.rounds.cohort import DiscountedDelta
    from models_store.delta_files import sound_files
    from models_store.store import DeltaFile

    spec, chosen = NetworkSpec(), strategies.get(strategy)
    base = resident_mb()
    reset_peak_rss()
    weights = chosen.weigh(1 + np.arange(count) % 200)
    members = [
        folding.Member(UUID(int=row), UUID(int=row), float(weights[row]), (DiscountedDelta(DeltaFile(path, sha256), 1.0),))
        for row, (path, sha256) in enumerate(_listed(folder, count))
    ]

    def combine() -> np.ndarray[Any, Any]:
        if isinstance(chosen, strategies.CoordinateStrategy):
            return folding.combine_members(members, strategy=chosen, spec=spec).vector
        return folding.fold_members(members, strategy=strategies.get_fold(strategy), spec=spec).finish().vector

    digests = set()

    def first_reading() -> None:
        sound_files.forget()
        after_intake()

    def after_intake() -> None:
        digests.add(hashlib.sha256(combine().tobytes()).hexdigest())

    timing = measure(first_reading, repeats=repeats, warmups=1)
    again = measure(after_intake, repeats=repeats, warmups=0)
    if len(digests) != 1:
        raise RuntimeError("the same deltas gave different updates")
    return {
        **timing.figures(),
        **timing.rates(count),
        "after_intake": {**again.figures(), **again.rates(count)},
        "peak_above_base_mb": rounded(peak_mb() - base),
        "base_mb": rounded(base),
        "sha256": digests.pop(),
    }


def steps(folder: str, count: int) -> dict[str, float]:
    """Microseconds per delta of each part of reading and summing, on one thread. Called in a child process."""
    installation.opened(folder)
    from aivo_core.network import NetworkSpec
    from aivo_core.privacy import global_norm
    from federation import strategies
    from models_store import files, local_files, store
    from models_store.delta_files import sound_files
    from models_store.store import LEARNER_MODELS, DeltaFile, DeltaReader

    spec = NetworkSpec()
    listed = _listed(folder, min(count, STEPS_OVER))
    root = Path(folder) / "learners"
    buffer = memoryview(bytearray(300_000))
    reader = DeltaReader(spec)
    row = store.read_delta(path=listed[0][0], sha256=listed[0][1], spec=spec)
    whole = files.read_file(alias=LEARNER_MODELS, path=listed[0][0], sha256=listed[0][1])

    def fold_all() -> None:
        fold = strategies.get_fold("fedavg").start(spec.tail_size)
        for _ in listed:
            fold.add(row, 3.0)
        fold.finish()

    timed: dict[str, Callable[[], object]] = {
        "open_and_read": lambda: [local_files.read_into(root, path, buffer) for path, _sha in listed],
        "sha256": lambda: [files.checksum(whole) for _ in listed],
        "finite_check": lambda: [np.isfinite(row).all() for _ in listed],
        "read_and_verify": lambda: [sound_files.forget(), *(reader.read(DeltaFile(path, sha256)) for path, sha256 in listed)],
        "read_verified": lambda: [reader.read(DeltaFile(path, sha256)) for path, sha256 in listed],
        "fold": fold_all,
        "norm": lambda: [global_norm(row) for _ in listed],
    }
    return {name: rounded(1e6 * measure(function, repeats=3).wall / len(listed)) for name, function in timed.items()}


def _listed(folder: str, count: int) -> Listed:
    lines = (Path(folder) / "deltas.txt").read_text().splitlines()[:count]
    return [(path, sha256) for path, sha256 in (line.split() for line in lines)]


def _table(sizes: dict[str, Any]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for count, found in sizes.items():
        in_memory = found["passes"]["memory_pass_s"]
        for label, key in (("memory pass", "memory_pass_s"), ("file pass", "file_pass_s")):
            seconds = found["passes"][key]
            rows.append((label, "", int(count), 1, seconds, None, ratio(seconds, in_memory), None, None))
        for name, by_threads in found["strategies"].items():
            for threads, done in by_threads.items():
                for label, reading in (("first reading", done), ("after intake", done["after_intake"])):
                    shown = [reading[key] for key in ("wall_s", "cpu_s", "over_memory_pass", "over_file_pass")]
                    rows.append(
                        (name, label, int(count), int(threads.removeprefix("threads_")), *shown, done["peak_above_base_mb"])
                    )
    headers = ("strategy", "files", "deltas", "threads", "wall s", "CPU s", "memory passes", "file passes", "peak MB above base")
    return Table("Aggregation", headers, rows)


def _steps_table(steps: dict[str, float]) -> Table:
    return Table("One delta on one thread", ("step", "µs"), list(steps.items()))


BENCHMARK = Benchmark(name="aggregation", description=__doc__, run=run, add_arguments=add_arguments)

if __name__ == "__main__":
    BENCHMARK.main()
