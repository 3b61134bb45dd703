"""What every benchmark stands on: timing, memory, child processes, the memory-pass baseline, tables and JSON.

A benchmark is one module of this package with a ``run(options) -> Report`` and, at its end::

    BENCHMARK = Benchmark(name="aggregation", description=__doc__, run=run, add_arguments=add_arguments)

    if __name__ == "__main__":
        BENCHMARK.main()

``python -m benchmarks.<name> [--json] [--full] [--repeats N]`` then prints tables, or exactly one JSON object:
``benchmark``, ``size`` (``quick``, or ``full``: the sizes that docs/performance.md quotes), ``seconds``, ``machine``,
``versions`` and the report's figures. ``python -m benchmarks`` (``make bench``) runs the modules named in
``benchmarks.__main__.MODULES``, each in a process of its own. ``options`` is the parsed command line: ``options.full``,
``options.repeats`` and whatever ``add_arguments`` declared.

The pieces:

``measure(function, repeats=, warmups=)``
    -> ``Timing``: medians and spread of wall and CPU seconds; ``.rates(count)`` gives units per wall and per CPU second,
    ``.figures()`` what belongs in the report's ``medians``.
``in_child("benchmarks.aggregation:_aggregate", arguments, threads=1)``
    -> ``ChildRun``: calls a module's function with JSON arguments in a fresh interpreter whose numerical libraries are
    limited to ``threads`` from the start, and gives its JSON result with the process's memory before and at its peak.
    Every engine that is compared with another one is measured this way, so that none pays for, or profits from, what the
    other loaded.
``resident_mb()``, ``peak_rss_mb()``, ``reset_peak_rss()``
    Memory of the calling process; reset the peak before the part that counts.
``memory_pass(size)``
    -> ``Timing`` of one pass over ``size`` bytes of float32 in memory, row by row into a float64 accumulator: the least
    that any aggregation over so many bytes has to do.
``Report``, ``Table``
    Figures for the JSON object, tables for people. ``ratio``, ``rounded`` and ``share`` keep figures short.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TAIL_NUMBERS = 52_586
"""Numbers in the default network's tail: the row length of the memory pass."""

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)


@dataclass(frozen=True)
class Timing:
    """Repeated runs of one function, in seconds; ``wall`` and ``cpu`` are medians.

    Attributes:
        wall, cpu: elapsed time, and CPU time of all threads of the process.
        wall_lowest, wall_highest: of the repeats.
    """

    wall: float
    cpu: float
    wall_lowest: float
    wall_highest: float
    repeats: int

    def rates(self, count: float) -> dict[str, float]:
        """Units per wall second and per CPU second, where one run works on ``count`` units."""
        return {"per_second": rounded(count / self.wall), "per_cpu_second": rounded(count / max(self.cpu, 1e-9))}

    def figures(self) -> dict[str, float]:
        """For the report: medians, the lowest and highest wall time, the repeats."""
        return {
            "wall_s": rounded(self.wall),
            "cpu_s": rounded(self.cpu),
            "wall_lowest_s": rounded(self.wall_lowest),
            "wall_highest_s": rounded(self.wall_highest),
            "repeats": self.repeats,
        }


def measure(
    function: Callable[[], object], *, repeats: int = 5, warmups: int = 1, before: Callable[[], object] | None = None
) -> Timing:
    """Time ``function`` in this process.

    Args:
        warmups: runs that are not counted.
        before: called, not timed, before every run.
    """
    for _ in range(warmups):
        if before is not None:
            before()
        function()
    walls, cpus = [], []
    for _ in range(repeats):
        if before is not None:
            before()
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return Timing(
        wall=statistics.median(walls),
        cpu=statistics.median(cpus),
        wall_lowest=min(walls),
        wall_highest=max(walls),
        repeats=repeats,
    )


def memory_pass(size: int, *, row_numbers: int = TAIL_NUMBERS, repeats: int = 3) -> Timing:
    """Time ``accumulator += row`` (float64 += float32) over ``size`` bytes of rows that lie in memory already.

    Args:
        size: bytes of float32, rounded down to whole rows, at least one.
    """
    rows = np.ones((max(1, size // (4 * row_numbers)), row_numbers), dtype=np.float32)
    accumulator = np.zeros(row_numbers, dtype=np.float64)

    def one_pass() -> None:
        for row in rows:
            np.add(accumulator, row, out=accumulator)

    return measure(one_pass, repeats=repeats, warmups=1)


def resident_mb() -> float:
    """Resident memory of this process, in MB of 2^20 bytes."""
    return _status_kb("VmRSS") / 1024


def peak_rss_mb() -> float:
    """Highest resident memory of this process so far, or since ``reset_peak_rss``, in MB of 2^20 bytes.

    Linux's ``VmHWM``: ``ru_maxrss`` would count what the parent held when it started this process.
    """
    return _status_kb("VmHWM") / 1024


def reset_peak_rss() -> None:
    """Let ``peak_rss_mb`` count from here (Linux: proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status_kb(field_name: str) -> int:
    if not sys.platform.startswith("linux"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"the kernel does not report {field_name}")


@dataclass(frozen=True)
class ChildRun:
    """What a child process gave back.

    Attributes:
        result: the function's JSON result.
        base_rss_mb: resident memory when the function was called, its module imported.
        peak_rss_mb: highest resident memory of the child.
        wall_s: of the child from start to end, interpreter and imports included.
    """

    result: Any
    base_rss_mb: float
    peak_rss_mb: float
    wall_s: float


def in_child(
    target: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    threads: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> ChildRun:
    """Call ``module:function`` with keyword ``arguments`` (JSON) in a fresh interpreter.

    Args:
        threads: limit for BLAS, OpenMP, Numba and TensorFlow, set before the interpreter starts; None sets none.
        environment: further variables.

    Raises:
        RuntimeError: the child failed; the message ends with what it wrote last.
    """
    variables = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")
    if threads is not None:
        variables.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    variables.update(environment or {})
    with tempfile.TemporaryDirectory(prefix="aivo-bench-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks._child", target, json.dumps(dict(arguments or {})), str(answer)]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - started
        if done.returncode != 0:
            raise RuntimeError(f"{target} ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
        told = json.loads(answer.read_text())
    return ChildRun(result=told["result"], base_rss_mb=told["base_rss_mb"], peak_rss_mb=told["peak_rss_mb"], wall_s=rounded(wall))


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in MB, operating system."""
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "os": platform.platform(),
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python, the product, NumPy, Numba and ``packages`` as installed; None where one is not. Imports nothing."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "product": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
    }
    for package in ("numpy", "numba", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Table:
    """Rows for people; cells are shown as they are, numbers short, None as a dash."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def text(self) -> str:
        cells = [list(self.headers), *[[_shown(cell) for cell in row] for row in self.rows]]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.headers))]
        lines = [
            "  ".join(_aligned(cell, width, index) for index, (cell, width) in enumerate(zip(row, widths, strict=True)))
            for row in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.title, *[line.rstrip() for line in lines]])


@dataclass(frozen=True)
class Report:
    """Of one benchmark: ``figures`` join the JSON object, ``tables`` and ``notes`` are printed.

    Attributes:
        packages: distributions beyond NumPy and Numba whose versions belong to the figures.
    """

    figures: Mapping[str, Any]
    tables: Sequence[Table]
    notes: Sequence[str] = field(default=())
    packages: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Benchmark:
    """One benchmark module's entry: see the module's docstring."""

    name: str
    description: str | None
    run: Callable[[argparse.Namespace], Report]
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Parse the command line, run, and print tables or one JSON object on standard output."""
        options = self.parse(arguments)
        started = time.perf_counter()
        report = self.run(options)
        about = {
            "benchmark": self.name,
            "size": "full" if options.full else "quick",
            "seconds": rounded(time.perf_counter() - started),
            "machine": machine(),
            "versions": versions(*report.packages),
        }
        if options.json:
            print(json.dumps({**about, **report.figures}))
            return
        print(_heading(about))
        for table in report.tables:
            print("\n" + table.text())
        for note in report.notes:
            print("\n" + note)

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """The command line as ``run`` takes it.

        Raises:
            SystemExit: wrong usage.
        """
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.{self.name}",
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument("--full", action="store_true", help="the sizes of docs/performance.md instead of quick ones")
        parser.add_argument("--repeats", type=int, default=3, help="runs per figure, of which the median counts")
        if self.add_arguments is not None:
            self.add_arguments(parser)
        options = parser.parse_args(arguments)
        if options.repeats < 1:
            parser.error("--repeats must be at least 1")
        return options


def rounded(value: float, digits: int = 4) -> float:
    """``value`` to ``digits`` significant digits."""
    return float(f"{value:.{digits}g}")


def ratio(value: float, baseline: float) -> float:
    """``value / baseline``, short; both in the same unit."""
    return rounded(value / baseline)


def share(part: float, whole: float) -> str:
    """``part / whole`` in per cent, for a table."""
    return f"{100 * part / whole:.0f} %"


def _heading(about: Mapping[str, Any]) -> str:
    on, used = about["machine"], about["versions"]
    installed = ", ".join(f"{name} {version}" for name, version in used.items() if version is not None)
    return (
        f"{about['benchmark']} ({about['size']} size, {about['seconds']:.0f} s)\n"
        f"{on['cpu']}, {on['cores']} cores, {on['memory_mb']} MB, {on['os']}\n{installed}"
    )


def _shown(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)
