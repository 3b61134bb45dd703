"""Simulated learners as a file in the canonical CSV form."""

from __future__ import annotations

import csv
import gzip
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from learners.simulator import ROW_COLUMNS, Simulator


@dataclass(frozen=True)
class SimulatedFile:
    """What was written."""

    rows: int
    mean_score: float


def write_simulated_csv(
    *, simulator: Simulator, events: int, path: Path, progress: Callable[[int, int, str], None] | None = None
) -> SimulatedFile:
    """Write all rows of ``simulator``; the file appears under its name when it is complete. The same call writes the same bytes.

    Args:
        events: mean number per learner, at least 2.
        path: compressed if its name ends in ``.gz``.
        progress: called after each learner with learners done, learners in all, and a text.

    Raises:
        ValueError: ``events`` is below 2.
        OSError: the folder cannot be written.
    """
    rows, right = 0, 0
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as raw:
        temporary = Path(raw.name)
        try:
            # No name and no time inside, so that equal contents are equal files.
            packed = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else None
            text = io.TextIOWrapper(packed or raw, encoding="utf-8", newline="", write_through=True)
            writer = csv.DictWriter(text, ROW_COLUMNS)
            writer.writeheader()
            for index in range(simulator.size):
                for row in simulator.rows(events=events, indices=[index]):
                    writer.writerow(row)
                    rows += 1
                    right += row["score"]
                if progress is not None:
                    progress(index + 1, simulator.size, "")
            text.detach()  # flushed, and left open: the layers below are closed by whoever opened them
            if packed is not None:
                packed.close()
            raw.flush()
            os.fsync(raw.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return SimulatedFile(rows, right / rows)
